"""`decompose-dft`: both directions, one side or two, any axis and length, and the real builder."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from builder_says import Builder
from graphs import assert_same_numbers, rewrite, run
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.passes.decompose_dft import DecomposeDft


def dft(
    shape: tuple[object, ...],
    *,
    made: tuple[object, ...],
    attrs: str = "",
    inputs: str = "x",
    constants: str = "",
    dtype: str = "float",
    opset: int = 17,
) -> str:
    return f"""
        <ir_version: 8, opset_import: ["" : {opset}]>
        g ({dtype}[{", ".join(map(str, shape))}] x) => ({dtype}[{", ".join(map(str, made))}] y)
        <{constants}>
        {{
            [dft] y = DFT {attrs} ({inputs})
        }}"""


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def test_a_real_signal_is_one_product() -> None:
    source = dft(("N", 12, 1), made=("N", 7, 2), attrs="<onesided = 1>")
    before, after, report = rewrite(source, DecomposeDft())
    assert ops(after) == ["Reshape", "MatMul", "Reshape"]
    assert set(report.merged.values()) == {("dft",)}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


def test_another_axis_is_brought_to_the_end_and_back() -> None:
    source = dft((2, 6, 5, 2), made=(2, 6, 5, 2), attrs="<axis = 1, inverse = 1>")
    before, after, _ = rewrite(source, DecomposeDft())
    assert ops(after) == ["Transpose", "Reshape", "MatMul", "Reshape", "Transpose"]
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


@given(
    length=st.integers(2, 17),
    count=st.none() | st.integers(2, 20),
    parts=st.sampled_from([1, 2]),
    inverse=st.booleans(),
    axis=st.sampled_from([-2, -3, 1, 2]),
    opset=st.sampled_from([17, 20]),
)
@settings(max_examples=40, deadline=None)
def test_any_length_and_axis(
    length: int, count: int | None, parts: int, inverse: bool, axis: int, opset: int
) -> None:
    shape = [3, 4, 5, parts]
    shape[axis] = length
    made = [*shape[:-1], 2]
    made[axis] = count or length
    constants = [f"int64 n = {{{count}}}"] if count else []
    constants += [f"int64 axis = {{{axis}}}"] if opset == 20 else []
    _, after, _ = rewrite(
        dft(
            tuple(shape),
            made=tuple(made),
            attrs=f"<inverse = {int(inverse)}{f', axis = {axis}' if opset < 20 else ''}>",
            inputs=f"x, {'n' if count else ''}{', axis' if opset == 20 else ''}".rstrip(", "),
            constants=", ".join(constants),
            opset=opset,
        ),
        DecomposeDft(),
    )
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    numbers = x[..., 0] + (1j * x[..., 1] if parts == 2 else 0)
    transform = np.fft.ifft if inverse else np.fft.fft
    at = axis if axis >= 0 else axis + 1
    expected = transform(numbers, count, axis=at)
    found = run(after, {"x": x})["y"]
    np.testing.assert_allclose(found[..., 0] + 1j * found[..., 1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [None, 8, 9, 5, 14])
def test_a_onesided_inverse_gives_a_real_signal(count: int | None) -> None:
    made = count or 10
    _, after, _ = rewrite(
        dft(
            (2, 6, 2),
            made=(2, made, 1),
            attrs="<inverse = 1, onesided = 1>",
            inputs="x, n" if count else "x",
            constants=f"int64 n = {{{count}}}" if count else "",
        ),
        DecomposeDft(),
    )
    x = np.random.default_rng(0).standard_normal((2, 6, 2)).astype(np.float32)
    expected = np.fft.irfft(x[..., 0] + 1j * x[..., 1], count, axis=1)
    np.testing.assert_allclose(run(after, {"x": x})["y"][..., 0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (dft((1, "L", 1), made=(1, "L", 2)), "the length of its signal is not static"),
        (dft((1, 8, 1), made=(1, 8, 2), dtype="double"), "it computes in float64"),
        (
            dft((1, 4096, 1), made=(1, 2049, 2), attrs="<onesided = 1>"),
            "its matrix takes 64 MiB, which is slower than a fast transform elsewhere",
        ),
        (
            """
            <ir_version: 8, opset_import: ["" : 17]>
            g (float[1,8,1] x, int64 n) => (float[1,M,2] y) { [dft] y = DFT (x, n) }""",
            "its dft_length is no constant",
        ),
    ],
)
def test_what_it_leaves_alone(source: str, reason: str) -> None:
    _, after, report = rewrite(source, DecomposeDft())
    assert ops(after) == ["DFT"]
    assert report.skipped == {"dft": reason}


def test_tensorrt_takes_what_it_refused(tensorrt: Builder) -> None:
    source = dft(("N", 64, 9, 1), made=("N", 33, 9, 2), attrs="<onesided = 1>")
    before, after, _ = rewrite(source, DecomposeDft())
    profiles = ({"x": ((1, 64, 9, 1), (4, 64, 9, 1), (8, 64, 9, 1))},)
    assert tensorrt.refusal(before, profiles=profiles).startswith("refused")
    assert not tensorrt.refusal(after, profiles=profiles)
