"""What of a node is rounded in a short float, and the Casts that do it within a body."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import ModelProto, TensorProto, helper

from optc.passes.float_port import FLOAT32, is_movement, nodes_of_sizes, ports
from optc.passes.graph import Names, Node, all_bodies, export_model, import_model
from optc.passes.linear import peek
from optc.passes.lower_floats import fate, shortened, why_not_its_constants
from optc.passes.precision import DTYPES, Float
from optc.passes.shape import Shapes


@dataclass(frozen=True, slots=True)
class Rounding:
    """What of a node is in a short float.

    Attributes:
        floats: Which: fp16 or bf16.
        inputs: Indices of the inputs that are.
        outputs: Indices of the outputs that are.
        is_exact: Whether these are numbers of the type without being rounded, as the inputs are.
    """

    floats: Float
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    is_exact: bool


class Roundings:
    """Says of each node of a graph, those of bodies too, what of it is rounded.

    Args:
        graph: The graph.
        shapes: What was inferred of it.
    """

    def __init__(self, graph: gs.Graph, shapes: Shapes) -> None:
        self._shapes = shapes
        self._sizes = nodes_of_sizes(graph, shapes)
        self._known: dict[tuple[str, Float], Rounding | None] = {}

    def of(self, node: gs.Node, floats: Float) -> Rounding | None:
        """Return what of ``node`` is rounded; None where it stays in fp32."""
        if floats == "fp32":
            return None
        key = (node.name, floats)
        if key not in self._known:
            self._known[key] = self._found(node, floats)
        return self._known[key]

    def dtype_of(self, tensor: gs.Tensor) -> np.dtype[Any] | None:
        """Return the type of a tensor; None where it is not known."""
        if isinstance(tensor, gs.Constant):
            found: np.dtype[Any] = np.dtype(tensor.dtype)
            return found
        return self._shapes.dtype(tensor.name)

    def _found(self, node: gs.Node, floats: Float) -> Rounding | None:
        found = ports(node, self.dtype_of, floats, sizes=self._sizes)
        if isinstance(found, str):
            return None
        dtype = DTYPES[floats]
        if why_not_its_constants(node, found, dtype, lambda constant: fate(constant, dtype)):
            return None  # such a node is not lowered
        read = [i for i, t in enumerate(node.inputs) if t.name and self.dtype_of(t) == FLOAT32]
        is_exact = (
            is_movement(node)
            and bool(read)
            and read == list(found.inputs)
            and not any(isinstance(value, float) for value in node.attrs.values())
        )
        return Rounding(floats, found.inputs, found.outputs, is_exact)


def rounded_in_bodies(model: ModelProto, roundings: Mapping[str, Rounding]) -> ModelProto:
    """Return ``model`` with Casts around nodes of its bodies, which round what they read and give.

    Args:
        model: Its names are those of the graph that it is a part of. Not changed.
        roundings: Name of a node in a body -> what of it is rounded.
    """
    graph = import_model(model)
    casts = _Casts(Names(graph))
    for body in all_bodies(graph):
        nodes: list[gs.Node] = []
        for node in body.nodes:
            rounding = roundings.get(node.name)
            nodes += [node] if rounding is None else casts.around(node, rounding)
        body.nodes = nodes
    return export_model(graph, value_info=False)


class _Casts:
    def __init__(self, names: Names) -> None:
        self.names = names

    def around(self, node: gs.Node, rounding: Rounding) -> list[gs.Node]:
        """Return ``node`` and the Casts that round for it; constants are rounded at once."""
        before: list[gs.Node] = []
        after: list[gs.Node] = []
        for index in rounding.inputs:
            tensor = node.inputs[index]
            if isinstance(tensor, gs.Constant):
                values = shortened(peek(tensor), DTYPES[rounding.floats]).astype(FLOAT32)
                node.inputs[index] = gs.Constant(self.names.fresh(tensor.name), values)
            else:
                node.inputs[index] = gs.Variable(self.names.fresh(tensor.name), FLOAT32)
                before += self.pair(tensor, node.inputs[index], rounding.floats)
        for index in () if rounding.is_exact else rounding.outputs:
            tensor = node.outputs[index]
            node.outputs[index] = gs.Variable(self.names.fresh(tensor.name), FLOAT32)
            after += self.pair(node.outputs[index], tensor, rounding.floats)
        return [*before, node, *after]

    def pair(self, source: gs.Tensor, target: gs.Tensor, floats: Float) -> list[gs.Node]:
        dtype = DTYPES[floats]
        low = gs.Variable(self.names.fresh(source.name), dtype)
        number = int(helper.np_dtype_to_tensor_dtype(dtype))
        return [
            Node("Cast", self.names.fresh("to_short"), {"to": number}, [source], [low]),
            Node("Cast", self.names.fresh("back"), {"to": int(TensorProto.FLOAT)}, [low], [target]),
        ]
