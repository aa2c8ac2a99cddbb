"""`fold-mul-before-gemm`: each rule, each refusal, and where the pattern stands."""

from __future__ import annotations

import pytest
from graphs import assert_same_numbers, rewrite, text

from optc.passes.fold_mul_before_gemm import FoldMulBeforeGemm

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'


@pytest.mark.parametrize("operands", ["x, s", "s, x"])
def test_a_scale_per_column_goes_into_the_rows_of_the_weights(operands: str) -> None:
    before, after, report = rewrite(
        HEAD
        + f"""
        g (float[N,2] x) => (float[N,2] y)
        <float[2,2] w = {{1, 2, 3, 4}}, float[2] b = {{10, 20}}, float[1,2] s = {{3, 5}}>
        {{
            [mul]  m = Mul ({operands})
            [gemm] y = Gemm <alpha = 0.5> (m, w, b)
        }}""",
        FoldMulBeforeGemm(),
    )
    assert (
        text(after)
        == """\
g (float[N,2] x) => (float[N,2] y)
   <float[2,2] w =  {3,6,15,20}, float[2] b =  {10,20}>
{
   [gemm] y = Gemm <alpha: float = 0.5> (x, w, b)
}"""
    )
    assert report.merged == {"gemm": ("mul", "gemm")}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        ("m = Div (x, s) [gemm] y = Gemm <transB = 1> (m, w)", "{1,1,2,2}"),
        ("m = Neg (x) [gemm] y = Gemm (m, w)", "{-3,-5,-6,-10}"),
        ("m = Mul (x, c) [gemm] y = Gemm <transA = 1> (m, w)", "{9,15,30,50}"),
    ],
)
def test_gemms_that_transpose_and_other_ways_to_scale(nodes: str, weights: str) -> None:
    before, after, _ = rewrite(
        HEAD
        + f"""
        g (float[2,2] x) => (float[2,2] y)
        <float[2,2] w = {{3, 5, 6, 10}}, float[2] s = {{3, 5}}, float[2,1] c = {{3, 5}}>
        {{ [mul] {nodes} }}""",
        FoldMulBeforeGemm(),
    )
    assert f"float[2,2] w =  {weights}" in text(after)
    assert len(after.graph.node) == 1
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", ["N,T,2", "2"])
def test_a_matmul_may_have_any_number_of_axes_and_a_bias_behind_it(shape: str) -> None:
    before, after, report = rewrite(
        HEAD
        + f"""
        g (float[{shape}] x) => (float[{shape[:-1]}1] y)
        <float[2,1] w = {{1, 2}}, float[1] b = {{10}}, float[2] s = {{3, 5}}>
        {{
            [mul]    m = Mul (x, s)
            [matmul] c = MatMul (m, w)
            [add]    y = Add (c, b)
        }}""",
        FoldMulBeforeGemm(),
    )
    assert "float[2,1] w =  {3,10}, float[1] b =  {10}" in text(after)
    assert report.merged == {"add": ("mul", "add")}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


def test_a_product_that_several_read_goes_into_all_of_them() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[N,2] x) => (float[N,1] y, float[N,1] z, float[N,1] v)
        <float[2,1] w = {1, 2}, float[2,1] u = {3, 4}, float[2] s = {3, 5}>
        {
            [mul]    m = Mul (x, s)
            [first]  y = MatMul (m, w)
            [second] z = MatMul (m, u)
            [third]  v = MatMul (m, w)
        }""",
        FoldMulBeforeGemm(),
    )
    assert (
        text(after)
        == """\
