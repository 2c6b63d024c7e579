"""What may come between sparse layers and those that follow their memory, beside the dense model: written in place, left out, noise."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import anymask
from anymask.errors import SettingError
from anymask.kernels import available
from anymask.prunables import compact

pytestmark = pytest.mark.skipif(not available(), reason="the native kernels were not built here (no C compiler)")


class Between(nn.Module):
    """Nothing in evaluation; in training it takes 1 off."""

    def forward(self, x):
        return x - 1 if self.training else x


class Again(nn.Module):
    """Its ReLU is called once more in training."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x):
        x = self.relu(self.norm(self.conv(x)))
        return x + self.relu(x - 1) if self.training else x


class Hidden(Again):
    """What comes in between in training is in its own forward, where no module shows it."""

    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.relu(x - 1 if self.training else x)


class Written(Again):
    """The same, written over what the norm gave."""

    def forward(self, x):
        x = self.norm(self.conv(x))
        if self.training:
            x -= 1
        return self.relu(x)


def both(*parts):
    """A network of these, and its sparse twin; images for them."""
    torch.manual_seed(0)
    dense, x = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.randn(5, 3, 12, 10)
    mask = anymask.prune(dense, "random-uniform", sparsity=0.3, seed=0)
    mask.apply(dense)
    return dense, anymask.to_sparse(copy.deepcopy(dense), mask, x, measure=False), x


def check_same(dense, sparse, x):
    """Equal outputs and gradients of the input, in training and in evaluation."""
    for part in (nn.Module.train, nn.Module.eval):
        found = []
        for model in (part(dense), part(sparse)):
            given = x.clone().requires_grad_()
            y = model(given)
            y.square().sum().backward()
            found.append((y.detach(), given.grad))
        torch.testing.assert_close(*found, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2)])
@pytest.mark.parametrize("norm", [[], [nn.BatchNorm2d(8)]])
def test_what_a_pool_gives_may_be_written_over(pool, norm):
    check_same(*both(nn.Conv2d(3, 8, 3), *norm, pool, nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3)))


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("between", [Between, lambda: nn.Sequential(nn.Identity(), Between())])
def test_a_norm_does_no_relu_that_training_puts_something_before(between, inplace):
    check_same(*both(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), between(), nn.ReLU(inplace), nn.Conv2d(8, 8, 3)))


def test_a_relu_that_training_calls_once_more_is_one():
    check_same(*both(Again(), nn.Conv2d(8, 8, 3)))


@pytest.mark.parametrize("kind", [Hidden, Written])
def test_what_is_done_unseen_between_a_norm_and_its_relu_is_an_error(kind):
    dense, sparse, x = both(kind())
    torch.testing.assert_close(sparse.eval()(x), dense.eval()(x), atol=1e-5, rtol=1e-4)
    with pytest.raises(SettingError, match="a ReLU was given something else than in the example"):
        sparse.train()(x)


def test_a_norm_of_one_value_a_channel_is_refused_in_training_as_pytorch_does():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    anymask.to_sparse(model, anymask.prune(model, "random", sparsity=0.5), torch.randn(2, 4, 4, 4), measure=False)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.randn(1, 4, 1, 1))
    assert model.eval()(torch.randn(1, 4, 1, 1)).shape == (1, 8, 1, 1)


def test_several_threads_may_compute_with_a_model_at_once():
    _, sparse, x = both(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    sparse.eval()
    images = [x[:1] * number for number in range(1, 9)]
    with torch.inference_mode():
        right = [sparse(each) for each in images]

    def compute(each):
        with torch.inference_mode():
            return [sparse(each) for _ in range(20)][-1]

    with ThreadPoolExecutor(4) as pool:
        torch.testing.assert_close(list(pool.map(compute, images)), right)


def test_a_model_that_was_stopped_between_a_norm_and_its_relu_can_be_kept():
    _, sparse, x = both(Hidden())
    y = sparse[0].norm(sparse[0].conv(x))
    copies = copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))
    assert sparse[0].relu(y) is y
    assert not vars(y)
    for one in copies:
        torch.testing.assert_close(one.eval()(x), sparse.eval()(x))


class Views(nn.Module):
    """Images and channels become one dimension, by view."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(80, 5)

    def forward(self, x):
        x = self.conv(x)
        return self.fc(x.view(len(x) * 8, -1)).view(len(x), 8, 5).mean(1)


class Weighs(Views):
    """A layer's weight is used beside the layer."""

    def forward(self, x):
        return self.conv(x).mean((2, 3)) * self.conv.weight.flatten(1).norm(dim=1)


@pytest.mark.parametrize(("kind", "why"), [(Views, "reshape"), (Weighs, "weights are vectors")])
def test_a_model_that_cannot_compute_with_sparse_layers_stays_dense_and_trains(kind, why):
    model, x = kind(), torch.randn(5, 3, 12, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    mask = anymask.prune(model, "random-uniform", sparsity=0.3, seed=0)
    mask.apply(model)
    before, right = copy.deepcopy(model.state_dict()), model(x)
    with pytest.warns(UserWarning, match=f"leaves all layers dense: with sparse ones the model fails.*{why}"):
        anymask.to_sparse(model, mask, x, optimizer=optimizer, measure=False)
    torch.testing.assert_close(model.state_dict(), before)
    torch.testing.assert_close(model(x), right)
    model(x).sum().backward()
    optimizer.step()


def test_a_transformers_layers_stay_dense_because_its_evaluation_takes_their_weights():
    model = nn.Sequential(nn.Linear(12, 16), nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True))
    mask, x = anymask.prune(model, "random-uniform", sparsity=0.5, seed=0), torch.randn(3, 6, 12)
    mask.apply(model)
    right = model.eval()(x)
    anymask.to_sparse(model, mask, x, measure=False)
    assert list(compact(model)) == ["0.weight"]
    with torch.no_grad():
        torch.testing.assert_close(model(x), right, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, torch.optim.LBFGS])
def test_an_optimizer_that_has_slots_of_other_shapes_is_refused_before_anything_is_changed(kind):
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), torch.randn(3, 6)
    optimizer = kind(model.parameters(), lr=0.01)

    def loss():
        optimizer.zero_grad()
        value = model(x).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    optimizer.step(loss)
    mask = anymask.prune(model, "random-uniform", sparsity=0.3, seed=0)
    with pytest.raises(SettingError, match=f"{kind.__name__} keeps .* in a shape of its own"):
        anymask.to_sparse(model, mask, x, optimizer=optimizer, measure=False)
    assert model[0].weight.all()
    optimizer.step(loss)
