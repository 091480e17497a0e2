"""Path patching against the three passes of the method, by plain hooks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import featurizers
import pytest
import torch
from featurizers import Anatomy
from featurizers.errors import UsageError
from featurizers_patching import patch
from torch import Tensor, nn

from tests.support.models import fresh_model
from tests.support.patching import activations, packable, plain_hook, put

BASE, SOURCE = [5, 9, 3, 7, 11, 2], [6, 2, 14, 3, 9, 7]
SHORT, SHORT_SOURCE = [8, 1, 4, 6], [3, 12, 5, 1]
METRIC: dict[str, Any] = {"metric": ("logit_difference", 7, 9), "normalize": False}


def three_passes(
    model: Any,
    base: list[int],
    source: list[int],
    sender: Any,
    token: int,
    receivers: Sequence[Any],
    frozen: Sequence[str] = ("attn.out", "mlp.out"),
    *,
    value: Tensor | None = None,
) -> float:
    """Return the logit difference after path patching from one token of a sender to receivers, by plain hooks.

    The first pass reads the source at the sender and the base at all modules. In the second the sender is edited and
    every module gives its clean output, except the sender's own where it is computed from the edit. In the third the
    receivers get what they read in the second.
    """
    everywhere = [f"{kind}:{block}" for kind in frozen for block in range(Anatomy(model).n_layers)]
    clean = {site: activations(model, base, site) for site in everywhere}
    new = activations(model, source, sender) if value is None else value
    own = dict.fromkeys(("attn.z", "attn.q", "attn.v", "attn.k", "attn.out"), "attn.out")
    own |= dict.fromkeys(("mlp.act", "mlp.out"), "mlp.out")
    kind, *_ = sender.split(":")
    block = 0 if kind == "embed" else int(sender.split(":")[1])
    read: dict[Any, Tensor] = {}

    def keep(hidden: Tensor, site: Any) -> Tensor:
        read[site] = hidden
        return hidden

    with ExitStack() as stack:
        for site, values in clean.items():
            kept = list(range(len(base)))
            if site == f"{own.get(kind)}:{block}":
                # later tokens attend to an edited key or value
                kept = [t for t in kept if (t < token if kind in ("attn.k", "attn.v") else t != token)]
            stack.enter_context(plain_hook(model, site, put(kept, values)))
        stack.enter_context(plain_hook(model, sender, put([token], new)))
        for site in receivers:
            stack.enter_context(plain_hook(model, site, lambda hidden, site=site: keep(hidden, site)))
        with torch.no_grad():
            model(torch.tensor([base]), use_cache=False)
    with ExitStack() as stack:
        for site in receivers:
            stack.enter_context(plain_hook(model, site, put(range(len(base)), read[site])))
        with torch.no_grad():
            logits = model(torch.tensor([base]), use_cache=False).logits[0, -1]
    return float(logits[7] - logits[9])


def check(name: str, senders: Any, receivers: list[str], tokens: Sequence[int], **options: Any) -> float:
    """Compare a grid with the three passes, and return its largest effect."""
    model: Any = packable(name)
    prompts = [(BASE, SOURCE), (SHORT, SHORT_SOURCE)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grid = patch(
            model, [b for b, _ in prompts], [s for _, s in prompts], senders, receivers=receivers, **METRIC, **options
        )
    assert grid.about["packed"]
    assert grid.about["verified"] > 0
    frozen = options.get("freeze", ("attn.out", "mlp.out"))
    for b, (base, source) in enumerate(prompts):
        for s, site in enumerate(grid.sites):
            for token in tokens:
                if token < len(base):
                    expected = three_passes(model, base, source, str(site), token, receivers, frozen)
                    atol = 1e-6 if name == "gemma2" else 1e-10
                    assert abs(float(grid.raw[0, s, b, token]) - expected) < atol, (str(site), token)
    return float((grid.raw - grid.base[0, :, None]).abs().nan_to_num().max())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_heads_send_to_the_queries_keys_and_values_of_heads(name: str) -> None:
    n_keys = 4 if name == "gpt2" else 2
    receivers = ["attn.q:1:2", "attn.q:2:0", f"attn.k:2:{n_keys - 1}", "attn.v:1:0", "attn.v:2:1"]
    assert check(name, ["attn.z:0:*", "attn.z:1:3"], receivers, range(6)) > 1e-3
    for receiver in receivers:
        check(name, ["attn.z:0:1"], [receiver], [1, 4, 5])


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("frozen", [("attn.out", "mlp.out"), ("attn.out",)])
def test_any_site_sends_through_mlps_or_around_them(name: str, frozen: tuple[str, ...]) -> None:
    senders = ["resid.pre:1", "attn.out:0", "mlp.out:0", "mlp.act:0", "attn.z:0:2", "embed", "resid.post:0"]
    receivers = ["attn.v:2", "mlp.in:1", "attn.q:2:1"]
    assert check(name, senders, receivers, [2, 5], freeze=frozen) > 1e-3


@pytest.mark.parametrize("receivers", [["attn.v:1:1"], ["mlp.in:0"], ["attn.k:2:0", "attn.v:1:1", "mlp.in:1"]])
def test_keys_and_values_send_from_later_tokens_too(receivers: list[str]) -> None:
    senders = ["attn.k:0:1", "attn.v:0:0", "attn.v:1", "attn.q:0:3"]
    assert check("llama", senders, receivers, [0, 3, 5]) > 1e-3


def test_the_residual_stream_receives() -> None:
    assert check("llama", ["attn.z:0:1", "mlp.out:1"], ["resid.pre:2"], range(6)) > 1e-3
    assert check("llama", ["mlp.act:1", "attn.z:2:0"], ["resid.post:2"], [0, 5]) > 1e-3
    assert check("gpt2", ["resid.pre:1", "attn.q:1"], ["resid.pre:1", "attn.q:1:2"], [2, 5]) > 1e-3  # a sender receives


def test_without_receivers_after_it_a_sender_has_no_effect() -> None:
    grid = patch(packable("llama"), BASE, SOURCE, ["attn.z:2:0", "mlp.out:1"], receivers="attn.q:1:*", **METRIC)
    assert torch.equal(grid.raw[0, :, 0], grid.base[0, 0].expand(2, 6))


def test_every_receiver_is_the_whole_block_after_the_sender() -> None:
    """Queries, keys, values and the MLP's input together are all that a block reads, beside the stream itself."""
    model: Any = packable("gpt2")
    options: dict[str, Any] = {"sites": "attn.z:0:1", "positions": [2, 4], **METRIC}
    stream = patch(model, BASE, SOURCE, receivers=["resid.pre:1"], **options)
    whole = patch(model, BASE, SOURCE, freeze=(), **options)
    mlp = patch(model, BASE, SOURCE, receivers=["mlp.in:0"], **options)
    assert not torch.allclose(stream.raw, whole.raw)  # the MLP of block 0 reads the head too
    both = patch(model, BASE, SOURCE, receivers=["resid.pre:1"], freeze="attn.out", **options)
    torch.testing.assert_close(both.raw, whole.raw, rtol=0, atol=1e-10)
    assert not torch.allclose(mlp.raw, stream.raw)


