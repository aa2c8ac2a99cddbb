r"""Shorten a chain of Add, Sub, Mul, Div and Neg with constants to one Mul and one Add at most.

    before                      after

    x    a                      x    s
     \  /                        \  /
     Add   s                     Mul   s*a+b
       \  /                        \  /
       Mul   b                     Add
         \  /                       |
         Add                        y
          |
          y

Why it holds: each of them is sign * scale * x + shift with constants, and so is the whole chain. It
is written as an Add, a Sub from a constant, a Mul, or a Mul and an Add, where that is shorter.
Integers: exact, as they wrap around; Div of integers, which cuts off, is not taken. Floats: equal up
to rounding, the constants being computed in float64 and rounded once. Where the chain overflowed or
lost all digits half-way, the result is the better one.

Needs: the constants, of any shape that broadcasts.
Keeps: the name of the last node and y. A value that others read ends a chain.
Skips, with the reason in the report: a large number that is added and taken away again, as that
rounds on purpose; constants that would leave the range of their type, or be larger than those there.
Order: after the passes that fuse, as activations are made of such chains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.affine import Array, Refused, variable_of
from optc.passes.contract import Facts, Pass, Report
from optc.passes.graph import detach, producer
from optc.passes.linear import FLOATS, limits, peek
from optc.passes.match import become, names_of

OPS = ("Add", "Div", "Mul", "Neg", "Sub")
LONGEST = 16
LARGEST_CANCELLED = 64.0
"""How many times larger than what is left, or than 1, an addend may be: 1.5 * 2**23 added to a float32
and taken away rounds it to a whole number; so does 1536 for a float16 and 192 for a bfloat16."""


class FoldConstantChains(Pass):
    """Turn ``Add(Mul(Add(x, a), s), b)`` into ``Add(Mul(x, s), s*a+b)``; any such chain."""

    name = "fold-constant-chains"
    exactness = "exact for integers, floats equal up to rounding"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Fold what can be folded in ``graph``."""
        report = Report()
        own: set[int] | None = None
        for last in facts.nodes(*OPS):
            before = _before(last, facts)
            if before is None or _behind(last, facts) is not None:
                continue  # no chain, or not its end
            own = own or {id(node) for node in graph.nodes}
            chain = [last]
            while before is not None and id(before) in own and len(chain) < LONGEST:
                chain.insert(0, before)
                before = _before(before, facts)
            if len(chain) <= _fewest(chain):
                continue
            try:
                whole = _composed(chain)
            except Refused as refused:
                report.skipped[last.name] = str(refused)
                continue
            names = names_of(*chain)
            for node in _write(chain, _steps(whole), whole.dtype, facts):
                report.merged[node.name] = names
        return report


def _before(node: gs.Node, facts: Facts) -> gs.Node | None:
    """Return the node before ``node`` in a chain: nothing else reads what it makes."""
    x = variable_of(node)
    before = None if x is None or facts.is_shared(x) else producer(x)
    if before is None or before.op not in OPS or variable_of(before) is None:
        return None
    return before


def _behind(node: gs.Node, facts: Facts) -> gs.Node | None:
    made = node.outputs[0]
    if facts.is_shared(made):
        return None
    behind: gs.Node = made.outputs[0]
    return behind if behind.op in OPS and variable_of(behind) is made else None


def _fewest(chain: list[gs.Node]) -> int:
    """Return how many nodes it takes to do what ``chain`` does."""
    ops = {node.op for node in chain}
    if ops == {"Neg"}:
        return len(chain)  # those that cancel are for the pass that removes such
    return bool(ops & {"Mul", "Div"}) + bool(ops & {"Add", "Sub"})


