"""Cost of an armed site in a server: the bank beside the layer that it edits, and tokens a second inside vLLM.

    python benchmarks/serving.py bank                                    # torch alone
    plugins/vllm/checks/environment /tmp/vllm-env
    PYTHONPATH=. /tmp/vllm-env/bin/python benchmarks/serving.py engine /tmp/serving-model

The engine runs a model of the size of SmolLM2-135M with random weights, eight requests of 64 + 32 tokens, with one
armed site, on one core. "hooks lifted" is the same model without it; the runs of all cases take turns. Runs of one case
differ by more than the site costs, so a profiler also measures the share of time in the plugin's own functions.
"""

from __future__ import annotations

import cProfile
import functools
import json
import os
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import featurizers
import torch
from featurizers_vllm import Settings, extra_args
from featurizers_vllm.admission import in_single
from featurizers_vllm.bank import Bank
from torch import nn

SITE, WIDTH, REQUESTS, NEW, TURNS = "resid.post:15", 576, 8, 32, 9


OWN = {"hook", "fill", "update_state", "process_inputs", "validate_params", "extra_args"}
"""Functions of the plugin that a run enters: the edit, the bookkeeping of each step, and what each request costs."""


def turns(cases: dict[str, Callable[[], float]], count: int) -> dict[str, list[float]]:
    """Run all cases in turn, after one run of each that does not count."""
    results: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(count + 1):
        for name, case in cases.items():
            value = case()
            if turn:
                results[name].append(value)
    return results


def own_share(case: Callable[[], float]) -> float:
    """Return the share of a run's time that is spent in functions of the plugin, and in what they call."""
    profile = cProfile.Profile()
    profile.runcall(case)
    stats: Any = pstats.Stats(profile)
    rows = stats.stats.items()
    own = sum(row[3] for (file, _, function), row in rows if "featurizers_vllm" in file and function in OWN)
    return float(own / stats.total_tt)


# ---------------------------------------------------------------------- the bank alone


class Layer(nn.Module):
    """Matrix products of a decoder layer: 12 d² multiplications a token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.square = nn.Linear(width, 4 * width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.square(x).sum(-1, keepdim=True) + self.down(self.up(x))


def dictionary(width: int) -> featurizers.DictionaryFeaturizer:
    """Return a JumpReLU dictionary with random weights."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.nn.functional.normalize(torch.randn(512, width, generator=generator), dim=-1)
    return featurizers.DictionaryFeaturizer.from_tensors(
        weights, weights, b_enc=torch.zeros(512), b_dec=torch.zeros(width), rule="jumprelu", threshold=torch.ones(512)
    )


@torch.inference_mode()
def bank() -> None:
    """Print the time of a bank as a share of a layer's."""
    torch.set_num_threads(1)
    for width, features, requests, stages in ((576, 8, 8, 1), (4096, 8, 8, 1), (4096, 8, 8, 2), (4096, 8, 32, 1)):
        layer, f = Layer(width), dictionary(width)
        held = Bank(width, features=features, requests=requests, tokens=512, stages=stages)
        for number in range(requests):
            indices = [number * features + i for i in range(features)]
            program = in_single(featurizers.lower(featurizers.Ablate(f, value=2.0, indices=indices)))
            held.slot[0, number::requests] = held.acquire(0, f"{number}", program)
        for rows in (8, 64):
            x, residual = torch.randn(2, rows, width)
            repeats = 1 if width == 4096 else 20

            def timed(call: Callable[[], Any], repeats: int = repeats) -> float:
                begin = time.perf_counter()
                for _ in range(repeats):
                    call()
                return (time.perf_counter() - begin) / repeats

            cases = {
                "bank": lambda x=x, r=residual, held=held: timed(lambda: held(x, r)),
                "layer": lambda x=x, layer=layer: timed(lambda: layer(x)),
            }
            found = turns(cases, TURNS)
            share = statistics.median(a / b for a, b in zip(found["bank"], found["layer"], strict=True))
            arithmetic = 2 * features * requests * stages / (12 * width)
            print(
                f"width {width}, {features} features x {requests} requests, {stages} operations, {rows} tokens: "
                f"{share:.2%} of a layer (products alone {arithmetic:.2%})",
                flush=True,
            )


