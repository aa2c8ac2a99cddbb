"""What the original model computes: on ONNX Runtime, on the CPU, with every optimisation off.

A model that ONNX Runtime cannot load is tried once more with a lower IR version, then on onnx's
own reference implementation; which it was is part of every result. `Model` also makes the variants
that verification needs: with other tensors as outputs, with other weights, with ONNX Runtime's
optimisations on. The variants share one copy of the large weights.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import networkx as nx
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, inliner, numpy_helper

from optc.optimizer.custom_library import Libraries, register
from optc.optimizer.made_up import is_float
from optc.optimizer.model_parts import read_by
from optc.optimizer.ort_errors import ORT_ERRORS, first_line
from optc.passes.graph import DEFAULT_DOMAINS, StoredValues, nodes_of
from optc.specs.diagnostic import Diagnostic, ModelError

if TYPE_CHECKING:
    from optc.optimizer.cut import Cut
    from optc.optimizer.torch_module import Expected, TorchModule

Array = npt.NDArray[Any]
Values = dict[str, Any]
"""Name -> array; a sequence or map that a model gives back is a list or dict of them."""

EVALUATOR_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    ImportError,
    MemoryError,
)
"""What onnx's reference implementation raises: an op there is any Python code."""

LOWER_IR_VERSION = 10
"""ONNX Runtime 1.20 reads it. What later versions added is metadata, and types that a runtime of
that age refuses in any case."""

SHAPE_OPS = ("Shape", "Size", "EyeLike", "RandomNormalLike", "RandomUniformLike")
"""Ops that read the shape of their input and not its values."""

LIFTED_BYTES = 1024
"""Float weights from this size on are kept outside the model and shared by its variants."""

_NATIVE = "?bhilqBHILQefd"
"""Kinds of numpy arrays that ONNX Runtime's binding takes and gives as they are."""


class Rejected(Exception):
    """A model could not be run on an input. The text is the runtime's own."""


class Runner(Protocol):
    """A model, ready to run.

    Attributes:
        engine: What runs it, in words.
        inputs: Names of the inputs it must be given.
        outputs: Names of its outputs, in order.
    """

    engine: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, feeds: Mapping[str, Array]) -> Values:
        """Return all outputs in order; raises Rejected where the model does not take ``feeds``."""
        ...


def owned(value: Any) -> Any:
    """Return ``value`` in memory of its own: an output of ONNX Runtime keeps its whole arena alive."""
    return value.copy() if isinstance(value, np.ndarray) else value


class OrtRunner:
    """A model on ONNX Runtime's CPU provider.

    Args:
        model: Its file, or the model itself in memory.
        folder: Where the external data of a model in memory is.
        optimised: Whether ONNX Runtime may optimise it.
        weights: Name of an initialiser -> values to use in its place. Not copied.
        libraries: Of custom operators that it has.
    """

    def __init__(
        self,
        model: Path | ModelProto,
        folder: Path,
        *,
        optimised: bool = False,
        weights: Mapping[str, Array] | None = None,
        libraries: Libraries = (),
    ) -> None:
        options = ort.SessionOptions()
        register(options, libraries)
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = (
            level.ORT_ENABLE_ALL if optimised else level.ORT_DISABLE_ALL
        )
        options.log_severity_level = 4  # the exception says it; stderr need not say it again
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(folder.resolve()))
        # Without this a product with weights of int8 rounds its other operand to 8 bits as well.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        # ONNX Runtime reads these arrays for as long as the session lives.
        self._weights = {name: ort_value(array) for name, array in (weights or {}).items()}
        options.add_external_initializers(list(self._weights), list(self._weights.values()))
        source = model.SerializeToString() if isinstance(model, ModelProto) else str(model)
        self._session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self._run_options = ort.RunOptions()
        self._run_options.log_severity_level = 4
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self.inputs = tuple(value.name for value in inputs)
        self.outputs = tuple(value.name for value in outputs)
        # numpy does not know bfloat16, float8 and the 4-bit types: these go by ONNX's number.
        self._by_number = any("bfloat16" in v.type or "float8" in v.type for v in inputs + outputs)
        off = "on" if optimised else "off"
        self.engine = f"ONNX Runtime {ort.__version__} on the CPU, its optimisations {off}"

    def run(self, feeds: Mapping[str, Array]) -> Values:
        """Return all outputs in order; raises Rejected where the model does not take ``feeds``."""
        feeds = {name: np.asarray(array, order="C") for name, array in feeds.items()}
        try:
            if not self._by_number:
                found = self._session.run(None, feeds, self._run_options)
            else:
                values = {name: ort_value(array) for name, array in feeds.items()}
                found = self._session.run_with_ort_values(None, values, self._run_options)
                found = [array_of(value) for value in found]
        except ORT_ERRORS as error:
            raise Rejected(str(error)) from error
        return dict(zip(self.outputs, found, strict=True))


