"""One training in a folder of its own, with its weights."""

import shutil
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from anymask.config import Bench, Experiment
from anymask.errors import SettingError
from anymask.mask import Mask
from anymask.pruning.methods import method_of
from anymask.pruning.patterns import pattern
from anymask.ranks import by_rank_0, leads, ranks
from anymask.runlog import settings_id
from anymask.sweep.claims import claimed
from anymask.sweep.compare import Cell, Grid, Runner, Trained, Watcher
from anymask.sweep.masks import DENSE, Masks, check_mask, file_sparsity, is_dynamic, is_mask_file, rounds_folder, weights_file
from anymask.sweep.teachers import write_weights
from anymask.techniques.refitting import reconstruct
from anymask.train import Computing, Protocol, accuracy


class _Single(Runner):
    def __init__(self, bench: Bench, folder: str | Path, computing: Computing | None, *, masked: bool, moves: bool) -> None:
        super().__init__(bench, folder, computing, masked=masked, moves=moves)
        self.teachers.folder = self.folder / "unfinished" / "teachers"

    def mask_file(self, mask: str, sparsity: float, seed: int) -> Path:
        return self.folder / "unfinished" / super().mask_file(mask, sparsity, seed).name


def train_one(
    cell: Cell,
    folder: str | Path,
    *,
    experiment: Experiment | None = None,
    protocol: Protocol | None = None,
    computing: Computing | None = None,
    resume: bool = False,
    tensorboard: bool = False,
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Train `cell` and keep model.safetensors, mask.mask (unless dense) and ledger.jsonl in `folder`; returns its row.

    Args:
        cell: what is trained.
        folder: of this training alone; made when it is not there.
        experiment, protocol: the data, the network and how it is trained.
        computing: how.
        resume: go on from the last epoch of a training that was stopped, to the same numbers bit for bit; without it a
            folder that holds one is refused.
        tensorboard: log to `folder`/tensorboard.
        watcher: told of progress.

    Raises:
        SettingError: when `folder` holds a training that is not to be resumed, one of other settings, one that another process is at, or
            weights or a mask of none, or sparse="on" cannot be.
    """
    Grid(masks=() if cell.mask == DENSE else (cell.mask,), sparsity=(cell.sparsity,), recipes=(cell.recipe,))  # checks the names
    bench = Bench(experiment or Experiment(), protocol or Protocol())
    watcher, runner = watcher or Watcher(), _Single(bench, folder, computing, masked=cell.mask != DENSE, moves=is_dynamic(cell.mask))
    if is_mask_file(cell.mask):  # which tells its sparsity of this network only now
        cell = replace(cell, sparsity=file_sparsity(cell.mask, runner.bench.model(cell.seed)))
    name = runner.name(cell)
    finished = by_rank_0(lambda: _look(runner, cell, name, resume=resume))
    watcher.begin(total=1, done=len(finished))
    if name in finished:
        return finished[name]
    with claimed(runner.folder / "train.lock") if ranks() == 1 else nullcontext(True) as mine:
        if not mine:
            fix = "wait for it and add --resume, or choose another --out"
            raise SettingError(f"another process trains in {runner.folder}", allowed="one at a time", fix=fix)
        done = runner.train(cell, name, watcher, log_dir=runner.folder / "tensorboard" if tensorboard else None)
        if leads():
            _keep(done, runner)
    watcher.finished(cell, done.row)
    return done.row


def _keep(done: Trained, runner: Runner) -> None:
    write_weights(done.model, runner.folder / "model.safetensors")
    if done.mask is not None:
        done.mask.save(runner.folder / "mask.mask")
    runner.ledger.append(done.row)
    shutil.rmtree(runner.folder / "unfinished")


def cell_of(mask: str, *, sparsity: float | None, recipe: str | None, seed: int) -> Cell:
    """The training of `mask` (a method, a mask file or "dense"); what is None is as it is where nothing is told.

    A file knows its sparsity, and so does an N:M pattern; other methods take 0.98. The recipe is "best", or "default" for "dense".

    Raises:
        UnknownName, SettingError: for a mask that there is not, and a sparsity that is given for a mask file or a dense network.
    """
    if recipe is None:
        recipe = "default" if mask == DENSE else "best"
    fixed = 0.0 if mask == DENSE else file_sparsity(mask) if is_mask_file(mask) else None
    if fixed is None:
        check_mask(mask)
        density = None if is_dynamic(mask) else pattern(method_of(mask).pattern).density
        usual = 0.98 if density is None else 1 - density
        return Cell(mask, usual if sparsity is None else sparsity, recipe, seed)
    if sparsity is not None:
        raise SettingError(
            f"sparsity came as {sparsity} with mask {mask}",
            allowed=f"no sparsity here: it is {fixed:g} already",
            fix="leave --sparsity out, or name a method",
        )
    return Cell(mask, fixed, recipe, seed)


def _look(runner: Runner, cell: Cell, name: str, *, resume: bool) -> dict[str, dict[str, Any]]:
    """The finished rows in the folder, by their ids; it is there afterwards, and holds nothing that would be mixed with this training."""
    finished = runner.ledger.by_id()
    _check_folder(runner, cell, name, finished=finished, resume=resume)
    if name not in finished:
        runner.folder.mkdir(parents=True, exist_ok=True)  # fails now, not after the work
    return finished


def _check_folder(runner: Runner, cell: Cell, name: str, *, finished: Mapping[str, Mapping[str, Any]], resume: bool) -> None:
    """Refuse a folder whose training would be mixed with this one."""
    unfinished = [path.stem for path in (runner.folder / "unfinished").glob("*.pt")]
    if not finished and not unfinished:
        if (runner.folder / "unfinished").exists():  # which may hold rounds of a ticket, or of a teacher
            return
        if others := [file for file in ("model.safetensors", "mask.mask") if (runner.folder / file).exists()]:
            raise SettingError(
                f"{runner.folder} holds {' and '.join(others)} of no training here, which this one would replace",
                allowed="a new folder",
                fix="choose another --out",
            )
        if resume:
            warnings.warn(f"{runner.folder} holds nothing yet: beginning anew", stacklevel=2)
        return
    what = "a finished training" if finished else "a training that was stopped"
    if not resume:
        fix = "choose another --out" if finished else "add --resume to go on with it, or choose another --out"
        raise SettingError(f"{runner.folder} holds {what}", allowed="a new folder, or --resume", fix=fix)
    if name not in finished and name not in unfinished:
        row: Mapping[str, Any] = next(iter(finished.values()), {})
        there, here = row.get("settings", {}), runner.settings(cell)
        other = [f"{key} {there.get(key)!r} there, {here[key]!r} here" for key in here if there and there.get(key) != here[key]]
        if there.get("recipe") == cell.recipe and settings_id({**here, "techniques": row.get("techniques")}) != name:
            other.append(f"what is in the recipe {cell.recipe} has changed")
        raise SettingError(
            f"{runner.folder} holds {what} with other settings" + (f": {', '.join(other)}" if other else ""),
            allowed="the settings, data and version of anymask that it was begun with",
            fix="give those, or choose another --out",
        )


def prune_to(
    out: str | Path,
    method: str,
    *,
    sparsity: float | None,
    seed: int = 0,
    experiment: Experiment | None = None,
    protocol: Protocol | None = None,
    refit: str | Path | None = None,
    force: bool = False,
    **how: Any,
) -> tuple[Mask, dict[str, float]]:
    """Write the mask that `compare` makes for `seed` to `out`: by `method`, on the initialisation of that seed or on weights.

    Until a lottery ticket is found its finished rounds are beside `out`, in a folder that ends in .rounds; a second call
    goes on from there, in the middle of a round. Where a ticket starts from other weights than the initial ones, they are beside
    `out`, too, in a file that ends in .safetensors.

    Args:
        refit: where to write the network of the experiment's weights, pruned by the mask and refitted (`anymask.reconstruct`).
        force: replace files that are there; never the experiment's weights.
        how: other settings of `anymask.prune`: rounds, exclude, floor ...

    Returns:
        The mask, and with `refit` test accuracies in [0, 1]: "dense", "pruned" as it is, "refitted".

    Raises:
        UnknownName: for a method that is not in `METHODS`.
        SettingError: for a sparsity out of range, a method whose mask moves, files that are there where there is no `force`,
            weights that would be replaced, rounds of other settings, or `refit` without weights.
    """
    if is_dynamic(method):
        raise SettingError(
            f"{method} moves its mask while it trains",
            allowed="a method that makes a mask before",
            fix=f"`anymask train --mask {method} --out DIR` ends with its mask in DIR/mask.mask",
        )
    check_mask(method, sparsity=sparsity)
    out, row = Path(out), method_of(method)
    written = [out, *([weights_file(out)] if "rewind_step" in row.needs or not row.rewinds else [])]
    for path in (*written, *([] if refit is None else [Path(refit)])):
        if path.exists() and not force:
            raise SettingError(f"{path} is there already", allowed="a new file", fix="choose another, or add --force to replace it")
    out.parent.mkdir(parents=True, exist_ok=True)  # fails now, not after the work
    bench = Bench(experiment or Experiment(), protocol or Protocol())
    _check_written(written, bench.checkpoint(seed))
    if refit is not None:
        _check_refit(Path(refit), written, bench.checkpoint(seed))
    if "train" in row.needs:
        how["training"] = bench.settings(seed)  # which the names of folders in a run folder have
    masks = Masks(bench, lambda *_: out)
    mask = masks.make(method, sparsity=sparsity, seed=seed, model=bench.model(seed), **how)
    accuracies = {} if refit is None else _refit_to(Path(refit), mask, bench, seed)
    mask.save(out)
    if "train" in row.needs:
        shutil.rmtree(rounds_folder(out), ignore_errors=True)
    return mask, accuracies


def _check_written(written: list[Path], checkpoint: Path | None) -> None:
    if checkpoint is not None and checkpoint.resolve() in {path.resolve() for path in written}:
        raise SettingError(
            f"out came as {written[0]}, which would replace {checkpoint}, the weights that this begins with",
            allowed="a mask file elsewhere; the weights of a ticket are beside it, under its name",
            fix="choose another --out",
        )


def _check_refit(path: Path, others: list[Path], checkpoint: Path | None) -> None:
    if checkpoint is None:
        raise SettingError(
            f"refit came as {path} without a trained network",
            allowed="it with weights, whose network is pruned and refitted",
            fix="give --weights CHECKPOINT, or leave --refit out",
        )
    if path.is_dir() or path.resolve() in {other.resolve() for other in (*others, checkpoint)}:
        raise SettingError(
            f"refit came as {path}, which is " + ("a folder" if path.is_dir() else "the place of another file of this command"),
            allowed="a file of its own",
            fix="choose another --refit",
        )


def _refit_to(path: Path, mask: Mask, bench: Bench, seed: int) -> dict[str, float]:
    train, _, test = bench.batches(seed)
    assert test is not None
    dense, pruned, refitted = (bench.model(seed) for _ in range(3))
    mask.apply(pruned)
    reconstruct(refitted, mask, data=train, seed=seed)
    write_weights(refitted, path)
    return {name: accuracy(model, test) for name, model in {"dense": dense, "pruned": pruned, "refitted": refitted}.items()}
