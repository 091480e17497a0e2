"""Names of tuned-lens: signatures, field order, and what its own test checks of `remove_subspace`."""

import inspect

import pytest
import torch
from featurizers.errors import ShapeError, UsageError
from featurizers_causal_basis import compat, white_box
from featurizers_causal_basis.lens import ExternalLens

from tests.support.models import LAYERS, WIDTH, hooked, module_of, prompts, read, tiny_model

SIGNATURES = {  # of tuned-lens 0.2.0
    "ablate_subspace": ["model", "A", "layer_index", "mode=zero", "orthonormal=False"],
    "derange": ["batch", "generator=None"],
    "extract_causal_bases": ["lens", "hiddens", "k", "*labels=None", "*max_iter=100", "*mode=mean"],
    "remove_subspace": ["u", "A", "mode=zero", "orthonormal=False"],
    "sample_derangement": ["n", "device=cpu", "generator=None"],
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_tuned_lens(name):
    signature = [
        ("*" if p.kind is p.KEYWORD_ONLY else "") + p.name + ("" if p.default is p.empty else f"={p.default}")
        for p in inspect.signature(getattr(compat, name)).parameters.values()
    ]
    assert signature == SIGNATURES[name]


def test_fields_are_in_the_order_of_tuned_lens():
    assert compat.CausalBasis._fields == ("energies", "vectors")


@pytest.mark.parametrize("d", [1, 2, 40, 101])
def test_inner_products_with_the_columns_become_zero_or_their_mean(d):
    u = normal(10, d)
    for k in range(1, d, 13):
        a = normal(d, k, seed=k)
        torch.testing.assert_close(compat.remove_subspace(u, a) @ a, torch.zeros(10, k, dtype=torch.float64))
        mean = (u @ a).mean(dim=0, keepdim=True).expand(10, k)
        torch.testing.assert_close(compat.remove_subspace(u, a, mode="mean") @ a, mean)


def test_randomness_is_torchs_global_generator():
    u, a = normal(20, 6), normal(6, 2)
    torch.manual_seed(3)
    first = compat.remove_subspace(u, a, "resample"), compat.derange(u), compat.sample_derangement(5)
    torch.manual_seed(3)
    again = compat.remove_subspace(u, a, "resample"), compat.derange(u), compat.sample_derangement(5)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(compat.derange(u), first[1])
    own = [compat.derange(u, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*own)
    for call in (
        lambda: compat.remove_subspace(u[:1], a, "mean"),
        lambda: compat.remove_subspace(u[:1], a, "resample"),
        lambda: compat.remove_subspace(u, a, "median"),
        lambda: compat.remove_subspace(u, a[1:]),
        lambda: compat.sample_derangement(1),
    ):
        with pytest.raises(ValueError):  # noqa: PT011  # the class that tuned-lens raises; other tests check the messages
            call()


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "gpt_neo"])
def test_it_is_the_output_of_the_block_that_is_ablated(architecture):
    model, ids, v = tiny_model(architecture), prompts(2, 5), normal(WIDTH).float()
    module, side = module_of(model, architecture, "resid.post", 1)
    one = v / v.norm()
    with torch.no_grad():
        with hooked(module, side, lambda h: h - (h @ one)[..., None] * one):
            expected = model(ids).logits
        with compat.ablate_subspace(model, v, 1) as same:
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert same is model


# ---------------------------------------------------------------------- extraction


class Unembed(torch.nn.Module):
    """A final norm and the unembedding, named as in tuned-lens."""

    def __init__(self, d, vocabulary):
        super().__init__()
        self.final_norm = torch.nn.LayerNorm(d)
        self.unembedding = torch.nn.Linear(d, vocabulary, bias=False)


class Lens(torch.nn.Module):
    """A linear translator for each layer and the unembedding, as in tuned-lens."""

    def __init__(self, d=12, vocabulary=30, layers=2, translated=True):
        super().__init__()
        self.unembed = Unembed(d, vocabulary)
        self.translators = torch.nn.ModuleList(torch.nn.Linear(d, d) for _ in range(layers if translated else 0))
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_(normal(*parameter.shape, seed=number + 40) * 0.7)
        self.double()

    def transform_hidden(self, h, idx):
        return h + self.translators[idx](h) if len(self.translators) else h

    def forward(self, h, idx):
        return self.unembed.unembedding(self.unembed.final_norm(self.transform_hidden(h, idx)))


def energy(lens, h, v, layer, centre):
    """Return the mean over tokens of KL(p(h) ‖ p(h - v vᵀ(h - m)))."""
    with torch.no_grad():
        p = lens(h, layer).log_softmax(-1)
        q = lens(h - ((h - centre) @ v)[..., None] * v, layer).log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("translated", [False, True])
