"""Fidelity, compared with plain torch hooks, scipy's rank correlation, and a model with a known answer."""

import warnings

import pytest
import torch
from featurizers.errors import ShapeError, SiteError, UsageError
from featurizers_causal_basis import (
    BasisRecord,
    CausalBasisFeaturizer,
    MassiveTokenWarning,
    causal_fidelity,
    derange,
)
from featurizers_causal_basis.fidelity import spearman
from featurizers_causal_basis.pictures import energies_by_layer, fidelity_plot

from tests.support.models import VOCABULARY, WIDTH, fresh_model, hooked, hooks_of, module_of, prompts, read, tiny_model

pytestmark = pytest.mark.filterwarnings("error::featurizers_causal_basis.MassiveTokenWarning")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def basis(k=3, mode="mean", site="resid.post:1", d=WIDTH):
    vectors = torch.linalg.qr(normal(d, k).double()).Q.float()
    side = "input" if site.startswith("resid.pre") else "output"
    record = BasisRecord(mode=mode, side=side, readout="logit-lens", n_tokens=10)
    return CausalBasisFeaturizer.of(vectors, torch.linspace(1, 0.1, k), normal(d, seed=4), record, site=site)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("mode", ["mean", "zero", "resample"])
@pytest.mark.parametrize("site", ["resid.pre:1", "resid.post:1"])
def test_it_agrees_with_plain_hooks(architecture, mode, site):
    model, f = tiny_model(architecture), basis(mode=mode, site=site)
    ids = prompts(5, 6)
    mask = torch.ones(5, 6, dtype=torch.bool)
    mask[:, 0] = mask[3, 4:] = False
    fidelity = causal_fidelity(f, model, ids, mask=mask, seed=3, batch_size=2)

    module, side = module_of(model, architecture, site.partition(":")[0], 1)
    hidden = read(model, module, side, input_ids=ids)

    def by_hand(v):
        part = hidden @ v
        target = torch.zeros(()) if mode == "zero" else f.mean @ v
        if mode == "resample":
            target = part.clone()
            target[mask] = derange(part[mask], torch.Generator().manual_seed(3))

        def edit(h):
            return torch.where(mask[..., None], h + (target - h @ v)[..., None] * v, h)

        with torch.no_grad():
            clean = model(ids).logits.double().log_softmax(-1)
            with hooked(module, side, edit):
                edited = model(ids).logits.double().log_softmax(-1)
        return float((clean.exp() * (clean - edited)).sum(-1)[mask].mean())

    expected = torch.tensor([by_hand(v) for v in f.vectors.mT], dtype=torch.float64)
    torch.testing.assert_close(fidelity.model_kl, expected, rtol=1e-3, atol=1e-6)
    assert expected.min() > 1e-4
    assert fidelity.n_tokens == int(mask.sum()) == 23


@pytest.mark.parametrize("mode", ["mean", "resample"])
def test_the_batch_size_does_not_matter_and_hooks_are_removed(mode):
    model, f, ids = tiny_model("gpt2"), basis(mode=mode), prompts(5, 6)
    before = hooks_of(model)
    one = causal_fidelity(f, model, ids, batch_size=5)
    for size in (1, 2, 9):
        other = causal_fidelity(f, model, ids, batch_size=size)
        for name in ("model_kl", "control_kl"):
            torch.testing.assert_close(getattr(other, name), getattr(one, name), rtol=1e-4, atol=1e-7)
    assert hooks_of(model) == before
    assert not torch.equal(causal_fidelity(f, model, ids, seed=1).control_kl, one.control_kl)


def test_padding_is_left_out():
    model, f = tiny_model("llama"), basis(mode="resample")
    short = prompts(2, 4)
    plain = causal_fidelity(f, model, short)
    padded = torch.cat([torch.full((2, 3), 7), short], dim=1)
    attention = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 4, dtype=torch.long)], dim=1)
    fidelity = causal_fidelity(f, model, {"input_ids": padded, "attention_mask": attention})
    assert fidelity.n_tokens == 8
    torch.testing.assert_close(fidelity.model_kl, plain.model_kl, rtol=1e-3, atol=1e-6)


