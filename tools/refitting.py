"""A trained network, pruned, and refitted without training (`anymask.reconstruct`); results/refitting.jsonl.

    python ../shared/data/unpack.py data-local cifar100 && python tools/make_cifar100_parts.py data-local/cifar-100-python data-local
    for seed in 0 1 2; do anymask train --mask dense --recipe default --data cifar100 --data-dir data-local/cifar-100-report \
        --validation 0.2 --model vgg11-0.5x --protocol short-15 --seed $seed --out runs/dense/report-vgg11-0.5x-$seed; done
    python tools/refitting.py        what is not in the file yet, about half a minute for each mask, sparsity and seed

Beside it, what is usually done first: the statistics of the norms measured anew on as many images. Nothing is chosen on test images.
"""

import sys
import time
from pathlib import Path

import torch
from torch import nn

from anymask import Mask, prune, reconstruct
from anymask.config import Bench, Experiment
from anymask.data import Batches
from anymask.runlog import Ledger
from anymask.sweep.compare import versions
from anymask.train import Protocol, accuracy

ROOT = Path(__file__).resolve().parent.parent
FILE, DENSE = ROOT / "results" / "refitting.jsonl", ROOT / "runs" / "dense"
MODELS, SEEDS, BATCHES = ("vgg11-0.5x",), (0, 1, 2), 8
MASKS, SPARSITIES = ("magnitude", "wanda"), (0.5, 0.8, 0.9, 0.95)


def bench(model: str) -> Bench:
    weights = DENSE / f"report-{model}-{{seed}}" / "model.safetensors"
    place = ROOT / "data-local" / "cifar-100-report"
    return Bench(Experiment("cifar100", place, model=model, weights=weights, validation=0.2, device="cpu"), Protocol())


def measure_norms_anew(model: nn.Module, train: Batches) -> None:
    """Means and variances of batch norms, over the first batches."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all
    model.train()
    with torch.no_grad():
        for (x, _), _ in zip(train, range(BATCHES), strict=False):
            model(x)


def one(here: Bench, mask: Mask, seed: int) -> dict[str, float]:
    """Test accuracies in % of the pruned network, as it is and mended in two ways."""
    train, _, test = here.batches(seed)
    pruned, normed, refitted = (here.model(seed) for _ in range(3))
    mask.apply(pruned)
    mask.apply(normed)
    measure_norms_anew(normed, train)
    began = time.monotonic()
    done = reconstruct(refitted, mask, data=train, seed=seed)
    found = {"seconds": round(time.monotonic() - began, 1)}
    for place, name in enumerate(("unexplained_before", "unexplained")):
        found[name] = sum(shares[place] for shares in done.unexplained.values()) / len(done.unexplained)
    named = {"dense": here.model(seed), "pruned": pruned, "norms": normed, "refitted": refitted}
    return found | {name: round(100 * accuracy(model, test), 2) for name, model in named.items()}


def main() -> None:
    file = Ledger(FILE)
    done, commit = file.rows(), versions()["commit"]
    for model in MODELS:
        here = bench(model)
        for seed in SEEDS:
            for method in MASKS:
                for sparsity in SPARSITIES:
                    what = {"model": model, "mask": method, "sparsity": sparsity, "seed": seed}
                    if any(what.items() <= row.items() for row in done):
                        continue
                    mask = prune(here.model(seed), method, sparsity=sparsity, data=here.batches(seed)[0], seed=seed)
                    row = what | one(here, mask, seed) | {"commit": commit}
                    print(row, file=sys.stderr, flush=True)
                    file.append(row)


if __name__ == "__main__":
    main()
