"""`fold-batchnorm-into-gemm`: each rule, each refusal, and where the pattern stands.

With epsilon 0 and these variances the scale is whole: gamma / sqrt(var) = {6, 6} / {2, 3} = {3, 2},
and the shift is beta - mean * scale = {1, 2} - {1, 4} * {3, 2} = {-2, -6}.
"""

from __future__ import annotations

import pytest
from graphs import assert_same_numbers, rewrite, text

from optc.passes.fold_batchnorm_into_gemm import FoldBatchnormIntoGemm

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
STATISTICS = (
    "float[2] gamma = {6, 6}, float[2] beta = {1, 2}, float[2] mean = {1, 4}, float[2] var = {4, 9}"
)
NORM = "[norm] y = BatchNormalization <epsilon = 0.0> (c, gamma, beta, mean, var)"


@pytest.mark.parametrize(
    ("attributes", "printed", "bias"),
    [
        ("transB = 0", "transB: int = 0", "28,34"),
        ("alpha = 2.0, beta = 3.0", "alpha: float = 2", "88,114"),
    ],
)
def test_a_batchnorm_behind_a_gemm_is_folded_and_beta_with_it(
    attributes: str, printed: str, bias: str
) -> None:
    before, after, report = rewrite(
        HEAD
        + f"""
        g (float[N,3] x) => (float[N,2] y)
        <float[3,2] w = {{1, 2, 3, 4, 5, 6}}, float[2] b = {{10, 20}}, {STATISTICS}>
        {{ [gemm] c = Gemm <{attributes}> (x, w, b) {NORM} }}""",
        FoldBatchnormIntoGemm(),
    )
    assert (
        text(after)
        == f"""\
g (float[N,3] x) => (float[N,2] y)
   <float[3,2] w =  {{3,4,9,8,15,12}}, float[2] b =  {{{bias}}}>
{{
   [gemm] y = Gemm <{printed}> (x, w, b)
}}"""
    )
    assert report.merged == {"gemm": ("gemm", "norm")}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


def test_transposed_weights_are_scaled_by_their_rows() -> None:
    before, after, _ = rewrite(
        HEAD
        + f"""
        g (float[3,N] x) => (float[N,2] y)
        <float[2,3] w = {{1, 2, 3, 4, 5, 6}}, {STATISTICS}>
        {{ [gemm] c = Gemm <transA = 1, transB = 1> (x, w) {NORM} }}""",
        FoldBatchnormIntoGemm(),
    )
    assert (
        text(after)
        == """\
g (float[3,N] x) => (float[N,2] y)
   <float[2,3] w =  {3,6,9,8,10,12}, float[2] "gemm.bias" =  {-2,-6}>
{
   [gemm] y = Gemm <transA: int = 1, transB: int = 1> (x, w, "gemm.bias")
}"""
    )
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", ["float b = {10}", "float[1] b = {10}", "float[1,1] b = {10}"])
def test_a_bias_of_one_number_becomes_one_per_column(bias: str) -> None:
    before, after, _ = rewrite(
        HEAD
        + f"""
        g (float[N,1] x) => (float[N,2] y)
        <float[1,2] w = {{1, 2}}, {bias}, {STATISTICS}>
        {{ [gemm] c = Gemm (x, w, b) {NORM} }}""",
        FoldBatchnormIntoGemm(),
    )
    assert "float[2] b =  {28,14}" in text(after)
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


def test_a_matmul_of_matrices_becomes_a_gemm() -> None:
    before, after, report = rewrite(
        HEAD
        + f"""
        g (float[N,1] x) => (float[N,2] y)
        <float[1,2] w = {{1, 2}}, {STATISTICS}>
        {{ [matmul] c = MatMul (x, w) {NORM} }}""",
        FoldBatchnormIntoGemm(),
    )
    assert (
        text(after)
        == """\
g (float[N,1] x) => (float[N,2] y)
   <float[1,2] w =  {3,4}, float[2] "matmul.bias" =  {-2,-6}>
{
   [matmul] y = Gemm (x, w, "matmul.bias")
}"""
    )
    assert report.merged == {"matmul": ("matmul", "norm")}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


def test_a_matmul_whose_bias_is_in_an_add_keeps_the_two() -> None:
    before, after, report = rewrite(
        HEAD
        + f"""
        g (float[N,1] x) => (float[N,2] y)
        <float[1,2] w = {{1, 2}}, float[1,2] b = {{10, 20}}, {STATISTICS}>
        {{ [matmul] m = MatMul (x, w) [add] c = Add (b, m) {NORM} }}""",
        FoldBatchnormIntoGemm(),
    )
    assert (
        text(after)
        == """\
g (float[N,1] x) => (float[N,2] y)
   <float[1,2] w =  {3,4}, float[2] b =  {28,34}>
{
   [matmul] m = MatMul (x, w)
   [add] y = Add (b, m)
}"""
    )
    assert report.merged == {"add": ("add", "norm")}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


REFUSALS = {
    "the Gemm output has another reader": f"""
        g (float[N,1] x) => (float[N,2] y, float[N,2] c)
        <float[1,2] w = {{1, 2}}, {STATISTICS}>
        {{ [gemm] c = Gemm (x, w) {NORM} }}""",
    "the MatMul output has another reader": f"""
        g (float[N,1] x) => (float[N,2] y, float[N,2] m)
        <float[1,2] w = {{1, 2}}, float[2] b = {{10, 20}}, {STATISTICS}>
        {{ [matmul] m = MatMul (x, w) [add] c = Add (m, b) {NORM} }}""",
    "the weights of the Gemm are computed at run time": f"""
        g (float[N,1] x, float[1,2] w) => (float[N,2] y)
        <{STATISTICS}>
        {{ [gemm] c = Gemm (x, w) {NORM} }}""",
    "the bias of the Gemm is computed at run time": f"""
        g (float[N,1] x, float[N,2] b) => (float[N,2] y)
        <float[1,2] w = {{1, 2}}, {STATISTICS}>
        {{ [gemm] c = Gemm (x, w, b) {NORM} }}""",
    "the bias of the Gemm is not one number per channel": f"""
        g (float[3,1] x) => (float[3,2] y)
        <float[1,2] w = {{1, 2}}, float[3,1] b = {{10, 20, 30}}, {STATISTICS}>
        {{ [gemm] c = Gemm (x, w, b) {NORM} }}""",
    "the BatchNormalization works on axis 1, the channels are on axis 2": f"""
        g (float[N,2,1] x) => (float[N,2,2] y)
        <float[1,2] w = {{1, 2}}, {STATISTICS}>
        {{ [matmul] c = MatMul (x, w) {NORM} }}""",
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_would_change_a_result_is_left_alone_with_the_reason(reason: str) -> None:
    before, after, report = rewrite(HEAD + REFUSALS[reason], FoldBatchnormIntoGemm())
    del before.graph.value_info[:]
    assert text(after) == text(before)
    assert report.rewritten == 0
    assert report.skipped == {"norm": reason}


def test_a_product_of_two_results_is_not_spoken_of() -> None:
    _, _, report = rewrite(
        HEAD
        + f"""
        g (float[N,1] x, float[1,2] w) => (float[N,2] y)
        <{STATISTICS}>
        {{ [matmul] c = MatMul (x, w) {NORM} }}""",
        FoldBatchnormIntoGemm(),
    )
    assert report.merged == report.skipped == {}
