"""Objects that hold a model and that no plugin knows: refused, and the module that they hold is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import featurizers
import pytest
import torch
from featurizers import Anatomy, Steer, collect, intervene
from featurizers.errors import UsageError
from torch import nn

from tests.support.models import WIDTH, prompts, tiny_model

IDS = prompts(2, 6, seed=1)
DELTA = torch.linspace(-2, 3, WIDTH)


def steer() -> Steer:
    return Steer(featurizers.create("identity", d_in=WIDTH), delta=DELTA)


class Wrapper:
    """As nnsight's LanguageModel: no module, but it holds one."""

    def __init__(self, model: nn.Module) -> None:
        self._module = model


@pytest.mark.parametrize("use", ["collect", "intervene", "attach", "anatomy"])
def test_a_wrapper_that_is_no_module_is_refused_and_its_module_named(use: str) -> None:
    wrapper: Any = Wrapper(tiny_model("llama"))
    featurizer = featurizers.create("identity", d_in=WIDTH)
    featurizer.site = "resid.post:1"
    uses: dict[str, Callable[[], Any]] = {
        "collect": lambda: collect(wrapper, {"input_ids": IDS}, ["resid.post:1"]),
        "intervene": lambda: intervene(wrapper, {"resid.post:1": steer()}).__enter__(),
        "attach": lambda: featurizers.attach(wrapper, featurizer),
        "anatomy": lambda: Anatomy(wrapper),
    }
    with pytest.raises(UsageError, match=r"not Wrapper, which holds one: pass that LlamaForCausalLM, model\._module"):
        uses[use]()


@pytest.mark.parametrize("given", [None, "gpt2", {"model": 1}, LookupError])
def test_what_holds_no_module_is_refused(given: Any) -> None:
    with pytest.raises(UsageError, match="the model is a torch module"):
        collect(given, {"input_ids": IDS}, ["resid.post:1"])
