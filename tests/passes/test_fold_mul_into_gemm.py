"""`fold-mul-into-gemm`: each rule, each refusal, and where the pattern stands."""

from __future__ import annotations

import pytest
from graphs import assert_same_numbers, rewrite, text

from optc.passes.fold_mul_into_gemm import FoldMulIntoGemm

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'


@pytest.mark.parametrize(
    ("scale", "weights", "bias"),
    [
        ("float[2] s = {3, 5}", "3,10,9,20", "30,100"),
        ("float[1,2] s = {3, 5}", "3,10,9,20", "30,100"),
        ("float[1,1] s = {3}", "3,6,9,12", "30,60"),
        ("float s = {3}", "3,6,9,12", "30,60"),
    ],
)
@pytest.mark.parametrize("operands", ["c, s", "s, c"])
def test_a_scale_per_column_goes_into_weights_and_bias(
    scale: str, weights: str, bias: str, operands: str
) -> None:
    before, after, report = rewrite(
        HEAD
        + f"""
        g (float[N,2] x) => (float[N,2] y)
        <float[2,2] w = {{1, 2, 3, 4}}, float[2] b = {{10, 20}}, {scale}>
        {{
            [gemm] c = Gemm (x, w, b)
            [mul]  y = Mul ({operands})
        }}""",
        FoldMulIntoGemm(),
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
    assert report.merged == {"gemm": ("gemm", "mul")}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


def test_alpha_stays_and_beta_goes_into_the_bias() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[N,2] x) => (float[N,2] y)
        <float[2,2] w = {2, 4, 6, 8}, float[2] b = {10, 20}, float[2] s = {2, 4}>
        {
            [gemm] c = Gemm <alpha = 0.5, beta = 2.0, transB = 1> (x, w, b)
            [div]  y = Div (c, s)
        }""",
        FoldMulIntoGemm(),
    )
    assert (
        text(after)
        == """\
g (float[N,2] x) => (float[N,2] y)
   <float[2,2] w =  {1,2,1.5,2}, float[2] b =  {10,10}>
{
   [gemm] y = Gemm <alpha: float = 0.5, transB: int = 1> (x, w, b)
}"""
    )
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


def test_a_matmul_of_any_rank_takes_a_scale() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[N,T,2] x) => (float[N,T,2] y)
        <float[2,2] w = {1, 2, 3, 4}, float[1,1,2] s = {3, 5}>
        {
            [matmul] c = MatMul (x, w)
            [mul]    y = Mul (c, s)
        }""",
        FoldMulIntoGemm(),
    )
    assert (
        text(after)
        == """\
g (float[N,T,2] x) => (float[N,T,2] y)
   <float[2,2] w =  {3,10,9,20}>
{
   [matmul] y = MatMul (x, w)
}"""
    )
    assert report.merged == {"matmul": ("matmul", "mul")}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


def test_a_stack_of_weights_takes_a_scale() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[2,N,1] x) => (float[2,N,2] y)
        <float[2,1,2] w = {1, 2, 3, 4}, float[2] s = {3, 5}>
        {
            [matmul] c = MatMul (x, w)
            [mul]    y = Mul (c, s)
        }""",
        FoldMulIntoGemm(),
    )
    assert "float[2,1,2] w =  {3,10,9,20}" in text(after)
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


def test_the_bias_of_a_matmul_that_stands_in_an_add_is_scaled_too() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[N,T,2] x) => (float[N,T,2] y)
        <float[2,2] w = {1, 2, 3, 4}, float[2] b = {10, 20}, float[2] s = {3, 5}>
        {
            [matmul] m = MatMul (x, w)
            [add]    c = Add (b, m)
            [mul]    y = Mul (c, s)
        }""",
        FoldMulIntoGemm(),
    )
    assert (
        text(after)
        == """\
g (float[N,T,2] x) => (float[N,T,2] y)
   <float[2,2] w =  {3,10,9,20}, float[2] b =  {30,100}>
{
   [matmul] m = MatMul (x, w)
   [add] y = Add (b, m)
}"""
    )
    assert report.merged == {"add": ("add", "mul")}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


