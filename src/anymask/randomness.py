"""Random numbers of a block that leave the caller's as they were."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def kept_random() -> Iterator[list[int]]:
    """A block that may draw from the global random numbers of Python, NumPy and torch: they are put back afterwards.

    It gives the GPUs whose numbers are put back, which are those in use.
    """
    # is_initialized() leaves GPUs alone that nobody has used yet: to ask for their numbers would take memory of each
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=gpus):
            yield gpus
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


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
    with kept_random() as gpus:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed GPUs that nobody has used yet, for good
        for gpu in gpus:
            torch.cuda.default_generators[gpu].manual_seed(seed)
        yield
