#!/usr/bin/env python3
"""Parts of CIFAR-100 that two cores can train on, in the published layout: one to tune on, and one to report on.

    python ../shared/data/unpack.py data-local cifar100
    python tools/make_cifar100_parts.py data-local/cifar-100-python data-local

The tuning part has images 0 to 124 of each class's training images to train and validate on, and 125 to 174 to test on; the report
part 250 to 374, and the published test images. No index is in both.
"""

import argparse
import pickle
import sys
from pathlib import Path

from make_fashion_mnist_5k import of_each_class

from anymask.data.catalog import load
from anymask.data.splits import Dataset, Split
from anymask.errors import AnymaskError
from anymask.runlog import atomic

# which of each class's training images are to train on, and which to test on; None: the published test images
PARTS = {"tuning": (slice(0, 125), slice(125, 175)), "report": (slice(250, 375), None)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the folder cifar-100-python")
    parser.add_argument("to", type=Path, help="where cifar-100-tuning and cifar-100-report are made")
    options = parser.parse_args()
    try:
        dataset = load("cifar100", dir=options.source)
    except (AnymaskError, OSError) as error:
        sys.exit(f"{error}")
    for name, splits in parts(dataset).items():
        folder = options.to / f"cifar-100-{name}"
        for file, split in splits.items():
            _write(folder / file, {"data": split.images.reshape(len(split.labels), -1).numpy(), "fine_labels": split.labels.tolist()})
        _write(folder / "meta", {"fine_label_names": list(dataset.classes)})
        print(folder)


def parts(dataset: Dataset) -> dict[str, dict[str, Split]]:
    """The splits "train" and "test" of each part, in published order."""
    return {
        name: {
            "train": of_each_class(dataset.train, train),
            "test": dataset.test if test is None else of_each_class(dataset.train, test),
        }
        for name, (train, test) in PARTS.items()
    }


def _write(path: Path, record: dict[str, object]) -> None:
    with atomic(path) as file:
        pickle.dump(record, file, protocol=2)


if __name__ == "__main__":
    main()
