r"""Turn shifts and masks of bits into integer arithmetic.

    before              after (uint8, to the left by 3)

    x   3               x
     \ /                |
    BitShift LEFT       Cast to int32
      |                 |
      y                 Mul by 8, Mod 256
                        |
                        Cast to uint8
                        |
                        y

Why it holds, bit by bit:
- a shift to the left multiplies by a power of two, and what is shifted out is what an integer product
  drops (of 8 bits: what Mod 256 drops);
- a shift to the right divides by it, rounding down: (x - x mod 2**s) / 2**s, with the remainder that is
  never negative, also for a negative x;
- BitwiseNot of a signed x is -1 - x, of an unsigned byte 255 - x;
- BitwiseAnd with 2**k - 1 is the remainder of a division by 2**k.
Bytes are computed in int32.

Needs: shifts and masks that are constant.
Keeps: the name of y.
Skips, with the reason in the report: unsigned types of more than 8 bits, which TensorRT has not; int8
and int16; shifts by all bits or more, and to the sign; other masks, BitwiseOr and BitwiseXor, which
would take a handful of operators for each bit.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.graph import Array
from optc.passes.replacement import Replacement

TYPES = ("int32", "int64", "uint8")


class ComputeBitsInIntegers(Pass):
    """Turn BitShift, BitwiseNot and BitwiseAnd with low bits into integer arithmetic."""

    name = "compute-bits-in-integers"
    group = "legalise"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Rewrite what ``graph`` does with single bits."""
        report = Report()
        for node in facts.nodes("BitShift", "BitwiseAnd", "BitwiseNot"):
            dtype = facts.shapes.dtype(node.inputs[0].name)
            if dtype is None or dtype.name not in TYPES:
                report.skipped[node.name] = f"TensorRT has no arithmetic of {dtype}"
                continue
            new = Replacement(graph, facts, node)
            made = _RULES[node.op](node, dtype, new)
            if isinstance(made, str):
                report.skipped[node.name] = made
                continue
            new.finish(report, made if dtype != np.uint8 else new.cast(made, np.uint8))
        return report


def _wide(x: gs.Tensor, dtype: np.dtype[np.generic], new: Replacement) -> gs.Tensor:
    return new.cast(x, np.int32) if dtype == np.uint8 else x


def _number_type(dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    return np.dtype(np.int32) if dtype == np.uint8 else dtype


def _shift(node: gs.Node, dtype: np.dtype[np.generic], new: Replacement) -> gs.Tensor | str:
    x, by = node.inputs
    if not isinstance(by, gs.Constant):
        return "how far it shifts is no constant"
    shifts = np.asarray(by.values).astype(np.int64)
    most = 7 if dtype == np.uint8 else 8 * dtype.itemsize - 2
    if not np.all((shifts >= 0) & (shifts <= most)):
        return f"it shifts {dtype} by more than {most} bits, or by fewer than none"
    factors = (np.int64(1) << shifts).astype(_number_type(dtype))
    x = _wide(x, dtype, new)
    if node.attrs["direction"] == "LEFT":
        product = new.add("Mul", x, factors)
        return product if dtype != np.uint8 else new.add("Mod", product, np.array(256, np.int32))
    if dtype != np.uint8:
        x = new.add("Sub", x, new.add("Mod", x, factors))
    return new.add("Div", x, factors)


def _not(node: gs.Node, dtype: np.dtype[np.generic], new: Replacement) -> gs.Tensor | str:
    most = np.array(255 if dtype == np.uint8 else -1, _number_type(dtype))
    return new.add("Sub", most, _wide(node.inputs[0], dtype, new))


def _and(node: gs.Node, dtype: np.dtype[np.generic], new: Replacement) -> gs.Tensor | str:
    constants = [tensor for tensor in node.inputs if isinstance(tensor, gs.Constant)]
    others = [tensor for tensor in node.inputs if not isinstance(tensor, gs.Constant)]
    if len(constants) != 1:
        return "its mask is no constant"
    mask: Array = np.asarray(constants[0].values).astype(np.int64)
    if not np.all((mask >= 0) & (mask < 2**30) & (mask & (mask + 1) == 0)):
        return "its mask is not of the lowest bits alone"
    divisor = (mask + 1).astype(_number_type(dtype))
    return new.add("Mod", _wide(others[0], dtype, new), divisor)


_RULES = {"BitShift": _shift, "BitwiseAnd": _and, "BitwiseNot": _not}
