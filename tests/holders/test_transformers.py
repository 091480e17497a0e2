"""Models of transformers, held in every way that it and its companions offer."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch
import transformers
from featurizers.testing import Held, HolderContract
from torch import Tensor, nn

from tests.support import unusual_models
from tests.support.holders import places
from tests.support.models import HEAD_WIDTH, MODULES, fresh_model

torch.set_num_threads(1)


def held(architecture: str, wrap: Callable[[nn.Module], Any] = lambda model: model, kind: type[Held] = Held) -> Held:
    """Return a tiny model, held by what a function makes of it."""
    plain = fresh_model(architecture).requires_grad_(False)
    return kind(wrap(copy.deepcopy(plain)), plain, places(MODULES[architecture], HEAD_WIDTH[architecture]))


class TestGpt2(HolderContract):
    title = "transformers, GPT-2"

    @classmethod
    def make(cls) -> Held:
        return held("gpt2")


class TestLlama(HolderContract):
    title = "transformers, Llama"

    @classmethod
    def make(cls) -> Held:
        return held("llama")


class TestGemma2(HolderContract):
    title = "transformers, Gemma 2"

    @classmethod
    def make(cls) -> Held:
        return held("gemma2")


# ---------------------------------------------------------------------- compiled


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


class WhenWarm(Held):
    """A compiled model that has run before it is edited."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.logits(self.inputs())
        self.logits(self.inputs(padded=True))


class Compiled(HolderContract):  # for the table alone: it compiles for a minute; see tests/core/models/test_compilation
    title = "torch.compile(model)"
    tolerance = 1e-5

    @classmethod
    def make(cls) -> Held:
        return held("llama", compiled, WhenWarm)


class TestCompiledInPlace(HolderContract):
    title = "model.compile()"
    tolerance = 1e-5

    @classmethod
    def make(cls) -> Held:
        def wrap(model: nn.Module) -> nn.Module:
            model.compile(backend="eager")
            return model

        return held("llama", wrap, WhenWarm)


class CompiledLayers(HolderContract):  # for the table alone
    title = "each layer compiled"
    tolerance = 1e-5

    @classmethod
    def make(cls) -> Held:
        def wrap(model: Any) -> nn.Module:
            for number, layer in enumerate(model.model.layers):
                model.model.layers[number] = compiled(layer)
            return model  # type: ignore[no-any-return]

        return held("llama", wrap, WhenWarm)


# ---------------------------------------------------------------------- accelerate


class TestCpuOffload(HolderContract):
    title = "accelerate, weights offloaded"

    @classmethod
    def make(cls) -> Held:
        accelerate = pytest.importorskip("accelerate")
        return held("llama", lambda model: accelerate.cpu_offload(model, execution_device="cpu"))


class TestDispatched(HolderContract):
    title = "accelerate, device map"

    @classmethod
    def make(cls) -> Held:
        accelerate = pytest.importorskip("accelerate")

        def wrap(model: Any) -> Any:
            parts = {name: "cpu" for name, _ in model.model.named_children()}
            devices = {f"model.{name}": device for name, device in parts.items()} | {"lm_head": "cpu"}
            return accelerate.dispatch_model(model, devices, force_hooks=True)

        return held("llama", wrap)


# ---------------------------------------------------------------------- adapters


def with_adapter(make_config: Callable[[Any], Any]) -> Held:
    """Return a Llama with an adapter of PEFT that has random weights."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(fresh_model("llama"), make_config(peft)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "ia3_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    inside = "base_model.model."
    paths = {kind: (inside + path, side) for kind, (path, side) in MODULES["llama"].items()}
    return Held(model, copy.deepcopy(model), places(paths, HEAD_WIDTH["llama"]))


class TestLora(HolderContract):
    title = "PEFT, LoRA"

    @classmethod
    def make(cls) -> Held:
        targets = ["q_proj", "o_proj", "down_proj"]
        return with_adapter(lambda peft: peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))


class TestIa3(HolderContract):
    title = "PEFT, IA3"

    @classmethod
    def make(cls) -> Held:
        targets = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
        return with_adapter(lambda peft: peft.IA3Config(**targets, task_type="CAUSAL_LM"))


class WithVirtualTokens(Held):
    """A model that puts virtual tokens before the prompt."""

    def of_holder(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in inputs.items() if name != "position_ids"}

    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return super().logits(inputs)[:, -6:]

    def plain_logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return super().plain_logits(self.of_holder(inputs))[:, -6:]


def with_prompt(make_config: Callable[[Any], Any]) -> Held:
    """Return a Llama with a trained prompt of PEFT."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(fresh_model("llama"), make_config(peft)).eval().requires_grad_(False)
    paths = {kind: ("base_model." + path, side) for kind, (path, side) in MODULES["llama"].items()}
    return WithVirtualTokens(model, copy.deepcopy(model), places(paths, HEAD_WIDTH["llama"]))


