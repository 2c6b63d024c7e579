"""The masks of a grid: by a method, from a file, or moving as it trains; and where a training begins."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from anymask.config import Bench
from anymask.durations import Duration
from anymask.errors import FileFormatError, SettingError
from anymask.formats import load_mask
from anymask.mask import Mask, digest
from anymask.pruning import DYNAMIC, METHODS, Dynamic, Ticket, lottery_ticket, prune
from anymask.pruning.budget import density_of
from anymask.pruning.lottery import Train
from anymask.pruning.methods import is_method, method_of
from anymask.pruning.patterns import pattern
from anymask.ranks import by_rank_0, leads
from anymask.registry import lookup
from anymask.runlog import atomic
from anymask.sweep.claims import clear_halves, make_once
from anymask.sweep.pace import Pace
from anymask.train import Computing
from anymask.train.computing import same_bits

DENSE = "dense"
REWIND = "5%"  # of the training: where lottery-rewind returns to


@dataclass(frozen=True)
class Start:
    """Where a training begins.

    Args:
        mask: None for the dense network.
        weights: a state dict instead of the initialisation, as rewound lottery tickets have.
        step: the optimiser step to begin at.
        dynamic: how the mask moves; None for one that stays.
    """

    mask: Mask | None
    weights: Mapping[str, Tensor] | None = None
    step: int = 0
    dynamic: Dynamic | None = None


def check_mask(mask: str, *, sparsity: float | None = None) -> None:
    """Refuse what is neither a mask method nor a mask file, or a sparsity that it cannot have.

    Raises:
        UnknownName, SettingError: with what is meant, or allowed.
    """
    if is_mask_file(mask) or mask == DENSE:
        return
    if Path(mask).suffix and "+" not in mask and not Path(mask).exists():
        raise SettingError(f"no mask file at {mask}", allowed="a file that load_mask reads, or a mask method", fix="check the path")
    base = mask.partition("+")[0]
    lookup(dict.fromkeys([*METHODS, *DYNAMIC]), base, what="mask method")
    if base in DYNAMIC:
        dynamic_named(mask)
    elif sparsity is not None:
        density_of(sparsity, pattern=pattern(method_of(mask).pattern))


def is_mask_file(mask: str) -> bool:
    """Whether `mask` is a file of the user's; a file that happens to be called "snip" or "dense" hides nothing."""
    return mask != DENSE and not is_method(mask) and mask.partition("+")[0] not in DYNAMIC and Path(mask).is_file()


def is_dynamic(mask: str) -> bool:
    """Whether `mask` moves while it trains: a row of `DYNAMIC`, with changes after a plus or not."""
    return mask.partition("+")[0] in DYNAMIC


def dynamic_named(mask: str) -> Dynamic:
    """The row of `DYNAMIC` that `mask` stands for, with another time between updates or another scope after a plus.

    Raises:
        SettingError: for what is neither.

    Example:
        >>> dynamic_named("rigl+25it+er").every, dynamic_named("rigl+25it+er").start, dynamic_named("gmp+global").scope
        ('25it', 'random-er', 'global')
    """
    base, *words = mask.split("+")
    row = DYNAMIC[base]
    for word in words:
        if word[:1].isdigit():
            row = replace(row, every=str(Duration.parse(word)))
        elif row.shrinks:
            row = replace(row, scope=word)
        else:
            method_of(f"random-{word}")
            row = replace(row, start=f"random-{word}")
    return row


