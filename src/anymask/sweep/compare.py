"""The paired comparison: each mask trained with each recipe, the same seed giving the same start to all of them."""

import os
import platform
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

import anymask
from anymask.config import Bench, Experiment
from anymask.connectivity import reachable
from anymask.errors import SettingError
from anymask.formats.opening import files_of
from anymask.mask import Mask, digest
from anymask.pruning.budget import seed_of
from anymask.ranks import by_rank_0, leads, ranks
from anymask.runlog import Ledger, file_hash, processor, settings_id
from anymask.sweep.claims import claimed
from anymask.sweep.masks import DENSE, Masks, Start, check_mask, digests, file_name, file_sparsity, is_dynamic, is_mask_file
from anymask.sweep.pace import Pace
from anymask.sweep.teachers import Teachers
from anymask.sweep.variants import variant
from anymask.train import Computing, Protocol, fit


@dataclass(frozen=True)
class Grid:
    """What is compared."""

    masks: tuple[str, ...] = ("random-erk", "snip", "synflow")
    """Mask methods (also grasp, lottery, rigl ...; snip+erk+2:4 for another scope and pattern), or mask files of your own."""
    sparsity: tuple[float, ...] = (0.98,)
    """Shares of zeros, each in [0, 1)."""
    recipes: tuple[str, ...] = ("default", "tost", "best")
    """Recipes; the first is the one that others are compared with. tost:lrsi is that technique alone, tost:-lrsi all but it,
    tost@label_smoothing.eps=0.1,lr=0.05 has other settings and a learning rate of its own."""
    seeds: int = 3
    """How many seeds, >= 1; each gives its own initialisation, mask, split and data order."""
    first_seed: int = 0
    """The first of them."""
    dense: bool = True
    """Train the dense network as well, with the first recipe where that is `default` (or default@lr=0.2), else with `default`."""

    def __post_init__(self) -> None:
        if DENSE in self.masks:
            raise SettingError(
                "masks came with dense", allowed="methods and mask files there", fix="leave it out: `dense` is a setting of its own"
            )
        for sparsity in self.sparsity:
            if not 0 <= sparsity < 1:
                raise SettingError(f"sparsity came as {sparsity}", allowed="a share of zeros in [0, 1)", fix="0.98 keeps 2% of the weights")
            for mask in self.masks:
                check_mask(mask, sparsity=sparsity)
        for recipe in self.recipes:
            variant(recipe)
        if self.seeds < 1:
            raise SettingError(f"seeds came as {self.seeds}", allowed="a number >= 1", fix="3 or more show the spread")
        if self.first_seed < 0:
            raise SettingError(f"first_seed came as {self.first_seed}", allowed="a number >= 0", fix="leave it out to begin with 0")


@dataclass(frozen=True)
class Cell:
    """One training of the grid."""

    mask: str
    sparsity: float
    recipe: str
    seed: int

    def __post_init__(self) -> None:
        seed_of(self.seed, least=0)

    def __str__(self) -> str:
        what = DENSE if self.mask == DENSE else f"{self.mask} {self.sparsity:g}"
        return f"{what}, {self.recipe}, seed {self.seed}"


class Watcher:
    """Told what happens, to several trainings at a time where there are workers; this one ignores it."""

    def begin(self, *, total: int, done: int) -> None:
        """The grid has `total` trainings, of which `done` are in the ledger already."""

    def cell(self, cell: Cell, *, epochs: int) -> None:
        """A training begins (or its mask is being made)."""

    def epoch(self, cell: Cell, epoch: int, figures: dict[str, Any]) -> None:
        """An epoch (from 1) of it has ended."""

    def finished(self, cell: Cell, row: dict[str, Any]) -> None:
        """It is in the ledger; another process may have trained it."""

    def left(self, cell: Cell, why: str | None) -> None:
        """It ended without a row: it failed, or (None) another process is at it."""


