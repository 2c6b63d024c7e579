"""Made ledger rows: the numbers are chosen, nothing is trained."""

from math import sin
from typing import Any

from anymask.runlog import settings_id

SHIFT = {"default": 0.0, "tost": 0.01, "ham": -0.004}


def made_row(mask: str, recipe: str, seed: int, test: float, *, sparsity: float = 0.98, epochs: int = 12, **more: Any) -> dict[str, Any]:
    """One row as the trainer writes it."""
    settings = {"data": "fashion-mnist-5k", "model": "demonet", "mask": mask, "sparsity": sparsity, "recipe": recipe}
    settings |= {"seed": seed, "epochs": epochs, "batch_size": 128, "lr": 0.1, **more}
    ramp = [epoch / epochs for epoch in range(1, epochs + 1)]
    fade = [max(0.0, 1 - 1.6 * done) for done in ramp]
    strength = {} if recipe == "default" else {"ghost_activation": fade, "label_smoothing": [1.0] * epochs}
    return {
        "id": settings_id(settings),
        "settings": settings,
        "command": "anymask sweep plan.toml",
        "versions": {"anymask": "0.1.0", "torch": "2.13.0", "python": "3.11.7", "commit": None},
        "machine": {"device": "cpu", "threads": 2, "processor": "made"},
        "accuracy": {"validation": test, "test": test, "best_epoch": epochs, "last_validation": test, "last_test": test},
        "density": {
            "overall": 1 - sparsity,
            "layers": {} if mask == "dense" else {"conv1.weight": 0.9, "conv2.weight": 0.05, "fc.weight": 0.0},
        },
        "curves": {
            "epoch": list(range(1, epochs + 1)),
            "train_loss": [2.0 - 1.5 * done + 0.01 * seed for done in ramp],
            "validation_accuracy": [test * (0.5 + 0.5 * done) for done in ramp],
            "lr": [0.1 * (1 - done) for done in ramp],
            "strength": strength,
        },
        "time": {"seconds": 12.5, "mask_seconds": 0.5, "finished": f"2026-11-22T14:00:0{seed % 10}Z"},
        "ghosts": {"extra_parameters": 1234, "extra_flops": 5678},
    }


def made_rows(
    *, masks: tuple[str, ...] = ("random-erk", "snip", "synflow"), seeds: int = 3, sparsity: float = 0.98, **more: Any
) -> list[dict[str, Any]]:
    """A small sweep: every mask with every recipe of `SHIFT` and every seed, and a dense reference."""
    rows = [made_row("dense", "default", seed, 0.91 + 0.001 * seed, sparsity=0.0, **more) for seed in range(seeds)]
    for place, mask in enumerate(masks):
        for recipe, shift in SHIFT.items():
            tests = [0.85 + 0.01 * place + 0.002 * seed + shift + 0.003 * sin(7 * seed + 3 * place + 900 * shift) for seed in range(seeds)]
            rows += [made_row(mask, recipe, seed, test, sparsity=sparsity, **more) for seed, test in enumerate(tests)]
    return rows
