r"""Let nodes compute in float16 or bfloat16, with as few Casts as can be.

    before                      after, all but the Softmax asked for in fp16

    x                           x
    |                           |
    |   w   b                  Cast  w   b     (in fp16: converted once)
     \  |  /                     \   |   /
      Conv                        Conv
        |                           |
      Relu   c                    Relu   c
         \  /                        \  /
         Add                         Add
          |                           |
       Softmax                       Cast
          |                           |
          y                        Softmax
                                      |
                                      y

Which floats of a node change is said by `float_port`. Inputs and outputs of the model and of bodies
keep their type. A tensor is cast at most once each way, beside what makes it, for all its readers.

The number of Casts is the least one can have, by a minimum cut: each node is on the side of the
short type or on that of fp32, and a tensor that is made on one side and read on the other costs one.
- What multiplies matrices is on the side that was asked for.
- Another node that is to be lowered is left in fp32 where that saves Casts: it is never less exact.
- A node that is to stay in fp32 and only copies, chooses or compares takes the short type where that
  saves Casts and all that it reads is in it already: it returns the same numbers.
Casts that stand in the model already are counted with the others, and go where they are not needed.

Why it holds: a node in the short type rounds what it reads and what it returns. That is what was
asked for, and how much it matters was measured before.

Needs: for bfloat16 often a later opset; the model is raised where all its nodes can follow.
Keeps: name, dtype and shape of inputs and outputs, and of what was asked to stay.
Skips, with the reason in the report: a node that has no version in the short type, computes sizes or
coordinates, reads a weight that is beyond the largest number of the type or of which nothing is
left in it, or needs fewer Casts where it stays.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import ml_dtypes
import networkx as nx
import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from optc.passes.contract import Facts, Pass, Report
from optc.passes.float_port import (
    FLOAT32,
    NO_END,
    NO_FLOATS,
    Ports,
    cast_to,
    is_movement,
    nodes_of_sizes,
    ports,
)
from optc.passes.flops import is_product
from optc.passes.graph import Array, Node, all_bodies, all_nodes, redirect
from optc.passes.linear import peek
from optc.passes.minimum_cut import ENDLESS, Network
from optc.passes.opset import NEWEST, changes
from optc.passes.precision import DTYPES, Float, Lowering

LOW, FULL = "low", "full"
"""The two sides, as they are called in the network."""

FEWER_CASTS = "fewer Casts are needed where it stays in fp32"

SMALL = 4096
"""Elements of a constant that is read to see whether a short type has all its numbers."""

PIECE = 1 << 20
"""Elements of a weight that are looked at together: it is never copied as a whole to be looked at."""


class LowerFloats(Pass):
    """Let nodes compute in float16 or bfloat16, with as few Casts as can be."""

    name = "lower-floats"
    group = "lower"
    exactness = "rounds to the short type where it is asked for"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Lower what is asked for in ``graph`` and its bodies."""
        report = Report()
        if facts.lowering is None or facts.in_body:  # bodies are changed with the graph around them
            return report
        short: tuple[Float, ...] = ("fp16", "bf16")
        retyped: dict[int, np.dtype[Any]] = {}
        for precision in short:
            asked = _asked(graph, facts.lowering, precision)
            if asked:
                _Change(graph, facts, precision, asked, retyped, report).make()
        return report


def _asked(graph: gs.Graph, lowering: Lowering, precision: Float) -> frozenset[str]:
    """Return the names of the nodes that are to be lowered to ``precision``.

    A DequantizeLinear that is not named goes with its readers, and a QuantizeLinear with what
    dequantises: those around a quantised product are as new as its integers.
    """
    nodes = list(all_nodes(graph))
    asked = {node.name for node in nodes if lowering.float_of(node.name) == precision}
    for op in ("DequantizeLinear", "QuantizeLinear"):
        for node in nodes:
            if node.op == op and not node.domain and node.name not in lowering.nodes:
                readers = list(_readers_behind_casts(node.outputs[0]))
                if readers and all(reader.name in asked for reader in readers):
                    asked.add(node.name)
    return frozenset(asked)


def _readers_behind_casts(tensor: gs.Tensor) -> Iterator[gs.Node]:
    for reader in tensor.outputs:
        if reader.op == "Cast" and not reader.domain:
            yield from reader.outputs[0].outputs
        else:
            yield reader


