"""Sparse models in loops of the user's own: what a loop keeps, copies, or begins in the middle."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import anymask
from anymask.errors import MaskError
from anymask.kernels import available
from anymask.prunables import compact
from tests.sparse.test_converting import made, sgd, steps

pytestmark = pytest.mark.skipif(not available(), reason="the native kernels were not built here (no C compiler)")


@pytest.mark.parametrize("kind", ["rigl", "set"])
def test_a_loop_may_keep_its_loss_while_the_mask_moves_and_layers_become_dense(kind):
    """A graph that lives on keeps the node that adds up gradients, of the shape that the weight had."""
    model, mask, x, y = made("resnet20")
    optimizer = sgd(model)
    anymask.to_sparse(model, mask, x, measure=False)
    rewiring = anymask.rewire(anymask.hold(mask, model, optimizer), kind, total_steps=6, every="2it", end="100%")
    for step in range(8):
        if step == 6:
            anymask.to_dense(model, optimizer=optimizer)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(rewiring.history) == 2


def test_a_recipe_may_come_and_go_while_layers_are_dense_for_a_move():
    model, mask, x, y = made("resnet20")
    optimizer = sgd(model)
    anymask.to_sparse(model, mask, x, measure=False)
    anymask.rewire(anymask.hold(mask, model, optimizer), "rigl", total_steps=9, every="1it", end="100%")
    running = anymask.Recipe.preset("tost:label_smoothing").attach(model, optimizer, total_steps=3, example=x)
    assert not compact(model)  # paused: the gradients of pruned weights are wanted in the next step
    for _ in range(3):
        running.loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        running.step()
    running.finish()


def test_a_copy_of_a_sparse_model_with_ghosts_is_the_plain_one():
    model, mask, x, _ = made("resnet20")
    optimizer = sgd(model)
    anymask.to_sparse(model, mask, x, measure=False)
    plain = copy.deepcopy(model).eval()(x)
    anymask.hold(mask, model, optimizer)
    anymask.Recipe.preset("best").attach(model, optimizer, total_steps=9, example=x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.eval()(x), plain)


def test_slots_that_were_not_converted_are_told():
    model, mask, x, y = made("resnet20")
    optimizer = sgd(model)
    steps(model, optimizer, x, y, many=1)
    anymask.to_sparse(model, mask, x, measure=False)
    with pytest.raises(MaskError, match=r"keeps momentum_buffer of .* dense layer.*optimizer=optimizer"):
        anymask.hold(mask, model, optimizer)


def test_an_average_of_the_parameters_is_that_of_the_dense_model():
    """A state dict is a copy, so an average that is written into one does not work; the docs name this one."""
    model, mask, x, y = made("resnet20")
    dense, averages = copy.deepcopy(model), []
    anymask.to_sparse(model, mask, x, measure=False)
    for net in (model, dense):
        optimizer = sgd(net)
        anymask.hold(mask, net, optimizer)
        average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        for _ in range(2):
            steps(net, optimizer, x, y, many=1)
            average.update_parameters(net)
        averages.append(average.module.state_dict())
    for name, right in averages[1].items():
        torch.testing.assert_close(averages[0][name], right, atol=1e-4, rtol=1e-3)
    assert not torch.equal(averages[0]["fc.weight"], model.state_dict()["fc.weight"])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("measure", [True, False])
def test_a_model_may_be_converted_where_there_are_no_gradients(mode, measure, tmp_path, monkeypatch):
    monkeypatch.setenv("ANYMASK_CACHE", str(tmp_path))  # nothing is measured yet
    model, mask, x, y = made("plain")
    optimizer = sgd(model)
    steps(model, optimizer, x, y, many=1)
    with mode():
        anymask.to_sparse(model, mask, x, optimizer=optimizer, measure=measure)
    steps(model, optimizer, x, y, many=1)
    with mode():
        anymask.to_dense(model, optimizer=optimizer)
    steps(model, optimizer, x, y, many=1)


def test_a_model_that_was_made_for_inference_alone_is_converted_there():
    with torch.inference_mode():
        model, mask, x, _ = made("plain")
        right = model(x)
        torch.testing.assert_close(anymask.to_sparse(model, mask, x, measure=False)(x), right, atol=1e-5, rtol=1e-4)
        assert compact(model)
        assert torch.equal(anymask.to_dense(model)(x), right)
