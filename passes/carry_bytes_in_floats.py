r"""Let operators that only move or compare uint8 work on floats.

    before                          after

    q (uint8)                       q (uint8)
    |                               |
    |                               Cast (to float)
    |                               |
    MaxPool                         MaxPool
    |                               |
    |                               Cast (to uint8)
    |                               |
    y (uint8)                       y (uint8)

Inside an engine TensorRT has no uint8, neither as a result nor to work on: it takes it as an input and
an output only, and casts it to and from floats.

Why it holds: a float32 holds every integer of 8 bits, and these operators make no new ones. Where a
Cast meets another one, or the arithmetic that made the integers, `remove-casts-of-whole-numbers`
removes the pair, and what is left of quantised arithmetic is arithmetic in floats.

What it costs: four times the memory traffic where it stands; 8 bits have no faster form here.
Keeps: names of outputs.
Skips: types other than uint8, silently: TensorRT has int8.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.graph import Array
from optc.passes.replacement import Replacement

OPERANDS: dict[str, tuple[int, ...] | None] = {
    "Concat": None,
    "Expand": (0,),
    "Flatten": (0,),
    "Gather": (0,),
    "GatherElements": (0,),
    "GatherND": (0,),
    "Identity": (0,),
    "Max": None,
    "MaxPool": (0,),
    "Min": None,
    "Pad": (0, 2),
    "Reshape": (0,),
    "Slice": (0,),
    "Split": (0,),
    "Squeeze": (0,),
    "Tile": (0,),
    "Transpose": (0,),
    "Unsqueeze": (0,),
    "Where": (1, 2),
}
"""Operator -> which of its inputs it moves to its outputs; None for all."""


class CarryBytesInFloats(Pass):
    """Let operators that only move or compare ``uint8`` work on floats."""

    name = "carry-bytes-in-floats"
    group = "legalise"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Rewrite the refused nodes in ``graph``."""
        report = Report()
        nodes = facts.nodes(*OPERANDS)
        _ = nodes and facts.shapes  # inferred before anything changes
        for node in nodes:
            where = OPERANDS[node.op]
            moved = [
                index
                for index, tensor in enumerate(node.inputs)
                if tensor.name and (where is None or index in where)
            ]
            if all(_is_bytes(node.inputs[index], facts) for index in moved):
                _carry(node, moved, Replacement(graph, facts, node), report)
        return report


def _is_bytes(tensor: gs.Tensor, facts: Facts) -> bool:
    return facts.dtype(tensor) == np.dtype(np.uint8)


def _carry(node: gs.Node, moved: list[int], new: Replacement, report: Report) -> None:
    inputs: list[gs.Tensor | Array] = list(node.inputs)
    for index in moved:
        inputs[index] = _floats(node.inputs[index], new)
    made = new.add_with(len(node.outputs), node.op, *inputs, **node.attrs)
    # the second output of a MaxPool holds places
    carried = 1 if node.op == "MaxPool" else len(made)
    results = {
        index: new.cast(tensor, np.uint8) if index < carried else tensor
        for index, tensor in enumerate(made)
        if node.outputs[index].name
    }
    new.finish(report, results)


def _floats(tensor: gs.Tensor, new: Replacement) -> gs.Tensor | Array:
    if isinstance(tensor, gs.Constant):
        values: Array = np.asarray(tensor.values).astype(np.float32)
        return values
    return new.cast(tensor, np.float32)
