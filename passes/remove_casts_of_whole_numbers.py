r"""Read a float itself in place of the integer it was cast to, where it is that integer.

    before                                  after

    x                                       x
    |                                       |
    Round, Add 3, Clip [0, 255]             Round, Add 3, Clip [0, 255]
    |                                       |
    Cast (to uint8)                         |
    |                                       |
    Cast (to float)                         |
    |                                       |
    Sub 3                                   Sub 3

Why it holds: the values are whole numbers in the range of the integer type by the way they are made:
rounded or integers before, then moved, added and clipped by constants. No zero among them has a sign,
which the integer would not keep. What is not a number has no integer that the specification defines.

This is what quantised arithmetic becomes where it is computed in floats. TensorRT has no uint8 inside
an engine.

Keeps: names of outputs. The first Cast stays where others read the integers.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.match import made_by, names_of
from optc.passes.whole_number import whole_of


class RemoveCastsOfWholeNumbers(Pass):
    """Read a float itself in place of the integer it was cast to, where it is that integer."""

    name = "remove-casts-of-whole-numbers"
    group = "clean"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Skip what can be skipped in ``graph``; a Cast that is left casts to its own type."""
        report = Report()
        for cast in facts.nodes("Cast"):
            before = made_by(cast.inputs[0], "Cast")
            if before is None:
                continue
            source, integers = before.inputs[0], facts.shapes.dtype(cast.inputs[0].name)
            dtype, goal = facts.shapes.dtype(source.name), facts.shapes.dtype(cast.outputs[0].name)
            if integers is None or dtype is None or goal is None or dtype.kind != "f":
                continue
            whole = whole_of(source, facts)
            # An integer that is too large for another wraps around, a float is out of range.
            if (
                whole is not None
                and whole.fits(integers)
                and (goal.kind == "f" or whole.fits(goal))
            ):
                cast.inputs[0] = source
                report.merged[cast.name] = names_of(before, cast)
        return report
