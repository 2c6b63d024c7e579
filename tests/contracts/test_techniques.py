"""What every technique promises, for every row of TECHNIQUES and each of its main settings."""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymask import Mask, Recipe, hold, prunable
from anymask.errors import TechniqueError
from anymask.holding import Hold, held
from anymask.schedules import Schedule
from anymask.surgery import fingerprint
from anymask.techniques import (
    HAM,
    SAM,
    TECHNIQUES,
    Averaging,
    Context,
    DensityLR,
    Distillation,
    FanInInit,
    GhostActivation,
    GhostSkip,
    GradientCorrection,
    IsometryInit,
    LabelSmoothing,
    LRsI,
    Preconditioning,
    RescaleSettings,
    SignIn,
    Technique,
)

FADE = Schedule("linear", full="20%", end="60%")
VARIANTS: dict[str, Technique] = {
    "lrsi": LRsI(settings=RescaleSettings(iterations=3)),
    "fan_in_init": FanInInit(),
    "fan_in_init redraw": FanInInit(redraw=True),
    "isometry_init": IsometryInit(),
    "isometry_init gain": IsometryInit(gain=2.0, iterations=3),
    "density_lr": DensityLR(),
    "density_lr faded": DensityLR(FADE, power=0.5),
    "ghost_activation": GhostActivation(FADE),
    "ghost_activation mish": GhostActivation(FADE, soft="mish", beta=2.0),
    "ghost_activation sharpen": GhostActivation(FADE, fade="sharpen"),
    "ghost_skip": GhostSkip(FADE),
    "ghost_skip learned": GhostSkip(FADE, kind="learned"),
    "ghost_skip all": GhostSkip(FADE, where="all"),
    "label_smoothing": LabelSmoothing(),
    "label_smoothing faded": LabelSmoothing(FADE),
    "distillation": Distillation(),
    "distillation faded": Distillation(FADE, share=1.0, temperature=1.0),
    "ham": HAM(alpha=20.0),
    "ham faded": HAM(FADE, alpha=20.0, beta=0.1),
    "sign_in": SignIn(),
    "sign_in faded": SignIn(FADE, beta=0.5, every="2it"),
    "gradient_correction": GradientCorrection(),
    "gradient_correction all": GradientCorrection(FADE, where="all"),
    "preconditioning": Preconditioning(),
    "preconditioning faded": Preconditioning(FADE, power=1.0, every=2, block=4),
    "averaging": Averaging(decay=0.5),
    "averaging faded": Averaging(FADE),
    "averaging swa": Averaging(kind="swa", start="1it"),
    "sam": SAM(),
    "sam faded": SAM(FADE, rho=0.2),
}
FADING = {name: t for name, t in VARIANTS.items() if t.seam != "init"}
STEP = {name: t for name, t in VARIANTS.items() if t.seam == "step"}
MODEL = {name: t for name, t in VARIANTS.items() if t.seam == "model"}


class Block(nn.Module):
    """Strided, growing, shrinking; an in-place ReLU; one ReLU in two places; a ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.relu, self.inplace, self.six = nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6()
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.inplace(self.bn2(self.conv2(x)))
        x = self.relu(self.bn3(self.conv3(x)))
        return self.fc(self.six(x).mean((2, 3)))


def setting(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer, Tensor, Tensor]:
    """A network whose mask is held, its optimiser, inputs and targets."""
    torch.manual_seed(seed)
    model = Block()
    x, optimizer = torch.randn(8, 3, 8, 8), torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    hold(Mask({n: torch.rand(p.shape) < 0.5 for n, p in prunable(model).items()}), model, optimizer)
    return model, optimizer, x, torch.arange(8) % 5


def teacher() -> nn.Module:
    """Another network, always the same one; draws nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Block()


def carried(optimizer: torch.optim.Optimizer) -> Hold:
    carried = held(optimizer)
    assert carried is not None
    return carried


def attach(technique: Technique, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, **more: object):
    how = {"total_steps": 10, "example": x[:2], "data": [(x, y)], "teacher": teacher()} | more
    return Recipe((technique,)).attach(model, optimizer, **how)  # type: ignore[arg-type]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, running, x: Tensor, y: Tensor, *, steps: int) -> None:
    model.train()
    for _ in range(steps):
        running.loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        running.step()


def observed(technique: Technique, running, model: nn.Module, x: Tensor, y: Tensor, *, strength: float = 1.0) -> Tensor:
    """What the technique acts on: the output, the loss, or the output after three steps."""
    if technique.seam == "step":
        return trained_at(technique, strength=strength)
    with torch.no_grad():
        return running.loss(model.train()(x), y) if technique.seam == "loss" else model.eval()(x)


