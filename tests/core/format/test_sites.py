"""Names of sites, the modules that they stand for, and errors about sites that a model lacks."""

from __future__ import annotations

import re
from types import SimpleNamespace

import featurizers
import pytest
import torch
import transformers
from featurizers import Ablate, Anatomy, Site, collect, hookimpl, intervene
from featurizers.errors import ManifestError, SiteError
from featurizers.format.sites import BLOCK_KINDS, HEAD_KINDS, MODEL_KINDS, Blocks
from featurizers.registry.plugin_host import host
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.models import LAYERS, WIDTH, fresh_model, prompts, tiny_model

torch.set_num_threads(1)

counts = st.integers(0, 200)
paths = st.from_regex(r"[a-z_0-9]+([.:][a-z_0-9]+){0,4}", fullmatch=True)
sites = st.one_of(
    st.builds(Site, st.sampled_from(sorted(BLOCK_KINDS)), counts),
    st.builds(lambda kind, layer, head: Site(kind, layer, head=head), st.sampled_from(HEAD_KINDS), counts, counts),
    st.builds(Site, st.sampled_from(sorted(MODEL_KINDS))),
    st.builds(lambda path, side: Site("module", module=path, side=side), paths, st.sampled_from(["input", "output"])),
)
found_in = st.fixed_dictionaries(
    {
        "position": st.none() | st.lists(st.integers(-5, 5)).map(tuple),
        "model": st.none() | st.text(),
        "model_revision": st.none() | st.text(),
    }
)


@given(sites)
def test_a_site_is_read_back_from_its_string(site):
    assert Site.parse(str(site)) == site
    assert str(Site.parse(str(site))) == str(site)
    assert Site.parse(site) is site


@given(sites, found_in)
def test_where_a_site_was_found_makes_no_difference_to_which_it_is(site, provenance):
    elsewhere = site.at(**provenance)
    assert elsewhere == site
    assert hash(elsewhere) == hash(site)
    assert str(elsewhere) == str(site)
    assert {name: getattr(elsewhere, name) for name in provenance} == provenance
    assert {site: 1}[elsewhere] == 1


@given(sites, sites)
def test_sites_are_equal_exactly_when_their_strings_are(one, other):
    assert (one == other) == (str(one) == str(other))
    assert one != str(one)


@given(st.text(alphabet="abdeimnoprstuzl.:0123456789- _", max_size=30))
def test_any_string_is_a_site_or_a_site_error(text):
    try:
        site = Site.parse(text)
    except SiteError:
        return
    assert Site.parse(str(site)) == site


@pytest.mark.parametrize(
    "text",
    [
        "",
        "resid.post",
        "resid.post:",
        "resid.post:-1",
        "resid.post:1.0",
        "resid.post: 1",
        "resid.post:x",
        "resid.post:1:2",
        "mlp.out:1:0",
        "attn.z",
        "attn.out:1:0",
        "attn.q",
        "attn.z::3",
        "attn.z:1:2:3",
        "attn.z:1:",
        "resid.middle:1",
        "Resid.Post:1",
        "embed:0",
        "norm.out:0",
        "module",
        "module:",
        "module::output",
        "module:model.layers.0",
        "module:model.layers.0:outputs",
        "blocks.8.hook_resid_post",
    ],
)
def test_a_string_that_names_no_place_is_refused(text):
    with pytest.raises(SiteError):
        Site.parse(text)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "resid.post"},
        {"kind": "resid.post", "layer": True},
        {"kind": "resid.post", "layer": "1"},
        {"kind": "resid.post", "layer": 1.0},
        {"kind": "mlp.out", "layer": 1, "head": 0},
        {"kind": "attn.z", "layer": 1, "head": -1},
        {"kind": "attn.z", "head": 1},
        {"kind": "embed", "layer": 0},
        {"kind": "embed", "head": 0},
        {"kind": "module", "module": "m"},
        {"kind": "module", "side": "input"},
        {"kind": "module", "module": "m", "side": "middle"},
        {"kind": "module", "module": "m", "side": "input", "layer": 1},
        {"kind": "module", "module": "m", "side": "input", "head": 1},
        {"kind": "resid.post", "layer": 1, "module": "m"},
        {"kind": "resid.post", "layer": 1, "side": "input"},
        {"kind": "embed", "module": "m"},
    ],
    ids=str,
)
def test_fields_that_do_not_say_one_place_are_refused(fields):
    with pytest.raises(SiteError):
        Site(**fields)


