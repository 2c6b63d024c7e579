"""Where names become objects: data, model, mask and recipe of one training, from plain settings."""

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anymask import data, models
from anymask.data import Augment, Batches, Dataset
from anymask.errors import FileFormatError, MissingFile, SettingError
from anymask.formats import load_weights
from anymask.formats.opening import files_of
from anymask.formats.reading import load_into
from anymask.onednn import memory_format
from anymask.pruning.budget import seed_of
from anymask.ranks import by_rank_0, first_of_machine, ranks, together
from anymask.registry import code_digest, imported
from anymask.runlog import CODE_OF, file_hash
from anymask.surgery import evaluating
from anymask.train import Protocol


@dataclass(frozen=True)
class Experiment:
    """Which data and which network."""

    data: str = "fashion-mnist-5k"
    """The images: fashion-mnist-5k comes with the package; `anymask list` shows the others."""
    data_dir: Path | None = None
    """Folder with the publishers' files."""
    download: bool = False
    """Fetch the files into the data folder first, checked against the published checksums."""
    model: str = "demonet"
    """The network: demonet, resnet18, resnet32-2x, vgg16, mobilenet ...; `anymask list` shows all; mine:Net is one of yours, of mine.py."""
    weights: Path | None = None
    """A checkpoint of a trained network to begin with, in place of the initialisation of a seed; {seed} in its path stands for the seed."""
    validation: float = 0.1
    """Share of the training images kept aside to choose the checkpoint on, in (0, 1); a folder with test and val has its own."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto for the fastest there is."""
    plugins: tuple[str, ...] = ()
    """Modules of yours to import first, which add mask methods or techniques to the tables (CONTRIBUTING.md)."""

    def __post_init__(self) -> None:
        if not 0 < self.validation < 1:
            raise SettingError(f"validation came as {self.validation}", allowed="a share in (0, 1)", fix="0.1 keeps a tenth aside")


