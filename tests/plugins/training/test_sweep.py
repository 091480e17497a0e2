"""Sweeps, baselines and controls: against closed forms, plain hooks, torch's SVD, and single searches."""

import csv
import json
import random
import warnings

import featurizers
import featurizers_training as training
import pytest
import torch
from featurizers import Site
from featurizers.errors import MissingDependencyError, SiteError, UsageError
from featurizers_training import CleanRuns
from featurizers_training.sweeps.controls import controlled
from featurizers_training.sweeps.report import heat_map

from tests.support.models import LAYERS, WIDTH, fresh_model, hooked, module_of, prompts, read, tiny_model

LAST = f"resid.post:{LAYERS - 1}"
SETTINGS = training.Settings(epochs=2, batch_size=8)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def answers(model, ids):
    with torch.no_grad():
        return model(ids).logits[:, -1].argmax(-1)


def pairs_of(model, count, seed, **more):
    """Make pairs whose label is the model's own answer to the source."""
    base, source = prompts(count, 5, seed=seed), prompts(count, 5, seed=seed + 100)
    rows = zip(base.tolist(), source.tolist(), answers(model, source).tolist(), strict=True)
    return training.Pairs.of([{"base": b, "source": s, "label": label, **more} for b, s, label in rows])


@pytest.fixture(scope="module")
def parts(model):
    return pairs_of(model, 24, 0), pairs_of(model, 17, 1)


@pytest.fixture(scope="module")
def swept(model, parts):
    methods = [training.DAS(4), training.FullVector(), training.PCA(4), training.RandomSubspace(4)]
    sites = [f"resid.post:{layer}" for layer in range(LAYERS)]
    return training.sweep(model, *parts, sites, [-1, 0], methods, controls=training.CONTROLS, settings=SETTINGS)


@pytest.fixture(scope="module")
def written(swept, tmp_path_factory):
    return swept.write(tmp_path_factory.mktemp("sweep") / "out")


def cell(swept, **wanted):
    (found,) = [c for c in swept.cells if all(str(getattr(c, key)) == str(value) for key, value in wanted.items())]
    return found


# ---------------------------------------------------------------------- measurements


def test_every_cell_exists_once(swept):
    keys = [(c.control, c.position, str(c.site), c.method) for c in swept.cells]
    assert len(keys) == len(set(keys)) == 3 * 2 * LAYERS * 4
    assert {c.control for c in swept.cells} == {None, "shuffled-labels", "random-model"}
    assert all((c.held_out.n, c.train.n) == (17, 24) for c in swept.cells)
    assert {c.selected for c in swept.cells if c.method == "full-vector"} == {WIDTH}
    assert {c.selected for c in swept.cells if c.method != "full-vector"} == {4}


def test_the_last_residual_stream_of_the_source_gives_the_sources_answer(swept):
    best = cell(swept, site=LAST, position=-1, method="full-vector", control=None)
    assert (best.held_out.value, best.train.value) == (1.0, 1.0)


def test_a_token_that_nothing_reads_changes_no_answer(swept, model, parts):
    found = cell(swept, site=LAST, position=0, method="full-vector", control=None)
    hits = [int(answers(model, torch.tensor([pair.base])) == pair.label[0]) for pair in parts[1]]
    assert found.held_out.hits == sum(hits)


@pytest.mark.parametrize(("layer", "position"), [(0, -1), (1, 0)])
def test_the_full_vector_is_a_plain_hook(swept, model, parts, layer, position):
    module, side = module_of(model, "llama", "resid.post", layer)
    hits = 0
    for pair in parts[1]:
        there = read(model, module, side, input_ids=torch.tensor([pair.sources[0]]))[:, position]

        def edit(hidden, there=there):
            hidden = hidden.clone()
            hidden[:, position] = there
            return hidden

        with hooked(module, side, edit):
            hits += int(answers(model, torch.tensor([pair.base])) == pair.label[0])
    found = cell(swept, site=f"resid.post:{layer}", position=position, method="full-vector", control=None)
    assert found.held_out.hits == hits


def test_a_cell_is_the_search_that_train_makes(swept, model, parts):
    best, found = swept.best("das")
    alone = training.train(model, parts[0].at(best.position), best.site, training.DAS(4), settings=SETTINGS)
    torch.testing.assert_close(alone.featurizer.basis, found.featurizer.basis)
    assert alone.accuracy["train"] == best.train == found.accuracy["train"]
    assert training.evaluate(model, parts[1].at(best.position), alone.featurizer) == best.held_out


