"""Which operators take a tensor in any order of its axes, and what they must be told of the order.

A layout is turned by a permutation, as Transpose has it: axis ``i`` of the turned tensor is axis
``perm[i]`` of the one before. An operator that is listed here gives the turned result of what it
gave, if it reads what it read turned, and if its axes are renamed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts
from optc.passes.match import argument
from optc.passes.movement import axes_of, integers, sizes

LARGE_BYTES = 1024 * 1024
"""Constants beyond this are not turned: they may be shared, and would be there twice."""


SPREADS_BY_ITSELF = 7
"""The first opset in which inputs are spread as numpy does it."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a node has the layout that may be turned.

    Attributes:
        rank: Of the tensors that have it.
        inputs: Positions of the inputs.
        outputs: Positions of the outputs.
        gone: Axes that the output lacks, if it has another rank and so no such layout.
        axes: Axes that the node is told of, in the order that it is told.
    """

    rank: int
    inputs: tuple[int, ...] = (0,)
    outputs: tuple[int, ...] = (0,)
    gone: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()

    def allows(self, perm: Sequence[int]) -> bool:
        """Whether an output that lacks axes stays as it is when the inputs are turned."""
        left = [axis for axis in perm if axis not in self.gone]
        return not self.gone or left == sorted(left)


def layout_of(node: gs.Node, facts: Facts) -> Layout | None:
    """Return the layout of ``node``; None if it has none, or one that may not be turned."""
    rule = None if node.domain or not node.inputs else RULES.get(node.op)
    dims = (
        None
        if rule is None
        else facts.dims(node.outputs[0] if rule[0] is _spread else node.inputs[0])
    )
    if rule is None or not dims:
        return None
    layout = rule[0](node, len(dims), facts)
    if layout is None:
        return None
    # What is laid out and, say, a list of indices at once cannot be turned.
    told = {id(t) for index, t in enumerate(node.inputs) if index not in layout.inputs}
    return None if any(id(node.inputs[i]) in told for i in layout.inputs) else layout


def turn(node: gs.Node, layout: Layout, perm: Sequence[int], facts: Facts) -> None:
    """Tell ``node`` of the new order of axes. What it reads and makes is the caller's to turn."""
    RULES[node.op][1](node, layout, perm, facts)
    for index in layout.inputs:
        if isinstance(node.inputs[index], gs.Constant):
            node.inputs[index] = _turned_constant(node.inputs[index], perm, facts)


def is_free(tensor: gs.Tensor, facts: Facts) -> bool:
    """Whether ``tensor`` is the same in every layout, as all its extents are 1."""
    dims = facts.dims(tensor)
    return dims is not None and all(extent == 1 for extent in dims)


def _turned_constant(tensor: gs.Constant, perm: Sequence[int], facts: Facts) -> gs.Constant:
    if math.prod(tensor.shape) == 1:
        return tensor
    value = np.asarray(tensor.values)
    full = value.reshape((1,) * (len(perm) - value.ndim) + value.shape)
    turned = np.ascontiguousarray(full.transpose(perm))
    return gs.Constant(facts.fresh_name(f"{tensor.name}_turned"), turned)


# --- where the layout is -------------------------------------------------------------------------


def _alike(node: gs.Node, rank: int, facts: Facts) -> Layout:
    """Element by element."""
    return Layout(rank)


def _spread(node: gs.Node, rank: int, facts: Facts) -> Layout | None:
    """Inputs are spread to one shape: each is laid out, or is too small to have a layout."""
    if facts.opset < SPREADS_BY_ITSELF:
        return None
    laid_out = []
    for index, tensor in enumerate(node.inputs):
        dims = facts.dims(tensor)
        if dims is None or (
            isinstance(tensor, gs.Constant) and tensor._values.nbytes > LARGE_BYTES
        ):
            return None
        if all(extent == 1 for extent in dims):
            continue
        if len(dims) != rank and not isinstance(tensor, gs.Constant):
            return None
        laid_out.append(index)
    return Layout(rank, tuple(laid_out))


