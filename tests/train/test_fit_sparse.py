"""The reference trainer on sparse layers: the numbers of dense ones but for rounding, and a dense model at the end of it."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anymask import Mask, data, fit, models, prunable, prune, to_sparse
from anymask.data import Batches, Split
from anymask.errors import SettingError, TechniqueError
from anymask.kernels import available
from anymask.prunables import compact
from anymask.surgery import fingerprint
from anymask.train import Protocol, Result, accuracy, checkpoint, sparsity
from tests.train.trainings import MOVING, PROTOCOL, Net, batches, mask_of, train_once

needs_kernels = pytest.mark.skipif(not available(), reason="the native kernels were not built here (no C compiler)")
ADAM = replace(PROTOCOL, optimizer="adamw", lr=2e-3)
SHAPES = {name: tuple(p.shape) for name, p in Net().named_parameters()}


class Wide(nn.Module):
    """A layer that is faster sparse at 2% of its weights, and one that is not at all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 32, 1), nn.Conv2d(32, 32, 3, padding=1)
        self.bn, self.relu, self.deep = nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=32)
        self.fc = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.deep(self.relu(self.bn(self.conv(self.stem(x))))).mean((2, 3)))


def made_wide() -> tuple[Wide, Mask]:
    torch.manual_seed(0)
    model = Wide()
    return model, Mask({"conv.weight": torch.rand(32, 32, 3, 3) < 0.02, "deep.weight": torch.ones(32, 1, 3, 3)})


@needs_kernels
def test_auto_converts_what_is_measured_faster_prints_nothing_and_gives_the_model_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ANYMASK_CACHE", str(tmp_path))
    model, mask = made_wide()
    model = model.to(memory_format=torch.channels_last)
    before, strides = fingerprint(model), [p.stride() for p in model.parameters()]
    seen = []
    train, _, test = batches()
    how: dict[str, Any] = {"mask": mask, "recipe": "default", "protocol": Protocol(epochs=1, batch_size=16), "test": test}
    result = fit(model, train, **how, on_epoch=lambda *_: seen.append(list(compact(model))))
    assert seen[0] == list(compact(model)) + seen[0]  # sparse while it trained, dense now
    assert "conv.weight" in seen[0]
    assert result.sparse_layers == len(seen[0])
    assert (fingerprint(model), [p.stride() for p in model.parameters()]) == (before, strides)
    assert accuracy(model, test) == result.test
    measured = (tmp_path / "layers-3.json").read_text()
    again = fit(made_wide()[0], train, **how)
    assert again.curves == result.curves
    assert (tmp_path / "layers-3.json").read_text() == measured
    assert capfd.readouterr() == ("", "")


@needs_kernels
def test_the_same_seed_gives_the_same_bits_on_several_threads() -> None:
    images, threads = data.load("fashion-mnist-5k"), torch.get_num_threads()
    train = Batches(Split(images.train.images[:640], images.train.labels[:640]), batch_size=64, shuffle=True, seed=0)
    found = []
    try:
        torch.set_num_threads(2)
        for _ in range(3):
            net = models.build("demonet", classes=10, channels=1, seed=0)
            mask = prune(net, "random-erk", sparsity=0.98, seed=0)
            fit(net, train, mask=mask, recipe="default", protocol=Protocol(epochs=1, batch_size=64), sparse="on")
            found.append(net.state_dict())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in other)


@needs_kernels
@pytest.mark.parametrize("recipe", ["default", "tost"])
def test_the_accuracies_are_those_of_dense_layers_and_every_zero_is_exact(recipe: str) -> None:
    images = data.load("fashion-mnist-5k")
    train = Batches(Split(images.train.images[:960], images.train.labels[:960]), batch_size=64, shuffle=True, seed=0)
    test = Batches(Split(images.test.images[:500], images.test.labels[:500]), batch_size=250)
    results: dict[str, Result] = {}
    for sparse in ("on", "off"):
        model = models.build("demonet", classes=10, channels=1, seed=0)
        mask = prune(model, "random-erk", sparsity=0.9, seed=0)
        how: dict[str, Any] = {"mask": mask, "recipe": recipe, "validation": test, "test": test, "sparse": sparse}
        results[sparse] = fit(model, train, protocol=Protocol(epochs=2, batch_size=64, lr=0.05), **how)
        for name, kept in mask.items():
            assert not model.get_parameter(name)[~kept].any()
        assert accuracy(model, test) == results[sparse].test
    ours, theirs = results["on"], results["off"]
    assert (ours.sparse_layers, theirs.sparse_layers) == (len(mask), 0)
    assert ours.curves["train_loss"] == pytest.approx(theirs.curves["train_loss"], abs=0.02)
    assert ours.test == pytest.approx(theirs.test, abs=0.03)  # 15 of 500 images
    assert ours.found == theirs.found


