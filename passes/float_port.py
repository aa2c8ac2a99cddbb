"""Which float32 inputs and outputs of a node take a shorter float type together, and which may not.

Asked of ONNX's own schemas: parameters that share a type variable have one type, so they change
together or not at all; a parameter of the fixed type tensor(float), like the scales of a Resize,
stays. `STAYS` has the operators whose schema would let them change and that stay all the same, and
`HELD` the parameters that stay beside others that change, as what they hold loses its meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper
from onnx.defs import OpSchema

from optc.passes.graph import WITH_BODIES, all_nodes, bodies_of
from optc.passes.match import argument, number
from optc.passes.opset import NEWEST
from optc.passes.precision import DTYPES, Float
from optc.passes.shape import Shapes

NO_END = float(np.finfo(np.float32).max)
"""What masks are written with: it and its negative stand for infinity."""

DTypeOf = Callable[[gs.Tensor], np.dtype[Any] | None]

FLOAT32 = np.dtype(np.float32)


def _ops(names: str) -> list[str]:
    return names.split()


STAYS = {
    **dict.fromkeys(
        _ops("""Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform
            RandomUniformLike"""),
        "its numbers are drawn in fp32",
    ),
    **dict.fromkeys(
        _ops("BlackmanWindow HammingWindow HannWindow MelWeightMatrix Range"),
        "it counts, and a short type skips numbers",
    ),
    **dict.fromkeys(
        _ops("MaxRoiPool RoiAlign"),
        "its boxes are coordinates, which a short type rounds to others",
    ),
    **dict.fromkeys(
        _ops("""ConcatFromSequence Optional OptionalGetElement OptionalHasElement SequenceAt
            SequenceConstruct SequenceInsert SplitToSequence"""),
        "a sequence keeps the type of its tensors",
    ),
    **dict.fromkeys(sorted(WITH_BODIES), "what enters and leaves a body keeps its type"),
    "BitCast": "it looks at the bits of numbers",
    "CastLike": "another tensor says its type",
}
"""Operator -> why its floats stay in fp32."""

HELD = {
    "BatchNormalization": (1, 2, 3, 4),  # a small variance has no digits left in fp16
    "DequantizeLinear": (1,),  # the scale: of weights it is often too small for fp16
    "Dropout": (1,),
    "OneHot": (0, 1),
    "QuantizeLinear": (1,),
    "Resize": (1, 2),
    "Upsample": (1,),
}
"""Operator -> its inputs that stay in fp32, where the schema lets them differ from the others.

TensorRT for RTX 1.7 takes all of these; it wants the grid of a GridSample in the type of its input.
"""

HELD_OUTPUTS = {"BatchNormalization": (1, 2), "LayerNormalization": (1, 2)}
"""Operator -> its outputs that stay in fp32: statistics."""

NOT_BUILT: dict[Float, tuple[str, ...]] = {
    "bf16": ("ConvTranspose", "GRU", "LpNormalization", "LpPool"),
}
"""Short type -> operators that TensorRT for RTX 1.7 builds in fp32, but not in that type.

Asked of its builder for each operator of ONNX. HardSwish and Mish are not here, as their parts are
built (`spell-out-activations`).
"""

RECURRENT = ("GRU", "LSTM", "RNN")

SEQUENCE_LENGTHS = 4
"""The input of these with which TensorRT for RTX 1.7 builds them in fp32 only."""

EXACT_CASTS = frozenset(
    {"bool", "int2", "int4", "int8", "uint2", "uint4", "uint8", "float4_e2m1fn"}
    | {"float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"}
)
"""Types all of whose numbers float16 and bfloat16 have too."""


@dataclass(frozen=True, slots=True)
class Ports:
    """What of a node takes the short type: indices of inputs and of outputs, in ascending order."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


NO_FLOATS = "it has no fp32 values"
"""The reason to leave a node alone that there is nothing to say about."""


