"""Keeping pruned weights at exactly 0 while somebody else trains."""

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anymask.errors import MaskError, SettingError
from anymask.interrupts import uninterrupted
from anymask.mask import Mask, local, needs_mask, shard
from anymask.prunables import compact, trained


def _check_slots(model: nn.Module, optimizer: Optimizer) -> None:
    for name, layer in compact(model).items():
        for slot, value in optimizer.state.get(layer.weight, {}).items():
            if isinstance(value, Tensor) and tuple(value.shape) == layer.dense_shape:
                raise MaskError(
                    f"the optimizer keeps {slot} of {name} as of the dense layer, {layer.dense_shape}",
                    allowed="slots of the kept weights alone, where a layer is sparse",
                    fix="call anymask.to_sparse(model, mask, example, optimizer=optimizer), which converts them",
                )


class Hold:
    """A mask that is kept on a model and its optimiser. Made by `anymask.hold`; undone by `release`."""

    def __init__(self, mask: Mask, model: nn.Module, optimizer: Optimizer) -> None:
        self.mask, self.model, self.optimizer = mask, model, optimizer
        self.parameters = mask.check(model)
        _check_slots(model, optimizer)
        self._kept = self._ones(mask)
        self._masked: dict[str, weakref.ref[Tensor]] = {}  # which gradient of each weight has been masked since the last step
        self._handles: list[Any] = []
        self._looks = 0  # how often it is still looked whether another optimiser brings pruned weights back
        try:
            with uninterrupted():
                for name, parameter in self.parameters.items():
                    self._handles.append(self._hold_gradient(name, parameter))
                self._handles += [optimizer.register_step_post_hook(self), optimizer.register_load_state_dict_post_hook(self._loaded)]
                self._handles.append(optimizer.register_step_pre_hook(self._mask_assigned))
            self(optimizer)
        except BaseException:
            self.release()
            raise
        self._looks = 3

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        """Zero the pruned weights and whatever the optimiser stores for them; called after each of its steps.

        Most optimisers keep zeros by themselves once the gradients are masked. Those that mix the entries of a tensor
        (Muon) or begin their slots with other values (Rprop, Adagrad) do not.
        """
        self._masked.clear()
        if self._looks:
            self._looks -= 1
            self._warn_of_others(optimizer)
        together: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
        alone = len({id(parameter) for parameter in self.parameters.values()}) == len(self.parameters)  # no weight has two names
        for name, parameter in self.parameters.items():
            kept = self._where(name, parameter)
            slots = (slot for slot in optimizer.state.get(parameter, {}).values() if isinstance(slot, Tensor))
            for tensor in (local(parameter), *(local(slot) for slot in slots if slot.shape == parameter.shape)):
                if kept.dtype == _INTEGERS.get(tensor.itemsize) and kept.stride() == tensor.stride() and _few(tensor) and alone:
                    together.setdefault(kept.dtype, []).append((tensor.view(kept.dtype), kept))
                else:
                    _zero(tensor, kept)
        for pairs in together.values():
            torch._foreach_mul_(*map(list, zip(*pairs, strict=True)))

    def _warn_of_others(self, optimizer: Optimizer) -> None:
        """Say so where weights that `optimizer` does not train came back since the last step: one that mixes entries (Muon) trains them."""
        mine = trained(optimizer)
        others = [(name, p) for name, p in self.parameters.items() if id(p) not in mine]
        if revived := [name for name, p in others if bool((self._where(name, p) == 0).logical_and(local(p) != 0).any())]:
            self._looks = 0
            warnings.warn(
                f"pruned weights of {', '.join(revived)} are not 0 any more, and {type(optimizer).__name__}, which holds the mask, does "
                "not train them: call anymask.hold(mask, model, optimizer) for each optimiser that does",
                stacklevel=3,
            )

    def _loaded(self, optimizer: Optimizer) -> None:
        _check_slots(self.model, optimizer)
        self(optimizer)

    @torch.no_grad()
    def move(self, mask: Mask) -> None:
        """Hold `mask` from now on, of the same names and shapes as the one before: `self.mask` is then this one.

        What is newly pruned becomes 0 at once, in weights, gradients and optimiser slots. What is newly kept begins at 0 in all of
        them, since it was held there. The tensors that hooks, compiled graphs and CUDA graphs know are written in place.

        Raises:
            MaskError: for another set of names or shapes, or when the hold was released.
        """
        if not self._handles:
            raise MaskError("a hold was moved after release()", allowed="moves while it holds", fix="hold the new mask instead")
        shapes, wanted = ({name: tuple(m[name].shape) for name in m} for m in (mask, self.mask))
        if shapes != wanted:
            other = sorted(name for name in {*shapes, *wanted} if shapes.get(name) != wanted.get(name))
            raise MaskError(
                f"the new mask differs in name or shape: {', '.join(other)}",
                allowed="the names and shapes of the mask that is held",
                fix="release this hold and hold the new mask",
            )
        mask.check(self.model)  # sparse layers have no place for other weights than theirs
        ones = self._ones(mask)
        for name, parameter in self.parameters.items():
            self._where(name, parameter).copy_(ones[name])
            self._mask_gradient(name, parameter)
        self.mask = mask
        self(self.optimizer)

    def release_with(self, handle: Any) -> None:
        """Call `handle.remove()` on `release`: for what works on this hold and means nothing without it."""
        self._handles.append(handle)

    def act_last(self) -> None:
        """Let what moves this mask (`anymask.rewire`) act after all that hears of the optimiser's steps by now."""
        for handle in self._handles:
            if hasattr(handle, "act_last"):
                handle.act_last()

    def release(self) -> None:
        """Remove every hook; the weights stay as they are."""
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()

    def _hold_gradient(self, name: str, parameter: Tensor) -> Any:
        # Python's garbage collector does not see what the hook of a parameter holds: with this hold, which has the model, both would stay.
        here, everywhere = weakref.ref(self), self._kept

        # After accumulation and before clipping, scaling or all-reduce: nobody sees an unmasked gradient.
        def mask_gradient(parameter: Tensor) -> None:
            if (hold := here()) is not None:
                hold._mask_gradient(name, parameter)
            else:  # it went with its optimiser; the weights are still pruned
                _mask_gradient(parameter, everywhere[name].to(parameter.device))

        self._mask_gradient(name, parameter)
        trains = parameter.requires_grad
        handle = parameter.requires_grad_(True).register_post_accumulate_grad_hook(mask_gradient)  # refused on a frozen one
        parameter.requires_grad_(trains)  # which may be thawed later
        return handle

    def _mask_gradient(self, name: str, parameter: Tensor) -> None:
        if parameter.grad is not None:
            _mask_gradient(parameter, self._where(name, parameter))
            self._masked[name] = weakref.ref(parameter.grad)  # an id is soon that of the next gradient

    @torch.no_grad()
    def _mask_assigned(self, *_: Any) -> None:
        """Mask the gradients that no backward pass has left: `parameter.grad = g` calls no hook."""
        for name, parameter in self.parameters.items():
            seen = self._masked.get(name)
            if parameter.grad is not None and (seen is None or seen() is not parameter.grad):
                self._mask_gradient(name, parameter)

    def _ones(self, mask: Mask) -> dict[str, Tensor]:
        """1 where kept: see `_zero`; of a sharded parameter the part of this rank."""
        stored = mask.as_stored(self.model)
        return {name: shard(stored[name].to(torch.int8), parameter) for name, parameter in self.parameters.items()}

    def _where(self, name: str, parameter: Tensor) -> Tensor:
        """What is kept of this rank's part, on its device and in its memory layout (a model may be moved after `hold`)."""
        kept, here = self._kept[name], local(parameter)
        if kept.shape != here.shape:  # converted by to_sparse or to_dense since
            kept = self._kept[name] = self._ones(self.mask)[name]
        dtype = _INTEGERS.get(here.itemsize, torch.int8) if _few(here) else torch.int8
        if (kept.device, kept.dtype, kept.stride()) != (here.device, dtype, here.stride()):
            kept = self._kept[name] = torch.empty_like(here, dtype=dtype).copy_(kept)
        return kept


