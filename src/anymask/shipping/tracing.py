"""From a PyTorch model to the steps that are shipped: exported by torch.export, then one operation after the other."""

import io
import logging
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, fx, nn

from anymask.errors import SettingError
from anymask.shipping.aten import HANDLERS, RESHAPES
from anymask.shipping.calls import Given, Trace, Value, refused
from anymask.shipping.ops import Reshape, Wrong
from anymask.shipping.plan import Plan
from anymask.sparse import to_dense
from anymask.surgery import copied

# What is silenced is of the process, not of a thread: two exports at once would each put back what the other has set.
_ALONE = threading.Lock()
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def plain(model: nn.Module) -> nn.Module:
    """A copy of `model` on the CPU in float32 and eval mode, dense where it was sparse; the model itself stays as it is.

    Raises:
        SettingError: when it cannot be copied.
    """
    try:
        twin = copied(model)
    except Exception as error:  # whatever its attributes raise: locks, generators, open files
        raise SettingError(
            f"{type(model).__name__} cannot be copied ({reason(error)})",
            allowed="a model that copy.deepcopy copies",
            fix="take out of it what the reason names",
        ) from error
    return to_dense(twin.to("cpu", torch.float32)).eval()


def traced(model: nn.Module, example: Tensor) -> Plan:
    """The steps of `model`, each of its operations as it is there: nothing is folded or fused.

    Args:
        model: a module of one tensor (N, C, H, W) or (N, D) to one tensor, as `plain` gives it.
        example: a batch for it.

    Raises:
        SettingError: when it takes integers, when torch.export cannot follow it, when it writes into a buffer or its input, or naming the
            operation that cannot be shipped, and the module it is in.
    """
    if not example.is_floating_point():
        raise SettingError(
            f"{type(model).__name__} takes integers ({example.dtype})",
            allowed="floating-point inputs in .anymask",
            fix="ship to .onnx or .safetensors, dense",
        )
    program = exported(model, example)
    written = [*program.graph_signature.buffers_to_mutate.values(), *program.graph_signature.user_inputs_to_mutate.values()]
    if written:
        raise SettingError(
            f"{type(model).__name__} writes into {', '.join(written)} in its forward",
            allowed="a forward that leaves its buffers and its input as they are",
            fix="take that out of what you ship, or ship its weights alone, to .safetensors",
        )
    graph = program.graph_module.graph
    graph.eliminate_dead_code()
    trace, constants = Trace(type(model).__name__, tuple(example.shape[1:])), _constants(program)
    found: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            found[node] = constants.get(node.name, Value(0))
        elif node.op == "call_function":
            found[node] = _called(node, trace, found)
    return _finished(next(node for node in graph.nodes if node.op == "output"), trace, found)


