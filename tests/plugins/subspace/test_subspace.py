"""Subspaces and standardization."""

import copy

import featurizers
import pytest
import torch
from featurizers.errors import BasisError, ConfigError, ShapeError
from featurizers.testing import FeaturizerContract
from featurizers_subspace import StandardizeFeaturizer, SubspaceFeaturizer, stiefel


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def off_orthonormal(basis):
    return float((basis.mT @ basis - torch.eye(basis.shape[-1], dtype=basis.dtype)).abs().amax())


class TestSubspace(FeaturizerContract):
    @pytest.fixture
    def featurizer(self):
        return featurizers.create("subspace", d_in=8, n_features=3, seed=5)

    @pytest.fixture
    def activations(self):
        return normal(12, 8)


class TestWholeRotation(TestSubspace):
    @pytest.fixture
    def featurizer(self):
        return featurizers.create("subspace", d_in=8, n_features=8)


class TestStandardize(FeaturizerContract):
    @pytest.fixture
    def featurizer(self):
        return StandardizeFeaturizer.fit(3 * normal(50, 8, seed=1) + 2)

    @pytest.fixture
    def activations(self):
        return 3 * normal(12, 8) + 2


class TestPCA(TestStandardize):
    @pytest.fixture
    def featurizer(self):
        return SubspaceFeaturizer.fit_pca(3 * normal(50, 8, seed=1) + 2, 4, whiten=True)


class TestThreeStages(TestStandardize):
    @pytest.fixture
    def featurizer(self):
        rotation = featurizers.create("subspace", d_in=8, n_features=8)
        pca = SubspaceFeaturizer.fit_pca(3 * normal(50, 8, seed=1) + 2, 5)
        return rotation >> (pca >> featurizers.create("subspace", d_in=5, n_features=2))


