"""What of a file's tensors is the mask: one row for each way in which libraries keep it."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from anymask.errors import MaskError
from anymask.formats.leaves import Contents, Leaf, Leaves
from anymask.formats.names import bare, matched
from anymask.formats.pytree import as_torch, is_pytree, masks_in
from anymask.formats.refusal import refusal
from anymask.prunables import prunable
from anymask.registry import nearest

UNWRAPPED = ("masks", "mask", "state_dict", "model_state_dict", "model_state", "model", "module", "network", "net", "params", "weights")
_PARAMETERS = ("weight", "bias")
_PARAMETRIZED = re.compile(r"(.*?)parametrizations\.(\w+)\.(?:(\d+\.mask)|(original)|.+)")
_ACTIVATIONS = ("_input", "_output")  # NNI's masks of what goes into and comes out of a module

Named = Mapping[str, Leaf]


@dataclass(frozen=True)
class Found:
    """The masks that a file holds.

    Args:
        family: the row, or kind of file, that they come from.
        kept: name of the parameter -> bool tensor.
        loose: whether the names are another framework's, and only resemble those of a model.
        left_out: weights of a checkpoint without zeros, which nothing says are covered.
    """

    family: str
    kept: dict[str, Tensor]
    loose: bool = False
    left_out: tuple[str, ...] = ()


def find(path: Path, contents: Contents, *, model: nn.Module | None) -> Found:
    """The masks in a file.

    Raises:
        FileFormatError: when there is none, or what should be one holds values other than 0 and 1.
        MaskError: when the zeros of a checkpoint are the mask and `model` has other weights.
    """
    tensors = {keys: leaf for keys, leaf in contents.leaves.items() if leaf.shape and all(leaf.shape)}  # no counts of steps
    loose = is_pytree(tensors)
    leaves = unwrapped(as_torch(masks_in(tensors)) if loose else tensors)
    named = named_leaves(leaves, prefixes=model is None)
    for family, mark in MARKS.items():
        targets = {target: leaf for name, leaf in named.items() if (target := mark(name, named)) is not None}
        if targets:
            return Found(family, _trimmed({name: _checked(path, name, leaf.read()) for name, leaf in targets.items()}))
    if plain := _plain(named):
        return Found(_plain_family(contents, leaves), _trimmed(plain), loose)
    kept = _zeros(path, without_marks(named), model=model, loose=loose)
    if model is not None:
        return Found("zeros", kept, loose)
    left_out = tuple(name for name, tensor in kept.items() if tensor.all())
    return Found("zeros", {name: tensor for name, tensor in kept.items() if name not in left_out}, loose, left_out)


def unwrapped(leaves: Leaves) -> Leaves:
    """What lies under keys such as "state_dict", if anything does; masks before weights."""
    for key in UNWRAPPED:
        under = {keys[1:]: leaf for keys, leaf in leaves.items() if keys[0] == key and len(keys) > 1}
        if under and (len(under) == len(leaves) or not is_by_module(leaves)):
            return unwrapped(under)
    return leaves


def is_by_module(leaves: Leaves) -> bool:
    """Whether these are {module: {"weight": ..., "bias": ...}}, the form of NNI."""
    return all(len(keys) == 2 and "." not in keys[1] for keys in leaves)


def without_marks(named: Named) -> dict[str, Leaf]:
    """The weights under their plain names: without masks, without what pruning libraries add to a name.

    Parametrizations other than by a mask keep their names, because no single tensor of theirs is the weight: spectral and weight norm.
    """
    targets = {name: next((t for mark in MARKS.values() if (t := mark(name, named)) is not None), None) for name in named}
    masked = set(targets.values())
    added = {name: part for name in named if targets[name] is None and (part := _PARAMETRIZED.fullmatch(name))}
    entries = Counter(part[1] + part[2] for part in added.values())
    found: dict[str, Leaf] = {}
    for name, leaf in named.items():
        if targets[name] is not None:
            continue
        of = added.get(name)
        plain = of[1] + of[2] if of else name.removesuffix("_orig")
        if plain not in masked and not (of and of[4] and entries[plain] == 1):
            found[name] = leaf
        elif of is None or of[4]:
            found[plain] = leaf
    return found


def named_leaves(leaves: Leaves, *, prefixes: bool) -> dict[str, Leaf]:
    joined = {".".join(keys): leaf for keys, leaf in leaves.items() if not keys[-1].startswith(_ACTIVATIONS)}
    names = bare(joined, prefixes=prefixes)
    return {names[name]: leaf for name, leaf in joined.items()}


# -- the rows: from a tensor's name to that of the parameter it masks, or None ------------------------------------------


def _torch_prune(name: str, names: Collection[str]) -> str | None:
    """torch.nn.utils.prune: `weight_orig` beside `weight_mask`."""
    target = name.removesuffix("_mask")
    return target if target != name and f"{target}_orig" in names else None


def _parametrized(name: str, names: Collection[str]) -> str | None:
    """torch.nn.utils.parametrize with a mask in a buffer: sparsimony (mklasby/sparsimony, parametrization/fake_sparsity.py)."""
    found = _PARAMETRIZED.fullmatch(name)
    return found[1] + found[2] if found and found[3] else None


def _modelopt(name: str, names: Collection[str]) -> str | None:
    """NVIDIA/Model-Optimizer, modelopt/torch/sparsity/weight_sparsity/module.py: the buffer `_weight_mask`, bool."""
    head, dot, last = name.rpartition(".")
    return head + dot + "weight" if last == "_weight_mask" else None


def _weight_mask(name: str, names: Collection[str]) -> str | None:
    """`weight_mask`: ToST's `extract_mask`, ganguli-lab/Synaptic-Flow (Layers/layers.py), Torch-Pruning's and SparseML's buffers."""
    target = name.removesuffix("_mask")
    last = target.rpartition(".")[2]
    return target if target != name and (target in names or any(word in last for word in _PARAMETERS)) else None


