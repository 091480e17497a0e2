"""Make, save, load and use what one distribution provides, in an environment without the packages for development."""

import contextlib
import json
import subprocess
import sys
import tempfile
from importlib.metadata import requires
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import featurizers
import torch
from safetensors.torch import save_file
from torch import nn

IDS = torch.arange(12).reshape(2, 6)
SOURCE = {"input_ids": IDS.flip(1) + 20}


def command(*words: str) -> str:
    """Run the ``featurizers`` command and return what it prints."""
    done = subprocess.run([sys.executable, "-m", "featurizers", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def round_trip(featurizer: "featurizers.Featurizer") -> None:
    """Save a featurizer, load it, and interchange its features in a model through it."""
    again = featurizers.load(featurizer.save_pretrained("it"), verify=True)
    x, y = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    assert torch.equal(again.interchange(x, y), featurizer.interchange(x, y))
    assert torch.equal(again.interchange(x, x), x)

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with featurizers.intervene(model, {"module:0:output": featurizers.Interchange(again, source=y)}):
        edited = model(x)
    assert torch.equal(edited, model[1](featurizer.interchange(model[0](x), y)))


def create(kind: str, **config: object) -> None:
    """Do the round trip of a new featurizer."""
    round_trip(featurizers.create(kind, **config))


def core() -> None:
    """Use both kinds of the core."""
    create("dictionary", d_in=8, n_features=16)
    first, second = (featurizers.create("dictionary", d_in=8, n_features=n) for n in (8, 16))
    round_trip(first >> second)
    assert "dictionary" in command("kinds")


def dictionary(rule: str, **options: Any) -> "featurizers.Featurizer":
    """Return a dictionary with random weights."""
    tensors = {name: torch.randn(16, 8) for name in ("W_enc", "W_dec")}
    return featurizers.DictionaryFeaturizer.from_tensors(
        **tensors, b_enc=torch.randn(16), b_dec=torch.randn(8), rule=rule, **options
    )


def converted(plugin: str, source: "featurizers.Featurizer") -> None:
    """Write a dictionary in the format of a plugin, read it again, and use it."""
    featurizers.convert(source, "converted", to=plugin)
    again = featurizers.load("./converted")
    x = torch.randn(3, 8)
    torch.testing.assert_close(again.encode(x), source.encode(x))
    round_trip(again)


def sae_lens() -> None:
    """Use SAELens' format, and the kind of its matching pursuits."""
    converted("sae-lens", dictionary("relu"))
    create("sae-lens.matching-pursuit", d_in=8, n_features=16)


def sparsify() -> None:
    """Use sparsify's format."""
    converted("sparsify", dictionary("topk", rule_options={"k": 4}))


def dictionary_learning() -> None:
    """Use dictionary_learning's format, and one of its classes."""
    converted("dictionary-learning", dictionary("relu"))
    from featurizers_dictionary_learning import AutoEncoder

    round_trip(AutoEncoder(8, 16).as_featurizer())


def decoder() -> Any:
    """Return a tiny GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=50, bos_token_id=None, eos_token_id=None)
    return GPT2LMHeadModel(config).eval()


class Block(nn.Module):
    """A block of `Torch`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add what the MLP writes."""
        return x + self.mlp(self.norm(x))


class Torch(nn.Module):
    """A decoder for an environment that has no transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=2)
        self.embed, self.norm, self.head = nn.Embedding(50, 8), nn.LayerNorm(8), nn.Linear(8, 50)
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> SimpleNamespace:
        """Return the logits, ``(batch, sequence, 50)``."""
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.head(self.norm(x)))


def saved_in_pyvene(model: Any, intervenable: Any) -> None:
    """Save a pyvene model, load it, and run both."""
    folder = featurizers.save_intervenable(intervenable, "intervenable")
    again = featurizers.load_intervenable(folder, model)
    run = [each({"input_ids": IDS}, [SOURCE], {"sources->base": 3})[1].logits for each in (intervenable, again)]
    assert torch.equal(*run)
    assert not torch.equal(run[0], model(IDS).logits)


def pyvene() -> None:
    """Use a featurizer as an intervention of pyvene."""
    from pyvene import IntervenableConfig, IntervenableModel

    model, f = decoder(), dictionary("relu")
    config = IntervenableConfig({"layer": 1, "component": "block_output"}, f.get_interchange_intervention())
    saved_in_pyvene(model, IntervenableModel(config, model))


