"""`featurizers.report` beside plain torch, numpy and the model's own modules, for each kind, and its refusals."""

from __future__ import annotations

import itertools
import math
from typing import Any

import featurizers
import numpy as np
import pytest
import torch
from featurizers import Label
from featurizers.errors import FeatureIndexError, ShapeError, SiteError, UsageError
from featurizers_evaluate.reporting import making
from featurizers_evaluate.reporting.histograms import Histograms
from featurizers_evaluate.reporting.stream import why_not_in_stream
from featurizers_evaluate.reporting.texts import token_texts
from featurizers_evaluate.reporting.top import top_rows
from featurizers_transcoder import Crosscoder, CrossLayerTranscoder, Transcoder

from tests.support.dictionaries import dictionary
from tests.support.models import fresh_model, module_of, read, tiny_model
from tests.support.site_maps import linear_map, written
from tests.support.site_maps import model as decoder

SITE = "resid.post:1"
IDS = torch.randint(0, 64, (24, 30), generator=torch.Generator().manual_seed(3))


def reported(f: Any, *, model: Any = None, tokens: Any = IDS, **options: Any) -> Any:
    own = {"site": SITE} if isinstance(f, featurizers.Featurizer) and f.site is None else {}
    model = tiny_model("llama") if model is None else model
    return featurizers.report(f, model, tokens, **{"effect_tokens": 0, "progress": False, **own, **options})


def sparse(rule: str = "topk", **options: Any) -> Any:
    return dictionary(rule, d_in=32, k=5, **options)


def activations(ids: torch.Tensor, architecture: str = "llama", kind: str = "resid.post", layer: int = 1) -> Any:
    model = tiny_model(architecture)
    return read(model, *module_of(model, architecture, kind, layer), input_ids=ids)


def contexts_by_hand(z: Any, rows: list[list[int]], sign: int, above: float, first: int = 0) -> list[Any]:
    """Return value, tokens and features of the best place of each row, the best rows first, without equal contexts.

    Args:
        z: of one feature, an array of each row.
        rows: token ids.
        sign: 1 for the largest, -1 for the smallest.
        above: what a value times the sign must exceed.
        first: tokens at the start of a row that are not measured.
    """
    found = []
    for values, ids in zip(z, rows, strict=True):
        measured = [(sign * value, -i) for i, value in enumerate(values) if i >= first]
        if not measured or max(measured)[0] <= above:
            continue
        best = -max(measured)[1]
        around = range(max(0, best - 10), min(len(ids), best + 11))
        seen = tuple(float(values[i]) if i >= first else 0.0 for i in around)
        found.append((float(values[best]), tuple(f" #{ids[i]}" for i in around), seen))
    found.sort(key=lambda each: -sign * each[0])
    distinct = [each for i, each in enumerate(found) if all(each[1] != other[1] for other in found[:i])]
    return distinct[:5]


def check_contexts(found: Any, expected: list[Any]) -> None:
    assert [each.tokens for each in found] == [tokens for _, tokens, _ in expected]
    for each, (value, _, values) in zip(found, expected, strict=True):
        assert each.value == pytest.approx(value, rel=1e-5)
        assert each.values == pytest.approx(values, rel=1e-4, abs=1e-5)


# ---------------------------------------------------------------------- what the data shows


@torch.no_grad()
@pytest.mark.parametrize("rule", ["topk", "relu", "abstopk"])
def test_counts_histograms_and_contexts_are_those_of_numpy(rule: str) -> None:
    f = sparse(rule)
    z = f.encode(activations(IDS)).double().numpy()
    result = reported(f, batch_size=5)
    assert len(result) == 64
    flat = z.reshape(-1, 64)
    for number, each in enumerate(result):
        values = flat[:, number][flat[:, number] != 0]
        assert each.name == str(number)
        assert each.density == pytest.approx(len(values) / IDS.numel())
        assert each.mean == pytest.approx(flat[:, number].mean(), rel=1e-5, abs=1e-9)
        assert each.std == pytest.approx(flat[:, number].std(), rel=1e-5, abs=1e-9)
        edges, counts = each.histogram
        assert sum(counts) == len(values)
        if len(values):
            assert (each.least, each.most) == pytest.approx((values.min(), values.max()), rel=1e-5)
            assert np.histogram(values, edges)[0].tolist() == list(counts)
            assert len(counts) > 3 or len(values) < 30
        else:
            assert (each.least, each.most, edges) == (None, None, ())
        check_contexts(each.high, contexts_by_hand(z[..., number], IDS.tolist(), 1, 0.0))
        check_contexts(each.low, contexts_by_hand(z[..., number], IDS.tolist(), -1, 0.0))
    assert any(each.low for each in result) == (rule == "abstopk")


