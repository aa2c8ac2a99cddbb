r"""Remove nodes that give back what they were given, alone or together with the node before.

    before                                       after

    x                                            x
    |                                            |
    Reshape (to the shape that x has)            |
    |                                            |
    Transpose [1,0]                              |
    |                                            |
    Transpose [1,0]                              |
    |                                            |
    Relu                                         Relu

Why it holds, bit by bit:
- Identity, Dropout when not training, Cast to the same type, sums and the like of one input;
- operators that only move data, where shape inference shows that they move none: Reshape, Flatten,
  Squeeze, Unsqueeze, Expand, Tile, Transpose, Slice, Pad, Split, Concat, Resize, pooling over windows
  of one element. A chain of Reshape, Flatten, Squeeze and Unsqueeze keeps the order of the elements: it
  changes nothing where it ends in the shape it began with;
- x * 1, x / 1, x ** 1, x - 0 where the constant does not widen x. x + 0 is exact for integers; for
  floats only x + -0.0 is, as 0.0 turns -0.0 into 0.0. Behind a product of matrices, a convolution
  or a normalisation it does not matter: the specification leaves open in which order they add, and so
  a zero's sign;
- Where with a condition that is all true or all false, where what it chooses is not widened;
- Neg and Not of themselves; Relu, Abs, Ceil, Floor, Round and Sign of themselves;
- a Cast back from a type that holds every value of the first.

Two that do not cancel become one where that is exact: Transpose of Transpose, a Cast of a lossless
Cast.

Keeps: the names of outputs. A producer takes over the name of the output where its own is free; where
it is not (an input that is an output, one value with two names) the node stays, or an Identity does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper

from optc.passes.contract import Facts, Pass, Report
from optc.passes.determinism import is_training
from optc.passes.graph import Array, producer, redirect
from optc.passes.match import argument, made_by
from optc.passes.movement import RESHAPING, composed, inverse, perm_of

SMALL_BYTES = 64 * 1024
"""Constants beyond this are not looked into."""

IDEMPOTENT = frozenset({"Abs", "Ceil", "Floor", "Relu", "Round", "Sign"})
SUMS = (
    "BatchNormalization",
    "Conv",
    "ConvTranspose",
    "Gemm",
    "InstanceNormalization",
    "LayerNormalization",
    "MatMul",
)
"""Operators that add products in an order that is theirs to choose."""

FURTHEST = 4
"""Nodes that move data between such a sum and what is added to it, at most."""

INVOLUTIONS = frozenset({"BitwiseNot", "Neg", "Not"})

LOSSLESS = {
    "bool": "int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 bfloat16 float32 float64",
    "int8": "int16 int32 int64 float16 bfloat16 float32 float64",
    "uint8": "int16 int32 int64 uint16 uint32 uint64 float16 bfloat16 float32 float64",
    "int16": "int32 int64 float32 float64",
    "uint16": "int32 int64 uint32 uint64 float32 float64",
    "int32": "int64 float64",
    "uint32": "int64 uint64 float64",
    "float16": "float32 float64",
    "bfloat16": "float32 float64",
    "float32": "float64",
}
"""Type -> the types that hold every one of its values."""


class RemoveIdentities(Pass):
    """Remove nodes that give back what they were given, and inverse pairs."""

    name = "remove-identities"
    group = "clean"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Remove what changes nothing in ``graph``."""
        report = Report()
        _ = facts.shapes  # inferred before anything changes
        here = {id(node) for node in graph.nodes}
        for node in graph.nodes:
            if node.domain or not node.inputs or not node.outputs:
                continue
            if (inner := _shortened(node, facts)) is not None:
                report.merged[node.name] = (inner.name, node.name)
            source = _source(node, facts)
            if source is None:
                continue
            if reason := _why_not(node, source, facts, here):
                report.skipped[node.name] = reason
                continue
            _replace(node, source, facts)
            report.removed[node.name] = "it changes nothing"
        if report.removed:
            graph.nodes = [node for node in graph.nodes if node.name not in report.removed]
        return report


