"""`fold-add-before-gemm`: each rule, each refusal, and where the pattern stands."""

from __future__ import annotations

import pytest
from graphs import assert_same_numbers, rewrite, text

from optc.passes.fold_add_before_gemm import FoldAddBeforeGemm

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'


@pytest.mark.parametrize(
    ("operator", "operands", "weights", "bias"),
    [
        ("Add", "x, t", "1,2,3,4", "28,46"),
        ("Add", "t, x", "1,2,3,4", "28,46"),
        ("Sub", "x, t", "1,2,3,4", "-8,-6"),
        ("Sub", "t, x", "-1,-2,-3,-4", "28,46"),
    ],
)
def test_a_shift_per_column_is_added_to_the_bias_in_either_order(
    operator: str, operands: str, weights: str, bias: str
) -> None:
    before, after, report = rewrite(
        HEAD
        + f"""
        g (float[N,2] x) => (float[N,2] y)
        <float[2,2] w = {{1, 2, 3, 4}}, float[2] b = {{10, 20}}, float[2] t = {{3, 5}}>
        {{
            [add]  m = {operator} ({operands})
            [gemm] y = Gemm (m, w, b)
        }}""",
        FoldAddBeforeGemm(),
    )
    assert (
        text(after)
        == f"""\
g (float[N,2] x) => (float[N,2] y)
   <float[2,2] w =  {{{weights}}}, float[2] b =  {{{bias}}}>
{{
   [gemm] y = Gemm (x, w, b)
}}"""
    )
    assert report.merged == {"gemm": ("add", "gemm")}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


def test_alpha_scales_what_the_shift_adds_and_beta_only_the_bias() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[2,N] x) => (float[N,2] y)
        <float[2,2] w = {1, 2, 3, 4}, float[2] b = {10, 20}, float[2,1] t = {3, 5}>
        {
            [add]  m = Add (x, t)
            [gemm] y = Gemm <alpha = 0.5, beta = 2.0, transA = 1, transB = 1> (m, w, b)
        }""",
        FoldAddBeforeGemm(),
    )
    assert "float[2] b =  {26.5,54.5}" in text(after)
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


def test_a_matmul_of_matrices_becomes_a_gemm() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[N,2] x) => (float[N,1] y) <float[2,1] w = {1, 2}, float t = {3}>
        { [add] m = Add (x, t) [matmul] y = MatMul (m, w) }""",
        FoldAddBeforeGemm(),
    )
    assert (
        text(after)
        == """\
g (float[N,2] x) => (float[N,1] y)
   <float[2,1] w =  {1,2}, float[1] "matmul.bias" =  {9}>
{
   [matmul] y = Gemm (x, w, "matmul.bias")
}"""
    )
    assert report.merged == {"matmul": ("add", "matmul")}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


def test_a_matmul_of_more_axes_takes_it_into_the_add_behind_it() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[N,T,2] x) => (float[N,T,1] y)
        <float[2,1] w = {1, 2}, float[1] b = {10}, float[2] t = {3, 5}>
        {
            [shift]  m = Add (x, t)
            [matmul] c = MatMul (m, w)
            [add]    y = Add (c, b)
        }""",
        FoldAddBeforeGemm(),
    )
    assert (
        text(after)
        == """\
g (float[N,T,2] x) => (float[N,T,1] y)
   <float[2,1] w =  {1,2}, float[1] b =  {23}>
{
   [matmul] c = MatMul (x, w)
   [add] y = Add (c, b)
}"""
    )
    assert report.merged == {"add": ("shift", "add")}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


REFUSALS = {
    "a MatMul has no bias, and only one of two matrices can be a Gemm": """
        g (float[N,T,2] x) => (float[N,T,1] y)
        <float[2,1] w = {1, 2}, float[2] t = {3, 5}>
        { [add] m = Add (x, t) [matmul] y = MatMul (m, w) }""",
    "the Add output has another reader": """
        g (float[N,2] x) => (float[N,1] y, float[N,2] m)
        <float[2,1] w = {1, 2}, float[2] t = {3, 5}>
        { [add] m = Add (x, t) [matmul] y = MatMul (m, w) }""",
    "the bias of the Gemm is computed at run time": """
        g (float[N,2] x, float[1] b) => (float[N,1] y)
        <float[2,1] w = {1, 2}, float[2] t = {3, 5}>
        { [add] m = Add (x, t) [gemm] y = Gemm (m, w, b) }""",
    "the bias of the Gemm is not one number per channel": """
        g (float[2,2] x) => (float[2,1] y)
        <float[2,1] w = {1, 2}, float[2] t = {3, 5}, float[2,1] b = {1, 2}>
        { [add] m = Add (x, t) [gemm] y = Gemm (m, w, b) }""",
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_would_change_a_result_is_left_alone_with_the_reason(reason: str) -> None:
    before, after, report = rewrite(HEAD + REFUSALS[reason], FoldAddBeforeGemm())
    assert list(after.graph.node) == list(before.graph.node)
    assert report.rewritten == 0
    assert report.skipped == {"add": reason}


def test_a_matmul_whose_result_before_the_bias_the_caller_reads_is_left_alone() -> None:
    _, _, report = rewrite(
        HEAD
        + """
        g (float[N,T,2] x) => (float[N,T,1] y, float[N,T,1] c)
        <float[2,1] w = {1, 2}, float[1] b = {10}, float[2] t = {3, 5}>
        {
            [shift]  m = Add (x, t)
            [matmul] c = MatMul (m, w)
            [add]    y = Add (c, b)
        }""",
        FoldAddBeforeGemm(),
    )
    assert report.rewritten == 0
    assert report.skipped == {
        "shift": "a MatMul has no bias, and only one of two matrices can be a Gemm"
    }
