r"""Fold a constant Add or Sub per channel into the convolution before it.

    before                      after

    x   W   b                   x   W   b+t
     \  |  /                     \  |  /
      Conv    t (constant)        Conv
         \   /                      |
          Add                       y
           |
           y

Why it holds: (W (*) x + b) + t = W (*) x + (b + t), as t is constant over the spatial axes; so it
is for ConvTranspose and DeformConv. Conv(x) - t is the same with -t, and t - Conv(x) with -W and
t - b. Equal up to rounding: b + t is computed in float64 and rounded once.

Needs: W, b and t constant; t one number, or one per output channel. A Conv with no bias gets one.
Keeps: names of the Conv, its weights and y. Weights that others share stay shared.
Skips, with the reason in the report: a Conv output that another node or the caller reads; a bias
that would leave the range of its type; t - Conv(x) where W is shared with another node.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.linear import CONVOLUTIONS, fold_into


class FoldAddIntoConv(Pass):
    """Fold ``Add(Conv(x, W, b), t)`` into ``Conv(x, W, b+t)``; also Sub, other convolutions."""

    name = "fold-add-into-conv"
    exactness = "equal up to rounding of the bias"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Fold what can be folded in ``graph``."""
        return fold_into(graph, facts, followers=("Add", "Sub"), into=CONVOLUTIONS)
