"""Sources and `collect` of padded prompts against the same prompts alone, and against the base itself."""

from __future__ import annotations

import featurizers
import pytest
import torch
from featurizers import Collect, Interchange, collect, intervene
from torch import Tensor, nn

from tests.support.models import ARCHITECTURES, WIDTH, module_of, prompts, read, tiny_model

torch.set_num_threads(1)

SITE = "resid.post:1"
TOKENS = [prompts(3, seed=5), prompts(6, seed=6)]

all_architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
sides = pytest.mark.parametrize("side", ["left", "right"])
POSITIONS = pytest.mark.parametrize("positions", [[-1], [0, 1], None], ids=["last", "first two", "all"])


def padded(side: str) -> dict[str, Tensor]:
    """Two prompts and their mask alone, without position ids."""
    ids, mask = torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long)
    for row, prompt in enumerate(TOKENS):
        own = slice(6 - len(prompt), 6) if side == "left" else slice(0, len(prompt))
        ids[row, own], mask[row, own] = prompt, 1
    return {"input_ids": ids, "attention_mask": mask}


def with_itself(model: nn.Module, inputs: dict[str, Tensor], positions: list[int] | None) -> dict[str, Interchange]:
    f = featurizers.create("identity", d_in=WIDTH)
    return {SITE: Interchange(f, source=inputs, positions=positions)}


def generated(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return torch.stack(model.generate(**inputs, **options).logits)


@all_architectures
@sides
@POSITIONS
def test_an_interchange_with_itself_changes_nothing(architecture, side, positions):
    model, inputs = tiny_model(architecture), padded(side)
    with torch.no_grad():
        clean = {"generate": generated(model, inputs), "forward": model(**inputs).logits}
        with intervene(model, with_itself(model, inputs, positions)):
            found = {"generate": generated(model, inputs), "forward": model(**inputs).logits}
    for way, logits in clean.items():
        torch.testing.assert_close(found[way], logits, rtol=0, atol=1e-5, msg=way)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neo", "llama"])
@sides
def test_collect_of_a_padded_prompt_is_that_of_the_prompt_alone(architecture, side):
    model = tiny_model(architecture)
    module, module_side = module_of(model, architecture, "resid.post", 1)
    found = collect(model, padded(side), [SITE], positions=[0, -1])[SITE]
    for row, prompt in enumerate(TOKENS):
        alone = read(model, module, module_side, input_ids=prompt.unsqueeze(0))[0]
        torch.testing.assert_close(found[row], alone[[0, -1]], rtol=0, atol=2e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neo", "llama"])
def test_a_padded_source_is_that_of_the_prompt_alone_in_a_base_without_padding(architecture):
    model, base = tiny_model(architecture), {"input_ids": prompts(2, 4, seed=9)}
    module, module_side = module_of(model, architecture, "resid.post", 1)
    f = featurizers.create("identity", d_in=WIDTH)
    swap = Interchange(f, source=padded("left"), positions=[-1])
    with torch.no_grad(), intervene(model, {SITE: [swap, Collect(f, positions=[-1])]}) as collected:
        model(**base)
    for row, prompt in enumerate(TOKENS):
        alone = read(model, module, module_side, input_ids=prompt.unsqueeze(0))[0, -1]
        torch.testing.assert_close(collected[SITE][row, 0], alone, rtol=0, atol=2e-5)


def test_position_ids_that_are_given_are_used():
    model, inputs = tiny_model("gpt2"), {**padded("left"), "position_ids": torch.arange(6).expand(2, -1)}
    module, side = module_of(model, "gpt2", "resid.post", 1)
    assert torch.equal(collect(model, inputs, [SITE])[SITE], read(model, module, side, **inputs))
