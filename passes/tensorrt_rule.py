"""What TensorRT cannot take whatever its parser says, known without asking it.

These are facts about its interface, not about operators: which dtypes it computes in, and that a
tensor which says how large another is (a shape tensor) cannot enter an engine from outside, as it
would need ranges of values that nothing gives. Everything else is asked of the parser and builder.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from optc.passes.graph import nodes_in, producer, reads

SHAPE_OPERANDS: dict[str, tuple[int, ...]] = {
    "CenterCropPad": (1,),
    "Col2Im": (1, 2),
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "OneHot": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
    "Upsample": (1,),
}
"""Op -> which of its inputs say how large something is."""


def why_not_its_types(node: gs.Node) -> str | None:
    """Return why ``node`` cannot run in TensorRT for the types it handles, or None.

    A float64 is refused because TensorRT takes it and computes in float32 without a word. So is a
    QuantizeLinear to uint8 with a zero point of 0, which it takes for one to int8.
    """
    for each in nodes_in(node):
        for tensor in (*reads(each), *each.outputs):
            if getattr(tensor, "proto", None) is not None:
                return f"`{tensor.name}` is no tensor but a {tensor.type.removesuffix('_type')}"
            if tensor.dtype is None:
                continue
            dtype = np.dtype(tensor.dtype)
            if dtype.kind == "O":
                return f"`{tensor.name}` holds strings, which TensorRT has not"
            if dtype.kind == "c":
                return f"`{tensor.name}` is complex, which TensorRT has not"
            if dtype == np.float64:
                return f"`{tensor.name}` is float64, which TensorRT would compute in float32"
        if each.op == "QuantizeLinear" and _quantises_to_uint8(each):
            return "it quantises to uint8, which TensorRT would do to int8"
    return None


def _quantises_to_uint8(node: gs.Node) -> bool:
    """Whether a QuantizeLinear makes uint8, as it does where nothing says otherwise."""
    if len(node.inputs) > 2 and node.inputs[2].name:
        zero_point = node.inputs[2].dtype
        return zero_point is not None and np.dtype(zero_point) == np.uint8
    return node.attrs.get("output_dtype", 0) in (0, TensorProto.UINT8)


def why_not_its_rounds(node: gs.Node) -> str | None:
    """Return why TensorRT would give an output of the Loop ``node`` a wrong extent, or None.

    A scan output has one entry for each round. Where a condition may end a Loop early, TensorRT
    takes it all the same, with as many entries as the trip count says.
    """
    for each in nodes_in(node):
        if each.op != "Loop" or each.domain:
            continue
        body = each.attrs["body"]
        carried = len(each.inputs) - 2
        if len(body.outputs) - 1 > carried and not _runs_to_its_end(each):
            return (
                "its condition may end it before the trip count is reached; TensorRT would give its "
                "scan outputs an entry for each round that was not made, too"
            )
    return None


def _runs_to_its_end(loop: gs.Node) -> bool:
    """Whether the condition of ``loop`` is true at first and stays so."""
    body = loop.attrs["body"]
    first, last = loop.inputs[1], _through_identities(body.outputs[0])
    always = last is body.inputs[1] or _is_true(last)
    return always and (not first.name or _is_true(first))


def _through_identities(tensor: gs.Tensor) -> gs.Tensor:
    maker = producer(tensor)
    while maker is not None and maker.op == "Identity" and not maker.domain:
        tensor = maker.inputs[0]
        maker = producer(tensor)
    return tensor


def _is_true(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and bool(np.all(tensor.values))


def shape_operands(node: gs.Node) -> list[gs.Tensor]:
    """Return the inputs of ``node`` that say how large something is, constants left out."""
    if node.domain:
        return []
    return [
        node.inputs[index]
        for index in SHAPE_OPERANDS.get(node.op, ())
        if index < len(node.inputs)
        and node.inputs[index].name
        and not isinstance(node.inputs[index], gs.Constant)
    ]


def shape_readers(nodes: Iterable[gs.Node], inputs: Iterable[str]) -> dict[str, str]:
    """Return the nodes that would make a shape tensor of one of ``inputs``.

    Args:
        nodes: Of one stage.
        inputs: Tensors that enter the stage from outside.

    Returns:
        Name of a node with a shape operand -> the input that the operand is computed from.
    """
    inside = {node.name: node for node in nodes}
    entering = set(inputs)
    found = {}
    for node in inside.values():
        pending, seen = shape_operands(node), set()
        while pending:
            tensor = pending.pop()
            if tensor.name in seen or isinstance(tensor, gs.Constant):
                continue
            seen.add(tensor.name)
            if tensor.name in entering:
                found[node.name] = tensor.name
                break
            maker = producer(tensor)
            # What Shape and Size return is known to TensorRT whatever the values of their input.
            if maker is not None and maker.name in inside and maker.op not in ("Shape", "Size"):
                pending.extend(maker.inputs)
    return found
