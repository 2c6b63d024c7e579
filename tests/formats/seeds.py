"""One small file of each kind that is read, made by the library itself where it is installed, and the mask that is in it."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from anymask.formats import save
from anymask.mask import Mask

FLAX_NAMES = {"Conv_0.weight": "0.weight", "Dense_0.weight": "2.weight"}  # of flax_tree, in the model net()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, (1, 2)), nn.BatchNorm2d(3), nn.Linear(4, 3))


def kept() -> dict[str, Tensor]:
    """The mask that every seed holds: no layer is symmetric, so that a wrong layout is seen."""
    seed = torch.Generator().manual_seed(1)
    return {"0.weight": torch.rand(3, 2, 1, 2, generator=seed) < 0.5, "2.weight": torch.rand(3, 4, generator=seed) < 0.5}


def masked_state() -> dict[str, Tensor]:
    return {name: value * kept()[name] if name in kept() else value for name, value in net().state_dict().items()}


def own(path: Path) -> None:
    Mask(kept(), info={"method": "snip", "seed": 0}).save(path)


def torch_prune(path: Path) -> None:
    model = net()
    for index in (0, 2):
        prune.custom_from_mask(model[index], "weight", kept()[f"{index}.weight"])
    torch.save(model.state_dict(), path)


class FakeSparsity(nn.Module):
    """As in mklasby/sparsimony, sparsimony/parametrization/fake_sparsity.py (FakeSparsityDenseGradBuffer)."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.register_buffer("dense_grad", torch.zeros_like(mask))

    def forward(self, x: Tensor) -> Tensor:
        return self.mask * x


def sparsimony(path: Path) -> None:
    model = net()
    for index in (0, 2):
        parametrize.register_parametrization(model[index], "weight", FakeSparsity(kept()[f"{index}.weight"]))
    torch.save(model.state_dict(), path)


def torch_ao(path: Path) -> None:
    """torch.ao.pruning: `BaseSparsifier.state_dict()`, whose defaultdict torch.load refuses, made plain."""
    state = {name: {"mask": mask} for name, mask in kept().items()}
    torch.save({"state": state, "groups": [{"tensor_fqn": name, "sparsity_level": 0.5} for name in kept()]}, path)


def tost(path: Path) -> None:
    """ToST's `extract_mask`: what of the state dict of a pruned model has "mask" in its name."""
    model = net()
    for index in (0, 2):
        prune.custom_from_mask(model[index], "weight", kept()[f"{index}.weight"])
    torch.save({name: value for name, value in model.state_dict().items() if "mask" in name}, path)


def synaptic_flow(path: Path) -> None:
    """ganguli-lab/Synaptic-Flow, Layers/layers.py: buffers `weight_mask` and `bias_mask` in every layer, norms too."""
    state = net().state_dict()
    masks = {f"{name}_mask": torch.ones_like(value) for name, value in state.items() if name.endswith((".weight", ".bias"))}
    torch.save({**state, **masks, **{f"{name}_mask": mask.float() for name, mask in kept().items()}}, path)


def open_lth(path: Path) -> None:
    """facebookresearch/open_lth, pruning/mask.py: `{k: v.cpu().int() ...}`."""
    torch.save({name: mask.int() for name, mask in kept().items()}, path)


def nni(path: Path) -> None:
    """microsoft/nni 2, nni/algorithms/compression/v2/pytorch/base/pruner.py, `export_model`."""
    masks = {name.removesuffix(".weight"): {"weight": mask.float(), "bias": torch.ones(3)} for name, mask in kept().items()}
    masks["2"]["bias"] = None
    torch.save(masks, path)


def nni3(path: Path) -> None:
    """microsoft/nni 3, nni/compression/base/wrapper.py: inputs and outputs are targets, too."""
    masks: dict[str, Any] = {name.removesuffix(".weight"): {"weight": mask.float()} for name, mask in kept().items()}
    masks["0"] |= {"_input_0": torch.zeros(1, 2, 3, 3), "_output_0": torch.zeros(1, 3)}
    torch.save(masks, path)


def modelopt(path: Path) -> None:
    """NVIDIA/Model-Optimizer, modelopt/torch/sparsity/weight_sparsity/module.py; mto.save puts a state dict beside its own."""
    masks = {name.replace("weight", "_weight_mask"): mask for name, mask in kept().items()}
    torch.save({"modelopt_state": {"modelopt_version": "0.40"}, "model_state_dict": {**net().state_dict(), **masks}}, path)


def zeros_safetensors(path: Path) -> None:
    save_file(masked_state(), path, metadata={"format": "pt"})


