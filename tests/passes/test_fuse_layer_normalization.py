"""`fuse-layer-normalization`: each way of writing it, each refusal, types and shapes."""

from __future__ import annotations

import numpy as np
import pytest
from builder_says import Builder
from graphs import assert_same_numbers, parsed, rewrite, run, text
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, helper

from optc.passes.fuse_layer_normalization import FuseLayerNormalization
from optc.passes.graph import export_model, import_model
from optc.passes.pipeline import PassRecord, optimise

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
GRAPH = "g (float[N,2,3] x) => (float[N,2,3] y)"
CONSTANTS = """
    <float[3] s = {1, 2, 3}, float[3] b = {10, 20, 30}, float eps = {0.25},
     float one = {1}, float two = {2}, float half = {0.5}, float minus_half = {-0.5}>"""
UP_TO_SUM = """
    [mean] m = ReduceMean <axes = [-1]> (x)
    [sub]  d = Sub (x, m)
    [pow]  p = Pow (d, two)
    [var]  v = ReduceMean <axes = [2]> (p)
    [add]  e = Add (v, eps)
"""
UP_TO_ROOT = UP_TO_SUM + "[root] r = Sqrt (e)"
PARTS = ("mean", "sub", "pow", "var", "add", "root")
WITH_BOTH = """\
g (float[N,2,3] x) => (float[N,2,3] y)
   <float[3] s =  {1,2,3}, float[3] b =  {10,20,30}>
{
   [y] y = LayerNormalization <axis: int = -1, epsilon: float = 0.25> (x, s, b)
}"""


def source(nodes: str, *, graph: str = GRAPH, constants: str = CONSTANTS, head: str = HEAD) -> str:
    return f"{head} {graph} {constants} {{ {nodes} }}"


def fused(nodes: str, **others: str) -> tuple[ModelProto, ModelProto, PassRecord]:
    return rewrite(source(nodes, **others), FuseLayerNormalization())


def ops(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def assert_close(before: ModelProto, after: ModelProto) -> None:
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


# --- the ways of writing it -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "quotient",
    [
        "[root] r = Sqrt (e) [div] q = Div (d, r)",
        "[root] r = Pow (e, half) [div] q = Div (d, r)",
        "[root] r = Sqrt (e) [inv] i = Reciprocal (r) [div] q = Mul (d, i)",
        "[root] r = Sqrt (e) [inv] i = Div (one, r) [div] q = Mul (i, d)",
        "[root] r = Pow (e, minus_half) [div] q = Mul (d, r)",
    ],
)
def test_however_it_divides_it_is_fused(quotient: str) -> None:
    before, after, report = fused(
        UP_TO_SUM + quotient + "[scale] t = Mul (s, q) [y] y = Add (t, b)"
    )
    assert text(after) == WITH_BOTH
    [(name, parts)] = report.merged.items()
    assert name == "y"
    assert set(parts) == {node.name for node in before.graph.node}
    assert_close(before, after)


def test_a_square_may_be_a_product_and_every_operand_may_stand_on_either_side() -> None:
    before, after, _ = fused(
        """
        m = ReduceMean <axes = [-1]> (x)
        d = Sub (x, m)
        p = Mul (d, d)
        v = ReduceMean <axes = [-1]> (p)
        e = Add (eps, v)
        r = Sqrt (e)
        q = Div (d, r)
        t = Mul (q, s)
        [y] y = Add (b, t)"""
    )
    assert text(after) == WITH_BOTH
    assert_close(before, after)


def test_a_scale_that_goes_into_the_inverse_first_is_taken_in() -> None:
    before, after, _ = fused(
        UP_TO_ROOT
        + """
        i = Reciprocal (r)
        g = Mul (i, s)
        t = Mul (d, g)
        [y] y = Add (t, b)"""
    )
    assert text(after) == WITH_BOTH
    assert_close(before, after)


