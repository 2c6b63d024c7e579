"""A pruned checkpoint of Hugging Face, fine-tuned through its own Trainer with the recipe and without; results/fine_tuning.jsonl.

    python tools/fine_tuning.py          the seeds that are not in the file yet, about two minutes each

A small ResNet of transformers is trained dense on Fashion-MNIST-5k, pruned by magnitude to 90%, saved with `save_pretrained`, and
read again. The same checkpoint, data order and settings go to both fine-tunings. What is reported is the test accuracy of the last
step, so that nothing is chosen. LRsI is left out: it is for weights that have not been trained yet.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from network_list import without_torchvisions_operators

without_torchvisions_operators()

from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments  # noqa: E402

from anymask import data, prune  # noqa: E402
from anymask.integrations.transformers import AnyMask  # noqa: E402
from anymask.runlog import Ledger, atomic  # noqa: E402

FILE = Path(__file__).resolve().parent.parent / "results" / "fine_tuning.jsonl"
RECIPES = {"default": None, "tost:-lrsi": "tost:-lrsi", "tost:label_smoothing": "tost:label_smoothing"}
SPARSITY, SEEDS, EPOCHS = 0.9, (0, 1, 2), {"dense": 20, "fine": 10}


def images() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and test images as the Trainer wants them: dicts of one image (1, 28, 28) and its label."""
    found = data.load("fashion-mnist-5k")
    mean, std = data.statistics(found.train)

    def items(split: Any) -> list[dict[str, Any]]:
        pixels = (split.images.float() / 255 - mean[0]) / std[0]
        return [{"pixel_values": x, "labels": int(y)} for x, y in zip(pixels, split.labels, strict=True)]

    return items(found.train), items(found.test)


def train(model: torch.nn.Module, train_set: list, *, seed: int, epochs: int, lr: float, callback: AnyMask | None = None) -> Trainer:
    """One training through the Hugging Face loop."""
    arguments = TrainingArguments(
        tempfile.mkdtemp(), num_train_epochs=epochs, per_device_train_batch_size=128, per_device_eval_batch_size=500, learning_rate=lr,
        lr_scheduler_type="cosine", seed=seed, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, logging_strategy="no",
    )  # fmt: skip
    more = {"callbacks": [callback], "compute_loss_func": callback.loss} if callback else {}
    trainer = Trainer(model, arguments, train_dataset=train_set, **more)
    trainer.train()
    return trainer


def accuracy(model: torch.nn.Module, test_set: list) -> float:
    """Share of the test images that are classified right, in %."""
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(torch.stack([i["pixel_values"] for i in test_set[k : k + 500]])).logits.argmax(1)
                 == torch.tensor([i["labels"] for i in test_set[k : k + 500]])).sum())
            for k in range(0, len(test_set), 500)
        )  # fmt: skip
    return 100 * right / len(test_set)


def checkpoint(folder: str, train_set: list, *, seed: int) -> None:
    """Train dense, prune, and save as Hugging Face does."""
    torch.manual_seed(seed)
    config = ResNetConfig(num_channels=1, embedding_size=16, hidden_sizes=[16, 32, 64], depths=[2, 2, 2], layer_type="basic", num_labels=10)
    model = ResNetForImageClassification(config)
    train(model, train_set, seed=seed, epochs=EPOCHS["dense"], lr=3e-3)
    prune(model, "magnitude", sparsity=SPARSITY).apply(model)
    model.save_pretrained(folder)


def one_seed(seed: int) -> list[dict[str, Any]]:
    """Each recipe from the same checkpoint."""
    train_set, test_set = images()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(folder, train_set, seed=seed)
        for name, recipe in RECIPES.items():
            model = ResNetForImageClassification.from_pretrained(folder)
            before, start = {n: p.detach() == 0 for n, p in model.named_parameters() if p.ndim > 1}, accuracy(model, test_set)
            callback = AnyMask(mask="zeros", recipe=recipe)
            train(model, train_set, seed=seed, epochs=EPOCHS["fine"], lr=3e-3, callback=callback)
            kept = all(not model.get_parameter(n)[zero].any() for n, zero in before.items())
            zeros = sum(int(zero.sum()) for zero in before.values())
            rows.append({"seed": seed, "recipe": name, "sparsity": SPARSITY, "pruned": start, "test": accuracy(model, test_set),
                         "zeros": zeros, "every zero kept": kept})  # fmt: skip
            print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    known = Ledger(FILE).rows()
    for seed in SEEDS:
        if not any(row["seed"] == seed for row in known):
            known += one_seed(seed)
            with atomic(FILE, "w") as file:
                file.writelines(json.dumps(row) + "\n" for row in known)
    sys.exit(not all(row["every zero kept"] for row in known))
