"""Masks of every library are read, told apart by what is in the file, and their names found in a model."""

import io
import json
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils import prune as torch_prune

from anymask.errors import FileFormatError, MaskError
from anymask.formats import load_mask, load_weights
from anymask.mask import Mask
from tests.formats.seeds import FLAX_NAMES, SEEDS, kept, masked_state, net


@pytest.mark.parametrize("name", SEEDS)
@pytest.mark.parametrize("file", ["mask", "mask.safetensors", "mask.npz", "mask.pth"])
def test_each_kind_of_file_is_read_under_any_name(tmp_path, name, file):
    make, family = SEEDS[name]
    make(tmp_path / file)
    mask = load_mask(tmp_path / file)
    assert {FLAX_NAMES.get(n, n): t.tolist() for n, t in mask.items()} == {n: t.tolist() for n, t in kept().items()}
    assert mask.info == ({"format": family, "source": file} if family else {"method": "snip", "seed": 0})


@pytest.mark.parametrize("name", SEEDS)
def test_with_a_model_the_names_are_the_models(tmp_path, name):
    SEEDS[name][0](tmp_path / "mask")
    mask = load_mask(tmp_path / "mask", model=net())
    assert mask == Mask(kept())
    wrapped = nn.Module()
    wrapped.model = net()
    assert list(load_mask(tmp_path / "mask", model=wrapped)) == ["model.0.weight", "model.2.weight"]


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "_orig_mod.module.model."])
@pytest.mark.parametrize("given", [None, net()])
def test_what_trainers_put_before_names_is_understood(tmp_path, prefix, given):
    torch.save({prefix + name: mask for name, mask in kept().items()}, tmp_path / "m")
    assert load_mask(tmp_path / "m", model=given) == Mask(kept())


def test_a_prefix_that_not_all_names_have_is_a_name(tmp_path):
    masks = {"model.0.weight": torch.eye(3, 4), "head.weight": torch.eye(2, 3)}
    torch.save(masks, tmp_path / "m")
    assert list(load_mask(tmp_path / "m")) == list(masks)
    model = nn.ModuleDict({"model": nn.Sequential(nn.Linear(4, 3)), "head": nn.Linear(3, 2)})
    assert list(load_mask(tmp_path / "m", model=model)) == list(masks)


def test_a_model_decides_whether_a_prefix_is_a_name(tmp_path):
    torch.save({"model.fc.weight": torch.eye(3, 4)}, tmp_path / "m")
    inner = nn.ModuleDict({"fc": nn.Linear(4, 3)})
    both = nn.ModuleDict({"model": inner, "fc": nn.Linear(4, 3)})
    assert list(load_mask(tmp_path / "m")) == list(load_mask(tmp_path / "m", model=inner)) == ["fc.weight"]
    assert list(load_mask(tmp_path / "m", model=both)) == ["model.fc.weight"]


def test_a_name_that_may_be_either_of_two_is_not_guessed(tmp_path):
    torch.save({"module.fc.weight": torch.eye(3, 4)}, tmp_path / "m")
    both = nn.ModuleDict({"model": nn.ModuleDict({"fc": nn.Linear(4, 3)}), "fc": nn.Linear(4, 3)})
    with pytest.raises(MaskError, match=r"not in the model: module\.fc\.weight"):
        load_mask(tmp_path / "m", model=both)


def test_a_compiled_part_of_a_model_keeps_its_name(tmp_path):
    torch.save({"0._orig_mod.fc.weight": torch.eye(2), "1.weight": torch.eye(3)}, tmp_path / "m")
    assert list(load_mask(tmp_path / "m")) == ["0.fc.weight", "1.weight"]


def test_a_dictionary_of_modules_names_their_weights(tmp_path):
    torch.save({name.removesuffix(".weight"): mask for name, mask in kept().items()}, tmp_path / "m")
    assert load_mask(tmp_path / "m", model=net()) == Mask(kept())


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "net", "masks"])
def test_checkpoints_are_unwrapped(tmp_path, key):
    wrapped = {"epoch": 3, "args": None, key: OrderedDict(kept()), "optimizer": {"state": {0: {"exp_avg": torch.rand(2, 2)}}}}
    torch.save(wrapped, tmp_path / "m")
    assert load_mask(tmp_path / "m") == Mask(kept())
    torch.save({"checkpoint": 1, "model": wrapped}, tmp_path / "m")
    assert load_mask(tmp_path / "m") == Mask(kept())


