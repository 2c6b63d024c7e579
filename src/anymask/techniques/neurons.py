"""Masked weights as rows, one for each output neuron, for techniques that change an initialisation."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anymask.errors import MaskError
from anymask.mask import Mask
from anymask.prunables import TRANSPOSED, bare, prunable, rows_of, transposed_groups
from anymask.ranks import from_rank
from anymask.sparse import as_dense
from anymask.surgery import CONVS, needs_whole
from anymask.techniques.base import Context, Technique


@dataclass(frozen=True)
class Neurons:
    """One masked weight tensor as rows: row i holds what output neuron i multiplies its inputs with.

    Args:
        name: of the parameter.
        rows: the weights (outputs, fan-in), 0 where pruned; a copy.
        kept: bool, like `rows`.
        parts: into how many blocks of equally many rows the matrix falls, of which each is a map of its own: the groups of a
            convolution, the query, key and value projections of nn.MultiheadAttention, the gates of a recurrent layer.
    """

    name: str
    rows: Tensor
    kept: Tensor
    parts: int


@torch.no_grad()
def reinitialise(context: Context, technique: Technique, change: Callable[[Neurons], Tensor]) -> int:
    """Replace the kept weights of each masked conv, linear or recurrent layer by those that `change` gives; the others become 0.

    Tied weights are one layer, and sparse ones (`to_sparse`) are dense meanwhile. What else the mask covers (embeddings, biases) stays
    as it is. On several ranks of torch.distributed each has to call this, and the weights of rank 0 are used.

    Args:
        context: needs a mask.
        technique: who asks, for errors.
        change: gives new rows, in any floating type; called in the order of the model's parameters.

    Returns:
        How many layers there were.

    Raises:
        TechniqueError: without a mask, without such a layer in it, or for a model that is cut by fully_shard.
        MaskError: when the mask does not fit.
    """
    mask, model = context.needs_mask(technique.name), bare(context.model)
    fix = f"attach it to the model before fully_shard, in a recipe of its own, and leave {technique.name} out of this one"
    needs_whole(model.parameters(), f"{technique.name} on {type(model).__name__}", fix=fix)
    with as_dense(model):
        layers = _masked(model, mask)
        if not layers:
            raise technique.nothing("a masked convolution, linear or recurrent layer", model, fix="give the mask of such layers")
        groups, parts = transposed_groups(model), _parts(model)
        for name, (parameter, kept) in layers.items():
            index = rows_of(parameter.shape, transposed=groups.get(name, 0)).flatten(1)
            lies = kept.flatten()[index]
            flat = torch.zeros_like(parameter).flatten()
            at = index[lies].to(flat.device)
            flat[at] = parameter.flatten()[at]
            rows = flat[index.to(flat.device)]
            found = change(Neurons(name, rows, lies.to(flat.device), parts.get(id(parameter), 1)))
            flat[at] = from_rank(found[lies.to(flat.device)].cpu()).to(flat)
            parameter.copy_(flat.view(parameter.shape))
    return len(layers)


def _masked(model: nn.Module, mask: Mask) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """The parameters that have neurons, in the model's order, each once, with what is kept of them under all their names."""
    try:
        known = prunable(model, kinds=("conv", "linear", "recurrent"))
    except MaskError:  # it has none
        return {}
    kept = mask.by_parameter(model)
    return {name: (parameter, kept[id(parameter)]) for name, parameter in known.items() if id(parameter) in kept}


def _parts(model: nn.Module) -> dict[int, int]:
    """`Neurons.parts` of the parameters that have more than one, by id."""
    found: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, (*CONVS, *TRANSPOSED)):
            found[id(module.weight)] = module.groups
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            found[id(module.in_proj_weight)] = 3
        elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            found |= {id(p): len(p) // module.hidden_size for n, p in module.named_parameters(recurse=False) if "weight_" in n}
    return found