class TestConstructors:
    def test_a_seed_gives_the_same_orthonormal_basis_whatever_the_global_seed(self):
        one = featurizers.create("subspace", d_in=64, n_features=7, seed=3)
        torch.manual_seed(99)
        two = featurizers.create("subspace", d_in=64, n_features=7, seed=3)
        assert torch.equal(one.basis, two.basis)
        assert off_orthonormal(one.basis.detach()) < 1e-6
        assert not torch.equal(one.basis, featurizers.create("subspace", d_in=64, n_features=7, seed=4).basis)

    def test_creating_one_leaves_the_global_generator_alone(self):
        torch.manual_seed(7)
        expected = torch.randn(3)
        torch.manual_seed(7)
        featurizers.create("subspace", d_in=8, n_features=2)
        assert torch.equal(torch.randn(3), expected)

    @pytest.mark.parametrize("shape", [(16, 4), (16, 16), (4096, 16)])
    def test_a_given_basis_is_kept(self, shape):
        basis = torch.linalg.qr(normal(*shape))[0]
        f = SubspaceFeaturizer.from_basis(basis)
        assert (f.orthonormal_basis() - basis).abs().amax() < 1e-6
        assert f.basis.data_ptr() != basis.data_ptr()

    @pytest.mark.parametrize(
        ("basis", "words"),
        [
            (normal(16, 4), "orthonormalize=True"),
            (torch.linalg.qr(normal(16, 4))[0].mT, "transposed"),
            (torch.zeros(4, 0), "none"),
            (normal(16), "matrix"),
            (torch.ones(4, 2, dtype=torch.long), "real matrix"),
            (torch.full((4, 2), torch.nan), "NaN"),
        ],
    )
    def test_what_is_not_an_orthonormal_basis_is_refused(self, basis, words):
        with pytest.raises(BasisError, match=words):
            SubspaceFeaturizer.from_basis(basis)

    def test_orthonormalize_gives_the_polar_factor(self):
        w = normal(16, 4)
        u, _, vh = torch.linalg.svd(w, full_matrices=False)
        assert (SubspaceFeaturizer.from_basis(w, orthonormalize=True).basis - u @ vh).abs().amax() < 1e-6
        with pytest.raises(BasisError, match="dependent"):
            SubspaceFeaturizer.from_basis(w[:, [0, 0]], orthonormalize=True)

    def test_directions_span_the_subspace_and_stay_with_their_features(self):
        directions = normal(3, 16) * torch.tensor([[1.0], [50.0], [0.01]])
        f = SubspaceFeaturizer.from_directions(directions)
        _, error = f.featurize(directions)
        assert (error.norm(dim=-1) / directions.norm(dim=-1)).amax() < 1e-5
        assert (f.encode(directions) / directions.norm(dim=-1, keepdim=True)).diagonal().amin() > 0.7
        with pytest.raises(BasisError, match="dependent"):
            SubspaceFeaturizer.from_directions(directions[[0, 0]])
        with pytest.raises(BasisError, match="zero"):
            SubspaceFeaturizer.from_directions(torch.zeros(1, 16))

    def test_pca_coordinates_are_centred_uncorrelated_and_largest_first(self):
        x = normal(500, 8) @ torch.diag(torch.arange(8.0, 0, -1)) + 100
        pca = SubspaceFeaturizer.fit_pca(x, 3)
        assert [stage.kind for stage in pca.stages] == ["standardize", "subspace"]
        z = pca.collect(x).double()
        assert z.mean(dim=0).abs().amax() < 1e-3
        covariance = z.T @ z / len(z)
        assert (covariance - torch.diag(covariance.diagonal())).abs().amax() < 1e-2
        expected = torch.linalg.eigvalsh(torch.cov(x.double().T, correction=0)).flip(0)[:3]
        torch.testing.assert_close(covariance.diagonal(), expected, rtol=1e-3, atol=1e-3)

    def test_the_mean_is_a_stage_so_that_ablating_pca_moves_to_the_mean(self):
        x = normal(500, 8) + 100
        pca = SubspaceFeaturizer.fit_pca(x, 8)
        torch.testing.assert_close(pca.ablate(x[:3]), x.mean(dim=0).expand(3, -1), rtol=1e-5, atol=1e-3)

    def test_svd_is_uncentred(self):
        x = normal(50, 8) + 3
        _, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
        overlap = (SubspaceFeaturizer.from_svd(x, 2).basis.double().T @ vh[:2].T).abs()
        torch.testing.assert_close(overlap, torch.eye(2, dtype=torch.float64), rtol=1e-5, atol=1e-5)
        with pytest.raises(BasisError):
            SubspaceFeaturizer.from_svd(x[:3], 4)

    @pytest.mark.parametrize("config", [{"d_in": 4, "n_features": 5}, {"d_in": 0, "n_features": 0}, {"d_in": 4}])
    def test_impossible_sizes_are_refused(self, config):
        with pytest.raises(ConfigError):
            featurizers.create("subspace", **config)

    def test_statistics_that_are_none_are_refused(self):
        with pytest.raises(BasisError):
            StandardizeFeaturizer.from_statistics(torch.zeros(3), torch.tensor([1.0, 0.0, 1.0]))
        with pytest.raises(ShapeError):
            StandardizeFeaturizer.from_statistics(torch.zeros(3), torch.ones(4))
        with pytest.raises(ShapeError):
            StandardizeFeaturizer.fit(torch.zeros(0, 4))

    def test_widths_are_checked_where_stages_meet(self):
        a, b = (featurizers.create("subspace", d_in=8, n_features=4, seed=s) for s in (0, 1))
        with pytest.raises(ShapeError, match=r"4 features.*takes 8"):
            a >> b