def test_a_gate_is_hard_when_accuracy_is_measured(model, parts, tmp_path):
    method = training.DBM(temperature=(3.0, 3.0), gate_lr=0.5, sparsity=0.2)
    settings = training.Settings(epochs=10, batch_size=8)
    result = training.sweep(model, *parts, [LAST], [-1], [method], settings=settings)
    loaded = featurizers.load(result.best()[1].save(tmp_path / "a"))
    (found,) = result.cells
    assert 0 < found.selected == len(loaded.feature_sets["selected"]) < WIDTH
    for pairs, measured in zip(parts, (found.train, found.held_out), strict=True):
        hits = 0
        for pair in pairs:
            base, source = ({"input_ids": torch.tensor([ids])} for ids in (pair.base, pair.sources[0]))
            logits = loaded.attach(model)(base, source).logits
            hits += int(logits[0, -1].argmax() == pair.label[0])
        assert measured.hits == hits


def test_searches_run_the_prompts_once_per_position(model, parts, monkeypatch):
    made = []
    real = CleanRuns.__init__

    def counted(self, *arguments, **options):
        made.append(self)
        real(self, *arguments, **options)

    monkeypatch.setattr(CleanRuns, "__init__", counted)
    methods = [training.DAS(2), training.DBM()]
    settings = training.Settings(epochs=1, batch_size=24)
    training.sweep(model, *parts, ["resid.post:0", LAST], [-1, 0], methods, settings=settings)
    assert len(made) == 2 * 2
    made.clear()
    controls = ("random-model", "shuffled-labels")
    swept = training.sweep(model, *parts, [LAST], [-1, 0], methods[:1], settings=settings, controls=controls)
    assert len(made) == 2 * 2 + 2 * 2  # once more in the random model
    assert [(cell.control, cell.position) for cell in swept.cells] == [
        (control, position) for control in (None, *controls) for position in (-1, 0)
    ]


@pytest.mark.parametrize("controls", [(), ("shuffled-labels",)])
def test_baselines_run_the_prompts_once_for_all_positions_and_labels(model, parts, controls):
    rows = []
    handle = model.model.layers[0].self_attn.register_forward_hook(lambda _, __, out: rows.append(len(out[0])))
    methods = [training.FullVector(), training.PCA(2), training.RandomSubspace(2)]
    training.sweep(model, *parts, ["resid.post:1", LAST], [-1, 0, 2], methods, controls=controls)
    handle.remove()
    in_train, in_test, checked = 24, 17, 4
    assert sum(rows) == 3 * in_train + 2 * in_test + 2 * checked  # sources, bases, and those of the search for PCA


