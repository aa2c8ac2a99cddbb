"""Takes a model apart: nodes on their own, beginnings, and what is left without some nodes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Final

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from optc.optimizer.job import Profile

_MOST_SIZES: Final = 64
"""Of a tensor of sizes. A longer one, or one of any length, is data."""

_SHAPE_OPS: Final = frozenset(
    {
        "Add",
        "Cast",
        "Ceil",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "Div",
        "Equal",
        "Expand",
        "Floor",
        "Gather",
        "Greater",
        "Identity",
        "Less",
        "Max",
        "Min",
        "Mod",
        "Mul",
        "Neg",
        "Range",
        "ReduceProd",
        "Reshape",
        "Shape",
        "Size",
        "Slice",
        "Squeeze",
        "Sub",
        "Unsqueeze",
        "Where",
    }
)
"""What sizes are computed with. A node is asked about together with what computes its sizes."""

_DTYPES: Final = frozenset(
    {
        TensorProto.FLOAT,
        TensorProto.FLOAT16,
        TensorProto.BFLOAT16,
        TensorProto.FLOAT8E4M3FN,
        TensorProto.INT64,
        TensorProto.INT32,
        TensorProto.INT8,
        TensorProto.UINT8,
        TensorProto.BOOL,
    }
)
"""Of tensors that can enter and leave an engine."""

_INTEGERS: Final = frozenset({TensorProto.INT64, TensorProto.INT32})


ProfilesOf = Callable[[Sequence[str]], tuple[Profile, ...] | None]
"""Tensor names -> the optimisation profiles of a model that has these as inputs: () where none has
a dynamic axis, None where an axis has no bound."""


class ModelParts:
    """A model, ready to be taken apart.

    Args:
        model: Every node named, names unique, bodies included; the types of tensors in
            ``value_info``.

    Attributes:
        nodes: Those of the main graph, by their names.
        owner: Name of a node, of bodies too -> name of the node of the main graph that holds it.
    """

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        self._model = model
        self.nodes = {node.name: node for node in graph.node}
        self._place = {name: place for place, name in enumerate(self.nodes)}
        self.owner = {inner: node.name for node in graph.node for inner in names_in(node)}
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._types = {info.name: info for info in (*graph.value_info, *graph.output, *graph.input)}
        self._producer = {name: node for node in graph.node for name in node.output if name}
        self._outputs = {info.name for info in graph.output}

    def without(self, names: Collection[str]) -> ModelProto:
        """Return the model without the nodes ``names``, whose outputs become inputs.

        What reads an output that cannot be an input is left out too.
        """
        if not names:
            return self._model
        left, missing = [], set[str]()
        for node in self.nodes.values():
            blind = any(name in missing and not self._can_enter(name) for name in read_by(node))
            if node.name in names or blind:
                missing.update(node.output)
            else:
                left.append(node)
        return self._part(left)

    def beginning(self, length: int) -> ModelProto:
        """Return the first ``length`` nodes."""
        return self._part(list(self.nodes.values())[:length])

    def alone(self, node: NodeProto, *, narrowed: bool = False) -> ModelProto | None:
        """Return ``node`` and what computes its sizes; None where a type is missing.

        Args:
            node: Of the main graph.
            narrowed: Whether to go on to what alone reads its result, and reads a part of it.
        """
        tail = self._narrowing(node) if narrowed else []
        chain = {each.name: each for each in (node, *tail)}
        queue = [node]
        while queue:
            for name in read_by(queue.pop()):
                producer = self._producer.get(name)
                if producer is not None and producer.name not in chain and self._is_size(name):
                    chain[producer.name] = producer
                    queue.append(producer)
        part = [self.nodes[name] for name in sorted(chain, key=self._place.__getitem__)]
        entering = _entering(part) - self._constants.keys()
        leaving = [name for name in (tail or [node])[-1].output if name]
        if not all(map(self._can_enter, entering)) or not all(map(self._has_dtype, leaving)):
            return None
        return self._part(part, leaving)

    def _narrowing(self, node: NodeProto) -> list[NodeProto]:
        """Return the chain of nodes behind ``node`` that each read but a part of what they read."""
        chain: list[NodeProto] = []
        while len(node.output) == 1 and node.output[0] not in self._outputs:
            readers = self._readers.get(node.output[0], [])
            if len(readers) != 1 or not self._narrows(readers[0], node.output[0]):
                break
            node = readers[0]
            chain.append(node)
        return chain

    def _narrows(self, node: NodeProto, name: str) -> bool:
        return (
            node.op_type in ("Gather", "Slice", "Squeeze")
            and node.domain in ("", "ai.onnx")
            and node.input[0] == name
            and all(other in self._constants for other in node.input[1:])
        )

    @cached_property
    def _readers(self) -> dict[str, list[NodeProto]]:
        """Name of a tensor -> the nodes of the main graph that read it, in bodies too."""
        found: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes.values():
            for name in read_by(node):
                found[name].append(node)
        return found

    def _part(self, nodes: list[NodeProto], leaving: Sequence[str] | None = None) -> ModelProto:
        """Return a model of ``nodes``, which leaves ``leaving`` or what others read of it."""
        entering = _entering(nodes)
        own = {node.name for node in nodes}
        if leaving is None:
            others = [node for name, node in self.nodes.items() if name not in own]
            wanted = self._outputs.union(*map(read_by, others))
            made = [name for node in nodes for name in node.output]
            leaving = [name for name in made if name in wanted and self._has_dtype(name)]
        model = ModelProto(ir_version=self._model.ir_version)
        model.opset_import.extend(self._model.opset_import)
        model.functions.extend(self._model.functions)
        graph = model.graph
        graph.name = self._model.graph.name
        graph.node.extend(nodes)
        constants = entering & self._constants.keys()
        graph.initializer.extend(self._constants[name] for name in sorted(constants))
        inputs = sorted(entering - self._constants.keys())
        graph.input.extend(self._types[name] for name in inputs)
        graph.output.extend(self._types[name] for name in leaving)
        return model

    def _is_size(self, name: str) -> bool:
        """Return whether ``name`` looks like one or a few sizes that were computed."""
        node = self._producer[name]
        info = self._types.get(name)
        if node.domain not in ("", "ai.onnx") or node.op_type not in _SHAPE_OPS or info is None:
            return False
        return info.type.tensor_type.HasField("shape") and _may_be_sizes(info)

    def _has_dtype(self, name: str) -> bool:
        return name in self._types and self._types[name].type.tensor_type.elem_type in _DTYPES

    def _can_enter(self, name: str) -> bool:
        """Return whether ``name`` can be an input: TensorRT knows its dtype, we its rank."""
        return self._has_dtype(name) and self._types[name].type.tensor_type.HasField("shape")


def inputs_of(model: ModelProto) -> list[str]:
    """Return the names of the inputs."""
    return [info.name for info in model.graph.input]


def _bodies(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g


def names_in(node: NodeProto) -> Iterator[str]:
    """Yield the name of ``node`` and those of the nodes in its bodies."""
    yield node.name
    for body in _bodies(node):
        for inner in body.node:
            yield from names_in(inner)


def read_by(node: NodeProto) -> set[str]:
    """Return the tensors that ``node`` reads, those that its bodies read from outside too."""
    found = {name for name in node.input if name}
    for body in _bodies(node):
        own = {info.name for info in body.input} | {tensor.name for tensor in body.initializer}
        outputs = {info.name for info in body.output}
        found |= (_entering(body.node) | outputs - _made(body.node)) - own
    return found


def takes_sizes(model: ModelProto) -> bool:
    """Return whether an input may be a size, which an engine cannot take from outside."""
    return any(
        info.type.tensor_type.elem_type in _INTEGERS and _may_be_sizes(info)
        for info in model.graph.input
    )


def _may_be_sizes(info: ValueInfoProto) -> bool:
    """Return whether a tensor is short enough to hold sizes, whatever the extents of others."""
    dims = info.type.tensor_type.shape.dim
    return len(dims) <= 1 and all(0 < dim.dim_value <= _MOST_SIZES for dim in dims)


def _made(nodes: Iterable[NodeProto]) -> set[str]:
    return {name for node in nodes for name in node.output}


def _entering(nodes: Collection[NodeProto]) -> set[str]:
    """Return the tensors that ``nodes`` read and do not make."""
    return set[str]().union(*map(read_by, nodes)) - _made(nodes)
