"""Embedded task: a tiny transformer whose answer depends on whether its first number is below its second."""

from __future__ import annotations

from typing import Any

import featurizers
import torch
from featurizers import Collect, Featurizer, Interchange, Site
from torch import Tensor, nn

from featurizers_training.demo.task import Task
from featurizers_training.methods.searches import DAS
from featurizers_training.pairs import Pairs
from featurizers_training.search.settings import Settings

NUMBERS, LETTERS = 10, 8
ANSWERS = NUMBERS + LETTERS  # token of the first answer
VOCABULARY = ANSWERS + 2 * LETTERS
LAYERS, WIDTH = 4, 64
PLANTED = Site("resid.post", 1)
POSITIONS = [-1]
QUIET = 0.5
"""Weight in the loss of the planted direction's share of the variance: the variable matters, but varies little."""


def make_task(seed: int, n_features: int | None) -> Task:
    """Train the transformer and draw counterfactual pairs.

    A prompt is ``a b c``: two different numbers and a letter. Each letter and value of the hidden variable ``a < b``
    have an answer token of their own. The counterfactual answer keeps the base's letter and takes the source's value of
    the variable, so that swapping the whole residual stream gives a wrong answer: it swaps the letter as well.

    It is known where the variable is: interchange intervention training (Geiger et al. 2022, arXiv:2112.00826) makes
    the model keep it on one random direction at the site `PLANTED`, with a small part of the variance there. The search
    does not know this.

    Args:
        seed: of everything random.
        n_features: dimensions of the subspace; 1 if None.
    """
    prompts = _prompts()
    planted = featurizers.create("subspace", d_in=WIDTH, n_features=1, seed=seed + 2000).requires_grad_(False)
    model, accuracy = _train(prompts, planted, seed)
    share = float(
        _share(featurizers.collect(model, {"input_ids": prompts}, [PLANTED], positions=POSITIONS)[PLANTED], planted)
    )
    generator = torch.Generator().manual_seed(seed)
    shuffled = prompts[torch.randperm(len(prompts), generator=generator)]
    held_out = len(prompts) // 3
    return Task(
        title="A tiny transformer: is the first number below the second?",
        model=model,
        train=_pairs(shuffled[held_out:], 2048, generator),
        test=_pairs(shuffled[:held_out], 512, generator),
        sites=[Site("embed"), *(Site("resid.post", layer) for layer in range(LAYERS))],
        subspace=DAS(n_features=n_features or 1),
        settings=Settings(epochs=6, batch_size=128, seed=seed),
        notes=[
            f"it answers {accuracy:.1%} of the {len(prompts)} prompts correctly; {held_out} are held out for the test",
            f"it was trained to keep this variable on one random direction at {PLANTED}, which has {share:.0%} of the "
            "variance there; the search does not know the site or the direction",
        ],
        spell=_spell,
        planted=(PLANTED, planted),
    )


def _prompts() -> Tensor:
    """Return all prompts ``(720, 3)``."""
    axes = [torch.arange(NUMBERS), torch.arange(NUMBERS), torch.arange(NUMBERS, ANSWERS)]
    prompts = torch.cartesian_prod(*axes)
    return prompts[prompts[:, 0] != prompts[:, 1]]


def _spell(tokens: Tensor) -> str:
    """Write a prompt as ``3 7 c``, and an answer as ``c if below`` or ``c if not``."""
    words = []
    for token in tokens.reshape(-1).tolist():
        letter = "abcdefgh"[(token - NUMBERS) % LETTERS]
        answer = f"{letter} if {'below' if token >= ANSWERS + LETTERS else 'not'}"
        words.append(str(token) if token < NUMBERS else letter if token < ANSWERS else answer)
    return " ".join(words)


def _variable(prompts: Tensor) -> Tensor:
    return (prompts[:, 0] < prompts[:, 1]).long()


def _answer(prompts: Tensor, variable: Tensor) -> Tensor:
    return ANSWERS + variable * LETTERS + prompts[:, 2] - NUMBERS


def _pairs(prompts: Tensor, count: int, generator: torch.Generator) -> Pairs:
    """Draw pairs whose variable differs, so that every answer has to change."""
    base = prompts[torch.randint(len(prompts), (count,), generator=generator)]
    pools = [prompts[_variable(prompts) == value] for value in (0, 1)]
    draws = [pool[torch.randint(len(pool), (count,), generator=generator)] for pool in pools]
    source = torch.where(_variable(base).bool().unsqueeze(-1), draws[0], draws[1])
    columns = zip(base.tolist(), source.tolist(), _answer(base, _variable(source)).tolist(), strict=True)
    return Pairs.of({"base": b, "source": s, "label": answer} for b, s, answer in columns)


def _share(activations: Tensor, planted: Featurizer[Any]) -> Tensor:
    """Return the share of the variance of activations ``(n, 1, d)`` that is in a subspace."""
    return planted.collect(activations).var(dim=0).sum() / activations.var(dim=0).sum()


def _train(
    prompts: Tensor, planted: Featurizer[Any], seed: int, steps: int = 250, batch: int = 128, lr: float = 4e-3
) -> tuple[nn.Module, float]:
    """Train a Llama of four layers on the prompts and on interchanges of the planted direction.

    Returns:
        The model and its accuracy on the prompts.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config: Any = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=8,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    variable = _variable(prompts)
    identity = featurizers.create("identity", d_in=WIDTH)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
        for _ in range(steps):
            rows = torch.randint(len(prompts), (batch,))
            others = rows.roll(1)
            with featurizers.intervene(model, {PLANTED: Collect(identity, positions=POSITIONS)}) as collected:
                logits = model(prompts[rows]).logits[:, -1]
            source = collected[PLANTED].roll(1, dims=0)
            with featurizers.intervene(model, {PLANTED: Interchange(planted, source=source, positions=POSITIONS)}):
                swapped = model(prompts[rows]).logits[:, -1]
            loss = nn.functional.cross_entropy(logits, _answer(prompts[rows], variable[rows]))
            loss = loss + nn.functional.cross_entropy(swapped, _answer(prompts[rows], variable[others]))
            loss = loss + QUIET * _share(collected[PLANTED], planted)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    model.eval().requires_grad_(False)
    right = model(prompts).logits[:, -1].argmax(-1) == _answer(prompts, variable)
    return model, float(right.float().mean())
