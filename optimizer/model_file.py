"""A model file: read so that nothing in it can hurt, refused with a clear error where it is at fault.

`read_model` looks at the file and at every tensor in it, `load_graph` makes the graph that passes
edit. What comes through both has names that are text, constants whose data has the size that their
shape says, external data inside the model's folder, and nodes that ONNX's own checker takes. What
does not is a `ModelError`.

Weights are not read for this beyond the model file itself: external data may be larger than memory.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, cast

import networkx as nx
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    SparseTensorProto,
    TensorProto,
    TypeProto,
    ValueInfoProto,
    checker,
    helper,
    inliner,
    numpy_helper,
    version_converter,
)

from optc.optimizer.file_kind import kind_of, kind_of_folder
from optc.optimizer.hollow import hollow
from optc.passes.graph import (
    DEFAULT_DOMAINS,
    MAX_BODY_DEPTH,
    MIN_IR_VERSION,
    all_nodes,
    all_tensors,
    export_model,
    external_entry,
    import_model,
    nodes_of,
)
from optc.specs.diagnostic import Diagnostic, ModelError

OLDEST_OPSET = 7
"""Before it, broadcasting was asked for by attribute: TensorRT and ONNX Runtime take it no more."""

OPSET_FOR_NEW_NODES = 17
"""What a model of other domains only (a tree ensemble, say) gets, for the nodes that passes add."""

LARGEST_MESSAGE = 2**31 - 1
"""Bytes of the largest file that protobuf reads."""

LARGEST_ARRAY = 2**58
"""Elements, empty axes aside: numpy makes no array of which 64 bits cannot count the bytes."""

MOST_NODES = 200_000
"""Inlining its functions may make a small file as large as it likes; this is where it ends."""


class InputShape(Protocol):
    """What has to be known of an input: one entry an axis, an extent or a symbol."""

    @property
    def shape(self) -> Sequence[str | int]: ...  # noqa: D102 - said above


@dataclass(frozen=True, eq=False)
class ModelFile:
    """An ONNX file that was read and looked through.

    Attributes:
        path: As it was given.
        proto: The model. External data stays where it is, and so does that of large tensors inside
            the file: initialisers refer to it.
        bytes: Size of the file and of the files with its external data together.
        external: Files with external data, each once.
    """

    path: Path
    proto: ModelProto
    bytes: int
    external: tuple[Path, ...] = ()

    @property
    def folder(self) -> Path:
        """Where external data is looked for."""
        return self.path.parent

    @cached_property
    def sha256(self) -> str:
        """The hash of the file at `path` alone, as ``sha256sum`` prints it.

        External data is not in it: a spec's ``model.sha256`` is of the file it names.
        """
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def read_model(path: Path) -> ModelFile:
    """Return the model in the file at ``path``.

    Raises:
        ModelError: If the file cannot be read, is no ONNX model or a damaged one, is of a version
            that this installation does not know, or keeps data outside its folder. All tensors at
            fault are named at once.
    """
    data = _bytes_of(path)
    size = len(data)
    hollowed = hollow(data, path.name)
    model = ModelProto()
    try:
        model.ParseFromString(bytes(data) if hollowed is None else hollowed)
    except DecodeError as error:
        raise _not_onnx(path, bytes(data), str(error)) from error
    if not model.HasField("graph") or model.ir_version < 1:
        raise _not_onnx(path, bytes(data), "it holds no graph")
    external = _checked(path, model)
    files = tuple(file for file in external.files() if file != path.parent / path.name)
    size += sum(file.stat().st_size for file in files)
    return ModelFile(path, model, size, files)


def model_in_memory(model: ModelProto) -> ModelFile:
    """Return ``model`` looked through as a file is.

    Raises:
        ModelError: As `read_model`; also where it has external data, as nothing says where that is.
    """
    path = Path("(in memory)")
    if not model.HasField("graph") or model.ir_version < 1:
        raise _fault("not-onnx", "the model in memory holds no graph", None)
    external = _checked(path, model)
    if files := external.files():
        raise _fault(
            "damaged-model",
            f"the model in memory has data in `{files[0].name}`, and nothing says in which folder",
            "give the path of the model's file, or load it with its external data",
        )
    return ModelFile(path, model, model.ByteSize())


def _checked(path: Path, model: ModelProto) -> _ExternalFiles:
    """Look through ``model`` and return the files that hold its external data."""
    _check_versions(path, model)
    external = _ExternalFiles(path)
    if faults := _Inspection(external).faults(model):
        raise ModelError(*faults)
    return external


def load_graph(file: ModelFile, inputs: Mapping[str, InputShape] | None = None) -> gs.Graph:
    """Return the graph of ``file``, its inputs in the shapes that are asked for.

    Args:
        file: What `read_model` gave. The graph refers to its initialisers.
        inputs: Name of an input -> its shape. An input that is not there keeps the shape that the
            model declares, an axis without a name called ``<input>_<axis>``.

    Returns:
        A graph in the normal form of `optc.passes.contract`, its functions inlined. Where the
        model declares the shape of another tensor with a symbol that ``inputs`` renames or pins,
        it is renamed or pinned there too.

    Raises:
        ModelError: If the graph is cyclic, reads what nothing makes, makes a tensor twice, has no
            output, or has a node that is not as ONNX says.
    """
    model = without_functions(file.proto)
    graph = import_model(model, file.folder)
    if not graph.outputs:
        raise _fault("no-outputs", "the model has no outputs, so there is nothing to compute")
    for name, times in Counter(tensor.name for tensor in graph.outputs).items():
        if times > 1:
            raise _fault("duplicate-output", f"the model has {times} outputs called `{name}`")
    _import_used_domains(graph)
    _check(graph)
    _give_shapes(graph, {name: tuple(given.shape) for name, given in (inputs or {}).items()})
    return graph


def _fault(code: str, problem: str, todo: str | None = "export the model again") -> ModelError:
    return ModelError(Diagnostic(code, problem, todo))


# --- the file ------------------------------------------------------------------------------------


def _bytes_of(path: Path) -> memoryview:
    """Return the file at ``path``, mapped: what nobody looks at is not read."""
    try:
        info = path.stat()
        if stat.S_ISDIR(info.st_mode):
            kind = kind_of_folder(path)
            raise _fault(
                "model-unreadable",
                f"the model `{path}` is a folder" + (f", {kind.what}" if kind else ""),
                kind.todo if kind else "give the path of the ONNX file itself",
            )
        if not stat.S_ISREG(info.st_mode):  # reading a pipe would wait for ever
            raise _fault("model-unreadable", f"the model `{path}` is not a regular file", None)
        if info.st_size > LARGEST_MESSAGE:
            raise _fault(
                "model-too-large",
                f"the model `{path}` has {info.st_size / 2**30:.1f} GiB, an ONNX file has at most 2",
                "save it with external data: `onnx.save(model, path, save_as_external_data=True)`",
            )
        if info.st_size == 0:
            return memoryview(b"")
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError as error:
        raise _fault("model-not-found", f"there is no model `{path}`", None) from error
    except OSError as error:
        raise _fault(
            "model-unreadable", f"the model `{path}` cannot be read: {error.strerror}", None
        ) from error


def _not_onnx(path: Path, data: bytes, reason: str) -> ModelError:
    kind = kind_of(data)
    if kind is not None:
        return _fault(
            "not-onnx",
            f"the model `{path}` is not an ONNX file: it looks like {kind.what}",
            kind.todo,
        )
    if not data.startswith(b"\x08"):  # the IR version, which every writer puts first
        return _fault("not-onnx", f"the model `{path}` is not an ONNX file: {reason}", None)
    return _fault(
        "damaged-model",
        f"the model `{path}` cannot be read as ONNX, it may be cut short: {reason}",
        "copy or export it again, and compare its size",
    )


def _check_versions(path: Path, model: ModelProto) -> None:
    """Refuse what this onnx does not know; versions are of the file format and of the ops."""
    if model.ir_version > onnx.IR_VERSION:
        raise _fault(
            "unsupported-ir-version",
            f"the model `{path}` has IR version {model.ir_version}, onnx {onnx.__version__} knows "
            f"{onnx.IR_VERSION}",
            "install a newer onnx, or export the model for an older one",
        )
    if not model.opset_import:
        raise _fault(
            "damaged-model",
            f"the model `{path}` does not say of which opset its nodes are",
            "copy or export it again: it may be cut short, or older than optc can read",
        )
    versions = {entry.version for entry in model.opset_import if entry.domain in DEFAULT_DOMAINS}
    newest = onnx.defs.onnx_opset_version()
    if len(versions) > 1:
        raise _fault(
            "unsupported-opset",
            f"the model `{path}` imports opsets {', '.join(map(str, sorted(versions)))} at once",
        )
    for version in versions:
        if not OLDEST_OPSET <= version <= newest:
            raise _fault(
                "unsupported-opset",
                f"the model `{path}` is of opset {version}, optc reads {OLDEST_OPSET} to {newest}",
                f"export it for an opset from {OLDEST_OPSET} to {newest}"
                + (", or install a newer onnx" if version > newest else ""),
            )


# --- what is in it -------------------------------------------------------------------------------

MOST_FAULTS = 20
"""A file that was cut or overwritten has thousands of faults; nobody reads more than these."""

CONSTANT_ATTRIBUTES = {
    "value": AttributeProto.TENSOR,
    "sparse_value": AttributeProto.SPARSE_TENSOR,
    "value_float": AttributeProto.FLOAT,
    "value_floats": AttributeProto.FLOATS,
    "value_int": AttributeProto.INT,
    "value_ints": AttributeProto.INTS,
    "value_string": AttributeProto.STRING,
    "value_strings": AttributeProto.STRINGS,
}

PACKED_BITS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}
"""By name, as not every onnx that optc runs with has them all."""

Name = str | bytes
"""Protobuf gives a string that is not UTF-8 as bytes."""


class _Inspection:
    """One look at all there is in a model before anything is made of it."""

    def __init__(self, external: _ExternalFiles) -> None:
        self.external = external
        self.found: list[Diagnostic] = []

    def faults(self, model: ModelProto) -> list[Diagnostic]:
        pending: list[GraphProto | FunctionProto] = [model.graph, *model.functions]
        self.names((e.domain for e in model.opset_import), "a domain")
        self.names((model.producer_name, model.producer_version), "the producer")
        self.names((t for e in model.metadata_props for t in (e.key, e.value)), "the metadata")
        while pending and len(self.found) < MOST_FAULTS:
            part = pending.pop()
            self.names((part.name,), "a graph")
            if isinstance(part, FunctionProto):
                self.names((*part.input, *part.output, part.domain), "a function")
            else:
                self.graph(part)
            for node in part.node:
                pending.extend(self.node(node))
        return self.found[:MOST_FAULTS]

    def graph(self, graph: GraphProto) -> None:
        for info in graph.input:
            self.value(info, "an input")
        for info in graph.output:
            self.value(info, "an output")
        for info in graph.value_info:
            self.value(info, "a tensor")
        for tensor in graph.initializer:
            self.tensor(tensor, f"the initialiser `{_text(tensor.name)}`")
        for sparse in graph.sparse_initializer:
            self.sparse(sparse, f"the initialiser `{_text(sparse.values.name)}`")

    def node(self, node: NodeProto) -> Iterator[GraphProto]:
        """Look at a node and yield its bodies."""
        names = (node.name, node.op_type, node.domain, *node.input, *node.output)
        self.names(names, "a node or tensor")
        where = f"an attribute of the node `{_text(node.name) or _text(node.op_type)}`"
        for attr in node.attribute:
            self.names((attr.name,), "an attribute")
            if attr.ref_attr_name:  # stands for an attribute of the call of a function
                continue
            if attr.HasField("t") or attr.type == AttributeProto.TENSOR:
                self.tensor(attr.t, where)
            if attr.HasField("sparse_tensor") or attr.type == AttributeProto.SPARSE_TENSOR:
                self.sparse(attr.sparse_tensor, where)
            if attr.HasField("g"):
                yield attr.g
            for tensor in attr.tensors:
                self.tensor(tensor, where)
            for sparse in attr.sparse_tensors:
                self.sparse(sparse, where)
            yield from attr.graphs
            if (
                node.op_type == "Constant"
                and node.domain in DEFAULT_DOMAINS
                and CONSTANT_ATTRIBUTES.get(attr.name) != attr.type
            ):
                self.add("damaged-model", f"{where} (Constant) is no value")

    def value(self, info: ValueInfoProto, what: str) -> None:
        self.names((info.name,), what)
        for kind in _tensor_types(info.type):
            self.names((d.dim_param for d in kind.shape.dim), "an axis")
            if kind.elem_type and not _is_known(kind.elem_type):
                self.add(
                    "damaged-model",
                    f"{what}, `{_text(info.name)}`, has the element type {kind.elem_type}, which "
                    "ONNX does not have",
                )

    def names(self, names: Iterable[Name], what: str) -> None:
        for name in names:
            if isinstance(name, bytes):
                self.add("bad-name", f"the name of {what} is not UTF-8: {name!r}")

    def tensor(self, tensor: TensorProto, what: str) -> None:
        self.names((tensor.name,), what)
        reason = _why_not_whole(tensor)
        if reason is not None:
            self.add("damaged-model", f"{what} {reason}")
        elif tensor.data_location == TensorProto.EXTERNAL:
            reason = self.external.why_not(tensor)
            if reason is not None:
                self.add("external-data", f"{what} {reason}", _TODO_EXTERNAL)

    def sparse(self, sparse: SparseTensorProto, what: str) -> None:
        self.names((sparse.values.name,), what)
        reason = _why_not_dense(sparse)
        if reason is not None:
            self.add("damaged-model", f"{what} {reason}")

    def add(self, code: str, problem: str, todo: str = "copy or export the model again") -> None:
        self.found.append(Diagnostic(code, problem, todo))


def _text(name: Name) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else name


def _tensor_types(kind: TypeProto) -> Iterator[TypeProto.Tensor | TypeProto.SparseTensor]:
    """Yield the tensor types in a type, those of sequences, optionals and maps included."""
    while True:
        match kind.WhichOneof("value"):
            case "tensor_type":
                yield kind.tensor_type
            case "sparse_tensor_type":
                yield kind.sparse_tensor_type
            case "sequence_type":
                kind = kind.sequence_type.elem_type
                continue
            case "optional_type":
                kind = kind.optional_type.elem_type
                continue
            case "map_type":
                kind = kind.map_type.value_type
                continue
        return


def _is_known(data_type: int) -> bool:
    return data_type != TensorProto.UNDEFINED and data_type in TensorProto.DataType.values()


def _bits(data_type: int) -> int:
    """Return how many bits one element takes in ``raw_data``."""
    packed = PACKED_BITS.get(TensorProto.DataType.Name(data_type))
    return packed or 8 * int(helper.tensor_dtype_to_np_dtype(data_type).itemsize)


def _why_not_whole(tensor: TensorProto) -> str | None:
    """Return why the data of ``tensor`` cannot be what its shape says, or None where it can."""
    if not _is_known(tensor.data_type):
        return f"has the element type {tensor.data_type}, which ONNX does not have"
    dims = list(tensor.dims)
    if any(dim < 0 for dim in dims) or math.prod(max(dim, 1) for dim in dims) > LARGEST_ARRAY:
        return f"has the shape {dims}"
    if tensor.HasField("segment"):
        return "is one segment of a larger tensor, which ONNX has no way to put together"
    count = math.prod(dims)
    if tensor.data_location == TensorProto.EXTERNAL:
        if tensor.data_type == TensorProto.STRING:
            return "holds text, which cannot be in external data"
        return None
    if tensor.data_type == TensorProto.STRING:
        present, wanted = len(tensor.string_data), count
        unit = "strings"
    elif tensor.HasField("raw_data"):
        present, wanted = len(tensor.raw_data), _nbytes(tensor)
        unit = "bytes"
    else:
        present = len(getattr(tensor, helper.tensor_dtype_to_field(tensor.data_type)))
        wanted = count
        unit = "values"
        if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128):
            wanted *= 2
        elif _bits(tensor.data_type) < 8:  # packed into bytes
            wanted = _nbytes(tensor)
    if present != wanted:
        return f"has {present} {unit} of data, its shape {dims} asks for {wanted}"
    return None


def _nbytes(tensor: TensorProto) -> int:
    bits: int = math.prod(tensor.dims) * _bits(tensor.data_type)
    return (bits + 7) // 8


def _why_not_dense(sparse: SparseTensorProto) -> str | None:
    """Return why a sparse tensor cannot be written out densely, or None where it can."""
    values, indices, dims = sparse.values, sparse.indices, list(sparse.dims)
    for part, what in ((values, "values"), (indices, "indices")):
        if part.data_location == TensorProto.EXTERNAL:
            return f"has {what} in external data, which sparse tensors cannot have"
        if reason := _why_not_whole(part):
            return f"is sparse, and among its {what} {reason}"
    if not dims or any(dim < 0 for dim in dims):
        return f"is sparse and has the shape {dims}"
    size = math.prod(dims) * _bits(values.data_type) // 8
    if size > LARGEST_MESSAGE:
        return f"is sparse and would take {size / 2**30:.1f} GiB densely, optc takes up to 2"
    count = math.prod(values.dims)
    if indices.data_type != TensorProto.INT64 or list(indices.dims) not in (
        [count],
        [count, len(dims)],
    ):
        return f"is sparse and has indices of shape {list(indices.dims)} for {count} values"
    found = numpy_helper.to_array(indices)
    ends = np.array(dims) if found.ndim == 2 else math.prod(dims)
    if ((found < 0) | (found >= ends)).any():
        return f"is sparse and has indices outside its shape {dims}"
    return None


# --- external data -------------------------------------------------------------------------------

_TODO_EXTERNAL = (
    "keep the files with the weights beside the model, as the exporter wrote them, and copy them "
    "whole"
)


class _ExternalFiles:
    """The files that hold a model's external data, each looked at once."""

    def __init__(self, model: Path) -> None:
        self.folder = model.parent
        # A model may itself be a link to where the model and its data are (as caches have it).
        self.roots = {self.folder.resolve(), model.resolve().parent}
        self.seen: dict[str, int | str] = {}

    def files(self) -> tuple[Path, ...]:
        """Return the files that are all right."""
        return tuple(
            self.folder / location for location, size in self.seen.items() if isinstance(size, int)
        )

    def why_not(self, tensor: TensorProto) -> str | None:
        """Return why the data of ``tensor`` cannot be read from its file, or None where it can."""
        entries = {entry.key: entry.value for entry in tensor.external_data}
        for key in ("offset", "length"):
            value = entries.get(key) or "0"
            if not (isinstance(value, str) and value.isascii() and value.isdecimal()):
                return f"has the {key} {value!r} in external data, which is no number"
            if len(value) > 18:
                return f"has the {key} {value} in external data, which no file reaches"
        location = entries.get("location", "")
        if not isinstance(location, str) or not location or "\0" in location:
            return f"has no usable location of its external data: {location!r}"
        if location not in self.seen:
            self.seen[location] = self.size_or_fault(location)
        size = self.seen[location]
        if isinstance(size, str):
            return f"has its data in `{location}`, {size}"
        _, offset, length = external_entry(tensor)
        wanted = _nbytes(tensor)
        if length is not None and length != wanted:
            return (
                f"has {length} bytes in `{location}`, its shape {list(tensor.dims)} asks for "
                f"{wanted}"
            )
        if offset + wanted > size:
            return (
                f"has its data in `{location}` at bytes {offset} to {offset + wanted}, but that "
                f"file has {size}"
            )
        return None

    def size_or_fault(self, location: str) -> int | str:
        """Return the size of the file, or why it must not or cannot be read."""
        relative = Path(location)
        if relative.is_absolute():
            return "which is an absolute path: it has to be relative to the model's folder"
        if ".." in relative.parts:
            return "which leads out of the model's folder"
        path = self.folder / relative
        try:
            # Also a folder on the way may be a link.
            real = path.resolve(strict=True)
            if not any(real.is_relative_to(root) for root in self.roots):
                return f"which is a link out of the model's folder, to `{real}`"
            info = path.stat()
        except RuntimeError:  # what Python before 3.13 makes of links in a circle
            return "which is a link to itself"
        except OSError as error:
            return f"which cannot be read: {error.strerror}"
        if not stat.S_ISREG(info.st_mode):
            return "which is not a regular file"
        if not os.access(path, os.R_OK):
            return "which cannot be read: Permission denied"
        return info.st_size


