"""The file `.anymask`: safetensors, with the steps in its header and all positions, values and constants one after the other."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields, replace
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

import numpy as np
from safetensors import numpy as safetensors

from anymask.errors import AnymaskError, FileFormatError, IsFolder, MissingFile
from anymask.shipping import gaps
from anymask.shipping.ops import OPS, Layer, Op, Shape, Step, Wrong
from anymask.shipping.plan import STORED, Array, Arrays, Plan, constants, halves, sizes, whole

FORMAT = "anymask-program-1"
_FAMILY = FORMAT.rpartition("-")[0]
_STEPS = 10_000
_MOST, _MOST_IN_ALL = 2**28, 2**31  # numbers of one activation and of all, per sample: what a file says is only believed up to here
_MOST_HEADER = 100_000_000  # bytes, as safetensors has it
_NAMES = {op: name for name, op in OPS.items()}


# -- writing -------------------------------------------------------------------------------------------------------
def packed(plan: Plan) -> bytes:
    """The file of `plan`; see `unpacked`."""
    layers = [arrays for step, arrays in zip(plan.steps, plan.arrays, strict=True) if isinstance(step.op, Layer)]
    others = [arrays[name] for step, arrays in zip(plan.steps, plan.arrays, strict=True) for name in sizes(step)]
    values = _joined([arrays["values"] for arrays in layers], np.float32 if plan.values == "bfloat16" else STORED[plan.values])
    tensors = {
        "positions": gaps.compressed(_joined([gaps.code(arrays["positions"]) for arrays in layers], np.uint8)),
        "values": halves(values) if plan.values == "bfloat16" else values,
        "constants": _joined(others, STORED[constants(plan.values)]),
    }
    if plan.values == "int8":
        tensors["scales"] = _joined([arrays["scales"] for arrays in layers], np.float32)
    steps = [[_NAMES[type(step.op)], list(step.inputs), _settings(step.op)] for step in plan.steps]
    header = {"values": plan.values, "input": list(plan.input), "steps": steps, "info": dict(plan.info)}
    return sealed(json.dumps(header, separators=(",", ":"), allow_nan=False), tensors)


def sealed(header: str, tensors: Mapping[str, Array]) -> bytes:
    """The bytes of a file with this header and a checksum over all of it."""
    seal = json.dumps({"header": header, "sha256": _digest(header, tensors)})
    return safetensors.save(dict(tensors), metadata={FORMAT: seal})  # one key: safetensors writes several in an order of its own


def _joined(arrays: list[Array], dtype: Any) -> Array:
    return np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype, copy=False)


def _settings(op: Op) -> dict[str, Any]:
    """The fields of `op` that are not as usual."""
    return {f.name: value for f in fields(op) if (value := getattr(op, f.name)) != f.default or f.default is MISSING}


def _digest(header: str, tensors: Mapping[str, Array]) -> str:
    """A flipped bit would be another network, and safetensors would not see it."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()


# -- reading -------------------------------------------------------------------------------------------------------
def read(path: str | os.PathLike[str]) -> Plan:
    """The network in a file of `anymask.ship`.

    Raises:
        MissingFile, IsFolder: when there is no such file.
        OSError: when it cannot be read.
        FileFormatError: when it is damaged, truncated, of a newer format, or another kind of file.
    """
    path = Path(path)
    if not path.is_file():
        kind, came = (IsFolder, f"{path} is a folder") if path.is_dir() else (MissingFile, f"no shipped network at {path}")
        raise kind(came, allowed="a file that anymask.ship has written", fix="check the path")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MOST_HEADER, path.stat().st_size - 8):
            raise refusal(path, "its first bytes are those of another kind of file, or it is cut off")
        with refusing(path):
            _seal(path, file.read(length))
        file.seek(0)
        return unpacked(file.read(), path=path)


def unpacked(blob: bytes, *, path: Path) -> Plan:
    """The network in the bytes of a file; `path` is for what is said of them.

    Raises:
        FileFormatError: when they are damaged, truncated, of a newer format, or of another kind of file.
    """
    with refusing(path):
        tensors = safetensors.load(blob)
        seal = _seal(path, blob[8 : 8 + int.from_bytes(blob[:8], "little")])
        if _digest(seal["header"], tensors) != seal["sha256"]:
            raise refusal(path, "its checksum is wrong")
        return _plan(json.loads(seal["header"]), tensors)


def _seal(path: Path, head: bytes) -> dict[str, Any]:
    metadata = json.loads(head).get("__metadata__", {})
    for key in metadata:
        if key != FORMAT and key.rpartition("-")[0] == _FAMILY:
            raise refusal(path, f"its format is {key}, and this version reads {FORMAT}", fix="install a newer anymask")
    if FORMAT not in metadata:
        raise refusal(path, "a safetensors file of something else")
    seal: dict[str, Any] = json.loads(metadata[FORMAT])
    return seal


