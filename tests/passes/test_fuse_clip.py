from __future__ import annotations

import numpy as np
import pytest
from builder_says import Builder
from graphs import assert_same_numbers, rewrite, run, text
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.passes.fuse_clip import FuseClip

HEAD = '<ir_version: 8, opset_import: ["" : 13]>'
NUMBERS = "<float zero = {0}, float one = {1}, float minus = {-1}, float[1] six = {6}>"


def graph(body: str, dtype: str = "float") -> str:
    return f"{HEAD} g ({dtype}[2,n] x) => ({dtype}[2,n] y) {NUMBERS} {{ {body} }}"


FORMS = {
    "Relu and Min": ("a = Relu(x) [last] y = Min(a, six)", 0, 6),
    "Min and Relu": ("a = Min(six, x) [last] y = Relu(a)", 0, 6),
    "Max and Min": ("a = Max(x, minus) [last] y = Min(six, a)", -1, 6),
    "Min and Max": ("a = Min(x, six) [last] y = Max(minus, a)", -1, 6),
    "Relu and Clip": ("a = Relu(x) [last] y = Clip(a, minus, one)", 0, 1),
    "Clip and Clip": ("a = Clip(x, minus, one) [last] y = Clip(a, zero)", 0, 1),
    "bounds that exclude each other": ("a = Max(x, six) [last] y = Min(a, one)", 1, 1),
}


@pytest.mark.parametrize("name", FORMS)
def test_two_become_one_clip(name: str) -> None:
    body, low, high = FORMS[name]
    before, after, report = rewrite(graph(body), FuseClip())
    assert (
        text(after)
        == f"""\
g (float[2,n] x) => (float[2,n] y)
   <float last_min =  {{{low}}}, float last_max =  {{{high}}}>
{{
   [last] y = Clip (x, last_min, last_max)
}}"""
    )
    assert report.merged == {"last": (f"{before.graph.node[0].op_type}_0", "last")}
    assert_same_numbers(before, after, rtol=0, dynamic=40)
    special = {"x": np.array([[np.nan, np.inf, -np.inf, -0.0]] * 2, np.float32)}
    np.testing.assert_array_equal(run(after, special)["y"], run(before, special)["y"])


def test_what_is_a_relu_becomes_one() -> None:
    before, after, _ = rewrite(graph("a = Max(x, minus) [last] y = Relu(a)"), FuseClip())
    assert [(n.op_type, list(n.input)) for n in after.graph.node] == [("Relu", ["x"])]
    assert_same_numbers(before, after, rtol=0)


@given(
    bounds=st.lists(
        st.tuples(st.sampled_from(["Max", "Min", "Relu", "Clip"]), st.integers(-3, 3)),
        min_size=2,
        max_size=5,
    )
)
@settings(max_examples=40, deadline=None)
def test_any_chain_becomes_one_node(bounds: list[tuple[str, int]]) -> None:
    lines, numbers = [], []
    for index, (op, bound) in enumerate(bounds):
        numbers += [f"float b{index} = {{{bound}}}", f"float c{index} = {{{bound + 2}}}"]
        more = {"Relu": "", "Clip": f", b{index}, c{index}"}.get(op, f", b{index}")
        lines.append(f"t{index + 1} = {op}(t{index}{more})")
    before, after, _ = rewrite(
        f"{HEAD} g (float[99] t0) => (float[99] t{len(bounds)}) "
        f"<{', '.join(numbers)}> {{ {' '.join(lines)} }}",
        FuseClip(),
    )
    assert len(after.graph.node) == 1
    assert_same_numbers(before, after, rtol=0)


def test_bounds_are_attributes_before_opset_11() -> None:
    before, after, _ = rewrite(
        f"""<ir_version: 8, opset_import: ["" : 8]> g (float[9] x) => (float[9] y) {NUMBERS}
        {{ a = Relu(x) y = Min(a, six) }}""",
        FuseClip(),
    )
    assert [len(n.attribute) for n in after.graph.node] == [2]
    assert_same_numbers(before, after, rtol=0)