class Bench:
    """The data of an experiment in memory, ready for trainings of any seed.

    Args:
        cut: what is kept of the data.
        tests: whether trainings are given the test images.
    """

    def __init__(
        self, experiment: Experiment, protocol: Protocol, *, cut: Callable[[Dataset], Dataset] | None = None, tests: bool = True
    ) -> None:
        self.experiment, self.protocol, self.tests = experiment, protocol, tests
        self.own_code()  # imports plugins here, because worker processes and Ray's nodes have imported none
        models.find(experiment.model)  # a name that is not there is told before the data are read
        self.device = pick_device(experiment.device)
        whole = first_of_machine(self._load) if experiment.download else self._load(False)
        self.dataset: Dataset = whole if cut is None else cut(whole)
        self.mean, self.std = data.statistics(self.dataset.train)
        self.data_hash = _hash(self.dataset)
        self._formats: dict[str, torch.memory_format] = {}  # by the network's name
        self._hashes: dict[tuple[Any, ...], str] = {}  # of checkpoints, as they are now

    def own_code(self) -> dict[str, str]:
        """A digest of each module of the user's, which no id knows of, for the `versions` of a row."""
        model = self.experiment.model
        names = dict.fromkeys([*self.experiment.plugins, *([model.partition(":")[0]] if models.is_own(model) else [])])
        return {f"{CODE_OF}{name}": code_digest(imported(name)) for name in names}

    def batches(self, seed: int) -> tuple[Batches, Batches, Batches | None]:
        """Training, validation and test batches (None without `tests`); split, order and augmentation depend on `seed` only."""
        train, validation = self.dataset.train, self.dataset.validation
        if validation is None:
            train, validation = data.split_validation(train, share=self.experiment.validation, seed=seed)
        augment = Augment() if self.protocol.augment else None
        size = self.protocol.batch_size
        return (
            self._batches(train, batch_size=size, shuffle=True, augment=augment, seed=seed),
            self._batches(validation, batch_size=max(size, 500)),
            self._batches(self.dataset.test, batch_size=max(size, 500)) if self.tests else None,
        )

    def model(self, seed: int) -> nn.Module:
        """The network with the initialisation of `seed`, or the experiment's weights, on the device."""
        model = self._built(seed)
        if (path := self.checkpoint(seed)) is not None:
            load_into(model, by_rank_0(lambda: _read(path)), name=self.experiment.model)
        return model.to(self.device, memory_format=self._format)  # type: ignore[call-overload]

    def _built(self, seed: int) -> nn.Module:
        channels = self.dataset.train.images.shape[1]
        model = models.build(self.experiment.model, classes=len(self.dataset.classes), channels=channels, seed=seed_of(seed, least=0))
        if models.is_own(self.experiment.model):
            self._check_fits(model, seed=seed)
        return model

    @property
    def _format(self) -> torch.memory_format:
        """Of images and weights: oneDNN and cuDNN convolve channels_last without converting it at each layer."""
        name = self.experiment.model
        if name not in self._formats:
            model = self._built(0)
            chosen = memory_format(model, device=self.device)
            if models.is_own(name) and not self._computes(model, chosen):  # x.view(len(x), -1), of so many tutorials
                chosen = torch.contiguous_format
            self._formats[name] = chosen
        return self._formats[name]

    def _computes(self, model: nn.Module, memory_format: torch.memory_format) -> bool:
        """Whether a network of the user's, which takes images as they are by default, takes them in this format, too."""
        images = self.dataset.train.images[:2].float().contiguous(memory_format=memory_format)
        try:
            with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
                model.to(memory_format=memory_format)(images)  # type: ignore[call-overload]
        except Exception:  # it is the user's code
            return False
        return True

    def _check_fits(self, model: nn.Module, *, seed: int) -> None:
        """Refuse a network of the user's that does not give a number for each class for an image; lazy layers begin here, by `seed`."""
        image, name = self.dataset.train.images[:1].float(), self.experiment.model
        try:
            with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                given = model(image)
        except Exception as error:  # it is the user's code
            raise SettingError(
                f"model {name!r} does not take images {tuple(image.shape)} ({type(error).__name__}: {error})",
                allowed="a network for images of that size",
                fix="mend it, or choose other data",
            ) from error
        shape = tuple(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
        if shape != (1, len(self.dataset.classes)):
            raise SettingError(
                f"model {name!r} gave {shape} for one image",
                allowed=f"{(1, len(self.dataset.classes))}, a number for each class",
                fix="give it an argument classes=, and as many outputs",
            )

    def total_steps(self, seed: int) -> int:
        """Optimiser steps of a whole training."""
        train, _, _ = self.batches(seed)
        return self.protocol.epochs * math.ceil(len(train) / self.protocol.accumulate)

    def checkpoint(self, seed: int) -> Path | None:
        """The file that trainings of `seed` begin with; None where they begin with the initialisation."""
        given = self.experiment.weights
        return None if given is None else Path(str(given).replace("{seed}", str(seed)))

    def settings(self, seed: int) -> dict[str, Any]:
        """What decides the numbers of the trainings of `seed` here, as plain values.

        Raises:
            MissingFile: when the checkpoint that they begin with is not there.
        """
        e, path = self.experiment, self.checkpoint(seed)
        untested = {} if self.tests else {"tests": False}
        begun = {} if path is None else {"weights": str(e.weights), "weights_hash": by_rank_0(lambda: self._hash_of(path))}
        here = {"data": e.data, "data_hash": self.data_hash, "model": e.model, "validation": e.validation}
        return {**here, **begun, **self.protocol.plain(), **untested}

    def _hash_of(self, checkpoint: Path) -> str:
        files = files_of(_there(checkpoint))
        now = tuple((file, (stat := file.stat()).st_mtime_ns, stat.st_size) for file in files)
        if now not in self._hashes:
            self._hashes[now] = file_hash(*files)
        return self._hashes[now]

    def _load(self, download: bool) -> Dataset:
        return data.load(self.experiment.data, dir=self.experiment.data_dir, download=download)

    def _batches(self, split: data.Split, **settings: Any) -> Batches:
        last = self._format == torch.channels_last
        return Batches(split, device=self.device, mean=self.mean, std=self.std, channels_last=last, **settings)


def pick_device(name: str) -> str:
    """The device called `name`; "auto" is a GPU where there is one. Of several ranks each has the GPU of its LOCAL_RANK.

    Raises:
        SettingError: when PyTorch knows no such device, or it is not there, or not for each rank.
    """
    if name == "auto":  # PyTorch has no process group for mps
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() and not together() else "cpu"
    if together() and name.startswith("cuda"):
        _check_one_each(name)
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SettingError(f"device {name!r} ({reason})", allowed="cpu, or a device that is there", fix='leave it at "auto"') from error
    return name


def _check_one_each(name: str) -> None:
    there = torch.cuda.device_count()
    if name != "cuda" or int(os.environ.get("LOCAL_RANK", "0")) >= there:
        raise SettingError(
            f"device {name!r} came for {ranks()} ranks, with {there} GPUs on this machine",
            allowed="cuda, with a GPU for each rank, or cpu",
            fix="leave --device at auto, and give torchrun --nproc-per-node as many as there are GPUs",
        )


def _read(checkpoint: Path) -> dict[str, torch.Tensor]:
    try:
        return load_weights(_there(checkpoint))
    except FileFormatError as error:  # which is worded for masks
        fix = "give the safetensors, or the file of torch.save, that holds the state dict"
        raise FileFormatError(f"{checkpoint} is no checkpoint ({error.came})", allowed="the weights of a network", fix=fix) from error


def _there(checkpoint: Path) -> Path:
    if not checkpoint.is_file():
        fix = "check the path; `anymask train --mask dense` leaves a model.safetensors, and {seed} stands for the seed"
        raise MissingFile(f"no checkpoint at {checkpoint}", allowed="the file of a trained network", fix=fix)
    return checkpoint


def _hash(dataset: Dataset) -> str:
    digest = hashlib.sha256()
    for split in (dataset.train, dataset.test, *([] if dataset.validation is None else [dataset.validation])):
        digest.update(str(tuple(split.images.shape)).encode())
        digest.update(split.images.contiguous().numpy().data)
        digest.update(split.labels.contiguous().numpy().data)
    return digest.hexdigest()[:12]