def _along(default: int, *, since: int = 1, outputs: bool = False) -> Where:
    """Return the rule of an operator that works along one axis and keeps all."""

    def where(node: gs.Node, rank: int, facts: Facts) -> Layout | None:
        if facts.opset < since:
            return None
        made = tuple(range(len(node.outputs))) if outputs else (0,)
        return Layout(rank, outputs=made, axes=(int(node.attrs.get("axis", default)) % rank,))

    return where


def _joined(node: gs.Node, rank: int, facts: Facts) -> Layout | None:
    if any(
        isinstance(tensor, gs.Constant) and tensor._values.nbytes > LARGE_BYTES
        for tensor in node.inputs
    ):
        return None
    return Layout(rank, tuple(range(len(node.inputs))), axes=(node.attrs.get("axis", 1) % rank,))


def _reduced(node: gs.Node, rank: int, facts: Facts) -> Layout | None:
    axes = axes_of(node, facts)
    if not axes:  # not known, or all, or none
        return None
    named = tuple(axis % rank for axis in axes)
    if node.attrs.get("keepdims", 1):
        return Layout(rank, axes=named)
    return Layout(rank, outputs=(), gone=named, axes=named)


def _found(node: gs.Node, rank: int, facts: Facts) -> Layout | None:
    """The place of an extreme along an axis."""
    axis = (int(node.attrs.get("axis", 0)) % rank,)
    if node.attrs.get("keepdims", 1):
        return Layout(rank, axes=axis)
    return Layout(rank, outputs=(), gone=axis, axes=axis)


def _squeezed(node: gs.Node, rank: int, facts: Facts) -> Layout | None:
    axes = axes_of(node, facts)
    if axes is None:
        return None
    named = tuple(axis % rank for axis in axes)
    return Layout(rank, outputs=(), gone=named, axes=named)


def _gathered(node: gs.Node, rank: int, facts: Facts) -> Layout | None:
    dims = facts.dims(node.inputs[1])
    axis = (int(node.attrs.get("axis", 0)) % rank,)
    if dims is None or len(dims) > 1:
        return None
    return Layout(rank, axes=axis) if dims else Layout(rank, outputs=(), gone=axis, axes=axis)


def _sliced(node: gs.Node, rank: int, facts: Facts) -> Layout | None:
    axes = node.attrs.get("axes", integers(argument(node, 3)))
    if axes is None:
        starts = node.attrs.get("starts", integers(argument(node, 1)))
        if starts is None or argument(node, 3) is not None:
            return None
        axes = range(len(starts))
    return Layout(rank, axes=tuple(axis % rank for axis in axes))


def _padded(node: gs.Node, rank: int, facts: Facts) -> Layout | None:
    pads = node.attrs.get("pads", integers(argument(node, 1)))
    if pads is None or len(pads) != 2 * rank or argument(node, 3) is not None:
        return None
    return Layout(rank)


def _repeated(node: gs.Node, rank: int, facts: Facts) -> Layout | None:
    counts = integers(argument(node, 1))
    return Layout(rank) if counts is not None and len(counts) == rank else None


def _quantised(node: gs.Node, rank: int, facts: Facts) -> Layout | None:
    dims = facts.dims(node.inputs[1])
    if dims is None or len(dims) > 1 or node.attrs.get("block_size", 0):
        return None
    if all(extent == 1 for extent in dims):
        return Layout(rank)
    return (
        Layout(rank, axes=(int(node.attrs.get("axis", 1)) % rank,)) if facts.opset >= 13 else None
    )


# --- what is told --------------------------------------------------------------------------------


def _tell_nothing(node: gs.Node, layout: Layout, perm: Sequence[int], facts: Facts) -> None:
    """There is nothing to tell."""


def _tell_axis(node: gs.Node, layout: Layout, perm: Sequence[int], facts: Facts) -> None:
    for axis in layout.axes:
        node.attrs["axis"] = perm.index(axis)


