r"""Fold a BatchNormalization into the Gemm or MatMul before it.

    before                                  after

    x   W   b                               x   W*s  s*b+t
     \  |  /                                 \   |   /
      Gemm   gamma beta mean var               Gemm
         \     |    |    |   /                   |
         BatchNormalization                      y
                |
                y

Why it holds: with s = gamma / sqrt(var + epsilon) and t = beta - s * mean, both constant, the
BatchNormalization is s * c + t per channel c, and these are the columns of a product of matrices.
alpha stays as it is, beta goes into the bias. Equal up to rounding: new weights and bias are
computed in float64 and rounded once.

Needs: W, b and the four constants of the BatchNormalization; a product with two axes, as a
BatchNormalization works on axis 1. A MatMul becomes a Gemm, or keeps the Add that holds its bias.
Keeps: names of the Gemm, its weights and y. One that nothing takes stays as it is.
Skips, with the reason in the report: training mode; a result with more than two axes; a bias that
differs from row to row; an output of the Gemm that another node or the caller reads; a weight
shared with a node that does not get the same s; weights that would leave the range of their type.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.linear import PRODUCTS, fold_into


class FoldBatchnormIntoGemm(Pass):
    """Fold ``BatchNormalization(Gemm(x, W, b))`` into ``Gemm(x, W*s, s*b+t)``; also MatMul."""

    name = "fold-batchnorm-into-gemm"
    exactness = "equal up to rounding of weights and bias"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Fold what can be folded in ``graph``."""
        return fold_into(graph, facts, followers=("BatchNormalization",), into=PRODUCTS)