def refusal(path: Path, why: str, *, fix: str = "make the file again: anymask.ship(model, mask, ...), or a whole copy") -> FileFormatError:
    """The error for a file that holds no network that can be run."""
    return FileFormatError(f"{path} is not a shipped network that can be read ({why})", allowed=f"a whole file of format {FORMAT}", fix=fix)


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Whatever is raised inside the block while a file is read becomes a refusal of `path`; errors of ours pass."""
    try:
        yield
    except AnymaskError:
        raise
    except Exception as error:  # a damaged file drives parsers to any exception that there is
        said = " ".join(str(error).split())[:200]
        raise refusal(path, said if isinstance(error, Wrong) else f"{type(error).__name__}: {said}") from error


def _plan(header: dict[str, Any], tensors: Mapping[str, Array]) -> Plan:
    values, given = header["values"], _value(Shape, header["input"], "input")
    if values not in STORED or not given or not isinstance(header["info"], dict):
        raise Wrong(f"values stored as {values!r}, for an input {given}")
    if len(header["steps"]) > _STEPS:
        raise Wrong(f"{len(header['steps']):,} steps, at most {_STEPS:,} are allowed")
    steps = tuple(_step(*entry) for entry in header["steps"])
    plan = Plan(given, steps, ({},) * len(steps), values, header["info"])
    numbers = [math.prod(shape) for shape in plan.shapes()]
    if max(numbers) > _MOST or sum(numbers) > _MOST_IN_ALL or min(numbers) < 1:
        raise Wrong(f"a map of {max(numbers):,} numbers, at most {_MOST:,} are allowed")
    return replace(plan, arrays=_arrays(plan, tensors))


def _step(name: str, inputs: list[int], settings: dict[str, Any]) -> Step:
    if name not in OPS:
        raise Wrong(f"an operation {name!r}, which this version does not have")
    op, hints = OPS[name], get_type_hints(OPS[name])
    if odd := set(settings) - {f.name for f in fields(op)}:
        raise Wrong(f"{name} with {', '.join(map(repr, sorted(odd)))}")
    made = op(**{key: _value(hints[key], value, f"{key} of {name}") for key, value in settings.items()})
    return Step(made, _value(Shape, inputs, f"inputs of {name}"))


def _value(kind: Any, value: Any, what: str) -> Any:
    """`value` of JSON as a `kind` of the annotations in `ops`."""
    if isinstance(kind, UnionType):  # float | None
        return None if value is None else _value(float, value, what)
    if parts := get_args(kind):
        if isinstance(value, list) and (parts[-1] is Ellipsis or len(value) == len(parts)):
            return tuple(_value(int, number, what) for number in value)
    elif kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    elif kind is not float and type(value) is kind and (kind is not int or 0 <= value < 2**31):
        return value
    raise Wrong(f"{what} is {str(value)[:50]!r}")


def _arrays(plan: Plan, tensors: Mapping[str, Array]) -> tuple[Arrays, ...]:
    """What each step needs, cut out of the tensors of the file, once each is known to be in its bounds."""
    layers = [step.op for step in plan.steps if isinstance(step.op, Layer)]
    lengths = [length for step in plan.steps for length in sizes(step).values()]
    counted = {
        "values": (plan.kept, STORED[plan.values]),
        "constants": (sum(lengths), STORED[constants(plan.values)]),
    }
    if plan.values == "int8":
        counted["scales"] = (sum(op.outputs for op in layers), np.float32)
    if set(tensors) != {"positions", *counted}:
        raise Wrong(f"tensors {', '.join(sorted(tensors))}")
    for name, (count, dtype) in counted.items():
        _check(name, tensors[name], count, dtype)
    tensors = {name: whole(tensor) if name == "values" and plan.values == "bfloat16" else tensor for name, tensor in tensors.items()}
    for name in counted:
        if not np.isfinite(tensors[name]).all():
            raise Wrong(f"{name} that are not finite")
    cut = {
        "positions": _positions(tensors["positions"], layers, total=plan.total),
        "values": _cut(tensors["values"], [op.kept for op in layers]),
    }
    if plan.values == "int8":
        cut["scales"] = _cut(tensors["scales"], [op.outputs for op in layers])
    of_layers = (dict(zip(cut, parts, strict=True)) for parts in zip(*cut.values(), strict=True))
    others = iter(_cut(tensors["constants"], lengths))
    return tuple({name: next(others) for name in sizes(s)} | (next(of_layers) if isinstance(s.op, Layer) else {}) for s in plan.steps)


def _check(name: str, tensor: Array, count: int, dtype: Any) -> None:
    if tensor.shape != (count,) or tensor.dtype != dtype:
        raise Wrong(f"{name} are {tensor.dtype} {tensor.shape}, where {np.dtype(dtype).name} ({count},) is needed")


def _cut(tensor: Array, lengths: list[int]) -> list[Array]:
    return [tensor[begin:end] for begin, end in pairwise(np.cumsum([0, *lengths]).tolist())]


def _positions(packed: Array, layers: list[Layer], *, total: int) -> list[Array]:
    if packed.dtype != np.uint8 or packed.ndim != 1:
        raise Wrong(f"positions are {packed.dtype} {packed.shape}")
    counts = [op.kept for op in layers]
    found = gaps.decode(gaps.decompressed(packed, kept=sum(counts), total=total), counts)
    for op, positions in zip(layers, found, strict=True):
        if len(positions) and positions[-1] >= math.prod(op.weight_shape):
            raise Wrong(f"position {positions[-1]} of a weight {op.weight_shape}")
    return found
