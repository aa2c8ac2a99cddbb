r"""Fuse a GELU that is spelt out into one Gelu.

    before                                after

    x                                     x
    |\                                    |
    | Div (sqrt 2)                        Gelu
    | Erf                                 |
    | Add (1)                             y
    |/
    Mul
    |
    Mul (0.5)
    |
    y

Why it holds: Gelu is 0.5 * x * (1 + erf(x / sqrt(2))) by definition, and with approximate="tanh"
0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3))). Both are read as polynomials, so that
every order and grouping of their factors is seen: Mul for Div, x * x * x for a Pow, 0.5 at any place,
x * Phi(x) with Phi = 0.5 + 0.5 * erf. Equal up to rounding. Constants may be off by their own rounding.

Needs: opset 20, to which an older model is raised; float32, float16 or bfloat16.
Keeps: y and its name.
Skips, with the reason in the report: a value on the way that another node or the caller reads; a
model that cannot be raised.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.match import become, names_of
from optc.passes.polynomial import Polynomial, Reading, is_close, readings, tolerance_of

SINCE = 20
SLOPE = math.sqrt(2 / math.pi)

INNER: dict[str, Polynomial] = {
    "Erf": {(1, 0): math.sqrt(0.5)},
    "Tanh": {(1, 0): SLOPE, (3, 0): SLOPE * 0.044715},
}
"""Function -> what it is applied to."""

OUTER: Polynomial = {(1, 0): 0.5, (1, 1): 0.5}


class FuseGelu(Pass):
    """Fuse ``0.5 * x * (1 + erf(x / sqrt(2)))`` and its tanh form into ``Gelu(x)``."""

    name = "fuse-gelu"
    group = "fuse"
    exactness = "equal up to rounding"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Fuse what can be fused in ``graph``."""
        report = Report()
        functions = facts.nodes("Erf", "Tanh")
        here = {id(node) for node in graph.nodes} if functions else frozenset()
        for function in functions:
            found = _gelu(function, here, facts)
            if found is None:
                continue
            reason = found.why_not(facts)
            if reason is None and not facts.reach_opset(SINCE):
                reason = f"the model cannot be raised to opset {SINCE}"
            if reason is not None:
                report.skipped[found.last.name] = reason
                continue
            report.merged[found.last.name] = names_of(*found.nodes)
            attrs = {"approximate": "tanh"} if function.op == "Tanh" else {}
            become(found.last, "Gelu", [found.x], attrs)
        return report


def _gelu(function: gs.Node, here: Collection[int], facts: Facts) -> Reading | None:
    inner = INNER[function.op]
    for found in readings(function, here, lambda polynomial: polynomial.keys() == inner.keys()):
        if found.outer.keys() != OUTER.keys():
            continue
        tolerance = tolerance_of(found.x, facts)
        if (
            tolerance is not None
            and is_close(found.inner, inner, tolerance)
            and is_close(found.outer, OUTER, tolerance)
        ):
            return found
    return None
