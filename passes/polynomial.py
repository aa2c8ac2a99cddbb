"""Reads arithmetic with constants as a polynomial, so that the order it was written in matters not.

An activation that is spelt out is a product and a sum around one function: ``0.5 * x * (1 + e)`` with
e = erf(x / sqrt(2)). Exporters write its factors in every order. As a polynomial in x and e it is
``0.5 x + 0.5 x e`` in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from optc.passes.contract import Facts
from optc.passes.match import are_private, made_by, number

Polynomial = dict[tuple[int, int], float]
"""Powers of the two unknowns -> coefficient. There are no zeros in it."""

ARITHMETIC = ("Add", "Div", "Mul", "Pow", "Sub")
DEEPEST = 6
"""Nodes from the end of a polynomial to its unknowns; the longest form met has 5."""

TOLERANCES = {"float16": 2e-3, "bfloat16": 1e-2, "float32": 1e-5}
"""How far a constant of each type may be from what it stands for: a little more than its rounding.

Other types have no activation that is worth fusing to: onnxruntime has no kernel for them.
"""


@dataclass(slots=True)
class Reading:
    """An activation that is spelt out: which nodes, from what to what.

    Attributes:
        x: What it is a function of.
        last: The node that makes its result.
        nodes: All of it, ``last`` included.
        inner: The polynomial in x that its function is applied to.
        outer: The polynomial in x and in what the function returns.
        constants: The numbers that were read.
    """

    x: gs.Tensor
    last: gs.Node
    nodes: list[gs.Node] = field(default_factory=list)
    inner: Polynomial = field(default_factory=dict)
    outer: Polynomial = field(default_factory=dict)
    constants: list[gs.Constant] = field(default_factory=list)

    def why_not(self, facts: Facts) -> str | None:
        """Return why one node cannot take the place of all, or None where it can."""
        inside = [node for node in self.nodes if node is not self.last]
        if not are_private(inside, facts, within=self.nodes):
            return "a value on the way has another reader"
        rank = max((len(constant.shape) for constant in self.constants), default=0)
        dims = facts.shapes.dims(self.x.name)
        if rank and (dims is None or len(dims) < rank):
            return "a constant of a higher rank widens it"
        return None


def is_close(found: Polynomial, wanted: Polynomial, tolerance: float) -> bool:
    """Whether both have the same terms, with coefficients that are equal up to rounding."""
    return found.keys() == wanted.keys() and all(
        abs(found[term] - wanted[term]) <= tolerance * abs(wanted[term]) for term in wanted
    )


def tolerance_of(x: gs.Tensor, facts: Facts) -> float | None:
    """Return how far constants may be off for values of the type of ``x``; None for other types."""
    dtype = facts.shapes.dtype(x.name)
    return None if dtype is None else TOLERANCES.get(dtype.name)


def readings(
    function: gs.Node, here: Collection[int], is_inner: Callable[[Polynomial], bool]
) -> Iterator[Reading]:
    """Yield what the first input and the output of ``function`` may be part of, smallest first.

    Args:
        function: The node in the middle.
        here: ``id`` of the nodes of its graph: a body that reads its output is no part of it.
        is_inner: Whether its input may be this polynomial of some value x.

    Yields:
        For each such x each polynomial that the output goes into.
    """
    result = function.outputs[0]
    for x in _sources(function.inputs[0]):
        before = _Reader({id(x): (1, 0)})
        inner = before.read(function.inputs[0])
        if inner is None or not is_inner(inner):
            continue
        for last in (function, *_readers(result, here)):
            after = _Reader({id(x): (1, 0), id(result): (0, 1)})
            outer = after.read(last.outputs[0])
            if outer is not None:
                nodes = {id(n): n for n in (*before.nodes, function, *after.nodes)}
                constants = [*before.constants, *after.constants]
                yield Reading(x, last, list(nodes.values()), inner, outer, constants)


def _sources(tensor: gs.Tensor) -> Iterator[gs.Tensor]:
    """Yield ``tensor`` and what is before it behind arithmetic with one-element constants."""
    pending, seen = [(tensor, 0)], {id(tensor)}
    while pending:
        found, depth = pending.pop(0)
        if isinstance(found, gs.Constant):
            continue
        yield found
        maker = made_by(found, *ARITHMETIC)
        if maker is None or depth == DEEPEST:
            continue
        for source in maker.inputs:
            if id(source) not in seen:
                seen.add(id(source))
                pending.append((source, depth + 1))


def _readers(tensor: gs.Tensor, here: Collection[int]) -> Iterator[gs.Node]:
    """Yield the one node that reads ``tensor``, the one that reads what it makes, and so on."""
    for _ in range(DEEPEST):
        nodes = {id(node): node for node in tensor.outputs}
        if len(nodes) != 1:
            return
        (node,) = nodes.values()
        if node.op not in ARITHMETIC or node.domain or id(node) not in here:
            return
        yield node
        tensor = node.outputs[0]


class _Reader:
    """Reads one expression over given unknowns."""

    def __init__(self, unknowns: Mapping[int, tuple[int, int]]) -> None:
        self.unknowns = unknowns
        self.nodes: list[gs.Node] = []
        self.constants: list[gs.Constant] = []

    def read(self, tensor: gs.Tensor, depth: int = 0) -> Polynomial | None:
        """Return what ``tensor`` is; None where it is no polynomial of the unknowns."""
        if id(tensor) in self.unknowns:
            return {self.unknowns[id(tensor)]: 1.0}
        value = number(tensor)
        if value is not None:
            self.constants.append(tensor)
            return {(0, 0): value} if value else {}
        node = made_by(tensor, *ARITHMETIC)
        if node is None or depth == DEEPEST:
            return None
        self.nodes.append(node)
        first = self.read(node.inputs[0], depth + 1)
        second = None if first is None else self.read(node.inputs[1], depth + 1)
        if first is None or second is None:
            return None
        return _combined(node.op, first, second)


def _combined(op: str, first: Polynomial, second: Polynomial) -> Polynomial | None:
    constant = second.get((0, 0)) if second.keys() <= {(0, 0)} else None
    match op:
        case "Add":
            return _sum(first, second, 1.0)
        case "Sub":
            return _sum(first, second, -1.0)
        case "Mul":
            return _product(first, second)
        case "Div" if constant:
            return {term: value / constant for term, value in first.items()}
        case "Pow" if constant in (2.0, 3.0):
            square = _product(first, first)
            return square if constant == 2.0 else _product(square, first)
    return None


def _sum(first: Polynomial, second: Polynomial, sign: float) -> Polynomial:
    total = dict(first)
    for term, value in second.items():
        total[term] = total.get(term, 0.0) + sign * value
    return {term: value for term, value in total.items() if value}


def _product(first: Polynomial, second: Polynomial) -> Polynomial:
    total: Polynomial = {}
    for (a, b), value in first.items():
        for (c, d), other in second.items():
            total[a + c, b + d] = total.get((a + c, b + d), 0.0) + value * other
    return {term: value for term, value in total.items() if value}
