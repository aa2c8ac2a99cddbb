r"""Let a Gemm read what a Transpose before it reads.

    before                      after

    a                           a   b
    |                            \ /
    Transpose   b               Gemm (transA = 1)
           \   /                  |
           Gemm                   y
             |
             y

Why it holds: transA and transB are that Transpose, of the one or the other factor. A MatMul of two
matrices is a Gemm without a bias. The sums are the same ones, in an order that is up to the runtime.

Needs: a Transpose of two axes that only Gemms and MatMuls of matrices read, as their factors: else
it would stay. For a MatMul opset 11, which the model is raised to; floats.
Keeps: names of the Gemms and y.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.graph import detach
from optc.passes.linear import FLOATS


class FuseTransposeIntoGemm(Pass):
    """Fuse ``Gemm(Transpose(a), b)`` into ``Gemm(a, b)`` with transA; also b, and MatMul."""

    name = "fuse-transpose-into-gemm"
    group = "fuse"
    exactness = "equal up to rounding"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Fuse what can be fused in ``graph``."""
        report = Report()
        own: set[int] | None = None
        for transpose in facts.nodes("Transpose"):
            turned = transpose.outputs[0]
            readers = list({id(node): node for node in turned.outputs}.values())
            if not readers or facts.is_kept(turned) or not _turns_a_matrix(transpose, facts):
                continue
            own = own or {id(node) for node in graph.nodes}
            if not all(id(node) in own and _takes(node, turned, facts) for node in readers):
                continue
            if any(node.op == "MatMul" for node in readers) and not facts.reach_opset(11):
                continue
            for node in readers:
                _take(node, turned, transpose.inputs[0])
                report.merged[node.name] = (
                    transpose.name,
                    *report.merged.get(node.name, (node.name,)),
                )
            detach(transpose)
        return report


def _turns_a_matrix(transpose: gs.Node, facts: Facts) -> bool:
    order = transpose.attrs.get("perm")
    if order is not None:
        return list(order) == [1, 0]
    dims = facts.shapes.dims(transpose.inputs[0].name)
    return dims is not None and len(dims) == 2


def _takes(node: gs.Node, turned: gs.Tensor, facts: Facts) -> bool:
    """Whether ``node`` reads ``turned`` only as a factor, and can be a Gemm."""
    if node.domain or node.op not in ("Gemm", "MatMul"):
        return False
    if any(tensor is turned for tensor in node.inputs[2:]):
        return False
    if node.op == "Gemm":
        return True
    other = next((t for t in node.inputs if t is not turned), turned)
    dtype = facts.shapes.dtype(turned.name)
    dims = facts.dims(other)
    if dims is None or len(dims) != 2 or 0 in dims:
        return False
    if dtype is None or dtype.name not in FLOATS:
        return False
    return dtype.name != "bfloat16" or facts.opset >= 13


def _take(node: gs.Node, turned: gs.Tensor, matrix: gs.Tensor) -> None:
    """Let ``node`` be a Gemm that reads ``matrix`` where it read ``turned``."""
    node.op = "Gemm"
    for index, flag in enumerate(("transA", "transB")):
        if node.inputs[index] is turned:
            node.inputs[index] = matrix
            node.attrs[flag] = 1 - int(node.attrs.get(flag, 0))
            if not node.attrs[flag]:
                del node.attrs[flag]
