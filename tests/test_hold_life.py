"""What a held mask means for gradients, scaling, clipping, copies, checkpoints and moves; and that it comes off without a trace."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from anymask import Mask, Recipe, hold, prune
from anymask.errors import MaskError
from anymask.holding import held
from anymask.surgery import fingerprint
from tests.test_hold import assert_zero_where_masked


def held_net(kind=torch.optim.SGD, **options):
    """A small convolutional net under a random mask, its optimiser, and a batch."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))
    mask = Mask({"0.weight": torch.rand(4, 2, 3, 3) < 0.5, "4.weight": torch.rand(3, 36) < 0.3})
    optimizer = kind(model.parameters(), **{"lr": 0.1, **options})
    return model, mask, optimizer, hold(mask, model, optimizer), torch.randn(4, 2, 5, 5)


def test_gradients_add_up_over_batches_and_are_masked_after_each():
    model, mask, _, _, x = held_net()
    model.eval()
    plain = copy.deepcopy(model)
    for batch in x.split(2):
        model(batch).square().sum().backward()
        assert_zero_where_masked(mask, model)
    plain(x).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, torch.where(mask[name], q.grad, 0) if name in mask else q.grad)


def test_clipping_sees_the_norm_of_the_masked_gradients():
    model, mask, _, _, x = held_net()
    plain = copy.deepcopy(model)
    for net in (model, plain):
        net(x).square().sum().backward()
    masked = [torch.where(mask[name], p.grad, 0) if name in mask else p.grad for name, p in plain.named_parameters()]
    by_hand = torch.cat([gradient.flatten() for gradient in masked]).norm()
    torch.testing.assert_close(nn.utils.clip_grad_norm_(model.parameters(), 1.0), by_hand)
    assert nn.utils.clip_grad_norm_(plain.parameters(), 1.0) > by_hand * 1.01


@pytest.mark.parametrize("first", ["backward", "nothing"])
def test_a_gradient_that_is_assigned_is_masked_as_the_step_begins(first):
    """As loops of gradient surgery or torch.func do: no hook of autograd runs then."""
    model, mask, optimizer, _, x = held_net(torch.optim.Adafactor)
    for _ in range(2):
        if first == "backward":
            model(x).square().sum().backward()
        gradients = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        assert_zero_where_masked(mask, model)
        for name in mask:
            gradient = model.get_parameter(name).grad
            assert not gradient[~mask[name]].any()
            assert gradient[mask[name]].any()


def test_an_assigned_gradient_is_masked_where_it_has_the_id_of_one_that_was_zeroed():
    for _ in range(40):  # about a third of them has
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        mask = hold(prune(model, "random", sparsity=0.9), model, optimizer).mask
        model(torch.randn(32, 8)).square().sum().backward()
        optimizer.zero_grad()
        gradients = torch.autograd.grad(model(torch.randn(32, 8)).square().sum(), list(model.parameters()))
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        assert not any(model.get_parameter(name).grad[~mask[name]].any() for name in mask)


@pytest.mark.parametrize("first", ["held", "other"])
def test_a_second_optimiser_that_brings_weights_back_is_named_and_held_it_does_not(first):
    """Muon mixes the entries of a tensor, so masked gradients do not keep its weights at 0."""

    def train(*, both: bool) -> tuple[nn.Module, Mask]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
        mask = prune(model, "random-uniform", sparsity=0.5)
        muon = torch.optim.Muon([model[2].weight], lr=0.01)
        adamw = torch.optim.AdamW([p for p in model.parameters() if p is not model[2].weight])
        hold(mask, model, adamw)
        if both:
            hold(mask, model, muon)
        for _ in range(5):
            model(torch.randn(4, 8)).square().sum().backward()
            for optimizer in (adamw, muon) if first == "held" else (muon, adamw):
                optimizer.step()
            model.zero_grad()
        return model, mask

    with pytest.warns(UserWarning, match=r"pruned weights of 2\.weight are not 0 any more, and AdamW.*for each optimiser"):
        train(both=False)
    model, mask = train(both=True)
    assert_zero_where_masked(mask, model)


def test_what_nobody_has_any_more_is_freed_and_a_model_keeps_its_masked_gradients():
    model, mask, optimizer, holding, x = held_net()
    models, holds = weakref.ref(model), weakref.ref(holding)
    del optimizer, holding
    gc.collect()
    assert holds() is None
    model(x).square().sum().backward()
    assert_zero_where_masked(mask, model)
    assert all(not model.get_parameter(name).grad[~mask[name]].any() for name in mask)
    del model
    gc.collect()
    assert models() is None


