"""Maps of every format written in every other, compared with the table of the documentation."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import featurizers
import pytest
import torch
from featurizers import FeatureSpace
from featurizers.errors import ConversionError
from featurizers.store import of_folder
from featurizers_circuit_tracer import featurizers_resolve
from featurizers_transcoder import Transcoder

from tests.plugins.dictionary_learning.test_crosscoders import write as write_crosscoder
from tests.plugins.sparsify.test_transcoders import write as write_sparsify

ROOT = Path(__file__).parents[3]
SETS = ROOT / "tests/fixtures/circuit-tracer"
TABLE = re.compile(r"<!-- table: conversions -->\n(.*)<!-- end of table: conversions -->", re.DOTALL)
WORDS = {
    "a set begins at layer 0 and has every layer": "one group for each layer of a model from 0 on",
    "it has the rules topk and groupmax": "the rules topk and groupmax",
    "it has the rules relu and jumprelu": "relu, jumprelu|relu and jumprelu",
    "it has one write": "not the kind|no architecture for the kind",
    "it has one group": "not the kind|no architecture for the kind",
    "other kind": "not the kind|no architecture for the kind",
    "not written": "no architecture for the kind",
    "the features' numbers": "numbers that the features have",
    "the map's name": "The name .* is not kept",
}
"""What the documentation says, and words of the message."""


def layer(name: str, number: int) -> FeatureSpace[Any]:
    def files(repository: str, subfolder: str | None = None, revision: str | None = None) -> Any:
        return of_folder(SETS / repository.partition("/")[2] / (subfolder or ""), None)

    found = featurizers_resolve(f"owner/{name}/layer-{number}", files)
    assert found is not None
    return found


def of_sae_lens(tmp_path: Path, **options: Any) -> FeatureSpace[Any]:
    torch.manual_seed(0)
    f = Transcoder.from_weights(
        torch.randn(9, 4), torch.randn(9, 4), W_skip=torch.randn(4, 4), rule="jumprelu", threshold=torch.rand(9)
    )
    f.reads, f.writes = {"in": "mlp.in:1"}, {"out": "mlp.out:1"}
    featurizers.convert(f, tmp_path / "of-sae-lens", to="sae-lens")
    return featurizers.load(tmp_path / "of-sae-lens", **options)


MAPS: dict[str, Callable[[Path], FeatureSpace[Any]]] = {
    "transcoder of SAELens": of_sae_lens,
    "slice of a transcoder of SAELens": lambda path: of_sae_lens(path, indices=[3, 1]),
    "layer of a cross-layer transcoder": lambda _: layer("clt-relu", 1),
    "temporal autoencoder of SAELens": lambda _: featurizers.create(
        "sae-lens.temporal", d_in=16, n_features=8, n_heads=2, bottleneck_factor=2
    ),
    "layer of a set of circuit-tracer": lambda _: layer("set-relu", 1),
    "set of circuit-tracer": lambda _: featurizers.load(SETS / "set-jumprelu-skip"),
    "cross-layer transcoder of circuit-tracer": lambda _: featurizers.load(SETS / "clt-relu"),
    "slice of a set of circuit-tracer": lambda _: featurizers.load(
        SETS / "set-relu", indices={f"layer-{number}": [number] for number in range(3)}
    ),
    "transcoder of sparsify": lambda path: featurizers.load(write_sparsify(path / "layers.0.mlp", "transcode-skip")),
    "crosscoder of dictionary_learning": lambda path: featurizers.load(write_crosscoder(path / "crosscoder", "plain")),
}


def rows() -> list[list[str]]:
    match = TABLE.search((ROOT / "docs/site-maps.md").read_text(encoding="utf-8"))
    assert match is not None
    return [[cell.strip().strip("`") for cell in line.split("|")[1:-1]] for line in match[1].split("\n") if "|" in line]


def test_the_table_has_each_map_once():
    assert [row[0] for row in rows()[2:]] == list(MAPS)


@pytest.mark.parametrize("name", MAPS)
def test_conversions_lose_what_the_table_says(name, tmp_path):
    (_, *targets), _, *table = rows()
    (cells,) = [row[1:] for row in table if row[0] == name]
    f = MAPS[name](tmp_path)
    for target, cell in zip(targets, cells, strict=True):
        folder = tmp_path / target / ("layers.0.mlp" if "sparsify" in name else "written")
        if cell.startswith("refused: "):
            with pytest.raises(ConversionError, match=WORDS[cell.removeprefix("refused: ")]):
                featurizers.convert(f, folder, to=target)
            continue
        lost = featurizers.convert(f, folder, to=target)
        if cell == "nothing is lost":
            assert lost == []
        else:
            (sentence,) = lost
            assert re.search(WORDS[cell], sentence)