def test_the_form_of_tensorflow_is_fused() -> None:
    before, after, report = fused(
        UP_TO_ROOT
        + """
        [inv] i = Reciprocal (r)
        [g]   g = Mul (i, s)
        [xg]  xg = Mul (x, g)
        [mg]  mg = Mul (m, g)
        [sh]  sh = Sub (b, mg)
        [y]   y = Add (xg, sh)"""
    )
    assert text(after) == WITH_BOTH
    assert report.merged == {"y": (*PARTS, "inv", "g", "xg", "mg", "sh", "y")}
    assert_close(before, after)


@pytest.mark.parametrize("shift", ["sh = Add (nr, b)", "sh = Add (b, nr)"])
def test_the_form_of_keras_is_fused(shift: str) -> None:
    before, after, _ = fused(
        UP_TO_ROOT
        + "i = Reciprocal (r) g = Mul (i, s) n = Neg (m) nr = Mul (n, g)"
        + f"{shift} xg = Mul (x, g) [y] y = Add (xg, sh)"
    )
    assert text(after) == WITH_BOTH
    assert_close(before, after)


def test_the_form_of_keras_without_a_bias_is_fused() -> None:
    before, after, _ = fused(
        UP_TO_ROOT
        + "i = Reciprocal (r) g = Mul (i, s) n = Neg (m) nr = Mul (n, g) xg = Mul (x, g)"
        + "[y] y = Add (xg, nr)"
    )
    assert ops(after) == ["LayerNormalization"]
    assert len(after.graph.node[0].input) == 2
    assert_close(before, after)


def test_the_form_of_tensorflow_without_a_scale_gets_ones() -> None:
    before, after, _ = fused(
        UP_TO_ROOT
        + "i = Reciprocal (r) xi = Mul (x, i) mi = Mul (m, i) sh = Sub (b, mi) [y] y = Add (sh, xi)"
    )
    assert (
        text(after)
        == """\
g (float[N,2,3] x) => (float[N,2,3] y)
   <float[3] y_scale =  {1,1,1}, float[3] b =  {10,20,30}>
{
   [y] y = LayerNormalization <axis: int = -1, epsilon: float = 0.25> (x, y_scale, b)
}"""
    )
    assert_close(before, after)


def test_without_scale_and_bias_the_quotient_is_the_operator() -> None:
    before, after, report = fused(UP_TO_ROOT + "[y] y = Div (d, r)")
    assert (
        text(after)
        == """\
g (float[N,2,3] x) => (float[N,2,3] y)
   <float[3] y_scale =  {1,1,1}>
{
   [y] y = LayerNormalization <axis: int = -1, epsilon: float = 0.25> (x, y_scale)
}"""
    )
    assert report.merged == {"y": (*PARTS, "y")}
    assert_close(before, after)


def test_a_bias_alone_is_taken_in_and_one_number_is_spread() -> None:
    before, after, _ = fused(UP_TO_ROOT + "q = Div (d, r) [y] y = Add (q, two)")
    assert (
        text(after)
        == """\
g (float[N,2,3] x) => (float[N,2,3] y)
   <float[3] y_scale =  {1,1,1}, float[3] y_bias =  {2,2,2}>
{
   [y] y = LayerNormalization <axis: int = -1, epsilon: float = 0.25> (x, y_scale, y_bias)
}"""
    )
    assert_close(before, after)


def test_two_last_axes_are_one_normalised_shape_and_leading_ones_are_dropped() -> None:
    before, after, _ = fused(
        """
        m = ReduceMean <axes = [-1, -2]> (x)
        d = Sub (x, m)
        p = Pow (d, two)
        v = ReduceMean <axes = [1, 2]> (p)
        e = Add (v, eps)
        r = Sqrt (e)
        q = Div (d, r)
        t = Mul (q, s)
        [y] y = Add (t, b)""",
        constants="<float[1,2,1] s = {2, 3}, float[2,3] b = {1, 2, 3, 4, 5, 6}, float two = {2},"
        " float[1] eps = {0.25}>",
    )
    assert (
        text(after)
        == """\
g (float[N,2,3] x) => (float[N,2,3] y)
   <float[2,3] y_scale =  {2,2,2,3,3,3}, float[2,3] b =  {1,2,3,4,5,6}>
{
   [y] y = LayerNormalization <axis: int = -2, epsilon: float = 0.25> (x, y_scale, b)
}"""
    )
    assert_close(before, after)


