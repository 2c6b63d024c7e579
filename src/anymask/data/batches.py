"""Batches out of memory, cropped and flipped as a whole: the same ones on every device and after every resume."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from anymask.data.splits import Split
from anymask.errors import SettingError


@dataclass(frozen=True)
class Augment:
    """Random crops of the image padded with black, and random left-right flips, drawn for each image.

    Args:
        pad: pixels added on each side before an image of the old size is cropped; 0 for no crop.
        flip: whether half of the images are mirrored.

    Example:
        >>> Augment().pad
        4
    """

    pad: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if self.pad < 0:
            raise SettingError(f"pad came as {self.pad}", allowed="0 or more pixels", fix="give 4, the usual for 32 x 32, or 0 for no crop")


class Batches:
    """Batches of a split that lies in memory as uint8, augmented and normalised on its device.

    A pixel v in 0 ... 255 becomes `(v / 255 - mean) / std`; padding is black before that. Order and augmentations of epoch k
    depend on `seed` and k only, and are drawn on the CPU, so that every device, and every resumed run, sees the same batches.
    `for x, y in batches` is the next epoch each time, from 0; one that is left before its last batch begins again. A loop that resumes
    says which: `batches.epoch(k)`.

    Args:
        split: images and labels; copied to `device` once, as uint8.
        batch_size: >= 1.
        device: where the batches lie.
        mean: one number a channel, in [0, 1], such as `statistics(train)[0]`; None for 0.
        std: one number a channel, > 0, such as `statistics(train)[1]`; None for 1.
        shuffle: a new order each epoch; else the order of the split.
        augment: crops and flips; None for none.
        seed: of order and augmentations, >= 0.
        drop_last: leave out a last batch that is not full.
        channels_last: memory format of the images; their shape stays `(B, C, H, W)`.

    Raises:
        SettingError: for a setting out of its range, and when there is no batch at all.

    Example:
        >>> split = Split(torch.zeros(5, 1, 4, 4, dtype=torch.uint8), torch.arange(5))
        >>> batches = Batches(split, batch_size=2, shuffle=True, augment=Augment(pad=1))
        >>> [len(labels) for images, labels in batches.epoch(3)]
        [2, 2, 1]
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        device: str | torch.device = "cpu",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        shuffle: bool = False,
        augment: Augment | None = None,
        seed: int = 0,
        drop_last: bool = False,
        channels_last: bool = False,
    ) -> None:
        channels = split.images.shape[1]
        mean = (0.0,) * channels if mean is None else mean
        std = (1.0,) * channels if std is None else std
        count = len(split) // max(1, batch_size) if drop_last else -(-len(split) // max(1, batch_size))
        _check(batch_size=batch_size, seed=seed, mean=mean, std=std, channels=channels, count=count, images=len(split))
        self._images, self._labels = split.images.to(device), split.labels.to(device)
        self._count, self._batch_size, self._shuffle, self._augment, self._seed = count, batch_size, shuffle, augment, seed
        per_channel = torch.tensor([mean, std], dtype=torch.float64).reshape(2, 1, -1, 1, 1)
        self._scale = (1 / (255 * per_channel[1])).float().to(device)
        self._shift = (-per_channel[0] / per_channel[1]).float().to(device)
        self._drawn: tuple[int, tuple[Tensor, Tensor, Tensor, Tensor]] | None = None  # the epoch that was asked for last
        self._passes = 0  # to the end, by iter()
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(self.epoch(self._passes), 1):
            self._passes += number == len(self)  # with the last one: whoever counts asks for no further one
            yield batch

    def epoch(self, number: int, *, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch `number` (from 0): images float32 `(B, C, H, W)` and labels int64 `(B,)`.

        Args:
            number: >= 0.
            start: the first batch to yield, in [0, len(self)]; the batches from there on are those of the whole epoch.

        Raises:
            SettingError: for a number or start out of range.
        """
        if number < 0 or not 0 <= start <= len(self):
            raise SettingError(
                f"epoch came as {number} and start as {start}",
                allowed=f"an epoch from 0 and a start from 0 to {len(self)}",
                fix="use the numbers of the run that is resumed",
            )
        return self._epoch(number, start)

    def plain(self, *, mirrored: bool = False) -> Iterator[Tensor]:
        """The images `(B, C, H, W)` in the order of the split, normalised and not augmented, but for all `mirrored` left to right."""
        for images in self._images.split(self._batch_size):
            yield self._normalised(images.flip(-1) if mirrored else images)

    @property
    def mirrors(self) -> bool:
        """Whether some images come mirrored."""
        return self._augment is not None and self._augment.flip

    def samples(self, number: int, batch: int) -> tuple[Tensor, Tensor]:
        """Of batch `batch` of epoch `number`: the places of its images in the split, int64 (B,), and which are mirrored, bool (B,).

        Example:
            >>> split = Split(torch.zeros(5, 1, 4, 4, dtype=torch.uint8), torch.arange(5))
            >>> batches = Batches(split, batch_size=2, shuffle=True)
            >>> torch.equal(batches.samples(3, 1)[0], list(batches.epoch(3))[1][1])
            True
        """
        order, _, _, mirrored = self._drawing(number)
        here = slice(batch * self._batch_size, (batch + 1) * self._batch_size)
        return order[here], mirrored[here]

    def _normalised(self, images: Tensor) -> Tensor:
        return images.float().mul_(self._scale).add_(self._shift).contiguous(memory_format=self._format)

    def _epoch(self, number: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        order, top, left, mirrored = self._drawing(number)
        many = max(1, _together(self._images) // self._batch_size) * self._batch_size
        for first in range(start * self._batch_size, min(len(order), len(self) * self._batch_size), many):
            here = slice(first, first + many)
            images = self._images[order[here]]
            if self._augment is not None:
                images = _crop(images, top=top[here], left=left[here], mirrored=mirrored[here], pad=self._augment.pad)
            made = zip(self._normalised(images).split(self._batch_size), self._labels[order[here]].split(self._batch_size), strict=True)
            yield from itertools.islice(made, len(self) - first // self._batch_size)

    def _drawing(self, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self._drawn is None or self._drawn[0] != number:
            self._drawn = number, self._draw(number)
        return self._drawn[1]

    def _draw(self, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Order, top and left edges of the crops, and flips of a whole epoch, on the device."""
        count, augment = len(self._labels), self._augment or Augment(pad=0, flip=False)
        # torch's CPU generator keeps 32 bits of a seed: seed and epoch are mixed into those, not put side by side
        mixed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(mixed)
        order = torch.randperm(count, generator=generator) if self._shuffle else torch.arange(count)
        edges = torch.randint(2 * augment.pad + 1, (2, count), generator=generator)
        mirrored = (torch.rand(count, generator=generator) < 0.5) & augment.flip
        device = self._images.device
        return order.to(device), edges[0].to(device), edges[1].to(device), mirrored.to(device)


@dataclass(frozen=True)
class Fixed:
    """The batches of one epoch, each time that they are gone through, whatever was gone through before.

    Example:
        >>> batches = Batches(Split(torch.zeros(5, 1, 4, 4, dtype=torch.uint8), torch.arange(5)), batch_size=5, shuffle=True)
        >>> first = [labels.tolist() for _, labels in batches]
        >>> [labels.tolist() for _, labels in Fixed(batches)] == first != [labels.tolist() for _, labels in batches]
        True
    """

    batches: Batches
    number: int = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.batches.epoch(self.number)


def _together(images: Tensor) -> int:
    """How many images are cropped at once. A GPU is told of several batches: 15 launches take longer than what they do for one."""
    return 0 if images.device.type == "cpu" else 2**24 // images[0].numel()  # 64 MB in float32, 5,000 images of CIFAR


def _crop(images: Tensor, *, top: Tensor, left: Tensor, mirrored: Tensor, pad: int) -> Tensor:
    """Crop each padded image at its own edge and mirror some, as one gather: uint8 `(B, C, H, W)` in and out.

    1 ms for 128 images of 3 x 32 x 32 on one thread; plain advanced indexing takes 3 ms.
    """
    count, channels, height, width = images.shape
    rows = torch.arange(height, device=images.device) + top[:, None]
    columns = torch.arange(width, device=images.device).expand(count, width)
    columns = torch.where(mirrored[:, None], width - 1 - columns, columns) + left[:, None]
    places = rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]
    padded = F.pad(images, (pad, pad, pad, pad)).flatten(2)
    return padded.gather(2, places.reshape(count, 1, -1).expand(-1, channels, -1)).reshape(images.shape)


def _check(*, batch_size: int, seed: int, mean: Sequence[float], std: Sequence[float], channels: int, count: int, images: int) -> None:
    if batch_size < 1 or seed < 0:
        raise SettingError(
            f"batch_size came as {batch_size}, seed as {seed}", allowed="batch_size >= 1, seed >= 0", fix="give such numbers"
        )
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise SettingError(
            f"mean came as {tuple(mean)}, std as {tuple(std)}",
            allowed=f"{channels} numbers each, one a channel, std > 0",
            fix="take them from statistics(train)",
        )
    if count == 0:
        raise SettingError(
            f"{images} images make no batch of {batch_size}",
            allowed="one batch or more",
            fix="give a smaller batch_size, or drop_last=False",
        )
