"""Leaving the caller's random state and model as they were."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from anymask.surgery import copied


@contextmanager
def isolated_random(seed: int) -> Iterator[None]:
    """A block in which the global random numbers of Python, NumPy and torch start from `seed`; put back afterwards.

    Shuffling loaders, augmentations and dropout draw from these, so the block gives the same result each time.

    Example:
        >>> import torch
        >>> before = torch.get_rng_state()
        >>> with isolated_random(0):
        ...     _ = torch.rand(3)
        >>> torch.equal(before, torch.get_rng_state())
        True
    """
    # torch.manual_seed would also seed GPUs that nobody has used yet, for good; is_initialized() leaves those alone
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=gpus):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)
            for gpu in gpus:
                torch.cuda.default_generators[gpu].manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def masked_copy(model: nn.Module, kept: Mapping[str, Tensor]) -> nn.Module:
    """A deep copy of `model`, without its wrapper and without gradients, its weights 0 where `kept` is False.

    Tied weights stay tied.
    """
    twin = copied(model)
    twin.zero_grad(set_to_none=True)
    parameters = dict(twin.named_parameters())
    with torch.no_grad():
        for name, keep in kept.items():
            parameters[name].masked_fill_(~keep.to(parameters[name].device), 0)
    return twin
