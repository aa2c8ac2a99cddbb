"""`turn-products-into-convs`: each form, each refusal, and what the builder says for 7.5."""

from __future__ import annotations

import numpy as np
import pytest
from builder_says import Builder, profile_of
from graphs import assert_same_numbers, rewrite, text
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.passes.turn_products_into_convs import TurnProductsIntoConvs

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
WEIGHTS = "<float[4,3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}>"
LEFT = "<float[3,4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}>"


def test_a_product_of_three_axes_becomes_a_conv_between_two_transposes() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[N,M,2] x) => (float[N,M,3] y) <float[2,3] w = {1, 2, 3, 4, 5, 6}>
        {
            [mm] y = MatMul (x, w)
        }""",
        TurnProductsIntoConvs(),
    )
    assert (
        text(after)
        == """\
g (float[N,M,2] x) => (float[N,M,3] y)
   <float[3,2,1] mm_value =  {1,4,2,5,3,6}>
{
   [mm_transpose] mm_transpose_out = Transpose <perm: ints = [0, 2, 1]> (x)
   [mm_conv] mm_conv_out = Conv (mm_transpose_out, mm_value)
   [mm_transpose_1] y = Transpose <perm: ints = [0, 2, 1]> (mm_conv_out)
}"""
    )
    assert report.merged == dict.fromkeys(("mm_transpose", "mm_conv", "mm_transpose_1"), ("mm",))
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


PRODUCTS = {
    "rows": f"g (float[N,4] x) => (float[N,3] y) {WEIGHTS} {{ y = MatMul (x, w) }}",
    "sequence": f"g (float[N,M,4] x) => (float[N,M,3] y) {WEIGHTS} {{ y = MatMul (x, w) }}",
    "image": f"g (float[N,2,M,4] x) => (float[N,2,M,3] y) {WEIGHTS} {{ y = MatMul (x, w) }}",
    "windows": f"g (float[N,M,2,5,4] x) => (float[N,M,2,5,3] y) {WEIGHTS} {{ y = MatMul (x, w) }}",
    "left of a matrix": f"g (float[4,M] x) => (float[3,M] y) {LEFT} {{ y = MatMul (w, x) }}",
    "left of matrices": f"g (float[N,4,M] x) => (float[N,3,M] y) {LEFT} {{ y = MatMul (w, x) }}",
    "left of images": f"g (float[N,2,4,M] x) => (float[N,2,3,M] y) {LEFT} {{ y = MatMul (w, x) }}",
    "linear": f"g (float[N,4] x) => (float[N,3] y) {WEIGHTS[:-1]}, float[3] b = {{1, 2, 3}}>"
    "{ y = Gemm <alpha = 0.5, beta = 2.0> (x, w, b) }",
    "linear, both turned": f"g (float[4,N] x, float[N,1] b) => (float[N,3] y) {LEFT}"
    "{ y = Gemm <transA = 1, transB = 1, beta = 2.0> (x, w, b) }",
    "integers": "g (float[N,2,4] x) => (float[N,2,3] y) <int8[4,3] i = {1,2,3,4,5,6,7,8,9,10,11,12}, "
    "float[3] s = {0.5, 2, 3}, int8[3] z = {0, 0, 0}>"
    "{ w = DequantizeLinear <axis = -1> (i, s, z)  y = MatMul (x, w) }",
    "linear, integers": "g (float[N,4] x) => (float[N,3] y) "
    "<int8[3,4] i = {1,2,3,4,5,6,7,8,9,10,11,12}, float s = {0.5}>"
    "{ w = DequantizeLinear (i, s)  y = Gemm <transB = 1, alpha = 3.0> (x, w) }",
    "linear, a number": f"g (float[N,4] x) => (float[N,3] y) {WEIGHTS[:-1]}, float b = {{1}}>"
    "{ y = Gemm (x, w, b) }",
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_builder_takes_for_7_5_what_it_refused(name: str, tensorrt: Builder) -> None:
    before, after, _ = rewrite(HEAD + PRODUCTS[name], TurnProductsIntoConvs())
    assert not {"Gemm", "MatMul"} & {node.op_type for node in after.graph.node}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5, dynamic=3)

    profiles = (profile_of(before),)
    refusal = tensorrt.refusal(before, compute_capability="7.5", profiles=profiles)
    assert "FP32 GEMM is not supported" in refusal
    assert tensorrt.refusal(after, compute_capability="7.5", profiles=profiles) == ""
    assert tensorrt.refusal(before, compute_capability="8.6", profiles=profiles) == ""


def test_before_opset_13_axes_are_attributes() -> None:
    before, after, _ = rewrite(HEAD.replace("17", "11") + PRODUCTS["rows"], TurnProductsIntoConvs())
    assert "Unsqueeze <axes: ints = [2, 3]>" in text(after)
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


def test_weights_with_axes_of_one_before_them_are_one_matrix() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[N,2,2] x) => (float[N,2,1] y) <float[1,2,1] w = {1, 2}> { y = MatMul (x, w) }""",
        TurnProductsIntoConvs(),
    )
    assert report.rewritten
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


