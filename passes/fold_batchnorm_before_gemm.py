r"""Fold a BatchNormalization into the Gemms and MatMuls behind it.

    before                                  after

    x   gamma beta mean var                 x   W*s   b + tW
     \    |    |    |   /                   \   |   /
     BatchNormalization   W   b               Gemm
                       \  |  /                 |
                         Gemm                   y
                          |
                          y

Why it holds: with s = gamma / sqrt(var + epsilon) and t = beta - s * mean, both constant, the
BatchNormalization is s * x + t per column of x, and (s * x + t) W + b = x (W * s) + (b + t W). A
MatMul of two matrices becomes a Gemm. Where several read the result, it goes into all of them.
Equal up to rounding: new weights and bias are computed in float64 and rounded once.

Needs: W, b and the four constants of the BatchNormalization; x of two axes.
Keeps: names of the Gemm, its weights and y.
Skips, with the reason in the report: training mode; a result that any other node or the caller
reads; a weight shared with a node that does not read it; x transposed by the Gemm; weights or a bias
that would leave the range of their type.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.linear import PRODUCTS, fold_back


class FoldBatchnormBeforeGemm(Pass):
    """Fold ``Gemm(BatchNormalization(x), W, b)`` into ``Gemm(x, W*s, b + tW)``; also MatMul."""

    name = "fold-batchnorm-before-gemm"
    exactness = "equal up to rounding of weights and bias"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Fold what can be folded in ``graph``."""
        return fold_back(graph, facts, leaders=("BatchNormalization",), into=PRODUCTS)