def test_featurizers_spans_and_chunks() -> None:
    model: Any = packable("llama")
    f = featurizers.create("subspace", d_in=32, n_features=8, seed=0).double()
    options: dict[str, Any] = {"sites": "resid.pre:1", "featurizer": f, "receivers": ["attn.v:2"], **METRIC}
    grid = patch(model, BASE, SOURCE, **options)
    base, source = (activations(model, tokens, "resid.pre:1") for tokens in (BASE, SOURCE))
    value = f.interchange(base, source)
    for token in (0, 3):
        expected = three_passes(model, BASE, SOURCE, "resid.pre:1", token, ["attn.v:2"], value=value)
        assert abs(float(grid.raw[0, 0, 0, token]) - expected) < 1e-8
    for rows in (1, 5):
        torch.testing.assert_close(patch(model, BASE, SOURCE, batch_rows=rows, **options).raw, grid.raw)
    span = patch(model, BASE, SOURCE, positions=[[1, 3], "all"], **options)
    assert not torch.allclose(span.raw[..., 0], grid.raw[..., 1])


class Shifted(nn.Module):
    """A norm that adds a part of the token before."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return x + 0.5 * nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


def test_receivers_that_read_other_tokens_are_noticed() -> None:
    model: Any = fresh_model("llama").double().requires_grad_(False)
    for layer in model.model.layers:
        layer.input_layernorm = Shifted(layer.input_layernorm)
    with pytest.warns(UserWarning, match="cannot be patched on packed rows .*attn.v:1 differs from"):
        grid = patch(model, BASE, SOURCE, "mlp.out:0", receivers="attn.v:1", **METRIC)
    assert grid.about["packed"] is False
    for token in (0, 4):
        expected = three_passes(model, BASE, SOURCE, "mlp.out:0", token, ["attn.v:1"])
        assert abs(float(grid.raw[0, 0, 0, token]) - expected) < 1e-6


def test_a_model_off_packed_rows_gives_the_same_paths() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    model: Any = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=48)).eval().double()
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    with pytest.warns(UserWarning, match="cannot be patched on packed rows"):
        grid = patch(model, BASE, SOURCE, "mlp.act:0", receivers=["mlp.in:2", "attn.q:1:2"], **METRIC)
    for token in (1, 5):
        expected = three_passes(model, BASE, SOURCE, "mlp.act:0", token, ["mlp.in:2", "attn.q:1:2"])
        assert abs(float(grid.raw[0, 0, 0, token]) - expected) < 1e-5


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"receivers": "attn.z:1:0"}, "attn.z:1:0 cannot be a receiver"),
    ({"receivers": ["attn.q:1", "mlp.out:1"]}, "mlp.out:1 cannot be a receiver"),
    ({"receivers": "attn.q:1", "freeze": "mlp.out"}, "does not go with receivers"),
    ({"receivers": "attn.q:1", "freeze": ("attn.out", "attn.pattern")}, "does not go with receivers"),
    ({"receivers": "attn.q:1", "method": "gradient"}, "paths is not estimated"),
    ({"receivers": "attn.q:1", "screen": 3}, "paths is not estimated"),
    ({"receivers": "attn.q:1", "sites": "module:model.embed_tokens:output"}, "outside the blocks"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[message for _, message in WRONG])
def test_paths_that_there_are_not_are_refused(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"base": BASE, "source": SOURCE, "sites": "attn.z:0:0", **METRIC, **options}
    with pytest.raises(UsageError, match=message):
        patch(packable("llama"), **given)
