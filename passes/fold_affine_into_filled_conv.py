r"""Fold a constant scale and shift per channel into the Conv before it whose weights are one number.

    before                                  after

    shape (constant)                        shape
      |                                       |
    ConstantOfShape v                       ConstantOfShape s*v
      |                                       |
    x W   b                                 x W   s*b+t
     \|  /                                   \|  /
     Conv   gamma beta mean var              Conv
        \     |    |    |   /                 |
        BatchNormalization                    y
               |
               y

Why it holds: as for weights that are stored, see `fold-batchnorm-into-conv`; the same goes for Mul,
Div, Add, Sub and Neg. Where s is one number for all channels, the weights are all the same number after
it as before. So they stay a few bytes in the file, however many there are.

Models whose weights were left out, to be small, are written like that.

Needs: bias and what scales and shifts constant.
Keeps: names of the Conv and of y. Others that read the old weights go on doing so.
Where s differs from channel to channel, weights of up to 256 KiB are stored.

Skips, with the reason in the report: such a scale where there are more weights; a Conv output that
another node or the caller reads; numbers that would leave the range of their type; what
`fold-batchnorm-into-conv` skips of a BatchNormalization itself.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.affine import Array, Channels, Doubles, Refused, affine_of, variable_of
from optc.passes.contract import Facts, Pass, Report
from optc.passes.graph import detach
from optc.passes.linear import FLOATS, Linear, limits
from optc.passes.match import argument, made_by, names_of

STORED_BYTES = 256 * 1024
"""Weights of up to so many bytes are stored where a scale tells them apart."""


class FoldAffineIntoFilledConv(Pass):
    """Fold a constant scale and shift into a Conv whose weights are all the same number."""

    name = "fold-affine-into-filled-conv"
    exactness = "equal up to rounding of weights and bias"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Fold what can be folded in ``graph``."""
        report = Report()
        own: set[int] | None = None
        for follower in facts.nodes("BatchNormalization", "Mul", "Div", "Add", "Sub", "Neg"):
            conv = made_by(variable_of(follower), "Conv")
            filled = None if conv is None else made_by(conv.inputs[1], "ConstantOfShape")
            if conv is None or filled is None:
                continue
            own = own or {id(node) for node in graph.nodes}
            if id(conv) not in own:
                continue  # this is a body, and the Conv is outside
            try:
                weights = _fold(conv, filled, follower, facts)
            except Refused as refused:
                report.skipped[follower.name] = str(refused)
                continue
            if weights is not None:
                graph.nodes.append(weights)
                report.merged[weights.name] = names_of(filled)
            report.merged[conv.name] = names_of(conv, follower)
        return report


def _fold(conv: gs.Node, filled: gs.Node, follower: gs.Node, facts: Facts) -> gs.Node | None:
    """Let ``conv`` do what ``follower`` does, and return the node that fills its new weights if any.

    Raises:
        Refused: If it cannot.
    """
    if facts.is_shared(conv.outputs[0]):
        raise Refused("the Conv output has another reader")
    weight, fill = conv.inputs[1], filled.attrs.get("value")
    value = np.zeros(1, np.float32) if fill is None else np.asarray(fill.values)
    dims = facts.shapes.dims(weight.name)
    shape = [dim for dim in dims or () if isinstance(dim, int)]
    if dims is None or len(shape) != len(dims) or value.dtype.name not in FLOATS:
        raise Refused("the weights of the Conv are of a shape or type that is not known")
    bias = argument(conv, 2)
    if bias is not None and not isinstance(bias, gs.Constant):
        raise Refused("the bias of the Conv is computed at run time")
    channels = Channels(shape[0], axis=1, rank=len(shape))
    affine = affine_of(follower, channels, facts.opset)
    scale = np.ones(1) if affine.scale is None else affine.scale
    is_filled = bool((scale == scale[0]).all())
    if not is_filled and math.prod(shape) * value.dtype.itemsize > STORED_BYTES:
        raise Refused("the scale is not the same for all channels")
    if bias is not None or affine.shift is not None:
        numbers = Linear(conv, weight, bias).bias_numbers(channels) * scale
        numbers = numbers if affine.shift is None else numbers + affine.shift
        bias = gs.Constant(facts.fresh_name(f"{conv.name}.bias"), _held(numbers, value.dtype))
    filters = _held(value.astype(np.float64) * (scale[:1] if is_filled else scale), value.dtype)
    name = facts.fresh_name(weight.name)
    node: gs.Node | None = None
    if is_filled:
        made: gs.Tensor = gs.Variable(name, value.dtype, shape)
        attrs = {"value": gs.Constant(facts.fresh_name(f"{name}.value"), filters)}
        fresh = facts.fresh_name(filled.name)
        node = gs.Node("ConstantOfShape", fresh, attrs, [filled.inputs[0]], [made])
    else:
        column = filters.reshape(-1, *[1] * (len(shape) - 1))
        made = gs.Constant(name, np.ascontiguousarray(np.broadcast_to(column, shape)))
    conv.inputs = [conv.inputs[0], made, *([] if bias is None else [bias])]
    output = follower.outputs[0]
    detach(follower)
    conv.outputs = [output]
    return node


def _held(numbers: Doubles, dtype: np.dtype[Any]) -> Array:
    """Return ``numbers`` as ``dtype``.

    Raises:
        Refused: If it cannot hold them.
    """
    smallest, largest = limits(dtype)
    sizes = np.abs(numbers)
    if not ((sizes <= largest) & ((sizes >= smallest) | (sizes == 0))).all():
        raise Refused(f"the folded numbers do not fit {dtype.name}")
    return numbers.astype(dtype)
