"""The graph that passes edit, and the networkx view that questions of dataflow are asked of.

`import_model` turns an `onnx.ModelProto` into an `onnx_graphsurgeon.Graph` in the normal form that
`passes.contract` promises; `export_model` turns it back. Both are our own rather than
graph-surgeon's: the weights are never copied to be looked at, types that numpy does not know
(sequences, optionals) survive, and the form is normal from the start.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from collections.abc import Set as AbstractSet
from functools import cache
from pathlib import Path
from typing import Any, cast

import networkx as nx
import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.util.misc import SynchronizedList

from optc.specs.diagnostic import Diagnostic, ModelError

Array = npt.NDArray[Any]
Scope = MutableMapping[str, gs.Tensor]
"""Name in a model -> the tensor that it means in a graph; a body sees what is around it, too."""

DEFAULT_DOMAINS = ("", "ai.onnx")

WITH_BODIES = frozenset({"If", "Loop", "Scan", "SequenceMap"})
"""Operators of the default domain that have attributes which are graphs."""

MAX_BODY_DEPTH = 64
"""Bodies nested deeper than this are refused: no exporter makes them, and recursion has an end."""


MIN_IR_VERSION = 8
"""Older models are raised to this: before 4, initialisers had to be inputs as well."""


class Node(gs.Node):  # type: ignore[misc]
    """A node that equals itself alone, and is made without ceremony.

    graph-surgeon compares nodes part by part, also each time an edge is cut: where many nodes read
    one tensor, that is most of the time. And it looks at each attribute that is set.
    """

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init__(
        self,
        op: str,
        name: str = "",
        attrs: dict[str, Any] | None = None,
        inputs: Sequence[gs.Tensor] = (),
        outputs: Sequence[gs.Tensor] = (),
        domain: str = "",
    ) -> None:
        self.__dict__.update(
            op=op,
            name=name,
            attrs={} if attrs is None else attrs,
            inputs=SynchronizedList(self, "outputs", inputs),
            outputs=SynchronizedList(self, "inputs", outputs),
            domain=domain,
        )


def _new_variable(name: str) -> gs.Variable:
    """Return a variable of no known type, as `gs.Variable` makes it."""
    tensor = gs.Variable.__new__(gs.Variable)
    tensor.__dict__.update(
        name=name,
        inputs=SynchronizedList(tensor, "outputs", ()),
        outputs=SynchronizedList(tensor, "inputs", ()),
        dtype=None,
        shape=None,
        type="tensor_type",
        proto=None,
    )
    return tensor


def _new_constant(name: str, values: LazyValues) -> gs.Constant:
    """Return a constant, as `gs.Constant` makes it."""
    tensor = gs.Constant.__new__(gs.Constant)
    tensor.__dict__.update(
        name=name,
        inputs=SynchronizedList(tensor, "outputs", ()),
        outputs=SynchronizedList(tensor, "inputs", ()),
        _values=values,
        data_location=None,
        _export_dtype=None,
    )
    return tensor


class StoredValues(LazyValues):  # type: ignore[misc]
    """Values of a constant that stay in their TensorProto, or in its external file, until read."""

    def __init__(self, tensor: TensorProto, folder: Path | None) -> None:
        self.tensor = tensor
        self.folder = folder
        self.shape = tuple(tensor.dims)
        self.dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        self.nbytes = _nbytes(self.shape, self.dtype)

    def load(self) -> Array:
        """Return the values; those of an external file are mapped, not read."""
        if self.tensor.data_location != TensorProto.EXTERNAL:
            return numpy_helper.to_array(self.tensor)
        entry = external_entry(self.tensor)
        if self.dtype.itemsize * 8 != _bits(self.dtype):  # sub-byte types are packed in the file
            raw = TensorProto()
            raw.CopyFrom(self.tensor)
            raw.data_location = TensorProto.DEFAULT
            del raw.external_data[:]
            raw.raw_data = self.file(entry).read_bytes()[entry[1] : entry[1] + (entry[2] or 0)]
            return numpy_helper.to_array(raw)
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(
            self.file(entry), self.dtype, mode="r", offset=entry[1], shape=self.shape or (1,)
        ).reshape(self.shape)

    def file(self, entry: tuple[str, int, int | None]) -> Path:
        """Return the path of the external file that ``entry`` names."""
        return (self.folder or Path()) / entry[0]


def external_entry(tensor: TensorProto) -> tuple[str, int, int | None]:
    """Return location, offset and length (None: to the end) of a tensor's external data."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    length = entries.get("length")
    return entries["location"], int(entries.get("offset") or 0), int(length) if length else None


