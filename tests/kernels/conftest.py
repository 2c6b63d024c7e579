import pytest

from anymask.kernels import available, native


@pytest.fixture(autouse=True)
def _the_best_again():
    yield
    if available():
        native.library().am_use(None)
