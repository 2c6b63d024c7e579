"""Two halves of data have no image in common, whatever data set an image is in."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from anymask.data import Split
from anymask.data.apart import absent, digests, drawn


def split(pixels: list[list[int]]) -> Split:
    images = torch.tensor(pixels, dtype=torch.uint8).reshape(len(pixels), 1, 2, 2)
    return Split(images, torch.zeros(len(pixels), dtype=torch.int64))


PIXELS = st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=1, max_size=30)


@given(PIXELS, PIXELS, st.floats(0.01, 0.99))
def test_an_image_is_in_the_same_half_in_every_data_set(first: list, second: list, share: float) -> None:
    halves: dict[tuple[int, ...], set[bool]] = {}
    for pixels in (first, second):
        for image, half in zip(pixels, drawn(digests(split(pixels)), share=share).tolist(), strict=True):
            halves.setdefault(tuple(image), set()).add(half)
    assert all(len(half) == 1 for half in halves.values())


@given(PIXELS, PIXELS)
def test_what_is_absent_is_what_the_other_set_has_no_pixels_of(first: list, second: list) -> None:
    assert absent(digests(split(first)), digests(split(second))).tolist() == [image not in second for image in first]


def test_the_share_of_many_images_is_the_one_asked_for() -> None:
    images = torch.arange(20_000, dtype=torch.int32).view(torch.uint8).reshape(-1, 1, 2, 2)
    found = digests(Split(images, torch.zeros(len(images), dtype=torch.int64)))
    assert len(set(found)) == 20_000
    assert abs(float(drawn(found, share=0.3).float().mean()) - 0.3) < 0.015  # 4.6 standard deviations


def test_the_same_bytes_of_another_shape_are_another_image() -> None:
    flat = Split(torch.zeros(1, 1, 1, 4, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    assert digests(flat) != digests(split([[0, 0, 0, 0]]))