@cache
def _bits(dtype: np.dtype[Any]) -> int:
    return {"int4": 4, "uint4": 4, "float4_e2m1fn": 4, "int2": 2, "uint2": 2}.get(
        dtype.name, dtype.itemsize * 8
    )


def _nbytes(shape: Sequence[int], dtype: np.dtype[Any]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return (count * _bits(dtype) + 7) // 8


# --- from ONNX -----------------------------------------------------------------------------------


def import_model(model: ModelProto, folder: Path | None = None) -> gs.Graph:
    """Return the graph of ``model`` in normal form.

    Args:
        model: Not changed. Its initialisers are referred to, not copied: keep it unchanged while
            the graph lives. Functions of the model are inlined.
        folder: Where external data is; needed only when values of such a tensor are read.

    Raises:
        ModelError: If the graph is cyclic, reads a tensor that nothing makes, makes one twice, or
            nests bodies absurdly deep.
    """
    if model.functions:
        from onnx import inliner

        model = inliner.inline_local_functions(model, convert_version=False)
    return _Importer(model, folder).graph()


class _Importer:
    """One import: the names in use, and the tensors in scope."""

    def __init__(self, model: ModelProto, folder: Path | None) -> None:
        self.model = model
        self.folder = folder
        self.node_names = {n.name for n in nodes_of(model.graph) if n.name}
        self.tensor_names: set[str] = set()
        self.taken: set[str] = set()  # node names handed out
        self.body_renames = 0

    def graph(self) -> gs.Graph:
        model = self.model
        _reserve(self.tensor_names, model.graph)
        graph = self.read(model.graph, {}, depth=0)
        graph.opset = opset_of(model)
        graph.import_domains = list(model.opset_import)
        graph.ir_version = max(
            model.ir_version,
            MIN_IR_VERSION,
            helper.find_min_ir_version_for(model.opset_import, True),
        )
        graph.producer_name = model.producer_name
        graph.producer_version = model.producer_version
        graph.metadata = {entry.key: entry.value for entry in model.metadata_props}
        return graph

    def read(self, proto: GraphProto, outer: Scope, depth: int) -> gs.Graph:
        if depth > MAX_BODY_DEPTH:
            raise _fault("nesting", f"bodies are nested more than {MAX_BODY_DEPTH} deep")
        scope: dict[str, gs.Tensor] = {}
        renamed = self.renamed_in(proto) if depth else {}

        for tensor in proto.initializer:
            if tensor.name in scope:
                raise _fault("made-twice", f"there are two initialisers `{tensor.name}`")
            scope[tensor.name] = self.constant(renamed.get(tensor.name, tensor.name), tensor)
        for sparse in proto.sparse_initializer:
            name = sparse.values.name
            scope[name] = gs.Constant(renamed.get(name, name), _dense(sparse))
        inputs: list[gs.Variable] = []
        weights = set(scope)
        for info in proto.input:
            if info.name in weights:  # IR version 3 lists initialisers as inputs
                continue
            if info.name in scope:
                raise _fault("made-twice", f"there are two inputs `{info.name}`")
            scope[info.name] = _variable(renamed.get(info.name, info.name), info)
            inputs.append(scope[info.name])
        types = {info.name: info for info in [*proto.value_info, *proto.output]}
        protos = list(proto.node)  # protobuf makes a new wrapper at each look
        constants = [_is_constant(node) for node in protos]
        for node, constant in zip(protos, constants, strict=True):
            for name in filter(None, node.output):
                if name in scope:
                    raise _fault("made-twice", f"the tensor `{name}` is made twice", node)
                new = renamed.get(name, name)
                if constant:
                    scope[name] = self.constant_of(new, node)
                else:
                    scope[name] = _variable(new, types.get(name))
        visible = ChainMap(scope, outer) if depth else scope
        nodes = [
            self.node(node, index, visible, depth)
            for index, (node, constant) in enumerate(zip(protos, constants, strict=True))
            if not constant
        ]
        outputs = []
        for info in proto.output:
            if info.name not in visible:
                raise _fault("missing-tensor", f"nothing makes the output `{info.name}`")
            outputs.append(visible[info.name])
        graph = gs.Graph(nodes, inputs, outputs, name=proto.name or "graph")
        graph.doc_string = proto.doc_string
        graph.nodes = sorted_nodes(graph)
        return graph

    def renamed_in(self, proto: GraphProto) -> dict[str, str]:
        """Return new names for tensors of a body that bear a name some other graph uses."""
        own = [t.name for t in proto.initializer]
        own += [t.values.name for t in proto.sparse_initializer]
        own += [i.name for i in proto.input]
        own += [name for node in proto.node for name in node.output if name]
        new = {}
        for name in own:
            if name in self.tensor_names:
                fresh = name
                while fresh in self.tensor_names:
                    self.body_renames += 1
                    fresh = f"{name}__{self.body_renames}"
                new[name] = fresh
            self.tensor_names.add(new.get(name, name))
        return new

    def constant(self, name: str, tensor: TensorProto) -> gs.Constant:
        return _new_constant(name, StoredValues(tensor, self.folder))

    def constant_of(self, name: str, node: NodeProto) -> gs.Constant:
        """Return the value of a Constant node as a constant tensor."""
        (attr,) = node.attribute
        if attr.name == "value":
            return self.constant(name, attr.t)
        if attr.name == "sparse_value":
            return gs.Constant(name, _dense(attr.sparse_tensor))
        value = helper.get_attribute_value(attr)
        dtype = {"f": np.float32, "i": np.int64}.get(attr.name.removeprefix("value_")[0], object)
        return gs.Constant(name, np.array(value, dtype=dtype))

    def node(self, proto: NodeProto, index: int, scope: Scope, depth: int) -> gs.Node:
        for name in proto.input:
            if name and name not in scope:
                raise _fault("missing-tensor", f"nothing makes the tensor `{name}`", proto)
        return Node(
            op=proto.op_type,
            name=self.node_name(proto, index),
            domain="" if proto.domain in DEFAULT_DOMAINS else proto.domain,
            attrs={a.name: self.attribute(a, scope, depth) for a in proto.attribute},
            inputs=[scope[name] if name else gs.Variable.empty() for name in proto.input],
            outputs=[scope[name] if name else gs.Variable.empty() for name in proto.output],
        )

    def node_name(self, proto: NodeProto, index: int) -> str:
        """Return the node's own name, or a new one where it has none or another bears it too."""
        if proto.name and proto.name not in self.taken:
            self.taken.add(proto.name)
            return proto.name
        stem = f"{proto.name or proto.op_type}_{index}"
        name, count = stem, 1
        while name in self.taken or name in self.node_names:
            name, count = f"{stem}_{count}", count + 1
        self.taken.add(name)
        return name

    def attribute(self, attr: AttributeProto, scope: Scope, depth: int) -> Any:
        match attr.type:
            case _ if attr.ref_attr_name:  # has a meaning in functions only: onnx's checker says so
                return attr
            case AttributeProto.FLOAT:
                return attr.f
            case AttributeProto.INT:
                return attr.i
            case AttributeProto.FLOATS:
                return list(attr.floats)
            case AttributeProto.INTS:
                return list(attr.ints)
            case AttributeProto.TENSOR:
                return self.constant(attr.t.name, attr.t)
            case AttributeProto.GRAPH:
                return self.read(attr.g, scope, depth + 1)
            case AttributeProto.STRING if _is_text(attr.s):
                return attr.s.decode()
            case AttributeProto.STRINGS if all(map(_is_text, attr.strings)):
                return [s.decode() for s in attr.strings]
        return attr  # types, sparse tensors, bytes that are no text: carried as they are


def _reserve(names: set[str], graph: GraphProto) -> None:
    """Add all tensor names of the main graph: they are a contract, bodies' names give way."""
    names.update(t.name for t in graph.initializer)
    names.update(t.values.name for t in graph.sparse_initializer)
    names.update(i.name for i in graph.input)
    names.update(name for node in graph.node for name in node.output if name)


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_constant(node: NodeProto) -> bool:
    return (
        node.op_type == "Constant"
        and node.domain in DEFAULT_DOMAINS
        and len(node.attribute) == 1
        and not node.attribute[0].ref_attr_name
        and len(node.output) == 1
        and bool(node.output[0])
    )


def _dense(sparse: onnx.SparseTensorProto) -> Array:
    values = numpy_helper.to_array(sparse.values)
    indices = numpy_helper.to_array(sparse.indices)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    if indices.ndim == 1:
        dense.reshape(-1)[indices] = values
    else:
        dense[tuple(indices.T)] = values
    return dense


def _variable(name: str, info: ValueInfoProto | None) -> gs.Variable:
    """Return a variable with the declared type; ``proto`` holds a type that is no dense tensor."""
    variable = _new_variable(name)
    if info is None or not info.type.WhichOneof("value"):
        return variable
    if not info.type.HasField("tensor_type"):
        variable.type = info.type.WhichOneof("value")
        variable.proto = info.type
        return variable
    tensor = info.type.tensor_type
    if tensor.elem_type:
        variable.dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    if tensor.HasField("shape"):
        variable.shape = [_dim(d) for d in tensor.shape.dim]
    return variable


def _dim(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    match dim.WhichOneof("value"):
        case "dim_value" if dim.dim_value >= 0:
            return dim.dim_value
        case "dim_param" if dim.dim_param not in ("", "?"):  # `?` is no name: each is another
            return dim.dim_param
    return None


def _fault(code: str, problem: str, node: NodeProto | None = None) -> ModelError:
    at = f" (node `{node.name or '?'}`, {node.op_type})" if node is not None else ""
    return ModelError(
        Diagnostic(code, f"the model is damaged: {problem}{at}", "export the model again")
    )


# --- to ONNX -------------------------------------------------------------------------------------

Place = Callable[[gs.Constant], TensorProto | None]
"""Says how a constant is written: a TensorProto (say, one that refers to a file), or None to embed."""


def export_model(
    graph: gs.Graph, *, place: Place | None = None, value_info: bool = True
) -> ModelProto:
    """Return ``graph`` as a model.

    Args:
        graph: As `import_model` gives it, or as passes left it.
        place: Asked for every constant of 1 KiB or more.
        value_info: Whether the types of inner tensors are written too.
    """
    model = ModelProto()
    model.ir_version = graph.ir_version or 8
    model.producer_name = graph.producer_name or "optc"
    model.producer_version = graph.producer_version or ""
    model.opset_import.extend(graph.import_domains or [helper.make_opsetid("", graph.opset)])
    for key, value in getattr_or(graph, "metadata", {}).items():
        model.metadata_props.add(key=key, value=value)
    _Exporter(place, value_info).write(graph, model.graph, outer=())
    return model


def without_input_extents(model: ModelProto) -> ModelProto:
    """Return ``model``, the extents of its inputs replaced by names where it has control flow.

    With extents that are known, onnxruntime infers shapes in the branch that an If never takes too,
    and refuses the model where they do not fit together there.
    """
    if any(attr.HasField("g") for node in model.graph.node for attr in node.attribute):
        for info in model.graph.input:
            for axis, dim in enumerate(info.type.tensor_type.shape.dim):
                if dim.HasField("dim_value"):
                    dim.dim_param = f"{info.name}_{axis}"
    return model


def getattr_or(graph: gs.Graph, name: str, default: Any) -> Any:
    """Return an attribute that only our own graphs have (graph-surgeon logs where one is missing)."""
    return vars(graph).get(name, default)


def skeleton(graph: gs.Graph) -> ModelProto:
    """Return ``graph`` as a model whose large constants have a type and a shape but no data.

    For questions that need no weights: it is small whatever the model weighs.
    """

    def hollow(constant: gs.Constant) -> TensorProto:
        tensor = TensorProto(
            name=constant.name,
            data_type=helper.np_dtype_to_tensor_dtype(np.dtype(constant.dtype)),
            dims=constant.shape,
            data_location=TensorProto.EXTERNAL,
        )
        tensor.external_data.add(key="location", value="nowhere")
        return tensor

    return export_model(graph, place=hollow)


class _Exporter:
    def __init__(self, place: Place | None, value_info: bool) -> None:
        self.place = place
        self.value_info = value_info

    def write(
        self, graph: gs.Graph, proto: GraphProto, outer: tuple[AbstractSet[str], ...]
    ) -> None:
        """Write ``graph``; ``outer`` has the names of the constants that stand around it."""
        proto.name = graph.name
        proto.doc_string = graph.doc_string or ""
        # A constant is written in the outermost graph that reads it, once.
        constants: dict[str, gs.Constant] = {}
        for tensor in [*(t for n in graph.nodes for t in n.inputs), *graph.outputs]:
            if isinstance(tensor, gs.Constant) and not any(tensor.name in n for n in outer):
                constants.setdefault(tensor.name, tensor)
        if not outer:
            for tensor in _constants_shared_by_bodies(graph):
                constants.setdefault(tensor.name, tensor)
        for constant in constants.values():
            self.constant(constant, proto.initializer.add())
        for node in graph.nodes:
            self.node(node, proto.node.add(), (*outer, constants.keys()))
        proto.input.extend(value_info_of(t) for t in graph.inputs)
        proto.output.extend(value_info_of(t) for t in graph.outputs)
        if self.value_info:
            done = {t.name for t in [*graph.inputs, *graph.outputs]}
            for node in graph.nodes:
                proto.value_info.extend(
                    value_info_of(t)
                    for t in node.outputs
                    if t.name and t.name not in done and _has_type(t)
                )

    def constant(self, constant: gs.Constant, tensor: TensorProto) -> None:
        stored = constant._values
        if self.place is not None and stored.nbytes >= 1024:
            placed = self.place(constant)
            if placed is not None:
                tensor.CopyFrom(placed)
                tensor.name = constant.name
                return
        _write_values(stored, tensor)
        tensor.name = constant.name

    def node(self, node: gs.Node, proto: NodeProto, visible: tuple[AbstractSet[str], ...]) -> None:
        proto.op_type, proto.name = node.op, node.name
        proto.domain = node.domain or ""
        proto.input.extend(t.name for t in node.inputs)
        proto.output.extend(t.name for t in node.outputs)
        for name, value in node.attrs.items():
            attr = proto.attribute.add(name=name)
            if isinstance(value, gs.Graph):
                attr.type = AttributeProto.GRAPH
                self.write(value, attr.g, visible)
            elif isinstance(value, gs.Constant):
                attr.type = AttributeProto.TENSOR
                _write_values(value._values, attr.t)
                attr.t.name = value.name
            elif isinstance(value, AttributeProto):
                attr.CopyFrom(value)
            else:
                attr.CopyFrom(_plain_attribute(name, value, node))


def _plain_attribute(name: str, value: Any, node: gs.Node) -> AttributeProto:
    if isinstance(value, list) and not value:  # an empty list has no type of its own
        return helper.make_attribute(name, value, attr_type=_declared_type(node, name))
    return helper.make_attribute(name, value)


def _declared_type(node: gs.Node, attribute: str) -> int:
    """Return the type of an attribute that is a list, from the schema of the op."""
    if not onnx.defs.has(node.op, node.domain or ""):
        return int(AttributeProto.INTS)
    schema = onnx.defs.get_schema(node.op, domain=node.domain or "")
    declared = schema.attributes.get(attribute)
    kind = None if declared is None else int(cast(Any, declared.type).value)
    if kind in (AttributeProto.FLOATS, AttributeProto.STRINGS):
        return kind
    return int(AttributeProto.INTS)  # also where it is no list: the checker then says so


def _write_values(stored: Any, tensor: TensorProto) -> None:
    if isinstance(stored, StoredValues) and stored.tensor.data_location != TensorProto.EXTERNAL:
        tensor.CopyFrom(stored.tensor)
        return
    values = stored.load() if isinstance(stored, LazyValues) else stored
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(values)))