def _tell_axes(node: gs.Node, layout: Layout, perm: Sequence[int], facts: Facts) -> None:
    axes = [perm.index(axis) for axis in layout.axes]
    if "axes" in node.attrs:
        node.attrs["axes"] = axes
    else:
        node.inputs[1] = sizes(facts, f"{node.name}_axes", axes)


def _tell_slice(node: gs.Node, layout: Layout, perm: Sequence[int], facts: Facts) -> None:
    axes = [perm.index(axis) for axis in layout.axes]
    if "starts" in node.attrs:
        node.attrs["axes"] = axes
        return
    dtype = facts.dtype(node.inputs[1]) or np.int64
    told = gs.Constant(facts.fresh_name(f"{node.name}_axes"), np.array(axes, dtype))
    if len(node.inputs) > 3:
        node.inputs[3] = told
    else:
        node.inputs.append(told)


def _tell_pads(node: gs.Node, layout: Layout, perm: Sequence[int], facts: Facts) -> None:
    pads = node.attrs.get("pads", integers(argument(node, 1)))
    turned = [pads[axis + side * layout.rank] for side in (0, 1) for axis in perm]
    if "pads" in node.attrs:
        node.attrs["pads"] = turned
    else:
        node.inputs[1] = sizes(facts, f"{node.name}_pads", turned)


def _tell_counts(node: gs.Node, layout: Layout, perm: Sequence[int], facts: Facts) -> None:
    counts = integers(argument(node, 1)) or []
    node.inputs[1] = sizes(facts, f"{node.name}_counts", [counts[axis] for axis in perm])


Where = Callable[[gs.Node, int, Facts], Layout | None]
Tell = Callable[[gs.Node, Layout, Sequence[int], Facts], None]

ELEMENTWISE = [
    "Abs",
    "Acos",
    "Acosh",
    "Asin",
    "Asinh",
    "Atan",
    "Atanh",
    "BitwiseNot",
    "Cast",
    "Ceil",
    "Celu",
    "Clip",
    "Cos",
    "Cosh",
    "Elu",
    "Erf",
    "Exp",
    "Floor",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "IsInf",
    "IsNaN",
    "LeakyRelu",
    "Log",
    "Mish",
    "Neg",
    "Not",
    "Reciprocal",
    "Relu",
    "Round",
    "Selu",
    "Shrink",
    "Sigmoid",
    "Sign",
    "Sin",
    "Sinh",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Swish",
    "Tan",
    "Tanh",
    "ThresholdedRelu",
]
SPREADING = [
    "Add",
    "And",
    "BitwiseAnd",
    "BitwiseOr",
    "BitwiseXor",
    "Div",
    "Equal",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "Max",
    "Mean",
    "Min",
    "Mod",
    "Mul",
    "Or",
    "PRelu",
    "Pow",
    "Sub",
    "Sum",
    "Where",
    "Xor",
]
REDUCING = [
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
]

RULES: dict[str, tuple[Where, Tell]] = {
    **dict.fromkeys(ELEMENTWISE, (_alike, _tell_nothing)),
    **dict.fromkeys(SPREADING, (_spread, _tell_nothing)),
    **dict.fromkeys(REDUCING, (_reduced, _tell_axes)),
    **dict.fromkeys(("ArgMax", "ArgMin"), (_found, _tell_axis)),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), (_quantised, _tell_axis)),
    **dict.fromkeys(("Softmax", "LogSoftmax"), (_along(-1, since=13), _tell_axis)),
    "Concat": (_joined, _tell_axis),
    "Gather": (_gathered, _tell_axis),
    "Pad": (_padded, _tell_pads),
    "Slice": (_sliced, _tell_slice),
    "Split": (_along(0, outputs=True), _tell_axis),
    "Squeeze": (_squeezed, _tell_axes),
    "Tile": (_repeated, _tell_counts),
}
