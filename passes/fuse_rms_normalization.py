r"""Fuse a root mean square normalisation that is spelt out into one RMSNormalization.

    before                          after

    x                               x  scale
    |\                               \  |
    | Pow (2)                  RMSNormalization
    | ReduceMean                        |
    | Add (epsilon)                     y
    | Sqrt
    |/
    Div
    |
    Mul (scale)
    |
    y

Why it holds: this is the definition of RMSNormalization, the mean being taken over the last axes. The
variations met are the same in exact arithmetic: Mul of a value with itself for Pow; Reciprocal,
1 / sqrt or Pow (-0.5) and a Mul for Div; a scale that goes into the inverse first. Equal up to
rounding: how the sum is rounded is up to the runtime in both forms.

Types: where a float16 or bfloat16 value is cast to float32 before and back behind, the operator
computes in float32 too (``stash_type``); it also does for a float16 that is cast to float64, which
rounds to the same float16 but for the last digit. Else it computes in the type that the nodes did.

Needs: opset 23, to which an older model is raised; fixed extents of the axes normalised over; a
constant epsilon above 0.
Keeps: y and its name. A scale of ones is made where there is none; a scale that is computed, or that
varies along other axes, stays a node of its own behind.
Skips, with the reason in the report: a mean over axes that are not the last ones; a value on the way
that another node or the caller reads; other float64, as epsilon is a float32; a model that cannot be raised.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.normalization import fuse_over_last_axes


class FuseRmsNormalization(Pass):
    """Fuse ``x / sqrt(mean(x ** 2) + epsilon) * scale`` over the last axes."""

    name = "fuse-rms-normalization"
    group = "fuse"
    exactness = "equal up to rounding"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Fuse what can be fused in ``graph``."""
        return fuse_over_last_axes(facts, "RMSNormalization", since=23, centred=False)
