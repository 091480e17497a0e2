"""What a linear map computes, beside torch's own functions."""

import pickle

import featurizers
import pytest
import torch
from featurizers.errors import ConfigError, FeatureIndexError, ShapeError, UsageError
from featurizers_transcoder import Crosscoder, CrossLayerTranscoder, Transcoder
from torch.nn import functional

from tests.support.site_maps import linear_map

D, N = 6, 10
X = torch.linspace(-2, 3, 5 * D).sin().reshape(5, D)
W_ENC, W_DEC = torch.arange(2.0 * N * D).sin().reshape(2, N, D)
B_ENC, CENTRE = torch.linspace(-1, 1, N), torch.linspace(-1, 2, D)


@pytest.mark.parametrize(
    ("normalize", "oracle"),
    [
        ("none", lambda x: x),
        ("rms", lambda x: functional.rms_norm(x, (D,), eps=1e-6)),
        ("standard", lambda x: functional.layer_norm(x, (D,), eps=1e-6)),
    ],
)
def test_features_are_those_of_torch(normalize, oracle):
    skip = torch.arange(1.0 * D * D).cos().reshape(D, D)
    f = Transcoder.from_weights(W_ENC, W_DEC, B_ENC, CENTRE, skip, normalize=normalize, centre=CENTRE)
    z = torch.relu(functional.linear(oracle(X - CENTRE), W_ENC, B_ENC))
    torch.testing.assert_close(f.encode("features", {"in": X}), z)
    assert (z > 0).any()
    expected = z @ W_DEC + CENTRE + X @ skip  # the skip connection takes the activations as they are
    torch.testing.assert_close(f.decode("out", {"features": z}, {"in": X}), expected)


def test_one_token_and_none_are_decoded_as_many_are():
    f = Transcoder.from_weights(W_ENC, W_DEC, B_ENC, CENTRE)
    change = torch.zeros(5, N).index_fill(-1, torch.tensor([3]), 2.0)  # few enough to be decoded by their rows alone
    expected = change @ W_DEC
    for z, value in ((change, expected), (change[0], expected[0]), (change[:0], expected[:0])):
        torch.testing.assert_close(f.decode_change("out", "features", z), value)
        torch.testing.assert_close(f.decode("out", {"features": z}, {}), value + CENTRE)


def test_a_group_sums_over_its_reads_and_keeps_the_largest():
    f = linear_map(Crosscoder, {0: (["a", "b"], ["a", "b"])}, width=D, n=N, rule="jumprelu")
    x = {"a": X, "b": X.flip(0)}
    pre = sum(x[r] @ f.W_enc["layer-0"][r].T for r in x) + f.b_enc["layer-0"]
    threshold = f.rule_tensors["threshold"]["layer-0"]
    torch.testing.assert_close(f.encode("layer-0", x), torch.where(pre > threshold, pre, 0.0))


def test_a_slice_keeps_the_numbers_of_its_features():
    f = linear_map(CrossLayerTranscoder, {i: ([f"in-{i}"], [f"out-{i}"]) for i in range(2)}, width=D, n=N)
    part = f.take({"layer-1": [7, 2]})
    assert list(part.groups) == ["layer-1"]
    x = {"in-1": X}
    torch.testing.assert_close(part.encode("layer-1", x), f.encode("layer-1", x)[..., [7, 2]])
    assert part.select("layer-1", [2], X).columns.tolist() == [1]
    with pytest.raises(FeatureIndexError, match="feature 3 is not among the 2 of 10"):
        part.select("layer-1", [3], X)
    with pytest.raises(UsageError, match="slice of a map already"):
        part.take({"layer-1": [2]})
    top = Transcoder.from_weights(W_ENC, W_DEC, rule="topk", rule_options={"k": 2})
    with pytest.raises(UsageError, match="compares all features"):
        top.take([1])


