"""Find where a language model represents a variable: prompts that it answers correctly, pairs, a sweep of sites.

    python examples/find_a_variable.py --model SmolLM2-135M-Instruct.Q4_1.gguf --task kind --out kind

There are two tasks. ``continent``: "The country Kenya is on the continent of"; the variable is the continent.
``kind``: a line such as "red, juice. drink:", after an example line; the variable is which kind of word is asked for.
Its counterfactual answer is the other word of the base, so that a vector which transfers the source's answer is wrong.
As in MIB (arXiv:2504.13151), the model answers both prompts of a pair correctly. No country and no word of a held-out
pair is in a pair of the search. See docs/training-study.md.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import featurizers
import torch
import typer
from featurizers.models import Anatomy, load_model
from featurizers_training import DAS, PCA, FullVector, Pairs, RandomSubspace, Settings, evaluate, sweep
from featurizers_training.demo.english import COUNTRIES, TEMPLATE
from featurizers_training.sweeps.report import tables
from rich.console import Console
from torch import nn

console = Console()

KINDS = {
    "animal": "dog cat horse cow sheep lion tiger bear wolf fox rabbit mouse",
    "fruit": "apple banana orange grape peach pear lemon mango cherry lime plum fig",
    "tool": "hammer saw drill wrench shovel axe knife needle rake ladder scissors brush",
    "color": "red blue green yellow purple pink brown gray black white silver violet",
    "country": "France Japan Brazil Kenya Canada Spain Egypt India Peru Italy Norway Chile",
    "drink": "tea coffee milk water juice wine beer soda cocoa cider lemonade rum",
}
SHOWN = "chair, eagle. bird: eagle\n"


@dataclass(frozen=True)
class Prompt:
    """A prompt, its answer and its parts.

    Attributes:
        text: for the model.
        answer: correct next word, without the space before it.
        variable: value of the variable in this prompt.
        others: answer for each value of the variable.
        words: words that may not be both in a pair of the search and in a held-out pair.
        positions: beginnings of the text that end at the positions to search, by name.
    """

    text: str
    answer: str
    variable: str
    others: dict[str, str]
    words: frozenset[str]
    positions: dict[str, str]


def continents(rng: random.Random, held_out: bool) -> Iterator[Prompt]:
    """Yield the countries of a fixed two thirds, or the held-out third, in random order."""
    known = [(country, continent) for continent, names in COUNTRIES.items() for country in names.split()]
    random.Random(0).shuffle(known)
    third = len(known) // 3
    chosen = known[:third] if held_out else known[third:]
    rng.shuffle(chosen)
    for country, continent in chosen:
        text, to_country = TEMPLATE.format(country), TEMPLATE.partition("{}")[0] + country
        answers = {each: each.split()[0] for each in COUNTRIES}
        yield Prompt(
            text, answers[continent], continent, answers, frozenset([country]), {"country": to_country, "last": text}
        )


def kinds(rng: random.Random, held_out: bool) -> Iterator[Prompt]:
    """Yield without end two words of different kinds and one of the kinds, from two thirds of the words or the rest."""
    while True:
        pair = rng.sample(sorted(KINDS), 2)
        asked = pair[0]
        word = {kind: rng.choice(KINDS[kind].split()[8:] if held_out else KINDS[kind].split()[:8]) for kind in pair}
        first, second = rng.sample(pair, 2)
        to_kind = f"{SHOWN}{word[first]}, {word[second]}. {asked}"
        text = f"{to_kind}:"
        yield Prompt(text, word[asked], asked, word, frozenset(word.values()), {"kind": to_kind, "last": text})


TASKS: dict[str, Callable[[random.Random, bool], Iterator[Prompt]]] = {"continent": continents, "kind": kinds}


@torch.no_grad()
def answered(model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt], batch: int = 32) -> list[Prompt]:
    """Return the prompts for which the model's most likely next token is the first token of the answer."""
    correct = []
    device = next(model.parameters()).device
    for start in range(0, len(prompts), batch):
        chunk = prompts[start : start + batch]
        ids = [tokenizer(prompt.text).input_ids for prompt in chunk]
        answers = [tokenizer(f"{p.text} {p.answer}").input_ids[len(row)] for p, row in zip(chunk, ids, strict=True)]
        lengths = torch.tensor([len(row) for row in ids])
        padded = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True).to(device)
        mask = (torch.arange(padded.shape[1]) < lengths.unsqueeze(-1)).long().to(device)
        logits = model(input_ids=padded, attention_mask=mask).logits
        likeliest = logits[torch.arange(len(chunk)), lengths.to(device) - 1].argmax(-1).tolist()
        correct += [prompt for prompt, a, b in zip(chunk, likeliest, answers, strict=True) if a == b]
    return correct


