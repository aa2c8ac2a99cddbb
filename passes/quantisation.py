"""What of a product may be quantised to 8 bits, and to which numbers.

Everything is symmetric: a number is a whole multiple of a scale (int8), or a scale times a float of 8
bits (fp8, e4m3), and zero is zero. Activations have one scale a tensor, constant weights one for each
channel that comes out. What places Q and DQ and what simulates them use the same functions.

What TensorRT for RTX 1.7.1 makes of it, read in the layers that its builder lists (scales in fp32,
floats around in fp32, fp16 or bf16):

==================  =======================  ====================
product             int8 multiplied as int8  fp8 as fp8
==================  =======================  ====================
Conv, 1-D to 3-D    8.0 and up; not on 7.5   8.9 and up
Gemm, MatMul        7.5 and up               8.9 and up
ConvTranspose       never                    never
==================  =======================  ====================

Where it does not, it takes the model all the same, dequantises the operands while it runs, the weights
too, and multiplies floats: the numbers are rounded for nothing. On 7.5 the floats around a Gemm or
MatMul must be fp16. Below 8.9 the builder refuses fp8 by name; a portable engine it builds, though it
is to run on 8.0, too. A Conv in fp8 has kernels of at most 32 taps. A Conv in groups is widened with
zeros to four channels a group, a depthwise one to many times its size: it stays in floats. Attention
(product, Softmax, product) is one kernel in floats, and in fp8 where its lengths are static, the keys
are 32 at least, both its products are in fp8, and no Where behind the Softmax guards against NaN. Else
it is taken apart, its scores written to memory: it stays in floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.graph import Array
from optc.passes.match import argument, made_by
from optc.passes.precision import DTYPES, LARGEST, NodePrecision

EightBits = Literal["int8", "fp8"]
"""A precision that operands are quantised to."""

PRODUCTS = ("Conv", "Gemm", "MatMul")
"""Operators whose operands are quantised."""

LEAST_CHANNELS = 4
"""Of a group of a Conv: fewer are widened with zeros."""

LEAST_KEYS = 32
"""Of attention in fp8."""

MOST_TAPS = 32
"""Of the kernel of a Conv in fp8, over all its spatial axes: 4x8 are multiplied as fp8, 3x11 are not."""

STEPS = (
    "Add",
    "Cast",
    "Div",
    "Identity",
    "Mul",
    "Reshape",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
    "Where",
)
MOST_STEPS = 6
"""What stands between a product and the Softmax of attention: scales, masks, axes."""

WIDEST_RATIO = 2.0**-10
"""The least scale of a channel, as a share of the largest of its tensor.