def test_axes_may_be_an_input_or_left_out() -> None:
    head = '<ir_version: 9, opset_import: ["" : 18]>'
    before, after, _ = fused(
        """
        m = ReduceMean (x)
        d = Sub (x, m)
        p = Pow (d, two)
        v = ReduceMean <noop_with_empty_axes = 0> (p, all)
        e = Add (v, eps)
        r = Sqrt (e)
        [y] y = Div (d, r)""",
        graph="g (float[2,3] x) => (float[2,3] y)",
        constants="<int64[2] all = {1, 0}, float two = {2}, float eps = {0.25}>",
        head=head,
    )
    assert helper.get_node_attr_value(after.graph.node[0], "axis") == -2
    assert_close(before, after)


def test_an_older_model_is_raised_to_the_opset_that_has_it() -> None:
    before, after, _ = fused(
        UP_TO_ROOT + "q = Div (d, r) t = Mul (q, s) [y] y = Add (t, b)",
        head='<ir_version: 8, opset_import: ["" : 12]>',
    )
    assert text(after) == WITH_BOTH
    assert after.opset_import[0].version == 17
    assert_close(before, after)


def test_a_model_that_cannot_be_raised_is_left_alone_and_says_so() -> None:
    before, after, report = fused(
        UP_TO_ROOT + "[div] y = Div (d, r)", head='<ir_version: 8, opset_import: ["" : 6]>'
    )
    assert ops(after) == ops(before)
    assert after.opset_import[0].version == 6
    assert report.skipped == {
        "div": "the model cannot be raised to opset 17, which has LayerNormalization"
    }


# --- scales and biases that are none ---------------------------------------------------------------


def test_a_scale_that_is_computed_stays_behind() -> None:
    before, after, _ = fused(
        UP_TO_ROOT + "[div] q = Div (d, r) t = Mul (q, w) y = Add (t, b)",
        graph="g (float[N,2,3] x, float[N,1,3] w) => (float[N,2,3] y)",
    )
    assert ops(after) == ["LayerNormalization", "Mul", "Add"]
    assert_close(before, after)


def test_a_scale_along_another_axis_stays_behind() -> None:
    before, after, _ = fused(
        UP_TO_ROOT + "[div] q = Div (d, r) y = Mul (q, w)",
        constants=CONSTANTS[:-1] + ", float[2,1] w = {1, 2}>",
    )
    assert ops(after) == ["LayerNormalization", "Mul"]
    assert_close(before, after)


def test_a_bias_that_adds_an_axis_stays_behind() -> None:
    before, after, _ = fused(
        UP_TO_ROOT + "[div] q = Div (d, r) y = Add (q, w)",
        graph="g (float[N,2,3] x) => (float[1,N,2,3] y)",
        constants=CONSTANTS[:-1] + ", float[1,1,1,3] w = {1, 2, 3}>",
    )
    assert ops(after) == ["LayerNormalization", "Add"]
    assert_close(before, after)


def test_a_quotient_that_is_read_twice_or_kept_ends_the_pattern() -> None:
    for graph, rest in (
        (GRAPH[:-1] + ", float[N,2,3] z)", "y = Mul (q, s) z = Add (q, b)"),
        (GRAPH[:-1] + ", float[N,2,3] q)", "y = Mul (q, s)"),
    ):
        before, after, report = fused(UP_TO_ROOT + "[div] q = Div (d, r)" + rest, graph=graph)
        assert ops(after)[0] == "LayerNormalization"
        assert "Mul" in ops(after)
        assert report.merged == {"div": (*PARTS, "div")}
        assert_close(before, after)


