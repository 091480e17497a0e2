"""Compares edits inside vLLM with `featurizers.intervene` on transformers: tokens and log probabilities.

    plugins/vllm/checks/environment /tmp/vllm-env
    PYTHONPATH=. /tmp/vllm-env/bin/python plugins/vllm/checks/serving.py FOLDER eager chunks cache preemption

A tiny model and featurizers are made in FOLDER if it is empty. Each mode runs in a process of its own and prints one
line for each comparison; the exit code is 1 if one fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import featurizers
import torch
from featurizers import Ablate, Interchange, Mask, Steer
from featurizers_vllm import extra_args

from tests.support.serving import request, saved

WIDTH, VOCABULARY, NEW = 64, 256, 24
SITES = ["resid.post:1", "mlp.out:0", "attn.out:2"]
TOLERANCE = 1e-4
CONFIGS = {"GPT2LMHeadModel": "GPT2Config", "Gemma3ForCausalLM": "Gemma3TextConfig"}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, so that the passes can be counted
    "VLLM_LOGGING_LEVEL": "WARNING",
}


# ---------------------------------------------------------------------- what is served
def make(folder: Path, architecture: str) -> None:
    """Write a tiny model with random weights, featurizers for it, and the settings of a server."""
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    torch.manual_seed(0)
    shared = {"vocab_size": VOCABULARY, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "pad_token_id": 0}
    if architecture.startswith("GPT2"):
        sizes = {"n_embd": WIDTH, "n_layer": 4, "n_head": 2, "n_positions": 512}
    elif architecture.startswith("Gemma"):
        sizes |= {"query_pre_attn_scalar": 32, "sliding_window": 32}
    else:
        sizes |= {"tie_word_embeddings": False}
    kind = getattr(transformers, CONFIGS.get(architecture, architecture.replace("ForCausalLM", "Config")))
    config = kind(**shared, **sizes, dtype="float32")
    getattr(transformers, architecture)(config).eval().save_pretrained(folder / "model")
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    words.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0").save_pretrained(folder / "model")
    allowed = saved(folder, WIDTH)
    special = featurizers.load(folder / "relu")
    special.special_tokens = tuple(range(0, VOCABULARY, 3))
    special.save_pretrained(folder / "special")
    allowed.append({"id": "owner/special", "revision": "r1", "path": "special"})
    settings = {"version": 1, "sites": SITES, "featurizers": allowed, "features": 6}
    (folder / "settings.json").write_text(json.dumps(settings, indent=1))


def cases(folder: Path) -> dict[str, dict[str, list[Any]]]:
    """Return operations by site, by the name of the case."""
    site = SITES[0]

    def f(name: str) -> Any:
        loaded = featurizers.load(folder / name)
        loaded.id, loaded.revision = f"owner/{name}", "r1"
        return loaded

    source = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(7)) * 3
    four = torch.tensor([2.0, -2.0, 1.0, 0.0])
    return {
        "clean": {},
        "ablate, jumprelu": {site: [Ablate(f("jumprelu"), value=1.5, indices=list(range(6)))]},
        "ablate, subspace": {site: [Ablate(f("subspace"), value=four)]},
        "steer, positions": {site: [Steer(f("relu"), delta=6.0, indices=[7], positions=[0, -1])]},
        "two operations": {
            site: [Ablate(f("gated"), value=4.0, indices=[3, 9, 11]), Ablate(f("subspace"), positions=[-1])]
        },
        "steer, topk": {site: [Steer(f("topk"), delta=torch.tensor([3.0, -3.0]), indices=[5, 6])]},
        "interchange": {site: [Interchange(f("subspace"), source=source)]},
        "mask": {site: [Mask(f("subspace"), source=source, gate=four.clamp(0, 1) * 0.7, positions=[1, 2])]},
        "modules": {
            SITES[1]: [Steer(f("relu"), delta=2.0, indices=[1])],
            SITES[2]: [Ablate(f("subspace"), value=four)],
        },
        "special tokens": {site: [Steer(f("special"), delta=5.0, indices=[4, 2])]},
    }


def prompts(count: int) -> list[list[int]]:
    """Return prompts of different lengths."""
    generator = torch.Generator().manual_seed(3)
    lengths = [9, 40, 5, 17, 23, 70, 12, 31, 6, 20]
    return [torch.randint(3, VOCABULARY, (lengths[i % 10],), generator=generator).tolist() for i in range(count)]


# ---------------------------------------------------------------------- both sides
class Reference:
    """The model in transformers."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()

    @torch.no_grad()
    def __call__(self, ids: list[int], operations: dict[str, list[Any]], new: int) -> tuple[list[int], Any, Any]:
        """Return greedy tokens, their log probabilities, and those of the prompt's tokens from the second on."""
        prompt = torch.tensor([ids])
        with featurizers.intervene(self.model, operations):
            given = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": new}
            options = {"eos_token_id": None, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
            out = self.model.generate(prompt, **given, **options)
            logits = self.model(prompt).logits[0].float().log_softmax(-1)
        tokens = out.sequences[0, len(ids) :].tolist()
        steps = [step[0].float().log_softmax(-1)[t] for step, t in zip(out.logits, tokens, strict=True)]
        return tokens, torch.stack(steps), logits[:-1].gather(-1, prompt[0, 1:, None]).squeeze(-1)


def engine(folder: Path, **options: Any) -> Any:
    """Return vLLM with the tiny model."""
    from vllm import LLM

    small = {"max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 512, "kv_cache_memory_bytes": 2**28}
    plain = {"dtype": "float32", "skip_tokenizer_init": True, "enable_prefix_caching": False, "enforce_eager": True}
    return LLM(model=str(folder / "model"), **{**small, **plain, "seed": 0, **options})


def ask(llm: Any, asked: list[tuple[list[int], dict[str, list[Any]]]], new: int, *, prompt: bool = True) -> list[Any]:
    """Return vLLM's outputs for prompts with operations."""
    from vllm import SamplingParams

    plain = {"temperature": 0, "max_tokens": new, "ignore_eos": True, "logprobs": 1, "detokenize": False}
    params = [
        SamplingParams(**plain, prompt_logprobs=1 if prompt else None, extra_args=extra_args(each) if each else None)
        for _, each in asked
    ]
    return list(llm.generate([{"prompt_token_ids": ids} for ids, _ in asked], params, use_tqdm=False))


def compare(name: str, output: Any, reference: tuple[list[int], Any, Any], clean: Any, ids: list[int]) -> bool:
    """Print how an output of vLLM differs from the reference, and return whether that is right."""
    tokens, generated, prompt = reference
    found = list(output.outputs[0].token_ids)
    chosen = [step[t].logprob for step, t in zip(output.outputs[0].logprobs, found, strict=True)]
    difference = float((torch.tensor(chosen) - generated).abs().max()) if found == tokens else float("inf")
    if output.prompt_logprobs is not None:
        of_prompt = [step[t].logprob for step, t in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
        difference = max(difference, float((torch.tensor(of_prompt) - prompt).abs().max()))
    changed = sum(a != b for a, b in zip(tokens, clean[0], strict=True))
    effect = float((prompt - clean[2]).abs().max())
    right = difference < TOLERANCE
    print(
        f"{'right' if right else 'WRONG'}: {name}: tokens equal {found == tokens}, log probabilities within "
        f"{difference:.1e}; the edit changes {changed} of {len(tokens)} tokens and log probabilities by {effect:.1e}"
    )
    return right


# ---------------------------------------------------------------------- modes
def batch(folder: Path, **options: Any) -> bool:
    """Compare all cases, asked twice and more than fit in a batch: requests come, move in the batch and go."""
    llm, reference, asked = engine(folder, **options), Reference(folder), cases(folder)
    names = list(asked) * 2
    ids = prompts(len(names))
    outputs = ask(llm, [(prompt, asked[name]) for prompt, name in zip(ids, names, strict=True)], NEW)
    right = []
    for name, prompt, output in zip(names, ids, outputs, strict=True):
        clean = reference(prompt, {}, NEW)
        right.append(compare(name, output, reference(prompt, asked[name], NEW), clean, prompt))
    return all(right) and refusals(llm)


def refusals(llm: Any) -> bool:
    """Check that requests that cannot be served are refused, and that the engine goes on."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    ids = prompts(1)[0]
    steer = {"featurizer": "owner/relu", "do": "steer", "indices": [1], "delta": 1.0}
    bad = {
        "no such position": request({**steer, "positions": [len(ids)]}),
        "not armed": request({**steer, "site": "resid.post:0"}),
        "not allowed": request({**steer, "featurizer": "../secret"}),
        "no fixed form": request({"featurizer": "owner/topk", "do": "ablate", "indices": [1]}),
        "too many features": request({**steer, "indices": list(range(7))}),
        "no JSON": "{",
    }
    right = []
    for name, raw in bad.items():
        params = SamplingParams(max_tokens=1, detokenize=False, extra_args={"featurizers": raw})
        try:
            llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
            print(f"WRONG: {name} is not refused")
            right.append(False)
        except VLLMValidationError as error:
            print(f"right: {name} is refused: {error}"[:160])
            right.append(True)
    llm.generate([{"prompt_token_ids": ids}], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    return all(right)


def cache(folder: Path, **options: Any) -> bool:
    """Ask for one long prompt with and without edits, which must not share keys and values."""
    llm, reference, asked = engine(folder, enable_prefix_caching=True, **options), Reference(folder), cases(folder)
    ids = torch.randint(3, VOCABULARY, (300,), generator=torch.Generator().manual_seed(4)).tolist()
    clean, right = reference(ids, {}, 8), []
    cached = {}
    for turn, name in enumerate(["ablate, jumprelu", "clean", "interchange", "ablate, jumprelu", "clean"]):
        (output,) = ask(llm, [(ids, asked[name])], 8, prompt=False)
        cached[turn] = output.num_cached_tokens
        right.append(compare(f"{name} ({cached[turn]} cached)", output, reference(ids, asked[name], 8), clean, ids))
    for name in ("steer, positions", "interchange", "ablate, subspace"):  # two turns of a chat
        (first,) = ask(llm, [(ids[:250], asked[name])], 40, prompt=False)
        longer = [*ids[:250], *first.outputs[0].token_ids, *ids[:10]]
        (output,) = ask(llm, [(longer, asked[name])], 8, prompt=False)
        wanted, clean = reference(longer, asked[name], 8), reference(longer, {}, 8)
        right.append(
            compare(f"a second turn: {name} ({output.num_cached_tokens} cached)", output, wanted, clean, longer)
        )
    shared = [cached[turn] > 0 for turn in range(5)]
    print(f"{'right' if shared == [False, False, False, True, True] else 'WRONG'}: each shares with its own alone")
    return all(right) and shared == [False, False, False, True, True]


def preemption(folder: Path, **options: Any) -> bool:
    """Compare requests that are preempted and computed again, because the cache is too small for all of them."""
    block = 2 * 4 * 2 * 32 * 4 * 32  # keys and values of 32 tokens, in bytes
    llm = engine(folder, kv_cache_memory_bytes=12 * block, max_model_len=128, block_size=32, **options)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    count, preempt = [0], scheduler._preempt_request

    def counted(*arguments: Any, **given: Any) -> Any:
        count[0] += 1
        return preempt(*arguments, **given)

    scheduler._preempt_request = counted
    asked, reference = cases(folder), Reference(folder)
    ids = prompts(len(asked))
    outputs = ask(llm, list(zip(ids, asked.values(), strict=True)), 50, prompt=False)
    right = [
        compare(name, output, reference(prompt, asked[name], 50), reference(prompt, {}, 50), prompt)
        for name, output, prompt in zip(asked, outputs, ids, strict=True)
    ]
    print(f"{'right' if count[0] else 'WRONG'}: {count[0]} preemptions")
    return all(right) and count[0] > 0


MODES: dict[str, Callable[..., bool]] = {
    "eager": batch,
    "chunks": lambda folder: batch(folder, max_num_batched_tokens=16),
    "compiled": lambda folder: batch(folder, enforce_eager=False),
    "cache": cache,
    "preemption": preemption,
}


def main() -> int:
    """Run the modes, each in a process of its own; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("modes", nargs="+", choices=MODES)
    parser.add_argument("--architecture", default="LlamaForCausalLM")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if not (given.folder / "settings.json").exists():
        make(given.folder, given.architecture)
    settings = str((given.folder / "settings.json").resolve())
    if os.environ.get("FEATURIZERS_VLLM") == settings:  # a process of one mode
        return 0 if MODES[given.modes[0]](given.folder.resolve()) else 1
    failed = []
    for mode in given.modes:
        print(f"== {mode}", flush=True)
        words = [sys.executable, __file__, str(given.folder), mode]
        if subprocess.run(
            words, env={**os.environ, **ENVIRONMENT, "FEATURIZERS_VLLM": settings}, check=False
        ).returncode:
            failed.append(mode)
    print("FAILED: " + ", ".join(failed) if failed else "all right")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