def zeros_torch(path: Path) -> None:
    torch.save({"epoch": 3, "optimizer": {"state": {0: {"momentum": torch.zeros(2, 2)}}}, "state_dict": masked_state()}, path)


def zeros_legacy(path: Path) -> None:
    torch.save(masked_state(), path, _use_new_zipfile_serialization=False)


def zeros_sharded(path: Path) -> None:
    """Hugging Face: the index; its shards lie beside it."""
    state = masked_state()
    shards = {"0": "model-1.safetensors", "1": "model-2.safetensors", "2": "model-2.safetensors"}
    places = {name: shards[name[0]] for name in state}
    for shard in set(places.values()):
        save_file({name: state[name] for name in state if places[name] == shard}, path.parent / shard)
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


def npz(path: Path) -> None:
    _savez(path, {name: mask.numpy() for name, mask in kept().items()} | {"step": np.int64(3), "note": np.array("mine")})


def npz_packed(path: Path) -> None:
    _savez(path, {name: np.asfortranarray(mask.numpy().astype(">f4")) for name, mask in kept().items()}, pack=np.savez_compressed)


def flax_tree(masks: dict[str, Tensor]) -> dict[str, Any]:
    """The tree of flax: HWIO and (in, out), in modules of other names."""
    conv, dense = (masks[name].numpy().astype(np.uint8) for name in ("0.weight", "2.weight"))
    return {"Conv_0": {"kernel": conv.transpose(2, 3, 1, 0), "bias": None}, "Dense_0": {"kernel": dense.T, "bias": None}}


def npz_pytree(path: Path) -> None:
    tree = flax_tree(kept())
    _savez(path, {f"params/{module}/kernel": tree[module]["kernel"] for module in tree})


def flax(path: Path) -> None:
    """A TrainState with the state of JaxPruner in it (jaxpruner/base_updater.py, SparseState)."""
    weights = {module: {"kernel": np.ones(leaf["kernel"].shape, np.float32)} for module, leaf in flax_tree(kept()).items()}
    state = {"masks": flax_tree(kept()), "inner_state": {"0": {"count": 3}}, "target_sparsities": None, "count": np.int32(3)}
    path.write_bytes(flax_bytes({"step": 3, "params": weights, "opt_state": state, "phase": 1j}))


class BFloat16(np.ndarray):
    """The bits of bfloat16 numbers, which NumPy does not have."""


def flax_bytes(tree: Any) -> bytes:
    """google/flax, flax/serialization.py: `msgpack_serialize` and `_ndarray_to_bytes`."""

    def pack(x: Any) -> Any:
        if isinstance(x, complex):
            return msgpack.ExtType(2, msgpack.packb((x.real, x.imag)))
        array, code = np.asarray(x), 1 if isinstance(x, np.ndarray) else 3
        name = "bfloat16" if isinstance(x, BFloat16) else array.dtype.name
        return msgpack.ExtType(code, msgpack.packb((array.shape, name, array.tobytes("C")), use_bin_type=True))

    return msgpack.packb(tree, default=pack, strict_types=True)


def weight_mask_safetensors(path: Path) -> None:
    written = path.parent / "written.safetensors"
    save(Mask(kept()), written, format="weight-mask")
    written.replace(path)


def _savez(path: Path, arrays: dict[str, Any], *, pack: Callable[..., None] = np.savez) -> None:
    with open(path, "wb") as file:
        pack(file, **arrays)


SEEDS: dict[str, tuple[Callable[[Path], None], str]] = {  # name: how it is made, the format it is read as
    "own": (own, ""),
    "torch-prune": (torch_prune, "torch-prune"),
    "sparsimony": (sparsimony, "parametrized"),
    "torch-ao": (torch_ao, "sparsifier"),
    "tost": (tost, "weight-mask"),
    "synaptic-flow": (synaptic_flow, "weight-mask"),
    "weight-mask-safetensors": (weight_mask_safetensors, "weight-mask"),
    "open-lth": (open_lth, "mask-dict"),
    "nni": (nni, "nni"),
    "nni3": (nni3, "nni"),
    "modelopt": (modelopt, "modelopt"),
    "zeros-safetensors": (zeros_safetensors, "zeros"),
    "zeros-torch": (zeros_torch, "zeros"),
    "zeros-legacy": (zeros_legacy, "zeros"),
    "zeros-sharded": (zeros_sharded, "zeros"),
    "npz": (npz, "npz"),
    "npz-packed": (npz_packed, "npz"),
    "npz-pytree": (npz_pytree, "npz"),
    "flax": (flax, "flax"),
}


def seed_bytes(name: str) -> bytes:
    """The file of that name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seed"
        SEEDS[name][0](path)
        return path.read_bytes()
