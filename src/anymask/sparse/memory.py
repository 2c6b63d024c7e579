"""Memory that is kept and lies in huge pages: where the arithmetic is cheap, page faults and page tables cost more than it does.

It acts on glibc's malloc, so the dense layers of this process gain, too. ANYMASK_MALLOC=0 leaves it alone.
"""

import ctypes
import os
import sys
from functools import cache

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of mallopt(3)
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
_HUGE = 2 << 20
_GROW = 256 << 20

_top = 0  # of the heap, as far as it was asked for; 0 where nothing is to be done


def prepare() -> None:
    """Once: let malloc keep what is freed, take large tensors from the heap, and ask for huge pages there. Linux with glibc only."""
    global _top  # noqa: PLW0603  the heap is one for the process, too
    if _top or os.environ.get("ANYMASK_MALLOC") == "0" or not sys.platform.startswith("linux"):
        return
    heap = _heap()
    try:
        libc = _libc()
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_TOP_PAD, _GROW)
    except AttributeError:  # another C library
        return
    if heap is not None:
        _ask(*heap, _MADV_HUGEPAGE)
        _ask(*heap, _MADV_COLLAPSE)  # what is there already; Linux 6.1 and newer
        _top = heap[1]


def follow() -> None:
    """Ask for huge pages in what the heap has grown by."""
    global _top  # noqa: PLW0603
    if _top:
        top = _libc().sbrk(0)
        if top > _top:
            _ask(_top, top, _MADV_HUGEPAGE)
            _top = top


def _ask(start: int, end: int, advice: int) -> None:
    start = -(-start // _HUGE) * _HUGE
    if end > start:
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)  # a wish: what it gives does not matter


def _heap() -> tuple[int, int] | None:
    try:
        with open("/proc/self/maps") as maps:
            line = next((line for line in maps if line.rstrip().endswith("[heap]")), "")
    except OSError:
        return None
    start, _, end = line.partition(" ")[0].partition("-")
    return (int(start, 16), int(end, 16)) if end else None


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.sbrk.restype = ctypes.c_size_t
    libc.sbrk.argtypes = [ctypes.c_ssize_t]
    return libc
