"""Models that are no plain image network: those that ship do it right, and the others are refused with what is wrong."""

import logging
import re
import sys
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import anymask
from anymask.errors import AnymaskError, SettingError
from anymask.shipping import making
from anymask.shipping.making import ship
from anymask.shipping.tracing import exporting


@pytest.fixture
def onnx():
    pytest.importorskip("onnxscript", reason="pip install 'anymask[onnx]'")
    pytest.importorskip("onnxruntime", reason="pip install 'anymask[onnx]'")


class Tokens(nn.Module):
    """Token ids to scores of classes."""

    def __init__(self):
        super().__init__()
        self.embedding, self.last = nn.Embedding(20, 8), nn.Linear(8, 3)

    def forward(self, ids):
        return self.last(self.embedding(ids).mean(1))


class Branching(nn.Module):
    """Decides by what it computes, which no exporter follows."""

    def forward(self, x):
        return x if x.sum() > 0 else -x


IDS = torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(0))


def refused(model, example, path):
    with pytest.raises(SettingError) as caught:
        ship(model, None, example=example, to=path)
    assert not list(path.parent.iterdir())
    return caught.value


@pytest.mark.usefixtures("onnx")
def test_a_model_of_token_ids_ships_to_onnx_and_is_compared_there(tmp_path):
    assert ship(Tokens(), None, example=IDS, to=tmp_path / "net.onnx").difference < 1e-5


def test_a_model_of_token_ids_ships_to_safetensors_and_is_refused_as_anymask(tmp_path):
    error = refused(Tokens(), IDS, tmp_path / "net.anymask")
    assert "Tokens takes integers (torch.int64)" in error.came
    assert "ship to .onnx" in error.fix
    assert ship(Tokens(), None, example=IDS, to=tmp_path / "net.safetensors").kept == 24


def test_a_double_example_is_still_taken_as_float32(tmp_path):
    assert ship(nn.Linear(4, 3), None, example=torch.ones(2, 4).double(), to=tmp_path / "net.anymask").difference < 0.01


@pytest.mark.usefixtures("onnx")
@pytest.mark.parametrize("name", ["net.onnx", "net.anymask"])
def test_a_failed_export_says_why_in_one_line_and_prints_nothing(name, tmp_path, capfd):
    error = refused(Branching(), torch.ones(2, 4), tmp_path / name)
    assert "Branching cannot be exported (Could not guard on data-dependent expression" in error.came
    assert not any(word in str(error) for word in ("\x1b", "\n", "step 1/3", "Next steps"))
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == 0  # loggers speak again


# -- several outputs, and examples that do not fit ---------------------------------------------------------------------


class Several(nn.Module):
    """Gives what `outputs` makes of its features and its scores."""

    def __init__(self, outputs):
        super().__init__()
        self.first, self.last, self.outputs = nn.Linear(4, 8), nn.Linear(8, 3), outputs

    def forward(self, x):
        features = self.first(x)
        return self.outputs(features, self.last(features))


@pytest.mark.parametrize("name", ["net.onnx", "net.anymask"])
@pytest.mark.parametrize("outputs", [lambda f, s: {"features": f, "logits": s}, lambda f, s: (s, f)], ids=["dict", "tuple"])
def test_a_model_of_several_outputs_is_refused(name, outputs, tmp_path):
    assert "Several gives 2 tensors" in refused(Several(outputs), torch.ones(2, 4), tmp_path / name).came


@pytest.mark.usefixtures("onnx")
@pytest.mark.parametrize("outputs", [lambda f, s: {"logits": s}, lambda f, s: (s > 0,)], ids=["dict", "bools"])
def test_one_output_is_compared_however_it_is_wrapped_and_of_any_type(outputs, tmp_path):
    assert ship(Several(outputs), None, example=torch.ones(2, 4), to=tmp_path / "net.onnx").difference < 1e-5


@pytest.mark.parametrize("name", ["net.onnx", "net.anymask"])
def test_an_example_that_the_model_cannot_take_is_said_to_be_the_reason(name, tmp_path, capfd):
    error = refused(nn.Linear(4, 3), torch.ones(2, 5), tmp_path / name)
    assert "Linear fails with the example, torch.float32 (2, 5) (mat1 and mat2 shapes" in error.came
    assert capfd.readouterr() == ("", "")


# -- what is counted -----------------------------------------------------------------------------------------------------


