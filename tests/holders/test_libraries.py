"""Models that nnsight and interp-engine hold."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from featurizers.testing import Held, HolderContract
from torch import Tensor, nn

from tests.support import nnsight_models
from tests.support.holders import places
from tests.support.models import MODULES, fresh_model

torch.set_num_threads(1)


class InTraces(Held):
    """A model of nnsight that is edited in the body of its traces."""

    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        with self.holder.trace(**inputs):
            logits = self.holder.output.logits.save()
        return logits

    def run(self, operations: Any, inputs: Any) -> tuple[Tensor, dict[str, Any]]:
        import nnsight
        from featurizers_nnsight import edit

        with self.holder.trace(**inputs):
            collected = nnsight.save(edit(self.holder, operations))
            logits = self.holder.output.logits.save()
        return logits, collected

    def generate(self, operations: Any, inputs: Any, **options: Any) -> tuple[Tensor, dict[str, Any]]:
        from featurizers_nnsight import edit

        ids, rest = inputs["input_ids"], {name: value for name, value in inputs.items() if name != "input_ids"}
        with self.holder.generate(ids, **rest, **options) as tracer:
            for _ in tracer.iter[: options["max_new_tokens"]]:
                edit(self.holder, operations)
            tokens = tracer.result.save()
        return tokens, {}


def of_nnsight(kind: type[Held], architecture: str = "llama") -> Held:
    pytest.importorskip("nnsight")
    plain = fresh_model(architecture).requires_grad_(False)
    lm = nnsight_models.held(plain)
    return kind(lm, plain, places(MODULES[architecture], 8), hooked=lm._module)


class TestTrace(HolderContract):
    title = "nnsight, edit in a trace"
    left_out: ClassVar = {"generate, collect": "edit returns what one step collects"}

    @classmethod
    def make(cls) -> Held:
        return of_nnsight(InTraces)


class AroundTraces(InTraces):
    """A model of nnsight in a context of `featurizers.intervene`."""

    def run(self, operations: Any, inputs: Any) -> tuple[Tensor, dict[str, Any]]:
        return Held.run(self, operations, inputs)

    def generate(self, operations: Any, inputs: Any, **options: Any) -> tuple[Tensor, dict[str, Any]]:
        import featurizers

        ids, rest = inputs["input_ids"], {name: value for name, value in inputs.items() if name != "input_ids"}
        with (
            featurizers.intervene(self.holder, operations) as collected,
            self.holder.generate(ids, **rest, **options) as tracer,
        ):
            tokens = tracer.result.save()
        return tokens, dict(collected)


class TestAroundTraces(HolderContract):
    title = "nnsight, intervene around a trace"

    @classmethod
    def make(cls) -> Held:
        return of_nnsight(AroundTraces, "gpt2")


class WithEngine(Held):
    """An eager model of interp-engine, whose model of transformers is called."""

    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.holder.hf_model(**inputs).logits  # type: ignore[no-any-return]

    def generate(self, operations: Any, inputs: Any, **options: Any) -> tuple[Tensor, dict[str, Any]]:
        import featurizers

        with featurizers.intervene(self.holder, operations) as collected:
            tokens = self.holder.hf_model.generate(**inputs, **options)
        return tokens, dict(collected)


class TestInterpEngine(HolderContract):
    title = "interp-engine, eager"

    @classmethod
    def make(cls) -> Held:
        engine = pytest.importorskip("interp_engine")
        plain: nn.Module = fresh_model("llama").requires_grad_(False)
        words = nnsight_models.tokenizer()
        holder = engine.EagerModel("tiny", hf_model=copy.deepcopy(plain), tokenizer=words, device="cpu")
        return WithEngine(holder, plain, places(MODULES["llama"], 8), hooked=holder.hf_model)
