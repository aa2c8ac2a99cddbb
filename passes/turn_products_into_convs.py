r"""Turn matrix products with constant weights into convolutions over windows of one element.

    before                          after

    x [B, M, K]   W [K, N]          x [B, M, K]
         \       /                  |
          MatMul                    Transpose [0, 2, 1]
            |                       |
            y [B, M, N]             Conv (W' [N, K, 1])
                                    |
                                    Transpose [0, 2, 1]
                                    |
                                    y [B, M, N]

For compute capability 7.5, where TensorRT has no float32 matrix product but does convolve.

Why it holds: with K as channels, a convolution over windows of one element is at each place the sum
over K of W'[n, k] * x[k], which is the product. Where M is the axis of the batch (two axes, or Gemm)
nothing is transposed. Weights on the left, ``W @ x``, need no Transpose with x of two or three axes,
as K is the axis of channels already. Alpha and beta of a Gemm go into weights and bias; a third input
that is not one number per column is added after it. Weights that a DequantizeLinear makes of integers
stay integers.

How exact: equal up to rounding, as products are summed in another order; without alpha and beta the
weights are those of the model.
What it costs: two Transposes of the activations, which a convolution in this layout may not need in
the end; the sum itself is the same.

Keeps: the names of outputs. Weights that others read too are copied.
Skips, with the reason in the report: both operands computed at run time; weights of several matrices;
weights of one axis; more than four axes, those between the first two and the last not static.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.graph import Array
from optc.passes.match import argument, made_by
from optc.passes.replacement import Declined, Replacement, replace_each

FLOATS = ("float16", "float32")
"""Types a Conv of TensorRT computes in, and numpy too."""


class TurnProductsIntoConvs(Pass):
    """Turn ``MatMul`` and ``Gemm`` with constant weights into ``Conv`` over windows of one element."""

    name = "turn-products-into-convs"
    group = "legalise"
    exactness = "equal up to rounding"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Rewrite the refused products in ``graph``."""
        nodes = facts.nodes("Gemm", "MatMul")
        return replace_each(nodes, facts, lambda node: Replacement(graph, facts, node), _written)


def _written(new: Replacement) -> gs.Tensor:
    write = _gemm if new.node.op == "Gemm" else _matmul
    return write(new.node, new.facts, new)


@dataclass(frozen=True, slots=True)
class _Matrix:
    """Constant weights, seen as one matrix.

    Attributes:
        values: Floats, or the integers that a DequantizeLinear reads.
        dtype: Of the floats.
        dequantise: That node; None where there is none.
        axis: Of the matrix, along which its scales lie.
    """

    values: Array
    dtype: np.dtype[Any]
    dequantise: gs.Node | None = None
    axis: int = 0

    @property
    def turned(self) -> _Matrix:
        """The transposed matrix."""
        values = np.ascontiguousarray(self.values.T)
        return replace(self, values=values, axis=1 - self.axis)

    def kernel(self, axes: int, new: Replacement, alpha: float = 1.0) -> Array | gs.Variable:
        """Return the matrix, times ``alpha``, as weights of a Conv over so many axes."""
        weights = self.values.reshape(*self.values.shape, *[1] * axes)
        if self.dequantise is None:
            if alpha != 1:
                return (weights.astype(np.float64) * alpha).astype(weights.dtype)
            return weights
        scale, *zero_point = self.dequantise.inputs[1:]
        if alpha != 1:
            values = np.asarray(scale.values)
            scale = new.constant((values.astype(np.float64) * alpha).astype(values.dtype))
        axis = self.axis if scale.shape else None  # an attribute since opset 13
        return new.add("DequantizeLinear", weights, scale, *zero_point, axis=axis)


def _matrix(tensor: gs.Tensor) -> _Matrix | None:
    """Return weights as one matrix, None where they are none."""
    dequantise = made_by(tensor, "DequantizeLinear")
    if dequantise is not None and all(isinstance(t, gs.Constant) for t in dequantise.inputs):
        stored, scale = dequantise.inputs[:2]
        if len(stored.shape) != 2 or 0 in stored.shape or len(scale.shape) > 1:
            return None
        axis = dequantise.attrs.get("axis", 1) % 2
        return _Matrix(np.asarray(stored.values), np.dtype(scale.dtype), dequantise, axis)
    if not isinstance(tensor, gs.Constant) or np.dtype(tensor.dtype).name not in FLOATS:
        return None
    *batch, rows, columns = tensor.shape if len(tensor.shape) > 1 else (0, *tensor.shape, 0)
    if any(extent != 1 for extent in batch) or 0 in (rows, columns):
        return None
    return _Matrix(np.asarray(tensor.values).reshape(rows, columns), np.dtype(tensor.dtype))


def _is_known(tensor: gs.Tensor) -> bool:
    maker = made_by(tensor, "DequantizeLinear")
    return isinstance(tensor, gs.Constant) or (
        maker is not None and isinstance(maker.inputs[0], gs.Constant)
    )


