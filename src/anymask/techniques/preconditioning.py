"""Preconditioning: each neuron's gradient times the inverse root of the covariance of the few inputs that it keeps."""

import hashlib
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from anymask.errors import SettingError, TechniqueError
from anymask.holding import held
from anymask.mask import Mask
from anymask.pauses import aside
from anymask.prunables import bare, compact
from anymask.ranks import from_rank, leads, ranks
from anymask.schedules import Schedule
from anymask.sparse.layers import Glances
from anymask.surgery import CONVS, needs_whole
from anymask.techniques.base import Attached, Context, Technique
from anymask.techniques.neuron_blocks import Blocks, Each, inputs_of, threads_of_one


@dataclass(frozen=True)
class Preconditioning(Technique):
    r"""Before each step of the optimiser, the gradient g of the kept incoming weights of each neuron becomes

        (C / v + damping) ** -power  g

    with C the covariance (k, k) of the k inputs that the neuron keeps, over images and places, and v their mean variance. Then each layer's
    gradient gets the norm that it had, so that learning rates mean what they did.

    Inputs behind a ReLU go up and down together, and gradient descent is slow along all directions but that one. Dense networks can only
    undo this for whole layers, by large matrices; a sparse neuron has so few inputs that its own small matrix is cheap. C is taken from
    `samples` places of the batch every `every` steps, as a moving average.

    It costs that look and, at each step, a product with each matrix. A neuron of more than `block` kept inputs has a matrix (and a mean
    variance) for each `block` of them, which lie together. Memory is for two matrices of each block, at most `block`^2 floats; where the
    native kernels do not run, one of the two is as large as the layer's largest.

    Preconditioned are convolutions and linear layers of the mask that own their weight and are called as modules: transposed convolutions,
    recurrent layers, the projections of nn.MultiheadAttention and a head that is tied to an embedding are left as they are, and of a layer
    that is called more than once in a step the first call counts. A mask that moves is followed, with a look in the step after.

    Args:
        power: in (0, 1]; 1 is the natural gradient's for the inputs.
        damping: of C's mean variance, > 0; the larger, the nearer to the plain gradient.
        every: steps between looks, >= 1.
        samples: places of a look, >= 2.
        decay: share of the old C in the new one, in [0, 1).
        block: largest size of a matrix, >= 1.

    Raises:
        TechniqueError: on attach, when there is no mask, no such layer in it, or a model that fully_shard has cut; in the first step,
            when none of them has run as a module, or only compiled (see `RunningRecipe.watched`).

    Example:
        >>> import torch, anymask
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> mask = anymask.Mask({"weight": torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])})
        >>> held, recipe = anymask.hold(mask, model, optimizer), anymask.Recipe((Preconditioning(),))
        >>> recipe.attach(model, optimizer, total_steps=1).found["preconditioning"]
        '1 of 1 masked weights, 2 matrices of up to 2 x 2'

    Reference: the inputs' half of K-FAC (arXiv 1503.05671), which alone does most of the work (FOOF, arXiv 2201.12250); by neuron it is the
    unit-wise natural gradient (arXiv 1303.0818). Ours: on kept inputs alone, centred; the power, blocks
    and the norm of the layer.
    """

    name: ClassVar[str] = "preconditioning"
    seam: ClassVar[str] = "step"
    about: ClassVar[str] = "gradients times the inverse root of the covariance of each neuron's kept inputs"
    paper: ClassVar[str] = "arXiv 2201.12250"
    depth: ClassVar[int] = 4  # of the gradients as `gradient_correction` leaves them

    schedule: Schedule = field(default_factory=lambda: Schedule("step", full="100%", end="100%"))
    power: float = 0.5
    damping: float = 0.1
    every: int = 200
    samples: int = 512
    decay: float = 0.5
    block: int = 32

    def __post_init__(self) -> None:
        if not 0 < self.power <= 1:
            raise SettingError(f"power came as {self.power}", allowed="a number in (0, 1]", fix="0.5 is the default")
        if not 0 < self.damping < float("inf"):
            raise SettingError(f"damping came as {self.damping}", allowed="a finite number > 0", fix="0.1 is the default")
        for name, least in (("every", 1), ("samples", 2), ("block", 1)):
            if (value := getattr(self, name)) < least:
                raise SettingError(f"{name} came as {value}", allowed=f"a whole number >= {least}", fix="leave it out for the default")
        if not 0 <= self.decay < 1:
            raise SettingError(f"decay came as {self.decay}", allowed="a number in [0, 1)", fix="0.5 is the default")

    def attach(self, context: Context) -> "_Preconditioning":
        model, mask = bare(context.model), context.needs_mask(self.name)
        weights = context.masked_weights(self.name)
        needs_whole(weights.values(), f"{self.name} on {type(model).__name__}", fix=f"leave {self.name} out of the recipe")
        modules = dict(model.named_modules())
        layers = {name: modules[name.rpartition(".")[0]] for name in weights if name.rpartition(".")[2] == "weight"}
        layers = {name: m for name, m in layers.items() if isinstance(m, (*CONVS, nn.Linear)) and mask[name].any()}
        if not layers:
            raise self.nothing("a masked convolution or linear layer", model, fix="give the mask of such layers")
        return _Preconditioning(self, context, layers, total=len(mask))


