"""A graph in low precision, node by node on the CPU: prepared once, each node's precision set per run.

A node in fp16 or bf16 reads what `passes.float_port` lets it read in that type, weights too, rounded
to it; it computes in fp32, and its results are rounded again: what a GPU does that multiplies in the
short type and adds up in fp32. ONNX Runtime's own fp16 kernels flatter: they keep fp32 from one
operator to the next wherever they can. It remains an estimate, as a compiler that fuses operators
rounds less often, and one that adds up in another order differs in the last digit.

Only what follows from the nodes in low precision is computed; the rest is taken from a reference run
in fp32, whose tensors are kept as far as memory allows.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort
from onnx import helper

from optc.optimizer.custom_library import Libraries
from optc.optimizer.made_up import available_bytes
from optc.optimizer.node_rounding import Rounding, Roundings, rounded_in_bodies
from optc.optimizer.node_session import (
    ModuleSession,
    NodeRejected,
    NodeSession,
    NodeSessions,
    array_in,
    bytes_of,
    is_array,
    quantising_session,
    rounding_session,
    value_of,
)
from optc.optimizer.reference import Array, owned
from optc.optimizer.torch_module import TorchModule
from optc.passes.determinism import RANDOM
from optc.passes.graph import all_nodes, bodies_of, nodes_in, reads
from optc.passes.linear import peek
from optc.passes.lower_floats import shortened
from optc.passes.precision import DTYPES, Float, Lowering, NodePrecision
from optc.passes.quantisation import (
    EightBits,
    Operands,
    identities,
    is_eight_bits,
    quantisable,
    scale_of,
    weight_scales,
)
from optc.passes.quantisation import rounded as rounded_to_eight_bits
from optc.passes.shape import Shapes
from optc.specs.diagnostic import Diagnostic, ModelError

See = Callable[[str, Array], None]
"""Is shown a tensor: its name and its values, which it must not keep or change."""

MOST_KEPT = 2 << 30
"""Bytes that a reference, or the constants, take at most."""

COMPARED_BYTES = 1 << 16
"""Results up to this size are compared with the reference's: sizes and indices mostly stay."""

MOST_WITH_BODIES = 64
"""Sessions of control-flow nodes that are held: there is one for each choice of what is rounded."""