def autoencoder() -> None:
    """Use an autoencoder as an intervention of pyvene."""
    from featurizers_autoencoder import AutoencoderLayer, get_intervenable_with_autoencoder

    model, layer = decoder(), AutoencoderLayer(input_dim=8, latent_dim=16)
    saved_in_pyvene(model, get_intervenable_with_autoencoder(model, layer, 16, layer=1))


def causal_basis() -> None:
    """Find a causal basis of a small decoder."""
    from featurizers_causal_basis import extract_causal_bases

    (basis,) = extract_causal_bases(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 20)), [torch.randn(50, 8)], k=2)
    round_trip(basis)
    assert "causal-basis" in command("fit", "--help")


def causalab() -> None:
    """Write a submission to the MIB benchmark and read it."""
    from featurizers_causalab import read_submission, write_submission
    from featurizers_causalab.featurizers import SubspaceFeaturizer

    f = SubspaceFeaturizer(shape=(8, 2), id="DAS").as_featurizer()
    f.site = featurizers.Site("resid.post", 1).at(position=(-1,))
    write_submission({"ARC_easy_Gemma2ForCausalLM_answer/layer-1": f}, "submission")
    (again,) = read_submission("./submission").values()
    round_trip(again)


def transcoder() -> None:
    """Save a transcoder, load it, and edit a model through it."""
    from featurizers_transcoder import Transcoder

    f = Transcoder.from_weights(*torch.randn(3, 16, 8)[:2])
    f.reads, f.writes = {"in": "module:0:input"}, {"out": "module:1:output"}
    again = featurizers.load(f.save_pretrained("it"), verify=True)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(2, 3, 8)
    with featurizers.intervene(model, featurizers.Steer(again, delta=2.0, indices=[5])):
        edited = model(x)
    torch.testing.assert_close(edited, model(x) + 2 * f.W_dec["features"]["out"][5])


def circuit_tracer() -> None:
    """Write a transcoder for circuit-tracer, and read it again."""
    from featurizers_transcoder import Transcoder

    f = Transcoder.from_weights(*torch.randn(2, 16, 8))
    f.reads, f.writes = {"in": "mlp.in:0"}, {"out": "mlp.out:0"}
    assert featurizers.convert(f, "for-circuit-tracer", to="circuit-tracer") == []
    again, x = featurizers.load("./for-circuit-tracer"), torch.randn(3, 8)
    assert torch.equal(again.encode("layer-0", {"in-0": x}), f.encode("features", {"in": x}))


def llamascopium() -> None:
    """Read a transcoder of llamascopium, whose activations are normalised by an average norm of 4."""
    config = {"sae_type": "sae", "d_model": 4, "expansion_factor": 2, "sparsity_include_decoder_norm": False}
    hooks = {"hook_point_in": "blocks.0.mlp.hook_in", "hook_point_out": "blocks.0.mlp.hook_out"}
    weights = {"W_E": torch.randn(4, 8), "b_E": torch.zeros(8), "W_D": torch.randn(8, 4), "b_D": torch.zeros(4)}
    norms = {f"dataset_average_activation_norm.{hook}": torch.tensor(4.0) for hook in hooks.values()}
    Path("llamascopium-folder").mkdir()
    Path("llamascopium-folder/config.json").write_text(json.dumps({**config, **hooks}))
    save_file({**weights, **norms}, "llamascopium-folder/sae_weights.safetensors")
    f, x = featurizers.load("./llamascopium-folder"), torch.randn(3, 4)
    torch.testing.assert_close(f.encode("features", {"in": x}), torch.relu(x / 2 @ weights["W_E"]))


def training() -> None:
    """Search for a subspace, and evaluate what was saved."""
    import featurizers_training as training

    records = [
        {"base": [i % 7 + 1, 2, i % 5 + 3], "source": [i % 6 + 8, 4, i % 3 + 9], "label": i % 4, "base_label": 9}
        for i in range(8)
    ]
    model, pairs = decoder(), training.Pairs.of(records)
    found = training.train(model, pairs, "resid.post:1", training.DAS(n_features=2))
    found.save("found")
    again = featurizers.load("./found")
    assert training.evaluate(model, pairs, again) == training.evaluate(model, pairs, found.featurizers[0])
    round_trip(again)
    for name in ("train", "sweep", "evaluate", "demo"):
        command(name, "--help")