@pytest.mark.parametrize("architecture", ["llama", "gpt_neo"])
@torch.no_grad()
def test_a_baselines_answers_are_those_of_plain_hooks(architecture):
    """With prompts of different lengths, some of them shared, labels of one and two tokens, and two tokens at once."""
    model, random_ = tiny_model(architecture), random.Random(0)
    prompt = [[random_.randrange(1, 60) for _ in range(random_.randrange(4, 8))] for _ in range(12)]
    module, side = module_of(model, architecture, "resid.post", 1)
    positions = [[-2, -1], [1, 3]]

    def answer(base, source, tokens, n_label):
        """Generate an answer, one prompt at a time and without a cache, while a hook edits it."""
        there = read(model, module, side, input_ids=torch.tensor([source]))[0, tokens]

        def edit(hidden):
            hidden = hidden.clone()
            hidden[0, [token % len(base) for token in tokens]] = there
            return hidden

        given = []
        with hooked(module, side, edit):
            for _ in range(n_label):
                given.append(int(model(torch.tensor([[*base, *given]])).logits[0, -1].argmax()))
        return given

    bases = [prompt[i - i % 2] for i in range(len(prompt))]
    for tokens in positions:
        labels = [answer(b, s, tokens, 1 + n % 3 % 2) for n, (b, s) in enumerate(zip(bases, prompt, strict=True))]
        spoilt = [[*label[:-1], label[-1] ^ (n % 4 == 0)] for n, label in enumerate(labels)]
        train, test = (
            training.Pairs.of(
                {"base": b, "source": s, "label": label} for b, s, label in zip(bases, prompt, given, strict=True)
            )
            for given in (labels, spoilt)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # gpt_neo does not run on packed rows
            swept = training.sweep(model, train, test, ["resid.post:1"], positions, [training.FullVector()])
        found = cell(swept, position=tokens)
        assert found.train.right == (True,) * len(prompt)
        assert found.held_out.right == tuple(n % 4 != 0 for n in range(len(prompt)))


def test_a_baseline_is_what_train_makes(model, parts):
    """A sweep runs baselines on packed rows, and `train` from the middle of the model."""
    methods = [training.FullVector(), training.PCA(3), training.RandomSubspace(3)]
    swept = training.sweep(model, *parts, ["resid.post:0", "mlp.out:1"], [[1, -1], -1], methods, settings=SETTINGS)
    for cell in swept.cells:
        (method,) = [method for method in methods if method.name == cell.method]
        alone = training.train(model, parts[0].at(cell.position), cell.site, method, settings=SETTINGS)
        assert (cell.train, cell.train.right) == (alone.accuracy["train"], alone.accuracy["train"].right)
        assert cell.held_out == training.evaluate(model, parts[1].at(cell.position), alone.featurizer)
    best, found = swept.best("pca")
    alone = training.train(model, parts[0].at(best.position), best.site, methods[1], settings=SETTINGS)
    torch.testing.assert_close(found.featurizer.state_dict(), alone.featurizer.state_dict())
    described = found.measured(train=alone.accuracy["train"]).featurizer
    assert described.site == alone.featurizer.site
    about = described.metadata["training"]
    assert {**about, "accuracy": 0} == {**alone.featurizer.metadata["training"], "accuracy": 0}


def test_labels_of_another_length_are_run_anew(model):
    records = [{"base": [1, 2, 3], "source": [4, 5, 6], "label": label} for label in ([7], [8, 9], [10])]
    pairs = training.Pairs.of(records)
    runs = CleanRuns(model, pairs, [LAST])
    shuffled = pairs.with_shuffled_labels(1)
    assert [pair.label for pair in shuffled] != [pair.label for pair in pairs]
    same_lengths = [len(pair.label) for pair in shuffled] == [len(pair.label) for pair in pairs]
    assert not same_lengths
    assert not runs.serves(model, shuffled)
    other = training.Pairs.of(
        [{**record, "label": [number] * len(record["label"])} for number, record in enumerate(records)]
    )
    assert not runs.serves(model, other)  # the first token of a long label is run
    assert runs.serves(model, training.Pairs.of([{**records[0], "label": [3]}, records[1], records[2]]))


def test_the_best_is_that_of_the_searches(swept):
    best, found = swept.best()
    assert best.method == "das"
    assert best.control is None
    assert best.held_out.value == max(c.held_out.value for c in swept.cells if c.method == "das" and not c.control)
    assert found.accuracy["test"] == best.held_out
    record = found.featurizer.metadata["training"]["accuracy"]["test"]
    assert record == best.held_out.record()
    assert str(found.featurizer.site) == str(best.site)
    assert swept.best("full-vector")[0].held_out.value == 1.0
    with pytest.raises(UsageError, match=r"das, full-vector, pca, random, and not 'x'"):
        swept.best("x")


def test_a_sweep_does_not_change_the_model(swept, model):
    assert not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh_model("llama").parameters(), strict=True))


def test_positions_that_records_name(model):
    records = [{"base": [1, 2, 3], "source": [4, 5, 6, 7], "label": 9, "base_position": {"subject": 1, "end": -1}}]
    pairs = training.Pairs.of(records, position="end")
    result = training.sweep(model, pairs, pairs, [LAST], ["subject", "end", [0, 1]], [training.FullVector()])
    assert [row["position"] for row in result.rows()] == ["subject", "end", "0+1"]
    right = int(answers(model, torch.tensor([[4, 5, 6, 7]]))) == 9
    assert cell(result, position="end").held_out.hits == int(right)


# ---------------------------------------------------------------------- principal components


@pytest.mark.parametrize("positions", [-1, [0, 3]], ids=str)
def test_principal_components_are_those_of_torchs_svd(model, parts, positions):
    pairs = parts[0].at(positions)
    module, side = module_of(model, "llama", "resid.post", 1)
    columns = [positions] if isinstance(positions, int) else positions
    tokens = [prompt for pair in pairs for prompt in (pair.base, *pair.sources)]
    rows = read(model, module, side, input_ids=torch.tensor(sorted(set(tokens))))[:, columns].reshape(-1, WIDTH)
    wanted = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:3].T
    found = training.train(model, pairs, "resid.post:1", training.PCA(3)).featurizer.stages[-1].basis
    torch.testing.assert_close(found @ found.T, wanted @ wanted.T, atol=1e-4, rtol=1e-4)


