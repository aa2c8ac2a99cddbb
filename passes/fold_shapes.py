r"""Replace computed sizes by what they always are.

    before                          after

    x [batch, 8, 32, 32]            x    (0, 8, -1)
    |  \                             \   /
    |  Shape                        Reshape
    |    |
    |  Gather 0     Gather 1
    |    |              |
    |     \             |     -1
    |      \            |     /
     \      Concat ----------
      \     /
      Reshape

Why it holds: shape inference follows the arithmetic of exporters exactly, as expressions over the
symbols of the graph's inputs, each of at least 1 where no range says otherwise.

- An integer or boolean tensor of up to 1024 elements that comes out the same in every run becomes a
  constant. What only it was computed from is gone.
- The target of a Reshape becomes a constant where each extent is a number, is that of the same axis
  of the input (0: copied), or is the only one left (-1: the number of elements decides it). Where
  there was no -1 before, it is written only beside extents that are never zero: with none of them
  zero there is one answer.
- The target of an Expand becomes a constant where each extent is a number or that of the input's
  axis (1: kept).
- The ends of a Slice become constants where each is a number or the end of the axis.

Skips, with the reason in the report: a target or an end that only the run knows. In the branches of
an If only conditions of an If become constants: the extents at hand may belong to the other branch, and
sizes that are written out where they do not fit together make onnxruntime refuse the model. A condition
that is to stay (`optc.passes.branch_check`) stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.dimension import Dim
from optc.passes.graph import is_constant, remove_dead
from optc.passes.match import argument
from optc.passes.movement import THE_END
from optc.passes.shape import Shapes


class FoldShapes(Pass):
    """Replace computed sizes by what they always are."""

    name = "fold-shapes"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Fold in ``graph``."""
        report = Report()
        relieved = _fold_values(graph, facts)
        for node in () if facts.conditional else graph.nodes:
            if node.op in _TARGETS and not node.domain:
                _fold_target(node, facts, report)
        for node in remove_dead(graph, facts.kept):
            report.removed[node.name] = "the sizes it computes are known"
        for name in relieved:
            if name not in report.removed:
                report.merged[name] = (name,)
        return report


def _fold_values(graph: gs.Graph, facts: Facts) -> list[str]:
    """Turn known values into constants and return the nodes that no longer make them."""
    relieved = []
    for node in graph.nodes:
        for index, tensor in enumerate(node.outputs):
            if facts.conditional and (not _is_condition(tensor) or facts.is_kept(tensor)):
                continue
            value = facts.shapes.constant(tensor.name)
            if value is None or value.dtype.kind not in "biu":
                continue
            if not tensor.outputs and not facts.is_kept(tensor):
                continue  # nobody would notice
            # A Split or an If may not leave an output out, so the place is taken by another name.
            spare = gs.Variable(
                facts.fresh_name(f"{tensor.name}_unread"), tensor.dtype, tensor.shape
            )
            node.outputs[index] = spare
            tensor.to_constant(np.array(value, order="C"))  # for all readers, in bodies too
            relieved.append(node.name)
    return relieved


def _is_condition(tensor: gs.Tensor) -> bool:
    return any(
        node.op == "If" and not node.domain and node.inputs[0] is tensor for node in tensor.outputs
    )


def _fold_target(node: gs.Node, facts: Facts, report: Report) -> None:
    index, known = _TARGETS[node.op]
    if index >= len(node.inputs) or is_constant(node.inputs[index]):
        return
    target = node.inputs[index]
    value = facts.shapes.value(target.name)
    dims = facts.shapes.dims(node.inputs[0].name)
    if value is None or value.ndim != 1 or dims is None:
        return  # nothing is known of it: no pattern of ours
    extents = known(node, facts.shapes, dims, list(value))
    if extents is None:
        report.skipped[node.name] = f"only the run knows what `{target.name}` says"
        return
    name = facts.fresh_name(f"{node.name}_{_NOUNS[node.op]}")
    dtype = facts.shapes.dtype(target.name) or np.dtype(np.int64)
    node.inputs[index] = gs.Constant(name, np.array(extents, dtype))
    _correct(node.outputs[0], facts.shapes)
    report.merged[node.name] = (node.name,)


def _correct(tensor: gs.Tensor, shapes: Shapes) -> None:
    """Let a declared shape of another rank give way: with a constant target, everyone sees it."""
    dims = shapes.dims(tensor.name)
    if dims is not None and tensor.shape is not None and len(tensor.shape) != len(dims):
        tensor.shape = [dim if isinstance(dim, int) else None for dim in dims]


def _reshape_target(
    node: gs.Node, shapes: Shapes, dims: Sequence[Dim], target: Sequence[Any]
) -> list[int] | None:
    zero_is_zero = bool(node.attrs.get("allowzero", 0))
    if zero_is_zero and 0 in target:
        return None
    found: list[int | None] = []
    others: list[Dim] = []
    for axis, extent in enumerate(target):
        if isinstance(extent, int) and extent > 0:
            found.append(extent)
        elif axis < len(dims) and (extent == 0 or extent == dims[axis]):
            found.append(0)
            others.append(dims[axis])
        else:
            found.append(None)  # an expression, -1, or not known
    if found.count(None) > 1:
        return None
    if (
        None in found
        and target[found.index(None)] != -1
        and any(shapes.interval(extent)[0] < 1 for extent in others)
    ):
        return None
    if zero_is_zero:
        del node.attrs["allowzero"]
    return [-1 if extent is None else extent for extent in found]


def _expand_target(
    node: gs.Node, shapes: Shapes, dims: Sequence[Dim], target: Sequence[Any]
) -> list[int] | None:
    found = []
    for axis, extent in enumerate(target):
        own = axis - len(target) + len(dims)
        if own >= 0 and extent == dims[own]:
            found.append(1)
        elif isinstance(extent, int):
            found.append(extent)
        else:
            return None
    return found


def _slice_ends(
    node: gs.Node, shapes: Shapes, dims: Sequence[Dim], target: Sequence[Any]
) -> list[int] | None:
    axes: Sequence[Any] = range(len(target))
    if (given := argument(node, 3)) is not None:
        known = shapes.constant(given.name)
        if known is None:
            return None
        axes = [int(axis) for axis in known]
    steps: Sequence[Any] = [1] * len(target)
    if (given := argument(node, 4)) is not None:
        known = shapes.constant(given.name)
        if known is None:
            return None
        steps = [int(step) for step in known]
    end = 2**31 - 1 if shapes.dtype(node.inputs[2].name) == np.int32 else THE_END
    found = []
    for extent, axis, step in zip(target, axes, steps, strict=True):
        if isinstance(extent, int):
            found.append(extent)
        elif step > 0 and extent is not None and shapes.interval(extent - dims[axis])[0] >= 0:
            found.append(end)
        else:
            return None
    return found


Known = Callable[[gs.Node, Shapes, Sequence[Dim], Sequence[Any]], list[int] | None]

_TARGETS: dict[str, tuple[int, Known]] = {
    "Reshape": (1, _reshape_target),
    "Expand": (1, _expand_target),
    "Slice": (2, _slice_ends),
}
_NOUNS = {"Reshape": "target", "Expand": "target", "Slice": "ends"}
