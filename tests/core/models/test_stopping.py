"""Forward passes that end early."""

import pytest
import torch
from featurizers.models import run_until, stoppable
from torch import nn

from tests.support.models import ARCHITECTURES, LAYERS, fresh_model, hooks_of, module_of, prompts, read, tiny_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_runs_after_the_module(architecture):
    model = fresh_model(architecture)
    before, side = module_of(model, architecture, "resid.post", 1)
    after, _ = module_of(model, architecture, "resid.post", 2)
    ran = [module.register_forward_hook(lambda m, *_: seen.append(m)) for module in (before, after)]
    seen: list[nn.Module] = []
    with torch.no_grad():
        assert run_until(before, lambda: model(input_ids=prompts(1, 4))) is None
    assert seen == [before]
    for handle in ran:
        handle.remove()
    assert hooks_of(model) == []
    assert read(model, after, side, input_ids=prompts(1, 4)).isfinite().all()


def test_a_call_that_does_not_pass_the_module_returns_its_result():
    assert run_until(nn.Linear(2, 2), lambda: 5) == 5


def test_other_errors_pass_and_the_hook_is_removed():
    model = tiny_model("llama")
    with pytest.raises(KeyError):
        run_until(model.model.norm, lambda: {}["x"])
    assert hooks_of(model) == []


def test_no_code_of_a_model_handles_the_stop():
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                return self.inner(x)
            except Exception:
                return x

    model = Careful()
    assert run_until(model.inner, lambda: model(torch.zeros(2))) is None


@pytest.mark.parametrize("outer_first", [True, False])
def test_each_of_two_nested_blocks_ends_its_own(outer_first):
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(LAYERS)])
    outer, inner = (model[0], model[1]) if outer_first else (model[1], model[0])
    reached = []

    def call() -> None:
        run_until(inner, lambda: model(torch.zeros(2)))
        reached.append("inner ended")

    assert run_until(outer, call) is None
    assert reached == ([] if outer_first else ["inner ended"])


def test_a_function_ends_the_block_that_it_was_made_for():
    steps = []
    with stoppable() as stop_outer:
        with stoppable():
            steps.append("inner")
            stop_outer()
        steps.append("between")
    steps.append("after")
    assert steps == ["inner", "after"]
