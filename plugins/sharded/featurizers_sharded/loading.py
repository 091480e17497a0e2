"""`load_share`, which `featurizers.load` calls with ``mesh=``, and `shard`, which divides what is in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import torch
from featurizers import DictionaryFeaturizer, FeatureSpace, SiteMap
from featurizers.errors import UsageError, shown
from torch import nn

from featurizers_sharded.dictionary import ShardedDictionary
from featurizers_sharded.ranks import Ranks

if TYPE_CHECKING:
    from featurizers_sharded.site_map import ShardedMap

Sharded: TypeAlias = "ShardedDictionary | ShardedMap"


def load_share(read: Callable[..., FeatureSpace[Any]], mesh: Any, device: Any) -> FeatureSpace[Any]:
    """Load the share of this process; all processes of the mesh call it, and all raise if one of them fails.

    Args:
        read: loads the featurizer, given the keywords ``divide``, which chooses what this process holds of it, and
            ``device``.
        mesh: as in `featurizers.load`.
        device: given by the caller, None for that of the mesh.

    Raises:
        UsageError: it is no mesh, another device, the processes read different files, or the artefact holds something
            else than a dictionary, a transcoder or a crosscoder.
        OtherRankError: another process failed.
    """
    ranks = Ranks(mesh)
    with ranks.reporting():
        device = ranks.device_type if device is None else torch.device(device)
        if torch.device(device).type != ranks.device_type:
            raise UsageError(f"the mesh is of the device {ranks.device_type!r}, and device= is {shown(str(device))}")
        divided: list[Sharded] = []

        def divide(whole: FeatureSpace[Any]) -> tuple[FeatureSpace[Any], nn.Module, Mapping[str, slice]]:
            divided.append(_divided(whole, ranks))
            return divided[-1], divided[-1].share, divided[-1].rows()

        featurizer = read(divide=divide, device=device)
        if not any(each is featurizer for each in divided):
            raise UsageError(f"{featurizer.id!r} was not divided over the mesh")
        return _agreed(divided[-1], "load")


@overload
def shard(whole: DictionaryFeaturizer, mesh: Any) -> ShardedDictionary: ...
@overload
def shard(whole: SiteMap[Any], mesh: Any) -> ShardedMap: ...
def shard(whole: DictionaryFeaturizer | SiteMap[Any], mesh: Any) -> Sharded:
    """Divide a dictionary or a map that every process holds whole, such as one that another library wrote.

    Raises:
        UsageError: as `load_share`.
    """
    ranks = Ranks(mesh)
    with ranks.reporting():
        featurizer = _divided(whole, ranks)
        own = featurizer.rows()
        state = {name: tensor[own.get(name, slice(None))].clone() for name, tensor in whole.state_dict().items()}
        featurizer.share.load_state_dict(state, assign=True)
        featurizer.edits = list(whole.edits)
        if isinstance(featurizer, ShardedDictionary):
            featurizer.site = whole.sites.get("site")
        elif isinstance(whole, SiteMap):
            featurizer.reads, featurizer.writes = whole.reads, whole.writes
        return _agreed(featurizer, "shard").described_as(whole)


def _agreed(featurizer: Sharded, call: str) -> Sharded:
    """Return the featurizer once the processes have the same config, sites and tensors that are not divided."""
    sites = {name: str(site) for name, site in featurizer.sites.items()}
    about = json.dumps([featurizer.config.model_dump(mode="json"), featurizer.revision, sites])
    digest, own = hashlib.sha256(about.encode()).hexdigest()[:16], featurizer.rows()
    whole = [tensor for name, tensor in featurizer.share.state_dict().items() if name not in own]
    with featurizer.ranks.together(call, featurizer.kind, f"{about[:300]} ({digest})", *whole):
        return featurizer


def _divided(whole: object, ranks: Ranks) -> Sharded:
    if isinstance(whole, DictionaryFeaturizer):
        return ShardedDictionary(whole, ranks)
    if isinstance(whole, SiteMap) and whole.kind.partition(".")[0] == "transcoder":
        from featurizers_transcoder import LinearMap  # whoever has a map of the kind has the package

        from featurizers_sharded.site_map import ShardedMap

        if isinstance(whole, LinearMap):
            return ShardedMap(whole, ranks)
    kind = whole.kind if isinstance(whole, FeatureSpace) else type(whole).__name__
    raise UsageError(
        f"only dictionaries, transcoders and crosscoders are divided over a mesh, and this is of kind {shown(kind)}"
    )