def test_an_error_lists_the_kinds():
    with pytest.raises(
        SiteError,
        match=r"resid\.pre, resid\.post, attn\.out, attn\.q, attn\.k, attn\.v, attn\.z, resid\.mid, mlp\.in",
    ):
        Site.parse("residual:3")


@pytest.mark.parametrize(
    ("text", "meant"),
    [("resid.pots:3", "resid.post"), ("mpl.out:1", "mlp.out"), ("embedd", "embed"), ("atn.z:1:0", "attn.z")],
)
def test_a_misspelt_kind_is_answered_by_those_like_it(text, meant):
    with pytest.raises(SiteError, match=rf"Did you mean .*'{re.escape(meant)}'"):
        Site.parse(text)


def test_a_site_of_none_says_what_to_set():
    with pytest.raises(SiteError, match=r"the site is None.*set f\.site = 'resid\.post:8'"):
        Site.parse(None)


# ---- in a model


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (f"resid.post:{LAYERS}", "LlamaForCausalLM has 3 layers, 0 to 2"),
        ("attn.z:0:4", "LlamaForCausalLM has 4 heads, 0 to 3"),
        ("module:model.layers.9:output", "no module 'model.layers.9'"),
        ("module:model.layers.0.mlq:input", r"no module 'model.layers.0.mlq'. Did you mean .*'model\.layers\.0\.mlp'"),
        ("nowhere:1", "unknown kind of site 'nowhere'"),
    ],
)
def test_a_site_that_a_model_does_not_have_is_named(site, message):
    model = tiny_model("llama")
    for use in (
        Anatomy(model).place,
        lambda site: collect(model, {"input_ids": prompts(1, 2)}, [site]),
        lambda site: intervene(model, {site: Ablate(featurizers.create("identity"))}).__enter__(),
    ):
        with pytest.raises(SiteError, match=message):
            use(site)


@pytest.mark.parametrize(
    ("site", "component"),
    [
        ("embed", "model.embed_tokens.output"),
        ("resid.pre:0", "model.layers[0].input"),
        ("resid.post:2", "model.layers[2].output"),
        ("attn.out:1", "model.layers[1].self_attn.output"),
        ("attn.z:1", "model.layers[1].self_attn.o_proj.input"),
        ("mlp.out:1", "model.layers[1].mlp.output"),
        ("mlp.act:1", "model.layers[1].mlp.down_proj.input"),
        ("norm.out", "model.norm.output"),
        ("module:model.layers.2.mlp.up_proj:input", "model.layers[2].mlp.up_proj.input"),
        ("module:lm_head:output", "lm_head.output"),
    ],
)
def test_a_site_as_pyvene_writes_it(site, component):
    assert Anatomy(tiny_model("llama")).pyvene_component(site) == component


def test_a_site_as_pyvene_writes_it_in_gpt2():
    assert Anatomy(tiny_model("gpt2")).pyvene_component("attn.z:1") == "transformer.h[1].attn.c_proj.input"
    assert Anatomy(tiny_model("gpt2").transformer).pyvene_component("resid.post:1") == "h[1].output"


def test_pyvene_has_no_module_for_a_head():
    with pytest.raises(SiteError, match="unit 'h'"):
        Anatomy(tiny_model("llama")).pyvene_component("attn.z:1:0")


def test_a_part_that_a_block_does_not_have_is_named():
    config = transformers.OPTConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, ffn_dim=8, word_embed_proj_dim=8
    )
    anatomy = Anatomy(transformers.OPTModel(config))
    assert anatomy.place("attn.z:1").path == "decoder.layers.1.self_attn.out_proj"
    for site in ("mlp.out:1", "mlp.act:1"):
        with pytest.raises(SiteError, match=rf"{site}: no such part was found in OPTDecoderLayer.*module:PATH:output"):
            anatomy.place(site)


@pytest.mark.parametrize(("name", "site"), [("embed_tokens", "embed"), ("norm", "norm.out")])
def test_a_part_that_a_model_does_not_have_is_named(name, site):
    model = fresh_model("llama")
    model.model.renamed = model.model._modules.pop(name)
    with pytest.raises(SiteError, match=f"{site}: no such module was found in LlamaModel"):
        Anatomy(model).place(site)


def test_heads_are_refused_where_their_number_is_unknown():
    model = fresh_model("llama")
    model.config = SimpleNamespace(num_hidden_layers=LAYERS)
    assert Anatomy(model).place("attn.z:1").columns is None
    with pytest.raises(SiteError, match="cannot be told apart"):
        Anatomy(model).place("attn.z:1:0")


