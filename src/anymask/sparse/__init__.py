"""Layers that store and compute kept weights alone."""

from anymask.sparse.converting import Pause, as_dense, to_dense, to_sparse

__all__ = ["Pause", "as_dense", "to_dense", "to_sparse"]
