"""Backends of plugins: a made-up library that holds a model, against plain hooks on the model inside it."""

from __future__ import annotations

import importlib.metadata
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import featurizers
import pytest
import torch
from featurizers import Anatomy, Collect, Interchange, Steer, attach, collect, intervene
from featurizers.errors import MissingDependencyError, PluginError, SiteError, UsageError
from featurizers.models import NativeBackend, Pass, Place, backend_of, carry_out, edit_columns, features_of
from featurizers.registry.plugin_host import host
from torch import Tensor, nn

from tests.support.models import WIDTH, fresh_model, hooked, module_of, prompts, tiny_model

IDS, OTHER = prompts(2, 6, seed=1), prompts(2, 6, seed=2)
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
DELTA = torch.linspace(-2, 3, WIDTH)

PLUGIN = """
    from contextlib import contextmanager
    from featurizers import Site, hookimpl
    from featurizers.errors import UsageError
    from featurizers.models import NativeBackend, Place

    class Backend(NativeBackend):
        argument_names = {"input_ids": "ids"}

        def parse(self, text):
            kind, _, layer = text.partition("/")
            return Site("resid.post", int(layer)) if kind == "stream" else None

        def place(self, site):
            if site.kind == "embed":
                return Place("embedding", self.module.embedding, "output")
            return None

        def other_coordinates(self, site):
            return "it is doubled here; hold the model undoubled" if site.kind == "norm.out" else None

        def watched(self):
            return [self.module, self.model, self.model.model]

        @contextmanager
        def prepared(self):
            self.module.prepared += 1
            yield
            self.module.prepared -= 1

    @hookimpl
    def featurizers_backend(model, part):
        if part is not None:
            raise UsageError("its blocks are held already; give the holder")
        return Backend(model.outer, model.outer.inner) if type(model).__name__ == "Holder" else None
"""


class Outer(nn.Module):
    """What the made-up library calls: it takes ids by another name, and passes the embeddings through a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Identity()
        self.layers = inner.model.layers
        self.prepared = 0
        vars(self)["inner"] = inner

    @property
    def config(self) -> Any:
        return vars(self)["inner"].config

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        inner = vars(self)["inner"]
        embeds = self.embedding(inner.model.embed_tokens(ids))
        return inner(inputs_embeds=embeds, attention_mask=attention_mask, use_cache=False).logits


class Holder:
    """No module, as nnsight's LanguageModel."""

    def __init__(self, inner: nn.Module) -> None:
        self.outer = Outer(inner)


