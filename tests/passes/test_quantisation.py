"""`optc.passes.quantisation`: which operands are quantised, and to which numbers."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import pytest
from graphs import parsed

from optc.passes.graph import import_model
from optc.passes.quantisation import (
    EightBits,
    Operands,
    dequantised,
    least_capability,
    quantisable,
    quantised,
    rounded,
    scale_of,
    weight_scales,
)

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'


def said_of(source: str) -> Operands | str:
    """Return what is said of the first product of a graph."""
    graph = import_model(parsed(HEAD + source))
    node = next(node for node in graph.nodes if node.op not in ("Relu", "DequantizeLinear"))
    return quantisable(node, _dtype_of, _rank_of)


def _dtype_of(tensor: gs.Tensor) -> np.dtype[Any] | None:
    return None if tensor.dtype is None else np.dtype(tensor.dtype)


def _rank_of(tensor: gs.Tensor) -> int | None:
    return None if tensor.shape is None else len(tensor.shape)


WEIGHTS = "<float[2,3] w = {1, 2, 3, 4, 5, 6}>"

TAKEN = {
    "the channels of a Conv come first": (
        (
            "g (float[1,4,8] x) => (float[1,2,8] y) <float[2,4,1] w = {1,2,3,4,5,6,7,8}> "
            "{ y = Conv (x, w) }"
        ),
        Operands((0,), 1, 0),
    ),
    "columns": (
        f"g (float[N,2] x) => (float[N,3] y) {WEIGHTS} {{ y = MatMul (x, w) }}",
        Operands((0,), 1, 1),
    ),
    "columns of several matrices": (
        (
            "g (float[2,N,2] x) => (float[2,N,2] y) <float[2,2,2] w = {1,2,3,4,5,6,7,8}> "
            "{ y = MatMul (x, w) }"
        ),
        Operands((0,), 1, 2),
    ),
    "rows of weights on the left": (
        f"g (float[3,N] x) => (float[2,N] y) {WEIGHTS} {{ y = MatMul (w, x) }}",
        Operands((1,), 0, 0),
    ),
    "a Gemm": (
        f"g (float[N,2] x) => (float[N,3] y) {WEIGHTS} {{ y = Gemm (x, w) }}",
        Operands((0,), 1, 1),
    ),
    "a Gemm with turned weights": (
        f"g (float[N,3] x) => (float[N,2] y) {WEIGHTS} {{ y = Gemm <transB = 1> (x, w) }}",
        Operands((0,), 1, 0),
    ),
    "a Gemm with turned weights on the left": (
        f"g (float[2,N] x) => (float[3,N] y) {WEIGHTS} {{ y = Gemm <transA = 1> (w, x) }}",
        Operands((1,), 0, 1),
    ),
    "two activations": (
        "g (float[N,2,4] a, float[N,4,2] b) => (float[N,2,2] y) { y = MatMul (a, b) }",
        Operands((0, 1)),
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_operands(name: str) -> None:
    source, expected = TAKEN[name]
    assert said_of(source) == expected


REFUSED = {
    "no product": ("g (float[2] x) => (float[2] y) { y = Neg (x) }", ""),
    "a ConvTranspose": (
        (
            "g (float[1,2,8] x) => (float[1,1,8] y) <float[2,1,1] w = {1, 2}> "
            "{ y = ConvTranspose (x, w) }"
        ),
        "in floats whether it is quantised or not",
    ),
    "a depthwise Conv": (
        (
            "g (float[1,2,8] x) => (float[1,2,8] y) <float[2,1,1] w = {1, 2}> "
            "{ y = Conv <group = 2> (x, w) }"
        ),
        "fewer than 4 channels a group",
    ),
    "computed weights": (
        "g (float[1,2,8] x, float[2,2,1] v) => (float[1,2,8] y) { w = Relu (v) y = Conv (x, w) }",
        "computed at run time",
    ),
    "a vector": (
        f"g (float[2] x) => (float[3] y) {WEIGHTS} {{ y = MatMul (x, w) }}",
        "an operand is a vector",
    ),
    "two constants": (
        (
            "g () => (float[2,2] y) <float[2,1] v = {1, 2}, float[1,2] w = {1, 2}> "
            "{ y = MatMul (v, w) }"
        ),
        "both its operands are constant",
    ),
    "another type": (
        "g (float16[N,2] x) => (float16[N,1] y) <float16[2,1] w = {1, 2}> { y = MatMul (x, w) }",
        "not known to be float32",
    ),
    "quantised before": (
        (
            "g (int8[N,2] q) => (float[N,3] y) <float[2,3] w = {1, 2, 3, 4, 5, 6}, float s = {1}> "
            "{ x = DequantizeLinear (q, s) y = MatMul (x, w) }"
        ),
        "quantised as it stands",
    ),
    "a computed bias that is scaled": (
        (
            f"g (float[N,2] x, float[3] b) => (float[N,3] y) {WEIGHTS} "
            "{ y = Gemm <beta = 2.0> (x, w, b) }"
        ),
        "it scales what it adds",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_reasons(name: str) -> None:
    source, expected = REFUSED[name]
    reason = said_of(source)
    assert isinstance(reason, str)
    assert expected in reason
    assert bool(reason) is bool(expected)


@pytest.mark.parametrize(("taps", "precision"), [(32, "fp8"), (33, "int8"), (33, "fp8")])
def test_kernels_in_fp8_have_32_taps_at_most(taps: int, precision: EightBits) -> None:
    conv = gs.Node(
        "Conv",
        inputs=[
            gs.Variable("x", np.float32, [1, 4, 99]),
            gs.Constant("w", np.ones((4, 4, taps), np.float32)),
        ],
    )
    found = quantisable(conv, _dtype_of, _rank_of, precision)
    assert isinstance(found, str) is ((taps, precision) == (33, "fp8"))


ATTENTION = """
    g (float[1,T,8] q, float[1,8,T] k, float[1,T,8] v) => (float[1,T,8] y) <float s = {0.5}>
    {
        a = MatMul (q, k)
        b = Mul (a, s)
        p = Softmax (b)
        y = MatMul (p, v)
    }"""


@pytest.mark.parametrize(
    ("precision", "length", "is_taken"),
    [("int8", "32", False), ("fp8", "32", True), ("fp8", "31", False), ("fp8", "N", False)],
)
def test_attention_is_quantised_to_fp8_and_of_known_length_only(
    precision: EightBits, length: str, is_taken: bool
) -> None:
    source = HEAD + ATTENTION.replace("T", length)
    graph = import_model(parsed(source))
    first, *_, last = graph.nodes
    for node in (first, last):
        found = quantisable(node, _dtype_of, _rank_of, precision)
        assert (found == Operands((0, 1))) is is_taken
    plain = import_model(parsed(source.replace("Softmax", "Relu")))
    assert quantisable(plain.nodes[0], _dtype_of, _rank_of, precision) == Operands((0, 1))


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_attention_that_is_guarded_against_nan_stays_floats(precision: EightBits) -> None:
    guard = "n = IsNaN (p) r = Where (n, s, p) y = MatMul (r, v)"
    source = HEAD + ATTENTION.replace("T", "32").replace("y = MatMul (p, v)", guard)
    graph = import_model(parsed(source))
    first, *_, last = graph.nodes
    assert all(
        isinstance(quantisable(node, _dtype_of, _rank_of, precision), str) for node in (first, last)
    )


def test_the_largest_magnitude_is_the_largest_number() -> None:
    assert quantised(np.float32([-6.35, 6.35]), scale_of(6.35, "int8"), "int8").tolist() == [
        -127,
        127,
    ]
    assert quantised(np.float32([-3.5, 3.5]), scale_of(3.5, "fp8"), "fp8").tolist() == [-448, 448]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_tensor_of_zeros_stays_one(precision: EightBits) -> None:
    zeros = np.zeros((2, 2), np.float32)
    scales = weight_scales(zeros, 0, precision)
    assert scales.tolist() == [1, 1]
    assert not rounded(zeros, scales, precision, 0).any()


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_the_smallest_magnitude_has_a_scale_that_can_be_divided_by(precision: EightBits) -> None:
    scale = scale_of(1e-45, precision)
    assert np.isfinite(np.float32(1) / scale)
    assert np.isfinite(rounded(np.float32([1e-45]), scale, precision)).all()


def test_a_channel_has_a_scale_of_its_own_down_to_a_share_of_the_largest() -> None:
    weights = np.float32([[127, 1], [-12.7, 2], [1e-9, 0], [0, 0]])
    scales = weight_scales(weights, 0, "int8")
    np.testing.assert_allclose(scales, [1, 0.1, 2**-10, 2**-10], rtol=1e-6)
    np.testing.assert_array_equal(
        weight_scales(weights.T.reshape(1, 2, 4), 2, "int8"), scales, "along the last axis"
    )


def test_halves_are_rounded_to_even_and_what_is_too_large_saturates() -> None:
    values = np.float32([0.5, 1.5, 2.5, -0.5, -1.5, 127.5, 200, -128.4, -300])
    assert quantised(values, np.float32(1), "int8").tolist() == [
        0,
        2,
        2,
        0,
        -2,
        127,
        127,
        -128,
        -128,
    ]


def test_fp8_is_rounded_as_ml_dtypes_does_after_saturation() -> None:
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32) * 300
    found = quantised(values, np.float32(1), "fp8")
    expected = values.clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    assert found.dtype == expected.dtype
    assert found.tobytes() == expected.tobytes()
    assert np.abs(dequantised(found, np.float32(1))).max() == 448


def test_activations_are_not_changed_in_place() -> None:
    values = np.float32([[1.4, -2.6]])
    rounded(values, np.float32(1), "int8")
    assert values.tolist() == np.float32([[1.4, -2.6]]).tolist()


def test_where_the_builder_multiplies_8_bits() -> None:
    assert least_capability("Conv", "int8") == "8.0"
    assert least_capability("MatMul", "int8") == "7.5"
    assert least_capability("Gemm", "fp8") == "8.9"
    assert least_capability("ConvTranspose", "int8") is None