# ---------------------------------------------------------------------- vLLM


def made(folder: Path) -> None:
    """Write the model, a featurizer, and settings that arm one site."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    dictionary(WIDTH).save_pretrained(folder / "jumprelu")
    allowed = [{"id": "owner/name", "path": "jumprelu"}]
    (folder / "settings.json").write_text(json.dumps({"version": 1, "sites": [SITE], "featurizers": allowed}))


def engine(folder: Path) -> None:
    """Print tokens a second without the armed site, with it, and with edits."""
    if not (folder / "settings.json").exists():
        made(folder)
    os.environ.update(
        FEATURIZERS_VLLM=str(folder / "settings.json"),
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        OMP_NUM_THREADS="1",
        VLLM_CPU_OMP_THREADS_BIND="0",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="WARNING",
    )
    from featurizers_vllm import server
    from featurizers_vllm.models import place
    from vllm import LLM, SamplingParams

    small = {"max_model_len": 512, "max_num_seqs": REQUESTS, "kv_cache_memory_bytes": 2**28, "seed": 0}
    plain = {"dtype": "float32", "skip_tokenizer_init": True, "enable_prefix_caching": False, "enforce_eager": True}
    llm = LLM(model=str(folder / "model"), **small, **plain)
    prompts = [{"prompt_token_ids": list(range(100 + 31 * i, 164 + 31 * i))} for i in range(REQUESTS)]
    f = dictionary(WIDTH)

    def asked(indices: list[int]) -> dict[str, str]:
        return extra_args({SITE: featurizers.Ablate(f, value=2.0, indices=indices)}, names={f: "owner/name"})

    def run(edits: list[list[int]], *, lifted: bool = False) -> float:
        arguments: list[Any] = [asked(each) if each else None for each in edits]
        wanted = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True, "detokenize": False}
        params = [SamplingParams(**wanted, extra_args=each) for each in arguments]
        module, hooks = layer(), {}
        if lifted:
            hooks = dict(module._forward_hooks)
            module._forward_hooks.clear()
        begin = time.process_time()  # processor seconds of one thread, for other work may run on the machine
        llm.generate(prompts, params, use_tqdm=False)
        seconds = time.process_time() - begin
        module._forward_hooks.update(hooks)
        return NEW * REQUESTS / seconds

    def layer() -> nn.Module:
        from featurizers_vllm.architectures import ARCHITECTURES

        model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        return place(model, Settings.of_environment().armed[0], ARCHITECTURES["LlamaForCausalLM"])  # type: ignore[union-attr]

    assert server.of_process() is not None
    none, one = [[]] * REQUESTS, [list(range(8))] * REQUESTS
    each = [list(range(8 * i, 8 * i + 8)) for i in range(REQUESTS)]
    cases = {
        "hooks lifted": lambda: run(none, lifted=True),
        "armed, no request edited": lambda: run(none),
        "all edited, one edit of 8 features": lambda: run(one),
        "all edited, each otherwise": lambda: run(each),
    }
    profiled = {name: functools.partial(own_share, case) for name, case in cases.items()}
    for name, shares in turns(profiled, TURNS).items():
        low, high = min(shares), max(shares)
        print(
            f"{name}: {statistics.median(shares):.2%} of the time ({low:.2%} to {high:.2%}) in the plugin's functions"
        )
    found = turns(cases, TURNS)
    for name, values in found.items():
        ratios = [value / base for value, base in zip(values, found["hooks lifted"], strict=True)]
        low, high = min(ratios), max(ratios)
        print(
            f"{name}: {statistics.median(values):.1f} tokens a second, {statistics.median(ratios):.3f} of that without "
            f"the site ({low:.3f} to {high:.3f})"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["engine"]:
        engine(Path(sys.argv[2]).resolve())
    else:
        bank()