@dataclass(slots=True)
class _Affine:
    """``sign * scale * x + shift``, as far as a chain has been read; None: no such constant yet.

    Attributes:
        largest: The largest of the addends, in units of what is left at the end.
        size: Elements of the largest constant of the chain.
    """

    dtype: np.dtype[np.generic]
    sign: int = 1
    scale: Array | None = None
    shift: Array | None = None
    largest: float = 0.0
    size: int = 1

    def negate(self) -> None:
        self.sign = -self.sign
        self.shift = None if self.shift is None else -self.shift

    def add(self, addend: Array) -> None:
        self.shift = addend if self.shift is None else self.shift + addend
        self.largest = max(self.largest, float(np.abs(addend).max(initial=0)))

    def multiply(self, factor: Array) -> None:
        self.scale = factor if self.scale is None else self.scale * factor
        if self.shift is not None:
            self.shift = self.shift * factor
            self.largest *= float(np.abs(factor).max(initial=0))


def _composed(chain: list[gs.Node]) -> _Affine:
    """Return what all nodes of ``chain`` do together.

    Raises:
        Refused: If that cannot be told, or not be told exactly enough.
    """
    constants = [t for node in chain for t in node.inputs if isinstance(t, gs.Constant)]
    dtype = np.dtype(constants[0].dtype) if constants else np.dtype(np.float32)
    is_float = dtype.name in FLOATS
    if not is_float and (dtype.kind not in "iu" or any(node.op == "Div" for node in chain)):
        raise Refused(f"a division of {dtype.name} cuts off")
    whole = _Affine(dtype)
    with np.errstate(all="ignore"):  # integers wrap; what is not finite is refused
        for node in chain:
            if node.op == "Neg":
                whole.negate()
                continue
            at = next(i for i, t in enumerate(node.inputs) if isinstance(t, gs.Constant))
            stored = peek(node.inputs[at])
            value = stored.astype(np.float64) if is_float else stored
            whole.size = max(whole.size, value.size)
            match node.op:
                case "Add":
                    whole.add(value)
                case "Sub" if at == 0:
                    whole.negate()
                    whole.add(value)
                case "Sub":
                    whole.add(-value)
                case "Mul":
                    whole.multiply(value)
                case "Div":
                    whole.multiply(1 / value)
    for numbers in (whole.scale, whole.shift):
        if numbers is not None:
            _require_fit(numbers, whole, is_float=is_float)
    return whole


def _require_fit(numbers: Array, whole: _Affine, *, is_float: bool) -> None:
    if numbers.size > whole.size:
        raise Refused("the folded constant would be larger than those of the chain")
    if not is_float:
        return
    smallest, largest = limits(whole.dtype)
    size = np.abs(numbers)
    if not (size <= largest).all() or ((size < smallest) & (size > 0)).any():
        raise Refused(f"the folded constants do not fit {whole.dtype.name}")
    if numbers is whole.shift and whole.largest > LARGEST_CANCELLED:
        left = float(size.min(initial=math.inf))
        if whole.largest > LARGEST_CANCELLED * max(1.0, left):
            raise Refused("a large number is added and taken away again: that rounds")


Step = tuple[str, Array, bool]
"""Operator, its constant, and whether that comes first."""


def _steps(whole: _Affine) -> list[Step]:
    """Return the fewest operators that compute ``whole``."""
    if whole.scale is not None:
        steps: list[Step] = [("Mul", whole.scale if whole.sign == 1 else -whole.scale, False)]
        return steps if whole.shift is None else [*steps, ("Add", whole.shift, False)]
    assert whole.shift is not None, "a chain has a constant"
    return [("Add", whole.shift, False) if whole.sign == 1 else ("Sub", whole.shift, True)]


def _write(
    chain: list[gs.Node], steps: list[Step], dtype: np.dtype[np.generic], facts: Facts
) -> list[gs.Node]:
    """Let the last nodes of ``chain`` be ``steps``, cut the others off, and return the last ones."""
    value = variable_of(chain[0])
    gone, left = chain[: -len(steps)], chain[-len(steps) :]
    for node in gone:
        detach(node)
    for node, (op, constant, is_first) in zip(left, steps, strict=True):
        name = facts.fresh_name(f"{node.name}.constant")
        tensor = gs.Constant(name, np.asarray(constant, dtype))
        become(node, op, [tensor, value] if is_first else [value, tensor])
        value = node.outputs[0]
        if node is not chain[-1]:
            value.shape = None  # of another extent where its constant was larger
    return left
