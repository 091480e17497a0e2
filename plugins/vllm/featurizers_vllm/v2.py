"""vLLM's V2 model runner, which asks the model for a class of state and tells it of requests and passes.

Nothing here imports vLLM; `state_class` is given vLLM's class.
"""

from __future__ import annotations

from typing import Any

from featurizers_vllm.admission import Admission
from featurizers_vllm.rows import Rows


def state_class(base: type[Any], rows: Rows, admission: Admission) -> type[Any]:
    """Return a subclass of vLLM's ``DefaultModelState`` that tells `Rows` of requests and of each pass.

    Args:
        base: vLLM's class.
        rows: of the model.
        admission: which admitted the requests.
    """

    class EditedModelState(base):  # type: ignore[misc]
        """State of a model whose activations are edited."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._featurizers_numbers: dict[str, int] = {}

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            """Take up a request, also one that goes on after it was preempted."""
            super().add_request(req_index, new_req_data)
            params = new_req_data.sampling_params
            edits = admission.of(params.extra_args if params is not None else None)
            rows.add(req_index, edits, len(new_req_data.prompt_token_ids or ()))
            self._featurizers_numbers[new_req_data.req_id] = req_index

        def remove_request(self, req_id: str) -> None:
            """Forget a request that is finished or preempted."""
            super().remove_request(req_id)
            number = self._featurizers_numbers.pop(req_id, None)
            if number is not None:
                rows.remove(number)

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> Any:
            """Write which slot each token of the pass belongs to; a captured graph reads it when it is replayed."""
            n, end = input_batch.num_reqs, input_batch.num_tokens
            rows.fill(
                input_batch.idx_mapping_np[:n],
                input_batch.query_start_loc_np[: n + 1],
                input_batch.positions[:end],
                input_batch.input_ids[:end],
            )
            return super().prepare_inputs(input_batch, req_states)

        def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> Any:
            """Write that no token is edited."""
            rows.clear()
            return super().prepare_dummy_inputs(num_reqs, num_tokens)

    return EditedModelState