def test_modules_of_nni_may_be_called_as_wrappers_are(tmp_path):
    torch.save({"model": {"weight": torch.eye(2, 3)}, "fc": {"weight": torch.eye(3, 2)}}, tmp_path / "m")
    assert list(load_mask(tmp_path / "m")) == ["model.weight", "fc.weight"]


def test_a_mask_that_does_not_fit_names_what_is_missing_unexpected_and_misshapen(tmp_path):
    torch.save({"0.wieght": torch.ones(3, 2, 1, 2), "2.weight": torch.ones(4, 3)}, tmp_path / "m")
    with pytest.raises(MaskError) as caught:
        load_mask(tmp_path / "m", model=net())
    for said in (
        "not in the model: 0.wieght (3, 2, 1, 2) (nearest: 0.weight,",
        "another shape: 2.weight is (4, 3) in the mask and (3, 4) in the model",
        "prunable and not in the mask: 0.weight (3, 2, 1, 2) (nearest: 0.wieght)",
    ):
        assert said in caught.value.came


def test_a_model_that_torch_prunes_takes_the_masks_of_its_own_checkpoint_and_of_others(tmp_path):
    model = net()
    for name, mask in kept().items():
        torch_prune.custom_from_mask(model.get_submodule(name.removesuffix(".weight")), "weight", mask)
    torch.save(model.state_dict(), tmp_path / "its.pth")
    Mask(kept()).save(tmp_path / "ours.mask")
    for file in ("its.pth", "ours.mask"):
        mask = load_mask(tmp_path / file, model=model)
        assert mask == Mask({f"{name}_orig": tensor for name, tensor in kept().items()})
        mask.check(model)


def test_an_own_mask_finds_its_names_in_a_wrapped_model(tmp_path):
    Mask(kept(), info={"method": "snip"}).save(tmp_path / "m")
    mask = load_mask(tmp_path / "m", model=nn.DataParallel(net()))
    assert (list(mask), mask.info) == (["0.weight", "2.weight"], {"method": "snip"})  # those of the model inside


