"""What the passes that move data share: the shape a Reshape must say, and what a Slice takes.

Sizes are the expressions of shape inference. What they say holds for every input that the model
allows, except in the branch of an If that is not taken: ask `Facts.conditional` before sizes are
written out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts
from optc.passes.dimension import Dim
from optc.passes.match import argument
from optc.passes.shape import Shapes

THE_END = 2**63 - 1
"""Beyond every axis: how ONNX writes a slice that goes to the end."""

BEFORE_ALL = -(2**31)
"""Before every axis: the end of a slice that goes backwards to the first element."""

SLICE_READS_CUTS = 10
"""The first opset in which Slice reads starts, ends and axes."""

AXES_ARE_INPUT = {"ReduceSum": 13, "Squeeze": 13, "Unsqueeze": 13}
"""Op -> the first opset in which it reads its axes; for the other reductions it is 18."""

RESHAPING = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze"})
"""Operators that keep the elements in their order."""

SMALL = 4096
"""Constants of more elements are not read: no axis list, no list of sizes is as long."""


def integers(tensor: gs.Tensor | None) -> list[int] | None:
    """Return the elements of a constant that is a short list of integers; else None."""
    if not isinstance(tensor, gs.Constant) or len(tensor.shape) != 1 or tensor.shape[0] > SMALL:
        return None
    value = np.asarray(tensor.values)
    return [int(element) for element in value] if value.dtype.kind in "iu" else None


def sizes(facts: Facts, stem: str, numbers: Iterable[int]) -> gs.Constant:
    """Return a new constant: a list of integers."""
    return gs.Constant(facts.fresh_name(stem), np.array(list(numbers), np.int64))


def axes_of(node: gs.Node, facts: Facts) -> list[int] | None:
    """Return the axes that a Squeeze, Unsqueeze or reduction is given, as attribute or as input.

    Returns:
        None where it is given none, or where only the run knows them.
    """
    axes = node.attrs.get("axes", facts.constant(argument(node, 1)))
    return None if axes is None else [int(axis) for axis in np.ravel(axes)]


def reads_axes(op: str, opset: int) -> bool:
    """Whether a Squeeze, Unsqueeze or reduction reads its axes, rather than has them as attribute."""
    return opset >= AXES_ARE_INPUT.get(op, 18)


def perm_of(node: gs.Node, shapes: Shapes) -> list[int] | None:
    """Return the permutation of a Transpose; None where the rank decides it and is not known."""
    if "perm" in node.attrs:
        return [int(axis) for axis in node.attrs["perm"]]
    dims = shapes.dims(node.inputs[0].name)
    return None if dims is None else list(range(len(dims)))[::-1]


def composed(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...]:
    """Return the permutation of a Transpose by ``first``, then by ``second``."""
    return tuple(first[axis] for axis in second)


def inverse(perm: Sequence[int]) -> tuple[int, ...]:
    """Return the permutation of the Transpose that undoes one by ``perm``."""
    return tuple(sorted(range(len(perm)), key=perm.__getitem__))


def reshape_target(source: Sequence[Dim], goal: Sequence[Dim], shapes: Shapes) -> list[int] | None:
    """Return what a Reshape must say to make ``goal`` of ``source``.

    An extent that is no number is copied from its axis (0) or computed (-1).

    Returns:
        None where two extents would have to be computed, or one beside an extent that may be zero.
    """
    target = []
    copied = []
    for axis, extent in enumerate(goal):
        if isinstance(extent, int) and extent > 0:
            target.append(extent)
        elif axis < len(source) and extent == source[axis]:
            target.append(0)
            copied.append(extent)
        else:
            target.append(-1)
    if target.count(-1) > 1:
        return None
    if -1 in target and any(shapes.interval(extent)[0] < 1 for extent in copied):
        return None
    return target


@dataclass(frozen=True, slots=True)
class Cut:
    """What a Slice takes along one axis, as ONNX writes it."""

    start: int
    end: int
    step: int = 1

    def indices(self, extent: int) -> range:
        """Return the indices it takes from an axis of ``extent``."""
        start, end = (edge + extent if edge < 0 else edge for edge in (self.start, self.end))
        low, high = (0, extent) if self.step > 0 else (-1, extent - 1)
        start = min(max(start, 0), high)
        return range(start, min(max(end, low), high), self.step)

    def then(self, later: Cut, extent: Dim) -> Cut | None:
        """Return the cut that does this one on an axis of ``extent``, then ``later``."""
        if isinstance(extent, int):
            first = self.indices(extent)
            second = later.indices(len(first))
            start, end = (first.start + first.step * at for at in (second.start, second.stop))
            return cut_of(range(start, end, first.step * second.step)) if second else Cut(0, 0)
        edges = (self.start, self.end, later.start, later.end)
        if self.step == later.step == 1 and min(edges) >= 0:
            start = min(self.start + later.start, THE_END)
            return Cut(start, min(self.end, self.start + later.end, THE_END))
        return None


def cut_of(indices: range) -> Cut:
    """Return the cut that takes ``indices``, of which there is at least one."""
    # An end of -1 would mean the last element; what comes before the first is below every axis.
    return Cut(indices.start, indices.stop if indices.stop >= 0 else BEFORE_ALL, indices.step)


def cuts_of(node: gs.Node, shapes: Shapes) -> dict[int, Cut] | None:
    """Return what a Slice with constant inputs (opset 10 or later) takes, by axis from 0."""
    starts, ends = integers(argument(node, 1)), integers(argument(node, 2))
    dims = shapes.dims(node.inputs[0].name)
    if starts is None or ends is None or dims is None:
        return None
    axes: list[int] | None = list(range(len(starts)))
    steps: list[int] | None = [1] * len(starts)
    if (given := argument(node, 3)) is not None:
        axes = integers(given)
    if (given := argument(node, 4)) is not None:
        steps = integers(given)
    if axes is None or steps is None:
        return None
    cuts = map(Cut, starts, ends, steps)
    return {axis % len(dims): cut for axis, cut in zip(axes, cuts, strict=True)}


def write_cuts(node: gs.Node, cuts: dict[int, Cut], facts: Facts) -> None:
    """Let the Slice ``node`` take ``cuts``."""
    axes = sorted(cuts)
    lists = {
        "starts": [cuts[axis].start for axis in axes],
        "ends": [cuts[axis].end for axis in axes],
        "axes": axes,
        "steps": [cuts[axis].step for axis in axes],
    }
    if set(lists["steps"]) == {1}:
        del lists["steps"]
    source = node.inputs[0]
    node.inputs.clear()
    node.inputs.append(source)
    node.inputs.extend([sizes(facts, f"{node.name}_{noun}", of) for noun, of in lists.items()])


def readers_of(tensor: gs.Tensor, facts: Facts, here: Collection[int]) -> list[gs.Node]:
    """Return the nodes that read ``tensor``; none where somebody outside of ``here`` does.

    Where each of them does the work of its producer too, that one is gone.

    Args:
        tensor: One that a node makes.
        facts: Tells whether it must stay.
        here: ``id()`` of the nodes of the graph at hand: readers in bodies are not among them.
    """
    readers = list({id(node): node for node in tensor.outputs}.values())
    if facts.is_kept(tensor) or any(id(node) not in here for node in readers):
        return []
    return readers
