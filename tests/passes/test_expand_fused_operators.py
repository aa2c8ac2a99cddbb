"""`expand-fused-operators`: numbers of ONNX Runtime's own kernels, and what the builder says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from builder_says import Builder, profile_of
from graphs import assert_same_numbers, rewrite, text

from optc.passes.contract import Facts
from optc.passes.expand_fused_operators import ExpandFusedOperators

HEAD = '<ir_version: 9, opset_import: ["" : 17, "com.microsoft" : 1]>'
PASS = ExpandFusedOperators()
MS = "com.microsoft"
NORM = "float[4] gamma = {1, 2, 0.5, 4}, float[4] beta = {0, 1, 2, 3}, float[4] b = {1, -1, 2, 0}"


def numbers(*shape: int) -> str:
    drawn: Any = np.random.default_rng(0).integers(-3, 4, int(np.prod(shape)))
    return "{" + ", ".join(map(str, drawn)) + "}"


CONV = f"float[3,2,3,3] w = {numbers(3, 2, 3, 3)}, float[3] b = {{1, 2, 3}}"
OPERATORS = {
    "conv": f"""
        g (float[N,2,5,5] x) => (float[N,3,5,5] y) <{CONV}>
        {{ y = {MS}.FusedConv <activation = "Relu", pads = [1, 1, 1, 1]> (x, w, b) }}""",
    "conv and sum": f"""
        g (float[N,2,5,5] x, float[N,3,3,3] z) => (float[N,3,3,3] y) <{CONV}>
        {{ y = {MS}.FusedConv <activation = "Relu"> (x, w, b, z) }}""",
    "conv and clip": f"""
        g (float[N,2,5,5] x) => (float[N,3,3,3] y) <{CONV}>
        {{ y = {MS}.FusedConv <activation = "Clip", activation_params = [0.0, 6.0]> (x, w, b) }}""",
    "conv and leak": f"""
        g (float[N,2,5,5] x) => (float[N,3,3,3] y) <{CONV}>
        {{ y = {MS}.FusedConv <activation = "LeakyRelu", activation_params = [0.2]> (x, w) }}""",
    "conv and hard sigmoid": f"""
        g (float[N,2,5,5] x) => (float[N,3,3,3] y) <{CONV}>
        {{ y = {MS}.FusedConv
             <activation = "HardSigmoid", activation_params = [0.2, 0.5]> (x, w) }}""",
    "linear": f"""
        g (float[N,4] x) => (float[N,3] y) <float[3,4] w = {numbers(3, 4)}, float[3] b = {{1, 2, 3}}>
        {{ y = {MS}.FusedGemm
             <activation = "LeakyRelu", activation_alpha = 0.3, transB = 1, alpha = 0.5> (x, w, b) }}""",
    "product": f"""
        g (float[2,4,N] x, float[N,2,3,4] w) => (float[N,2,N,3] y)
        {{ y = {MS}.FusedMatMul <alpha = 0.5, transA = 1, transB = 1> (x, w) }}""",
    "gelu": f"g (float[N,4] x) => (float[N,4] y) {{ y = {MS}.Gelu (x) }}",
    "bias and gelu": f"""
        g (float[N,4] x) => (float[N,4] y) <{NORM}> {{ y = {MS}.BiasGelu (x, b) }}""",
    "fast gelu": f"g (float[N,4] x) => (float[N,4] y) <{NORM}> {{ y = {MS}.FastGelu (x, b) }}",
    "quick gelu": f"g (float[N,4] x) => (float[N,4] y) {{ y = {MS}.QuickGelu (x) }}",
    "skip": f"""
        g (float[N,3,4] x, float[N,3,4] z) => (float[N,3,4] y, float[N,3,4] t) <{NORM}>
        {{ y, , , t = {MS}.SkipLayerNormalization <epsilon = 0.001> (x, z, gamma, beta, b) }}""",
    "skip alone": f"""
        g (float[N,3,4] x, float[3,4] z) => (float[N,3,4] y) <{NORM}>
        {{ y = {MS}.SkipLayerNormalization (x, z, gamma, beta) }}""",
    "skip, mean square": f"""
        g (float[N,3,4] x, float[N,3,4] z) => (float[N,3,4] y, float[N,3,4] t) <{NORM}>
        {{ y, , , t = {MS}.SkipSimplifiedLayerNormalization <epsilon = 0.001> (x, z, gamma, b) }}""",
    "embedding": f"""
        g (int32[N,3] i, int32[N,3] s, bool[N,3] n) => (float[N,3,4] y, int32[N] k, float[N,3,4] t)
        <{NORM}, float[5,4] w = {numbers(5, 4)}, float[6,4] p = {numbers(6, 4)},
         float[4,4] e = {numbers(4, 4)}>
        {{ m = Cast <to = 6> (n)
           y, k, t = {MS}.EmbedLayerNormalization (i, s, w, p, e, gamma, beta, m) }}""",
    "embedding by position": f"""
        g (int32[N,3] i, int32[N,3] o) => (float[N,3,4] y)
        <{NORM}, float[5,4] w = {numbers(5, 4)}, float[6,4] p = {numbers(6, 4)}>
        {{ y, k = {MS}.EmbedLayerNormalization (i, , w, p, , gamma, beta, , o) }}""",
}
TAKEN = ("gelu", "skip, mean square")
"""What TensorRT takes as it is."""


@pytest.mark.parametrize("name", OPERATORS)
def test_it_is_what_onnxruntime_computes(name: str, tensorrt: Builder) -> None:
    before, after, report = rewrite(HEAD + OPERATORS[name], PASS)
    assert report.skipped == {}
    assert all(not node.domain for node in after.graph.node)
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)
    profiles = (profile_of(before),)
    assert (tensorrt.refusal(before, profiles=profiles) == "") == (name in TAKEN)
    assert tensorrt.refusal(after, profiles=profiles) == ""


def test_where_opset_17_cannot_be_reached_normalising_is_spelt_out_further(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Facts, "reach_opset", lambda facts, version: version <= facts.opset)
    before, after, _ = rewrite(HEAD.replace("17", "13") + OPERATORS["skip"], PASS)
    assert "LayerNormalization" not in {node.op_type for node in after.graph.node}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


def test_half_precision_is_normalised_in_float32() -> None:
    before, after, _ = rewrite(
        HEAD
        + f"""
        g (float16[N,4] x, float16[N,4] z) => (float16[N,4] y)
        <float16[4] gamma = {{1, 1, 1, 1}}>
        {{ y = {MS}.SkipSimplifiedLayerNormalization (x, z, gamma) }}""",
        PASS,
    )
    assert [node.op_type for node in after.graph.node][:2] == ["Add", "Cast"]
    assert before.graph.output[0].type == after.graph.output[0].type


def test_half_precision_stays_half_precision() -> None:
    before, after, _ = rewrite(
        HEAD
        + f"""
        g (float16[N,4] x) => (float16[N,4] y) {{ y = {MS}.QuickGelu <alpha = 1.5> (x) }}""",
        PASS,
    )
    assert "float16 QuickGelu_0_value =  {15872}" in text(after)
    assert_same_numbers(before, after, rtol=1e-2, atol=1e-2)


def test_bytes_pool_with_channels_last() -> None:
    before, after, _ = rewrite(
        HEAD
        + f"""
        g (uint8[N,4,4,2] x) => (uint8[N,2,2,2] y)
        {{ y = {MS}.NhwcMaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x) }}""",
        PASS,
    )
    assert [node.op_type for node in after.graph.node] == ["Transpose", "MaxPool", "Transpose"]
    assert_same_numbers(before, after, rtol=0)


REFUSALS = {
    "its activation Swish is not known here": f"""
        g (float[N,2,5,5] x) => (float[N,3,3,3] y) <{CONV}>
        {{ [n] y = {MS}.FusedConv <activation = "Swish"> (x, w) }}""",
    "it transposes batch axes": f"""
        g (float[2,2,2] x, float[2,2,2] w) => (float[2,2,2] y)
        {{ [n] y = {MS}.FusedMatMul <transBatchA = 1> (x, w) }}""",
    "its output `m` is read": f"""
        g (float[N,3,4] x, float[N,3,4] z) => (float[N,3,4] y, float[N,3,1] m) <{NORM}>
        {{ [n] y, m = {MS}.SkipLayerNormalization (x, z, gamma, beta) }}""",
    "nobody knows how many axes `c` has": f"""
        g (float[2,2] x, float[2,2] w) => (float[2,2] y)
        {{ c = {MS}.Unknown (x)  [n] y = {MS}.FusedMatMul <transA = 1> (c, w) }}""",
    "nobody knows which type it computes in": f"""
        g (float[2,2] x) => (float[2,2] y)
        {{ c = {MS}.Unknown (x)  [n] d = {MS}.QuickGelu (c)  y = {MS}.Unknown (d) }}""",
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_is_not_spelt_out_stays_and_says_why(reason: str) -> None:
    _, _, report = rewrite(HEAD + REFUSALS[reason], PASS)
    assert report.skipped == {"n": reason}
    assert not report.rewritten
