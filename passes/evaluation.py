"""Computes what nodes give that read nothing but constants.

All nodes are computed in one session of ONNX Runtime, its optimisations off, so that the values are
the very ones the model would have computed. Where that fails the nodes are halved until the one that
makes it fail is alone. If ONNX Runtime has no kernel for it, ``onnx.reference`` computes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from optc.passes.graph import StoredValues, export_model, reads

Array = npt.NDArray[Any]

LENT_BYTES = 4096
"""Constants from here on are lent to the session where they are; smaller ones go into its model."""

IR_VERSION = 10
"""The first that has all the types ONNX Runtime computes with."""

RUNTIME_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)

REFERENCE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,  # some operators need packages that onnx does not
    LookupError,
    MemoryError,
    RuntimeError,  # NotImplementedError among them
    TypeError,
    ValueError,
)
"""What the numpy code of ``onnx.reference`` raises on what it does not cover."""

CARRIERS = {
    "tensor(bfloat16)": (TensorProto.FLOAT, ml_dtypes.bfloat16),
    "tensor(float8e4m3fn)": (TensorProto.FLOAT, ml_dtypes.float8_e4m3fn),
    "tensor(float8e4m3fnuz)": (TensorProto.FLOAT, ml_dtypes.float8_e4m3fnuz),
    "tensor(float8e5m2)": (TensorProto.FLOAT, ml_dtypes.float8_e5m2),
    "tensor(float8e5m2fnuz)": (TensorProto.FLOAT, ml_dtypes.float8_e5m2fnuz),
    "tensor(float8e8m0)": (TensorProto.FLOAT, ml_dtypes.float8_e8m0fnu),
    "tensor(float4e2m1)": (TensorProto.FLOAT, ml_dtypes.float4_e2m1fn),
    "tensor(int4)": (TensorProto.INT8, ml_dtypes.int4),
    "tensor(uint4)": (TensorProto.UINT8, ml_dtypes.uint4),
    "tensor(int2)": (TensorProto.INT8, ml_dtypes.int2),
    "tensor(uint2)": (TensorProto.UINT8, ml_dtypes.uint2),
}
"""Types that ONNX Runtime does not hand to numpy -> the wider type that carries them exactly."""


@dataclass(slots=True)
class Evaluation:
    """What came of evaluating nodes.

    Attributes:
        values: Name of a wanted tensor -> its value. Sequences and optionals are left out.
        failures: Name of a node that could not be computed -> why.
    """

    values: dict[str, Array] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


class _RefusedError(Exception):
    """ONNX Runtime takes the nodes at no price: it lacks a kernel, or their types are wrong."""


class _FailedError(Exception):
    """ONNX Runtime takes the nodes, but not with these values."""


def evaluate(nodes: Sequence[gs.Node], wanted: Iterable[str], opset: int) -> Evaluation:
    """Compute tensors that follow from constants.

    Args:
        nodes: In topological order, of the default domain. They read constants and each other, and
            are not changed.
        wanted: Names of the outputs to return. Those that need a failed node are left out.
        opset: Version of the default domain.
    """
    evaluator = _Evaluator(opset)
    names = frozenset(wanted)
    evaluator.compute(list(nodes), names)
    found = evaluator.known
    return Evaluation({name: found[name] for name in names & found.keys()}, evaluator.failures)


class _Evaluator:
    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.known: dict[str, Array] = {}
        self.failures: dict[str, str] = {}
        self.lost: set[str] = set()  # what cannot be computed as a node before it failed
        self.no_tensors: set[str] = set()  # computed, but cannot leave a session

    def compute(self, nodes: list[gs.Node], wanted: frozenset[str]) -> None:
        """Add to ``known`` those of ``wanted`` that ``nodes`` make."""
        nodes = [node for node in nodes if self.can_be_computed(node)]
        made = frozenset(tensor.name for node in nodes for tensor in node.outputs)
        if not nodes:
            return
        try:
            self.known |= self.on_onnxruntime(nodes, wanted & made)
        except (_RefusedError, _FailedError) as error:
            if len(nodes) == 1:
                self.compute_alone(nodes[0], wanted & made, error)
                return
            middle = len(nodes) // 2
            first, second = nodes[:middle], nodes[middle:]
            handed_on = frozenset(tensor.name for node in second for tensor in reads(node))
            self.compute(first, wanted | handed_on)
            self.compute(second, wanted)

    def can_be_computed(self, node: gs.Node) -> bool:
        names = {tensor.name for tensor in reads(node)}
        if names & self.no_tensors:
            self.failures[node.name] = "it reads a sequence, and cannot be computed with its maker"
        if names & (self.no_tensors | self.lost):
            self.lost.update(tensor.name for tensor in node.outputs if tensor.name)
            return False
        return True

    def compute_alone(self, node: gs.Node, wanted: frozenset[str], error: Exception) -> None:
        """Compute one node by the reference, unless ONNX Runtime found fault with its values."""
        if isinstance(error, _RefusedError):
            found = self.on_reference(node, wanted)
            if found is not None:
                self.known |= found
                return
        self.failures[node.name] = f"it cannot be computed ahead: {error}"
        self.lost.update(tensor.name for tensor in node.outputs if tensor.name)

    # --- the two evaluators ---

    def on_onnxruntime(self, nodes: list[gs.Node], wanted: frozenset[str]) -> dict[str, Array]:
        model, lent = self.model_of(nodes, wanted, may_lend=True)
        session = _session(model, lent)
        carried = {}
        for output in session.get_outputs():
            if not output.type.startswith("tensor("):
                self.no_tensors.add(output.name)
            elif output.type in CARRIERS:
                carried[output.name] = CARRIERS[output.type]
        if carried:
            del session
            for name, (type_, _) in carried.items():
                model.graph.node.add(op_type="Cast", input=[name], output=[f"{name}/carried"])
                model.graph.node[-1].attribute.append(helper.make_attribute("to", type_))
            del model.graph.output[:]
            for name in wanted:
                model.graph.output.add(name=f"{name}/carried" if name in carried else name)
            session = _session(model, lent)
        names = [o.name for o in session.get_outputs() if o.name not in self.no_tensors]
        if not names:
            return {}
        try:
            values = session.run(names, {})
        except RUNTIME_ERRORS as error:
            raise _FailedError(_first_line(error)) from error
        found = {}
        for name, value in zip(names, values, strict=True):
            plain = name.removesuffix("/carried")
            found[plain] = value.astype(carried[plain][1]) if plain in carried else value
        return found

    def on_reference(self, node: gs.Node, wanted: frozenset[str]) -> dict[str, Array] | None:
        """Return what ``onnx.reference`` computes, or None where it cannot or gets a type wrong."""
        from onnx.reference import ReferenceEvaluator

        model, _ = self.model_of([node], wanted, may_lend=False)
        try:
            typed = onnx.shape_inference.infer_shapes(model)
            values = ReferenceEvaluator(model).run(None, {})
        except (*REFERENCE_ERRORS, onnx.shape_inference.InferenceError):
            return None
        found = {}
        for info, value in zip(typed.graph.output, values, strict=True):
            array = np.asarray(value)
            expected = info.type.tensor_type.elem_type
            if not expected or array.dtype != helper.tensor_dtype_to_np_dtype(expected):
                return None
            found[info.name] = array
        return found

    def model_of(
        self, nodes: list[gs.Node], wanted: frozenset[str], *, may_lend: bool
    ) -> tuple[ModelProto, dict[str, Array]]:
        """Return a model of ``nodes``, and the constants that are to be lent to its session."""
        lent: dict[str, Array] = {}
        read = {tensor.name for node in nodes for tensor in node.inputs}

        def place(constant: gs.Constant) -> TensorProto | None:
            if (
                not may_lend or constant.name not in read
            ):  # of a body: only the model itself borrows
                return None
            return _lend(constant.name, constant._values, lent)

        domains = [helper.make_opsetid("", self.opset)]
        ir_version = max(IR_VERSION, helper.find_min_ir_version_for(domains, True))
        graph = gs.Graph(nodes, import_domains=domains, ir_version=ir_version)
        model = export_model(graph, place=place, value_info=False)
        made = {tensor.name for node in nodes for tensor in node.outputs}
        needed = {t.name for n in nodes for t in reads(n) if not isinstance(t, gs.Constant)}
        for name in sorted(needed - made):
            value = self.known[name]
            tensor = _lend(name, value, lent) if may_lend else None
            model.graph.initializer.append(tensor or numpy_helper.from_array(value, name))
        for name in sorted(wanted):
            model.graph.output.add(name=name)
        return model, lent


def _lend(name: str, stored: Array | StoredValues, lent: dict[str, Array]) -> TensorProto | None:
    """Return a tensor without data for a large value, and add its data to ``lent``."""
    dtype = np.dtype(stored.dtype)
    if stored.nbytes < LENT_BYTES or dtype.isbuiltin != 1 or dtype == object:
        return None
    value = stored if isinstance(stored, np.ndarray) else stored.load()
    lent[name] = np.ascontiguousarray(value)
    tensor = TensorProto(
        name=name,
        data_type=helper.np_dtype_to_tensor_dtype(dtype),
        dims=value.shape,
        data_location=TensorProto.EXTERNAL,
    )
    tensor.external_data.add(key="location", value="lent")
    return tensor


def _session(model: ModelProto, lent: dict[str, Array]) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False  # memory goes back when the session does
    options.intra_op_num_threads = 1  # no pool: starting one takes longer than what is computed
    options.add_session_config_entry("session.disable_prepacking", "1")  # each runs once
    values = [ort.OrtValue.ortvalue_from_numpy(value) for value in lent.values()]
    if lent:
        options.add_external_initializers(list(lent), values)
    try:
        return ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except RUNTIME_ERRORS as error:
        raise _RefusedError(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