def _sparsifier(name: str, names: Collection[str]) -> str | None:
    """torch.ao.pruning: {"state": {"fc.weight": {"mask": ...}}}, and other dictionaries of `fc.weight.mask`."""
    target = name.removesuffix(".mask").removeprefix("state.")
    return target if name.endswith(".mask") and target.endswith(_PARAMETERS) else None


MARKS: dict[str, Callable[[str, Collection[str]], str | None]] = {
    "torch-prune": _torch_prune,
    "parametrized": _parametrized,
    "modelopt": _modelopt,
    "weight-mask": _weight_mask,
    "sparsifier": _sparsifier,
}


# -- masks without a mark ----------------------------------------------------------------------------------------------


def _plain(named: Named) -> dict[str, Tensor]:
    """All tensors, when each holds nothing but 0 and 1 and one is a matrix or more; else nothing."""
    kept = {}
    if any(len(leaf.shape) > 1 for leaf in named.values()):
        for name, leaf in named.items():
            tensor = leaf.read()
            if not _is_binary(tensor):
                return {}
            kept[name] = tensor != 0
    return kept


def _plain_family(contents: Contents, leaves: Leaves) -> str:
    """facebookresearch/open_lth (pruning/mask.py) and others save {name: mask}, microsoft/nni {module: {"weight": mask}}."""
    if contents.kind in ("npz", "msgpack"):
        return "flax" if contents.kind == "msgpack" else "npz"
    return "nni" if is_by_module(leaves) else "mask-dict"


def _trimmed(kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the masks of biases and norms that keep everything: they prune nothing, and would count as weights."""
    return {name: tensor for name, tensor in kept.items() if tensor.ndim > 1 or not tensor.all()} or kept


def _checked(path: Path, name: str, tensor: Tensor) -> Tensor:
    if not _is_binary(tensor):
        raise refusal(path, f"the mask of {name} holds values other than 0 and 1", fix="make it 0 and 1: scores are no mask")
    return tensor != 0


def _is_binary(tensor: Tensor) -> bool:
    return tensor.dtype is torch.bool or bool(((tensor == 0) | (tensor == 1)).all())


# -- masks that are the zeros of a checkpoint --------------------------------------------------------------------------


def _zeros(path: Path, weights: Named, *, model: nn.Module | None, loose: bool) -> dict[str, Tensor]:
    """Which weights are not exactly 0: of `model`'s prunable weights, or of all matrices."""
    if model is None:
        covered = {name: leaf for name, leaf in weights.items() if leaf.floating and len(leaf.shape) > 1}
    else:
        covered = _prunable_among(weights, model, loose=loose)
    kept = {name: leaf.read() != 0 for name, leaf in covered.items()}
    if all(tensor.all() for tensor in kept.values()):
        why = f"no mask, and no exact zero in its {len(kept)} matrices of weights" if kept else "no mask, and no matrix of weights"
        raise refusal(path, why, fix="save the masks too, or the weights with the pruned ones set to 0")
    return kept


def _prunable_among(weights: Named, model: nn.Module, *, loose: bool) -> dict[str, Leaf]:
    """The prunable weights of `model`, each under its name in the file.

    Raises:
        MaskError: naming every one that the file lacks.
    """
    in_file = {target: name for name, target in matched({n: leaf.shape for n, leaf in weights.items()}, model, loose=loose).items()}
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    found, lacking = {}, []
    for name, parameter in prunable(model).items():
        there = [in_file[alias] for alias in tied[id(parameter)] if alias in in_file]
        if there:
            found[there[0]] = weights[there[0]]
        else:
            lacking.append(f"{name} (nearest: {', '.join(nearest(name, weights)) or 'none'})")
    if lacking:
        raise MaskError(
            f"the checkpoint does not fit {type(model).__name__}; not in it: {'; '.join(lacking)}",
            allowed="every prunable weight of the model",
            fix="give the model that this checkpoint is of, or rename its entries",
        )
    return found
