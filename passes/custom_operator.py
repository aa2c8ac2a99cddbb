"""What operators return that ONNX does not have, as the spec declares it.

Shape inference asks here for each node of a domain and op that was declared. A name of an axis in
the declaration stands for the extent of that axis at the node; a name that no input has stands for
an extent that the data decide, one a node, with the upper bound that the declaration gives.

The declarations hold inside ``with declared(...)``: passes hand graphs to shape inference in many
places, and what an operator is does not change while a model is compiled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import cast

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.dimension import Dim, Expression, substitute, symbol, symbols
from optc.passes.graph import op_key
from optc.passes.shape_fact import DType, Fact
from optc.passes.shape_rule import Call
from optc.specs.axis_arithmetic import arithmetic
from optc.specs.compile_spec import LARGEST_DIM, Operator

UNNAMED = ("?", "", -1)
"""Of an axis of an input: anything will do, and nothing refers to it."""

Key = tuple[str, str]
"""Domain, "" for the default one, and op."""


@dataclass(frozen=True, slots=True)
class CustomOutput:
    """What one output is.

    Attributes:
        like: The input whose dtype and shape it has where the others do not say; or None.
        dtype: Of its elements.
        shape: Its extents, over the names of the inputs' axes and of what the data decide.
    """

    like: int | None = None
    dtype: DType | None = None
    shape: tuple[Dim, ...] | None = None


@dataclass(frozen=True, slots=True)
class CustomOperator:
    """An operator, and how what it returns follows from what it is given.

    Attributes:
        domain: Of its nodes.
        op: Their op.
        inputs: For each input its axes: a name, an extent it always has, or one of `UNNAMED`.
            Nothing is said of inputs beyond these.
        outputs: One entry an output.
        bounds: Name of an extent that the data decide -> what it never exceeds.
    """

    domain: str
    op: str
    inputs: tuple[tuple[str | int, ...], ...] = ()
    outputs: tuple[CustomOutput, ...] = ()
    bounds: Mapping[str, Dim] = field(default_factory=dict)

    @classmethod
    def of(cls, operator: Operator) -> CustomOperator:
        """Return what an entry of a checked spec's `operators` declares."""
        domain, op = key_of(operator.op)
        return cls(
            domain,
            op,
            operator.inputs,
            tuple(
                CustomOutput(
                    each.like,
                    None if each.dtype is None else _dtype(each.dtype),
                    None if each.shape is None else tuple(map(_dim, each.shape)),
                )
                for each in operator.outputs
            ),
            {name: _dim(bound) for name, bound in operator.bounds.items()},
        )

    @property
    def key(self) -> Key:
        """Domain and op."""
        return self.domain, self.op

    def facts(self, call: Call) -> list[Fact]:
        """Return what is known of the outputs of a node: the rule of shape inference."""
        meanings = self._axes([None if fact is None else fact.dims for fact in call.inputs], [])
        self._add_what_data_decide(call, meanings)
        return [self._fact(output, call, meanings) for output in self.outputs]

    def contradictions(self, inputs: Sequence[tuple[Dim, ...] | None]) -> list[str]:
        """Return what of the inputs of a node is not as declared.

        Args:
            inputs: Extents of each; None where they are not known, or it is omitted.
        """
        found: list[str] = []
        self._axes(inputs, found)
        return found

    def impossible(self, inputs: Sequence[tuple[int | None, ...] | None]) -> list[str]:
        """Return what of the extents and bounds it declares cannot be, of inputs that are so large.

        Args:
            inputs: Extents of each; None where they are not known, or it is omitted.
        """
        known = [None if dims is None or None in dims else dims for dims in inputs]
        meanings = self._axes(cast(Sequence[tuple[Dim, ...] | None], known), [])
        given = ", ".join(f"{name} = {extent}" for name, extent in meanings.items())
        declared = [
            (f"axis {axis} of output {index}", dim)
            for index, output in enumerate(self.outputs)
            for axis, dim in enumerate(output.shape or ())
        ]
        declared += [(f"the bound of `{name}`", bound) for name, bound in self.bounds.items()]
        found = []
        for what, dim in declared:
            if not symbols(dim) or not symbols(dim) <= meanings.keys():
                continue
            try:
                extent = substitute(dim, meanings)
            except ZeroDivisionError:
                found.append(f"{what} is {dim}, which divides by zero where {given}")
                continue
            if isinstance(extent, int) and not 0 <= extent <= LARGEST_DIM:
                found.append(f"{what} is {dim}, which is {extent} where {given}")
        return found

    def _axes(self, inputs: Sequence[tuple[Dim, ...] | None], wrong: list[str]) -> dict[str, Dim]:
        """Return what the names of the inputs' axes stand for; ``wrong`` learns what cannot be."""
        meanings: dict[str, Dim] = {}
        for index, (dims, axes) in enumerate(zip(inputs, self.inputs, strict=False)):
            if dims is None:
                continue
            if len(axes) != len(dims):
                wrong.append(
                    f"input {index} has {len(dims)} axes, and is declared with {len(axes)}"
                )
                continue
            for at, (axis, dim) in enumerate(zip(axes, dims, strict=True)):
                if axis in UNNAMED:
                    continue
                said = meanings.get(axis, dim) if isinstance(axis, str) else axis
                if isinstance(said, int) and isinstance(dim, int) and said != dim:
                    name = f"{said}" if isinstance(axis, int) else f"`{axis}`, which is {said}"
                    wrong.append(f"axis {at} of input {index} is {dim}, and is declared as {name}")
                # Two that are said to be one: the better known stands for both.
                elif isinstance(axis, str) and (axis not in meanings or isinstance(dim, int)):
                    meanings[axis] = dim
        return meanings

    def _add_what_data_decide(self, call: Call, meanings: dict[str, Dim]) -> None:
        """Let each name that no input has stand for an extent of its own."""
        for index, output in enumerate(self.outputs[: len(call.node.outputs)]):
            for axis, dim in enumerate(output.shape or ()):
                bare = dim.bare_symbol if isinstance(dim, Expression) else None
                if bare is not None and bare not in meanings and call.output_name(index):
                    # The name that an axis has elsewhere too, for `dims` to refer to it.
                    meanings[bare] = call.fresh(axis, self._bound(bare, meanings), output=index)
        for output in self.outputs:
            for dim in output.shape or ():
                for name in sorted(symbols(dim) - meanings.keys()):
                    first = next(i for i, each in enumerate(call.node.outputs) if each.name)
                    bound = self._bound(name, meanings)
                    meanings[name] = call.fresh(name, bound, output=first)

    def _bound(self, name: str, meanings: Mapping[str, Dim]) -> Dim | None:
        bound = self.bounds.get(name)
        if bound is None or not symbols(bound) <= meanings.keys():
            return None
        return substitute(bound, meanings)

    def _fact(self, output: CustomOutput, call: Call, meanings: Mapping[str, Dim]) -> Fact:
        dtype, dims = output.dtype, None
        if output.shape is not None:
            dims = tuple(substitute(dim, meanings) for dim in output.shape)
        like = output.like
        fact = call.inputs[like] if like is not None and like < len(call.inputs) else None
        if fact is not None:
            dtype = fact.dtype if dtype is None else dtype
            dims = fact.dims if dims is None else dims
        return Fact(dtype, dims)