def test_half_precision_stays_half_precision() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float16[N,2] x) => (float16[N,1] y) <float16[2,1] w = {1, 2}>
        { y = Gemm <alpha = 2.0> (x, w) }""",
        TurnProductsIntoConvs(),
    )
    assert report.rewritten
    assert_same_numbers(before, after, rtol=1e-2, atol=1e-2)


REFUSALS = {
    "both operands are computed at run time": (
        "g (float[2,2] x, float[2,2] w) => (float[2,2] y) { [n] y = MatMul (x, w) }"
    ),
    "the constant operand is not one matrix of floats": (
        "g (float[2,1,2] x) => (float[2,1,1] y) <float[2,2,1] w = {1, 2, 3, 4}>"
        "{ [n] y = MatMul (x, w) }"
    ),
    "the activations have one axis, or nobody knows how many": (
        "g (float[2] x) => (float[1] y) <float[2,1] w = {1, 2}> { [n] y = MatMul (x, w) }"
    ),
    "the weights have more axes than the activations": (
        "g (float[1,2] x) => (float[1,1,1] y) <float[1,2,1] w = {1, 2}> { [n] y = MatMul (x, w) }"
    ),
    "the activations have more than four axes": (
        "g (float[1,1,1,2,1] x) => (float[1,1,1,1,1] y) <float[1,2] w = {1, 2}>"
        "{ [n] y = MatMul (w, x) }"
    ),
    "the activations have more than four axes, which are not static": (
        "g (float[1,1,M,1,2] x) => (float[1,1,M,1,1] y) <float[2,1] w = {1, 2}>"
        "{ [n] y = MatMul (x, w) }"
    ),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_is_no_convolution_stays_and_says_why(reason: str) -> None:
    _, _, report = rewrite(HEAD + REFUSALS[reason], TurnProductsIntoConvs())
    assert not report.rewritten
    assert report.skipped == {"n": reason}


@settings(max_examples=30, deadline=None)
@given(
    batch=st.lists(st.integers(1, 3), max_size=4),
    sizes=st.tuples(*[st.integers(1, 4)] * 3),
    on_left=st.booleans(),
)
def test_products_of_any_rank_are_the_same(
    batch: list[int], sizes: tuple[int, int, int], on_left: bool
) -> None:
    rows, inner, columns = sizes
    lead = "".join(f"{extent}," for extent in batch)
    shape = (rows, inner) if on_left else (inner, columns)
    x = f"{lead}{inner},{columns}" if on_left else f"{lead}{rows},{inner}"
    numbers = ", ".join(map(str, np.arange(shape[0] * shape[1])))
    before, after, _ = rewrite(
        HEAD
        + f"""
        g (float[{x}] x) => (float[{lead}{rows},{columns}] y)
        <float[{shape[0]},{shape[1]}] w = {{{numbers}}}>
        {{ y = MatMul ({"w, x" if on_left else "x, w"}) }}""",
        TurnProductsIntoConvs(),
    )
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-4)
