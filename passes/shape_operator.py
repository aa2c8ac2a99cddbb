"""Rules of operators that compute: convolutions, pooling, products, recurrences, detection heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from onnx import helper

from optc.passes.dimension import Dim, ceil_division, product
from optc.passes.shape_fact import BOOL, FLOAT32, INT64, Fact, Ratio, ratio_of
from optc.passes.shape_rule import Call, Unknown, rule

_UINT8 = np.dtype(np.uint8)
_INT32 = np.dtype(np.int32)


@rule(
    *("Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Cos", "Cosh", "Sin", "Sinh", "Tan"),
    *("Tanh", "Celu", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu"),
    *("Log", "Mish", "PRelu", "Relu", "Selu", "Shrink", "Sigmoid", "Softplus"),
    *("Softsign", "Swish", "ThresholdedRelu", "Hardmax", "LogSoftmax", "Softmax"),
    *("InstanceNormalization", "GroupNormalization", "LRN", "LpNormalization"),
    *("MeanVarianceNormalization", "RMSNormalization", "ReverseSequence", "CumProd"),
    *("BitwiseNot", "Bernoulli", "RandomNormalLike", "RandomUniformLike"),
    *("RotaryEmbedding", "TensorScatter"),
)
def _same(call: Call) -> Fact:
    fact = call.fact(0)
    to = call.attr("dtype")
    dtype = fact.dtype if to is None else helper.tensor_dtype_to_np_dtype(to)
    return Fact(dtype, fact.dims)


@rule("BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor")
def _bitwise(call: Call) -> Fact:
    return Fact(call.dtype(0), call.broadcast([call.shape(0), call.shape(1)]))


@rule("Dropout")
def _dropout(call: Call) -> list[Fact]:
    fact = call.fact(0)
    return [
        Fact(fact.dtype, fact.dims, fact.value),
        Fact(BOOL if call.opset >= 10 else fact.dtype, fact.dims),
    ]


@rule("BatchNormalization")
def _batch_normalization(call: Call) -> list[Fact]:
    fact = call.fact(0)
    channels = call.fact(1).dims
    return [Fact(fact.dtype, fact.dims), *(Fact(call.dtype(3), channels) for _ in range(4))]


@rule("LayerNormalization")
def _layer_normalization(call: Call) -> list[Fact]:
    dims = call.shape(0)
    axis = call.axis(call.attr("axis", -1), len(dims))
    kept = (*dims[:axis], *(1 for _ in dims[axis:]))
    stash = helper.tensor_dtype_to_np_dtype(call.attr("stash_type", 1))
    return [Fact(call.dtype(0), dims), Fact(stash, kept), Fact(stash, kept)]


@rule("QuantizeLinear")
def _quantize(call: Call) -> Fact:
    to = call.attr("output_dtype", 0)
    dtype = helper.tensor_dtype_to_np_dtype(to) if to else call.dtype(2) or _UINT8
    return Fact(dtype, call.fact(0).dims)


@rule("DequantizeLinear")
def _dequantize(call: Call) -> Fact:
    to = call.attr("output_dtype", 0)
    dtype = helper.tensor_dtype_to_np_dtype(to) if to else call.dtype(1)
    return Fact(dtype, call.fact(0).dims)


@rule("DynamicQuantizeLinear")
def _dynamic_quantize(call: Call) -> list[Fact]:
    return [Fact(_UINT8, call.fact(0).dims), Fact(FLOAT32, ()), Fact(_UINT8, ())]


# Windows


def _spatial(call: Call, name: str, rank: int, default: int) -> list[int]:
    values = call.attr(name) or [default] * rank
    if len(values) != rank:
        raise Unknown
    return [int(value) for value in values]


def _padding(call: Call, rank: int) -> list[tuple[int, int]]:
    pads = _spatial(call, "pads", 2 * rank, 0)
    return list(zip(pads[:rank], pads[rank:], strict=True))


def _slid(call: Call, extents: Sequence[Dim], kernel: Sequence[Dim]) -> tuple[Dim, ...]:
    """Return how many windows fit along each axis."""
    rank = len(extents)
    if len(kernel) != rank:
        raise Unknown
    strides = _spatial(call, "strides", rank, 1)
    dilations = _spatial(call, "dilations", rank, 1)
    auto = call.attr("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        return tuple(ceil_division(d, s) for d, s in zip(extents, strides, strict=True))
    pads = [(0, 0)] * rank if auto == "VALID" else _padding(call, rank)
    result = []
    for extent, size, stride, dilation, (before, after) in zip(
        extents, kernel, strides, dilations, pads, strict=True
    ):
        room = extent + (before + after) - ((size - 1) * dilation + 1)
        count = room // stride + 1
        if call.attr("ceil_mode", 0):
            count = ceil_division(room, stride) + 1
            # The last window has to begin before the padding behind.
            begun = (extent + before - 1) // stride + 1
            if call.symbols.low(extent + before - 1 - room - (stride - 1)) < 0:
                count = call.symbols.minimum(count, begun)
        result.append(count)
    return tuple(result)


@rule("Conv", "ConvInteger", "QLinearConv")
def of_conv(call: Call) -> Fact:
    """Return what a convolution returns."""
    at = 3 if call.op == "QLinearConv" else 1
    dims, weight = call.shape(0), call.shape(at)
    if len(weight) != len(dims) or len(dims) < 2:
        raise Unknown
    kernel = call.attr("kernel_shape") or weight[2:]
    dtype = {"ConvInteger": _INT32, "QLinearConv": call.dtype(7)}.get(call.op, call.dtype(0))
    return Fact(dtype, (dims[0], weight[0], *_slid(call, dims[2:], kernel)))


@rule("DeformConv")
def _deform_conv(call: Call) -> Fact:
    dims, weight, offset = call.shape(0), call.shape(1), call.shape(2)
    return Fact(call.dtype(0), (dims[0], weight[0], *offset[2:]))


@rule("ConvTranspose")
def _conv_transpose(call: Call) -> Fact:
    dims, weight = call.shape(0), call.shape(1)
    rank = len(dims) - 2
    kernel = call.attr("kernel_shape") or weight[2:]
    if len(kernel) != rank:
        raise Unknown
    channels = weight[1] * int(call.attr("group", 1))
    if call.attr("output_shape"):
        given = call.attr("output_shape")
        return Fact(call.dtype(0), (dims[0], channels, *(int(v) for v in given[-rank:])))
    strides = _spatial(call, "strides", rank, 1)
    dilations = _spatial(call, "dilations", rank, 1)
    extra = _spatial(call, "output_padding", rank, 0)
    auto = call.attr("auto_pad", "NOTSET")
    pads = _padding(call, rank) if auto == "NOTSET" else [(0, 0)] * rank
    spatial: list[Dim] = []
    for axis, extent in enumerate(dims[2:]):
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            spatial.append(extent * strides[axis])
            continue
        spread = (kernel[axis] - 1) * dilations[axis] + 1
        spatial.append((extent - 1) * strides[axis] + extra[axis] + spread - sum(pads[axis]))
    return Fact(call.dtype(0), (dims[0], channels, *spatial))


@rule("MaxPool", "AveragePool", "LpPool")
def of_pool(call: Call) -> list[Fact]:
    """Return what pooling returns: the result, and indices."""
    dims = call.shape(0)
    result = (*dims[:2], *_slid(call, dims[2:], call.attr("kernel_shape") or ()))
    return [Fact(call.dtype(0), result), Fact(INT64, result)]


@rule("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def of_global_pool(call: Call) -> Fact:
    """Return what pooling over all that is not batch or channel returns."""
    dims = call.shape(0)
    return Fact(call.dtype(0), (*dims[:2], *(1 for _ in dims[2:])))


@rule("MaxUnpool")
def _max_unpool(call: Call) -> Fact:
    dims = call.shape(0)
    rank = len(dims) - 2
    if call.has(2):
        target = call.numbers(2)
        if target is None or len(target) != len(dims):
            raise Unknown
        return Fact(
            call.dtype(0),
            tuple(call.fresh(axis) if n is None else n for axis, n in enumerate(target)),
        )
    kernel = _spatial(call, "kernel_shape", rank, 1)
    strides = _spatial(call, "strides", rank, 1)
    spatial = [
        (extent - 1) * stride + size - before - after
        for extent, stride, size, (before, after) in zip(
            dims[2:], strides, kernel, _padding(call, rank), strict=True
        )
    ]
    return Fact(call.dtype(0), (*dims[:2], *spatial))


@rule("RoiAlign")
def _roi_align(call: Call) -> Fact:
    dims, rois = call.shape(0, rank=4), call.shape(1, rank=2)
    count = rois[0]
    batch = call.fact(2).dims
    if batch is not None and len(batch) == 1 and isinstance(batch[0], int):
        count = batch[0]
    size = (call.attr("output_height", 1), call.attr("output_width", 1))
    return Fact(call.dtype(0), (count, dims[1], *size))


@rule("MaxRoiPool")
def _max_roi_pool(call: Call) -> Fact:
    dims, rois = call.shape(0, rank=4), call.shape(1, rank=2)
    return Fact(call.dtype(0), (rois[0], dims[1], *call.attr("pooled_shape")))


@rule("GridSample")
def _grid_sample(call: Call) -> Fact:
    dims, grid = call.shape(0), call.shape(1)
    return Fact(call.dtype(0), (*dims[:2], *grid[1:-1]))


@rule("AffineGrid")
def _affine_grid(call: Call) -> Fact:
    size = call.numbers(1)
    if size is None:
        raise Unknown
    dims = [call.fresh(axis) if n is None else n for axis, n in enumerate(size)]
    return Fact(call.dtype(0), (dims[0], *dims[2:], len(dims) - 2))


@rule("Resize", "Upsample")
def _resize(call: Call) -> Fact:
    dims = list(call.shape(0))
    axes = call.attr("axes")
    axes = list(range(len(dims))) if axes is None else [call.axis(a, len(dims)) for a in axes]
    scales_at, sizes_at = (2, 3) if call.op == "Resize" and call.opset >= 11 else (1, 99)
    if call.has(sizes_at) and call.fact(sizes_at).dims != (0,):
        sizes = call.numbers(sizes_at) or [None] * len(axes)
        if len(sizes) != len(axes):
            raise Unknown
        policy = call.attr("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            sizes = _in_proportion([dims[axis] for axis in axes], sizes, policy)
        for axis, size in zip(axes, sizes, strict=True):
            dims[axis] = call.fresh(axis) if size is None else size
        return Fact(call.dtype(0), tuple(dims))
    given = call.attr("scales")
    scales: list[Any] | None
    if given is not None:
        scales = [float(scale) for scale in given]
    elif call.has(scales_at):
        elements = call.elements(scales_at)
        scales = None if elements is None else list(elements.reshape(-1))
    else:
        raise Unknown
    if scales is None or len(scales) != len(axes):
        scales = [None] * len(axes)
    cropped = _crops(call, len(axes))
    for axis, scale, crop in zip(axes, scales, cropped, strict=True):
        dims[axis] = _scaled(call, axis, dims[axis], scale, crop)
    return Fact(call.dtype(0), tuple(dims))


def _crops(call: Call, count: int) -> list[float | None]:
    """Return the part of each axis that a resize looks at; None where it is not known."""
    if call.attr("coordinate_transformation_mode") != "tf_crop_and_resize":
        return [1.0] * count
    roi = call.value(1)
    if roi is None or roi.dtype == object or roi.size != 2 * count:
        return [None] * count
    flat = roi.reshape(-1)
    return [float(flat[at + count] - flat[at]) for at in range(count)]


def _in_proportion(
    extents: Sequence[Dim], sizes: Sequence[Dim | None], policy: str
) -> list[Dim | None]:
    """Return the sizes of a resize that keeps the aspect ratio."""
    numbers = [(e, s) for e, s in zip(extents, sizes, strict=True)]
    if not all(isinstance(e, int) and isinstance(s, int) and e for e, s in numbers):
        return [None] * len(sizes)
    scales = [np.float32(int(str(s))) / np.float32(int(str(e))) for e, s in numbers]
    scale = min(scales) if policy == "not_larger" else max(scales)
    return [math.floor(float(scale * np.float32(int(str(e)))) + 0.5) for e in extents]


def _scaled(call: Call, axis: int, extent: Dim, scale: object, crop: float | None) -> Dim:
    if crop == 1.0 and isinstance(scale, float) and isinstance(extent, int):
        return math.floor(np.float32(extent) * np.float32(scale))
    if crop == 1.0 and (ratio := ratio_of(scale)) is not None:
        return Ratio(extent * ratio.numerator, ratio.denominator).floor
    if isinstance(scale, float) and crop is not None and math.isfinite(scale * crop):
        exact = Fraction(scale) * Fraction(crop)
        # Rounding may reach the next whole number, so this is an upper bound.
        near = ceil_division(extent * exact.numerator, exact.denominator)
        if isinstance(near, int) and isinstance(extent, int):
            return math.floor(np.float32(extent) * np.float32(crop) * np.float32(scale))
        return call.fresh(axis, near)
    return call.fresh(axis)


# Products


@rule("MatMul", "MatMulInteger", "QLinearMatMul")
def _matmul(call: Call) -> Fact:
    left, right = call.shape(0), call.shape(3 if call.op == "QLinearMatMul" else 1)
    if not left or not right:
        raise Unknown
    batch = call.broadcast([left[:-2], right[:-2]])
    rows = left[-2:-1] if len(left) > 1 else ()
    columns = right[-1:] if len(right) > 1 else ()
    dtype = {"MatMulInteger": _INT32, "QLinearMatMul": call.dtype(7)}.get(call.op, call.dtype(0))
    return Fact(dtype, (*batch, *rows, *columns))


@rule("Gemm")
def of_gemm(call: Call) -> Fact:
    """Return what a product of two matrices returns."""
    left, right = call.shape(0, rank=2), call.shape(1, rank=2)
    return Fact(
        call.dtype(0),
        (
            left[1] if call.attr("transA", 0) else left[0],
            right[0] if call.attr("transB", 0) else right[1],
        ),
    )


def einsum_extents(call: Call) -> tuple[str, dict[str, Dim], tuple[Dim, ...]]:
    """Return the output's subscripts, each subscript's extent, and the ellipsis's extents."""
    equation = str(call.attr("equation", "")).replace(" ", "")
    terms, arrow, output = equation.partition("->")
    extents: dict[str, Dim] = {}
    ellipses: list[tuple[Dim, ...]] = []
    operands = terms.split(",")
    if len(operands) != len(call.inputs):
        raise Unknown
    for index, term in enumerate(operands):
        dims = call.shape(index)
        head, dots, tail = term.partition("...")
        if len(head) + len(tail) > len(dims) or (not dots and len(head) != len(dims)):
            raise Unknown
        middle = dims[len(head) : len(dims) - len(tail)]
        named = [*zip(head, dims[: len(head)], strict=True)]
        named += zip(tail, dims[len(dims) - len(tail) :], strict=True)
        for letter, extent in named:
            known = extents.get(letter, 1)
            extents[letter] = extent if known == 1 or isinstance(extent, int) else known
            if extent == 1:
                extents[letter] = known
        if dots:
            ellipses.append(middle)
    if not arrow:
        letters = terms.replace(",", "").replace(".", "")
        output = "".join(sorted(letter for letter in extents if letters.count(letter) == 1))
        output = ("..." if ellipses else "") + output
    return output, extents, call.broadcast(ellipses) if ellipses else ()