WITH_POSITIONS = ("steer first*", "steer a token*", "interchange*", "mask*", "collect*", "gradient*")
OF_PEFT = "generate of PEFT adds the virtual tokens again at each step, or loses them, with this transformers"


class TestPromptTuning(HolderContract):
    title = "PEFT, prompt tuning"
    refused: ClassVar = dict.fromkeys(set(WITH_POSITIONS) - {"interchange*"}, "virtual tokens") | {
        "interchange with activations*": "virtual tokens",
        "interchange with inputs*": "virtual tokens",
    }
    left_out: ClassVar = {"generate*": OF_PEFT}

    @classmethod
    def make(cls) -> Held:
        return with_prompt(lambda peft: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))


class TestPrefixTuning(HolderContract):
    title = "PEFT, prefix tuning"
    refused: ClassVar = dict.fromkeys(WITH_POSITIONS, "in a cache already")
    left_out: ClassVar = {"generate*": OF_PEFT}

    @classmethod
    def make(cls) -> Held:
        return with_prompt(lambda peft: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))


# ---------------------------------------------------------------------- quantised


class TestFourBits(HolderContract):
    title = "bitsandbytes, 4 bits"

    @classmethod
    def make(cls) -> Held:
        bitsandbytes = pytest.importorskip("bitsandbytes")
        model = fresh_model("llama").requires_grad_(False)
        for path, linear in list(model.named_modules()):
            if isinstance(linear, nn.Linear) and path != "lm_head":
                small = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, bias=False)
                small.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False)
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, small.to("cpu"))
        model(torch.tensor([[1, 2]]))
        return Held(model, copy.deepcopy(model), places(MODULES["llama"], HEAD_WIDTH["llama"]))


# ---------------------------------------------------------------------- training


class Training(Held):
    """A model that recomputes its blocks in the backward pass."""

    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        self.holder.train()
        try:
            return self.holder(**inputs, use_cache=False).logits  # type: ignore[no-any-return]
        finally:
            self.holder.eval()


class TestCheckpointed(HolderContract):
    title = "gradient checkpointing"

    @classmethod
    def make(cls) -> Held:
        def wrap(model: Any) -> nn.Module:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            return model  # type: ignore[no-any-return]

        return held("llama", wrap, Training)


class TestReentrantCheckpointing(HolderContract):
    title = "gradient checkpointing, reentrant"

    @classmethod
    def make(cls) -> Held:
        def wrap(model: Any) -> nn.Module:
            model.gradient_checkpointing_enable({"use_reentrant": True})
            return model  # type: ignore[no-any-return]

        return held("llama", wrap, Training)


class Beside(Held):
    """A model that another thread edits and runs at the same time."""

    def run(self, operations: Any, inputs: Any) -> Any:
        import featurizers

        stop, started = threading.Event(), threading.Event()
        f = featurizers.create("identity", d_in=32)

        def other() -> None:
            with featurizers.intervene(self.holder, {"resid.post:0": featurizers.Steer(f, delta=50.0)}):
                while not stop.is_set():
                    self.logits(self.inputs())
                    started.set()

        thread = threading.Thread(target=other)
        thread.start()
        started.wait(60)
        try:
            return super().run(operations, inputs)
        finally:
            stop.set()
            thread.join()


