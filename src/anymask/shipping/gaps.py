"""Positions of kept weights as the gaps between them, a byte each, and those compressed."""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from anymask.shipping.ops import Wrong

Array = np.ndarray[Any, np.dtype[Any]]
ESCAPE = 255  # add 255 and go on
_RATIO, _FREE = 200, 1 << 24  # escapes unpacked: at most 200 for one byte of the file, and 16 Mi beside


def code(positions: Array) -> Array:
    """Ascending positions, int64 (kept,), from 0, as bytes: the number of places left out before each, in steps of 255.

    Example:
        >>> code(np.array([0, 3, 300]))
        array([  0,   2, 255,  41], dtype=uint8)
    """
    gaps = np.diff(positions, prepend=-1) - 1
    steps = gaps // ESCAPE
    coded = np.full(int(steps.sum()) + len(gaps), ESCAPE, np.uint8)
    coded[np.cumsum(steps + 1) - 1] = gaps % ESCAPE
    return coded


def decode(coded: Array, counts: Sequence[int]) -> list[Array]:
    """The positions in `coded`, where the codes of several layers follow each other, of `counts` positions each.

    Raises:
        Wrong: when there are more or fewer.

    Example:
        >>> decode(np.concatenate([code(np.array([0, 300])), code(np.array([7]))]), [2, 1])
        [array([  0, 300]), array([7])]
    """
    ends = np.flatnonzero(coded != ESCAPE)
    if len(ends) != sum(counts) or (len(coded) and (not len(ends) or ends[-1] != len(coded) - 1)):
        raise Wrong(f"{len(ends)} positions, where {sum(counts)} are needed")
    reached = np.cumsum(coded, dtype=np.int64)[ends] + np.arange(1, len(ends) + 1)
    found, begin = [], 0
    for count in counts:
        before = reached[begin - 1] if begin else 0
        found.append(reached[begin : begin + count] - before - 1)
        begin += count
    return found


def compressed(coded: Array) -> Array:
    """uint8, by zlib: of gaps that are random its Huffman codes alone are the smallest, of dense layers its repeats."""
    tried = []
    for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY):
        packer = zlib.compressobj(9, zlib.DEFLATED, 15, 9, strategy)
        tried.append(packer.compress(coded.tobytes()) + packer.flush())
    return np.frombuffer(min(tried, key=len), np.uint8)


def decompressed(packed: Array, *, kept: int, total: int) -> Array:
    """What `compressed` was given: the codes of `kept` positions of `total`; no more is unpacked than these can be.

    The values of all that is kept lie in the same file, so that `kept` cannot be made up; places left out can.

    Raises:
        Wrong: for what is damaged or would be larger.
    """
    unpacker = zlib.decompressobj()
    limit = kept + min(total // ESCAPE, _RATIO * len(packed) + _FREE)
    try:
        out = unpacker.decompress(packed.tobytes(), limit + 1)
    except zlib.error as error:
        raise Wrong(f"positions that cannot be unpacked ({error})") from None
    if len(out) > limit or not unpacker.eof or unpacker.unused_data:
        raise Wrong("positions that are cut off, or more than there can be")
    return np.frombuffer(out, np.uint8)
