r"""Compute dynamic quantisation, and products of integers, in floats that hold them exactly.

    before                                        after

    x                                             x
    |                                             |
    DynamicQuantizeLinear                         ReduceMin, ReduceMax, ... -> scale, zero point
    |       \        \                            |
    |q       \scale   \zero point                 Div, Round, Add, Clip
    |         |        |                          |
    MatMulInteger (W, zero point)                 Sub (zero point)
    |         |                                   |
    Cast      |                                   MatMul (W - its zero point, in floats)
      \      /                                    |
        Mul                                       Mul (scale)

TensorRT has no operators for this, and no uint8 inside an engine.

Why it holds:
- DynamicQuantizeLinear is spelt out operation by operation as the specification writes it, in float32,
  rounding halves to even. Where the range is empty the scale is 1, as in ONNX Runtime.
- Sums of products of 8-bit integers are exact in float32 in whatever order as long as no partial sum
  can reach 2**24: with constant weights the sum of their absolute values, times the largest activation,
  bounds them. Where they may, the product is split along K into up to 8 parts, which are added as int32.
  An operand of 8 bits is exact in TF32 as well.

How exact: the same integers as ONNX Runtime computes, but for the sign of a zero where an integer that
is cast back to float is not made at all. A convolution algorithm that transforms its operands
(Winograd) rounds, and may move a float that is read without the Cast by a millionth.
What it costs: arithmetic runs in float32, not in 8 bits, and the weights take four times the memory.

Also: com.microsoft's MatMulIntegerToFloat and DynamicQuantizeMatMul, which are the above in one node.
Needs: opset 13.
Skips, with the reason in the report: sums that may reach 2**24 in more than 8 parts, or with weights
computed at run time; a zero point for each row that is computed at run time; weights of one axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from optc.passes.contract import Facts, Pass, Report
from optc.passes.graph import Array, detach, redirect
from optc.passes.replacement import Declined, Replacement

EXACT_BELOW = 2**24
"""Sums of whole numbers below this are exact in float32."""

MAX_PARTS = 8
"""Into so many products one is split; each reads the activations again."""

OPSET = 13


class ExpandDynamicQuantisation(Pass):
    """Compute dynamic quantisation and products of integers in floats that hold them exactly."""

    name = "expand-dynamic-quantisation"
    group = "legalise"
    exactness = "exact, but for the sign of zeros"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Expand the refused nodes in ``graph``."""
        report = Report()
        nodes = facts.nodes("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger")
        nodes += facts.nodes(
            "DynamicQuantizeMatMul", "MatMulIntegerToFloat", domain="com.microsoft"
        )
        _ = nodes and facts.shapes  # inferred before anything changes
        for node in nodes:
            new = Replacement(graph, facts, node)
            try:
                _EXPANDERS[node.op](new, report)
            except Declined as reason:
                new.discard()
                report.skipped[node.name] = str(reason)
        return report


# --- DynamicQuantizeLinear -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Quantised:
    """What DynamicQuantizeLinear makes, in floats."""

    values: gs.Variable
    scale: gs.Variable
    zero_point: gs.Variable


def _quantised(x: gs.Tensor, new: Replacement) -> _Quantised:
    zero, top = np.float32(0), np.float32(255)
    low = new.add("Min", new.add("ReduceMin", x, keepdims=0), zero)
    high = new.add("Max", new.add("ReduceMax", x, keepdims=0), zero)
    extent = new.add("Sub", high, low)
    is_flat = new.add("Equal", extent, zero)
    scale = new.add("Where", is_flat, np.float32(1), new.add("Div", extent, top))
    # 0 - round(q), as -round(q) could be -0.0, which no integer is
    offset = new.add("Sub", zero, new.add("Round", new.add("Div", low, scale)))
    zero_point = new.add("Clip", offset, zero, top)
    steps = new.add("Add", new.add("Round", new.add("Div", x, scale)), zero_point)
    return _Quantised(new.add("Clip", steps, zero, top), scale, zero_point)


def _quantise(new: Replacement, report: Report) -> None:
    new.require_opset(OPSET)
    made = _quantised(new.node.inputs[0], new)
    integers = {0: made.values, 2: made.zero_point}
    results = {index: new.cast(floats, np.uint8) for index, floats in integers.items()}
    new.finish(report, {**results, 1: made.scale})


# --- operands ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Operand:
    """Integers of 8 bits less their zero point.

    Attributes:
        floats: They in floats: computed, or a constant.
        reach: The largest absolute value that they may have.
    """

    floats: gs.Variable | Array
    reach: int


