"""Ghost activations find ReLUs however they are written, and each is softened once."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from anymask import Recipe
from anymask.errors import TechniqueError
from anymask.schedules import Schedule
from anymask.surgery import fingerprint
from anymask.techniques import Context, GhostActivation, GhostSkip


def attach(model: nn.Module, example: object = None, **settings: object):
    return GhostActivation(**settings).attach(Context(model, None, F.cross_entropy, example=example))  # type: ignore[arg-type]


class Written(nn.Module):
    """Two linear layers with `act` between: forward code, not a module."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.act = nn.Linear(4, 8), nn.Linear(8, 3), [act]

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act[0](self.a(x) * 4))


SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": F.relu,
    "F.relu input=": lambda x: F.relu(input=x),
    "F.relu inplace": lambda x: F.relu(x, inplace=True),
    "F.relu inplace, by place": lambda x: F.relu(x, True),
    "F.relu_": F.relu_,
    "torch.relu": torch.relu,
    "torch.relu input=": lambda x: torch.relu(input=x),
    "torch.relu_": torch.relu_,
    "Tensor.relu": lambda x: x.relu(),
    "Tensor.relu_": lambda x: x.relu_(),
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU inplace": nn.ReLU(inplace=True),
}
CAPPED: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu6": F.relu6,
    "F.relu6 inplace": lambda x: F.relu6(x, inplace=True),
    "F.hardtanh": lambda x: F.hardtanh(x, 0.0, 6.0),
    "F.hardtanh named": lambda x: F.hardtanh(input=x, min_val=0, max_val=6, inplace=True),
    "F.hardtanh_": lambda x: F.hardtanh_(x, 0.0, 6.0),
    "nn.ReLU6": nn.ReLU6(),
    "nn.Hardtanh": nn.Hardtanh(0, 6),
}


