r"""Fold a Neg, or a constant Mul or Div per channel, into the convolution before it.

    before                      after

    x   W   b                   x   s*W  s*b
     \  |  /                     \   |   /
      Conv    s (constant)         Conv
         \   /                       |
          Mul                        y
           |
           y

Why it holds: s * (W (*) x + b) = (s * W) (*) x + s * b, as s is constant over the spatial axes. It
is the same for ConvTranspose and DeformConv, for Conv(x) / s with 1/s, and for -Conv(x) with -1.
Equal up to rounding: the new weights are computed in float64 and rounded once.

Needs: W, b and s constant; s one number, or one per output channel.
Keeps: names of the Conv, its weights and y. Weights that several nodes share stay shared: they are
folded together where all are followed by the same s. Else they are copied, if they take no more than
64 KiB, like a shared bias.
Skips, with the reason in the report: a Conv output that another node or the caller reads; a larger
weight shared with a node that is not followed by s; weights that would leave the range of their type.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.linear import CONVOLUTIONS, fold_into


class FoldMulIntoConv(Pass):
    """Fold ``Mul(Conv(x, W, b), s)`` into ``Conv(x, s*W, s*b)``; also Div, Neg, all convolutions."""

    name = "fold-mul-into-conv"
    exactness = "equal up to rounding of the weights"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Fold what can be folded in ``graph``."""
        return fold_into(graph, facts, followers=("Mul", "Div", "Neg"), into=CONVOLUTIONS)