# --- functions -----------------------------------------------------------------------------------

FunctionId = tuple[str, str, str]
MAIN: FunctionId = ("", "", "")
"""Stands for the graph of the model, among its functions."""


def without_functions(model: ModelProto) -> ModelProto:
    """Return ``model`` with its local functions inlined; the model itself where it has none.

    Raises:
        ModelError: If they call themselves, or make a model without end.
    """
    if not model.functions:
        return model
    _check_functions(model)
    shell = _without_weights(model)  # the inliner goes through the model as bytes, several times
    try:
        checker.check_model(shell)
        inlined = inliner.inline_local_functions(shell, convert_version=True)
    except (checker.ValidationError, version_converter.ConvertError, RuntimeError) as error:
        raise _invalid(error) from error
    del inlined.graph.initializer[:]
    inlined.graph.initializer.extend(model.graph.initializer)
    return inlined


def _check_functions(model: ModelProto) -> None:
    """Refuse functions that call themselves, or that make a model without end once inlined."""
    functions = {_id(function): function for function in model.functions}
    own_nodes: dict[FunctionId, int] = {}
    calls = nx.DiGraph()
    for caller, part in [(MAIN, model.graph), *functions.items()]:
        called = [(n.domain, n.op_type, n.overload) for n in nodes_of(cast(GraphProto, part))]
        own_nodes[caller] = len(called)
        calls.add_node(caller)
        for callee, times in Counter(called).items():
            if callee in functions:
                calls.add_edge(caller, callee, times=times)
    try:
        order = list(nx.topological_sort(calls))
    except nx.NetworkXUnfeasible:
        names = [caller[1] for caller, _ in nx.find_cycle(calls)]
        raise _fault(
            "recursive-function",
            "the model's functions call themselves: " + " -> ".join(f"`{n}`" for n in names),
        ) from None
    if nx.dag_longest_path_length(calls, weight=None) > MAX_BODY_DEPTH:
        raise _fault("nesting", f"functions call each other more than {MAX_BODY_DEPTH} deep")
    nodes: dict[FunctionId, int] = {}
    for caller in reversed(order):
        inlined = sum(e["times"] * nodes[callee] for _, callee, e in calls.out_edges(caller, True))
        nodes[caller] = own_nodes[caller] + inlined
    if nodes[MAIN] > MOST_NODES:
        raise _fault(
            "model-too-large",
            f"the model has {nodes[MAIN]:,} nodes once its functions are inlined, optc takes "
            f"{MOST_NODES:,}",
        )