def _constants_shared_by_bodies(graph: gs.Graph) -> Iterator[gs.Constant]:
    """Yield constants that bodies read from outside, or that more than one body reads."""
    readers: dict[str, set[int]] = {}
    for node in graph.nodes:
        for body in bodies_of(node):
            for inner in (body, *all_bodies(body)):
                for tensor in _read_by(inner):
                    if isinstance(tensor, gs.Constant):
                        seen = readers.setdefault(tensor.name, set())
                        seen.add(id(inner))
                        if len(seen) == 2:
                            yield tensor


def _read_by(graph: gs.Graph) -> Iterator[gs.Tensor]:
    for node in graph.nodes:
        yield from node.inputs
    yield from graph.outputs


def _has_type(tensor: gs.Tensor) -> bool:
    return getattr(tensor, "proto", None) is not None or tensor.dtype is not None


def value_info_of(tensor: gs.Tensor) -> ValueInfoProto:
    """Return name and type of ``tensor``; a type that is not known is left out."""
    info = ValueInfoProto(name=tensor.name)
    proto = getattr(tensor, "proto", None)
    if proto is not None:
        info.type.CopyFrom(proto)
    elif tensor.dtype is not None:
        kind = info.type.tensor_type
        kind.elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
        if tensor.shape is not None:
            kind.shape.SetInParent()
            for extent in tensor.shape:
                dim = kind.shape.dim.add()
                if isinstance(extent, str):
                    dim.dim_param = extent
                elif extent is not None:
                    dim.dim_value = int(extent)
    return info


