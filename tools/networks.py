"""What each technique does on networks that nobody here wrote; a row a network and technique in results/networks.jsonl.

    python tools/networks.py               all that are not in the file yet
    python tools/networks.py resnet10t     these networks, anew

A technique may find nothing to apply to; it then says so, and the row holds what it says (`refused`).
"""

import copy
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from network_list import NETWORKS, Network, without_torchvisions_operators
from network_table import good
from torch import Tensor, nn

from anymask import Mask, Recipe, hold, prunable
from anymask.errors import TechniqueError
from anymask.runlog import Ledger, atomic
from anymask.schedules import Schedule
from anymask.surgery import fingerprint, logits_of, run
from anymask.techniques import GhostActivation, GhostSkip, LabelSmoothing, LRsI, RescaleSettings, Technique

FILE = Path(__file__).resolve().parent.parent / "results" / "networks.jsonl"
FADE = Schedule("linear", full="0%", end="60%")
TECHNIQUES: dict[str, Technique] = {
    "ghost_activation": GhostActivation(FADE),
    "ghost_skip": GhostSkip(FADE),
    "ghost_skip learned": GhostSkip(FADE, kind="learned"),
    "lrsi": LRsI(settings=RescaleSettings(iterations=2), at_most="100%"),
    "label_smoothing": LabelSmoothing(),
}
BATCH, STEPS, SPARSITY = 4, 3, 0.9


def seen(model: nn.Module, example: Any, *, training: bool) -> Tensor:
    """The logits (N, 10), dropout and drop path by a fixed seed."""
    torch.manual_seed(1)
    model.train(training)
    return logits_of(run(model, example))


def try_one(network: Network, technique: Technique) -> dict[str, Any]:
    """Attach, compare at strengths 1 and 0, train three steps under a mask, finish."""
    torch.manual_seed(0)
    model, example, target = network.build(), network.example(BATCH), torch.arange(BATCH) % 10
    with torch.no_grad():
        for parameter in model.parameters():  # heads and last norms that begin at 0 would hide what is before them
            if not parameter.any():
                parameter.normal_(std=0.1)
    generator = torch.Generator().manual_seed(0)
    mask = Mask({name: torch.rand(p.shape, generator=generator) >= SPARSITY for name, p in prunable(model).items()})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    hold(mask, model, optimizer)
    before, twin = fingerprint(model), copy.deepcopy(model)
    recipe = Recipe((technique,))
    try:
        running = recipe.attach(model, optimizer, total_steps=STEPS, example=example, data=[(example, target)])
    except TechniqueError as refusal:
        return {"refused": str(refusal), "untouched": fingerprint(model) == before}
    row: dict[str, Any] = {"found": running.found[technique.name]}
    row["changed"] = differ(technique, running, (model, twin), example, target)
    if technique.seam != "init":
        row["equal_at_zero"] = equal_at_zero(running, (model, twin), example, target)
    losses = []
    for _ in range(STEPS):
        loss = running.loss(seen(model, example, training=True), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        running.step()
        losses.append(float(loss))
    running.finish()
    row["three_steps"] = all(torch.isfinite(torch.tensor(losses)).tolist())
    row["nothing_left"] = fingerprint(model) == before
    row["zeros"] = all(not model.get_parameter(name)[~kept].any() for name, kept in mask.items())
    return row


def differ(technique: Technique, running: Any, nets: tuple[nn.Module, nn.Module], example: Any, target: Tensor) -> bool:
    """Whether the technique changes the output (or, at the seam of the loss, the loss) at strength 1."""
    with torch.no_grad():
        # The norms' batch statistics keep signals of a freshly pruned deep network from fading to nothing, as in training.
        mine, plain = (unmoved(net, example) for net in nets)
        if technique.seam == "loss":
            mine, plain = running.loss(mine, target), nn.functional.cross_entropy(plain, target)
    return not torch.equal(mine, plain)


def unmoved(net: nn.Module, example: Any) -> Any:
    """What it gives in training, and its running statistics stay."""
    state = copy.deepcopy(net.state_dict())
    given = seen(net, example, training=True)
    net.load_state_dict(state)
    return given


def equal_at_zero(running: Any, nets: tuple[nn.Module, nn.Module], example: Any, target: Tensor) -> bool:
    """Whether output and gradients are the plain network's, bit for bit, at strength 0."""
    model, twin = nets
    gradients = []
    with running.plain():
        with torch.no_grad():
            same = torch.equal(seen(model, example, training=False), seen(twin, example, training=False))
        for net, loss in ((model, running.loss), (twin, nn.functional.cross_entropy)):
            loss(seen(net, example, training=True), target).backward()
    masked = running._hold.parameters if running._hold else {}
    for name, p in twin.named_parameters():
        mine = model.get_parameter(name).grad
        kept = slice(None) if name not in masked else running._hold.mask[name]
        gradients.append((mine is None and p.grad is None) or (mine is not None and torch.equal(mine[kept], p.grad[kept])))
    model.zero_grad()
    return same and all(gradients)


def try_all(networks: list[Network], *, known: dict[tuple[str, str], dict]) -> None:
    """Each technique on each network; the file is whole after each network."""
    for network in networks:
        start = time.perf_counter()
        size = sum(p.numel() for p in network.build().parameters())
        for name, technique in TECHNIQUES.items():
            about = {"network": network.name, "source": network.source, "family": network.family, "parameters": size, "technique": name}
            try:
                row = try_one(network, technique)
            except Exception as error:
                row = {"failed": f"{type(error).__name__}: {error}"[:600]}
            known[network.name, name] = {**about, **row}
            gc.collect()  # hooks and modules hold each other: without it a run of all networks took more than 23 GB
        with atomic(FILE, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in known.values())
        print(f"{network.name}: {time.perf_counter() - start:.0f} s", flush=True)


def rows() -> list[dict[str, Any]]:
    """What is in the file."""
    return Ledger(FILE).rows()


if __name__ == "__main__":
    without_torchvisions_operators()
    torch.set_num_threads(1)
    known = {(row["network"], row["technique"]): row for row in rows()}
    names = sys.argv[1:]
    try_all([n for n in NETWORKS if (n.name in names if names else (n.name, "lrsi") not in known)], known=known)
    bad = [row for row in known.values() if not good(row)]
    for row in bad:
        print("BAD", json.dumps(row)[:700])
    sys.exit(bool(bad))