def hold(mask: Mask, model: nn.Module, optimizer: Optimizer) -> Hold:
    """Keep the pruned weights of `model` at exactly 0 while any loop trains it with `optimizer`.

    At once the weights are masked; from then on each gradient is masked as soon as it is accumulated (so clipping and all-reduce see
    zeros; one that is assigned by hand, as a step begins), and after each step of the optimiser the weights and every slot of their shape
    (momentum, moments ...) are zeroed where masked. No parameter is renamed or replaced. A live weight that reaches 0 stays live.
    A model may come within torch.compile or DistributedDataParallel, or cut by `fully_shard`: hold it after that.
    LBFGS alone stores what it knows in another shape: hold the mask before its first step.

    Args:
        mask: which weights are kept; must fit `model`.
        model: trained in place; may be moved to another device later. The mask has the names of the model inside wrappers.
        optimizer: any `torch.optim.Optimizer` that holds the parameters of `model`, also within Accelerate's wrapper. Where several
            train it, call this for each of them.

    Raises:
        MaskError: when the mask is none or does not fit, or `optimizer` holds a mask already or none of the masked parameters, or has slots
            of dense layers that are sparse now; its `load_state_dict` raises this, too.
        SettingError: when `model` or `optimizer` is none.

    Example:
        >>> import torch, anymask
        >>> model = torch.nn.Linear(2, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> held = anymask.hold(anymask.Mask({"weight": torch.eye(2)}), model, optimizer)
        >>> model(torch.ones(1, 2)).sum().backward(); optimizer.step()
        >>> int((model.weight == 0).sum()), int((model.weight.grad == 0).sum())
        (2, 2)
    """
    mask, optimizer = needs_mask(mask), innermost(optimizer)
    if held(optimizer) is not None:
        raise MaskError(
            f"this {type(optimizer).__name__} holds a mask already",
            allowed="one hold for each optimiser",
            fix="call release() on the first hold",
        )
    here = trained(optimizer)
    if not any(id(parameter) in here for parameter in mask.check(model).values()):
        raise MaskError(
            f"this {type(optimizer).__name__} trains none of the {len(mask)} masked parameters",
            allowed="an optimiser made from the parameters of this very model",
            fix="make it from model.parameters()",
        )
    return Hold(mask, model, optimizer)


