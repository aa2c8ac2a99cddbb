r"""Make one Gemm of a product of two matrices and what is added to it.

    before                      after

    a   b                       a   b   c
     \ /                         \  |  /
    MatMul   c                    Gemm
         \  /                       |
         Add                        y
          |
          y

Why it holds: that is what a Gemm computes, where c broadcasts to the rows and columns of a b and not
the other way round. Neither b nor c need be constant: c may be a residual or another product. A Gemm
without a bias takes c too. Equal up to rounding: the sum is rounded once where it was rounded twice.

Needs: a and b known to have two axes; c known to have no larger extent than a b; floats.
Keeps: name of the Add, y.
Skips, with the reason in the report: a product that another node or the caller reads.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.linear import FLOATS
from optc.passes.match import are_private, argument, become, either_way, made_by, names_of


class FuseMatmulAddIntoGemm(Pass):
    """Fuse ``Add(MatMul(a, b), c)`` into ``Gemm(a, b, c)``, for two matrices."""

    name = "fuse-matmul-add-into-gemm"
    group = "fuse"
    exactness = "equal up to rounding"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Fuse what can be fused in ``graph``."""
        report = Report()
        own: set[int] | None = None
        for add in facts.nodes("Add"):
            for made, addend in either_way(add):
                product = made_by(made, "MatMul", "Gemm")
                if product is None or made is addend or argument(product, 2) is not None:
                    continue
                own = own or {id(node) for node in graph.nodes}
                if id(product) not in own or not _is_gemm(product, addend, facts):
                    continue
                if not are_private([product], facts, within=[add]):
                    report.skipped[add.name] = f"the {product.op} output has another reader"
                    continue
                attrs = {key: value for key, value in product.attrs.items() if key != "beta"}
                become(add, "Gemm", [*product.inputs[:2], addend], attrs)
                report.merged[add.name] = names_of(product, add)
                break
        return report


def _is_gemm(product: gs.Node, addend: gs.Tensor, facts: Facts) -> bool:
    """Whether a Gemm takes what ``product`` multiplies, and ``addend`` as its bias."""
    made = product.outputs[0].name
    shapes = [facts.shapes.dims(t.name) for t in product.inputs[:2]]
    sum_of, added = facts.shapes.dims(made), facts.dims(addend)
    dtype = facts.shapes.dtype(made)
    if dtype is None or dtype.name not in FLOATS or (dtype.name == "bfloat16" and facts.opset < 13):
        return False
    if sum_of is None or added is None or len(added) > 2:
        return False
    if any(dims is None or len(dims) != 2 or 0 in dims for dims in shapes):
        return False
    return all(
        one == 1 or one == all_
        for one, all_ in zip(reversed(added), reversed(sum_of), strict=False)
    )
