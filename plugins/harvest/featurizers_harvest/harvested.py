"""Commands ``featurizers harvested …``, of a harvest that is finished."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from featurizers.cli import print_json
from featurizers.errors import MissingDependencyError, UsageError, one_line, printable, shown

if TYPE_CHECKING:
    from featurizers_harvest.index import Context

Folder = Annotated[str, typer.Argument(metavar="FOLDER", help="Of a finished harvest.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Under which it was harvested, such as sae of site=sae.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def index_command(folder: Folder, name: Name, as_json: Json = False) -> None:
    """Build the index by feature: where each feature is not 0, the largest values first."""
    from featurizers_harvest.index import build_index
    from featurizers_harvest.reading import open as open_harvest

    path = build_index(open_harvest(folder), name)
    if as_json:
        print_json({"index": str(path)})
    else:
        print(f"Written: {printable(str(path), 500)}")


def contexts_command(
    folder: Folder,
    name: Name,
    feature: Annotated[int, typer.Argument(min=0, metavar="FEATURE", help="Its number.")],
    k: Annotated[int, typer.Option("--k", min=1, help="Number of contexts.")] = 10,
    width: Annotated[int, typer.Option(min=0, help="Tokens on each side.")] = 16,
    tokenizer: Annotated[
        str | None, typer.Option(help="Hub id or folder of the model's tokenizer; without it tokens are numbers.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the tokens at which a feature is largest, with those around; the index is built at the first call."""
    from featurizers_harvest.index import top_contexts
    from featurizers_harvest.reading import open as open_harvest

    decode = _decoder(tokenizer)
    found = top_contexts(open_harvest(folder), name, feature, k=k, width=width)
    if as_json:
        print_json({"feature": feature, "contexts": [each._asdict() | _texts(each, decode) for each in found]})
        return
    for each in found:
        texts = [decode([token]) if decode else f" {token}" for token in each.tokens]
        at = each.position - each.start
        line = "".join([*texts[:at], f"[{texts[at]}]", *texts[at + 1 :]])
        print(f"{each.value:10.4g}  document {each.document}, token {each.position}: {printable(line, 2000)}")
    if not found:
        print(f"Feature {feature} is 0 at every token.")


def export_command(
    folder: Folder,
    name: Name,
    to: Annotated[str, typer.Option(help="sae-lens (of activations) or delphi (of features).")],
    out: Annotated[Path, typer.Option(metavar="NEW", help="New folder.")],
    context_size: Annotated[int, typer.Option(min=1, help="Tokens of a context.")],
    hook_name: Annotated[
        str | None, typer.Option(help="For sae-lens: of the activations, such as blocks.3.hook_resid_post.")
    ] = None,
    module: Annotated[str | None, typer.Option(help="For delphi: of the module, such as layers.8.")] = None,
    splits: Annotated[int | None, typer.Option(min=1, help="For delphi: number of files; 5 by default.")] = None,
    as_json: Json = False,
) -> None:
    """Write a harvest as the files of SAELens or delphi."""
    if to not in ("sae-lens", "delphi"):
        raise UsageError(f"--to is sae-lens or delphi, not {shown(to)}")
    for option, value, of in (("--hook-name", hook_name, "sae-lens"), ("--module", module, "delphi")):
        if to == of and value is None:
            raise UsageError(f"--to {to} needs {option}")
    given = {"--hook-name": hook_name} if to == "delphi" else {"--module": module, "--splits": splits}
    if unfit := [option for option, value in given.items() if value is not None]:
        raise UsageError(f"{unfit[0]} is not for --to {to}")
    from featurizers_harvest.exports import to_delphi, to_sae_lens
    from featurizers_harvest.reading import open as open_harvest

    harvest = open_harvest(folder)
    if to == "sae-lens":
        contexts = to_sae_lens(harvest, name, out, hook_name=str(hook_name), context_size=context_size)
    else:
        contexts = to_delphi(harvest, name, out, module=str(module), context_size=context_size, splits=splits or 5)
    if as_json:
        print_json({"written": str(out), "contexts": contexts})
    else:
        print(f"Written: {printable(str(out), 500)}: {contexts} contexts of {context_size} tokens")


def _decoder(name: str | None) -> Any:
    """Return what makes a text of token ids; None without a tokenizer.

    Raises:
        UsageError: it cannot be loaded.
        MissingDependencyError: transformers is not installed.
    """
    if name is None:
        return None
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingDependencyError("a tokenizer", "transformers", "pip install 'transformers>=5.9'") from error
    path = Path(name).expanduser()
    try:
        return AutoTokenizer.from_pretrained(path if path.is_dir() else name).decode
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"cannot load the tokenizer {shown(name)}: {one_line(error)}") from error


def _texts(context: Context, decode: Any) -> dict[str, Any]:
    return {} if decode is None else {"texts": [decode([token]) for token in context.tokens]}
