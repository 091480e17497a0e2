"""Requests: their JSON from ordinary operations, what is admitted, and what is refused with a reason."""

from __future__ import annotations

import functools
import json
from types import SimpleNamespace
from typing import Any

import featurizers
import pytest
import torch
from featurizers import Ablate, Collect, Interchange, Mask, Steer
from featurizers.errors import FeatureIndexError, LoweringError
from featurizers_vllm import RequestError, ServerError, extra_args, server, starting
from featurizers_vllm.admission import Admission
from featurizers_vllm.server import Server

from tests.support.serving import COUNT, SITE, WIDTH, request, settings

STEER = {"featurizer": "owner/relu", "do": "steer", "indices": [1], "delta": 2.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artefacts")
    settings(folder)  # writes the artefacts, also for tests that ask no server
    return folder


@pytest.fixture(scope="module")
def admission(folder):
    return Admission(settings(folder))


def loaded(folder: Any, name: str, **options: Any) -> Any:
    f = featurizers.load(folder / name, **options)
    f.id, f.revision = f"owner/{name}", "r1"
    return f


SOURCE = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(3)) * 2
OPERATIONS = {
    "steer": lambda f: Steer(f("topk"), delta=torch.tensor([1.5, -2.0]), indices=[30, 2]),
    "steer by one number": lambda f: Steer(f("relu"), delta=1 / 3, indices=slice(2, 6), positions=[0, -1]),
    "ablate all": lambda f: Ablate(f("subspace"), value=torch.tensor([1.0, 2.0, 3.0, 4.0])),
    "ablate by a mask": lambda f: Ablate(f("jumprelu"), indices=torch.arange(COUNT) % 9 == 3),
    "ablate of a slice": lambda f: Ablate(f("gated", indices=[7, 30, 2]), value=0.7),
    "interchange": lambda f: Interchange(f("gated"), source=SOURCE, indices=[9, 3]),
    "mask": lambda f: Mask(f("subspace"), source=SOURCE, gate=torch.tensor([0.0, 0.3, 1.0, 0.5]), positions=[2]),
}


@pytest.mark.parametrize("name", [name for name, make in OPERATIONS.items() if name not in ("interchange", "mask")])
def test_the_edits_of_an_artefact_have_the_form_of_a_request(name, folder, admission, tmp_path):
    operation = OPERATIONS[name](lambda name, **options: loaded(folder, name, **options))
    f = operation.featurizer
    f.site, f.edits = SITE, [operation]
    saved = featurizers.load(f.save_pretrained(tmp_path / "a"))
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    sent, stored = admission.of({"featurizers": json.dumps(config["metadata"]["feature_edits"])}), saved.edits
    x = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(1)) * 3
    for edit, own in zip(sent, stored, strict=True):
        assert torch.allclose(edit.program.apply(x), featurizers.lower(own).apply(x), atol=1e-5)
    saved.revision = "r1"
    assert extra_args({SITE: saved.edits}) == extra_args({SITE: operation})


def test_a_request_gives_its_source_by_features(admission):
    sourced = {"featurizer": "owner/relu", "do": "interchange", "source": [[0.0] * WIDTH]}
    with pytest.raises(RequestError, match="gives its source by 'features', not by its activations"):
        admission.of({"featurizers": request(sourced)})


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_request_of_an_operation_is_lowered_to_the_operation(name, folder, admission):
    operation = OPERATIONS[name](lambda name, **options: loaded(folder, name, **options))
    arguments = extra_args({SITE: operation})
    (edit,) = admission.of(arguments)
    program = featurizers.lower(operation)
    x = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(1)) * 3
    wanted = program.apply(x)
    assert not torch.allclose(wanted, x, atol=0.1)
    torch.testing.assert_close(edit.program.apply(x), wanted, atol=1e-5, rtol=1e-5)
    assert (edit.positions, str(edit.site), edit.stage) == (program.positions, SITE, 0)
    assert edit.prompt_only == isinstance(operation, Interchange | Mask)


def test_operations_of_one_site_keep_their_order(folder, admission):
    f = loaded(folder, "subspace")
    several = {SITE: [Steer(f, delta=1.0), Ablate(f)], "mlp.out:0": Steer(f, delta=2.0)}
    edits = admission.of(extra_args(several))
    assert [(str(edit.site), edit.stage) for edit in edits] == [(SITE, 0), (SITE, 1), ("mlp.out:0", 0)]
    assert edits[0].program.vector is not None
    assert edits[1].program.vector is None