Holder.__module__ = "held_lib.models"
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a plugin for one test, beside no others of this project but two kinds."""
    installed = importlib.metadata.entry_points

    def install(code: str, name: str = "held-lib") -> None:
        info = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        module = f"backend_plugin_{abs(hash((str(tmp_path), name)))}"
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(code))
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: dist-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[featurizers]\n{name} = {module}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        host.cache_clear()

    def few(group: str) -> list[Any]:
        kept = {"featurizers", "featurizers-identity", "featurizers-subspace"}
        return [
            entry
            for entry in installed(group=group)
            if tmp_path in Path(str(entry.dist._path)).parents or entry.dist.name in kept
        ]

    monkeypatch.setattr(importlib.metadata, "entry_points", few)
    host.cache_clear()
    yield install
    host.cache_clear()


def steer(positions: list[int] | None = None) -> Steer:
    return Steer(featurizers.create("identity", d_in=WIDTH), delta=DELTA, positions=positions)


def added(columns: list[int]) -> Callable[[Tensor], Tensor]:
    def add(hidden: Tensor) -> Tensor:
        edited = hidden.clone()
        edited[torch.arange(2), columns] += DELTA
        return edited

    return add


def test_a_holder_that_is_no_module_is_edited_through_its_backend(install: Install) -> None:
    install(PLUGIN)
    model = fresh_model("llama")
    held: Any = Holder(model)
    for key in ("resid.post:1", "stream/1"):
        with torch.no_grad(), hooked(*module_of(model, "llama", "resid.post", 1), added([2, 0])):
            expected = model(IDS, attention_mask=MASK).logits
        with torch.no_grad(), intervene(held, {key: steer([0])}):
            assert held.outer.prepared == 1
            assert torch.equal(held.outer(IDS, attention_mask=MASK), expected)
        assert held.outer.prepared == 0
    assert (expected - model(IDS, attention_mask=MASK).logits).abs().max() > 1e-2


def test_the_place_of_a_backend_comes_before_the_modules(install: Install) -> None:
    install(PLUGIN)
    model = fresh_model("llama")
    held: Any = Holder(model)
    assert Anatomy(held).place("embed").path == "embedding"
    with torch.no_grad(), hooked(held.outer.embedding, "output", added([3, 3])):
        expected = held.outer(IDS)
    with torch.no_grad(), intervene(held, {"embed": steer([3])}):
        assert torch.equal(held.outer(IDS), expected)


def test_inputs_have_the_names_of_transformers_whatever_the_holder_calls_them(install: Install) -> None:
    install(PLUGIN)
    model = fresh_model("llama")
    held: Any = Holder(model)
    f = featurizers.create("identity", d_in=WIDTH)
    f.site = featurizers.Site.parse("resid.post:1")
    inputs = {"input_ids": OTHER}
    expected = collect(model, inputs, ["resid.post:1"])["resid.post:1"]
    assert torch.equal(collect(held, inputs, ["resid.post:1"])["resid.post:1"], expected)
    assert torch.equal(attach(held, f).collect(inputs)[0], expected)
    with torch.no_grad():
        swapped = attach(held, f)({"input_ids": IDS}, {"input_ids": OTHER})
        with intervene(model, {"resid.post:1": Interchange(f, source={"input_ids": OTHER})}):
            assert torch.equal(swapped, model(IDS).logits)


def test_attach_and_passports_compare_with_the_model_inside(install: Install, tmp_path: Path) -> None:
    install(PLUGIN)
    model = fresh_model("llama")
    held: Any = Holder(model)
    f = featurizers.create("identity", d_in=WIDTH)
    f.site = featurizers.Site("resid.post", 1, model="you/other")
    model.config._name_or_path = "you/this"
    with pytest.raises(UsageError, match=r"found in the model 'you/other', and this one is 'you/this'"):
        attach(held, f)
    f.site = featurizers.Site("resid.post", 1)
    loaded = featurizers.load(f.save_pretrained(tmp_path / "f", model=held))
    attach(model, loaded)
    attach(held, loaded)
    with pytest.raises(UsageError, match="the activations of this Holder are not those"):
        attach(Holder(fresh_model("llama", rms_norm_eps=0.5)), loaded)


def test_sites_in_other_coordinates_are_refused_and_modules_are_not(install: Install) -> None:
    install(PLUGIN)
    held: Any = Holder(fresh_model("llama"))
    for use in (
        lambda: collect(held, {"input_ids": IDS}, ["norm.out"]),
        lambda: intervene(held, {"norm.out": steer()}).__enter__(),
    ):
        with pytest.raises(SiteError, match=r"norm\.out: it is doubled here; hold the model undoubled\. For a featur"):
            use()
    assert Anatomy(held).place("module:layers.1:output").module is held.outer.layers[1]


def test_a_model_of_transformers_asks_no_plugin(install: Install) -> None:
    install(
        "from featurizers import hookimpl\n@hookimpl\ndef featurizers_backend(model, part): raise SystemExit(model)"
    )
    host().load("held-lib")
    model = tiny_model("llama")
    assert type(backend_of(model)) is NativeBackend
    assert collect(model, {"input_ids": IDS}, ["resid.post:1"])["resid.post:1"].shape == (2, 6, WIDTH)


def test_only_the_plugin_of_the_package_is_imported(install: Install) -> None:
    install(PLUGIN)
    install("raise SystemExit('imported')", name="other-lib")
    assert backend_of(Holder(fresh_model("llama"))).module is not None
    states = {info.name: info.state for info in featurizers.plugins()}
    assert (states["held-lib"], states["other-lib"]) == ("loaded", "available")


def test_the_plugin_of_a_base_class_and_a_loaded_plugin_are_asked(install: Install) -> None:
    install(PLUGIN)
    derived = type("Holder", (Holder,), {"__module__": "my_code"})
    assert type(backend_of(derived(fresh_model("llama")))).__name__ == "Backend"
    unrelated = type("Holder", (), {"__module__": "my_code", "outer": Outer(fresh_model("llama"))})
    assert type(backend_of(unrelated())).__name__ == "Backend"  # the plugin is loaded now


def test_a_missing_plugin_of_this_project_is_named(install: Install) -> None:
    for cls in (type("TransformerBridge", (nn.Module,), {"__module__": "transformer_lens.model_bridge"}), _of_lens()):
        with pytest.raises(MissingDependencyError, match=r"pip install featurizers-transformer-lens$"):
            Anatomy(cls())


def _of_lens() -> Any:
    return type("HookedSAETransformer", (_base(),), {"__module__": "sae_lens.analysis"})


def _base() -> type:
    return type("HookedTransformer", (nn.Module,), {"__module__": "transformer_lens.HookedTransformer"})


def test_the_library_of_the_blocks_may_refuse_the_model(install: Install) -> None:
    install(PLUGIN)
    model = fresh_model("llama")
    block = type("Block", (type(model.model.layers[0]),), {"__module__": "held_lib.blocks"})
    model.model.layers[0].__class__ = block
    with pytest.raises(UsageError, match="its blocks are held already; give the holder"):
        collect(model, {"input_ids": IDS}, ["resid.post:1"])


@pytest.mark.parametrize("result", ["1", "NativeBackend(None)", "1 / 0"])
def test_a_plugin_that_returns_no_backend_or_fails_is_named(result: str, install: Install) -> None:
    install(
        "from featurizers import hookimpl\nfrom featurizers.models import NativeBackend\n"
        f"@hookimpl\ndef featurizers_backend(model, part): return {result}"
    )
    with pytest.raises(PluginError, match=r"featurizers_backend.*(upgrade|Upgrade) or uninstall"):
        Anatomy(Holder(fresh_model("llama")))


# ---------------------------------------------------------------- for adapters that run models otherwise
def test_a_backend_that_refuses_to_begin_refuses_again(install: Install) -> None:
    begin = "            self.module.prepared += 1\n"
    refusing = f"            if self.module.refuses:\n                raise UsageError('not now')\n{begin}"
    install(PLUGIN.replace(begin, refusing))
    model = fresh_model("llama")
    held: Any = Holder(model)
    held.outer.refuses = True
    for _ in range(2):
        with pytest.raises(UsageError, match="not now"), intervene(held, {"resid.post:1": steer([0])}):
            pass
    held.outer.refuses = False
    with torch.no_grad(), hooked(*module_of(model, "llama", "resid.post", 1), added([2, 0])):
        expected = model(IDS, attention_mask=MASK).logits
    with torch.no_grad(), intervene(held, {"resid.post:1": steer([0])}):
        assert torch.equal(held.outer(IDS, attention_mask=MASK), expected)


def test_an_operation_on_a_tensor_is_that_of_intervene() -> None:
    hidden = torch.randn(2, 6, WIDTH)
    found = carry_out(steer([0, -1]), hidden, Pass(attention_mask=MASK))
    expected = hidden.clone()
    for row, columns in enumerate(([2, 5], [0, 5])):
        expected[row, columns] += DELTA
    assert torch.equal(found, expected)
    f = featurizers.create("subspace", d_in=WIDTH, n_features=3)
    collected = features_of(Collect(f, positions=[0]), hidden, Pass(attention_mask=MASK))
    assert torch.equal(collected, f.encode(hidden[torch.arange(2), [2, 0]][:, None]))
    source = torch.randn(2, 1, WIDTH)
    swapped = carry_out(Interchange(steer().featurizer, source=source, positions=[1]), hidden, Pass(), source)
    assert torch.equal(swapped, torch.cat([hidden[:, :1], source, hidden[:, 2:]], dim=1))
    assert carry_out(Collect(f), hidden, Pass()) is hidden
    with pytest.raises(UsageError, match="resid: Interchange needs the activations of its source"):
        carry_out(Interchange(f, source=source), hidden, Pass(), name="resid")


def test_columns_of_a_place_are_edited_and_the_rest_stays() -> None:
    whole = torch.arange(24.0).reshape(1, 2, 12)
    place = Place("", nn.Identity(), "output", slice(1, 3), groups=3)
    found = edit_columns(place, whole, lambda part: part * 0)
    expected = whole.clone()
    expected[..., [1, 2, 5, 6, 9, 10]] = 0
    assert torch.equal(found, expected)
    assert edit_columns(place, whole, lambda part: part) is whole