def _operand(
    tensor: gs.Tensor, zero_point: gs.Tensor | None, rank: int, new: Replacement
) -> _Operand:
    """Return ``tensor`` less ``zero_point``.

    Args:
        tensor: What a product reads.
        zero_point: One number, or one for each place along an axis.
        rank: How many axes there are from that one on.
    """
    dtype = _dtype(tensor, new)
    values = _floats(tensor, new)
    if zero_point is None:
        return _Operand(values, _reach(dtype, np.zeros(1)))
    zeros = _zero_points(zero_point, rank, new)
    if not isinstance(zeros, np.ndarray):
        return _Operand(new.add("Sub", values, zeros), 255)
    if isinstance(values, np.ndarray):
        centred: Array = values - zeros
        return _Operand(centred, int(np.abs(centred).max(initial=0)))
    reach = _reach(dtype, zeros)
    return _Operand(new.add("Sub", values, zeros) if np.any(zeros) else values, reach)


def _dtype(tensor: gs.Tensor, new: Replacement) -> np.dtype[Any]:
    dtype = new.facts.dtype(tensor)
    if dtype is None or dtype.name not in ("int8", "uint8"):
        raise Declined(f"`{tensor.name}` does not hold integers of 8 bits")
    return dtype


def _floats(tensor: gs.Tensor, new: Replacement) -> gs.Variable | Array:
    if isinstance(tensor, gs.Constant):
        values: Array = np.asarray(tensor.values).astype(np.float32)
        return values
    return new.cast(tensor, np.float32)


def _zero_points(tensor: gs.Tensor, rank: int, new: Replacement) -> gs.Variable | Array:
    zeros = _floats(tensor, new)
    if isinstance(zeros, np.ndarray):
        several = zeros.ndim == 1 and zeros.size > 1
        return zeros.reshape(-1, *[1] * (rank - 1)) if several else zeros
    if new.facts.shapes.dims(tensor.name) not in ((), (1,)):
        raise Declined("there are several zero points, computed at run time")
    return zeros


def _reach(dtype: np.dtype[Any], zeros: Array) -> int:
    info = np.iinfo(dtype)
    return int(max(info.max - zeros.min(initial=255), zeros.max(initial=-128) - info.min))


# --- products ------------------------------------------------------------------------------------


def _sizes(weights: Array, reach: int, most: int) -> list[int]:
    """Return the extents of the parts that K is split into, so that each sum is exact.

    Args:
        weights: Their absolute values, summed where one place of K meets several: [K, columns].
        reach: The largest absolute activation.
        most: How many parts there may be.

    Raises:
        Declined: If so many do not suffice.
    """
    inner = len(weights)
    sums = np.cumsum(weights, axis=0, dtype=np.float64)
    for count in range(1, min(most, inner) + 1):
        sizes = [len(part) for part in np.array_split(np.arange(inner), count)]
        totals = np.diff(sums[np.cumsum(sizes) - 1], axis=0, prepend=0)
        if totals.max(initial=0) * reach < EXACT_BELOW:
            return sizes
    raise Declined("its sums may reach 2**24, beyond which float32 is not exact")


def _split(
    x: gs.Variable | Array,
    weights: Array,
    sizes: list[int],
    axes: tuple[int, int],
    new: Replacement,
) -> list[tuple[gs.Variable | Array, Array]]:
    """Return activations and weights, cut along K into parts of ``sizes``."""
    if len(sizes) == 1:
        return [(x, weights)]
    parts = new.add_with(len(sizes), "Split", x, np.array(sizes, np.int64), axis=axes[0])
    cuts = np.split(weights, np.cumsum(sizes)[:-1], axis=axes[1])
    return list(zip(parts, map(np.ascontiguousarray, cuts), strict=True))


def _matmul(x: _Operand, weights: _Operand, new: Replacement) -> list[gs.Variable]:
    """Return the products of which the sum is ``MatMul(x, weights)``, each of them exact."""
    if not isinstance(weights.floats, np.ndarray):
        dims = new.facts.shapes.dims(new.node.inputs[1].name) or ()
        inner = dims[-2] if len(dims) > 1 else None
        if not isinstance(inner, int) or inner * weights.reach * x.reach >= EXACT_BELOW:
            raise Declined("its sums may reach 2**24, beyond which float32 is not exact")
        return [new.add("MatMul", x.floats, weights.floats)]
    values = weights.floats
    if values.ndim < 2 or not values.size:
        raise Declined("the weights have one axis, or are empty")
    by_place = np.moveaxis(np.abs(values), -2, 0).reshape(values.shape[-2], -1)
    sizes = _sizes(by_place, x.reach, MAX_PARTS)
    return [
        new.add("MatMul", part, cut) for part, cut in _split(x.floats, values, sizes, (-1, -2), new)
    ]


