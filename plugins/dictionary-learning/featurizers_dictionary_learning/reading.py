"""Reads folders ``{ae.pt, config.json}`` as autoencoders and as featurizers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from featurizers import DictionaryFeaturizer, Site
from featurizers.errors import ManifestError, UsageError, WeightsError, shown
from featurizers.features import FeatureSpace, select
from featurizers.format import ExternalFiles, check_finite
from featurizers.store import of_folder
from torch import Tensor

from featurizers_dictionary_learning import crosscoders
from featurizers_dictionary_learning.base import Dictionary
from featurizers_dictionary_learning.classes import (
    AutoEncoder,
    AutoEncoderNew,
    GatedAutoEncoder,
    IdentityDict,
    JumpAutoEncoder,
)
from featurizers_dictionary_learning.topk import (
    AutoEncoderTopK,
    BatchTopKSAE,
    JumpReluAutoEncoder,
    MatryoshkaBatchTopKSAE,
)

WEIGHTS, CONFIG, HUB_WEIGHTS, FORK_WEIGHTS = "ae.pt", "config.json", "model.safetensors", "model_final.pt"
CLASSES: dict[str, type[Dictionary]] = {
    cls.__name__: cls
    for cls in (
        AutoEncoder,
        AutoEncoderNew,
        AutoEncoderTopK,
        BatchTopKSAE,
        GatedAutoEncoder,
        IdentityDict,
        JumpAutoEncoder,
        JumpReluAutoEncoder,
        MatryoshkaBatchTopKSAE,
    )
}
SITES = {"resid_post": "resid.post", "mlp_out": "mlp.out", "attn_out": "attn.out"}
"""Site of each name that dictionary_learning's own scripts give a submodule, before its layer."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SUBMODULE = re.compile(rf"({'|'.join(SITES)})(?:_layer_?(\d{{1,5}}))?")
DUMP = {"step", "ae", "optimizer", "config", "norm_factor"}
"""Keys of ``ae.pt`` while a training with backups is not finished."""
SEVERAL_LAYERS = "a CrossCoder reads and writes several layers at once: load it with featurizers.load"


def read(source: ExternalFiles) -> FeatureSpace[Any] | None:
    """Read the featurizer in a folder ``{ae.pt, config.json}``, in raw units and float32; None for any other folder.

    Crosscoders of a fork are read from ``model_final.pt`` and ``model.safetensors`` too.

    Raises:
        ManifestError: the class is not known.
        WeightsError: the weights are not those of the class.
        FeatureIndexError: an index is out of range.
        UsageError: only some features are requested, but features of this class depend on each other.
    """
    if CONFIG not in source.names or not ({WEIGHTS, HUB_WEIGHTS, FORK_WEIGHTS} & set(source.names)):
        return None
    config, where = source.json(CONFIG), source.where
    crosscoder = _crosscoder(source, config)
    if crosscoder is not None:
        return crosscoder
    if WEIGHTS not in source.names:
        if HUB_WEIGHTS in source.names:
            _refuse_fork(source, config)
        return None
    autoencoder, trainer, factor = _autoencoder(source, config)
    columns = None
    if source.indices is not None:
        columns = select(source.indices, autoencoder.dict_size or 2**31).as_columns()
    for name, tensor in autoencoder.state_dict().items():
        if tensor.is_floating_point() and tensor.dtype not in FLOATS:
            raise WeightsError(
                where, f"tensor {shown(name)} is {str(tensor.dtype).removeprefix('torch.')}; use float32"
            )
    try:
        featurizer = autoencoder.map(columns).float()  # whatever the file holds, the package computes in float32
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    if columns is None and not source.allow_nonfinite:  # it may have tensors that the featurizer lacks
        check_finite(autoencoder.state_dict(), where)
    featurizer.site = _site(config, trainer)
    featurizer.id = str(trainer.get("wandb_name") or trainer["dict_class"])
    featurizer.metadata = {"dictionary_learning": config}
    if isinstance(featurizer, DictionaryFeaturizer):
        featurizer.metadata["units"] = "raw: the decoder's columns are as long as in the file"
    buffers: dict[str, Any] = {name: tensor.tolist() for name, tensor in autoencoder.named_buffers()}
    if factor is not None:
        buffers["norm_factor"] = factor
    if buffers:
        featurizer.metadata["buffers"] = buffers
    return featurizer


def load_dictionary(
    base_path: str | Path, device: torch.device | str | None = None
) -> tuple[Dictionary, dict[str, Any]]:
    """Load the autoencoder in a folder ``{ae.pt, config.json}`` in raw units and fp32, and its configuration.

    Raises:
        ManifestError: the class is not known.
        WeightsError: the weights are not those of the class.
    """
    source = of_folder(Path(base_path), None)
    config = source.json(CONFIG)
    autoencoder, _, _ = _autoencoder(source, config)
    check_finite(autoencoder.state_dict(), source.where)
    own = {name: tensor.clone() for name, tensor in autoencoder.state_dict().items()}
    autoencoder.load_state_dict(own, assign=True)
    return autoencoder.to(device=device, dtype=torch.float32), config