def ports(
    node: gs.Node,
    dtype_of: DTypeOf,
    precision: Float,
    *,
    opset: int = NEWEST,
    sizes: Container[str] = frozenset(),
) -> Ports | str:
    """Return which float32 inputs and outputs of ``node`` take a short type, or why none does.

    Args:
        node: Of any graph, also of a body.
        dtype_of: Says the type of a tensor; None where it is not known.
        precision: fp16 or bf16.
        opset: The version of the default domain to go by. The newest one says what can be had of a
            model that is raised to it.
        sizes: Names of nodes that must stay exact: `nodes_of_sizes`.

    Returns:
        At least one input or output; else a reason, as a phrase about the node.
    """
    if node.domain:
        return f"`{node.domain}` defines it, not ONNX"
    if node.op in STAYS:
        return STAYS[node.op]
    inputs, outputs = _floats(node.inputs, dtype_of), _floats(node.outputs, dtype_of)
    held, held_outputs = HELD.get(node.op, ()), HELD_OUTPUTS.get(node.op, ())
    if all(i in held for i in inputs) and all(i in held_outputs for i in outputs):
        return NO_FLOATS
    if node.name in sizes:
        return "it computes sizes or positions"
    if node.op in NOT_BUILT.get(precision, ()):
        return f"TensorRT builds no {node.op} in {DTYPES[precision].name}"
    if node.op in RECURRENT and argument(node, SEQUENCE_LENGTHS) is not None:
        return f"TensorRT builds a {node.op} with lengths of sequences in fp32 only"
    if node.op == "Cast" and (reason := _why_no_cast(node, dtype_of, precision)):
        return reason
    rule = _rule(node.op, opset, precision)
    if rule is None:
        return f"ONNX has no such operator in version {opset}"
    if max(inputs, default=0) >= rule.most_inputs or max(outputs, default=0) >= rule.most_outputs:
        return f"ONNX has no such parameters in version {opset}"
    taking = {
        variable
        for indices, variables, staying in (
            (inputs, rule.inputs, held),
            (outputs, rule.outputs, held_outputs),
        )
        for index in indices
        if index not in staying and (variable := _at(variables, index))
    }
    if not taking:
        return f"{node.op} takes no {DTYPES[precision].name} in version {opset} of ONNX"
    sides = (node.inputs, rule.inputs), (node.outputs, rule.outputs)
    for tensors, variables in sides:
        for index, tensor in enumerate(tensors):
            if tensor.name and _at(variables, index) in taking and dtype_of(tensor) is None:
                return f"the type of `{tensor.name}` is not known"
    return Ports(
        tuple(i for i in inputs if _at(rule.inputs, i) in taking),
        tuple(i for i in outputs if _at(rule.outputs, i) in taking),
    )


def _at(variables: tuple[str, ...], index: int) -> str:
    """Return the type variable of a parameter; the last one may stand for many."""
    return variables[min(index, len(variables) - 1)]


def _floats(tensors: list[gs.Tensor], dtype_of: DTypeOf) -> list[int]:
    return [i for i, t in enumerate(tensors) if t.name and dtype_of(t) == FLOAT32]


def cast_to(node: gs.Node) -> np.dtype[Any]:
    """Return the type that a Cast gives."""
    dtype: np.dtype[Any] = np.dtype(helper.tensor_dtype_to_np_dtype(node.attrs["to"]))
    return dtype


def _why_no_cast(node: gs.Node, dtype_of: DTypeOf, precision: Float) -> str | None:
    """Return why the float side of a Cast stays in fp32."""
    source, target = dtype_of(node.inputs[0]), cast_to(node)
    if source is None:
        return "the type of what it reads is not known"
    if source == FLOAT32:
        return "text says how many digits a number has" if target == object else None
    if target == FLOAT32 and source.name not in EXACT_CASTS and source != DTYPES[precision]:
        return f"{DTYPES[precision].name} does not have all numbers of {source.name}"
    return None


@dataclass(frozen=True, slots=True)
class _Rule:
    """An operator's type variables by parameter; "" where the short type may not stand."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    most_inputs: int
    most_outputs: int


@cache
def _rule(op: str, opset: int, precision: Float) -> _Rule | None:
    if not onnx.defs.has(op, opset, ""):
        return None
    schema = onnx.defs.get_schema(op, opset, "")
    wanted = f"tensor({DTYPES[precision].name})"
    takes = {c.type_param_str for c in schema.type_constraints if wanted in c.allowed_type_strs}

    def variables(parameters: list[OpSchema.FormalParameter]) -> tuple[str, ...]:
        return tuple(p.type_str if p.type_str in takes else "" for p in parameters) or ("",)

    return _Rule(
        variables(list(schema.inputs)),
        variables(list(schema.outputs)),
        schema.max_input,
        schema.max_output,
    )


# --- what only moves -----------------------------------------------------------------------------

MOVEMENT = frozenset(
    _ops("""Abs ArgMax ArgMin Ceil CenterCropPad Clip Compress Concat DepthToSpace Dropout Equal Expand
        Flatten Floor Gather GatherElements GatherND GlobalMaxPool Greater GreaterOrEqual Identity IsInf
        IsNaN Less LessOrEqual Max MaxPool MaxUnpool Min Neg NonZero Pad ReduceMax ReduceMin Relu Reshape
        ReverseSequence Round Shape Sign Size Slice SpaceToDepth Split Squeeze Tile TopK Transpose Trilu
        Unique Unsqueeze Where""")
)
"""Operators whose result on numbers of a short type is exact in it: they copy, choose or compare.

