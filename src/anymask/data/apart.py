"""Data in two halves that have no image in common, told by the images themselves."""

import hashlib
from collections.abc import Collection

import torch
from torch import Tensor

from anymask.data.splits import Split


def digests(split: Split) -> list[bytes]:
    """16 bytes for each image, in their order: equal for equal pixels and shapes, whatever data set they are in.

    Example:
        >>> split = Split(torch.tensor([0, 0, 1], dtype=torch.uint8).reshape(3, 1, 1, 1), torch.tensor([0, 1, 1]))
        >>> first, second, third = digests(split)
        >>> first == second, first == third
        (True, False)
    """
    shape = str(tuple(split.images.shape[1:])).encode()
    return [hashlib.blake2b(image.data, digest_size=16, key=shape).digest() for image in split.images.contiguous().numpy()]


def drawn(found: Collection[bytes], *, share: float) -> Tensor:
    """Which images of these digests are in the first of two halves: bool `(N,)`, about `share` of them True.

    An image is drawn by its digest, so it is in the same half in every data set that holds it, and so is its double.

    Example:
        >>> drawn([bytes(16), b"\\xff" * 16], share=0.5).tolist()
        [True, False]
    """
    return torch.tensor([int.from_bytes(digest[:8], "big") < share * 2**64 for digest in found], dtype=torch.bool)


def absent(found: Collection[bytes], others: Collection[bytes]) -> Tensor:
    """Which images of the digests `found` are none of `others`: bool `(N,)`.

    Example:
        >>> absent([b"a", b"b"], {b"b"}).tolist()
        [True, False]
    """
    known = set(others)
    return torch.tensor([digest not in known for digest in found], dtype=torch.bool)
