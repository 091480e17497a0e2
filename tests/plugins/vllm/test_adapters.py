"""Both model runners of vLLM, as far as they can be followed without it: their batches are imitated here."""

from __future__ import annotations

import enum
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import featurizers
import numpy as np
import pytest
import torch
from featurizers import Site
from featurizers_vllm import Settings, server, v1, v2
from featurizers_vllm.architectures import ARCHITECTURES, Architecture
from featurizers_vllm.bank import Bank
from featurizers_vllm.checks import check_version
from featurizers_vllm.errors import ServerError
from featurizers_vllm.models import edited
from featurizers_vllm.rows import Rows
from featurizers_vllm.server import Server
from torch import Tensor, nn

from tests.support.serving import SITE, WIDTH, request, settings

PLACE = Site.parse(SITE)
Direction = enum.Enum("Direction", ["UNIDIRECTIONAL", "SWAP"])


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    return Server(settings(tmp_path_factory.mktemp("artefacts")))


def new_rows(requests: int = 4) -> Rows:
    sizes = {"features": 6, "requests": requests, "tokens": 64, "stages": 2}
    return Rows({site: Bank(WIDTH, **sizes) for site in (PLACE, Site.parse("mlp.out:0"))}, requests)


def steer(feature: int, **changes: Any) -> str:
    return request({"featurizer": "owner/relu", "do": "steer", "indices": [feature], "delta": 5.0, **changes})


def parameters(raw: str | None) -> Any:
    return SimpleNamespace(extra_args=None if raw is None else {"featurizers": raw})


class Batch:
    """A batch of requests that come, go, move and are preempted, with the updates that vLLM's V1 runner would send.

    Attributes:
        at: the JSON of the request in each place, ``"clean"`` if it has no edits, None if the place is free.
    """

    def __init__(self, size: int) -> None:
        self.at: list[str | None] = [None] * size

    def update(self, turn: torch.Generator) -> Any:
        """Change the batch at random and return the update."""

        def chance(n: int) -> int:
            return int(torch.randint(n, (1,), generator=turn))

        removed = [place for place, each in enumerate(self.at) if each is not None and chance(4) == 0]
        for place in removed:
            self.at[place] = None
        added, moved = [], []
        for place, each in enumerate(self.at):
            if each is None and chance(2):
                self.at[place] = "clean" if chance(3) == 0 else steer(chance(40))
                raw = None if self.at[place] == "clean" else self.at[place]
                added.append((place, parameters(raw), [1, 2, 3], []))
        removed = [place for place in removed if self.at[place] is None]
        while None in self.at and any(self.at[self.at.index(None) :]):  # the batch is condensed
            target = self.at.index(None)
            source = max(place for place, each in enumerate(self.at) if each is not None)
            self.at[target], self.at[source] = self.at[source], None
            moved.append((source, target, Direction.UNIDIRECTIONAL))
        count = sum(each is not None for each in self.at)
        if count > 1 and chance(2):
            one, other = chance(count), chance(count)
            self.at[one], self.at[other] = self.at[other], self.at[one]
            moved.append((one, other, Direction.SWAP))
        return SimpleNamespace(removed=removed, added=added, moved=moved)


def alone(running: Server, raw: str | None, x: Tensor) -> Tensor:
    if raw in (None, "clean"):
        return x
    (edit,) = running.admission.edits(raw)
    return edit.program.apply(x)


def test_v1_follows_every_change_of_the_batch(running):
    held, batch, generator = new_rows(6), Batch(6), torch.Generator().manual_seed(0)
    edits = 0
    for turn in range(200):
        v1.update(held, running.admission, batch.update(generator))
        v1.update(held, running.admission, None)
        lengths = [1 + (turn + place) % 3 for place, each in enumerate(batch.at) if each is not None]
        first = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)
        metadata = {"layer": SimpleNamespace(query_start_loc=first)}
        tokens = torch.zeros(64, dtype=torch.long)
        v1.fill(held, metadata, torch.zeros(64, dtype=torch.long), tokens)
        x = torch.randn(sum(lengths) + 2, WIDTH, generator=generator)
        found = held.banks[PLACE](x, None)
        wanted = [alone(running, raw, part) for raw, part in zip(batch.at, x[:-2].split(lengths), strict=False)]
        torch.testing.assert_close(found, torch.cat([*wanted, x[-2:]]), atol=1e-5, rtol=1e-5)
        edits += len(held.edited)
    assert edits > 200


