"""anymask: bring any mask, train it better, ship it sparse.

Importing this package does no work: each name below is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from anymask.version import __version__

if TYPE_CHECKING:
    from anymask.diagnostics import Diagnostics
    from anymask.formats import load_mask
    from anymask.holding import Hold, hold
    from anymask.mask import Mask
    from anymask.prunables import prunable
    from anymask.pruning import prune
    from anymask.pruning.rewiring import Rewiring, rewire
    from anymask.recipe import Recipe
    from anymask.shipping.making import ship
    from anymask.shipping.runtime import load
    from anymask.sparse import to_dense, to_semi_structured, to_sparse
    from anymask.techniques.refitting import reconstruct
    from anymask.train import fit

_HOME = {
    "Diagnostics": "diagnostics",
    "Hold": "holding",
    "Mask": "mask",
    "Recipe": "recipe",
    "Rewiring": "pruning.rewiring",
    "fit": "train",
    "hold": "holding",
    "load": "shipping.runtime",
    "load_mask": "formats",
    "prunable": "prunables",
    "prune": "pruning",
    "reconstruct": "techniques.refitting",
    "rewire": "pruning.rewiring",
    "ship": "shipping.making",
    "to_dense": "sparse",
    "to_semi_structured": "sparse",
    "to_sparse": "sparse",
}
__all__ = [
    "Diagnostics", "Hold", "Mask", "Recipe", "Rewiring", "__version__", "fit", "hold", "load", "load_mask", "prunable", "prune",
    "reconstruct", "rewire", "ship", "to_dense", "to_semi_structured", "to_sparse",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'anymask' has no attribute {name!r}")
    value = getattr(import_module(f"anymask.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