@pytest.mark.parametrize("mode", ["mean", "zero"])
def test_bases_of_a_lens_object_are_those_of_its_divergences(translated, mode):
    lens = Lens(translated=translated)
    hiddens = [normal(3, 20, 12, seed=i) + 0.5 for i in range(3)]  # the last gets no basis
    bases = list(compat.extract_causal_bases(lens, hiddens, 3, mode=mode))
    assert len(bases) == 2
    for layer, basis in enumerate(bases):
        centre = hiddens[layer].flatten(0, 1).mean(0) if mode == "mean" else torch.zeros(12, dtype=torch.float64)
        for value, v in zip(basis.energies.tolist(), basis.vectors.mT, strict=True):
            assert value == pytest.approx(energy(lens, hiddens[layer], v, layer, centre), rel=1e-6)
        torch.testing.assert_close(basis.vectors.mT @ basis.vectors, torch.eye(3, dtype=torch.float64))
        assert basis.energies.tolist() == sorted(basis.energies.tolist(), reverse=True)
        others = torch.nn.functional.normalize(normal(200, 12, seed=8), dim=-1)
        assert basis.energies[0] > max(energy(lens, hiddens[layer], v, layer, centre) for v in others)
    assert all(parameter.requires_grad for parameter in lens.parameters())


def test_a_lens_without_a_closed_form_gives_the_same_energies():
    lens, hiddens = Lens(), [normal(40, 12, seed=i) for i in range(3)]
    formula = ExternalLens(lens).affine_norm(1)
    torch.testing.assert_close(formula.log_probs(hiddens[1]), lens(hiddens[1], 1).log_softmax(-1).detach())
    wrapped = lens.forward  # a function without the attributes of a lens
    assert ExternalLens(wrapped).affine_norm(1) is None
    for short, long in zip(
        compat.extract_causal_bases(lens, hiddens, 2), compat.extract_causal_bases(wrapped, hiddens, 2), strict=True
    ):
        torch.testing.assert_close(short.energies, long.energies, rtol=1e-5, atol=0)

    class Scaled(Lens):
        def forward(self, h, idx):
            return 2 * super().forward(h, idx)

    assert ExternalLens(Scaled()).affine_norm(0) is None  # its parts do not add up to it


def test_unsupported_arguments_are_refused():
    lens, hiddens = Lens(), [normal(5, 12)] * 3
    with pytest.raises(UsageError, match="leave labels out"):
        next(compat.extract_causal_bases(lens, hiddens, 2, labels=torch.zeros(5, dtype=torch.long)))
    with pytest.raises(UsageError, match="two layers"):
        next(compat.extract_causal_bases(lens, hiddens[:1], 2))
    with pytest.raises(UsageError, match="at most 12"):
        next(compat.extract_causal_bases(lens, hiddens, 13))
    with pytest.raises(ShapeError, match="must return one row of logits for each activation"):
        next(compat.extract_causal_bases(lambda h, idx: lens(h[:1], idx), hiddens, 1))
    assert next(compat.extract_causal_bases(lens, hiddens, 0, max_iter=2)).energies.shape == (12,)


def test_the_first_published_names():
    assert white_box.CausalBasis._fields == ("basis", "energies")
    lens, hiddens = Lens(), [normal(30, 12, seed=i) for i in range(3)]
    bases = white_box.extract_causal_bases(lens, hiddens, 2)
    assert len(bases) == 2
    for layer, basis in enumerate(bases):
        mean = hiddens[layer].mean(0)
        expected = [energy(lens, hiddens[layer], v, layer, mean) for v in basis.basis.mT]
        assert basis.energies.tolist() == pytest.approx(expected, rel=1e-6)
    # a decoder of one argument, and vectors below an energy dropped
    decoder = lambda h: lens(h, 0)  # noqa: E731
    first = white_box.extract_causal_bases(decoder, hiddens[:2], 2)[0]
    torch.testing.assert_close(first.energies, bases[0].energies, rtol=1e-4, atol=0)
    between = float(first.energies.mean())
    assert white_box.extract_causal_bases(decoder, hiddens[:2], 2, min_energy=between)[0].basis.shape == (12, 1)
    with pytest.raises(UsageError, match="two layers"):
        white_box.extract_causal_bases(lens, hiddens[:1], 2)


def test_the_first_published_names_take_a_whole_model():
    model, ids = tiny_model("gpt2"), prompts(2, 5)
    bases = white_box.extract_causal_bases(model, ids, 1, max_iter=2)
    assert len(bases) == LAYERS
    module, side = module_of(model, "gpt2", "resid.pre", 1)
    hidden = read(model, module, side, input_ids=ids)
    v, mean = bases[1].basis[:, 0], hidden.flatten(0, 1).mean(0)
    with torch.no_grad():
        p = model(ids).logits.double().log_softmax(-1)
        with hooked(module, side, lambda h: h - ((h - mean) @ v)[..., None] * v):
            q = model(ids).logits.double().log_softmax(-1)
    assert float(bases[1].energies[0]) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