def test_v1_edits_nothing_in_a_pass_that_serves_nobody(running):
    held = new_rows()
    v1.update(
        held, running.admission, SimpleNamespace(removed=[], added=[(0, parameters(steer(1)), [1], [])], moved=[])
    )
    metadata = {"layer": SimpleNamespace(query_start_loc=torch.tensor([0, 4]))}
    v1.fill(held, metadata, torch.arange(4), torch.zeros(4))
    x = torch.randn(4, WIDTH)
    assert not torch.equal(held.banks[PLACE](x, None), x)
    v1.fill(held, None, torch.arange(4), torch.zeros(4))
    assert torch.equal(held.banks[PLACE](x, None), x)


def test_v1_stops_where_it_cannot_tell_whose_tokens_run(running):
    held = new_rows()
    v1.update(
        held, running.admission, SimpleNamespace(removed=[], added=[(2, parameters(steer(1)), [1], [])], moved=[])
    )
    with pytest.raises(RuntimeError, match="does not say which tokens are whose"):
        v1.fill(held, {"layer": object()}, torch.arange(4), torch.zeros(4))
    with pytest.raises(RuntimeError, match="not in the batch"):
        v1.fill(held, {"layer": SimpleNamespace(query_start_loc=torch.tensor([0, 4]))}, torch.arange(4), torch.zeros(4))


# ---------------------------------------------------------------------- the V2 model runner


class ModelState:
    """As vLLM's ``DefaultModelState``."""

    def __init__(self, *arguments: Any) -> None:
        self.told: list[str] = []

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        self.told.append("add")

    def remove_request(self, req_id: str) -> None:
        self.told.append("remove")

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        return {"positions": "theirs"}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        return {}


def data(name: str, raw: str | None, prompt: int) -> Any:
    return SimpleNamespace(req_id=name, sampling_params=parameters(raw), prompt_token_ids=[1] * prompt)


def inputs(order: list[int], lengths: list[int], first: list[int]) -> Any:
    """A batch of requests, by their places in the runner's table, padded as for a captured graph."""
    positions = torch.cat([torch.arange(start, start + n) for start, n in zip(first, lengths, strict=True)])
    end = len(positions)
    starts = np.concatenate([[0], np.cumsum(lengths), [end] * 3]).astype(np.int32)
    return SimpleNamespace(
        num_reqs=len(order),
        num_tokens=end,
        idx_mapping_np=np.array([*order, 0, 0], dtype=np.int32),
        query_start_loc_np=starts,
        positions=nn.functional.pad(positions, (0, 5)),
        input_ids=torch.ones(end + 5, dtype=torch.int32),
    )


def test_v2_edits_the_requests_of_a_pass_wherever_they_are_in_its_table(running):
    held = new_rows(8)
    state = v2.state_class(ModelState, held, running.admission)("config")
    raws = {"a": steer(3), "b": None, "c": steer(9, positions=[-1]), "d": steer(20)}
    for number, (name, raw) in zip((5, 2, 0, 7), raws.items(), strict=True):
        state.add_request(number, data(name, raw, 4))
    assert state.prepare_inputs(inputs([0, 5, 2], [3, 1, 2], [1, 9, 0]), None) == {"positions": "theirs"}
    x = torch.randn(11, WIDTH)
    found = held.banks[PLACE](x, None)
    wanted = [x[:2], alone(running, steer(9), x[2:3]), alone(running, raws["a"], x[3:4]), x[4:]]
    torch.testing.assert_close(found, torch.cat(wanted), atol=1e-5, rtol=1e-5)

    state.remove_request("a")  # preempted
    state.prepare_inputs(inputs([0, 2], [1, 1], [9, 9]), None)
    assert torch.equal(held.banks[PLACE](x, None), x)
    state.add_request(1, data("a", raws["a"], 4))  # and resumed in another place
    state.prepare_inputs(inputs([1], [11], [0]), None)
    torch.testing.assert_close(held.banks[PLACE](x, None), alone(running, raws["a"], x), atol=1e-5, rtol=1e-5)

    state.prepare_dummy_inputs(4, 11)
    assert torch.equal(held.banks[PLACE](x, None), x)
    for name in ("a", "c", "d", "b", "never there"):
        state.remove_request(name)
    assert not held.edited
    assert all(not bank.slots for bank in held.banks.values())
    assert state.told.count("add") == 5


def test_v2_knows_requests_without_sampling(running):
    held = new_rows()
    state = v2.state_class(ModelState, held, running.admission)("config")
    state.add_request(0, SimpleNamespace(req_id="a", sampling_params=None, prompt_token_ids=[1]))
    assert not held.edited


# ---------------------------------------------------------------------- the model


