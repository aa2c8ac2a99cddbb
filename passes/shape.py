"""Shapes, dtypes and small integer values of all tensors of a graph, as far as they follow.

`infer` walks the graph once, in order, into the bodies of If, Loop and Scan. Extents are exact
expressions over the symbols of the graph's inputs (`dimension`). An extent that the data decides is
a symbol of its own, with an upper bound wherever one follows: the count of a NonZero is at most the
number of elements, what NonMaxSuppression keeps is at most what it may keep. That is what lets a
tensor cross a cut into an engine, which wants a largest extent for every axis.

The operators' rules are in ``shape_arithmetic``, ``shape_movement``, ``shape_operator``,
``shape_microsoft`` and ``shape_body``; those of operators that the spec declares in
``custom_operator``. An operator without a rule is asked of onnx's own inference, one node at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, TypeProto, helper, numpy_helper
from onnx.shape_inference import InferenceError, infer_node_outputs

from optc.passes import shape_arithmetic, shape_microsoft, shape_movement, shape_operator
from optc.passes.custom_operator import declaration_of
from optc.passes.dimension import Dim, Expression, Interval, interval, substitute, symbol, symbols
from optc.passes.graph import all_bodies, bodies_of, op_key
from optc.passes.shape_body import infer_bodies
from optc.passes.shape_fact import Array, DType, Fact, Symbols, fact_of_constant, objects
from optc.passes.shape_rule import RULES, Call, Unknown
from optc.specs.compile_spec import LARGEST_DIM, Range

_RULED = (shape_arithmetic, shape_microsoft, shape_movement, shape_operator)
assert all(_RULED), "imported for their rules"

BROKEN: tuple[type[Exception], ...] = (
    *(Unknown, IndexError, KeyError, ValueError, TypeError, ArithmeticError),
)
"""What a rule meets on a node that breaks its operator's own rules: a wrong rank, a missing
attribute, a division by zero. Nothing is known of what such a node returns."""

LONGEST_NAME = 48
"""A longer expression is not written out as the name of an axis."""

Profile = Mapping[str, Range]


class Shapes:
    """What `infer` found. A tensor that was not there then is unknown."""

    def __init__(self, facts: Mapping[str, Fact], symbols: Symbols) -> None:
        self._facts = facts
        self._symbols = symbols

    def __contains__(self, name: str) -> bool:
        return name in self._facts

    @property
    def input_symbols(self) -> frozenset[str]:
        """Names of the symbols that the graph's inputs have as extents."""
        return self._symbols.inputs

    def dims(self, name: str) -> tuple[Dim, ...] | None:
        """Return the extents of a tensor; None where its rank is not known.

        Of a sequence it is what all its tensors have in common.
        """
        fact = self._facts.get(name)
        return None if fact is None else fact.dims

    def dtype(self, name: str) -> DType | None:
        """Return the dtype of a tensor's elements; None where it is not known."""
        fact = self._facts.get(name)
        return None if fact is None else fact.dtype

    def is_sequence(self, name: str) -> bool:
        """Whether the tensor is a sequence of tensors."""
        fact = self._facts.get(name)
        return fact is not None and fact.is_sequence

    def value(self, name: str) -> Array | None:
        """Return the elements of a small tensor as objects; None where none is known.

        An element is an ``int``, ``bool`` or ``float``, an expression, or None where it is not
        known. Floats that depend on extents are `shape_fact.Ratio`.
        """
        fact = self._facts.get(name)
        value = None if fact is None else fact.value
        return None if value is None else objects(value)

    def is_size(self, name: str) -> bool:
        """Whether all elements of a tensor are known, as numbers or in terms of symbols."""
        value = self.value(name)
        return value is not None and all(element is not None for element in value.flat)

    def constant(self, name: str) -> Array | None:
        """Return the elements of a small tensor that is the same in every run, else None."""
        fact = self._facts.get(name)
        value = None if fact is None else fact.value
        return None if value is None or value.dtype == object else value

    def upper(self, name: str) -> Dim | None:
        """Return what an inner symbol never exceeds; None where nothing bounds it."""
        return self._symbols.upper.get(name)

    def data_dependent(self, dim: Dim) -> bool:
        """Whether the extents of the graph's inputs do not decide ``dim``."""
        return self._symbols.is_inner(dim)

    def interval(self, dim: Dim) -> Interval:
        """Return the lowest and highest value of ``dim`` in the ranges that inference knew."""
        return self._symbols.interval(dim)

    def axis_range(self, dim: Dim, profile: Profile) -> Range | None:
        """Return the extents that an axis takes in one optimisation profile.

        Args:
            dim: The axis.
            profile: Ranges of the inputs' symbols; those of inner symbols where they are given.

        Returns:
            Smallest, usual and largest extent. The usual one of a data-dependent axis is its bound
            at the profile's usual extents. None where nothing bounds the axis.
        """
        if isinstance(dim, int):
            fits = 0 <= dim <= LARGEST_DIM
            return Range(min=dim, opt=dim, max=max(1, dim)) if fits else None
        low, high = interval(dim, self._ranges(dim, profile, at_opt=False))
        usual = interval(dim, self._ranges(dim, profile, at_opt=True))[1]
        if math.isinf(high) or high > LARGEST_DIM:
            return None
        largest = max(1, int(high))
        smallest = min(max(0, int(low)) if math.isfinite(low) else 0, largest)
        return Range(min=smallest, opt=int(min(max(usual, smallest), largest)), max=largest)

    def bound_at_opt(self, dim: Dim, profile: Profile) -> int | None:
        """Return an extent at the profile's usual ones: its bound where the data decides it."""
        high = interval(dim, self._ranges(dim, profile, at_opt=True))[1]
        return max(0, int(high)) if math.isfinite(high) else None

    def unbounded_symbols(self, dim: Dim, profile: Profile) -> frozenset[str]:
        """Return the symbols that keep `axis_range` from giving a range: those to be bounded."""
        ranges = self._ranges(dim, profile, at_opt=False)
        if not math.isinf(interval(dim, ranges)[1]):
            return frozenset()
        found = {
            name
            for name in self._foundations(dim)
            if math.isinf(ranges[name][1]) and self._symbols.upper.get(name) is None
        }
        return frozenset(found)

    def _foundations(self, dim: Dim) -> list[str]:
        """Return the symbols ``dim`` depends on, also through bounds; a bound's before its own."""
        order: dict[str, None] = {}

        def visit(name: str) -> None:
            if name not in order:
                upper = self._symbols.upper.get(name)
                for inner in sorted(symbols(upper)) if upper is not None else ():
                    visit(inner)
                order[name] = None

        for name in sorted(symbols(dim)):
            visit(name)
        return list(order)

    def _ranges(self, dim: Dim, profile: Profile, *, at_opt: bool) -> dict[str, Interval]:
        ranges: dict[str, Interval] = {}
        for name in self._foundations(dim):
            given = profile.get(name)
            if given is not None:
                ranges[name] = (given.opt, given.opt) if at_opt else (given.min, given.max)
                continue
            upper = self._symbols.upper.get(name)
            high = math.inf if upper is None else interval(upper, ranges)[1]
            low = self._symbols.lower.get(name, 0)
            ranges[name] = (min(low, high), high)
        return ranges