def compare(
    grid: Grid,
    folder: str | Path,
    *,
    experiment: Experiment | None = None,
    protocol: Protocol | None = None,
    computing: Computing | None = None,
    watcher: Watcher | None = None,
) -> Ledger:
    """Train every cell of `grid` that is not in `folder`/ledger.jsonl yet; returns the ledger.

    May be stopped at any moment and called again: finished trainings are kept, the one that was running goes on from
    its last epoch, and the numbers are those of an undisturbed run.

    Several ranks of torch.distributed, of which each has to call this, train each cell together (see `fit`); rank 0 reads and writes
    `folder`.

    Args:
        grid: masks, sparsities, recipes and seeds.
        folder: the run folder; made when it is not there.
        experiment, protocol: the data, the network and how it is trained.
        computing: how; the dense network is trained dense. It changes how long a training takes and what is told of it, not which it is.
        watcher: told of progress.

    Raises:
        AnymaskError: for settings or data that do not fit; nothing is written before.
    """
    watcher, bench = watcher or Watcher(), Bench(experiment or Experiment(), protocol or Protocol())
    moves = any(is_dynamic(mask) for mask in grid.masks)
    runner = Runner(bench, folder, computing, moves=moves)
    planned = [(cell, runner.name(cell)) for cell in cells(grid, bench.model(grid.first_seed))]
    done = by_rank_0(runner.ledger.ids)
    watcher.begin(total=len(planned), done=sum(name in done for _, name in planned))
    for wait in (False, True):  # what another process is at comes last
        for cell, name in planned:
            train = partial(runner.run, cell, name, watcher)
            if name not in done and once(runner.ledger, cell, name, train, watcher, wait=wait):
                done.add(name)
    return runner.ledger


def cells(grid: Grid, model: nn.Module | None = None) -> Iterator[Cell]:
    """The trainings of `grid`, seed by seed, so that what is finished early is paired; mask files are read as those of `model`.

    What the grid names twice (0.9 and 0.90) is one training.
    """
    yield from dict.fromkeys(_cells(grid, list(_targets(grid, model))))


def _cells(grid: Grid, targets: Sequence[tuple[str, float]]) -> Iterator[Cell]:
    for seed in range(grid.first_seed, grid.first_seed + grid.seeds):
        if grid.dense:
            yield Cell(DENSE, 0.0, _reference(grid.recipes[0]), seed)
        for mask, sparsity in targets:
            for recipe in grid.recipes:
                yield Cell(mask, sparsity, recipe, seed)


def _reference(first: str) -> str:
    """The recipe of the dense network: techniques that are made for masks would refuse it."""
    return "default" if variant(first).recipe.techniques else first


def _targets(grid: Grid, model: nn.Module | None) -> Iterator[tuple[str, float]]:
    """Each method at each sparsity, and each mask file at the sparsity that it has."""
    files = [mask for mask in grid.masks if is_mask_file(mask)]
    yield from ((mask, sparsity) for sparsity in grid.sparsity for mask in grid.masks if mask not in files)
    yield from ((file, file_sparsity(file, model)) for file in files)


def once(
    ledger: Ledger, cell: Cell, name: str, train: Callable[[], dict[str, Any] | None], watcher: Watcher, *, wait: bool = False
) -> bool:
    """Call `train` for the row of `cell`, unless another process has put it into `ledger`; whether it is there now.

    It is not where `train` gives None, or where another process is at it, unless to `wait` for that one.
    """
    with claimed(ledger.path.with_name("claims") / f"{name}.lock", wait=wait) if ranks() == 1 else nullcontext(True) as mine:
        if not mine:
            return False
        row = by_rank_0(lambda: ledger.by_id().get(name)) or train()
    if row is not None:
        watcher.finished(cell, row)
    return row is not None


@dataclass(frozen=True)
class Trained:
    """A finished training that is not in the ledger yet."""

    row: dict[str, Any]
    model: nn.Module  # plain, with the weights of the chosen checkpoint
    mask: Mask | None


