"""From a model in short floats to one in fp32 that gives the numbers of the first, as a GPU would.

    what was lowered              what simulates it

    x (fp32)                      x
    |                             |
    Cast to fp16                  Cast to fp16, Cast to fp32     (rounds)
    |   W (fp16)                  |   W (fp16)
    |   |                         |   Cast to fp32
    Conv in fp16                  Conv in fp32
    |                             Cast to fp16, Cast to fp32
    Cast to fp32                  Identity
    |                             |
    y (fp32)                      y

ONNX Runtime's CPU has fp16 kernels for few operators and bf16 ones for fewer. Left to itself it casts
around each of the others, takes Casts away again where they meet, and so keeps digits between
operators that a GPU drops; what is in bf16 it mostly does not run at all. Here each operator computes
in fp32 and its results are rounded to the type they had. It is an estimate: a compiler that fuses
operators rounds less often.

To be run with ONNX Runtime's optimisations off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import ModelProto, TensorProto, TypeProto, helper

from optc.passes.float_port import is_movement
from optc.passes.graph import (
    Names,
    Node,
    StoredValues,
    all_bodies,
    bodies_of,
    export_model,
    import_model,
    nodes_of,
    redirect,
    sorted_nodes,
)
from optc.passes.precision import DTYPES, Float
from optc.passes.shape import infer
from optc.specs.diagnostic import Diagnostic, ModelError

SHORT: Mapping[int, Float] = {TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
"""ONNX's number of each type that is computed in fp32 and rounded to -> its name in a spec."""

SHORT_TYPES = frozenset(DTYPES[name] for name in SHORT.values())

TYPE_ATTRIBUTES = (
    *("dtype", "output_datatype", "output_dtype"),
    *("precision", "softmax_precision", "stash_type"),
)
"""Attributes that name the type of a result, or of what is computed on the way to it."""

DOMAINS = ("", "com.microsoft")
"""Domains whose operators compute in fp32 wherever they do in a shorter type."""

AS_THEY_ARE = ("BitCast",)
"""Operators that look at the bits."""


def short_floats(model: ModelProto) -> set[str]:
    """Return the names of the short floats that ``model`` computes with: fp16, bf16."""
    graph = model.graph
    numbers = {info.type.tensor_type.elem_type for info in (*graph.input, *graph.value_info)}
    numbers.update(tensor.data_type for tensor in graph.initializer)
    for node in nodes_of(graph):
        for attribute in node.attribute:
            if attribute.name in ("to", "value", *TYPE_ATTRIBUTES):
                numbers.update((attribute.i, attribute.t.data_type))
    return {SHORT[number] for number in numbers & SHORT.keys()}


def simulated(model: ModelProto, folder: Path | None = None) -> ModelProto:
    """Return a model that computes in fp32 and rounds to fp16 and bf16 what had these types.

    Args:
        model: Not changed. Its inputs and outputs keep their types, its constants too: they are
            cast where they are read. External data stays where it is.
        folder: Where external data is.

    Raises:
        ModelError: ``cannot-simulate`` where a sequence of short floats enters or leaves the model;
            as `import_model` does.
    """
    return _Simulation(import_model(model, folder)).model()


End = tuple[str, Any, np.dtype[Any] | None]
"""Name, shape and short type, if it has one, of an output."""