def trained_at(technique: Technique | None, *, strength: float) -> Tensor:
    """What the network computes after three steps with `technique` at `strength`, or without it."""
    model, optimizer, x, y = setting()
    running = Recipe(()).attach(model, optimizer, total_steps=10) if technique is None else attach(technique, model, optimizer, x, y)
    for _, attached in running._live.values():
        attached.set_strength(strength)
    for _ in range(3):
        running.loss(model.train()(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    for _, attached in running._live.values():
        attached.settle()
    with torch.no_grad():
        return model.eval()(x)


def test_every_technique_is_under_contract() -> None:
    assert {technique.name for technique in VARIANTS.values()} == set(TECHNIQUES)
    for name, kind in TECHNIQUES.items():
        assert name == kind.name
        assert kind.about
        assert kind.paper
        assert kind.seam in {"init", "model", "loss", "step"}


@pytest.mark.parametrize("name", VARIANTS)
def test_it_changes_something_at_full_strength(name: str) -> None:
    model, optimizer, x, y = setting()
    technique, plain = VARIANTS[name], model.eval()(x).detach()
    before = F.cross_entropy(model.train()(x), y) if technique.seam == "loss" else plain
    before = trained_at(None, strength=0.0) if technique.seam == "step" else before
    running = attach(technique, model, optimizer, x, y)
    atol = 1e-6 if technique.seam == "step" else 1e-4  # three steps are not many
    assert not torch.allclose(observed(technique, running, model, x, y), before, atol=atol)


@pytest.mark.parametrize("name", FADING)
def test_at_strength_zero_output_and_gradients_are_the_plain_ones_bit_for_bit(name: str) -> None:
    model, optimizer, x, y = setting()
    twin, technique = copy.deepcopy(model), VARIANTS[name]
    hold(carried(optimizer).mask, twin, torch.optim.SGD(twin.parameters(), lr=0.1))
    running = attach(technique, model, optimizer, x, y)
    for _, attached in running._live.values():
        attached.set_strength(0.0)
    values = []
    for net, loss in ((model, running.loss), (twin, F.cross_entropy)):
        values.append(loss(net.train()(x), y))
        values[-1].backward()
    assert torch.equal(*values)
    for key, theirs in twin.named_parameters():
        assert torch.equal(model.get_parameter(key).grad, theirs.grad), key
    with running.plain():
        assert torch.equal(model.eval()(x), twin.eval()(x))


@pytest.mark.parametrize("name", STEP)
def test_at_strength_zero_steps_are_the_plain_ones_bit_for_bit(name: str) -> None:
    assert torch.equal(trained_at(VARIANTS[name], strength=0.0), trained_at(None, strength=0.0))


@pytest.mark.parametrize("name", FADING)
def test_it_fades_without_a_jump(name: str) -> None:
    model, optimizer, x, y = setting()
    technique = VARIANTS[name]
    running = attach(technique, model, optimizer, x, y)
    _, attached = running._live[technique.name]
    at = []
    for strength in (0.0, 0.001, 0.5, 1.0):
        attached.set_strength(strength)
        at.append(observed(technique, running, model, x, y, strength=strength))
    near, far = (at[1] - at[0]).abs().max(), (at[3] - at[0]).abs().max()
    assert near <= 0.05 * far


@pytest.mark.parametrize("name", VARIANTS)
def test_names_are_kept_and_nothing_is_left_behind(name: str) -> None:
    model, optimizer, x, y = setting()
    before, keys = fingerprint(model), list(model.state_dict())
    groups = [list(map(id, group["params"])) for group in optimizer.param_groups]
    running = attach(VARIANTS[name], model, optimizer, x, y)
    assert set(keys) <= set(model.state_dict())
    assert list(running.plain_state_dict()) == keys
    train(model, optimizer, running, x, y, steps=10)
    assert running.finish() is model
    assert fingerprint(model) == before
    assert list(model.state_dict()) == keys
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == groups
    assert {id(p) for p in optimizer.state} <= {id(p) for p in model.parameters()}
    for key, kept in carried(optimizer).mask.items():
        assert not model.get_parameter(key)[~kept].any()


@pytest.mark.parametrize("name", VARIANTS)
def test_it_is_gone_where_its_schedule_ends_and_training_goes_on_plain(name: str) -> None:
    model, optimizer, x, y = setting()
    before, technique = fingerprint(model), VARIANTS[name]
    running = attach(technique, model, optimizer, x, y)
    end = technique.schedule.span(total=10)[1]
    train(model, optimizer, running, x, y, steps=end)
    running._context.model.__dict__.pop("_anymask_recipe")  # the mark of a running recipe stays until finish
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", VARIANTS)
def test_it_is_refused_when_attached_twice_and_after_that_still_works(name: str) -> None:
    model, optimizer, x, y = setting()
    running = attach(VARIANTS[name], model, optimizer, x, y)
    with pytest.raises(TechniqueError, match="already"):
        attach(VARIANTS[name], model, optimizer, x, y)
    train(model, optimizer, running, x, y, steps=10)
    running.finish()
    attach(VARIANTS[name], model, optimizer, x, y).finish(early=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_settings_make_the_same_technique_again(name: str) -> None:
    recipe = Recipe((VARIANTS[name],))
    assert Recipe.from_settings(recipe.settings()).techniques == recipe.techniques
    assert pickle.loads(pickle.dumps(recipe)) == recipe


@pytest.mark.parametrize("name", MODEL)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_copy_of_the_ghosted_model_is_a_plain_one(name: str, how: Callable[[nn.Module], nn.Module]) -> None:
    """Nobody fades the ghosts of a copy: an average of the weights, the best so far, an export."""
    model, optimizer, x, y = setting()
    running = attach(VARIANTS[name], model, optimizer, x, y)
    twin = how(model)
    train(model, optimizer, running, x, y, steps=3)
    twin.load_state_dict(model.state_dict())  # with learned ghosts in it, which the copy has no use for
    with running.plain():
        plain = model.eval()(x)
    assert torch.equal(twin.eval()(x), plain)
    assert not torch.equal(model(x), plain)
    running.finish(early=True)
    assert list(twin.state_dict()) == list(model.state_dict())
    ours = torch.optim.SGD(twin.parameters(), lr=0.1)
    hold(carried(optimizer).mask, twin, ours)
    attach(VARIANTS[name], twin, ours, x, y).finish(early=True)
    kinds = [[f"{type(m).__name__} {len(m._forward_hooks)} {len(m._forward_pre_hooks)}" for m in net.modules()] for net in (twin, model)]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("first", ["ghost_activation", "ghost_skip learned"])
def test_ghosts_that_leave_first_leave_the_others_where_they_are(first: str) -> None:
    net = nn.Sequential(nn.Tanh(), nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 5))
    optimizer, x, y = torch.optim.SGD(net.parameters(), lr=0.05), torch.randn(8, 3, 8, 8), torch.arange(8) % 5
    (second,) = {"ghost_activation", "ghost_skip learned"} - {first}
    soon = Schedule("step", full="20%", end="20%")
    recipe = Recipe((replace(VARIANTS[first], schedule=soon), VARIANTS[second]))
    running = recipe.attach(net, optimizer, total_steps=10, example=x)
    train(net, optimizer, running, x, y, steps=4)
    assert [m.ghosts for m in net.modules() if hasattr(m, "ghosts")] == [running._live[VARIANTS[second].name][1]._haunted.ghosts]
    train(net, optimizer, running, x, y, steps=6)
    running.finish()


@pytest.mark.parametrize("stop", [0, 1, 5, 6, 9])
@pytest.mark.parametrize("name", VARIANTS)
def test_stopped_and_resumed_is_bit_equal_to_undisturbed(name: str, stop: int) -> None:
    model, optimizer, x, y = setting()
    running = attach(VARIANTS[name], model, optimizer, x, y)
    file = io.BytesIO()
    train(model, optimizer, running, x, y, steps=stop)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "recipe": running.state_dict()}, file)
    train(model, optimizer, running, x, y, steps=10 - stop)
    running.finish()

    again, optimizer, x, y = setting()
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    running = attach(VARIANTS[name], again, optimizer, x, y, state=saved["recipe"])
    again.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(again, optimizer, running, x, y, steps=10 - stop)
    running.finish()
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_an_init_technique_is_not_run_again_on_resume() -> None:
    model, optimizer, x, y = setting()
    state = attach(VARIANTS["lrsi"], model, optimizer, x, y).state_dict()
    again, optimizer, x, y = setting()
    attach(VARIANTS["lrsi"], again, optimizer, x, y, state=state)
    for key, value in setting()[0].state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