class Runner:
    """Trains cells in a run folder: ledger.jsonl, masks/, teachers/ where recipes learn from one and, while a training runs, unfinished/.

    Raises:
        UnknownName, SettingError: for a `computing` that there is not, or not here, as sparse layers where a mask `moves`.
    """

    def __init__(
        self,
        bench: Bench,
        folder: str | Path,
        computing: Computing | None = None,
        *,
        masked: bool = True,
        moves: bool = False,
        pace: Pace | None = None,
    ) -> None:
        self.bench, self.folder, self.computing = bench, Path(folder), computing or Computing()
        how: dict[str, Any] = {"precision": bench.protocol.precision, "accumulate": bench.protocol.accumulate}
        self.computing.check(device=bench.device, **how, masked=masked, moves=moves)  # fails now, not after work
        self.ledger = Ledger(self.folder / "ledger.jsonl")
        self.pace = pace or Pace()
        versions()  # of the code that runs from now on, whatever is committed while it does
        self.masks = Masks(bench, self.mask_file, self.computing, self.pace)
        self.teachers = Teachers(bench, self.folder / "teachers", self.computing, self.pace)

    def name(self, cell: Cell) -> str:
        """The id of the row of `cell`; equal for equal settings."""
        return settings_id(self.named_by(cell))

    def named_by(self, cell: Cell) -> dict[str, Any]:
        """All that the id of the row of `cell` is made of."""
        return {**self.settings(cell), "techniques": variant(cell.recipe).recipe.settings()}

    def settings(self, cell: Cell) -> dict[str, Any]:
        """What decides the numbers of `cell`, apart from what its recipe's name stands for."""
        file = {"mask_hash": file_hash(*files_of(Path(cell.mask)))} if is_mask_file(cell.mask) else {}
        here = {"mask": cell.mask, "sparsity": cell.sparsity, "recipe": cell.recipe, "seed": cell.seed}
        return {**self.bench.settings(cell.seed), **here, **file}

    def run(self, cell: Cell, name: str, watcher: Watcher) -> dict[str, Any]:
        """Train `cell`, or go on with it, and put it into the ledger."""
        self._check_unchanged(cell, name)  # it may have been planned hours ago
        row = self.train(cell, name, watcher).row
        self._check_unchanged(cell, name)
        if leads():
            self.ledger.append(row)
            self.checkpoint_file(name).unlink(missing_ok=True)
        return row

    def _check_unchanged(self, cell: Cell, name: str) -> None:
        if self.name(cell) != name:
            raise SettingError(
                f"a file that {cell} is made of was changed after this began",
                allowed="recipe, mask and weights files that stay as they are while trainings of them are left",
                fix="start again: that one is trained as the files are then",
            )

    def train(self, cell: Cell, name: str, watcher: Watcher, *, log_dir: Path | None = None) -> Trained:
        """Train `cell`, or go on with it; its checkpoint file stays."""
        watcher.cell(cell, epochs=self.bench.protocol.epochs)
        model, wanted = self.bench.model(cell.seed), variant(cell.recipe)
        begins = [technique.name for technique in wanted.recipe.techniques if technique.seam == "init"]
        if begins and self.bench.checkpoint(cell.seed) is not None:
            warnings.warn(
                f"{cell.recipe} initialises a trained network anew ({', '.join(begins)}); best and tost:-lrsi do not", stacklevel=2
            )
        began = time.monotonic()
        start = self.start(cell, model)
        mask_seconds = time.monotonic() - began
        teacher = self.teachers.of(cell.seed) if any(t.taught for t in wanted.recipe.techniques) else None
        teacher_seconds = {} if teacher is None else {"teacher_seconds": time.monotonic() - began - mask_seconds}
        train, validation, test = self.bench.batches(cell.seed)
        after = self.pace.after(epochs=self.bench.protocol.epochs)

        def on_epoch(epoch: int, figures: dict[str, float]) -> None:
            watcher.epoch(cell, epoch, figures)
            after(epoch, figures)

        result = fit(
            model,
            train,
            mask=start.mask,
            rewire=start.dynamic,
            sparsity=cell.sparsity if start.dynamic is not None and start.dynamic.shrinks else None,
            first_step=start.step,
            recipe=wanted.recipe,
            teacher=teacher,
            protocol=self.bench.protocol if wanted.lr is None else replace(self.bench.protocol, lr=wanted.lr),
            validation=validation,
            test=test,
            seed=cell.seed,
            **asdict(replace(self.computing, sparse="auto") if cell.mask == DENSE else self.computing),
            checkpoint_file=self.checkpoint_file(name),
            log_dir=log_dir,
            on_epoch=on_epoch,
            on_step=self.pace.on_step,
        )
        row = {
            "id": name,
            "settings": self.settings(cell),
            "techniques": wanted.recipe.settings(),
            "command": command(),
            "versions": {**versions(), **self.bench.own_code()},
            "machine": machine(self.bench.device) | self._computed(),
            "accuracy": result.accuracies(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "density": self.density(result.mask, model),
            "mask": digests(start),
            "curves": result.curves,
            "time": {"seconds": result.seconds, "mask_seconds": mask_seconds, **teacher_seconds, "finished": now()},
            "ghosts": result.added,
            "found": result.found,
            "sparse_layers": result.sparse_layers,
            **({} if teacher is None else {"teacher": digest(teacher.state_dict())}),
        }
        return Trained(row, model, result.mask)

    def _computed(self) -> dict[str, Any]:
        """What else makes times and roundings differ, where it is not as usual."""
        compiled: dict[str, Any] = {"compile": self.computing.compile} if self.computing.compile != "off" else {}
        compiled |= {"deterministic": True} if self.computing.deterministic else {}
        return compiled | ({"streams": self.pace.streams} if self.pace.streams > 1 else {})

    def checkpoint_file(self, name: str) -> Path:
        """Where the training of the row `name` is kept until it is finished."""
        return self.folder / "unfinished" / f"{name}.pt"

    def start(self, cell: Cell, model: nn.Module) -> Start:
        """Where the training of `cell` begins, whatever its recipe; weights that it begins with are put into `model`."""
        start = self.masks.start(cell.mask, sparsity=cell.sparsity, seed=cell.seed, model=model)
        if start.weights is not None:
            model.load_state_dict(start.weights)
        return start

    def mask_file(self, mask: str, sparsity: float, seed: int) -> Path:
        """Where the mask of these is kept."""
        settings = settings_id({**self.bench.settings(seed), "mask": mask, "sparsity": sparsity, "seed": seed})
        return self.folder / "masks" / file_name(mask, sparsity=sparsity, seed=seed, settings=settings)

    def density(self, mask: Mask | None, model: nn.Module) -> dict[str, Any]:
        """The share of weights kept: overall, of each layer, and of those that a path from the input to the output passes."""
        if mask is None:
            return {"overall": 1.0, "layers": {}}
        effective = reachable(mask, model, torch.zeros(1, *self.bench.dataset.train.images.shape[1:])).density
        return {"overall": mask.density, "effective": effective, "layers": mask.layer_density()}


def command() -> str | None:
    """What was typed to make a row, also where this process was started by that one; None where no script or command was."""
    program, *words = sys.argv or [""]
    if Path(program).name == "anymask" or Path(program).parent == Path(anymask.__file__).parent:
        return shlex.join(["anymask", *words])
    return shlex.join(["python", program, *words]) if program.endswith(".py") else None


@cache
def versions() -> Mapping[str, str | None]:
    """What a row was made with: as it was when this process first asked."""
    here = Path(anymask.__file__).parent
    commit, changed = _git(here, "rev-parse", "--short", "HEAD"), _git(here, "status", "--porcelain", "--untracked-files=no", "--", ".")
    commit = os.environ.get("ANYMASK_COMMIT") or (f"{commit}-dirty" if commit and changed else commit)  # said for a copy elsewhere
    if _git(here, "ls-files", "--error-unmatch", "__init__.py") is None:  # installed in a folder of another repository
        commit = os.environ.get("ANYMASK_COMMIT")
    of = {"anymask": anymask.__version__, "torch": torch.__version__, "python": platform.python_version(), "commit": commit}
    return MappingProxyType(of)


def _git(folder: Path, *words: str) -> str | None:
    asked = ["git", "--no-optional-locks", "-C", str(folder), *words]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def machine(device: str) -> dict[str, Any]:
    """Where a row was made."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else processor()
    return {"device": device, "processor": name, "threads": torch.get_num_threads(), **({"ranks": ranks()} if ranks() > 1 else {})}


def now() -> str:
    """The time, as rows have it."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