@torch.no_grad()
def test_rows_of_several_lengths_are_as_if_alone_and_first_tokens_begin_no_context() -> None:
    rows = [IDS[i, : 30 - i].tolist() for i in range(24)]
    f = sparse()
    result = reported(f, tokens=rows, mask_first=2, batch_size=7)
    z = [f.encode(activations(torch.tensor([row])))[0].numpy() for row in rows]
    assert result.about["tokens"] == sum(len(row) - 2 for row in rows)
    for number, each in enumerate(result):
        own = [values[:, number] for values in z]
        assert each.density == pytest.approx(sum((v[2:] != 0).sum() for v in own) / result.about["tokens"])
        check_contexts(each.high, contexts_by_hand(own, rows, 1, 0.0, first=2))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["subspace", "identity", "composition"])
def test_dense_features_have_both_ends(kind: str) -> None:
    f = {
        "subspace": lambda: featurizers.create("subspace", d_in=32, n_features=4, seed=0),
        "identity": lambda: featurizers.create("identity"),
        "composition": lambda: (
            featurizers.create("standardize", d_in=32) >> featurizers.create("subspace", d_in=32, n_features=3, seed=1)
        ),
    }[kind]()
    z = f.encode(activations(IDS)).double().numpy()
    result = reported(f, batch_size=5)
    assert result.is_dense
    for number, each in enumerate(result):
        values = z[..., number]
        check_contexts(each.high, contexts_by_hand(values, IDS.tolist(), 1, -math.inf))
        check_contexts(each.low, contexts_by_hand(values, IDS.tolist(), -1, -math.inf))
        assert each.std == pytest.approx(values.std(), rel=1e-5)
        edges, counts = each.histogram
        assert np.histogram(values, edges)[0].tolist() == list(counts)
        assert len(counts) >= 8


def test_equal_contexts_are_shown_once_and_the_earliest_is_kept() -> None:
    ids = IDS[:6].repeat(4, 1)
    again = reported(sparse(), tokens=ids)
    once = reported(sparse(), tokens=IDS[:6])
    for each, other in zip(again, once, strict=True):
        tokens = [context.tokens for context in each.high]
        assert len(set(tokens)) == len(tokens)
        assert tokens == [context.tokens for context in other.high][: len(tokens)]


def test_the_size_of_a_batch_and_an_iterator_change_nothing() -> None:
    first, f = None, sparse("relu")  # equal first tokens have equal features, so that the order is by rounding
    for size in (1, 5, 24):
        result = reported(f, tokens=iter(IDS.tolist()), batch_size=size, effect_tokens=60, context=9)
        found = [(each.name, each.density, len(each.high)) for each in result]
        values = [context.value for each in result for context in each.high]
        first = first or (found, result.effect["kl"], values)
        assert found == first[0]
        assert values == pytest.approx(first[2], rel=1e-4, abs=1e-4)
        assert result.effect["kl"] == pytest.approx(first[1], rel=1e-4)
        assert result.effect.about["tokens"] == 60


def test_metrics_are_those_of_evaluate() -> None:
    result = reported(sparse(), effect_tokens=90, tokens=IDS, context=9, mask_first=1)
    options = {"site": SITE, "context": 9, "mask_first": 1, "progress": False}
    whole = featurizers.evaluate(
        sparse(), tiny_model("llama"), IDS, metrics=["reconstruction", "sparsity"], ablations=[], **options
    )
    part = featurizers.evaluate(sparse(), tiny_model("llama"), IDS, metrics=["effect"], max_tokens=90, **options)
    for found, expected in ((result.evaluation, whole), (result.effect, part)):
        assert found.metrics.keys() == expected.metrics.keys()
        for name, metric in expected.metrics.items():
            assert found.metrics[name].value == pytest.approx(metric.value, rel=1e-6), name


