"""Whether a graph takes inputs of given extents, asked of ONNX's own shape rules."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_graphsurgeon as gs

from optc.passes.graph import bodies_of, skeleton


def why_not_at(graph: gs.Graph, extents: Mapping[str, int]) -> str | None:
    """Return in ONNX's words why ``graph`` breaks a shape rule at these extents, or None.

    A graph with bodies is not judged: the branch that an If does not take may break any rule.

    Args:
        graph: Annotated or not; it is not changed, and no weight is read.
        extents: Symbol of an input axis -> its extent.
    """
    if any(bodies_of(node) for node in graph.nodes):
        return None
    model = skeleton(graph)
    del model.graph.value_info[:]
    for output in model.graph.output:
        if output.type.HasField("tensor_type"):
            output.type.tensor_type.ClearField("shape")
    for given in model.graph.input:
        for dim in given.type.tensor_type.shape.dim:
            if dim.dim_param in extents:
                dim.dim_value = extents[dim.dim_param]
    try:
        onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        return str(error).strip()
    return None