def _id(function: FunctionProto) -> FunctionId:
    return function.domain, function.name, function.overload


def _without_weights(model: ModelProto) -> ModelProto:
    """Return a copy whose initialisers are empty."""
    copy = ModelProto(
        ir_version=max(model.ir_version, MIN_IR_VERSION),
        opset_import=model.opset_import,
        functions=model.functions,
    )
    graph = model.graph
    copy.graph.name = graph.name or "graph"
    copy.graph.node.extend(graph.node)
    copy.graph.input.extend(graph.input)
    copy.graph.output.extend(graph.output)
    copy.graph.value_info.extend(graph.value_info)
    copy.graph.sparse_initializer.extend(graph.sparse_initializer)
    for tensor in graph.initializer:
        copy.graph.initializer.append(_empty(tensor.name, tensor.data_type))
    return copy


def _empty(name: str, data_type: int) -> TensorProto:
    return TensorProto(name=name, data_type=cast(TensorProto.DataType, data_type), dims=[0])


# --- the graph -----------------------------------------------------------------------------------


def _import_used_domains(graph: gs.Graph) -> None:
    """Import the domains that nodes are of, and no others.

    ONNX Runtime takes a model that lacks the import of a domain it knows; inlined functions leave
    imports behind.
    """
    imported = {
        "" if entry.domain in DEFAULT_DOMAINS else entry.domain: entry.version
        for entry in graph.import_domains
    }
    used = {node.domain or "" for node in all_nodes(graph)}
    if "" not in imported:
        if "" in used:
            raise _fault("unsupported-opset", "the model does not say of which opset its nodes are")
        imported[""] = graph.opset = OPSET_FOR_NEW_NODES
    graph.import_domains = [
        helper.make_opsetid(domain, imported.get(domain, 1)) for domain in sorted(used | {""})
    ]


