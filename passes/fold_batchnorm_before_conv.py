r"""Fold a BatchNormalization into the Convs behind it, where they pad nothing.

    before                                  after

    x   gamma beta mean var                 x   W*s   b + sum(W*t)
     \    |    |    |   /                   \   |   /
     BatchNormalization   W   b               Conv
                       \  |  /                 |
                         Conv                   y
                          |
                          y

Why it holds: with s = gamma / sqrt(var + epsilon) and t = beta - s * mean, both constant, the
BatchNormalization is s * x + t per channel, and where nothing is padded

    W (*) (s * x + t) + b  =  (W * s) (*) x + (b + sum(W * t))

the sum going over input channels and kernel. Where several Convs read the result, it goes into all
of them. Equal up to rounding: new weights and bias are computed in float64 and rounded once.

Needs: W, b and the four constants of the BatchNormalization.
Keeps: names of the Conv, its weights and y.
Skips, with the reason in the report: a Conv that pads, and a ConvTranspose or DeformConv, as there
not every output sees all of the kernel; training mode; a result that any other node or the caller
reads; a weight shared with a node that does not read it; weights or a bias that would leave the
range of their type.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.linear import CONVOLUTIONS, fold_back


class FoldBatchnormBeforeConv(Pass):
    """Fold ``Conv(BatchNormalization(x), W, b)`` into ``Conv(x, W*s, b + sum(W*t))``."""

    name = "fold-batchnorm-before-conv"
    exactness = "equal up to rounding of weights and bias"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Fold what can be folded in ``graph``."""
        return fold_back(graph, facts, leaders=("BatchNormalization",), into=CONVOLUTIONS)
