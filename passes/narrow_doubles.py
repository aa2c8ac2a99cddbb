r"""Compute in float32 what float64 computes no more exactly.

    before                after

    x (float32)           x (float32)
    |                     |
    Cast to float64       Floor
    |                     |
    Floor                 Cast to float64
    |                     |
    Cast to int64         Cast to int64
                          |

Why it holds: every float32 is a float64, so that an operator which returns some of the numbers it is
given, or whole ones near them, returns numbers that are float32 too. The Cast moves behind it, until
it meets one back or one to another type, and both are gone. Comparisons return the same bits. And one
sum, product, quotient or square root of float32 numbers that is rounded to float64 and then to
float32 is the one that is rounded to float32 at once, as float64 has more than twice the bits and two
more (Figueroa, "When is double rounding innocuous?", 1995).

Exact, where the target rounds float32 as IEEE 754 says.

All other float64 arithmetic is left to the fallback: no operator of a target that has only float32
gives its results.

Needs: inputs cast from float32 or a type that it holds, or constants of its numbers.
Keeps: the names and types of outputs.
Skips, with the reason in the report: inputs that are truly float64; a sum, product, quotient or root
that is read as float64.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from optc.passes.contract import Facts, Pass, Report
from optc.passes.match import made_by
from optc.passes.replacement import Operand, Replacement

CHOOSING = (
    *("Abs", "Ceil", "Clip", "Concat", "DepthToSpace", "Expand", "Flatten", "Floor", "Gather"),
    *("GatherElements", "GatherND", "Identity", "Max", "Min", "Neg", "Pad", "ReduceMax"),
    *("ReduceMin", "Relu", "Reshape", "Round", "ScatterElements", "ScatterND", "Sign", "Slice"),
    *("SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where"),
)
"""Operators that return numbers of their inputs, up to the sign, or whole numbers near them."""

COMPARING = ("Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual")

ROUNDING = ("Add", "Div", "Mul", "Sqrt", "Sub")
"""Operators whose result IEEE 754 defines as the exact one, rounded."""

HELD = ("bfloat16", "bool", "float16", "float32", "int16", "int8", "uint16", "uint8")
"""Types all of whose numbers are float32 numbers."""

MOST_CONSTANT = 1 << 16
"""Elements of the largest constant that is looked through."""


class NarrowDoubles(Pass):
    """Compute in float32 what float64 computes no more exactly."""

    name = "narrow-doubles"
    group = "clean"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Narrow what can be narrowed in ``graph``."""
        report = Report()
        if not any(cast.attrs["to"] == TensorProto.DOUBLE for cast in facts.nodes("Cast")):
            return report  # nothing was widened
        for node in facts.nodes(*CHOOSING, *COMPARING, *ROUNDING, "Cast"):
            wide = [index for index, t in enumerate(node.inputs) if _is_double(t, facts)]
            if not wide or (node.op == "Cast" and node.attrs["to"] in _FLOATS):
                continue
            if node.attrs.get("reduction", "none") not in ("none", "max", "min"):
                continue
            new = Replacement(graph, facts, node)
            operands: list[Operand] = list(node.inputs)
            for index in wide:
                operands[index] = _narrow(node.inputs[index], facts, new)
            if any(operands[index] is None for index in wide):
                report.skipped[node.name] = "it reads numbers that float32 does not hold"
                new.discard()
            elif node.op in ROUNDING and not _is_rounded_again(node.outputs[0], facts):
                report.skipped[node.name] = "its result is read as float64"
                new.discard()
            else:
                made = new.add_with(len(node.outputs), node.op, *operands, **node.attrs)
                doubles = [_is_double(tensor, facts) for tensor in node.outputs]
                results = {
                    index: new.cast(result, np.float64) if is_double else result
                    for index, (result, is_double) in enumerate(zip(made, doubles, strict=True))
                }
                new.finish(report, results)
        return report


_FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE)
"""A Cast to float32 of what was cast from it is removed with it, elsewhere."""


def _is_double(tensor: gs.Tensor, facts: Facts) -> bool:
    return bool(tensor.name) and facts.shapes.dtype(tensor.name) == np.float64


def _narrow(tensor: gs.Tensor, facts: Facts, new: Replacement) -> Operand:
    """Return what ``tensor`` is in float32, None where that is something else."""
    if isinstance(tensor, gs.Constant):
        if np.prod(tensor.shape) > MOST_CONSTANT:
            return None
        values = np.asarray(tensor.values)
        with np.errstate(over="ignore"):
            narrow = values.astype(np.float32)
        return narrow if np.array_equal(narrow, values, equal_nan=True) else None
    cast = made_by(tensor, "Cast")
    if cast is None:
        return None
    source = cast.inputs[0]
    dtype = facts.shapes.dtype(source.name)
    if dtype is None or dtype.name not in HELD:
        return None
    return source if dtype == np.float32 else new.cast(source, np.float32)


def _is_rounded_again(tensor: gs.Tensor, facts: Facts) -> bool:
    """Whether all that becomes of ``tensor`` is float32."""
    return not facts.is_kept(tensor) and all(
        reader.op == "Cast" and not reader.domain and reader.attrs["to"] == TensorProto.FLOAT
        for reader in tensor.outputs
    )