def test_principal_components_through_a_featurizer_are_those_of_its_features(model, parts):
    through = featurizers.create("subspace", d_in=WIDTH, n_features=6, seed=3)
    found = training.train(model, parts[0], "resid.post:1", training.PCA(2), through=through)
    alone = training.train(model, parts[0], "resid.post:1", training.PCA(2)).featurizer
    assert found.featurizer.n_features == 2
    runs = CleanRuns(model, parts[0], ["resid.post:1"])
    x = through.encode(runs.activations(0)).detach()
    wanted = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:2].T
    basis = found.featurizer.stages[-1].basis
    torch.testing.assert_close(basis @ basis.T, wanted @ wanted.T, atol=1e-4, rtol=1e-4)
    assert alone.d_in == WIDTH


def test_a_token_of_a_prompt_counts_once(model):
    records = [{"base": [1, 2], "source": [3, 4], "label": 5}, {"base": [3, 4], "source": [1, 2], "label": 5}]
    runs = CleanRuns(model, training.Pairs.of(records), [LAST, "resid.post:0"])
    assert runs.activations(0).shape == (2, WIDTH)


# ---------------------------------------------------------------------- controls


def test_a_random_model_is_what_training_starts_from(model):
    other = training.randomly_initialised(model, seed=1)
    assert type(other) is type(model)
    assert not other.training
    weights = torch.cat([p.flatten() for p in other.parameters() if p.dim() > 1])
    assert float(weights.std()) == pytest.approx(model.config.initializer_range, rel=0.05)
    same, different = training.randomly_initialised(model, seed=1), training.randomly_initialised(model, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), same.parameters(), strict=True))
    assert not torch.equal(other.lm_head.weight, different.lm_head.weight)
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)
    assert "random" in other.config._name_or_path
    assert "random" not in model.config._name_or_path


def test_a_random_model_keeps_the_dtype_and_the_random_state(model):
    before = torch.random.get_rng_state()
    other = training.randomly_initialised(fresh_model("gpt2").to(torch.bfloat16))
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16}
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_model_without_config_has_no_random_one():
    with pytest.raises(UsageError, match=r"a Linear cannot be made anew .* 'random-model' needs"):
        training.randomly_initialised(torch.nn.Linear(2, 2))


def test_the_control_in_a_random_model_is_measured_there(swept, model, parts):
    other = training.randomly_initialised(model, SETTINGS.seed)
    found = cell(swept, site=LAST, position=-1, method="full-vector", control="random-model")
    for pairs, measured in zip(parts, (found.train, found.held_out), strict=True):
        hits = [int(answers(other, torch.tensor(pair.sources)) == pair.label[0]) for pair in pairs]
        assert measured.hits == sum(hits) < len(pairs) / 2


def test_the_control_with_shuffled_labels_has_other_answers(swept, parts):
    found = cell(swept, site=LAST, position=-1, method="full-vector", control="shuffled-labels")
    for pairs, measured in zip(parts, (found.train, found.held_out), strict=True):
        shuffled = pairs.with_shuffled_labels(SETTINGS.seed)
        same = [int(a.label == b.label) for a, b in zip(pairs, shuffled, strict=True)]
        assert measured.hits == sum(same) < len(pairs) / 2


def test_the_search_of_a_control_is_made_with_its_labels(model, parts):
    other, both = controlled("shuffled-labels", model, {"train": parts[0], "test": parts[1]}, SETTINGS.seed)
    assert other is model
    assert sorted(pair.label for pair in both["train"]) == sorted(pair.label for pair in parts[0])
    for control, pairs in ((), parts[0]), (("shuffled-labels",), both["train"]):
        result = training.sweep(model, *parts, [LAST], [-1], [training.DAS(4)], controls=control, settings=SETTINGS)
        alone = training.train(model, pairs, LAST, training.DAS(4), settings=SETTINGS)
        assert result.cells[-1].train == alone.accuracy["train"]
        assert result.cells[-1].control == (control[0] if control else None)


# ---------------------------------------------------------------------- tables and pictures