@pytest.mark.parametrize("name", MODEL)
def test_nothing_to_apply_to_is_an_error_and_leaves_the_model_alone(name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    before, optimizer = fingerprint(model), torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TechniqueError, match="found nothing"):
        attach(VARIANTS[name], model, optimizer, torch.randn(4, 3), torch.arange(4) % 3)
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", VARIANTS)
def test_random_state_is_untouched_by_attach(name: str) -> None:
    model, optimizer, x, y = setting()
    state = torch.get_rng_state()
    attach(VARIANTS[name], model, optimizer, x, y)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", MODEL)
def test_no_recompilation_while_the_strength_changes(name: str) -> None:
    torch._dynamo.reset()
    model, optimizer, x, y = setting()
    running = attach(VARIANTS[name], model, optimizer, x, y)
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    compiled(x)
    first = len(graphs)
    outputs = []
    for _ in range(5):
        outputs.append(compiled(x).detach())
        running.step()
    assert len(graphs) == first
    assert len({float(out.sum()) for out in outputs}) > 1  # the strength did reach the graph
    torch._dynamo.reset()


def test_a_context_without_an_example_says_what_is_missing() -> None:
    model, optimizer, _, _ = setting()
    with pytest.raises(TechniqueError, match="example=x"):
        GhostSkip().attach(Context(model, optimizer, F.cross_entropy))
