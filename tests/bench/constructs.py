"""Small models, one for each construct that TensorRT for RTX refuses: what legalising is shown on.

A construct is the text of a graph, as `onnx.parser` reads it. A tensor that its list of constants
declares without a value gets seeded ones. So do inputs: floats around 0, integers over the range of
their type, or of 0 to 3 where that has more than 8 bits; other ones are said beside the text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx
from onnx import ModelProto, ValueInfoProto, helper, numpy_helper

Shape: TypeAlias = tuple[int, ...]
Values: TypeAlias = Callable[[np.random.Generator, Shape], Any]
"""From a generator and a shape to the values of a tensor; they are cast to its type."""

Range3: TypeAlias = tuple[int, int, int]

MICROSOFT = "com.microsoft."


@dataclass(frozen=True, slots=True)
class Construct:
    """One construct that is refused.

    Attributes:
        name: What it is.
        text: The graph, with ``ms.`` for the domain com.microsoft.
        opset: Version of the default domain.
        sizes: Symbol -> its least, usual and largest extent.
        values: Name of an input or constant -> what it holds.
        within: How much the result may differ, relative to the largest number of the result.
        ends: Where it ends: in one engine, or with something on the fallback.
        refused: Whether TensorRT refuses it; where not, it is here as other versions do.
        ordinary: Names of passes that are not there to legalise, and do it all the same.
        capability: The compute capability that refuses it.
    """

    name: str
    text: str
    opset: int = 17
    sizes: Mapping[str, Range3] = field(default_factory=dict)
    values: Mapping[str, Values] = field(default_factory=dict)
    within: float = 0.0
    ends: Literal["engine", "fallback"] = "engine"
    refused: bool = True
    ordinary: tuple[str, ...] = ()
    capability: str = "8.6"

    def model(self) -> ModelProto:
        """Return the model, with its constants."""
        head = f'<ir_version: 10, opset_import: ["" : {self.opset}, "com.microsoft" : 1]>'
        model = onnx.parser.parse_model(head + self.text.replace("ms.", MICROSOFT))
        rng = np.random.default_rng(1)
        for info in model.graph.value_info:
            shape = tuple(dim.dim_value for dim in info.type.tensor_type.shape.dim)
            array = self._array(rng, info, shape)
            model.graph.initializer.append(numpy_helper.from_array(array, info.name))
        del model.graph.value_info[:]
        for index, node in enumerate(model.graph.node):
            node.name = node.name or f"{node.op_type}_{index}"
        return model

    def feeds(self, model: ModelProto, which: int) -> dict[str, Any]:
        """Return inputs at the least (0), usual (1) or largest (2) extents."""
        rng = np.random.default_rng(which)
        return {
            info.name: self._array(rng, info, self._shape(info, which))
            for info in model.graph.input
        }

    def _shape(self, info: ValueInfoProto, which: int) -> Shape:
        dims = info.type.tensor_type.shape.dim
        return tuple(d.dim_value or self.sizes[d.dim_param][which] for d in dims)

    def _array(self, rng: np.random.Generator, info: ValueInfoProto, shape: Shape) -> Any:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type))
        make = self.values.get(info.name) or (_floats if dtype.kind == "f" else _integers(dtype))
        return np.asarray(make(rng, shape)).astype(dtype).reshape(shape)


# --- values --------------------------------------------------------------------------------------


def _floats(rng: np.random.Generator, shape: Shape) -> Any:
    return rng.standard_normal(shape)


def _integers(dtype: np.dtype[Any]) -> Values:
    if dtype.kind == "b":
        return within(0, 1)
    return within(0, 3) if dtype.itemsize > 1 else within(*map(int, _limits(dtype)))


def _limits(dtype: np.dtype[Any]) -> tuple[int, int]:
    limits = np.iinfo(dtype)
    return limits.min, limits.max


def within(low: int, high: int) -> Values:
    """Return what makes integers from ``low`` to ``high``."""
    return lambda rng, shape: rng.integers(low, high + 1, shape)


def between(low: float, high: float) -> Values:
    """Return what makes numbers from ``low`` to ``high``."""
    return lambda rng, shape: rng.uniform(low, high, shape)


def exactly(*numbers: float) -> Values:
    """Return what makes just these numbers."""
    return lambda _, shape: np.reshape(numbers, shape)


def boxes(size: float) -> Values:
    """Return what makes boxes (two corners) within a square of ``size``."""

    def made(rng: np.random.Generator, shape: Shape) -> Any:
        corners = np.sort(rng.uniform(0, size, (*shape[:-1], 2, 2)), axis=-2)
        return corners.reshape(shape)

    return made


def apart(rng: np.random.Generator, shape: Shape) -> Any:
    """Return different numbers in any order."""
    return rng.permutation(int(np.prod(shape))).reshape(shape)


# --- constructs ----------------------------------------------------------------------------------

BATCH = {"n": (1, 2, 8)}
ROUNDING = 1e-5
STEP = 1 / 64
"""At most two steps of 8 bits, relative to the largest of them."""

SCALES = "float s = {0.05}"
GRID = f"{SCALES}, uint8 z = {{120}}"
GRIDS = f"{GRID}, float t = {{0.02}}, uint8 y0 = {{130}}"

IMAGE, FEATURES = "float[1,3,128,128] image", "float[1,16,128,128] features"
BACKBONE = "features = Conv <pads = [1, 1, 1, 1]> (image, kernels)"
"""Work beside a construct: what multiplies the FLOPs is rewritten where it is a small part of a model."""

DETECTION = (
    Construct(
        "DeformConv",
        """g (float[n,4,9,9] x, float[n,18,9,9] o, float[n,9,9,9] m) => (float[n,6,9,9] y)
           <float[6,4,3,3] w, float[6] b>
           { y = DeformConv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w, o, b, m) }""",
        opset=19,
        sizes=BATCH,
        within=ROUNDING,
    ),
    *(
        Construct(
            f"RoiAlign, {mode}",
            f"""g ({IMAGE}, float[n,4,16,16] x, float[r,4] rois, int64[r] of)
               => ({FEATURES}, float[r,4,3,3] y) <float[16,3,3,3] kernels>
               {{ {BACKBONE}
                  y = RoiAlign <mode = "{mode}", output_height = 3, output_width = 3,
                                sampling_ratio = 1, spatial_scale = 0.5> (x, rois, of) }}""",
            sizes={"n": (2, 2, 4), "r": (1, 8, 20)},
            values={"rois": boxes(32), "of": within(0, 1)},
            within=ROUNDING,
        )
        for mode in ("avg", "max")
    ),
    Construct(
        "NonMaxSuppression, bounded",
        f"""g ({IMAGE}, float[1,50,4] boxes, float[1,2,50] scores) => ({FEATURES}, int64[k,3] y)
           <int64[1] most = {{10}}, float[1] overlap = {{0.5}}, float[1] score = {{0.1}},
            float[16,3,3,3] kernels>
           {{ {BACKBONE}
              y = NonMaxSuppression (boxes, scores, most, overlap, score) }}""",
        values={"boxes": boxes(1), "scores": between(0, 1)},
        within=ROUNDING,
    ),
    Construct(
        "NonMaxSuppression behind an If that asks whether there are boxes",
        """g (float[p,4] boxes, float[p] scores) => (int64[k] y) <float[1] overlap = {0.5}>
           {
             s = Shape (boxes)
             c = ReduceProd <keepdims = 0> (s)
             zero = Constant <value_int = 0> ()
             e = Equal (c, zero)
             y = If (e) <
               then_branch = a () => (int64[q] none)
                 { none = Constant <value = int64[0] {}> () },
               else_branch = b () => (int64[k] kept)
                 { i0 = Constant <value = int64[1] {0}> ()
                   i01 = Constant <value = int64[2] {0, 1}> ()
                   most = Constant <value = int64[1] {50}> ()
                   bb = Unsqueeze (boxes, i0)
                   ss = Unsqueeze (scores, i01)
                   nms = NonMaxSuppression (bb, ss, most, overlap)
                   two = Constant <value_int = 2> ()
                   kept = Gather <axis = 1> (nms, two) }
             >
           }""",
        sizes={"p": (0, 20, 50)},
        values={"boxes": boxes(1), "scores": between(0, 1)},
    ),
    Construct(
        "NonZero",
        "g (float[3,7] x) => (int64[2,k] y) { y = NonZero (x) }",
        values={"x": within(0, 2)},
    ),
    Construct(
        "indexing by a mask of booleans",
        """g (float[p,5] x, bool[p] m) => (float[k,5] y)
           { i = NonZero (m)  t = Transpose (i)  y = GatherND (x, t) }""",
        sizes={"p": (1, 20, 60)},
    ),
    Construct(
        "the best of several groups above a threshold",
        """g (float[40] a, float[40] b) => (float[k] y)
           <float limit = {0.3}, int64[1] most = {10}, int64[1] axis = {1}>
           {
             ma = Greater (a, limit)  ia = NonZero (ma)  ta = Transpose (ia)
             va = GatherND (a, ta)    na = Shape (va)    ca = Min (na, most)
             ya, ja = TopK <axis = 0> (va, ca)
             mb = Greater (b, limit)  ib = NonZero (mb)  tb = Transpose (ib)
             vb = GatherND (b, tb)    nb = Shape (vb)    cb = Min (nb, most)
             yb, jb = TopK <axis = 0> (vb, cb)
             y = Concat <axis = 0> (ya, yb)
           }""",
        values={"a": between(0, 1), "b": between(0, 1)},
    ),
    Construct(
        "Compress, constant condition",
        """g (float[n,5] x) => (float[n,k] y) <bool[5] c = {1, 0, 1, 1, 0}>
           { y = Compress <axis = 1> (x, c) }""",
        sizes=BATCH,
        ordinary=("fold-constants",),
    ),
    Construct(
        "Compress, computed condition",
        "g (float[p,5] x, bool[p] c) => (float[k,5] y) { y = Compress <axis = 0> (x, c) }",
        sizes={"p": (1, 20, 60)},
    ),
    Construct(
        "Unique of a constant",
        """g (float[n,5] x) => (float[n,k] y) <int64[6] i = {4, 0, 0, 2, 4, 2}>
           { u = Unique <sorted = 1> (i)  y = Gather <axis = 1> (x, u) }""",
        sizes=BATCH,
        ordinary=("fold-constants",),
    ),
    Construct(
        "Gather from an axis that is empty at the usual extents, in a branch then not taken",
        """g (float[p,4] x) => (float[4] y) <int64 last = {-1}, int64 zero = {0}, float[4] none>
           {
             s = Shape (x)
             extent = Gather (s, zero)
             c = Greater (extent, zero)
             y = If (c) <
               then_branch = a () => (float[4] t) { t = Gather (x, last) },
               else_branch = b () => (float[4] e) { e = Identity (none) }
             >
           }""",
        sizes={"p": (0, 0, 9)},
    ),
    Construct(
        "If with branches of unlike rank, one of them refused; the profile decides",
        """g (float[n,p] x) => (float[n,four] y)
           <int64 at = {1}, int64 limit = {3}, int64[1] start = {0}, int64[1] end = {4},
            int64[1] axis = {1}>
           {
             s = Shape (x)
             extent = Gather (s, at)
             c = Greater (extent, limit)
             y = If (c) <
               then_branch = a () => (float[n,four] t) { t = Slice (x, start, end, axis) },
               else_branch = b () => (float[m] e)
                 { nz = NonZero (x)  row = Gather (nz, at)  e = Cast <to = 1> (row) }
             >
           }""",
        sizes={"n": (1, 2, 8), "p": (5, 6, 9)},
        ordinary=("inline-constant-if", "fold-shapes"),
    ),
)

PRODUCTS = (
    Construct(
        "fp32 MatMul, constant weights",
        "g (float[n,7,5] x) => (float[n,7,4] y) <float[5,4] w> { y = MatMul (x, w) }",
        sizes=BATCH,
        within=ROUNDING,
        capability="7.5",
    ),
    Construct(
        "fp32 Gemm, constant weights",
        """g (float[n,5] x) => (float[n,4] y) <float[4,5] w, float[4] b>
           { y = Gemm <transB = 1> (x, w, b) }""",
        sizes=BATCH,
        within=ROUNDING,
        capability="7.5",
    ),
    Construct(
        "fp32 MatMul of two that are computed",
        "g (float[n,7,5] x, float[n,5,4] w) => (float[n,7,4] y) { y = MatMul (x, w) }",
        sizes=BATCH,
        within=ROUNDING,
        capability="7.5",
        ends="fallback",
    ),
    Construct(
        "MatMul of a vector by matrices",
        "g (float[3] x, float[2,3,4] w) => (float[2,4] y) { y = MatMul (x, w) }",
        within=ROUNDING,
    ),
)

QUANTISED = (
    Construct(
        "DynamicQuantizeLinear, MatMulInteger",
        """g (float[n,8] x) => (float[n,4] y) <int8[8,4] w, float ws = {0.01}>
           {
             q, s, z = DynamicQuantizeLinear (x)
             i = MatMulInteger (q, w, z)
             f = Cast <to = 1> (i)
             sc = Mul (s, ws)
             y = Mul (f, sc)
           }""",
        sizes=BATCH,
        within=ROUNDING,
    ),
    Construct(
        "DynamicQuantizeLinear, ConvInteger",
        """g (float[n,3,8,8] x) => (float[n,4,6,6] y) <int8[4,3,3,3] w, float ws = {0.01}>
           {
             q, s, z = DynamicQuantizeLinear (x)
             i = ConvInteger (q, w, z)
             f = Cast <to = 1> (i)
             sc = Mul (s, ws)
             y = Mul (f, sc)
           }""",
        sizes=BATCH,
        within=ROUNDING,
    ),
    *(
        Construct(
            f"QuantizeLinear, DequantizeLinear to uint8, zero point {zero_point}",
            f"""g (float[n,3,8,8] x) => (float[n,4,6,6] y)
                <float[4,3,3,3] w, {SCALES}, uint8 z = {{{zero_point}}}>
                {{ q = QuantizeLinear (x, s, z)
                   d = DequantizeLinear (q, s, z)
                   y = Conv (d, w) }}""",
            sizes=BATCH,
            within=ROUNDING,
        )
        for zero_point in (0, 128, 100)
    ),
    Construct(
        "QLinearConv",
        f"""g (uint8[n,3,8,8] x) => (uint8[n,4,6,6] y)
            <{GRIDS}, uint8[4,3,3,3] w, float ws = {{0.01}}, uint8 wz = {{128}}>
            {{ y = QLinearConv (x, t, z, w, ws, wz, s, y0) }}""",
        sizes=BATCH,
        within=STEP,
    ),
    Construct(
        "QLinearMatMul",
        f"""g (uint8[n,8] x) => (uint8[n,4] y)
            <{GRIDS}, uint8[8,4] w, float ws = {{0.01}}, uint8 wz = {{128}}>
            {{ y = QLinearMatMul (x, t, z, w, ws, wz, s, y0) }}""",
        sizes=BATCH,
        within=STEP,
    ),
    *(
        Construct(
            f"com.microsoft {op}",
            f"g (uint8[n,4,6,6] a, uint8[n,4,6,6] b) => (uint8[n,c,h,w] y) <{GRIDS}> {{ {text} }}",
            sizes=BATCH,
            within=STEP,
        )
        for op, text in {
            "QLinearAdd": "y = ms.QLinearAdd (a, s, z, b, t, y0, s, y0)",
            "QLinearMul": "y = ms.QLinearMul (a, s, z, b, t, y0, s, y0)",
            "QLinearConcat": "y = ms.QLinearConcat <axis = 1> (s, y0, a, s, z, b, t, y0)",
        }.items()
    ),
    *(
        Construct(
            f"com.microsoft {op}",
            f"g (uint8[n,4,6,6] a) => (uint8[n,c,h,w] y) <{GRIDS}> {{ {text} }}",
            sizes=BATCH,
            within=STEP,
        )
        for op, text in {
            "QLinearSigmoid": "y = ms.QLinearSigmoid (a, s, z, t, z)",
            "QLinearLeakyRelu": "y = ms.QLinearLeakyRelu <alpha = 0.1> (a, s, z, t, y0)",
            "QLinearSoftmax": "y = ms.QLinearSoftmax <axis = -1, opset = 13> (a, s, z, t, z)",
            "QLinearAveragePool": """y = ms.QLinearAveragePool <kernel_shape = [2, 2]>
                                     (a, s, z, t, y0)""",
            "QLinearGlobalAveragePool": "y = ms.QLinearGlobalAveragePool (a, s, z, t, y0)",
        }.items()
    ),
    Construct(
        "com.microsoft QGemm",
        """g (uint8[n,8] x) => (uint8[n,4] y)
           <float s = {0.05}, uint8 z = {120}, int8[8,4] w, float ws = {0.01}, int8 wz = {0},
            int32[4] b, float t = {0.2}, uint8 y0 = {130}>
           { y = ms.QGemm (x, s, z, w, ws, wz, b, t, y0) }""",
        sizes=BATCH,
        within=STEP,
    ),
    Construct(
        "com.microsoft MatMulIntegerToFloat",
        """g (float[n,8] x) => (float[n,4] y) <int8[8,4] w, float ws = {0.01}, int8 wz = {3}>
           { q, s, z = DynamicQuantizeLinear (x)
             y = ms.MatMulIntegerToFloat (q, w, s, ws, z, wz) }""",
        sizes=BATCH,
        within=ROUNDING,
    ),
    Construct(
        "com.microsoft DynamicQuantizeMatMul",
        """g (float[n,8] x) => (float[n,4] y) <int8[8,4] w, float ws = {0.01}, int8 wz = {3}>
           { y = ms.DynamicQuantizeMatMul (x, w, ws, wz) }""",
        sizes=BATCH,
        within=ROUNDING,
    ),
    Construct(
        "com.microsoft DynamicQuantizeLSTM",
        """g (float[5,n,4] x) => (float[5,1,n,3] y)
           <int8[1,4,12] w, int8[1,3,12] r, float[1] s = {0.01}, int8[1] z = {0}>
           { y = ms.DynamicQuantizeLSTM <hidden_size = 3>
                 (x, w, r, , , , , , s, z, s, z) }""",
        sizes=BATCH,
        within=0.02,
    ),
)

FUSED = tuple(
    Construct(
        f"com.microsoft {op}",
        f"g ({inputs}) => ({outputs}) <{constants}> {{ {text} }}",
        sizes=BATCH,
        within=ROUNDING,
        refused=op not in ("Gelu", "SkipSimplifiedLayerNormalization"),
    )
    for op, inputs, outputs, constants, text in (
        (
            "FusedConv",
            "float[n,3,8,8] x",
            "float[n,4,6,6] y",
            "float[4,3,3,3] w, float[4] b",
            'y = ms.FusedConv <activation = "Relu"> (x, w, b)',
        ),
        (
            "FusedMatMul",
            "float[n,5,7] x, float[n,5,4] w",
            "float[n,7,4] y",
            "float unused = {0}",
            "y = ms.FusedMatMul <transA = 1, alpha = 0.5> (x, w)",
        ),
        (
            "FusedGemm",
            "float[n,5] x",
            "float[n,4] y",
            "float[5,4] w, float[4] b",
            'y = ms.FusedGemm <activation = "Relu"> (x, w, b)',
        ),
        ("Gelu", "float[n,5] x", "float[n,5] y", "float unused = {0}", "y = ms.Gelu (x)"),
        ("BiasGelu", "float[n,5] x", "float[n,5] y", "float[5] b", "y = ms.BiasGelu (x, b)"),
        ("FastGelu", "float[n,5] x", "float[n,5] y", "float[5] b", "y = ms.FastGelu (x, b)"),
        (
            "QuickGelu",
            "float[n,5] x",
            "float[n,5] y",
            "float unused = {0}",
            "y = ms.QuickGelu <alpha = 1.702> (x)",
        ),
        (
            "SkipLayerNormalization",
            "float[n,3,8] x, float[n,3,8] k",
            "float[n,3,8] y",
            "float[8] w, float[8] b, float[8] c",
            "y = ms.SkipLayerNormalization <epsilon = 1e-5> (x, k, w, b, c)",
        ),
        (
            "SkipSimplifiedLayerNormalization",
            "float[n,3,8] x, float[n,3,8] k",
            "float[n,3,8] y",
            "float[8] w",
            "y = ms.SkipSimplifiedLayerNormalization <epsilon = 1e-5> (x, k, w)",
        ),
        (
            "EmbedLayerNormalization",
            "int32[n,4] i, int32[n,4] j",
            "float[n,4,8] y",
            "float[9,8] words, float[6,8] places, float[4,8] kinds, float[8] w, float[8] b",
            "y, m = ms.EmbedLayerNormalization (i, j, words, places, kinds, w, b)",
        ),
        (
            "Attention",
            "float[n,6,8] x",
            "float[n,6,8] y",
            "float[8,24] w, float[24] b",
            "y = ms.Attention <num_heads = 2> (x, w, b)",
        ),
        (
            "MultiHeadAttention",
            "float[n,3,8] q, float[n,5,8] k, float[n,5,8] v",
            "float[n,3,8] y",
            "float[24] b",
            "y = ms.MultiHeadAttention <num_heads = 2> (q, k, v, b)",
        ),
    )
)

BITS = (
    *(
        Construct(
            f"{op} of {dtype}",
            f"g ({dtype}[n,6] x) => ({dtype}[n,6] y) <{dtype} c = {{3}}> {{ {text} }}",
            opset=18,
            sizes=BATCH,
        )
        for op, dtype, text in (
            ("BitShift", "uint8", 'y = BitShift <direction = "RIGHT"> (x, c)'),
            ("BitwiseAnd", "int32", "y = BitwiseAnd (x, c)"),
            ("BitwiseNot", "int32", "y = BitwiseNot (x)"),
        )
    ),
    Construct(
        "BitwiseOr of int32",
        "g (int32[n,6] x) => (int32[n,6] y) <int32 c = {5}> { y = BitwiseOr (x, c) }",
        opset=18,
        sizes=BATCH,
        ends="fallback",
    ),
    Construct(
        "MaxPool of uint8",
        """g (uint8[n,3,8,8] x) => (uint8[n,3,4,4] y)
           { y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x) }""",
        sizes=BATCH,
    ),
    Construct(
        "float64 inside",
        """g (float[n,6] x) => (float[n,6] y) <double c = {0.5}>
           { d = Cast <to = 11> (x)  e = Mul (d, c)  y = Cast <to = 1> (e) }""",
        sizes=BATCH,
        within=ROUNDING,
        ordinary=("narrow-doubles", "remove-identities"),
    ),
)

ALGEBRA = (
    Construct(
        "Det",
        "g (float[n,3,3] x) => (float[n] y) { y = Det (x) }",
        sizes=BATCH,
        within=ROUNDING,
    ),
    Construct(
        "DFT",
        """g (float[n,24,1] x) => (float[n,13,2] y) <int64 axis = {1}>
           { y = DFT <onesided = 1> (x, , axis) }""",
        opset=20,
        sizes=BATCH,
        within=ROUNDING,
    ),
    Construct(
        "STFT",
        """g (float[n,64,1] x) => (float[n,f,9,2] y) <int64 step = {8}, float[16] w>
           { y = STFT (x, step, w) }""",
        sizes=BATCH,
        refused=False,
        within=ROUNDING,
    ),
    Construct(
        "MaxPool with indices",
        """g (float[n,3,8,8] x) => (float[n,3,4,4] y, int64[n,3,4,4] i)
           { y, i = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x) }""",
        sizes=BATCH,
    ),
    Construct(
        "MaxPool with dilations",
        """g (float[n,3,8,8] x) => (float[n,3,4,4] y)
           { y = MaxPool <kernel_shape = [3, 3], dilations = [2, 2]> (x) }""",
        sizes=BATCH,
    ),
    Construct(
        "AveragePool with dilations",
        """g (float[n,3,8,8] x) => (float[n,3,4,4] y)
           { y = AveragePool <kernel_shape = [3, 3], dilations = [2, 2]> (x) }""",
        opset=19,
        sizes=BATCH,
        within=ROUNDING,
    ),
    Construct(
        "MaxUnpool",
        """g (float[n,3,8,8] x) => (float[n,3,8,8] y)
           { p, i = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x)
             y = MaxUnpool <kernel_shape = [2, 2], strides = [2, 2]> (p, i) }""",
        sizes=BATCH,
        values={"x": apart},
    ),
    Construct(
        "Col2Im",
        """g (float[n,12,25] x) => (float[n,3,6,6] y) <int64[2] image = {6, 6}, int64[2] block = {2, 2}>
           { y = Col2Im (x, image, block) }""",
        opset=18,
        sizes=BATCH,
        within=ROUNDING,
    ),
    Construct(
        "AffineGrid",
        """g (float[n,2,3] x) => (float[n,5,6,2] y) <int64[4] size = {2, 3, 5, 6}>
           { y = AffineGrid (x, size) }""",
        opset=20,
        sizes={"n": (2, 2, 2)},
        within=ROUNDING,
    ),
    Construct(
        "CenterCropPad",
        """g (float[n,3,8,8] x) => (float[n,3,6,10] y) <int64[2] size = {6, 10}>
           { y = CenterCropPad <axes = [2, 3]> (x, size) }""",
        opset=18,
        sizes=BATCH,
    ),
    *(
        Construct(
            f"Resize, {name}",
            f"""g (float[n,3,12,12] x) => (float[n,3,7,9] y)
                <float[8] region = {{0, 0, 0.1, 0.1, 1, 1, 0.9, 0.8}}, int64[4] size = {{2, 3, 7, 9}}>
                {{ y = Resize <{attributes}> (x, {region}, , size) }}""",
            opset=19,
            sizes={"n": (2, 2, 2)},
            within=ROUNDING,
        )
        for name, attributes, region in (
            ("antialias", 'mode = "linear", antialias = 1', ""),
            (
                "tf_crop_and_resize",
                'mode = "linear", coordinate_transformation_mode = "tf_crop_and_resize"',
                "region",
            ),
            (
                "half_pixel_symmetric",
                'mode = "linear", coordinate_transformation_mode = "half_pixel_symmetric"',
                "",
            ),
        )
    ),
    Construct(
        "Resize that keeps the aspect ratio",
        """g (float[n,3,12,12] x) => (float[n,3,h,w] y) <int64[2] size = {7, 9}>
           { y = Resize <axes = [2, 3], mode = "linear",
                         keep_aspect_ratio_policy = "not_larger"> (x, , , size) }""",
        opset=19,
        sizes=BATCH,
        within=ROUNDING,
        ends="fallback",
    ),
    Construct(
        "ScatterND with reduction, constant places",
        """g (float[6,5] x, float[2,5] u) => (float[6,5] y) <int64[2,1] i = {4, 1}>
           { y = ScatterND <reduction = "add"> (x, i, u) }""",
        opset=18,
        within=ROUNDING,
    ),
    Construct(
        "ScatterElements with reduction, constant places",
        """g (float[6,5] x, float[2,5] u) => (float[6,5] y)
           <int64[2,5] i = {4, 1, 2, 0, 3, 0, 2, 4, 1, 5}>
           { y = ScatterElements <reduction = "max"> (x, i, u) }""",
        opset=18,
    ),
    Construct(
        "ScatterElements with reduction, computed places",
        """g (float[6,5] x, int64[2,5] i, float[2,5] u) => (float[6,5] y)
           { y = ScatterElements <reduction = "add"> (x, i, u) }""",
        opset=18,
        within=ROUNDING,
        ends="fallback",
    ),
)

FUNCTIONS = (
    Construct(
        "Attention with softcap",
        """g (float[n,2,6,4] q, float[n,2,5,4] k, float[n,2,5,4] v) => (float[n,2,6,4] y)
           { y = Attention <softcap = 2.0> (q, k, v) }""",
        opset=23,
        sizes=BATCH,
        within=ROUNDING,
    ),
    Construct(
        "LayerNormalization with Mean and InvStdDev",
        """g (float[n,6] x) => (float[n,6] y, float[n,1] m, float[n,1] i) <float[6] w, float[6] b>
           { y, m, i = LayerNormalization (x, w, b) }""",
        sizes=BATCH,
        within=ROUNDING,
    ),
    Construct(
        "NegativeLogLikelihoodLoss",
        """g (float[n,5] x, int64[n] t) => (float y)
           { y = NegativeLogLikelihoodLoss <reduction = "mean"> (x, t) }""",
        sizes=BATCH,
        within=ROUNDING,
    ),
    Construct(
        "SoftmaxCrossEntropyLoss",
        """g (float[n,5] x, int64[n] t) => (float y)
           { y = SoftmaxCrossEntropyLoss <reduction = "mean"> (x, t) }""",
        sizes=BATCH,
        within=ROUNDING,
    ),
)

CONSTRUCTS = (*DETECTION, *PRODUCTS, *QUANTISED, *FUSED, *BITS, *ALGEBRA, *FUNCTIONS)
"""All of them, in the order of the table."""
