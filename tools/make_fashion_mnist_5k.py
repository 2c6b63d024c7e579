#!/usr/bin/env python3
"""Rebuild src/anymask/data/embedded/fashion-mnist-5k.idx.xz, byte for byte, from Debian's package dataset-fashion-mnist.

    apt-get update && apt-get install -y dataset-fashion-mnist
    python tools/make_fashion_mnist_5k.py                                       the file that is shipped
    python tools/make_fashion_mnist_5k.py --part tuning --to data-local/fashion-mnist-tuning.idx.xz

The shipped part holds the first 500 training and the first 100 test images of each class; the tuning part holds the next 500
and the other 900, so that defaults can be chosen on images that no shipped result uses. Published order is kept. The bytes depend on
liblzma's encoder: the shipped file was made with liblzma 5.4.1 (Debian 12) and Python 3.11; the arrays depend on nothing.
"""

import argparse
import lzma
import struct
import sys
from pathlib import Path

import torch

from anymask.data.catalog import DATASETS, load
from anymask.data.idx import EMBEDDED
from anymask.data.splits import Split
from anymask.errors import AnymaskError
from anymask.runlog import atomic

# which training and which test images of each class, in published order
PARTS = {"shipped": (slice(0, 500), slice(0, 100)), "tuning": (slice(500, 1000), slice(100, 1000))}
# literal context 3, position bits 2: the smallest of seven tried, 2.25 MB; one thread, so that the blocks are always the same
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 3, "lp": 0, "pb": 2}]


def build(source: Path, *, part: str) -> bytes:
    """The file of `part`, from the folder that holds the published idx files."""
    data = load("fashion-mnist", dir=source)
    splits = [of_each_class(split, which) for split, which in zip((data.train, data.test), PARTS[part], strict=True)]
    arrays = [array for split in splits for array in (split.images[:, 0], split.labels.to(torch.uint8))]
    return lzma.compress(b"".join(_idx(array) for array in arrays), filters=FILTERS)


def of_each_class(split: Split, which: slice) -> Split:
    """These of the images of each class, in published order."""
    chosen = [torch.nonzero(split.labels == label)[which, 0] for label in split.labels.unique()]
    return split.take(torch.cat(chosen).sort().values)


def _idx(array: torch.Tensor) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.numpy().tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, default="shipped")
    parser.add_argument("--to", type=Path, help="where to write; needed for --part tuning, which is never shipped")
    parser.add_argument("--source", type=Path, default=DATASETS["fashion-mnist"].known[0], help="folder of the idx files")
    options = parser.parse_args()
    if options.part != "shipped" and options.to is None:
        parser.error("--part tuning needs --to PATH")
    try:
        blob = build(options.source, part=options.part)
    except AnymaskError as error:
        sys.exit(f"{error}\nOn Debian: apt-get install dataset-fashion-mnist")
    with atomic(options.to or EMBEDDED) as file:
        file.write(blob)
    print(f"{options.to or EMBEDDED}: {len(blob):,} bytes")


if __name__ == "__main__":
    main()
