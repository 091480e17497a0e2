"""Example: train a small TopK dictionary on the activations of a decoder and save it as an artefact.

    python examples/train_topk_dictionary.py --model SmolLM2-135M-Instruct.Q4_1.gguf --layer 12 --out dictionary

Gao et al. 2024 (arXiv:2406.04093): x̂ = W_decᵀ topk(W_enc (x - b_dec) + b_enc) + b_dec with rows of W_dec of length 1,
the squared error relative to the variance, and an auxiliary loss that lets dead features explain the residual. The text
is the file that ``--text`` names, by default the docstrings of Python's standard library.
"""

from __future__ import annotations

import ast
import sysconfig
import time
from pathlib import Path
from typing import Annotated, Any

import featurizers
import torch
import typer
from featurizers import DictionaryFeaturizer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional

console = Console()


def python_documentation() -> str:
    """Return the docstrings of Python's standard library, which every machine has."""
    texts = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts or "test" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # some files have another encoding, for tests
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                texts.append(text)
    return "\n\n".join(text for text in texts if len(text) > 80)


def activations(model: Any, ids: Tensor, site: str, batch: int = 8) -> Tensor:
    """Return activations at a site of sequences ``(n, length)``, without outliers: ``(tokens, d)``.

    The first token of each sequence is left out, and so are the few others whose activations have more than ten times
    the median norm (massive activations, Sun et al. 2024, arXiv:2402.17762), because they would make up most of the
    variance.
    """
    parts = []
    for start in track(range(0, len(ids), batch), "activations", console=console):
        collected = featurizers.collect(model, {"input_ids": ids[start : start + batch]}, [site])[site]
        parts.append(collected[:, 1:].flatten(0, 1))
    x = torch.cat(parts)
    norms = x.norm(dim=-1)
    return x[norms < 10 * norms.median()]


def train(
    x: Tensor, n_features: int, k: int, steps: int, batch: int, seed: int
) -> tuple[DictionaryFeaturizer, list[float]]:
    """Train a dictionary on activations ``(n, d)``; also return the unexplained share of the variance at each step."""
    g = torch.Generator().manual_seed(seed)
    d = x.shape[1]
    rows = functional.normalize(torch.randn(n_features, d, generator=g), dim=-1)
    f = DictionaryFeaturizer.from_tensors(
        rows.clone(), rows, None, x.mean(0), rule="topk", rule_options={"k": k}, pre_bias=True
    ).requires_grad_()
    optimizer = torch.optim.Adam(f.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (steps - i) / (0.2 * steps)))
    variance = (x - x.mean(0)).square().sum(-1).mean()
    silent = torch.zeros(n_features)
    losses = []
    for _ in track(range(steps), "training", console=console):
        tokens = x[torch.randint(len(x), (batch,), generator=g)]
        pre = (tokens - f.b_dec) @ f.W_enc.T + f.get_parameter("b_enc")
        values, indices = pre.topk(k, dim=-1, sorted=False)
        kept = torch.zeros_like(pre).scatter(-1, indices, values.relu())
        residual = tokens - (kept @ f.W_dec + f.b_dec)
        loss = residual.square().sum(-1).mean() / variance
        silent = torch.where((kept > 0).any(0), 0.0, silent + batch)
        dead = silent > 20 * batch
        if (count := int(dead.sum())) >= k:
            top = pre[:, dead].topk(min(count, d // 2), dim=-1)
            explained = torch.zeros(batch, count).scatter(-1, top.indices, top.values.relu()) @ f.W_dec[dead]
            target = residual.detach()
            loss_of_dead = (target - explained).square().sum(-1).mean() / target.square().sum(-1).mean()
            total = loss + loss_of_dead / 32
        else:
            total = loss
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            f.W_dec.copy_(functional.normalize(f.W_dec, dim=-1))
        losses.append(loss.item())
    return f.requires_grad_(False).eval(), losses


@torch.no_grad()
def measure(f: DictionaryFeaturizer, x: Tensor, trained_on: Tensor, k: int) -> dict[str, float]:
    """Measure what the dictionary explains of held-out activations ``(n, d)``, and what k principal components do."""
    mean = trained_on.mean(0)
    total = (x - x.mean(0)).square().sum()
    fires, residual = torch.zeros(f.n_features), 0.0
    for part in x.split(2048):
        features, error = f.featurize(part)
        fires += (features > 0).sum(0)
        residual += float(error.square().sum())
    components = torch.linalg.eigh((trained_on - mean).T @ (trained_on - mean)).eigenvectors[:, -k:]
    rest = (x - mean) - (x - mean) @ components @ components.T
    return {
        "variance_explained": 1 - residual / float(total),
        "variance_explained_by_pca_of_rank_k": 1 - float(rest.square().sum() / total),
        "l0": float(fires.sum()) / len(x),
        "never_fired": float((fires == 0).float().mean()),
    }


def main(
    model: Annotated[str, typer.Option(help="Hub id, folder, or .gguf file of a decoder.")],
    out: Annotated[Path, typer.Option(help="Folder of the artefact.")] = Path("dictionary"),
    text: Annotated[Path | None, typer.Option(help="Text file; Python's documentation if not given.")] = None,
    layer: Annotated[int, typer.Option(help="Block whose output is read.")] = 12,
    features: Annotated[int, typer.Option(help="Features of the dictionary.")] = 4096,
    k: Annotated[int, typer.Option(help="Features of a token that fire.")] = 32,
    tokens: Annotated[int, typer.Option(help="Tokens to train on.")] = 200_000,
    steps: Annotated[int, typer.Option(help="Steps of the optimizer.")] = 1500,
    batch: Annotated[int, typer.Option(help="Tokens a step.")] = 1024,
    seed: int = 0,
) -> None:
    """Train a TopK dictionary, print what it explains, and save it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start, length = time.perf_counter(), 128
    path = Path(model)
    name, options = (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (model, {})
    hub_id = None if path.exists() else model
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    decoder = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options).eval().requires_grad_(False)
    words = text.read_text(encoding="utf-8") if text else python_documentation()
    ids = tokenizer(words[: 8 * tokens], return_tensors="pt").input_ids[0, : tokens + tokens // 10]
    ids = ids[: len(ids) // length * length].reshape(-1, length)
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
    site = f"resid.post:{layer}"
    x = activations(decoder, ids, site)
    held_out, rest = x[: len(x) // 11], x[len(x) // 11 :]
    f, losses = train(rest, features, k, steps, batch, seed)
    measures = measure(f, held_out, rest, k)
    f.id, f.site = f"topk-{features}-{site}", featurizers.Site.parse(site).at(model=hub_id)
    f.metadata = {**measures, "tokens": len(rest), "tokens_held_out": len(held_out), "steps": steps}
    f.save_pretrained(out)
    table = Table("", "", title=f"{features} features, {k} of a token, at {site}")
    rows = {**measures, "unexplained_in_training": losses[-1], "minutes": (time.perf_counter() - start) / 60}
    for label, value in rows.items():
        table.add_row(label.replace("_", " "), f"{value:.3f}")
    console.print(table)
    console.print(f"saved in {out}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
