r"""Fold a Neg, or a constant Mul or Div per column, into the Gemms and MatMuls behind it.

    before                      after

    x    s (constant)           x   W*s  b
     \  /                        \   |  /
     Mul   W   b                   Gemm
       \   |  /                     |
         Gemm                       y
          |
          y

Why it holds: (x * s) W + b = x (W * s) + b, where s is one number for each column of x, thus for
each row of W. It is the same for x / s with 1/s, for -x with -1, and for a MatMul of any number of
axes by one matrix. Where several read the product, it goes into all of them. An Add or Sub of t in
between stays, with t / s: s * x + t = s * (x + t / s). Equal up to rounding: the new weights and t / s
are computed in float64 and rounded once.

Needs: W and s constant; s one number, or one per column; x known to have all the columns that the
Gemm reads, so that the Mul does not repeat one of them.
Keeps: names of the Gemm, its weights and y.
Skips, with the reason in the report: a product that any other node or the caller reads; a weight
shared with a node that does not read it; weights that would leave the range of their type.
Order: after the passes that fuse, as a normalisation may end in such a Mul.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.linear import PRODUCTS, fold_back


class FoldMulBeforeGemm(Pass):
    """Fold ``Gemm(Mul(x, s), W, b)`` into ``Gemm(x, W*s, b)``; also Div, Neg and MatMul."""

    name = "fold-mul-before-gemm"
    exactness = "equal up to rounding of the weights"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Fold what can be folded in ``graph``."""
        return fold_back(graph, facts, leaders=("Mul", "Div", "Neg"), into=PRODUCTS)
