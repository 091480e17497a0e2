"""`featurizers.evaluate` beside plain torch hooks and numpy, for each kind, and its refusals."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from typing import Any

import featurizers
import numpy as np
import pytest
import torch
from featurizers.errors import ArtefactError, ShapeError, UsageError
from featurizers_causal_basis import BasisRecord, CausalBasisFeaturizer, causal_fidelity
from featurizers_evaluate import DEFINITIONS, compare, sweep
from featurizers_evaluate.sums import Sums, Weights, interval
from featurizers_transcoder import Crosscoder, CrossLayerTranscoder, Transcoder
from torch.nn import functional

from tests.support.dictionaries import dictionary
from tests.support.models import fresh_model, hooked, module_of, read, save_language_model, tiny_model
from tests.support.site_maps import linear_map
from tests.support.site_maps import model as decoder

SITE = "resid.post:1"
IDS = torch.randint(0, 64, (24, 12), generator=torch.Generator().manual_seed(3))


def evaluated(f: Any, *, model: Any = None, tokens: Any = IDS, **options: Any) -> Any:
    own = {"site": SITE} if isinstance(f, featurizers.Featurizer) and f.site is None else {}
    return featurizers.evaluate(
        f, tiny_model("llama") if model is None else model, tokens, progress=False, **own, **options
    )


def sparse(**options: Any) -> Any:
    return dictionary("topk", d_in=32, k=5, **options)


def runs(model: Any, ids: torch.Tensor, edits: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return logits of the model alone and with each edit of the block's output, by plain hooks."""
    module, side = module_of(model, "llama", "resid.post", 1)
    found = {"clean": model(ids).logits}
    for name, edit in edits.items():
        with hooked(module, side, edit):
            found[name] = model(ids).logits
    return found


