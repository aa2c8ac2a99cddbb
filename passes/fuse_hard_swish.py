r"""Fuse a HardSwish that is spelt out into one HardSwish.

    before                    after

    x                         x
    |\                        |
    | Add (3)                 HardSwish
    | Clip (0, 6)             |
    |/                        y
    Mul
    |
    Div (6)
    |
    y

Why it holds: HardSwish is x * max(0, min(1, x / 6 + 0.5)) by definition. The division may stand
anywhere behind the Clip, be a Mul, or be in a HardSigmoid with alpha 1/6 and beta 0.5. Equal up to
rounding, and free of the overflow of x * 6 where that was written first.

Needs: opset 14, to which an older model is raised; float32 or float16.
Keeps: y and its name.
Skips, with the reason in the report: a value on the way that another node or the caller reads; a
model that cannot be raised.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_graphsurgeon as gs

from optc.passes.clipping import bounds_of
from optc.passes.contract import Facts, Pass, Report
from optc.passes.fuse_hard_sigmoid import is_line
from optc.passes.match import become, names_of
from optc.passes.polynomial import Reading, is_close, readings, tolerance_of

SINCE = 14


class FuseHardSwish(Pass):
    """Fuse ``x * clip(x + 3, 0, 6) / 6`` into ``HardSwish(x)``."""

    name = "fuse-hard-swish"
    group = "fuse"
    exactness = "equal up to rounding"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Fuse what can be fused in ``graph``."""
        report = Report()
        functions = facts.nodes("Clip", "HardSigmoid")
        here = {id(node) for node in graph.nodes} if functions else frozenset()
        for function in functions:
            found = _hard_swish(function, here, facts)
            if found is None:
                continue
            reason = found.why_not(facts)
            if reason is None and not facts.reach_opset(SINCE):
                reason = f"the model cannot be raised to opset {SINCE}"
            if reason is not None:
                report.skipped[found.last.name] = reason
                continue
            report.merged[found.last.name] = names_of(*found.nodes)
            become(found.last, "HardSwish", [found.x])
        return report


def _hard_swish(function: gs.Node, here: Collection[int], facts: Facts) -> Reading | None:
    if function.op == "Clip":
        scale, offset, (low, high) = 1.0, 0.0, bounds_of(function, facts.opset)
    else:  # max(0, min(1, scale * x + offset))
        scale, offset = function.attrs.get("alpha", 0.2), function.attrs.get("beta", 0.5)
        low, high = 0.0, 1.0
    if low != 0 or high is None or high <= 0:
        return None
    for found in readings(function, here, is_line):
        if found.outer.keys() != {(1, 1)}:
            continue
        tolerance = tolerance_of(found.x, facts)
        dtype = facts.shapes.dtype(found.x.name)
        if tolerance is None or dtype is None or dtype.name == "bfloat16":
            continue
        # The line that is clipped to [0, 1], and the factor that then is left.
        line = {
            (1, 0): scale * found.inner[1, 0] / high,
            (0, 0): (scale * found.inner.get((0, 0), 0.0) + offset) / high,
        }
        if is_close(line, {(1, 0): 1 / 6, (0, 0): 0.5}, tolerance) and is_close(
            found.outer, {(1, 1): 1 / high}, tolerance
        ):
            return found
    return None
