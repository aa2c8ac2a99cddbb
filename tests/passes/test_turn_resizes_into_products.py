"""`turn-resizes-into-products`: what TensorRT has no kernel for, and the real builder."""

from __future__ import annotations

import onnx
import pytest
from builder_says import Builder
from graphs import assert_same_numbers, rewrite

from optc.passes.turn_resizes_into_products import TurnResizesIntoProducts


def resize(
    attrs: str,
    *,
    inputs: str = "x, , , sizes",
    shape: str = "N, 3, 9, 8",
    made: str = "N, 3, 5, 4",
    constants: str = "int64[2] sizes = {5, 4}",
    dtype: str = "float",
) -> str:
    return f"""
        <ir_version: 9, opset_import: ["" : 18]>
        g ({dtype}[{shape}] x) => ({dtype}[{made}] y) <{constants}>
        {{
            [resize] y = Resize <{attrs}> ({inputs})
        }}"""


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


CROP = 'coordinate_transformation_mode = "tf_crop_and_resize"'
CASES = [
    resize('mode = "linear", antialias = 1, axes = [2, 3]'),
    resize('mode = "cubic", antialias = 1, axes = [2, 3]'),
    resize(
        'mode = "linear", antialias = 1',
        inputs="x, , scales",
        constants="float[4] scales = {1, 1, 0.6, 0.5}",
    ),
    resize(
        'mode = "linear", coordinate_transformation_mode = "half_pixel_symmetric", axes = [2, 3]'
    ),
    resize(
        f'mode = "linear", {CROP}',
        inputs="x, roi, , sizes",
        constants="float[8] roi = {0, 0, 0.4, 0.2, 1, 1, 0.9, 0.8}, int64[4] sizes = {2, 3, 5, 4}",
        shape="2, 3, 9, 8",
        made="2, 3, 5, 4",
    ),
]


@pytest.mark.parametrize("source", CASES)
def test_each_axis_is_a_product(source: str) -> None:
    before, after, report = rewrite(source, TurnResizesIntoProducts())
    assert ops(after) == ["MatMul", "MatMul"]
    assert set(report.merged.values()) == {("resize",)}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


def test_an_axis_that_keeps_its_extent_needs_none() -> None:
    source = resize(
        'mode = "linear", antialias = 1, axes = [2, 3]',
        constants="int64[2] sizes = {9, 4}",
        made="N, 3, 9, 4",
    )
    before, after, _ = rewrite(source, TurnResizesIntoProducts())
    assert ops(after) == ["MatMul"]
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            resize('axes = [2, 3], keep_aspect_ratio_policy = "not_larger"', made="N, 3, P, Q"),
            "its sizes keep the aspect ratio",
        ),
        (
            resize("axes = [2, 3]", shape="N, 3, H, 8"),
            "it resizes more than the last two axes, or one that is not static",
        ),
        (
            resize("axes = [2, 3], extrapolation_value = 2.0"),
            "it extrapolates with another number than 0",
        ),
        (
            resize("axes = [2, 3]", dtype="double"),
            "the shape of what it resizes is not known, or it is no float32 or float16",
        ),
    ],
)
def test_what_it_leaves_alone(source: str, reason: str) -> None:
    _, after, report = rewrite(source, TurnResizesIntoProducts())
    assert ops(after) == ["Resize"]
    assert report.skipped == {"resize": reason}


@pytest.mark.parametrize("source", [CASES[0], CASES[3], CASES[4]])
def test_tensorrt_takes_what_it_refused(tensorrt: Builder, source: str) -> None:
    before, after, _ = rewrite(source, TurnResizesIntoProducts())
    is_dynamic = before.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    profiles = ({"x": ((1, 3, 9, 8), (4, 3, 9, 8), (8, 3, 9, 8))},) if is_dynamic else ()
    assert tensorrt.refusal(before, profiles=profiles).startswith("refused")
    assert not tensorrt.refusal(after, profiles=profiles)