def test_a_request_names_a_featurizer_as_the_operator_does(folder, admission):
    f = featurizers.load(folder / "relu")
    with pytest.raises(RequestError, match=r"no featurizer 'dictionary'"):
        admission.of(extra_args({SITE: Steer(f, delta=1.0, indices=[1])}))
    assert admission.of(extra_args({SITE: Steer(f, delta=1.0, indices=[1])}, names={f: "owner/relu"}))
    with pytest.raises(RequestError, match=r"'owner/relu' is here at the revisions 'r1', not 'r2'"):
        admission.of({"featurizers": request({**STEER, "revision": "r2"})})


@pytest.mark.parametrize(
    "operation",
    [
        lambda f: Ablate(f, value="mean"),
        Collect,
        lambda f: Interchange(f, source={"input_ids": torch.ones(1, 2, dtype=torch.long)}),
        lambda f: Steer(f, delta=1.0, positions=[[0], [1]]),
        lambda f: Steer(f, delta=1.0, indices=[[0], [1]]),
    ],
)
def test_an_operation_without_a_fixed_form_makes_no_request(operation, folder):
    with pytest.raises(LoweringError):
        extra_args({SITE: operation(loaded(folder, "relu"))})


def test_an_index_that_the_featurizer_lacks_makes_no_request(folder):
    with pytest.raises(FeatureIndexError, match="out of range"):
        extra_args({SITE: Steer(loaded(folder, "relu"), delta=1.0, indices=[COUNT])})


def edits(**changes: Any) -> str:
    return request({**STEER, **changes})


