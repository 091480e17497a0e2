"""What the readers share: from arrays to a featurizer, whole or in part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from featurizers import Featurizer
from featurizers.errors import FeatureIndexError, WeightsError
from featurizers.format import ExternalFiles, TensorFile
from torch import Tensor

from featurizers_sae_lens.assembly import assemble, number

LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "decoder.bias"}
"""Names of two `torch.nn.Linear`."""


def finish(
    source: ExternalFiles, cfg: dict[str, Any], tensors: dict[str, Tensor], n_features: int, scale: float | None = None
) -> Featurizer[Any]:
    """The featurizer of what was read, once its sizes are those that the configuration says.

    Args:
        source: the files.
        cfg: as `assemble` takes it.
        tensors: as `assemble` takes them, of the features wanted.
        n_features: of the whole dictionary.
        scale: the factor of the activations, to fold into the weights.

    Raises:
        ManifestError, WeightsError: as `assemble`; or the sizes differ.
    """
    check_sizes(source, cfg, {"d_in": tensors["W_dec"].shape[1], "d_sae": n_features})
    part = source.indices is not None
    return assemble(
        cfg,
        tensors,
        source.where,
        numbers=source.indices,
        n_features=n_features if part else None,
        input_scale=scale,
    )


def check_sizes(source: ExternalFiles, cfg: dict[str, Any], found: dict[str, int]) -> None:
    """Raise `WeightsError` unless W_dec has the sizes that a configuration gives these names, if it has them."""
    for name, size in found.items():
        if name in cfg and number(cfg, name, source.where) != size:
            raise WeightsError(source.where, f"W_dec is of {size} for {name}, but the configuration says {cfg[name]}")


def count_features(file: TensorFile, name: str, source: ExternalFiles, axis: int) -> int:
    """How many features there are, by the matrix that has them on this axis; checks those that are wanted."""
    if name not in file.shapes or len(file.shapes[name]) != 2:
        raise WeightsError(source.where, f"{file.path.name} has no matrix {name!r}; it has {sorted(file.shapes)!r}")
    return check_indices(source, file.shapes[name][axis])


def check_indices(source: ExternalFiles, n_features: int) -> int:
    """The number of features, if all that are wanted are among them.

    Raises:
        FeatureIndexError: one is not.
    """
    if source.indices is not None and int(source.indices.max()) >= n_features:
        raise FeatureIndexError(
            f"feature {int(source.indices.max())} is out of range: there are {n_features}, 0 to {n_features - 1}"
        )
    return n_features


def of_arrays(
    source: ExternalFiles, get: Callable[[str], Any], names: dict[str, str], file_name: str, *, wide: tuple[str, ...]
) -> tuple[dict[str, Tensor], int]:
    """Tensors by our names, the features wanted of each, and the number of all features.

    Args:
        source: the files.
        get: the array of a name in the file.
        names: ours, and that in the file.
        file_name: for errors.
        wide: which of ours have a feature a column.

    Raises:
        WeightsError: one is missing or of another shape.
    """
    tensors: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        tensor = get(theirs)
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise WeightsError(source.where, f"{file_name} lacks the tensor {theirs!r}")
        tensors[ours] = tensor.T if ours in wide and tensor.dim() == 2 else tensor
    if any(tensors[name].dim() != 2 for name in ("W_enc", "W_dec")):
        raise WeightsError(source.where, f"{file_name}: W_enc and W_dec are no matrices")
    n_features = check_indices(source, tensors["W_dec"].shape[0])
    for name, tensor in tensors.items():
        if name != "b_dec" and tensor.dim() and len(tensor) != n_features:
            raise WeightsError(source.where, f"{file_name}: {names[name]!r} is not of the {n_features} of W_dec")
        if source.indices is not None and name != "b_dec" and tensor.dim():
            tensors[name] = tensor[source.indices]
    return tensors, n_features


def jumprelu_config(overrides: dict[str, Any], hook: str | None, model: Any = None) -> dict[str, Any]:
    """The configuration of a JumpReLU autoencoder that was released in another format, in SAELens' words."""
    return {
        "architecture": "jumprelu",
        "apply_b_dec_to_input": False,
        "reshape_activations": "hook_z" if hook and hook.endswith("hook_z") else "none",
        "metadata": {"hook_name": hook, "model_name": model, **overrides},
    }