class TestThreads(HolderContract):
    title = "beside a thread with other edits"

    @classmethod
    def make(cls) -> Held:
        return held("llama", kind=Beside)


# ---------------------------------------------------------------------- caches


class WithStaticCache(Held):
    """A model that generates with a static cache."""

    def generate(self, operations: Any, inputs: Any, **options: Any) -> Any:
        static = {} if options.get("use_cache") is False else {"cache_implementation": "static"}
        return super().generate(operations, inputs, **static, **options)


class TestStaticCache(HolderContract):
    title = "generate with a static cache"

    @classmethod
    def make(cls) -> Held:
        return held("llama", kind=WithStaticCache)


# ---------------------------------------------------------------------- other architectures


def seeing(model: nn.Module) -> Held:
    paths = {kind: (path.replace("model.", "model.language_model.", 1), side) for kind, (path, side) in LLAMA.items()}
    return Held(model, copy.deepcopy(model), places(paths, 8))


LLAMA = MODULES["llama"]


class TestGemma3Seeing(HolderContract):
    title = "Gemma 3 with images"

    @classmethod
    def make(cls) -> Held:
        return seeing(unusual_models.gemma3())


class TestPaliGemma(HolderContract):
    title = "PaliGemma"

    @classmethod
    def make(cls) -> Held:
        return seeing(unusual_models.paligemma())


class TestLlava(HolderContract):
    title = "LLaVA"

    @classmethod
    def make(cls) -> Held:
        return seeing(unusual_models.llava())


class TestQwen25Vl(HolderContract):
    title = "Qwen 2.5-VL"

    @classmethod
    def make(cls) -> Held:
        return seeing(unusual_models.qwen2_5_vl())


# ---------------------------------------------------------------------- mixtures, hybrids, states


def of_class(name: str, modules: Mapping[str, tuple[str, str]], **options: Any) -> Held:
    """Return a tiny model of a class of transformers, ``NameForCausalLM``, with random weights."""
    config = getattr(transformers, f"{name}Config")(**{**unusual_models.TEXT, **options})
    torch.manual_seed(0)
    model = unusual_models.with_large_weights(getattr(transformers, f"{name}ForCausalLM")(config))
    return Held(model, copy.deepcopy(model), places(modules, 8))


def without(*kinds: str) -> dict[str, tuple[str, str]]:
    return {kind: place for kind, place in LLAMA.items() if kind not in kinds}


class TestMixtral(HolderContract):
    title = "Mixtral"

    @classmethod
    def make(cls) -> Held:
        return of_class("Mixtral", without("mlp.act"), num_local_experts=4, num_experts_per_tok=2)


class TestQwen2Moe(HolderContract):
    title = "Qwen2-MoE"

    @classmethod
    def make(cls) -> Held:
        sizes = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
        return of_class("Qwen2Moe", without("mlp.act"), num_experts=4, num_experts_per_tok=2, **sizes)


class TestGptOss(HolderContract):
    title = "gpt-oss"

    @classmethod
    def make(cls) -> Held:
        sizes = {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}
        return of_class("GptOss", without("mlp.act"), layer_types=["sliding_attention", "full_attention"], **sizes)


class TestQwen3Next(HolderContract):
    title = "Qwen3-Next, a block of attention"

    @classmethod
    def make(cls) -> Held:
        linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        return of_class(
            "Qwen3Next",
            without("mlp.act"),
            layer_types=["linear_attention", "full_attention"],
            head_dim=8,
            linear_value_head_dim=8,
            shared_expert_intermediate_size=16,
            **linear,
            **experts,
        )


class TestMamba(HolderContract):
    title = "Mamba"

    @classmethod
    def make(cls) -> Held:
        model = unusual_models.mamba(1)
        paths = {
            "resid.pre": ("backbone.layers.{}", "input"),
            "resid.post": ("backbone.layers.{}", "output"),
        }
        return Held(model, copy.deepcopy(model), places(paths, 8))


class TestDataParallel(HolderContract):
    title = "torch, DataParallel"
    refused: ClassVar = {"*": "pass model.module"}

    @classmethod
    def make(cls) -> Held:
        return held("llama", nn.DataParallel)