def activations(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return read(model, *module_of(model, "llama", "resid.post", 1), input_ids=ids)


@torch.no_grad()
def test_losses_are_those_of_plain_hooks() -> None:
    model, f = tiny_model("llama"), sparse()
    x = activations(model, IDS)
    mean = x.double().mean(dim=(0, 1)).float()
    edits = {
        "": lambda x: f.reconstruct(x)[1],
        "zero": torch.zeros_like,
        "mean": mean.expand_as,
    }
    logits = runs(model, IDS, edits)
    p = logits["clean"].log_softmax(-1).double()
    loss = {
        n: float(functional.cross_entropy(v[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())) for n, v in logits.items()
    }
    kl = {n: float((p.exp() * (p - v.log_softmax(-1))).sum(-1).mean()) for n, v in logits.items()}
    result = evaluated(f, batch_size=5)
    expected = {"ce_loss_clean": loss["clean"], "ce_loss": loss[""], "kl": kl[""]}
    for name in ("zero", "mean"):
        expected |= {
            f"ce_loss_{name}_ablation": loss[name],
            f"kl_{name}_ablation": kl[name],
            f"ce_recovered_{name}_ablation": (loss[name] - loss[""]) / (loss[name] - loss["clean"]),
            f"kl_recovered_{name}_ablation": 1 - kl[""] / kl[name],
        }
    assert expected.keys() == {name for name, d in DEFINITIONS.items() if d.group == "effect"}
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dictionary", "relu", "subspace", "composition", "identity"])
def test_reconstruction_and_sparsity_are_the_formulas_of_numpy(kind: str) -> None:
    of = {
        "dictionary": sparse,
        "relu": lambda: dictionary("relu", d_in=32),
        "subspace": lambda: featurizers.create("subspace", d_in=32, n_features=4, seed=0),
        "composition": lambda: featurizers.create("identity", d_in=32) >> sparse(normalize="layer-norm"),
        "identity": lambda: featurizers.create("identity"),
    }
    f = of[kind]()
    x = activations(tiny_model("llama"), IDS)
    z, x_hat = (each.double().numpy().reshape(IDS.numel(), -1) for each in f.reconstruct(x))
    y = x.double().numpy().reshape(-1, 32)
    result = evaluated(f, metrics=["reconstruction", "sparsity"], batch_size=7)
    residual = ((y - x_hat) ** 2).sum()
    norms, norms_hat = np.linalg.norm(y, axis=1), np.linalg.norm(x_hat, axis=1)
    expected = {
        "mse": residual / len(y),
        "fvu": residual / ((y - y.mean(0)) ** 2).sum(),
        "explained_variance": 1 - residual / ((y - y.mean(0)) ** 2).sum(),
        "cosine": np.mean((y * x_hat).sum(1) / (norms * norms_hat)),
        "l2_norm_in": norms.mean(),
        "l2_norm_out": norms_hat.mean(),
        "l2_ratio": (norms_hat / norms).mean(),
        "relative_reconstruction_bias": (x_hat**2).sum() / (y * x_hat).sum(),
    }
    is_sparse = kind in ("dictionary", "relu", "composition")
    if is_sparse:
        density = (z != 0).mean(0)
        expected |= {
            "l0": (z != 0).sum(1).mean(),
            "l1": np.abs(z).sum(1).mean(),
            "dead_features": (density == 0).mean(),
            "dense_features_1_percent": (density > 0.01).mean(),
            "dense_features_10_percent": (density > 0.1).mean(),
        }
        assert result.density is not None
        np.testing.assert_allclose(result.density.numpy(), density, rtol=1e-12)
        bars = result.histogram
        assert (sum(bars.counts), bars.dead) == ((density > 0).sum(), (density == 0).sum())
        counted, _ = np.histogram(np.log10(density[density > 0]), bars.edges)
        assert bars.counts == tuple(counted)
    else:
        assert result.histogram is None
        assert "are dense" in str(result.metrics["l0"])
        assert all(result.metrics[name].value is None for name, d in DEFINITIONS.items() if d.group == "sparsity")
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert "nan" not in repr(result).lower()


def of_maps(cls: Any, groups: Any, reads: dict[str, str], writes: dict[str, str]) -> Any:
    f = linear_map(cls, groups, rule="relu")
    f.reads, f.writes = reads, writes
    return f


def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> float:
    return float(functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


@torch.no_grad()
def test_a_transcoder_is_measured_at_what_it_predicts() -> None:
    model, ids = decoder("llama"), IDS % 40
    generator = torch.Generator().manual_seed(0)
    shapes = ((12, 16), (12, 16), (12,), (16,))
    f = Transcoder.from_weights(*(torch.randn(shape, generator=generator) / 3 for shape in shapes))
    f.reads, f.writes = {"in": "mlp.in:1"}, {"out": "mlp.out:1"}
    mlp = model.model.layers[1].mlp
    x, y = read(model, mlp, "input", input_ids=ids), read(model, mlp, "output", input_ids=ids)
    features = {group: f.encode(group, {"in": x}) for group in f.groups}
    y_hat = f.decode("out", features, {"in": x})
    result = evaluated(f, model=model, tokens=ids, ablations=["zero"])
    variance = (y - y.mean((0, 1))).square().sum()
    assert result["fvu"] == pytest.approx(float((y - y_hat).square().sum() / variance), rel=1e-4)
    assert result["l0"] == pytest.approx(float((features["features"] != 0).sum(-1).double().mean()))
    with hooked(mlp, "output", lambda _: y_hat):
        assert result["ce_loss"] == pytest.approx(loss_of(model(ids).logits, ids), rel=1e-5)
    with hooked(mlp, "output", torch.zeros_like):
        assert result["ce_loss_zero_ablation"] == pytest.approx(loss_of(model(ids).logits, ids), rel=1e-5)
    assert "ce_loss_mean_ablation" not in result.metrics


@torch.no_grad()
def test_a_cross_layer_transcoder_is_spliced_in_as_a_replacement_model() -> None:
    model, ids = decoder("llama"), IDS % 40
    f = of_maps(
        CrossLayerTranscoder,
        {i: ([f"in-{i}"], [f"out-{j}" for j in range(i, 3)]) for i in range(3)},
        {f"in-{i}": f"mlp.in:{i}" for i in range(3)},
        {f"out-{i}": f"mlp.out:{i}" for i in range(3)},
    )
    layers = [layer.mlp for layer in model.model.layers]
    y = torch.cat([read(model, mlp, "output", input_ids=ids) for mlp in layers], dim=-1)
    x = {f"in-{i}": read(model, mlp, "input", input_ids=ids) for i, mlp in enumerate(layers)}
    z = {group: f.encode(group, x) for group in f.groups}
    y_hat = torch.cat([f.decode(f"out-{i}", z, x) for i in range(3)], dim=-1)
    own: dict[str, torch.Tensor] = {}
    features: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        for i, mlp in enumerate(layers):

            def note(x: torch.Tensor, i: int = i) -> torch.Tensor:
                own[f"in-{i}"] = x
                features[f"layer-{i}"] = f.encode(f"layer-{i}", own)
                return x

            stack.enter_context(hooked(mlp, "input", note))
            stack.enter_context(hooked(mlp, "output", lambda _, i=i: f.decode(f"out-{i}", features, own)))
        replaced = model(ids).logits
    result = evaluated(f, model=model, tokens=ids)
    variance = (y - y.mean((0, 1))).square().sum()
    assert result["fvu"] == pytest.approx(float((y - y_hat).square().sum() / variance), rel=1e-4)
    assert result["ce_loss"] == pytest.approx(loss_of(replaced, ids), rel=1e-4)
    assert result.about["site"] == "mlp.out:0, mlp.out:1, mlp.out:2"
    for i, (own_y, own_y_hat) in enumerate(zip(y.chunk(3, dim=-1), y_hat.chunk(3, dim=-1), strict=True)):
        found = {name: metric.value for name, metric in result.writes[f"mlp.out:{i}"].items()}
        assert found == pytest.approx(by_numpy(own_y, own_y_hat), rel=1e-4)
    assert result.writes["mlp.out:0"]["fvu"].interval is not None
    assert "at each write" in repr(result)


def by_numpy(y: torch.Tensor, y_hat: torch.Tensor) -> dict[str, float]:
    """Return the metrics of a reconstruction by the formulas of the documentation."""
    a, b = (t.flatten(0, 1).double().numpy() for t in (y, y_hat))
    norms, norms_hat, dot = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1), (a * b).sum(1)
    fvu = ((a - b) ** 2).sum() / ((a - a.mean(0)) ** 2).sum()
    return {
        "explained_variance": 1 - fvu,
        "fvu": fvu,
        "mse": ((a - b) ** 2).sum(1).mean(),
        "cosine": (dot / norms / norms_hat).mean(),
        "l2_norm_in": norms.mean(),
        "l2_norm_out": norms_hat.mean(),
        "l2_ratio": (norms_hat / norms).mean(),
        "relative_reconstruction_bias": (norms_hat**2).mean() / dot.mean(),
    }


def test_a_crosscoder_that_cannot_be_spliced_in_says_why() -> None:
    names = [f"site-{i}" for i in range(3)]
    sites = {f"site-{i}": f"resid.post:{i}" for i in range(3)}
    f = of_maps(Crosscoder, {0: (names, names)}, sites, sites)
    result = evaluated(f, model=decoder("llama"), tokens=IDS % 40)
    assert result["fvu"] > 0
    assert result["ce_loss_zero_ablation"] > 0
    for name in ("ce_loss", "kl", "ce_recovered_zero_ablation", "kl_recovered_mean_ablation"):
        assert str(result.metrics[name]).startswith("not defined, because the model cannot run with the reconstruction")
    assert "nan" not in repr(result).lower()


# ---------------------------------------------------------------------- the data


def ragged() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [IDS[i % 24, : int(torch.randint(1, 13, (1,), generator=generator))].tolist() for i in range(30)]


def test_the_size_of_a_batch_changes_no_number() -> None:
    f, tokens = sparse(), ragged()
    first, *others = (evaluated(f, tokens=tokens, batch_size=size) for size in (1, 4, 30))
    for other in others:
        for name, metric in first.metrics.items():
            assert other[name] == pytest.approx(metric.value, rel=1e-5, abs=1e-6), name
            assert other.metrics[name].interval == (
                None if metric.interval is None else pytest.approx(metric.interval, rel=1e-4, abs=1e-5)
            ), name
        assert other.density is not None
        assert torch.equal(other.density, first.density)


@torch.no_grad()
def test_padding_is_not_measured_and_documents_are_as_if_alone() -> None:
    model, f, tokens = tiny_model("llama"), sparse(), ragged()
    residual, loss, n, followed = 0.0, 0.0, 0, 0
    for ids in tokens:
        row = torch.tensor([ids])
        x = activations(model, row)
        residual += float((x - f.reconstruct(x)[1]).double().square().sum())
        loss += (len(ids) - 1) * loss_of(model(row).logits, row) if len(ids) > 1 else 0.0
        n, followed = n + len(ids), followed + len(ids) - 1
    forms: dict[str, Any] = {
        "lists": tokens,
        "tensors": [torch.tensor(ids) for ids in tokens],
        "records": [{"input_ids": ids, "url": "x"} for ids in tokens],
        "left padding": padded(tokens, left=True),
        "right padding": padded(tokens, left=False),
    }
    for name, form in forms.items():
        result = evaluated(f, tokens=form)
        assert result.about["tokens"] == n
        assert result["mse"] == pytest.approx(residual / n, rel=1e-5), name
        assert result["ce_loss_clean"] == pytest.approx(loss / followed, rel=1e-5), name


def padded(tokens: list[list[int]], *, left: bool) -> dict[str, torch.Tensor]:
    width = max(map(len, tokens))
    ids = [[0] * (width - len(row)) + row if left else row + [0] * (width - len(row)) for row in tokens]
    mask = [[0] * (width - len(r)) + [1] * len(r) if left else [1] * len(r) + [0] * (width - len(r)) for r in tokens]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def test_texts_are_read_with_the_tokenizer_cut_and_ended(tmp_path: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_language_model(tiny_model("llama"), tmp_path))
    texts = [" ".join(f"w{i}" for i in row) for row in IDS.tolist()]
    f = sparse()
    whole = evaluated(f, metrics=["reconstruction"])
    assert evaluated(f, tokens=texts, tokenizer=tokenizer, metrics="reconstruction")["mse"] == whole["mse"]
    cut = evaluated(f, tokens=texts, tokenizer=tokenizer, context=5, max_tokens=30, metrics=["reconstruction"])
    rows = [IDS[0, :5], IDS[0, 5:10], IDS[0, 10:], IDS[1, :5], IDS[1, 5:10], IDS[1, 10:], IDS[2, :5], IDS[2, 5:6]]
    assert cut["mse"] == pytest.approx(evaluated(f, tokens=rows, metrics=["reconstruction"])["mse"], rel=1e-6)
    assert (cut.about["tokens"], cut.about["documents"]) == (30, 3)
    records = [{"text": text} for text in texts]
    assert evaluated(f, tokens=records, tokenizer=tokenizer, metrics=["reconstruction"])["mse"] == whole["mse"]


@torch.no_grad()
def test_special_tokens_keep_their_activation_and_are_not_measured() -> None:
    model, f = tiny_model("llama"), sparse()
    ids = IDS.clone()
    ids[:, 0] = 7
    keep = (ids == 7)[..., None]
    x = activations(model, ids)
    logits = runs(model, ids, {"": lambda x: torch.where(keep, x, f.reconstruct(x)[1]), "zero": torch.zeros_like})
    losses = {
        name: functional.cross_entropy(each[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        for name, each in logits.items()
    }
    of_measured = (ids != 7)[:, :-1].flatten()
    own = sparse(special_tokens=[7])
    for result in (
        evaluated(f, tokens=ids, exclude_special_tokens=[7]),
        evaluated(own, tokens=ids),
    ):
        residual = (x - f.reconstruct(x)[1]).square().sum(-1)[ids != 7]
        assert result["mse"] == pytest.approx(float(residual.mean()), rel=1e-5)
        assert result["ce_loss"] == pytest.approx(float(losses[""][of_measured].mean()), rel=1e-5)
        assert result["ce_loss_zero_ablation"] == pytest.approx(float(losses["zero"][of_measured].mean()), rel=1e-5)
        assert result.about["excluded_tokens"] == [7]


@torch.no_grad()
def test_the_first_tokens_of_a_row_are_left_out_as_special_tokens_are() -> None:
    """Compared with a token that is special and stands at the start alone."""
    ids = torch.where(IDS == 7, 8, IDS)
    ids[:, 0] = 7
    own, f = sparse(special_tokens=[7]), sparse()
    expected = evaluated(own, tokens=ids).metrics
    result = evaluated(f, tokens=ids, mask_first=1)
    assert {n: m.value for n, m in result.metrics.items()} == pytest.approx({n: m.value for n, m in expected.items()})
    assert result.about["mask_first"] == 1
    rows = evaluated(f, tokens=ids, mask_first=2, context=4, metrics=["sparsity"]).about
    assert (rows["tokens"], rows["tokens_read"]) == (ids.numel() // 2, ids.numel())
    with pytest.raises(UsageError, match="leaves nothing of rows of 4 tokens"):
        evaluated(f, tokens=ids, mask_first=4, context=4)


def test_a_replacement_model_says_that_it_leaves_out_no_places() -> None:
    clt = of_maps(
        CrossLayerTranscoder,
        {0: (["in-0"], ["out-0", "out-1"]), 1: (["in-1"], ["out-1"])},
        {"in-0": "mlp.in:0", "in-1": "mlp.in:1"},
        {"out-0": "mlp.out:0", "out-1": "mlp.out:1"},
    )
    ids = torch.full((4, 6), 5)
    result = featurizers.evaluate(clt, decoder("llama"), ids, mask_first=1, ablations=[], progress=False)
    assert "left out by their place" in result.metrics["ce_loss"].why


# ---------------------------------------------------------------------- sums and intervals


def test_a_large_mean_costs_no_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 25, 6, generator=generator).double() + 1e6
    sums = Sums()
    for part in x.split(7):
        ones = torch.ones(len(part), 1, dtype=torch.float64)
        sums.add_vectors(ones, part, torch.ones(part.shape[:2], dtype=torch.bool))
        sums.add(ones, {"tokens": torch.full((len(part),), 25)})
    expected = np.var(x.numpy().reshape(-1, 6), axis=0).sum()
    assert float(sums.variance()[0]) == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(sums.mean_vector().numpy(), x.mean((0, 1)).numpy(), rtol=1e-14)


def test_the_interval_of_a_mean_is_that_of_the_delta_method() -> None:
    """Documents of different lengths, whose means differ: the linearised variance of a ratio of sums over documents."""
    generator = np.random.default_rng(0)
    n = generator.integers(5, 40, 200)
    totals = n * generator.normal(3.0, 1.0, 200)
    weights, sums = Weights(2000, 1), Sums()
    for document in range(200):
        row = weights.of([document])
        sums.add(row, {"x": torch.tensor([totals[document]]), "n": torch.tensor([n[document]])})
    ratio = totals.sum() / n.sum()
    error = math.sqrt(200 / 199 * ((totals - ratio * n) ** 2).sum()) / n.sum()
    low, high = interval(sums.mean("x", "n"), weights.documents) or (0.0, 0.0)
    assert float(sums.mean("x", "n")[0]) == pytest.approx(ratio)
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1.0, abs=0.08)
    assert (low + high) / 2 == pytest.approx(ratio, abs=0.3 * error)


def test_rows_of_one_document_are_drawn_together() -> None:
    whole, cut = Weights(50, 7), Weights(50, 7)
    alone = whole.of([0, 1, 2])
    rows = torch.cat([cut.of([0, 0]), cut.of([0, 1]), cut.of([1, 2])])
    assert torch.equal(rows, alone[[0, 0, 0, 1, 1, 2]])
    assert cut.documents == 3


def test_few_documents_have_values_and_no_interval() -> None:
    result = evaluated(sparse(), tokens=IDS[:19], metrics=["reconstruction"])
    assert result.metrics["mse"].interval is None
    assert "19 documents are too few" in result.metrics["mse"].why
    assert evaluated(sparse(), tokens=IDS[:20], metrics=["reconstruction"]).metrics["mse"].interval is not None


# ---------------------------------------------------------------------- runs


def test_blocks_before_the_site_run_once_and_the_numbers_are_those_of_whole_runs(monkeypatch: Any) -> None:
    model, f = fresh_model("llama"), sparse()
    calls = [0, 0, 0]
    for number, layer in enumerate(model.model.layers):
        forward = layer.self_attn.forward

        def counted(*args: Any, number: int = number, forward: Any = forward, **kwargs: Any) -> Any:
            calls[number] += 1
            return forward(*args, **kwargs)

        monkeypatch.setattr(layer.self_attn, "forward", counted)
    result = evaluated(f, model=model, batch_size=8)
    batches = 3
    assert calls == [batches * 2 + 1, batches * 2 + 1, batches * 4 + 2]  # one row is compared with a whole run
    monkeypatch.setattr("featurizers_evaluate.runs.last_clean_block", lambda *_: -1)
    whole = evaluated(f, model=model, batch_size=8)
    for name, metric in whole.metrics.items():
        assert result[name] == pytest.approx(metric.value, rel=1e-6, abs=1e-7), name


def test_a_model_in_training_mode_is_measured_in_evaluation_mode_and_left_as_it_was() -> None:
    model = fresh_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    expected = evaluated(sparse(), model=model.eval())
    result = evaluated(sparse(), model=model.train())
    assert model.training
    assert result["ce_loss"] == expected["ce_loss"]


# ---------------------------------------------------------------------- several at once


def test_a_sweep_keeps_the_largest_features() -> None:
    f = dictionary("relu", d_in=32)
    x = activations(tiny_model("llama"), IDS).detach()
    z = f.encode(x)
    found = sweep(f, tiny_model("llama"), IDS, k=[1, 4, 64], site=SITE, progress=False)
    assert found.labels == ("k=1", "k=4", "k=64")
    for k, (_, result) in zip((1, 4, 64), found, strict=True):
        kept = torch.zeros_like(z)
        for row, other in zip(z.flatten(0, 1), kept.flatten(0, 1), strict=True):
            best = row.argsort(descending=True)[:k]
            other[best] = row[best]
        residual = (x - f.decode(kept)).square().sum(-1).mean()
        assert result["mse"] == pytest.approx(float(residual), rel=1e-4)
        assert result["l0"] == pytest.approx(float((kept != 0).sum(-1).double().mean()))
    assert found["k=64"]["kl"] == pytest.approx(evaluated(f)["kl"], rel=1e-5)
    assert found["k=1"]["l0"] <= 1 < found["k=4"]["l0"]
    above = sweep(f, tiny_model("llama"), IDS, threshold=[0.0, 1.5], site=SITE, progress=False, metrics=["sparsity"])
    assert above["threshold=1.5"]["l0"] == pytest.approx(float((z > 1.5).sum(-1).double().mean()))
    assert found.plot(joined=True).get_xlabel() == "l0"
    assert found.plot(x="l0", y="ce_recovered_zero_ablation").figure is not None


def test_a_comparison_is_each_alone() -> None:
    first, second = sparse(), featurizers.create("subspace", d_in=32, n_features=4, seed=0)
    first.site, second.site = SITE, "resid.post:0"
    found = compare({"a": first, "b": second}, tiny_model("llama"), IDS, progress=False)
    for label, f in (("a", first), ("b", second)):
        alone = evaluated(f)
        for name, metric in alone.metrics.items():
            other = found[label].metrics[name]
            assert (other.value is None) == (metric.value is None)
            assert other.value is None or other.value == pytest.approx(metric.value, rel=1e-5, abs=1e-6), name
    text = repr(found)
    assert "not defined, because" in text
    assert "nan" not in text.lower()
    assert len(found.to_pandas()) == 2 * len(found["a"].metrics)
    assert found.plot().figure is not None


def test_interchange_accuracy_is_that_of_the_training_plugin() -> None:
    from featurizers_training import Pairs
    from featurizers_training import evaluate as accuracy_of

    model, ids = tiny_model("llama"), IDS[:, :6]
    with torch.no_grad():
        answers = model(input_ids=ids).logits[:, -1].argmax(-1).tolist()
    records = [
        {"base": ids[(i + 1) % 24].tolist(), "source": ids[i].tolist(), "label": (answers[i] + i % 2) % 64}
        for i in range(24)
    ]
    f = featurizers.create("identity", d_in=32)
    f.site = featurizers.Site("resid.post", 2)
    expected = accuracy_of(model, Pairs.of(records), f)
    assert expected.hits == 12
    result = evaluated(f, metrics=[], pairs=Pairs.of(records))
    assert list(result.metrics) == ["interchange_accuracy"]
    assert result["interchange_accuracy"] == expected.value
    assert result.metrics["interchange_accuracy"].interval == expected.interval


# ---------------------------------------------------------------------- the result, and refusals


def test_fidelity_is_that_of_the_plugin_of_causal_bases() -> None:
    model = tiny_model("llama")
    vectors = torch.linalg.qr(torch.randn(32, 3, generator=torch.Generator().manual_seed(1))).Q
    record = BasisRecord(mode="mean", side="output", readout="logit-lens", n_tokens=10)
    f = CausalBasisFeaturizer.of(vectors, torch.tensor([3.0, 2.0, 1.0]), torch.zeros(32), record, site=SITE)
    tokens = ragged()
    result = evaluated(f, tokens=tokens, metrics=["fidelity"], exclude_special_tokens=[tokens[0][0]], batch_size=3)
    inputs = padded(tokens, left=False)
    mask = inputs["attention_mask"].bool() & (inputs["input_ids"] != tokens[0][0])
    expected = causal_fidelity(f, model, inputs, mask=mask)
    assert list(result.metrics) == ["fidelity_spearman", "fidelity_kl", "fidelity_control_kl"]
    assert result["fidelity_kl"] == pytest.approx(float(expected.model_kl.mean()), rel=1e-5)
    assert result["fidelity_control_kl"] == pytest.approx(float(expected.control_kl.mean()), rel=1e-5)
    assert result["fidelity_spearman"] == expected.spearman
    for name, metric in evaluated(sparse(), metrics=["fidelity"]).metrics.items():
        assert metric.value is None, name
        assert "has no energies" in str(metric)
    with pytest.raises(UsageError, match="iterator"):
        evaluated(f, tokens=iter(tokens), metrics=["fidelity"])


def test_a_result_is_saved_and_read_again(tmp_path: Any) -> None:
    shapes: Any = ({0: (["in"], ["out-0", "out-1"])}, {"in": "mlp.in:0"}, {f"out-{i}": f"mlp.out:{i}" for i in (0, 1)})
    several = evaluated(of_maps(CrossLayerTranscoder, *shapes), model=decoder("llama"), tokens=IDS % 40)
    assert featurizers.load_evaluation(several.save(tmp_path / "several.json")).writes == several.writes
    assert set(several.to_pandas()["site"]) == {"", "mlp.out:0", "mlp.out:1"}
    result = evaluated(sparse(), data="random ids")
    again = featurizers.load_evaluation(result.save(tmp_path / "it.json"))
    assert again.metrics == result.metrics
    assert again.about == result.about
    assert again.histogram == result.histogram
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["metrics"]["l0"]["unit"] == "features"
    frame = result.to_pandas()
    assert frame.set_index("metric").loc["mse", "value"] == result["mse"]
    assert result["mse"] == result.metrics["mse"].value
    for name in result.metrics:
        assert name in repr(result)
    (tmp_path / "bad.json").write_text(json.dumps({"format": "featurizers-evaluate", "version": 2}))
    with pytest.raises(ArtefactError, match="version 2"):
        featurizers.load_evaluation(tmp_path / "bad.json")
    with pytest.raises(ArtefactError):
        featurizers.load_evaluation(tmp_path / "none.json")


def test_what_has_no_value_says_why() -> None:
    one = evaluated(sparse(), tokens=[[5]])
    assert "variance is 0" in str(one.metrics["fvu"])
    assert "no measured token is followed by another" in str(one.metrics["ce_loss"])
    assert one["mse"] > 0
    assert "nan" not in repr(one).lower()
    with pytest.raises(UsageError, match="not defined, because"):
        one["fvu"]
    broken = fresh_model("llama")
    broken.model.layers[0].mlp.down_proj.weight.data.fill_(math.inf)
    infinite = evaluated(sparse(), model=broken)
    assert "not finite" in str(infinite.metrics["mse"])
    assert "nan" not in repr(infinite).lower().replace("not finite", "")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no documents": ({"tokens": []}, "there are no tokens"),
    "empty documents": ({"tokens": [[], []]}, "there are no tokens"),
    "a text": ({"tokens": "hello"}, "a list of texts"),
    "texts without a tokenizer": ({"tokens": ["w1 w2"]}, "give the tokenizer"),
    "numbers": ({"tokens": torch.rand(2, 3)}, "token ids are integers"),
    "no ids": ({"tokens": [[1.5]]}, "no list of token ids"),
    "a record": ({"tokens": [{"words": "x"}]}, "without text"),
    "an id beyond": ({"tokens": [[1, 64]]}, "token id 64"),
    "an id below": ({"tokens": [[-1]]}, "token id -1"),
    "too long": ({"tokens": [[1] * 65]}, "context=64"),
    "an iterator": ({"tokens": iter([[1, 2]])}, "can be read once"),
    "all excluded": ({"tokens": [[1, 1]], "exclude_special_tokens": [1]}, "every token is excluded"),
    "no tokenizer": ({"exclude_special_tokens": True}, "needs the tokenizer"),
    "a metric": ({"metrics": ["fvu"]}, "metrics are some of"),
    "an ablation": ({"ablations": ["resample"]}, "ablations are some of"),
    "a batch of nothing": ({"batch_size": 0}, "batch_size is a whole number"),
    "k": ({"k": 0}, "at least 1"),
    "a threshold": ({"threshold": -1.0}, "at least 0"),
    "a mask": ({"tokens": {"input_ids": IDS, "attention_mask": IDS[:2]}}, "attention_mask is"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_measured_is_refused(case: str) -> None:
    options, words = REFUSED[case]
    with pytest.raises(UsageError, match=words):
        evaluated(sparse(), **options)


def test_what_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(ShapeError):
        evaluated(dictionary("topk", d_in=16, k=5))
    with pytest.raises(UsageError, match="does not say where it belongs"):
        featurizers.evaluate(sparse(), tiny_model("llama"), IDS)
    headless = tiny_model("llama").model
    with pytest.raises(UsageError, match="returns no logits"):
        evaluated(sparse(), model=headless)
    assert evaluated(sparse(), model=headless, metrics=["reconstruction"])["mse"] > 0
    with pytest.raises(UsageError, match="there is no argument"):
        sweep(sparse(), tiny_model("llama"), IDS, k=[1], site=SITE, batchsize=3)
    with pytest.raises(UsageError, match="a sweep is over"):
        sweep(sparse(), tiny_model("llama"), IDS)
    with pytest.raises(UsageError, match="different ids"):
        compare([sparse(), sparse()], tiny_model("llama"), IDS)


def test_sums_of_parts_are_those_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(6, 5, 3, generator=generator) + 100
    kept, weights = torch.rand(6, 5, generator=generator) > 0.3, torch.rand(6, 4, generator=generator).double()
    joined = Sums()
    for rows in (slice(0, 2), slice(2, 2), slice(2, 6)):  # the second has no rows
        part = Sums()
        part.add_vectors(weights[rows], y[rows], kept[rows])
        part.add(weights[rows], {"tokens": kept[rows].sum(dim=-1)})
        joined.include(part)
    each = weights.T[:, :, None] * kept
    for sample, share in enumerate(each):
        mean = (share[..., None] * y).sum((0, 1)) / share.sum()
        variance = (share * (y - mean).square().sum(-1)).sum() / share.sum()
        assert float(joined.variance()[sample]) == pytest.approx(float(variance), rel=1e-9)
    mean = (each[0][..., None] * y).sum((0, 1)) / each[0].sum()
    torch.testing.assert_close(joined.mean_vector(), mean, rtol=1e-12, atol=0)