def _why_not(node: gs.Node, source: gs.Tensor, facts: Facts, here: set[int]) -> str | None:
    """Return why readers cannot read ``source`` in place of what ``node`` makes, or None."""
    output = node.outputs[0]
    if any(t.outputs or facts.is_kept(t) for t in node.outputs[1:] if t.name):
        return "its other outputs are read"
    if not facts.is_kept(output):
        return None
    maker = producer(source)
    if maker is None or id(maker) not in here:
        return f"the output `{output.name}` is a value from outside"
    if facts.is_kept(source):
        return f"the output `{output.name}` is also called `{source.name}`"
    return None


def _replace(node: gs.Node, source: gs.Tensor, facts: Facts) -> None:
    """Let readers of what ``node`` makes read ``source``; an output keeps its name."""
    output = node.outputs[0]
    maker = producer(source)
    node.inputs.clear()
    node.outputs.clear()
    if not facts.is_kept(output):
        redirect(output, source)
        return
    assert maker is not None, "_why_not() lets no other source through"
    maker.outputs[maker.outputs.index(source)] = output
    redirect(source, output)


def _source(node: gs.Node, facts: Facts) -> gs.Tensor | None:
    """Return the tensor that the first output of ``node`` always equals, or None."""
    rule = RULES.get(node.op)
    return None if rule is None else rule(node, facts)


# --- what a rule asks ----------------------------------------------------------------------------


def _value(node: gs.Node, index: int, facts: Facts) -> Array | None:
    """Return the value of an input that is small and the same in every run, else None."""
    tensor = argument(node, index)
    if isinstance(tensor, gs.Constant) and tensor._values.nbytes > SMALL_BYTES:
        return None
    return facts.constant(tensor)


def _same_shape(one: gs.Tensor, other: gs.Tensor, facts: Facts) -> bool:
    dims = facts.shapes.dims(one.name)
    return dims is not None and dims == facts.shapes.dims(other.name)


def _is_all(value: Array | None, number: float) -> bool:
    return value is not None and value.size > 0 and bool(np.all(value == number))


def _same_op_before(node: gs.Node) -> gs.Node | None:
    """Return the node before, where it has the same operator."""
    before = producer(node.inputs[0])
    if before is None or before.op != node.op or before.domain:
        return None
    return before


# --- the rules, by operator ----------------------------------------------------------------------

Rule = Callable[[gs.Node, Facts], gs.Tensor | None]


def _always(node: gs.Node, facts: Facts) -> gs.Tensor | None:
    return node.inputs[0]


def _of_one(node: gs.Node, facts: Facts) -> gs.Tensor | None:
    return node.inputs[0] if len(node.inputs) == 1 else None


def _dropout(node: gs.Node, facts: Facts) -> gs.Tensor | None:
    return None if is_training(node) else node.inputs[0]


def _clip(node: gs.Node, facts: Facts) -> gs.Tensor | None:
    if facts.opset < 11:  # its bounds are the largest finite numbers where they are not given
        return None
    has_bounds = argument(node, 1) or argument(node, 2)
    return None if has_bounds else node.inputs[0]


def _cast(node: gs.Node, facts: Facts) -> gs.Tensor | None:
    goal = _cast_goal(node, facts)
    if goal is None:
        return None
    if facts.dtype(node.inputs[0]) == goal:
        return node.inputs[0]
    before = producer(node.inputs[0])
    if before is None or before.op not in ("Cast", "CastLike") or before.domain:
        return None
    first = facts.dtype(before.inputs[0])
    if first == goal and _is_lossless(first, facts.dtype(node.inputs[0])):
        return before.inputs[0]
    return None


def _cast_goal(node: gs.Node, facts: Facts) -> np.dtype[Any] | None:
    if node.op == "CastLike":
        return facts.dtype(node.inputs[1])
    return np.dtype(helper.tensor_dtype_to_np_dtype(node.attrs["to"]))


def _is_lossless(narrow: np.dtype[Any] | None, wide: np.dtype[Any] | None) -> bool:
    return (
        narrow is not None
        and wide is not None
        and wide.name in LOSSLESS.get(narrow.name, "").split()
    )


