"""The native library by ctypes: no header of Python or PyTorch, so that one build serves every version of both."""

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

from anymask.errors import SettingError
from anymask.kernels.plans import Job

INT, _POINTER, _C_INT, _C_FLOAT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int, ctypes.c_float
_SIZES = (
    "images", "lanes", "src_channels", "src_rows", "src_cols", "dst_channels", "dst_rows", "dst_cols", "rows", "row_start", "row_step",
    "src_row_start", "src_row_step", "ring", "cols", "packed_cols", "strips", "col_tiles", "kept",
)  # fmt: skip
_VERSION = 7  # of the interface in core.c
_TABLES = ("run_ptr", "runs", "dst_map", "rowptr", "off", "order")


class AmJob(ctypes.Structure):
    """A `Job` as core.h has it; its arrays must live as long."""

    _fields_ = (*((name, INT) for name in _SIZES), *((name, _POINTER) for name in _TABLES))


@cache
def library() -> Any:
    """The library, or None where it was not built.

    ANYMASK_ISA (avx512, avx2, portable) takes a lesser instruction set than the best, ANYMASK_NATIVE another build of the library.
    """
    other = os.environ.get("ANYMASK_NATIVE")
    found = [Path(other)] if other else sorted(Path(__file__).parent.glob("*.clib"))
    try:
        loaded = ctypes.CDLL(str(found[0])) if found else None
    except OSError:  # of another machine, or no OpenMP here
        return None
    if loaded is None or not hasattr(loaded, "am_version") or loaded.am_version() != _VERSION:
        return None
    loaded.am_use.restype, loaded.am_use.argtypes = ctypes.c_char_p, [ctypes.c_char_p]
    loaded.am_gather.argtypes = [_POINTER] * 5 + [_C_INT, _POINTER, _C_INT]
    loaded.am_dot.argtypes = [_POINTER] * 4 + [_C_INT]
    loaded.am_both.argtypes = [_POINTER] * 7 + [_C_INT]
    loaded.am_norm.argtypes = [*[INT] * 2, *[_POINTER] * 4, _C_FLOAT, _C_INT, _C_FLOAT, _C_INT, *[_POINTER] * 4, _C_INT]
    loaded.am_norm_back.argtypes = [*[INT] * 2, *[_POINTER] * 8, _C_FLOAT, _C_INT, _C_FLOAT, _C_INT, *[_POINTER] * 4, _C_INT]
    loaded.am_transpose.argtypes = [*[INT] * 2, *[_POINTER] * 2, _C_INT]
    loaded.am_norm_tracking.argtypes = [INT, *[_POINTER] * 2, *[_C_FLOAT] * 2, *[_POINTER] * 3]
    loaded.am_norm_pooling.argtypes = [*[_POINTER] * 4, *[_C_FLOAT] * 2, _C_INT, *[_POINTER] * 4, _C_INT]
    loaded.am_norm_pooling_back.argtypes = [*[_POINTER] * 8, *[_C_FLOAT] * 2, _C_INT, *[_POINTER] * 3, _C_INT]
    loaded.am_block_products.argtypes = [INT, *[_POINTER] * 4, _C_FLOAT, _POINTER, _C_INT]
    wanted = os.environ.get("ANYMASK_ISA")
    if loaded.am_use(wanted.encode() if wanted else None) is None:
        raise SettingError(f"ANYMASK_ISA is {wanted!r}", allowed="avx512, avx2 or portable, as far as this machine has it", fix="unset it")
    loaded.am_pooling.argtypes = [_POINTER] * 3 + [_C_INT]
    loaded.am_pooling_back.argtypes = [_POINTER] * 5 + [_C_INT]
    loaded.am_softening.argtypes = [INT, _POINTER, _POINTER, _C_FLOAT, _POINTER, _C_INT]
    return loaded


def available() -> bool:
    """Whether the native library is here."""
    return library() is not None


def isa() -> str:
    """The instruction set in use: avx512, avx2 or portable."""
    name: bytes = library().am_use(os.environ["ANYMASK_ISA"].encode() if os.environ.get("ANYMASK_ISA") else None)
    return name.decode()


def why_not() -> str:
    """What to do where it is not."""
    how = "install a C compiler (gcc or clang) and run pip install --force-reinstall --no-deps anymask"
    return f"the native kernels were not built, or of another version: {how}"


def struct(job: Job) -> AmJob:
    """The same for the native code."""
    return AmJob(
        job.images, job.lanes, *job.src, *job.dst, job.rows, job.row_start, job.row_step, job.src_row_start, job.src_row_step, job.ring,
        job.dst_map.shape[1], job.packed_cols, job.strips, len(job.dst_map), job.off.shape[1],
        *(None if (table := getattr(job, name)) is None else table.ctypes.data for name in _TABLES),
    )  # fmt: skip


def call(function: Any, *args: Any) -> None:
    """Call it with numbers, addresses (None for what is not there) and structures.

    Raises:
        MemoryError: where it found none.
    """
    if function(*args):
        raise MemoryError("the native kernels found no memory")


def held_call(_held: Any, function: Any, *args: Any) -> None:
    """`call` for a `functools.partial`, as long as which lives what lies at the addresses; in one frame, which a small layer feels."""
    if function(*args):
        raise MemoryError("the native kernels found no memory")