def _conv(x: _Operand, weights: _Operand, new: Replacement) -> list[gs.Variable]:
    values = weights.floats
    if not isinstance(values, np.ndarray) or not values.size:
        raise Declined("the weights are computed at run time, or are empty")
    by_place = np.abs(values).reshape(*values.shape[:2], -1).sum(axis=2, dtype=np.float64).T
    attrs = new.node.attrs
    sizes = _sizes(by_place, x.reach, MAX_PARTS if attrs.get("group", 1) == 1 else 1)
    return [
        new.add("Conv", *pair, **attrs) for pair in _split(x.floats, values, sizes, (1, 1), new)
    ]


def _integers(products: list[gs.Variable], new: Replacement) -> gs.Variable:
    first, *rest = [new.cast(product, np.int32) for product in products]
    for each in rest:
        first = new.add("Add", first, each)
    return first


def _multiply(new: Replacement, report: Report) -> None:
    """Expand MatMulInteger or ConvInteger."""
    node = new.node
    x, weights = node.inputs[:2]
    if node.op == "MatMulInteger":
        operands = _operand(x, new.input(2), 2, new), _operand(weights, new.input(3), 1, new)
        products = _matmul(*operands, new)
    else:
        rank = len(weights.shape) if isinstance(weights, gs.Constant) else 0
        operands = _operand(x, new.input(2), 1, new), _operand(weights, new.input(3), rank, new)
        products = _conv(*operands, new)
    new.require_opset(OPSET)
    output = node.outputs[0]
    new.finish(report, _integers(products, new))
    if len(products) == 1:
        _read_in_floats(output, products[0], new, report)


def _read_in_floats(
    integers: gs.Tensor, floats: gs.Variable, new: Replacement, report: Report
) -> None:
    """Let who casts ``integers`` to float read the ``floats`` that they were made from."""
    for reader in list(integers.outputs):
        if reader.op != "Cast" or reader.domain or reader.attrs["to"] != TensorProto.FLOAT:
            continue
        if not new.facts.is_kept(reader.outputs[0]):
            redirect(reader.outputs[0], floats)
            detach(reader)
            report.removed[reader.name] = "what it would cast is computed in floats"


def _scaled(
    products: list[gs.Variable],
    scales: tuple[gs.Tensor | None, gs.Tensor | None],
    bias: gs.Tensor | None,
    new: Replacement,
) -> gs.Variable:
    total = products[0]
    if len(products) > 1:
        total = new.cast(_integers(products, new), np.float32)
    result = new.add("Mul", total, new.add("Mul", *scales))
    return result if bias is None else new.add("Add", result, bias)


def _multiply_to_float(new: Replacement, report: Report) -> None:
    """Expand MatMulIntegerToFloat: a, b, their scales, their zero points, bias."""
    a, b = new.node.inputs[:2]
    operands = _operand(a, new.input(4), 2, new), _operand(b, new.input(5), 1, new)
    products = _matmul(*operands, new)
    new.require_opset(OPSET)
    new.finish(report, _scaled(products, (new.input(2), new.input(3)), new.input(6), new))


def _quantise_and_multiply(new: Replacement, report: Report) -> None:
    """Expand DynamicQuantizeMatMul: a in floats, b, its scale, its zero point, bias."""
    a, b = new.node.inputs[:2]
    weights = _operand(b, new.input(3), 1, new)
    new.require_opset(OPSET)
    made = _quantised(a, new)
    x = _Operand(new.add("Sub", made.values, made.zero_point), 255)
    products = _matmul(x, weights, new)
    new.finish(report, _scaled(products, (made.scale, new.input(2)), new.input(4), new))


_EXPANDERS: dict[str, Callable[[Replacement, Report], None]] = {
    "ConvInteger": _multiply,
    "DynamicQuantizeLinear": _quantise,
    "DynamicQuantizeMatMul": _quantise_and_multiply,
    "MatMulInteger": _multiply,
    "MatMulIntegerToFloat": _multiply_to_float,
}