def test_a_model_without_a_head_has_contexts_and_says_what_is_missing() -> None:
    body = fresh_model("llama").model
    result = reported(sparse(), model=body, effect_tokens=60)
    assert "returns no logits" in result.about["no_effect"]
    assert result.effect is None
    assert "head" in result.effects
    assert result[0].high
    assert result[0].neighbours


# ---------------------------------------------------------------------- histograms and tops


def test_a_histogram_grows_with_the_values_and_loses_none() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, 3, generator=generator) * torch.logspace(-12, 12, 50)[:, None]
    values[7] = 0.0
    values[3, 1] = -(2.0**5)  # at an edge
    bars = Histograms(torch.tensor([0.0, 1.5, -100.0]))
    for row in values:
        bars.add(torch.arange(3), row)
    for feature in range(3):
        edges = bars.edges(feature)
        expected = np.histogram(values[:, feature].double().numpy(), edges)[0]
        assert bars.counts[feature].tolist() == expected.tolist()
        assert int(bars.counts[feature].sum()) == 50


@pytest.mark.parametrize(("n", "k"), [(5, 5), (700, 10), (4099, 10), (640, 6)])
def test_the_top_in_groups_is_that_of_torch(n: int, k: int) -> None:
    x = torch.randn(n, 7, generator=torch.Generator().manual_seed(n))
    for largest in (True, False):
        found, expected = top_rows(x, k, largest=largest), x.topk(k, dim=0, largest=largest)
        assert torch.equal(found[0], expected.values)
        assert torch.equal(found[1], expected.indices)


# ---------------------------------------------------------------------- what features write


def check_effects(result: Any, logits: torch.Tensor) -> None:
    """Compare the tokens of each feature with the top and bottom 10 of logits ``(n, vocabulary)``."""
    for each, own in zip(result, logits, strict=True):
        for found, largest in ((each.promoted, True), (each.suppressed, False)):
            expected = own.topk(10, largest=largest)
            assert [value for _, value in found] == pytest.approx(expected.values.tolist(), rel=1e-4, abs=1e-5)
            assert [text for text, _ in found] == [f" #{i}" for i in expected.indices.tolist()]


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_effects_are_those_of_the_models_own_norm_and_head(architecture: str) -> None:
    """An edit of the last stream by each direction, times the norm's scale: what the norm divides by is undone."""
    model, f = tiny_model(architecture), sparse()
    norm, _ = module_of(model, architecture, "norm.out")
    head = model.get_output_embeddings()
    h = activations(IDS[:1], architecture, "resid.post", 2)[0, 5].double()

    def before_scale(x: torch.Tensor) -> torch.Tensor:
        """Return the logits with the norm's output times its own scale, which makes it affine."""
        centred = x - x.mean(-1, keepdim=True) if architecture in ("gpt2", "gpt_neox") else x
        scale = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        y, at_zero = norm.double()(x), norm.double()(torch.zeros_like(x))  # the second is the bias
        return ((y - at_zero) * scale) @ head.weight.double().T

    import copy

    norm = copy.deepcopy(norm)
    own = before_scale(h + 100 * f.W_dec.double()) - before_scale(h.expand(64, -1))
    result = reported(f, model=model)
    for each, logits in zip(result, own / 100, strict=True):
        expected = logits.topk(10)
        assert [value for _, value in each.promoted] == pytest.approx(expected.values.tolist(), rel=2e-3)
        assert [text for text, _ in each.promoted][:3] == [f" #{i}" for i in expected.indices.tolist()][:3]
    assert "unembedding" in result.effects.how


@torch.no_grad()
def test_effects_and_neighbours_are_matrix_products() -> None:
    model, f = tiny_model("llama"), sparse()
    result = reported(f)
    check_effects(result, (f.W_dec * model.model.norm.weight) @ model.lm_head.weight.T)
    unit = f.W_dec / f.W_dec.norm(dim=-1, keepdim=True)
    alike = (unit @ unit.T).fill_diagonal_(-2)
    for number, each in enumerate(result):
        expected = alike[number].topk(6)
        assert [int(name) for name, _ in each.neighbours] == expected.indices.tolist()
        assert [cosine for _, cosine in each.neighbours] == pytest.approx(expected.values.tolist(), abs=1e-5)
        assert each.norms["site"] == pytest.approx(float(f.W_dec[number].norm()), rel=1e-5)