def exported(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """The graph of `model` for batches of any size, without operations that write into their inputs.

    Raises:
        SettingError: when torch.export cannot follow it.
    """
    several = example if len(example) > 1 else torch.cat([example, example])  # a size of 1 would be taken as fixed
    with exporting(model):
        program = torch.export.export(model, (several,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    check_batches(model, program)
    with exporting(model):
        return program.run_decompositions({}) if any(map(_writes, program.graph.nodes)) else program


def check_batches(model: nn.Module, program: torch.export.ExportedProgram) -> None:
    """Refuse a graph that is of some sizes of batches alone, since the model does something else for others.

    Raises:
        SettingError: when there are such.
    """
    if any(sizes.lower > 2 or sizes.upper < 2**31 for sizes in program.range_constraints.values()):
        raise SettingError(
            f"{type(model).__name__} does other things for batches of other sizes than the example's",
            allowed="a model that does the same for batches of any size",
            fix="take out of its forward what asks for the number of samples, or ship its weights alone, to .safetensors",
        )


@contextmanager
def exporting(model: nn.Module) -> Iterator[None]:
    """Whatever an exporter raises inside the block becomes one error of ours, and what it logs, prints and warns of is silent."""
    try:
        with _ALONE, _unlogged(), torch.no_grad(), warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")  # of what the exporter itself uses
            yield
    except Exception as error:  # the compiler's errors are of many kinds
        raise SettingError(
            f"{type(model).__name__} cannot be exported ({reason(error)})",
            allowed="a model of one tensor that torch.export follows, for batches of any size",
            fix="take out of its forward what the reason names, or ship its weights alone, to .safetensors",
        ) from error


@contextmanager
def _unlogged() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable()  # torch's own loggers print whole tracebacks
    try:
        yield
    finally:
        logging.disable(before)


def reason(error: BaseException) -> str:
    """What the innermost cause says first; torch's exporters wrap it in reports of their steps."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in _COLOUR.sub("", str(error)).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(" ".join(lines[: 1 + lines[0].endswith(":")]).split())[:300].rstrip(".")


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _constants(program: torch.export.ExportedProgram) -> dict[str, Tensor]:
    """The parameters, buffers and constants of the graph, by the names of its placeholders."""
    signature = program.graph_signature
    held: Mapping[str, Any] = {**program.constants, **program.state_dict}
    named = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    return {name: held[of].detach() for name, of in named.items()}


def _called(node: fx.Node, trace: Trace, found: Mapping[fx.Node, Any]) -> Any:
    """What a call gives: a value, several of them, a constant if all that it takes are constants; None for sizes."""
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):  # a part of the graph under a mode, or run again and again
        raise refused(trace.model, target.name(), node)
    if not isinstance(target, torch._ops.OpOverload):  # an element of several, or arithmetic on the batch's size
        several = found.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        return several[node.args[1]] if isinstance(several, (list, tuple)) else None  # type: ignore[index]
    name = target._schema.name.removeprefix("aten::")
    if name.startswith(("sym_", "_assert")):
        return None
    arguments = target._schema.arguments
    held = {a.name: a.default_value for a in arguments if a.has_default_value()}
    held |= dict(zip((a.name for a in arguments), node.args, strict=False)) | dict(node.kwargs)
    held = {key: _held(value, found) for key, value in held.items()}
    try:
        if not any(isinstance(found[taken], Value) for taken in node.all_input_nodes):
            return _computed(node, found)
        if name not in HANDLERS:
            raise Wrong("")
        if name not in RESHAPES and any(found[taken] is None for taken in node.all_input_nodes):
            raise Wrong("it depends on the size of the batch")
        made = HANDLERS[name](trace, Given(held, node))
        _check(made, node, trace)
    except Wrong as error:
        raise refused(trace.model, name, node, why=str(error)) from None
    return made


def _held(argument: Any, found: Mapping[fx.Node, Any]) -> Any:
    """An argument, with what nodes stand for in their place."""
    if isinstance(argument, (list, tuple)):
        return [_held(part, found) for part in argument]
    return found[argument] if isinstance(argument, fx.Node) else argument


def _computed(node: fx.Node, found: Mapping[fx.Node, Any]) -> Any:
    """A constant made of constants, as a weight under a mask of torch.nn.utils.prune is."""
    if torch.Tag.nondeterministic_seeded in node.target.tags:  # type: ignore[union-attr]
        raise Wrong("it draws random numbers, which a file would freeze")
    args, kwargs = _held(node.args, found), {key: _held(value, found) for key, value in node.kwargs.items()}
    try:
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]
    except (TypeError, RuntimeError) as error:
        raise Wrong(f"not known before there is a batch: {' '.join(str(error).split())[:100]}") from None


def _check(made: Any, node: fx.Node, trace: Trace) -> None:
    """What was made has the shape that the exporter says, and the batch comes first in it."""
    pairs = zip(made, node.meta["val"], strict=True) if isinstance(made, list) else [(made, node.meta["val"])]
    for value, seen in pairs:
        if isinstance(value, Value) and (trace.shape(value) != tuple(seen.shape[1:]) or isinstance(seen.shape[0], int)):
            raise Wrong(f"a tensor of shape {tuple(seen.shape)}, of which the batch is not the first dimension")
        if isinstance(value, Value) and not seen.dtype.is_floating_point:
            raise Wrong(f"numbers of {seen.dtype}")


def _finished(node: fx.Node, trace: Trace, found: Mapping[fx.Node, Any]) -> Plan:
    outputs = [found[taken] for taken in node.all_input_nodes]
    if len(outputs) != 1 or not isinstance(outputs[0], Value):
        came = "an output that does not depend on its input" if len(outputs) == 1 else f"{len(outputs)} tensors"
        raise SettingError(f"{trace.model} gives {came}", allowed="one output, made from the input", fix="ship a module that returns one")
    if outputs[0].number != len(trace.steps):  # the last step makes the output, so one has to end with it
        trace.add(Reshape(trace.shape(outputs[0])), outputs[0])
    return Plan(trace.shapes[0], tuple(trace.steps), tuple(trace.arrays))
