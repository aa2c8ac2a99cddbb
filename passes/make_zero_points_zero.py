r"""Rewrite quantisation with a zero point, or to unsigned integers, into what needs neither.

    before                                   after, a zero point of 128

    x                                        x
    |                                        |
    QuantizeLinear (s, uint8 128)            QuantizeLinear (s, int8 0)
    |                                        |
    DequantizeLinear (s, uint8 128)          DequantizeLinear (s, int8 0)

    before                                   after, any other zero point

    x                                        x
    |                                        |
    QuantizeLinear (s, z)                    Div (s), Round
    |                                        |
    DequantizeLinear (s, z)                  Clip [low - z, high - z], Mul (s)

TensorRT quantises to int8 with a zero point of 0, and to nothing else; a uint8 zero point of 0 it reads
as int8, which cuts off the upper half.

Why it holds:
- saturate(round(x / s) + 128) to [0, 255] is saturate(round(x / s)) to [-128, 127], plus 128, which
  DequantizeLinear takes off again. The integers are others, the floats are the same. So are they where
  constants less their zero point fit int8.
- The rest is the arithmetic of the specification in float32, where whole numbers of up to 24 bits are
  exact: division by the scale, rounding of halves to even, saturation, and the multiplication.
- Constants that do not fit int8, and those of 32 bits (biases), are multiplied out.

How exact: exact but for the sign of zeros, which DequantizeLinear does not keep.
What it costs: what is computed in floats is no longer a product of integers for TensorRT: it runs in
float32, not in 8 bits. Constants that are multiplied out take four times the memory.

Needs: opset 13 where several numbers lie along an axis, else 11.
Keeps: names of outputs.
Skips, with the reason in the report: scales that are not float32; several scales or zero points that
are computed at run time; blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper

from optc.passes.contract import Facts, Pass, Report
from optc.passes.graph import Array, producer
from optc.passes.match import argument
from optc.passes.replacement import Declined, Replacement

OPSET = 11
"""Round, and Clip with its bounds as inputs."""

DOMAINS = ("", "com.microsoft")
TYPES = ("int8", "uint8", "int16", "uint16", "int32")


class MakeZeroPointsZero(Pass):
    """Rewrite quantisation with a zero point, or to unsigned integers, into what needs neither."""

    name = "make-zero-points-zero"
    group = "legalise"
    exactness = "exact, but for the sign of zeros"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Rewrite the refused nodes in ``graph``."""
        report = Report()
        nodes = [
            node
            for op in ("DequantizeLinear", "QuantizeLinear")  # what reads goes first
            for domain in DOMAINS
            for node in facts.nodes(op, domain=domain)
        ]
        _ = nodes and facts.shapes  # inferred before anything changes
        for node in nodes:
            if node.op == "QuantizeLinear" and not _is_read(node, facts):
                continue
            new = Replacement(graph, facts, node)
            try:
                _rewrite(new, report)
            except Declined as reason:
                new.discard()
                report.skipped[node.name] = str(reason)
        return report


def _is_read(node: gs.Node, facts: Facts) -> bool:
    return bool(node.outputs and (node.outputs[0].outputs or facts.is_kept(node.outputs[0])))


@dataclass(frozen=True, slots=True)
class _Grid:
    """What a QuantizeLinear or DequantizeLinear maps integers to floats by.

    Attributes:
        dtype: Of the integers.
        scale: A constant, or one number that is computed.
        zero_point: Constant.
    """

    dtype: np.dtype[Any]
    scale: gs.Tensor
    zero_point: Array

    @property
    def is_symmetric(self) -> bool:
        """Whether TensorRT takes it as it is."""
        return self.dtype == np.int8 and not np.any(self.zero_point)


def _grid(node: gs.Node, facts: Facts) -> _Grid:
    """Return how ``node`` maps, scale and zero point broadcast against its input.

    Raises:
        Declined: If that is not known, or no mapping that is spelt out here.
    """
    scale, zero = argument(node, 1), argument(node, 2)
    assert scale is not None, "the specification wants a scale"
    if node.attrs.get("block_size", 0) or node.attrs.get("precision", 0):
        raise Declined("it quantises blocks, or says which precision it computes in")
    dtype = _integers(node, zero, facts)
    if dtype is None or dtype.name not in TYPES:
        raise Declined("it is not known to quantise to integers of 8, 16 or 32 bits")
    if facts.dtype(scale) != np.float32:
        raise Declined("its scale is not known to be float32")
    if zero is not None and not isinstance(zero, gs.Constant):
        raise Declined("its zero point is computed at run time")
    zeros = np.zeros((), dtype) if zero is None else np.asarray(zero.values)
    count = int(np.prod(scale.shape)) if isinstance(scale, gs.Constant) else 1
    shape = _broadcast_shape(node, max(count, zeros.size), facts)
    if isinstance(scale, gs.Constant):
        wanted = shape if count > 1 else ()
        if tuple(scale.shape) != wanted:
            values = np.asarray(scale.values).reshape(wanted)
            scale = gs.Constant(facts.fresh_name(f"{node.name}_scale"), values)
    elif facts.shapes.dims(scale.name) != ():
        raise Declined("its scale is computed at run time, and is not known to be one number")
    return _Grid(dtype, scale, zeros.reshape(shape if zeros.size > 1 else ()))


