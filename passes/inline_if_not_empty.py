r"""Replace an If that returns nothing where a tensor is empty by its other branch.

    before                                    after

    x                                         x
    |                                         |
    Shape, ReduceProd                         Cast, Mul, Add ...
    |                                         |
    Equal (0)                                 NonMaxSuppression
    |                                         |
    If then: [empty]                          y
    |  else: [x -> Cast, Mul, Add ...
    |              -> NonMaxSuppression -> k]
    y

Why it holds: the bound of what the branch returns along its first axis is 0 where x is empty. There it
returns what the If does, in the same shape: nothing. Exporters write such an If because the
branch looks for the largest of x, and no number is the largest of none; here minus infinity is, as
defined since opset 20.

Exact. TensorRT takes no extent that the data decides out of a branch: in the main graph it does.

Needs: an x whose other extents are known and not 0; a branch of operators that work on empty tensors.
Keeps: names of the branch's nodes and of y.
Skips, with the reason in the report: a branch that is not seen to return nothing where x is empty; an
operator in it that might not work then.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.dimension import Dim, Expression, substitute
from optc.passes.graph import all_nodes, detach, is_constant
from optc.passes.inline_constant_if import connect
from optc.passes.match import argument, is_number, made_by
from optc.passes.movement import axes_of
from optc.passes.replacement import Replacement

ELEMENTWISE = frozenset({"Add", "And", "Div", "Max", "Min", "Mul", "Or", "Sub"})
"""Operators that want extents which are the same, or 1. Integers are divided by constants only."""

ALWAYS = frozenset({"Abs", "Cast", "Identity", "Neg", "Not", "Shape", "Transpose", "Unsqueeze"})
"""Operators that take any tensor of their rank."""

EXTREMES = {"ReduceMax": -np.inf, "ReduceMin": np.inf}
"""Reductions that are not defined for an empty tensor -> what changes nothing in others."""


class InlineIfNotEmpty(Pass):
    """Replace an If that returns nothing where a tensor is empty by its other branch."""

    name = "inline-if-not-empty"
    group = "legalise"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Inline the branches of ``graph`` that may run on empty tensors too."""
        report = Report()
        for node in facts.nodes("If"):
            x = _tested(node.inputs[0])
            if x is None or not _returns_nothing(node.attrs["then_branch"]):
                continue
            if reason := _why_not(node, x, facts):
                report.skipped[node.name] = reason
                continue
            _inline(graph, node, facts, report)
        return report


def _tested(condition: gs.Tensor) -> gs.Tensor | None:
    """Return the tensor that is empty where ``condition`` is true."""
    equal = made_by(condition, "Equal")
    if equal is None or not is_number(equal.inputs[1], 0):
        return None
    size = made_by(equal.inputs[0], "ReduceProd", "Size")
    if size is None or size.op == "Size":
        return None if size is None else size.inputs[0]
    shape = made_by(size.inputs[0], "Shape")
    plain = shape is not None and not shape.attrs and argument(size, 1) is None
    return shape.inputs[0] if shape is not None and plain and "axes" not in size.attrs else None


def _returns_nothing(branch: gs.Graph) -> bool:
    return all(is_constant(tensor) and 0 in tensor.shape for tensor in branch.outputs)


def _why_not(node: gs.Node, x: gs.Tensor, facts: Facts) -> str | None:
    """Return why the If stays, or None."""
    count = _count(facts.shapes.dims(x.name))
    if count is None:
        return f"more than one extent of `{x.name}` decides whether it is empty"
    branches = node.attrs["then_branch"], node.attrs["else_branch"]
    for nothing, result in zip(*(branch.outputs for branch in branches), strict=True):
        dims = facts.shapes.dims(result.name)
        if (
            dims is None
            or (0, *dims[1:]) != tuple(nothing.shape)
            or not _is_nothing(dims[0], count, facts)
        ):
            return f"`{result.name}` is not seen to be empty where `{x.name}` is"
    for inner in branches[1].nodes:
        if not _takes_nothing(inner, facts):
            return f"`{inner.name}`, {inner.op}, is not seen to work on empty tensors"
    return None