class EvaluatorRunner:
    """A model on `onnx.reference`: every op in Python, slow, and the last word on what it means."""

    def __init__(self, model: ModelProto) -> None:
        from onnx.reference import ReferenceEvaluator

        self._evaluator = ReferenceEvaluator(model)
        constants = {tensor.name for tensor in model.graph.initializer}
        self.inputs = tuple(v.name for v in model.graph.input if v.name not in constants)
        self.outputs = tuple(value.name for value in model.graph.output)
        self.engine = f"onnx.reference of onnx {onnx.__version__}"

    def run(self, feeds: Mapping[str, Array]) -> Values:
        """Return all outputs in order; raises Rejected where the model does not take ``feeds``."""
        try:
            found = self._evaluator.run(None, dict(feeds))
        except EVALUATOR_ERRORS as error:
            raise Rejected(f"{type(error).__name__}: {error}") from error
        return dict(zip(self.outputs, found, strict=True))


class Model:
    """A model file, and the variants of it that verification runs.

    Args:
        path: Of the file.
        libraries: Of custom operators that it has.
        modules: Operator, as domain and op -> the torch module that runs its nodes. The rest of the
            model runs in parts around these (`optc.optimizer.mixed_runner`).
        cut: Where a part is cut out of the model that is meant in place of the whole.
        results: Name of a tensor that a module gives -> what it has to be, where that is known.
    """

    def __init__(
        self,
        path: Path,
        libraries: Libraries = (),
        modules: Mapping[tuple[str, str], Path] = MappingProxyType({}),
        cut: Cut | None = None,
        results: Mapping[str, Expected] = MappingProxyType({}),
    ) -> None:
        self.path = path
        self.libraries = libraries
        self.modules = modules
        self.results = results
        self.cut = cut

    def _read(self) -> ModelProto:
        """Return the model, data of other files left out."""
        proto = onnx.load(self.path, load_external_data=False)
        return proto if self.cut is None else self.cut.of(_without_functions(proto))

    @property
    def runner(self) -> Runner:
        """The model as it is, without optimisations.

        Raises:
            ModelError: ``cannot-run-original`` if neither runtime can load it.
        """
        return self._opened[0]

    def release(self) -> None:
        """Let go of the runner's memory; it is loaded again when it is asked for."""
        vars(self).pop("_opened", None)

    @cached_property
    def _opened(self) -> tuple[Runner, int | None]:
        """The runner, and the IR version it had to be told in place of the file's."""
        if self._is_mixed:
            return self._mixed_runner(*self.parts, self._open_part), None
        folder = self.path.parent
        try:
            source = self.path if self.cut is None else self._read()
            return OrtRunner(source, folder, libraries=self.libraries), None
        except ORT_ERRORS as error:
            words = first_line(error)
        try:
            proto = self._read()
            onnx.load_external_data_for_model(proto, str(folder))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise self._cannot_run(words, first_line(error)) from error
        if proto.ir_version > LOWER_IR_VERSION and proto.ByteSize() < 2**31:
            newer, proto.ir_version = proto.ir_version, LOWER_IR_VERSION
            try:
                lowered = OrtRunner(proto, folder, libraries=self.libraries)
            except ORT_ERRORS:
                proto.ir_version = newer
            else:
                lowered.engine += f" (read as IR version {LOWER_IR_VERSION}, not {newer})"
                return lowered, LOWER_IR_VERSION
        try:
            evaluator = EvaluatorRunner(proto)
        except EVALUATOR_ERRORS as error:
            raise self._cannot_run(words, f"{type(error).__name__}: {error}") from error
        evaluator.engine += f" (ONNX Runtime: {words})"
        return evaluator, None

    def optimised(self) -> Runner | None:
        """Return the model with ONNX Runtime's optimisations, or None where it cannot load it."""
        if self.by_evaluator:
            return None
        proto, weights = self.parts
        try:
            return self._run_as(proto, weights, optimised=True)
        except ORT_ERRORS:
            return None

    def variant(
        self,
        outputs: Sequence[str] | None = None,
        change: Callable[[str, Array], Array] | None = None,
    ) -> Runner:
        """Return the model with ``outputs`` in place of its own, and its float weights changed.

        Args:
            outputs: Names of tensors of the main graph. None: the outputs it has.
            change: Called with name and values of each float weight; returns what to use instead.

        Raises:
            Rejected: If the runtime does not take the model like this.
        """
        proto, weights = self.parts
        if outputs is not None:
            proto = _copy(proto)
            declared = {value.name: value for value in (*proto.graph.output, *proto.graph.input)}
            chosen = [declared.get(name) or onnx.ValueInfoProto(name=name) for name in outputs]
            del proto.graph.output[:]
            proto.graph.output.extend(chosen)
        if change is not None:
            proto = _copy(proto) if outputs is None else proto
            weights = {name: change(name, array) for name, array in weights.items()}
            for name, tensor in _small_float_constants(proto.graph):
                array = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array(change(name, array), tensor.name))
        if self.by_evaluator:
            return EvaluatorRunner(_whole(proto, weights))
        try:
            return self._run_as(proto, weights)
        except ORT_ERRORS as error:
            raise Rejected(first_line(error)) from error

    def _run_as(
        self, proto: ModelProto, weights: Mapping[str, Array], *, optimised: bool = False
    ) -> Runner:
        def opened(part: ModelProto, own: Mapping[str, Array]) -> Runner:
            return OrtRunner(
                part,
                self.path.parent,
                optimised=optimised,
                weights=own,
                libraries=self.libraries,
            )

        return (
            self._mixed_runner(proto, weights, opened) if self._is_mixed else opened(proto, weights)
        )

    # -- with nodes that modules run

    @cached_property
    def _is_mixed(self) -> bool:
        """Whether modules run some nodes of the main graph."""
        if not self.modules:
            return False
        nodes = _without_functions(self._read()).graph.node
        return any(_key(node) in self.modules for node in nodes)

    def _mixed_runner(
        self,
        proto: ModelProto,
        weights: Mapping[str, Array],
        open_: Callable[[ModelProto, Mapping[str, Array]], Runner],
    ) -> Runner:
        from optc.optimizer.mixed_runner import MixedRunner

        return MixedRunner(proto, weights, self.path.parent, self._module_of, open_, self.results)

    def _open_part(self, part: ModelProto, weights: Mapping[str, Array]) -> Runner:
        """Return what runs a part of the model as it is.

        Raises:
            ModelError: ``cannot-run-original``.
        """
        try:
            return OrtRunner(part, self.path.parent, weights=weights, libraries=self.libraries)
        except ORT_ERRORS as error:
            other = "it does not take the modules that run other parts"
            raise self._cannot_run(first_line(error), other) from error

    def _module_of(self, node: NodeProto) -> TorchModule | None:
        """Return the module that runs ``node``, loaded once; None for ONNX Runtime."""
        from optc.optimizer.torch_module import ModuleRejected, TorchModule

        path = self.modules.get(_key(node))
        if path is None:
            return None
        if path not in self._loaded_modules:
            try:
                self._loaded_modules[path] = TorchModule(path)
            except ModuleRejected as error:
                raise self._cannot_run("its module is for torch", str(error)) from error
        return self._loaded_modules[path]

    @cached_property
    def _loaded_modules(self) -> dict[Path, TorchModule]:
        return {}

    @cached_property
    def parts(self) -> tuple[ModelProto, dict[str, Array]]:
        """The model without the large float weights of its main graph, and these by name.

        Those in external files are mapped, not read.
        """
        proto = self._read()
        if self._is_mixed:
            proto = _without_functions(proto)
        else:
            proto.ir_version = self._opened[1] or proto.ir_version
        _constants_to_initialisers(proto.graph)
        weights = {}
        for tensor in proto.graph.initializer:
            stored = StoredValues(tensor, self.path.parent)
            if not is_float(stored.dtype) or stored.nbytes < LIFTED_BYTES:
                continue
            weights[tensor.name] = stored.load()
            lifted = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            lifted.data_location = TensorProto.EXTERNAL
            lifted.external_data.add(key="location", value="given-in-memory")
            tensor.CopyFrom(lifted)
        return proto, weights

    @cached_property
    def dataflow(self) -> nx.DiGraph:
        """The tensors of the main graph; an edge goes from what a node reads to what it makes.

        In the order of the file, which is a topological one. A tensor's attribute ``node`` is the
        NodeProto that makes it. A body's reads count as its node's. What reads no more than the
        shape of a tensor does not depend on its values, so there is no edge.
        """
        tensors = nx.DiGraph()
        for node in self.parts[0].graph.node:
            made = [name for name in node.output if name]
            tensors.add_nodes_from(made, node=node)
            if node.op_type in SHAPE_OPS:
                continue
            tensors.add_edges_from((read, name) for read in read_by(node) for name in made)
        return tensors

    def leading_to(self, tensor: str) -> set[str]:
        """Return the names of ``tensor`` and of all that it is computed from."""
        if tensor not in self.dataflow:
            return {tensor}
        return {tensor, *nx.ancestors(self.dataflow, tensor)}

    @property
    def by_evaluator(self) -> bool:
        """Whether only `onnx.reference` can run the model here."""
        return isinstance(self.runner, EvaluatorRunner)

    def _cannot_run(self, ort_words: str, other_words: str) -> ModelError:
        return ModelError(
            Diagnostic(
                "cannot-run-original",
                f"nothing here can run `{self.path}`, so there is nothing to compare with: "
                f"ONNX Runtime {ort.__version__}: {ort_words}; onnx.reference: {other_words}",
                "use an onnxruntime that takes the model, or one of opset and IR version that "
                "this one reads",
            )
        )