class TestStiefel:
    """The polar factor and its gradient, compared with torch's decomposition and with finite differences."""

    def test_polar_is_that_of_the_singular_value_decomposition(self):
        w = normal(3, 9, 4, dtype=torch.float64)
        u, _, vh = torch.linalg.svd(w, full_matrices=False)
        torch.testing.assert_close(stiefel.polar(w), u @ vh)

    def test_the_retraction_gives_the_polar_factor_and_leaves_what_is_orthonormal(self):
        w = normal(200, 16) / 14
        expected = stiefel.polar(w)
        stiefel.retract_(w)
        torch.testing.assert_close(w, expected, rtol=1e-5, atol=1e-6)
        assert off_orthonormal(w) < 5e-6
        before = w.clone()
        stiefel.retract_(w)
        assert torch.equal(w, before)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_the_retraction_of_a_matrix_in_half_precision_is_the_exact_one_rounded(self, dtype):
        w = (normal(64, 6) * torch.linspace(0.5, 2, 6)).to(dtype)
        u, _, vh = torch.linalg.svd(w.double(), full_matrices=False)
        stiefel.retract_(w)
        assert w.dtype == dtype
        torch.testing.assert_close(w.double(), u @ vh, rtol=torch.finfo(dtype).eps, atol=1e-6)

    def test_gradients_equal_finite_differences(self):
        w = normal(7, 3, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(stiefel.polar, (w,), check_forward_ad=True)

    def test_the_tangent_gradient_is_that_of_polar_on_the_manifold(self):
        q = torch.linalg.qr(normal(9, 4, dtype=torch.float64))[0].requires_grad_()
        weight = normal(9, 4, seed=1, dtype=torch.float64)
        tangent, polar = (torch.autograd.grad((f(q) * weight).sum(), q)[0] for f in (stiefel.tangent, stiefel.polar))
        torch.testing.assert_close(tangent, polar)
        along = q.detach().T @ tangent
        torch.testing.assert_close(along, -along.T)  # a tangent vector


class TestTraining:
    def test_one_step_is_riemannian_gradient_descent(self):
        f = featurizers.create("subspace", d_in=10, n_features=3)
        base, source, target = (normal(6, 10, seed=s) for s in range(3))
        q = f.basis.detach().clone().double().requires_grad_()
        out = base.double() + ((source.double() - base.double()) @ q) @ q.T
        (g,) = torch.autograd.grad((out - target.double()).pow(2).sum(), q)
        q = q.detach()
        g = g - q @ (q.T @ g + g.T @ q) / 2
        u, _, vh = torch.linalg.svd(q - 0.01 * g, full_matrices=False)

        optimizer = torch.optim.SGD(f.parameters(), lr=0.01)
        (f.interchange(base, source) - target).pow(2).sum().backward()
        optimizer.step()
        torch.testing.assert_close(f.orthonormal_basis().double(), u @ vh, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        "optimizer",
        [
            lambda p: torch.optim.SGD(p, lr=1.0, weight_decay=0.9),
            lambda p: torch.optim.AdamW(p, lr=0.3, weight_decay=1.0),
            lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, nesterov=True),
        ],
        ids=["sgd", "adamw", "momentum"],
    )
    def test_the_basis_stays_orthonormal_under_any_optimizer_and_decay(self, optimizer):
        f = featurizers.create("subspace", d_in=32, n_features=5)
        base, source, target = (normal(8, 32, seed=s) for s in range(3))
        steps = optimizer(f.parameters())
        for _ in range(30):
            steps.zero_grad()
            (f.interchange(base, source) - target).pow(2).mean().backward()
            steps.step()
            assert off_orthonormal(f.orthonormal_basis().detach()) < 1e-5
        assert off_orthonormal(f.state_dict()["basis"]) < 1e-5

    def test_finds_the_subspace_that_carries_a_variable(self):
        true = torch.linalg.qr(normal(20, 2))[0]
        f = featurizers.create("subspace", d_in=20, n_features=2)
        optimizer = torch.optim.Adam(f.parameters(), lr=0.05)
        for step in range(300):
            base, source = normal(64, 20, seed=2 * step), normal(64, 20, seed=2 * step + 1)
            optimizer.zero_grad()
            (f.interchange(base, source) - (base + ((source - base) @ true) @ true.T)).pow(2).mean().backward()
            optimizer.step()
        overlap = torch.linalg.svdvals(f.orthonormal_basis().detach().T @ true)
        assert overlap.amin() > 0.999

    def test_the_retraction_runs_once_a_step_however_often_the_basis_is_used(self, monkeypatch):
        f = featurizers.create("subspace", d_in=16, n_features=3)
        calls = []
        original = stiefel.retract_
        monkeypatch.setattr(stiefel, "retract_", lambda w: (calls.append(1), original(w))[1])
        base, source = normal(4, 16), normal(4, 16, seed=1)
        optimizer = torch.optim.SGD(f.parameters(), lr=0.5)
        f.encode(base)
        assert len(calls) == 1
        for step in range(3):
            optimizer.zero_grad()
            for _ in range(5):
                f.interchange(base, source).sum().backward()
            optimizer.step()
            f.encode(base)
            assert len(calls) == step + 2

    def test_gradients_accumulate_over_several_backward_passes(self):
        f = featurizers.create("subspace", d_in=16, n_features=3)
        base, source, weight = (normal(4, 16, seed=s) for s in range(3))
        (f.interchange(base, source) * weight).sum().backward()
        once = f.basis.grad.clone()
        (f.interchange(base, source) * weight).sum().backward()
        torch.testing.assert_close(f.basis.grad, 2 * once)

    def test_a_step_between_forward_and_backward_is_an_error_not_a_wrong_gradient(self):
        f = featurizers.create("subspace", d_in=16, n_features=3)
        loss = f.interchange(normal(4, 16), normal(4, 16, seed=1)).sum()
        with torch.no_grad():
            f.basis.add_(1.0)
        with pytest.raises(RuntimeError, match=r"in place|inplace"):
            loss.backward()

    def test_a_frozen_basis_gets_no_gradient_and_thaws(self):
        f = featurizers.create("subspace", d_in=16, n_features=3)
        f.requires_grad_(False)
        x = normal(4, 16)
        assert not f.encode(x).requires_grad
        f.requires_grad_(True)
        assert f.encode(x).requires_grad
        with torch.no_grad():
            assert not f.encode(x).requires_grad

    def test_a_new_parameter_is_never_taken_for_the_old_one(self):
        f = featurizers.create("subspace", d_in=16, n_features=3).requires_grad_(False)
        x = normal(4, 16)
        for seed in range(50):
            f.basis = torch.nn.Parameter(torch.linalg.qr(normal(16, 3, seed=seed))[0], requires_grad=False)
            assert torch.equal(f.encode(x), x @ f.basis)
        f.basis.data = torch.linalg.qr(normal(16, 3, seed=99))[0]
        assert torch.equal(f.encode(x), x @ f.basis)
        f.basis.data.copy_(torch.linalg.qr(normal(16, 3, seed=98))[0])
        assert torch.equal(f.encode(x), x @ f.basis)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_trains_beside_a_model_of_low_precision(self, dtype):
        f = featurizers.create("subspace", d_in=16, n_features=3)
        base, source = normal(4, 16).to(dtype), normal(4, 16, seed=1).to(dtype)
        out = f.interchange(base, source)
        assert out.dtype == dtype
        out.float().pow(2).sum().backward()
        assert f.basis.grad.dtype == torch.float32
        assert f.basis.grad.abs().amax() > 0

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_may_be_cast_itself(self, dtype):
        f = featurizers.create("subspace", d_in=64, n_features=8).to(dtype)
        x, y = normal(4, 64).to(dtype), normal(4, 64, seed=1).to(dtype)
        assert f.encode(x).dtype == dtype
        assert torch.equal(f.interchange(x, x.clone()), x)
        optimizer = torch.optim.SGD(f.parameters(), lr=0.5)
        f.interchange(x, y).pow(2).mean().backward()
        optimizer.step()
        basis = f.orthonormal_basis().detach().double()
        assert off_orthonormal(basis) < max(1e-6, 2 * torch.finfo(dtype).eps)

    def test_deepcopy_after_use_is_independent(self):
        f = featurizers.create("subspace", d_in=16, n_features=3)
        x = normal(4, 16)
        f.encode(x).sum().backward()
        g = copy.deepcopy(f)
        with torch.no_grad():
            g.basis.copy_(torch.linalg.qr(normal(16, 3, seed=9))[0])
        assert not torch.equal(g.encode(x), f.encode(x))

    def test_functional_call_sees_the_parameter_it_was_given_and_leaves_both_alone(self):
        f = featurizers.create("subspace", d_in=16, n_features=3)
        x, own = normal(4, 16), f.basis.detach().clone()
        w = normal(16, 3, seed=2)
        before = w.clone()
        features, _ = torch.func.functional_call(f, {"basis": w}, (x,))
        torch.testing.assert_close(features, x @ stiefel.polar(w))
        assert torch.equal(w, before)
        assert torch.equal(f.basis, own)

    def test_torch_func_grad_vmap_and_jvp_agree_with_autograd(self):
        f = featurizers.create("subspace", d_in=16, n_features=3)
        x, ws = normal(4, 16), normal(5, 16, 3, seed=2)

        def loss(w):
            return torch.func.functional_call(f, {"basis": w}, (x,))[0].pow(3).sum()

        stacked = torch.func.vmap(torch.func.grad(loss))(ws)
        for w, g in zip(ws.clone().requires_grad_().unbind(), stacked, strict=True):
            torch.testing.assert_close(torch.autograd.grad(loss(w), w)[0], g, rtol=1e-4, atol=1e-4)
        direction = normal(16, 3, seed=3)
        _, slope = torch.func.jvp(loss, (ws[0],), (direction,))
        torch.testing.assert_close(slope, (stacked[0] * direction).sum(), rtol=1e-3, atol=1e-3)

    def test_torch_func_over_activations_leaves_no_trace(self):
        f = featurizers.create("subspace", d_in=16, n_features=3)
        x = normal(4, 16)
        with torch.no_grad():
            f.basis.mul_(2)  # as an optimizer step would; the first use is inside torch.func
        torch.func.grad(lambda x: f.encode(x).sum())(x)
        f.encode(x).sum().backward()
        assert off_orthonormal(f.orthonormal_basis().detach()) < 1e-5
        assert f.basis.grad is not None