@needs_kernels
@pytest.mark.parametrize("protocol", [PROTOCOL, ADAM], ids=["sgd", "adamw"])
def test_with_all_seams_accumulation_and_clipping_it_is_the_dense_training_but_for_rounding(protocol: Protocol) -> None:
    model, dense = Net(), Net()
    before = fingerprint(model)
    ours, theirs = (train_once(net, sparse=sparse, protocol=protocol) for net, sparse in ((model, "on"), (dense, "off")))
    assert ours.sparse_layers == len(mask_of(Net()))
    assert fingerprint(model) == before
    close(model, dense)
    assert ours.curves["train_loss"] == pytest.approx(theirs.curves["train_loss"], rel=1e-3)
    zeros = {name: int((p == 0).sum()) for name, p in prunable(model).items()}
    assert zeros == {name: int((~kept).sum()) for name, kept in mask_of(Net()).items()}


def close(ours: nn.Module, theirs: nn.Module) -> None:
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, atol=2e-3, rtol=1e-2)


def stopped(file: Path, *, after: int, sparse: str, protocol: Protocol = PROTOCOL) -> dict[str, Any]:
    """What is in the checkpoint file of a training that was interrupted when it had made `after` steps."""
    kept = checkpoint.save

    def save(path: Path, state: dict[str, Any]) -> None:
        kept(path, state)
        if state["progress"]["step"] == after:
            raise KeyboardInterrupt

    model = Net()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        with pytest.raises(KeyboardInterrupt):
            train_once(model, file=file, every=1, sparse=sparse, protocol=protocol)
    assert not compact(model)
    assert {name: tuple(model.get_parameter(name).shape) for name in SHAPES} == SHAPES
    assert all(not model.get_parameter(name)[~kept].any() for name, kept in mask_of(Net()).items())
    return torch.load(file, weights_only=True)


@needs_kernels
@pytest.mark.parametrize("steps", [1, 4, 7, 11, 17])
@pytest.mark.parametrize("protocol", [PROTOCOL, ADAM], ids=["sgd", "adamw"])
def test_a_sparse_training_that_was_stopped_ends_bit_equal(tmp_path: Path, steps: int, protocol: Protocol) -> None:
    whole = Net()
    expected = train_once(whole, sparse="on", protocol=protocol)
    stopped(tmp_path / "c.pt", after=steps, sparse="on", protocol=protocol)
    for sparse in ("on", "auto"):  # the file says what was sparse, whatever is measured now
        file = tmp_path / f"{sparse}.pt"
        file.write_bytes((tmp_path / "c.pt").read_bytes())
        model = Net(seed=99)
        result = train_once(model, file=file, every=1, sparse=sparse, protocol=protocol)
        assert result.curves == expected.curves
        assert result.sparse_layers == expected.sparse_layers == len(mask_of(Net()))
        assert all(torch.equal(model.state_dict()[key], value) for key, value in whole.state_dict().items())


@needs_kernels
@pytest.mark.parametrize("protocol", [PROTOCOL, ADAM], ids=["sgd", "adamw"])
def test_a_checkpoint_is_that_of_the_dense_training(tmp_path: Path, protocol: Protocol) -> None:
    saved = {sparse: stopped(tmp_path / f"{sparse}.pt", after=9, sparse=sparse, protocol=protocol) for sparse in ("on", "off")}
    ours, theirs = saved["on"], saved["off"]
    assert {name: tuple(ours["model"][name].shape) for name in SHAPES} == SHAPES
    assert list(ours["model"]) == list(theirs["model"])
    assert ours["optimizer"]["state"].keys() == theirs["optimizer"]["state"].keys()
    for number, slots in theirs["optimizer"]["state"].items():
        for name, slot in slots.items():
            torch.testing.assert_close(ours["optimizer"]["state"][number][name], slot, atol=2e-3, rtol=1e-2)
    assert (len(ours["sparse"]), theirs["sparse"]) == (len(mask_of(Net())), None)


@needs_kernels
@pytest.mark.parametrize("protocol", [PROTOCOL, ADAM], ids=["sgd", "adamw"])
@pytest.mark.parametrize(("first", "then"), [("on", "off"), ("off", "on")])
def test_a_training_goes_on_dense_or_sparse_whichever_it_was_begun(tmp_path: Path, first: str, then: str, protocol: Protocol) -> None:
    whole, model = Net(), Net(seed=99)
    expected = train_once(whole, sparse="off", protocol=protocol)
    stopped(tmp_path / "c.pt", after=9, sparse=first, protocol=protocol)
    result = train_once(model, file=tmp_path / "c.pt", sparse=then, protocol=protocol)
    assert result.sparse_layers == (len(mask_of(Net())) if then == "on" else 0)
    close(model, whole)
    assert result.curves["train_loss"] == pytest.approx(expected.curves["train_loss"], rel=1e-3)