def test_a_whole_group_is_taken_whatever_its_rule_is():
    """Its features are compared with each other alone, so that the other groups may be left out or sliced."""
    f = linear_map(CrossLayerTranscoder, {i: ([f"in-{i}"], [f"out-{i}"]) for i in range(3)}, rule="relu")
    config = f.config.model_copy(deep=True)
    config.groups["layer-1"].rule, config.groups["layer-1"].rule_options = "topk", {"k": 2}
    f = CrossLayerTranscoder.from_tensors(config, f.state_dict())
    part, x = f.take({"layer-1": None, "layer-2": [5]}), torch.randn(7, 16)
    assert list(part.groups) == ["layer-1", "layer-2"]
    assert torch.equal(part.encode("layer-1", {"in-1": x}), f.encode("layer-1", {"in-1": x}))
    assert part.take({"layer-2": None}).numbers("layer-2").tolist() == [5]
    with pytest.raises(UsageError, match="compares all features"):
        f.take({"layer-1": [0]})


def test_a_map_is_pickled():
    f = Transcoder.from_weights(W_ENC, W_DEC, B_ENC, rule="jumprelu", threshold=torch.ones(N))
    again = pickle.loads(pickle.dumps(f))
    assert torch.equal(again.encode("features", {"in": X}), f.encode("features", {"in": X}))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Transcoder.from_weights(W_ENC, W_DEC[:3]), ShapeError, r"W_enc must be .* got \(10, 6\) and \(3, 6\)"),
        (lambda: Transcoder.from_weights(W_ENC, W_DEC, torch.zeros(3)), ShapeError, "b_enc.features has shape"),
        (lambda: Transcoder.from_weights(W_ENC, W_DEC, rule="jumprelu"), ConfigError, "threshold.features' is missing"),
        (lambda: Transcoder.from_weights(W_ENC, W_DEC, threshold=B_ENC), ConfigError, "no tensor 'rule_tensors.thresh"),
        (lambda: Transcoder.from_weights(W_ENC, W_DEC, rule="topk"), ConfigError, r"takes the options \['k'\]"),
        (
            lambda: Transcoder.from_weights(W_ENC, W_DEC, rule="groupmax", rule_options={"k": 3}),
            ConfigError,
            "10 features do not make 3 equal groups",
        ),
        (lambda: Transcoder.from_weights(W_ENC, W_DEC, rule="nosuch"), ConfigError, "nosuch"),
        (lambda: Transcoder.from_weights(W_ENC, W_DEC, input_scale=2.0), ConfigError, "belongs to normalize='scale'"),
        (lambda: featurizers.create("transcoder", reads={}, writes={}, groups={}), ConfigError, "reads"),
        (lambda: linear_map(Transcoder, {0: (["in"], ["out"])}), ConfigError, "the group 'features'"),
        (lambda: linear_map(CrossLayerTranscoder, {0: (["a", "b"], ["c"])}), ConfigError, "reads one site"),
        (lambda: linear_map(Crosscoder, {0: (["a"], ["b"])}), ConfigError, "the same sites"),
        (lambda: linear_map(Crosscoder, {0: (["a", "a"], ["a"])}), ConfigError, "names a read twice"),
        (lambda: linear_map(Crosscoder, {0: (["a"], ["a"])}, skips={"a": ["b"]}), ConfigError, "the read 'b'"),
    ],
)
def test_weights_that_do_not_fit_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_sites_in_short_are_there_once_reads_and_writes_are():
    f = linear_map(CrossLayerTranscoder, {i: ([f"in-{i}"], [f"out-{i}"]) for i in range(3)}, width=D, n=N)
    f.reads = {}
    assert f.sites_text is None
    f.reads = {f"in-{i}": f"mlp.in:{i}" for i in range(3)}
    f.writes = {}
    assert f.sites_text is None
    f.writes = {f"out-{i}": f"mlp.out:{i}" for i in range(3)}
    assert f.sites_text == "mlp.in:0 … mlp.in:2 -> mlp.out:0 … mlp.out:2"