# --- looking around ------------------------------------------------------------------------------


def opset_of(model: ModelProto) -> int:
    """Return the version of the default domain that ``model`` imports."""
    for entry in model.opset_import:
        if entry.domain in DEFAULT_DOMAINS:
            return int(entry.version)
    return 1


def nodes_of(graph: GraphProto) -> Iterator[NodeProto]:
    """Yield every node of a GraphProto, those of bodies included, outermost first."""
    pending = [graph]
    while pending:
        for node in pending.pop().node:
            yield node
            for attr in node.attribute:
                if attr.HasField("g"):
                    pending.append(attr.g)
                pending.extend(attr.graphs)


def bodies_of(node: gs.Node) -> list[gs.Graph]:
    """Return the bodies of a control-flow node, in the order of its attributes."""
    if node.op not in WITH_BODIES and not node.domain:  # the hottest function of the passes
        return []
    return [value for value in node.attrs.values() if isinstance(value, gs.Graph)]


def all_bodies(graph: gs.Graph) -> Iterator[gs.Graph]:
    """Yield every body below ``graph``, innermost first."""
    for node in graph.nodes:
        for body in bodies_of(node):
            yield from all_bodies(body)
            yield body


def all_nodes(graph: gs.Graph) -> Iterator[gs.Node]:
    """Yield every node of ``graph`` and of the bodies below it."""
    for node in graph.nodes:
        yield node
        for body in bodies_of(node):
            yield from all_nodes(body)