def control_vectors() -> None:
    """Write a steering edit as a control vector, and read it again."""
    from featurizers_control_vectors import read_gguf, to_gguf

    f, x = dictionary("relu"), torch.randn(3, 8)
    to_gguf({"resid.post:1": featurizers.Steer(f, delta=2.0, indices=[5])}, "vector.gguf")
    ((site, again),) = read_gguf("vector.gguf").items()
    assert str(site) == "resid.post:1"
    torch.testing.assert_close(again.steer(x, 1.0), f.steer(x, 2.0, [5]))


def derived_scalars() -> None:
    """Measure direct effects, in the model's own bases and through a featurizer."""
    from featurizers_derived_scalars import Scalars, logit_difference, scalars

    metric, f = logit_difference(7, 9), featurizers.create("subspace", d_in=8, n_features=2)
    found = scalars(decoder(), IDS[0].tolist(), "write_to", metric=metric, featurizers={"mlp.delta:1": f})
    found.save("scalars.safetensors")
    again = Scalars.load("scalars.safetensors")
    assert all(torch.equal(again[key], found[key]) for key in found)
    assert len(again.topk(3, absolute=True)) == 3
    assert "write_to" in command("scalars", "--list")


def transformer_debugger() -> None:
    """Measure a scalar under its name in transformer-debugger."""
    from featurizers_derived_scalars import scalars

    pairs_of_tokens, heads = 6 * 7 // 2, 2
    found = scalars(decoder(), IDS[0].tolist(), "attn_write_norm")
    assert found["attn_write_norm", 1].shape == (pairs_of_tokens, heads)
    assert "attn_write_norm" in command("scalars", "--list")


def graphs() -> None:
    """Trace a graph, save it, read it again, and write its page, whose parts are data of the package."""
    from featurizers_transcoder import Transcoder

    f = Transcoder.from_weights(*torch.randn(2, 16, 8))
    f.reads, f.writes = {"in": "mlp.in:0"}, {"out": "mlp.out:0"}
    graph = featurizers.graph(decoder(), IDS[0].tolist(), [f])
    again = featurizers.load_graph(graph.save("graph"))
    assert torch.equal(again.influence, graph.influence)
    assert "</html>" in again.plot("graph.html").read_text(encoding="utf-8")
    assert "--maps" in command("graph", "--help")


def patching() -> None:
    """Patch a grid, save it and read it again."""
    metric = ("logit_difference", 7, 9)
    grid = featurizers.patch(decoder(), IDS[0].tolist(), IDS[1].tolist(), metric=metric)
    assert torch.equal(featurizers.load_grid(grid.save("grid.safetensors")).values, grid.values)


def evaluate() -> None:
    """Measure a dictionary, save the result and read it again."""
    f = dictionary("relu")
    f.site = featurizers.Site("resid.post", 1)
    result = featurizers.evaluate(f, Torch().eval(), IDS)
    assert featurizers.load_evaluation(result.save("evaluation.json")).metrics == result.metrics


def harvest() -> None:
    """Harvest a dictionary and a site, and read both again."""
    import featurizers_harvest

    f = dictionary("relu")
    f.site = featurizers.Site("resid.post", 1)
    featurizers.harvest(Torch().eval(), {"f": f, "x": f.site}, IDS, "harvest")
    found = featurizers_harvest.open("harvest")
    assert found.table("f").num_rows == IDS.numel()
    assert next(found.batches("x", 4)).shape == (4, 8)