def flattened(values: Mapping[str, Any]) -> dict[str, Array]:
    """Return ``values`` with each sequence and map taken apart: ``name[0]``, ``name[key]``."""
    flat: dict[str, Array] = {}
    for name, value in values.items():
        if isinstance(value, list):
            flat |= flattened({f"{name}[{index}]": item for index, item in enumerate(value)})
        elif isinstance(value, dict):
            flat |= flattened({f"{name}[{key}]": item for key, item in value.items()})
        elif value is not None:
            flat[name] = np.asarray(value)
    return flat


# --- values in and out ---------------------------------------------------------------------------


def ort_value(array: Array) -> ort.OrtValue:
    """Return ``array`` for ONNX Runtime, which reads it in place."""
    array = np.require(array, requirements=["C", "A"])
    if array.dtype.char in _NATIVE:
        return ort.OrtValue.ortvalue_from_numpy(array)
    number = helper.np_dtype_to_tensor_dtype(array.dtype)
    bits = array.view(f"u{array.dtype.itemsize}")
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, number)


def array_of(value: ort.OrtValue) -> Any:
    """Return a copy of what ONNX Runtime gave back, in the dtype ONNX means."""
    if not value.is_tensor():
        raise Rejected("a model with bfloat16 or float8 outputs cannot give a sequence back, too")
    dims = tuple(value.shape())
    tensor = TensorProto(data_type=value.element_type(), dims=dims)
    size = value.tensor_size_in_bytes() if math.prod(dims) else 0
    tensor.raw_data = ctypes.string_at(value.data_ptr(), size) if size else b""
    return numpy_helper.to_array(tensor)