def _is_castable(narrow: np.dtype[Any] | None, goal: np.dtype[Any] | None) -> bool:
    """Whether runtimes cast directly, and to the same values.

    Strings depend on the type they are made from. TensorRT takes 8-bit integers to floats only.
    """
    return (
        narrow is not None
        and goal is not None
        and narrow.itemsize * (narrow.kind != "b") != 1
        and goal.isbuiltin == 1
        and goal != object
    )


def _reshape(node: gs.Node, facts: Facts) -> gs.Tensor | None:
    """Return the last tensor of a chain of reshapes that has the shape of its end."""
    for tensor in _reshaped_from(node):
        if _same_shape(tensor, node.outputs[0], facts):
            return tensor
    return None


def _reshaped_from(node: gs.Node | None) -> Iterator[gs.Tensor]:
    while node is not None and node.op in RESHAPING and not node.domain:
        yield node.inputs[0]
        node = producer(node.inputs[0])


def _widening(node: gs.Node, facts: Facts) -> gs.Tensor | None:
    return node.inputs[0] if _same_shape(node.inputs[0], node.outputs[0], facts) else None


def _transpose(node: gs.Node, facts: Facts) -> gs.Tensor | None:
    perm = perm_of(node, facts.shapes)
    if perm is None:
        return None
    if perm == list(range(len(perm))):
        return node.inputs[0]
    before = _same_op_before(node)
    first = perm_of(before, facts.shapes) if before is not None else None
    if before is not None and first is not None and tuple(perm) == inverse(first):
        return before.inputs[0]
    return None


def _slice(node: gs.Node, facts: Facts) -> gs.Tensor | None:
    """A slice of full extent is all there is, unless it runs backwards."""
    if argument(node, 4) is not None:
        steps = _value(node, 4, facts)
        if steps is None or not np.all(steps > 0):
            return None
    return _widening(node, facts)


def _pad(node: gs.Node, facts: Facts) -> gs.Tensor | None:
    pads = np.asarray(node.attrs["pads"]) if "pads" in node.attrs else _value(node, 1, facts)
    return node.inputs[0] if pads is not None and not np.any(pads) else None


def _concat(node: gs.Node, facts: Facts) -> gs.Tensor | None:
    """A Concat gives back the one input that is not empty."""
    if len(node.inputs) == 1:
        return node.inputs[0]
    filled = []
    for tensor in node.inputs:
        dims = facts.shapes.dims(tensor.name)
        if dims is None:
            return None
        if not dims or dims[node.attrs["axis"]] != 0:
            filled.append(tensor)
    return filled[0] if len(filled) == 1 else None


def _split(node: gs.Node, facts: Facts) -> gs.Tensor | None:
    return node.inputs[0] if len(node.outputs) == 1 else None


def _resize(node: gs.Node, facts: Facts) -> gs.Tensor | None:
    if node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        return None
    if argument(node, 3) is not None:
        # With a policy, the scale may differ from 1 though the sizes come out the same.
        stretches = node.attrs.get("keep_aspect_ratio_policy", "stretch") == "stretch"
        return _widening(node, facts) if stretches else None
    if "scales" in node.attrs:  # Upsample of version 7
        scales: Array | None = np.asarray(node.attrs["scales"])
    else:  # Resize has a region of interest before them since version 11
        scales = _value(node, 2 if len(node.inputs) > 2 else 1, facts)
    return node.inputs[0] if _is_all(scales, 1) else None


def _pool(node: gs.Node, facts: Facts) -> gs.Tensor | None:
    """Pooling over windows of one element, at each of them."""
    ones = [*node.attrs["kernel_shape"], *node.attrs.get("strides", ())]
    if set(ones) != {1} or any(node.attrs.get("pads", ())):
        return None
    return node.inputs[0]


def _neutral(number: float) -> Rule:
    """Return the rule of an operator that changes nothing where its second input is ``number``."""

    def rule(node: gs.Node, facts: Facts) -> gs.Tensor | None:
        if _is_all(_value(node, 1, facts), number):
            return _widening(node, facts)
        return None

    return rule


