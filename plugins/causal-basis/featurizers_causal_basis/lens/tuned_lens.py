"""`TunedLens`: the logit lens after an affine translator for each layer, from files of the tuned-lens library."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, final

import torch
from featurizers.errors import ConfigError, ShapeError, WeightsError, one_line, shown
from featurizers.files import contained, load_torch, read_bytes
from featurizers.format import fingerprint
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from featurizers_causal_basis.lens.logit_lens import LogitLens
from featurizers_causal_basis.lens.readouts import AffineNorm, Readout


class _Config(BaseModel):
    """Fields of tuned-lens' ``config.json`` that determine the tensors."""

    model_config = ConfigDict(strict=True, extra="ignore")
    d_model: Annotated[int, Field(gt=0, le=2**20)]
    num_hidden_layers: Annotated[int, Field(gt=0, le=10_000)]
    bias: bool = True
    lens_type: str = "linear_tuned_lens"


@final
class TunedLens(Readout):
    """log p(h + A h + b) by the logit lens, with a matrix A and a vector b for the input of each block.

    The output of the last block has no translator. Belrose et al. 2023 (arXiv:2303.08112), section 3.

    Args:
        model: a decoder of `transformers` with its language-model head.
        weights: A for each block's input, ``(d, d)``.
        biases: b for each block's input, ``(d)``; None for zeros.

    Raises:
        ShapeError: a translator does not fit the model, or their number is not that of the blocks.
        SiteError, UsageError: as `LogitLens`.
    """

    name = "tuned-lens"

    def __init__(self, model: nn.Module, weights: list[Tensor], biases: list[Tensor] | None = None) -> None:
        self._lens = LogitLens(model)
        self.model, self.n_layers = model, self._lens.n_layers
        d = self._lens.unembedding.shape[-1]
        biases = [torch.zeros(d) for _ in weights] if biases is None else biases
        if len(weights) != self.n_layers or len(biases) != len(weights):
            raise ShapeError(
                f"{type(model).__name__} has {self.n_layers} blocks and needs a translator for the input of "
                f"each, got {len(weights)} matrices and {len(biases)} vectors"
            )
        for weight, bias in zip(weights, biases, strict=True):
            if weight.shape != (d, d) or bias.shape != (d,):
                raise ShapeError(
                    f"the translators of a model of width {d} are matrices ({d}, {d}) and vectors ({d},), got "
                    f"{tuple(weight.shape)} and {tuple(bias.shape)}"
                )
        self._weights, self._biases = weights, biases

    @classmethod
    def load(cls, model: nn.Module, folder: str | Path) -> TunedLens:
        """Read a folder that tuned-lens wrote, ``config.json`` and ``params.pt``, without running any code in it.

        Raises:
            ConfigError: the config is not that of a linear tuned lens.
            WeightsError: a file is missing or damaged, or the tensors do not match the config.
            ShapeError: the lens belongs to a model of another size.
        """
        root = Path(folder).expanduser()
        where = str(folder)
        raw = read_bytes(contained(root, root / "config.json", where, WeightsError), where, WeightsError, 2**20)
        try:
            config = _Config.model_validate_json(raw)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "it"
            problem = f"{field}: {one_line(first['msg'])}, got {shown(first['input'])}"
            raise ConfigError(f"{where}: config.json is not that of a tuned lens: {problem}") from error
        if config.lens_type != "linear_tuned_lens":
            raise ConfigError(
                f"{where}: the lens type is {shown(config.lens_type)}; only 'linear_tuned_lens' can be read"
            )
        state = load_torch(contained(root, root / "params.pt", where, WeightsError), where)
        names = [
            f"{i}.{part}" for i in range(config.num_hidden_layers) for part in ("weight", "bias")[: 1 + config.bias]
        ]
        if not isinstance(state, dict) or set(state) != set(names):
            raise WeightsError(where, f"params.pt does not hold exactly {names[0]!r} to {names[-1]!r}")
        for name, tensor in state.items():
            shape = (config.d_model,) * (2 if re.fullmatch(r"\d+\.weight", name) else 1)
            if (
                not isinstance(tensor, Tensor)
                or tuple(tensor.shape) != shape
                or not tensor.is_floating_point()
                or not tensor.float().isfinite().all()  # 8-bit floats have no isfinite
            ):
                raise WeightsError(where, f"{name} in params.pt is not a finite floating-point tensor of shape {shape}")
        layers = range(config.num_hidden_layers)
        biases = [state[f"{i}.bias"].clone() for i in layers] if config.bias else None
        return cls(model, [state[f"{i}.weight"].clone() for i in layers], biases)

    def log_probs(self, h: Float[Tensor, "n d"], depth: int) -> Float[Tensor, "n vocabulary"]:
        """See `Readout.log_probs`."""
        if depth < len(self._weights):
            dtype = torch.promote_types(h.dtype, torch.float32)
            h = h.to(dtype)
            h = h + h @ self._weights[depth].to(h).mT + self._biases[depth].to(h)
        return self._lens.log_probs(h, depth)

    def affine_norm(self, depth: int) -> AffineNorm | None:
        """See `Readout.affine_norm`."""
        plain = self._lens.affine_norm(depth)
        if plain is None or depth >= len(self._weights):
            return plain
        weight, bias = (part[depth].to(plain.unembedding) for part in (self._weights, self._biases))
        eye = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        return replace(plain, translator=weight + eye, offset=bias)

    @property
    def unembedding(self) -> Float[Tensor, "vocabulary d"]:
        """See `Readout.unembedding`."""
        return self._lens.unembedding

    @functools.cached_property
    def sha256(self) -> str:
        """See `Readout.sha256`. Covers the logit lens and the translators."""
        own = fingerprint([*self._weights, *self._biases])
        return fingerprint([torch.frombuffer(bytearray.fromhex(own + self._lens.sha256), dtype=torch.uint8)])
