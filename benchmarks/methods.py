"""What making a mask costs: seconds and peak memory of each method, each in a process of its own, on a quiet machine.

python benchmarks/methods.py            every method on the demo's network, and how some grow with size; writes results/methods.json
python benchmarks/methods.py snip resnet18 0.98      one of them, printed
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from anymask import data, models, prune
from anymask.mask import Mask
from anymask.pruning import METHODS
from anymask.pruning.methods import method_of
from anymask.sweep.compare import machine
from anymask.train import Protocol, fit

OUT = Path(__file__).resolve().parent.parent / "results" / "methods.json"
AS_OTHERS = ("random", "lottery-rewind", "lottery-lr")  # random is random-erk; these tickets train as often as lottery
NAMES = [name for name in METHODS if name not in AS_OTHERS] + ["magnitude+uniform", "magnitude+erk"]
# 11 and 99 million weights, beside the 0.5 million of demonet
GROWING = {
    "resnet18": ("random-erk", "magnitude", "snip", "grasp", "wanda", "synflow"),
    "vgg16-2.6x": ("random-erk", "magnitude", "snip", "wanda"),
}
REPEATS = 3  # medians; the largest network once
BATCH = 64
EPOCHS = 7


def one(method: str, name: str, sparsity: float) -> dict[str, float]:
    """Seconds, and MiB of memory beyond what the model and its data take, of making one mask; lottery tickets train as the demo does."""
    small = name == "demonet"
    channels, size = (1, 28) if small else (3, 32)
    model = models.build(name, classes=10, channels=channels, seed=0)
    torch.manual_seed(0)
    batches = [(torch.randn(BATCH, channels, size, size), torch.arange(BATCH) % 10) for _ in range(8)]
    images = data.Batches(data.load("fashion-mnist-5k").train, batch_size=BATCH, shuffle=True)

    def train(network: torch.nn.Module, mask: Mask | None, first: int, last: int | None) -> None:
        protocol = Protocol(epochs=EPOCHS, batch_size=BATCH, augment=False)
        fit(network, images, mask=mask, recipe="default", protocol=protocol, first_step=first, last_step=last)

    steps = EPOCHS * len(images)
    rewind = {"rewind_step": round(0.05 * steps)} if "rewind_step" in method_of(method).needs else {}
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is held now
    before, began = _resident("VmRSS"), time.perf_counter()
    mask = prune(model, method, sparsity=sparsity, data=batches, train=train, **rewind)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "extra_mib": _resident("VmHWM") - before, "weights": mask.total, "kept": mask.kept}


def _resident(field: str) -> float:
    """MiB that this process holds now (VmRSS), or held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure(method: str, name: str, sparsity: float, *, repeats: int) -> dict[str, object]:
    """Medians over processes."""
    command = [sys.executable, __file__, method, name, str(sparsity)]
    found = [json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(repeats)]
    medians = {key: statistics.median(run[key] for run in found) for key in ("seconds", "extra_mib")}
    row = {"method": method, "model": name, "sparsity": sparsity, "repeats": repeats, "weights": found[0]["weights"]}
    row |= {key: round(value, 3) for key, value in medians.items()}
    print(row, flush=True)
    return row


def main() -> None:
    if len(sys.argv) == 4:
        print(json.dumps(one(sys.argv[1], sys.argv[2], float(sys.argv[3]))))
        return
    # the rounds of a ticket are trainings, minutes of them: once
    rows = [
        measure(method, "demonet", sparsity, repeats=1 if "train" in method_of(method).needs else REPEATS)
        for sparsity in (0.9, 0.98)
        for method in NAMES
    ]
    rows += [measure(m, name, 0.98, repeats=REPEATS if name == "resnet18" else 1) for name, methods in GROWING.items() for m in methods]
    OUT.write_text(json.dumps({"machine": machine("cpu"), "batch": BATCH, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