def _crosscoder(source: ExternalFiles, config: dict[str, Any]) -> FeatureSpace[Any] | None:
    """Read the crosscoder in a folder that a trainer of a fork, or its classes, wrote; None if it is none."""
    trainer = config.get("trainer")
    stored: Any
    if isinstance(trainer, dict):
        name = next((name for name in (WEIGHTS, FORK_WEIGHTS) if name in source.names), None)
        if name is None or not (_is_crosscoder(trainer.get("dict_class")) or name == WEIGHTS):
            return None
        stored = source.torch(name)
        is_state = isinstance(stored, dict) and all(isinstance(tensor, Tensor) for tensor in stored.values())
        shapes = {n: tuple(tensor.shape) for n, tensor in stored.items()} if is_state else {}
        if not (_is_crosscoder(trainer.get("dict_class")) or _has_layers(shapes)):
            return None
        if not is_state:
            raise WeightsError(source.where, f"{name} holds no state dict of a crosscoder")
        options = trainer
    else:
        if HUB_WEIGHTS not in source.names or not {"activation_dim", "dict_size"} <= config.keys():
            return None
        stored, options = source.safetensors(HUB_WEIGHTS), config
        if not (_is_crosscoder(config.get("dict_class")) or "num_layers" in config or _has_layers(stored.shapes)):
            return None
    featurizer = crosscoders.read(source, stored, options)
    featurizer.id = str(options.get("wandb_name") or Path(source.where).name)
    featurizer.metadata = {"dictionary_learning": config}
    return featurizer


def _refuse_fork(source: ExternalFiles, config: dict[str, Any]) -> None:
    """Raise `ManifestError` for a dictionary that a fork wrote for the Hub: the options of a class, and safetensors."""
    if not {"activation_dim", "dict_size"} <= config.keys():
        return
    raise ManifestError(
        source.where,
        f"it has the options of a dictionary, of class {config.get('dict_class')!r}, but no {WEIGHTS}: a folder of a "
        "fork, whose classes of the same names measure features differently. If your fork does not, save the state "
        "dict with torch.save, and load it with the class of this plugin",
    )


def _is_crosscoder(name: object) -> bool:
    return isinstance(name, str) and "crosscoder" in name.lower()


def _has_layers(shapes: dict[str, tuple[int, ...]]) -> bool:
    return len(shapes.get("encoder.weight", ())) == 3


def _autoencoder(
    source: ExternalFiles, config: dict[str, Any]
) -> tuple[Dictionary, dict[str, Any], int | float | None]:
    """Read the autoencoder that a configuration names, for activations as the model has them.

    Returns:
        The autoencoder, the ``trainer`` of its configuration, and the factor that its biases were multiplied by.
    """
    where, trainer = source.where, config.get("trainer")
    if not isinstance(trainer, dict):
        raise ManifestError(where, f"{CONFIG} has no object 'trainer', whose dict_class names the class of {WEIGHTS}")
    name = trainer.get("dict_class")
    if _is_crosscoder(name):
        raise ManifestError(where, SEVERAL_LAYERS)
    if not isinstance(name, str) or name not in CLASSES:
        raise ManifestError(where, f"the dict_class {name!r} is not known; known are {', '.join(CLASSES)}")
    buffer = config.get("buffer")
    if isinstance(buffer, dict) and buffer.get("io") == "in_and_out":
        raise ManifestError(
            where, "a transcoder reads one site and writes another: it is not a featurizer of a single site"
        )
    state, factor = _state(source)
    if isinstance(state, dict) and _has_layers({n: tuple(t.shape) for n, t in state.items() if isinstance(t, Tensor)}):
        raise ManifestError(where, SEVERAL_LAYERS)
    autoencoder = CLASSES[name].from_state(state, f"{where}: {WEIGHTS}")
    _check(autoencoder, trainer, where)
    if factor is not None:
        scale = getattr(autoencoder, "scale_biases", None)
        wrong = not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 < factor < float("inf")
        if wrong or scale is None:
            raise WeightsError(where, f"{WEIGHTS} has the norm_factor {factor!r}, which a {name} cannot undo")
        autoencoder.float()  # before the biases are multiplied, so that they are not rounded twice
        scale(float(factor))
    return autoencoder, trainer, factor


def _state(source: ExternalFiles) -> tuple[Any, Any]:
    """Return the state dict in ``ae.pt``, and the factor that activations were divided by in training, if any."""
    state = source.torch(WEIGHTS)
    if not isinstance(state, dict) or not isinstance(state.get("ae"), dict):
        return state, None
    if unknown := sorted(map(str, state.keys() - DUMP)):
        raise WeightsError(source.where, f"{WEIGHTS} is the backup of a training, with unknown keys {unknown!r}")
    return state["ae"], state.get("norm_factor")


def _check(autoencoder: Dictionary, trainer: dict[str, Any], where: str) -> None:
    """Raise `WeightsError` if the weights contradict their config."""
    sizes: dict[str, Any] = {"activation_dim": autoencoder.activation_dim, "dict_size": autoencoder.dict_size}
    sizes |= {n: t.tolist() for n, t in autoencoder.named_buffers() if n in ("k", "group_sizes")}
    for name, size in sizes.items():
        configured = trainer.get(name)
        if None not in (configured, size) and (type(configured) is not type(size) or configured != size):
            raise WeightsError(where, f"{WEIGHTS} has {name} {size}, but {CONFIG} says {configured!r}")


def _site(config: dict[str, Any], trainer: dict[str, Any]) -> Site | None:
    """Return the site that the submodule's name gives, if it agrees with the layer; None if it gives no site."""
    layer, model, buffer = trainer.get("layer"), trainer.get("lm_name"), config.get("buffer")
    match = SUBMODULE.fullmatch(str(trainer.get("submodule_name")))
    if match is None or not isinstance(layer, int) or isinstance(layer, bool) or layer < 0:
        return None
    if int(match[2] or layer) != layer or (isinstance(buffer, dict) and buffer.get("io", "out") != "out"):
        return None
    return Site(SITES[match[1]], layer).at(model=model if isinstance(model, str) and "/" in model else None)
