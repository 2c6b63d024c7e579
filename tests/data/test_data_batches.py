import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from anymask.data import Augment, Batches, Split
from anymask.errors import SettingError


def noise(count: int, *, channels: int = 2, height: int = 5, width: int = 7) -> Split:
    """Random images without a black pixel; the label is the number of the image."""
    images = torch.randint(1, 256, (count, channels, height, width), generator=torch.Generator().manual_seed(1))
    return Split(images.to(torch.uint8), torch.arange(count))


def same(one, other) -> bool:
    one, other = list(one), list(other)
    return len(one) == len(other) and all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, other, strict=True))


def shift_and_flip(image: torch.Tensor, original: torch.Tensor, *, pad: int) -> list[tuple[int, int, bool]]:
    """All (top, left, flipped) for which a crop of the padded `original` is `image`."""
    padded = F.pad(original, (pad,) * 4).float() / 255
    _, height, width = original.shape
    found = []
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            crop = padded[:, top : top + height, left : left + width]
            found += [(top, left, flip) for flip in (False, True) if torch.allclose(crop.flip(2) if flip else crop, image, atol=1e-6)]
    return found


def test_augmented_images_are_padded_crops_and_mirrors_of_their_own_image():
    split = noise(60)
    seen = []
    for images, labels in Batches(split, batch_size=16, shuffle=True, augment=Augment(pad=2)).epoch(1):
        for image, label in zip(images, labels, strict=True):
            (drawn,) = shift_and_flip(image, split.images[label], pad=2)
            seen.append(drawn)
    tops, lefts, flips = zip(*seen, strict=True)
    assert set(tops) == set(lefts) == set(range(5))
    assert any(top != left for top, left in zip(tops, lefts, strict=True))
    assert 15 <= sum(flips) <= 45


def test_flip_and_crop_can_be_had_alone():
    split = noise(40)
    flips = [shift_and_flip(*pair, pad=0) for pair in zip(*_first(split, Augment(pad=0)), strict=True)]
    assert {flip for ((_, _, flip),) in flips} == {False, True}
    crops = [shift_and_flip(*pair, pad=1) for pair in zip(*_first(split, Augment(pad=1, flip=False)), strict=True)]
    assert {flip for ((_, _, flip),) in crops} == {False}


def _first(split: Split, augment: Augment) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = next(iter(Batches(split, batch_size=len(split), augment=augment)))
    return images, split.images[labels]


def test_without_augmentation_a_batch_is_the_normalised_split_in_its_order():
    split, mean, std = noise(10), (0.2, 0.7), (0.5, 2.0)
    images = torch.cat([images for images, _ in Batches(split, batch_size=4, mean=mean, std=std)])
    expected = (split.images.double() / 255 - torch.tensor(mean).reshape(2, 1, 1)) / torch.tensor(std).reshape(2, 1, 1)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, expected.float())


def test_padding_is_black_before_normalisation():
    white = Split(torch.full((50, 1, 4, 4), 255, dtype=torch.uint8), torch.zeros(50, dtype=torch.int64))
    images, _ = next(iter(Batches(white, batch_size=50, mean=(0.25,), std=(0.5,), augment=Augment(pad=1))))
    assert sorted(images.unique().tolist()) == [-0.5, 1.5]


@given(
    count=st.integers(1, 40),
    epoch=st.integers(0, 1000),
    data=st.data(),
    batch_size=st.integers(1, 12),
    seed=st.integers(0, 2**40),
    shuffle=st.booleans(),
)
def test_an_epoch_begun_in_its_middle_yields_the_batches_of_the_whole_one(*, count, epoch, data, **settings):
    split = noise(count)
    batches = Batches(split, augment=Augment(pad=1), **settings)
    whole = list(batches.epoch(epoch))
    start = data.draw(st.integers(0, len(batches)))
    resumed = Batches(split, augment=Augment(pad=1), **settings)
    assert same(resumed.epoch(epoch, start=start), whole[start:])
    assert sorted(torch.cat([labels for _, labels in whole]).tolist()) == list(range(count))
    assert len(whole) == len(batches)


def test_an_epoch_depends_on_seed_and_number_only_and_leaves_the_global_generator_alone():
    split = noise(30)
    settings = {"batch_size": 8, "shuffle": True, "augment": Augment(pad=1)}
    batches = Batches(split, **settings)
    second = list(batches.epoch(2))
    state = torch.get_rng_state()
    list(batches.epoch(0))
    half_read = batches.epoch(5)
    next(half_read)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(batches.epoch(2), second)
    assert not same(batches.epoch(3), second)
    for seed, epoch in [(1, 2), (2, 0), (2**32, 2)]:
        assert not same(Batches(split, seed=seed, **settings).epoch(epoch), second)


