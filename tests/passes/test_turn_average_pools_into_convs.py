"""`turn-average-pools-into-convs`: numbers of ONNX Runtime's pooling, and what the builder says."""

from __future__ import annotations

import pytest
from builder_says import Builder, profile_of
from graphs import assert_same_numbers, rewrite

from optc.passes.turn_average_pools_into_convs import TurnAveragePoolsIntoConvs

HEAD = '<ir_version: 9, opset_import: ["" : 19]>'
PASS = TurnAveragePoolsIntoConvs()

POOLS = {
    "no padding": ("N,3,8,9", "kernel_shape = [3, 2], dilations = [2, 3]"),
    "extents that vary": ("N,3,H,W", "kernel_shape = [2, 2], dilations = [2, 1]"),
    "padding that does not count": (
        "N,3,8,9",
        "kernel_shape = [3, 3], dilations = [2, 2], pads = [1, 2, 0, 1], strides = [2, 1]",
    ),
    "padding that counts": (
        "N,3,8,H",
        "kernel_shape = [3, 3], dilations = [2, 2], pads = [1, 1, 1, 1], count_include_pad = 1",
    ),
    "one axis": ("N,3,9", "kernel_shape = [3], dilations = [2], pads = [2, 2]"),
    "three axes": ("N,2,5,6,7", "kernel_shape = [2, 2, 2], dilations = [2, 3, 1]"),
}


@pytest.mark.parametrize("name", POOLS)
def test_it_is_what_onnxruntime_computes(name: str, tensorrt: Builder) -> None:
    dims, attributes = POOLS[name]
    out = ",".join("NABCDE"[: dims.count(",") + 1])
    before, after, report = rewrite(
        f"{HEAD} g (float[{dims}] x) => (float[{out}] y) {{ [n] y = AveragePool <{attributes}> (x) }}",
        PASS,
    )
    assert set(report.merged.values()) == {("n",)}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-6, dynamic=6)
    profiles = (profile_of(before, (5, 6, 8)),)
    assert tensorrt.refusal(before, profiles=profiles)
    assert tensorrt.refusal(after, profiles=profiles) == ""
    turing = tensorrt.refusal(after, profiles=profiles, compute_capability="7.5")
    assert ("FP32 3D convolution is not supported" in turing) == (name == "three axes")


def test_half_precision_stays_half_precision(tensorrt: Builder) -> None:
    before, after, _ = rewrite(
        HEAD
        + """g (float16[2,3,8,8] x) => (float16[2,3,6,6] y)
          { y = AveragePool <kernel_shape = [3, 3], dilations = [2, 2], pads = [1, 1, 1, 1]> (x) }""",
        PASS,
    )
    assert_same_numbers(before, after, rtol=4e-3, atol=2e-3)
    assert tensorrt.refusal(after) == ""


REFUSALS = {
    "its windows go beyond its padding": ("float[1,3,8,8]", "ceil_mode = 1"),
    "its spatial extents are not static, and its padding does not count": (
        "float[1,3,H,8]",
        "pads = [1, 1, 1, 1]",
    ),
    "its channels are not known": ("float[1,C,8,8]", ""),
    "it computes in float64": ("double[1,3,8,8]", ""),
    "a window of it lies in the padding altogether": (
        "float[1,3,2,8]",
        "pads = [3, 0, 3, 0], strides = [2, 1]",
    ),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_stays_says_why(reason: str) -> None:
    type_, more = REFUSALS[reason]
    attributes = ", ".join(filter(None, ["kernel_shape = [2, 2], dilations = [3, 3]", more]))
    result = type_.split("[")[0] + "[a,b,c,d]"
    _, _, report = rewrite(
        f"{HEAD} g ({type_} x) => ({result} y) {{ [n] y = AveragePool <{attributes}> (x) }}", PASS
    )
    assert report.skipped == {"n": reason}
    assert not report.rewritten


def test_what_has_no_dilations_is_left_alone() -> None:
    _, _, report = rewrite(
        HEAD
        + """g (float[1,3,8,8] x) => (float[1,3,7,7] y)
          { y = AveragePool <kernel_shape = [2, 2], dilations = [1, 1]> (x) }""",
        PASS,
    )
    assert not report.rewritten
    assert report.skipped == {}