@rule("Einsum")
def _einsum(call: Call) -> Fact:
    output, extents, ellipsis = einsum_extents(call)
    head, dots, tail = output.partition("...")
    if not set(head + tail) <= extents.keys():
        raise Unknown
    middle = ellipsis if dots else ()
    return Fact(call.dtype(0), (*(extents[c] for c in head), *middle, *(extents[c] for c in tail)))


@rule("LSTM", "GRU", "RNN")
def _recurrence(call: Call) -> list[Fact]:
    dims, recurrent = call.shape(0, rank=3), call.shape(2, rank=3)
    directions, hidden = recurrent[0], recurrent[2]
    dtype = call.dtype(0)
    if call.attr("layout", 0):
        batch, steps = dims[:2]
        every: tuple[Dim, ...] = (batch, steps, directions, hidden)
        last: tuple[Dim, ...] = (batch, directions, hidden)
    else:
        steps, batch = dims[:2]
        every, last = (steps, directions, batch, hidden), (directions, batch, hidden)
    return [Fact(dtype, every), Fact(dtype, last), Fact(dtype, last)]


@rule("Attention")
def _attention(call: Call) -> list[Fact]:
    query, key, value = (call.shape(i) for i in range(3))
    past = call.shape(4, rank=4)[2] if call.has(4) else 0
    if len(query) == len(key) == len(value) == 4:
        batch, heads, rows, _ = query
        key_heads, keys, depth, width = key[1], key[2] + past, key[3], value[3]
        result: tuple[Dim, ...] = (batch, heads, rows, width)
    elif len(query) == len(key) == len(value) == 3:
        batch, rows, _ = query
        heads, key_heads = call.attr("q_num_heads"), call.attr("kv_num_heads")
        keys, depth, width = key[1] + past, key[2] // key_heads, value[2] // key_heads
        result = (batch, rows, heads * width)
    else:
        raise Unknown
    return [
        Fact(call.dtype(0), result),
        Fact(call.dtype(1), (batch, key_heads, keys, depth)),
        Fact(call.dtype(2), (batch, key_heads, keys, width)),
        Fact(call.dtype(0), (batch, heads, rows, keys)),
    ]