DAMAGED = {
    "no JSON": ("{", "not valid JSON"),
    "a list": ("[]", "valid dictionary"),
    "no version": ('{"edits": []}', "version.*required"),
    "another version": ('{"version": 2, "edits": []}', "version"),
    "a version as text": ('{"version": "1", "edits": []}', "version"),
    "no edits": ('{"version": 1}', "edits.*required"),
    "edits by site": ('{"version": 1, "edits": {}}', "valid list"),
    "an unknown key": ('{"version": 1, "edits": [], "salt": 1}', "salt"),
    "a key twice": ('{"version": 1, "edits": [], "edits": []}', "not valid JSON.*twice|not valid JSON.*repeat|edits"),
    "not a number": (edits(delta=float("nan")), "not valid JSON"),
    "infinity": (edits(delta=float("inf")), "not valid JSON"),
    "an overflow": (edits().replace("2.0", "1e999"), "not valid JSON"),
    "nested deeply": ("[" * 5000, "not valid JSON|nested"),
    "too long": (edits(featurizer="x" * 1_000_001), "larger than"),
    "a lone surrogate": ('"\ud800"', "not valid JSON"),
    "an unknown operation": (edits(do="patch"), "do"),
    "no operation": (json.dumps({"version": 1, "edits": [{"site": SITE}]}), "discriminator"),
    "a value to steer": (edits(value=1.0), "value"),
    "a misspelt key": (edits(position=[0]), "position"),
    "no amount": (
        json.dumps({"version": 1, "edits": [{"site": SITE, "featurizer": "owner/relu", "do": "steer"}]}),
        "delta",
    ),
    "an amount as text": (edits(delta="2"), "delta"),
    "an amount as a truth": (edits(delta=True), "delta"),
    "amounts of amounts": (edits(delta=[[1.0]]), "delta"),
    "too few amounts": (edits(indices=[1, 2, 3], delta=[1.0, 2.0]), "do not fit"),
    "too many amounts": (edits(delta=[1.0, 2.0]), "do not fit"),
    "an amount that overflows": (edits(delta=1e30), r"writes numbers up to .*e\+29; at most 1e\+06"),
    "a fraction of an index": (edits(indices=[1.5]), "indices"),
    "an index as a truth": (edits(indices=[True]), "indices"),
    "an enormous index": (edits(indices=[2**70]), "indices"),
    "a negative index": (edits(indices=[-1]), "out of range"),
    "an index too high": (edits(indices=[COUNT]), "out of range"),
    "an index twice": (edits(indices=[1, 1]), "repeated"),
    "too many features": (edits(indices=list(range(7))), "7 features are edited; this server allows 6"),
    "all features": (edits(indices=None), f"{COUNT} features are edited"),
    "no position": (edits(positions=[]), "positions"),
    "positions of prompts": (edits(positions=[[0]]), "positions"),
    "an enormous position": (edits(positions=[2**70]), "positions"),
    "a site that is none": (edits(site="middle"), "cannot read|unknown kind"),
    "a site that is not armed": (edits(site="resid.post:0"), "not armed; this server has"),
    "a head": (edits(site="attn.z:1:0"), "not armed"),
    "an unknown featurizer": (edits(featurizer="owner/rel"), "Did you mean 'owner/relu'"),
    "a path": (edits(featurizer="../../etc"), "no featurizer"),
    "three operations": (request(STEER, STEER, STEER), "2 operations at one site"),
    "no fixed form": (edits(do="ablate", featurizer="owner/topk", delta=None).replace(', "delta": null', ""), "Steer"),
    "a gate above 1": (
        request({"featurizer": "owner/relu", "do": "mask", "indices": [1], "features": 1.0, "gate": 1.1}),
        "gate",
    ),
    "too few gates": (
        request({"featurizer": "owner/relu", "do": "mask", "indices": [1, 2], "features": 1.0, "gate": [0.1]}),
        "gate has 1 numbers for 2 features",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_request_that_cannot_be_served_is_refused_with_the_reason(name, admission):
    raw, reason = DAMAGED[name]
    with pytest.raises(RequestError, match=f"(?s){reason}") as error:
        admission.of({"featurizers": raw})
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 3001


def test_a_request_whose_bytes_are_damaged_is_refused_or_is_what_it_says(admission):
    """Each byte in turn is left out or replaced; nothing but a refusal comes of it, or edits of the same form."""
    whole = edits(positions=[0, -1])
    generator = torch.Generator().manual_seed(0)
    for place in range(len(whole)):
        letter = chr(int(torch.randint(32, 127, (1,), generator=generator)))
        for damaged in (whole[:place] + whole[place + 1 :], whole[:place] + letter + whole[place + 1 :]):
            try:
                found = admission.of({"featurizers": damaged})
            except RequestError:
                continue
            written = json.loads(damaged)["edits"][0]
            assert found[0].program.constant.tolist() == pytest.approx([written["delta"]] * len(written["indices"]))
            assert list(found[0].positions) == written["positions"]


@pytest.mark.parametrize("key", ["featurizer", "Featurizers", "featurizers_", "featurizer_edits"])
def test_a_misspelt_argument_is_refused_and_others_are_left_alone(key, admission):
    with pytest.raises(RequestError, match="stand under 'featurizers'"):
        admission.of({key: edits()})
    assert admission.of({"kv_transfer_params": {}, "session": "x"}) == ()
    assert admission.of(None) == ()


@pytest.mark.parametrize("given", [[], {}, 1, True, b"{}"])
def test_an_argument_that_is_no_text_is_refused(given, admission):
    with pytest.raises(RequestError, match=r"string of JSON.*json\.dumps"):
        admission.of({"featurizers": given})


def test_an_edit_of_as_many_features_as_are_allowed_is_admitted(admission):
    (edit,) = admission.of({"featurizers": edits(indices=list(range(6)))})
    assert edit.program.constant.tolist() == [2.0] * 6


def test_an_edit_of_no_features_edits_nothing(admission):
    (edit,) = admission.of({"featurizers": edits(indices=[])})
    x = torch.randn(3, WIDTH)
    assert torch.equal(edit.program.apply(x), x)


def test_a_server_that_arms_nothing_refuses_edits_and_serves_the_rest(monkeypatch):
    monkeypatch.delenv("FEATURIZERS_VLLM", raising=False)
    monkeypatch.setattr(server, "_running", [])
    server.admit({"other": 1})
    with pytest.raises(RequestError, match="started without FEATURIZERS_VLLM"):
        server.admit({"featurizers": edits()})
    monkeypatch.setenv("FEATURIZERS_VLLM", "settings.json")
    with pytest.raises(ServerError, match="name it in VLLM_PLUGINS"):
        server.admit({"featurizers": edits()})


def test_a_process_has_one_server_which_checks_its_requests(monkeypatch, folder):
    monkeypatch.setattr(server, "_running", [])
    first = server.start(settings(folder))
    assert server.start(settings(folder)) is first  # vLLM may load its plugins again
    assert server.of_process() is first
    server.admit({"featurizers": edits()})
    with pytest.raises(RequestError, match="out of range"):
        server.admit({"featurizers": edits(indices=[COUNT])})


# ---------------------------------------------------------------------- where vLLM makes a request for its engine


class Refused(Exception):
    pass


def decorated(method: Any) -> Any:
    """Wrap a method as vLLM's own decorators do."""

    @functools.wraps(method)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        return method(*arguments, **options)

    return wrapper


class InputProcessor:
    """As vLLM's, which turns a prompt into a request."""

    def __init__(self) -> None:
        self.made = True

    @decorated
    def process_inputs(self, tokens: list[int] | None, params: Any, **changes: Any) -> Any:
        given = {"prompt_token_ids": tokens, "sampling_params": params, "cache_salt": None, "resumable": False}
        return SimpleNamespace(**{**given, **changes})


@pytest.fixture
def processor(folder):
    kind = type("Processor", (InputProcessor,), {"process_inputs": InputProcessor.process_inputs})
    running = Server(settings(folder))
    starting.watch_requests(kind, running, Refused, tuple)
    starting.watch_requests(kind, running, Refused, tuple)  # as when vLLM loads its plugins again
    assert kind.process_inputs.__wrapped__ is InputProcessor.process_inputs
    return kind()


def parameters(raw: str | None) -> Any:
    return SimpleNamespace(extra_args=None if raw is None else {"featurizers": raw})


def test_requests_share_cached_keys_and_values_only_with_the_same_edits_and_salt(processor):
    def salt(raw: str | None, cache_salt: str | None = None) -> str | None:
        return processor.process_inputs([1, 2], parameters(raw), cache_salt=cache_salt).cache_salt

    assert salt(None) is None
    assert salt(None, "mine") == "mine"
    assert salt('{"version": 1, "edits": []}') is None
    distinct = [salt(edits()), salt(edits(delta=2.5)), salt(edits(), "mine"), salt(edits(), "yours"), "mine"]
    assert len(set(distinct)) == 5
    assert salt(edits(), "mine") == distinct[2]
    assert edits() not in str(distinct)  # a client cannot name the salt of another's edits


def test_a_second_turn_shares_the_first_ones_keys_and_values_only_if_the_same_tokens_are_edited(processor):
    """The answer of a first turn belongs to the prompt of the second, whose last token is another one."""
    mask = {"featurizer": "owner/relu", "do": "mask", "indices": [1], "features": 1.0, "gate": 0.5}
    interchange = {"featurizer": "owner/relu", "do": "interchange", "indices": [1], "features": 1.0}

    def shares(raw: str) -> bool:
        first, second = (processor.process_inputs([7] * n, parameters(raw)).cache_salt for n in (5, 9))
        assert first == processor.process_inputs([8] * 5, parameters(raw)).cache_salt
        return first == second

    assert shares(edits())
    assert shares(edits(positions=[0, 4]))
    assert not shares(edits(positions=[0, -1]))
    assert not shares(request(mask))
    assert not shares(request(STEER, interchange))


def test_a_position_that_the_prompt_lacks_is_refused_and_no_other(processor):
    for positions in ([0, 4], [-5]):
        assert processor.process_inputs([7] * 5, parameters(edits(positions=positions))).cache_salt
    for position in (5, -6, 100):
        with pytest.raises(Refused, match=f"the prompt has 5 tokens, and so no position {position}"):
            processor.process_inputs([7] * 5, parameters(edits(positions=[0, position])))


def test_prompts_without_tokens_and_prompts_in_parts_are_refused(processor):
    with pytest.raises(Refused, match="embeddings"):
        processor.process_inputs(None, parameters(edits()))
    with pytest.raises(Refused, match="in parts"):
        processor.process_inputs([1], parameters(edits()), resumable=True)
    assert processor.process_inputs(None, None).cache_salt is None


def test_a_beam_search_which_forgets_the_edits_is_refused():
    class Body:
        def __init__(self, arguments: dict[str, Any] | None) -> None:
            self.vllm_xargs = arguments

        def to_beam_search_params(self, width: int) -> int:
            return width

    starting.refuse_beams(Body, Refused)
    starting.refuse_beams(Body, Refused)
    assert Body(None).to_beam_search_params(3) == 3
    assert Body({"other": 1}).to_beam_search_params(3) == 3
    with pytest.raises(Refused, match="beam search"):
        Body({"featurizers": edits()}).to_beam_search_params(3)