A channel this much weaker than another has its last bits in what the others round away. Without a
bound a channel of zeros would have no scale, and the ratio of two would not be a number in fp16.
"""

DTypeOf = Callable[[gs.Tensor], np.dtype[Any] | None]
RankOf = Callable[[gs.Tensor], int | None]


@dataclass(frozen=True, slots=True)
class Operands:
    """What of a product is quantised.

    Attributes:
        activations: Indices of the inputs that are computed: one scale each.
        weights: Index of the input that is constant; None where both are computed.
        axis: Along which the weights have a scale for each channel; None without weights.
    """

    activations: tuple[int, ...]
    weights: int | None = None
    axis: int | None = None


def is_eight_bits(precision: NodePrecision) -> TypeGuard[EightBits]:
    """Whether ``precision`` is one that operands are quantised to."""
    return precision in ("int8", "fp8")


def least_capability(op: str, precision: EightBits) -> str | None:
    """Return the compute capability from which on TensorRT for RTX multiplies ``op`` in 8 bits.

    None where it never does. See the table of this module.

    Example:
        >>> least_capability("Conv", "int8"), least_capability("MatMul", "int8")
        ('8.0', '7.5')
    """
    if op not in PRODUCTS:
        return None
    if precision == "fp8":
        return "8.9"
    return "8.0" if op == "Conv" else "7.5"


def quantisable(
    node: gs.Node, dtype_of: DTypeOf, rank_of: RankOf, precision: EightBits | None = None
) -> Operands | str:
    """Return which operands of ``node`` are quantised, or why none is.

    Args:
        node: Of the main graph.
        dtype_of: Says the type of a tensor; None where it is not known.
        rank_of: Says how many axes it has; None where it is not known.
        precision: To what; None for what int8 and fp8 have in common.

    Returns:
        A reason is a phrase about the node; it is empty where the node is no product.
    """
    if node.domain or node.op not in (*PRODUCTS, "ConvTranspose"):
        return ""
    if node.op == "ConvTranspose":
        return "TensorRT multiplies it in floats whether it is quantised or not"
    left, right = node.inputs[:2]
    if is_quantised(node):
        return "it is quantised as it stands"
    if dtype_of(left) != np.float32 or dtype_of(right) != np.float32:
        return "its operands are not known to be float32"
    ranks = rank_of(left), rank_of(right)
    if None in ranks:
        return "nobody knows how many axes its operands have"
    constant = [isinstance(tensor, gs.Constant) for tensor in (left, right)]
    if all(constant):
        return "both its operands are constant"
    if node.op == "Conv":
        return _of_conv(node, precision)
    return _of_matrices(node, precision, ranks, constant)


def is_quantised(node: gs.Node) -> bool:
    """Whether an operand of the product ``node`` comes from a DequantizeLinear."""
    return any(made_by(tensor, "DequantizeLinear") is not None for tensor in node.inputs[:2])


def _of_conv(node: gs.Node, precision: EightBits | None) -> Operands | str:
    weights = node.inputs[1]
    if not isinstance(weights, gs.Constant):
        return "its weights are computed at run time"
    if node.attrs.get("group", 1) > 1 and weights.shape[1] < LEAST_CHANNELS:
        return (
            f"it has fewer than {LEAST_CHANNELS} channels a group, which TensorRT fills with zeros"
        )
    if precision == "fp8" and math.prod(weights.shape[2:]) > MOST_TAPS:
        return f"its kernel has more than {MOST_TAPS} taps, for which TensorRT multiplies no fp8"
    return Operands((0,), 1, 0)


def _of_matrices(
    node: gs.Node,
    precision: EightBits | None,
    ranks: tuple[int | None, int | None],
    constant: list[bool],
) -> Operands | str:
    if min(rank or 0 for rank in ranks) < 2:
        return "an operand is a vector"
    addend = argument(node, 2)
    if (
        node.op == "Gemm"
        and addend is not None
        and not isinstance(addend, gs.Constant)
        and node.attrs.get("beta", 1.0) != 1.0
    ):
        return "it scales what it adds"
    if not any(constant):
        softmax = softmax_of(node)
        if precision is None or softmax is None:
            return Operands((0, 1))
        if precision == "int8":
            return "TensorRT has one kernel for attention of floats, and none for int8"
        if not _is_static(node, softmax):
            return "TensorRT has one kernel for attention of any length of floats, and none for fp8"
        if softmax.outputs[0].shape[-1] < LEAST_KEYS:
            return f"TensorRT has no one kernel for attention to less than {LEAST_KEYS} keys in fp8"
        if any(reader.op in ("IsNaN", "Where") for reader in softmax.outputs[0].outputs):
            return (
                "its attention is guarded against NaN; TensorRT has no one kernel for that in fp8"
            )
        return Operands((0, 1))
    weights = constant.index(True)
    rank = ranks[weights]
    assert rank is not None, "looked at above"
    turned = node.op == "Gemm" and bool(node.attrs.get("transB" if weights else "transA", 0))
    last = bool(weights) != turned  # columns of the right operand, rows of the left one
    return Operands((1 - weights,), weights, rank - 1 if last else rank - 2)


def softmax_of(node: gs.Node) -> gs.Node | None:
    """Return the Softmax of the attention that the product ``node`` is part of, or None.

    It reads what the product of queries and keys gives, and gives what that with the values reads, but
    for simple steps between.
    """
    tensor = node.outputs[0]
    for _ in range(MOST_STEPS):
        for reader in tensor.outputs:
            if reader.op == "Softmax":
                return reader
        if len(tensor.outputs) != 1 or tensor.outputs[0].op not in STEPS:
            break
        tensor = tensor.outputs[0].outputs[0]
    makers = [(made_by(operand, "Softmax", *STEPS), 0) for operand in node.inputs]
    while makers:
        maker, steps = makers.pop()
        if maker is not None and maker.op == "Softmax":
            return maker
        if maker is not None and steps < MOST_STEPS:
            makers += [(made_by(t, "Softmax", *STEPS), steps + 1) for t in maker.inputs]
    return None


def _is_static(node: gs.Node, softmax: gs.Node) -> bool:
    """Whether the graph has the extents of the matrices of ``node`` and of the scores."""
    return all(
        tensor.shape is not None and all(isinstance(extent, int) for extent in tensor.shape[-2:])
        for tensor in (*node.inputs, softmax.outputs[0])
    )


# --- numbers -------------------------------------------------------------------------------------


def scale_of(amax: float, precision: EightBits) -> np.float32:
    """Return what 1 stands for where ``amax`` is the largest magnitude.

    Args:
        amax: Finite, not negative. All is quantised to 0 where it is 0.
        precision: int8 or fp8.

    Example:
        >>> float(scale_of(127.0, "int8")), float(scale_of(0.0, "fp8"))
        (1.0, 1.0)
    """
    if amax == 0:
        return np.float32(1)
    least = np.finfo(np.float32).tiny  # what is divided by it stays finite
    return np.float32(max(np.float32(amax) / np.float32(LARGEST[precision]), least))


def weight_scales(values: Array, axis: int, precision: EightBits) -> Array:
    """Return the scale of each channel of weights, along ``axis``.

    A channel far weaker than the others has the scale of one `WIDEST_RATIO` as strong as the
    strongest.
    """
    others = tuple(other for other in range(values.ndim) if other != axis)
    if values.size == 0:
        return np.ones(values.shape[axis], np.float32)
    amax = np.maximum(values.max(others), -values.min(others)).astype(np.float32)
    scales: Array = np.maximum(
        amax / np.float32(LARGEST[precision]),
        scale_of(float(amax.max()), precision) * np.float32(WIDEST_RATIO if amax.any() else 1),
    )
    return scales


def quantised(
    values: Array, scale: Array | np.float32, precision: EightBits, axis: int | None = None
) -> Array:
    """Return ``values`` as numbers of 8 bits: divided by their scale, rounded half to even, saturated.

    As QuantizeLinear has it, and TensorRT; so int8 has a -128 which a scale made for it never needs.

    Args:
        values: float32, finite.
        scale: One, or one for each channel along ``axis``.
        precision: int8 or fp8.
        axis: Of the channels.
    """
    steps = values / _along(scale, axis, values.ndim)
    if precision == "int8":
        np.rint(steps, out=steps)
        np.clip(steps, -128, 127, out=steps)
    else:
        np.clip(steps, -LARGEST["fp8"], LARGEST["fp8"], out=steps)
    stored: Array = steps.astype(DTYPES[precision])
    return stored


def dequantised(stored: Array, scale: Array | np.float32, axis: int | None = None) -> Array:
    """Return what numbers of 8 bits stand for, as float32; see `quantised`."""
    values: Array = stored.astype(np.float32) * _along(scale, axis, stored.ndim)
    return values


def rounded(
    values: Array, scale: Array | np.float32, precision: EightBits, axis: int | None = None
) -> Array:
    """Return ``values`` as they are after QuantizeLinear and DequantizeLinear; see `quantised`."""
    return dequantised(quantised(values, scale, precision, axis), scale, axis)


def _along(scale: Array | np.float32, axis: int | None, rank: int) -> Array:
    numbers = np.asarray(scale, np.float32)
    return numbers if axis is None else numbers.reshape(-1, *[1] * (rank - axis - 1))


# --- residuals -----------------------------------------------------------------------------------


def identities(
    tensor: gs.Tensor,
    products: Container[str],
    is_float: Callable[[gs.Node], bool],
    dims_of: Callable[[gs.Tensor], object],
) -> list[tuple[gs.Node, int]]:
    """Return the residual Adds that read ``tensor`` quantised, each with the index of that input.

    A product and the Add behind it run in one kernel, which reads the other operand from memory. Where
    that is a tensor which quantised products read, it is there in 8 bits already; read so, it is not
    written as floats at all. This holds where nobody else wants the floats; else there is no Add.

    Args:
        tensor: What products read quantised.
        products: Names of the products that are quantised to the same precision.
        is_float: Whether an Add computes in the floats that are around quantised products.
        dims_of: Returns the extents of a tensor; None where they are not known.
    """
    found = []
    for reader in {id(node): node for node in tensor.outputs}.values():
        if reader.name in products:
            continue
        if reader.op not in ("Add", "Sum") or reader.domain or not is_float(reader):
            return []
        if len(reader.inputs) != 2:
            return []
        left, right = reader.inputs
        other = right if left is tensor else left
        maker = other.inputs[0] if other.inputs else None
        if other is tensor or maker is None or maker.name not in products:
            return []
        if dims_of(left) is None or dims_of(left) != dims_of(right):
            return []
        found.append((reader, 0 if left is tensor else 1))
    return found if tensor.inputs else []
