r"""Spell operators on quantised tensors out: dequantise, compute in floats, quantise again.

    before                                     after

    x  xs xz  w ws wz  ys yz  b                x              w
     \  \  |  |  |  |  |  /  /                 |              |
             QLinearConv                       Dequantize-    Dequantize-
                  |                            Linear         Linear         b * xs * ws
                  y                               \           |             /
                                                            Conv
                                                              |
                                                        QuantizeLinear (ys, yz)
                                                              |
                                                              y

Also QLinearMatMul, and of com.microsoft: QGemm, QLinearAdd, QLinearAveragePool, QLinearConcat,
QLinearConv, QLinearGlobalAveragePool, QLinearLeakyRelu, QLinearMul, QLinearReduceMean, QLinearSigmoid,
QLinearSoftmax and QLinearWhere. It is the form that TensorRT computes with integers where the zero
points are 0; others are the business of `make-zero-points-zero`.

Why it holds: these operators are defined by their float counterparts on the numbers that the integers
stand for, rounded to the grid of the result.
How exact: a runtime multiplies the integers and rounds what comes of it once, which differs where the
result lies next to the middle of two steps: at most by one step of the result. ONNX Runtime looks
QLinearSigmoid and QLinearLeakyRelu up in a table made in the same way.

Needs: opset 13.
Keeps: names of outputs.
Skips, with the reason in the report: channels last with an unknown number of axes; a QLinearSoftmax of
before opset 13 over more than the last axis; a QLinearMatMul with a scale for each row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.graph import Array
from optc.passes.replacement import Declined, Operand, Replacement, Results, replace_each

OPSET = 13
"""Scales along an axis."""


class ExpandQuantisedOperators(Pass):
    """Spell ``QLinear`` operators out: dequantise, compute in floats, quantise again."""

    name = "expand-quantised-operators"
    group = "legalise"
    exactness = "to one step of the quantised result"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Spell the refused operators in ``graph`` out."""
        nodes = facts.nodes("QLinearConv", "QLinearMatMul")
        nodes += facts.nodes(*_RULES, domain="com.microsoft")
        return replace_each(nodes, facts, lambda node: _Quantised(graph, facts, node), _written)


def _written(new: _Quantised) -> Results:
    result = _RULES[new.node.op](new)
    new.require_opset(OPSET)
    return result


@dataclass(slots=True)
class _Quantised(Replacement):
    """A quantised operator being spelt out."""

    def floats(self, index: int, *, axis: int | None = None) -> gs.Variable:
        """Return input ``index`` in floats; its scale and zero point stand behind it."""
        return self.add(
            "DequantizeLinear",
            self.node.inputs[index],
            self.input(index + 1),
            *self._zero_point(index + 2),
            axis=axis,
        )

    def _zero_point(self, index: int) -> tuple[gs.Tensor, ...]:
        zero_point = self.input(index)
        return () if zero_point is None else (zero_point,)

    def integers(self, floats: gs.Tensor, index: int, *, like: int = 0) -> gs.Variable:
        """Return ``floats`` on the grid whose scale is input ``index``, its zero point behind it.

        Args:
            like: The input that has the type of the integers, where there is no zero point.
        """
        zeros: Operand = self.input(index + 1)
        if zeros is None:
            zeros = np.zeros((), self.dtype(self.node.inputs[like]))
        return self.add("QuantizeLinear", floats, self.input(index), zeros)

    def dtype(self, tensor: gs.Tensor) -> np.dtype[Any]:
        """Return the type of an input."""
        known = self.facts.dtype(tensor)
        if known is None:
            raise Declined(f"nobody knows of which type `{tensor.name}` is")
        return known

    def rank(self, index: int) -> int:
        """Return how many axes an input has."""
        tensor = self.node.inputs[index]
        dims = self.facts.dims(tensor)
        if dims is None:
            raise Declined(f"nobody knows how many axes `{tensor.name}` has")
        return len(dims)

    def attrs(self, *names: str) -> dict[str, Any]:
        """Return those attributes of the operator that its float counterpart has too."""
        return {name: self.node.attrs[name] for name in names if name in self.node.attrs}

    def channels_first(
        self, x: gs.Variable, compute: Callable[[gs.Variable], gs.Variable]
    ) -> gs.Variable:
        """Return what ``compute`` makes of ``x``, where channels may come last in both."""
        if not self.node.attrs.get("channels_last", 0):
            return compute(x)
        rank = self.rank(0)
        last = [0, rank - 1, *range(1, rank - 1)]
        result = compute(self.add("Transpose", x, perm=last))
        return self.add("Transpose", result, perm=[0, *range(2, rank), 1])


# --- the rules -----------------------------------------------------------------------------------


