"""Shipping: a trained sparse network as a file of the size of what is kept, and what runs it.

Importing this package loads neither torch nor NumPy: who only runs a file has no need of the one, and waits for the other later.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anymask.shipping.making import Shipped, ship
    from anymask.shipping.rebuild import Rebuilt
    from anymask.shipping.runtime import Program, load

_HOME = {"Program": "runtime", "Shipped": "making", "load": "runtime", "Rebuilt": "rebuild", "ship": "making"}
__all__ = ["Program", "Rebuilt", "Shipped", "load", "ship"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'anymask.shipping' has no attribute {name!r}")
    return getattr(import_module(f"anymask.shipping.{_HOME[name]}"), name)
