"""Image files to one uint8 tensor; the only module that needs Pillow."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anymask.errors import DataError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def decode(paths: Sequence[Path]) -> Tensor:
    """Decode `paths`, at least one, as RGB: uint8 `(N, 3, H, W)`; of 16 bits a pixel the upper 8.

    Raises:
        DataError: when a file is no image, or one of 32 bits a pixel, whose white is not known; when two differ in size (both are
            named), or when Pillow is not installed.
    """
    first = _pixels(paths[0])
    images = torch.empty(len(paths), 3, *first.shape[:2], dtype=torch.uint8)
    for row, path in enumerate(paths):
        pixels = _pixels(path)
        if pixels.shape != first.shape:
            raise _sizes_differ(paths[0], first, path, pixels)
        images[row] = torch.from_numpy(pixels).permute(2, 0, 1)
    return images


def _pixels(path: Path) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            "image files need the package pillow, which is not installed",
            allowed="pillow >= 10",
            fix="pip install 'anymask[images]'",
        ) from error
    try:
        with Image.open(path) as image:
            mode = image.mode
            # `convert` would make white of all above 255. Older Pillows call the 16 bits of a PNG, which cannot have more, "I".
            if mode.startswith("I;16") or (mode == "I" and image.format == "PNG"):
                return np.repeat((np.array(image) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
            pixels = np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow raises all of these for damaged files
        raise DataError(
            f"{path} cannot be read as an image ({type(error).__name__}: {error})",
            allowed="whole image files that Pillow can read",
            fix="fetch or make that file again, or remove it",
        ) from error
    if mode in ("I", "F"):
        raise DataError(
            f"{path} has one number of 32 bits a pixel (mode {mode})",
            allowed="images of 8 bits a channel, or grey ones of 16 bits",
            fix="scale its pixels to 0 ... 255, and save it as an 8-bit PNG",
        )
    return pixels


def _sizes_differ(path: Path, pixels: np.ndarray, other: Path, others: np.ndarray) -> DataError:
    (height, width), (h, w) = pixels.shape[:2], others.shape[:2]
    return DataError(
        f"{path} is {width} x {height} pixels and {other} is {w} x {h}",
        allowed="images of one size",
        fix=f"resize or crop all images to one size, for example with `mogrify -resize {width}x{height}! FILES`",
    )