g (float[N,2] x) => (float[N,1] y, float[N,1] z, float[N,1] v)
   <float[2,1] w =  {3,10}, float[2,1] u =  {9,20}>
{
   [first] y = MatMul (x, w)
   [second] z = MatMul (x, u)
   [third] v = MatMul (x, w)
}"""
    )
    assert report.merged["second"] == ("mul", "second")
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


READ = "the Mul output has another reader"
REFUSALS = [
    (
        READ,
        """
        g (float[N,2] x) => (float[N,1] y, float[N,2] m)
        <float[2,1] w = {1, 2}, float s = {3}> { [mul] m = Mul (x, s) [gemm] y = MatMul (m, w) }""",
    ),
    (
        READ,  # that is no product
        """
        g (float[N,2] x) => (float[N,1] y, float[N,2] z)
        <float[2,1] w = {1, 2}, float s = {3}>
        { [mul] m = Mul (x, s) [gemm] y = MatMul (m, w) z = Relu (m) }""",
    ),
    (
        READ,  # that has no weights
        """
        g (float[N,2] x, float[2,M] t) => (float[N,1] y, float[N,M] z)
        <float[2,1] w = {1, 2}, float s = {3}>
        { [mul] m = Mul (x, s) [gemm] y = MatMul (m, w) z = MatMul (m, t) }""",
    ),
    (
        "the weights of the MatMul are shared with another node",
        """
        g (float[N,2] x) => (float[N,1] y, float[N,1] z)
        <float[2,1] w = {1, 2}, float s = {3}>
        { [mul] m = Mul (x, s) [gemm] y = MatMul (m, w) z = MatMul (x, w) }""",
    ),
    (
        "the weights of the Gemm are computed at run time",
        """
        g (float[N,2] x, float[2,1] w) => (float[N,1] y)
        <float s = {3}> { [mul] m = Mul (x, s) [gemm] y = Gemm (m, w) }""",
    ),
    (
        "the MatMul is not known to multiply by one matrix",
        """
        g (float[N,2] x) => (float[1,N,1] y)
        <float[1,2,1] w = {1, 2}, float s = {3}>
        { [mul] m = Mul (x, s) [gemm] y = MatMul (m, w) }""",
    ),
    (
        "the constant has shape [2, 2]: it is not one number per channel",
        """
        g (float[2,2] x) => (float[2,1] y)
        <float[2,1] w = {1, 2}, float[2,2] s = {3, 5, 7, 9}>
        { [mul] m = Mul (x, s) [gemm] y = MatMul (m, w) }""",
    ),
]


@pytest.mark.parametrize(("reason", "source"), REFUSALS)
def test_what_would_change_a_result_is_left_alone_with_the_reason(reason: str, source: str) -> None:
    before, after, report = rewrite(HEAD + source, FoldMulBeforeGemm())
    assert [node.op_type for node in after.graph.node] == [n.op_type for n in before.graph.node]
    assert report.rewritten == 0
    assert report.skipped == {"mul": reason}


def test_a_product_of_two_results_is_not_spoken_of() -> None:
    _, _, report = rewrite(
        HEAD
        + """
        g (float[N,2] x, float[2,1] w) => (float[N,1] y) <float s = {3}>
        { [mul] m = Mul (x, s) [matmul] y = MatMul (m, w) }""",
        FoldMulBeforeGemm(),
    )
    assert report.merged == report.skipped == {}


@pytest.mark.parametrize("x", ["float[N,1] x", "float[2] x", "float[N,K] x"])
def test_a_mul_that_makes_what_it_reads_larger_is_left_alone(x: str) -> None:
    before, after, report = rewrite(
        HEAD
        + f"""
        g ({x}) => (float[N,1] y) <float[2,1] w = {{1, 2}}, float[1,2] s = {{3, 5}}>
        {{ [mul] m = Mul (x, s) [matmul] y = MatMul (m, w) }}""",
        FoldMulBeforeGemm(),
    )
    assert report.skipped == {"mul": "the Mul makes what it reads larger, or may do so"}
    assert report.rewritten == 0
    assert_same_numbers(before, after, rtol=0)


def test_float16_weights_that_would_lose_digits_are_left_alone() -> None:
    one, smallest = 0x3C00, 1  # as bits
    _, _, report = rewrite(
        HEAD
        + f"""
        g (float16[N,1] x) => (float16[N,1] y)
        <float16[1,1] w = {{{one}}}, float16 s = {{{smallest}}}>
        {{ [mul] m = Mul (x, s) [gemm] y = Gemm (m, w) }}""",
        FoldMulBeforeGemm(),
    )
    assert report.rewritten == 0
    assert report.skipped == {"mul": "the folded weights do not fit float16"}
