"""Layers that store and compute kept weights alone."""

from anymask.sparse.converting import as_dense, to_dense, to_sparse

__all__ = ["as_dense", "to_dense", "to_sparse"]