def nodes_in(node: gs.Node) -> Iterator[gs.Node]:
    """Yield ``node``, then the nodes in its bodies."""
    yield node
    for body in bodies_of(node):
        yield from all_nodes(body)


def op_key(node: gs.Node) -> tuple[str, str]:
    """Return domain, "" for the default one, and op."""
    return node.domain or "", node.op


def op_name(node: gs.Node) -> str:
    """Return the op, behind its domain and a ``::`` where that is not the default one."""
    return f"{node.domain}::{node.op}" if node.domain else str(node.op)


def all_tensors(graph: gs.Graph) -> dict[str, gs.Tensor]:
    """Return name -> tensor for ``graph`` and the bodies below it; omitted ones are left out."""
    found: dict[str, gs.Tensor] = {}
    for part in (graph, *all_bodies(graph)):
        for tensor in (*part.inputs, *part.outputs):
            found[tensor.name] = tensor
        for node in part.nodes:
            for tensor in (*node.inputs, *node.outputs):
                if tensor.name:
                    found[tensor.name] = tensor
    return found


def reads(node: gs.Node) -> Iterator[gs.Tensor]:
    """Yield the tensors ``node`` reads: its inputs, and what its bodies read from outside them."""
    for tensor in node.inputs:
        if tensor.name:
            yield tensor
    for body in bodies_of(node):
        yield from captures(body)


