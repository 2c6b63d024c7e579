"""What a training needs to go on from where it stopped, bit for bit."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from anymask.errors import FileFormatError, SettingError
from anymask.pauses import aside
from anymask.ranks import by_rank_0, together
from anymask.runlog import atomic

FORMAT = "anymask-checkpoint-2"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) and the random state, whole or not at all."""
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    whole = tree_map_only(Tensor, _off_the_gpu, {"format": FORMAT, "random": random, **state})
    for name, part in state.items():
        if hasattr(part, "_metadata"):  # of a state dict: which versions of its modules wrote it
            whole[name]._metadata = part._metadata
    with aside(), atomic(path) as file:  # to write it takes longer than to copy it
        try:
            torch.save(whole, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # "unexpected pos 64 vs 0", where the disk is full
                raise error.__context__ from None
            raise


def _off_the_gpu(tensor: Tensor) -> Tensor:
    return tensor.cpu() if tensor.is_cuda else tensor


def load(path: Path, *, device: str, begun: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """Read what `save` wrote; None where no file is. Nothing in it is run. Of several ranks the first one reads it for all.

    Raises:
        FileFormatError: when the file is damaged or another kind of file.
        SettingError: when it is of a training that was not `begun` with these.
    """
    if not by_rank_0(path.exists):
        return None
    source = io.BytesIO(by_rank_0(path.read_bytes)) if together() else path
    try:
        state = torch.load(source, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise _bad(path) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise _bad(path)
    if other := [name for name, now in (begun or {}).items() if state["begun"].get(name) != now]:
        raise SettingError(
            f"the checkpoint {path} is of a training with another {' and another '.join(other)}",
            allowed="the training that it was begun by",
            fix="give each training a file of its own, or remove this one to train from the start",
        )
    return state


def restore_random(state: dict[str, Any]) -> None:
    """Put the global random state back."""
    torch.set_rng_state(state["random"]["cpu"].cpu())
    if "cuda" in state["random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random"]["cuda"].cpu())


def _bad(path: Path) -> FileFormatError:
    return FileFormatError(
        f"{path} is not a checkpoint that can be read", allowed=f"a whole file of format {FORMAT}", fix="remove it to train from the start"
    )