def test_the_optimiser_within_the_wrapper_of_accelerate_is_held():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = nn.Linear(6, 3)
    mask = Mask({"weight": torch.arange(18).reshape(3, 6) % 2 == 0})
    model, wrapped = accelerate.Accelerator(cpu=True).prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    holding = hold(mask, model, wrapped)
    running = Recipe.preset("best:density_lr").attach(model, wrapped, total_steps=2)
    for _ in range(2):
        running.loss(model(torch.randn(4, 6)), torch.arange(4) % 3).backward()
        wrapped.step()
        assert_zero_where_masked(mask, model)
        running.step()
    assert held(wrapped) is holding
    running.finish()


def test_an_infinite_gradient_is_zero_where_masked_and_stays_where_kept():
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hold(Mask({"weight": torch.tensor([[1, 0]])}), model, optimizer)
    model(torch.full((1, 2), float("inf"))).sum().backward()
    assert model.weight.grad.tolist() == [[float("inf"), 0.0]]
    optimizer.step()
    assert model.weight.tolist() == [[-float("inf"), 0.0]]


def test_a_gradient_that_was_there_before_is_masked_at_once():
    model, mask, optimizer, holding, x = held_net()
    holding.release()
    model(x).square().sum().backward()
    hold(mask, model, optimizer)
    assert_zero_where_masked(mask, model)


@pytest.mark.parametrize("overflows", [False, True])
def test_gradient_scaling_skips_for_kept_weights_only(overflows):
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    hold(Mask({"weight": torch.tensor([[1, 0]])}), model, optimizer)
    before = model.weight[0, 0].item()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    x = torch.tensor([[float("inf"), 1.0] if overflows else [2.0, float("inf")]])
    scaler.scale(model(x).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == (4.0 if overflows else 8.0)
    assert model.weight.tolist() == [[before if overflows else pytest.approx(before - 0.2), 0.0]]


def test_mixed_precision_training_keeps_zeros():
    model, mask, optimizer, _, x = held_net(momentum=0.9)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert_zero_where_masked(mask, model, optimizer)


# -- weights -----------------------------------------------------------------------------------------------------------


def test_a_live_weight_that_reaches_zero_stays_trainable():
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    hold(Mask({"weight": torch.tensor([[1, 0]])}), model, optimizer)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.0]]))
    for expected in (0.0, -1.0):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        assert model.weight.tolist() == [[expected, 0.0]]


MOVES = [{"memory_format": torch.channels_last}, {"dtype": torch.float64}, {"dtype": torch.bfloat16}, {"device": "cuda"}]


@pytest.mark.parametrize("move", MOVES)
def test_a_model_that_is_moved_after_hold_stays_held(move):
    if "device" in move and not torch.cuda.is_available():
        pytest.skip("no GPU")
    model, mask, optimizer, _, x = held_net(torch.optim.Adam)
    with torch.no_grad():
        model[0].weight[:, 0] = 0  # live ones too: what is pruned cannot be read from the weights
    model.to(**move)
    for _ in range(2):
        optimizer.zero_grad()
        model(x.to(**move)).square().sum().backward()
        assert_zero_where_masked(mask, model)
        optimizer.step()
        assert_zero_where_masked(mask, model, optimizer)
    assert model[0].weight[mask["0.weight"]].all()


def test_complex_weights_are_held():
    for dtype in (torch.complex64, torch.complex128):
        model = nn.Linear(2, 2, bias=False, dtype=dtype)
        optimizer = torch.optim.AdamW(model.parameters())
        mask = Mask({"weight": torch.eye(2)})
        hold(mask, model, optimizer)
        model(torch.ones(1, 2, dtype=dtype)).abs().sum().backward()
        optimizer.step()
        assert_zero_where_masked(mask, model, optimizer)
        assert model.weight[mask["weight"]].all()


@pytest.mark.filterwarnings("ignore:Using backward")  # torch advises against it, for its memory
def test_a_gradient_that_is_differentiated_once_more_is_that_of_the_masked_one():
    model = nn.Linear(2, 1, bias=False)
    hold(Mask({"weight": torch.tensor([[1, 0]])}), model, torch.optim.SGD(model.parameters(), lr=0.1))
    x, penalty = torch.tensor([[2.0, 3.0]]), []
    model.weight.register_post_accumulate_grad_hook(lambda weight: penalty.append(weight.grad))
    model(x).square().sum().backward(create_graph=True)
    (second,) = torch.autograd.grad(penalty[0].sum(), model.weight)  # d/dw of 2 (w . x) x1, over the kept one alone
    assert second.tolist() == [[8.0, 12.0]]


def test_a_frozen_weight_is_held_when_it_is_thawed():
    model, mask, optimizer, holding, x = held_net()
    holding.release()
    model[0].weight.requires_grad_(False)
    hold(mask, model, optimizer)
    assert not model[0].weight.requires_grad
    model(x).sum().backward()
    assert model[0].weight.grad is None
    model[0].weight.requires_grad_(True)
    model(x).square().sum().backward()
    assert model[0].weight.grad.any()
    assert_zero_where_masked(mask, model)