def infer(
    graph: gs.Graph,
    *,
    opset: int | None = None,
    declared: Mapping[str, Sequence[int | str | None]] | None = None,
    ranges: Mapping[str, Interval] | None = None,
) -> Shapes:
    """Return the shapes, dtypes and small integer values of all tensors of ``graph``.

    Args:
        graph: In the normal form of `graph.import_model`. It is not changed.
        opset: Version of the default domain; the graph's own where it is not given.
        declared: Declared shapes by tensor, where the graph's variables no longer say them. They
            name data-dependent axes of outputs, and are believed of operators nobody knows.
        ranges: Lowest and highest extent of input symbols; 1 and no limit where it is not given.
    """
    walk = _Walk(graph, opset, declared or {}, ranges or {})
    walk.graph(graph)
    walk.name_after_outputs(graph)
    return Shapes(walk.facts, walk.symbols)


class Inference:
    """Infers a graph each time it was edited, and computes anew only what the edits concern.

    A symbol keeps the name it was given first, so the names may differ from those of `infer`.

    Args:
        graph: The main graph. Its inputs keep their shapes.
        ranges: As for `infer`.
    """

    def __init__(self, graph: gs.Graph, ranges: Mapping[str, Interval] | None = None) -> None:
        self._graph = graph
        self._ranges = ranges or {}
        self._walk: _Walk | None = None

    def shapes(self, changed: Iterable[str]) -> Shapes:
        """Return what follows now.

        Args:
            changed: Names of the nodes whose attributes may be others since the last call. What
                else an edit can change, inputs, outputs and constants, is seen.
        """
        walk = self._walk
        if walk is None or walk.opset != self._graph.opset:
            walk = self._walk = _Walk(self._graph, None, {}, self._ranges)
            walk.graph(self._graph)
            walk.name_after_outputs(self._graph)
        else:
            walk.again(self._graph, changed)
        return Shapes(walk.facts, walk.symbols)


