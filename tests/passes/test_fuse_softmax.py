from __future__ import annotations

import numpy as np
import pytest
from builder_says import Builder
from graphs import assert_same_numbers, rewrite, run, text

from optc.passes.fuse_softmax import FuseSoftmax

HEAD = '<ir_version: 8, opset_import: ["" : 18]>'
AXES = "<int64[1] last = {-1}, int64[1] second = {1}, int64[1] third = {2}>"
SHIFTED = "m = ReduceMax(x, last) d = Sub(x, m) e = Exp(d) s = ReduceSum(e, third)"
FORMS = {
    "Softmax": f"{SHIFTED} [end] y = Div(e, s)",
    "LogSoftmax": f"{SHIFTED} l = Log(s) [end] y = Sub(d, l)",
}
WITH_RECIPROCAL = f"{SHIFTED} r = Reciprocal(s) [end] y = Mul(r, e)"


def graph(body: str, dtype: str = "float") -> str:
    return f"{HEAD} g ({dtype}[2,n,3] x) => ({dtype}[2,n,3] y) {AXES} {{ {body} }}"


@pytest.mark.parametrize("dtype", ["float", "float16", "double"])
@pytest.mark.parametrize("op", FORMS)
def test_what_is_spelt_out_becomes_one_node(op: str, dtype: str) -> None:
    before, after, report = rewrite(graph(FORMS[op], dtype), FuseSoftmax())
    assert (
        text(after)
        == f"""\
g ({dtype}[2,n,3] x) => ({dtype}[2,n,3] y) {{
   [end] y = {op} <axis: int = 2> (x)
}}"""
    )
    assert len(report.merged["end"]) == len(before.graph.node)
    tolerance = 2e-2 if dtype == "float16" else 1e-5
    assert_same_numbers(before, after, rtol=tolerance, atol=tolerance / 10, dynamic=20)


def test_a_reciprocal_may_stand_for_the_division() -> None:
    before, after, _ = rewrite(graph(WITH_RECIPROCAL), FuseSoftmax())
    assert [n.op_type for n in after.graph.node] == ["Softmax"]
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", FORMS)
def test_large_and_infinite_values_come_out_as_before(op: str) -> None:
    before, after, _ = rewrite(graph(FORMS[op]), FuseSoftmax())
    special = np.array(
        [
            [[1e4, -1e4, 1e4], [-np.inf, 0, 1], [np.nan, 0, 1]],
            [[np.inf, 0, 1], [-np.inf, -np.inf, -np.inf], [3e38, -3e38, 0]],
        ],
        np.float32,
    )
    found, expected = run(after, {"x": special})["y"], run(before, {"x": special})["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_axes_are_attributes_in_older_models() -> None:
    before, after, _ = rewrite(
        """<ir_version: 8, opset_import: ["" : 9]> g (float[2,4] x) => (float[2,4] y) {
            m = ReduceMax<axes=[1]>(x) d = Sub(x, m) e = Exp(d)
            s = ReduceSum<axes=[1]>(e) y = Div(e, s)
        }""",
        FuseSoftmax(),
    )
    assert [n.op_type for n in after.graph.node] == ["Softmax"]
    assert_same_numbers(before, after, rtol=1e-5)


def test_all_axes_of_a_vector_are_its_last() -> None:
    before, after, _ = rewrite(
        f"""{HEAD} g (float[n] x) => (float[n] y)
        {{ m = ReduceMax(x) d = Sub(x, m) e = Exp(d) s = ReduceSum(e) y = Div(e, s) }}""",
        FuseSoftmax(),
    )
    assert [n.op_type for n in after.graph.node] == ["Softmax"]
    assert_same_numbers(before, after, rtol=1e-5, dynamic=7)


SKIPPED = {
    "another axis": SHIFTED.replace("last", "second").replace("third", "second"),
    "two axes": SHIFTED.replace("third", "second"),
    "all axes": SHIFTED.replace("(e, third)", "(e)"),
    "nothing": SHIFTED.replace("ReduceSum(", "ReduceSum<noop_with_empty_axes=1>(").replace(
        "(e, third)", "(e)"
    ),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_other_axes_are_left_alone(name: str) -> None:
    _, _, report = rewrite(graph(f"{SKIPPED[name]} [end] y = Div(e, s)"), FuseSoftmax())
    assert report.skipped == {"end": "it is not over the last axis alone"}


@pytest.mark.parametrize(
    "body",
    [
        "e = Exp(x) s = ReduceSum(e, last) y = Div(e, s)",
        "m = ReduceMin(x, last) d = Sub(x, m) e = Exp(d) s = ReduceSum(e, last) y = Div(e, s)",
        "m = ReduceMax(x, last) d = Sub(m, x) e = Exp(d) s = ReduceSum(e, last) y = Div(e, s)",
        "m = ReduceMax(x, last) d = Sub(x, m) e = Exp(d) s = ReduceMax(e, last) y = Div(e, s)",
        "p = Softmax<axis=-1>(x) y = Log(p)",
    ],
)
def test_what_differs_on_some_input_is_left_alone(body: str) -> None:
    _, _, report = rewrite(graph(body), FuseSoftmax())
    assert not report.rewritten
    assert not report.skipped


@pytest.mark.parametrize("point", ["m", "e", "s"])
def test_a_value_that_is_read_elsewhere_is_kept(point: str) -> None:
    _, _, report = rewrite(graph(FORMS["Softmax"]), FuseSoftmax(), points=(point,))
    assert report.skipped == {"end": "a value on the way has another reader"}


@pytest.mark.parametrize("op", FORMS)
def test_tensorrt_takes_it(tensorrt: Builder, op: str) -> None:
    _, after, _ = rewrite(graph(FORMS[op]).replace("[2,n,3]", "[2,5,64]"), FuseSoftmax())
    for compute_capability in ("7.5", "8.6", "8.9"):
        assert tensorrt.refusal(after, compute_capability=compute_capability) == ""
