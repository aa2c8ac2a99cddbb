"""`compute-bits-in-integers`: each operator and type, to the last bit, and the real builder."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from builder_says import Builder
from graphs import rewrite
from onnx.reference import ReferenceEvaluator

from optc.passes.compute_bits_in_integers import ComputeBitsInIntegers


def bits(operation: str, *, dtype: str, constant: str = "", opset: int = 18) -> str:
    return f"""
        <ir_version: 9, opset_import: ["" : {opset}]>
        g ({dtype}[N, 4] x) => ({dtype}[N, 4] y) <{constant}>
        {{
            [node] y = {operation}
        }}"""


def numbers(dtype: str) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """Return the extremes of a type and what lies between."""
    info = np.iinfo(dtype)
    rng = np.random.default_rng(0)
    drawn = rng.integers(info.min, info.max, 60, dtype=dtype, endpoint=True)
    near = np.array([info.min, info.max, 0, 1], dtype)
    return np.concatenate([near, drawn]).reshape(-1, 4)


def answer(model: onnx.ModelProto, x: object) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    [found] = ReferenceEvaluator(model).run(None, {"x": x})
    return np.asarray(found)


SHIFT = 'BitShift <direction = "{}"> (x, s)'
CASES = [
    *((SHIFT.format(way), "uint8", "uint8[4] s = {0, 1, 4, 7}", 18) for way in ("LEFT", "RIGHT")),
    (SHIFT.format("RIGHT"), "int32", "int32[4] s = {0, 1, 8, 30}", 28),
    (SHIFT.format("RIGHT"), "int64", "int64 s = {33}", 28),
    (SHIFT.format("LEFT"), "int32", "int32 s = {5}", 28),
    ("BitwiseNot (x)", "uint8", "", 18),
    ("BitwiseNot (x)", "int32", "", 18),
    ("BitwiseNot (x)", "int64", "", 18),
    ("BitwiseAnd (x, m)", "int32", "int32[4] m = {0, 1, 255, 1023}", 18),
    ("BitwiseAnd (m, x)", "uint8", "uint8 m = {15}", 18),
    ("BitwiseAnd (m, x)", "int64", "int64 m = {7}", 18),
]


@pytest.mark.parametrize(("operation", "dtype", "constant", "opset"), CASES)
@pytest.mark.filterwarnings("ignore:overflow")
def test_it_is_the_same_to_the_last_bit(
    operation: str, dtype: str, constant: str, opset: int
) -> None:
    source = bits(operation, dtype=dtype, constant=constant, opset=opset)
    before, after, report = rewrite(source, ComputeBitsInIntegers())
    assert set(report.merged.values()) == {("node",)}
    assert not {node.op_type for node in after.graph.node} & {"BitShift", "BitwiseAnd"}
    x = numbers(dtype)
    expected, found = answer(before, x), answer(after, x)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            bits(SHIFT.format("LEFT"), dtype="uint32", constant="uint32 s = {1}"),
            "TensorRT has no arithmetic of uint32",
        ),
        (
            bits(SHIFT.format("LEFT"), dtype="uint8", constant="uint8 s = {8}"),
            "it shifts uint8 by more than 7 bits, or by fewer than none",
        ),
        (
            bits("BitwiseAnd (x, m)", dtype="int32", constant="int32 m = {6}"),
            "its mask is not of the lowest bits alone",
        ),
        (bits("BitwiseAnd (x, x)", dtype="int32"), "its mask is no constant"),
        (
            bits('BitShift <direction = "LEFT"> (x, x)', dtype="uint8"),
            "how far it shifts is no constant",
        ),
    ],
)
def test_what_it_leaves_alone(source: str, reason: str) -> None:
    before, after, report = rewrite(source, ComputeBitsInIntegers())
    assert after.graph.node[0].op_type == before.graph.node[0].op_type
    assert report.skipped == {"node": reason}


@pytest.mark.parametrize("case", [0, 1, 5, 6, 7, 8, 9, 10])
def test_tensorrt_takes_what_it_refused(tensorrt: Builder, case: int) -> None:
    operation, dtype, constant, _ = CASES[case]
    before, after, _ = rewrite(
        bits(operation, dtype=dtype, constant=constant), ComputeBitsInIntegers()
    )
    profiles = ({"x": ((1, 4), (4, 4), (8, 4))},)
    assert tensorrt.refusal(before, profiles=profiles).startswith("refused")
    assert not tensorrt.refusal(after, profiles=profiles)