def test_the_table_holds_the_numbers(swept, written):
    with (written / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    data = json.loads((written / "table.json").read_text())
    assert data["cells"] == swept.rows()
    assert data["methods"]["das"]["n_features"] == 4
    assert len(rows) == len(swept.cells)
    for row, one in zip(rows, swept.cells, strict=True):
        assert (row["site"], row["position"], row["method"]) == (str(one.site), str(one.position), one.method)
        assert row["control"] == (one.control or "")
        assert float(row["accuracy"]) == one.held_out.value
        assert (float(row["low_95"]), float(row["high_95"])) == one.held_out.interval
        assert float(row["train_accuracy"]) == one.train.value


def test_the_heat_map_holds_the_numbers(swept, written):
    from matplotlib import image

    figure = heat_map(swept.rows(), "title")
    panels = [axes for axes in figure.axes if axes.images and axes.texts]
    assert [axes.get_title(loc="left") for axes in panels[:5]] == [
        "das",
        "full-vector",
        "pca",
        "random",
        "das, shuffled-labels",
    ]
    for axes in panels:
        method, _, control = axes.get_title(loc="left").partition(", ")
        values = axes.images[0].get_array()
        assert axes.images[0].get_clim() == (0, 1)
        for y, position in enumerate((-1, 0)):
            for x in range(LAYERS):
                wanted = cell(swept, site=f"resid.post:{x}", position=position, method=method, control=control or None)
                assert values[y, x] == wanted.held_out.value
        assert axes.texts[0].get_text() == f"{values[0, 0]:.0%}"
    pixels = image.imread(written / "heatmap.png")
    assert pixels.shape[0] > 300
    assert pixels.std() > 0.05


def test_with_one_position_methods_go_down(model, parts):
    methods = {"small": training.RandomSubspace(2), "large": training.RandomSubspace(8)}
    result = training.sweep(model, *parts, ["resid.post:0", LAST], [-1], methods, settings=SETTINGS)
    (axes,) = [axes for axes in heat_map(result.rows(), "t").axes if axes.texts]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["small", "large"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["resid.post:0", LAST]
    assert [row["selected"] for row in result.rows()] == [2, 8, 2, 8]


def test_without_matplotlib_the_error_says_what_installs_it(swept, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'featurizers-training\[plots\]'"):
        heat_map(swept.rows(), "t")


# ---------------------------------------------------------------------- errors before anything is computed


def test_wrong_arguments_are_refused_before_anything_is_computed(model, parts, monkeypatch):
    def run(*_, **__):
        raise AssertionError("the model is run")

    monkeypatch.setattr(CleanRuns, "__init__", run)
    full = [training.FullVector()]
    short = training.Pairs.of([{"base": [1], "source": [2, 3], "label": 4}])
    cases = [
        ((parts[0], short, [LAST], [-1, -2], full), {}, training.PairError, "pair 0.*token -2 is not in the prompt"),
        ((*parts, [LAST], ["subject"], full), {}, training.PairError, "no position named 'subject'"),
        ((*parts, ["resid.post:7"], [-1], full), {}, SiteError, "3 layers"),
        ((*parts, [], [-1], full), {}, UsageError, "a site and a position"),
        ((*parts, [LAST], [-1], full * 2), {}, UsageError, "two methods have one name"),
        (
            (*parts, [LAST], [-1], full),
            {"controls": ["noise"]},
            UsageError,
            "shuffled-labels, random-model, not 'noise'",
        ),
        ((*parts, [LAST], [-1], full), {"objective": "x"}, UsageError, "objective is one of"),
        ((*parts, [LAST], [-1], full), {"settings": training.Settings(patience=1)}, UsageError, "leave out patience"),
    ]
    for arguments, options, error, words in cases:
        with pytest.raises(error, match=words):
            training.sweep(model, *arguments, **options)


def test_clean_runs_of_more_sites_serve_a_search_at_one(model, parts):
    runs = SETTINGS.clean_runs(model, parts[0], ["resid.post:0", LAST, "embed"])
    shared = training.train(model, parts[0], LAST, training.DAS(3), settings=SETTINGS, runs=runs, validation=parts[1])
    alone = training.train(model, parts[0], LAST, training.DAS(3), settings=SETTINGS, validation=parts[1])
    torch.testing.assert_close(shared.featurizer.basis, alone.featurizer.basis)
    assert shared.accuracy == alone.accuracy
    with pytest.raises(UsageError, match=r"are at resid.post:0, .* and not at resid.post:1"):
        training.train(model, parts[0], "resid.post:1", training.DAS(3), runs=runs)
    with pytest.raises(UsageError, match=r"other pairs"):
        training.train(model, parts[1], LAST, training.DAS(3), runs=runs)
    several = parts[0].at(-1, 0)
    runs = SETTINGS.clean_runs(model, several, ["resid.post:0", LAST])
    with pytest.raises(UsageError, match=r"for 2 sites"):
        training.train(model, several, LAST, training.DAS(3), runs=runs)


def test_a_site_may_be_given_as_a_site(model, parts):
    result = training.sweep(model, *parts, [Site("resid.post", 0)], [-1], [training.FullVector()], settings=SETTINGS)
    assert [str(c.site) for c in result.cells] == ["resid.post:0"]
