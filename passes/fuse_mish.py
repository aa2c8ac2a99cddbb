r"""Fuse a Mish that is spelt out into one Mish.

    before            after

    x                 x
    |\                |
    | Softplus        Mish
    | Tanh            |
    |/                y
    Mul
    |
    y

Why it holds: Mish is x * tanh(softplus(x)) by definition. Equal up to rounding.

Needs: opset 18, to which an older model is raised; float32 or float16.
Keeps: y and its name.
Skips, with the reason in the report: a value on the way that another node or the caller reads; a
model that cannot be raised.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.match import are_private, become, either_way, made_by, names_of

SINCE = 18


class FuseMish(Pass):
    """Fuse ``x * tanh(softplus(x))`` into ``Mish(x)``."""

    name = "fuse-mish"
    group = "fuse"
    exactness = "equal up to rounding"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Fuse what can be fused in ``graph``."""
        report = Report()
        found_softplus = facts.nodes("Softplus")
        here = {id(node) for node in graph.nodes} if found_softplus else frozenset()
        for softplus in found_softplus:
            found = _tanh_and_mul(softplus, here)
            if found is None:
                continue
            tanh, mul = found
            dtype = facts.shapes.dtype(softplus.inputs[0].name)
            if dtype is None or dtype.name not in ("float16", "float32"):
                continue  # nothing runs a Mish of another type
            if not are_private([softplus, tanh], facts, within=[tanh, mul]):
                report.skipped[mul.name] = "a value on the way has another reader"
            elif not facts.reach_opset(SINCE):
                report.skipped[mul.name] = f"the model cannot be raised to opset {SINCE}"
            else:
                report.merged[mul.name] = names_of(softplus, tanh, mul)
                become(mul, "Mish", [softplus.inputs[0]])
        return report


def _tanh_and_mul(softplus: gs.Node, here: Collection[int]) -> tuple[gs.Node, gs.Node] | None:
    """Return what makes a Mish of ``softplus``, or None."""
    for tanh in softplus.outputs[0].outputs:
        for mul in tanh.outputs[0].outputs:
            if tanh.op != "Tanh" or mul.op != "Mul" or tanh.domain or mul.domain:
                continue
            if id(mul) not in here:  # in a body it would run more often
                continue
            for first, second in either_way(mul):
                if first is softplus.inputs[0] and made_by(second, "Tanh") is tanh:
                    return tanh, mul
    return None
