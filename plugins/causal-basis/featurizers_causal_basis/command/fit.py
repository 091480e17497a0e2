"""Command ``fit causal-basis``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import featurizers
import typer
from featurizers.cli import commit_link, dtype_named, layer_numbers, progress_bar, write_results
from featurizers.errors import UsageError
from featurizers.files import refuse_full

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from featurizers_causal_basis.featurizer import CausalBasisFeaturizer
    from featurizers_causal_basis.lens import Readout
    from featurizers_causal_basis.solve import Progress

PICTURE: Final = "energies.png"


def fit_command(
    model: Annotated[str, typer.Option("--model", help="Hub id, folder or .gguf file of a language model.")],
    data: Annotated[str, typer.Option("--data", help="Texts, one per line; in a .jsonl file objects, one per line.")],
    out: Annotated[Path, typer.Option(help="A new folder.")],
    layers: Annotated[str | None, typer.Option(help="Such as 4,8,12 or 0-29; default: all.")] = None,
    k: Annotated[int, typer.Option("-k", "--vectors", min=1, help="Vectors per layer.")] = 16,
    readout: Annotated[
        str, typer.Option(help="logit-lens, tuned-lens:FOLDER, or model, which is slow.")
    ] = "logit-lens",
    mode: Annotated[str, typer.Option(help="Ablate a direction to: mean, resample or zero.")] = "mean",
    preset: Annotated[str, typer.Option(help="multi, fast, reference or reference-axes.")] = "multi",
    side: Annotated[str, typer.Option(help="Of the blocks: input or output.")] = "output",
    min_energy: Annotated[float, typer.Option(min=0.0, help="Drop vectors with less energy, in nats per token.")] = 0.0,
    tokens: Annotated[int, typer.Option(min=2, help="Number of tokens to use.")] = 1024,
    length: Annotated[int, typer.Option(min=1, help="Most tokens of a prompt.")] = 128,
    mask_first: Annotated[int, typer.Option(min=0, help="Tokens to leave out at the start of each prompt.")] = 1,
    key: Annotated[str, typer.Option(help="Of the text in the objects of a .jsonl file.")] = "text",
    max_iter: Annotated[int, typer.Option(min=1, help="Iterations of L-BFGS per vector.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per forward pass.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    checkpoints: Annotated[Path | None, typer.Option(help="Folder to save the state in and to resume from.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:0.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the model: float32, bfloat16, float16 or auto.")] = "float32",
    push: Annotated[str | None, typer.Option(help="Repository of the Hub to upload to, owner/name.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Find the directions of some layers whose ablation moves the output most, and save them."""
    from featurizers.models import Anatomy, load_model
    from rich.console import Console

    from featurizers_causal_basis.command.prompts import read_prompts
    from featurizers_causal_basis.featurizer import SITES
    from featurizers_causal_basis.pictures import energies_by_layer, matplotlib_figure
    from featurizers_causal_basis.solve import Preset, extract_causal_bases

    Preset.named(preset)
    make_readout = _readout(readout)
    for name, value, allowed in (
        ("mode", mode, ("mean", "resample", "zero")),
        ("side", side, tuple(SITES)),
    ):
        if value not in allowed:
            raise UsageError(f"--{name} is one of {', '.join(allowed)}, not {value!r}")
    refuse_full(out.expanduser())
    matplotlib_figure()  # if it is missing, fail before the search
    loaded = load_model(model, device=device, dtype=dtype_named(dtype))
    n_layers = Anatomy(loaded.model).n_layers
    numbers = list(range(n_layers)) if layers is None else layer_numbers(layers, n_layers)
    prompts = read_prompts(data, loaded.tokenizer, tokens=tokens, length=length, skipped=mask_first, key=key)
    target = next(loaded.model.parameters()).device

    with progress_bar(len(numbers) * k, shown=not as_json, elapsed=True) as bar:

        def tell(progress: Progress) -> None:
            text = (
                f"layer {progress.layer}, vector {progress.vector + 1}: {progress.energy:.4g} nats, "
                f"{progress.evaluations} evaluations"
            )
            bar.reach(progress.layers_done * progress.k + progress.vector + progress.found, text)
            if progress.found:
                bar.note(text)

        bases = extract_causal_bases(
            make_readout(loaded.model),
            {"input_ids": prompts.ids.to(target), "attention_mask": prompts.attention.long().to(target)},
            k,
            max_iter=max_iter,
            min_energy=min_energy,
            mode=mode,  # type: ignore[arg-type]  # checked above
            layers=numbers,
            mask=prompts.mask.to(target),
            mask_rule=prompts.rule,
            side=side,  # type: ignore[arg-type]
            preset=preset,
            seed=seed,
            progress=tell,
            resume=checkpoints,
            batch_size=batch_size,
            # the last part of a path, which reveals nothing of this machine
            model_id=model if loaded.revision else Path(model).name or model,
            model_revision=loaded.revision,
        )
    if not bases:
        raise UsageError(f"no layer has a direction of {min_energy} nats per token; give a smaller --min-energy")
    for basis in bases:
        basis.id = f"causal basis of {basis.site}"
        basis.metadata = {**basis.metadata, "data": {"file": Path(data).name, "prompts": len(prompts.ids)}}

    def write(folder: Path) -> None:
        if len(bases) == 1:
            bases[0].save_pretrained(folder)
        else:
            featurizers.save_collection({_subfolder(basis): basis for basis in bases}, folder)
        energies_by_layer({str(basis.site): basis for basis in bases}).savefig(folder / PICTURE, dpi=150)

    folder = write_results(out, write)
    picture = folder / PICTURE
    result = {
        "folder": str(folder),
        "picture": str(picture),
        "n_tokens": bases[0].record.n_tokens,
        "mask": bases[0].record.mask,
        "units": "nats/token",
        "layers": [_row(basis) for basis in bases],
    }
    if push is not None:
        url = featurizers.push(folder, push)
        result["url"] = commit_link(url)
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=True))
        return
    Console(emoji=False).print(_table(bases))
    print(f"Energies of single vectors, of {result['n_tokens']} tokens: {result['mask']}.")
    print(f"Artefact: {folder}, picture: {result['picture']}" + (f", {result['url']}" if push is not None else ""))


