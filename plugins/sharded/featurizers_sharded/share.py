"""`Share`: the rows of a dictionary that one process holds."""

from __future__ import annotations

import torch
from featurizers import DictionaryFeaturizer
from featurizers.errors import UsageError
from torch import Tensor, nn

from featurizers_sharded.divided import Divided
from featurizers_sharded.ranks import Ranks

WHOLE = ("b_dec",)
"""Tensors of a dictionary without a row for each feature, which every process has."""


class Share(nn.Module):
    """Some features of a dictionary: its tensors under their own names, with the rows of these features alone.

    Args:
        whole: the dictionary; its tensors may be on the meta device.
        ranks: the processes.

    Attributes:
        divided: how the features are divided.
        start: number of the first feature here.
        stop: number after the last one.

    Raises:
        UsageError: there are fewer features than processes, or the dictionary is a slice.
    """

    W_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor

    def __init__(self, whole: DictionaryFeaturizer, ranks: Ranks) -> None:
        super().__init__()
        if whole.config.slice_of is not None:
            raise UsageError(f"{whole.id!r} is a slice of a dictionary, and whole ones alone are divided over a mesh")
        self.divided = Divided(ranks, whole.rule, whole.config.rule_options, whole.n_features)
        self.start, self.stop = self.divided.start, self.divided.stop
        parameters = dict(whole.named_parameters())
        for name, tensor in whole.state_dict().items():
            rows = tensor if name in WHOLE else tensor[self.start : self.stop]
            if name in parameters:
                self.register_parameter(name, nn.Parameter(rows, requires_grad=False))
            else:
                self.register_buffer(name, rows)

    def rows(self) -> dict[str, slice]:
        """Return which rows of each tensor of the dictionary are here."""
        return {name: slice(self.start, self.stop) for name in self.state_dict() if name not in WHOLE}

    def tensor(self, name: str) -> Tensor | None:
        """Return a tensor, None if the dictionary has none of this name."""
        found: Tensor | None = self._parameters.get(name, self._buffers.get(name))
        return found

    def tensors(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Return tensors by name."""
        return {name: self.get_parameter(name) for name in names}

    def trains(self) -> bool:
        """Return whether a weight needs a gradient."""
        return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())

    def extra_repr(self) -> str:
        """Return the text that ``print`` shows after the class name."""
        return f"features {self.start} to {self.stop - 1} of {self.divided.n_features}"
