"""Folders ``{ae.pt, config.json}``, as autoencoders and as featurizers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from featurizers import DictionaryFeaturizer, Featurizer, Site
from featurizers.errors import ManifestError, UsageError, WeightsError
from featurizers.features import select
from featurizers.format import ExternalFiles, check_finite
from featurizers.store import of_folder
from torch import Tensor

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

WEIGHTS, CONFIG, HUB_WEIGHTS = "ae.pt", "config.json", "model.safetensors"
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
"""What dictionary_learning's own scripts call a submodule, before its layer."""
SUBMODULE = re.compile(rf"({'|'.join(SITES)})(?:_layer_?(\d{{1,5}}))?")
DUMP = {"step", "ae", "optimizer", "config", "norm_factor"}
"""What a training that makes backups leaves in ``ae.pt`` until it ends."""
SEVERAL_LAYERS = "a CrossCoder reads and writes several layers at once: it is no featurizer of one site"


def read(source: ExternalFiles) -> Featurizer[Any] | None:
    """The featurizer in a folder ``{ae.pt, config.json}``, in raw units; None for any other.

    Raises:
        ManifestError: the class is not known, or is no featurizer of one site.
        WeightsError: the weights are not those of the class.
        FeatureIndexError: a feature that there is not.
        UsageError: some features are asked for where these depend on the others.
    """
    if CONFIG not in source.names or not ({WEIGHTS, HUB_WEIGHTS} & set(source.names)):
        return None
    config, where = source.json(CONFIG), source.where
    if WEIGHTS not in source.names:
        _refuse_of_hub(source, config)
        return None
    autoencoder, trainer, factor = _autoencoder(source, config)
    columns = None
    if source.indices is not None:
        columns = select(source.indices, autoencoder.dict_size or 2**31).as_columns()
    try:
        featurizer = autoencoder.map(columns)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    if columns is None and not source.allow_nonfinite:  # it may have tensors that the featurizer has not
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
    """The autoencoder in a folder ``{ae.pt, config.json}`` in raw units and single precision, and its configuration.

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


def _refuse_of_hub(source: ExternalFiles, config: dict[str, Any]) -> None:
    """Raise `ManifestError` for what a fork wrote for the Hub: the options of a class, and safetensors."""
    if not {"activation_dim", "dict_size"} <= config.keys():
        return
    shapes = source.safetensors(HUB_WEIGHTS).shapes
    if _is_crosscoder(config.get("dict_class")) or "num_layers" in config or _has_layers(shapes):
        raise ManifestError(source.where, SEVERAL_LAYERS)
    raise ManifestError(
        source.where,
        f"it has the options of a dictionary, of class {config.get('dict_class')!r}, but no {WEIGHTS}: a folder of a "
        "fork, whose classes of the same names measure features differently. If yours does not, save the state dict "
        "with torch.save, and load that with the class of this plugin",
    )


def _is_crosscoder(name: object) -> bool:
    return isinstance(name, str) and "crosscoder" in name.lower()


def _has_layers(shapes: dict[str, tuple[int, ...]]) -> bool:
    return len(shapes.get("encoder.weight", ())) == 3


def _autoencoder(
    source: ExternalFiles, config: dict[str, Any]
) -> tuple[Dictionary, dict[str, Any], int | float | None]:
    """The autoencoder that a configuration names, for activations as the model has them.

    Returns:
        It, what the configuration says of its training, and the factor that its biases were multiplied with.
    """
    where, trainer = source.where, config.get("trainer")
    if not isinstance(trainer, dict):
        raise ManifestError(where, f"{CONFIG} has no 'trainer' whose dict_class says what {WEIGHTS} is")
    name = trainer.get("dict_class")
    if _is_crosscoder(name):
        raise ManifestError(where, SEVERAL_LAYERS)
    if not isinstance(name, str) or name not in CLASSES:
        raise ManifestError(where, f"the dict_class {name!r} is not known; known are {', '.join(CLASSES)}")
    buffer = config.get("buffer")
    if isinstance(buffer, dict) and buffer.get("io") == "in_and_out":
        raise ManifestError(where, "it is a transcoder, which reads one site and writes another: not of one site")
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
        scale(float(factor))
    return autoencoder, trainer, factor


def _state(source: ExternalFiles) -> tuple[Any, Any]:
    """What ``ae.pt`` holds as a state dict, and the factor by which the activations were divided in training."""
    state = source.torch(WEIGHTS)
    if not isinstance(state, dict) or not isinstance(state.get("ae"), dict):
        return state, None
    if unknown := sorted(map(str, state.keys() - DUMP)):
        raise WeightsError(source.where, f"{WEIGHTS} is the backup of a training, with unknown keys {unknown!r}")
    return state["ae"], state.get("norm_factor")


def _check(autoencoder: Dictionary, trainer: dict[str, Any], where: str) -> None:
    """Raise `WeightsError` if the weights contradict their config."""
    found: dict[str, Any] = {"activation_dim": autoencoder.activation_dim, "dict_size": autoencoder.dict_size}
    found |= {n: t.tolist() for n, t in autoencoder.named_buffers() if n in ("k", "group_sizes")}
    for name, value in found.items():
        said = trainer.get(name)
        if None not in (said, value) and (type(said) is not type(value) or said != value):
            raise WeightsError(where, f"{WEIGHTS} has {name} {value}, but {CONFIG} says {said!r}")


def _site(config: dict[str, Any], trainer: dict[str, Any]) -> Site | None:
    """The site that the submodule's name says, if that and the layer are of one mind; None where it says none."""
    layer, model, buffer = trainer.get("layer"), trainer.get("lm_name"), config.get("buffer")
    match = SUBMODULE.fullmatch(str(trainer.get("submodule_name")))
    if match is None or not isinstance(layer, int) or isinstance(layer, bool) or layer < 0:
        return None
    if int(match[2] or layer) != layer or (isinstance(buffer, dict) and buffer.get("io", "out") != "out"):
        return None
    return Site(SITES[match[1]], layer).at(model=model if isinstance(model, str) and "/" in model else None)