@needs_kernels
def test_where_kernels_are_missing_a_sparse_training_goes_on_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(tmp_path / "c.pt", after=9, sparse="on")
    monkeypatch.setattr(sparsity, "available", lambda: False)
    assert train_once(Net(), file=tmp_path / "c.pt").sparse_layers == 0


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@needs_kernels
@pytest.mark.parametrize(
    ("how", "error"),
    [
        ({"on_epoch": interrupt}, KeyboardInterrupt),
        ({"protocol": Protocol(epochs=2, lr=1e30)}, TechniqueError),  # a loss that is not finite
        ({"recipe": "tost:ghost_activation"}, TechniqueError),  # refused by the model, which has no ReLU
    ],
    ids=["interrupted", "not finite", "refused"],
)
def test_whatever_stops_it_the_model_is_dense_again(how: dict[str, Any], error: type[BaseException]) -> None:
    model = Net()
    model.body[2] = model.body[5] = nn.Tanh()
    kinds = [type(module) for module in model.modules()]
    states: list[int] = []
    model.register_forward_pre_hook(lambda module, _: states.append(len(compact(module))))
    with pytest.raises(error):
        fit(model, batches()[0], **{"mask": mask_of(Net()), "sparse": "on", "recipe": "default", "protocol": PROTOCOL} | how)
    assert states[-1] == len(mask_of(Net()))  # it was sparse by then
    assert [type(module) for module in model.modules()] == kinds
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == SHAPES


@needs_kernels
@pytest.mark.parametrize("moving", ["set", "rigl", "gmp"])
def test_a_mask_that_moves_stays_dense(moving: str) -> None:
    assert train_once(Net(), moving=moving).sparse_layers == 0
    with pytest.raises(SettingError, match=r"sparse='on' came with a mask that moves\. Allowed: .*\. To do: "):
        train_once(Net(), moving=moving, sparse="on")
    assert MOVING[moving] is not None


def _hindered(what: str, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, Batches, dict[str, Any]]:
    model: nn.Module = Net()
    how: dict[str, Any] = {"mask": mask_of(Net()), "recipe": "default", "protocol": Protocol(epochs=1, batch_size=16)}
    if what == "without a mask":
        how["mask"] = None
    elif what == "with precision bfloat16":
        how["protocol"] = replace(how["protocol"], precision="bfloat16")
    elif what == "inside a wrapper":
        model = torch.compile(model, backend="eager")
    elif what == "without native kernels":
        monkeypatch.setattr(sparsity, "available", lambda: False)
    return model, batches()[0], how


@pytest.mark.parametrize("what", ["without a mask", "with precision bfloat16", "inside a wrapper", "without native kernels"])
def test_where_it_cannot_be_auto_is_dense_and_on_says_why(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, train, how = _hindered(what, monkeypatch)
    with pytest.raises(SettingError, match=rf"sparse='on' came .*{what}.*\. Allowed: .*\. To do: .* or leave sparse at 'auto'"):
        fit(model, train, **how, sparse="on")
    assert fit(model, train, **how).sparse_layers == 0


def test_another_device_or_dtype_is_a_hindrance() -> None:
    assert not sparsity.sparse_possible("auto", device="cuda:0", precision="float32")
    assert not sparsity.sparse_possible("auto", device="cpu", precision="float32", model=Net().double())
    with pytest.raises(SettingError, match=r"came on cuda:0\. Allowed: training on the CPU"):
        sparsity.sparse_possible("on", device="cuda:0", precision="float32")
    with pytest.raises(SettingError, match=r"came with torch\.float64\. Allowed: a model in float32"):
        sparsity.sparse_possible("on", device="cpu", precision="float32", model=Net().double())


def test_another_word_is_refused_with_the_nearest() -> None:
    with pytest.raises(SettingError, match=r"sparse: 'outo'\. Allowed: auto, on, off\. To do: did you mean 'auto'"):
        fit(Net(), batches()[0], mask=mask_of(Net()), sparse="outo")


@needs_kernels
@pytest.mark.parametrize("sparse", ["auto", "off"])
def test_a_model_that_comes_sparse_stays_so_and_its_weights_decay(sparse: str) -> None:
    train, validation, test = batches()
    model, mask = Net(), mask_of(Net())
    dense = copy.deepcopy(model)
    to_sparse(model, mask, next(iter(train))[0], measure=False)
    how: dict[str, Any] = {"mask": mask, "recipe": "default", "protocol": replace(PROTOCOL, weight_decay=0.05)}
    result = fit(model, train, **how, validation=validation, test=test, sparse=sparse)
    assert result.sparse_layers == len(compact(model)) == len(mask)
    fit(dense, train, **how, validation=validation, sparse="off")
    close(model, dense)
