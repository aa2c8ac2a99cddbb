"""Single nodes on ONNX Runtime: values go from one to the next without being copied.

A node is given all that it reads, constants too, so nodes that differ in their constants alone share
a session: a model has far fewer kinds of nodes than nodes. All sessions take memory from one arena,
where what one lets go of is what the next writes to: fresh pages cost more than most operators do.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, TypeProto, helper

from optc.optimizer.custom_library import Libraries, register
from optc.optimizer.ort_errors import ORT_ERRORS, first_line
from optc.optimizer.reference import Array, array_of, ort_value
from optc.optimizer.simulation import short_floats, simulated
from optc.optimizer.torch_module import ModuleNode, ModuleRejected, TorchModule
from optc.passes.graph import DEFAULT_DOMAINS, Node, export_model, nodes_of, op_key

IR_VERSION = 10
"""The first that has all the types ONNX Runtime computes with."""

MOST_THREADS = 16
"""Each session has threads of its own; with more of them a single node gains little."""

THREADED_BYTES = 1 << 16
"""A node that reads less than this is computed by the thread that asks for it."""


class NodeRejected(Exception):
    """ONNX Runtime has no kernel for a node, or cannot compute it with what it is given."""


class NodeSession:
    """A small model on ONNX Runtime's CPU provider, its optimisations off.

    Args:
        model: All that it reads are inputs, or small.
        threads: How many compute it.
        libraries: Of custom operators that it has.
    """

    def __init__(self, model: ModelProto, *, threads: int = 1, libraries: Libraries = ()) -> None:
        _register_arena()
        options = ort.SessionOptions()
        register(options, libraries)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4  # the exception says it
        options.intra_op_num_threads = threads
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.use_env_allocators", "1")
        # The threads of one session must not keep those of the next from the processor.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Without this a product with weights of int8 rounds its other operand to 8 bits as well.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        try:
            self._session = ort.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except ORT_ERRORS as error:
            raise NodeRejected(first_line(error)) from error
        self.inputs = tuple(value.name for value in self._session.get_inputs())
        self._outputs = tuple(value.name for value in self._session.get_outputs())

    def run(
        self, given: Sequence[ort.OrtValue], options: ort.RunOptions | None = None
    ) -> list[ort.OrtValue]:
        """Return the outputs for ``given``, one value for each of ``inputs``."""
        binding = self._session.io_binding()
        for name, value in zip(self.inputs, given, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name)
        try:
            self._session.run_with_iobinding(binding, options or _quiet())
        except ORT_ERRORS as error:
            raise NodeRejected(first_line(error)) from error
        found: list[ort.OrtValue] = binding.get_outputs()
        return found


class ModuleSession:
    """A node that a torch module runs, on values of ONNX Runtime.

    Args:
        node: The node; all its inputs are given.
        module: What runs it.
    """

    def __init__(self, node: NodeProto, module: TorchModule) -> None:
        self._node = ModuleNode(node, module, {})
        self.inputs = tuple(filter(None, node.input))
        self._outputs = tuple(filter(None, node.output))

    def run(
        self, given: Sequence[ort.OrtValue], options: ort.RunOptions | None = None
    ) -> list[ort.OrtValue]:
        """Return the outputs for ``given``, one value for each of ``inputs``."""
        values = {name: array_in(value) for name, value in zip(self.inputs, given, strict=True)}
        try:
            found = self._node.run(values)
        except ModuleRejected as error:
            raise NodeRejected(str(error)) from error
        return [value_of(found[name]) for name in self._outputs]


class NodeSessions:
    """Sessions for the nodes of one graph, each made when it is first asked for.

    Args:
        graph: Its operator versions are meant.
        libraries: Of custom operators that it has.
        modules: Operator, as domain and op -> the torch module that runs its nodes.

    Attributes:
        made: How many sessions were made.
    """

    def __init__(
        self,
        graph: gs.Graph,
        libraries: Libraries = (),
        modules: Mapping[tuple[str, str], TorchModule] = MappingProxyType({}),
    ) -> None:
        self._libraries = libraries
        self._modules = modules
        self._domains = graph.import_domains or [helper.make_opsetid("", graph.opset)]
        self._ir_version = max(IR_VERSION, helper.find_min_ir_version_for(self._domains, True))
        self._known: dict[tuple[bytes, bool], NodeSession] = {}
        self.made = 0

    def of_node(self, node: gs.Node, given: Sequence[ort.OrtValue]) -> NodeSession | ModuleSession:
        """Return the session that computes ``node``, which has no bodies.

        Args:
            node: Any node. What stands in its attributes is in the session.
            given: Values as the node reads them, omitted inputs left out. Only types are looked at.
        """
        read = [gs.Variable(f"i{i}" if t.name else "") for i, t in enumerate(node.inputs)]
        made = [gs.Variable(f"o{i}" if t.name else "") for i, t in enumerate(node.outputs)]
        alone = Node(node.op, "node", node.attrs, read, made, node.domain)
        names = [tensor.name for tensor in read if tensor.name]
        outputs = [tensor.name for tensor in made if tensor.name]
        model = self.model(alone, dict(zip(names, given, strict=True)), outputs)
        if (module := self._modules.get(op_key(node))) is not None:
            return ModuleSession(model.graph.node[0], module)
        key = (model.SerializeToString(deterministic=True), _is_large(given))
        if key not in self._known:
            self._known[key] = self.of_model(model, given)
        return self._known[key]

    def model(
        self, node: gs.Node, inputs: Mapping[str, ort.OrtValue], outputs: Sequence[str]
    ) -> ModelProto:
        """Return ``node`` as a model with ``outputs``, and with inputs of the types that are given."""
        graph = gs.Graph([node], import_domains=self._domains, ir_version=self._ir_version)
        model = export_model(graph, value_info=False)
        for name, value in inputs.items():
            model.graph.input.add(name=name, type=type_of(value))
        for name in outputs:
            model.graph.output.add(name=name)
        return model

    def of_model(self, model: ModelProto, given: Sequence[ort.OrtValue]) -> NodeSession:
        """Return a new session for ``model``, which is to be run on values like ``given``."""
        threads = _threads() if _is_large(given) else 1
        self.made += 1
        model = simulated(model) if short_floats(model) else model
        custom = any(node.domain not in DEFAULT_DOMAINS for node in nodes_of(model.graph))
        return NodeSession(model, threads=threads, libraries=self._libraries if custom else ())


def _is_large(given: Sequence[ort.OrtValue]) -> bool:
    return max(map(bytes_of, given), default=0) >= THREADED_BYTES


@cache
def _register_arena() -> None:
    """Make the arena that sessions share; sessions of others do not use it."""
    kind = ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    as_requested = 1
    ort.create_and_register_allocator(
        ort.OrtMemoryInfo("Cpu", kind, 0, ort.OrtMemType.DEFAULT),
        ort.OrtArenaCfg({"arena_extend_strategy": as_requested}),
    )


@cache
def rounding_session(number: int) -> NodeSession:
    """Return the session that rounds float32 to a type of ONNX and gives float32 again."""
    return _session_of_text(
        f"""g (float[] i) => (float[] o) {{
            low = Cast <to: int = {number}> (i)
            o = Cast <to: int = {TensorProto.FLOAT}> (low)
        }}"""
    )


@cache
def quantising_session(number: int) -> NodeSession:
    """Return the session that quantises float32 to a type of 8 bits, by a scale, and back."""
    return _session_of_text(
        f"""g (float[] i, float scale) => (float[] o) {{
            low = QuantizeLinear <output_dtype: int = {number}> (i, scale)
            o = DequantizeLinear (low, scale)
        }}"""
    )


def _session_of_text(text: str) -> NodeSession:
    model = onnx.parser.parse_model(f'<ir_version: {IR_VERSION}, opset_import: ["" : 21]> {text}')
    for value in (*model.graph.input, *model.graph.output):
        if value.name in "io":
            value.type.tensor_type.ClearField("shape")  # any
    return NodeSession(model, threads=_threads())


def give_back_memory() -> None:
    """Return to the system what no value lies in any more: allocators keep it for later."""
    options = _quiet()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    rounding_session(TensorProto.FLOAT16).run([value_of(np.zeros(1, np.float32))], options)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is not None:
        trim(0)


# --- values --------------------------------------------------------------------------------------


def value_of(array: Array) -> ort.OrtValue:
    """Return ``array`` for ONNX Runtime, which reads it where it is; text is copied."""
    if array.dtype.kind not in "OSUT":
        return ort_value(array)
    strings = helper.make_tensor("i", TensorProto.STRING, array.shape, array.ravel().tolist())
    node = helper.make_node("Identity", ["i"], ["o"])
    graph = helper.make_graph([node], "text", [], [], [strings])
    graph.output.add(name="o")
    domains = [helper.make_opsetid("", 21)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=IR_VERSION)
    return NodeSession(model).run([])[0]


def is_array(value: ort.OrtValue) -> bool:
    """Whether ``value`` is a tensor, and not a sequence or an optional."""
    return bool(value.is_tensor())


def array_in(value: ort.OrtValue) -> Array:
    """Return a tensor's array: a view of the value's memory wherever numpy knows its type."""
    try:
        found: Array = value.numpy()
    except ORT_ERRORS:  # bfloat16, float8: the binding knows no array of it
        found = array_of(value)
    return found


def bytes_of(value: ort.OrtValue) -> int:
    """Return the size of a tensor; 0 for what is no tensor, or text."""
    if not is_array(value) or value.element_type() == TensorProto.STRING:
        return 0
    return int(value.tensor_size_in_bytes())


def type_of(value: ort.OrtValue) -> TypeProto:
    """Return the type of ``value``; a tensor's rank is left open."""
    return _type_named(value.data_type())


def _type_named(words: str) -> TypeProto:
    """Return the type that ONNX Runtime calls ``seq(tensor(float))``."""
    kind, _, rest = words.removesuffix(")").partition("(")
    made = TypeProto()
    if kind == "tensor":
        made.tensor_type.elem_type = TensorProto.DataType.Value(rest.upper())
    elif kind == "seq":
        made.sequence_type.elem_type.CopyFrom(_type_named(rest))
    elif kind == "optional":
        made.optional_type.elem_type.CopyFrom(_type_named(rest))
    else:
        raise NodeRejected(f"its values are of the type {words}")
    return made


@cache
def _threads() -> int:
    return min(MOST_THREADS, len(os.sched_getaffinity(0)))


def _quiet() -> ort.RunOptions:
    options = ort.RunOptions()
    options.log_severity_level = 4
    return options
