"""2:4 masks for the sparse tensor cores of a GPU: which layers, who is refused, and where a GPU is, that it computes the same."""

import copy

import pytest
import torch
from torch import nn

import anymask
from anymask import Mask
from anymask.errors import MaskError, SettingError
from anymask.sparse.semi_structured import is_2_of_4

needs_tensor_cores = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs an NVIDIA GPU of compute capability 8.0"
)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))  # 10 outputs: no multiple of 32


def test_what_prune_makes_is_2_of_4_and_other_masks_are_not() -> None:
    model = net()
    assert is_2_of_4(anymask.prune(model, "magnitude+2:4")["0.weight"])
    assert not is_2_of_4(anymask.prune(model, "magnitude", sparsity=0.5)["0.weight"])
    assert is_2_of_4(torch.zeros(32, 64))
    assert not is_2_of_4(torch.zeros(32, 60))
    assert not is_2_of_4(torch.zeros(32, 64, 1, 1))


def test_a_model_on_the_cpu_is_refused_and_stays() -> None:
    model = net()
    mask, before = anymask.prune(model, "magnitude+2:4"), copy.deepcopy(model.state_dict())
    with pytest.raises(SettingError, match=r"0\.weight is torch\.float32 on cpu\. Allowed: float16 or bfloat16 on an NVIDIA GPU"):
        anymask.to_semi_structured(model, mask)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_mask_without_such_a_layer_is_refused() -> None:
    model = net()
    with pytest.raises(MaskError, match="none of the 2 masked weights"):
        anymask.to_semi_structured(model, anymask.prune(model, "magnitude", sparsity=0.9))
    with pytest.raises(MaskError, match=r"2\.weight"):
        anymask.to_semi_structured(model, Mask({"2.weight": torch.ones(3, 3)}))


def test_tied_weights_and_fused_encoder_layers_are_no_such_layers() -> None:
    tied = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    tied[1].weight = tied[0].weight
    for model in (tied, nn.TransformerEncoderLayer(64, 4, 128)):
        mask = anymask.prune(model, "magnitude+2:4")
        with pytest.raises(MaskError, match="none of the"):
            anymask.to_semi_structured(model, mask)


def test_to_dense_leaves_dense_models() -> None:
    model = net()
    weight = model[0].weight
    assert anymask.to_dense(model)[0].weight is weight


@needs_tensor_cores
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_computes_what_the_dense_one_does(dtype: torch.dtype) -> None:
    model = net().to("cuda", dtype).eval()
    mask = anymask.prune(model, "magnitude+2:4")
    dense = copy.deepcopy(model)
    mask.apply(dense)
    x = torch.randn(32, 128, device="cuda", dtype=dtype)
    anymask.to_semi_structured(model, mask)
    assert isinstance(model[0].weight, torch.sparse.SparseSemiStructuredTensor)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), dense(x))
    again = anymask.to_dense(model).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in dense.state_dict().items())
