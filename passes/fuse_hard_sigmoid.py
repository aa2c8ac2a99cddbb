r"""Fuse a clipped straight line into one HardSigmoid.

    before               after

    x                    x
    |                    |
    Add (3)              HardSigmoid (1/6, 0.5)
    Clip (0, 6)          |
    Div (6)              y
    |
    y

Why it holds: HardSigmoid(x) = max(0, min(1, alpha * x + beta)). A line a * x + b that is clipped to
[0, c] and then multiplied with 1 / c is the one with alpha = a / c and beta = b / c. The line and the
factor may be written by Add, Sub, Mul and Div in any order. NaN comes out as NaN in both. Equal up to
rounding.

Needs: constants; float32 or float16.
Keeps: y and its name. A Clip alone stays a Clip.
Skips, with the reason in the report: a value on the way that another node or the caller reads.
"""

from __future__ import annotations

import math

import onnx_graphsurgeon as gs

from optc.passes.clipping import bounds_of
from optc.passes.contract import Facts, Pass, Report
from optc.passes.match import become, names_of
from optc.passes.polynomial import Polynomial, Reading, is_close, readings, tolerance_of


class FuseHardSigmoid(Pass):
    """Fuse ``clip(x + 3, 0, 6) / 6`` and its like into ``HardSigmoid(x)``."""

    name = "fuse-hard-sigmoid"
    group = "fuse"
    exactness = "equal up to rounding"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Fuse what can be fused in ``graph``."""
        report = Report()
        clips = facts.nodes("Clip")
        here = {id(node) for node in graph.nodes} if clips else frozenset()
        for clip in clips:
            low, high = bounds_of(clip, facts.opset)
            if low != 0 or high is None or not 0 < high < math.inf:
                continue
            found = [r for r in readings(clip, here, is_line) if _ends_at_one(r, high, facts)]
            if not found:
                continue
            usable = [reading for reading in found if reading.why_not(facts) is None]
            if not usable:
                report.skipped[found[0].last.name] = str(found[0].why_not(facts))
                continue
            best = max(usable, key=lambda reading: len(reading.nodes))
            report.merged[best.last.name] = names_of(*best.nodes)
            alpha, beta = (best.inner.get(term, 0.0) / high for term in ((1, 0), (0, 0)))
            become(best.last, "HardSigmoid", [best.x], {"alpha": alpha, "beta": beta})
        return report


def is_line(polynomial: Polynomial) -> bool:
    """Whether it is a * x + b with an a that is not 0."""
    return (1, 0) in polynomial and polynomial.keys() <= {(1, 0), (0, 0)}


def _ends_at_one(reading: Reading, high: float, facts: Facts) -> bool:
    """Whether the clipped value is scaled to [0, 1], and runtimes have the operator for its type."""
    tolerance = tolerance_of(reading.x, facts)
    dtype = facts.shapes.dtype(reading.x.name)
    return (
        tolerance is not None
        and dtype is not None
        and dtype.name != "bfloat16"
        and len(reading.nodes) > 1
        and is_close(reading.outer, {(0, 1): 1 / high}, tolerance)
    )
