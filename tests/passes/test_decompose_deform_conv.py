"""`decompose-deform-conv`: each part of the operator, each refusal, and the real builder."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from builder_says import Builder
from graphs import assert_same_numbers, rewrite, run, seeded_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.optimizer.job import Profile
from optc.passes.decompose_deform_conv import DecomposeDeformConv

HEAD = '<ir_version: 9, opset_import: ["" : 19]>'


def deform_conv(
    *,
    x: tuple[object, ...] = ("N", 4, 9, 8),
    outputs: int = 6,
    kernel: tuple[int, int] = (3, 3),
    out: tuple[object, object] = (9, 8),
    group: int = 1,
    offset_group: int = 1,
    strides: tuple[int, int] = (1, 1),
    pads: tuple[int, int, int, int] = (1, 1, 1, 1),
    dilations: tuple[int, int] = (1, 1),
    bias: bool = True,
    mask: bool = True,
    dtype: str = "float",
    opset: int = 19,
) -> str:
    """Return a model of one DeformConv whose weights are 0.25, -0.25, 0.5..."""
    taps = kernel[0] * kernel[1]
    weight = (outputs, int(str(x[1])) // group, *kernel)
    values = _values([0.25 * (i % 7 - 3) for i in range(int(np.prod(weight)))], dtype)
    biases = _values([0.5 * i for i in range(outputs)], dtype)
    size = ", ".join(map(str, out))
    return (
        HEAD.replace("19", str(opset))
        + f"""
        g ({dtype}[{", ".join(map(str, x))}] x,
           {dtype}[{x[0]}, {offset_group * taps * 2}, {size}] offset
           {f",{dtype}[{x[0]}, {offset_group * taps}, {size}] mask" if mask else ""})
        => ({dtype}[{x[0]}, {outputs}, {size}] y)
        <{dtype}[{",".join(map(str, weight))}] w = {{{values}}}, {dtype}[{outputs}] b = {{{biases}}}>
        {{
            [dcn] y = DeformConv <group = {group}, offset_group = {offset_group},
                                  kernel_shape = [{kernel[0]}, {kernel[1]}],
                                  strides = [{strides[0]}, {strides[1]}],
                                  pads = [{", ".join(map(str, pads))}],
                                  dilations = [{dilations[0]}, {dilations[1]}]>
                                 (x, w, offset, {"b" if bias else ""}{", mask" if mask else ""})
        }}"""
    )


def _values(values: list[float], dtype: str) -> str:
    """Return the elements of a constant; onnx.parser wants the bits of a float16."""
    bits = np.array(values, np.float16).view(np.uint16)
    return ", ".join(map(str, bits if dtype == "float16" else values))


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def test_it_samples_weighs_and_sums() -> None:
    before, after, report = rewrite(deform_conv(), DecomposeDeformConv())
    assert ops(after) == [
        *("Gather", "Reshape", "Transpose", "Add", "Mul", "Add", "Reshape", "GridSample"),
        *("Reshape", "Mul", "Reshape", "Conv"),
    ]
    assert set(report.merged.values()) == {("dcn",)}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("opset", [19, 22])
def test_bias_and_mask_may_be_missing(bias: bool, mask: bool, opset: int) -> None:
    before, after, _ = rewrite(
        deform_conv(bias=bias, mask=mask, opset=opset), DecomposeDeformConv()
    )
    assert ops(after).count("Mul") == 1 + mask
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_kernel_stride_padding_dilation_and_groups(data: st.DataObject) -> None:
    def pair(low: int, high: int) -> tuple[int, int]:
        drawn = st.integers(low, high)
        return data.draw(st.tuples(drawn, drawn))

    kernel, strides, dilations = pair(1, 3), pair(1, 3), pair(1, 2)
    pads = pair(0, 2) + pair(0, 2)
    needed = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    size = [data.draw(st.integers(n, n + 5)) for n in needed]
    out = tuple(
        (size[axis] + pads[axis] + pads[axis + 2] - needed[axis]) // strides[axis] + 1
        for axis in (0, 1)
    )
    is_dynamic = data.draw(st.booleans())
    source = deform_conv(
        x=("N", 4, "H", "W") if is_dynamic else ("N", 4, *size),
        outputs=4,
        kernel=kernel,
        out=("P", "Q") if is_dynamic else out,
        group=data.draw(st.sampled_from([1, 2, 4])),
        offset_group=data.draw(st.sampled_from([1, 2, 4])),
        strides=strides,
        pads=(pads[0], pads[1], pads[2], pads[3]),
        dilations=dilations,
        bias=data.draw(st.booleans()),
        mask=data.draw(st.booleans()),
    )
    before, after, _ = rewrite(source, DecomposeDeformConv())
    rng = np.random.default_rng(0)
    batch = data.draw(st.integers(1, 3))
    extents = {"N": batch, "H": size[0], "W": size[1], "P": out[0], "Q": out[1]}
    feeds = {
        info.name: rng.normal(
            size=[d.dim_value or extents[d.dim_param] for d in info.type.tensor_type.shape.dim]
        ).astype(np.float32)
        for info in before.graph.input
    }
    expected, found = run(before, feeds)["y"], run(after, feeds)["y"]
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


def test_float16_is_sampled_in_float32() -> None:
    before, after, _ = rewrite(deform_conv(dtype="float16"), DecomposeDeformConv())
    assert ops(after).count("Cast") == 3
    feeds = seeded_inputs(before)
    wide, _, _ = rewrite(deform_conv(), DecomposeDeformConv())
    expected = run(wide, {name: value.astype(np.float32) for name, value in feeds.items()})["y"]
    found = run(after, feeds)["y"]
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=2e-2)


def test_weights_that_are_no_constant_are_reshaped() -> None:
    source = """
        g (float[2,3,5,5] x, float[2,3,3,3] w, float[2,18,5,5] offset) => (float[2,2,5,5] y)
        {
            [dcn] y = DeformConv <pads = [1, 1, 1, 1]> (x, w, offset)
        }"""
    before, after, _ = rewrite(HEAD + source, DecomposeDeformConv())
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (deform_conv(dtype="double"), "it computes in float64"),
        (
            HEAD
            + """
            g (float[1,2,8] x, float[2,2,3] w, float[1,3,6] offset) => (float[1,2,6] y)
            { [dcn] y = DeformConv (x, w, offset) }""",
            "it has 1 spatial axes, TensorRT samples along two",
        ),
        (
            HEAD
            + """
            g (float[1,2,8,8] x, float[2,2,R,3] w, float[1,18,6,6] offset) => (float[1,2,6,6] y)
            { [dcn] y = DeformConv (x, w, offset) }""",
            "its channels or its kernel are not known",
        ),
    ],
)
def test_what_it_leaves_alone(source: str, reason: str) -> None:
    before, after, report = rewrite(source, DecomposeDeformConv())
    assert ops(after) == ops(before)
    assert report.skipped == {"dcn": reason}


def profile(model: onnx.ModelProto, **ranges: tuple[int, int, int]) -> Profile:
    """Return the profile that gives each named axis its smallest, usual and largest extent."""
    return {
        info.name: tuple(  # type: ignore[dict-item]  # three of them
            tuple(
                ranges[d.dim_param][at] if d.dim_param else d.dim_value
                for d in info.type.tensor_type.shape.dim
            )
            for at in range(3)
        )
        for info in model.graph.input
    }


@pytest.mark.parametrize(
    ("compute_capability", "dtype", "is_dynamic"),
    [
        ("7.5", "float", True),
        ("8.6", "float", False),
        ("8.6", "float16", True),
        ("8.9", "float", True),
    ],
)
def test_tensorrt_takes_what_it_refused(
    tensorrt: Builder, compute_capability: str, dtype: str, is_dynamic: bool
) -> None:
    shape: dict[str, Any] = {"x": ("N", 4, "H", "W"), "out": ("H", "W")} if is_dynamic else {}
    before, after, _ = rewrite(
        deform_conv(dtype=dtype, group=2, offset_group=2, **shape), DecomposeDeformConv()
    )
    ranges = profile(before, N=(1, 4, 8), H=(9, 16, 32), W=(9, 16, 32))
    asked = {"compute_capability": compute_capability, "profiles": (ranges,)}
    assert tensorrt.refusal(before, **asked).startswith("refused")
    assert not tensorrt.refusal(after, **asked)