def captures(body: gs.Graph) -> Iterator[gs.Tensor]:
    """Yield the tensors (no constants) that ``body`` reads from the graphs around it."""
    own = {id(t) for t in body.inputs}
    own.update(id(t) for node in body.nodes for t in node.outputs)
    seen: set[int] = set()
    for tensor in [*(t for node in body.nodes for t in reads(node)), *body.outputs]:
        if id(tensor) in own or id(tensor) in seen or isinstance(tensor, gs.Constant):
            continue
        seen.add(id(tensor))
        yield tensor


def sorted_nodes(graph: gs.Graph) -> list[gs.Node]:
    """Return the nodes so that each follows those it reads, else in the order they stand.

    Raises:
        ModelError: If that cannot be, as the graph is cyclic.
    """
    nodes: list[gs.Node] = list(graph.nodes)
    place = {id(node): index for index, node in enumerate(nodes)}
    before = []
    in_order = True
    for index, node in enumerate(nodes):
        read = reads(node) if node.attrs and bodies_of(node) else node.inputs
        makers = [place[id(t.inputs[0])] for t in read if t.inputs and id(t.inputs[0]) in place]
        before.append(makers)
        in_order = in_order and (not makers or max(makers) < index)
    return nodes if in_order else [nodes[index] for index in _topological(before, nodes)]


