"""The values that hold images and labels, and what can be done with them before training."""

from dataclasses import dataclass

import torch
from torch import Tensor

from anymask.errors import DataError, SettingError

_CHUNK = 4096  # images whose squares are summed at once: 4096 of 3 x 64 x 64 in int32 are 0.2 GB


@dataclass(frozen=True, eq=False)
class Split:
    """Images with their labels.

    Args:
        images: uint8 `(N, C, H, W)`, values 0 to 255.
        labels: int64 `(N,)`, class numbers from 0.

    Raises:
        DataError: for other types or shapes.

    Example:
        >>> len(Split(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])))
        2
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        fits = images.ndim == 4 and labels.ndim == 1 and len(images) == len(labels)
        if not fits or images.dtype != torch.uint8 or labels.dtype != torch.int64:
            raise DataError(
                f"images came as {images.dtype} {tuple(images.shape)}, labels as {labels.dtype} {tuple(labels.shape)}",
                allowed="images torch.uint8 (N, C, H, W) and labels torch.int64 (N,)",
                fix="convert both; float images in [0, 1] by (255 * images).round().to(torch.uint8)",
            )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: Tensor) -> "Split":
        """The part that `chosen` selects: bool `(N,)` or int64 `(n,)`."""
        return Split(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test split of the same classes, and a validation split where the data come with one.

    Args:
        name: the name it was loaded by.
        classes: one name a class; label `k` is `classes[k]`.
        train: what may be trained on.
        test: what is looked at once, at the end.
        validation: what the checkpoint is chosen on; None where that is to be cut out of `train`.

    Raises:
        DataError: for labels without a class, for an empty split, and for splits whose images differ in shape.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    validation: Split | None = None

    def __post_init__(self) -> None:
        splits = [self.train, self.test, *([] if self.validation is None else [self.validation])]
        shapes = {tuple(split.images.shape[1:]) for split in splits}
        labels = torch.cat([split.labels for split in splits])
        whole = min(map(len, splits)) > 0
        if not whole or len(shapes) > 1 or int(labels.min()) < 0 or int(labels.max()) >= len(self.classes):
            seen = f"{int(labels.min())} to {int(labels.max())}" if len(labels) else "none"
            raise DataError(
                f"{self.name} has {len(self.train)} training and {len(self.test)} test images of shapes {sorted(shapes)}, "
                f"labels {seen} and {len(self.classes)} classes",
                allowed="two splits with images of one shape, and labels 0 to classes - 1",
                fix="check the files that it was read from",
            )


def split_validation(split: Split, *, share: float = 0.1, seed: int) -> tuple[Split, Split]:
    """Hold out `share` of every class: (train, validation), disjoint, together the whole of `split`.

    Of a class of n images, round(n * share) are held out, but at least one, and never all of them. Images keep their order.
    The same `seed` chooses the same images on any machine; torch's global random numbers are not touched.

    Args:
        split: what to divide.
        share: in (0, 1).
        seed: of the choice.

    Raises:
        SettingError: for a share outside (0, 1).
        DataError: when no class has two images.

    Example:
        >>> split = Split(torch.zeros(40, 1, 2, 2, dtype=torch.uint8), torch.arange(40) % 2)
        >>> train, validation = split_validation(split, share=0.1, seed=0)
        >>> len(train), validation.labels.tolist()
        (36, [0, 0, 1, 1])
    """
    if not 0 < share < 1:
        raise SettingError(f"share came as {share}", allowed="a number in (0, 1)", fix="give 0.1 to hold out a tenth")
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(split), dtype=torch.bool)
    for label in split.labels.unique():
        members = torch.nonzero(split.labels == label)[:, 0]
        count = min(len(members) - 1, max(1, round(len(members) * share)))
        held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    if not held.any():
        raise DataError(
            f"nothing can be held out of {len(split)} images",
            allowed="a class with two images or more",
            fix="add images, or pass a validation split of your own",
        )
    return split.take(~held), split.take(held)


def statistics(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel (mean, std) of the pixels in [0, 1], summed exactly; std is 1 for a channel of one single value.

    Example:
        >>> statistics(Split(torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1), torch.tensor([0, 1])))
        ((0.5,), (0.5,))
    """
    total = torch.zeros(split.images.shape[1], dtype=torch.int64)
    squares = torch.zeros_like(total)
    for images in split.images.split(_CHUNK):
        pixels = images.to(torch.int32)
        total += pixels.sum(dim=(0, 2, 3), dtype=torch.int64)
        squares += (pixels * pixels).sum(dim=(0, 2, 3), dtype=torch.int64)
    count = split.images.numel() // len(total)
    mean = total.double() / count
    variance = squares.double() / count - mean * mean
    std = variance.clamp(min=0).sqrt() / 255
    # below 1e-6 the channel is constant: one pixel of 2 GB that differs by 1 already gives 1e-7 * 255
    std = torch.where(std < 1e-6, torch.ones_like(std), std)
    return tuple((mean / 255).tolist()), tuple(std.tolist())