class Holder(nn.Module):
    """`act` as a child where it is a module."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net = Written(act)
        if isinstance(act, nn.Module):
            self.net.child = act

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("name", SPELLINGS | CAPPED)
@pytest.mark.parametrize("strength", [1.0, 0.3, 0.0])
def test_every_spelling_is_softened_once_and_its_gradients_are_right(name: str, strength: float) -> None:
    model, x = Holder((SPELLINGS | CAPPED)[name]), 4 * torch.randn(16, 4)
    cap = 6.0 if name in CAPPED else float("inf")
    hard = F.relu6 if name in CAPPED else F.relu
    by_hand = Written(lambda z: hard(z) if strength == 0 else torch.lerp(hard(z), F.silu(z).clamp(max=cap), strength))
    attached = attach(model, x[:2])
    assert attached.found == "1 ReLU"
    attached.set_strength(strength)
    out, wanted = model(x), by_hand(x)
    (out**2).sum().backward()
    (wanted**2).sum().backward()
    near = torch.equal if strength == 0 else (lambda a, b: torch.allclose(a, b, atol=1e-4, rtol=1e-4))
    assert near(out, wanted)
    for mine, theirs in zip(model.net.parameters(), by_hand.parameters(), strict=True):
        assert near(mine.grad, theirs.grad)
    attached.detach()
    assert torch.equal(model(x), Written(hard)(x))


def test_a_hardtanh_that_is_no_relu6_and_integers_are_left_alone() -> None:
    model = Written(lambda x: F.hardtanh(F.relu(x)) + F.relu(torch.tensor([-1, 2])).sum())
    plain, x = copy.deepcopy(model), torch.randn(5, 4)
    attached = attach(model, x)
    assert attached.found == "1 ReLU"
    attached.set_strength(0.0)
    assert torch.equal(model(x), plain(x))


class Wild(nn.Module):
    """Branches, a loop, a shared module, a root that calls F.relu around children that do, in place before a shortcut."""

    def __init__(self, soft: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.relu, self.soft = nn.ReLU(inplace=True), soft
        self.fail: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        act, relu = self.soft or F.relu, self.soft or self.relu
        for layer in self.layers:
            x = x + act(layer(x))
        y = self.inner[0](x)
        y = self.soft(y) if self.soft else self.inner[1](y)
        shortcut = x = self.layers[0](y)
        if self.soft:
            shortcut = x = self.soft(x)
        else:
            self.relu(x)  # in place: the shortcut reads what it wrote
        if self.fail is not None:
            raise self.fail
        x = relu(self.layers[1](x))
        return act(x - 0.5) + shortcut if x.sum() > 0 else act(x) - shortcut


@pytest.mark.parametrize("where", [torch.float32, torch.bfloat16])
def test_nested_owners_loops_branches_and_shortcuts_are_as_written_by_hand(where: torch.dtype) -> None:
    model, x = Wild(), torch.randn(6, 4)
    by_hand = Wild(lambda z: torch.lerp(F.relu(z), F.silu(z), torch.ones((), dtype=z.dtype)))
    attached = attach(model, (x[:2],))
    assert attached.found == "7 ReLU"
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where is torch.bfloat16):
        out, wanted = model(x), by_hand(x)
        assert torch.allclose(out, wanted)
        attached.set_strength(0.0)
        assert torch.equal(model(x), Wild(F.relu)(x))


def test_keyword_examples_and_modules_without_an_example() -> None:
    assert attach(Wild(), {"x": torch.randn(2, 4)}).found == "7 ReLU"
    assert (
        attach(nn.Sequential(nn.ReLU(), nn.Hardswish())).found
        == "1 ReLU, 1 hardswish left as they are (no example: what its code calls is not seen)"
    )


def test_an_error_in_forward_leaves_no_mode_behind() -> None:
    model, x = Wild(), torch.randn(6, 4)
    attached, depth = attach(model, x), torch._C._len_torch_function_stack()
    model.fail = ValueError("broken")
    with pytest.raises(ValueError, match="broken"):
        model(x)
    assert torch._C._len_torch_function_stack() == depth
    assert torch.equal(F.relu(-x.abs()), torch.zeros(6, 4))
    model.fail = None
    soft = model(x)
    attached.set_strength(0.0)
    assert not torch.equal(soft, model(x))


def test_ctrl_c_in_forward_softens_nothing_else_and_training_may_go_on() -> None:
    model, x = Wild(), torch.randn(6, 4)
    attached, depth = attach(model, x), torch._C._len_torch_function_stack()
    soft, model.fail = model(x), KeyboardInterrupt()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            model(x)
        assert torch.equal(F.relu(-x.abs()), torch.zeros(6, 4))
        assert torch.equal(nn.ReLU()(-x.abs()), torch.zeros(6, 4))
        exported = torch.export.export(nn.Sequential(nn.ReLU()), (x,))
        assert [node.target for node in exported.graph.nodes if node.op == "call_function"] == [torch.ops.aten.relu.default]
    model.fail = None
    assert torch.equal(model(x), soft)
    assert torch._C._len_torch_function_stack() == depth
    model.fail = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        model(x)
    attached.detach()
    assert torch._C._len_torch_function_stack() == depth


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_whole_it_trains_the_same_without_compiling_again(backend: str) -> None:
    torch._dynamo.reset()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.relu = nn.Linear(4, 8), nn.Linear(8, 8), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.a(x))
            for _ in range(2):
                x = F.relu(self.b(x), inplace=True) + x.relu()
            return torch.relu(F.relu6(x) - 1)

    model, x, graphs = Net(), torch.randn(6, 4), torch._dynamo.utils.counters
    attached = attach(model, x)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    graphs.clear()
    for strength in (1.0, 0.5, 0.25, 0.0):
        attached.set_strength(strength)
        values = []
        for net in (compiled, model):
            model.zero_grad()
            out = net(x)
            (out**2).sum().backward()
            values.append([out.detach(), *(p.grad for p in model.parameters())])
        for mine, theirs in zip(*values, strict=True):
            assert torch.allclose(mine, theirs, atol=1e-5)
    assert graphs["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.relu = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b(self.relu(self.a(x))))


class Checkpointed(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.stage, self.fc, self.how = Stage(), nn.Linear(4, 3), how

    def _part(self, x: Tensor) -> Tensor:
        return F.relu(self.fc(x))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x + 1)
        if self.how == "plain" or not self.training:
            return self._part(self.stage(x))
        if self.how == "function":
            return checkpoint(self._part, self.stage(x), use_reentrant=False)
        return self._part(checkpoint(self.stage, x, use_reentrant=self.how == "reentrant"))


@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
def test_checkpointed_modules_have_the_gradients_of_plain_ones(how: str) -> None:
    x, grads = torch.randn(6, 4, requires_grad=True), []
    for kind in ("plain", how):
        model = Checkpointed(kind)
        attach(model, x.detach())
        for _ in range(2):
            model.zero_grad()
            (model(x) ** 2).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert grads[0][0].any()


def test_a_checkpointed_function_is_refused_when_it_trains() -> None:
    model, x = Checkpointed("function"), torch.randn(6, 4)
    attach(model, x)
    with pytest.raises(TechniqueError, match="checkpoint that"):
        model.train()(x)


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("kind", ["free", "learned"])
def test_averaged_models_average_the_right_tensors(use_buffers: bool, before: bool, kind: str) -> None:
    torch.manual_seed(3)
    net = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    model, x = nn.Sequential(*net, nn.Flatten(), nn.Linear(64, 3)), torch.randn(4, 1, 8, 8)
    optimizer, names = torch.optim.SGD(model.parameters(), lr=0.1), list(model.state_dict())
    fade, average = Schedule("linear", full="10%", end="60%"), get_ema_multi_avg_fn(0.5)
    made = AveragedModel(model, use_buffers=use_buffers, multi_avg_fn=average) if before else None
    recipe = Recipe((GhostActivation(fade), GhostSkip(fade, kind=kind)))
    running = recipe.attach(model, optimizer, total_steps=6, example=x)
    ghosted = set(model.state_dict()) - set(names)
    assert bool(ghosted) == (kind == "learned")
    averaged = made or AveragedModel(model, use_buffers=use_buffers, multi_avg_fn=average)
    wanted: dict[str, Tensor] = {}
    for _ in range(6):
        running.loss(model(x), torch.arange(4) % 3).backward()
        optimizer.step()
        optimizer.zero_grad()
        running.step()
        averaged.update_parameters(model)
        learned = dict(model.named_parameters())
        for name in names:
            value = model.state_dict()[name].clone()
            moves = value.is_floating_point() and (use_buffers or name in learned)
            wanted[name] = torch.lerp(wanted[name], value, 0.5) if moves and name in wanted else value
    running.finish()
    mine = averaged.module.state_dict()
    for name in names:
        if wanted[name].is_floating_point():
            assert torch.allclose(mine[name], wanted[name], atol=1e-6), name


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_copy_has_no_ghost(how: Callable[[nn.Module], nn.Module]) -> None:
    model, x = Wild(), torch.randn(6, 4)
    before, plain, attached = fingerprint(model), model(x), attach(model, x)
    twin = how(model)
    assert torch.equal(twin(x), plain)
    assert not torch.equal(model(x), plain)
    attached.detach()
    assert torch.equal(twin(x), plain)
    assert fingerprint(model) == before


def test_a_branch_that_only_training_takes_is_found_by_its_class() -> None:
    class Aux(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.aux = Stage(), Stage()

        def forward(self, x: Tensor) -> Tensor:
            return self.main(x) + (self.aux(x) if self.training else 0)

    model, x = Aux(), torch.randn(6, 4)
    attached, aux = attach(model, x), model.aux(x)
    attached.set_strength(0.0)
    assert not torch.equal(model.aux(x), aux)


def test_the_ghost_follows_mode_dtype_and_device_of_the_model() -> None:
    model, x = Wild().double(), torch.randn(6, 4, dtype=torch.float64)
    attached = attach(model, x)
    assert list(dict(model.named_parameters())) == list(dict(Wild().named_parameters()))
    assert not list(model.buffers())
    moved = model.to("meta")
    assert moved.ghost_activation.ghosts[0].strength.is_meta
    attached.detach()


class Broken(nn.Module):
    """Code that torch.compile must cut in pieces."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.stage, self.last = Stage(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.last(x))
        torch._dynamo.graph_break()
        return torch.relu(self.stage(x) - 0.1)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo warns so with ghosts, not without; cause open
@pytest.mark.parametrize("what", ["pieces", "a child", "before attach"])
def test_other_ways_of_compiling_give_the_same(what: str) -> None:
    torch._dynamo.reset()
    model, plain, x = Broken(), Broken(), torch.randn(6, 4)
    eager = attach(plain, x)
    before = model
    if what == "a child":
        model.stage.compile(backend="eager")
    if what == "before attach":
        model = torch.compile(model, backend="eager")
    attached = attach(model, x)
    if what == "pieces":
        model = torch.compile(model, backend="eager")
    torch._dynamo.utils.counters.clear()
    graphs = set()
    for strength in (1.0, 0.5, 0.0):
        attached.set_strength(strength)
        eager.set_strength(strength)
        assert torch.allclose(model(x), plain(x))
        graphs.add(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(graphs) == 1
    attached.detach()
    assert list(dict(before.named_modules())) == list(dict(Broken().named_modules()))
    torch._dynamo.reset()