class _Simulation:
    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.names = Names(graph)
        self.parts = [graph, *all_bodies(graph)]
        shapes = infer(graph)
        # Which tensor has which type is found out before the first is changed.
        self.dtypes: dict[int, np.dtype[Any] | None] = {}
        self.short: dict[int, np.dtype[Any]] = {}
        self.sequences: set[int] = set()
        for tensor in self.tensors():
            dtype = tensor.dtype if isinstance(tensor, gs.Constant) else shapes.dtype(tensor.name)
            dtype = tensor.dtype if dtype is None else dtype
            self.dtypes[id(tensor)] = dtype
            if dtype is not None and dtype in SHORT_TYPES:
                self.short[id(tensor)] = dtype
            if shapes.is_sequence(tensor.name) or getattr(tensor, "proto", None) is not None:
                self.sequences.add(id(tensor))
        self.tensors_alive = list(self.tensors())  # their ids are theirs as long as they live

    def tensors(self) -> Iterator[gs.Tensor]:
        for part in self.parts:
            yield from part.inputs
            yield from part.outputs
            for node in part.nodes:
                for tensor in (*node.inputs, *node.outputs):
                    if tensor.name:
                        yield tensor

    def model(self) -> ModelProto:
        for tensor in (*self.graph.inputs, *self.graph.outputs):
            if id(tensor) in self.sequences and _holds_short(getattr(tensor, "proto", None)):
                raise _sequence(tensor.name)
        for part in self.parts:
            part.nodes = [made for node in list(part.nodes) for made in self.of_node(node)]
        ends = [(t.name, t.shape, self.short.get(id(t))) for t in self.graph.outputs]
        before = [*self.widened_inputs(), *self.widened_constants()]
        for tensor in self.tensors_alive:
            if id(tensor) in self.short and isinstance(tensor, gs.Variable):
                self.declare_wide(tensor)
        self.graph.nodes = [*before, *self.graph.nodes, *self.narrowed_outputs(ends)]
        for part in self.parts:
            part.nodes = sorted_nodes(part)
        return export_model(self.graph, place=_external, value_info=False)

    # -- nodes

    def of_node(self, node: gs.Node) -> list[gs.Node]:
        """Return what computes in fp32 what ``node`` gives, which is changed."""
        made = [i for i, tensor in enumerate(node.outputs) if id(tensor) in self.short]
        read = [i for i, tensor in enumerate(node.inputs) if id(tensor) in self.short]
        if (node.domain or "") not in DOMAINS or node.op in AS_THEY_ARE:
            return self.as_it_is(node, read, made)
        if not made and not read:
            return [node]
        if node.op == "CastLike" and (dtype := self.dtypes[id(node.outputs[0])]) is not None:
            node.inputs.pop()  # it may no longer be of the type that is wanted
            number = int(helper.np_dtype_to_tensor_dtype(dtype))
            node.op, node.attrs = "Cast", {**node.attrs, "to": number}
        if node.op == "Cast":
            return self.of_cast(node, bool(made))
        for name in TYPE_ATTRIBUTES:
            if node.attrs.get(name) in SHORT:
                node.attrs[name] = int(TensorProto.FLOAT)
        if node.op == "ConstantOfShape" and made:
            value = np.asarray(node.attrs["value"].values).astype(np.float32)
            node.attrs["value"] = gs.Constant(node.attrs["value"].name, value)
        if bodies_of(node) or self.is_exact(node, made):
            return [node]
        casts = []
        for index in made:
            if id(node.outputs[index]) not in self.sequences:
                casts += self.rounded(node, index)
        return [node, *casts]

    def of_cast(self, node: gs.Node, to_short: bool) -> list[gs.Node]:
        if to_short:
            return [node, self.widened(node, 0)]
        if node.attrs["to"] == TensorProto.FLOAT:  # ONNX Runtime would take it away with others
            node.op, node.attrs = "Identity", {}
        return [node]

    def is_exact(self, node: gs.Node, made: list[int]) -> bool:
        """Whether the results are numbers of the short type without being rounded."""
        types = {self.short.get(id(tensor)) for tensor in node.inputs if tensor.name}
        return (
            is_movement(node)
            and {self.short[id(node.outputs[index])] for index in made} <= types
            and not any(isinstance(value, float) for value in node.attrs.values())
        )

    def rounded(self, node: gs.Node, index: int) -> list[gs.Node]:
        """Return the Casts that round an output of ``node``."""
        tensor = node.outputs[index]
        dtype = self.short[id(tensor)]
        exact = node.outputs[index] = self.variable(tensor, "exact", np.dtype(np.float32))
        short = self.variable(tensor, "short", dtype)
        return [self.cast(exact, short), self.cast(short, tensor)]

    def widened(self, node: gs.Node, index: int) -> gs.Node:
        """Return the Cast that widens an output of ``node``, which gives it in the short type."""
        tensor = node.outputs[index]
        short = node.outputs[index] = self.variable(tensor, "short", self.short[id(tensor)])
        return self.cast(short, tensor)

    def as_it_is(self, node: gs.Node, read: list[int], made: list[int]) -> list[gs.Node]:
        """Return ``node``, given and giving the types it was written for."""
        before = []
        for index in read:
            tensor = node.inputs[index]
            node.inputs[index] = self.variable(tensor, "short", self.short[id(tensor)])
            before.append(self.cast(tensor, node.inputs[index]))
        return [*before, node, *(self.widened(node, index) for index in made)]

    def cast(self, source: gs.Tensor, target: gs.Variable) -> gs.Node:
        """Return a Cast to the type of ``target``: fp32 where it is one that was short."""
        dtype = np.dtype(np.float32) if id(target) in self.short else target.dtype
        attrs = {"to": int(helper.np_dtype_to_tensor_dtype(dtype))}
        return Node("Cast", self.names.fresh("simulated_cast"), attrs, [source], [target])

    def variable(self, tensor: gs.Tensor, what: str, dtype: np.dtype[Any]) -> gs.Variable:
        return gs.Variable(self.names.fresh(f"{tensor.name}_{what}"), dtype)

    # -- where values enter and leave

    def widened_inputs(self) -> list[gs.Node]:
        short = [tensor for tensor in self.graph.inputs if id(tensor) in self.short]
        return [self.widened_source(tensor) for tensor in short]

    def widened_constants(self) -> list[gs.Node]:
        constants = {
            id(tensor): tensor
            for tensor in self.tensors_alive
            if id(tensor) in self.short and isinstance(tensor, gs.Constant)
        }
        return [self.widened_source(tensor) for tensor in constants.values()]

    def widened_source(self, tensor: gs.Tensor) -> gs.Node:
        """Return the Cast that widens what stays short, and let all read what it gives."""
        wide = self.variable(tensor, "wide", np.dtype(np.float32))
        redirect(tensor, wide)
        for part in self.parts:
            if part is not self.graph or not self.enters(tensor):  # it leaves as it comes
                part.outputs = [wide if output is tensor else output for output in part.outputs]
        return self.cast(tensor, wide)

    def declare_wide(self, tensor: gs.Variable) -> None:
        if self.enters(tensor):
            return
        if tensor.dtype is not None:
            tensor.dtype = np.dtype(np.float32)
        if getattr(tensor, "proto", None) is not None:
            tensor.proto = _widened_type(tensor.proto)

    def narrowed_outputs(self, ends: Sequence[End]) -> list[gs.Node]:
        """Return the Casts that give the outputs the types they had, under the names they had."""
        casts = []
        for index, (name, shape, dtype) in enumerate(ends):
            wide = self.graph.outputs[index]
            if dtype is None or self.enters(wide) or id(wide) in self.sequences:
                continue
            wide.name = self.names.fresh(f"{name}_wide")
            short = self.graph.outputs[index] = gs.Variable(name, dtype, shape)
            casts.append(self.cast(wide, short))
        return casts

    def enters(self, tensor: gs.Tensor) -> bool:
        return any(tensor is given for given in self.graph.inputs)


def _external(constant: gs.Constant) -> TensorProto | None:
    """Return how a constant is written that is in a file of its own: as it was."""
    stored = constant._values
    if isinstance(stored, StoredValues) and stored.tensor.data_location == TensorProto.EXTERNAL:
        return stored.tensor
    return None


def _holds_short(kind: TypeProto | None) -> bool:
    return kind is not None and kind != _widened_type(kind)


def _widened_type(kind: TypeProto) -> TypeProto:
    """Return the type of a sequence or an optional, its short floats made fp32."""
    wide = TypeProto()
    wide.CopyFrom(kind)
    inner = wide
    while (kind_of := inner.WhichOneof("value")) != "tensor_type":
        if kind_of not in ("sequence_type", "optional_type", "map_type"):
            return wide
        part = getattr(inner, kind_of)
        inner = part.value_type if kind_of == "map_type" else part.elem_type
    if inner.tensor_type.elem_type in SHORT:
        inner.tensor_type.elem_type = TensorProto.FLOAT
    return wide


def _sequence(name: str) -> ModelError:
    return ModelError(
        Diagnostic(
            "cannot-simulate",
            f"`{name}` is a sequence of fp16 or bf16 tensors, which cannot be cast at the boundary",
            "give and take tensors",
        )
    )
