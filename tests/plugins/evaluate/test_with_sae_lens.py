"""Numbers that SAELens computes too, beside `sae_lens.evals.run_evals` on the same dictionary, model and tokens."""

from __future__ import annotations

import warnings
from typing import Any

import featurizers
import pytest
import torch
from featurizers_evaluate import DEFINITIONS

from tests.support.models import fresh_model

LAYER, WIDTH, BOS = 1, 32, 3


@pytest.fixture(scope="module")
def lens() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("sae_lens")
        return pytest.importorskip("transformer_lens")


class Tokenizer:
    """A tokenizer as far as `sae_lens.evals` asks for one."""

    padding_side = "right"
    bos_token_id = BOS
    eos_token_id = 5
    pad_token_id = sep_token_id = decoder_start_token_id = None
    additional_special_tokens_ids: tuple[int, ...] = ()
    special_tokens_map: dict[str, str] = {}  # noqa: RUF012


@pytest.fixture(scope="module")
def run(lens: Any) -> Any:
    """Return both models, the dictionary of both libraries, the tokens, and SAELens' results by exclusion."""
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler
    from transformer_lens.pretrained.weight_conversions.gpt2 import convert_gpt2_weights

    from tests.support.sae_lens import make

    plain = fresh_model("gpt2").requires_grad_(False)
    cfg = lens.HookedTransformerConfig(
        n_layers=3, d_model=WIDTH, n_heads=4, d_head=8, d_mlp=48, n_ctx=64, d_vocab=64, act_fn="gelu_new"
    )
    hooked = lens.HookedTransformer(cfg)
    hooked.load_state_dict(convert_gpt2_weights(plain, cfg), strict=False)
    hooked.eval()
    hooked.tokenizer = Tokenizer()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(6, 64, (12, 16), generator=generator)
    tokens[:, 0] = BOS
    tokens[2, 7] = 5
    sae = make("topk", d_in=WIDTH, d_sae=48, k=5)
    sae.cfg.metadata.hook_name = f"blocks.{LAYER}.hook_resid_post"
    sae.cfg.metadata.hook_head_index = None

    class Store:
        store_batch_size_prompts = 12
        context_size = 16

        def get_batch_tokens(self, size: int) -> Any:
            return tokens

        def reset_input_dataset(self) -> None:
            pass

    found = {}
    config = get_eval_everything_config(12, 1, 1)
    for excluded in (False, True):
        scalars, features = run_evals(sae, Store(), hooked, ActivationScaler(), config, exclude_special_tokens=excluded)
        found[excluded] = {key: value for group in scalars.values() for key, value in group.items()} | features
    torch.testing.assert_close(hooked(tokens), plain(tokens).logits, rtol=1e-4, atol=1e-4)
    return plain, sae, tokens, found


@pytest.mark.parametrize("excluded", [False, True])
def test_every_number_is_that_of_sae_lens(run: Any, excluded: bool) -> None:
    from featurizers_sae_lens import wrap

    model, sae, tokens, found = run
    f = wrap(sae)
    result = featurizers.evaluate(
        f,
        model,
        tokens,
        site=f"resid.post:{LAYER}",
        batch_size=12,
        exclude_special_tokens=excluded,
        tokenizer=Tokenizer(),
        progress=False,
    )
    compared = {name: d.sae_lens for name, d in DEFINITIONS.items() if d.sae_lens}
    assert len(compared) == 16
    for name, key in compared.items():
        assert result[name] == pytest.approx(found[excluded][key], rel=2e-4, abs=1e-5), name
    density = torch.tensor(found[excluded]["feature_density"], dtype=torch.float64)
    assert result.density is not None
    torch.testing.assert_close(result.density, density, rtol=1e-6, atol=1e-7)
    assert result.about["tokens"] == 12 * 16 - (13 if excluded else 0)
    other = featurizers.evaluate(f, model, tokens, site=f"resid.post:{LAYER}", progress=False, batch_size=5)
    assert excluded is (other["mse"] != pytest.approx(result["mse"], rel=1e-9))
