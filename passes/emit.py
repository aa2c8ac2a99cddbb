"""Writes the nodes that spell one operator out in others; the operator becomes the last of them.

Where the outputs of the operator become those of several nodes, see `optc.passes.replacement`.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
from onnx import helper

from optc.passes.contract import Facts, Report
from optc.passes.match import become

Value: TypeAlias = gs.Tensor | npt.NDArray[Any]
"""An input of a new node: a tensor, or an array that becomes a constant."""


class Emitter:
    """Appends nodes that stand for ``node``, and lets it become the last of them.

    Each gets a name that tells what it stands for, and a line in the report.
    """

    def __init__(self, graph: gs.Graph, facts: Facts, report: Report, node: gs.Node) -> None:
        self._graph = graph
        self._facts = facts
        self._report = report
        self._node = node

    def make(self, op: str, *inputs: Value, **attrs: Any) -> gs.Variable:
        """Append a node of the default domain and return its one output."""
        name = self._facts.fresh_name(f"{self._node.name}_{op}")
        output = gs.Variable(self._facts.fresh_name(f"{name}_output"))
        node = gs.Node(op, name, dict(attrs), domain="")
        node.inputs.extend([self.tensor(value) for value in inputs])
        node.outputs.append(output)
        self._graph.nodes.append(node)
        self._report.merged[name] = (self._node.name,)
        return output

    def finish(self, op: str, *inputs: Value, **attrs: Any) -> None:
        """Let the node that is spelt out become the last one. Name, place and outputs stay."""
        become(self._node, op, [self.tensor(value) for value in inputs], attrs)
        self._report.merged[self._node.name] = (self._node.name,)

    def tensor(self, value: Value) -> gs.Tensor:
        """Return a tensor as it is, and an array as a constant."""
        if isinstance(value, gs.Tensor):
            return value
        return gs.Constant(self._facts.fresh_name(f"{self._node.name}_value"), np.asarray(value))

    def cast(self, tensor: gs.Tensor, dtype: npt.DTypeLike) -> gs.Variable:
        """Return ``tensor`` in another type."""
        return self.make("Cast", tensor, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def shape(self, *extents: int) -> gs.Tensor:
        """Return a constant int64 vector, as Reshape wants it."""
        return self.tensor(np.array(extents, np.int64))
