"""The kinds: `Transcoder`, `CrossLayerTranscoder` and `Crosscoder`, told apart by what they read and write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Self, final

from featurizers.errors import ConfigError, ShapeError
from jaxtyping import Float
from torch import Tensor

from featurizers_transcoder.config import LinearMapConfig, Normalization
from featurizers_transcoder.linear_map import LinearMap


@final
class Transcoder(LinearMap):
    """Map with one read ``in``, one write ``out`` and one group ``features``, with or without a skip connection.

    Examples:
        >>> import torch
        >>> f = Transcoder.from_weights(torch.eye(4, 3), torch.ones(4, 2))
        >>> f.encode("features", {"in": torch.tensor([[1.0, -1.0, 2.0]])})
        tensor([[1., 0., 2., 0.]])
    """

    kind: ClassVar[str] = "transcoder"

    def __init__(self, config: LinearMapConfig) -> None:
        if (list(config.reads), list(config.writes), list(config.groups)) != (["in"], ["out"], ["features"]):
            raise ConfigError("a transcoder has the read 'in', the write 'out' and the group 'features'")
        super().__init__(config)

    @classmethod
    def from_weights(
        cls,
        W_enc: Float[Tensor, "n_features d_in"],
        W_dec: Float[Tensor, "n_features d_out"],
        b_enc: Float[Tensor, " n_features"] | None = None,
        b_dec: Float[Tensor, " d_out"] | None = None,
        W_skip: Float[Tensor, "d_in d_out"] | None = None,
        *,
        rule: str = "relu",
        rule_options: Mapping[str, int | float] | None = None,
        normalize: Normalization = "none",
        input_scale: float = 1.0,
        eps: float = 1e-6,
        centre: Float[Tensor, " d_in"] | None = None,
        special_tokens: Sequence[int] = (),
        numbers: Tensor | None = None,
        slice_of: int | None = None,
        **rule_tensors: Tensor,
    ) -> Self:
        """Build a transcoder from weights.

        Args:
            W_enc: encoder, a row for each feature.
            W_dec: decoder, a row for each feature.
            b_enc: bias of the encoder, zero if None.
            b_dec: bias of the decoder, zero if None.
            W_skip: skip connection, used as ``x @ W_skip``; None for none.
            rule: activation rule.
            rule_options: numbers of the rule.
            normalize: see `ReadConfig`, as for the next two.
            input_scale: see there.
            eps: see there.
            centre: subtracted from the activations before they are encoded; None for nothing.
            special_tokens: see `LinearMapConfig`.
            numbers: for a slice, the numbers of its features in the whole map.
            slice_of: for a slice, the number of features of the whole map.
            rule_tensors: parameters of the rule, ``(n_features,)`` each.

        Raises:
            ShapeError: the tensors do not fit each other.
            ConfigError: an option is not known, or a tensor of the rule is missing or unknown.
        """
        if W_enc.dim() != 2 or W_dec.dim() != 2 or len(W_enc) != len(W_dec):
            raise ShapeError(
                "W_enc must be (n_features, d_in) and W_dec (n_features, d_out), got "
                f"{tuple(W_enc.shape)} and {tuple(W_dec.shape)}"
            )
        config = {
            "reads": {
                "in": {
                    "width": W_enc.shape[1],
                    "normalize": normalize,
                    "eps": eps,
                    "input_scale": input_scale,
                    "centre": centre is not None,
                }
            },
            "writes": {"out": W_dec.shape[1]},
            "groups": {
                "features": {
                    "reads": ["in"],
                    "writes": ["out"],
                    "n_features": len(W_enc),
                    "rule": rule,
                    "rule_options": dict(rule_options or {}),
                    "slice_of": slice_of,
                }
            },
            "skips": {"out": ["in"]} if W_skip is not None else {},
            "special_tokens": list(special_tokens),
        }
        tensors: dict[str, Tensor | None] = {
            "W_enc.features.in": W_enc,
            "W_dec.features.out": W_dec,
            "b_enc.features": b_enc,
            "b_dec.out": b_dec,
            "W_skip.out.in": W_skip,
            "centre.in": centre,
            "numbers-features": numbers,
            **{f"rule_tensors.{name}.features": tensor for name, tensor in rule_tensors.items()},
        }
        return cls.from_tensors(config, {name: tensor for name, tensor in tensors.items() if tensor is not None})


@final
class CrossLayerTranscoder(LinearMap):
    """Map with several groups; each group reads one site and writes one or more.

    By convention the read of a layer i is ``in-i``, the write ``out-i`` and the group ``layer-i``.
    """

    kind: ClassVar[str] = "transcoder.cross-layer"

    def __init__(self, config: LinearMapConfig) -> None:
        for name, group in config.groups.items():
            if len(group.reads) > 1:
                raise ConfigError(
                    f"a group of a cross-layer transcoder reads one site, and {name!r} has {len(group.reads)}"
                )
        super().__init__(config)


@final
class Crosscoder(LinearMap):
    """Map that reads and writes the same sites, with one group that reads all or groups that read some.

    A read and the write of the same name are the same site.
    """

    kind: ClassVar[str] = "transcoder.crosscoder"

    def __init__(self, config: LinearMapConfig) -> None:
        widths = {name: read.width for name, read in config.reads.items()}
        if widths != config.writes:
            raise ConfigError("a crosscoder reads and writes the same sites, with the same names and widths")
        super().__init__(config)