# --- models in memory ----------------------------------------------------------------------------


def _copy(proto: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(proto)
    return copy


def _whole(proto: ModelProto, weights: Mapping[str, Array]) -> ModelProto:
    """Return a copy of ``proto`` with ``weights`` in it again."""
    proto = _copy(proto)
    for tensor in proto.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
    return proto


def _constants_to_initialisers(graph: GraphProto) -> None:
    """Make the Constant nodes of the main graph initialisers: only these can be shared."""
    kept = []
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            tensor = graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
        else:
            kept.append(node)
    if len(kept) < len(graph.node):
        kept = [_copied(node) for node in kept]
        del graph.node[:]
        graph.node.extend(kept)


def _without_functions(model: ModelProto) -> ModelProto:
    """Return ``model`` with its functions inlined: nodes in them can be cut at, too."""
    if not model.functions:
        return model
    return inliner.inline_local_functions(model, convert_version=False)


def _key(node: NodeProto) -> tuple[str, str]:
    """Return domain, "" for the default one, and op."""
    return "" if node.domain in DEFAULT_DOMAINS else node.domain, node.op_type


def _copied(node: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    return copy


def _small_float_constants(graph: GraphProto) -> Iterable[tuple[str, TensorProto]]:
    """Yield the float constants that stand in the model itself, bodies included.

    Exporters call many of them alike, so each is given with a name of its own.
    """
    tensors = list(graph.initializer)
    for node in nodes_of(graph):
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                tensors.append(attribute.t)
            elif attribute.HasField("g"):
                tensors += attribute.g.initializer
    for index, tensor in enumerate(tensors):
        in_file = tensor.data_location == TensorProto.EXTERNAL
        if not in_file and is_float(helper.tensor_dtype_to_np_dtype(tensor.data_type)):
            yield f"{index}: {tensor.name}", tensor