def sharded() -> None:
    """Divide a dictionary over a mesh of one process, and save it."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    whole = dictionary("relu")
    folder = whole.save_pretrained("whole")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    f = featurizers.load(f"./{folder}", mesh=init_device_mesh("cpu", (1,)))
    x = torch.randn(3, 8)
    torch.testing.assert_close(f.encode(x), whole.encode(x))
    assert (f.save_pretrained("again") / "model.safetensors").stat().st_size
    dist.destroy_process_group()


def interp_engine() -> None:
    """Collect at a point of an eager model, and steer it by specs."""
    from featurizers_interp_engine import to_specs
    from interp_engine import EagerModel, steer

    model = decoder()
    engine = EagerModel("tiny", hf_model=model, tokenizer=object(), device="cpu")
    edit = featurizers.Steer(dictionary("relu"), delta=2.0)
    with featurizers.intervene(engine, {"resid_post.1": edit}):
        expected = model(IDS).logits
    with steer(engine, to_specs(edit, site="resid.post:1")):
        torch.testing.assert_close(model(IDS).logits, expected)


def nnsight() -> None:
    """Edit inside a trace, and make a function for a server."""
    from featurizers_nnsight import edit, remote_edit
    from nnsight import NNsight

    model = decoder()
    steer, lm = featurizers.Steer(dictionary("relu"), delta=2.0, positions=[-1]), NNsight(model)
    with featurizers.intervene(model, {"resid.post:1": steer}):
        expected = model(IDS).logits
    with lm.trace(input_ids=IDS):
        edit(lm, {"resid.post:1": steer})
        logits = lm.output.logits.save()
    assert torch.equal(logits, expected)
    assert callable(remote_edit(lm, {"resid.post:1": steer}))


def vllm() -> None:
    """Admit a request of ordinary operations, and edit a batch without vLLM."""
    import json

    import numpy as np
    from featurizers_vllm import Settings, extra_args
    from featurizers_vllm.admission import Admission
    from featurizers_vllm.bank import Bank
    from featurizers_vllm.rows import Rows

    f = dictionary("relu")
    f.save_pretrained("it")
    steer = featurizers.Ablate(f, value=2.0, indices=[5])
    given = {"version": 1, "sites": ["resid.post:1"], "featurizers": [{"id": "owner/name", "path": "it"}]}
    admission = Admission(Settings.parse(json.dumps(given).encode(), "settings.json", Path.cwd()))
    (edit,) = admission.of(extra_args({"resid.post:1": steer}, names={f: "owner/name"}))
    rows = Rows({edit.site: Bank(8, features=8, requests=2, tokens=16, stages=2)}, 2)
    rows.add(1, [edit], 3)
    rows.fill(np.array([0, 1]), np.array([0, 2, 5]), torch.arange(5), torch.arange(5))
    x = torch.randn(5, 8)
    found = rows.banks[edit.site](x, None)
    assert torch.equal(found[:2], x[:2])
    torch.testing.assert_close(found[2:], f.ablate(x[2:], value=2.0, indices=[5]))


def transformer_lens() -> None:
    """Read a hook point of an object that looks like a bridge: TransformerLens itself need not be installed."""
    of_lens = {"__module__": "transformer_lens.stand_in"}
    point = type("HookPoint", (nn.Identity,), of_lens)
    bridge = type("TransformerBridge", (nn.Module,), {**of_lens, "forward": lambda self, input: self.ln_final(input)})()
    bridge.ln_final = nn.Sequential()
    bridge.ln_final.hook_out = point()
    vars(bridge).update(original_model=Torch().eval(), _weights_processed=False)
    x = torch.randn(2, 3, 8)
    found = featurizers.collect(bridge, {"input_ids": x}, ["norm.out", "ln_final.hook_out"])
    assert all(torch.equal(each, x) for each in found.values())


def new_plugin() -> None:
    """Write a plugin, and compile its code."""
    command("new-plugin", "mine")
    for path in Path("featurizers-mine").rglob("*.py"):
        compile(path.read_text(encoding="utf-8"), str(path), "exec")


CHECKS = {
    "core": core,
    "autoencoder": autoencoder,
    "causal-basis": causal_basis,
    "causalab": causalab,
    "circuit-tracer": circuit_tracer,
    "control-vectors": control_vectors,
    "derived-scalars": derived_scalars,
    "dictionary-learning": dictionary_learning,
    "evaluate": evaluate,
    "graphs": graphs,
    "harvest": harvest,
    "flow": lambda: create("flow", d_in=8),
    "identity": lambda: create("identity", d_in=8),
    "interp-engine": interp_engine,
    "llamascopium": llamascopium,
    "new-plugin": new_plugin,
    "nnsight": nnsight,
    "patching": patching,
    "pyvene": pyvene,
    "sae-lens": sae_lens,
    "sharded": sharded,
    "sparsify": sparsify,
    "subspace": lambda: [create("subspace", d_in=8, n_features=2), create("standardize", d_in=8)],
    "training": training,
    "transcoder": transcoder,
    "transformer-debugger": transformer_debugger,
    "transformer-lens": transformer_lens,
    "vllm": vllm,
}


def main() -> None:
    """Check one distribution, named as its folder."""
    name = sys.argv[1]
    distribution = "featurizers" if name == "core" else f"featurizers-{name}"
    assert requires(distribution), distribution
    checkout = Path(__file__).parent.parent
    assert not Path(featurizers.__file__).is_relative_to(checkout), featurizers.__file__
    featurizers.check_plugins()
    if name != "core":
        assert name in command("plugins")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        CHECKS[name]()
    print(f"{distribution}: made, saved, loaded and used")


if __name__ == "__main__":
    main()