def test_the_shapes_in_signatures_are_checked_while_testing():
    import jaxtyping

    f = featurizers.create("subspace", d_in=8, n_features=3)
    with pytest.raises(jaxtyping.TypeCheckError):
        f.apply_edit(torch.zeros(4, 8), torch.zeros(4, 3), torch.zeros(4, 2))


class TestAutocast:
    """Autocast is on around the model; what a subspace computes is the same as without it."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_the_basis_stays_orthonormal_and_is_put_back_once(self, dtype):
        f = featurizers.create("subspace", d_in=64, n_features=16)
        optimizer = torch.optim.SGD(f.parameters(), lr=0.5)
        base, source, target = (normal(8, 64, seed=s) for s in range(3))
        for _ in range(3):
            with torch.autocast("cpu", dtype):
                (f.interchange(base, source) - target).pow(2).sum().backward()
            optimizer.step()
            with torch.autocast("cpu", dtype):
                basis = f.orthonormal_basis().detach().clone()
                stiefel.retract_(f.basis)
            assert off_orthonormal(basis.double()) < 1e-5
            assert torch.equal(f.basis, basis)

    def test_a_step_of_training_is_that_without_autocast(self):
        found = []
        for on in (True, False):
            f = featurizers.create("subspace", d_in=64, n_features=16, seed=3)
            optimizer = torch.optim.SGD(f.parameters(), lr=0.5)
            base, source, target = (normal(8, 64, seed=s) for s in range(3))
            with torch.autocast("cpu", torch.bfloat16, enabled=on):
                loss = (f.interchange(base, source) - target).pow(2).sum()
            loss.backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=on):
                optimizer.step()
                found.append([f.basis.grad, f.encode(base), f.interchange(base, source), *f.featurize(base)])
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)

    def test_the_polar_factor_is_that_without_autocast(self):
        w, direction = normal(32, 4), normal(32, 4, seed=1)
        expected = torch.func.vjp(stiefel.polar, w)[1](direction)[0], torch.func.jvp(stiefel.polar, (w,), (direction,))
        with torch.autocast("cpu", torch.bfloat16):
            found = torch.func.vjp(stiefel.polar, w)[1](direction)[0], torch.func.jvp(stiefel.polar, (w,), (direction,))
            deviation = stiefel.deviation(stiefel.polar(w))
        assert torch.equal(found[0], expected[0])
        assert all(map(torch.equal, found[1], expected[1]))
        assert deviation < 1e-5

    def test_features_are_those_of_the_formula_in_single_precision(self):
        f = featurizers.create("subspace", d_in=64, n_features=16)
        x = normal(8, 64) * 100
        with torch.autocast("cpu", torch.bfloat16):
            features, error = f.featurize(x)
            inside, again = f.inverse_featurize(features, None), f.encode(x)
            seen = []
            f.splice(x, seen.append)
        q = f.basis.detach().numpy()
        for found, expected in (
            (features, x.numpy() @ q),
            (again, x.numpy() @ q),
            (seen[0], x.numpy() @ q),
            (inside, x.numpy() @ q @ q.T),
            (inside + error, x.numpy()),
        ):
            torch.testing.assert_close(found.detach(), torch.from_numpy(expected), rtol=1e-5, atol=1e-3)


def test_tensors_of_the_caller_stay_the_callers():
    basis, mean, std = torch.linalg.qr(normal(8, 3))[0].contiguous(), normal(8), torch.ones(8)
    f, g = SubspaceFeaturizer.from_basis(basis), StandardizeFeaturizer.from_statistics(mean, std)
    kept = f.basis.detach().clone(), g.mean.clone(), g.std.clone()
    for tensor in (basis, mean, std):
        tensor.mul_(3.0)
    for tensor, before in zip((f.basis, g.mean, g.std), kept, strict=True):
        assert torch.equal(tensor, before)