def spare_bytes() -> int:
    """Return the memory that may be used to save time: a quarter of what there is."""
    available = available_bytes()
    return MOST_KEPT if available is None else min(MOST_KEPT, available // 4)


class Form(NamedTuple):
    """In which numbers a tensor is read.

    Attributes:
        floats: The type that its values are rounded to.
        eight: The precision that they are quantised to and dequantised from; None for none.
        axis: Along which there is a scale for each channel; None for one scale, as activations have.
    """

    floats: Float
    eight: EightBits | None = None
    axis: int | None = None


EXACT = Form("fp32")


@dataclass(frozen=True, slots=True)
class Reference:
    """A run in fp32.

    Attributes:
        outputs: Name -> array of each output of the graph, in order.
        kept: Name -> value of the inputs, and of the tensors that there was memory for.
    """

    outputs: Mapping[str, Array]
    kept: Mapping[str, ort.OrtValue] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """The memory that what is kept takes."""
        return sum(map(bytes_of, self.kept.values()))


@dataclass(frozen=True, slots=True)
class _Step:
    """A node of the main graph, its bodies with it.

    Attributes:
        node: The node.
        reads: Names of what is computed or given, and that it or a body of it reads.
        makes: Names of its outputs, omitted ones left out.
    """

    node: gs.Node
    reads: tuple[str, ...]
    makes: tuple[str, ...]

    @property
    def nodes(self) -> Iterator[gs.Node]:
        """The node and those in its bodies."""
        return nodes_in(self.node)


class Simulator:
    """A graph whose nodes can be computed in low precision.

    What it and its references took is given back to the system by `node_session.give_back_memory`,
    once they are gone.

    Args:
        graph: In normal form; fp32 for the most part. It is not changed and must not be while the
            simulator lives.
        shapes: What was inferred of it.
        floats: What nodes in int8 and fp8 take and give.
        amax: Name of a tensor -> the largest magnitude that its quantised values stand for.
        libraries: Of custom operators that it has.
        modules: Operator, as domain and op -> the torch module that runs its nodes.

    Attributes:
        runs: How often `run` ran.
    """

    def __init__(
        self,
        graph: gs.Graph,
        shapes: Shapes,
        *,
        floats: Float,
        amax: Mapping[str, float] | None = None,
        libraries: Libraries = (),
        modules: Mapping[tuple[str, str], TorchModule] = MappingProxyType({}),
    ) -> None:
        self.runs = 0
        self._graph = graph
        self._shapes = shapes
        self._floats = floats
        self._amax = dict(amax or {})
        self._steps = [_step(node) for node in graph.nodes]
        self._node_of = {node.name: node for node in all_nodes(graph)}
        self._step_of = {
            node.name: index for index, step in enumerate(self._steps) for node in step.nodes
        }
        self._outputs = tuple(tensor.name for tensor in graph.outputs)
        self._roundings = Roundings(graph, shapes)
        self._sessions = NodeSessions(graph, libraries, modules)
        self._session_of: dict[int, NodeSession | ModuleSession] = {}
        self._with_bodies: dict[tuple[int, frozenset[Any]], NodeSession] = {}
        self._operands: dict[tuple[int, EightBits], Operands | None] = {}
        self._constants = _Constants()

    @property
    def sessions(self) -> int:
        """How many sessions were made so far."""
        return self._sessions.made

    def reference(self, feeds: Mapping[str, Array]) -> Reference:
        """Return a run in fp32 that later runs on the same input start from.

        Raises:
            ModelError: ``cannot-simulate``, ``simulation-failed``.
        """
        given = {name: value_of(np.asarray(array, order="C")) for name, array in feeds.items()}
        kept = _Kept(spare_bytes(), always=self._drawn)
        run = _Run(self, given, Lowering({}), kept.add)
        run.compute(range(len(self._steps)))
        return Reference(run.outputs(), {**given, **kept.values})

    def run(
        self,
        reference: Reference,
        nodes: Mapping[str, NodePrecision],
        *,
        see: See | None = None,
    ) -> dict[str, Array]:
        """Return the graph's outputs with some nodes in low precision.

        Where a node stops on numbers that low precision gave it (an index that is out of range, say),
        the outputs that follow from it have an axis more than they should, of extent 0.

        Args:
            reference: A run of this simulator on the input that is meant.
            nodes: Name of a node, also of one in a body -> its precision; the others compute in
                fp32, and so do nodes that cannot do otherwise.
            see: Is shown each tensor of the main graph that may differ from the reference's.

        Raises:
            ModelError: ``cannot-simulate``.
        """
        self.runs += 1
        lowering = Lowering(nodes, self._floats, self._amax)
        run = _Run(self, reference.kept, lowering, None if see is None else _shower(see))
        run.compute(self._needed(reference.kept, run.low))
        return run.outputs(reference)

    def tensors(
        self, feeds: Mapping[str, Array], wanted: Collection[str], see: See
    ) -> dict[str, Array]:
        """Return the graph's outputs in fp32, and show each of the wanted tensors on the way.

        Args:
            feeds: Name -> array of each input.
            wanted: Names of tensors of the main graph, inputs and constants too.
            see: Is shown each of them that is a tensor, once.

        Raises:
            ModelError: ``cannot-simulate``, ``simulation-failed``.
        """
        names = frozenset(wanted)
        given = {name: value_of(np.asarray(array, order="C")) for name, array in feeds.items()}
        shown = _shower(see)
        for name in names & given.keys():
            shown(name, given[name])
        for name in names & self._constant_of.keys():
            see(name, peek(self._constant_of[name]))
        run = _Run(
            self, given, Lowering({}), lambda name, value: name in names and shown(name, value)
        )
        run.compute(range(len(self._steps)))
        return run.outputs()

    # -- what follows from the graph

    @cached_property
    def _drawn(self) -> frozenset[str]:
        """Names of tensors of random numbers: drawn again they would be others."""
        drawn = [step for step in self._steps if step.node.op in RANDOM]
        return frozenset(name for step in drawn for name in step.makes)

    @cached_property
    def _constant_of(self) -> dict[str, gs.Constant]:
        inputs = (tensor for step in self._steps for tensor in step.node.inputs)
        return {tensor.name: tensor for tensor in inputs if isinstance(tensor, gs.Constant)}

    def _rank_of(self, tensor: gs.Tensor) -> int | None:
        if isinstance(tensor, gs.Constant):
            return len(tensor.shape)
        dims = self._shapes.dims(tensor.name)
        return None if dims is None else len(dims)

    def _operands_of(self, index: int, precision: EightBits) -> Operands | None:
        """Return what of a step is quantised; None where nothing can be."""
        key = (index, precision)
        if key not in self._operands:
            node = self._steps[index].node
            found = quantisable(node, self._roundings.dtype_of, self._rank_of, precision)
            if isinstance(found, str) or not self._is_bounded(node, found):
                self._operands[key] = None
            else:
                self._operands[key] = found
        return self._operands[key]

    def _is_bounded(self, node: gs.Node, operands: Operands) -> bool:
        """Whether all that is to be quantised has a largest magnitude."""
        sizes = [self._amax.get(node.inputs[i].name, math.inf) for i in operands.activations]
        if operands.weights is not None:
            values = peek(node.inputs[operands.weights])
            sizes += [float(values.max()), float(values.min())] if values.size else [math.inf]
        return all(map(math.isfinite, sizes))

    def _roundings_in(self, lowering: Lowering) -> dict[int, dict[str, Rounding]]:
        """Return the number of each step with nodes in short floats -> what of these is rounded."""
        found: dict[int, dict[str, Rounding]] = {}
        for name in lowering.nodes:
            rounding = self._roundings.of(self._node_of[name], lowering.float_of(name))
            if rounding is not None:
                found.setdefault(self._step_of[name], {})[name] = rounding
        return found

    def _forms_in(self, lowering: Lowering) -> dict[int, dict[int, Form]]:
        """Return the number of each step that reads 8 bits -> index of the input -> its form."""
        found: dict[int, dict[int, Form]] = {}
        products: dict[EightBits, set[str]] = {"int8": set(), "fp8": set()}
        read: dict[tuple[str, EightBits], gs.Tensor] = {}
        for name, precision in lowering.nodes.items():
            index = self._step_of[name]
            node = self._steps[index].node
            if not is_eight_bits(precision) or node.name != name:  # none in bodies
                continue
            operands = self._operands_of(index, precision)
            if operands is None:
                continue
            products[precision].add(name)
            forms = found.setdefault(index, {})
            for place in operands.activations:
                forms[place] = Form(lowering.floats, precision)
                read[node.inputs[place].name, precision] = node.inputs[place]
            if operands.weights is not None:
                forms[operands.weights] = Form(lowering.floats, precision, operands.axis)
        for (name, precision), tensor in read.items():
            if name in self._outputs:
                continue
            for add, place in identities(
                tensor,
                products[precision],
                lambda node: lowering.float_of(node.name) == lowering.floats,
                lambda tensor: self._shapes.dims(tensor.name),
            ):
                index = self._step_of[add.name]
                if self._steps[index].node is add:
                    found.setdefault(index, {})[place] = Form(lowering.floats, precision)
        return found

    def _needed(self, known: Collection[str], low: Collection[int]) -> list[int]:
        """Return the steps that what may change needs, in order: it, and what was not kept of it."""
        changed: set[str] = set()
        follows = []
        for index, step in enumerate(self._steps):
            follows.append(index in low or not changed.isdisjoint(step.reads))
            if follows[-1]:
                changed.update(step.makes)
        needed = []
        missing: set[str] = set()
        for index in reversed(range(len(self._steps))):
            step = self._steps[index]
            if follows[index] or not missing.isdisjoint(step.makes):
                needed.append(index)
                missing.update(name for name in step.reads if name not in known)
        return needed[::-1]


def _step(node: gs.Node) -> _Step:
    read = (tensor.name for tensor in reads(node) if not isinstance(tensor, gs.Constant))
    made = (tensor.name for tensor in node.outputs if tensor.name)
    return _Step(node, tuple(dict.fromkeys(read)), tuple(made))


def _shower(see: See) -> Callable[[str, ort.OrtValue], None]:
    def show(name: str, value: ort.OrtValue) -> None:
        if is_array(value):
            see(name, array_in(value))

    return show


class _Run:
    """One walk over the steps.

    Args:
        simulator: Whose steps.
        known: Values that need not be computed, by name: the inputs at least.
        lowering: What nodes compute in.
        made: Is told of each value that is not the reference's.
    """

    def __init__(
        self,
        simulator: Simulator,
        known: Mapping[str, ort.OrtValue],
        lowering: Lowering,
        made: Callable[[str, ort.OrtValue], object] | None,
    ) -> None:
        self.simulator = simulator
        self.known = known
        self.lowering = lowering
        self.roundings = simulator._roundings_in(lowering)
        self.quantised = simulator._forms_in(lowering)
        self.low = self.roundings.keys() | self.quantised.keys()
        self.made = made
        self.values: dict[str, ort.OrtValue] = {}
        self.changed: set[str] = set()  # what is not as in the reference
        self.lost: set[str] = set()  # what cannot be computed with these numbers
        self.rounded: dict[str, dict[Form, ort.OrtValue]] = {}
        self.type_of: dict[str, Float] = {}  # of what was computed in a short type

    def compute(self, steps: Collection[int]) -> None:
        """Compute steps, given in order, and let go of what none of the rest reads."""
        every = self.simulator._steps
        last = {name: i for i in steps for name in (*every[i].reads, *every[i].makes)}
        for name in self.simulator._outputs:
            last.pop(name, None)
        for index in steps:
            step = every[index]
            as_reference = index not in self.low and self.changed.isdisjoint(step.reads)
            is_known = all(name in self.known for name in step.makes)
            if not (is_known and (as_reference or step.node.op in RANDOM)):
                self.step(index, as_reference)
            for name in (*step.reads, *step.makes):
                if last.get(name) == index:
                    self.values.pop(name, None)
                    self.rounded.pop(name, None)

    def step(self, index: int, as_reference: bool) -> None:
        step = self.simulator._steps[index]
        try:
            results = self.results(index) if self.lost.isdisjoint(step.reads) else None
        except _Stopped:
            if as_reference:
                raise
            results = None
        if results is None:
            self.changed.update(step.makes)
            self.lost.update(step.makes)
            return
        for name, value in zip(step.makes, results, strict=True):
            self.take(name, value, as_reference)

    def take(self, name: str, value: ort.OrtValue, as_reference: bool) -> None:
        """Keep a result, unless it turns out to be the reference's."""
        if not as_reference and _is_same(value, self.known.get(name)):
            self.type_of.pop(name, None)
            return
        self.values[name] = value
        if not as_reference:
            self.changed.add(name)
        if self.made is not None and not (as_reference and self.low):
            self.made(name, value)

    def value(self, name: str) -> ort.OrtValue:
        found = self.values.get(name)
        return self.known[name] if found is None else found

    def outputs(self, reference: Reference | None = None) -> dict[str, Array]:
        """Return the graph's outputs; those that were not computed are the reference's."""
        found = {}
        for name in self.simulator._outputs:
            if name in self.lost and reference is not None:
                there = reference.outputs[name]
                found[name] = np.empty((*there.shape, 0), there.dtype)
            elif reference is not None and name not in self.values:
                found[name] = reference.outputs[name]
            elif is_array(self.value(name)):
                found[name] = owned(array_in(self.value(name)))
        return found

    # -- one step

    def results(self, index: int) -> list[ort.OrtValue]:
        step = self.simulator._steps[index]
        if bodies_of(step.node):
            return self.with_bodies(index)
        forms = dict(self.quantised.get(index, {}))
        rounding = self.roundings.get(index, {}).get(step.node.name)
        if rounding is not None:
            forms = {**dict.fromkeys(rounding.inputs, Form(rounding.floats)), **forms}
        given = [
            self.read(tensor, forms.get(place, EXACT))
            for place, tensor in enumerate(step.node.inputs)
            if tensor.name
        ]
        results = self.call(index, given)
        if rounding is not None:
            made = (place for place, tensor in enumerate(step.node.outputs) if tensor.name)
            for number, (place, name) in enumerate(zip(made, step.makes, strict=True)):
                if place in rounding.outputs:
                    self.type_of[name] = rounding.floats
                    if not rounding.is_exact:
                        results[number] = _rounded(results[number], rounding.floats)
        return results

    def read(self, tensor: gs.Tensor, form: Form) -> ort.OrtValue:
        """Return the value of a tensor in ``form``."""
        if isinstance(tensor, gs.Constant):
            return self.simulator._constants.value(tensor, form)
        name = tensor.name
        if form == EXACT or (name in self.values and form == Form(self.type_of.get(name, "fp32"))):
            return self.value(name)
        known = self.rounded.setdefault(name, {})
        if form not in known:
            if form.eight is None:
                known[form] = _rounded(self.value(name), form.floats)
            else:
                scale = scale_of(self.lowering.amax[name], form.eight)
                known[form] = _quantised(self.value(name), scale, form)
        return known[form]

    def with_bodies(self, index: int) -> list[ort.OrtValue]:
        """Return the results of a control-flow node: one session for each choice of precisions."""
        simulator, step = self.simulator, self.simulator._steps[index]
        given = {name: self.value(name) for name in step.reads}
        roundings = self.roundings.get(index, {})
        key = (index, frozenset(roundings.items()))
        sessions = simulator._with_bodies
        session = sessions.pop(key, None)
        if session is None:
            with _quoted(step.node, "cannot-simulate"):
                model = simulator._sessions.model(step.node, given, step.makes)
                if roundings:
                    model = rounded_in_bodies(model, roundings)
                session = simulator._sessions.of_model(model, list(given.values()))
        sessions[key] = session
        if len(sessions) > MOST_WITH_BODIES:
            del sessions[next(iter(sessions))]
        with _quoted(step.node, "simulation-failed"):
            return session.run(list(given.values()))

    def call(self, index: int, given: list[ort.OrtValue]) -> list[ort.OrtValue]:
        node = self.simulator._steps[index].node
        sessions = self.simulator._session_of
        if index not in sessions:
            with _quoted(node, "cannot-simulate"):
                sessions[index] = self.simulator._sessions.of_node(node, given)
        with _quoted(node, "simulation-failed"):
            return sessions[index].run(given)


def _is_same(value: ort.OrtValue, other: ort.OrtValue | None) -> bool:
    """Whether two values are the same, as far as it can be told in no time."""
    if other is None or not 0 < bytes_of(value) <= COMPARED_BYTES:
        return False
    left, right = array_in(value), array_in(other)
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and left.tobytes() == right.tobytes()
    )