def configuration(**changes: Any) -> Any:
    """Return a configuration as vLLM's, with which edits are right."""
    given: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "dtype": torch.float32,
        "runner_type": "generate",
        "enable_prompt_embeds": False,
        "enable_sleep_mode": False,
        "layers": 2,
        "width": WIDTH,
        "world_size": 1,
        "data_parallel_size": 1,
        "use_ubatching": False,
        "device": "cpu",
        "full_graphs": False,
        "v2": False,
        "speculative": None,
        "transfer": None,
        "fast_prefill": False,
        "additional_config": {},
        **changes,
    }
    names = ("architecture", "dtype", "runner_type", "enable_prompt_embeds", "enable_sleep_mode")
    return SimpleNamespace(
        model_config=SimpleNamespace(
            **{name: given[name] for name in names},
            hf_text_config=SimpleNamespace(num_hidden_layers=given["layers"]),
            get_hidden_size=lambda: given["width"],
        ),
        parallel_config=SimpleNamespace(
            **{name: given[name] for name in ("world_size", "data_parallel_size", "use_ubatching")}
        ),
        device_config=SimpleNamespace(device=given["device"]),
        scheduler_config=SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=64),
        compilation_config=SimpleNamespace(
            cudagraph_mode=SimpleNamespace(has_full_cudagraphs=lambda: given["full_graphs"])
        ),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=given["fast_prefill"]),
        speculative_config=given["speculative"],
        kv_transfer_config=given["transfer"],
        additional_config=given["additional_config"],
        use_v2_model_runner=given["v2"],
    )


WRONG = {
    "another model": ({"architecture": "MambaForCausalLM"}, "'MambaForCausalLM'; supported are.*LlamaForCausalLM"),
    "too few layers": ({"layers": 1}, "resid.post:1 is armed, but the model has 1 layers"),
    "half precision": ({"dtype": torch.float16}, "--dtype bfloat16"),
    "pooling": ({"runner_type": "pooling"}, "only generation"),
    "embeddings": ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
    "sleep": ({"enable_sleep_mode": True}, "--enable-sleep-mode"),
    "parallelism": ({"world_size": 2}, "parallelism"),
    "data parallelism": ({"data_parallel_size": 2}, "parallelism"),
    "batches cut in two": ({"use_ubatching": True}, "--enable-dbo"),
    "speculative decoding": ({"speculative": object()}, "speculative decoding"),
    "disaggregation": ({"transfer": object()}, "KV connector"),
    "skipped layers": ({"fast_prefill": True}, "--kv-sharing-fast-prefill"),
    "other settings": ({"additional_config": "hash"}, "additional_config"),
    "full graphs": ({"device": "cuda", "full_graphs": True}, "cudagraph_mode PIECEWISE"),
    "a GPU": ({"device": "cuda"}, '"untested": true'),
    "the V2 runner": ({"v2": True}, '"untested": true'),
    "another width": ({"width": WIDTH + 1}, f"activations of {WIDTH}, the model's have {WIDTH + 1}"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_server_does_not_start_where_edits_would_not_be_right(name, running):
    changes, reason = WRONG[name]
    with pytest.raises(ServerError, match=f"(?s){reason}"):
        running.build(configuration(**changes))


@pytest.mark.parametrize("version", ["0.32.0", "0.32.5", "0.32.1rc1", "0.32.1.dev7+g1a2b3c4"])
def test_a_tested_version_of_vllm_is_taken(version):
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.32.0", "", "newest", "dev\n"])
def test_another_version_of_vllm_is_refused(version):
    with pytest.raises(ServerError, match=r"vLLM .* is installed, and featurizers-vllm works with >=0\.32,<0\.33"):
        check_version(version)


def test_what_was_not_tested_starts_when_the_operator_says_so(running):
    daring = Server(running.settings.model_copy(update={"untested": True}))
    assert daring.build(configuration(v2=True))
    with pytest.raises(ServerError, match="PIECEWISE"):
        daring.build(configuration(device="cuda", full_graphs=True))


def test_a_processor_that_is_named_twice_is_refused_and_a_second_engine_is_not(running):
    first, second = configuration(), configuration()
    running.join(first)
    with pytest.raises(ServerError, match="named twice"):
        running.join(first)
    running.join(second)
    one, other = running.build(first), running.build(second)
    assert running.rows(first) is one
    assert running.rows(second) is other
    with pytest.raises(RuntimeError, match="another class of model"):
        running.rows(configuration())


def test_the_armed_sites_are_in_the_key_of_compiled_code(running):
    config = configuration(additional_config={"theirs": 1})
    running.build(config)
    assert config.additional_config["theirs"] == 1
    assert json.loads(json.dumps(config.additional_config))["featurizers_vllm"]["sites"] == [SITE, "mlp.out:0"]


class Layer(nn.Module):
    """As a decoder layer of vLLM: it returns what it adds, and the stream that this is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = hidden if residual is None else hidden + residual
        return self.mlp(residual), residual


class Model(nn.Module):
    """As a model of vLLM."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, input_ids: Tensor, positions: Tensor, hidden: Tensor) -> Tensor:
        residual = None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        return hidden + residual


def test_a_model_is_edited_as_by_a_plain_hook(running, monkeypatch):
    monkeypatch.setattr(server, "_running", [running])
    config = configuration(v2=True)
    daring = Server(running.settings.model_copy(update={"untested": True}))
    monkeypatch.setattr(server, "_running", [daring])
    model = edited(Model, Architecture("nowhere", layers="layers"))(vllm_config=config)
    held = daring.rows(config)
    raw = request(
        {"site": "mlp.out:0", "featurizer": "owner/subspace", "do": "ablate"},
        {"featurizer": "owner/relu", "do": "steer", "indices": [1], "delta": 5.0},
    )
    held.add(0, daring.admission.edits(raw), 5)
    held.fill(np.array([0]), np.array([0, 5]), torch.arange(5), torch.zeros(5))
    x = torch.randn(5, WIDTH)
    found = model(torch.zeros(5), torch.arange(5), x)

    programs = [edit.program for edit in daring.admission.edits(raw)]
    plain = Model(vllm_config=None)
    plain.layers[0].mlp.register_forward_hook(lambda _, __, out: programs[0].apply(out))
    wanted = programs[1].apply(plain(torch.zeros(5), torch.arange(5), x))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- settings


def written(**changes: Any) -> bytes:
    given = {"version": 1, "sites": [SITE], "featurizers": [{"id": "a", "path": "b"}], **changes}
    return json.dumps({key: value for key, value in given.items() if value is not None}).encode()


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"{", "not valid JSON"),
        (written(version=2), "version"),
        (written(version=None), "version"),
        (written(site=SITE), "site"),
        (written(sites=[]), "sites"),
        (written(sites=["attn.z:1"]), "cannot be armed; arm sites of the kinds resid.post, attn.out, mlp.out"),
        (written(sites=["resid.pre:3"]), "arm 'resid.post:2'"),
        (written(sites=["resid.pre:0"]), "cannot be armed"),
        (written(sites=["middle"]), "sites"),
        (written(sites=[SITE, SITE]), "named twice"),
        (written(featurizers=[]), "featurizers"),
        (written(featurizers=[{"id": "a", "path": "b"}] * 2), "named twice"),
        (written(featurizers=[{"id": "a"}]), "path"),
        (written(features=0), "features"),
        (written(features="8"), "features"),
        (written(operations=17), "operations"),
    ],
)
def test_settings_that_say_something_else_are_refused(raw, reason, tmp_path):
    with pytest.raises(ServerError, match=f"(?s){reason}"):
        Settings.parse(raw, "settings.json", tmp_path)


