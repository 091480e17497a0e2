"""`FeaturizerContract`: tests that every kind of featurizer must pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

import featurizers
from featurizers.errors import ConfigError, FeatureIndexError, LoweringError, ShapeError
from featurizers.features.derivatives import Error
from featurizers.features.featurizer import Featurizer
from featurizers.models.lowering import lower
from featurizers.models.operations import Ablate, Interchange, Mask, Steer
from featurizers.registry.plugin_host import build, host
from featurizers.testing.samples import Identity, tiny_gpt2

LOW_PRECISION = (torch.float16, torch.bfloat16)


class FeaturizerContract:
    """Tests of every law of featurizers. Subclass it and define the two fixtures, and pytest runs them on your kind.

    A test may be overridden only by a test marked ``pytest.mark.xfail(reason=...)``, which says why the law does not
    hold.

    Attributes:
        tolerance: largest error of a round trip or of a closed form, relative to the largest activation, in fp32.
    """

    tolerance: ClassVar[float] = 1e-5

    def __init_subclass__(cls, **options: Any) -> None:
        """Raise if a subclass overrides a law without saying why."""
        super().__init_subclass__(**options)
        for name, value in vars(cls).items():
            if name.startswith("test_") and hasattr(FeaturizerContract, name):
                marks = getattr(value, "pytestmark", [])
                if not any(mark.name == "xfail" and mark.kwargs.get("reason") for mark in marks):
                    raise TypeError(
                        f"{cls.__name__}.{name} overrides a law; mark it xfail(reason=...) if the law cannot hold"
                    )

    @pytest.fixture
    def featurizer(self) -> Featurizer[Any]:
        """Return the featurizer to test: a new one for each test, with weights that are not all 0 or 1."""
        raise NotImplementedError("define a fixture named 'featurizer'")

    @pytest.fixture
    def activations(self) -> Tensor:
        """Return at least 12 different activations, fp32 ``(n, d_in)``, with different values of the features."""
        raise NotImplementedError("define a fixture named 'activations'")

    # ------------------------------------------------------------------ the map and its inverse

    def test_has_a_kind_a_config_and_widths(self, featurizer: Featurizer[Any], activations: Tensor) -> None:
        assert type(featurizer).kind == featurizer.kind
        assert isinstance(featurizer.config, type(featurizer).Config)
        assert featurizer.d_in in (None, activations.shape[-1])
        features, _ = featurizer.featurize(activations)
        assert featurizer.n_features in (None, features.shape[-1])

    def test_inverse_recovers_the_activations(self, featurizer: Featurizer[Any], activations: Tensor) -> None:
        for x in _shapes(activations):
            features, error = featurizer.featurize(x)
            assert features.shape[:-1] == x.shape[:-1]
            self._close(featurizer.inverse_featurize(features, error), x)

    def test_a_reconstruction_is_the_inverse_without_residual(
        self, featurizer: Featurizer[Any], activations: Tensor
    ) -> None:
        for x in _shapes(activations):
            features, error = featurizer.featurize(x)
            alone, reconstruction = featurizer.reconstruct(x)
            self._close(alone, features)
            assert reconstruction.shape == x.shape
            self._close(reconstruction, featurizer.inverse_featurize(features, featurizer.without_residual(error)))

    def test_no_activations_give_no_features(self, featurizer: Featurizer[Any], activations: Tensor) -> None:
        features, error = featurizer.featurize(activations[:0])
        assert features.shape[0] == 0
        assert featurizer.inverse_featurize(features, error).shape == activations[:0].shape

    def test_encode_gives_the_features_of_featurize(self, featurizer: Featurizer[Any], activations: Tensor) -> None:
        features, _ = featurizer.featurize(activations)
        self._close(featurizer.encode(activations), features)
        columns = _some(features.shape[-1])
        self._close(featurizer.encode(activations, columns), features[..., columns])

    def test_sparse_features_are_the_features(self, featurizer: Featurizer[Any], activations: Tensor) -> None:
        expected = featurizer.encode(featurizer.flatten(activations))
        active = featurizer.encode_active(activations)
        places = active.rows * expected.shape[-1] + active.columns
        assert (places.diff() > 0).all(), "features are ordered by token, and by column within a token"
        assert (active.values != 0).all(), "features that are 0 are left out"
        found = torch.zeros_like(expected).view(-1).index_put((places,), active.values)
        self._close(found.view(expected.shape), expected)
        values, indices = featurizer.encode_sparse(activations)
        self._close(torch.zeros_like(expected).scatter_add(-1, indices, values), expected)

    def test_each_example_is_mapped_alone(self, featurizer: Featurizer[Any], activations: Tensor) -> None:
        together, _ = featurizer.featurize(activations)
        for i in (0, len(activations) - 1):
            self._close(featurizer.featurize(activations[i : i + 1])[0], together[i : i + 1])

    def test_nothing_is_remembered_between_calls(self, featurizer: Featurizer[Any], activations: Tensor) -> None:
        first, second = activations[:4], activations[4:8]
        before = copy.deepcopy(featurizer)
        features, error = featurizer.featurize(first)
        featurizer.featurize(second)
        featurizer.interchange(second, first)
        self._close(featurizer.inverse_featurize(features, error), first)
        self._close(featurizer.inverse_featurize(features, error), first)  # the first call left them unchanged
        self._close(before.inverse_featurize(features, error), first)  # nothing is stored on the module
        assert _same_state(featurizer, before)

    def test_inputs_are_never_changed_or_handed_back(self, featurizer: Featurizer[Any], activations: Tensor) -> None:
        base, source = activations[:4], activations[4:8]
        kept = base.clone(), source.clone()
        features, error = featurizer.featurize(base)
        kept_features, kept_error = features.clone(), _map(error, torch.clone)
        results = {
            "featurize": features,
            "inverse_featurize": featurizer.inverse_featurize(features, error),
            "interchange": featurizer.interchange(base, source),
            "interchange of none": featurizer.interchange(base, source, []),
            "interchange of some": featurizer.interchange(base, source, _some(features.shape[-1])),
            "mask": featurizer.mask(base, source, torch.full((features.shape[-1],), 0.5)),
            "collect": featurizer.collect(base),
            "steer": featurizer.steer(base, 1.0),
            "ablate": featurizer.ablate(base),
        }
        assert torch.equal(base, kept[0])
        assert torch.equal(source, kept[1])
        assert torch.equal(features, kept_features)
        assert _equal(error, kept_error)
        inputs = {base.untyped_storage().data_ptr(), source.untyped_storage().data_ptr()}
        for name, result in results.items():
            assert result.untyped_storage().data_ptr() not in inputs, f"{name} returns an input"

    # ------------------------------------------------------------------ operations

    def test_an_edit_that_changes_nothing_is_exact(self, featurizer: Featurizer[Any], activations: Tensor) -> None:
        count = featurizer.featurize(activations)[0].shape[-1]
        for dtype in (torch.float32, *LOW_PRECISION):
            base, source = activations[:4].to(dtype), activations[4:8].to(dtype)
            zero, half = torch.zeros(count), torch.full((count,), 0.3)
            results = {
                "interchange with itself": featurizer.interchange(base, base.clone()),
                "interchange of no feature": featurizer.interchange(base, source, []),
                "interchange of no feature of any example": featurizer.interchange(base, source, [[]] * 4),
                "interchange of one feature with itself": featurizer.interchange(base, base.clone(), [0]),
                "a closed mask": featurizer.mask(base, source, zero),
                "a mask with itself": featurizer.mask(base, base.clone(), half),
                "steering by zero": featurizer.steer(base, 0.0),
                "steering one feature by zero": featurizer.steer(base, 0.0, [count - 1]),
                "ablating to its own value": featurizer.ablate(base, None, featurizer.collect(base)),
                "splicing": featurizer.splice(base, lambda _: None),
            }
            for name, result in results.items():
                assert result.dtype == dtype, f"{name} turns {dtype} into {result.dtype}"
                assert torch.equal(result, base), f"{name} is not exact in {dtype}"

    def test_interchange_is_the_inverse_of_the_sources_features(
        self, featurizer: Featurizer[Any], activations: Tensor
    ) -> None:
        base, source = activations[:4], activations[4:8]
        features, error = featurizer.featurize(base)
        others, _ = featurizer.featurize(source)
        self._close(featurizer.interchange(base, source), featurizer.inverse_featurize(others, error))
        columns = _some(features.shape[-1])
        merged = features.clone()
        merged[..., columns] = others[..., columns]
        expected = featurizer.inverse_featurize(merged, error)
        mask = torch.zeros(features.shape[-1], dtype=torch.bool)
        mask[columns] = True
        for indices in (columns, columns.tolist(), columns.flip(0), mask, [columns.tolist()] * 4):
            self._close(featurizer.interchange(base, source, indices), expected)
        self._close(featurizer.interchange(base, source[:1]), featurizer.interchange(base, source[:1].expand(4, -1)))

    def test_interchange_of_other_features_for_each_example(
        self, featurizer: Featurizer[Any], activations: Tensor
    ) -> None:
        count = featurizer.featurize(activations)[0].shape[-1]
        base, source = activations[:3], activations[3:6]
        rows = [[0], [], list(range(count))]
        alone = [featurizer.interchange(base[i : i + 1], source[i : i + 1], row) for i, row in enumerate(rows)]
        self._close(featurizer.interchange(base, source, rows), torch.cat(alone))
        wide_base, wide_source = (t.unsqueeze(1).expand(-1, 2, -1) for t in (base, source))
        self._close(featurizer.interchange(wide_base, wide_source, rows)[:, 1], torch.cat(alone))

    def test_mask_steer_ablate_and_collect_follow_the_features(
        self, featurizer: Featurizer[Any], activations: Tensor
    ) -> None:
        base, source = activations[:4], activations[4:8]
        features, error = featurizer.featurize(base)
        others, _ = featurizer.featurize(source)
        gate = torch.linspace(0, 1, features.shape[-1])
        blended = features + gate * (others - features)
        self._close(featurizer.mask(base, source, gate), featurizer.inverse_featurize(blended, error))

        columns = _some(features.shape[-1])
        values = torch.linspace(0.5, 1.5, len(columns))
        added, put = features.clone(), features.clone()
        added[..., columns] += values
        put[..., columns] = values
        self._close(featurizer.steer(base, values, columns), featurizer.inverse_featurize(added, error))
        self._close(featurizer.ablate(base, columns, values), featurizer.inverse_featurize(put, error))
        self._close(featurizer.ablate(base), featurizer.inverse_featurize(torch.zeros_like(features), error))

        self._close(featurizer.collect(base), features)
        self._close(featurizer.collect(base, columns.flip(0)), features[..., columns.flip(0)])
        assert featurizer.collect(base, []).shape == (4, 0)

    def test_lowered_edits_are_those_of_the_featurizer(self, featurizer: Featurizer[Any], activations: Tensor) -> None:
        base = activations[:4]
        columns = _some(featurizer.featurize(base)[0].shape[-1])
        values = torch.linspace(0.5, 1.5, len(columns))
        steer = Steer(featurizer, delta=values, indices=columns)
        ablate = Ablate(featurizer, value=values, indices=columns)
        for operation, expected in (
            (steer, featurizer.steer(base, values, columns)),
            (ablate, featurizer.ablate(base, columns, values)),
        ):
            try:
                program = lower(operation)
            except LoweringError:  # a kind need not have this form, but if it has one, it is right
                continue
            self._close(program.apply(base), expected)

    def test_low_precision_activations_are_computed_precisely(
        self, featurizer: Featurizer[Any], activations: Tensor
    ) -> None:
        has_weights = any(tensor.is_floating_point() for tensor in featurizer.state_dict().values())
        for dtype in LOW_PRECISION:
            base, source = activations[:4].to(dtype), activations[4:8].to(dtype)
            exact = featurizer.collect(base.float())
            scale = exact.abs().amax()
            allowed = self.tolerance if has_weights else torch.finfo(dtype).eps
            assert (featurizer.collect(base).float() - exact).abs().amax() <= allowed * scale
            features, error = featurizer.featurize(base)
            again, size = featurizer.inverse_featurize(features, error), base.float().abs().amax()
            assert (again.float() - base.float()).abs().amax() <= allowed * size
            swapped = featurizer.interchange(base.float(), source.float())
            rounding = torch.finfo(dtype).eps * swapped.abs().amax()
            assert (featurizer.interchange(base, source).float() - swapped).abs().amax() <= rounding

    def test_features_that_are_not_there_are_refused(self, featurizer: Featurizer[Any], activations: Tensor) -> None:
        base = activations[:4]
        count = featurizer.featurize(base)[0].shape[-1]
        for wrong in ([count], [-1], [0, 0], [[0], [count]], [0.5]):
            with pytest.raises(FeatureIndexError):
                featurizer.interchange(base, base, wrong)  # type: ignore[arg-type]
        with pytest.raises(FeatureIndexError):
            featurizer.interchange(base, base, [[0]] * 3)

    def test_another_width_is_refused_by_name(self, featurizer: Featurizer[Any], activations: Tensor) -> None:
        if featurizer.d_in is None:
            return
        wrong = torch.zeros(4, featurizer.d_in + 1)
        calls: list[Callable[[], Tensor]] = [
            lambda: featurizer.collect(wrong),
            lambda: featurizer.steer(wrong, 1.0),
            lambda: featurizer.ablate(wrong),
            lambda: featurizer.interchange(wrong, activations[:4]),
            lambda: featurizer.interchange(activations[:4], wrong),
        ]
        for call in calls:
            with pytest.raises(ShapeError, match=str(featurizer.d_in)):
                call()

    # ------------------------------------------------------------------ gradients

    def test_gradients_are_those_of_the_inverse(self, featurizer: Featurizer[Any], activations: Tensor) -> None:
        count = featurizer.featurize(activations)[0].shape[-1]
        base, source = (activations[i : i + 4].clone().requires_grad_() for i in (0, 4))
        gate = torch.linspace(0.1, 0.9, count).requires_grad_()
        parameters = [p for p in featurizer.parameters() if p.requires_grad]
        weight = torch.linspace(-1, 1, base.numel()).reshape(base.shape)

        def plain() -> Tensor:
            features, error = featurizer.featurize(base)
            others, _ = featurizer.featurize(source)
            return featurizer.inverse_featurize(features + gate * (others - features), error)

        actual, expected = (
            torch.autograd.grad((result * weight).sum(), [base, source, gate, *parameters], allow_unused=True)
            for result in (featurizer.mask(base, source, gate), plain())
        )
        for g, e in zip(actual, expected, strict=True):
            assert (g is None) == (e is None)
            if g is not None and e is not None:
                self._close(g, e)
        assert actual[1] is not None
        assert actual[1].abs().amax() > 0, "no gradient reaches the source"
        learned = [g for g in actual[3:] if g is not None and g.abs().amax() > 0]
        assert learned or not parameters, "no gradient reaches a parameter; freeze what is not trained"

    def test_jvp_and_vjp_are_adjoint(self, featurizer: Featurizer[Any], activations: Tensor) -> None:
        x, dx = activations[:4], activations[4:8]
        features, error = featurizer.featurize(x)
        df = torch.linspace(-1, 1, features.numel()).reshape(features.shape)
        forward = (featurizer.encode_jvp(x, dx) * df).sum()
        backward = (dx * featurizer.encode_vjp(x, df)).sum()
        torch.testing.assert_close(forward, backward, rtol=1e-4, atol=1e-4)
        forward = (featurizer.decode_jvp(features, error, df) * dx).sum()
        backward = (df * featurizer.decode_vjp(features, error, dx)).sum()
        torch.testing.assert_close(forward, backward, rtol=1e-4, atol=1e-4)

    def test_a_spliced_feature_gets_the_gradient_of_the_decoder(
        self, featurizer: Featurizer[Any], activations: Tensor
    ) -> None:
        x = activations[:4].clone().requires_grad_()
        weight = activations[4:8]
        seen: list[Tensor] = []

        def tap(features: Tensor) -> None:
            features.retain_grad()
            seen.append(features)

        modes: tuple[Literal["live", "stop"], ...] = ("live", "stop")
        for error_grad in modes:
            seen.clear()
            x.grad = None
            spliced = featurizer.splice(x, tap, error_grad=error_grad)
            (spliced * weight).sum().backward()  # type: ignore[no-untyped-call]
            features, error = featurizer.featurize(x.detach())
            through = featurizer.decode_vjp(features, error, weight)
            assert seen[0].grad is not None
            assert x.grad is not None
            self._close(seen[0].grad, through)
            if error_grad == "stop":
                self._close(x.grad, featurizer.encode_vjp(x.detach(), through))
            else:
                self._close(x.grad, weight)  # the splice as a whole is the identity

    # ------------------------------------------------------------------ copies, artefacts, composition

    def test_a_saved_featurizer_loads_to_the_same_bits(
        self, featurizer: Featurizer[Any], activations: Tensor, tmp_path: Path
    ) -> None:
        featurizer.id = "found by a test"
        featurizer.site = featurizers.Site("resid.post", 1).at(position=(-1,), model="owner/model")
        featurizer.feature_sets = {"chosen": torch.tensor([0])}
        featurizer.metadata = {"accuracy": 0.5}
        loaded = featurizers.load(featurizer.save_pretrained(tmp_path / "artefact"), verify=True)
        assert type(loaded) is type(featurizer)
        assert loaded.config == featurizer.config
        assert (loaded.id, loaded.site, loaded.metadata) == (
            featurizer.id,
            featurizer.site,
            featurizer.metadata,
        )
        assert vars(loaded.site) == vars(featurizer.site)
        assert _equal(tuple(loaded.feature_sets.values()), tuple(featurizer.feature_sets.values()))
        assert _same_state(loaded, featurizer)
        before = featurizer.state_dict()
        for name, tensor in loaded.state_dict().items():
            assert _layout(tensor) == _layout(before[name]), (
                f"the tensor {name!r} has the strides {before[name].stride()}, and {tensor.stride()} after it was "
                "saved and loaded, and matrix products round by the layout; give it the layout of the constructor, "
                "for example with .contiguous()"
            )
        self._behaves_the_same(loaded, featurizer, activations)

    def test_saved_edits_do_what_they_did(
        self, featurizer: Featurizer[Any], activations: Tensor, tmp_path: Path
    ) -> None:
        source = featurizer.flatten(activations)[None, :1]
        values = featurizer.collect(source)[0, 0].detach()
        some = None if featurizer.n_features is None and featurizer.d_in is None else [len(values) - 1]
        featurizer.site = featurizer.site or "resid.post:0"
        featurizer.edits = [
            Steer(featurizer, delta=1.5, indices=some),
            Ablate(featurizer, value=values, positions=[-1]),
            Interchange(featurizer, source=source, indices=some),
            Mask(featurizer, source=source, gate=torch.linspace(0, 1, len(values))),
        ]
        loaded = featurizers.load(featurizer.save_pretrained(tmp_path / "edits"))
        base = activations[None, 1:]
        for saved, edit in zip(loaded.edits, featurizer.edits, strict=True):
            assert saved.positions == edit.positions
            given = (getattr(each, "source", None) for each in (saved, edit))
            results = [each.apply(base, own) for each, own in zip((saved, edit), given, strict=True)]
            self._close(*results)

    def test_a_copy_and_a_state_dict_are_the_same_featurizer(
        self, featurizer: Featurizer[Any], activations: Tensor
    ) -> None:
        featurizer.interchange(activations[:4], activations[4:8])  # its autograd graph must not prevent the copy
        self._behaves_the_same(copy.deepcopy(featurizer), featurizer, activations)
        again = build(type(featurizer), featurizer.config.model_dump())
        again.load_state_dict(featurizer.state_dict())
        self._behaves_the_same(again, featurizer, activations)

    def test_unknown_configuration_is_refused(self, featurizer: Featurizer[Any]) -> None:
        with pytest.raises(ConfigError):
            build(type(featurizer), {**featurizer.config.model_dump(), "no_such_option": 1})

    def test_composes_with_the_identity(self, featurizer: Featurizer[Any], activations: Tensor) -> None:
        base, source = activations[:4], activations[4:8]
        identity = Identity()
        for composed in (identity >> featurizer, featurizer >> identity):
            self._same(composed.interchange(base, source), featurizer.interchange(base, source), featurizer)
            assert torch.equal(composed.collect(base), featurizer.collect(base))
            features, error = composed.featurize(base)
            self._close(composed.inverse_featurize(features, error), base)

    # ------------------------------------------------------------------ backends

    def test_native_hooks_do_what_the_featurizer_does(self, featurizer: Featurizer[Any], activations: Tensor) -> None:
        model, base, source = tiny_gpt2(activations.shape[-1])
        block = model.transformer.h[0]
        there = featurizers.collect(model, {"input_ids": source}, ["resid.post:0"])["resid.post:0"][:, 2]

        def by_hand(_: object, __: object, output: Any) -> Any:
            # before transformers 5.3, a block of GPT-2 returns a tuple
            x = (output[0] if isinstance(output, tuple) else output).clone()
            x[:, 2] = featurizer.interchange(x[:, 2], there, [0])
            return (x, *output[1:]) if isinstance(output, tuple) else x

        handle = block.register_forward_hook(by_hand)
        expected = model(base).logits
        handle.remove()
        swap = featurizers.Interchange(featurizer, source={"input_ids": source}, positions=[2], indices=[0])
        with featurizers.intervene(model, {"resid.post:0": swap}):
            actual = model(base).logits
        assert torch.equal(actual, expected)
        assert not torch.equal(model(base).logits, actual), "the interchange changes no logit"

    def test_pyvene_does_what_the_native_backend_does(self, featurizer: Featurizer[Any], activations: Tensor) -> None:
        if "pyvene" not in host().names():
            pytest.skip("featurizers-pyvene is not installed")
        pyvene = pytest.importorskip("pyvene")
        model, base, source = tiny_gpt2(activations.shape[-1])
        gate = torch.linspace(-1, 1, featurizer.n_features or activations.shape[-1])
        options: dict[str, Any] = {"source": {"input_ids": source}, "positions": [2]}
        native = {
            "interchange": featurizers.Interchange(featurizer, **options, indices=[0]),
            "collect": featurizers.Collect(featurizer, positions=[2]),
        }
        if featurizer.n_features is not None:
            native["mask"] = featurizers.Mask(featurizer, **options, gate=torch.sigmoid(gate))
        for name, operation in native.items():
            cls = getattr(featurizer, f"get_{name}_intervention")()
            representation = {
                "layer": 0,
                "component": "block_output",
                "unit": "pos",
                "max_number_of_units": 1,
            }
            config = pyvene.IntervenableConfig([representation], intervention_types=cls)
            intervenable = pyvene.IntervenableModel(config, model)
            (intervention,) = intervenable.interventions.values()
            if name == "mask":
                intervention.mask.data.copy_(gate)
            where = [[[2]] * len(base)]
            sources = [None] if name == "collect" else [{"input_ids": source}]
            locations = {"base": 2} if name == "collect" else {"sources->base": (where, where)}
            subspaces = [[[0]] * len(base)] if name == "interchange" else None
            before, after = intervenable({"input_ids": base}, sources, locations, subspaces=subspaces)
            with featurizers.intervene(model, {"resid.post:0": operation}) as collected:
                logits = model(base).logits
            if name == "collect":
                assert torch.equal(before[1][0], collected["resid.post:0"])
            else:
                self._same(after.logits, logits, featurizer)

    # ------------------------------------------------------------------ helpers

    def _close(self, actual: Tensor, expected: Tensor) -> None:
        __tracebackhide__ = True
        assert actual.shape == expected.shape
        if actual.numel():
            scale = max(float(expected.detach().abs().amax()), 1.0)
            worst = float((actual - expected).detach().abs().amax())
            assert worst <= self.tolerance * scale, f"off by {worst:.3g} at a scale of {scale:.3g}"

    def _same(self, actual: Tensor, expected: Tensor, featurizer: Featurizer[Any]) -> None:
        """Check that results are equal, or close for a kind with its own `blend`, which may sum in another order."""
        __tracebackhide__ = True
        if type(featurizer).blend is Featurizer.blend:
            assert torch.equal(actual, expected)
        self._close(actual, expected)

    def _behaves_the_same(self, one: Featurizer[Any], other: Featurizer[Any], activations: Tensor) -> None:
        base, source = activations[:4], activations[4:8]
        assert torch.equal(one.featurize(base)[0], other.featurize(base)[0])
        assert _equal(one.featurize(base)[1], other.featurize(base)[1])
        assert torch.equal(one.interchange(base, source), other.interchange(base, source))


def _shapes(activations: Tensor) -> list[Tensor]:
    width = activations.shape[-1]
    return [
        activations,
        activations[0],
        activations[:12].reshape(3, 4, width),
        activations[:12].reshape(2, 3, 2, width),
    ]


def _some(count: int) -> Tensor:
    """Return the columns of a few features, not in order."""
    return torch.tensor(sorted({0, count // 2, count - 1}, reverse=True))


def _same_state(one: Featurizer[Any], other: Featurizer[Any]) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def _layout(tensor: Tensor) -> list[int]:
    """Strides of the axes that have more than one element."""
    return [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _map(error: Error, change: Callable[[Tensor], Tensor]) -> Error:
    if isinstance(error, tuple):
        return tuple(_map(part, change) for part in error)
    return None if error is None else change(error)


def _equal(one: Error, other: Error) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    if one is None or other is None:
        return one is other
    return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
