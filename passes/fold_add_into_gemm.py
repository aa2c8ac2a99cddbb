r"""Fold a constant Add or Sub per column into the Gemm or MatMul before it.

    before                      after

    x   W   b                   x   W   b+t
     \  |  /                     \  |  /
      Gemm    t (constant)        Gemm
         \   /                      |
          Add                       y
           |
           y

Why it holds: (x W + b) + t = x W + (b + t), where t is one number for each column of W. beta goes
into the bias. A MatMul of two matrices becomes a Gemm; with more axes it has no bias, so its first
Add stays and takes up the next one. t - Gemm(x) is folded with -W and t - b. Equal up to rounding:
b + t is computed in float64 and rounded once.

Needs: W, b and t constant; t one number, or one per column.
Keeps: names of the Gemm, its weights and y. Weights that others share stay shared.
Skips, with the reason in the report: an output of the Gemm that another node or the caller reads; a
bias that differs from row to row; a bias that would leave the range of its type.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.linear import PRODUCTS, fold_into


class FoldAddIntoGemm(Pass):
    """Fold ``Add(Gemm(x, W, b), t)`` into ``Gemm(x, W, b+t)``; also Sub, and MatMul of matrices."""

    name = "fold-add-into-gemm"
    exactness = "equal up to rounding of the bias"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Fold what can be folded in ``graph``."""
        return fold_into(graph, facts, followers=("Add", "Sub"), into=PRODUCTS)
