r"""Fold a constant Add or Sub per channel into the Convs behind it, where they pad nothing.

    before                      after

    x    t (constant)           x   W   b + sum(W*t)
     \  /                        \  |  /
     Add   W   b                  Conv
       \   |  /                     |
         Conv                       y
          |
          y

Why it holds: W (*) (x + t) + b = W (*) x + (b + W (*) t), and where nothing is padded W (*) t is
the same at all positions: the sum over input channels and kernel of W * t. x - t is the same with
-t, and t - x with -W. Where several Convs read the sum, it goes into all of them. Equal up to
rounding: the new bias is summed in float64 and rounded once.

Needs: W, b and t constant; t one number, or one per input channel; x known to have all the channels
that the Conv reads.
Keeps: names of the Conv, its weights and y.
Skips, with the reason in the report: a Conv that pads, and a ConvTranspose or DeformConv, as there
not every output sees all of the kernel; a sum that any other node or the caller reads; for t - x a
weight shared with a node that does not read it; a bias that would leave the range of its type.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.linear import CONVOLUTIONS, fold_back


class FoldAddBeforeConv(Pass):
    """Fold ``Conv(Add(x, t), W, b)`` into ``Conv(x, W, b + sum(W*t))``; also Sub."""

    name = "fold-add-before-conv"
    exactness = "equal up to rounding of the bias"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Fold what can be folded in ``graph``."""
        return fold_back(graph, facts, leaders=("Add", "Sub"), into=CONVOLUTIONS)
