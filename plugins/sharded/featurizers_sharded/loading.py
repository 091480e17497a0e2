"""`load_share`, which `featurizers.load` calls with ``mesh=``, and `shard`, which divides a dictionary in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from featurizers import DictionaryFeaturizer, FeatureSpace
from featurizers.errors import UsageError, shown
from torch import nn

from featurizers_sharded.dictionary import ShardedDictionary
from featurizers_sharded.ranks import Ranks


def load_share(read: Callable[..., FeatureSpace[Any]], mesh: Any, device: Any) -> FeatureSpace[Any]:
    """Load the share of this process; all processes of the mesh call it, and all raise if one of them fails.

    Args:
        read: loads the featurizer, given the keywords ``divide``, which chooses what this process holds of it, and
            ``device``.
        mesh: as in `featurizers.load`.
        device: given by the caller, None for that of the mesh.

    Raises:
        UsageError: it is no mesh, another device, the processes read different files, or the artefact holds something
            else than a dictionary.
        OtherRankError: another process failed.
    """
    ranks = Ranks(mesh)
    with ranks.reporting():
        device = ranks.device_type if device is None else torch.device(device)
        if torch.device(device).type != ranks.device_type:
            raise UsageError(f"the mesh is of the device {ranks.device_type!r}, and device= is {shown(str(device))}")

        def divide(whole: FeatureSpace[Any]) -> tuple[FeatureSpace[Any], nn.Module, Mapping[str, slice]]:
            featurizer = _divided(whole, ranks)
            return featurizer, featurizer.share, featurizer.share.rows()

        featurizer = read(divide=divide, device=device)
        if not isinstance(featurizer, ShardedDictionary):
            raise UsageError(f"{featurizer.id!r} was not divided over the mesh")
        about = [featurizer.config.model_dump(mode="json"), featurizer.revision, str(featurizer.site)]
        with ranks.together("load", str(about)[:300], featurizer.share.b_dec):
            return featurizer


def shard(whole: DictionaryFeaturizer, mesh: Any) -> ShardedDictionary:
    """Divide a dictionary that every process holds whole, such as one that another library wrote.

    Raises:
        UsageError: as `load_share`.
    """
    ranks = Ranks(mesh)
    with ranks.reporting():
        featurizer = _divided(whole, ranks)
        state = {
            name: (tensor[rows] if (rows := featurizer.share.rows().get(name)) is not None else tensor).clone()
            for name, tensor in whole.state_dict().items()
        }
        featurizer.share.load_state_dict(state, assign=True)
        with ranks.together("shard", featurizer.share.b_dec):
            featurizer.site, featurizer.edits = whole.site, list(whole.edits)
            return featurizer.described_as(whole)


def _divided(whole: object, ranks: Ranks) -> ShardedDictionary:
    if not isinstance(whole, DictionaryFeaturizer):
        kind = whole.kind if isinstance(whole, FeatureSpace) else type(whole).__name__
        raise UsageError(f"only a dictionary is divided over a mesh, not a featurizer of kind {shown(kind)}")
    return ShardedDictionary(whole, ranks)
