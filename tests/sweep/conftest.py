"""What the tests of sweeps share."""

from pathlib import Path

import pytest

from tests.sweep.plans import write_images


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two classes of a few images, which nobody changes."""
    return write_images(tmp_path_factory.mktemp("images"))
