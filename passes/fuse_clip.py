r"""Fuse two operators that bound a value into one Clip, or one Relu.

    before          after

    x               x
    |               |
    Relu            Clip (0, 6)
    |               |
    Min (6)         y
    |
    y

Why it holds: Relu, Max and Min with a number, and Clip, bound a value from below, from above or both.
To bound it to [a, b] and then to [c, d] is to bound it once, to a and b bounded to [c, d] themselves.
NaN comes out as NaN in all of them. Exact; only the sign of a zero that meets a bound of 0 is open in
both forms.

Needs: bounds that are constants of one element, the lower not above the upper one; floats.
Keeps: y and its name. One Max or Min alone stays what it is.
Skips, with the reason in the report: a value in the middle that another node or the caller reads.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.clipping import bounds_of
from optc.passes.contract import Facts, Pass, Report
from optc.passes.match import become, made_by, names_of, number

BOUNDING = ("Clip", "Max", "Min", "Relu")


class FuseClip(Pass):
    """Fuse two of Relu, Clip, and Min or Max with a number, into one Clip."""

    name = "fuse-clip"
    group = "fuse"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Fuse what can be fused in ``graph``."""
        report = Report()
        for node in facts.nodes(*BOUNDING):
            value = _bounded(node)
            before = made_by(value, *BOUNDING)
            source = None if before is None else _bounded(before)
            if value is None or before is None or source is None:
                continue
            first, second = _interval(before, facts.opset), _interval(node, facts.opset)
            if first is None or second is None:
                continue
            if reason := _why_not(before, node, source, facts):
                report.skipped[node.name] = reason
                continue
            low, high = (min(max(bound, second[0]), second[1]) for bound in first)
            if _bound(node, source, low, high, facts):
                report.merged[node.name] = names_of(before, node)
        return report


def _bounded(node: gs.Node) -> gs.Tensor | None:
    """Return the input that ``node`` bounds, or None where it is none by a number."""
    if node.op in ("Clip", "Relu"):
        tensor: gs.Tensor = node.inputs[0]
        return tensor
    if len(node.inputs) != 2:
        return None
    variables = [tensor for tensor in node.inputs if number(tensor) is None]
    return variables[0] if len(variables) == 1 else None


def _interval(node: gs.Node, opset: int) -> tuple[float, float] | None:
    """Return the smallest and the largest value that ``node`` lets through."""
    low: float | None
    high: float | None
    if node.op == "Clip":
        low, high = bounds_of(node, opset)
    elif node.op == "Relu":
        low, high = 0.0, math.inf
    else:
        (bound,) = (value for value in map(number, node.inputs) if value is not None)
        low, high = (bound, math.inf) if node.op == "Max" else (-math.inf, bound)
    if low is None or high is None or not low <= high:  # not either where one is NaN
        return None
    if low == math.inf or high == -math.inf:  # nothing is left of the input, and no Clip says so
        return None
    return low, high


def _why_not(before: gs.Node, node: gs.Node, source: gs.Tensor, facts: Facts) -> str | None:
    if facts.is_shared(before.outputs[0]):
        return "the value in the middle has another reader"
    ranks = [
        len(tensor.shape)
        for n in (before, node)
        for tensor in n.inputs
        if isinstance(tensor, gs.Constant)
    ]
    rank = max(ranks, default=0)
    dims = facts.shapes.dims(source.name)
    if rank and (dims is None or len(dims) < rank):
        return "a constant of a higher rank widens it"
    return None


def _bound(node: gs.Node, source: gs.Tensor, low: float, high: float, facts: Facts) -> bool:
    """Let ``node`` bound ``source``; return whether there is an operator for its type."""
    dtype = facts.shapes.dtype(source.name)
    if dtype is None or dtype.name not in ("float16", "float32", "float64"):
        return False
    if (low, high) == (0, math.inf):
        become(node, "Relu", [source])
        return True
    bounds = {"min": low, "max": high}
    given = {name: bound for name, bound in bounds.items() if math.isfinite(bound)}
    if facts.opset < 11:
        if dtype != np.float32:
            return False
        become(node, "Clip", [source], given)
        return True
    inputs = [source]
    for name, bound in bounds.items():
        if math.isfinite(bound):
            constant = np.asarray(bound, dtype)
            inputs.append(gs.Constant(facts.fresh_name(f"{node.name}_{name}"), constant))
        else:
            inputs.append(gs.Variable.empty())
    while not inputs[-1].name:
        inputs.pop()
    become(node, "Clip", inputs)
    return True