def _number(precision: NodePrecision) -> int:
    return int(helper.np_dtype_to_tensor_dtype(DTYPES[precision]))


def _rounded(value: ort.OrtValue, to: Float) -> ort.OrtValue:
    return value if to == "fp32" else rounding_session(_number(to)).run([value])[0]


def _quantised(value: ort.OrtValue, scale: np.float32, form: Form) -> ort.OrtValue:
    """Return ``value`` quantised and dequantised, in the floats of ``form``."""
    assert form.eight is not None, "there is something to quantise to"
    found = quantising_session(_number(form.eight)).run([value, value_of(np.asarray(scale))])[0]
    return _rounded(found, form.floats)


class _Stopped(ModelError):
    """A node cannot be computed with the values it is given."""


@contextmanager
def _quoted(node: gs.Node, code: str) -> Iterator[None]:
    """Tell of a node that ONNX Runtime rejects, in its words."""
    try:
        yield
    except NodeRejected as error:
        kind = _Stopped if code == "simulation-failed" else ModelError
        raise kind(
            Diagnostic(
                code,
                f"low precision cannot be simulated: ONNX Runtime {ort.__version__} does not compute "
                f"`{node.name}` ({node.op}): {error}",
                "set the precision of nodes by hand, or search where it runs",
            )
        ) from error


