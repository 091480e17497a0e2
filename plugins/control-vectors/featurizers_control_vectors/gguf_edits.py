"""Steering edits and control vectors of llama.cpp: `to_gguf` and `read_gguf`."""

from __future__ import annotations

from pathlib import Path

from featurizers import DictionaryFeaturizer, Site
from featurizers.errors import ArtefactError, LoweringError
from featurizers.files import os_errors

from featurizers_control_vectors.edits import Edits, added, featurizer_of
from featurizers_control_vectors.gguf_files import read_directions, write_directions


def to_gguf(edits: Edits, path: str | Path, *, model_hint: str = "", all_tokens: bool = False) -> None:
    """Write edits that add to the outputs of blocks as a control vector for llama.cpp.

    llama.cpp adds ``direction.N`` to what block N returns, counted from 0, which is the site ``resid.post:N``; it takes
    no direction for block 0. Several edits at one site are added up.

    Args:
        edits: of those that `featurizers.lower` takes and that add a vector, as `Steer` does; or featurizers that
            hold such edits.
        path: of the new file.
        model_hint: architecture of the model in llama.cpp's names, such as ``llama``; llama.cpp only shows it.
        all_tokens: whether to let edits that leave out special tokens change every token, as llama.cpp does.

    Raises:
        LoweringError: an edit is not an addition to the output of a block after the first, or has positions; the
            message says why.
        ArtefactError: there is a file already, or it cannot be written.

    Examples:
        >>> import featurizers, tempfile
        >>> f = featurizers.create("subspace", d_in=4, n_features=2, seed=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     to_gguf({"resid.post:3": featurizers.Steer(f, delta=2.0)}, f"{folder}/happy.gguf")
        ...     {str(site): f.d_in for site, f in read_gguf(f"{folder}/happy.gguf").items()}
        {'resid.post:3': 4}
    """
    directions = added(edits, _block, "a control vector", all_tokens=all_tokens)
    path = Path(path)
    where = str(path)
    if path.exists():
        raise ArtefactError(where, "there is a file already; choose another name")
    with os_errors(path):
        write_directions(directions, path, model_hint)


def read_gguf(path: str | Path) -> dict[Site, DictionaryFeaturizer]:
    """Return a featurizer for each direction of a control vector, by its site.

    ``f.edits`` of each, ``Steer(f, delta=1.0)``, adds its direction, as llama.cpp does with the scale 1. A feature is
    read as the coefficient of the direction in the activations, which the file says nothing about.

    Raises:
        WeightsError: the file is damaged, or holds something else.
    """
    return {
        Site("resid.post", layer): featurizer_of(Site("resid.post", layer), direction, f"direction.{layer}")
        for layer, direction in read_directions(Path(path), str(path)).items()
    }


def _block(site: Site) -> int:
    """Return the layer of a site at which llama.cpp adds."""
    if site.kind != "resid.post" or site.layer is None:
        raise LoweringError(
            f"{site}: a control vector is added to the outputs of blocks, 'resid.post:N'; 'resid.pre:N' is the output "
            "of block N - 1"
        )
    if site.layer == 0:
        raise LoweringError("resid.post:0: llama.cpp takes no direction for block 0; choose a later block")
    return site.layer
