"""Which conditions in the branches of an If must not become constants.

With the extents at hand one branch of an If may be such that its nodes do not fit together: a model
for two sample rates has one branch for each, and a chunk that is right for one is wrong for the other.
Where such a branch decides by its own sizes, say whether it removes an axis, writing the decision out
gives a node a tensor of a rank that it does not take. The branch would never have run; but onnxruntime
infers shapes before it runs anything, and refuses the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_graphsurgeon as gs
from onnx import shape_inference

from optc.passes.fold_constants import FoldConstants
from optc.passes.fold_shapes import FoldShapes
from optc.passes.graph import all_nodes, captures, skeleton
from optc.passes.inline_constant_if import InlineConstantIf
from optc.passes.pipeline import optimise
from optc.passes.remove_identities import RemoveIdentities
from optc.passes.shape import annotate, infer


def has_branches_within_branches(graph: gs.Graph) -> bool:
    """Whether an If of ``graph`` has an If in a branch."""
    return any(True for _ in _conditions(graph))


def conditions_to_keep(
    graph: gs.Graph, ranges: Mapping[str, tuple[int, int]] | None = None
) -> frozenset[str]:
    """Return the conditions in branches that do not fit together once they are written out.

    Args:
        graph: A copy to try it on.
        ranges: As for `optc.passes.pipeline.optimise`.
    """
    conditions: dict[tuple[str, str], set[str]] = {}
    for node, branch, inner in _conditions(graph):
        conditions.setdefault((node.name, branch), set()).add(inner.inputs[0].name)
    optimise(
        graph,
        [FoldConstants(), InlineConstantIf(), RemoveIdentities(), FoldShapes()],
        ranges=ranges,
    )
    annotate(graph, infer(graph, opset=graph.opset, ranges=ranges))
    left = {node.name: node for node in graph.nodes}
    found: set[str] = set()
    for (name, branch), names in conditions.items():
        if name in left and not _fits(left[name].attrs[branch], graph):
            found |= names
    return frozenset(found)


def _conditions(graph: gs.Graph) -> Iterator[tuple[gs.Node, str, gs.Node]]:
    """Yield the Ifs of ``graph``, the name of a branch, and each If in that branch."""
    for node in graph.nodes:
        if node.op != "If" or node.domain:
            continue
        for name, body in node.attrs.items():
            for inner in all_nodes(body) if isinstance(body, gs.Graph) else ():
                if inner.op == "If" and not inner.domain:
                    yield node, name, inner


def _fits(branch: gs.Graph, whole: gs.Graph) -> bool:
    """Whether onnx's own inference takes ``branch``, whatever the extents of what it reads."""
    part = gs.Graph(branch.nodes, list(captures(branch)), branch.outputs, name=branch.name)
    part.opset, part.import_domains, part.ir_version = whole.opset, whole.import_domains, None
    part.producer_name, part.producer_version = whole.producer_name, whole.producer_version
    model = skeleton(part)
    del model.graph.value_info[:]
    for info in (*model.graph.input, *model.graph.output):
        for dim in info.type.tensor_type.shape.dim:
            dim.Clear()
    for info in model.graph.output:
        info.type.tensor_type.ClearField("shape")
    try:
        shape_inference.infer_shapes(model, strict_mode=True)
    except shape_inference.InferenceError:
        return False
    return True
