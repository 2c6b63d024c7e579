"""A sweep on a Ray cluster: Ray decides where a training runs and begins it anew when its node is lost; this process keeps the ledger.

What nodes need: anymask of the same version, and the data (and mask files and modules of your own) at the same paths. The run folder
need not be theirs. Where they see it (one machine, NFS), trainings leave their checkpoints and lottery tickets their rounds in it, and
go on from there; elsewhere what is cut off begins anew. A mask is made once, on any node, and sent to all that train it.
"""

import logging
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anymask.errors import AnymaskError, DataError, SettingError, UnknownName
from anymask.runlog import atomic
from anymask.sweep.claims import claimed, clear_halves
from anymask.sweep.compare import Runner, Watcher, command
from anymask.sweep.masks import weights_file
from anymask.sweep.run import LOOK_AGAIN, Benches, Task, Worker
from anymask.train import Computing

LOST = 3  # how often Ray begins a training anew, whose node or process died, before that counts as one try that failed
_REACH = 5.0  # seconds for the cluster to answer
_BENCHES = Benches()  # of this process, where it is one of Ray's: a node reads its data once


@dataclass(frozen=True)
class Order:
    """What a node is told."""

    task: Task
    computing: Computing | None
    here: Path  # the folder that paths are relative to
    folder: Path
    claim: Path  # a file that lies in `folder` as long as this is going on
    masks: Mapping[str, bytes]  # files that the training needs


def train(order: Order) -> dict[str, Any]:
    """The row of a training; runs on a node."""
    with _runner(order) as runner:
        clear_halves(runner.checkpoint_file(order.task.name))
        return runner.train(order.task.cell, order.task.name, Watcher()).row


def make_mask(order: Order) -> dict[str, bytes]:
    """The files of the mask that a training begins with; runs on a node."""
    cell = order.task.cell
    with _runner(order) as runner:
        file = runner.mask_file(cell.mask, cell.sparsity, cell.seed)
        runner.masks.make_file(file, cell.mask, sparsity=cell.sparsity, seed=cell.seed, model=runner.bench.model(cell.seed))
        return _contents(file)


@contextmanager
def _runner(order: Order) -> Iterator[Runner]:
    """What trains `order` on this node: in the run folder where that is seen from here, else in one that goes with the training."""
    torch.set_num_threads(1)  # one core is what Ray has set aside
    with suppress(OSError):  # no such folder here: then paths that are not absolute are not found, and the error says which
        os.chdir(order.here)
    with tempfile.TemporaryDirectory() as own:
        folder = order.folder if order.claim.exists() else Path(own)
        runner = _BENCHES.runner(order.task.part, folder, order.computing)
        if runner.name(order.task.cell) != order.task.name:
            raise DataError(
                f"{socket.gethostname()} has other data, mask files or settings than the machine where the sweep was started",
                allowed="the same files, and anymask of the same version",
                fix="copy them there, or take that node out of the cluster; what is finished is kept",
            )
        for name, content in order.masks.items():
            file = folder / "masks" / name
            if not file.exists() or file.read_bytes() != content:
                _write(file, content)
        yield runner


def _contents(mask: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (weights_file(mask), mask) if file.exists()}  # a mask is whole with its weights


def _write(file: Path, content: bytes) -> None:
    with atomic(file) as out:
        out.write(content)


def on_ray(worker: Worker, address: str, *, watcher: Watcher) -> None:
    """Train on the cluster at `address` what is left of the work of `worker`.

    Each training has one core, and one GPU where the plan's device is cuda, or auto in a cluster that has GPUs.

    Raises:
        AnymaskError: without Ray, for an address where no cluster answers, for a cluster that can run none of the trainings, and for
            a node that lacks the data or anymask.
        Stopped: when the time is up; what still runs is stopped.
    """
    with _cluster(address) as ray:
        driver = _Driver(ray, worker, watcher)
        if driver.room() < 1:
            raise SettingError(
                f"ray came as {address!r}, a cluster without a {' and a '.join(driver.needs)}",
                allowed="one where a training can run",
                fix="add a node to it, or give --device cpu",
            )
        driver.work()


@dataclass(frozen=True)
class _Running:
    task: Task
    mask: Path | None  # the one that is made; None where it is trained
    claim: ExitStack


