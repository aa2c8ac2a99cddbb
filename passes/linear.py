"""Conv, ConvTranspose, Gemm and MatMul with constant weights, seen from their channels.

All four multiply by weights and add a bias. So what follows them channel by channel goes into
weights and bias, and so does what comes before them:

    s * (W x + b) + t  =  (s * W) x + (s * b + t)
    W (s * x + t) + b  =  (W * s) x + (b + W t)

That arithmetic, and the reasons against it, are here once for all passes that fold.

How exact: weights and bias are computed in float64 and rounded once to their own type. Where the
type cannot hold them (overflow, or a float16 channel so small that it would lose digits), nothing
is folded.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from optc.passes.affine import Array, Channels, Doubles, affine_of, argument, per_channel
from optc.passes.contract import Facts, Report
from optc.passes.graph import detach, producer

CONVOLUTIONS = ("Conv", "ConvTranspose")
PRODUCTS = ("Gemm", "MatMul")
FLOATS = ("float16", "bfloat16", "float32", "float64")

NOTHING = 1e-30
"""A channel whose largest weight is below this may vanish: training leaves such dead channels."""


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """A node that multiplies its input by weights and adds a bias.

    Attributes:
        node: The Conv, ConvTranspose, Gemm or MatMul.
        weight: Its weights, constant or not.
        bias: Its bias, constant or not; None where it has none.
        adder: The Add right behind a MatMul that holds its bias; None for all others.
    """

    node: gs.Node
    weight: gs.Tensor
    bias: gs.Tensor | None = None
    adder: gs.Node | None = None

    @property
    def last(self) -> gs.Node:
        """The node that makes the result."""
        return self.adder or self.node

    @property
    def groups(self) -> int:
        """How many groups of channels there are that do not see each other."""
        return int(self.node.attrs.get("group", 1))

    @property
    def is_transposed(self) -> bool:
        """Whether the weights of a Gemm are [output channels, input channels]."""
        return bool(self.node.attrs.get("transB", 0))

    def why_not(self, facts: Facts) -> str | None:
        """Return why weights and bias cannot be given new values, or None."""
        op = self.node.op
        if not isinstance(self.weight, gs.Constant):
            return f"the weights of the {op} are computed at run time"
        if self.bias is not None and not isinstance(self.bias, gs.Constant):
            return f"the bias of the {op} is computed at run time"
        shape, dtype = self.weight.shape, np.dtype(self.weight.dtype)
        if dtype.name not in FLOATS:
            return f"the weights of the {op} are {dtype.name}"
        if 0 in shape or len(shape) < 2 or shape[0] % self.groups:
            return f"the weights of the {op} have the shape {list(shape)}"
        return None

    def channels(self, facts: Facts) -> Channels:
        """Return where the output channels are. The weights must be constant."""
        shape = self.weight.shape
        match self.node.op:
            case "Conv":
                return Channels(shape[0], axis=1, rank=len(shape))
            case "ConvTranspose":
                return Channels(shape[1] * self.groups, axis=1, rank=len(shape))
            case "Gemm":
                return Channels(shape[0 if self.is_transposed else 1], axis=1, rank=2)
        rank = facts.shapes.rank(self.node.outputs[0]) or 1  # unknown: it has one axis for sure
        return Channels(shape[-1], axis=rank - 1, rank=rank)

    def bias_numbers(self, channels: Channels) -> Doubles | None:
        """Return the constant bias as [count], or None where it varies over another axis."""
        if self.bias is None:
            return np.zeros(channels.count)
        if self.node.op in CONVOLUTIONS:  # their bias has one axis, not those of the result
            channels = Channels(channels.count, axis=0, rank=1)
        numbers = per_channel(self.bias, channels)
        if numbers is not None and self.node.op == "Gemm":
            numbers = numbers * self.node.attrs.get("beta", 1.0)
        return numbers

    def by_channel(self, weight: Array) -> Array:
        """Return contiguous weights as a view: [group, output channel, input channel, the rest]."""
        kernel = math.prod(weight.shape[2:])
        match self.node.op:
            case "Conv":
                return weight.reshape(self.groups, -1, weight.shape[1], kernel)
            case "ConvTranspose":
                return weight.reshape(self.groups, -1, weight.shape[1], kernel).swapaxes(1, 2)
            case "Gemm" if self.is_transposed:
                return weight.reshape(1, *weight.shape, 1)
        return weight.reshape(1, -1, weight.shape[-1], 1).swapaxes(1, 2)

    def scaled(self, factor: Doubles) -> Array | None:
        """Return the weights times ``factor``, or None where their type cannot hold the result.

        Args:
            factor: Has four axes, and broadcasts to the view that `by_channel` gives.
        """
        weight = np.ascontiguousarray(_peek(self.weight))
        product = np.empty(weight.shape, weight.dtype)
        rows, result = self.by_channel(weight), self.by_channel(product)
        with np.errstate(all="ignore"):  # what comes of it is judged below
            # numpy computes this in float64 buffer by buffer: no double copy of large weights
            np.multiply(rows, factor, out=result, dtype=np.float64, casting="unsafe")
        largest = np.maximum(result.max((2, 3)), -result.min((2, 3))).astype(np.float64)
        if not np.isfinite(largest).all():
            return None
        is_small = largest < float(ml_dtypes.finfo(weight.dtype).smallest_normal)
        if is_small.any():
            exact = np.abs(np.multiply(rows, factor, dtype=np.float64, casting="unsafe"))
            if exact[is_small].max() >= NOTHING:
                return None
        return product


def linear_making(tensor: gs.Tensor, ops: Collection[str]) -> Linear | None:
    """Return the node of ``ops`` that makes ``tensor``, or None.

    A MatMul counts where its right operand is a constant; with an Add of a constant right behind
    it, the two are seen as one.
    """
    node = producer(tensor)
    if node is None or node.domain:
        return None
    if node.op == "Add" and "MatMul" in ops:
        inner = argument(node)
        found = linear_making(inner, ["MatMul"]) if inner is not None else None
        if found is None or found.adder is not None:
            return None
        bias = next(t for t in node.inputs if isinstance(t, gs.Constant))
        return Linear(found.node, found.weight, bias, adder=node)
    if node.op not in ops:
        return None
    weight = node.inputs[1]
    if node.op == "MatMul":
        is_matrix = isinstance(weight, gs.Constant) and len(weight.shape) >= 2
        return Linear(node, weight) if is_matrix else None
    has_bias = len(node.inputs) > 2 and bool(node.inputs[2].name)
    return Linear(node, weight, node.inputs[2] if has_bias else None)


def fold_into(
    graph: gs.Graph, facts: Facts, *, followers: Collection[str], into: Collection[str]
) -> Report:
    """Fold every node of ``followers`` into the node of ``into`` whose result it reads.

    That node keeps its name and takes over the output of the one it now stands for. A MatMul of
    matrices that is given a bias becomes a Gemm.
    """
    report = Report()
    own = {id(node) for node in graph.nodes}
    for follower in graph.nodes:
        x = argument(follower) if follower.op in followers else None
        linear = linear_making(x, into) if x is not None else None
        if linear is None or not own.issuperset((id(linear.node), id(linear.last))):
            continue  # not our pattern, or in a body and fed by what is computed outside it
        if reason := _fold(linear, follower, facts):
            report.skipped[follower.name] = reason
            continue
        name = linear.last.name
        report.merged[name] = (*report.merged.get(name, (name,)), follower.name)
    return report


def _fold(linear: Linear, follower: gs.Node, facts: Facts) -> str | None:
    """Fold ``follower`` into ``linear``, or return why that would change a result."""
    op = linear.node.op
    if any(facts.is_shared(node.outputs[0]) for node in (linear.node, linear.last)):
        return f"the {op} output has another reader"
    if reason := linear.why_not(facts):
        return reason
    channels = linear.channels(facts)
    affine = affine_of(follower, channels, facts.opset)
    if isinstance(affine, str):
        return affine
    bias = linear.bias_numbers(channels)
    if bias is None:
        return f"the bias of the {op} is not one number per channel"
    factor = None
    with np.errstate(all="ignore"):  # what is not finite then is refused
        if affine.scale is not None:
            factor = affine.scale.reshape(linear.groups, -1, 1, 1)
            bias = bias * affine.scale
        if affine.shift is not None:
            bias = bias + affine.shift
    keeps_bias = linear.bias is None and affine.shift is None
    if reason := _rewrite(linear, factor, None if keeps_bias else bias, channels, facts):
        return reason
    output = follower.outputs[0]
    detach(follower)
    linear.last.outputs = [output]
    return None


def _rewrite(
    linear: Linear, factor: Doubles | None, bias: Doubles | None, channels: Channels, facts: Facts
) -> str | None:
    """Multiply the weights and replace the bias, or return why that cannot be.

    Args:
        linear: Changed only where None is returned.
        factor: What to multiply the weights by, see `Linear.scaled`; None leaves them alone.
        bias: The new bias, one number per output channel; None leaves it alone.
        channels: The output channels.
        facts: Of the graph.
    """
    node, weight = linear.node, linear.weight
    dtype = np.dtype(weight.dtype)
    becomes_gemm = node.op == "MatMul" and linear.adder is None and bias is not None
    if becomes_gemm and (channels.rank != 2 or len(weight.shape) != 2):
        return "a MatMul has no bias, and only one of two matrices can be a Gemm"
    if bias is not None and not (np.abs(bias) <= float(ml_dtypes.finfo(dtype).max)).all():
        return f"the folded bias does not fit {dtype.name}"
    if factor is not None:
        if facts.is_shared(weight):
            return f"the weights of the {node.op} are shared with another node"
        product = linear.scaled(factor)
        if product is None:
            return f"the folded weights do not fit {dtype.name}"
        weight.values = product
    if becomes_gemm:
        node.op = "Gemm"
    if bias is not None:
        _give_bias(linear, bias.astype(dtype), channels, facts)
    return None


def _give_bias(linear: Linear, numbers: Array, channels: Channels, facts: Facts) -> None:
    """Write the bias: over the old one where nobody else reads that, else as a new constant."""
    node = linear.last
    node.attrs.pop("beta", None)  # it is in the numbers
    if linear.adder is not None:
        numbers = channels.broadcast(numbers)
    if linear.bias is None:
        new = gs.Constant(facts.fresh_name(f"{node.name}.bias"), numbers)
        node.inputs = [*node.inputs[:2], new]
    elif facts.is_shared(linear.bias):
        new = gs.Constant(facts.fresh_name(f"{node.name}.bias"), numbers)
        node.inputs = [new if tensor is linear.bias else tensor for tensor in node.inputs]
    else:
        linear.bias.values = numbers


def _peek(constant: gs.Constant) -> Array:
    """Return the values of a constant without leaving a copy of them in it."""
    stored = constant._values
    values: Array = stored.load() if isinstance(stored, LazyValues) else stored
    return values
