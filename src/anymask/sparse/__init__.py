"""Layers that store and compute kept weights alone."""

from anymask.sparse.converting import Pause, as_dense, to_dense, to_sparse
from anymask.sparse.semi_structured import to_semi_structured

__all__ = ["Pause", "as_dense", "to_dense", "to_semi_structured", "to_sparse"]
