"""What each rank of tests/test_distributed.py does: `torchrun distributed_worker.py SCENARIO FOLDER`.

Each rank writes `SCENARIO-RANK.pt` into FOLDER: the whole weights, and the optimiser's slots of the held ones.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import anymask
from anymask import Recipe
from anymask.cli.ranks import leave
from anymask.errors import TechniqueError
from anymask.schedules import Schedule
from anymask.techniques import (
    DensityLR,
    FanInInit,
    GhostActivation,
    GhostSkip,
    IsometryInit,
    LabelSmoothing,
    LRsI,
    Preconditioning,
    RescaleSettings,
)

STEPS, HALF, EACH = 8, 4, 6  # steps in all, where it is saved, samples of a rank in a step


def network() -> nn.Module:
    """Two convolutions whose group norms know no batch, so that two ranks are one process with twice the batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU())
    model.extend([nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3)])
    return model


def recipe() -> Recipe:
    fade = Schedule("linear", full="0%", end="60%")
    return Recipe((GhostActivation(schedule=fade), GhostSkip(kind="free", schedule=fade), LabelSmoothing()), name="free")


def batches(rank: int | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of a rank; those of both, one after the other, for None."""
    generator = torch.Generator().manual_seed(1)
    whole = [(torch.randn(2 * EACH, 1, 4, 4, generator=generator), torch.arange(2 * EACH) % 3) for _ in range(STEPS)]
    cut = slice(None) if rank is None else slice(rank * EACH, (rank + 1) * EACH)
    return [(x[cut], y[cut]) for x, y in whole]


def mask_of(model: nn.Module) -> anymask.Mask:
    return anymask.prune(model, "magnitude", sparsity=0.6)


def train(
    wrap: Callable[[nn.Module], nn.Module],
    rank: int | None,
    *,
    chosen: Recipe | None = None,
    seed: int = 0,
    save: Path | None = None,
    load: Path | None = None,
) -> dict[str, torch.Tensor]:
    """Hold, recipe, steps, finish. With `save` it stops in the middle and saves; with `load` it goes on from there."""
    inner = network()
    mask = mask_of(inner).broadcast()
    model = wrap(inner)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    held = anymask.hold(mask, model, optimizer)
    saved = None if load is None else torch.load(load, weights_only=True)
    data = batches(rank)
    running = (chosen or recipe()).attach(
        model, optimizer, total_steps=STEPS, example=data[0][0][:2], data=data, seed=seed, state=None if saved is None else saved["recipe"]
    )
    if saved is not None:
        inner.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    for x, y in data[running.position : STEPS if save is None else HALF]:
        running.loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        running.step()
    if save is not None:
        if rank == 0:
            torch.save({"model": inner.state_dict(), "optimizer": optimizer.state_dict(), "recipe": running.state_dict()}, save)
        return {}
    assert running.finish() is model
    found = {name: whole(p) for name, p in inner.named_parameters()}
    for name, parameter in held.parameters.items():
        for slot in ("exp_avg", "exp_avg_sq"):
            found[f"{slot} of {name}"] = whole(optimizer.state[parameter][slot])
    held.release()
    return found


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp2(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            fully_shard(layer)
    return fully_shard(model)


def refusals(rank: int) -> dict[str, torch.Tensor]:
    """What cannot work on a model that is spread already says so, and leaves it as it was."""
    learned, scaled = Recipe((GhostSkip(kind="learned"),)), Recipe((LRsI(settings=RescaleSettings(iterations=2)),))
    for wrap, chosen, said in ((ddp, learned, "several ranks"), (fsdp2, scaled, "cut by fully_shard"), (fsdp2, learned, "several ranks")):
        model = wrap(network())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        groups = len(optimizer.param_groups)
        with pytest.raises(TechniqueError, match=said):
            chosen.attach(model, optimizer, total_steps=9, example=batches(rank)[0][0], data=batches(rank))
        assert len(optimizer.param_groups) == groups
        assert len(list(model.parameters())) == len(list(network().parameters()))
    for technique in (FanInInit(), IsometryInit(), Preconditioning()):
        model = network()
        mask, model = mask_of(model), fsdp2(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(TechniqueError, match="cut by fully_shard"):
            Recipe((technique,)).attach(model, optimizer, total_steps=9, mask=mask)
    return {}


def refitted(rank: int) -> dict[str, torch.Tensor]:
    """Rank 0 refits for all, on its data; what it meets, all of them meet."""
    model, nothing = network().eval(), torch.full_like(batches(0)[0][0], torch.nan)
    mask = mask_of(model)
    before = {name: whole(value) for name, value in model.named_parameters()}
    with pytest.raises(TechniqueError, match="not finite"):
        anymask.reconstruct(model, mask, data=[nothing] if rank == 0 else batches(rank))
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    anymask.reconstruct(model, mask, data=batches(rank) if rank == 0 else [])
    with pytest.raises(TechniqueError, match="cut by fully_shard"):
        anymask.reconstruct(fsdp2(network()), mask, data=batches(rank))
    return {name: whole(value) for name, value in model.named_parameters()}


def main(folder: Path, wanted: list[str]) -> None:
    dist.init_process_group("gloo")
    rank, saved = dist.get_rank(), folder / "saved.pt"
    scale = Recipe((LRsI(settings=RescaleSettings(iterations=3), at_most="100%"),))
    scenarios = {
        "ddp": lambda: train(ddp, rank),
        "fsdp2": lambda: train(fsdp2, rank),
        "lrsi": lambda: train(ddp, rank, chosen=scale),
        "drawn": lambda: train(
            ddp, rank, chosen=Recipe((FanInInit(redraw=True), IsometryInit(), DensityLR(), Preconditioning(every=3))), seed=rank
        ),
        "steps": lambda: train(fsdp2, rank, chosen=Recipe((DensityLR(),))),
        "save": lambda: train(ddp, rank, save=saved),
        "resume": lambda: train(ddp, rank, load=saved),
        "refitted": lambda: refitted(rank),
        "refusals": lambda: refusals(rank),
    }
    for name in wanted:
        torch.save(scenarios[name](), folder / f"{name}-{rank}.pt")
        dist.barrier()
    leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
