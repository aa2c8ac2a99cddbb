r"""Let an RNN start from nothing where it starts from zeros.

    before                              after

    x     batch                         x
    |       |                           |
    |     Concat [2, batch, 48]         |
    |       |                           |
    |     ConstantOfShape 0             |
    |       |                           |
    |     Split                         |
    |     /   \                         |
    LSTM h     c                       LSTM
    |                                   |
    y                                   y

Why it holds: LSTM, GRU and RNN start from zeros where they are not given what to start from. Zeros are
constants, or made by ConstantOfShape and moved, cut or repeated since.

What computed the extents of the zeros goes with them: exporters write a dozen nodes for it.

Keeps: names of outputs.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.linear import peek
from optc.passes.match import argument, made_by

STATES = {"LSTM": (5, 6), "GRU": (5,), "RNN": (5,)}
"""Where the operators take what they start from."""

MOVING = (
    "Cast",
    "Expand",
    "Gather",
    "Identity",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
)
"""Operators whose outputs hold nothing but elements of their first input."""

FURTHEST = 8
"""Nodes between the zeros and the RNN, at most."""


class RemoveZeroStates(Pass):
    """Let an LSTM, GRU or RNN start from nothing where it starts from zeros."""

    name = "remove-zero-states"
    group = "clean"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Take zeros from the recurrent operators of ``graph``."""
        report = Report()
        for node in facts.nodes(*STATES):
            zeros = [
                index
                for index in STATES[node.op]
                if (state := argument(node, index)) is not None and _is_zero(state)
            ]
            for index in zeros:
                node.inputs[index] = gs.Variable.empty()
            while not node.inputs[-1].name:
                node.inputs.pop()
            if zeros:
                report.merged[node.name] = (node.name,)
        return report


def _is_zero(tensor: gs.Tensor) -> bool:
    """Whether all elements are known to be zero, and without a sign."""
    for _ in range(FURTHEST):
        moved = made_by(tensor, *MOVING)
        if moved is None:
            break
        tensor = moved.inputs[0]
    if isinstance(tensor, gs.Constant):
        return not any(peek(tensor).tobytes())
    filled = made_by(tensor, "ConstantOfShape")
    if filled is None:
        return False
    value = filled.attrs.get("value")  # zeros where it is not given
    return value is None or not any(np.asarray(value.values).tobytes())
