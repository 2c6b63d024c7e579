"""Trees of JAX: flax's layout and names become torch's (google/flax, flax/linen/linear.py), JaxPruner's masks are found.

JaxPruner (google-research/jaxpruner, jaxpruner/base_updater.py) keeps its masks in the state of the optimiser: a tree like
that of the parameters under the key "masks", of uint8 in the parameter's shape or, with `use_packed_masks`, one bit a weight.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from anymask.formats.leaves import Leaf, Leaves

_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight"}
_MASKS, _PARAMS = "masks", "params"


def is_pytree(leaves: Leaves) -> bool:
    """Whether these are named as flax names parameters: kernels, and no weights."""
    last = {_last(keys) for keys in leaves}
    return "kernel" in last and "weight" not in last


def as_torch(leaves: Leaves) -> Leaves:
    """The same tensors in torch's layout, under torch's names for the parameters of a layer."""
    found: Leaves = {}
    for keys, leaf in leaves.items():
        last = _last(keys)
        name = keys[-1].removesuffix(last) + _LEAVES.get(last, last)
        found[(*keys[:-1], name)] = _transposed(leaf) if last == "kernel" else leaf
    return found


def masks_in(leaves: Leaves) -> Leaves:
    """What lies under the key "masks", if anything does; packed masks are unpacked by the shapes of the parameters beside."""
    under = {keys[keys.index(_MASKS) + 1 :]: leaf for keys, leaf in leaves.items() if _MASKS in keys[:-1]}
    shapes = {_below_params(keys): leaf.shape for keys, leaf in leaves.items() if keys[0] == _PARAMS}
    return {keys: _unpacked(leaf, shapes.get(_below_params(keys))) for keys, leaf in under.items()} or leaves


def _last(keys: tuple[str, ...]) -> str:
    return keys[-1].rpartition(".")[2]


def _below_params(keys: tuple[str, ...]) -> tuple[str, ...]:
    while keys[0] == _PARAMS and len(keys) > 1:
        keys = keys[1:]
    return keys


def _transposed(leaf: Leaf) -> Leaf:
    """(..., in, out) -> (out, in, ...): HWIO to OIHW, and (in, out) to (out, in)."""
    if len(leaf.shape) < 2:
        return leaf
    order = (len(leaf.shape) - 1, len(leaf.shape) - 2, *range(len(leaf.shape) - 2))
    return leaf.changed(tuple(leaf.shape[i] for i in order), partial(torch.permute, dims=order))


def _unpacked(leaf: Leaf, shape: tuple[int, ...] | None) -> Leaf:
    if shape is None or leaf.shape == shape or leaf.floating or leaf.shape != (-(-int(np.prod(shape)) // 8),):
        return leaf
    return leaf.changed(shape, partial(_bits, shape=shape))


def _bits(packed: Tensor, *, shape: tuple[int, ...]) -> Tensor:
    if packed.dtype is not torch.uint8:
        return packed  # no bits: refused by its values or its shape
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=int(np.prod(shape)))).reshape(shape)
