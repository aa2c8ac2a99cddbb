"""`fuse-matmul-add-into-gemm`: what a Gemm takes as its bias, and what it does not."""

from __future__ import annotations

import pytest
from graphs import assert_same_numbers, rewrite, text

from optc.passes.fuse_matmul_add_into_gemm import FuseMatmulAddIntoGemm

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'


@pytest.mark.parametrize("operands", ["p, c", "c, p"])
@pytest.mark.parametrize("bias", ["M,K", "1,K", "M,1", "K", "1", ""])
def test_whatever_broadcasts_to_the_product_is_its_bias(operands: str, bias: str) -> None:
    kind = f"float[{bias}]" if bias else "float"
    before, after, report = rewrite(
        HEAD
        + f"""
        g (float[M,N] a, float[N,K] b, {kind} c) => (float[M,K] y)
        {{ [product] p = MatMul (a, b) [add] y = Add ({operands}) }}""",
        FuseMatmulAddIntoGemm(),
    )
    assert [str(node.op_type) for node in after.graph.node] == ["Gemm"]
    assert list(after.graph.node[0].input) == ["a", "b", "c"]
    assert report.merged == {"add": ("product", "add")}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-6)


def test_a_gemm_without_a_bias_keeps_its_alpha_and_forgets_its_beta() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[N,M] a, float[K,N] b, float[M,K] c) => (float[M,K] y) {
            [gemm] p = Gemm <alpha = 0.5, beta = 3.0, transA = 1, transB = 1> (a, b)
            [add]  y = Add (p, c)
        }""",
        FuseMatmulAddIntoGemm(),
    )
    assert (
        text(after)
        == """\
g (float[N,M] a, float[K,N] b, float[M,K] c) => (float[M,K] y) {
   [add] y = Gemm <alpha: float = 0.5, transA: int = 1, transB: int = 1> (a, b, c)
}"""
    )
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-6)


def test_of_two_products_one_is_the_bias_of_the_other() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[M,N] a, float[N,K] b) => (float[M,K] y) {
            [one] p = MatMul (a, b)
            [two] q = MatMul (a, b)
            [add] y = Add (p, q)
        }""",
        FuseMatmulAddIntoGemm(),
    )
    assert [str(node.op_type) for node in after.graph.node] == ["MatMul", "Gemm"]
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "graph",
    [
        # the bias makes the product larger
        "g (float[1,N] a, float[N,K] b, float[M,K] c) => (float[M,K] y)",
        "g (float[M,N] a, float[N,K] b, float[1,M,K] c) => (float[1,M,K] y)",
        "g (float[M,N] a, float[N,K] b, float[L,K] c) => (float[O,K] y)",  # or may do so
        "g (float[B,M,N] a, float[N,K] b, float[K] c) => (float[B,M,K] y)",  # no matrices
        "g (float[N] a, float[N,K] b, float[K] c) => (float[K] y)",
        "g (int32[M,N] a, int32[N,K] b, int32[K] c) => (int32[M,K] y)",
        "g (float[M,0] a, float[0,K] b, float[K] c) => (float[M,K] y)",  # no runtime agrees on it
    ],
)
def test_what_no_gemm_computes_is_left_alone(graph: str) -> None:
    _, after, report = rewrite(
        HEAD + graph + " { [product] p = MatMul (a, b) [add] y = Add (p, c) }",
        FuseMatmulAddIntoGemm(),
    )
    assert len(after.graph.node) == 2
    assert report.merged == report.skipped == {}


@pytest.mark.parametrize("more", ["float[M,K] p", "float[M,K] z"])
def test_a_product_that_others_read_is_left_alone(more: str) -> None:
    _, after, report = rewrite(
        HEAD
        + f"""
        g (float[M,N] a, float[N,K] b, float[K] c) => (float[M,K] y, {more})
        {{ [product] p = MatMul (a, b) [add] y = Add (p, c) z = Relu (p) }}""",
        FuseMatmulAddIntoGemm(),
    )
    assert report.rewritten == 0
    assert report.skipped == {"add": "the MatMul output has another reader"}
    assert "MatMul" in text(after)


def test_a_product_twice_added_is_left_alone() -> None:
    _, _, report = rewrite(
        HEAD
        + """
        g (float[M,N] a, float[N,K] b) => (float[M,K] y)
        { [product] p = MatMul (a, b) [add] y = Add (p, p) }""",
        FuseMatmulAddIntoGemm(),
    )
    assert report.rewritten == 0


def test_a_product_is_not_moved_into_a_body() -> None:
    _, _, report = rewrite(
        HEAD
        + """
        g (float[M,N] a, float[N,K] b, float[K] c, bool p) => (float[M,K] y) {
            m = MatMul (a, b)
            y = If (p) <
                then_branch = then () => (float[M,K] t) { [add] t = Add (m, c) },
                else_branch = other () => (float[M,K] e) { e = Sub (m, c) }
            >
        }""",
        FuseMatmulAddIntoGemm(),
    )
    assert report.rewritten == 0
