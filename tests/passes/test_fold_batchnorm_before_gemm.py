"""`fold-batchnorm-before-gemm`: the rule, and what is left alone."""

from __future__ import annotations

import pytest
from graphs import assert_same_numbers, rewrite, text

from optc.passes.fold_batchnorm_before_gemm import FoldBatchnormBeforeGemm

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
STATISTICS = """float[2] gamma = {2, 3}, float[2] beta = {5, 7}, float[2] mean = {1, 2},
                float[2] var = {0.75, 0.75}"""  # with epsilon 0.25 the spread is 1
NORM = "[norm] n = BatchNormalization <epsilon = 0.25> (x, gamma, beta, mean, var)"


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_scale_and_shift_go_into_weights_and_bias(op: str) -> None:
    before, after, report = rewrite(
        HEAD
        + f"""
        g (float[N,2] x) => (float[N,1] y) <float[2,1] w = {{1, 2}}, {STATISTICS}>
        {{ {NORM} [gemm] y = {op} (n, w) }}""",
        FoldBatchnormBeforeGemm(),
    )
    assert (
        text(after)
        == """\
g (float[N,2] x) => (float[N,1] y)
   <float[2,1] w =  {2,6}, float[1] "gemm.bias" =  {5}>
{
   [gemm] y = Gemm (x, w, "gemm.bias")
}"""
    )
    assert report.merged == {"gemm": ("norm", "gemm")}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


REFUSALS = {
    "the BatchNormalization output has another reader": (
        "float[N,1] y, float[N,2] n",
        "[gemm] y = Gemm (n, w)",
    ),
    "the BatchNormalization works on axis 1, the channels are on axis 0": (
        "float[2,1] y",
        "[gemm] y = Gemm <transA = 1> (n, w)",
    ),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_would_change_a_result_is_left_alone_with_the_reason(reason: str) -> None:
    outputs, gemm = REFUSALS[reason]
    before, after, report = rewrite(
        HEAD
        + f"""
        g (float[2,2] x) => ({outputs.replace("N", "2")})
        <float[2,1] w = {{1, 2}}, {STATISTICS}> {{ {NORM} {gemm} }}""",
        FoldBatchnormBeforeGemm(),
    )
    assert list(after.graph.node) == list(before.graph.node)
    assert report.rewritten == 0
    assert report.skipped == {"norm": reason}