@pytest.mark.parametrize("dtype", ["double", "float16"])
def test_bounds_have_the_type_of_the_value(dtype: str) -> None:
    six = "17920" if dtype == "float16" else "6"  # the parser takes the bits of a float16
    before, after, _ = rewrite(
        f"""{HEAD} g ({dtype}[2,9] x) => ({dtype}[2,9] y) <{dtype} six = {{{six}}}>
        {{ a = Relu(x) y = Min(a, six) }}""",
        FuseClip(),
    )
    assert [n.op_type for n in after.graph.node] == ["Clip"]
    assert_same_numbers(before, after, rtol=0)


@pytest.mark.parametrize(
    "body",
    [
        "y = Max(x, zero)",
        "a = Relu(x) y = Add(a, six)",
        "a = Relu(x) y = Min(a, six, one)",
        "a = Abs(x) b = Relu(x) y = Min(a, b)",
        "a = Relu(x) y = Clip(a, one, zero)",
    ],
)
def test_what_bounds_nothing_twice_is_left_alone(body: str) -> None:
    _, _, report = rewrite(graph(body), FuseClip())
    assert not report.rewritten
    assert not report.skipped


def test_integers_are_left_alone() -> None:
    _, _, report = rewrite(
        f"""{HEAD} g (int64[2] x) => (int64[2] y) <int64 one = {{1}}, int64 six = {{6}}>
        {{ a = Max(x, one) y = Min(a, six) }}""",
        FuseClip(),
    )
    assert not report.rewritten


def test_a_value_in_the_middle_that_is_read_elsewhere_is_kept() -> None:
    _, _, report = rewrite(graph("a = Relu(x) [last] y = Min(a, six)"), FuseClip(), points=("a",))
    assert report.skipped == {"last": "the value in the middle has another reader"}


def test_a_bound_that_widens_is_left_alone() -> None:
    _, _, report = rewrite(
        f"""{HEAD} g (float[2] x) => (float[1,2] y) <float[1,1] six = {{6}}>
        {{ a = Relu(x) [last] y = Min(a, six) }}""",
        FuseClip(),
    )
    assert report.skipped == {"last": "a constant of a higher rank widens it"}


def test_tensorrt_takes_it(tensorrt: Builder) -> None:
    _, after, _ = rewrite(
        graph("a = Relu(x) y = Min(a, six)").replace("[2,n]", "[2,64]"), FuseClip()
    )
    for compute_capability in ("7.5", "8.6", "8.9"):
        assert tensorrt.refusal(after, compute_capability=compute_capability) == ""


@pytest.mark.parametrize(("op", "number"), [("Min", "-inf"), ("Max", "inf")])
def test_bounds_that_leave_nothing_of_the_input_stay(op: str, number: str) -> None:
    source = f"""
        g (float[3] x) => (float[3] z) <float i = {{{number}}}>
        {{
            [relu]  t = Relu (x)
            [bound] z = {op} (t, i)
        }}"""
    _, after, _ = rewrite(HEAD + source, FuseClip())
    assert [node.op_type for node in after.graph.node] == ["Relu", op]


def test_a_bound_that_an_old_clip_does_not_give_is_the_largest_number() -> None:
    source = """
        <ir_version: 8, opset_import: ["" : 10]>
        g (float[3] x) => (float[3] z)
        {
            [relu] t = Relu (x)
            [clip] z = Clip <min = 0.0> (t)
        }"""
    before, after, _ = rewrite(source, FuseClip())
    assert [node.op_type for node in after.graph.node] == ["Clip"]
    inputs = {"x": np.array([np.inf, -np.inf, 1], np.float32)}
    np.testing.assert_array_equal(run(after, inputs)["z"], run(before, inputs)["z"])