def annotate(graph: gs.Graph, shapes: Shapes) -> None:
    """Write what was inferred onto every variable but the graph's inputs.

    An axis with a bare symbol gets its name, one with a longer expression a name that is the same
    wherever the expression is. Where nothing was inferred, what is declared stays.
    """
    names: dict[Expression, str] = {}
    inputs = {tensor.name for tensor in graph.inputs}
    taken = set(shapes._symbols.ranges)
    for part in (graph, *all_bodies(graph)):
        made = (tensor for node in part.nodes for tensor in node.outputs)
        for tensor in (*part.inputs, *made, *part.outputs):
            if tensor.name in inputs or not isinstance(tensor, gs.Variable):
                continue
            dims, dtype = shapes.dims(tensor.name), shapes.dtype(tensor.name)
            if shapes.is_sequence(tensor.name) or getattr(tensor, "proto", None) is not None:
                continue
            if dtype is not None:
                tensor.dtype = dtype
            if dims is not None:
                tensor.shape = [
                    dim
                    if isinstance(dim, int)
                    else _axis_name(dim, tensor.name, axis, names, taken)
                    for axis, dim in enumerate(dims)
                ]


def _axis_name(
    dim: Expression, tensor: str, axis: int, names: dict[Expression, str], taken: set[str]
) -> str:
    if (bare := dim.bare_symbol) is not None:
        return bare
    if dim not in names:
        text = str(dim)
        name = text if len(text) <= LONGEST_NAME else f"{tensor}_{axis}"
        while name in taken:
            name += "'"
        taken.add(name)
        names[dim] = name
    return names[dim]


@dataclass(slots=True)
class _Seen:
    """A node without bodies as it was when the facts of its outputs were found."""

    op: str
    inputs: list[Fact | None]
    outputs: list[gs.Tensor]


