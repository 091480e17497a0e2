"""The task in English: on which continent a country is, in any language model that knows it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from featurizers_training import DAS, Pairs, Settings
from torch import Tensor, nn

from featurizers.demo.search import Task
from featurizers.errors import FeaturizerError
from featurizers.format.sites import Site
from featurizers.models.anatomy import Anatomy
from featurizers.models.loading import load_model

TEMPLATE = "The country {} is on the continent of"
COUNTRIES = {
    "Africa": (
        "Algeria Angola Botswana Cameroon Chad Congo Egypt Ethiopia Ghana Kenya Libya Madagascar Malawi Mali Morocco "
        "Mozambique Namibia Niger Nigeria Rwanda Senegal Somalia Sudan Tanzania Tunisia Uganda Zambia Zimbabwe"
    ),
    "Asia": (
        "Afghanistan Bangladesh Bhutan Cambodia China India Indonesia Iran Iraq Japan Jordan Kazakhstan Korea Kuwait "
        "Laos Lebanon Malaysia Mongolia Myanmar Nepal Oman Pakistan Philippines Qatar Singapore Syria Taiwan "
        "Thailand Vietnam"
    ),
    "Europe": (
        "Albania Austria Belgium Bulgaria Croatia Denmark England Estonia Finland France Germany Greece Hungary "
        "Iceland Ireland Italy Latvia Lithuania Luxembourg Malta Netherlands Norway Poland Portugal Romania Serbia "
        "Slovakia Slovenia Spain Sweden Switzerland Ukraine"
    ),
    "South America": "Argentina Bolivia Brazil Chile Colombia Ecuador Guyana Paraguay Peru Suriname Uruguay Venezuela",
}
FEWEST = 12
"""Countries that a model must know for the search to mean anything."""


def make_task(source: str, seed: int, n_features: int | None, layers: list[int] | None) -> Task:
    """Load a language model, keep the countries whose continent it tells, and pair those of different continents.

    The countries of the test are in no pair that the search sees.

    Raises:
        UsageError: the model cannot be loaded.
        FeaturizerError: it knows too few countries.
    """
    model, tokenizer, _ = load_model(source)
    names, ids, answers = _known(model, tokenizer)
    if len(names) < FEWEST or len(set(answers.tolist())) < 2:
        raise FeaturizerError(
            f"{source} completes {TEMPLATE.format('…')!r} rightly for {len(names)} countries only; the demo needs a "
            f"model that knows {FEWEST} of at least two continents"
        )
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    held_out = sorted(order[: len(names) // 3].tolist())
    trained = sorted(order[len(names) // 3 :].tolist())
    train, test = (_pairs(ids, answers, rows, seed) for rows in (trained, held_out))
    return Task(
        title=f"{Path(source).name}: on which continent is the country?",
        model=model,
        train=train[:640],
        test=test[:96],
        sites=_sites(model, layers, 6),
        subspace=DAS(n_features=n_features or 4),
        settings=Settings(epochs=1, batch_size=16, seed=seed),
        notes=[
            f"prompt: {TEMPLATE.format(names[0])!r}",
            f"it tells the continent of {len(names)} countries; {len(held_out)} of them are kept for the test: "
            + ", ".join(names[i] for i in held_out),
        ],
        spell=tokenizer.decode,
    )


def _sites(model: nn.Module, layers: list[int] | None, count: int) -> list[Site]:
    """The residual stream after the given blocks, or after ``count`` of them from first to last."""
    n_layers = Anatomy(model).n_layers
    if layers is None:
        layers = sorted({round(i * (n_layers - 1) / max(count - 1, 1)) for i in range(count)})
    sites = [Site("resid.post", layer) for layer in layers]
    for site in sites:
        Anatomy(model).place(site)
    return sites


@torch.no_grad()
def _known(model: nn.Module, tokenizer: Any) -> tuple[list[str], Tensor, Tensor]:
    """The countries that the model answers rightly, their prompts ``(n, t)`` and the first tokens of the answers.

    Prompts of another length than most are left out, so that no batch needs padding.
    """
    prompts = {}
    for continent, countries in COUNTRIES.items():
        for country in countries.split():
            text = TEMPLATE.format(country)
            ids = tokenizer(text).input_ids
            prompts[country] = ids, tokenizer(f"{text} {continent}").input_ids[len(ids)]
    length, _ = Counter(len(ids) for ids, _ in prompts.values()).most_common(1)[0]
    names = [name for name, (ids, _) in prompts.items() if len(ids) == length]
    ids = torch.tensor([prompts[name][0] for name in names])
    answers = torch.tensor([prompts[name][1] for name in names])
    said = torch.cat([model(input_ids=chunk).logits[:, -1].argmax(-1) for chunk in torch.split(ids, 32)])
    right = (said == answers).nonzero().squeeze(-1)
    return [names[i] for i in right.tolist()], ids[right], answers[right]


def _pairs(ids: Tensor, answers: Tensor, rows: list[int], seed: int) -> Pairs:
    """Every two of these countries on different continents, in random order."""
    pool = torch.tensor(rows)
    base, source = torch.cartesian_prod(pool, pool).unbind(-1)
    differ = (answers[base] != answers[source]).nonzero().squeeze(-1)
    differ = differ[torch.randperm(len(differ), generator=torch.Generator().manual_seed(seed + 1))]
    prompts, labels = ids.tolist(), answers.tolist()
    columns = zip(base[differ].tolist(), source[differ].tolist(), strict=True)
    return Pairs.of({"base": prompts[b], "source": prompts[s], "label": labels[s]} for b, s in columns)
