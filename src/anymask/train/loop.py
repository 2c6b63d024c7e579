"""The reference trainer: one flat loop."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anymask.data import Batches
from anymask.errors import SettingError
from anymask.mask import Mask
from anymask.onednn import overruns
from anymask.pruning.dynamic import Dynamic, dense_mask, dynamic_of
from anymask.ranks import leads
from anymask.recipe import Recipe
from anymask.train.computing import Computing, same_bits
from anymask.train.graphs import own_stream
from anymask.train.run import Result, Run
from anymask.train.settings import Protocol


def fit(
    model: nn.Module,
    train: Batches,
    *,
    mask: Mask | None = None,
    rewire: Dynamic | str | None = None,
    sparsity: float | None = None,
    recipe: Recipe | str | None = None,
    teacher: nn.Module | None = None,
    protocol: Protocol | None = None,
    validation: Batches | None = None,
    test: Batches | None = None,
    seed: int = 0,
    first_step: int = 0,
    last_step: int | None = None,
    sparse: str = "auto",
    compile: str = "off",
    diagnose: str = "off",
    deterministic: bool = False,
    checkpoint_file: str | Path | None = None,
    checkpoint_every: int | None = None,
    log_dir: str | Path | None = None,
    on_epoch: Callable[[int, dict[str, float]], None] | None = None,
    on_step: Callable[[], None] | None = None,
) -> Result:
    """Train `model` in place, with `mask` held and `recipe` attached; it ends plain, with the chosen checkpoint's weights.

    The network that is evaluated, chosen and reported is always the plain one: ghosts are at strength 0 there.

    Where torch.distributed is initialised, all ranks train this one network (DistributedDataParallel), with the mask and the initial
    weights of rank 0: call `fit` on each of them, with the same arguments and the model itself. `train` gives the batches of the whole
    training, of which each rank computes its part; results are known on all ranks, and files are read and written by rank 0. The
    numbers are those of one process but for rounding and batch norms, which see the images of their own rank.

    Args:
        model: on the device of `train`.
        train: shuffled batches; `validation` and `test`: the same, not shuffled. Without `validation` the last
            checkpoint is the chosen one.
        mask: held at exact zeros; None trains dense.
        rewire: how the mask moves meanwhile: "set" or "rigl" (which need `mask`), "gmp" (which begins dense without one), or a
            `Dynamic`. The mask of the chosen checkpoint is `Result.mask`. With gmp only checkpoints that have the final sparsity
            may be chosen: those of epochs that end after the mask has.
        sparsity: for gmp, what it ends at.
        recipe: a Recipe, the name of a preset, or a TOML file; None is "best", or "default" where there is no mask.
        teacher: a trained network for recipes that learn from one (distillation), as `Recipe.attach` takes it.
        protocol: epochs, optimiser and the rest.
        seed: for what techniques and dropout draw; data order is the business of `train`.
        first_step: the optimiser step to begin at (> 0 for a rewound lottery ticket).
        last_step: the step to stop before; None for the end of the protocol.
        sparse: whether masked layers compute their kept weights alone meanwhile, which is to_sparse. "auto": those that are measured
            faster, where it can be: a mask that stays, in float32, on the CPU, with the native kernels; "on": all that can be, and an
            error where it cannot be; "off": none. Numbers differ by rounding, and the model ends dense.
        compile: "on" trains the network through torch.compile (docs/speed.md), which takes its time at the start and whenever ghosts go:
            for trainings of many steps, on a GPU most of all. Numbers differ by rounding, and dropout draws others. "graph" records
            each kind of step (forward, backward, mask and optimiser) as one CUDA graph: for small networks on a GPU, which else waits for
            Python. cuDNN chooses its algorithms by timing them then (not where `deterministic`), so numbers differ by rounding.
            Steps of techniques that look at their numbers stay as they are. For one batch a step, in float32 or bfloat16;
            on a CPU it changes nothing. "fused" does both: what torch.compile makes of the network, in recorded steps.
        deterministic: by PyTorch's deterministic algorithms alone (torch.use_deterministic_algorithms): on a GPU, too, the same call gives
            the same bits then. It costs time.
        diagnose: "on" records each epoch what `anymask.Diagnostics` says of the plain network, for the first training batch, in
            `Result.curves["diagnostics"]`; "sharpness" adds `anymask.diagnostics.sharpness` on that batch, which costs as much as up to
            a few hundred dense steps; "off" nothing. The training is the same, bit for bit.
        checkpoint_file: written atomically after every epoch, and every `checkpoint_every` steps; where it exists,
            training goes on from it, and ends bit-equal to a training that was never stopped (on a GPU, where
            `deterministic`). On a GPU, where an epoch may take less time than that, it is written less often, so
            that it takes a twentieth of the time, and whenever `on_epoch` stops the training. It is the same file whether the
            layers were sparse; with "auto" those are sparse again that were. It is also the same for any number of ranks.
        log_dir: TensorBoard events go there (extra `tensorboard`).
        on_epoch: called with the epoch (from 1) and its figures, on every rank.
        on_step: called after each step of the optimiser, which a GPU may not have made by then.

    Raises:
        TechniqueError: when the loss becomes NaN or infinite, a technique does not fit, or gmp had no step left for its last update.
        SettingError: when `train` is a DataLoader, `rewire` and `mask` or `sparsity` do not go together, sparse="on", `compile` or
            `deterministic` cannot be, the checkpoint is of a training with another `rewire` or `diagnose`, or there are several ranks and
            the model is within DistributedDataParallel already.

    Example:
        >>> from anymask import data, fit, models
        >>> from anymask.train import Protocol
        >>> images = data.load("fashion-mnist-5k")
        >>> few = data.Split(images.test.images[:64], images.test.labels[:64])
        >>> batches = data.Batches(few, batch_size=32)
        >>> net = models.build("demonet", classes=10, channels=1, seed=0)
        >>> result = fit(net, batches, test=batches, recipe="default", protocol=Protocol(epochs=1))
        >>> 0 <= result.test <= 1
        True
    """
    if not hasattr(train, "epoch"):
        raise SettingError(
            f"train came as {type(train).__name__}",
            allowed="an anymask.data.Batches",
            fix="give data.Batches(data.Split(images, labels), batch_size=128); for a DataLoader write the loop in README",
        )
    protocol = protocol or Protocol()
    moving = dynamic_of(rewire, {}) if rewire is not None else None
    if recipe is None:
        recipe = "default" if mask is None and moving is None else "best"
    recipe = Recipe.preset(recipe) if isinstance(recipe, str) else recipe
    mask = _first_mask(model, mask, moving=moving, sparsity=sparsity)
    how: dict[str, Any] = {
        "recipe": recipe,
        "teacher": teacher,
        "moving": moving,
        "sparsity": sparsity,
        "computing": (computing := Computing(sparse, compile, diagnose, deterministic)),
    }
    device = next(model.parameters()).device
    if device.type == "cpu":
        _warn_of_overruns(model)
    here = nullcontext() if device.type != "cuda" else own_stream(device) if computing.records else torch.cuda.device(device)
    with same_bits(deterministic), here:
        mask = None if mask is None else mask.broadcast()
        run = Run(model, train, mask=mask, protocol=protocol, first_step=first_step, file=checkpoint_file)
        with run.leaving:
            run.begin(train, **how, seed=seed, first_step=first_step)
            stop = run.total if last_step is None else min(last_step, run.total)
            told: dict[str, Any] = {"writer": _writer(log_dir), "on_epoch": on_epoch, "on_step": on_step}
            _train(run, train, stop=stop, validation=validation, every=checkpoint_every, **told)
            return run.finish(stop=stop, test=test)


def _train(
    run: Run,
    train: Batches,
    *,
    stop: int,
    validation: Batches | None,
    every: int | None,
    writer: Any,
    on_epoch: Callable[[int, dict[str, float]], None] | None,
    on_step: Callable[[], None] | None,
) -> None:
    """The loop."""
    while run.step < stop:
        epoch = run.step // run.per_epoch
        run.model.train()
        for index, (x, y) in enumerate(train.epoch(epoch, start=run.first_batch), run.first_batch + 1):
            last = index % run.protocol.accumulate == 0 or index == len(train)
            run.look(train, epoch, index - 1)
            run.take(x, y, last=last)
            if last:
                if on_step is not None:
                    on_step()
                if run.step == stop:
                    break
                if every and run.step % every == 0 and run.step % run.per_epoch:
                    run.save()
        run.end_epoch(epoch, validation=validation)
        figures = {name: values[-1] for name, values in run.progress["curves"].items() if isinstance(values, list)}
        if on_epoch is not None:
            try:
                on_epoch(epoch + 1, figures)
            except BaseException:
                run.save_what_is_new()
                raise
        if writer is not None:
            for name, value in figures.items():
                if value is not None:
                    writer.add_scalar(name, value, epoch + 1)
            writer.flush()


def _warn_of_overruns(model: nn.Module) -> None:
    found = [name for name, layer in overruns(model).items() if layer.weight.ndim == 4 and layer.weight.stride(2) > 1]  # channels_last
    if found:
        warnings.warn(
            f"{', '.join(found)}: with weights in channels_last, fewer than 16 input channels and a stride, oneDNN gives such convolutions "
            "of one pixel wrong gradients or crashes (github.com/uxlfoundation/oneDNN/issues/6035). On a CPU, leave model and images as "
            "they are by default, torch.contiguous_format",
            stacklevel=3,
        )


def _first_mask(model: nn.Module, mask: Mask | None, *, moving: Dynamic | None, sparsity: float | None) -> Mask | None:
    """The mask that training begins with."""
    if moving is None and sparsity is not None:
        raise SettingError(
            f"sparsity came as {sparsity} without rewire",
            allowed="sparsity for a mask that shrinks",
            fix="give rewire='gmp', or mask=prune(model, method, sparsity=...)",
        )
    if moving is None or mask is not None:
        return mask
    if moving.start != "dense":
        raise SettingError(
            f"rewire={moving.name!r} came without mask",
            allowed="a mask to begin with",
            fix=f"give mask=prune(model, {moving.start!r}, sparsity=0.9)",
        )
    return dense_mask(model)


def _writer(log_dir: str | Path | None) -> Any:
    if log_dir is None or not leads():
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise SettingError(
            "log_dir needs TensorBoard", allowed="the extra tensorboard", fix="pip install 'anymask[tensorboard]'"
        ) from error
    return SummaryWriter(str(log_dir))