def test_only_the_first_add_behind_a_matmul_is_its_bias() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[N,T,1] x) => (float[N,T,2] y)
        <float[1,2] w = {1, 2}, float[2] b = {10, 20}, float[2] t = {3, 5}, float s = {2}>
        {
            [matmul] m = MatMul (x, w)
            [add]    c = Add (m, b)
            [add2]   d = Add (c, t)
            [mul]    y = Mul (d, s)
        }""",
        FoldMulIntoGemm(),
    )
    assert report.merged == report.skipped == {}
    assert_same_numbers(before, after, rtol=0)


REFUSALS = {
    "the Gemm output has another reader": """
        g (float[N,1] x) => (float[N,2] y, float[N,2] c)
        <float[1,2] w = {1, 2}, float s = {3}>
        { [gemm] c = Gemm (x, w) [mul] y = Mul (c, s) }""",
    "the MatMul output has another reader": """
        g (float[N,1] x) => (float[N,2] y, float[N,2] c)
        <float[1,2] w = {1, 2}, float[2] b = {1, 2}, float s = {3}>
        { [matmul] m = MatMul (x, w) [add] c = Add (m, b) [mul] y = Mul (c, s) }""",
    "the weights of the MatMul are shared with another node": """
        g (float[N,1] x) => (float[N,2] y, float[N,2] z)
        <float[1,2] w = {1, 2}, float s = {3}>
        { [matmul] c = MatMul (x, w) [mul] y = Mul (c, s) [other] z = MatMul (x, w) }""",
    "the weights of the Gemm are computed at run time": """
        g (float[N,1] x, float[1,2] w) => (float[N,2] y)
        <float s = {3}>
        { [gemm] c = Gemm (x, w) [mul] y = Mul (c, s) }""",
    "the weights of the MatMul are int32": """
        g (int32[N,1] x) => (int32[N,2] y)
        <int32[1,2] w = {1, 2}, int32 s = {3}>
        { [matmul] c = MatMul (x, w) [mul] y = Mul (c, s) }""",
    "the constant has shape [3, 1]: it is not one number per channel": """
        g (float[3,1] x) => (float[3,2] y)
        <float[1,2] w = {1, 2}, float[3,1] s = {3, 5, 7}>
        { [gemm] c = Gemm (x, w) [mul] y = Mul (c, s) }""",
    "the constant has shape [1, 1, 2]: it is not one number per channel": """
        g (float[3,1] x) => (float[1,3,2] y)
        <float[1,2] w = {1, 2}, float[1,1,2] s = {3, 5}>
        { [gemm] c = MatMul (x, w) [mul] y = Mul (c, s) }""",
    "the bias of the MatMul is not one number per channel": """
        g (float[3,1] x) => (float[3,2] y)
        <float[1,2] w = {1, 2}, float[3,1] b = {1, 2, 3}, float s = {3}>
        { [matmul] m = MatMul (x, w) [add] c = Add (m, b) [mul] y = Mul (c, s) }""",
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_would_change_a_result_is_left_alone_with_the_reason(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optc.passes.linear.COPIED_BYTES", 0)
    before, after, report = rewrite(HEAD + REFUSALS[reason], FoldMulIntoGemm())
    del before.graph.value_info[:]
    assert text(after) == text(before)
    assert report.rewritten == 0
    assert report.skipped == {"mul": reason}


def test_the_scale_of_attention_is_not_spoken_of() -> None:
    _, _, report = rewrite(
        HEAD
        + """
        g (float[N,2,2] q, float[N,2,2] k) => (float[N,2,2] y)
        <float s = {0.125}>
        { [matmul] c = MatMul (q, k) [mul] y = Mul (c, s) }""",
        FoldMulIntoGemm(),
    )
    assert report.merged == report.skipped == {}