def innermost(optimizer: Any) -> Any:
    """The optimiser that makes the steps: Accelerate's and Lightning's wrappers step the one inside, and so call its hooks."""
    while getattr(optimizer, "optimizer", None) is not None:
        optimizer = optimizer.optimizer
    if hasattr(optimizer, "register_step_post_hook"):
        return optimizer
    raise SettingError(
        f"the optimizer came as {type(optimizer).__name__}",
        allowed="a torch.optim.Optimizer, whose hooks are called",
        fix="give the one that trains the model, after the model",
    )


def held(optimizer: Optimizer | None) -> Hold | None:
    """The hold that `optimizer` carries, if any."""
    hooks = () if optimizer is None else innermost(optimizer)._optimizer_step_post_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, Hold)), None)


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


def _few(tensor: Tensor) -> bool:
    """Whether a GPU takes as long to be told of `tensor` as it takes for it: about 2 microseconds."""
    return tensor.is_cuda and tensor.numel() <= 2**20


def _zero(tensor: Tensor, kept: Tensor) -> None:
    """Set `tensor` to 0 where `kept` is 0; where it is 1, every bit stays as it is."""
    # As floats, an overflowed gradient would turn into inf * 0 = NaN; masked_fill_ takes 4 to 15 times as long on a CPU.
    bits = _INTEGERS.get(tensor.itemsize)
    if bits is None or tensor.grad_fn is not None:  # complex128; a gradient that is to be differentiated once more
        tensor.masked_fill_(kept == 0, 0)
    else:
        tensor.view(bits).mul_(kept)


def _mask_gradient(parameter: Tensor, kept: Tensor) -> None:
    gradient = parameter.grad
    if gradient is not None and gradient.is_sparse:
        parameter.grad = _masked_rows(gradient, kept)
    elif gradient is not None:
        _zero(local(gradient) if hasattr(gradient, "to_local") else gradient, kept)


def _masked_rows(gradient: Tensor, kept: Tensor) -> Tensor:
    gradient = gradient.coalesce()  # rows of an embedding with sparse=True, as SparseAdam wants them
    _zero(gradient.values(), kept[gradient.indices()[0]])
    return gradient


def evaluated(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """What `Optimizer.step` was called with, its closure replaced by what it gave; None without one."""
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        return None
    with torch.enable_grad():
        value = closure()
    return args[:1], {**kwargs, "closure": lambda: value}