def records(
    tokenizer: Any, prompts: Sequence[Prompt], count: int, rng: random.Random, *, differ: bool = True
) -> list[dict[str, Any]]:
    """Draw random pairs that differ in the variable, or that do not, as records of a file of pairs."""
    drawn: list[dict[str, Any]] = []
    seen: set[tuple[str, str]] = set()
    for _ in range(1000 * count):
        base, source = rng.sample(prompts, 2)
        label = base.others.get(source.variable)
        if len(drawn) == count:
            break
        if label is None or (label != base.answer) != differ:
            continue
        if (base.text, source.text) in seen or base.words & source.words:
            continue
        seen.add((base.text, source.text))
        positions = [{k: len(tokenizer(v).input_ids) - 1 for k, v in p.positions.items()} for p in (base, source)]
        drawn.append(
            {
                "base": base.text,
                "source": source.text,
                "label": f" {label}",
                "base_label": f" {base.answer}",
                "base_position": positions[0],
                "source_position": positions[1],
            }
        )
    return drawn


def write_pairs(
    model: nn.Module, tokenizer: Any, task: str, folder: Path, *, pairs: int, held_out: int, seed: int
) -> dict[str, Any]:
    """Write ``train.jsonl``, ``test.jsonl`` and ``same.jsonl``, and return how many prompts and pairs there are.

    The last file has pairs with the same value of the variable, so that its interchange should not change the answer.
    """
    counts: dict[str, Any] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", pairs), ("test", held_out)):
        rng = random.Random(f"{seed} {name}")
        prompts = [prompt for prompt, _ in zip(TASKS[task](rng, name == "test"), range(2 * count), strict=False)]
        correct = answered(model, tokenizer, prompts)
        lines = records(tokenizer, correct, count, rng)
        counts[name] = {"prompts": len(prompts), "answered correctly": len(correct), "pairs": len(lines)}
        write_lines(lines, folder / f"{name}.jsonl")
    write_lines(records(tokenizer, correct, held_out, rng, differ=False), folder / "same.jsonl")
    return counts


def write_lines(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a file of JSON lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def again(source: str, site: str, model: str, pairs: Path) -> float:
    """Measure the accuracy of an artefact in a new process, at a site such as ``resid.post:8@last``."""
    command = [sys.executable, "-m", "featurizers", "evaluate", source, "--site", site, "--model", model]
    done = subprocess.run([*command, "--pairs", str(pairs), "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr}")
    return float(json.loads(done.stdout)["accuracy"])


def main(
    model: Annotated[str, typer.Option(help="Hub id, folder, or .gguf file of a decoder.")],
    task: Annotated[str, typer.Option(help="One of continent, kind.")] = "kind",
    out: Annotated[Path, typer.Option(help="Folder of pairs, tables, picture and artefact.")] = Path("variable"),
    every: Annotated[int, typer.Option(help="Search after each n-th block, and after the last.", min=1)] = 3,
    features: Annotated[int, typer.Option(help="Dimensions of the subspaces.")] = 16,
    pairs: Annotated[int, typer.Option(help="Number of pairs of the search.")] = 200,
    held_out: Annotated[int, typer.Option(help="Number of held-out pairs, which the accuracy is measured on.")] = 100,
    epochs: int = 5,
    controls: Annotated[str, typer.Option(help="Some of shuffled-labels,random-model, or none.")] = "shuffled-labels",
    push: Annotated[str | None, typer.Option(help="owner/name of a repository on the Hub.")] = None,
    seed: int = 0,
) -> None:
    """Write pairs, sweep the layers, save the best subspace, and measure it again in a new process."""
    loaded = load_model(model)
    counts = write_pairs(loaded.model, loaded.tokenizer, task, out, pairs=pairs, held_out=held_out, seed=seed)
    for name, count in counts.items():
        console.print(f"{name}: " + ", ".join(f"{value} {key}" for key, value in count.items()), highlight=False)
    train, test = (Pairs.read(out / f"{name}.jsonl", loaded.tokenizer, position="last") for name in ("train", "test"))
    last = Anatomy(loaded.model).n_layers - 1
    result = sweep(
        loaded.model,
        train,
        test,
        [f"resid.post:{layer}" for layer in sorted({*range(0, last, every), last})],
        list(train.records[0]["base_position"]),
        [DAS(n_features=features), FullVector(), PCA(n_features=features), RandomSubspace(n_features=features)],
        controls=[name for name in controls.split(",") if name and name != "none"],
        settings=Settings(epochs=epochs, seed=seed),
        progress=True,
    )
    result.write(out)
    for table in tables(result.rows(), str(result.about["title"])):
        console.print(table)
    cell, found = result.best("das")
    same = evaluate(
        loaded.model, Pairs.read(out / "same.jsonl", loaded.tokenizer, position=cell.position), found.featurizer
    )
    console.print(
        f"{cell.site} at {cell.position}: {same} keep the answer with a source of the same value", highlight=False
    )
    folder = found.save(out / "artefact")
    source = str(folder)
    if push is not None:
        featurizers.push(folder, push)
        source = f"hub:{push}"
    accuracy = again(source, f"{cell.site}@{cell.position}", model, out / "test.jsonl")
    console.print(f"{source}: {accuracy:.1%} in a new process, {cell.held_out.value:.1%} here", highlight=False)


if __name__ == "__main__":
    typer.run(main)
