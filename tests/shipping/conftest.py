"""Which convolution over kept weights a test runs with."""

import pytest

from anymask.shipping import runtime
from anymask.shipping.portable import Gather


@pytest.fixture
def gather(portable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The native one of this machine, or the one that stands in for it."""
    if portable:
        monkeypatch.setattr(runtime, "gather_class", lambda: Gather)
    elif runtime.gather_class() is Gather:
        pytest.skip("the native kernels are not built here")
