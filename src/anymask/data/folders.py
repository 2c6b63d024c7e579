"""Data sets of image files: Tiny-ImageNet as published, and any folder with one folder a class."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from anymask.data.apart import absent, digests
from anymask.data.images import SUFFIXES, decode
from anymask.data.splits import Dataset, Split, split_validation
from anymask.errors import DataError

HELD_OUT = 0.2
_VALIDATION = ("val", "valid", "validation")
_LAYOUT = "FOLDER/train/CLASS/* with FOLDER/test/CLASS/* or FOLDER/val/CLASS/*, or FOLDER/CLASS/*"


def read_folder(folder: Path) -> Dataset:
    """Any images with one folder a class, decoded as RGB; classes are the folder names in alphabetical order.

    Train and test are FOLDER/train and FOLDER/test, and FOLDER/val (or valid, or validation) is the validation split, or the test split
    where there is no FOLDER/test. Where there is none of these, or where the class folders lie directly in FOLDER, 20% of every class are
    held out as the test split, the same ones each time.
    """
    train = folder / "train" if (folder / "train").is_dir() else folder
    classes = _classes(train)
    whole = _split(train, classes)
    others = [folder / name for name in ("test", *_VALIDATION) if train != folder and (folder / name).is_dir()]
    if len(several := [other.name for other in others if other.name != "test"]) > 1:
        raise DataError(f"{folder} has {' and '.join(several)}", allowed="one folder of validation images", fix="leave one")
    for other in others:
        unknown = [name for name in _classes(other) if name not in classes]
        if unknown:
            raise DataError(f"{other} has the classes {unknown}, {train} has not", allowed=f"the classes of {train}", fix="name both alike")
    _tell_unused(folder, classes, [train, *others])
    held = [_split(other, classes) for other in others]
    found = Dataset("folder", classes, *([whole, *held] if held else split_validation(whole, share=HELD_OUT, seed=0)))
    for what, split in (("training", found.train), ("validation", found.validation)):
        if split is not None and (seen := int((~absent(digests(found.test), digests(split))).sum())):
            warnings.warn(f"{seen} of {len(found.test)} test images in {folder} are {what} images, too", stacklevel=2)
    return found


def _tell_unused(folder: Path, classes: Sequence[str], used: Sequence[Path]) -> None:
    """Warn of folders such as Test or eval beside train: their images are neither trained on nor tested with."""
    if used[0] == folder:
        return  # what lies in it are classes
    beside = [path for path in folder.iterdir() if any(os.path.isdir(path / name) for name in classes)]  # False in lost+found, too
    if unused := sorted(path.name for path in beside if not any(path.samefile(one) for one in used)):
        instead = "" if used[1:] else f", and {HELD_OUT:.0%} of train are held out as test images"
        words = f"{', '.join(unused)} in {folder} {'is' if len(unused) == 1 else 'are'} not used{instead}"
        warnings.warn(f"{words}; the names that are used are test and {', '.join(_VALIDATION)}", stacklevel=3)


def read_tiny_imagenet(folder: Path) -> Dataset:
    """The publishers' folder; their val is the test split, since the labels of their test images were not published."""
    wnids = tuple((folder / "wnids.txt").read_text(encoding="utf-8").split())
    numbers = {wnid: number for number, wnid in enumerate(wnids)}
    train = [(path, numbers[wnid]) for wnid in wnids for path in _images(folder / "train" / wnid / "images")]
    return Dataset("tiny-imagenet", wnids, _decode(train), _decode(_annotated(folder / "val", numbers)))


def _annotated(val: Path, numbers: dict[str, int]) -> list[tuple[Path, int]]:
    notes = val / "val_annotations.txt"
    if not notes.is_file():
        raise DataError(f"no {notes}", allowed="val/val_annotations.txt as published", fix="unpack tiny-imagenet-200.zip again")
    labelled = []
    for number, line in enumerate(notes.read_text(encoding="utf-8").splitlines(), 1):
        name, wnid, *_ = [*line.split("\t"), ""]
        if wnid not in numbers or not (val / "images" / name).is_file():
            raise DataError(
                f"line {number} of {notes} names the image {name!r} and the class {wnid!r}",
                allowed="an image in val/images, a tab, a class of wnids.txt",
                fix="unpack tiny-imagenet-200.zip again",
            )
        labelled.append((val / "images" / name, numbers[wnid]))
    return labelled


def _split(root: Path, classes: Sequence[str]) -> Split:
    return _decode([(path, number) for number, name in enumerate(classes) if (root / name).is_dir() for path in _images(root / name)])


def _decode(labelled: Sequence[tuple[Path, int]]) -> Split:
    return Split(decode([path for path, _ in labelled]), torch.tensor([label for _, label in labelled]))


def _classes(folder: Path) -> tuple[str, ...]:
    found = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))
    if not found:
        raise DataError(f"no class folders in {folder}", allowed=_LAYOUT, fix="put the images of each class into a folder of their own")
    return found


def _images(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise DataError(f"no images in {folder}", allowed=f"files that end in {', '.join(sorted(SUFFIXES))}", fix="add some, or remove it")
    return found
