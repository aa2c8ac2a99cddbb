r"""Fold a Mul or Div by one number into weights that are some nodes away.

    before                                  after

    x   W                                   x   s*W
     \ /                                     \  /
    MatMul  b                               MatMul  s*b
        \  /                                    \   /
        Add                                     Add
         |                                       |
      Reshape                                 Reshape
         |                                       |
     Transpose    s (one number)             Transpose
           \     /                               |
             Mul                                 q
              |
              q

Why it holds: what stands between passes a factor on. Reshape, Transpose and the like only move what
they are given; a product of two matrices, a mean and a sum are linear in each operand; Relu, maxima
and their like keep a factor that is above 0. So s * f(x W + b) = f(x (s * W) + s * b) where the
weights come before, and f(s * x) W = f(x) (s * W) where they come behind. That takes the 1 / sqrt(d)
out of an attention, whether it stands at the queries, at the keys or at their product.

Where queries, keys and values are made by one product and taken apart by Split, Slice or Gather, only
the columns of W and b that lead to the Mul are scaled: their other readers may read no such column.
Equal up to rounding: new weights and bias are computed in float64 and rounded once.

Needs: W, b and s constant; s one number. For a part of the columns, shapes that tell which.
Keeps: names of the weights, of the node that has them and of the outputs.
Skips, with the reason in the report: a value on the way that another node or the caller reads; a
weight shared with another node; weights that would leave the range of their type; float16 values
between weights and scale that would become larger, or more than 64 times smaller.
Order: after the passes that fuse, as an activation or an attention may end in such a Mul.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from optc.passes.affine import Refused, variable_of
from optc.passes.contract import Facts, Pass, Report
from optc.passes.dimension import Dim
from optc.passes.graph import detach, producer, redirect
from optc.passes.linear import (
    CONVOLUTIONS,
    FLOATS,
    PRODUCTS,
    Linear,
    linear_making,
    linear_reading,
    reads_linearly,
    scale_input,
    scale_outputs,
)
from optc.passes.match import argument

LINEAR = (*CONVOLUTIONS, *PRODUCTS)
MOVES = frozenset(
    {"Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)
"""Operators whose result is their first input in another order, or several times."""

PARTS = frozenset({"Gather", "Slice", "Split"})
"""Operators whose result is a part of their first input."""

SUMS = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum"})
MAXIMA = frozenset({"GlobalMaxPool", "LeakyRelu", "MaxPool", "ReduceMax", "ReduceMin", "Relu"})
"""Operators that keep a factor above 0."""

LARGEST_IN_HALF = 64.0
"""By how much a float16 between weights and scale may become smaller: its digits end at 6e-5."""

FURTHEST = 12
"""How many nodes may stand between: attentions have at most 7."""


class MoveScaleIntoWeights(Pass):
    """Fold ``s * f(MatMul(x, W))`` into ``f(MatMul(x, s*W))`` where f only moves, sums or multiplies."""

    name = "move-scale-into-weights"
    exactness = "equal up to rounding of weights and bias"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Fold what can be folded in ``graph``."""
        report = Report()
        own: set[int] | None = None
        for node in facts.nodes("Mul", "Div"):
            x, scale = variable_of(node), _scale(node)
            if x is None or scale is None:
                continue
            found = _before(x, scale, facts) or _behind(node, scale, facts)
            if found is None:
                continue
            linear, way = found
            own = own or {id(each) for each in graph.nodes}
            try:
                if not own.issuperset(map(id, (linear.node, linear.last, *way))):
                    raise Refused("the weights are in another graph")
                _require_same_rank(node, x, facts)
                is_behind = way[0] is node
                _require_range(linear, 1 / scale if is_behind else scale)
                if is_behind:
                    scale_input(linear, scale, node, facts)
                else:
                    numbers = _columns(linear, way, x, scale, facts)
                    scale_outputs(linear, numbers, node, facts)
            except Refused as refused:
                report.skipped[node.name] = str(refused)
                continue
            _take_out(node, x, facts)
            last = linear.last
            report.merged[last.name] = (*report.merged.get(last.name, (last.name,)), node.name)
        return report


