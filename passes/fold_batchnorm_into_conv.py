r"""Fold a BatchNormalization into the convolution before it.

    before                                  after

    x   W   b                               x   s*W  s*b+t
     \  |  /                                 \   |   /
      Conv   gamma beta mean var               Conv
         \     |    |    |   /                   |
         BatchNormalization                      y
                |
                y

Why it holds: with s = gamma / sqrt(var + epsilon) and t = beta - s * mean, both constant, the
BatchNormalization is s * c + t per channel c, and

    s * (W (*) x + b) + t  =  (s * W) (*) x + (s * b + t)

It is the same for ConvTranspose and DeformConv. Equal up to rounding: new weights and bias are
computed in float64 and rounded once.

Needs: W, b and the four constants of the BatchNormalization.
Keeps: names of the Conv, its weights and y. Weights that several nodes share stay shared: they are
folded together where all get the same s. Else they are copied, if they take no more than 64 KiB, like
a shared bias. A BatchNormalization that nothing takes stays as it is: it is never spelt out as Mul and
Add.
Skips, with the reason in the report: training mode; statistics for each position (spatial=0, before
opset 9); var + epsilon not above 0; a Conv output that another node or the caller reads; a larger
weight shared with a node that does not get the same s; weights that would leave the range of their
type.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.linear import CONVOLUTIONS, fold_into


class FoldBatchnormIntoConv(Pass):
    """Fold ``BatchNormalization(Conv(x, W, b))`` into ``Conv(x, s*W, s*b+t)``; also other ones."""

    name = "fold-batchnorm-into-conv"
    exactness = "equal up to rounding of weights and bias"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Fold what can be folded in ``graph``."""
        return fold_into(graph, facts, followers=("BatchNormalization",), into=CONVOLUTIONS)