def _count(dims: tuple[Dim, ...] | None) -> Expression | None:
    """Return the one extent that is not a number, where none of the others is 0."""
    found = [dim for dim in dims or () if not isinstance(dim, int)]
    return found[0] if len(found) == 1 and 0 not in (dims or ()) else None


def _is_nothing(dim: Dim, count: Expression, facts: Facts) -> bool:
    """Whether ``dim`` is 0 where ``count`` is."""
    if isinstance(dim, int) or dim == count:
        return dim == count or dim == 0
    upper = dim if dim.bare_symbol is None else facts.shapes.upper(dim.bare_symbol)
    if upper is None or upper == count or count.bare_symbol is None:
        return upper == count
    return substitute(upper, {count.bare_symbol: 0}) == 0


def _takes_nothing(node: gs.Node, facts: Facts) -> bool:
    """Whether ``node`` does what it says on tensors of any extents that are not known."""
    if node.domain:
        return False
    shapes = [facts.shapes.dims(tensor.name) for tensor in node.inputs if not is_constant(tensor)]
    known = [dims for dims in shapes if dims is not None]
    if len(known) != len(shapes):
        return False
    x = node.inputs[0]
    dtype = facts.dtype(x)
    is_float = dtype is not None and dtype.kind == "f"
    match node.op:
        case op if op in ALWAYS:
            return True
        case op if op in ELEMENTWISE:
            known += [tuple(t.shape) for t in node.inputs if is_constant(t)]
            return (op != "Div" or is_float) and _fit(known)
        case op if op in EXTREMES:
            return is_float and len(node.inputs) == 1 and _is_total(node)
        case "Gather":
            axis, index = node.attrs.get("axis", 0), argument(node, 1)
            extent = known[0][axis] if known else None
            return (
                isinstance(extent, int)
                and isinstance(index, gs.Constant)
                and bool(np.all((index.values < extent) & (index.values >= -extent)))
            )
        case "Squeeze":
            made = facts.shapes.dims(node.outputs[0].name)
            axes = axes_of(node, facts)
            return made is not None and axes is not None and all(known[0][a] == 1 for a in axes)
        case "NonMaxSuppression":
            boxes, scores = known[:2]
            return boxes[0] == scores[0] and boxes[1] == scores[2] and boxes[2] == 4
    return False


def _is_total(node: gs.Node) -> bool:
    return "axes" not in node.attrs and not node.attrs.get("keepdims", 1)


def _fit(shapes: Sequence[tuple[Dim, ...]]) -> bool:
    """Whether ``shapes`` broadcast whatever their symbols are."""
    rank = max(map(len, shapes))
    columns = zip(*((1,) * (rank - len(dims)) + tuple(dims) for dims in shapes), strict=True)
    return all(len({dim for dim in column if dim != 1}) <= 1 for column in columns)


def _inline(graph: gs.Graph, node: gs.Node, facts: Facts, report: Report) -> None:
    branch = node.attrs["else_branch"]
    for inner in all_nodes(node.attrs["then_branch"]):
        detach(inner)
    graph.nodes.extend(branch.nodes)
    for identity in connect(node, branch, facts):
        graph.nodes.append(identity)
        report.merged[identity.name] = (node.name,)
    for inner in all_nodes(branch):
        report.merged[inner.name] = (node.name, inner.name)
    for inner in branch.nodes:
        if inner.op in EXTREMES:
            _guard(graph, inner, facts, report)
    detach(node)
    graph.nodes = [each for each in graph.nodes if each is not node]
    report.removed[node.name] = "its branch returns nothing where it reads nothing"


def _guard(graph: gs.Graph, node: gs.Node, facts: Facts, report: Report) -> None:
    """Let a reduction see one element more, which changes nothing unless it is the only one."""
    new = Replacement(graph, facts, node)
    x = node.inputs[0]
    dtype = facts.shapes.dtype(x.name)
    assert dtype is not None, "_takes_nothing() lets no other input through"
    flat = new.add("Reshape", x, np.array([-1], np.int64))
    joined = new.add("Concat", flat, np.array([EXTREMES[node.op]], dtype), axis=0)
    new.finish(report, new.add(node.op, joined, keepdims=0))
