r"""Fold a Neg, or a constant Mul or Div per channel, into the convolutions behind it.

    before                      after

    x    s (constant)           x   W*s  b
     \  /                        \   |  /
     Mul   W   b                   Conv
       \   |  /                     |
         Conv                       y
          |
          y

Why it holds: W (*) (s * x) + b = (W * s) (*) x + b, where s is one number for each input channel;
the zeros of a padding stay zero. It is the same for ConvTranspose, for DeformConv, for x / s with
1/s, and for -x with -1. Where several convolutions read the product, it goes into all of them. An Add
or Sub of t in between stays, with t / s: s * x + t = s * (x + t / s).
Equal up to rounding: the new weights are computed in float64 and rounded once.

Needs: W and s constant; s one number, or one per input channel; x known to have all the channels
that the Conv reads, so that the Mul does not repeat one of them.
Keeps: names of the Conv, its weights and y.
Skips, with the reason in the report: a product that any other node or the caller reads; a weight
shared with a node that does not read the product; weights that would leave the range of their type.
Order: after the passes that fuse, as x * clip(x + 3, 0, 6) / 6 ends in such a Div.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.linear import CONVOLUTIONS, fold_back


class FoldMulBeforeConv(Pass):
    """Fold ``Conv(Mul(x, s), W, b)`` into ``Conv(x, W*s, b)``; also Div, Neg, all convolutions."""

    name = "fold-mul-before-conv"
    exactness = "equal up to rounding of the weights"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Fold what can be folded in ``graph``."""
        return fold_back(graph, facts, leaders=("Mul", "Div", "Neg"), into=CONVOLUTIONS)