def test_settings_are_a_file_or_the_json_itself(tmp_path, monkeypatch):
    assert Settings.of_environment({}) is None
    (tmp_path / "it.json").write_bytes(written())
    of_file = Settings.of_environment({"FEATURIZERS_VLLM": str(tmp_path / "it.json")})
    monkeypatch.chdir(tmp_path)
    of_json = Settings.of_environment({"FEATURIZERS_VLLM": written().decode()})
    assert of_file == of_json
    assert of_file is not None
    assert of_file.featurizers[0].path == str(tmp_path / "b")
    for value in ("", "no-such-file", "a\0b"):
        with pytest.raises(ServerError, match=r"cannot be read.*unset it"):
            Settings.of_environment({"FEATURIZERS_VLLM": value})


def test_a_featurizer_that_cannot_be_loaded_stops_the_server(tmp_path):
    found = Settings.parse(written(), "settings.json", tmp_path)
    with pytest.raises(ServerError, match="featurizer 'a'"):
        Server(found).build(configuration())


def test_weights_that_are_not_the_artefacts_own_stop_the_server(tmp_path):
    f = featurizers.create("subspace", d_in=WIDTH, n_features=2, seed=0)
    f.save_pretrained(tmp_path / "b")
    other = featurizers.create("subspace", d_in=WIDTH, n_features=2, seed=1).save_pretrained(tmp_path / "other")
    (tmp_path / "b" / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(ServerError, match="featurizer 'a'"):
        Server(Settings.parse(written(), "settings.json", tmp_path)).build(configuration())


def test_the_page_of_serving_lists_the_architectures():
    page = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \| \d", page, re.MULTILINE)) == set(ARCHITECTURES)


def test_the_page_of_serving_says_what_is_allowed_if_the_operator_says_nothing(tmp_path):
    page = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()
    said = re.findall(r"^\| `(\w+)` \| most .+; (\d+) if left out \|$", page, re.MULTILINE)
    found = Settings.parse(written(), "settings.json", tmp_path)
    assert {name: int(number) for name, number in said} == {"features": found.features, "operations": found.operations}
    assert not found.untested