class _Kept:
    """Values that are kept until they take too much: then the largest go first.

    Args:
        limit: Bytes that they take at most.
        always: Names of those that stay in any case.
    """

    def __init__(self, limit: int, always: Collection[str]) -> None:
        self.values: dict[str, ort.OrtValue] = {}
        self._limit = limit
        self._always = always
        self._bytes = 0
        self._largest: list[tuple[int, int, str]] = []

    def add(self, name: str, value: ort.OrtValue) -> None:
        size = bytes_of(value)
        self.values[name] = value
        self._bytes += size
        if name not in self._always:
            # Of equally large ones those that go are spread over the graph.
            spread = int(f"{len(self.values):032b}"[::-1], 2)
            heapq.heappush(self._largest, (-size, spread, name))
        while self._bytes > self._limit and self._largest:
            size, _, name = heapq.heappop(self._largest)
            self._bytes += size
            del self.values[name]


class _Constants:
    """Values of constants in the forms they are read in, those used last held as memory allows."""

    def __init__(self) -> None:
        self._limit = spare_bytes()
        self._bytes = 0
        self._held: dict[tuple[str, Form], ort.OrtValue] = {}

    def value(self, tensor: gs.Constant, form: Form) -> ort.OrtValue:
        key = (tensor.name, form)
        found = self._held.pop(key, None)
        if found is None:
            found = self._made(tensor, form)
            self._bytes += bytes_of(found)
        self._held[key] = found
        while self._bytes > self._limit:
            oldest = next(iter(self._held))
            self._bytes -= bytes_of(self._held.pop(oldest))
        return found

    def _made(self, tensor: gs.Constant, form: Form) -> ort.OrtValue:
        if form.eight is not None:
            assert form.axis is not None, "constants that are quantised are weights"
            array = peek(tensor)
            scales = weight_scales(array, form.axis, form.eight)
            value = value_of(rounded_to_eight_bits(array, scales, form.eight, form.axis))
            return _rounded(value, form.floats)
        if form.floats != "fp32" and tensor.dtype == np.float32:
            return value_of(shortened(peek(tensor), DTYPES[form.floats]).astype(np.float32))
        exact = self._held.get((tensor.name, EXACT))
        return _rounded(value_of(peek(tensor)) if exact is None else exact, form.floats)
