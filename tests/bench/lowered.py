"""What the benchmarks measure of a lowered model: is it valid, what is in it, what it computes.

A lowered model is a list of parts in the order they run: one for a converter, the stages of a
package for optc. All are measured by the same means: optc's simulator of low precision, its count
of FLOPs, its way to ask TensorRT for RTX.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from converter import CAPABILITY
from onnx import ModelProto

from optc.optimizer.arrays import dtype_name, typed
from optc.optimizer.builder import Workers
from optc.optimizer.compare import errors, is_inexact, wide
from optc.optimizer.job import BuildJob, Profile
from optc.optimizer.reference import OrtRunner
from optc.optimizer.simulation import simulated
from optc.passes.flops import flops
from optc.passes.graph import bodies_of, import_model
from optc.passes.shape import annotate, infer

Feeds = dict[str, Any]
Case = Callable[[Feeds], Feeds]

FLOATS = ("float32", "float16", "bfloat16")
LOW = ("float16", "bfloat16")
QUANTISING = ("QuantizeLinear", "DequantizeLinear")


# --- what it computes ----------------------------------------------------------------------------


class Chain:
    """The parts of a lowered model, ready to run on the simulator.

    Args:
        parts: Files.
        simulate: Whether what is computed in less than fp32 is rounded; where not, the parts run as
            ONNX Runtime runs them.
    """

    def __init__(self, parts: Sequence[Path], *, simulate: bool = True) -> None:
        self.runners = [_runner(part, simulate) for part in parts]

    def run(self, feeds: Mapping[str, Any]) -> Feeds:
        """Return all that goes in and out of parts."""
        values = dict(feeds)
        for runner in self.runners:
            values |= runner.run({name: values[name] for name in runner.inputs})
        return values


def _runner(part: Path, simulate: bool) -> OrtRunner:
    if not simulate:
        return OrtRunner(part, part.parent)
    return OrtRunner(simulated(onnx.load(part)), part.parent)


def outputs_of(model: Path) -> list[str]:
    """Return the names of the outputs."""
    return [value.name for value in onnx.load(model, load_external_data=False).graph.output]


def of_scale(expected: Mapping[str, Any], found: Mapping[str, Any]) -> float:
    """Return the largest difference of an output that is floats over its largest number.

    It is infinite where an output has another shape or type, or is finite on one side only.
    """
    return max((_of_scale(array, found[name]) for name, array in expected.items()), default=0.0)


def _of_scale(expected: Any, found: Any) -> float:
    found = typed(found, dtype_name(expected.dtype))
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return float("inf")
    if not is_inexact(expected):
        return 0.0
    want = wide(expected).reshape(-1)
    size = np.abs(want)
    scale = float(np.max(size, initial=0.0, where=np.isfinite(size))) or 1.0
    return float(np.max(errors(want, wide(found).reshape(-1)), initial=0.0)) / scale


def sqnr_db(expected: Mapping[str, Any], found: Mapping[str, Any]) -> float:
    """Return the least ratio of signal to noise of the outputs that are floats, in decibels."""
    ratios = []
    for name, array in expected.items():
        if is_inexact(array):
            if array.shape != found[name].shape:
                return float("-inf")
            want = wide(array)
            noise = float(np.sum((wide(found[name]) - want) ** 2))
            signal = float(np.sum(want**2))
            if noise:
                ratios.append(10 * np.log10(signal / noise) if signal else float("-inf"))
    return float(min(ratios, default=float("inf")))


# --- what is in it -------------------------------------------------------------------------------


@dataclass(slots=True)
class Ledger:
    """What a lowered model is made of, all parts together.

    Attributes:
        work: Floating-point operations of what computes on floats, Casts left out.
        low: Those of it that are computed in fp16 or bf16, or on quantised operands.
        quantised: Those of it on quantised operands.
        casts: Casts from one float type to another.
        quantising: Of each of Q and DQ how many.
    """

    work: int = 0
    low: int = 0
    quantised: int = 0
    casts: int = 0
    quantising: dict[str, int] | None = None

    @property
    def share(self) -> float:
        """The share of the work that is in low precision."""
        return self.low / self.work if self.work else 0.0


def ledger_of(parts: Sequence[Path], values: Mapping[str, Any]) -> Ledger:
    """Count what is in ``parts`` at the extents of ``values``, which go in and out of them."""
    ledger = Ledger(quantising=dict.fromkeys(QUANTISING, 0))
    for part in parts:
        model = onnx.load(part, load_external_data=False)
        _pin(model, values)
        graph = import_model(model, part.parent)
        shapes = infer(graph, opset=graph.opset)
        annotate(graph, shapes)
        _count(ledger, graph, flops(graph, shapes, {}))
    return ledger


def _pin(model: ModelProto, values: Mapping[str, Any]) -> None:
    """Give the inputs the extents of ``values``; what is said of other tensors may not hold."""
    for info in model.graph.input:
        if info.name in values:
            shape = info.type.tensor_type.shape
            del shape.dim[:]
            for extent in np.shape(values[info.name]):
                shape.dim.add(dim_value=extent)
    del model.graph.value_info[:]
    for info in model.graph.output:
        info.type.tensor_type.ClearField("shape")


def _count(ledger: Ledger, graph: gs.Graph, work: Mapping[str, int]) -> None:
    for node in graph.nodes:
        if bodies := bodies_of(node):
            inside = Ledger(quantising=ledger.quantising)
            for body in bodies:
                _count(inside, body, dict.fromkeys((n.name for n in body.nodes), 1))
            ledger.casts += inside.casts
            ledger.work += work[node.name]
            ledger.low += round(work[node.name] * inside.share)
        elif node.op in QUANTISING:
            assert ledger.quantising is not None
            ledger.quantising[node.op] += 1
        elif node.op == "Cast":
            types = {_type(node.inputs[0]), _type(node.outputs[0])}
            ledger.casts += len(types) == 2 and types <= {*FLOATS}
        elif computes_in := _computes_in(node):
            ledger.work += work[node.name]
            quantised = _is_quantised(node)
            if computes_in in LOW or quantised:
                ledger.low += work[node.name]
            if quantised:
                ledger.quantised += work[node.name]


def _computes_in(node: gs.Node) -> str:
    """Return the float type that a node computes in; nothing where it computes on no floats."""
    types = [_type(tensor) for tensor in (*node.inputs[:1], *node.outputs[:1])]
    return next((name for name in types if name in FLOATS), "")


def _is_quantised(node: gs.Node) -> bool:
    makers = [tensor.inputs[0].op for tensor in node.inputs[:2] if tensor.inputs]
    return len(makers) == 2 and set(makers) == {"DequantizeLinear"}


def _type(tensor: gs.Tensor) -> str:
    return "" if tensor.dtype is None else np.dtype(tensor.dtype).name


# --- what TensorRT says of it --------------------------------------------------------------------


def profile_of(model: Path, cases: Sequence[Mapping[str, Any]]) -> Profile:
    """Return the profile that spans the shapes of ``cases``, the first of them the usual one."""
    profile = {}
    constants = {t.name for t in onnx.load(model, load_external_data=False).graph.initializer}
    for info in onnx.load(model, load_external_data=False).graph.input:
        dims = info.type.tensor_type.shape.dim
        if info.name not in constants and not all(dim.HasField("dim_value") for dim in dims):
            shapes = [np.shape(case[info.name]) for case in cases]
            low, high = (tuple(map(pick, *shapes, shapes[0])) for pick in (min, max))
            profile[info.name] = (low, tuple(shapes[0]), high)
    return profile


def _with_named_axes(model: Path, folder: Path) -> Path:
    """Return the model, or a copy in which no two axes of inputs are called ``?``: to TensorRT they
    would be equal.
    """
    proto = onnx.load(model, load_external_data=False)
    unnamed = [
        (dim, f"{info.name}_{axis}")
        for info in proto.graph.input
        for axis, dim in enumerate(info.type.tensor_type.shape.dim)
        if dim.dim_param == "?"
    ]
    if not unnamed:
        return model
    for dim, name in unnamed:
        dim.dim_param = name
    onnx.save(proto, folder / model.name)
    return folder / model.name


def engines_of(parts: Sequence[Path], cases: Sequence[Mapping[str, Any]]) -> Iterator[str | int]:
    """Yield of each part the bytes of its engine, or why there is none."""
    with Workers(1) as workers, tempfile.TemporaryDirectory() as folder:
        for part in parts:
            profile = profile_of(part, cases)
            job = BuildJob(
                _with_named_axes(part, Path(folder)),
                Path(folder, "engine"),
                "tensorrt-rtx",
                compute_capability=CAPABILITY,
                profiles=(profile,) if profile else (),
            )
            [result] = workers.build([job])
            if result.failure is None:
                yield result.engine_bytes
            else:
                yield f"{result.failure.reason}: {' '.join(result.failure.text.split())}"
