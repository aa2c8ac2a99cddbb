r"""Let an LSTM with weights of 8 bits compute in floats.

    before                                           after

    x   W (int8)   R (int8)   scales, zero points    x   W (float)   R (float)
     \     |         |         /                      \     |         /
        DynamicQuantizeLSTM                                 LSTM
             |                                               |
             y                                               y

DynamicQuantizeLSTM of com.microsoft keeps its weights as integers, [directions, inputs, 4 * hidden].
TensorRT has an LSTM, in floats.

Why it holds: the weights that the integers stand for, multiplied out and transposed, are those of LSTM.
How exact: only close. ONNX Runtime also rounds input and state to 8 bits before each product, with a
step of 1/255 of their range; LSTM does not, and is the more exact of the two. On a text recogniser
whose layers before it are quantised too, logits of up to 16.4 moved by 0.07; changing the image by one
in a million moves them by 0.27.
What it costs: the weights take four times the memory.

Keeps: names of outputs.
Skips, with the reason in the report: weights, scales or zero points that are computed at run time.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.graph import Array
from optc.passes.replacement import Declined, Replacement, Results, replace_each


class DequantiseLstm(Pass):
    """Let ``DynamicQuantizeLSTM`` compute in floats, as ``LSTM``."""

    name = "dequantise-lstm"
    group = "legalise"
    exactness = "close: input and state are no longer rounded to 8 bits"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Rewrite the refused nodes in ``graph``."""
        nodes = facts.nodes("DynamicQuantizeLSTM", domain="com.microsoft")
        return replace_each(nodes, facts, lambda node: Replacement(graph, facts, node), _written)


def _written(new: Replacement) -> Results:
    node = new.node
    weights = [_dequantised(new, *places) for places in ((1, 8), (2, 10))]
    rest = [new.input(index) for index in range(3, 8)]
    made = new.add_with(len(node.outputs), "LSTM", node.inputs[0], *weights, *rest, **node.attrs)
    return dict(enumerate(made))


def _dequantised(new: Replacement, index: int, scale_index: int) -> Array:
    """Return weights as LSTM has them: [directions, 4 * hidden, inputs], in floats.

    Args:
        index: Of the weights among the inputs.
        scale_index: Of their scale, [directions] or [directions, 4 * hidden]; the zero point is next.
    """
    weights, scale = new.input(index), new.input(scale_index)
    zero_point = new.input(scale_index + 1)
    if not isinstance(weights, gs.Constant) or not isinstance(scale, gs.Constant):
        raise Declined("its weights or their scale are computed at run time")
    centred = np.asarray(weights.values).astype(np.float32)
    if zero_point is not None:
        if not isinstance(zero_point, gs.Constant):
            raise Declined("its zero points are computed at run time")
        centred -= _by_column(np.asarray(zero_point.values))
    floats = centred * _by_column(np.asarray(scale.values))
    return np.ascontiguousarray(floats.swapaxes(1, 2))


def _by_column(values: Array) -> Array:
    numbers: Array = values.reshape(values.shape[0], 1, -1).astype(np.float32)
    return numbers