def _topological(before: Sequence[Sequence[int]], nodes: Sequence[gs.Node]) -> list[int]:
    """Return the nodes by number, each as soon as those are out that it needs: ``before``."""
    order: list[int] = []
    state = bytearray(len(before))  # 1: what it needs is being put out, 2: it is out
    for first in range(len(before)):
        pending = [first]
        while pending:
            index = pending[-1]
            if state[index] == 2:
                pending.pop()
                continue
            state[index] = 1
            missing = [maker for maker in before[index] if state[maker] != 2]
            if any(state[maker] == 1 for maker in missing):
                raise _cycle(before, nodes)
            if missing:
                pending.extend(reversed(missing))
            else:
                state[index] = 2
                order.append(index)
                pending.pop()
    return order


def _cycle(before: Sequence[Sequence[int]], nodes: Sequence[gs.Node]) -> ModelError:
    view = nx.DiGraph((maker, index) for index, makers in enumerate(before) for maker in makers)
    names = " -> ".join(f"`{nodes[edge[0]].name}`" for edge in nx.find_cycle(view)[:6])
    return _fault("cyclic", f"its nodes form a cycle: {names}")


def dataflow(graph: gs.Graph) -> nx.DiGraph:
    """Return the networkx view of ``graph``, bodies contracted into their control-flow node.

    Nodes are node names in topological order, with the attribute ``node`` (the gs.Node). An edge
    carries ``tensors``: the names that flow along it, body reads included.
    """
    view = nx.DiGraph()
    maker: dict[int, str] = {}
    for node in graph.nodes:
        view.add_node(node.name, node=node)
        for tensor in reads(node):
            source = maker.get(id(tensor))
            if source is None:
                continue
            if view.has_edge(source, node.name):
                names = view.edges[source, node.name]["tensors"]
                if tensor.name not in names:
                    names.append(tensor.name)
            else:
                view.add_edge(source, node.name, tensors=[tensor.name])
        for tensor in node.outputs:
            if tensor.name:
                maker[id(tensor)] = node.name
    return view


