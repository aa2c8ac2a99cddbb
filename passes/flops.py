"""How much arithmetic each node of a graph does, and how much it moves: where the work is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.dimension import Dim
from optc.passes.graph import bodies_of, nodes_in, op_key, reads
from optc.passes.shape import Shapes
from optc.specs.compile_spec import LARGEST_DIM, Range


def flops(graph: gs.Graph, shapes: Shapes, profile: Mapping[str, Range]) -> dict[str, int]:
    """Return the floating-point operations of each node of ``graph``, by name.

    A multiply-add of a convolution, matrix product, recurrence or attention counts 2; any other
    operator counts 1 for each element it returns. An If counts as its costlier branch, a Loop or
    Scan as its body times the number of rounds.

    Args:
        graph: The graph.
        shapes: What was inferred of it.
        profile: Its ``opt`` extents are counted at. An axis that the data decides counts at its
            bound, one that nothing bounds counts 1.
    """
    count = _Count(shapes, profile)
    return {node.name: count.of_node(node) for node in graph.nodes}


@dataclass(frozen=True, slots=True)
class Traffic:
    """What running a node moves.

    Attributes:
        bytes: What it reads and writes, weights included.
        steps: How many nodes run for it: itself, and round for round those of its bodies.
    """

    bytes: int
    steps: int = 1


def traffic(graph: gs.Graph, shapes: Shapes, profile: Mapping[str, Range]) -> dict[str, Traffic]:
    """Return what each node of ``graph`` moves, by name.

    A node reads its inputs and writes its outputs, once. What only gives a tensor another shape moves
    nothing, and a Gather or Slice reads no more than it returns. Bodies count as in `flops`.

    Args:
        graph: The graph.
        shapes: What was inferred of it.
        profile: Extents are taken as in `flops`. What has no known type counts as float32.
    """
    count = _Count(shapes, profile)
    return {node.name: count.traffic_of(node) for node in graph.nodes}


def tensor_bytes(
    graph: gs.Graph, shapes: Shapes, profile: Mapping[str, Range]
) -> Callable[[str], int]:
    """Return what tells the bytes of a tensor of ``graph`` by its name, extents as in `flops`."""
    count = _Count(shapes, profile)
    tensors = {tensor.name: tensor for tensor in graph.inputs}
    tensors.update((tensor.name, tensor) for node in graph.nodes for tensor in node.outputs)
    return lambda name: count.bytes_of(tensors[name])


class _Count:
    def __init__(self, shapes: Shapes, profile: Mapping[str, Range]) -> None:
        self.shapes = shapes
        self.profile = profile
        self.extents: dict[Dim, int] = {}

    def of_node(self, node: gs.Node) -> int:
        bodies = bodies_of(node)
        if bodies:
            work = [sum(map(self.of_node, body.nodes)) for body in bodies]
            return max(work) if node.op == "If" else self.rounds(node) * sum(work)
        rule = _RULES.get(op_key(node))
        if rule is not None:
            found = rule(self, node)
            if found is not None:
                return found
        return sum(self.volume(self.dims(tensor) or ()) for tensor in node.outputs if tensor.name)

    def traffic_of(self, node: gs.Node) -> Traffic:
        own = self.moved_by(node)
        bodies = [[self.traffic_of(inner) for inner in body.nodes] for body in bodies_of(node)]
        if not bodies:
            return Traffic(own)
        moved = [sum(each.bytes for each in body) for body in bodies]
        steps = [sum(each.steps for each in body) for body in bodies]
        if node.op == "If":
            return Traffic(own + max(moved), 1 + max(steps))
        rounds = self.rounds(node)
        return Traffic(own + rounds * sum(moved), 1 + rounds * sum(steps))

    def moved_by(self, node: gs.Node) -> int:
        if not node.domain and node.op in _VIEWS:
            return 0
        made = sum(self.bytes_of(tensor) for tensor in node.outputs if tensor.name)
        read = [self.bytes_of(tensor) for tensor in reads(node)]
        if not node.domain and node.op in _SELECTIONS and read:
            read[0] = min(read[0], made)
        return made + sum(read)

    def bytes_of(self, tensor: gs.Tensor) -> int:
        """Return the bytes of a tensor; one of unknown rank counts as one element."""
        if isinstance(tensor, gs.Constant):
            dtype, dims = tensor.dtype, tuple(tensor.shape)
        else:
            dtype, dims = self.shapes.dtype(tensor.name), self.dims(tensor) or ()
        return self.volume(dims) * (4 if dtype is None else np.dtype(dtype).itemsize)

    def rounds(self, node: gs.Node) -> int:
        """Return how often the body of a Loop or Scan runs, 1 where nothing says."""
        if node.op == "Loop":
            value = self.shapes.value(node.inputs[0].name)
            if value is not None and value.size == 1:
                limit = value.reshape(-1)[0]
                bound = None if limit is None else self.shapes.bound_at_opt(limit, self.profile)
                if bound is not None and bound <= LARGEST_DIM:
                    return bound
            return 1
        scans = int(node.attrs.get("num_scan_inputs", 0))
        axes = node.attrs.get("scan_input_axes") or [0] * scans
        dims = self.dims(node.inputs[-1]) if node.inputs else None
        return dims[axes[-1]] if axes and dims and -len(dims) <= axes[-1] < len(dims) else 1

    def dims(self, tensor: gs.Tensor) -> tuple[int, ...] | None:
        """Return the extents of a tensor as they are counted; None where its rank is unknown."""
        dims = self.shapes.dims(tensor.name) if tensor.name else None
        return None if dims is None else tuple(map(self.extent, dims))

    def extent(self, dim: Dim) -> int:
        if isinstance(dim, int):
            return dim
        if dim not in self.extents:
            bound = self.shapes.bound_at_opt(dim, self.profile)
            self.extents[dim] = 1 if bound is None else bound
        return self.extents[dim]

    @staticmethod
    def volume(dims: tuple[int, ...]) -> int:
        return math.prod(dims)

    def input(self, node: gs.Node, index: int, rank: int = 1) -> tuple[int, ...] | None:
        """Return the extents of an input with at least ``rank`` axes; None where it has not."""
        dims = self.dims(node.inputs[index]) if index < len(node.inputs) else None
        return dims if dims is not None and len(dims) >= rank else None

    def output(self, node: gs.Node) -> int | None:
        dims = self.dims(node.outputs[0])
        return None if dims is None else self.volume(dims)


def _conv(count: _Count, node: gs.Node, at: int = 1) -> int | None:
    weight, made = count.input(node, at, rank=3), count.output(node)
    return None if weight is None or made is None else 2 * made * math.prod(weight[1:])


def _quantised_conv(count: _Count, node: gs.Node) -> int | None:
    return _conv(count, node, at=3)


def _conv_transpose(count: _Count, node: gs.Node) -> int | None:
    source, weight = count.input(node, 0), count.input(node, 1, rank=3)
    if source is None or weight is None:
        return None
    return 2 * math.prod(source) * math.prod(weight[1:])


def _gemm(count: _Count, node: gs.Node) -> int | None:
    left, made = count.input(node, 0, rank=2), count.output(node)
    if left is None or made is None:
        return None
    return 2 * made * left[0 if node.attrs.get("transA", 0) else 1]


def _matmul(count: _Count, node: gs.Node) -> int | None:
    left, made = count.input(node, 0), count.output(node)
    return None if left is None or made is None else 2 * made * left[-1]


def _einsum(count: _Count, node: gs.Node) -> int | None:
    terms = str(node.attrs.get("equation", "")).replace(" ", "").partition("->")[0].split(",")
    if len(terms) < 2 or len(terms) != len(node.inputs):
        return None
    extents: dict[str, int] = {}
    middle = 1
    for index, term in enumerate(terms):
        dims = count.input(node, index, rank=0)
        head, _, tail = term.partition("...")
        if dims is None or len(head) + len(tail) > len(dims):
            return None
        ends = (*dims[: len(head)], *dims[len(dims) - len(tail) :])
        for letter, extent in zip(head + tail, ends, strict=True):
            extents[letter] = max(extent, extents.get(letter, 1))
        middle = max(middle, math.prod(dims[len(head) : len(dims) - len(tail)]))
    return 2 * (len(terms) - 1) * middle * math.prod(extents.values())


def _recurrence(gates: int) -> Callable[[_Count, gs.Node], int | None]:
    def count_it(count: _Count, node: gs.Node) -> int | None:
        source, weight = count.input(node, 0, rank=3), count.input(node, 2, rank=3)
        if source is None or weight is None:
            return None
        steps, hidden = source[0] * source[1], weight[2]
        return 2 * weight[0] * steps * gates * hidden * (source[2] + hidden)

    return count_it


def _attention(count: _Count, node: gs.Node) -> int | None:
    query, key, value = (count.input(node, index, rank=3) for index in range(3))
    if query is None or key is None or value is None or len(query) != len(key):
        return None
    past = count.input(node, 4, rank=4)
    keys = key[-2] + (past[-2] if past is not None else 0)
    rows = math.prod(query[:-1])  # of each head where heads are an axis, else of all at once
    width = value[-1] if len(query) == 4 else query[-1] * value[-1] // max(1, key[-1])
    return 2 * rows * keys * (query[-1] + width)


def _fused_matmul(count: _Count, node: gs.Node) -> int | None:
    left, made = count.input(node, 0, rank=2), count.output(node)
    if left is None or made is None:
        return None
    return 2 * made * left[-2 if node.attrs.get("transA", 0) else -1]


def _projected_attention(count: _Count, node: gs.Node) -> int | None:
    """Count com.microsoft's Attention, which computes queries, keys and values itself."""
    source, weight, made = count.input(node, 0, 3), count.input(node, 1, 2), count.output(node)
    if source is None or weight is None or made is None:
        return None
    batch, length, width = source
    projected = batch * length * width * weight[1]
    sizes = node.attrs.get("qkv_hidden_sizes") or [weight[1] // 3] * 3
    return 2 * (projected + batch * length * length * (int(sizes[0]) + int(sizes[2])))


def _quantised_lstm(count: _Count, node: gs.Node) -> int | None:
    source, weight = count.input(node, 0, rank=3), count.input(node, 1, rank=3)
    if source is None or weight is None:
        return None
    hidden = weight[2] // 4
    return 2 * weight[0] * source[0] * source[1] * weight[2] * (source[2] + hidden)


_VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Shape", "Size", "Squeeze", "Unsqueeze"})
"""What reads no element, or gives the elements it has another shape."""

_SELECTIONS = frozenset({"Gather", "GatherElements", "GatherND", "Slice"})
"""What reads of its first input no more than it returns."""

MICROSOFT = "com.microsoft"

_RULES: dict[tuple[str, str], Callable[[_Count, gs.Node], int | None]] = {
    ("", "Conv"): _conv,
    ("", "ConvInteger"): _conv,
    ("", "DeformConv"): _conv,
    ("", "QLinearConv"): _quantised_conv,
    ("", "ConvTranspose"): _conv_transpose,
    ("", "Gemm"): _gemm,
    ("", "MatMul"): _matmul,
    ("", "MatMulInteger"): _matmul,
    ("", "QLinearMatMul"): _matmul,
    ("", "Einsum"): _einsum,
    ("", "RNN"): _recurrence(1),
    ("", "GRU"): _recurrence(3),
    ("", "LSTM"): _recurrence(4),
    ("", "Attention"): _attention,
    (MICROSOFT, "Attention"): _projected_attention,
    (MICROSOFT, "DynamicQuantizeLSTM"): _quantised_lstm,
    (MICROSOFT, "DynamicQuantizeMatMul"): _matmul,
    (MICROSOFT, "FusedConv"): _conv,
    (MICROSOFT, "FusedGemm"): _gemm,
    (MICROSOFT, "FusedMatMul"): _fused_matmul,
    (MICROSOFT, "MatMulIntegerToFloat"): _matmul,
    (MICROSOFT, "MultiHeadAttention"): _attention,
    (MICROSOFT, "QGemm"): _gemm,
    (MICROSOFT, "QLinearConv"): _quantised_conv,
    (MICROSOFT, "TransposeMatMul"): _fused_matmul,
}
"""Domain, "" for the default one, and operator -> its rule."""


def is_product(node: gs.Node) -> bool:
    """Whether ``node``, or one in its bodies, multiplies matrices: what engines are for."""
    return any(op_key(each) in _RULES for each in nodes_in(node))