@torch.no_grad()
def test_directions_of_other_kinds_are_decoded_or_not_defined() -> None:
    model = tiny_model("llama")
    readout = model.model.norm.weight[:, None] * model.lm_head.weight.T
    unknown_width = featurizers.create("identity")  # has no closed form
    check_effects(reported(unknown_width), readout)
    subspace = featurizers.create("subspace", d_in=32, n_features=4, seed=0)
    found = reported(subspace)
    check_effects(found, subspace.orthonormal_basis().T @ readout)
    assert found.neighbours == "the directions are orthogonal to each other"
    normalised = sparse(normalize="layer-norm")
    found = reported(normalised)
    check_effects(found, normalised.W_dec @ readout)
    assert "before it is undone" in found.note
    chain = featurizers.create("standardize", d_in=32) >> sparse(normalize="layer-norm")
    found = reported(chain)
    assert found.effects == found.neighbours
    assert "depends on the activation" in found.effects
    assert found[0].promoted == ()
    at_the_end = featurizers.create("identity", d_in=32)
    check_effects(reported(at_the_end, site="norm.out"), model.lm_head.weight.T)


STREAM = {
    ("llama", "mlp.out:1"): True,
    ("llama", "attn.out:0"): True,
    ("llama", "attn.z:1"): False,
    ("llama", "mlp.act:1"): False,
    ("llama", "mlp.in:1"): False,
    ("llama", "embed"): True,
    ("llama", "resid.pre:2"): True,
    ("gpt2", "embed"): True,
    ("gpt_neox", "attn.out:2"): True,  # a parallel block
    ("gemma2", "embed"): True,  # it is multiplied by one number
    ("gemma2", "mlp.out:1"): False,  # a norm follows
    ("gemma2", "module:model.layers.1.post_feedforward_layernorm:output"): True,
    ("gemma2", "attn.out:1"): False,
    ("gemma2", "module:model.layers.1.post_attention_layernorm:output"): True,
}


@pytest.mark.parametrize(("architecture", "site"), STREAM)
def test_what_is_added_to_the_stream_is_told_by_trying(architecture: str, site: str) -> None:
    model = tiny_model(architecture).requires_grad_(False)
    why = why_not_in_stream(model, featurizers.Site.parse(site), featurizers.Anatomy(model))
    assert (why == "") == STREAM[architecture, site], why


def test_a_site_that_is_not_in_the_stream_says_why() -> None:
    result = reported(featurizers.create("identity"), site="attn.z:1")
    assert "attn.z:1 is not added to the residual stream" in result.effects
    assert result[0].promoted == ()
    assert result[0].high


# ---------------------------------------------------------------------- maps between sites


@torch.no_grad()
def test_a_cross_layer_transcoder_sums_what_it_writes_and_names_features_by_group() -> None:
    f = linear_map(
        CrossLayerTranscoder,
        {0: (["in-0"], ["out-0", "out-1"]), 1: (["in-1"], ["out-1"])},
        rule="relu",
    )
    f.reads = {"in-0": "mlp.in:0", "in-1": "mlp.in:1"}
    f.writes = {"out-0": "mlp.out:0", "out-1": "mlp.out:1"}
    model, ids = decoder("llama"), IDS % 40
    result = reported(f, model=model, tokens=ids)
    assert result.names == [f"layer-{group}/{number}" for group in (0, 1) for number in range(12)]
    weights = {name: tensor for name, tensor in f.state_dict().items() if name.startswith("W_dec.")}
    readout = model.model.norm.weight[:, None] * model.lm_head.weight.T
    first = weights["W_dec.layer-0.out-0"] + weights["W_dec.layer-0.out-1"]
    check_effects(result, torch.cat([first, weights["W_dec.layer-1.out-1"]]) @ readout)
    x = {f"in-{i}": read(model, model.model.layers[i].mlp, "input", input_ids=ids) for i in (0, 1)}
    z = torch.cat([f.encode(group, x) for group in f.groups], dim=-1)
    assert result.count.tolist() == (z != 0).sum((0, 1)).tolist()
    each = result["layer-0/5"]
    check_contexts(each.high, contexts_by_hand(z[..., 5].double().numpy(), ids.tolist(), 1, 0.0))
    lengths = {name: float(weights[f"W_dec.layer-0.{name}"][5].norm()) for name in f.writes}
    assert each.norms == pytest.approx(lengths, rel=1e-5)
    assert result["layer-1/0"].norms["out-0"] == 0


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_transcoder_writes_where_the_mlp_is_added(architecture: str) -> None:
    generator = torch.Generator().manual_seed(0)
    f = Transcoder.from_weights(*(torch.randn(12, 16, generator=generator) for _ in range(2)))
    f.reads, f.writes = {"in": "mlp.in:1"}, {"out": written(architecture, 1)}
    model = decoder(architecture)
    result = reported(f, model=model, tokens=IDS % 40)
    gain = model.model.norm.weight + (architecture == "gemma2")
    check_effects(result, (f.W_dec["features"]["out"] * gain) @ model.lm_head.weight.T)
    assert result.names == [str(number) for number in range(12)]