class _Driver:
    """Hands trainings to Ray in their order, and what comes back to the ledger."""

    def __init__(self, ray: Any, worker: Worker, watcher: Watcher) -> None:
        self.ray, self.worker, self.watcher = ray, worker, watcher
        self.needs = _needs(worker.planned, there=ray.cluster_resources())
        how = {"num_cpus": self.needs["CPU"], "num_gpus": self.needs.get("GPU", 0), "max_retries": LOST}
        self.train, self.make = ray.remote(**how)(train), ray.remote(**how)(make_mask)
        self.running: dict[Any, _Running] = {}

    def room(self) -> int:
        """How many trainings fit the cluster as it is now."""
        there = self.ray.cluster_resources()
        return int(min(there.get(name, 0) // amount for name, amount in self.needs.items()))

    def work(self) -> None:
        """Train, until nothing is left.

        Raises:
            Stopped: when the time is up.
        """
        done = self.worker.ledger.ids()
        waiting = [task for task in self.worker.planned if task.name not in done]
        try:
            while (waiting := self._begin(waiting)) or self.running:
                for ref in self._ended():
                    waiting = [*waiting, *self._keep(ref)]
                self.worker.clock.check()
        finally:
            for running in self.running.values():
                running.claim.close()

    def _ended(self) -> list[Any]:
        if self.running:
            return self.ray.wait(list(self.running), timeout=LOOK_AGAIN)[0]
        time.sleep(LOOK_AGAIN)  # others do what is left
        return []

    def _begin(self, waiting: Sequence[Task]) -> list[Task]:
        """Hand over what there is room for; those of `waiting` that are still to be trained, the ones that failed last.

        One more than there is room for, so that no node waits for this process, and an autoscaler sees that more is to come.
        """
        most = self.room() + 1
        if len(self.running) >= most:
            return list(waiting)
        rows, failed, left = self.worker.ledger.by_id(), self.worker.failed(), []
        for task in sorted(waiting, key=lambda task: len(failed.get(task.name, ()))):
            if task.name in rows:  # another process has trained it
                self.watcher.finished(task.cell, rows[task.name])
                continue
            if len(failed.get(task.name, ())) > self.worker.retries:
                continue
            if len(self.running) >= most or not self._hand_over(task):
                left.append(task)
        return left

    def _hand_over(self, task: Task) -> bool:
        """Let Ray train `task`; False when it is another process's, or its mask is to be made first."""
        folder = self.worker.folder.absolute()
        mask = None if task.mask is None or task.mask.exists() else task.mask.absolute()
        lock = mask.with_suffix(".lock") if mask else folder / "claims" / f"{task.name}.lock"
        with ExitStack() as claim:
            if not claim.enter_context(claimed(lock)):
                return False
            if (mask and mask.exists()) or task.name in self.worker.ledger.ids():  # by another process, just now
                return False
            masks = {} if mask or not task.mask else _contents(task.mask)
            order = Order(task, self.worker.computing, Path.cwd(), folder, lock, masks)
            ref = (self.make if mask else self.train).remote(order)
            self.running[ref] = _Running(task, mask, claim.pop_all())
        return not mask

    def _keep(self, ref: Any) -> list[Task]:
        """Keep what `ref` has brought; what is to be tried again."""
        running = self.running.pop(ref)
        task = running.task
        with running.claim:
            try:
                made = self.ray.get(ref)
                if not running.mask:
                    made["command"] = command()  # a node knows Ray's alone
                    self.worker.ledger.append(made)
            except (self.ray.exceptions.RayError, ValueError) as error:
                self.watcher.left(task.cell, self.worker.note(task, self._reason(error)))
                return [] if running.mask else [task]
            if running.mask:
                for name, content in made.items():
                    _write(running.mask.with_name(name), content)
                return []
            (self.worker.folder / "unfinished" / f"{task.name}.pt").unlink(missing_ok=True)
        self.watcher.finished(task.cell, made)
        return []

    def _reason(self, error: Exception) -> BaseException:
        """What was raised on the node; raised here where that node can train nothing: it would fail all that is left, one by one."""
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, (DataError, UnknownName)):  # this process knows all names: that node lacks a module of the user's
            raise cause
        if isinstance(cause, self.ray.exceptions.RaySystemError):
            raise AnymaskError(
                f"a node cannot begin a training ({str(cause).splitlines()[0]})",
                allowed="nodes that have anymask of this version",
                fix="install it there, or take that node out of the cluster; what is finished is kept",
            ) from error
        return cause


def _needs(planned: Sequence[Task], *, there: Mapping[str, float]) -> dict[str, int]:
    devices = {task.part.experiment.device for task in planned}
    gpu = any(device.startswith("cuda") for device in devices) or ("auto" in devices and there.get("GPU", 0) >= 1)
    return {"CPU": 1, "GPU": 1} if gpu else {"CPU": 1}


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """The module ray, connected; what this process has begun there ends with the block."""
    try:
        import ray
    except ImportError as error:
        raise AnymaskError("ray is not installed", allowed="ray 2.40 or newer", fix="pip install 'anymask[ray]'") from error
    try:
        _reach(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise SettingError(
            f"ray came as {address!r}, and no cluster answers there ({str(error).splitlines()[0]})",
            allowed="the address of a cluster that runs, as `ray start --head` shows it, or auto for the one of this machine",
            fix="start it, or look at `ray status`",
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Fail within seconds: Ray itself tries for minutes where nobody answers, and then ends the process."""
    host, _, port = address.partition("://")[2].rpartition(":") if "://" in address else address.rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=_REACH).close()