# Detection


@rule("NonMaxSuppression")
def _non_max_suppression(call: Call) -> Fact:
    boxes, scores = call.shape(0, rank=3), call.shape(1, rank=3)
    limit = call.number(2) if call.has(2) else 0
    per_class = boxes[1]
    if limit is not None:
        per_class = call.symbols.minimum(per_class, call.symbols.maximum(limit, 0))
    bound = product((per_class, scores[1], boxes[0]))
    if bound == 0:
        return Fact(INT64, (0, 3))
    return Fact(INT64, (call.fresh(0, bound), 3))


@rule("RandomNormal", "RandomUniform")
def _random(call: Call) -> Fact:
    dtype = helper.tensor_dtype_to_np_dtype(call.attr("dtype", 1))
    return Fact(dtype, tuple(int(extent) for extent in call.attr("shape")))


@rule("Multinomial")
def _multinomial(call: Call) -> Fact:
    dtype = helper.tensor_dtype_to_np_dtype(call.attr("dtype", 6))
    return Fact(dtype, (call.shape(0, rank=2)[0], call.attr("sample_size", 1)))


@rule("Det")
def _determinant(call: Call) -> Fact:
    return Fact(call.dtype(0), call.shape(0)[:-2])


@rule("CenterCropPad")
def _center_crop_pad(call: Call) -> Fact:
    dims = list(call.shape(0))
    axes = call.attr("axes")
    axes = list(range(len(dims))) if axes is None else [call.axis(a, len(dims)) for a in axes]
    target = call.numbers(1)
    if target is None or len(target) != len(axes):
        raise Unknown
    for axis, extent in zip(axes, target, strict=True):
        dims[axis] = call.fresh(axis) if extent is None else extent
    return Fact(call.dtype(0), tuple(dims))


@rule("Constant")
def _constant(call: Call) -> Fact:
    attrs = call.node.attrs
    if "value" in attrs:
        value = np.asarray(attrs["value"].values)
    else:
        kinds: dict[str, type[np.generic]] = {
            "value_float": np.float32,
            "value_floats": np.float32,
            "value_int": np.int64,
            "value_ints": np.int64,
        }
        name = next((name for name in kinds if name in attrs), None)
        if name is None:
            raise Unknown
        value = np.asarray(attrs[name], dtype=kinds[name])
    return Fact(value.dtype, value.shape, value if value.dtype.kind in "biuf" else None)
