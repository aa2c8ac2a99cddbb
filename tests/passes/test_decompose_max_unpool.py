"""`decompose-max-unpool`: windows of any kind, what it leaves alone, and the real builder."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from builder_says import Builder
from graphs import rewrite, run

from optc.passes.decompose_max_unpool import DecomposeMaxUnpool


def pooled(attrs: str, shape: str, made: str, *, dtype: str = "float", opset: int = 17) -> str:
    return f"""
        <ir_version: 8, opset_import: ["" : {opset}]>
        g ({dtype}[{shape}] x) => ({dtype}[{made}] y)
        {{
            [pool] p, i = MaxPool <{attrs}> (x)
            [unpool] y = MaxUnpool <{attrs}> (p, i)
        }}"""


def unpool(shape: str, made: str) -> str:
    return f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[{shape}] x, int64[{shape}] i) => (float[{made}] y)
        {{
            [unpool] y = MaxUnpool <kernel_shape = [2, 2], strides = [2, 2]> (x, i)
        }}"""


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize(
    ("attrs", "shape"),
    [
        ("kernel_shape = [2, 2], strides = [2, 2]", "N, 3, 6, 8"),
        ("kernel_shape = [2], strides = [2]", "2, 3, 8"),
        ("kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]", "2, 3, 7, 9"),
        ("kernel_shape = [2, 2]", "1, 2, 4, 4"),
        ("kernel_shape = [3, 2], strides = [3, 2]", "N, 2, H, W"),
    ],
)
@pytest.mark.parametrize("opset", [10, 17])
def test_what_was_pooled_goes_back_where_it_was(attrs: str, shape: str, opset: int) -> None:
    made = ", ".join("ABCD"[: shape.count(",") + 1])
    before, after, report = rewrite(pooled(attrs, shape, made, opset=opset), DecomposeMaxUnpool())
    assert "MaxUnpool" not in ops(after)
    assert "ScatterElements" in ops(after)
    assert set(report.merged.values()) == {("unpool",)}
    extents = {"N": 2, "H": 6, "W": 4}
    sizes = [int(extents.get(axis, axis)) for axis in shape.split(", ")]
    x = np.random.default_rng(0).standard_normal(sizes).astype(np.float32)
    expected, found = run(before, {"x": x})["y"], run(after, {"x": x})["y"]
    np.testing.assert_array_equal(found, expected)


def test_an_output_shape_is_left_alone() -> None:
    source = """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1,1,2,2] x, int64[1,1,2,2] i) => (float[1,1,5,5] y)
        <int64[4] shape = {1, 1, 5, 5}>
        {
            [unpool] y = MaxUnpool <kernel_shape = [2, 2], strides = [2, 2]> (x, i, shape)
        }"""
    _, after, report = rewrite(source, DecomposeMaxUnpool())
    assert ops(after) == ["MaxUnpool"]
    assert report.skipped == {"unpool": "runtimes do not agree on what an output_shape means"}


@pytest.mark.parametrize("is_dynamic", [False, True])
def test_tensorrt_takes_what_it_refused(tensorrt: Builder, is_dynamic: bool) -> None:
    shape, made = ("N, 3, H, 4", "N, 3, P, 8") if is_dynamic else ("2, 3, 4, 4", "2, 3, 8, 8")
    before, after, _ = rewrite(unpool(shape, made), DecomposeMaxUnpool())
    extents = ((1, 3, 4, 4), (2, 3, 4, 4), (4, 3, 8, 4))
    profiles = ({"x": extents, "i": extents},) if is_dynamic else ()
    assert tensorrt.refusal(before, profiles=profiles).startswith("refused")
    assert not tensorrt.refusal(after, profiles=profiles)
