"""`SiteMapContract`: tests of the laws that every kind of `featurizers.SiteMap` keeps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import featurizers
from featurizers.errors import ConfigError, FeatureIndexError, ShapeError, SiteError, UsageError
from featurizers.features.site_map import Edit, SiteMap
from featurizers.registry.plugin_host import build


class SiteMapContract:
    """Conformance suite for a kind of map between sites: derive from it and give a fixture ``site_map``.

    Each test is a law; its name says which. A kind that breaks one does not override the test, but marks it as an
    expected failure with its reason.

    Attributes:
        tolerance: largest difference, relative to the largest value, that rounding may cause in float32.

    Examples:
        class TestMyMap(SiteMapContract):
            @pytest.fixture
            def site_map(self):
                return MyMap(MyConfig(...))
    """

    tolerance: ClassVar[float] = 1e-5

    @pytest.fixture
    def site_map(self) -> SiteMap[Any]:
        """Return the map to test, with weights that are not zero."""
        raise NotImplementedError("give a fixture site_map that returns the map to test")

    @pytest.fixture
    def x(self, site_map: SiteMap[Any]) -> dict[str, Tensor]:
        """Return activations at the reads, ``(2, 5, width)`` each."""
        return _activations(site_map.read_widths, seed=0)

    @pytest.fixture
    def y(self, site_map: SiteMap[Any]) -> dict[str, Tensor]:
        """Return activations at the writes."""
        return _activations(site_map.write_widths, seed=1)

    # ------------------------------------------------------------------ the map
    def test_the_features_and_the_error_give_the_writes_back(
        self, site_map: SiteMap[Any], x: dict[str, Tensor], y: dict[str, Tensor]
    ) -> None:
        features, error = site_map.featurize(x, y)
        assert {name: z.shape[-1] for name, z in features.items()} == {
            name: group.n_features for name, group in site_map.groups.items()
        }
        again = site_map.inverse_featurize(features, error, x)
        for write, value in y.items():
            self._close(again[write], value)

    def test_an_edit_is_the_difference_of_the_reconstructions(
        self, site_map: SiteMap[Any], x: dict[str, Tensor], y: dict[str, Tensor]
    ) -> None:
        features, _ = site_map.featurize(x, y)
        changed = {name: z + torch.linspace(-1, 1, z.shape[-1]) for name, z in features.items()}
        edits = {name: Edit(features[name], changed[name], None) for name in features}
        for write, base in y.items():
            expected = base + site_map.decode(write, changed, x) - site_map.decode(write, features, x)
            self._close(site_map.apply_edit(write, base, edits), expected)

    def test_an_edit_of_some_features_is_that_of_all_with_the_others_held(
        self, site_map: SiteMap[Any], x: dict[str, Tensor], y: dict[str, Tensor]
    ) -> None:
        for name, group in site_map.groups.items():
            columns = torch.tensor(sorted({0, group.n_features // 2, group.n_features - 1}, reverse=True))
            some, whole = site_map.encode(name, x, columns), site_map.encode(name, x)
            self._close(some, whole[..., columns])
            changed = whole.index_add(-1, columns, torch.ones_like(some))
            for write, base in y.items():
                short = site_map.apply_edit(write, base, {name: Edit(some, some + 1, columns)})
                self._close(short, site_map.apply_edit(write, base, {name: Edit(whole, changed, None)}))

    def test_an_edit_that_changes_nothing_gives_the_write_back(
        self, site_map: SiteMap[Any], x: dict[str, Tensor], y: dict[str, Tensor]
    ) -> None:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            given = {name: value.to(dtype) for name, value in x.items()}
            edits = {}
            for name in site_map.groups:
                z = site_map.encode(name, given)
                edits[name] = Edit(z, z.clone(), None)
            for write, value in y.items():
                base = value.to(dtype)
                result = site_map.apply_edit(write, base, edits)
                assert result.dtype == dtype
                assert torch.equal(result, base), f"at {write!r} in {dtype}"

    def test_inputs_are_not_changed(self, site_map: SiteMap[Any], x: dict[str, Tensor], y: dict[str, Tensor]) -> None:
        before = copy.deepcopy((x, y))
        features, error = site_map.featurize(x, y)
        site_map.inverse_featurize(features, error, x)
        for mapping, kept in zip((x, y), before, strict=True):
            assert all(torch.equal(mapping[name], kept[name]) for name in mapping)

    def test_gradients_reach_features_and_reads(self, site_map: SiteMap[Any], x: dict[str, Tensor]) -> None:
        given = {name: value.clone().requires_grad_() for name, value in x.items()}
        features = {name: site_map.encode(name, given) for name in site_map.groups}
        for z in features.values():
            z.retain_grad()
        sum(site_map.decode(write, features, given).square().sum() for write in site_map.write_widths).backward()  # type: ignore[union-attr]
        for name, z in features.items():
            assert z.grad is not None, f"no gradient reaches the features of {name!r}"
        for name in {read for group in site_map.groups.values() for read in group.reads}:
            assert given[name].grad is not None, f"no gradient reaches the read {name!r}"

    def test_widths_and_features_that_are_not_there_are_refused(
        self, site_map: SiteMap[Any], x: dict[str, Tensor], y: dict[str, Tensor]
    ) -> None:
        read, width = next(iter(site_map.read_widths.items()))
        with pytest.raises(ShapeError, match=str(width)):
            site_map.featurize({**x, read: torch.zeros(2, 5, width + 1)}, y)
        with pytest.raises(ShapeError, match=repr(read)):
            site_map.featurize({name: value for name, value in x.items() if name != read}, y)
        group, own = next(iter(site_map.groups.items()))
        for wrong in ([10**9], [-1], [0, 0], [0.5]):
            with pytest.raises(FeatureIndexError):
                site_map.select(group, wrong, x[own.reads[0]])  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="no group"):
            site_map.by_group({"no such group": [0]})

    # ------------------------------------------------------------------ sites and artefacts
    def test_sites_have_the_names_of_the_map(self, site_map: SiteMap[Any]) -> None:
        with pytest.raises(SiteError, match="give a site for each"):
            site_map.reads = {"no such read": "mlp.in:0"}
        assert site_map.sites_text is None
        _place(site_map)
        assert "->" in (site_map.sites_text or "")

    def test_a_saved_map_loads_to_the_same_bits(
        self, site_map: SiteMap[Any], x: dict[str, Tensor], y: dict[str, Tensor], tmp_path: Path
    ) -> None:
        _place(site_map)
        site_map.id, site_map.metadata = "found by a test", {"accuracy": 0.5}
        loaded = featurizers.load(site_map.save_pretrained(tmp_path / "artefact"), verify=True)
        assert type(loaded) is type(site_map)
        assert loaded.config == site_map.config
        assert (loaded.id, loaded.metadata) == (site_map.id, site_map.metadata)
        assert {name: vars(site) for name, site in loaded.sites.items()} == {
            name: vars(site) for name, site in site_map.sites.items()
        }
        for one, other in zip(site_map.featurize(x, y), loaded.featurize(x, y), strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)
        (entry,) = featurizers.list_artefacts(tmp_path / "artefact").values()
        assert entry.site == site_map.sites_text

    def test_a_slice_edits_as_the_whole(
        self, site_map: SiteMap[Any], x: dict[str, Tensor], y: dict[str, Tensor], tmp_path: Path
    ) -> None:
        folder = site_map.save_pretrained(tmp_path / "artefact")
        indices = {name: [group.n_features - 1] for name, group in list(site_map.groups.items())[:2]}
        try:
            part = featurizers.load(folder, indices=indices)
        except UsageError:
            pytest.skip("the kind is loaded whole")
        assert list(part.groups) == list(indices)
        for name, own in indices.items():
            columns = torch.tensor(own)
            z = part.encode(name, x)
            self._close(z, site_map.encode(name, x, columns))
            chosen = part.select(name, own, x[site_map.groups[name].reads[0]]).as_columns()
            for write, base in y.items():
                expected = site_map.apply_edit(write, base, {name: Edit(z, z + 1, columns)})
                self._close(part.apply_edit(write, base, {name: Edit(z, z + 1, chosen)}), expected)
        with pytest.raises(FeatureIndexError):
            part.select(next(iter(indices)), [0], next(iter(x.values())))

    def test_a_copy_is_the_same_map(self, site_map: SiteMap[Any], x: dict[str, Tensor], y: dict[str, Tensor]) -> None:
        for again in (copy.deepcopy(site_map), build(type(site_map), site_map.config.model_dump())):
            again.load_state_dict(site_map.state_dict())
            for one, other in zip(site_map.featurize(x, y), again.featurize(x, y), strict=True):
                assert all(torch.equal(one[name], other[name]) for name in one)

    def test_unknown_configuration_is_refused(self, site_map: SiteMap[Any]) -> None:
        with pytest.raises(ConfigError):
            build(type(site_map), {**site_map.config.model_dump(), "no_such_option": 1})

    def _close(self, actual: Tensor, expected: Tensor) -> None:
        __tracebackhide__ = True
        assert actual.shape == expected.shape
        scale = max(float(expected.detach().abs().amax()), 1.0)
        worst = float((actual - expected).detach().abs().amax())
        assert worst <= self.tolerance * scale, f"off by {worst:.3g} at a scale of {scale:.3g}"


def _activations(widths: dict[str, int], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(2, 5, width, generator=generator) for name, width in widths.items()}


def _place(site_map: SiteMap[Any]) -> None:
    """Give a map some sites, in the order of their names."""
    shared = [*dict.fromkeys([*site_map.read_widths, *site_map.write_widths])]
    sites = {
        name: featurizers.Site("resid.post", n).at(model="owner/model", position=(-1,)) for n, name in enumerate(shared)
    }
    site_map.reads = {name: sites[name] for name in site_map.read_widths}
    site_map.writes = {name: sites[name] for name in site_map.write_widths}
