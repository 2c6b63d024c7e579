"""Gradients of a `Gather`, NumPy in and out, for tests: sparse layers give addresses to what `Gather.at` gives."""

import numpy as np

from anymask import kernels
from anymask.kernels.native import Floats, address


class Gather(kernels.Gather):
    """With the gradients of its input, plus `add`, into `out`, and of the kept weights, returned."""

    def input_gradient(self, g: Floats, values: Floats, out: Floats, *, add: Floats | None = None, threads: int = 1) -> Floats:
        self._at(out, threads).input_gradient(*map(address, (g, values, add, out)))
        return out

    def weight_gradient(self, x: Floats, g: Floats, *, threads: int = 1) -> Floats:
        out = np.zeros(len(self.conv.kept), np.float32)
        self._at(x, threads).weight_gradient(*map(address, (x, g, out)))
        return out

    def gradients(self, x: Floats, g: Floats, values: Floats, out: Floats, *, add: Floats | None = None, threads: int = 1) -> Floats:
        """Both."""
        of_values = np.zeros_like(values)
        self._at(x, threads).gradients(*map(address, (x, g, values, add, out, of_values)))
        return of_values