def test_two_that_share_a_scale_are_both_fused() -> None:
    before, after, _ = fused(
        UP_TO_ROOT
        + "q = Div (d, r) z = Mul (q, s)"
        + "m1 = ReduceMean <axes = [-1]> (z) d1 = Sub (z, m1) p1 = Pow (d1, two)"
        + "v1 = ReduceMean <axes = [-1]> (p1) e1 = Add (v1, eps) r1 = Sqrt (e1)"
        + "q1 = Div (d1, r1) y = Mul (q1, s)"
    )
    assert ops(after) == ["LayerNormalization", "LayerNormalization"]
    assert_close(before, after)


# --- types ----------------------------------------------------------------------------------------

BITS: dict[str, dict[float, float]] = {
    "float": {0.25: 0.25, 1: 1, 2: 2, 3: 3},
    "float16": {0.25: 0x3400, 1: 0x3C00, 2: 0x4000, 3: 0x4200},
    "bfloat16": {0.25: 0x3E80, 1: 0x3F80, 2: 0x4000, 3: 0x4040},
}
"""Type -> number -> how it is written in the text of a model."""


def constants_of(dtype: str) -> str:
    """Return the constants in another type; the bias is the scale backwards."""
    bits = BITS[dtype]
    return (
        f"<{dtype}[3] s = {{{bits[1]}, {bits[2]}, {bits[3]}}},"
        f" {dtype}[3] b = {{{bits[3]}, {bits[2]}, {bits[1]}}},"
        f" {dtype} two = {{{bits[2]}}}, {dtype} eps = {{{bits[0.25]}}}>"
    )


HALVES = (
    constants_of("float16").partition(", float16 two")[0] + ", float two = {2}, float eps = {0.25}>"
)
HALF_GRAPH = "g (float16[N,2,3] x) => (float16[N,2,3] y)"
SCALED = "t = Mul (h, s) [y] y = Add (t, b)"
IN_HALF = """\
g (float16[N,2,3] x) => (float16[N,2,3] y)
   <float16[3] s =  {15360,16384,16896}, float16[3] b =  {16896,16384,15360}>
{
   [y] y = LayerNormalization <axis: int = -1, epsilon: float = 0.25> (x, s, b)
}"""


def half(nodes: str, graph: str = HALF_GRAPH) -> tuple[ModelProto, ModelProto, PassRecord]:
    return fused(nodes, graph=graph, constants=HALVES)


def test_casts_before_and_behind_are_what_the_operator_does_itself() -> None:
    before, after, _ = half(
        "[up] x32 = Cast <to = 1> (x)"
        + UP_TO_ROOT.replace("(x", "(x32")
        + "q = Div (d, r) h = Cast <to = 10> (q)"
        + SCALED
    )
    assert text(after) == IN_HALF
    assert_same_numbers(before, after, rtol=2e-3, atol=2e-3)


def test_a_cast_of_the_deviation_as_pytorch_exports_it_is_taken_in() -> None:
    before, after, _ = half(
        "m = ReduceMean <axes = [-1]> (x) d16 = Sub (x, m) d = Cast <to = 1> (d16)"
        + UP_TO_ROOT.partition("[pow]")[2].join(("[pow]", ""))
        + "q = Div (d, r) h = Cast <to = 10> (q)"
        + SCALED
    )
    assert text(after) == IN_HALF
    assert_same_numbers(before, after, rtol=2e-3, atol=2e-3)


def test_the_float64_that_older_exports_compute_a_float16_in_is_not_kept() -> None:
    before, after, _ = fused(
        "m = ReduceMean <axes = [-1]> (x) d16 = Sub (x, m) d = Cast <to = 11> (d16)"
        + UP_TO_ROOT.partition("[pow]")[2].join(("[pow]", ""))
        + "q = Div (d, r) h = Cast <to = 10> (q)"
        + SCALED,
        graph=HALF_GRAPH,
        constants=HALVES.replace("float two", "double two").replace("float eps", "double eps"),
    )
    assert text(after) == IN_HALF
    assert_same_numbers(before, after, rtol=2e-3, atol=2e-3)


