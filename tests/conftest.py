"""One thread for each test process: two that share two cores wait for each other's barriers, 3.7 times as long."""

import importlib.util
import os
import sys
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded, and for the processes that tests start

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("slow machines", deadline=None)
hypothesis.settings.load_profile("slow machines")

VISION = None
if importlib.util.find_spec("torchvision") is not None:
    # The package index has torchvision with CUDA operators, which do not load beside torch's CPU build; its Python part, which
    # lightning, transformers and timm import, wants their schemas alone.
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        VISION = torch.library.Library("torchvision", "DEF")  # kept: the schemas go with this object
        VISION.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        VISION.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(scope="session", autouse=True)
def _cache_of_this_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Which layers are faster sparse is measured for the tests, apart from what the user's cache holds; each worker has its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANYMASK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