def test_a_mask_under_two_names_of_one_tensor_holds_both():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hold(Mask({"0.weight": torch.tensor([[1, 1], [0, 1]]), "1.weight": torch.tensor([[1, 0], [1, 1]])}), model, optimizer)
    model(torch.randn(3, 2)).square().sum().backward()
    optimizer.step()
    for tensor in (model[0].weight, model[0].weight.grad):
        assert (tensor != 0).tolist() == [[True, False], [False, True]]


def test_an_averaged_model_is_zero_where_masked():
    model, mask, optimizer, _, x = held_net()
    average = AveragedModel(model)
    for _ in range(3):
        model(x).sum().backward()
        optimizer.step()
        average.update_parameters(model)
    assert_zero_where_masked(mask, average.module)


# -- state, copies, release --------------------------------------------------------------------------------------------


def hooks(model, optimizer):
    """Everything that could be left hanging on parameters and optimiser."""
    of_parameters = [(p._post_accumulate_grad_hooks or {}, p._backward_hooks or {}) for p in model.parameters()]
    of_optimizer = [value for key, value in vars(optimizer).items() if key.endswith("hooks")]
    return [len(found) for found in (*(h for pair in of_parameters for h in pair), *of_optimizer)]


def test_the_model_is_the_same_while_held_and_no_hook_is_left_after_release():
    model, mask, optimizer, holding, x = held_net()
    holding.release()
    before, bare, parameters = fingerprint(model), hooks(model, optimizer), list(model.state_dict())
    assert not any(bare)
    holding = hold(mask, model, optimizer)
    assert held(optimizer) is holding
    assert any(hooks(model, optimizer))
    assert fingerprint(model) == before
    assert list(model.state_dict()) == parameters
    holding.release()
    holding.release()
    assert hooks(model, optimizer) == bare
    assert held(optimizer) is None
    model(x).square().sum().backward()
    optimizer.step()
    assert model[4].weight[~mask["4.weight"]].any()


def test_a_deep_copy_is_a_plain_model():
    model, mask, _, _, x = held_net()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    assert not any(hooks(twin, optimizer))
    twin(x).square().sum().backward()
    optimizer.step()
    assert twin[4].weight[~mask["4.weight"]].any()


def test_dense_slots_that_are_loaded_are_masked():
    model, mask, optimizer, holding, x = held_net(torch.optim.AdamW)
    holding.release()
    model(x).square().sum().backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    hold(mask, model, optimizer)
    optimizer.load_state_dict(saved)
    assert optimizer.state[model[4].weight]["exp_avg"].any()
    assert_zero_where_masked(mask, model, optimizer)


def test_a_training_goes_on_bit_for_bit_from_state_dicts():
    def step(model, optimizer, x):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    model, mask, optimizer, _, x = held_net(torch.optim.AdamW)
    other, _, fresh, _, _ = held_net(torch.optim.AdamW)
    step(model, optimizer, x)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, its in ((model, optimizer), (other, fresh)):
        step(net, its, x)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert_zero_where_masked(mask, other, fresh)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_second_hold_on_one_optimiser_is_refused_until_the_first_is_released():
    model, mask, optimizer, holding, _ = held_net()
    with pytest.raises(MaskError, match=r"this SGD holds a mask already.*call release\(\)"):
        hold(mask, model, optimizer)
    holding.release()
    assert held(optimizer) is None
    hold(mask, model, optimizer)


def test_an_optimiser_of_another_model_is_refused_and_nothing_is_touched():
    model, mask, _, _, _ = held_net()
    twin = copy.deepcopy(model)
    nn.init.ones_(twin[0].weight)
    stranger = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(MaskError, match="trains none of the 2 masked parameters"):
        hold(mask, twin, stranger)
    assert twin[0].weight.all()
    assert not any(hooks(twin, stranger))


def test_two_optimisers_may_share_the_parameters_between_them():
    model, mask, _, holding, x = held_net()
    holding.release()
    optimizers = [torch.optim.Muon([model[4].weight]), torch.optim.AdamW([p for p in model.parameters() if p is not model[4].weight])]
    for each in optimizers:
        hold(mask, model, each)
    model(x).square().sum().backward()
    for each in optimizers:
        each.step()
    assert_zero_where_masked(mask, model, *optimizers)


def test_a_mask_that_does_not_fit_is_refused_and_nothing_is_touched():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(MaskError, match="weihgt"):
        hold(Mask({"weight": torch.zeros(2, 2), "weihgt": torch.ones(1)}), model, optimizer)
    assert model.weight.all()
    assert not any(hooks(model, optimizer))


def test_what_is_no_mask_is_refused_and_nothing_is_touched():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for mask in ("ok.mask", {"weight": torch.eye(2)}, None):
        with pytest.raises(MaskError, match=rf"mask came as {type(mask).__name__}.*load_mask\(path\)"):
            hold(mask, model, optimizer)
    assert not any(hooks(model, optimizer))