def test_a_widened_value_that_others_read_stays_and_so_does_the_cast_back() -> None:
    before, after, _ = half(
        "x32 = Cast <to = 1> (x)"
        + UP_TO_ROOT.replace("(x", "(x32")
        + "q = Div (d, r) h = Cast <to = 10> (q) z = Neg (x32)"
        + SCALED,
        HALF_GRAPH[:-1] + ", float[N,2,3] z)",
    )
    assert ops(after) == ["Cast", "LayerNormalization", "Cast", "Neg", "Mul", "Add"]
    assert_same_numbers(before, after, rtol=2e-3, atol=2e-3)


def test_a_cast_within_that_nothing_undoes_is_left_alone() -> None:
    _, _, report = half(
        "m = ReduceMean <axes = [-1]> (x) d16 = Sub (x, m) d = Cast <to = 1> (d16)"
        + UP_TO_ROOT.partition("[pow]")[2].join(("[pow]", ""))
        + "[y] y = Div (d, r)",
        "g (float16[N,2,3] x) => (float[N,2,3] y)",
    )
    assert report.skipped == {"y": "it makes float32 of float16"}


@pytest.mark.parametrize(("dtype", "stash"), [("float16", 10), ("bfloat16", 16)])
def test_what_computes_in_half_precision_still_does(dtype: str, stash: int) -> None:
    before, after, _ = fused(
        UP_TO_ROOT + "q = Div (d, r) t = Mul (q, s) [y] y = Add (t, b)",
        graph=GRAPH.replace("float", dtype),
        constants=constants_of(dtype),
    )
    [node] = after.graph.node
    assert helper.get_node_attr_value(node, "stash_type") == stash
    if dtype == "float16":  # onnxruntime has no arithmetic in bfloat16
        assert_same_numbers(before, after, rtol=1e-2, atol=1e-2)


def test_float64_is_left_alone() -> None:
    _, _, report = fused(
        UP_TO_ROOT + "[y] y = Div (d, r)",
        graph=GRAPH.replace("float", "double"),
        constants="<double two = {2}, double eps = {1}>",
    )
    assert report.skipped == {"y": "it computes in float64, the operator's epsilon is a float32"}


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    ["m", "d", "p", "v", "e", "r"],
)
def test_a_value_on_the_way_that_is_read_or_kept_is_refused(other: str) -> None:
    reason = {"y": "a value on the way has another reader"}
    shape = "[N,2,3]" if other in ("d", "p") else "[N,2,1]"
    nodes = UP_TO_ROOT + "[y] y = Div (d, r)"
    _, _, report = fused(nodes, graph=f"{GRAPH[:-1]}, float{shape} {other})")
    assert report.skipped == reason
    assert not report.merged
    _, after, report = fused(nodes + f"z = Neg ({other})", graph=f"{GRAPH[:-1]}, float{shape} z)")
    assert report.skipped == reason
    assert "LayerNormalization" not in ops(after)


def normalised(mean: str, variance: str) -> str:
    return f"""
        m = ReduceMean <{mean}> (x)
        d = Sub (x, m)
        p = Pow (d, two)
        v = ReduceMean <{variance}> (p)
        e = Add (v, eps)
        r = Sqrt (e)
        [y] y = Div (d, r)"""


@pytest.mark.parametrize(
    ("mean", "variance", "reason"),
    [
        ("axes = [1]", "axes = [1]", "it normalises the axes [1] of 3, not the last ones"),
        ("axes = [0, 2]", "axes = [0, 2]", "it normalises the axes [0, 2] of 3, not the last ones"),
        ("axes = [1, 2]", "axes = [2]", "mean and variance are taken over different axes"),
        ("axes = [0, 1, 2]", "keepdims = 1", "the extents that it normalises over are not fixed"),
    ],
)
def test_other_axes_are_refused(mean: str, variance: str, reason: str) -> None:
    _, _, report = fused(normalised(mean, variance))
    assert report.skipped == {"y": reason}