class _Walk:
    """One inference: the facts found so far, by tensor name."""

    def __init__(
        self,
        graph: gs.Graph,
        opset: int | None,
        declared: Mapping[str, Sequence[int | str | None]],
        ranges: Mapping[str, Interval],
    ) -> None:
        self.opset = int(graph.opset) if opset is None else opset
        self.versions = {"": self.opset}
        for entry in graph.import_domains or ():
            self.versions.setdefault(entry.domain, entry.version)
        self.declared = declared
        self.facts: dict[str, Fact] = {}
        self.seen: dict[str, _Seen] = {}  # by name of a node
        found: dict[str, Interval] = {}
        shapes: dict[str, tuple[Dim, ...] | None] = {}
        for tensor in graph.inputs:
            shapes[tensor.name] = dims = _input_dims(tensor)
            for dim in dims or ():
                for name in symbols(dim):
                    found[name] = ranges.get(name, (1, math.inf))
        self.symbols = Symbols(found)
        for tensor in graph.inputs:
            fact = self.declared_fact(tensor)
            fact.dims = fact.dims if fact.is_sequence else shapes[tensor.name]
            self.facts[tensor.name] = fact

    # Walking

    def graph(self, graph: gs.Graph) -> None:
        for node in graph.nodes:
            self.node(node)
        for tensor in graph.outputs:
            if tensor.name:
                self.fact(tensor)

    def again(self, graph: gs.Graph, changed: Iterable[str]) -> None:
        """Walk the main graph after it was edited; pass by what nothing has changed for."""
        for name in changed:
            if name in self.seen:
                self.seen[name].op = ""  # no longer holds for any
        for node in graph.nodes:
            if not self.is_settled(node):
                self.node(node)

    def is_settled(self, node: gs.Node) -> bool:
        """Whether what followed for ``node`` follows still; attributes are for the caller to watch."""
        seen = self.seen.get(node.name)
        if seen is None or seen.op != node.op:
            return False
        inputs, outputs = node.inputs, node.outputs
        if len(seen.inputs) != len(inputs) or len(seen.outputs) != len(outputs):
            return False
        facts = self.facts
        for tensor, fact in zip(inputs, seen.inputs, strict=True):
            found = facts.get(tensor.name) if tensor.name else None
            if isinstance(tensor, gs.Constant) and (
                found is None or found.source is not tensor._values
            ):
                found = self.fact(tensor)
            if found is not fact:
                return False
        return all(map(is_, seen.outputs, outputs))

    def body(self, body: gs.Graph, inputs: Sequence[Fact]) -> list[Fact]:
        for tensor, fact in zip(body.inputs, inputs, strict=False):
            if fact.dtype is None or fact.dims is None:
                declared = self.declared_fact(tensor)
                fact.dtype = declared.dtype if fact.dtype is None else fact.dtype
                fact.is_sequence |= declared.is_sequence
            self.facts[tensor.name] = fact
        self.graph(body)
        return [self.facts[tensor.name] for tensor in body.outputs]

    def fact(self, tensor: gs.Tensor) -> Fact | None:
        """Return what is known of an input of a node; None where it is omitted."""
        name = tensor.name
        if not name:
            return None
        fact = self.facts.get(name)
        if isinstance(tensor, gs.Constant):
            if fact is None or fact.source is not tensor._values:
                new = fact_of_constant(tensor)
                fact = new if fact is None or not fact.says_the_same(new) else fact
                fact.source = tensor._values
                self.facts[name] = fact
        elif fact is None:
            fact = self.facts[name] = self.declared_fact(tensor)
        return fact

    def node(self, node: gs.Node) -> None:
        outputs = list(node.outputs)
        inputs = [self.fact(tensor) for tensor in node.inputs]
        facts = self.outputs(Call(node, inputs, self.symbols, self.opset))
        found = [
            self.completed(facts[index] if index < len(facts) else Fact(), tensor)
            for index, tensor in enumerate(outputs)
        ]
        for index, tensor in enumerate(outputs):
            if tensor.name:
                old = self.facts.get(tensor.name)
                if old is not None and old.says_the_same(found[index]):
                    found[index] = old  # so that its readers need not be asked again
                self.facts[tensor.name] = found[index]
        if not bodies_of(node):  # what a body reads is no input of the node
            self.seen[node.name] = _Seen(node.op, inputs, outputs)

    def outputs(self, call: Call) -> Sequence[Fact]:
        node = call.node
        try:
            if bodies_of(node):
                return infer_bodies(call, self.body)
            custom = declaration_of(node)
            known = custom.facts if custom else RULES.get(op_key(node))
            result = None if known is None else known(call)
        except BROKEN:
            result = None
        if result is None:
            result = self.by_onnx(call)
        return [result] if isinstance(result, Fact) else result

    def completed(self, fact: Fact, tensor: gs.Tensor) -> Fact:
        """Believe the declared type where nothing else is known."""
        if fact.dtype is None or fact.dims is None:
            declared = self.declared_fact(tensor)
            if fact.dtype is None:
                fact.dtype, fact.is_sequence = declared.dtype, declared.is_sequence
            if fact.dims is None:
                fact.dims = declared.dims
        return fact

    def declared_fact(self, tensor: gs.Tensor) -> Fact:
        if not isinstance(tensor, gs.Variable):
            return Fact()
        if (proto := getattr(tensor, "proto", None)) is not None:
            return self.fact_of_type(proto, tensor.name, 0, {})
        shape = self.declared.get(tensor.name, tensor.shape)
        dtype = None if tensor.dtype is None else np.dtype(tensor.dtype)
        if shape is None:
            return Fact(dtype)
        dims = tuple(
            extent if isinstance(extent, int) and extent >= 0 else self.named(tensor, axis, extent)
            for axis, extent in enumerate(shape)
        )
        return Fact(dtype, dims)

    def named(self, tensor: gs.Tensor, axis: int, name: int | str | None) -> Dim:
        """Return the symbol of an axis that is known by its declaration only."""
        if not isinstance(name, str) or not name or name == "?":
            return self.symbols.fresh(tensor.name, str(axis))
        if name not in self.symbols.ranges:
            self.symbols.bind(name, 0, None)
        return symbol(name)

    # Operators without a rule

    def by_onnx(self, call: Call) -> Sequence[Fact]:
        """Return what onnx infers of one node."""
        node = call.node
        version = self.versions.get(node.domain or "")
        if version is None or not onnx.defs.has(node.op, version, node.domain or ""):
            return []
        if bodies_of(node):  # they have been walked, which is all that is asked of them here
            return []
        meanings: dict[str, Dim] = {}
        types: dict[str, TypeProto] = {}
        data: dict[str, TensorProto] = {}
        for tensor, fact in zip(node.inputs, call.inputs, strict=True):
            if fact is None:
                continue
            if fact.dtype is None:
                return []
            types[tensor.name] = _type_of(fact, meanings)
            value = fact.value
            if value is not None and value.dtype != object and value.dtype == fact.dtype:
                data[tensor.name] = numpy_helper.from_array(np.array(value, order="C"))
        proto = helper.make_node(
            node.op,
            [t.name for t in node.inputs],
            [t.name for t in node.outputs],
            domain=node.domain or "",
        )
        for name, attribute in node.attrs.items():
            proto.attribute.append(_attribute(name, attribute))
        schema = onnx.defs.get_schema(node.op, version, node.domain or "")
        imports = [helper.make_opsetid(domain, v) for domain, v in self.versions.items()]
        try:
            found = infer_node_outputs(schema, proto, types, data, opset_imports=imports)
        except (InferenceError, RuntimeError, ValueError):
            return []
        return [
            self.fact_of_type(found[tensor.name], tensor.name, 0, meanings)
            if tensor.name in found
            else Fact()
            for tensor in node.outputs
        ]

    def fact_of_type(
        self, proto: TypeProto, tensor: str, output: int, meanings: Mapping[str, Dim]
    ) -> Fact:
        kind = proto.WhichOneof("value")
        if kind == "sequence_type":
            inner = proto.sequence_type.elem_type
            fact = self.fact_of_type(inner, tensor, output, meanings)
            fact.is_sequence = True
            return fact
        if kind != "tensor_type":
            return Fact()
        found = proto.tensor_type
        dtype = helper.tensor_dtype_to_np_dtype(found.elem_type) if found.elem_type else None
        if not found.HasField("shape"):
            return Fact(dtype)
        dims: list[Dim] = []
        for axis, dim in enumerate(found.shape.dim):
            # onnx takes an unknown extent for 0 in places, and computes with it.
            if dim.HasField("dim_value") and (dim.dim_value or not meanings):
                dims.append(dim.dim_value)
            elif dim.dim_param in meanings:
                dims.append(meanings[dim.dim_param])
            else:
                dims.append(self.symbols.fresh(tensor, str(axis)))
        return Fact(dtype, tuple(dims))

    # Names

    def name_after_outputs(self, graph: gs.Graph) -> None:
        """Give a data-dependent axis the name that an output declares for it."""
        renamed: dict[str, Dim] = {}
        for tensor in graph.outputs:
            shape = self.declared.get(tensor.name, getattr(tensor, "shape", None))
            dims = self.facts[tensor.name].dims if tensor.name in self.facts else None
            if shape is None or dims is None or len(shape) != len(dims):
                continue
            for dim, name in zip(dims, shape, strict=True):
                bare = dim.bare_symbol if isinstance(dim, Expression) else None
                if (
                    bare is not None
                    and bare not in self.symbols.inputs
                    and bare not in renamed
                    and isinstance(name, str)
                    and name not in ("", "?")
                    and name not in self.symbols.ranges
                    and symbol(name) not in renamed.values()
                ):
                    renamed[bare] = symbol(name)
        if renamed:
            self.symbols.rename(renamed)
            for fact in self.facts.values():
                _rename(fact, renamed)


