"""Which float tensors hold whole numbers only, and in which range, by how they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts
from optc.passes.graph import producer
from optc.passes.match import argument

MAX_NODES = 32
"""How many nodes before a tensor are looked at."""

SMALL_BYTES = 64 * 1024
"""Constants beyond this are not looked into, unless a pass made them: then they are in memory."""

MOVING = frozenset(
    {
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "MaxPool",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)
"""Operators whose output holds elements of their first input and nothing else."""


@dataclass(frozen=True, slots=True)
class Whole:
    """The whole numbers that a tensor may hold, as far as it holds numbers at all.

    Attributes:
        low: The smallest; may be infinite.
        high: The largest; may be infinite.
        negative_zero: Whether a zero may have a sign, which no integer has.
    """

    low: float
    high: float
    negative_zero: bool

    def fits(self, dtype: np.dtype[Any]) -> bool:
        """Whether a Cast to ``dtype`` and back gives the very same floats."""
        if dtype.kind not in "iu" or self.negative_zero:
            return False
        info = np.iinfo(dtype)
        return int(info.min) <= self.low and self.high <= int(info.max)


ANY = Whole(-math.inf, math.inf, negative_zero=True)


def whole_of(tensor: gs.Tensor, facts: Facts) -> Whole | None:
    """Return which whole numbers ``tensor`` holds, None where it may hold others."""
    return _Search(facts).of(tensor)


class _Search:
    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.left = MAX_NODES

    def of(self, tensor: gs.Tensor) -> Whole | None:
        if isinstance(tensor, gs.Constant):
            return _of_constant(tensor)
        dtype = self.facts.shapes.dtype(tensor.name)
        if dtype is not None and dtype.kind in "iu":
            info = np.iinfo(dtype)
            return Whole(int(info.min), int(info.max), negative_zero=False)
        node = producer(tensor)
        if node is None or node.domain or self.left == 0:
            return None
        self.left -= 1
        match node.op:
            case "Round" | "Ceil" | "Floor":
                return ANY
            case "Cast":
                return self.of_cast(node)
            case "Clip":
                return self.of_clip(node)
            case "Add" | "Sub":
                return self.of_sum(node)
            case "Relu":
                found = self.of(node.inputs[0])
                return found and Whole(max(0.0, found.low), found.high, found.negative_zero)
            case "Concat" | "Max" | "Min":
                return self.of_any(node)
        return self.of(node.inputs[0]) if node.op in MOVING else None

    def of_cast(self, node: gs.Node) -> Whole | None:
        """Floats of 32 bits hold all integers of up to 16; those of int32 are rounded, yet whole."""
        found = self.of(node.inputs[0])
        dtype = self.facts.shapes.dtype(node.outputs[0].name)
        if found is None or dtype is None or dtype.name not in ("float32", "float64"):
            return None
        exact = max(abs(found.low), abs(found.high)) <= 2**24
        return found if exact else Whole(-math.inf, math.inf, found.negative_zero)

    def of_clip(self, node: gs.Node) -> Whole | None:
        found = self.of(node.inputs[0])
        if found is None or node.attrs:
            return None
        least, most = (-math.inf, -math.inf), (math.inf, math.inf)  # where each bound lies itself
        for index in (1, 2):
            bound = argument(node, index)
            if bound is None:
                continue
            limit = self.of(bound)
            if limit is None or limit.negative_zero:
                return None
            if index == 1:
                least = limit.low, limit.high
            else:
                most = limit.low, limit.high
        return Whole(
            min(max(found.low, least[0]), most[0]),
            min(max(found.high, least[1]), most[1]),
            found.negative_zero,
        )

    def of_sum(self, node: gs.Node) -> Whole | None:
        """A sum of whole numbers is whole even where it is rounded. -0.0 is -0.0 + -0.0 only."""
        one, other = (self.of(tensor) for tensor in node.inputs)
        if one is None or other is None:
            return None
        if node.op == "Sub":
            other = Whole(-other.high, -other.low, negative_zero=True)
        low, high = one.low + other.low, one.high + other.high
        return Whole(low, high, one.negative_zero and other.negative_zero)

    def of_any(self, node: gs.Node) -> Whole | None:
        found = [self.of(tensor) for tensor in node.inputs]
        known = [each for each in found if each is not None]
        if len(known) != len(found):
            return None
        return Whole(
            min(each.low for each in known),
            max(each.high for each in known),
            any(each.negative_zero for each in known),
        )


def _of_constant(tensor: gs.Constant) -> Whole | None:
    is_at_hand = isinstance(tensor._values, np.ndarray) or tensor._values.nbytes <= SMALL_BYTES
    if not is_at_hand or np.dtype(tensor.dtype).kind not in "fiu":
        return None
    values = np.asarray(tensor.values)
    if values.size == 0 or not np.all(np.isfinite(values)) or np.any(values != np.rint(values)):
        return None
    negative_zero = bool(np.any(np.signbit(values) & (values == 0)))
    return Whole(float(values.min()), float(values.max()), negative_zero)
