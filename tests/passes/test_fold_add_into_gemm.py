"""`fold-add-into-gemm`: each rule, each refusal, and where the pattern stands."""

from __future__ import annotations

import pytest
from graphs import assert_same_numbers, rewrite, text

from optc.passes.fold_add_into_gemm import FoldAddIntoGemm

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'


@pytest.mark.parametrize(
    ("operator", "operands", "weights", "bias"),
    [
        ("Add", "c, t", "1,2", "13,25"),
        ("Add", "t, c", "1,2", "13,25"),
        ("Sub", "c, t", "1,2", "7,15"),
        ("Sub", "t, c", "-1,-2", "-7,-15"),
    ],
)
def test_a_shift_per_column_is_added_to_the_bias_in_either_order(
    operator: str, operands: str, weights: str, bias: str
) -> None:
    before, after, report = rewrite(
        HEAD
        + f"""
        g (float[N,1] x) => (float[N,2] y)
        <float[1,2] w = {{1, 2}}, float[2] b = {{10, 20}}, float[1,2] t = {{3, 5}}>
        {{
            [gemm] c = Gemm (x, w, b)
            [node] y = {operator} ({operands})
        }}""",
        FoldAddIntoGemm(),
    )
    assert (
        text(after)
        == f"""\
g (float[N,1] x) => (float[N,2] y)
   <float[1,2] w =  {{{weights}}}, float[2] b =  {{{bias}}}>
{{
   [gemm] y = Gemm (x, w, b)
}}"""
    )
    assert report.merged == {"gemm": ("gemm", "node")}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


def test_a_beta_that_scaled_nothing_does_not_scale_the_new_bias() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[N,1] x) => (float[N,2] y)
        <float[1,2] w = {1, 2}, float t = {3}>
        {
            [gemm] c = Gemm <beta = 0.5> (x, w)
            [add]  y = Add (c, t)
        }""",
        FoldAddIntoGemm(),
    )
    assert (
        text(after)
        == """\
g (float[N,1] x) => (float[N,2] y)
   <float[1,2] w =  {1,2}, float[2] "gemm.bias" =  {3,3}>
{
   [gemm] y = Gemm (x, w, "gemm.bias")
}"""
    )
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


def test_a_matmul_of_matrices_becomes_a_gemm_and_takes_the_next_too() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[N,1] x) => (float[N,2] y)
        <float[1,2] w = {1, 2}, float[2] t = {3, 5}, float u = {1}>
        {
            [matmul] m = MatMul (x, w)
            [add]    c = Add (t, m)
            [add2]   y = Add (c, u)
        }""",
        FoldAddIntoGemm(),
    )
    assert (
        text(after)
        == """\
g (float[N,1] x) => (float[N,2] y)
   <float[1,2] w =  {1,2}, float[2] "matmul.bias" =  {4,6}>
{
   [matmul] y = Gemm (x, w, "matmul.bias")
}"""
    )
    assert report.merged == {"matmul": ("matmul", "add", "add2")}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


def test_the_add_behind_a_matmul_of_more_axes_stays_and_takes_up_the_next() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[N,T,1] x) => (float[N,T,2] y)
        <float[1,2] w = {1, 2}, float[2] t = {3, 5}, float u = {1}>
        {
            [matmul] m = MatMul (x, w)
            [add]    c = Add (t, m)
            [add2]   y = Add (c, u)
        }""",
        FoldAddIntoGemm(),
    )
    assert (
        text(after)
        == """\
g (float[N,T,1] x) => (float[N,T,2] y)
   <float[1,2] w =  {1,2}, float[2] t =  {4,6}>
{
   [matmul] m = MatMul (x, w)
   [add] y = Add (t, m)
}"""
    )
    assert report.merged == {"add": ("add", "add2")}
    assert report.skipped == {
        "add": "a MatMul has no bias, and only one of two matrices can be a Gemm"
    }
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


def test_a_bias_that_two_share_is_copied_and_weights_stay_shared() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[N,1] x) => (float[N,2] y, float[N,2] z)
        <float[1,2] w = {1, 2}, float[2] b = {10, 20}, float t = {1}>
        {
            [gemm]  c = Gemm (x, w, b)
            [add]   y = Add (c, t)
            [other] z = Gemm (x, w, b)
        }""",
        FoldAddIntoGemm(),
    )
    assert (
        text(after)
        == """\
g (float[N,1] x) => (float[N,2] y, float[N,2] z)
   <float[1,2] w =  {1,2}, float[2] "gemm.bias" =  {11,21}, float[2] b =  {10,20}>
{
   [gemm] y = Gemm (x, w, "gemm.bias")
   [other] z = Gemm (x, w, b)
}"""
    )
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


REFUSALS = {
    "the Gemm output has another reader": """
        g (float[N,1] x) => (float[N,2] y, float[N,2] c)
        <float[1,2] w = {1, 2}, float t = {3}>
        { [gemm] c = Gemm (x, w) [add] y = Add (c, t) }""",
    "the bias of the Gemm is computed at run time": """
        g (float[N,1] x, float[2] b) => (float[N,2] y)
        <float[1,2] w = {1, 2}, float t = {3}>
        { [gemm] c = Gemm (x, w, b) [add] y = Add (c, t) }""",
    "the constant has shape [3, 1]: it is not one number per channel": """
        g (float[3,1] x) => (float[3,2] y)
        <float[1,2] w = {1, 2}, float[3,1] t = {3, 5, 7}>
        { [gemm] c = Gemm (x, w) [add] y = Add (c, t) }""",
    "the constant has shape [3, 2]: it is not one number per channel": """
        g (float[1,1] x) => (float[3,2] y)
        <float[1,2] w = {1, 2}, float[3,2] t = {1, 2, 3, 4, 5, 6}>
        { [gemm] c = MatMul (x, w) [add] y = Add (c, t) }""",
    "the weights of the MatMul are int32": """
        g (int32[N,1] x) => (int32[N,2] y)
        <int32[1,2] w = {1, 2}, int32 t = {3}>
        { [matmul] c = MatMul (x, w) [add] y = Add (c, t) }""",
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_would_change_a_result_is_left_alone_with_the_reason(reason: str) -> None:
    before, after, report = rewrite(HEAD + REFUSALS[reason], FoldAddIntoGemm())
    del before.graph.value_info[:]
    assert text(after) == text(before)
    assert report.rewritten == 0
    assert report.skipped == {"add": reason}
