"""Command ``featurizers harvest``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import featurizers
import typer
from featurizers.cli import dtype_named, print_json
from featurizers.errors import ArtefactError, UsageError, printable, shown

if TYPE_CHECKING:
    from featurizers_harvest.reading import Harvest


def harvest_command(
    model: Annotated[str, typer.Option(help="Hub id, folder or .gguf file of a language model.")],
    data: Annotated[str, typer.Option(help="A .jsonl, .parquet or text file, or the id of a data set of the Hub.")],
    out: Annotated[str, typer.Option(help="Folder, or an address such as s3://bucket/name; called again it goes on.")],
    featurizer: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]SOURCE", help="Whose features to harvest; may be repeated.")
    ] = None,
    site: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]SITE", help="Whose activations to harvest; may be repeated.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="Of the text, or the token ids, in a record; or text.")] = None,
    split: Annotated[str, typer.Option(help="Of a data set of the Hub.")] = "train",
    documents: Annotated[int | None, typer.Option(min=1, help="Documents to read; all by default.")] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a row; longer documents are cut; 1024 by default.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that run together.")] = 8,
    exclude_special: Annotated[
        bool, typer.Option("--exclude-special", help="No features at special tokens of the tokenizer, such as bos.")
    ] = False,
    values: Annotated[str, typer.Option(help="Dtype of the values: float16 or float32.")] = "float16",
    shard_tokens: Annotated[int, typer.Option(min=1, help="About how many tokens a shard has.")] = 2**16,
    shard: Annotated[
        int | None, typer.Option(min=0, help="With --of: compute every n-th shard from this one on, for job arrays.")
    ] = None,
    of: Annotated[int | None, typer.Option(min=1, help="Number of jobs that share the shards.")] = None,
    engine: Annotated[str, typer.Option(help="local or ray.")] = "local",
    workers: Annotated[int, typer.Option(min=1, help="Processes, or actors of Ray.")] = 1,
    check_share: Annotated[
        float | None,
        typer.Option("--check", help="Compute this share of the shards again, such as 0.01, and compare the rows."),
    ] = None,
    by_feature: Annotated[
        bool, typer.Option("--index", help="Build the index by feature of each featurizer at the end.")
    ] = False,
    any_model: Annotated[bool, typer.Option("--any-model", help="Take another model than the artefact names.")] = False,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; an accelerator if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the model: float32, bfloat16, float16 or auto.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Write the features of artefacts on a corpus, or activations, to Parquet files; called again it goes on."""
    from featurizers_evaluate import launched

    from featurizers_harvest.harvesting import check, harvest
    from featurizers_harvest.index import build_index

    place = launched()
    if by_feature and (shard is not None or check_share is not None or place is not None):
        raise UsageError("--index takes no --shard, no --check and no torchrun: give it when all shards are there")
    if (shard is None) != (of is None):
        raise UsageError("give --shard and --of together, such as --shard 0 --of 8")
    wanted = _wanted(featurizer or [], site or [])
    options: dict[str, Any] = {
        "key": key,
        "context": context,
        "batch_size": batch_size,
        "exclude_special_tokens": exclude_special,
        "values": values,
        "shard_tokens": shard_tokens,
        "max_documents": documents,
        "device": device or (place and place.device),
        "dtype": dtype_named(dtype),
        "any_model": any_model,
    }
    given = _data(data, key, split)
    if check_share is not None:
        if shard is not None or workers != 1 or engine != "local" or place is not None:
            raise UsageError("--check takes no --shard, --of, --engine, --workers and no torchrun")
        _check(check(model, wanted, given, out, share=check_share, **options), out, as_json)
        return
    chosen: Any = None if shard is None or of is None else (shard, of)
    if place is not None and chosen is None:
        chosen = "rank"
    found = harvest(
        model, wanted, given, out, shard=chosen, engine=engine, workers=workers, progress=not as_json, **options
    )
    if by_feature:
        for name in (name for name, each in found.plan.features.items() if each["kind"] != "activations"):
            build_index(found, name)
    _show(found, as_json)


def _wanted(sources: list[str], sites: list[str]) -> dict[str, Any]:
    """Return featurizers and sites by name; one without a name is named by its site."""
    found: dict[str, Any] = {}
    for text in sources:
        name, equals, source = text.partition("=")
        f = featurizers.load(source if equals else text)
        _add(found, name if equals else (f.sites_text or f.id).replace(":", ".").replace(" -> ", "-"), f)
    for text in sites:
        name, equals, site = text.partition("=")
        _add(found, name if equals else text.replace(":", "."), featurizers.Site.parse(site if equals else text))
    if not found:
        raise UsageError("give --featurizer SOURCE or --site SITE, once or several times")
    return found


def _add(found: dict[str, Any], name: str, each: Any) -> None:
    if name in found:
        raise UsageError(f"two have the name {shown(name)}: give other names, --featurizer NAME=SOURCE")
    found[name] = each


def _data(data: str, key: str | None, split: str) -> Any:
    """Return the path of a file, or a data set of the Hub, which is streamed."""
    from featurizers.hub import REPO_ID

    path = Path(data).expanduser()
    if path.exists() or "/" not in data or REPO_ID.fullmatch(data) is None:
        return path
    from featurizers_evaluate import hub_documents

    return hub_documents(data, key or "text", split)


def _show(found: Harvest, as_json: bool) -> None:
    if as_json:
        about = {"folder": found.folder.where, "names": found.names, "shards": len(found.entries), "of": found.n_shards}
        print_json({**about, "tokens": found.n_tokens, "plan": found.plan.sha256})
        return
    done = f"{len(found.entries)} of {found.n_shards} shards, {found.n_tokens} tokens"
    print(f"Written: {printable(found.folder.where, 500)}: {done}; {', '.join(found.names)}")


def _check(problems: list[str], out: str, as_json: bool) -> None:
    if as_json:
        print_json({"problems": problems})
    elif not problems:
        print("The rows that were computed again are those of the files.")
    if problems:
        raise ArtefactError(out, "; ".join(problems[:10]))