def _input_dims(tensor: gs.Tensor) -> tuple[Dim, ...] | None:
    if not isinstance(tensor, gs.Variable) or tensor.shape is None:
        return None
    return tuple(
        extent
        if isinstance(extent, int) and extent >= 0
        else symbol(
            extent
            if isinstance(extent, str) and extent not in ("", "?")
            else f"{tensor.name}_{axis}"
        )
        for axis, extent in enumerate(tensor.shape)
    )


def _type_of(fact: Fact, meanings: dict[str, Dim]) -> TypeProto:
    """Return a fact as onnx writes it; ``meanings`` learns what the names of axes stand for."""
    shape: list[int | str] | None = None
    if fact.dims is not None:
        shape = []
        for dim in fact.dims:
            if isinstance(dim, Expression):
                meanings[str(dim)] = dim
            shape.append(dim if isinstance(dim, int) else str(dim))
    tensor = helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(fact.dtype), shape)
    return helper.make_sequence_type_proto(tensor) if fact.is_sequence else tensor


def _attribute(name: str, value: Any) -> onnx.AttributeProto:
    if isinstance(value, onnx.AttributeProto):
        return value
    if isinstance(value, gs.Constant):
        return helper.make_attribute(name, numpy_helper.from_array(np.asarray(value.values)))
    if isinstance(value, list) and not value:
        return helper.make_attribute(name, value, attr_type=onnx.AttributeProto.INTS)
    return helper.make_attribute(name, value)


def _rename(fact: Fact, renamed: Mapping[str, Dim]) -> None:
    if fact.dims is not None:
        fact.dims = tuple(substitute(dim, renamed) for dim in fact.dims)
    if fact.known is not None and fact.known.dtype == object:
        for index, element in np.ndenumerate(fact.known):
            if isinstance(element, Expression):
                fact.known[index] = substitute(element, renamed)