@torch.no_grad()
def test_a_crosscoder_counts_the_stream_once() -> None:
    sites = {"in-0": "resid.post:0", "in-1": "resid.post:1"}
    f = linear_map(Crosscoder, {0: ([*sites], [*sites])}, rule="relu")
    f.reads = f.writes = sites
    model = decoder("llama")
    result = reported(f, model=model, tokens=IDS % 40, effect_tokens=60)
    last = f.state_dict()["W_dec.layer-0.in-1"]
    check_effects(result, (last * model.model.norm.weight) @ model.lm_head.weight.T)
    assert "at in-1" in result.effects.how
    both = torch.cat([f.state_dict()[f"W_dec.layer-0.{name}"] for name in sites], dim=-1)
    unit = both / both.norm(dim=-1, keepdim=True)
    alike = (unit @ unit.T).fill_diagonal_(-2).max(dim=-1)
    for row, each in enumerate(result):
        assert each.neighbours[0][1] == pytest.approx(float(alike.values[row]), abs=1e-5)


def test_a_causal_basis_has_its_energies() -> None:
    from featurizers_causal_basis import BasisRecord, CausalBasisFeaturizer

    record = BasisRecord(mode="mean", side="output", readout="logit-lens", n_tokens=100)
    energies = torch.tensor([0.5, 0.25, 0.125])
    f = CausalBasisFeaturizer.of(torch.eye(32)[:, :3], energies, torch.zeros(32), record, site=SITE)
    assert [each.energy for each in reported(f)] == energies.tolist()


# ---------------------------------------------------------------------- choosing features


def test_chosen_features_have_the_numbers_of_the_whole() -> None:
    f = sparse("relu")
    whole = reported(f)
    part = reported(f, features=[40, 7, 9])
    assert part.names == ["7", "9", "40"]
    for each in part:
        other = whole[each.name]
        assert (each.density, each.histogram, each.high) == (other.density, other.histogram, other.high)
        assert [text for text, _ in each.promoted] == [text for text, _ in other.promoted]
        assert {name for name, _ in each.neighbours} == {"7", "9", "40"} - {each.name}
    taken = reported(f.take([40, 7, 9]))
    assert taken.names == ["40", "7", "9"]
    assert taken["7"].density == whole["7"].density
    with pytest.raises(FeatureIndexError, match="has no feature 8"):
        part[8]


def test_of_too_many_features_the_most_active_are_shown(monkeypatch: Any) -> None:
    f = sparse("relu")
    count = reported(f).count
    monkeypatch.setattr(making, "MOST_FEATURES", 10)
    result = reported(f)
    assert result.names == [str(i) for i in sorted(count.argsort(descending=True, stable=True)[:10].tolist())]
    assert (result.about["features"], result.about["n_features"]) == (10, 64)