def test_the_direction_that_the_model_reads_differs_from_random_ones():
    """Ablate the last block in a direction that the head reads fifty times as strongly as any other."""
    model = fresh_model("gpt2")
    strong = torch.linalg.qr(normal(WIDTH, WIDTH).double()).Q.float()
    with torch.no_grad():
        scale = torch.full((WIDTH,), 0.02)
        scale[0] = 1.0
        model.lm_head.weight.copy_(normal(VOCABULARY, WIDTH, seed=9) @ strong @ scale.diag() @ strong.mT)
    record = BasisRecord(mode="zero", side="output", readout="model", n_tokens=10)
    f = CausalBasisFeaturizer.of(
        strong[:, :4], torch.tensor([1.0, 0.1, 0.01, 0.001]), torch.zeros(WIDTH), record, site="resid.post:2"
    )
    fidelity = causal_fidelity(f, model, prompts(4, 6))
    assert fidelity.model_kl[0] > 10 * fidelity.model_kl[1:].max()
    assert fidelity.model_kl[0] > 5 * fidelity.control_kl.median()
    assert fidelity.record()["units"] == "nats/token"


def test_rank_correlation_agrees_with_scipy():
    scipy_stats = pytest.importorskip("scipy.stats")
    for seed in range(5):
        x, y = normal(12, seed=seed), normal(12, seed=seed + 50)
        for a, b in ((x, y), (x.round(), y.round()), (x, x.exp()), (x, -x)):
            assert spearman(a, b) == pytest.approx(float(scipy_stats.spearmanr(a, b).statistic), abs=1e-12)
    assert spearman(torch.ones(4), normal(4)) is None
    assert spearman(torch.ones(1), torch.ones(1)) is None


def test_a_massive_first_token_causes_a_warning_unless_it_is_masked():
    model = fresh_model("gpt2")
    with torch.no_grad():
        model.transformer.wpe.weight[0] += 1000 * normal(WIDTH)
    f, ids = basis(), prompts(3, 6)
    with pytest.warns(MassiveTokenWarning, match="3 of 18 tokens, at position 0, are up to .* leave them out"):
        causal_fidelity(f, model, ids)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[:, 0] = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        causal_fidelity(f, model, ids, mask=mask)


def test_wrong_input_is_refused_in_one_line():
    model, f, ids = tiny_model("gpt2"), basis(), prompts(2, 5)
    nowhere = basis()
    nowhere.site = None
    for error, words, arguments in [
        (UsageError, "does not say where it belongs", {"basis": nowhere}),
        (UsageError, "leaves out every token", {"mask": torch.zeros(2, 5, dtype=torch.bool)}),
        (UsageError, "batch_size", {"batch_size": 0}),
        (ShapeError, "a mask has one boolean", {"mask": torch.ones(2, 4, dtype=torch.bool)}),
        (ShapeError, "token ids", {"tokens": ids[0]}),
        (ShapeError, "token ids", {"tokens": {"inputs_embeds": normal(2, 5, WIDTH)}}),
        (SiteError, "3 layers", {"basis": basis(site="resid.post:7")}),
        (
            UsageError,
            "leaves no token in its place",
            {"basis": basis(mode="resample"), "mask": torch.arange(10).reshape(2, 5) == 3},
        ),
    ]:
        with pytest.raises(error, match=words):
            causal_fidelity(**{"basis": f, "model": model, "tokens": ids, **arguments})
    with pytest.raises(UsageError, match="training mode"):
        causal_fidelity(f, fresh_model("gpt2").train(), ids)


def test_pictures_show_every_energy():
    f = basis(mode="zero")
    fidelity = causal_fidelity(f, tiny_model("gpt2"), prompts(2, 5))
    (points, *_) = fidelity_plot(fidelity).axes[0].lines
    assert list(points.get_ydata()) == fidelity.model_kl.tolist()
    assert list(points.get_xdata()) == fidelity.energies.tolist()
    figure = energies_by_layer({"resid.post:0": f})
    figure.canvas.draw()
    ticks = figure.axes[0].yaxis.get_ticklabels(which="both")
    assert all(float(tick.get_text()) > 0 for tick in ticks if tick.get_text())
    assert any(tick.get_text() for tick in ticks)
    drawn = energies_by_layer({"resid.post:0": f, "resid.post:1": f.truncate(2)}).axes[0]
    assert [list(line.get_ydata()) for line in drawn.lines] == [f.energies.tolist(), f.energies[:2].tolist()]
    assert [text.get_text() for text in drawn.get_legend().get_texts()] == ["resid.post:0", "resid.post:1"]
    with pytest.raises(UsageError, match="no basis"):
        energies_by_layer({})