An integral part and a number with another sign are among the short type's as well.
"""


def is_movement(node: gs.Node) -> bool:
    """Whether ``node`` returns the same in a short type as in fp32 where all it reads is in it."""
    if node.domain:
        return False
    match node.op:
        case "Cast" | "ConstantOfShape" | "EyeLike":  # those that `ports` lets change type
            return True
        case "Resize" | "Upsample":
            return bool(node.attrs.get("mode", "nearest") == "nearest")
        case "Scatter" | "ScatterElements" | "ScatterND":
            return node.attrs.get("reduction", "none") in ("none", "max", "min")
    return node.op in MOVEMENT


# --- shape arithmetic ----------------------------------------------------------------------------

READS_SIZES = {
    **dict.fromkeys(("AffineGrid", "CenterCropPad", "Expand", "Pad", "Reshape", "Tile"), (1,)),
    **dict.fromkeys(("Split", "SplitToSequence", "TopK", "Trilu", "Upsample"), (1,)),
    **dict.fromkeys(("BlackmanWindow", "ConstantOfShape", "HammingWindow", "HannWindow"), (0,)),
    "Col2Im": (1, 2),
    "Loop": (0,),
    "MaxUnpool": (2,),
    "NonMaxSuppression": (2,),
    "OneHot": (1,),
    "Range": (0, 1, 2),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
}
"""Operator -> its inputs that say how large or where from, not what."""

ARITHMETIC = frozenset(
    _ops("""Abs Add Cast Ceil Clip Concat Div Exp Expand Flatten Floor Gather Identity Log Max Min Mod Mul
        Neg Pow ReduceMax ReduceMin ReduceProd ReduceSum Reciprocal Relu Reshape Round Sign Slice Split
        Sqrt Squeeze Sub Sum Unsqueeze Where""")
)
"""Operators that sizes are computed with."""


POSITIONAL = frozenset([*ARITHMETIC, *_ops("Atan Cos Sin Tile Transpose")])
"""Operators that positions are computed with, and what is read off them: rotations, waves."""

COPYING = frozenset(_ops("Concat Expand Reshape Slice Squeeze Tile Transpose Unsqueeze"))
"""Operators that make a constant of a constant."""


def nodes_of_sizes(graph: gs.Graph, shapes: Shapes) -> frozenset[str]:
    """Return the names of the nodes that compute sizes or positions in floats, of bodies too.

    Those of sizes are found from where sizes are read, against the flow, along lists and single
    numbers; and by shape inference, which knows values only where they follow from extents. Those of
    positions read nothing but integers that were counted, as floats, and constants.
    """
    found = _known_sizes(graph, shapes) | _positions(graph, shapes)
    seen: set[int] = set()
    pending = [
        node.inputs[index]
        for node in all_nodes(graph)
        for index in (READS_SIZES.get(node.op, ()) if not node.domain else ())
        if index < len(node.inputs)
    ]
    while pending:
        tensor = pending.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        dims = shapes.dims(tensor.name)
        for node in tensor.inputs if dims is not None and len(dims) < 2 else ():
            if node.op in ARITHMETIC and not node.domain:
                found.add(node.name)
                pending.extend(node.inputs)
    return frozenset(found)


def _known_sizes(graph: gs.Graph, shapes: Shapes) -> set[str]:
    """Return the names of the nodes of which shape inference knows what floats they make."""
    return {
        node.name
        for node in all_nodes(graph)
        if node.op in ARITHMETIC
        and not node.domain
        and any(
            shapes.dtype(t.name) == FLOAT32 and shapes.value(t.name) is not None
            for t in node.outputs
            if t.name
        )
    }


def _positions(graph: gs.Graph, shapes: Shapes) -> set[str]:
    """Return the names of the nodes that read no other floats than what was counted."""
    found: set[str] = set()
    counted: set[int] = set()  # ids of tensors
    constant: set[int] = set()

    for node in all_nodes(graph):
        if node.domain or bodies_of(node):
            continue
        made = [t for t in node.outputs if t.name and shapes.dtype(t.name) == FLOAT32]
        read = {
            id(t)
            for t in node.inputs
            if t.name and not isinstance(t, gs.Constant) and shapes.dtype(t.name) == FLOAT32
        }
        if node.op == "Range" or (node.op == "Cast" and made and _counts(node.inputs[0], shapes)):
            counted.update(map(id, made))
        elif node.op == "ConstantOfShape" or (node.op in COPYING and read <= constant):
            constant.update(map(id, made))
        elif any(map(_is_mask, node.inputs)):
            continue  # of what is counted it is said here what counts not at all
        elif read & counted and read <= counted | constant and (node.op in POSITIONAL or not made):
            counted.update(map(id, made))
            found.add(node.name)
    return found


def _is_mask(tensor: gs.Tensor) -> bool:
    """Whether ``tensor`` is a constant of one number that stands for infinity."""
    value = number(tensor)
    return value is not None and abs(value) == NO_END


def _counts(tensor: gs.Tensor, shapes: Shapes) -> bool:
    """Whether ``tensor`` has integers that a short type has not."""
    constant = isinstance(tensor, gs.Constant)
    dtype = np.dtype(tensor.dtype) if constant else shapes.dtype(tensor.name)
    return dtype is not None and dtype.kind in "iu" and dtype.name not in EXACT_CASTS