def test_labels_follow_the_numbers_of_a_slice_and_the_groups_of_a_map() -> None:
    f = sparse("relu")
    f.labels = [Label(7, "rivers", "alice"), Label(7, "water", "bob", score=0.5), Label(40, "months", "alice")]
    result = reported(f, features=[40, 9, 7])
    assert [[label.text for label in each.labels] for each in result] == [["rivers", "water"], [], ["months"]]
    assert reported(f.take([40, 9]))["40"].labels[0].text == "months"
    clt = linear_map(CrossLayerTranscoder, {0: (["a"], ["x"]), 1: (["b"], ["y"])}, rule="relu")
    clt.reads, clt.writes = {"a": "mlp.in:0", "b": "mlp.in:1"}, {"x": "mlp.out:0", "y": "mlp.out:1"}
    clt.labels = [Label(3, "rivers", "alice", group="layer-1")]
    found = reported(clt, model=decoder("llama"), tokens=IDS % 40)
    assert {each.name for each in found if each.labels} == {"layer-1/3"}
    assert found.to_pandas()["label"].dropna().tolist() == ["rivers"]


def test_links_and_stored_metrics_come_from_the_artefact(tmp_path: Any) -> None:
    f = sparse()
    f.site = SITE
    f.metadata = {"sae_lens": {"metadata": {"neuronpedia_id": "gpt2-small/1-res-jb"}}}
    metrics = featurizers.evaluate(f, tiny_model("llama"), IDS, metrics=["sparsity"], progress=False)
    again = featurizers.load(f.save_pretrained(tmp_path / "it", metrics=metrics))
    result = reported(again)
    assert result[3].link == "https://www.neuronpedia.org/gpt2-small/1-res-jb/3"
    assert result.about["stored"]["metrics"]["l0"] == 5
    again.metadata = {"sae_lens": {"metadata": {"neuronpedia_id": 'a/b"><script>'}}, "evaluation": {"metrics": [1]}}
    result = reported(again)
    assert (result[3].link, result.about["stored"]) == (None, None)


# ---------------------------------------------------------------------- texts


def test_tokens_are_shown_as_the_tokenizer_decodes_them() -> None:
    class Tokenizer:
        names = ("Ġthe", "▁word", "âĢ", "<0x0A>", "x")
        texts = (" the", "word", "\ufffd", "\n", "\u202eabc\x00\ud800")

        def decode(self, ids: list[int]) -> str:
            return self.texts[ids[0]]

        def convert_ids_to_tokens(self, number: int) -> str:
            return self.names[number]

    expected = {0: " the", 1: " word", 2: "âĢ", 3: "⏎", 4: "\\u202eabc\\x00\\ud800", 9: " #9"}
    assert token_texts(Tokenizer(), expected) == expected
    assert token_texts(None, [3]) == {3: " #3"}


def test_a_report_is_a_data_frame() -> None:
    pandas = pytest.importorskip("pandas")
    frame = reported(sparse()).to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == 64
    assert frame["density"].sum() == pytest.approx(5)


# ---------------------------------------------------------------------- refusals

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no context": ({"contexts": 0}, "contexts is a number from 1 to 20"),
    "a negative number": ({"effect_tokens": -1}, "effect_tokens is a whole number"),
    "no tokens": ({"tokens": []}, "there are no tokens to measure on"),
    "everything left out": ({"mask_first": 30}, "every token is excluded"),
    "no feature": ({"features": []}, "1 to 32768 features, and 0 are chosen"),
    "a text": ({"tokens": ["w1"]}, "give the tokenizer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_reported_is_refused(case: str) -> None:
    options, words = REFUSED[case]
    with pytest.raises(UsageError, match=words):
        reported(sparse(), **options)


def test_what_does_not_fit_or_is_not_finite_is_refused() -> None:
    with pytest.raises(SiteError):
        reported(sparse(), site="resid.post:7")
    with pytest.raises(ShapeError):
        reported(dictionary("topk", d_in=8))
    with pytest.raises(FeatureIndexError):
        reported(sparse(), features=[64])
    f = sparse("relu")
    f.get_parameter("b_enc").data[3] = math.nan
    with pytest.raises(UsageError, match="feature 3 is NaN or infinite"):
        reported(f)


def test_pairs_of_rows_are_documents_again() -> None:
    """The tokens for the effect on the model are the first of the data, cut as they were."""
    documents = [IDS[i, : 5 + i].tolist() for i in range(6)]
    first = making._First(40)
    from featurizers_evaluate.documents import Reading, batches

    for batch in batches(documents, Reading(context=4), 3, torch.device("cpu")):
        first.add(batch)
    kept = first.documents()
    assert list(itertools.chain(*kept))[:40] == list(itertools.chain(*documents))[:40]
    assert kept[0] == documents[0]
