"""Rows of a harvest beside a plain loop: one document at a time, a plain hook, dense features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import featurizers
import featurizers_harvest
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from featurizers.errors import ArtefactError, SiteError, UsageError
from torch import Tensor

from tests.support.dictionaries import dictionary
from tests.support.models import fresh_model, module_of, read, save_language_model

LENGTHS = [3, 0, 7, 12, 1, 25, 5, 8, 2, 9]
IDS = [
    torch.randint(1, 64, (n,), generator=torch.Generator().manual_seed(i)).tolist() for i, n in enumerate(3 * LENGTHS)
]


def topk(k: int = 3, site: str = "resid.post:1") -> Any:
    f = dictionary("topk", d_in=32, k=k)
    f.site = site
    return f


def harvest(wanted: Any, data: Any, out: Path, **options: Any) -> featurizers_harvest.Harvest:
    options = {"shard_tokens": 60, "batch_size": 4, "values": "float32", "progress": False} | options
    model = options.pop("model", None) or fresh_model("llama")
    return featurizers.harvest(model, wanted, data, out, **options)


def by_hand(ids: list[int], layer: int = 1, context: int = 1000) -> Tensor:
    """Return the output of a block, by a plain hook, of one document alone."""
    model = fresh_model("llama")
    module, side = module_of(model, "llama", "resid.post", layer)
    rows = [ids[start : start + context] for start in range(0, len(ids), context)]
    return torch.cat([read(model, module, side, input_ids=torch.tensor([row]))[0] for row in rows])


def files(out: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(out.rglob("*")) if path.is_file() and path.name not in (".lock", "known.json"))
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def test_rows_are_the_features_and_activations_of_each_document_alone(tmp_path: Path) -> None:
    f = topk()
    found = harvest({"f": f, "x": "resid.post:0"}, IDS, tmp_path / "out")
    assert (found.is_complete, found.n_tokens, found.n_shards) == (True, sum(3 * LENGTHS), 5)
    rows, activations = found.table("f").to_pylist(), found.table("x").to_pylist()
    tokens = found.table()
    assert tokens.to_pylist() == [{k: row[k] for k in ("document", "position", "token")} for row in rows]
    at = 0
    for document, ids in enumerate(IDS):
        if not ids:
            continue
        expected, dense = f.encode(by_hand(ids)), by_hand(ids, layer=0)
        for position, token in enumerate(ids):
            row = rows[at]
            assert (row["document"], row["position"], row["token"]) == (document, position, token)
            assert row["indices"] == sorted(row["indices"])
            whole = torch.zeros(64).index_put((torch.tensor(row["indices"]),), torch.tensor(row["values"]))
            torch.testing.assert_close(whole, expected[position], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(
                torch.tensor(activations[at]["activation"]), dense[position], rtol=1e-4, atol=1e-4
            )
            at += 1
    assert at == len(rows)


def test_long_documents_are_cut_into_rows_and_keep_their_positions(tmp_path: Path) -> None:
    found = harvest({"x": "resid.post:1"}, IDS, tmp_path / "out", context=10)
    rows = found.table("x", filter=pa.compute.field("document") == 5).to_pylist()
    assert [row["position"] for row in rows] == list(range(25))
    torch.testing.assert_close(
        torch.tensor([row["activation"] for row in rows]), by_hand(IDS[5], context=10), rtol=1e-4, atol=1e-4
    )


def test_every_form_of_the_data_gives_the_same_rows(tmp_path: Path) -> None:
    texts = [" ".join(f"w{i}" for i in ids) for ids in IDS if ids]
    (tmp_path / "texts.txt").write_text("\n\n".join(texts) + "\n")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"words": text, "n": 1}) + "\n" for text in texts))
    pq.write_table(pa.table({"words": texts}), tmp_path / "texts.parquet", row_group_size=7)
    save_language_model(fresh_model("llama"), tmp_path / "model")

    class Again:
        def __iter__(self) -> Any:
            return iter(texts)

    forms: list[tuple[Any, dict[str, Any]]] = [
        (texts, {}),
        (tmp_path / "texts.txt", {}),
        (str(tmp_path / "texts.jsonl"), {"key": "words"}),
        (tmp_path / "texts.parquet", {"key": "words"}),
        (Again(), {}),
    ]
    datasets = pytest.importorskip("datasets")
    forms.append((datasets.Dataset.from_dict({"words": texts}), {"key": "words"}))
    options = {"model": str(tmp_path / "model"), "shard_tokens": 100, "device": "cpu"}
    expected = None
    for number, (data, more) in enumerate(forms):
        found = harvest([topk()], data, tmp_path / str(number), **options, **more)
        assert found.n_shards > 2
        own = (found.plan.data, files(tmp_path / str(number)))
        expected = expected or own
        assert own == expected, data
    assert found.table()["token"].to_pylist() == [i for ids in IDS for i in ids]


def test_inputs_with_a_mask_and_tensors_are_documents(tmp_path: Path) -> None:
    ids = torch.tensor([[5, 6, 7], [0, 8, 9]])
    padded = harvest(["embed"], {"input_ids": ids, "attention_mask": (ids > 0).long()}, tmp_path / "padded")
    assert padded.table()["token"].to_pylist() == [5, 6, 7, 8, 9]
    assert harvest(["embed"], ids, tmp_path / "whole").table()["token"].to_pylist() == [5, 6, 7, 0, 8, 9]


def test_the_size_of_a_batch_and_of_a_shard_change_numbers_by_rounding_alone(tmp_path: Path) -> None:
    one = harvest([topk()], IDS, tmp_path / "one", batch_size=1, shard_tokens=10)
    many = harvest([topk()], IDS, tmp_path / "many", batch_size=16, shard_tokens=10**6)
    assert (many.n_shards, one.n_shards > 10) == (1, True)
    a, b = one.table("resid.post.1"), many.table("resid.post.1")
    assert a.drop_columns("values").equals(b.drop_columns("values"))
    torch.testing.assert_close(*(torch.tensor(t["values"].combine_chunks().flatten().to_pylist()) for t in (a, b)))


def test_special_tokens_have_no_features_and_stay_in_the_tokens(tmp_path: Path) -> None:
    f = topk()
    f.special_tokens = (IDS[0][0],)
    found = harvest({"f": f, "x": "resid.post:1"}, IDS, tmp_path / "out", exclude_special_tokens=[IDS[0][1]])
    tokens = found.table()["token"].to_pylist()
    assert found.table("f")["token"].to_pylist() == [t for t in tokens if t not in IDS[0][:2]]
    assert found.table("x")["token"].to_pylist() == [t for t in tokens if t != IDS[0][1]]
    kept = found.table("f", filter=pa.compute.field("document") == 0).to_pylist()
    expected = f.encode(by_hand(IDS[0]))[[p for p, t in enumerate(IDS[0]) if t not in IDS[0][:2]]]
    values = torch.stack(
        [torch.zeros(64).index_put((torch.tensor(r["indices"]),), torch.tensor(r["values"])) for r in kept]
    )
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)


def test_maps_are_harvested_group_by_group(tmp_path: Path) -> None:
    from featurizers_transcoder import CrossLayerTranscoder

    from tests.support.site_maps import linear_map

    f = linear_map(
        CrossLayerTranscoder, {i: ([f"in-{i}"], [f"out-{j}" for j in range(i, 2)]) for i in range(2)}, width=32
    )
    f.reads = {name: f"mlp.in:{number}" for number, name in enumerate(f.read_widths)}
    f.writes = {name: f"mlp.out:{number}" for number, name in enumerate(f.write_widths)}
    found = harvest({"clt": f}, IDS, tmp_path / "out")
    assert found.names == [f"clt.{group}" for group in f.groups]
    for number, group in enumerate(f.groups):
        rows = found.table(f"clt.{group}", filter=pa.compute.field("document") == 3).to_pylist()
        x = featurizers.collect(fresh_model("llama"), {"input_ids": torch.tensor([IDS[3]])}, [f"mlp.in:{number}"])
        reads = dict.fromkeys(f.groups[group].reads, x[f"mlp.in:{number}"][0])
        expected = f.encode(group, reads)
        for row, own in zip(rows, expected, strict=True):
            assert row["indices"] == own.nonzero()[:, 0].tolist()


def test_a_slice_is_harvested_by_the_numbers_of_the_whole(tmp_path: Path) -> None:
    whole = dictionary("relu", d_in=32)
    whole.site = "resid.post:1"
    whole.save_pretrained(tmp_path / "whole")
    part = featurizers.load(tmp_path / "whole", indices=[40, 3, 17])
    found = harvest({"whole": whole, "part": part}, IDS, tmp_path / "out")
    for a, b in zip(found.table("whole").to_pylist(), found.table("part").to_pylist(), strict=True):
        known = {i: v for i, v in zip(a["indices"], a["values"], strict=True) if i in (3, 17, 40)}
        assert list(known) == b["indices"]
        assert list(known.values()) == pytest.approx(b["values"], rel=1e-4, abs=1e-5)


def test_half_precision_rounds_and_never_overflows(tmp_path: Path) -> None:
    half = harvest([topk()], IDS, tmp_path / "half", values="float16").table("resid.post.1")
    whole = harvest([topk()], IDS, tmp_path / "whole").table("resid.post.1")
    values = torch.tensor(whole["values"].combine_chunks().flatten().to_pylist())
    assert half["values"].combine_chunks().flatten().to_pylist() == values.half().tolist()
    large = topk()
    large.W_enc *= 1e5
    with pytest.raises(UsageError, match=r"is too large for float16; give values='float32'"):
        harvest([large], IDS, tmp_path / "large", values="float16")
    assert not list((tmp_path / "large").rglob("*.parquet"))
    large.W_enc.fill_(float("nan"))
    with pytest.raises(UsageError, match="NaN or infinity was computed"):
        harvest([large], IDS, tmp_path / "nan")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch_size": 2}, "rows.batch_size was 4 and is 2"),
        ({"context": 9}, "rows.context was 64 and is 9"),
        ({"data": IDS[:-1]}, "data.documents was 30 and is 29"),
        ({"data": [[1], *IDS[1:]]}, "data.sha256 was '[0-9a-f]+…?'? and is"),
        ({"wanted": [topk(4)]}, "features.resid.post.1.checksum was"),
        ({"wanted": ["resid.post:1"]}, "features.resid.post.1.kind was 'dictionary' and is 'activations'"),
    ],
)
def test_another_plan_than_the_folders_is_refused_and_says_what_differs(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    harvest([topk()], IDS, tmp_path / "out")
    before = files(tmp_path / "out")
    given = {"wanted": [topk()], "data": IDS, **change}
    with pytest.raises(ArtefactError, match=says):
        harvest(given.pop("wanted"), given.pop("data"), tmp_path / "out", **given)
    assert files(tmp_path / "out") == before


def test_another_model_is_another_plan(tmp_path: Path) -> None:
    harvest([topk()], IDS, tmp_path / "out")
    model = fresh_model("llama")
    next(model.parameters()).data[0, 0] += 1
    with pytest.raises(ArtefactError, match=r"model.checksum was"):
        harvest([topk()], IDS, tmp_path / "out", model=model)


def test_what_cannot_be_harvested_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="data is an iterator, which can be read once"):
        harvest(["embed"], iter(IDS), out)
    with pytest.raises(UsageError, match="no documents"):
        harvest(["embed"], [], out)
    with pytest.raises(UsageError, match="document 1 is a record without text"):
        harvest(["embed"], [[1], {"words": "w1"}], out)
    with pytest.raises(UsageError, match="document 1 has the token id 99"):
        harvest(["embed"], [[1], [99]], out)
    with pytest.raises(UsageError, match="document 0 is a text: give the tokenizer"):
        harvest(["embed"], ["w1"], tmp_path / "text")
    with pytest.raises(UsageError, match="a name is letters"):
        harvest({"../x": "embed"}, IDS, out)
    with pytest.raises(UsageError, match="by different names"):
        harvest({"a": "embed", "A": "embed"}, IDS, out)
    with pytest.raises(SiteError):
        harvest(["resid.post:9"], IDS, out)
    with pytest.raises(UsageError, match="give its name or its folder, not the model"):
        harvest(["embed"], IDS, tmp_path / "workers", workers=2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    with pytest.raises(ArtefactError, match="it is there already and holds no harvest"):
        harvest(["embed"], IDS, tmp_path / "full")
    with pytest.raises(ArtefactError, match="there is no harvest here"):
        featurizers_harvest.open(tmp_path / "nothing")


def test_documents_without_tokens_give_files_without_rows(tmp_path: Path) -> None:
    found = harvest([topk(), "embed"], [[], []], tmp_path / "out")
    assert (found.n_tokens, found.table("embed").num_rows, found.table("resid.post.1").num_rows) == (0, 0, 0)
    assert found.table("embed").schema.field("activation").type == pa.list_(pa.float32(), 32)