@pytest.mark.parametrize("value", ["0", "-1"])
def test_an_epsilon_that_is_not_positive_is_refused(value: str) -> None:
    constants = f"<float two = {{2}}, float eps = {{{value}}}>"
    _, _, report = fused(UP_TO_ROOT + "[y] y = Div (d, r)", constants=constants)
    assert report.skipped == {"y": f"its epsilon is {value}"}


def test_an_epsilon_that_adds_an_axis_is_refused() -> None:
    _, _, report = fused(
        UP_TO_ROOT + "[y] y = Div (d, r)",
        graph="g (float[N,2,3] x) => (float[1,N,2,3] y)",
        constants="<float two = {2}, float[1,1,1,1] eps = {1}>",
    )
    assert report.skipped == {"y": "its result has another shape than what it normalises"}


def test_a_scale_within_along_another_axis_is_refused() -> None:
    _, _, report = fused(
        UP_TO_ROOT + "i = Reciprocal (r) g = Mul (i, w) [y] y = Mul (d, g)",
        constants=CONSTANTS[:-1] + ", float[2,1] w = {1, 2}>",
    )
    assert report.skipped == {"y": "its scale or bias varies along other axes than the operator's"}


@pytest.mark.parametrize(
    "nodes",
    [
        UP_TO_ROOT.replace("two", "one") + "y = Div (d, r)",  # not a square
        UP_TO_ROOT.replace("Sub (x, m)", "Sub (m, x)") + "y = Div (x, r)",
        UP_TO_ROOT + "y = Div (x, r)",  # not what was squared
        UP_TO_ROOT + "y = Div (r, d)",
        UP_TO_SUM + "r = Pow (e, two) y = Div (d, r)",
        UP_TO_SUM + "r = Pow (e, minus_half) y = Div (d, r)",
        UP_TO_ROOT.replace("eps", "w") + "y = Div (d, r)",  # an epsilon that is computed
        UP_TO_ROOT.replace("Sub (x, m)", "Sub (x, w)") + "y = Div (d, r)",
        UP_TO_ROOT
        + "i = Reciprocal (r) a = Mul (x, i) c = Mul (m, i) z = Sub (c, b) y = Add (a, z)",
    ],
)
def test_what_only_looks_like_it_is_not_met(nodes: str) -> None:
    before, after, report = fused(
        nodes, graph="g (float[N,2,3] x, float[N,1,1] w) => (float[N,2,3] y)"
    )
    assert ops(after) == ops(before)
    assert not report.skipped


def test_a_variance_as_a_difference_of_squares_is_not_taken() -> None:
    before, after, report = fused(
        """
        m = ReduceMean <axes = [-1]> (x)
        p = Mul (x, x)
        q = ReduceMean <axes = [-1]> (p)
        mm = Mul (m, m)
        v = Sub (q, mm)
        e = Add (v, eps)
        r = Sqrt (e)
        d = Sub (x, m)
        y = Div (d, r)"""
    )
    assert ops(after) == ops(before)
    assert not report.skipped


# --- any shape ------------------------------------------------------------------------------------