class _Preconditioning(Attached):
    def __init__(self, settings: Preconditioning, context: Context, layers: dict[str, Any], *, total: int) -> None:
        self._settings, self._context, self._layers = settings, context, layers
        self._step, self._mask = context.start, context.needs_mask(settings.name)
        self._places = {name: self._place(name, self._mask) for name in layers}
        self._seen: dict[str, Tensor] = {}  # covariances of this step's look
        self._covariances: dict[str, Tensor] = {}  # on the CPU, unless they stay on a GPU
        self._matrices: dict[str, Tensor] = {}
        self._placed = 0  # how often one of them came to lie somewhere else
        places = self._places.values()
        width = max(p.width for p in places)
        self.found = f"{len(layers)} of {total} masked weights, {sum(p.blocks for p in places)} matrices of up to {width} x {width}"
        self._loaded: Mapping[str, Any] = {}  # of a training that goes on, until it is known which mask is held
        self._due = True  # whether some layer needs a look before its time
        self._silent = -1  # the step of which it is known that nobody looks: each layer asks
        self._handles = [layer.register_forward_pre_hook(_Look(self, name), with_kwargs=True) for name, layer in layers.items()]

    @property
    def recording(self) -> Hashable:
        return self.strength, self._placed

    def replayed(self) -> None:
        self._step += 1

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        if self._loaded:  # saved again before the first step
            return dict(self._loaded)
        kept = {f"blocks.{name}": _digest(self._mask[name]) for name in self._covariances}
        return {
            "step": self._step,
            "due": self._due,
            **kept,
            **{f"covariance.{name}": self._places[name].lower(c) for name, c in self._covariances.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step, self._loaded, self._silent = state["step"], state, -1

    # -- the look
    @property
    def looks(self) -> bool:
        if self.strength == 0 or self._silent == self._step:
            return False
        if self._loaded or self._now() is not self._mask:
            self._follow()
        found = self._due or self._step % self._settings.every == 0
        self._silent = -1 if found else self._step
        return found

    @torch.no_grad()
    def look(self, name: str, x: Tensor) -> None:
        """Note the covariances of what goes into a layer, unless that is done already."""
        if name in self._seen or not leads() or not self._layers[name].training or not self.looks:
            return
        self._follow()
        if not x.numel() or not self._places[name].blocks:
            return
        self._check_width(name, x)
        seed = (self._context.seed * 1_000_003 + self._step) * 10_007 + list(self._layers).index(name)
        draws = torch.Generator().manual_seed(seed % 2**63)
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        rows = inputs_of(self._layers[name], x, samples=self._settings.samples, draws=draws)
        self._seen[name] = self._home(name, self._places[name].covariances(rows))

    def _check_width(self, name: str, x: Tensor) -> None:
        layer = self._layers[name]
        axes, width = len(getattr(layer, "kernel_size", ())), getattr(layer, "in_features", None) or layer.in_channels
        if x.dim() <= axes or x.shape[-1 - axes] != width:
            raise TechniqueError(
                f"the input of {name} came to {Preconditioning.name} as {tuple(x.shape)}",
                allowed=f"{width} {'channels' if axes else 'numbers a sample'}, as {type(layer).__name__} says that it takes",
                fix="check the shape of the batch; where this layer reshapes its input by itself, leave it out of the mask, "
                f"or {Preconditioning.name} out of the recipe",
            )

    # -- the step
    @torch.no_grad()
    def before_update(self) -> None:
        moved = self._follow()
        if self.looks:
            self._learn(moved=moved)
        self._step += 1
        for name, matrix in self._matrices.items() if self.strength > 0 else ():
            gradient = self._layers[name].weight.grad
            if gradient is not None:
                self._places[name].multiply(gradient, matrix, strength=self.strength)

    def _learn(self, *, moved: bool) -> None:
        if not from_rank(bool(self._seen)):
            gradients = (layer.weight.grad for layer in self._layers.values())
            if not self._covariances and not moved and any(bool(g.any()) for g in gradients if g is not None):
                raise TechniqueError(
                    f"{Preconditioning.name} saw none of its layers run before this step",
                    allowed="layers that are called as modules, in training mode; compiled ones within `running.watched()`",
                    fix="call model.train() (norms alone may stay in eval mode), put `with running.watched():` around the forward pass "
                    "of a compiled model, or leave it out of the recipe",
                )
            return
        made: dict[str, Tensor] = {}
        here = all(self._stays(name) for name in self._places)
        with nullcontext(map) if here else _aside() as each:
            for name in self._places:
                # Of rank 0, for all: ranks see other images, and have to make equal steps.
                seen = from_rank(self._seen.get(name))
                if seen is None or not seen.isfinite().all():
                    continue
                old = self._covariances.get(name)
                self._covariances[name] = seen if old is None else old.lerp(seen, 1 - self._settings.decay)
                made[name] = self._roots(name, each=each)
                if self._layers[name].weight.device.type == "cpu":
                    self._use(name, made.pop(name))
        for name, matrices in made.items():
            self._use(name, matrices)
        self._seen, self._due = {}, False

    def _stays(self, name: str) -> bool:
        """Whether what is learned of a layer stays on its device: a GPU that has nobody to send it to, and nothing to do but products."""
        s = self._settings
        return _gpu(self._layers[name].weight) and s.power == 0.5 and s.damping >= _LEAST_DAMPING and ranks() == 1

    def _home(self, name: str, covariances: Tensor) -> Tensor:
        return covariances.to(self._layers[name].weight.device) if self._stays(name) else covariances.cpu()

    def _roots(self, name: str, *, each: Each = map) -> Tensor:
        s = self._settings
        if self._stays(name):
            return self._places[name].square_roots(self._covariances[name], damping=s.damping)
        return self._places[name].roots(self._covariances[name], power=s.power, damping=s.damping, each=each)

    def _know(self, name: str, covariances: Tensor) -> None:
        self._covariances[name] = self._home(name, covariances)
        self._use(name, self._roots(name))

    def _use(self, name: str, made: Tensor) -> None:
        known = self._matrices.get(name)
        if known is None or known.shape != made.shape or known.device != self._layers[name].weight.device:
            self._matrices[name] = made.to(self._layers[name].weight.device)
            self._placed += 1
        else:
            known.copy_(made)  # in place, for steps that were recorded

    # -- where weights are
    def _follow(self) -> bool:
        """Take the mask that is held now, the tensors as they lie now, and what was loaded; True where the mask is another."""
        mask, loaded = self._now(), self._loaded
        moved, self._loaded = False, {}
        for name, layer in self._layers.items():
            other = mask is not self._mask and not torch.equal(mask[name], self._mask[name])
            if other or self._places[name].lies != (layer.weight.shape, layer.weight.device):
                self._places[name] = self._place(name, mask)
                known = [of.pop(name, None) for of in (self._seen, self._covariances, self._matrices)]
                if known[1] is not None and not other:
                    self._know(name, known[1])
            moved = moved or other
        self._mask, self._due, self._silent = mask, self._due or moved, -1
        if loaded:
            self._due = loaded["due"]
            for name in self._layers:
                if loaded.get(f"blocks.{name}") == _digest(mask[name]):
                    self._know(name, self._places[name].symmetric(loaded[f"covariance.{name}"].cpu()))
                elif f"covariance.{name}" in loaded:  # the mask moved after the step that was saved, or blocks were in another order then
                    self._due = True
        return moved

    def _now(self) -> Mask:
        hold = held(self._context.needs_optimizer(Preconditioning.name))
        return self._mask if hold is None else hold.mask

    def _place(self, name: str, mask: Mask) -> Blocks:
        layer = self._layers[name]
        sparse = compact(bare(self._context.model)).get(name)
        flat = mask[name].flatten().nonzero()[:, 0] if sparse is None else sparse.places().long()
        how = {"groups": getattr(layer, "groups", 1), "block": self._settings.block}
        return Blocks(mask[name].shape, flat, layer.weight, compact=sparse is not None, **how)


class _Look(Glances):
    """What hears a layer's inputs; in a copy of the model, or in one that was pickled, nothing is `attached`."""

    def __init__(self, attached: _Preconditioning | None, name: str) -> None:
        self.attached, self.name = attached, name

    def __call__(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self.attached is not None and not torch.compiler.is_compiling() and (args or "input" in kwargs):
            self.attached.look(self.name, args[0] if args else kwargs["input"])

    def glances(self) -> bool:
        return self.attached is not None and self.attached.looks

    def __reduce__(self) -> Any:
        return _Look, (None, self.name)


_LEAST_DAMPING = 1e-3  # for products: at 1e-5 they are off by 8% for covariances of float32, which are not quite positive


@contextmanager
def _aside() -> Iterator[Each]:
    """Others go on while processors compute: 0.6 s for a ResNet-18 at 98%, on two cores."""
    with aside(), threads_of_one() as each:
        yield each


def _gpu(weight: Tensor) -> bool:
    return weight.is_cuda


def _digest(kept: Tensor) -> str:
    return hashlib.sha256(kept.cpu().numpy().tobytes()).hexdigest()
