"""`Collection`: where the maps of a graph read and write in a model.

The residual stream has two points in each block l: 2l before attention and 2l + 1 before the MLP. Blocks that run both
side by side have the first alone. The last point, 2L for L blocks, is read by the final norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from featurizers import Site, SiteMap
from featurizers.errors import ShapeError, SiteError, UsageError, shown
from featurizers_derived_scalars import Circuit, Place
from featurizers_transcoder import LinearMap

READS = "resid.pre, resid.mid, resid.post or mlp.in"
WRITES = "mlp.out, or the norm after it"


@final
@dataclass(frozen=True, eq=False)
class Read:
    """A read of a map.

    Attributes:
        map: that reads.
        name: of the read.
        site: where.
        point: of the residual stream that the site is computed from.
        norm: scale of the norm between the two; None if the site is the stream itself.
    """

    map: LinearMap
    name: str
    site: Site
    point: int
    norm: Place | None

    @property
    def layer(self) -> int:
        """Block whose MLP comes after the read."""
        return self.point // 2


@final
@dataclass(frozen=True, eq=False)
class Write:
    """A write of a map.

    Attributes:
        map: that writes.
        name: of the write.
        layer: block whose MLP's output it is.
        place: ``mlp.out``, or ``mlp.delta`` if what is written is added to the stream as it is.
    """

    map: LinearMap
    name: str
    layer: int
    place: Place


@final
@dataclass(frozen=True, eq=False)
class Reader:
    """Features that are encoded at one layer.

    Attributes:
        read: of their map.
        group: of their map.
        writes: that have a decoder of them.
    """

    read: Read
    group: str
    writes: tuple[Write, ...]


@final
@dataclass(frozen=True, eq=False)
class Collection:
    """Maps of a model, whose features are the nodes of a graph.

    Attributes:
        readers: by layer.
        writes: of all maps.
        skips: pairs of a read and the write that a skip connection adds it to.
    """

    readers: dict[int, Reader] = field(default_factory=dict)
    writes: list[Write] = field(default_factory=list)
    skips: list[tuple[Read, Write]] = field(default_factory=list)

    @classmethod
    def of(cls, circuit: Circuit, maps: Sequence[SiteMap[Any]] | SiteMap[Any]) -> Collection:
        """Return where maps belong in a model.

        Args:
            circuit: of the model.
            maps: transcoders or cross-layer transcoders with their sites. Layers may be without one.

        Raises:
            UsageError: there is no map, one is of another kind, or two read one layer.
            ShapeError: a map has another width than the model.
            SiteError: a map has no sites, does not read the residual stream before an MLP, does not write the outputs
                of MLPs, or writes before it reads.
        """
        if isinstance(maps, str) or not isinstance(maps, SiteMap | Iterable):
            raise UsageError(f"maps are transcoders that were loaded, in a list, not {shown(maps)}")
        maps = [maps] if isinstance(maps, SiteMap) else list(maps)
        if not maps:
            raise UsageError("a graph needs at least one transcoder: its features are the nodes")
        found = cls()
        for each in maps:
            found._add(circuit, each)
        return found

    def _add(self, circuit: Circuit, map_: SiteMap[Any]) -> None:
        if not isinstance(map_, LinearMap):
            if isinstance(map_, SiteMap):
                map_.stored_tensors()  # raises if no process has it whole
            kind = map_.kind if isinstance(map_, SiteMap) else type(map_).__name__
            raise UsageError(
                f"a graph needs maps with linear encoders and decoders, of the kinds transcoder and "
                f"transcoder.cross-layer; {shown(getattr(map_, 'id', kind))} is of the kind {shown(kind)}"
            )
        if not map_.reads or not map_.writes:
            raise SiteError(f"{map_.id!r} has no sites; set its reads and writes, as in f.reads = {{'in': 'mlp.in:3'}}")
        for name, group in map_.config.groups.items():
            if len(group.reads) > 1:
                raise SiteError(f"{map_.id!r}: the group {name!r} has several reads; features of a graph have one each")
        widths = {**map_.read_widths, **map_.write_widths}
        if wrong := [name for name, width in widths.items() if width != circuit.d_model]:
            raise ShapeError(
                f"{map_.id!r}: {wrong[0]!r} has width {widths[wrong[0]]}, and the model has {circuit.d_model}: another "
                "model's map?"
            )
        reads = {name: _read(circuit, map_, name, site) for name, site in map_.reads.items()}
        writes = {name: _write(circuit, map_, name, site) for name, site in map_.writes.items()}
        for name, group in map_.config.groups.items():
            reader = Reader(reads[group.reads[0]], name, tuple(writes[write] for write in group.writes))
            layer = reader.read.layer
            _check_causal(map_, reader.read, reader.writes)
            if layer in self.readers:
                other = self.readers[layer].read.map.id
                raise UsageError(f"{other!r} and {map_.id!r} both read layer {layer}; give one map for a layer")
            self.readers[layer] = reader
        self.writes.extend(writes.values())
        for write, names in map_.config.skips.items():
            for name in names:
                _check_causal(map_, reads[name], [writes[write]])
                self.skips.append((reads[name], writes[write]))

    def writes_at(self, layer: int) -> Iterator[Write]:
        """Yield the writes to the MLP of a layer."""
        return (write for write in self.writes if write.layer == layer)

    @property
    def reads(self) -> list[Read]:
        """Every read that features or skip connections have, each once."""
        every = [reader.read for reader in self.readers.values()] + [read for read, _ in self.skips]
        return list(dict.fromkeys(every))

    @property
    def special_tokens(self) -> frozenset[int]:
        """Ids of the tokens that the maps expect at the start of a prompt; empty if they say nothing."""
        return frozenset(token for write in self.writes for token in write.map.special_tokens)


def _check_causal(map_: LinearMap, read: Read, writes: Sequence[Write]) -> None:
    for write in writes:
        if write.layer < read.layer:
            raise SiteError(
                f"{map_.id!r} writes {map_.writes[write.name]} before it reads {read.site}; edges of a graph lead from "
                "earlier layers to later ones"
            )


def _read(circuit: Circuit, map_: LinearMap, name: str, site: Site) -> Read:
    point, norm = _point_and_norm(circuit, map_, site)
    if point >= 2 * circuit.n_layers:
        raise SiteError(f"{map_.id!r} reads {site}, which comes after every MLP of the model")
    return Read(map_, name, site, point, norm)


def _point_and_norm(circuit: Circuit, map_: LinearMap, site: Site) -> tuple[int, Place | None]:
    kind, layer = site.kind, site.layer
    if kind == "module":
        kind, layer = _kind_of_module(circuit, site)
    if layer is None or kind not in ("resid.pre", "resid.mid", "resid.post", "mlp.in"):
        raise SiteError(f"{map_.id!r} reads {site}; maps of a graph read {READS}")
    _check_layer(circuit, map_, site, layer)
    parallel = circuit.layout.blocks[layer].parallel
    if kind == "resid.mid" and parallel:
        circuit.check(Place("resid.mid", layer))
    if kind in ("resid.pre", "resid.post"):
        return 2 * layer + (2 if kind == "resid.post" else 0), None
    scale = Place("norm.mlp.scale", layer)
    norm = scale if kind == "mlp.in" and circuit.norm(scale) is not None else None
    return 2 * layer + (0 if parallel else 1), norm


def _kind_of_module(circuit: Circuit, site: Site) -> tuple[str, int | None]:
    """Return kind and layer of the site that a module's side is; the kind ``module`` if a graph has no such site."""
    for layer, block in enumerate(circuit.layout.blocks):
        kinds = {
            (block.block, "input"): "resid.pre",
            (block.block, "output"): "resid.post",
            (block.mlp_norm, "input"): "resid.mid",
            (block.mlp_norm, "output"): "mlp.in",
            (block.mlp, "input"): "mlp.in",
        }
        if site.module is not None and (kind := kinds.get((site.module, site.side or "output"))):
            return kind, layer
    return "module", None


def _write(circuit: Circuit, map_: LinearMap, name: str, site: Site) -> Write:
    layer: int | None = site.layer if site.kind == "mlp.out" else None
    kind = "mlp.out"
    if site.kind == "module" and site.side != "input":
        for number, block in enumerate(circuit.layout.blocks):
            if site.module == block.mlp_output:
                layer = number
            elif site.module is not None and site.module == block.mlp_post_norm:
                layer, kind = number, "mlp.delta"
    if layer is None:
        raise SiteError(f"{map_.id!r} writes {site}; maps of a graph write {WRITES}")
    _check_layer(circuit, map_, site, layer)
    return Write(map_, name, layer, Place(kind, layer))


def _check_layer(circuit: Circuit, map_: LinearMap, site: Site, layer: int) -> None:
    if layer >= circuit.n_layers:
        raise SiteError(f"{map_.id!r} is of {site}, and the model has {circuit.n_layers} layers: another model's map?")
