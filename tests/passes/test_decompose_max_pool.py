"""`decompose-max-pool`: windows of any kind with their indices, and the real builder."""

from __future__ import annotations

import onnx
import pytest
from builder_says import Builder
from graphs import assert_same_numbers, rewrite

from optc.passes.decompose_max_pool import DecomposeMaxPool


def pool(
    attrs: str,
    shape: str,
    made: str,
    *,
    indices: bool = True,
    dtype: str = "float",
    opset: int = 17,
) -> str:
    second = f", int64[{made}] i" if indices else ""
    return f"""
        <ir_version: 8, opset_import: ["" : {opset}]>
        g ({dtype}[{shape}] x) => ({dtype}[{made}] y{second})
        {{
            [pool] y{", i" if indices else ""} = MaxPool <{attrs}> (x)
        }}"""


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize(
    ("attrs", "shape"),
    [
        ("kernel_shape = [2, 2], strides = [2, 2]", "N, 3, 6, 8"),
        ("kernel_shape = [2], strides = [2]", "2, 3, 9"),
        ("kernel_shape = [3, 3], strides = [2, 1], pads = [1, 1, 1, 0]", "2, 3, 7, 9"),
        ("kernel_shape = [3, 2], dilations = [2, 3], pads = [1, 0, 0, 1]", "N, 2, 8, 9"),
        ("kernel_shape = [2, 2, 2]", "2, 2, 4, 5, 3"),
    ],
)
@pytest.mark.parametrize("indices", [False, True])
@pytest.mark.parametrize("opset", [10, 17, 22])
def test_each_window_and_where_its_largest_is(
    attrs: str, shape: str, indices: bool, opset: int
) -> None:
    made = ", ".join("ABCDE"[: shape.count(",") + 1])
    source = pool(attrs, shape, made, indices=indices, opset=opset)
    before, after, report = rewrite(source, DecomposeMaxPool())
    if not indices and "dilations" not in attrs:
        assert ops(after) == ["MaxPool"]
        return
    assert "MaxPool" not in ops(after)
    assert ("ArgMax" in ops(after)) == indices
    assert set(report.merged.values()) == {("pool",)}
    assert_same_numbers(before, after, rtol=0)


def test_of_two_that_are_as_large_it_is_the_first() -> None:
    source = """
        <ir_version: 8, opset_import: ["" : 17]>
        g (int64[1,1,4,4] n) => (float[1,1,2,2] y, int64[1,1,2,2] i)
        {
            x = Cast <to = 1> (n)
            [pool] y, i = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x)
        }"""
    before, after, _ = rewrite(source, DecomposeMaxPool())
    assert_same_numbers(before, after, rtol=0)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            pool("kernel_shape = [2, 2]", "1, 2, H, 4", "1, 2, P, 3"),
            "its spatial extents are not static",
        ),
        (
            pool("kernel_shape = [2, 2], storage_order = 1", "1, 2, 4, 4", "1, 2, 3, 3"),
            "its indices count down the columns first",
        ),
        (
            pool("kernel_shape = [2, 2], ceil_mode = 1", "1, 2, 4, 4", "1, 2, 3, 3"),
            "its windows go beyond its padding",
        ),
        (
            pool("kernel_shape = [6, 6]", "1, 2, 8, 8", "1, 2, 3, 3"),
            "its windows have more than 32 elements",
        ),
        (
            pool("kernel_shape = [2, 2]", "1, 2, 4, 4", "1, 2, 3, 3", dtype="double"),
            "it computes in float64",
        ),
    ],
)
def test_what_it_leaves_alone(source: str, reason: str) -> None:
    _, after, report = rewrite(source, DecomposeMaxPool())
    assert ops(after) == ["MaxPool"]
    assert report.skipped == {"pool": reason}


@pytest.mark.parametrize("indices", [False, True])
def test_tensorrt_takes_what_it_refused(tensorrt: Builder, indices: bool) -> None:
    attrs = "kernel_shape = [2, 2], strides = [2, 2], dilations = [2, 2], pads = [1, 1, 0, 0]"
    before, after, _ = rewrite(
        pool(attrs, "N, 3, 8, 8", "N, 3, 4, 4", indices=indices), DecomposeMaxPool()
    )
    profiles = ({"x": ((1, 3, 8, 8), (4, 3, 8, 8), (8, 3, 8, 8))},)
    assert tensorrt.refusal(before, profiles=profiles).startswith("refused")
    assert not tensorrt.refusal(after, profiles=profiles)
