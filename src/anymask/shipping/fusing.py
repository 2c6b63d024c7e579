"""Fewer steps that compute the same: batch norms into the layers before them; sums and ReLUs done by the layers themselves."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from anymask.shipping.ops import Activation, Add, Clamp, Layer, Scale, Shape, Step
from anymask.shipping.plan import Arrays, Plan, rows_of


class Node(NamedTuple):
    """A step with its arrays."""

    step: Step
    arrays: Arrays


def fused(plan: Plan) -> Plan:
    """`plan` with every Scale, Add and ReLU in the layer before it, where nobody else takes what that gives.

    Example:
        >>> from anymask.shipping.ops import Linear
        >>> arrays = {"positions": np.array([0]), "values": np.ones(1, np.float32)}
        >>> linear, relu = Step(Linear(1, 1, kept=1), (0,)), Step(Activation("relu"), (1,))
        >>> [step.op.relu for step in fused(Plan((1,), (linear, relu), (arrays, {}))).steps]
        [True]
    """
    plan = _clamps_parted(plan)
    for way in (_scale, _add, _relu):
        plan = _everywhere(plan, way)
    return plan


def _clamps_parted(plan: Plan) -> Plan:
    """Each ReLU6 as a ReLU, which the layer before can do, and what is left of it."""
    numbers, nodes = {0: 0}, list[Node]()
    for number, (step, arrays) in enumerate(zip(plan.steps, plan.arrays, strict=True), 1):
        inputs, op = tuple(numbers[value] for value in step.inputs), step.op
        if isinstance(op, Clamp) and op.low == 0.0 and op.high is not None and op.high > 0:
            nodes.append(Node(Step(Activation("relu"), inputs), {}))
            inputs, op = (len(nodes),), Clamp(None, op.high)
        nodes.append(Node(Step(op, inputs), arrays))
        numbers[number] = len(nodes)
    return replace(plan, steps=tuple(node.step for node in nodes), arrays=tuple(node.arrays for node in nodes))


Way = Callable[[Node, Callable[[int], Node | None], list[Shape]], tuple[int, Node] | None]
"""(taker, layer of a value, shapes) -> the value that is taken up, and what makes the taker's now."""


def _everywhere(plan: Plan, way: Way) -> Plan:
    nodes: dict[int, Node] = dict(enumerate(map(Node, plan.steps, plan.arrays), 1))
    uses = Counter(value for step in plan.steps for value in step.inputs)
    uses[len(plan.steps)] += 1
    shapes = plan.shapes()

    def layer(value: int) -> Node | None:
        """The layer that makes `value` for one taker alone and does nothing after its sum, if it is one."""
        node = nodes.get(value)
        if node is None or not isinstance(node.step.op, Layer) or uses[value] != 1 or node.step.op.relu:
            return None
        return node

    for number in list(nodes):
        if made := way(nodes[number], layer, shapes):
            del nodes[made[0]]  # the taker's place comes after all that the layer takes
            nodes[number] = made[1]
    numbers = {0: 0} | {value: place for place, value in enumerate(nodes, 1)}
    steps = tuple(Step(node.step.op, tuple(numbers[value] for value in node.step.inputs)) for node in nodes.values())
    return replace(plan, steps=steps, arrays=tuple(node.arrays for node in nodes.values()))


def _scale(taker: Node, layer: Callable[[int], Node | None], shapes: list[Shape]) -> tuple[int, Node] | None:
    node = layer(taker.step.inputs[0])
    if not isinstance(taker.step.op, Scale) or node is None or not isinstance(op := node.step.op, Layer) or op.add:
        return None
    scale, old = taker.arrays["scale"].astype(np.float64), node.arrays
    values = (old["values"] * scale[rows_of(op, old["positions"])]).astype(np.float32)
    bias = (old.get("bias", 0.0) * scale + taker.arrays["shift"]).astype(np.float32)
    left = values != 0  # a channel that its norm multiplies by 0 needs no weights
    arrays = {"positions": old["positions"][left], "values": values[left], "bias": bias}
    return taker.step.inputs[0], Node(Step(replace(op, kept=int(left.sum()), bias=True), node.step.inputs), arrays)


def _add(taker: Node, layer: Callable[[int], Node | None], shapes: list[Shape]) -> tuple[int, Node] | None:
    if type(taker.step.op) is not Add or len({shapes[value] for value in taker.step.inputs}) != 1:
        return None
    for value, other in (sorted(taker.step.inputs, reverse=True), sorted(taker.step.inputs)):  # the later one first
        node = layer(value)
        if node is not None and isinstance(op := node.step.op, Layer) and not op.add:
            return value, Node(Step(replace(op, add=True), (*node.step.inputs, other)), node.arrays)
    return None


def _relu(taker: Node, layer: Callable[[int], Node | None], shapes: list[Shape]) -> tuple[int, Node] | None:
    node = layer(taker.step.inputs[0]) if taker.step.op in (Activation("relu"), Clamp(0.0, None)) else None
    if node is None or not isinstance(op := node.step.op, Layer):
        return None
    return taker.step.inputs[0], Node(Step(replace(op, relu=True), node.step.inputs), node.arrays)