def _readout(text: str) -> Callable[[nn.Module], Readout | nn.Module]:
    """Return the function from a model to the readout that an option names.

    Raises:
        UsageError: the option names no readout.
    """
    from featurizers_causal_basis.lens import LogitLens, TunedLens

    if text == "logit-lens":
        return LogitLens
    if text == "model":
        return lambda model: model
    kind, _, folder = text.partition(":")
    if kind == "tuned-lens" and folder:
        return lambda model: TunedLens.load(model, folder)
    raise UsageError(f"--readout is logit-lens, model or tuned-lens:FOLDER, not {text!r}")


def _subfolder(basis: CausalBasisFeaturizer) -> str:
    return str(basis.site).replace(":", "-")


def _row(basis: CausalBasisFeaturizer) -> dict[str, Any]:
    numbers = {name: getattr(basis.record, name) for name in ("joint_energy", "inversions", "evaluations")}
    return {
        "site": str(basis.site),
        "subfolder": _subfolder(basis),
        "energies": basis.energies.tolist(),
        **numbers,
    }


def _table(bases: list[CausalBasisFeaturizer]) -> Table:
    from rich.table import Table

    table = Table("site")
    for name in ("vectors", "first", "last", "all at once", "evaluations"):
        table.add_column(name, justify="right")
    for basis in bases:
        energies = float(basis.energies[0]), float(basis.energies[-1]), basis.record.joint_energy
        shown = [f"{float('nan') if energy is None else energy:.4g}" for energy in energies]
        table.add_row(str(basis.site), str(basis.n_features), *shown, str(basis.record.evaluations))
    return table