# -- zeros -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [torch.save, save_file])
def test_zeros_cover_the_matrices_that_hold_one_or_with_a_model_all_that_is_prunable(tmp_path, write):
    state = masked_state() | {
        "2.weight": torch.ones(3, 4),
        "table": torch.eye(2),
        "1.weight": torch.zeros(3),
        "causal": torch.zeros(2, 2).int(),
    }
    write(state, tmp_path / "m")
    assert list(load_mask(tmp_path / "m")) == ["0.weight", "table"]
    mask = load_mask(tmp_path / "m", model=net())
    assert mask == Mask({"0.weight": kept()["0.weight"], "2.weight": torch.ones(3, 4)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("as_safetensors", [False, True])
def test_zeros_of_any_floating_type_negative_ones_too(tmp_path, dtype, as_safetensors):
    weight = torch.tensor([[1.0, -0.0, 0.0], [2.0, float("nan"), -3.0]]).to(dtype)
    save_file({"w.weight": weight}, tmp_path / "m") if as_safetensors else torch.save({"w.weight": weight}, tmp_path / "m")
    assert load_mask(tmp_path / "m")["w.weight"].int().tolist() == [[1, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("given", [None, net()])
def test_a_checkpoint_without_a_zero_says_so(tmp_path, given):
    torch.save(net().state_dict(), tmp_path / "dense.pt")
    with pytest.raises(FileFormatError, match=r"dense\.pt .*no mask, and no exact zero in its 2 matrices.*To do: save the masks too"):
        load_mask(tmp_path / "dense.pt", model=given)


def test_a_checkpoint_of_another_model_names_what_it_lacks(tmp_path):
    torch.save({"0.wieght": 0.5 * torch.eye(3), "2.weight": torch.eye(3, 4)}, tmp_path / "m")
    with pytest.raises(MaskError, match=r"the checkpoint does not fit Sequential; not in it: 0\.weight \(nearest: 2\.weight, 0\.wieght\)"):
        load_mask(tmp_path / "m", model=net())


def test_a_tied_weight_is_found_under_either_of_its_names(tmp_path):
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    for name in ("embed.weight", "head.weight"):
        torch.save({name: 0.3 * torch.eye(4, 3)}, tmp_path / "m")
        assert list(load_mask(tmp_path / "m", model=model)) == [name]


def test_parametrised_weights_without_a_mask_are_read_by_their_zeros(tmp_path):
    torch.save({"0.parametrizations.weight.original": 0.5 * torch.eye(2)}, tmp_path / "m")  # torch.ao saves no masks
    assert load_mask(tmp_path / "m") == Mask({"0.weight": torch.eye(2)})


def test_torch_aos_masks_are_read_from_its_sparsifier_made_plain_or_once_squashed(tmp_path):
    model, sparsifier = net(), WeightNormSparsifier(sparsity_level=0.5, sparse_block_shape=(1, 1), zeros_per_block=1)
    sparsifier.prepare(model, [{"tensor_fqn": "2.weight"}])
    sparsifier.step()
    state = sparsifier.state_dict()["state"]
    torch.save({"state": state}, tmp_path / "m")
    with pytest.raises(FileFormatError, match=r"would run or build collections\.defaultdict"):
        load_mask(tmp_path / "m")
    torch.save({"state": {name: dict(value) for name, value in state.items()}}, tmp_path / "m")
    mask = load_mask(tmp_path / "m", model=net())
    assert mask == Mask({name: value["mask"] for name, value in state.items()})
    sparsifier.squash_mask()
    torch.save(model.state_dict(), tmp_path / "squashed")
    assert load_mask(tmp_path / "squashed") == mask


# -- folders and shards ------------------------------------------------------------------------------------------------


def test_a_folder_is_read_by_its_index_and_so_is_the_index_itself(tmp_path):
    SEEDS["zeros-sharded"][0](tmp_path / "model.safetensors.index.json")
    (tmp_path / "pytorch_model.bin").write_bytes(b"of another format, and not looked at")
    assert load_mask(tmp_path) == load_mask(tmp_path / "model.safetensors.index.json", model=net()) == Mask(kept())


def test_a_folder_with_one_checkpoint_is_that_checkpoint(tmp_path):
    SEEDS["zeros-torch"][0](tmp_path / "pytorch_model.bin")
    assert load_mask(tmp_path) == Mask(kept())


def test_shards_of_torch_are_read(tmp_path):
    torch.save(masked_state(), tmp_path / "pytorch_model-1.bin")
    places = ", ".join(f'"{name}": "pytorch_model-1.bin"' for name in masked_state())
    (tmp_path / "pytorch_model.bin.index.json").write_text(f'{{"weight_map": {{{places}}}}}')
    assert load_mask(tmp_path, model=net()) == Mask(kept())


@pytest.mark.parametrize(
    ("places", "says"),
    [
        ({"a": "../away.safetensors"}, r"a shard at '\.\./away"),
        ({"a": "/etc/passwd"}, "a shard at '/etc/passwd'"),
        ({"a": ".."}, r"a shard at '\.\.'"),
        ({"a": ""}, "a shard at ''"),
        ({"lost.weight": "model-1.safetensors"}, "1 tensors that its shards do not hold, such as lost.weight"),
        ({"a": "index.json"}, "an index where a shard belongs"),
        ({"a": 3}, "TypeError"),
        ([], "AttributeError"),
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(tmp_path, places, says):
    SEEDS["zeros-sharded"][0](tmp_path / "whole.json")
    (tmp_path / "index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(FileFormatError, match=says):
        load_mask(tmp_path / "index.json")


def test_an_index_whose_ninth_byte_is_a_brace_is_no_safetensors_file(tmp_path):
    SEEDS["zeros-sharded"][0](tmp_path / "i")
    (tmp_path / "i").write_text('{ "x" : {}, ' + (tmp_path / "i").read_text()[1:])
    assert (tmp_path / "i").read_text()[8] == "{"
    assert load_mask(tmp_path / "i") == Mask(kept())


def test_a_shard_that_is_not_there_is_named(tmp_path):
    (tmp_path / "i").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        load_mask(tmp_path / "i")


# -- refused -----------------------------------------------------------------------------------------------------------


def zipped(*names):
    """A zip archive with files of these names."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    return file.getvalue()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"fc.weight_mask": torch.rand(2, 2)}, "the mask of fc.weight holds values other than 0 and 1"),
        ({"fc": "text"}, "no tensor under a name"),
        (torch.eye(2), "no tensor under a name"),
        ([torch.eye(2)], "no tensor under a name"),
        ({"a": torch.zeros(0, 3)}, "no mask"),
        ({"a": torch.eye(2).to_sparse()}, "no tensor under a name"),
        ({"a" * 2000: torch.eye(2)}, "a name of 2001 characters"),
        ({"scores": torch.rand(3), "fc.bias": torch.ones(2)}, "no mask, and no matrix"),
    ],
)
def test_what_holds_no_mask_says_what_it_holds(tmp_path, value, says):
    torch.save(value, tmp_path / "m")
    with pytest.raises(FileFormatError, match=f"{says}.*Allowed.*To do"):
        load_mask(tmp_path / "m")


@pytest.mark.parametrize(
    ("blob", "says"),
    [
        (b"", "empty"),
        (b"\x89HDF\r\n\x1a\n" + bytes(80), "no format that is known"),
        (b"\x93NUMPY\x01\x00" + bytes(80), "a single array"),
        (b'{"weight_map": ', "JSONDecodeError"),
        (b"PK\x03\x04" + bytes(80), "BadZipFile"),
        (zipped("a.npy", "notes.txt"), r"an archive with notes\.txt in it"),
    ],
)
def test_other_files_are_refused(tmp_path, blob, says):
    (tmp_path / "m").write_bytes(blob)
    with pytest.raises(FileFormatError, match=says):
        load_mask(tmp_path / "m")


@pytest.mark.parametrize("name", ["open-lth", "zeros-torch", "npz", "npz-packed"])
def test_one_flipped_bit_in_a_zipped_mask_is_refused_or_harmless(tmp_path, name):
    SEEDS[name][0](tmp_path / "m")
    whole, mask = (tmp_path / "m").read_bytes(), load_mask(tmp_path / "m")
    for place in range(0, len(whole), 3):
        (tmp_path / "m").write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            assert dict(load_mask(tmp_path / "m")).keys() <= mask.keys()
        except FileFormatError:
            continue
        assert load_mask(tmp_path / "m") == mask


def test_an_entry_that_is_marked_as_a_folder_is_refused(tmp_path):
    """PyTorch reads nothing then, and gives what the memory held: now and then what an earlier file had there."""
    torch.save({"weight": torch.eye(2)}, tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as archive, zipfile.ZipFile(tmp_path / "n.pt", "w") as marked:
        for entry in archive.infolist():
            content = archive.read(entry)
            entry.external_attr |= 0x10 * entry.filename.endswith("/version")
            marked.writestr(entry, content)
    with pytest.raises(FileFormatError, match="an archive that is compressed, or damaged"):
        load_mask(tmp_path / "n.pt")


def test_a_folder_without_a_checkpoint_says_what_it_may_hold(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no mask file at .*pytorch_model\.bin\.index\.json"):
        load_mask(tmp_path)


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torch-prune", "sparsimony", "synaptic-flow", "modelopt"])
def test_weights_come_under_their_plain_names_without_masks(tmp_path, name):
    SEEDS[name][0](tmp_path / "m")
    weights, dense = load_weights(tmp_path / "m"), net().state_dict()
    assert set(weights) == set(dense)
    assert all(torch.equal(weights[key], dense[key]) for key in dense)