def _integers(node: gs.Node, zero: gs.Tensor | None, facts: Facts) -> np.dtype[Any] | None:
    """Return the type of the integers that ``node`` reads or makes."""
    if zero is not None:
        return facts.dtype(zero)
    if node.op == "DequantizeLinear":
        return facts.dtype(node.inputs[0])
    wanted = node.attrs.get("output_dtype", 0)
    return np.dtype(helper.tensor_dtype_to_np_dtype(wanted) if wanted else np.uint8)


def _broadcast_shape(node: gs.Node, count: int, facts: Facts) -> tuple[int, ...]:
    """Return the shape in which ``count`` numbers lie along the axis of ``node``."""
    if count == 1:
        return ()
    x = node.inputs[0]
    dims = facts.dims(x)
    if dims is None:
        raise Declined("nobody knows how many axes its input has")
    axis = node.attrs.get("axis", 1)
    axis = axis + len(dims) if axis < 0 else axis
    return (count, *[1] * (len(dims) - axis - 1))


# --- the rewrites --------------------------------------------------------------------------------


def _rewrite(new: Replacement, report: Report) -> None:
    node, facts = new.node, new.facts
    grid = _grid(node, facts)
    if grid.is_symmetric:
        return
    if node.op == "QuantizeLinear":
        if _is_shifted(node, grid, facts):
            _shift(node, facts, report)
            return
        new.require_opset(OPSET)
        new.finish(report, _quantised(node.inputs[0], grid, new))
        return
    if isinstance(node.inputs[0], gs.Constant):
        new.finish(report, _constant(node, grid, new))
        return
    before = producer(node.inputs[0])
    if before is not None and before.op == "QuantizeLinear" and before.domain in DOMAINS:
        first = _grid(before, facts)
        if _is_shifted(before, first, facts):
            _shift(before, facts, report)
            return
        if first.dtype == grid.dtype and np.array_equal(first.zero_point, grid.zero_point):
            new.others = (before,)
            new.require_opset(OPSET)
            steps = _steps(before.inputs[0], first, new)
            new.finish(report, new.add("Mul", _limited(steps, first, new), grid.scale))
            return
    floats = new.cast(node.inputs[0], np.float32)
    if np.any(grid.zero_point):
        floats = new.add("Sub", floats, grid.zero_point.astype(np.float32))
    new.finish(report, new.add("Mul", floats, grid.scale))


def _steps(x: gs.Tensor, grid: _Grid, new: Replacement) -> gs.Variable:
    return new.add("Round", new.add("Div", x, grid.scale))


def _limited(steps: gs.Variable, grid: _Grid, new: Replacement) -> gs.Variable:
    """Return ``steps`` as far from zero as the integers are from their zero point."""
    info = np.iinfo(grid.dtype)
    zeros = grid.zero_point.astype(np.float32)
    low, high = np.float32(info.min) - zeros, np.float32(info.max) - zeros
    if zeros.ndim == 0:
        return new.add("Clip", steps, low, high)
    return new.add("Min", new.add("Max", steps, low), high)


def _quantised(x: gs.Tensor, grid: _Grid, new: Replacement) -> gs.Variable:
    """Return the integers themselves. The zero point is added even if 0: it leaves no -0.0."""
    shifted = new.add("Add", _steps(x, grid, new), grid.zero_point.astype(np.float32))
    info = np.iinfo(grid.dtype)
    whole = new.add("Clip", shifted, np.float32(info.min), np.float32(info.max))
    return new.cast(whole, grid.dtype)


def _constant(node: gs.Node, grid: _Grid, new: Replacement) -> gs.Tensor:
    """Return what a constant is as int8 with a zero point of 0, or multiplied out."""
    integers = np.asarray(node.inputs[0].values)
    centred = integers.astype(np.int64) - grid.zero_point.astype(np.int64)
    if (
        integers.dtype.itemsize == 1
        and centred.min(initial=0) >= -128
        and centred.max(initial=0) <= 127
    ):
        scale = node.inputs[1]
        zeros = np.zeros(scale.shape if isinstance(scale, gs.Constant) else (), np.int8)
        return new.add("DequantizeLinear", centred.astype(np.int8), scale, zeros, **node.attrs)
    if not isinstance(grid.scale, gs.Constant):
        return new.add("Mul", centred.astype(np.float32), grid.scale)
    return new.constant(centred.astype(np.float32) * grid.scale.values)


def _is_shifted(node: gs.Node, grid: _Grid, facts: Facts) -> bool:
    """Whether ``node`` and all that read it may use int8 with a zero point of 0 in its place."""
    output = node.outputs[0]
    return (
        grid.dtype == np.uint8
        and bool(np.all(grid.zero_point == 128))
        and not facts.is_kept(output)
        and bool(output.outputs)
        and all(
            reader.op == "DequantizeLinear"
            and reader.domain in DOMAINS
            and isinstance(zero := argument(reader, 2), gs.Constant)
            and bool(np.all(zero.values == 128))
            for reader in output.outputs
        )
    )


def _shift(node: gs.Node, facts: Facts, report: Report) -> None:
    """Let ``node`` and all that read it use int8 with a zero point of 0."""
    output = node.outputs[0]
    for each in (node, *output.outputs):
        zeros = np.zeros(each.inputs[2].shape, np.int8)
        each.inputs[2] = gs.Constant(facts.fresh_name(f"{each.name}_zero_point"), zeros)
        report.merged[each.name] = (each.name,)
    if node.attrs.get("output_dtype", 0):
        node.attrs["output_dtype"] = int(helper.np_dtype_to_tensor_dtype(np.dtype(np.int8)))
    output.dtype = np.dtype(np.int8)