class Masks:
    """Makes the masks of one bench, and keeps them in a folder.

    Args:
        bench: data, network and protocol.
        file_of: where the mask of (name, sparsity, seed) is kept.
        computing: how the rounds of a lottery ticket are trained; sparse="on" means all but the first, which has no mask.
    """

    def __init__(
        self, bench: Bench, file_of: Callable[[str, float, int], Path], computing: Computing | None = None, pace: Pace | None = None
    ) -> None:
        self.bench, self.file_of, self.computing = bench, file_of, replace(computing or Computing(), diagnose="off")
        self.pace = pace or Pace()

    def start(self, mask: str, *, sparsity: float, seed: int, model: nn.Module) -> Start:
        """Where the trainings of this mask, sparsity and seed begin, with any recipe: made once on the initialisation, then read.

        Several ranks make it together, and all have that of rank 0, which alone writes and reads files here.
        """
        if is_mask_file(mask):
            return Start(by_rank_0(lambda: load_mask(mask, model=model)))
        moving = dynamic_named(mask) if is_dynamic(mask) else None
        file = self.file(mask, sparsity=sparsity, seed=seed)
        if file is None:
            return Start(None, dynamic=moving)
        if not by_rank_0(file.exists):
            how: dict[str, Any] = {"sparsity": sparsity, "seed": seed, "model": model}
            make_once(file, lambda: self.make_file(file, mask, **how), wait=self.pace.wait)  # the rounds of a ticket share a folder
        found = by_rank_0(lambda: _read(file, moving.start if moving else mask, sparsity=sparsity, seed=seed))
        return found if moving is None else Start(found.mask, dynamic=moving)

    def file(self, mask: str, *, sparsity: float, seed: int) -> Path | None:
        """Where the mask that these trainings begin with is kept; None where they begin dense, or with a file of the user's."""
        if mask == DENSE or is_mask_file(mask) or (is_dynamic(mask) and dynamic_named(mask).start == DENSE):
            return None
        return self.file_of(mask, sparsity, seed)

    def make_file(self, file: Path, mask: str, **how: Any) -> None:
        """Make the mask that trainings of `mask` begin with; nobody else may be making it."""
        by_rank_0(lambda: clear_halves(file))
        made = self.make(dynamic_named(mask).start if is_dynamic(mask) else mask, **how)
        by_rank_0(lambda: made.save(file))

    def make(self, mask: str, *, sparsity: float | None, seed: int, model: nn.Module, **how: Any) -> Mask:
        """The mask, made anew, by the method of that name with the settings `how`; weights that a ticket starts from are kept.

        On several ranks the mask is that of rank 0.
        """
        with same_bits(self.computing.deterministic):
            if "train" in method_of(mask).needs:
                made = self._ticket(mask, sparsity=sparsity, seed=seed, model=model, **how)
            else:
                made = prune(model, mask, sparsity=sparsity, data=self.bench.batches(seed)[0], seed=seed, **how).broadcast()
        return Mask(made, info=made.info | {"method": method_of(mask).name, "network": self._network()})

    def _ticket(self, mask: str, *, sparsity: float | None, seed: int, model: nn.Module, **how: Any) -> Mask:
        row = method_of(mask, scope=how.get("scope"), pattern=how.get("pattern"))
        file = self.file_of(mask, sparsity or 0.0, seed)
        steps = self.bench.total_steps(seed)
        how = {"rounds": row.rounds, "scope": row.scope, "pattern": row.pattern} | how
        ticket: Ticket = lottery_ticket(
            model,
            sparsity=sparsity,
            train=self.trainer(seed, folder=(folder := rounds_folder(file))),
            rewind_step=Duration.parse(REWIND).steps(total=steps) if "rewind_step" in row.needs else 0,
            rewinds=row.rewinds,
            seed=seed,
            folder=folder,  # so that a stopped search goes on
            **how,
        )
        if leads() and (ticket.step or not row.rewinds):
            with atomic(weights_file(file)) as out:
                out.write(to_bytes(dict(ticket.weights)))
        return ticket.mask

    def trainer(self, seed: int, *, folder: Path) -> Train:
        """What trains the rounds of a lottery ticket: the default recipe on the training images; one that stopped goes on."""
        train, _, _ = self.bench.batches(seed)
        unfinished = folder / "unfinished.pt"  # of the round that is not there yet

        def trainer(model: nn.Module, mask: Mask | None, first: int, last: int | None) -> None:
            computing = self.computing if mask is not None else replace(self.computing, sparse="auto")
            self.pace.between()
            how: dict[str, Any] = {"mask": mask, "first_step": first, "last_step": last, "seed": seed}
            self.pace.fit(model, train, protocol=self.bench.protocol, computing=computing, file=unfinished, **how)
            if leads():
                unfinished.unlink(missing_ok=True)

        return trainer

    def _network(self) -> dict[str, Any]:
        """What rebuilds the network, for those who look at the mask later."""
        train = self.bench.dataset.train
        return {"model": self.bench.experiment.model, "classes": len(self.bench.dataset.classes), "input": list(train.images.shape[1:])}


def _read(file: Path, mask: str, *, sparsity: float, seed: int) -> Start:
    """Where a mask that was made leads to, with the weights beside it; a file of another mask is refused, whatever its name."""
    found, weights, row = load_mask(file), weights_file(file), method_of(mask)
    asked = {"method": row.name, "scope": row.scope, "pattern": row.pattern, "sparsity": sparsity, "seed": seed}
    other = [f"{key} {found.info.get(key)!r}, not {value!r}" for key, value in asked.items() if found.info.get(key) != value]
    if other:
        raise FileFormatError(
            f"{file} holds another mask than its name says: {'; '.join(other)}",
            allowed="the file that was made there",
            fix="remove it, and the mask is made anew; a mask file of your own is given by its path",
        )
    if weights.exists():
        return Start(found, load_file(weights), int(found.info["rewind_step"]))
    if found.info.get("rewind_step") or found.info.get("rewinds") is False:
        raise FileFormatError(
            f"{weights}, the weights that trainings of {file.name} begin with, is not there",
            allowed="both files, as they were made",
            fix="copy it, too, or remove the mask, and both are made anew",
        )
    return Start(found)


def digests(start: Start) -> dict[str, str]:
    """What tells two starts apart: of the mask, and of the weights where they are not the initialisation."""
    parts: dict[str, Mapping[str, Tensor] | None] = {"digest": start.mask, "weights": start.weights}
    return {name: digest(tensors) for name, tensors in parts.items() if tensors is not None}


def weights_file(mask_file: Path) -> Path:
    """Where the weights are that trainings of a mask begin with, where that is not the initialisation."""
    return _beside(mask_file, ".safetensors")


def rounds_folder(mask_file: Path) -> Path:
    """Where the finished rounds of a lottery ticket are until it is found."""
    return _beside(mask_file, ".rounds")


def _beside(mask_file: Path, ending: str) -> Path:
    return mask_file.with_name(mask_file.name.removesuffix(".mask") + ending)  # with_suffix makes one of ticket-0.50 and ticket-0.60


def file_name(mask: str, *, sparsity: float, seed: int, settings: str) -> str:
    """The name of a mask file in a run folder; `settings` is a hash of what decides it."""
    safe = re.sub(r"[^\w.+-]", "_", mask)  # 2:4 holds what some file systems refuse
    return f"{safe}-{sparsity:g}-seed{seed}-{settings}.mask"


def file_sparsity(mask: str, model: nn.Module | None = None) -> float:
    """The sparsity of a mask file; with the model of all its prunable weights, where the mask of a checkpoint is its zeros."""
    return round(load_mask(mask, model=model).sparsity, 6)
