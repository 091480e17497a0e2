"""Task in English, for any language model that knows the answers: on which continent is a country?"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from featurizers import Site
from featurizers.errors import FeaturizerError
from featurizers.models import Anatomy, load_model
from torch import Tensor, nn

from featurizers_training.demo.task import Task
from featurizers_training.methods.searches import DAS
from featurizers_training.pairs import Pairs
from featurizers_training.search.settings import Settings

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
"""Number of countries that a model must know for the search to mean anything."""


def make_task(source: str, seed: int, n_features: int | None, layers: list[int] | None) -> Task:
    """Load a language model, keep the countries whose continent it knows, and pair those of different continents.

    No pair of the search has a country of the test.

    Args:
        source: Hub id, folder or ``.gguf`` file of the model.
        seed: of the split and of the pairs.
        n_features: dimensions of the subspace; 4 if None.
        layers: blocks to search; six from first to last if None.

    Raises:
        UsageError: the model cannot be loaded.
        SiteError: the model does not have one of the layers.
        FeaturizerError: the model knows too few countries.
    """
    model, tokenizer, _ = load_model(source)
    sites = _sites(model, layers, 6)
    names, ids, answers = _known(model, tokenizer)
    if len(names) < FEWEST or len(set(answers.tolist())) < 2:
        raise FeaturizerError(
            f"{source} completes {TEMPLATE.format('…')!r} correctly for {len(names)} countries only; the demo needs a "
            f"model that knows {FEWEST} countries on at least two continents"
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
        sites=sites,
        subspace=DAS(n_features=n_features or 4),
        settings=Settings(epochs=1, batch_size=16, seed=seed),
        notes=[
            f"prompt: {TEMPLATE.format(names[0])!r}",
            f"it knows the continent of {len(names)} countries; {len(held_out)} of them are held out for the test: "
            + ", ".join(names[i] for i in held_out),
        ],
        spell=tokenizer.decode,
    )


def _sites(model: nn.Module, layers: list[int] | None, count: int) -> list[Site]:
    """Return the residual stream after the given blocks, or after ``count`` blocks from first to last."""
    n_layers = Anatomy(model).n_layers
    if layers is None:
        layers = sorted({round(i * (n_layers - 1) / max(count - 1, 1)) for i in range(count)})
    sites = [Site("resid.post", layer) for layer in layers]
    for site in sites:
        Anatomy(model).place(site)
    return sites


@torch.no_grad()
def _known(model: nn.Module, tokenizer: Any) -> tuple[list[str], Tensor, Tensor]:
    """Return the countries that the model answers correctly, their prompts ``(n, t)`` and first tokens of the answers.

    Only prompts of the commonest length are used, so that no batch needs padding.
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
    answered = torch.cat([model(input_ids=chunk).logits[:, -1].argmax(-1) for chunk in torch.split(ids, 32)])
    right = (answered == answers).nonzero().squeeze(-1)
    return [names[i] for i in right.tolist()], ids[right], answers[right]


def _pairs(ids: Tensor, answers: Tensor, rows: list[int], seed: int) -> Pairs:
    """Return all pairs of these countries on different continents, in random order."""
    pool = torch.tensor(rows)
    base, source = torch.cartesian_prod(pool, pool).unbind(-1)
    differ = (answers[base] != answers[source]).nonzero().squeeze(-1)
    differ = differ[torch.randperm(len(differ), generator=torch.Generator().manual_seed(seed + 1))]
    prompts, labels = ids.tolist(), answers.tolist()
    columns = zip(base[differ].tolist(), source[differ].tolist(), strict=True)
    return Pairs.of({"base": prompts[b], "source": prompts[s], "label": labels[s]} for b, s in columns)
