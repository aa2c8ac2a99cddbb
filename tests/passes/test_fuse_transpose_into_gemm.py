"""`fuse-transpose-into-gemm`: either factor, all readers or none."""

from __future__ import annotations

import pytest
from graphs import assert_same_numbers, rewrite, text

from optc.passes.fuse_transpose_into_gemm import FuseTransposeIntoGemm

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'


def test_the_first_factor_is_transposed_by_the_gemm() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[N,2] a, float[N,3] b, float[3] c) => (float[2,3] y) {
            [turn] t = Transpose <perm = [1, 0]> (a)
            [gemm] y = Gemm <beta = 2.0> (t, b, c)
        }""",
        FuseTransposeIntoGemm(),
    )
    assert (
        text(after)
        == """\
g (float[N,2] a, float[N,3] b, float[3] c) => (float[2,3] y) {
   [gemm] y = Gemm <beta: float = 2, transA: int = 1> (a, b, c)
}"""
    )
    assert report.merged == {"gemm": ("turn", "gemm")}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-6)


def test_a_gemm_that_transposes_the_other_way_needs_no_flag_then() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[2,N] a, float[N,3] b) => (float[2,3] y) {
            [turn] t = Transpose (b)
            [gemm] y = Gemm <transB = 1> (a, t)
        }""",
        FuseTransposeIntoGemm(),
    )
    assert "y = Gemm (a, b)" in text(after)
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("operands", "result"), [("t, a", "2,2"), ("a, t", "3,3"), ("t, w", "2,1")]
)
def test_a_matmul_of_matrices_becomes_a_gemm(operands: str, result: str) -> None:
    before, after, _ = rewrite(
        HEAD
        + f"""
        g (float[3,2] a) => (float[{result}] y) <float[3,1] w = {{1, 2, 3}}>
        {{ [turn] t = Transpose (a) [product] y = MatMul ({operands}) }}""",
        FuseTransposeIntoGemm(),
    )
    assert [str(node.op_type) for node in after.graph.node] == ["Gemm"]
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-6)


def test_all_readers_take_it_even_as_both_factors() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[2,2] a) => (float[2,2] y, float[2,2] z) {
            [turn]   t = Transpose (a)
            [first]  y = MatMul (t, t)
            [second] z = Gemm (a, t)
        }""",
        FuseTransposeIntoGemm(),
    )
    assert (
        text(after)
        == """\
g (float[2,2] a) => (float[2,2] y, float[2,2] z) {
   [first] y = Gemm <transA: int = 1, transB: int = 1> (a, a)
   [second] z = Gemm <transB: int = 1> (a, a)
}"""
    )
    assert report.merged == {"first": ("turn", "first"), "second": ("turn", "second")}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "graph",
    [
        # the Transpose would stay
        "g (float[2,2] a) => (float[2,2] y, float[2,2] t) { t = Transpose (a) y = MatMul (t, a) }",
        """g (float[2,2] a) => (float[2,2] y, float[2,2] z)
           { t = Transpose (a) y = MatMul (t, a) z = Relu (t) }""",
        "g (float[2,2] a) => (float[2,2] y) { t = Transpose (a) y = Gemm (a, t, t) }",
        # it is no Transpose of a matrix, no product of matrices, none of floats
        """g (float[3,2,2] a) => (float[2,2,3] y)
           { t = Transpose <perm = [1, 2, 0]> (a) y = MatMul (t, t) }""",
        "g (float[2,2] a, float[3,2,2] b) => (float[3,2,2] y) { t = Transpose (a) y = MatMul (t, b) }",
        "g (int32[2,2] a) => (int32[2,2] y) { t = Transpose (a) y = MatMul (t, a) }",
        "g (float[2,2] a) => (float[2,2] y) { t = Transpose <perm = [0, 1]> (a) y = Gemm (t, a) }",
    ],
)
def test_what_saves_nothing_or_is_no_gemm_is_left_alone(graph: str) -> None:
    before, after, report = rewrite(HEAD + graph, FuseTransposeIntoGemm())
    assert [node.op_type for node in after.graph.node] == [n.op_type for n in before.graph.node]
    assert report.rewritten == 0
    assert report.merged == report.skipped == {}