class Kinds(nn.Module):
    """A module of each kind that a mask may cover, and one twice."""

    def __init__(self):
        super().__init__()
        self.one, self.three, self.up = nn.Conv1d(2, 4, 3), nn.Conv3d(1, 2, 3), nn.ConvTranspose2d(2, 3, 2)
        self.attention, self.last = nn.MultiheadAttention(8, 2), nn.Linear(8, 3)
        self.again = self.last


def test_weights_of_all_kinds_count_and_each_once(tmp_path):
    model = Kinds()
    mask = anymask.prune(model, "random", sparsity=0.5)
    mask.apply(model)
    done = ship(model, mask, example=torch.ones(2, 2), to=tmp_path / "net.safetensors")
    assert (done.kept, done.total) == (mask.kept, mask.total)


def test_zeros_of_torch_prune_count_as_zeros(tmp_path):
    model = nn.Conv1d(2, 4, 3)
    prune.random_unstructured(model, "weight", amount=0.75)
    done = ship(model, None, example=torch.ones(2, 2, 3), to=tmp_path / "net.safetensors")
    assert (done.kept, done.total) == (6, 24)


def test_two_exports_at_once_silence_nothing_for_good():
    before, inside, enter = (sys.stderr, logging.root.manager.disable), threading.Event(), threading.Barrier(2, timeout=30)

    def second() -> None:
        enter.wait()
        with exporting(nn.Identity()):
            inside.set()

    thread = threading.Thread(target=second)
    thread.start()
    with exporting(nn.Identity()):
        enter.wait()
        assert not inside.wait(0.1)  # one after the other
    thread.join()
    assert inside.is_set()
    assert (sys.stderr, logging.root.manager.disable) == before


class Forward(nn.Module):
    """A convolution, and then what it is told."""

    def __init__(self, rest):
        super().__init__()
        self.conv, self.rest = nn.Conv2d(2, 3, 1), rest
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        return self.rest(self, self.conv(x))


def counted(net, y):
    net.calls += 1
    return y


def in_float32(net, y):
    with torch.autocast("cpu", enabled=False):
        return y.relu() + 1


@pytest.mark.parametrize(
    ("rest", "says"),
    [
        (lambda net, y: y + torch.randn(3, 1, 1), "randn in its own forward.*random numbers"),
        (lambda net, y: y * torch.zeros(3, 1, 1).bernoulli(0.5), "bernoulli.*random numbers"),
        (counted, "writes into calls in its forward"),
        (in_float32, "uses wrap_with_autocast"),
    ],
)
def test_a_forward_that_no_file_can_have_says_why(rest, says, tmp_path):
    error = refused(Forward(rest).eval(), torch.randn(2, 2, 4, 4), tmp_path / "net.anymask")
    assert re.search(says, str(error)), str(error)


def test_a_model_that_cannot_be_copied_says_why(tmp_path):
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()
    assert "Linear cannot be copied (cannot pickle '_thread.lock' object)" in refused(model, torch.ones(1, 2), tmp_path / "n.anymask").came


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        pass


def test_an_extra_state_is_named_where_it_has_no_place(tmp_path):
    assert "no tensor: _extra_state" in refused(Extra(2, 2), torch.ones(1, 2), tmp_path / "net.safetensors").came


def small(*, scale):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        for parameter in model[2].parameters():
            parameter.mul_(scale)
    return model, torch.randn(8, 16)


def test_small_outputs_are_compared_by_their_size(tmp_path, monkeypatch):
    model, x = small(scale=1e-5)
    ship(model, None, example=x, to=tmp_path / "net.anymask")
    answer = making._answer
    monkeypatch.setattr(making, "_answer", lambda model, example: answer(model, example) * 1.1)
    with pytest.raises(AnymaskError, match="other outputs than the model"):
        ship(model, None, example=x, to=tmp_path / "other.anymask")


def test_outputs_of_which_rounding_is_much_are_those_of_the_model(tmp_path):
    model, x = small(scale=1.0)
    model.append(nn.Linear(4, 2))
    with torch.no_grad():
        model[2].bias.fill_(1e5)  # and so the last one's outputs are differences of large numbers
        model[3].weight.copy_(torch.tensor([[1.0, -1, 1, -1], [1, 1, -1, -1]]))
        model[3].bias.zero_()
    ship(model, None, example=x, to=tmp_path / "net.anymask", values="float32")


def test_weights_that_are_too_small_for_float16_are_told(tmp_path):
    model, x = small(scale=3e-7)
    with pytest.warns(UserWarning, match=r"float16 changes what Sequential gives by up to \d+% of the largest output"):
        ship(model, None, example=x, to=tmp_path / "net.anymask")
    ship(model, None, example=x, to=tmp_path / "net.anymask", values="bfloat16")
