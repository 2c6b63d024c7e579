import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anymask.data import Dataset, Split, split_validation, statistics
from anymask.errors import DataError, SettingError


def numbered(labels: list[int]) -> Split:
    """Images that hold their own number, so that they can be told apart."""
    pixels = torch.arange(len(labels)).reshape(-1, 1)
    images = torch.cat([pixels // 256, pixels % 256], dim=1).to(torch.uint8)
    return Split(images.reshape(-1, 1, 1, 2), torch.tensor(labels, dtype=torch.int64))


def numbers(split: Split) -> list[int]:
    return [256 * high + low for high, low in split.images.reshape(-1, 2).tolist()]


labels_of_two_or_more = st.lists(st.integers(0, 5), min_size=2, max_size=200).filter(lambda labels: len(set(labels)) < len(labels))


@given(labels=labels_of_two_or_more, share=st.floats(0.01, 0.99), seed=st.integers(0, 2**40))
def test_validation_and_train_are_disjoint_complete_in_order_and_stratified(labels, share, seed):
    split = numbered(labels)
    state = torch.get_rng_state()
    train, validation = split_validation(split, share=share, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(numbers(train) + numbers(validation)) == list(range(len(labels)))
    assert numbers(train) == sorted(numbers(train))
    assert [labels[n] for n in numbers(train)] == train.labels.tolist()
    for label in set(labels):
        count = labels.count(label)
        assert (validation.labels == label).sum() == min(count - 1, max(1, round(count * share)))


def test_validation_depends_on_the_seed_alone():
    split = numbered([k % 3 for k in range(300)])
    one, again, other = (numbers(split_validation(split, seed=seed)[1]) for seed in (7, 7, 8))
    assert one == again != other
    torch.manual_seed(5)
    assert numbers(split_validation(split, seed=7)[1]) == one


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(SettingError, match="share came as"):
        split_validation(numbered([0, 0]), share=share, seed=0)


def test_a_validation_split_that_would_be_empty_is_refused():
    with pytest.raises(DataError, match="nothing can be held out"):
        split_validation(numbered([0, 1, 2]), seed=0)


def test_statistics_are_those_of_float64_also_over_several_chunks():
    images = torch.randint(0, 256, (5000, 3, 3, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = images.numpy().astype(np.float64) / 255
    mean, std = statistics(Split(images, torch.zeros(5000, dtype=torch.int64)))
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(axis=(0, 2, 3)), rtol=1e-12)


@pytest.mark.parametrize("value", [0, 37, 255])
def test_std_of_a_constant_channel_is_one(value):
    split = Split(torch.full((3, 1, 7, 7), value, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
    assert statistics(split) == ((pytest.approx(value / 255),), (1.0,))


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 2, 2, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.int64)),
    ],
)
def test_a_split_of_other_types_or_shapes_is_refused(images, labels):
    with pytest.raises(DataError, match="uint8"):
        Split(images, labels)


@pytest.mark.parametrize("test", [numbered([2]), numbered([-1]), Split(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.tensor([0]))])
def test_a_data_set_with_labels_or_shapes_that_do_not_fit_is_refused(test):
    with pytest.raises(DataError, match="2 classes"):
        Dataset("x", ("a", "b"), numbered([0, 1]), test)


def test_an_empty_split_is_refused_in_a_data_set():
    with pytest.raises(DataError, match="0 test images"):
        Dataset("x", ("a",), numbered([0]), numbered([0]).take(torch.tensor([], dtype=torch.int64)))


def test_a_split_pickles():
    split = pickle.loads(pickle.dumps(numbered([0, 1])))
    assert numbers(split) == [0, 1]
