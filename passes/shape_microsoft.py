"""Rules of the operators that ONNX Runtime's tools write, of the domain com.microsoft.

onnx knows nothing of them, and files seldom declare what they return. What is read of them here is
what ONNX Runtime's documentation of its operators says.
"""

from __future__ import annotations

import numpy as np

from optc.passes.dimension import Dim, total
from optc.passes.shape_fact import FLOAT32, Fact
from optc.passes.shape_operator import of_conv, of_gemm, of_global_pool, of_pool
from optc.passes.shape_rule import Call, Unknown, rule

DOMAIN = "com.microsoft"
_INT32 = np.dtype(np.int32)

rule("FusedConv", domain=DOMAIN)(of_conv)
rule("FusedGemm", domain=DOMAIN)(of_gemm)


@rule("BiasGelu", "FastGelu", "Gelu", "QuickGelu", domain=DOMAIN)
@rule("QLinearLeakyRelu", "QLinearSigmoid", "QLinearSoftmax", domain=DOMAIN)
def _same(call: Call) -> Fact:
    return Fact(call.dtype(0), call.shape(0))


@rule("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=DOMAIN)
def _skip_normalization(call: Call) -> list[Fact]:
    dims = call.shape(0)
    result, statistic = Fact(call.dtype(0), dims), Fact(FLOAT32, (*dims[:-1], 1))
    return [result, statistic, statistic, result]


@rule("EmbedLayerNormalization", domain=DOMAIN)
def _embed_layer_normalization(call: Call) -> list[Fact]:
    batch, length = call.shape(0, rank=2)
    result = Fact(call.dtype(2), (batch, length, call.shape(2, rank=2)[1]))
    return [result, Fact(_INT32, (batch,)), result]


# --- products ------------------------------------------------------------------------------------


def _product(call: Call, left: tuple[Dim, ...], right: tuple[Dim, ...]) -> tuple[Dim, ...]:
    if len(left) < 2 or len(right) < 2:
        raise Unknown
    return (*call.broadcast([left[:-2], right[:-2]]), left[-2], right[-1])


@rule("FusedMatMul", "TransposeMatMul", domain=DOMAIN)
def _fused_matmul(call: Call) -> Fact:
    if call.attr("transBatchA", 0) or call.attr("transBatchB", 0):
        raise Unknown
    left, right = (
        (*dims[:-2], dims[-1], dims[-2]) if call.attr(name, 0) and len(dims) > 1 else dims
        for dims, name in ((call.shape(0), "transA"), (call.shape(1), "transB"))
    )
    return Fact(call.dtype(0), _product(call, left, right))


@rule("DynamicQuantizeMatMul", "MatMulIntegerToFloat", domain=DOMAIN)
def _matmul_to_float(call: Call) -> Fact:
    dtype = call.dtype(0 if call.op == "DynamicQuantizeMatMul" else 2)
    return Fact(dtype, _product(call, call.shape(0), call.shape(1)))


@rule("QGemm", domain=DOMAIN)
def _quantised_gemm(call: Call) -> Fact:
    left, right = call.shape(0, rank=2), call.shape(3, rank=2)
    rows, columns = left[bool(call.attr("transA", 0))], right[not call.attr("transB", 0)]
    return Fact(call.dtype(8) if call.has(8) else FLOAT32, (rows, columns))


@rule("Attention", domain=DOMAIN)
def _attention(call: Call) -> list[Fact]:
    batch, length, _ = call.shape(0, rank=3)
    sizes = call.attr("qkv_hidden_sizes")
    width: Dim = sizes[2] if sizes else call.shape(1, rank=2)[1] // 3
    return [Fact(call.dtype(0), (batch, length, width))]


@rule("MultiHeadAttention", domain=DOMAIN)
def _multi_head_attention(call: Call) -> list[Fact]:
    batch, length, _ = call.shape(0, rank=3)
    return [Fact(call.dtype(0), (batch, length, call.shape(2, rank=3)[2]))]


@rule("DynamicQuantizeLSTM", domain=DOMAIN)
def _lstm(call: Call) -> list[Fact]:
    length, batch, _ = call.shape(0, rank=3)
    directions, hidden = call.shape(1, rank=3)[0], int(call.attr("hidden_size"))
    state = Fact(call.dtype(0), (directions, batch, hidden))
    return [Fact(call.dtype(0), (length, directions, batch, hidden)), state, state]


# --- on quantised tensors ------------------------------------------------------------------------


@rule("QLinearAdd", "QLinearMul", domain=DOMAIN)
def _elementwise(call: Call) -> Fact:
    return Fact(call.dtype(0), call.broadcast([call.shape(0), call.shape(3)]))


@rule("QLinearWhere", domain=DOMAIN)
def _where(call: Call) -> Fact:
    return Fact(call.dtype(1), call.broadcast([call.shape(index) for index in (0, 1, 4)]))


@rule("QLinearConcat", domain=DOMAIN)
def _concat(call: Call) -> Fact:
    parts = [call.shape(index) for index in range(2, len(call.inputs), 3)]
    axis = call.axis(call.attr("axis"), len(parts[0]))
    extent = total(dims[axis] for dims in parts)
    return Fact(call.dtype(2), (*parts[0][:axis], extent, *parts[0][axis + 1 :]))


@rule("QLinearReduceMean", domain=DOMAIN)
def _mean(call: Call) -> Fact:
    dims = call.shape(0)
    axes = {call.axis(axis, len(dims)) for axis in call.attr("axes") or range(len(dims))}
    kept: list[Dim] = [1] if call.attr("keepdims", 1) else []
    result = [e for at, dim in enumerate(dims) for e in (kept if at in axes else [dim])]
    return Fact(call.dtype(0), tuple(result))


@rule("QLinearConv", "QLinearAveragePool", "QLinearGlobalAveragePool", domain=DOMAIN)
def _windows(call: Call) -> Fact:
    if call.attr("channels_last", 0):
        raise Unknown
    if call.op == "QLinearConv":
        return of_conv(call)
    return of_global_pool(call) if "Global" in call.op else of_pool(call)[0]