def _check(graph: gs.Graph) -> None:
    """Refuse what onnx's checker refuses: ops of ONNX's own that it lacks, attributes, arities."""

    def without_data(constant: gs.Constant) -> TensorProto:
        return _empty(constant.name, helper.np_dtype_to_tensor_dtype(np.dtype(constant.dtype)))

    model = export_model(graph, place=without_data, value_info=False)
    for info in (*model.graph.input, *model.graph.output):
        # The checker wants a shape where ONNX Runtime needs none; it does not look at it.
        if info.type.WhichOneof("value") in (None, "tensor_type"):
            kind = info.type.tensor_type
            kind.elem_type = kind.elem_type or TensorProto.FLOAT
            kind.shape.SetInParent()
    try:
        checker.check_model(model)
    except checker.ValidationError as error:
        raise _invalid(error) from error


def _invalid(error: Exception) -> ModelError:
    return _fault("invalid-model", f"the model is not valid ONNX: {' '.join(str(error).split())}")


def _give_shapes(graph: gs.Graph, shapes: Mapping[str, tuple[str | int, ...]]) -> None:
    renamed: dict[str, str | int | None] = {}
    for tensor in graph.inputs:
        if tensor.type != "tensor_type":
            continue
        if tensor.dtype is None:
            raise _fault("untyped-input", f"the input `{tensor.name}` has no element type")
        declared = tensor.shape
        shape = list(shapes[tensor.name]) if tensor.name in shapes else _named(tensor)
        for old, new in zip(declared or (), shape or (), strict=True):
            if isinstance(old, str) and renamed.setdefault(old, new) != new:
                renamed[old] = None  # one name for two axes: it says nothing inside
        tensor.shape = shape
    new_names = set(renamed.values())
    inputs = {id(tensor) for tensor in graph.inputs}
    for tensor in _variables(graph):
        if id(tensor) not in inputs and tensor.shape is not None:
            # A symbol of the inside that happens to be called as one of the inputs is another.
            tensor.shape = [
                renamed.get(axis, None if axis in new_names else axis)
                if isinstance(axis, str)
                else axis
                for axis in tensor.shape
            ]


def _named(tensor: gs.Variable) -> list[str | int] | None:
    """Return the declared shape with a name for each axis that has none."""
    if tensor.shape is None:
        return None
    return [
        f"{tensor.name}_{index}" if axis is None else axis
        for index, axis in enumerate(tensor.shape)
    ]


def _variables(graph: gs.Graph) -> Iterator[gs.Variable]:
    """Yield every tensor that is computed or handed in, in bodies too."""
    yield from (t for t in all_tensors(graph).values() if isinstance(t, gs.Variable))
