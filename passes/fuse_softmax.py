r"""Fuse a Softmax or LogSoftmax that is spelt out, over the last axis.

    before                      after

    x                           x
    |\                          |
    | ReduceMax                 Softmax (-1)
    |/                          |
    Sub                         y
    |
    Exp
    |\
    | ReduceSum
    |/
    Div
    |
    y

Why it holds: Softmax is exp(x) / sum(exp(x)) by definition; with the maximum subtracted, as it is here
and in every runtime, nothing overflows. The Div may be a Mul with the Reciprocal. x - max - log(sum)
is the LogSoftmax. Equal up to rounding.

Without the maximum it overflows where the operator does not, and the logarithm of a Softmax has lost
what was below the smallest number: neither is the same on every input, and both stay.

Over other axes than the last one nothing is done: onnxruntime then takes up to 38 times as long for
the operator, which it transposes, as for its parts.

Needs: float32, float16 or float64; a known rank.
Keeps: y and its name.
Skips, with the reason in the report: another axis; a value on the way that another node or the caller
reads.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.match import are_private, argument, become, either_way, made_by, names_of
from optc.passes.movement import axes_of


class FuseSoftmax(Pass):
    """Fuse ``exp(x - max) / sum`` into ``Softmax(x)``, and its logarithm into ``LogSoftmax(x)``."""

    name = "fuse-softmax"
    group = "fuse"
    exactness = "equal up to rounding"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Fuse what can be fused in ``graph``."""
        report = Report()
        for last in facts.nodes("Div", "Mul", "Sub"):
            nodes = _parts(last)
            if nodes is None:
                continue
            highest, *_, total = nodes
            x = highest.inputs[0]
            dims, dtype = facts.shapes.dims(x.name), facts.shapes.dtype(x.name)
            if not dims or dtype is None or dtype.name not in ("float16", "float32", "float64"):
                continue
            if not all(_is_over_last(node, len(dims), facts) for node in (highest, total)):
                report.skipped[last.name] = "it is not over the last axis alone"
            elif not are_private(nodes, facts, within=[*nodes, last]):
                report.skipped[last.name] = "a value on the way has another reader"
            else:
                report.merged[last.name] = names_of(*nodes, last)
                op = "LogSoftmax" if last.op == "Sub" else "Softmax"
                become(last, op, [x], {"axis": len(dims) - 1})
        return report


def _parts(last: gs.Node) -> list[gs.Node] | None:
    """Return the nodes before ``last``, from the ReduceMax to the ReduceSum, or None."""
    match last.op:
        case "Div":
            return _of_quotient(last.inputs[0], last.inputs[1], [])
        case "Mul":
            for exponential, inverse in either_way(last):
                reciprocal = made_by(inverse, "Reciprocal")
                if reciprocal is not None:
                    return _of_quotient(exponential, reciprocal.inputs[0], [reciprocal])
            return None
    log = made_by(last.inputs[1], "Log")
    total = None if log is None else made_by(log.inputs[0], "ReduceSum")
    exp = None if total is None else made_by(total.inputs[0], "Exp")
    if log is None or total is None or exp is None or exp.inputs[0] is not last.inputs[0]:
        return None
    shifted = _shifted(exp.inputs[0])
    return None if shifted is None else [*shifted, exp, log, total]


def _of_quotient(
    exponential: gs.Tensor, divisor: gs.Tensor, between: list[gs.Node]
) -> list[gs.Node] | None:
    exp, total = made_by(exponential, "Exp"), made_by(divisor, "ReduceSum")
    if exp is None or total is None or total.inputs[0] is not exponential:
        return None
    shifted = _shifted(exp.inputs[0])
    return None if shifted is None else [*shifted, exp, *between, total]


def _shifted(tensor: gs.Tensor) -> list[gs.Node] | None:
    """Return the ReduceMax and the Sub of x - max(x), or None."""
    sub = made_by(tensor, "Sub")
    highest = None if sub is None else made_by(sub.inputs[1], "ReduceMax")
    if sub is None or highest is None or highest.inputs[0] is not sub.inputs[0]:
        return None
    return [highest, sub]


def _is_over_last(node: gs.Node, rank: int, facts: Facts) -> bool:
    """Whether a reduction keeps all axes and is over the last one alone."""
    if not node.attrs.get("keepdims", 1):
        return False
    axes = axes_of(node, facts)
    return axes in ([-1], [rank - 1]) or (rank == 1 and _is_over_all(node, axes))


def _is_over_all(node: gs.Node, axes: list[int] | None) -> bool:
    return not axes and argument(node, 1) is None and not node.attrs.get("noop_with_empty_axes")
