"""Every form of indices compared with a plain reference."""

from __future__ import annotations

import featurizers
import pytest
import torch
from featurizers.errors import FeatureIndexError, UsageError
from featurizers.features.indices import Selection, select
from hypothesis import given
from hypothesis import strategies as st

torch.set_num_threads(1)

N = 6
some = st.lists(st.integers(0, N - 1), unique=True)
rows = st.lists(some, min_size=1, max_size=4)
flags = st.lists(st.booleans(), min_size=N, max_size=N)


def chosen(selection: Selection, batch: int = 1, n: int = N) -> list[list[int]]:
    """Return the features that a selection means for each example, in ascending order."""
    if selection.is_everything:
        return [list(range(n))] * batch
    mask = selection.mask_for(torch.zeros(batch, n))
    assert mask.dtype == torch.bool
    return [[i for i, on in enumerate(row) if on] for row in mask.expand(batch, n).tolist()]


@given(
    some,
    st.sampled_from(
        [list, tuple, lambda x: torch.tensor(x, dtype=torch.long), lambda x: torch.tensor(x, dtype=torch.int32)]
    ),
)
def test_numbers_mean_themselves_in_their_order(numbers, form):
    selection = select(form(numbers), N)
    assert selection.columns.tolist() == numbers
    assert selection.columns.dtype == torch.long
    assert chosen(selection) == [sorted(numbers)]


@given(rows)
def test_a_list_for_each_example(numbers):
    assert chosen(select(numbers, N), len(numbers)) == [sorted(row) for row in numbers]
    assert chosen(select(tuple(map(tuple, numbers)), N), len(numbers)) == [sorted(row) for row in numbers]


@given(
    st.integers(0, 4).flatmap(
        lambda k: st.lists(st.permutations(range(N)).map(lambda p: p[:k]), min_size=1, max_size=4)
    )
)
def test_a_tensor_of_two_axes_is_a_row_for_each_example(numbers):
    tensor = torch.tensor(numbers, dtype=torch.long).reshape(len(numbers), -1)
    assert chosen(select(tensor, N), len(numbers)) == [sorted(row) for row in numbers]


@given(flags, st.booleans())
def test_booleans_mean_where_they_are_true(mask, as_list):
    selection = select(mask if as_list else torch.tensor(mask), N)
    assert selection.as_columns().tolist() == [i for i, on in enumerate(mask) if on]
    assert chosen(selection) == [[i for i, on in enumerate(mask) if on]]


@given(st.lists(flags, min_size=1, max_size=4))
def test_booleans_of_two_axes_are_a_row_for_each_example(mask):
    assert chosen(select(torch.tensor(mask), N), len(mask)) == [[i for i, on in enumerate(row) if on] for row in mask]


ends = st.none() | st.integers(-9, 9)


@given(ends, ends, st.none() | st.integers(1, 4))
def test_a_slice_is_that_of_a_list(start, stop, step):
    assert select(slice(start, stop, step), N).columns.tolist() == list(range(N))[start:stop:step]


def test_a_slice_that_goes_backwards_is_that_of_a_list():
    assert select(slice(None, None, -1), N).columns.tolist() == list(range(N))[::-1]


def test_a_range_is_its_numbers():
    assert select(range(4, 0, -2), N).columns.tolist() == [4, 2]


def test_none_is_every_feature_and_an_empty_list_is_none():
    assert select(None, N).is_everything
    for nothing in ([], (), slice(0, 0), torch.zeros(0, dtype=torch.long), torch.zeros(N, dtype=torch.bool)):
        selection = select(nothing, N)
        assert not selection.is_everything
        assert selection.as_columns().tolist() == []
    assert chosen(select([[], []], N), 2) == [[], []]
    assert chosen(select(torch.zeros(2, 0, dtype=torch.long), N), 2) == [[], []]


