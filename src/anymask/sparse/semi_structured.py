"""2:4 masks on NVIDIA GPUs: linear layers whose weight is one of PyTorch's semi-structured tensors, for inference."""

import warnings
from collections import Counter

import torch
from torch import Tensor, nn

from anymask.errors import MaskError, SettingError
from anymask.mask import Mask

_TRAINED = "anymask_trained"  # of a converted layer: whether its weight took gradients
_ROWS, _COLUMNS = 32, 64  # what PyTorch's CUTLASS kernels want to divide a float16 weight; cuSPARSELt wants less


def to_semi_structured(model: nn.Module, mask: Mask) -> nn.Module:
    """Let the linear layers of `model` that `mask` keeps 2:4 use the sparse tensor cores of an NVIDIA GPU, in place, for inference.

    Converted are nn.Linear layers of the mask that keep at most two of every four consecutive inputs, with outputs a multiple of 32 and
    inputs of 64; all others stay as they are, and so do tied weights and the layers of nn.TransformerEncoderLayer, whose fused inference
    does not know such tensors. A converted weight is a `torch.sparse.SparseSemiStructuredTensor` of half the size and takes no gradient;
    its layer wants contiguous inputs. Not run on a GPU by us yet: time it, because small batches and layers can be slower than dense.

    Args:
        model: float16 or bfloat16, on a GPU of compute capability 8.0 or newer; changed in place. `anymask.to_dense` undoes it, which is to
            be done before its state dict is saved.
        mask: what is kept; must fit `model`. Pruned weights become 0.

    Returns:
        `model` itself.

    Raises:
        MaskError: when the mask does not fit, or keeps no such layer 2:4.
        SettingError: for another device or dtype.

    Example:
        >>> import torch, anymask
        >>> net = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.ReLU())
        >>> mask = anymask.prune(net, "magnitude+2:4")
        >>> if torch.cuda.is_available():
        ...     net = anymask.to_semi_structured(net.half().cuda(), mask)

    Reference: Mishra et al. 2021, arXiv 2104.08378; torch.sparse.to_sparse_semi_structured.
    """
    parameters = mask.check(model)
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    fused = in_fused_layers(model)
    linears = {f"{name}.weight" if name else "weight": module for name, module in model.named_modules() if type(module) is nn.Linear}
    chosen = {name: linears[name] for name in parameters if name in linears and is_2_of_4(mask[name])}
    chosen = {name: layer for name, layer in chosen.items() if uses[id(layer.weight)] == 1 and id(layer) not in fused}
    if not chosen:
        raise MaskError(
            f"none of the {len(mask)} masked weights is a linear layer that keeps 2:4",
            allowed=f"nn.Linear with two of every four inputs kept, outputs a multiple of {_ROWS} and inputs of {_COLUMNS}",
            fix='make the mask with anymask.prune(model, "magnitude+2:4")',
        )
    for name, weight in ((name, layer.weight) for name, layer in chosen.items()):
        if isinstance(weight, torch.sparse.SparseSemiStructuredTensor):
            raise SettingError(f"{name} is semi-structured already", allowed="a dense model", fix="call anymask.to_dense first")
        half = weight.dtype in {torch.float16, torch.bfloat16}
        if not half or not weight.is_cuda or torch.cuda.get_device_capability(weight.device) < (8, 0):
            raise SettingError(
                f"{name} is {weight.dtype} on {weight.device}",
                allowed="float16 or bfloat16 on an NVIDIA GPU of compute capability 8.0 or newer",
                fix="model.half().cuda() where there is one; on a CPU use anymask.to_sparse",
            )
    mask.apply(model)
    for layer in chosen.values():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*SparseSemiStructuredTensor is in prototype")
            compressed = torch.sparse.to_sparse_semi_structured(layer.weight.detach().contiguous())
        layer.__dict__[_TRAINED] = layer.weight.requires_grad
        layer.weight = nn.Parameter(compressed, requires_grad=False)
    return model


def in_fused_layers(model: nn.Module) -> set[int]:
    """The ids of all modules in layers of nn.TransformerEncoderLayer, which computes with their dense weights itself in evaluation.

    Example:
        >>> len(in_fused_layers(torch.nn.Linear(2, 2)))
        0
    """
    return {id(m) for layer in model.modules() if isinstance(layer, nn.TransformerEncoderLayer) for m in layer.modules()}


def is_2_of_4(kept: Tensor) -> bool:
    """Whether a linear layer's mask (O, I) can be a semi-structured tensor.

    Example:
        >>> is_2_of_4(torch.tensor([1, 0, 0, 1]).repeat(32, 16)), is_2_of_4(torch.tensor([1, 0, 1, 1]).repeat(32, 16))
        (True, False)
    """
    fits = kept.ndim == 2 and kept.shape[0] % _ROWS == 0 and kept.shape[1] % _COLUMNS == 0
    return fits and bool((kept.reshape(-1, 4).sum(1) <= 2).all())


def densify(layer: nn.Module) -> None:
    """Undo it for one layer; nothing where it is dense."""
    if type(layer) is nn.Linear and isinstance(layer.weight, torch.sparse.SparseSemiStructuredTensor):
        trained = layer.__dict__.pop(_TRAINED, True)
        layer.weight = nn.Parameter(layer.weight.to_dense(), requires_grad=trained)  # times the unit matrix: exact for finite weights
