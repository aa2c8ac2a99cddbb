r"""Spell the determinant of small matrices out as a sum of products.

    before               after

    x [..., n, n]        x
    |                    |
    Det                  Reshape [..., n*n]
    |                    |
    y [...]              Gather of n factors for each of the n! permutations, Mul
                         |
                         Mul by the signs, ReduceSum
                         |
                         y

Why it holds: it is Leibniz's formula, the sum over all permutations of the sign times the product of
one element a row. Equal up to rounding, relative to the products: a matrix that is close to singular
has a determinant that is far smaller than they are, and as inexact as with elimination.

Needs: matrices of static extent, 1 to 4. The axes before them may be dynamic.
Keeps: the name of y.
Skips, with the reason in the report: larger matrices, whose products are too many (120 for 5); float64;
shapes that are not known.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.replacement import Operand, Replacement

LARGEST = 4
"""Extent of the largest matrix that is spelt out, in 24 products."""


class DecomposeDet(Pass):
    """Spell Det of matrices of up to 4 rows out as products and a sum."""

    name = "decompose-det"
    group = "legalise"
    exactness = "equal up to rounding"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Spell out every small Det of ``graph``."""
        report = Report()
        for node in facts.nodes("Det"):
            [x] = node.inputs
            dims, dtype = facts.shapes.dims(x.name), facts.shapes.dtype(x.name)
            extent = None if dims is None or dims[-1:] != dims[-2:-1] else dims[-1]
            if dims is None or dtype is None or not isinstance(extent, int):
                report.skipped[node.name] = "the shape or type of its matrices is not known"
            elif not 1 <= extent <= LARGEST:
                report.skipped[node.name] = f"matrices of {extent} rows have too many products"
            elif dtype == np.float64:
                report.skipped[node.name] = "it computes in float64"
            else:
                new = Replacement(graph, facts, node)
                new.finish(report, _spelt_out(x, extent, len(dims), dtype, new))
        return report


def _spelt_out(
    x: gs.Tensor, extent: int, rank: int, dtype: np.dtype[np.generic], new: Replacement
) -> gs.Tensor:
    """Return the determinants of matrices of ``extent`` rows."""
    orders = np.array(list(permutations(range(extent))), np.int64)
    identity = np.identity(extent)
    signs = np.array([round(np.linalg.det(identity[order])) for order in orders], dtype)
    flat = new.add("Reshape", x, np.array([0] * (rank - 2) + [extent * extent], np.int64))
    products: Operand = signs
    for row in range(extent):
        factors = new.add("Gather", flat, row * extent + orders[:, row], axis=rank - 2)
        products = new.add("Mul", products, factors)
    assert isinstance(products, gs.Tensor), "there is a row at least"
    return new.along("ReduceSum", products, [rank - 2], keepdims=0)