def test_a_model_without_blocks_is_refused():
    with pytest.raises(SiteError, match=r"Linear: no list of \? blocks was found.*featurizers_anatomy"):
        Anatomy(nn.Linear(2, 2)).place("resid.post:0")


def test_a_model_without_blocks_still_has_its_modules():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    f = featurizers.create("identity", d_in=2)
    x = torch.ones(3, 2)
    plain = model(x)
    with featurizers.intervene(model, {"module:1:output": featurizers.Steer(f, delta=1.0)}):
        assert torch.equal(model(x), plain + 1)


def test_two_lists_that_could_be_the_blocks_are_refused():
    model = fresh_model("llama")
    model.model.others = nn.ModuleList(fresh_model("llama").model.layers)
    with pytest.raises(SiteError, match=r"several lists look like its blocks: model\.layers, model\.others"):
        _ = Anatomy(model).blocks


def test_the_blocks_beside_the_token_embedding_are_those_of_the_words():
    model = fresh_model("llama")
    model.vision = nn.Module()
    model.vision.layers = fresh_model("gpt2").transformer.h
    assert Anatomy(model).blocks.layers == "model.layers"


def test_a_module_that_carries_no_tensor_is_refused():
    with pytest.raises(SiteError, match="BaseModelOutputWithPast, not a tensor"):
        collect(tiny_model("llama"), {"input_ids": prompts(1, 2)}, ["module:model:output"])


def test_a_module_site_reads_a_named_argument():
    model, inputs = tiny_model("llama"), {"input_ids": prompts(2, 3)}
    found = collect(
        model, inputs, ["module:model.layers.1.self_attn:input", "module:model.layers.1.input_layernorm:output"]
    )
    assert torch.equal(*found.values())


# ---- models of other libraries


class ToyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Linear(WIDTH, WIDTH)
        self.thinking = nn.Sequential(nn.Linear(WIDTH, 12), nn.ReLU(), nn.Linear(12, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixing(x).cumsum(1)
        return x + self.thinking(x)


class Toy(nn.Module):
    """A model that is not from `transformers`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Module()
        self.words = nn.Embedding(9, WIDTH)
        self.body.steps = nn.ModuleList([ToyBlock(), ToyBlock()])

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.words(tokens)
        for step in self.body.steps:
            x = step(x)
        return x


class ToyPlugin:
    @staticmethod
    @hookimpl
    def featurizers_anatomy(model: nn.Module) -> Blocks | None:
        if hasattr(model, "strange"):
            return Blocks(decoder="model", layers="model.layers", mlp="post_attention_layernorm")
        if not isinstance(model, Toy):
            return None
        return Blocks(decoder="", layers="body.steps", mlp="thinking", down_projection="thinking.2", attention="mixing")


@pytest.fixture
def toy_plugin():
    plugin = ToyPlugin()
    host()._manager.register(plugin, "toy")
    yield plugin
    host()._manager.unregister(plugin)


def test_a_model_of_another_library_is_refused_without_a_plugin():
    with pytest.raises(SiteError, match="Toy: no list of"):
        Anatomy(Toy()).place("resid.post:0")


@pytest.mark.usefixtures("toy_plugin")
class TestAnAnatomyOfAPlugin:
    TOKENS = torch.tensor([[0, 0, 3, 4], [1, 2, 5, 6]])
    MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])

    def test_it_says_where_the_sites_are(self):
        anatomy = Anatomy(Toy())
        assert anatomy.n_layers == 2
        assert anatomy.place("mlp.act:1").path == "body.steps.1.thinking.2"
        assert anatomy.pyvene_component("mlp.act:1") == "body.steps[1].thinking[2].input"
        with pytest.raises(SiteError, match=r"attn\.z:0: no such part was found in ToyBlock"):
            anatomy.place("attn.z:0")

    def test_the_sites_are_read_and_edited(self):
        model = Toy()
        inputs = {"tokens": self.TOKENS}
        found = collect(model, inputs, ["resid.pre:0", "attn.out:0", "mlp.out:0", "resid.post:0", "mlp.act:1"])
        parts = found["resid.pre:0"] + found["attn.out:0"].cumsum(1) + found["mlp.out:0"]
        torch.testing.assert_close(parts, found["resid.post:0"])
        assert found["mlp.act:1"].shape == (2, 4, 12)
        with torch.no_grad(), intervene(model, {"mlp.out:1": Ablate(featurizers.create("identity"))}):
            x = found["resid.post:0"]
            assert torch.equal(model(**inputs), x + model.body.steps[1].mixing(x).cumsum(1))

    def test_positions_follow_the_mask_that_its_decoder_is_given(self):
        found = collect(Toy(), {"tokens": self.TOKENS, "attention_mask": self.MASK}, ["resid.pre:0"], positions=[0])[
            "resid.pre:0"
        ]
        assert torch.equal(found[:, 0], Toy().words(torch.tensor([3, 1])))

    def test_it_is_not_asked_for_other_models(self):
        assert Anatomy(tiny_model("gpt2")).blocks.layers == "transformer.h"

    def test_it_comes_before_what_the_library_would_find(self):
        model = fresh_model("llama")
        model.strange = True
        assert Anatomy(model).place("mlp.out:1").path == "model.layers.1.post_attention_layernorm"

    def test_a_path_that_it_gets_wrong_is_named(self):
        model = Toy()
        model.body.steps[1].thinking = nn.ReLU()
        with pytest.raises(SiteError, match=r"Toy has no module 'body\.steps\.1\.thinking\.2'"):
            Anatomy(model).place("mlp.act:1")


def test_where_a_site_was_found_is_added_and_not_forgotten():
    site = Site("resid.post", 1).at(position=(-1,)).at(model="owner/model").at(model_revision="v1")
    assert (site.position, site.model, site.model_revision) == ((-1,), "owner/model", "v1")


@pytest.mark.parametrize("shape", [(3, 2), (4, 5, 6, 2)])
def test_activations_of_other_axes_are_ablated_to_the_mean_of_each_feature(shape):
    model, f = nn.Sequential(nn.Identity()), featurizers.create("identity", d_in=2)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with featurizers.intervene(model, {"module:0:output": Ablate(f, value="mean")}):
        torch.testing.assert_close(model(x), x.flatten(0, -2).mean(0).expand(shape))


def test_a_vector_is_edited_whole_and_has_no_positions():
    model, f = nn.Sequential(nn.Identity()), featurizers.create("identity", d_in=2)
    swap = featurizers.Interchange(f, source=torch.ones(2))
    with featurizers.intervene(model, {"module:0:output": swap}):
        assert torch.equal(model(torch.zeros(2)), torch.ones(2))
    swap = featurizers.Interchange(f, source=torch.ones(2), positions=[0])
    with featurizers.intervene(model, {"module:0:output": swap}), pytest.raises(featurizers.errors.ShapeError):
        model(torch.zeros(2))


@pytest.mark.parametrize("text", ["resid.post:8", "attn.z:8:3", "embed", "module:model.layers.8.mlp:output"])
def test_a_whole_site_may_be_given_where_its_kind_is(text):
    site = Site(text, model="owner/model")
    assert vars(site) == vars(Site.parse(text).at(model="owner/model"))
    f = featurizers.create("identity", d_in=8)
    f.site = text
    assert f.site == Site.parse(text)
    f.site = None
    assert f.site is None


@pytest.mark.parametrize("wrong", ["resid.post", "resid.post:x", "nowhere", 8, ("resid.post", 8)])
def test_what_names_no_site_is_refused_where_it_is_assigned(wrong):
    f = featurizers.create("identity", d_in=8)
    with pytest.raises(SiteError):
        f.site = wrong
    with pytest.raises(SiteError):
        Site(wrong)
    with pytest.raises(SiteError):
        Site("resid.post:8", 9)


@pytest.mark.parametrize("length", [1, 255, 256, 257])
@pytest.mark.parametrize("side", ["input", "output"])
def test_a_module_site_of_any_length_that_is_saved_is_listed(length, side, tmp_path):
    f = featurizers.create("identity", d_in=8)
    f.site = Site("module", module="a" * length, side=side)
    if length > 256:
        with pytest.raises(ManifestError, match=r"at most 2|module"):
            f.save_pretrained(tmp_path)
        with pytest.raises(ManifestError, match=r"at most 2|module"):
            featurizers.save_collection({"a": f}, tmp_path / "b")
        return
    f.save_pretrained(tmp_path / "a")
    featurizers.save_collection({"a": f}, tmp_path / "b")
    for folder in ("a", "b"):
        (entry,) = featurizers.list_artefacts(tmp_path / folder).values()
        assert entry.site == str(f.site)
    assert featurizers.load(tmp_path / "b", subfolder="a").site == f.site