def _weights(node: gs.Node, side: int) -> _Matrix:
    matrix = _matrix(node.inputs[side])
    if matrix is not None:
        return matrix
    if not any(map(_is_known, node.inputs[:2])):
        raise Declined("both operands are computed at run time")
    raise Declined("the constant operand is not one matrix of floats")


def _matmul(node: gs.Node, facts: Facts, new: Replacement) -> gs.Tensor:
    on_left = _is_known(node.inputs[0])
    x, stored = node.inputs[::-1] if on_left else node.inputs
    weights = _weights(node, 0 if on_left else 1)
    dims = facts.shapes.dims(x.name)
    if dims is None or len(dims) < 2:
        raise Declined("the activations have one axis, or nobody knows how many")
    if isinstance(stored, gs.Constant) and len(stored.shape) > len(dims):
        raise Declined("the weights have more axes than the activations")  # and so the result
    return _left(x, weights, len(dims), new) if on_left else _right(x, weights, dims, new)


def _left(x: gs.Tensor, weights: _Matrix, rank: int, new: Replacement) -> gs.Tensor:
    """Return ``weights @ x``: the rows of x are the channels."""
    match rank:
        case 2:
            row = new.add("Conv", new.along("Unsqueeze", x, [0]), weights.kernel(1, new))
            return new.along("Squeeze", row, [0])
        case 3:
            return new.add("Conv", x, weights.kernel(1, new))
        case 4:
            swapped = new.add("Transpose", x, perm=[0, 2, 1, 3])
            product = new.add("Conv", swapped, weights.kernel(2, new))
            return new.add("Transpose", product, perm=[0, 2, 1, 3])
    raise Declined("the activations have more than four axes")


def _right(x: gs.Tensor, weights: _Matrix, dims: tuple[object, ...], new: Replacement) -> gs.Tensor:
    """Return ``x @ weights``: the columns of x are the channels."""
    inner, outer = weights.values.shape
    match len(dims):
        case 2:
            return _rows(x, weights.turned.kernel(2, new), None, new)
        case 3:
            turned = new.add("Transpose", x, perm=[0, 2, 1])
            product = new.add("Conv", turned, weights.turned.kernel(1, new))
            return new.add("Transpose", product, perm=[0, 2, 1])
        case 4:
            return _images(x, weights, new)
    middle = [extent for extent in dims[2:-1] if isinstance(extent, int)]
    if len(middle) != len(dims) - 3:
        raise Declined("the activations have more than four axes, which are not static")
    flat = new.add("Reshape", x, np.array([0, 0, np.prod(middle), inner], np.int64))
    product = _images(flat, weights, new)
    return new.add("Reshape", product, np.array([0, 0, *middle, outer], np.int64))


def _images(x: gs.Tensor, weights: _Matrix, new: Replacement) -> gs.Tensor:
    turned = new.add("Transpose", x, perm=[0, 3, 1, 2])
    product = new.add("Conv", turned, weights.turned.kernel(2, new))
    return new.add("Transpose", product, perm=[0, 2, 3, 1])


def _rows(
    x: gs.Tensor, kernel: Array | gs.Variable, bias: Array | None, new: Replacement
) -> gs.Tensor:
    """Return the product of each row of ``x``, the batch, with ``kernel`` [N, K, 1, 1]."""
    image = new.along("Unsqueeze", x, [2, 3])
    rest = () if bias is None else (bias,)
    product = new.add("Conv", image, kernel, *rest)
    return new.along("Squeeze", product, [2, 3])


def _gemm(node: gs.Node, facts: Facts, new: Replacement) -> gs.Tensor:
    weights = _weights(node, 1)
    if not node.attrs.get("transB", 0):
        weights = weights.turned
    alpha, beta = float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))
    x = node.inputs[0]
    if node.attrs.get("transA", 0):
        x = new.add("Transpose", x, perm=[1, 0])
    addend = argument(node, 2)
    bias = _bias(addend, beta, weights)
    product = _rows(x, weights.kernel(2, new, alpha), bias, new)
    if addend is None or bias is not None or beta == 0:
        return product
    if beta != 1:
        addend = new.add("Mul", addend, np.array(beta, weights.dtype))
    return new.add("Add", product, addend)


def _bias(addend: gs.Tensor | None, beta: float, weights: _Matrix) -> Array | None:
    """Return the third input of a Gemm as one number per column, None where it is not that."""
    columns = weights.values.shape[0]
    if not isinstance(addend, gs.Constant) or addend.shape not in (
        (),
        (1,),
        (1, 1),
        (columns,),
        (1, columns),
    ):
        return None
    numbers = np.asarray(addend.values).reshape(-1).astype(np.float64) * beta
    bias: Array = np.broadcast_to(numbers, columns).astype(weights.dtype)
    return bias
