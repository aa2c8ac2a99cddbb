"""`fuse-rms-normalization`: what differs from `fuse-layer-normalization`, which shares its search."""

from __future__ import annotations

import numpy as np
import pytest
from builder_says import Builder
from graphs import assert_same_numbers, rewrite, run, text
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto

from optc.passes.fuse_rms_normalization import FuseRmsNormalization
from optc.passes.pipeline import PassRecord

HEAD = '<ir_version: 11, opset_import: ["" : 23]>'
GRAPH = "g (float[N,2,3] x) => (float[N,2,3] y)"
CONSTANTS = """
    <float[3] s = {1, 2, 3}, float eps = {0.25}, int64[1] last = {-1},
     float one = {1}, float two = {2}, float minus_half = {-0.5}>"""
UP_TO_SUM = "[pow] p = Pow (x, two) [var] v = ReduceMean (p, last) [add] e = Add (v, eps)"
UP_TO_ROOT = UP_TO_SUM + "[root] r = Sqrt (e)"
FUSED = """\
g (float[N,2,3] x) => (float[N,2,3] y)
   <float[3] s =  {1,2,3}>
{
   [y] y = RMSNormalization <axis: int = -1, epsilon: float = 0.25> (x, s)
}"""


def fused(
    nodes: str, *, graph: str = GRAPH, constants: str = CONSTANTS, head: str = HEAD
) -> tuple[ModelProto, ModelProto, PassRecord]:
    return rewrite(f"{head} {graph} {constants} {{ {nodes} }}", FuseRmsNormalization())


def ops(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def assert_close(before: ModelProto, after: ModelProto) -> None:
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "nodes",
    [
        UP_TO_ROOT + "q = Div (x, r) [y] y = Mul (q, s)",
        UP_TO_ROOT + "i = Reciprocal (r) q = Mul (x, i) [y] y = Mul (s, q)",
        UP_TO_ROOT + "i = Div (one, r) q = Mul (i, x) [y] y = Mul (s, q)",
        UP_TO_ROOT + "i = Reciprocal (r) g = Mul (s, i) [y] y = Mul (x, g)",
        UP_TO_SUM + "i = Pow (e, minus_half) q = Mul (x, i) [y] y = Mul (s, q)",
        UP_TO_ROOT.replace("Pow (x, two)", "Mul (x, x)") + "q = Div (x, r) [y] y = Mul (q, s)",
    ],
)
def test_however_it_is_written_it_is_fused(nodes: str) -> None:
    before, after, report = fused(nodes)
    assert text(after) == FUSED
    [(name, parts)] = report.merged.items()
    assert name == "y"
    assert len(parts) == len(before.graph.node)
    assert_close(before, after)


def test_without_a_scale_it_gets_ones_and_a_bias_stays_behind() -> None:
    before, after, report = fused(UP_TO_ROOT + "[div] q = Div (x, r) [bias] y = Add (q, s)")
    assert (
        text(after)
        == """\
g (float[N,2,3] x) => (float[N,2,3] y)
   <float[3] q_scale =  {1,1,1}, float[3] s =  {1,2,3}>
{
   [div] q = RMSNormalization <axis: int = -1, epsilon: float = 0.25> (x, q_scale)
   [bias] y = Add (q, s)
}"""
    )
    assert report.merged == {"div": ("pow", "var", "add", "root", "div")}
    assert_close(before, after)


def test_casts_before_and_behind_are_what_the_operator_does_itself() -> None:
    before, after, _ = fused(
        "x32 = Cast <to = 1> (x)"
        + UP_TO_ROOT.replace("(x", "(x32")
        + "i = Reciprocal (r) q = Mul (x32, i) h = Cast <to = 10> (q) [y] y = Mul (s, h)",
        graph="g (float16[N,2,3] x) => (float16[N,2,3] y)",
        constants=CONSTANTS.replace("float[3] s = {1, 2, 3}", "float16[3] s = {15360, 0, 16384}"),
    )
    assert (
        text(after)
        == """\
g (float16[N,2,3] x) => (float16[N,2,3] y)
   <float16[3] s =  {15360,0,16384}>
{
   [y] y = RMSNormalization <axis: int = -1, epsilon: float = 0.25> (x, s)
}"""
    )
    assert_same_numbers(before, after, rtol=2e-3, atol=2e-3)


def test_what_the_casts_enclose_is_fused_where_the_scale_is_a_float32() -> None:
    before, after, _ = fused(
        "x32 = Cast <to = 1> (x)"
        + UP_TO_ROOT.replace("(x", "(x32")
        + "q = Div (x32, r) t = Mul (q, s) y = Cast <to = 10> (t)",
        graph="g (float16[N,2,3] x) => (float16[N,2,3] y)",
    )
    assert ops(after) == ["Cast", "RMSNormalization", "Cast"]
    assert_same_numbers(before, after, rtol=2e-3, atol=2e-3)


def test_what_takes_the_mean_off_is_left_to_another_pass() -> None:
    before, after, report = fused(
        "m = ReduceMean (x, last) d = Sub (x, m)"
        + UP_TO_ROOT.replace("(x", "(d")
        + "q = Div (d, r) y = Mul (q, s)"
    )
    assert ops(after) == ops(before)
    assert not report.skipped


