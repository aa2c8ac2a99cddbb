r"""Fold a constant Add or Sub per column into the Gemms and MatMuls behind it.

    before                      after

    x    t (constant)           x   W   b + tW
     \  /                        \  |  /
     Add   W   b                  Gemm
       \   |  /                     |
         Gemm                       y
          |
          y

Why it holds: (x + t) W + b = x W + (b + t W), where t is one number for each column of x. x - t is
the same with -t, and t - x with -W. A MatMul of two matrices becomes a Gemm; with more axes it needs
an Add of a constant right behind it, which takes t W up. Where several read the sum, it goes into
all of them. Equal up to rounding: t W is summed in float64, and b + t W is rounded once.

Needs: W, b and t constant; t one number, or one per column; x known to have all the columns that the
Gemm reads.
Keeps: names of the Gemm, its weights and y.
Skips, with the reason in the report: a sum that any other node or the caller reads; a MatMul of more
axes without a bias; for t - x a weight shared with a node that does not read it; a bias that would
leave the range of its type.
Order: after the passes that fuse, as a normalisation may end in such an Add.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.linear import PRODUCTS, fold_back


class FoldAddBeforeGemm(Pass):
    """Fold ``Gemm(Add(x, t), W, b)`` into ``Gemm(x, W, b + tW)``; also Sub and MatMul."""

    name = "fold-add-before-gemm"
    exactness = "equal up to rounding of the bias"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Fold what can be folded in ``graph``."""
        return fold_back(graph, facts, leaders=("Add", "Sub"), into=PRODUCTS)