def test_to_iterate_is_the_next_epoch_each_time_and_to_look_at_the_first_batches_is_none():
    batches = Batches(noise(30), batch_size=8, shuffle=True, augment=Augment(pad=1))
    for epoch in range(3):
        next(iter(batches))
        assert same(itertools.islice(batches, 2), itertools.islice(batches.epoch(epoch), 2))
        assert same([batch for _, batch in zip(range(len(batches)), batches, strict=False)], batches.epoch(epoch))


def test_unshuffled_epochs_keep_their_order_and_draw_new_crops():
    batches = Batches(noise(20), batch_size=20, augment=Augment(pad=2))
    (one, labels), (other, again) = next(batches.epoch(0)), next(batches.epoch(1))
    assert labels.tolist() == again.tolist() == list(range(20))
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("count", "drop_last", "sizes"), [(7, False, [3, 3, 1]), (7, True, [3, 3]), (6, False, [3, 3]), (6, True, [3, 3])])
def test_length_and_sizes_with_and_without_the_last_batch(count, drop_last, sizes):
    batches = Batches(noise(count), batch_size=3, drop_last=drop_last)
    assert [len(labels) for _, labels in batches] == sizes
    assert len(batches) == len(sizes)


@pytest.mark.parametrize("augment", [None, Augment(pad=1)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_format_is_the_one_asked_for_and_changes_no_value(augment, channels_last):
    images, _ = next(iter(Batches(noise(4), batch_size=4, augment=augment, channels_last=channels_last)))
    assert images.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert images.is_contiguous() is not channels_last
    other, _ = next(iter(Batches(noise(4), batch_size=4, augment=augment, channels_last=not channels_last)))
    assert torch.equal(images, other)


def test_batches_do_not_change_the_split():
    split = noise(8)
    before = split.images.clone()
    for images, _ in Batches(split, batch_size=4, augment=Augment(pad=1)):
        images.zero_()
    assert torch.equal(split.images, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_an_accelerator_sees_the_same_batches():
    settings = {"batch_size": 16, "shuffle": True, "augment": Augment(pad=2), "mean": (0.3, 0.4), "std": (0.5, 0.6)}
    for (one, labels), (other, others) in zip(Batches(noise(50), **settings), Batches(noise(50), device="cuda", **settings), strict=True):
        assert labels.tolist() == others.tolist()
        torch.testing.assert_close(one, other.cpu(), rtol=0, atol=1e-6)  # the GPU may fuse the multiplication and the addition


@pytest.mark.parametrize(
    "setting",
    [
        {"batch_size": 0},
        {"batch_size": 9, "drop_last": True},
        {"batch_size": 4, "seed": -1},
        {"batch_size": 4, "mean": (0.5,)},
        {"batch_size": 4, "std": (0.5, 0.0)},
    ],
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(SettingError, match="Allowed"):
        Batches(noise(8), **setting)


def test_pad_epoch_and_start_out_of_range_are_refused_at_once():
    with pytest.raises(SettingError, match="pad came as -1"):
        Augment(pad=-1)
    batches = Batches(noise(8), batch_size=4)
    for number, start in [(-1, 0), (0, -1), (0, 3)]:
        with pytest.raises(SettingError, match="start from 0 to 2"):
            batches.epoch(number, start=start)


@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_that_are_cropped_together_as_on_a_gpu_are_the_same(drop_last, monkeypatch):
    split = Split(torch.randint(256, (23, 1, 4, 4), dtype=torch.uint8), torch.arange(23))
    made = Batches(split, batch_size=3, shuffle=True, augment=Augment(pad=1), drop_last=drop_last, channels_last=True)
    apart = list(made.epoch(2))
    assert len(apart) == len(made)
    for together in (1, 3, 8, 15, 100):
        monkeypatch.setattr("anymask.data.batches._together", lambda _images, n=together: n)
        for start in range(len(made) + 1):
            found = list(made.epoch(2, start=start))
            assert len(found) == len(made) - start
            for (x, y), (images, labels) in zip(found, apart[start:], strict=True):
                assert torch.equal(x, images)
                assert torch.equal(y, labels)