def key_of(text: str) -> Key:
    """Return domain and op of ``domain::op``."""
    domain, _, op = text.rpartition("::")
    return ("" if domain == "ai.onnx" else domain), op


_NONE: Mapping[Key, CustomOperator] = MappingProxyType({})
_DECLARED: ContextVar[Mapping[Key, CustomOperator]] = ContextVar("declared", default=_NONE)


@contextmanager
def declared(operators: Iterable[CustomOperator]) -> Iterator[None]:
    """Let shape inference know ``operators``, beside those that it knows already."""
    token = _DECLARED.set({**_DECLARED.get(), **{each.key: each for each in operators}})
    try:
        yield
    finally:
        _DECLARED.reset(token)


def declare(operators: Iterable[CustomOperator]) -> None:
    """Let shape inference know ``operators``, too, up to the end of the `declared` around the call."""
    _DECLARED.set({**_DECLARED.get(), **{each.key: each for each in operators}})


def declaration_of(node: gs.Node) -> CustomOperator | None:
    """Return what is declared of the operator of ``node``, or None."""
    return _DECLARED.get().get(op_key(node))


def _dim(text: str | int) -> Dim:
    parsed = arithmetic(text)
    dim: Dim = parsed.value({name: symbol(name) for name in parsed.names})
    return dim


def _dtype(name: str) -> DType:
    other = {"bfloat16": ml_dtypes.bfloat16, "string": np.object_}
    dtype: DType = np.dtype(other.get(name, name))
    return dtype