# --- weights -------------------------------------------------------------------------------------


class CastValues(LazyValues):  # type: ignore[misc]
    """Values of a constant in another type, converted when they are read."""

    def __init__(self, constant: gs.Constant, dtype: np.dtype[Any]) -> None:
        self.constant = constant
        self.dtype = dtype
        self.shape = tuple(constant.shape)
        self.nbytes = math.prod(self.shape) * dtype.itemsize

    def load(self) -> Array:
        """Return the values, as `shortened` makes them."""
        return shortened(peek(self.constant), self.dtype)


def shortened(values: Array, dtype: np.dtype[Any]) -> Array:
    """Return float32 ``values`` in the short type ``dtype``, each the nearest that it has.

    The largest number of float32 is what masks write for infinity. It becomes the largest of the
    type: a Softmax over nothing but infinities would return no numbers. And where all numbers are too
    small they become the least of the type rather than 0: they keep something else from being 0.
    """
    values = np.asarray(values)
    with np.errstate(over="ignore", under="ignore"):
        short: Array = values.astype(dtype)
    if np.isinf(short).any():
        largest = np.array(_limits(dtype).largest, dtype)
        short[values == NO_END] = largest
        short[values == -NO_END] = -largest
    if not short.any() and values.any():
        least = np.array(_limits(dtype).least, dtype)
        short[values > 0] = least
        short[values < 0] = -least
    return short


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of the numbers of a weight in a short type.

    Attributes:
        numbers: How many there are besides 0.
        largest: The largest magnitude of those that are finite, and stand not for infinity.
        overflows: Whether that is beyond the largest number of the type.
        lost: How many become 0.
        coarse: How many others are too small to keep all digits that the type has.
    """

    numbers: int
    largest: float
    overflows: bool
    lost: int
    coarse: int


def fate(constant: gs.Constant, dtype: np.dtype[Any]) -> Fate:
    """Return what becomes of the numbers of a float32 ``constant`` in the type ``dtype``."""
    least, smallest, _ = _limits(dtype)
    numbers, largest, lost, coarse = 0, 0.0, 0, 0
    values = np.asarray(peek(constant)).reshape(-1)
    for start in range(0, values.size, PIECE):
        sizes = np.abs(values[start : start + PIECE])
        top = float(sizes.max())
        if not top < NO_END:
            top = float(np.max(sizes, where=sizes < NO_END, initial=0.0))
        largest = max(largest, top)
        below = int(np.count_nonzero(sizes < smallest))
        zeros = sizes.size - int(np.count_nonzero(sizes))
        vanishing = int(np.count_nonzero(sizes <= least / 2)) - zeros
        numbers += sizes.size - zeros
        lost += vanishing
        coarse += below - zeros - vanishing
    with np.errstate(over="ignore"):
        overflows = bool(np.isinf(np.float32(largest).astype(dtype)))
    return Fate(numbers, largest, overflows, lost, coarse)


class _Limits(NamedTuple):
    """The least number of a type above 0, the least that has all its digits, and the largest."""

    least: float
    smallest: float
    largest: float


@cache
def _limits(dtype: np.dtype[Any]) -> _Limits:
    limits = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    return _Limits(*map(float, (limits.smallest_subnormal, limits.smallest_normal, limits.max)))


GUARDS = ("Add", "Clip", "Max")
"""Operators that keep others from 0 by a small constant: the least number of a type does that too."""


def why_not_its_constants(
    node: gs.Node,
    found: Ports,
    dtype: np.dtype[Any],
    fate_of: Callable[[gs.Constant], Fate],
) -> str | None:
    """Return why the constants of ``node`` keep it in fp32, or None.

    Args:
        node: The node.
        found: What of it would be in the short type.
        dtype: The short type.
        fate_of: Tells what becomes of a constant in it.
    """
    for constant in _constants(node, found):
        what = fate_of(constant)
        if what.overflows:
            return f"{dtype.name} ends before {what.largest:.6g} in `{constant.name}`"
        if what.numbers and what.lost == what.numbers and node.op not in GUARDS:
            return (
                f"nothing of `{constant.name}` is left in {dtype.name}:"
                f" {what.largest:.6g} is 0 there"
            )
        if node.op in ("DequantizeLinear", "QuantizeLinear") and what.lost + what.coarse:
            return f"the scales `{constant.name}` lose digits in {dtype.name}"
    return None


# --- the graph -----------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Candidate:
    """A node that can be on the side of the short type.

    Attributes:
        node: The node.
        graph: The graph, main or body, that it is in.
        ports: What of it takes the type there.
        is_fixed: It can be on no other side.
        follows: It was not asked for, and takes the type only where all that it reads has it.
        converts: It is a Cast between fp32 and the short type that stands in the model already.
    """

    node: gs.Node
    graph: gs.Graph
    ports: Ports
    is_fixed: bool = False
    follows: bool = False
    converts: bool = False


@dataclass(slots=True, eq=False)
class _Flow:
    """A float32 tensor: who makes it, and who reads it.

    Attributes:
        tensor: The tensor.
        graph: The graph, main or body, that it is made in or enters.
        maker: The candidate that can make it in the short type; None where nobody can.
        readers: Candidates that can read it so, and the indices of their inputs.
        stays: Whether somebody reads it who cannot, or sees it from outside.
    """

    tensor: gs.Tensor
    graph: gs.Graph
    maker: _Candidate | None = None
    readers: list[tuple[_Candidate, int]] = field(default_factory=list)
    stays: bool = False


class _Change:
    """The change of one model to one short type."""

    def __init__(
        self,
        graph: gs.Graph,
        facts: Facts,
        precision: Float,
        asked: frozenset[str],
        retyped: dict[int, np.dtype[Any]],
        report: Report,
    ) -> None:
        self.graph = graph
        self.facts = facts
        self.precision = precision
        self.dtype = DTYPES[precision]
        self.asked = asked
        self.retyped = retyped  # id of a tensor -> its type, where it is not what the facts say
        self.report = report
        self.short: dict[int, gs.Constant] = {}  # id of a constant -> the same in the short type
        self.fates: dict[int, Fate] = {}  # id of a constant -> its fate
        self.new: dict[int, list[gs.Node]] = defaultdict(list)  # by id of what it follows
        self.added: set[str] = set()  # names of new Casts
        self.sizes = nodes_of_sizes(graph, facts.shapes)

    def make(self) -> None:
        self.raise_opset()
        self.candidates = {id(c.node): c for c in self.find_candidates()}
        self.flows = self.find_flows()
        self.low = self.on_the_short_side()
        for flow in self.flows.values():
            self.settle(flow)
        for candidate in self.candidates.values():
            if candidate in self.low and not candidate.converts:
                self.retype(candidate)
            elif candidate not in self.low and not candidate.follows:
                self.report.skipped[candidate.node.name] = FEWER_CASTS
        self.place()
        self.remove_idle_casts()

    # Who can

    def dtype_of(self, tensor: gs.Tensor) -> np.dtype[Any] | None:
        """Return the type of a tensor; None where it is not known, or is none of a tensor."""
        found = self.retyped.get(id(tensor))
        if found is not None:
            return found
        if not isinstance(tensor, gs.Constant) and self.facts.shapes.is_sequence(tensor.name):
            return None
        return self.facts.dtype(tensor)

    def ports_of(self, node: gs.Node, opset: int) -> Ports | str:
        return ports(node, self.dtype_of, self.precision, opset=opset, sizes=self.sizes)

    def raise_opset(self) -> None:
        """Raise the model to where all that was asked for has a version in the short type, if it can."""
        wanted: dict[Hashable, int] = {}  # what decides it of a node -> the version
        for node in all_nodes(self.graph):
            if node.name in self.asked and not node.domain and node.name not in self.sizes:
                types = (
                    self.dtype_of(t) if t.name else t.name for t in (*node.inputs, *node.outputs)
                )
                alike = (node.op, len(node.inputs), node.attrs.get("to"), *types)
                if alike not in wanted:
                    wanted[alike] = self.wanted_opset(node)
        for version in sorted({*wanted.values()}, reverse=True):
            if self.facts.reach_opset(version):
                return

    def wanted_opset(self, node: gs.Node) -> int:
        """Return the lowest version in which all of ``node`` can have the short type that ever can."""
        now = self.facts.opset
        best = self.ports_of(node, NEWEST)
        versions = (now, *changes(node.op, now, NEWEST))
        return next((v for v in versions if self.ports_of(node, v) == best), now)

    def find_candidates(self) -> Iterator[_Candidate]:
        for part in (self.graph, *all_bodies(self.graph)):
            for node in part.nodes:
                found = self.ports_of(node, self.facts.opset)
                asked = node.name in self.asked
                if isinstance(found, str):
                    if asked and found != NO_FLOATS:
                        self.report.skipped[node.name] = found
                elif self.converts(node):
                    yield _Candidate(node, part, found, is_fixed=True, converts=True)
                elif asked:
                    if reason := why_not_its_constants(node, found, self.dtype, self.fate_of):
                        self.report.skipped[node.name] = reason
                    else:
                        yield _Candidate(node, part, found, is_fixed=is_product(node))
                elif is_movement(node) and all(map(self.has_all, _constants(node, found))):
                    yield _Candidate(node, part, found, follows=True)

    def converts(self, node: gs.Node) -> bool:
        """Whether ``node`` is a Cast from fp32 to the short type or back."""
        if node.op != "Cast" or node.domain:
            return False
        return {self.dtype_of(node.inputs[0]), cast_to(node)} == {FLOAT32, self.dtype}

    def fate_of(self, constant: gs.Constant) -> Fate:
        if id(constant) not in self.fates:
            self.fates[id(constant)] = fate(constant, self.dtype)
        return self.fates[id(constant)]

    def has_all(self, constant: gs.Constant) -> bool:
        """Whether the short type has all numbers of a constant, which must be small to be looked at."""
        if math.prod(constant.shape) > SMALL:
            return False
        values = np.asarray(peek(constant))
        with np.errstate(over="ignore", under="ignore"):
            return np.array_equal(values.astype(self.dtype).astype(FLOAT32), values, equal_nan=True)

    def find_flows(self) -> dict[int, _Flow]:
        flows: dict[int, _Flow] = {}

        def add(tensor: gs.Tensor, graph: gs.Graph, maker: _Candidate | None) -> None:
            if tensor.name and self.dtype_of(tensor) == FLOAT32:
                stays = self.facts.is_kept(tensor)
                flows[id(tensor)] = _Flow(tensor, graph, maker, stays=stays)

        for part in (self.graph, *all_bodies(self.graph)):
            for tensor in part.inputs:
                add(tensor, part, None)
            for node in part.nodes:
                candidate = self.candidates.get(id(node))
                for index, tensor in enumerate(node.outputs):
                    can = candidate is not None and index in candidate.ports.outputs
                    add(tensor, part, candidate if can else None)
        for node in all_nodes(self.graph):
            candidate = self.candidates.get(id(node))
            for index, tensor in enumerate(node.inputs):
                flow = flows.get(id(tensor))
                if flow is None:
                    continue
                if candidate is not None and index in candidate.ports.inputs:
                    flow.readers.append((candidate, index))
                else:
                    flow.stays = True
        return flows

    # Who does

    def on_the_short_side(self) -> set[_Candidate]:
        """Return the candidates that take the short type, so that the fewest Casts are needed."""
        free = nx.Graph()
        edges: list[tuple[Hashable, Hashable, int]] = []

        def add(start: Hashable, end: Hashable, cost: int) -> None:
            """Let it cost that much if ``start`` takes the short type and ``end`` does not."""
            edges.append((start, end, cost))
            ends = [end for end in (start, end) if end not in (LOW, FULL)]
            free.add_edge(ends[0], ends[-1])

        for candidate in self.candidates.values():
            for index in candidate.ports.inputs if candidate.follows else ():
                flow = self.flows.get(id(candidate.node.inputs[index]))
                if flow is not None and (maker := _side(flow.maker)) != LOW:
                    add(candidate, maker, ENDLESS)
        for flow in self.flows.values():
            maker = _side(flow.maker)
            readers = {_side(reader) for reader, _ in flow.readers}
            readers |= {FULL} if flow.stays else set()
            for here, there in ((LOW, FULL), (FULL, LOW)):  # one Cast, whoever reads it there
                across = {there} if there in readers else readers - {here}
                if not across or maker == there or {maker, *across} == {LOW, FULL}:
                    continue
                middle = (here, flow) if len(across) > 1 else next(iter(across))
                steps = [(maker, middle, 1)]
                steps += [(middle, reader, ENDLESS) for reader in across - {middle}]
                for start, end, cost in steps:
                    add(start, end, cost) if here == LOW else add(end, start, cost)
        return self.low_sides(free, edges)

    def low_sides(
        self, free: nx.Graph, edges: list[tuple[Hashable, Hashable, int]]
    ) -> set[_Candidate]:
        """Return the candidates that a minimum cut leaves on the side of the short type.

        Of all such cuts the one in which most of what was asked for is on that side, and least of
        what follows.

        Args:
            free: What is to be on either side, joined where one has an edge to the other.
            edges: From, to, cost.
        """
        regions: list[set[Hashable]] = list(nx.connected_components(free))
        region_of = {each: number for number, region in enumerate(regions) for each in region}
        networks = [Network() for _ in regions]
        for start, end, cost in edges:
            networks[region_of[end if start == LOW else start]].add(start, end, cost)
        low = {c for c in self.candidates.values() if not c.follows and c not in region_of}
        for region, network in zip(regions, networks, strict=True):
            full = network.sink_side(LOW, FULL, ENDLESS)
            assert full is not None, "nothing that must be in one type must be in the other"
            inside = (each for each in region - full if isinstance(each, _Candidate))
            asked = [each for each in inside if not each.follows]
            needed = network.in_reach([LOW, *asked])
            low.update(each for each in needed if isinstance(each, _Candidate))
        return low

    # What becomes of it

    def settle(self, flow: _Flow) -> None:
        """Give each reader of a tensor the type that it takes."""
        readers = [(reader, index) for reader, index in flow.readers if reader in self.low]
        stays = flow.stays or len(readers) < len(flow.readers)
        if flow.maker is None or flow.maker not in self.low:
            if not readers:
                return
            short = self.cast_down(flow, [reader for reader, _ in readers])
        elif flow.maker.converts:
            short = flow.maker.node.inputs[0]
            if not stays:
                self.remove(flow.maker.node)
        elif stays:
            short = self.cast_up(flow)
        else:
            self.retyped[id(flow.tensor)] = flow.tensor.dtype = self.dtype
            return
        for reader, index in readers:
            if reader.node.outputs[0] is not short:
                reader.node.inputs[index] = short

    def cast_down(self, flow: _Flow, readers: list[_Candidate]) -> gs.Tensor:
        """Return what is in fp32 in the short type; by a Cast that is there already, if there is one."""
        casts = [r.node for r in readers if r.converts and r.graph is flow.graph]
        casts.sort(key=lambda cast: not self.facts.is_kept(cast.outputs[0]))
        if casts:
            return casts[0].outputs[0]
        short = self.variable_like(flow.tensor)
        after = flow.tensor.inputs[0] if flow.tensor.inputs else flow.graph
        self.cast(flow.tensor, short, after, stands_for=readers[0].node)
        return short

    def cast_up(self, flow: _Flow) -> gs.Tensor:
        """Let a tensor be a Cast of what its maker gives now, and return that."""
        maker = flow.tensor.inputs[0]
        short = self.variable_like(flow.tensor)
        index = next(i for i, tensor in enumerate(maker.outputs) if tensor is flow.tensor)
        maker.outputs[index] = short
        self.cast(short, flow.tensor, maker, stands_for=maker)
        return short

    def variable_like(self, tensor: gs.Tensor) -> gs.Variable:
        name = self.facts.fresh_name(f"{tensor.name}_{self.dtype.name}")
        short = gs.Variable(name, self.dtype, tensor.shape)
        self.retyped[id(short)] = self.dtype
        return short

    def cast(
        self, source: gs.Tensor, result: gs.Tensor, after: gs.Node | gs.Graph, stands_for: gs.Node
    ) -> None:
        dtype = FLOAT32 if self.dtype_of(source) == self.dtype else self.dtype
        name = self.facts.fresh_name(f"{result.name}_cast")
        to = helper.np_dtype_to_tensor_dtype(dtype)
        self.new[id(after)].append(Node("Cast", name, {"to": to}, [source], [result]))
        self.report.merged[name] = (stands_for.name,)
        self.added.add(name)

    def retype(self, candidate: _Candidate) -> None:
        """Let a node have the short type in its attributes, and read its constants in it."""
        node, found = candidate.node, candidate.ports
        self.report.merged[node.name] = (node.name,)
        for index in found.inputs:
            if isinstance(node.inputs[index], gs.Constant):
                node.inputs[index] = self.short_constant(node.inputs[index])
        kind = helper.np_dtype_to_tensor_dtype(self.dtype)
        if node.op == "Cast" and found.outputs:
            node.attrs["to"] = kind
        elif node.op == "EyeLike":
            node.attrs["dtype"] = kind
        elif node.op == "DequantizeLinear" and 1 not in found.inputs:
            node.attrs["output_dtype"] = kind  # or it is the type of the scale
        elif node.op == "ConstantOfShape":
            value = node.attrs.get("value", gs.Constant("value", np.zeros(1, FLOAT32)))
            node.attrs["value"] = gs.Constant(value.name, CastValues(value, self.dtype))

    def short_constant(self, constant: gs.Constant) -> gs.Constant:
        found = self.short.get(id(constant))
        if found is None:
            name = self.facts.fresh_name(f"{constant.name}_{self.dtype.name}")
            found = self.short[id(constant)] = gs.Constant(name, CastValues(constant, self.dtype))
            what = self.fate_of(constant)
            if what.lost + what.coarse:
                self.report.noted[constant.name] = (
                    f"{what.largest:.6g} is the least number of {self.dtype.name} there"
                    if what.lost == what.numbers
                    else f"of {what.numbers} numbers {what.lost} are 0 in {self.dtype.name}, and"
                    f" {what.coarse} so small that they lose digits"
                )
        return found

    def place(self) -> None:
        """Put the new Casts into their graphs, each right after what makes what it reads."""
        for part in (self.graph, *all_bodies(self.graph)):
            nodes = list(self.new.get(id(part), ()))
            for node in part.nodes:
                nodes += [node, *self.new.get(id(node), ())]
            part.nodes = nodes

    def remove_idle_casts(self) -> None:
        """Take out Casts to the type that is there, and the second of two that do the same."""
        for part in (self.graph, *all_bodies(self.graph)):
            casts = [node for node in part.nodes if self.is_cast_between(node)]
            for cast in casts:
                if self.dtype_of(cast.inputs[0]) == cast_to(cast):
                    self.replace(cast, cast.inputs[0])
            # Others can do with the one that must stay, and with what was there before.
            casts.sort(key=lambda c: (not self.facts.is_kept(c.outputs[0]), c.name in self.added))
            done: dict[tuple[int, np.dtype[Any]], gs.Tensor] = {}
            for cast in casts:
                if cast.outputs[0].outputs or self.facts.is_kept(cast.outputs[0]):
                    same = done.setdefault((id(cast.inputs[0]), cast_to(cast)), cast.outputs[0])
                    if same is not cast.outputs[0]:
                        self.replace(cast, same)

    def is_cast_between(self, node: gs.Node) -> bool:
        """Whether ``node`` is a Cast, and between no other types than fp32 and the short one."""
        if node.op != "Cast" or node.domain:
            return False
        return {self.dtype_of(node.inputs[0]), cast_to(node)} <= {FLOAT32, self.dtype}

    def replace(self, cast: gs.Node, tensor: gs.Tensor) -> None:
        """Let the readers of a Cast read ``tensor``, if nobody sees what it makes from outside."""
        if not self.facts.is_kept(cast.outputs[0]):
            redirect(cast.outputs[0], tensor)
            self.remove(cast)

    def remove(self, cast: gs.Node) -> None:
        """Say of a Cast that it is gone: nobody reads it any more."""
        self.report.merged.pop(cast.name, None)
        if cast.name not in self.added:
            self.report.removed[cast.name] = "what it reads has the type already"


def _constants(node: gs.Node, found: Ports) -> list[gs.Constant]:
    """Return the constants that ``node`` would have in the short type."""
    constants = [node.inputs[i] for i in found.inputs if isinstance(node.inputs[i], gs.Constant)]
    if node.op == "ConstantOfShape" and "value" in node.attrs:
        constants.append(node.attrs["value"])
    return constants


def _side(candidate: _Candidate | None) -> Hashable:
    """Return what stands for a candidate in the network: itself where its side is to be found."""
    if candidate is None:
        return FULL
    return LOW if candidate.is_fixed else candidate