# --- editing -------------------------------------------------------------------------------------


def is_constant(tensor: gs.Tensor) -> bool:
    """Whether the value of ``tensor`` is known."""
    return isinstance(tensor, gs.Constant)


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """Return the node that makes ``tensor``; None for inputs, constants and omitted ones."""
    return tensor.inputs[0] if tensor.inputs else None


def redirect(old: gs.Tensor, new: gs.Tensor) -> None:
    """Let every node that reads ``old``, in bodies too, read ``new``. Outputs are not touched."""
    for reader in list({id(n): n for n in old.outputs}.values()):
        for index, tensor in enumerate(reader.inputs):
            if tensor is old:
                reader.inputs[index] = new


def detach(node: gs.Node) -> None:
    """Cut ``node`` off from its tensors, so that `remove_dead` takes it away."""
    node.inputs.clear()
    node.outputs.clear()


def remove_dead(graph: gs.Graph, kept: frozenset[str]) -> list[gs.Node]:
    """Remove nodes that nothing reads, last first, and return them.

    Args:
        graph: Its bodies are left as they are, but what a removed node's body read counts no more.
        kept: Names of tensors that stay even where no node reads them.
    """
    dead: list[gs.Node] = []
    alive: list[gs.Node] = []
    for node in reversed(graph.nodes):
        for tensor in node.outputs:
            if tensor.name and (tensor.outputs or tensor.name in kept):
                alive.append(node)
                break
        else:
            dead.append(node)
            for inner in (n for body in bodies_of(node) for n in all_nodes(body)):
                detach(inner)
            detach(node)
    if dead:
        graph.nodes = alive[::-1]
    return dead


def finish(graph: gs.Graph) -> None:
    """Give every output of ``graph`` that became a constant a node that makes it.

    A stage owns nodes, so what no node makes would be in no stage.
    """
    names = Names(graph)
    for index, tensor in enumerate(graph.outputs):
        if not isinstance(tensor, gs.Constant):
            continue
        output = gs.Variable(tensor.name, tensor.dtype, list(tensor.shape))
        tensor.name = names.fresh(f"{output.name}_value")
        node = Node("Identity", names.fresh(f"{output.name}_out"), domain="")
        node.inputs.append(tensor)
        node.outputs.append(output)
        graph.nodes.append(node)
        graph.outputs[index] = output


class Names:
    """Hands out names that nothing in a model bears."""

    def __init__(self, graph: gs.Graph) -> None:
        self._taken = set(all_tensors(graph)) | {node.name for node in all_nodes(graph)}

    def fresh(self, stem: str) -> str:
        """Return ``stem``, or ``stem`` with a number where it is taken."""
        name, count = stem, 1
        while name in self._taken:
            name, count = f"{stem}_{count}", count + 1
        self._taken.add(name)
        return name