def _scale(node: gs.Node) -> float | None:
    """Return the one number that ``node`` multiplies by, or None."""
    constant = (
        next(t for t in node.inputs if isinstance(t, gs.Constant)) if variable_of(node) else None
    )
    if constant is None or math.prod(constant.shape) != 1:
        return None
    if np.dtype(constant.dtype).name not in FLOATS:
        return None
    number = float(np.asarray(constant.values).reshape(()).astype(np.float64))
    if number == 0 or not math.isfinite(number):
        return None
    return 1 / number if node.op == "Div" else number


def _require_same_rank(node: gs.Node, x: gs.Tensor, facts: Facts) -> None:
    """Check that the constant, though one number, adds no axis."""
    axes = max(len(t.shape) for t in node.inputs if isinstance(t, gs.Constant))
    if axes:
        dims = facts.shapes.dims(x.name)
        if dims is None or len(dims) < axes:
            raise Refused(f"the {node.op} adds an axis, or may do so")


def _require_range(linear: Linear, factor: float) -> None:
    """Check that values between weights and scale, which change by ``factor``, stay in range."""
    if np.dtype(linear.weight.dtype) == np.float16 and not 1 / LARGEST_IN_HALF <= abs(factor) <= 1:
        raise Refused("float16 values between weights and scale would leave their range")


def _take_out(node: gs.Node, x: gs.Tensor, facts: Facts) -> None:
    """Remove ``node``; where what it makes must keep its name, ``x`` takes that over."""
    output, maker = node.outputs[0], producer(x)
    detach(node)
    if maker is None or not facts.is_kept(output):
        redirect(output, x)
        return
    outputs = [output if t is x else t for t in maker.outputs]
    maker.outputs.clear()
    maker.outputs.extend(outputs)
    redirect(x, output)


# --- the way -------------------------------------------------------------------------------------

Way = Sequence[gs.Node]
"""The nodes between weights and scale, in the order of the dataflow."""


def _passed(node: gs.Node, scale: float) -> Sequence[int]:
    """Return which inputs of ``node`` pass a factor on, alone, to all it makes; none if none does."""
    if node.domain:
        return ()
    if node.op == "MatMul":
        return (0, 1)
    if node.op in MOVES or node.op in PARTS or node.op in SUMS:
        return (0,)
    if node.op in MAXIMA and scale > 0 and not any(t.name for t in node.outputs[1:]):
        return (0,)
    return ()


def _before(x: gs.Tensor, scale: float, facts: Facts, steps: int = 0) -> tuple[Linear, Way] | None:
    """Return the linear node that ``x`` comes from, and the way from there, or None."""
    linear = linear_making(x, LINEAR)
    if linear is not None:
        return (linear, ()) if steps else None  # next to each other: that is for others
    node = producer(x)
    if node is None or steps == FURTHEST:
        return None
    for index in _passed(node, scale):
        found = _before(node.inputs[index], scale, facts, steps + 1)
        if found is not None:
            return found[0], (*found[1], node)
    return None


def _behind(node: gs.Node, scale: float, facts: Facts) -> tuple[Linear, Way] | None:
    """Return the linear node that reads what ``node`` makes, and the way to there, or None."""
    way = [node]
    while len(way) <= FURTHEST:
        made = way[-1].outputs
        if len([t for t in made if t.name]) != 1 or facts.is_shared(made[0]):
            return None
        reader: gs.Node = made[0].outputs[0]
        if reads_linearly(reader, made[0], LINEAR):
            return (linear_reading(reader, facts), way) if len(way) > 1 else None
        if not any(reader.inputs[index] is made[0] for index in _passed(reader, scale)):
            return None
        if sum(t is made[0] for t in reader.inputs) != 1:
            return None
        way.append(reader)
    return None


# --- columns -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Grid:
    """Which output channels a tensor is made of.

    Attributes:
        ids: Numbers of channels, over the axes of the tensor that they go along.
        axes: Those axes, in the order that ``ids`` has them.
        rank: How many axes the tensor has.
    """

    ids: npt.NDArray[np.int64]
    axes: tuple[int, ...]
    rank: int


