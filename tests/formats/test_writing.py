"""What is written is read again, by us and by the library it is for."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils import prune

from anymask.errors import FileFormatError, MaskError, SettingError, UnknownName
from anymask.formats import WRITTEN, convert, load_mask, load_weights, save
from anymask.mask import Mask
from tests.formats.seeds import SEEDS, kept, net, seed_bytes

FORMATS = ["anymask", *WRITTEN]


def weights_for(format):
    return net().state_dict() if format in WRITTEN and WRITTEN[format].needs_weights else None


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("file", ["m", "m.safetensors", "m.pth"])
def test_round_trip(tmp_path, format, file):
    mask = Mask(kept(), info={"method": "snip"})
    mask.save(tmp_path / file, format=format, weights=weights_for(format))
    loaded = load_mask(tmp_path / file)
    assert (loaded, list(loaded)) == (mask, sorted(mask))
    assert loaded.info == ({"method": "snip"} if format == "anymask" else {"format": format, "source": file})
    assert load_mask(tmp_path / file, model=net()) == mask


@pytest.mark.parametrize("name", SEEDS)
@pytest.mark.parametrize("format", FORMATS)
def test_any_file_is_converted_to_any_format(tmp_path, name, format):
    SEEDS[name][0](tmp_path / "in")
    torch.save({"model": {f"module.{key}": value for key, value in net().state_dict().items()}}, tmp_path / "weights")
    mask = load_mask(tmp_path / "in")
    if list(mask) != list(kept()) and format in ("torch-prune", "zeros"):  # flax's own names
        mask = load_mask(tmp_path / "in", model=net())
        mask.save(tmp_path / "in")
    converted = convert(tmp_path / "in", tmp_path / "out", to=format, weights=tmp_path / "weights" if weights_for(format) else None)
    assert load_mask(tmp_path / "out") == converted == mask


def test_torch_prunes_own_modules_load_what_is_written_for_them(tmp_path):
    weights = net().state_dict()
    save(Mask(kept()), tmp_path / "m.pt", format="torch-prune", weights=weights)
    model = net()
    for index in (0, 2):
        prune.identity(model[index], "weight")
        torch.nn.init.zeros_(model[index].weight_orig)
    model.load_state_dict(torch.load(tmp_path / "m.pt"), strict=True)
    model(torch.ones(2, 2, 4, 5))
    for index in (0, 2):
        assert torch.equal(model[index].weight, weights[f"{index}.weight"] * kept()[f"{index}.weight"])
        assert torch.equal(model[index].weight_orig, weights[f"{index}.weight"])
    assert {value.dtype for name, value in torch.load(tmp_path / "m.pt").items() if name.endswith("_mask")} == {torch.float32}


@pytest.mark.parametrize("file", ["m.pt", "m.safetensors"])
def test_zeros_are_a_checkpoint_of_the_whole_model(tmp_path, file):
    weights = net().state_dict()
    weights["2.weight"][0, 0] = float("inf")
    save(Mask({"2.weight": torch.zeros(3, 4)}), tmp_path / file, format="zeros", weights=weights)
    state = load_file(tmp_path / file) if file == "m.safetensors" else torch.load(tmp_path / file)
    assert set(state) == set(weights)
    assert state["2.weight"].tolist() == [[0.0] * 4] * 3
    assert all(torch.equal(state[name], weights[name]) for name in weights if name != "2.weight")
    assert weights["2.weight"].all()  # what was given is as it was


def test_tosts_prune_model_custom_finds_its_names(tmp_path):
    save(Mask(kept()), tmp_path / "m.pth", format="weight-mask")
    masks = torch.load(tmp_path / "m.pth")
    for name, module in net().named_modules():  # ToST, pruning_utils.py: mask_dict[name + '.weight_mask']
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            prune.CustomFromMask.apply(module, "weight", mask=masks[name + ".weight_mask"])
            assert torch.equal(module.weight_mask, kept()[name + ".weight"].float())


def test_weights_that_share_memory_are_written(tmp_path):
    shared = torch.rand(4, 4)
    state = {"2.weight": shared[:3], "other": shared.T}
    save(Mask({"2.weight": kept()["2.weight"]}), tmp_path / "m.safetensors", format="zeros", weights=state)
    assert torch.equal(load_file(tmp_path / "m.safetensors")["other"], shared.T)


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ({"format": "zero"}, UnknownName, "unknown format to write 'zero'.*did you mean 'zeros'"),
        ({"format": "zeros"}, SettingError, "format zeros came without weights"),
        ({"format": "torch-prune"}, SettingError, "--weights CHECKPOINT"),
        ({"format": "anymask", "weights": {}}, SettingError, "format anymask came with weights"),
        ({"format": "weight-mask", "weights": {}}, SettingError, "format weight-mask came with weights"),
        (
            {"format": "zeros", "weights": {"0.wieght": torch.ones(1), "2.weight": torch.ones(4, 3)}},
            MaskError,
            r"0\.weight is not there \(nearest: 2\.weight, 0\.wieght\); 2\.weight is \(4, 3\) there and \(3, 4\) in the mask",
        ),
    ],
)
def test_what_cannot_be_written_is_said_and_leaves_the_old_file(tmp_path, how, error, says):
    (tmp_path / "m").write_text("mine")
    with pytest.raises(error, match=says):
        save(Mask(kept()), tmp_path / "m", **how)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_file_that_is_there_is_replaced_when_told_so(tmp_path):
    (tmp_path / "in").write_bytes(seed_bytes("tost"))
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SettingError, match="is there already"):
        convert(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"
    convert(tmp_path / "in", tmp_path / "out", replace=True)
    assert load_mask(tmp_path / "out").info == {"format": "weight-mask", "source": "in"}


def test_a_mask_is_no_checkpoint(tmp_path):
    Mask(kept()).save(tmp_path / "in")
    with pytest.raises((FileFormatError, MaskError)):
        convert(tmp_path / "in", tmp_path / "out", to="zeros", weights=tmp_path / "in")
    with pytest.raises(FileNotFoundError):
        load_weights(tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


class Wrapper(torch.nn.Module):
    """All of its parameters begin with a word that trainers put there, too."""

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 3))

    def forward(self, x):
        return self.model(x)


def normed(norm):
    return torch.nn.Sequential(norm(torch.nn.Linear(4, 4)), torch.nn.Linear(4, 3))


@pytest.mark.parametrize(
    "make",
    [
        Wrapper,
        lambda: normed(torch.nn.utils.parametrizations.weight_norm),
        lambda: normed(torch.nn.utils.parametrizations.spectral_norm),
        lambda: normed(torch.nn.utils.spectral_norm),
    ],
)
def test_the_model_that_weights_are_of_loads_what_is_converted_with_them(tmp_path, make):
    torch.save(make().state_dict(), tmp_path / "w.pt")
    weights = torch.load(tmp_path / "w.pt")
    name = next(name for name in weights if name.endswith("1.weight"))
    Mask({name: torch.eye(3, 4)}).save(tmp_path / "m.mask")
    convert(tmp_path / "m.mask", tmp_path / "out.pt", to="zeros", weights=tmp_path / "w.pt")
    written = torch.load(tmp_path / "out.pt")
    make().load_state_dict(written)
    assert all(torch.equal(written[other], weights[other]) for other in weights if other != name)
    assert torch.equal(written[name], weights[name] * torch.eye(3, 4))


def test_weights_on_another_device_come_to_the_mask_and_what_is_no_tensor_is_named(tmp_path):
    with pytest.raises(NotImplementedError):  # which only the copy to the CPU raises: there are no numbers on this device
        save(Mask({"2.weight": torch.eye(3, 4)}), tmp_path / "m.pt", format="zeros", weights=net().to("meta").state_dict())
    with pytest.raises(SettingError, match=r"no tensor: _extra_state.*Allowed"):
        save(Mask(kept()), tmp_path / "m.safetensors", format="zeros", weights={**net().state_dict(), "_extra_state": {}})
