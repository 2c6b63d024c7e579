"""Opening a file, or the folder of a sharded checkpoint, by what is in it."""

import json
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import safe_open

from anymask.errors import AnymaskError, MissingFile
from anymask.formats.arrays import read_arrays
from anymask.formats.leaves import Contents, Leaf, Leaves
from anymask.formats.packed import read_packed
from anymask.formats.pickled import is_zipped_pickle, read_legacy, read_zipped
from anymask.formats.refusal import refusal, refusing

SAFETENSORS, ZIP, PICKLE, MSGPACK, INDEX = "safetensors", "zip", "pickle", "msgpack", "index"
IN_A_FOLDER = (
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "model.safetensors",
    "pytorch_model.bin",
    "flax_model.msgpack",
    "mask.pth",
)
_MAPS = {b"\xde": 3, b"\xdf": 5}  # MessagePack's bytes of a map with many entries, and where the first begins
_INT_TYPES = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")


def kind_of(path: Path) -> str:
    """Which kind of file `path` is, by its first bytes.

    Raises:
        OSError: when it cannot be read.
        FileFormatError: when it is none that is known.
    """
    with open(path, "rb") as file:
        head = file.read(64)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size - 8:
        return SAFETENSORS
    if head.startswith(b"PK\x03\x04"):
        return ZIP
    if head.lstrip()[:1] == b"{":
        return INDEX
    if head[:1] == b"\x80":
        return PICKLE
    if _begins_a_map(head):
        return MSGPACK
    if head.startswith(b"\x93NUMPY"):
        raise refusal(path, "a single array, without the name of its parameter", fix="save a .npz: numpy.savez(path, **masks)")
    raise refusal(path, "empty" if not head else "its first bytes are those of no format that is known")


def _begins_a_map(head: bytes) -> bool:
    """Whether a MessagePack map begins here, with a text for its first key."""
    if head[:1] in _MAPS or b"\x81" <= head[:1] <= b"\x8f":
        key = head[_MAPS.get(head[:1], 1) :][:1]
        return b"\xa0" <= key <= b"\xbf" or b"\xd9" <= key <= b"\xdb"
    return False


def file_in(folder: Path) -> Path:
    """The index or checkpoint in `folder`.

    Raises:
        MissingFile: when there is none of the usual names.
    """
    for name in IN_A_FOLDER:
        if (folder / name).is_file():
            return folder / name
    raise MissingFile(f"no mask file at {folder}", allowed=f"a file, or a folder with {', '.join(IN_A_FOLDER)}", fix="name the file")


def files_of(path: Path) -> list[Path]:
    """All files that are read for `path`: of an index its shards, too."""
    with suppress(AnymaskError), refusing(path):  # reading what is damaged tells it
        if kind_of(path) == INDEX:
            return [path, *(path.parent / shard for shard in sorted(set(_places(path).values())))]
    return [path]


@contextmanager
def opened(path: Path) -> Iterator[Contents]:
    """The tensors of a file of another project; they can be read inside the block.

    Raises:
        FileFormatError: when the file is damaged, truncated or of no known kind.
    """
    with ExitStack() as stack, refusing(path):
        yield _contents(path, kind_of(path), stack).checked(path)


def _contents(path: Path, kind: str, stack: ExitStack) -> Contents:
    if kind == SAFETENSORS:
        return Contents("safetensors", _safetensors(path, stack))
    if kind == ZIP:
        archive = stack.enter_context(zipfile.ZipFile(path))
        read = read_zipped if is_zipped_pickle(archive.namelist()) else read_arrays
        return read(path, archive)
    if kind == PICKLE:
        return read_legacy(path)
    return read_packed(path) if kind == MSGPACK else _sharded(path, stack)


def _safetensors(path: Path, stack: ExitStack) -> Leaves:
    file: Any = stack.enter_context(safe_open(path, framework="pt"))

    def leaf(name: str) -> Leaf:
        piece = file.get_slice(name)
        return Leaf(tuple(piece.get_shape()), piece.get_dtype() not in _INT_TYPES, lambda: file.get_tensor(name))

    return {(name,): leaf(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def _sharded(path: Path, stack: ExitStack) -> Contents:
    """The checkpoint that the index `path` describes, as Hugging Face writes it: {"weight_map": {name: file}}."""
    places = _places(path)
    shards = {shard: _shard(path.parent / shard, stack) for shard in sorted(set(places.values()))}
    lost = [name for name, shard in places.items() if (name,) not in shards[shard]]
    if lost:
        raise refusal(path, f"{len(lost)} tensors that its shards do not hold, such as {lost[0]}", fix="fetch the shards again")
    return Contents("safetensors", {(name,): shards[shard][name,] for name, shard in places.items()})


def _places(path: Path) -> dict[str, str]:
    places: dict[str, str] = json.loads(path.read_bytes())["weight_map"]
    for shard in places.values():
        if Path(shard).name != shard or shard in {"", ".."}:  # an index may not lead out of its folder
            raise refusal(path, f"a shard at {shard!r}, which is no file beside it")
    return places


def _shard(path: Path, stack: ExitStack) -> Leaves:
    with refusing(path):
        if path.exists() and not path.is_file():  # a pipe would wait for ever
            raise refusal(path, "no file, where a shard belongs")
        kind = kind_of(path)
        if kind == INDEX:
            raise refusal(path, "an index where a shard belongs")
        return _contents(path, kind, stack).leaves