def _columns(
    linear: Linear, way: Way, x: gs.Tensor, scale: float, facts: Facts
) -> npt.NDArray[np.float64]:
    """Return what to multiply each output channel of ``linear`` by.

    Raises:
        Refused: If one that leads to ``x`` also leads elsewhere.
    """
    linear.require_constants()
    channels = linear.channels(facts)
    start: gs.Tensor = linear.last.outputs[0]
    tensors = _tensors(start, way, x)
    taken = max((i for i, node in enumerate(way) if node.op in PARTS), default=-1)
    for tensor in tensors[taken + 1 :]:
        if facts.is_kept(tensor) or len(_readers(tensor)) != 1:
            raise Refused(f"`{tensor.name}`, between weights and scale, has another reader")
    if taken < 0:
        return np.full(channels.count, scale)
    everything = np.arange(channels.count)
    grids = [_Grid(everything, (channels.axis,), channels.rank)]
    for node, read, made in zip(way[: taken + 1], tensors, tensors[1:], strict=False):
        grids.append(_moved(grids[-1], node, read, made, facts))
    mine = np.unique(grids[-1].ids)
    for tensor, grid, node in zip(tensors, grids, way[: taken + 1], strict=False):
        if facts.is_kept(tensor):
            raise Refused(f"`{tensor.name}`, between weights and scale, has another reader")
        for ids in _read_elsewhere(tensor, grid, node, tensors, facts):
            if np.isin(mine, ids).any():
                raise Refused(f"`{tensor.name}`, between weights and scale, has another reader")
    numbers = np.ones(channels.count)
    numbers[mine] = scale
    return numbers


def _readers(tensor: gs.Tensor) -> list[gs.Node]:
    """Return who reads the elements of ``tensor``, not only its shape."""
    return [node for node in tensor.outputs if node.domain or node.op not in ("Shape", "Size")]


def _tensors(start: gs.Tensor, way: Way, x: gs.Tensor) -> list[gs.Tensor]:
    """Return what flows along the way: ``start``, ..., ``x``."""
    tensors = [start]
    for node, after in zip(way, (*way[1:], None), strict=True):
        read = [x] if after is None else after.inputs
        tensors.append(next(t for t in node.outputs if any(t is each for each in read)))
    return tensors