def test_what_subtracts_something_else_than_a_mean_is_not_met() -> None:
    before, after, report = fused(
        UP_TO_ROOT
        + "i = Reciprocal (r) xi = Mul (x, i) vi = Mul (v, i) sh = Sub (s, vi) y = Add (xi, sh)",
    )
    assert ops(after) == ops(before)
    assert report.skipped == {"Mul_5": "a value on the way has another reader"}


@pytest.mark.parametrize("other", ["p", "v", "e", "r"])
def test_a_value_on_the_way_that_is_kept_is_refused(other: str) -> None:
    shape = "[N,2,3]" if other == "p" else "[N,2,1]"
    _, after, report = fused(
        UP_TO_ROOT + "[y] y = Div (x, r)", graph=f"{GRAPH[:-1]}, float{shape} {other})"
    )
    assert "RMSNormalization" not in ops(after)
    assert report.skipped == {"y": "a value on the way has another reader"}


def test_an_axis_in_the_middle_is_refused() -> None:
    _, _, report = fused(
        UP_TO_ROOT + "[y] y = Div (x, r)",
        constants=CONSTANTS.replace("last = {-1}", "last = {-2}"),
    )
    assert report.skipped == {"y": "it normalises the axes [1] of 3, not the last ones"}


def test_axes_that_are_computed_and_a_mean_over_none_are_refused() -> None:
    _, _, report = fused(
        UP_TO_ROOT.replace("last", "axes") + "[y] y = Div (x, r)",
        graph="g (float[N,2,3] x, int64[1] axes) => (float[N,2,3] y)",
    )
    assert report.skipped == {"y": "the axes of a mean are computed at run time"}
    _, _, report = fused(
        UP_TO_ROOT.replace("(p, last)", "<noop_with_empty_axes = 1> (p)") + "[y] y = Div (x, r)"
    )
    assert report.skipped == {"y": "a mean is taken over no axis"}


def test_an_older_model_is_raised_to_the_opset_that_has_it() -> None:
    before, after, _ = fused(
        UP_TO_ROOT.replace("ReduceMean (p, last)", "ReduceMean <axes = [-1]> (p)")
        + "q = Div (x, r) [y] y = Mul (q, s)",
        head='<ir_version: 8, opset_import: ["" : 13]>',
    )
    assert text(after) == FUSED
    assert after.opset_import[0].version == 23
    assert_close(before, after)


@st.composite
def layers(draw: st.DrawFn) -> str:
    """Draw a root mean square normalisation over the last axes, with or without a scale."""
    dims = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    rank, count = len(dims), draw(st.integers(1, len(dims)))
    axes = ", ".join(str(axis) for axis in range(-count, 0))
    shape = [draw(st.sampled_from([1, extent])) for extent in dims[rank - count :]]
    values = ", ".join(str(index % 7 - 3) for index in range(int(np.prod(shape))))
    lead = [draw(st.sampled_from([str(extent), f"D{i}"])) for i, extent in enumerate(dims)]
    extents = ",".join([*lead[: rank - count], *map(str, dims[rank - count :])])
    end = draw(st.sampled_from(["y = Div (x, r)", "q = Div (x, r) y = Mul (q, s)"]))
    return (
        f"{HEAD} g (float[{extents}] x) => (float[{extents}] y)"
        f" <float[{','.join(map(str, shape))}] s = {{{values}}}, float eps = {{0.25}},"
        f" int64[{count}] last = {{{axes}}}>"
        f" {{ p = Mul (x, x) v = ReduceMean (p, last) e = Add (eps, v) r = Sqrt (e) {end} }}"
    )


@given(layers())
@settings(max_examples=40, deadline=None)
def test_every_shape_gives_the_same_numbers(drawn: str) -> None:
    before, after, _ = rewrite(drawn, FuseRmsNormalization())
    assert ops(after) == ["RMSNormalization"]
    assert_close(before, after)


def test_what_is_no_number_comes_out_the_same() -> None:
    before, after, _ = fused(UP_TO_ROOT + "q = Div (x, r) y = Mul (q, s)")
    x = np.array([[[1, 2, np.inf], [np.nan, 0, 1]], [[0, 0, 0], [1e30, 1, 0]]], np.float32)
    np.testing.assert_allclose(run(after, {"x": x})["y"], run(before, {"x": x})["y"], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_tensorrt_builds_what_is_fused(tensorrt: Builder, dtype: str) -> None:
    two, quarter = (2, 0.25) if dtype == "float" else (0x4000, 0x3400)
    _, after, _ = fused(
        UP_TO_ROOT + "q = Div (x, r) y = Mul (q, s)",
        graph=GRAPH.replace("float", dtype).replace("N", "4"),
        constants=f"<{dtype}[3] s = {{{two}, {two}, {two}}}, {dtype} two = {{{two}}},"
        f" {dtype} eps = {{{quarter}}}, int64[1] last = {{-1}}>",
    )
    assert ops(after) == ["RMSNormalization"]
    assert tensorrt.refusal(after) == ""