def _mul(node: gs.Node, facts: Facts) -> gs.Tensor | None:
    for index in (0, 1):
        if _is_all(_value(node, index, facts), 1):
            other = node.inputs[1 - index]
            return other if _same_shape(other, node.outputs[0], facts) else None
    return None


def _add(node: gs.Node, facts: Facts) -> gs.Tensor | None:
    for index in (0, 1):
        value, other = _value(node, index, facts), node.inputs[1 - index]
        if _is_all(value, 0) and (_keeps_zeros(value, of_sum=True) or _is_sum(other)):
            return other if _same_shape(other, node.outputs[0], facts) else None
    return None


def _is_sum(tensor: gs.Tensor) -> bool:
    """Whether the sign of a zero in ``tensor`` is nobody's to say."""
    for _ in range(FURTHEST):
        moved = made_by(tensor, *RESHAPING, "Transpose")
        if moved is None:
            break
        tensor = moved.inputs[0]
    return made_by(tensor, *SUMS) is not None


def _sub(node: gs.Node, facts: Facts) -> gs.Tensor | None:
    value = _value(node, 1, facts)
    if _is_all(value, 0) and _keeps_zeros(value, of_sum=False):
        return _widening(node, facts)
    return None


def _keeps_zeros(zeros: Array | None, *, of_sum: bool) -> bool:
    """Whether adding (or subtracting) zeros of this sign leaves -0.0 as it is."""
    if zeros is None:
        return False
    if zeros.dtype.kind in "iu":
        return True
    return bool(np.all(np.signbit(zeros.astype(np.float64)) == of_sum))


def _where(node: gs.Node, facts: Facts) -> gs.Tensor | None:
    """A choice that is always the same one."""
    condition = _value(node, 0, facts)
    for index, choice in ((1, True), (2, False)):
        if _is_all(condition, choice) and _same_shape(node.inputs[index], node.outputs[0], facts):
            return node.inputs[index]
    return None


def _idempotent(node: gs.Node, facts: Facts) -> gs.Tensor | None:
    return None if _same_op_before(node) is None else node.inputs[0]


def _involution(node: gs.Node, facts: Facts) -> gs.Tensor | None:
    before = _same_op_before(node)
    return None if before is None else before.inputs[0]


RULES: dict[str, Rule] = {
    "Add": _add,
    "AveragePool": _pool,
    "Cast": _cast,
    "CastLike": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Div": _neutral(1),
    "Dropout": _dropout,
    "Expand": _widening,
    "Identity": _always,
    "Max": _of_one,
    "MaxPool": _pool,
    "Mean": _of_one,
    "Min": _of_one,
    "Mul": _mul,
    "Pad": _pad,
    "Pow": _neutral(1),
    "Resize": _resize,
    "Slice": _slice,
    "Split": _split,
    "Sub": _sub,
    "Sum": _of_one,
    "Tile": _widening,
    "Transpose": _transpose,
    "Upsample": _resize,
    "Where": _where,
    **dict.fromkeys(RESHAPING, _reshape),
    **dict.fromkeys(IDEMPOTENT, _idempotent),
    **dict.fromkeys(INVOLUTIONS, _involution),
}


# --- two become one ------------------------------------------------------------------------------


def _shortened(node: gs.Node, facts: Facts) -> gs.Node | None:
    """Let ``node`` do what the node before it does too; return that one, or None."""
    before = producer(node.inputs[0])
    if before is None or before.domain or facts.is_shared(node.inputs[0]):
        return None
    match before.op, node.op:
        case "Transpose", "Transpose":
            first, second = perm_of(before, facts.shapes), perm_of(node, facts.shapes)
            if first is None or second is None:
                return None
            node.attrs["perm"] = list(composed(first, second))
        case "Cast", "Cast":
            narrow, wide = facts.dtype(before.inputs[0]), facts.dtype(node.inputs[0])
            if not _is_lossless(narrow, wide) or not _is_castable(narrow, _cast_goal(node, facts)):
                return None
        case _:
            return None
    node.inputs[0] = before.inputs[0]
    return before
