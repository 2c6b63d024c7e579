"""The data of a study's two halves, which have no image in common; each takes its validation images from its training images."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from anymask import data
from anymask.config import Experiment
from anymask.data import Dataset
from anymask.data.apart import absent, digests, drawn
from anymask.errors import SettingError
from anymask.sweep.studyfile import Study

Cut = Callable[[Dataset], Dataset]
_LEAST = 2  # images of a class, of which one is kept aside for validation


def confirmation_cut(study: Study) -> Cut:
    """What the confirmation has: all images, or with `share` the training images that were not drawn for tuning, and the test images."""
    share = study.share
    if share is None:
        return lambda dataset: replace(dataset, validation=None)
    return lambda dataset: _kept(dataset, ~drawn(digests(dataset.train), share=share), half="confirm")


def tuning_cut(study: Study) -> Cut:
    """What tuning has: training images that the confirmation has neither as training nor as test images. Reads the latter's data.

    Raises:
        SettingError: on use, where too few are left.
    """
    cut, known = confirmation_cut(study), set[bytes]()
    for experiment in {_files(part.experiment): part.experiment for part in study.confirm}.values():
        dataset = cut(data.load(experiment.data, dir=experiment.data_dir, download=experiment.download))
        known.update(digests(dataset.train), digests(dataset.test))

    def keep(dataset: Dataset) -> Dataset:
        found = digests(dataset.train)
        kept = absent(found, known)
        if study.share is not None:
            kept &= drawn(found, share=study.share)
        return _kept(dataset, kept, half="tune")

    return keep


def _files(experiment: Experiment) -> tuple[str, str]:
    return experiment.data, str(experiment.data_dir)


def _kept(dataset: Dataset, kept: Tensor, *, half: str) -> Dataset:
    before = torch.bincount(dataset.train.labels, minlength=len(dataset.classes))
    left = torch.bincount(dataset.train.labels[kept], minlength=len(dataset.classes))
    short = [name for name, was, now in zip(dataset.classes, before, left, strict=True) if now < min(int(was), _LEAST)]
    if short:
        raise SettingError(
            f"[{half}] has {int(left.sum())} images of {dataset.name} that the other half does not have, too few of {', '.join(short[:5])}",
            allowed="data of which each half has images of its own",
            fix="write share = 0.5 under [tune], which divides them, or name other data in one of the two",
        )
    return replace(dataset, train=dataset.train.take(kept), validation=None)
