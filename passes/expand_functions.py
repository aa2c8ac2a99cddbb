r"""Replace an operator by the function that the standard defines it with.

    before                       after

    x                            x
    |                            |    \
    Celu alpha=2                 |     Div 2
    |                            |      |
    y                            |     Elu
                                 |      |
                               Max 0   Mul 2
                                 |      |
                                 |    Min 0
                                  \    /
                                   Sum
                                    |
                                    y

Why it holds: for these operators the ONNX standard gives a body of other operators, and what the
operator returns is what the body returns. It is taken from the onnx package, which knows the body for
the types and attributes at hand.

Equal up to rounding: a runtime's own kernel may compute in another order.

It costs what a chain of small operators costs, which a compiler fuses for the most part. Operators
whose body is random or holds a loop or a branch are not here.

Needs: known types of the inputs.
Keeps: names of outputs.
Skips, with the reason in the report: an operator that the standard does not spell out for the opset
and the types of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper
from onnx.inliner import inline_selected_functions

from optc.passes.contract import Facts, Pass, Report
from optc.passes.dimension import Dim
from optc.passes.graph import (
    detach,
    export_model,
    import_model,
    redirect,
)
from optc.passes.replacement import Operand, Replacement

FUNCTIONS = (
    *("Attention", "CausalConvWithState", "Celu", "CenterCropPad", "Elu"),
    *("Gelu", "GroupNormalization", "HardSigmoid", "HardSwish", "LayerNormalization", "LeakyRelu"),
    *("LogSoftmax", "MeanVarianceNormalization", "Mish"),
    *("NegativeLogLikelihoodLoss", "PRelu", "ReduceL1", "ReduceL2", "ReduceLogSum"),
    *("ReduceLogSumExp", "ReduceSumSquare", "RMSNormalization", "RotaryEmbedding", "Selu"),
    *("Shrink", "Softmax", "SoftmaxCrossEntropyLoss", "Softplus", "Softsign", "Swish"),
    *("ThresholdedRelu",),
)
"""Operators with a body of other operators, from some opset on."""


class ExpandFunctions(Pass):
    """Replace an operator by the function that the standard defines it with."""

    name = "expand-functions"
    group = "legalise"
    exactness = "equal up to rounding"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Expand every operator of ``graph`` that has a body."""
        report = Report()
        for node in facts.nodes(*FUNCTIONS):
            expand(node, graph, facts, report)
        return report


def expand(node: gs.Node, graph: gs.Graph, facts: Facts, report: Report) -> None:
    """Replace a node of ``graph`` by its function, and say so in ``report``, or why not."""
    body = _body(node, facts)
    if isinstance(body, str):
        report.skipped[node.name] = body
        return
    new = Replacement(graph, facts, node)
    made = _written(body, [tensor for tensor in node.inputs if tensor.name], new)
    named = [index for index, tensor in enumerate(node.outputs) if tensor.name]
    new.finish(report, dict(zip(named, made, strict=True)))


def _body(node: gs.Node, facts: Facts) -> gs.Graph | str:
    """Return the function of ``node`` as a graph of its inputs and outputs, or why there is none."""
    twin = gs.Node(node.op, node.name, _defaults(node.op, facts.opset) | node.attrs, domain="")
    for index, tensor in enumerate(node.inputs):
        if not tensor.name:
            twin.inputs.append(gs.Variable.empty())
            continue
        dtype = facts.shapes.dtype(tensor.name)
        if dtype is None:
            return f"the type of its input {index} is not known"
        dims = facts.shapes.dims(tensor.name)
        shape = None if dims is None else [_extent(dim) for dim in dims]
        twin.inputs.append(gs.Variable(f"input_{index}", dtype, shape))
    for index, tensor in enumerate(node.outputs):
        twin.outputs.append(gs.Variable(f"output_{index}" if tensor.name else ""))
    inputs = [tensor for tensor in twin.inputs if tensor.name]
    outputs = [tensor for tensor in twin.outputs if tensor.name]
    single = gs.Graph([twin], inputs, outputs, name=node.op, opset=facts.opset)
    try:
        expanded = inline_selected_functions(
            export_model(single), [("", node.op)], inline_schema_functions=True
        )
    except RuntimeError as error:  # what it raises where an omitted input has no type
        return f"onnx does not spell it out: {error}"
    if [inner.op_type for inner in expanded.graph.node] == [node.op]:
        return f"the standard does not spell it out for opset {facts.opset} and its types"
    return import_model(expanded)


def _defaults(op: str, opset: int) -> dict[str, Any]:
    """Return the attributes that an operator has where none are given: onnx does not fill them in."""
    found = {}
    for name, attribute in onnx.defs.get_schema(op, opset).attributes.items():
        if attribute.default_value.type:
            value = helper.get_attribute_value(attribute.default_value)
            found[name] = value.decode() if isinstance(value, bytes) else value
    return found


def _extent(dim: Dim) -> int | None:
    return dim if isinstance(dim, int) else None


def _written(body: gs.Graph, inputs: Sequence[gs.Tensor], new: Replacement) -> list[gs.Tensor]:
    """Write the nodes of ``body``, which is taken to pieces, and return what its outputs are."""
    now: dict[int, gs.Tensor] = {}

    def becomes(old: gs.Tensor, tensor: gs.Tensor) -> None:
        now[id(old)] = tensor
        redirect(old, tensor)

    for own, given in zip(body.inputs, inputs, strict=True):
        becomes(own, given)
    for node in body.nodes:
        operands = [_operand(tensor) for tensor in node.inputs]
        outputs, attrs = list(node.outputs), dict(node.attrs)
        detach(node)
        made = new.add_with(len(outputs), node.op, *operands, domain=node.domain, **attrs)
        for old, tensor in zip(outputs, made, strict=True):
            becomes(old, tensor)
    return [now.get(id(tensor), tensor) for tensor in body.outputs]


def _operand(tensor: gs.Tensor) -> Operand:
    if isinstance(tensor, gs.Constant):
        return np.asarray(tensor.values)
    return tensor if tensor.name else None
