"""`Anatomy` after the model has changed under it: nothing of an earlier answer is left."""

import copy
import pickle

import featurizers
import pytest
import torch
from featurizers import hookimpl
from featurizers.errors import PluginError, SiteError
from featurizers.format import Blocks
from featurizers.models import Anatomy, collect, intervene
from featurizers.registry.plugin_host import host
from torch import Tensor, nn

from tests.support.models import LAYERS, WIDTH, fresh_model, prompts

SITES = ("resid.post:1", "attn.z:1", "mlp.act:1")


class Wrapped(nn.Module):
    """Calls the module that it holds, and adds one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        output = self.inner(*args, **kwargs)
        return (output[0] + 1, *output[1:]) if isinstance(output, tuple) else output + 1


@pytest.fixture
def model():
    """A model whose sites were asked for already."""
    model = fresh_model("llama")
    with intervene(model, {site: featurizers.Collect(featurizers.create("identity")) for site in SITES}):
        model(prompts(1, 3))
    assert Anatomy(model).n_layers == LAYERS
    return model


def is_steered(model: nn.Module, site: str) -> bool:
    """Whether an edit at a site changes the logits of the model as it is now."""
    before = model(prompts(1, 3)).logits
    with intervene(model, {site: featurizers.Steer(featurizers.create("identity"), delta=1.0)}):
        return not torch.equal(model(prompts(1, 3)).logits, before)


def test_blocks_that_are_added(model):
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    with pytest.raises(SiteError, match="no list of 3 blocks was found"):
        Anatomy(model).place("resid.post:0")
    model.config.num_hidden_layers = LAYERS + 1
    assert Anatomy(model).place(f"resid.post:{LAYERS}").module is model.model.layers[LAYERS]


def test_blocks_that_are_removed(model):
    del model.model.layers[0]
    model.config.num_hidden_layers = LAYERS - 1
    assert Anatomy(model).place("resid.post:0").module is model.model.layers[0]
    with pytest.raises(SiteError, match="has 2 layers, 0 to 1"):
        Anatomy(model).place("resid.post:2")


def test_a_block_that_is_replaced(model):
    model.model.layers[1] = copy.deepcopy(model.model.layers[1])
    assert Anatomy(model).place("resid.post:1").module is model.model.layers[1]
    assert is_steered(model, "attn.z:1")
    model.model.layers[1] = Wrapped(model.model.layers[1])
    with pytest.raises(SiteError, match="no list of 3 blocks was found"):
        Anatomy(model).place("resid.post:1")


def test_a_config_that_is_replaced(model):
    heads = model.config.num_attention_heads
    assert Anatomy(model).place("attn.z:1:1").columns == slice(WIDTH // heads, 2 * WIDTH // heads)
    model.config = copy.deepcopy(model.config)
    model.config.num_attention_heads = heads // 2
    assert Anatomy(model).place("attn.z:1:1").columns == slice(2 * WIDTH // heads, 4 * WIDTH // heads)


def test_a_list_of_blocks_that_is_replaced_or_renamed(model):
    model.model.layers = nn.ModuleList([copy.deepcopy(block) for block in model.model.layers])
    assert Anatomy(model).place("resid.post:1").module is model.model.layers[1]
    model.model.blocks = model.model._modules.pop("layers")
    assert Anatomy(model).place("resid.post:1").path == "model.blocks.1"


def test_a_second_list_that_looks_like_blocks(model):
    model.model.others = nn.ModuleList(fresh_model("llama").model.layers)
    with pytest.raises(SiteError, match=r"several lists look like its blocks: model\.layers, model\.others"):
        intervene(model, {"resid.post:0": featurizers.Collect(featurizers.create("identity"))}).__enter__()


@pytest.mark.parametrize("name", ["self_attn", "mlp"])
def test_a_part_that_is_wrapped_by_assignment(model, name):
    for block in model.model.layers:
        setattr(block, name, Wrapped(getattr(block, name)))
    inner = {"self_attn": ("attn.z", "o_proj", "attn.out"), "mlp": ("mlp.act", "down_proj", "mlp.out")}[name]
    place = Anatomy(model).place(f"{inner[0]}:1")
    assert place.path == f"model.layers.1.{name}.inner.{inner[1]}"
    assert Anatomy(model).place(f"{inner[2]}:1").module is getattr(model.model.layers[1], name)
    assert is_steered(model, f"{inner[0]}:1")


def test_a_projection_that_is_wrapped_by_assignment(model):
    for block in model.model.layers:
        block.mlp.down_proj = Wrapped(block.mlp.down_proj)
    with pytest.raises(SiteError, match=r"mlp\.act:1: no such part was found in LlamaDecoderLayer"):
        Anatomy(model).place("mlp.act:1")
    for block in model.model.layers:
        block.mlp.down_proj = nn.Sequential(nn.Linear(48, WIDTH, bias=False))
        block.mlp.down_proj.weight = block.mlp.down_proj[0].weight
    assert Anatomy(model).place("mlp.act:1").module is model.model.layers[1].mlp.down_proj


def test_a_part_under_a_name_that_comes_first(model):
    for block in model.model.layers:
        block.feed_forward = block.mlp
    assert Anatomy(model).blocks.mlp == "mlp"
    for block in model.model.layers:
        del block.mlp
    assert Anatomy(model).blocks.mlp == "feed_forward"


def test_a_model_that_is_wrapped():
    model = fresh_model("llama")
    ids = prompts(1, 3)
    known = collect(model, {"input_ids": ids}, SITES)

    class Peft(nn.Module):
        """Forwards attributes to the model that it wraps, as peft does."""

        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base_model = nn.Module()
            self.base_model.model = base

        def __getattr__(self, name: str):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.base_model.model, name)

        def forward(self, *args, **kwargs):
            return self.base_model.model(*args, **kwargs)

    wrapped = Peft(model)
    assert Anatomy(wrapped).place("mlp.act:1").path == "base_model.model.model.layers.1.mlp.down_proj"
    assert Anatomy(wrapped).place("module:lm_head:input").module is model.lm_head
    found = collect(wrapped, {"input_ids": ids}, SITES)
    assert all(torch.equal(known[site], found[site]) for site in SITES)
    assert is_steered(wrapped, "mlp.act:1")


def test_a_plugin_that_is_loaded_later(model):
    class Plugin:
        @staticmethod
        @hookimpl
        def featurizers_anatomy(model: nn.Module) -> Blocks | None:
            return Blocks(decoder="model", layers="model.layers", mlp="post_attention_layernorm")

    plugin = Plugin()
    assert Anatomy(model).place("mlp.out:1").path == "model.layers.1.mlp"
    host()._manager.register(plugin, "late")
    try:
        assert Anatomy(model).place("mlp.out:1").path == "model.layers.1.post_attention_layernorm"
    finally:
        host()._manager.unregister(plugin)
    assert Anatomy(model).place("mlp.out:1").path == "model.layers.1.mlp"


def test_a_plugin_is_asked_before_an_ambiguity_is_refused(model):
    class Plugin:
        @staticmethod
        @hookimpl
        def featurizers_anatomy(model: nn.Module) -> Blocks | None:
            return Blocks(decoder="model", layers="model.others")

    model.model.others = nn.ModuleList(fresh_model("llama").model.layers)
    plugin = Plugin()
    host()._manager.register(plugin, "late")
    try:
        assert Anatomy(model).place("resid.post:1").path == "model.others.1"
    finally:
        host()._manager.unregister(plugin)


def test_a_plugin_that_fails_is_passed_over_where_blocks_are_found_without_it(model):
    class Plugin:
        @staticmethod
        @hookimpl
        def featurizers_anatomy(model: nn.Module) -> Blocks | None:
            raise RuntimeError("no such model")

    plugin = Plugin()
    host()._manager.register(plugin, "faulty")
    try:
        with pytest.warns(UserWarning, match="no such model.* The blocks of the model were found without it"):
            assert Anatomy(model).place("resid.post:1").module is model.model.layers[1]
        model.model.others = nn.ModuleList(model.model.layers)
        del model.model.layers, model.model.others[0]
        with pytest.raises(PluginError, match="no such model"):
            Anatomy(model).place("resid.post:1")
    finally:
        host()._manager.unregister(plugin)


def test_nothing_stays_on_the_model(model):
    plain = fresh_model("llama")
    assert vars(model).keys() == vars(plain).keys()
    assert model.state_dict().keys() == plain.state_dict().keys()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert Anatomy(other).place("resid.post:1").module is other.model.layers[1]


def test_a_shared_module_and_an_empty_slot_are_no_trouble(model):
    model.model.register_module("nothing", None)
    model.model.again = model.model.embed_tokens
    model.model.layers[0].register_module("attn", None)
    assert Anatomy(model).blocks.attention == "self_attn"


def test_the_path_of_a_missing_module_is_named(model):
    with pytest.raises(SiteError, match=r"LlamaForCausalLM has no module 'model\.layers\.1\.nothing'"):
        Anatomy(model).place("module:model.layers.1.nothing:output")
    with pytest.raises(SiteError, match=r"has no module 'model\.layers\.7'"):
        Anatomy(model).place("module:model.layers.7:output")


def test_experts_are_no_single_mlp():
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2 = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.w2(self.w1(x))

    model = fresh_model("llama")
    for block in model.model.layers:
        block.mlp = nn.Sequential(nn.ModuleList([Expert(), Expert()]))
    assert Anatomy(model).blocks.down_projection is None
    with pytest.raises(SiteError, match=r"mlp\.act:1: .* its Sequential has '0', and none"):
        Anatomy(model).place("mlp.act:1")


@pytest.mark.parametrize("path", ["model.layers", "extra"])
def test_a_module_that_is_never_called_is_refused(model, path):
    model.extra = nn.ModuleDict({"a": nn.Linear(2, 2)})
    with pytest.raises(SiteError, match=rf"Module(List|Dict) '{path}' is never called; it holds '[0a]'"):
        Anatomy(model).place(f"module:{path}:output")


@pytest.mark.parametrize("compile_", [torch.jit.script, lambda part: torch.jit.trace(part, torch.ones(1, WIDTH))])
@pytest.mark.filterwarnings("ignore")
def test_a_module_of_torchscript_is_refused(compile_):
    model = nn.Sequential(compile_(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())), nn.Linear(WIDTH, 2))
    steer = featurizers.Steer(featurizers.create("identity", d_in=WIDTH), delta=1.0)
    with pytest.raises(SiteError, match=r"'0' was compiled by torch\.jit, which takes no hooks"):
        intervene(model, {"module:0:output": steer}).__enter__()


def test_an_anatomy_names_the_sites_of_its_model():
    """GPT-2's, written by hand, and a hybrid of which one block of two has attention."""
    assert repr(Anatomy(fresh_model("gpt2"))) == (
        "Anatomy(GPT2LMHeadModel, 3 layers with resid.pre, resid.post, attn.out, attn.q (4 heads), "
        "attn.k (4 heads), attn.v (4 heads), attn.z (4 heads), resid.mid, mlp.in, mlp.out, mlp.act; embed, norm.out)"
    )
    model = fresh_model("llama")
    del model.model.layers[1].self_attn
    assert (
        "attn.out (in 2 of them), attn.q (in 2 of them, 4 heads), attn.k (in 2 of them, 2 heads), "
        "attn.v (in 2 of them, 2 heads), attn.z (in 2 of them, 4 heads), resid.mid (in 2 of them), mlp.in, mlp.out"
    ) in repr(Anatomy(model))
    assert repr(Anatomy(nn.Linear(2, 2))) == "Anatomy(Linear, no blocks were found; its sites are 'module:PATH:output')"


def test_a_site_of_none_is_one_error_of_every_operation():
    f, model = featurizers.create("identity", d_in=WIDTH), fresh_model("gpt2")
    for call in (
        lambda: intervene(model, {f.site: featurizers.Collect(f)}).__enter__(),
        lambda: collect(model, {"input_ids": prompts(1, 3)}, {f.site: f}),
        lambda: Anatomy(model).place(f.site),
    ):
        with pytest.raises(SiteError, match=r"the site is None.*set f\.site"):
            call()


def test_a_wrapper_of_a_model_is_refused_with_the_name_of_the_model() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    with pytest.raises(SiteError, match=r"Pass the GPT2LMHeadModel that it wraps, model\.module"):
        Anatomy(Wrapper(fresh_model("gpt2"))).place("resid.post:1")
