r"""Fuse a layer normalisation that is spelt out into one LayerNormalization.

    before                                       after

    x                                            x  scale  bias
    |\                                            \   |   /
    | ReduceMean                              LayerNormalization
    |/                                                |
    Sub ___                                           y
    |      \
    |      Pow (2)
    |      ReduceMean
    |      Add (epsilon)
    |      Sqrt
    |     /
    Div
    |
    Mul (scale)
    Add (bias)
    |
    y

Why it holds: this is the definition of LayerNormalization, the means being taken over the last axes.
The variations met are the same in exact arithmetic: Mul of a value with itself for Pow; Reciprocal,
1 / sqrt or Pow (-0.5) and a Mul for Div; a scale that goes into the inverse first; TensorFlow's and
Keras' x * r + (bias - mean * r) with r = scale / sqrt(...). Equal up to rounding: how the sums are rounded is
up to the runtime in both forms.

Types: where a float16 or bfloat16 value is cast to float32 before or within and back behind, the operator
computes in float32 too (``stash_type``); it also does for a float16 that is cast to float64, which
rounds to the same float16 but for the last digit. Else it computes in the type that the nodes did.

Needs: opset 17, to which an older model is raised; fixed extents of the axes normalised over; a
constant epsilon above 0.
Keeps: y and its name. A scale of ones is made where there is none; a scale or bias that is computed,
or that varies along other axes, stays a node of its own behind.
Skips, with the reason in the report: means over axes that are not the last ones, or not the same;
a value on the way that another node or the caller reads; other float64, as epsilon is a float32; a Cast
within that nothing undoes; a model that cannot be raised.

Not taken: a variance that is mean(x ** 2) - mean(x) ** 2. In floats that is not the same up to
rounding: where the mean is large it cancels, down to a negative variance.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.normalization import fuse_over_last_axes


class FuseLayerNormalization(Pass):
    """Fuse ``(x - mean) / sqrt(variance + epsilon) * scale + bias`` over the last axes."""

    name = "fuse-layer-normalization"
    group = "fuse"
    exactness = "equal up to rounding"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Fuse what can be fused in ``graph``."""
        return fuse_over_last_axes(facts, "LayerNormalization", since=17, centred=True)