def _read_elsewhere(
    tensor: gs.Tensor, grid: _Grid, node: gs.Node, tensors: Sequence[gs.Tensor], facts: Facts
) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the channels that readers of ``tensor`` see, but for the outputs in ``tensors``."""
    if sum(t is tensor for t in node.inputs) != 1:
        yield grid.ids
    on_the_way = {id(t) for t in tensors}
    for reader in _readers(tensor):
        for made in reader.outputs:
            if id(made) in on_the_way or not (made.outputs or facts.is_kept(made)):
                continue
            takes_part = reader.op in PARTS and not reader.domain and reader.inputs[0] is tensor
            yield _moved(grid, reader, tensor, made, facts).ids if takes_part else grid.ids
        if not reader.outputs:
            yield grid.ids


def _moved(grid: _Grid, node: gs.Node, read: gs.Tensor, made: gs.Tensor, facts: Facts) -> _Grid:
    """Return the channels of ``made``, which ``node`` makes of ``read``.

    Raises:
        Refused: If that is not known.
    """
    moved = None
    before, after = facts.shapes.dims(read.name), facts.shapes.dims(made.name)
    if before is not None and after is not None and len(before) == grid.rank:
        match node.op:
            case "Identity":
                moved = grid
            case "Transpose":
                order = node.attrs.get("perm", [*range(grid.rank)][::-1])
                moved = _Grid(grid.ids, tuple(order.index(axis) for axis in grid.axes), grid.rank)
            case "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze":
                moved = _reshaped(grid, before, after)
            case "Gather" | "Slice" | "Split":
                moved = _part(grid, node, made, before, facts)
    if moved is None:
        raise Refused(f"it is not known which columns the {node.op} `{node.name}` takes")
    return moved


def _reshaped(grid: _Grid, before: Sequence[Dim], after: Sequence[Dim]) -> _Grid | None:
    """Return the channels after a change of shape, None where they meet other axes."""
    if grid.axes != tuple(range(grid.axes[0], grid.axes[0] + len(grid.axes))):
        return None
    first, last = grid.axes[0], grid.axes[-1] + 1
    count = grid.ids.size
    for start in range(len(after) + 1):
        for end in range(start, len(after) + 1):
            extents = [extent for extent in after[start:end] if isinstance(extent, int)]
            if len(extents) != end - start or math.prod(extents) != count:
                continue
            as_many_before = _same_product(before[:first], after[:start])
            if as_many_before or _same_product(before[last:], after[end:]):
                return _Grid(grid.ids.reshape(extents), tuple(range(start, end)), len(after))
    return None


def _same_product(one: Sequence[Dim], other: Sequence[Dim]) -> bool:
    """Whether two shapes are known to hold equally many elements, of which there may be none."""
    left = [extent for extent in one if extent != 1]
    right = [extent for extent in other if extent != 1]
    while left and right and left[-1] == right[-1]:
        left.pop(), right.pop()
    while left and right and left[0] == right[0]:
        left.pop(0), right.pop(0)
    numbers = [extent for extent in (*left, *right) if isinstance(extent, int)]
    if len(numbers) != len(left) + len(right):
        return False
    return math.prod(numbers[: len(left)]) == math.prod(numbers[len(left) :])


def _part(
    grid: _Grid, node: gs.Node, made: gs.Tensor, before: Sequence[Dim], facts: Facts
) -> _Grid | None:
    """Return the channels of a part, None where it is not known which one it is."""
    match node.op:
        case "Gather":
            axis = node.attrs.get("axis", 0) % grid.rank
            index = _value(node, 1, facts)
            if index is None or index.ndim > 1:
                return None
            extent = _extent(node.inputs[0], axis, facts)
            if axis in grid.axes and (extent is None or not np.all(np.abs(index) <= extent - 1)):
                return None  # the last one from the end, -extent, is not worth a rule
            return _taken(grid, axis, index)
        case "Split":
            axis = node.attrs.get("axis", 0) % grid.rank
            if axis not in grid.axes:
                return grid
            sizes = [_extent(t, axis, facts) for t in node.outputs]
            at = next(i for i, t in enumerate(node.outputs) if t is made)
            known = [size for size in sizes[: at + 1] if size is not None]
            if len(known) != at + 1:
                return None
            return _taken(grid, axis, np.arange(sum(known[:-1]), sum(known)))
    return _sliced(grid, node, before, facts)


def _sliced(grid: _Grid, node: gs.Node, before: Sequence[Dim], facts: Facts) -> _Grid | None:
    if "starts" in node.attrs:  # before opset 10
        starts, ends = (np.array(node.attrs[key]) for key in ("starts", "ends"))
        axes = np.array(node.attrs.get("axes", range(len(starts))))
        steps = np.ones_like(starts)
    else:
        values = [_value(node, index, facts) for index in range(1, len(node.inputs))]
        known = [value for value in values if value is not None]
        if len(known) != len(values):
            return None
        starts, ends, *more = known
        axes = more[0] if more else np.arange(len(starts))
        steps = more[1] if len(more) > 1 else np.ones_like(starts)
    for start, end, axis, step in zip(starts, ends, axes % grid.rank, steps, strict=True):
        if axis in grid.axes:
            extent = before[axis]
            if not isinstance(extent, int):
                return None
            # Python's own slices clamp as ONNX says, but for an end before the first element
            stop = None if step < 0 and end < -extent else int(end)
            grid = _taken(grid, int(axis), np.arange(extent)[int(start) : stop : int(step)])
    return grid


def _taken(grid: _Grid, axis: int, index: npt.NDArray[np.int64]) -> _Grid:
    """Return the channels at ``index`` of an axis; a single index takes the axis away."""
    ids, axes, rank = grid.ids, grid.axes, grid.rank
    if axis in axes:
        ids = np.take(ids, index, axes.index(axis))
        axes = tuple(each for each in axes if index.ndim or each != axis)
    if not index.ndim:
        axes, rank = tuple(each - (each > axis) for each in axes), rank - 1
    return _Grid(ids, axes, rank)


def _value(node: gs.Node, index: int, facts: Facts) -> npt.NDArray[np.int64] | None:
    value = facts.constant(argument(node, index))
    return None if value is None else value.astype(np.int64)


def _extent(tensor: gs.Tensor, axis: int, facts: Facts) -> int | None:
    dims = facts.shapes.dims(tensor.name)
    extent = None if dims is None else dims[axis]
    return extent if isinstance(extent, int) else None