def _bias(new: _Quantised, index: int) -> tuple[Operand, ...]:
    """Return a bias of int32 in floats: its step is that of the product of both operands."""
    bias, scales = new.input(index), (new.input(1), new.input(4))
    if bias is None:
        return ()
    numbers = [_numbers(tensor) for tensor in (bias, *scales)]
    known = [each for each in numbers if each is not None]
    if len(known) == len(numbers):
        product: Array = known[0].astype(np.float32) * (known[1] * known[2])
        return (product,)
    step = new.add("Mul", *scales)
    return (new.add("Mul", new.cast(bias, np.float32), step),)


def _numbers(tensor: gs.Tensor | None) -> Array | None:
    return np.asarray(tensor.values) if isinstance(tensor, gs.Constant) else None


CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
POOL = ("auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides")


def _conv(new: _Quantised) -> gs.Variable:
    weights, bias = new.floats(3, axis=0), _bias(new, 8)

    def compute(x: gs.Variable) -> gs.Variable:
        return new.add("Conv", x, weights, *bias, **new.attrs(*CONV))

    return new.integers(new.channels_first(new.floats(0), compute), 6)


def _matmul(new: _Quantised) -> gs.Variable:
    row_scale = new.node.inputs[1]
    if isinstance(row_scale, gs.Constant) and int(np.prod(row_scale.shape)) > 1:
        raise Declined("it has a scale for each row")
    columns = new.rank(3) - 1
    product = new.add("MatMul", new.floats(0), new.floats(3, axis=max(columns, 0)))
    return new.integers(product, 6)


def _gemm(new: _Quantised) -> gs.Variable:
    columns = 0 if new.node.attrs.get("transB", 0) else 1
    product = new.add(
        "Gemm",
        new.floats(0),
        new.floats(3, axis=columns),
        *_bias(new, 6),
        beta=new.node.attrs.get("alpha", 1.0),  # the bias counts in the steps of the product
        **new.attrs("alpha", "transA", "transB"),
    )
    return product if new.input(7) is None else new.integers(product, 7)


def _elementwise(op: str) -> Callable[[_Quantised], gs.Variable]:
    def rule(new: _Quantised) -> gs.Variable:
        return new.integers(new.add(op, new.floats(0), new.floats(3)), 6)

    return rule


def _unary(op: str, *attrs: str, **defaults: Any) -> Callable[[_Quantised], gs.Variable]:
    def rule(new: _Quantised) -> gs.Variable:
        return new.integers(new.add(op, new.floats(0), **{**defaults, **new.attrs(*attrs)}), 3)

    return rule


def _softmax(new: _Quantised) -> gs.Variable:
    axis, rank = new.node.attrs.get("axis", -1), new.rank(0)
    if new.node.attrs.get("opset", 13) < 13 and axis % rank != rank - 1:
        raise Declined("it is of before opset 13, over more than the last axis")
    return new.integers(new.add("Softmax", new.floats(0), axis=axis), 3)


def _pool(op: str) -> Callable[[_Quantised], gs.Variable]:
    def rule(new: _Quantised) -> gs.Variable:
        names = () if op.startswith("Global") else POOL

        def compute(x: gs.Variable) -> gs.Variable:
            return new.add(op, x, **new.attrs(*names))

        return new.integers(new.channels_first(new.floats(0), compute), 3)

    return rule


def _mean(new: _Quantised) -> gs.Variable:
    axes = new.node.attrs.get("axes") or list(range(new.rank(0)))
    keepdims = new.node.attrs.get("keepdims", 1)
    return new.integers(new.along("ReduceMean", new.floats(0), axes, keepdims=keepdims), 3)


def _concat(new: _Quantised) -> gs.Variable:
    parts = [new.floats(index) for index in range(2, len(new.node.inputs), 3)]
    joined = new.add("Concat", *parts, axis=new.node.attrs["axis"])
    return new.integers(joined, 0, like=2)


def _where(new: _Quantised) -> gs.Variable:
    chosen = new.add("Where", new.node.inputs[0], new.floats(1), new.floats(4))
    return new.integers(chosen, 7, like=1)


_RULES: dict[str, Callable[[_Quantised], gs.Variable]] = {
    "QGemm": _gemm,
    "QLinearAdd": _elementwise("Add"),
    "QLinearAveragePool": _pool("AveragePool"),
    "QLinearConcat": _concat,
    "QLinearConv": _conv,
    "QLinearGlobalAveragePool": _pool("GlobalAveragePool"),
    "QLinearLeakyRelu": _unary("LeakyRelu", "alpha", alpha=0.01),
    "QLinearMatMul": _matmul,
    "QLinearMul": _elementwise("Mul"),
    "QLinearReduceMean": _mean,
    "QLinearSigmoid": _unary("Sigmoid"),
    "QLinearSoftmax": _softmax,
    "QLinearWhere": _where,
}