def test_a_checked_selection_is_returned_as_it_is():
    selection = select([1], N)
    assert select(selection, N) is selection


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([N], f"feature index {N} is out of range: there are {N} features, 0 to {N - 1}"),
        ([-1], "feature index -1 is out of range"),
        ([0, 99, -3], "feature index -3 is out of range"),
        (torch.tensor([2, N]), "out of range"),
        ([[0], [N]], "out of range"),
        ([1, 1], "repeated"),
        ([[0], [2, 2]], "repeated"),
        (torch.tensor([[0, 0]]), "repeated"),
        ([0.0], "list of integers"),
        (torch.zeros(2), "list of integers"),
        (torch.zeros(2, dtype=torch.complex64), "list of integers"),
        ([[0.0]], "list of integers"),
        (3, "list of integers"),
        (torch.tensor(3), "list of integers"),
        (torch.zeros(1, 1, 1, dtype=torch.long), "list of integers"),
        (["a"], "integers"),
        ("ab", "integers"),
        ([None], "integers"),
        ({1, 2}, "integers"),
        ([0, [1]], "integers"),
        ([[True, False]], "must be a list of integers"),
        ([[[0]]], "integers"),
        ([2**70], "integers"),
        (torch.ones(N - 1, dtype=torch.bool), "does not fit"),
        (torch.ones(N, 1, dtype=torch.bool), "does not fit"),
        (torch.ones(1, 1, N, dtype=torch.bool), "boolean mask|list of integers"),
        ([True], "does not fit"),
        ([[0], 1], "integers"),
        ([[0], "ab"], "integers"),
    ],
)
def test_anything_else_is_refused(indices, message):
    with pytest.raises(FeatureIndexError, match=message):
        select(indices, N)


@pytest.mark.parametrize("indices", [{}, {"out": [0]}])
def test_indices_by_group_are_for_maps(indices):
    with pytest.raises(UsageError, match="indices by group are for maps between sites; of a featurizer give a list"):
        select(indices, N)


@given(rows, st.integers(0, 2))
def test_rows_broadcast_over_the_axes_between_batch_and_features(numbers, between):
    features = torch.zeros(len(numbers), *[3] * between, N)
    mask = select(numbers, N).mask_for(features).expand_as(features)
    for example, row in enumerate(numbers):
        assert all(line.nonzero().flatten().tolist() == sorted(row) for line in mask[example].reshape(-1, N))


@given(some)
def test_shared_numbers_broadcast_over_everything(numbers):
    features = torch.zeros(2, 3, N)
    mask = select(numbers, N).mask_for(features).expand_as(features)
    assert all(line.nonzero().flatten().tolist() == sorted(numbers) for line in mask.reshape(-1, N))


@pytest.mark.parametrize("shape", [(3, N), (1, 4, N), (N,)])
def test_rows_for_another_batch_are_refused(shape):
    with pytest.raises(FeatureIndexError, match="indices are given for 2 examples"):
        select([[0], [1]], N).mask_for(torch.zeros(shape))


def test_a_list_of_tensors_gives_each_example_its_own():
    assert torch.equal(select([torch.tensor([0]), torch.tensor([1, 2])], N).mask, select([[0], [1, 2]], N).mask)


def test_an_enormous_index_takes_no_memory():
    assert select([2**31 - 1, 5], 2**31).columns.tolist() == [2**31 - 1, 5]
    with pytest.raises(FeatureIndexError, match="repeated"):
        select([2**31 - 1, 5, 2**31 - 1], 2**31)


@pytest.mark.parametrize("wrong", [slice(0, 3, 0), slice("a", 3), slice(0.5, 3), slice(None, None, 1.0)], ids=str)
def test_a_slice_that_is_none_of_a_list_is_refused(wrong):
    with pytest.raises(FeatureIndexError, match="is not a slice of integers"):
        select(wrong, 8)
    part = featurizers.DictionaryFeaturizer.from_tensors(torch.eye(8), torch.eye(8)).take([1, 2])
    with pytest.raises(FeatureIndexError, match="is not a slice of integers"):
        part.collect(torch.ones(1, 8), wrong)