@st.composite
def layers(draw: st.DrawFn) -> str:
    """Draw a layer normalisation over the last axes, with a scale and bias of any shape that fits."""
    rank = draw(st.integers(1, 4))
    dims = draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank))
    count = draw(st.integers(1, rank))
    axes = draw(st.permutations(range(rank - count, rank)))
    axes = [draw(st.sampled_from([axis, axis - rank])) for axis in axes]
    extents = dims[rank - count :]

    def constant(name: str) -> str:
        kept = draw(st.integers(0, count))
        shape = [draw(st.sampled_from([1, extent])) for extent in extents[count - kept :]]
        if kept == count:
            shape = [1] * draw(st.integers(0, rank - count)) + shape
        values = ", ".join(str(index % 7 - 3) for index in range(int(np.prod(shape, dtype=int))))
        kind = f"float[{','.join(map(str, shape))}]" if shape else "float"
        return f"{kind} {name} = {{{values}}}"

    lead = [draw(st.sampled_from([str(extent), f"D{i}"])) for i, extent in enumerate(dims)]
    shape = ",".join([*lead[: rank - count], *map(str, extents)])
    nodes = [
        *(f"m = ReduceMean <axes = {axes}> (x)", "d = Sub (x, m)", "p = Mul (d, d)"),
        *(f"v = ReduceMean <axes = {axes}> (p)", "e = Add (v, eps)", "r = Sqrt (e)"),
        *draw(
            st.sampled_from(
                [
                    ("y = Div (d, r)",),
                    ("q = Div (d, r)", "y = Mul (s, q)"),
                    ("q = Div (d, r)", "y = Add (q, b)"),
                    ("q = Div (d, r)", "t = Mul (q, s)", "y = Add (b, t)"),
                ]
            )
        ),
    ]
    return (
        f"{HEAD} g (float[{shape}] x) => (float[{shape}] y) "
        f"<{constant('s')}, {constant('b')}, float eps = {{0.25}}> {{ {' '.join(nodes)} }}"
    )


@given(layers())
@settings(max_examples=60, deadline=None)
def test_every_shape_gives_the_same_numbers(drawn: str) -> None:
    before, after, _ = rewrite(drawn, FuseLayerNormalization())
    assert ops(after) == ["LayerNormalization"]
    assert_close(before, after)


def test_an_empty_batch_and_what_is_no_number_come_out_the_same() -> None:
    before, after, _ = fused(UP_TO_ROOT + "q = Div (d, r) t = Mul (q, s) y = Add (t, b)")
    rows = np.array([[1, 2, np.inf], [np.nan, 0, 1]], np.float32)
    for x in (rows[None], np.zeros((0, 2, 3), np.float32), np.full((1, 2, 3), 7, np.float32)):
        np.testing.assert_allclose(run(after, {"x": x})["y"], run(before, {"x": x})["y"], rtol=1e-5)


def test_a_body_is_fused_with_a_scale_from_outside() -> None:
    model = parsed(
        HEAD
        + f"""
        g (float[2,2,3] x, bool c) => (float[2,2,3] y) {CONSTANTS}
        {{
            y = If (c) <
                then_branch = g1 () => (float[2,2,3] t) {{
                    {UP_TO_ROOT}
                    q = Div (d, r)
                    t = Mul (q, s)
                }},
                else_branch = g2 () => (float[2,2,3] f) {{ f = Mul (x, s) }}
            >
        }}"""
    )
    graph = import_model(model)
    optimise(graph, [FuseLayerNormalization()])
    after = export_model(graph, value_info=False)
    branch = helper.get_node_attr_value(after.graph.node[0], "then_branch")
    assert [node.op_type for node in branch.node] == ["LayerNormalization"]
    x = np.random.default_rng(0).standard_normal((2, 2, 3)).astype(np.float32)
    for c in (True, False):
        inputs = {"x": x, "c": np.array(c)}
        np.testing.assert_allclose(run(after, inputs)["y"], run(model, inputs)["y"], rtol=1e-5)


# --- TensorRT -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "stash"), [("float", 1), ("float16", 10), ("bfloat16", 16)])
def test_tensorrt_builds_what_is_fused(tensorrt: Builder, dtype: str, stash: int) -> None:
    _, after, _ = fused(
        UP_TO_ROOT + "q = Div (d, r) t = Mul (q, s) [y] y = Add (t, b)",
        graph=f"g ({dtype}[4,2,3] x) => ({dtype}[4,2,3] y)",
        constants=constants_of(dtype),
    )
    [node] = after.graph.node
    assert {a.name: a.i for a in node.attribute}.get("stash_type", 1) == stash
    assert tensorrt.refusal(after) == ""
