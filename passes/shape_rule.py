"""How the rule of an operator is written: what it may ask of a node, and where it is registered.

A rule takes a `Call`, a node with the facts of its inputs, and returns the facts of its outputs.
Where it cannot say anything, as a rank is not known or the node breaks its operator's own rules, it
raises `Unknown` by asking; nothing else may come out of a rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.dimension import Dim, Expression, product
from optc.passes.shape_fact import Array, DType, Fact, Symbols, followed, objects


class Unknown(Exception):
    """A rule needs what is not known."""


@dataclass(slots=True, eq=False)
class Call:
    """One node, with what is known of its inputs.

    Attributes:
        node: The node.
        inputs: One fact an input; None for an omitted one.
        symbols: Where fresh symbols come from.
        opset: Version of the default domain.
    """

    node: gs.Node
    inputs: list[Fact | None]
    symbols: Symbols
    opset: int

    @property
    def op(self) -> str:
        """The operator."""
        return str(self.node.op)

    def attr(self, name: str, default: Any = None) -> Any:
        """Return an attribute, or ``default`` where the node has none of that name."""
        return self.node.attrs.get(name, default)

    def has(self, index: int) -> bool:
        """Whether the input is there."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def fact(self, index: int) -> Fact:
        """Return what is known of an input that the operator requires."""
        fact = self.inputs[index] if index < len(self.inputs) else None
        if fact is None:
            raise Unknown
        return fact

    def dtype(self, index: int) -> DType | None:
        """Return the dtype of an input; None where it is omitted or not known."""
        fact = self.inputs[index] if index < len(self.inputs) else None
        return None if fact is None else fact.dtype

    def shape(self, index: int, rank: int | None = None) -> tuple[Dim, ...]:
        """Return the extents of an input, which must have ``rank`` axes where that is given."""
        dims = self.fact(index).dims
        if dims is None or self.fact(index).is_sequence or rank not in (None, len(dims)):
            raise Unknown
        return dims

    def value(self, index: int) -> Array | None:
        """Return the elements of an input; None where it is omitted or none is known."""
        return self.fact(index).value if self.has(index) else None

    def elements(self, index: int) -> Array | None:
        """Return the elements of a small input as objects, ``None`` for each that is not known.

        None where the input is not small.
        """
        fact = self.fact(index)
        value = fact.value
        if value is not None:
            return objects(value)
        shape = followed(fact.dims, fact.dtype)
        return None if shape is None else np.full(shape, None, dtype=object)

    def number(self, index: int) -> Dim | None:
        """Return an integer input that has one element."""
        value = self.value(index)
        if value is None or value.size != 1:
            return None
        element = value.reshape(-1)[0]
        return element if isinstance(element, Expression) or element is None else int(element)

    def numbers(self, index: int) -> list[Dim | None] | None:
        """Return the elements of a list-like integer input, None for each that is not known.

        None where not even their count is known.
        """
        elements = self.elements(index)
        if elements is None:
            dims = self.fact(index).dims
            if dims is None or len(dims) != 1 or isinstance(dims[0], Expression) or dims[0] > 64:
                return None
            return [None] * dims[0]
        return list(elements.reshape(-1))

    def fixed(self, index: int, attribute: str = "") -> list[int] | None:
        """Return a list of plain ints from an attribute, else from an input; None where neither
        says.
        """
        if attribute and attribute in self.node.attrs:
            given = self.node.attrs[attribute]
            return [int(v) for v in (given if isinstance(given, list | tuple) else [given])]
        if not self.has(index):
            return None
        value = self.value(index)
        if value is None or value.dtype == object:
            raise Unknown
        return [int(v) for v in value.reshape(-1)]

    def axis(self, axis: int, rank: int) -> int:
        """Return ``axis`` counted from the front."""
        if not -rank <= axis < rank:
            raise Unknown
        return axis % rank

    def output_name(self, output: int = 0) -> str:
        """Return the name of an output."""
        return str(self.node.outputs[output].name)

    def fresh(
        self,
        part: int | str,
        upper: Dim | None = None,
        *,
        lower: float = 0,
        output: int = 0,
    ) -> Expression:
        """Return a new symbol for an axis or an element of an output."""
        return self.symbols.fresh(self.output_name(output), str(part), lower=lower, upper=upper)

    def fresh_dims(self, rank: int, output: int = 0) -> tuple[Dim, ...]:
        """Return a new symbol for each axis of an output of which only the rank is known."""
        return tuple(self.fresh(axis, output=output) for axis in range(rank))

    def broadcast(self, shapes: Sequence[tuple[Dim, ...]]) -> tuple[Dim, ...]:
        """Return the shape that ``shapes`` broadcast to."""
        first, *others = shapes
        if all(other == first for other in others):
            return first
        rank = max(map(len, shapes))
        result = []
        for axis in range(rank):
            extent: Dim = 1
            for dims in shapes:
                at = axis - rank + len(dims)
                if at >= 0:
                    extent = self._joined(extent, dims[at], axis)
            result.append(extent)
        return tuple(result)

    def _joined(self, a: Dim, b: Dim, axis: int) -> Dim:
        if a == b or b == 1:
            return a
        if a == 1 or isinstance(b, int):
            return b
        if isinstance(a, int):
            return a
        low_a, low_b = self.symbols.low(a), self.symbols.low(b)
        if low_a > 1:
            return a
        if low_b > 1:
            return b
        either = self.symbols.maximum(a, b)
        if (low_a >= 1) == (low_b >= 1):
            return either
        return self.fresh(
            f"{axis}_broadcast", either
        )  # 0 against 1 is 0, which is not their maximum


Result = Fact | Sequence[Fact] | None
Rule = Callable[[Call], Result]
SomeRule = TypeVar("SomeRule", bound=Rule)

RULES: dict[tuple[str, str], Rule] = {}
"""Domain, "" for the default one, and operator -> its rule."""


def rule(*ops: str, domain: str = "") -> Callable[[SomeRule], SomeRule]:
    """Register the function as the rule of ``ops``."""

    def register(function: SomeRule) -> SomeRule:
        for op in ops:
            RULES[domain, op] = function
        return function

    return register


def volume(dims: Iterable[Dim]) -> Dim:
    """Return the number of elements of a tensor."""
    return product(dims)


def is_known(elements: Iterable[Dim | None]) -> bool:
    """Whether no element is None."""
    return all(element is not None for element in elements)
