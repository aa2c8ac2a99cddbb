r"""Fold a Neg, or a constant Mul or Div per column, into the Gemm or MatMul before it.

    before                      after

    x   W   b                   x   W*s  s*b
     \  |  /                     \   |   /
      Gemm    s (constant)         Gemm
         \   /                       |
          Mul                        y
           |
           y

Why it holds: s * (x W + b) = x (W * s) + s * b, where s is one number for each column of W. alpha
stays as it is, beta goes into the bias. A MatMul may have any number of axes, and an Add of a
constant may stand between it and the Mul. Neg is a Mul by -1. Equal up to rounding: new weights and bias are computed
in float64 and rounded once.

Needs: W, b and s constant; s one number, or one per column.
Keeps: names of the Gemm, its weights and y.
Skips, with the reason in the report: an output of the Gemm that another node or the caller reads; a
weight shared with a node that is not followed by s; a bias that differs from row to row; weights
that would leave the range of their type.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.linear import PRODUCTS, fold_into


class FoldMulIntoGemm(Pass):
    """Fold ``Mul(Gemm(x, W, b), s)`` into ``Gemm(x, W*s, s*b)``; also Div, Neg and MatMul."""

    name = "fold-mul-into-gemm"
    exactness = "equal up to rounding of weights and bias"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Fold what can be folded in ``graph``."""
        return fold_into(graph, facts, followers=("Mul", "Div", "Neg"), into=PRODUCTS)
