"""Ghost skips on units of every order and layout, against what is written out by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from anymask.errors import TechniqueError
from anymask.surgery import evaluating
from anymask.techniques import Context, GhostSkip
from tests.foundations.test_surgery import Flow, conv

TOKENS = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def grown(x, channels, dim):
    """Zero channels appended."""
    pad = list(x.shape)
    pad[dim] = channels - x.shape[dim]
    return torch.cat([x, x.new_zeros(pad)], dim)


CASES = {
    "post-norm": ("b(a(h(x)))", {"a": conv(4, 4), "b": nn.GroupNorm(2, 4), "h": nn.Tanh()}, IMAGES, lambda h: h),
    "pre-activation": (
        "a(torch.relu(b(h(x))))", {"a": conv(4, 6), "b": nn.GroupNorm(2, 4), "h": nn.Tanh()}, IMAGES, lambda h: grown(h, 6, 1),
    ),
    "strided, shrinking": (
        "b(a(h(x)))", {"a": nn.Conv2d(4, 2, 3, stride=2, padding=1), "b": nn.GroupNorm(1, 2), "h": nn.Tanh()}, IMAGES,
        lambda h: F.avg_pool2d(h, 2).unflatten(1, (2, 2)).mean(2),
    ),
    "channels last": (
        "b(a(h(x)).permute(0, 2, 3, 1))", {"a": conv(4, 5), "b": nn.LayerNorm(5), "h": nn.Tanh()}, IMAGES,
        lambda h: grown(h, 5, 1).permute(0, 2, 3, 1),
    ),
    "tokens": ("a(b(h(x)))", {"a": nn.Linear(6, 9), "b": nn.LayerNorm(6), "h": nn.Tanh()}, TOKENS, lambda h: grown(h, 9, 2)),
    "vectors": ("b(a(h(x)))", {"a": nn.Linear(6, 9), "b": nn.LayerNorm(9), "h": nn.Tanh()}, TOKENS[:, 0], lambda h: grown(h, 9, 1)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_shortcut_is_what_is_written_out_by_hand(case):
    forward, modules, x, skip = CASES[case]
    model = Flow(forward, **modules)
    plain = model(x)
    attached = GhostSkip(scale=0.5).attach(Context(model, None, F.cross_entropy, example=x))
    attached.set_strength(0.5)
    torch.testing.assert_close(model(x), plain + 0.25 * skip(torch.tanh(x)))
    attached.set_strength(0.0)
    assert torch.equal(model(x), plain)
    attached.detach()
    assert torch.equal(model(x), plain)


def test_where_the_user_wants_determinism_it_has_a_backward_pass_that_cuda_has(request):
    """Of torch's list of what raises there, adaptive average pools are what a strided unit would need."""
    forward, modules, x, skip = CASES["strided, shrinking"]
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    torch.use_deterministic_algorithms(True)
    model, seen = Flow(forward, **modules), x.clone().requires_grad_()
    plain = model(x)
    attached = GhostSkip(scale=0.5).attach(Context(model, None, F.cross_entropy, example=x))
    attached.set_strength(1.0)
    out = model(seen)
    torch.testing.assert_close(out, plain + 0.5 * skip(torch.tanh(x)))
    nodes, names = [out.grad_fn], set()
    while nodes:
        node = nodes.pop()
        names.add(type(node).__name__)
        nodes += [after for after, _ in node.next_functions if after is not None]
    assert "AvgPool2DBackward0" in names
    assert not [name for name in names if name.startswith("Adaptive")]


@pytest.mark.parametrize("case", CASES)
def test_a_learned_shortcut_learns_and_leaves(case):
    forward, modules, x, _ = CASES[case]
    model = Flow(forward, **modules)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = GhostSkip(kind="learned").attach(Context(model, optimizer, F.cross_entropy, example=x))
    (guest, *_) = [p for group in optimizer.param_groups for p in group["params"]][len(list(modules["a"].parameters())) + 2 :]
    before = guest.detach().clone()
    model(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(guest, before)
    assert guest.grad is None  # zero_grad of the model does not know it
    attached.detach()
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_learned_shortcut_is_of_the_kind_of_its_layer(dtype):
    forward, modules, x, _ = next(iter(CASES.values()))
    model = Flow(forward, **modules).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = GhostSkip(kind="learned").attach(Context(model, optimizer, F.cross_entropy, example=x.to(dtype)))
    assert model(x.to(dtype)).dtype == dtype
    attached.detach()


def test_guests_of_a_fused_optimiser_that_has_made_steps_take_theirs():
    model = Flow("b(a(h(x)))", a=conv(4, 4), b=nn.BatchNorm2d(4), h=nn.Tanh())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)

    def step() -> None:
        model(IMAGES).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # all have momentum now, which PyTorch wants of all of a group or of none
    attached = GhostSkip(kind="learned").attach(Context(model, optimizer, F.cross_entropy, example=IMAGES))
    step()
    attached.detach()
    step()
    assert len(optimizer.state) == len(list(model.parameters()))


def test_auto_takes_convolutions_that_look_around_and_all_where_there_are_none():
    wide, narrow = conv(4, 4), nn.Conv2d(4, 4, 1)
    modules = {"h": nn.Tanh(), "a": wide, "b": nn.BatchNorm2d(4), "c": narrow, "d": nn.BatchNorm2d(4)}
    found = {
        where: GhostSkip(where=where).attach(Context(Flow("d(c(b(a(h(x)))))", **modules), None, F.cross_entropy, example=IMAGES)).found
        for where in ("auto", "spatial", "all")
    }
    assert found == {"auto": "1 conv + norm units", "spatial": "1 conv + norm units", "all": "2 conv + norm units"}
    model = Flow("d(c(h(x)))", h=nn.Tanh(), c=nn.Conv2d(4, 4, 1), d=nn.BatchNorm2d(4))
    assert GhostSkip().attach(Context(model, None, F.cross_entropy, example=IMAGES)).found == "1 conv + norm units"
    with pytest.raises(TechniqueError, match="found nothing"):
        GhostSkip(where="spatial").attach(Context(Flow("d(c(h(x)))", **modules), None, F.cross_entropy, example=IMAGES))


def test_ghosts_go_back_to_the_mode_they_were_in_when_somebody_looks_at_the_model():
    model = Flow("b(a(h(x)))", a=conv(4, 4), b=nn.BatchNorm2d(4), h=nn.Tanh())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    GhostSkip(kind="learned").attach(Context(model, optimizer, F.cross_entropy, example=IMAGES))
    (ghost,) = model.ghost_skip.ghosts
    with evaluating(model):  # which writes to each module that it knows
        assert not ghost.branch[1].training
    assert ghost.branch[1].training
