"""Files of torch.save, of the present (zip) and the old form; nothing in them is run."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anymask.formats.leaves import Contents, Leaf
from anymask.formats.refusal import refusal

_MAGIC = b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # torch.serialization.MAGIC_NUMBER, which begins the old form
_DEEPEST = 8  # dicts in dicts
_FOLDER = 0x10  # MS-DOS's attribute, which PyTorch's reader goes by
_PER_BYTE = 8  # numbers a byte of a file: enough for tensors under two names, too few for views that repeat one number endlessly


def is_zipped_pickle(names: list[str]) -> bool:
    """Whether a zip archive with files of these names comes from torch.save."""
    return any(name.endswith("/data.pkl") for name in names)


def read_zipped(path: Path, archive: zipfile.ZipFile) -> Contents:
    """The tensors of a file of torch.save.

    Raises:
        FileFormatError: for an archive that would unpack to more than it is, or whose checksums are wrong.
    """
    entries = archive.infolist()
    # torch.load hands out memory that nobody wrote where the two sizes of a stored entry differ, and for what is marked as a folder
    if any(e.compress_type != zipfile.ZIP_STORED or e.compress_size != e.file_size or e.external_attr & _FOLDER for e in entries):
        raise refusal(path, "an archive that is compressed, or damaged: torch.save stores its entries as they are")
    if sum(e.file_size for e in entries) > path.stat().st_size:
        raise refusal(path, "an archive that unpacks to more than its size; torch.save writes none")
    if (damaged := archive.testzip()) is not None:  # the mapped file is read past the checksums
        raise refusal(path, f"the checksum of {damaged} is wrong")
    if path.suffix == ".safetensors":  # torch.load goes by this name, and would not look inside
        with open(path, "rb") as file:
            return _contents(path, torch.load(file, map_location="cpu", weights_only=True))
    return _contents(path, torch.load(path, map_location="cpu", weights_only=True, mmap=True))


def read_legacy(path: Path) -> Contents:
    """The tensors of a file that torch.save wrote before version 1.6, or with `_use_new_zipfile_serialization=False`.

    Raises:
        FileFormatError: for another pickle.
    """
    with open(path, "rb") as file:
        if _MAGIC not in file.read(64):
            raise refusal(path, "a pickle, and none of torch.save; nothing was run", fix="write it with torch.save, or as a .npz")
        file.seek(0)
        return _contents(path, torch.load(file, map_location="cpu", weights_only=True))


def _contents(path: Path, root: Any) -> Contents:
    tensors = [(keys, tensor) for keys, tensor in _flat(root) if _is_plain(tensor)]
    if sum(Tensor.numel(tensor) for _, tensor in tensors) > _PER_BYTE * path.stat().st_size:
        raise refusal(path, "its tensors claim more numbers than a file of this size holds")
    return Contents("torch", {keys: _leaf(tensor) for keys, tensor in tensors})


def _flat(root: Any) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Every tensor in dicts of dicts, in order; a dict that is met twice is looked at once, so that the time is linear."""
    todo: list[tuple[tuple[str, ...], Any]] = [((), root)]
    seen: set[int] = set()
    while todo:
        keys, node = todo.pop()
        if isinstance(node, Tensor) and keys:
            yield keys, node
        elif isinstance(node, dict) and id(node) not in seen and len(keys) < _DEEPEST:
            seen.add(id(node))
            entries = [((*keys, str(key)), value) for key, value in dict.items(node) if isinstance(key, (str, int))]
            todo.extend(reversed(entries))


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized and not tensor.is_nested


def _leaf(tensor: Tensor) -> Leaf:
    plain = Tensor.detach(tensor)  # by the class: a hostile file may set attributes of the tensor
    return Leaf(tuple(plain.shape), plain.is_floating_point(), lambda: plain)
