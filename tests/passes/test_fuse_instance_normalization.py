"""`fuse-instance-normalization`: what is spelt out, what surrounds the operator, and what is left."""

from __future__ import annotations

import pytest
from builder_says import Builder
from graphs import assert_same_numbers, rewrite, text
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto

from optc.passes.fuse_instance_normalization import FuseInstanceNormalization
from optc.passes.pipeline import PassRecord

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
GRAPH = "g (float[N,3,H,W] x) => (float[N,3,H,W] y)"
CONSTANTS = """
    <float[3,1,1] s = {1, 2, 3}, float[1,3,1,1] b = {10, 20, 30}, float eps = {0.25},
     float two = {2}>"""
CORE = """
    [mean] m = ReduceMean <axes = [2, 3]> (x)
    [sub]  d = Sub (x, m)
    [pow]  p = Pow (d, two)
    [var]  v = ReduceMean <axes = [-1, -2]> (p)
    [add]  e = Add (v, eps)
    [root] r = Sqrt (e)
"""
PARTS = ("mean", "sub", "pow", "var", "add", "root")


def fused(
    nodes: str, *, graph: str = GRAPH, constants: str = CONSTANTS, head: str = HEAD
) -> tuple[ModelProto, ModelProto, PassRecord]:
    return rewrite(f"{head} {graph} {constants} {{ {nodes} }}", FuseInstanceNormalization())


def ops(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def assert_close(before: ModelProto, after: ModelProto) -> None:
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5, dynamic=4)


# --- what is spelt out ----------------------------------------------------------------------------


def test_means_over_all_spatial_axes_and_a_scale_per_channel_are_fused() -> None:
    before, after, report = fused(
        CORE + "[div] q = Div (d, r) [scale] t = Mul (q, s) [y] y = Add (t, b)"
    )
    assert (
        text(after)
        == """\
g (float[N,3,H,W] x) => (float[N,3,H,W] y)
   <float[3] y_scale =  {1,2,3}, float[3] y_bias =  {10,20,30}>
{
   [y] y = InstanceNormalization <epsilon: float = 0.25> (x, y_scale, y_bias)
}"""
    )
    assert report.merged == {"y": (*PARTS, "div", "scale", "y")}
    assert_close(before, after)


def test_without_scale_and_bias_it_gets_ones_and_zeros() -> None:
    before, after, _ = fused(CORE + "[y] y = Div (d, r)")
    assert (
        text(after)
        == """\
g (float[N,3,H,W] x) => (float[N,3,H,W] y)
   <float[3] y_scale =  {1,1,1}, float[3] y_bias =  {0,0,0}>
{
   [y] y = InstanceNormalization <epsilon: float = 0.25> (x, y_scale, y_bias)
}"""
    )
    assert_close(before, after)


def test_the_form_of_tensorflow_is_fused() -> None:
    before, after, _ = fused(
        CORE
        + "i = Reciprocal (r) g = Mul (i, s) xg = Mul (x, g) mg = Mul (m, g) sh = Sub (b, mg)"
        + "y = Add (xg, sh)"
    )
    assert ops(after) == ["InstanceNormalization"]
    assert_close(before, after)


def test_half_precision_stays_half_precision() -> None:
    before, after, _ = fused(
        CORE + "[y] y = Div (d, r)",
        graph=GRAPH.replace("float", "float16"),
        constants="<float16 two = {16384}, float16 eps = {13312}>",
    )
    assert ops(after) == ["InstanceNormalization"]
    assert_same_numbers(before, after, rtol=1e-2, atol=1e-2)


def test_a_group_normalisation_that_is_spelt_out_normalises_its_groups() -> None:
    before, after, _ = fused(
        "[in] z = Reshape (x, three)"
        + CORE.replace("(x", "(z").replace("[-1, -2]", "[2]").replace("[2, 3]", "[-1]")
        + "q = Div (d, r) t = Reshape (q, four) u = Mul (t, s) y = Add (u, b)",
        graph="g (float[2,4,5,6] x) => (float[2,4,5,6] y)",
        constants="<float[4,1,1] s = {1, 2, 3, 4}, float[4,1,1] b = {1, 2, 3, 4}, float two = {2},"
        " float eps = {0.25}, int64[3] three = {2, 2, 60}, int64[4] four = {2, 4, 5, 6}>",
    )
    # one axis of fixed extent and no scale of its own: as good a LayerNormalization
    assert ops(after) == ops(before)

    before, after, _ = fused(
        "[in] z = Reshape (x, five)"
        + CORE.replace("(x", "(z").replace("[-1, -2]", "[2, 3, 4]").replace("[2, 3]", "[2, 3, 4]")
        + "q = Div (d, r) t = Reshape (q, four) u = Mul (t, s) y = Add (u, b)",
        graph="g (float[2,4,5,6] x) => (float[2,4,5,6] y)",
        constants="<float[4,1,1] s = {1, 2, 3, 4}, float[4,1,1] b = {1, 2, 3, 4}, float two = {2},"
        " float eps = {0.25}, int64[5] five = {2, 2, 2, 5, 6}, int64[4] four = {2, 4, 5, 6}>",
    )
    assert ops(after) == ["Reshape", "InstanceNormalization", "Reshape", "Mul", "Add"]
    assert_close(before, after)


@pytest.mark.parametrize(
    ("shape", "axes", "constants"),
    [
        ("N,3,4", "[2]", "float[4] s = {1, 2, 3, 4}"),
        ("N,3,4", "[2]", "float[1] s = {2}"),
        ("N,3,2,2", "[2, 3]", "float[2,2] s = {1, 2, 3, 4}"),
        ("N,3,2,2", "[2, 3]", "float[2] s = {1, 2}"),
        ("N,3,2,2", "[1, 2, 3]", "float[3,1,1] s = {1, 2, 3}"),
        ("N,3,2,2", "[2]", "float[3,1,1] s = {1, 2, 3}"),
        ("N,C,H,W", "[2, 3]", "float s = {2}"),
        ("N,3", "[1]", "float[3] s = {1, 2, 3}"),
    ],
)
def test_what_is_no_instance_normalisation_is_left_to_others(
    shape: str, axes: str, constants: str
) -> None:
    before, after, report = fused(
        CORE.replace("[2, 3]", axes).replace("[-1, -2]", axes) + "q = Div (d, r) y = Mul (q, s)",
        graph=f"g (float[{shape}] x) => (float[{shape}] y)",
        constants=f"<{constants}, float two = {{2}}, float eps = {{1}}>",
    )
    assert ops(after) == ops(before)
    assert not report.skipped


def test_one_axis_with_a_scale_per_channel_is_an_instance_normalisation() -> None:
    before, after, _ = fused(
        CORE.replace("[2, 3]", "[2]").replace("[-1, -2]", "[2]") + "q = Div (d, r) y = Mul (q, s)",
        graph="g (float[N,3,4] x) => (float[N,3,4] y)",
        constants="<float[3,1] s = {1, 2, 3}, float two = {2}, float eps = {1}>",
    )
    assert ops(after) == ["InstanceNormalization"]
    assert_close(before, after)


def test_one_axis_of_unknown_extent_is_an_instance_normalisation_too() -> None:
    before, after, _ = fused(
        CORE.replace("[2, 3]", "[2]").replace("[-1, -2]", "[2]") + "y = Div (d, r)",
        graph="g (float[N,3,L] x) => (float[N,3,L] y)",
    )
    assert ops(after) == ["InstanceNormalization"]
    assert_close(before, after)


@pytest.mark.parametrize("other", ["m", "d", "p", "v", "e", "r"])
def test_a_value_on_the_way_that_is_kept_is_refused(other: str) -> None:
    shape = "[N,3,H,W]" if other in ("d", "p") else "[N,3,1,1]"
    _, after, report = fused(
        CORE + "[y] y = Div (d, r)", graph=f"{GRAPH[:-1]}, float{shape} {other})"
    )
    assert "InstanceNormalization" not in ops(after)
    assert report.skipped == {"y": "a value on the way has another reader"}


def test_a_cast_within_is_refused() -> None:
    _, _, report = fused(
        "m = ReduceMean <axes = [2, 3]> (x) h = Sub (x, m) d = Cast <to = 1> (h)"
        + "p = Pow (d, two) v = ReduceMean <axes = [2, 3]> (p) e = Add (v, eps) r = Sqrt (e)"
        + "q = Div (d, r) [y] y = Cast <to = 10> (q)",
        graph=GRAPH.replace("float", "float16"),
    )
    assert list(report.skipped.values()) == [
        "it casts on the way, the operator computes in the type of its input"
    ]


@pytest.mark.parametrize(("opset", "takes"), [(17, False), (22, True)])
def test_bfloat16_is_taken_since_the_operator_takes_it(opset: int, takes: bool) -> None:
    core = CORE.replace("<axes = [2, 3]> (x)", "(x, hw)").replace(
        "<axes = [-1, -2]> (p)", "(p, hw)"
    )
    _, after, report = fused(
        (core if opset > 17 else CORE) + "[y] y = Div (d, r)",
        graph=GRAPH.replace("float", "bfloat16"),
        constants="<bfloat16 two = {16384}, bfloat16 eps = {16256}, int64[2] hw = {2, 3}>",
        head=f'<ir_version: 10, opset_import: ["" : {opset}]>',
    )
    assert ("InstanceNormalization" in ops(after)) == takes
    assert report.skipped == ({} if takes else {"y": "the operator does not take bfloat16"})


# --- what surrounds the operator --------------------------------------------------------------------

AROUND = """
    <float[3] s = {1, 2, 3}, float[3] b = {10, 20, 30}, int64[3] flat = {0, 3, -1},
     int64[4] back = {2, 3, 4, 5}, float[3,1,1] f = {2, 3, 4}, float[3,1,1] a = {1, 2, 3}>"""
FIXED = "g (float[2,3,4,5] x) => (float[2,3,4,5] y)"


def test_reshapes_that_keep_the_channels_are_dropped_and_what_follows_is_taken_in() -> None:
    before, after, report = fused(
        """
        [in]   z = Reshape (x, flat)
        [norm] n = InstanceNormalization <epsilon = 0.5> (z, s, b)
        [out]  o = Reshape (n, back)
        [mul]  t = Mul (f, o)
        [y]    y = Add (t, a)""",
        graph=FIXED,
        constants=AROUND,
    )
    assert (
        text(after)
        == """\
g (float[2,3,4,5] x) => (float[2,3,4,5] y)
   <float[3] y_scale =  {2,6,12}, float[3] y_bias =  {21,62,123}>
{
   [y] y = InstanceNormalization <epsilon: float = 0.5> (x, y_scale, y_bias)
}"""
    )
    assert report.merged == {"y": ("in", "norm", "out", "mul", "y")}
    assert_close(before, after)


@pytest.mark.parametrize(
    ("rest", "constants"),
    [
        ("y = Mul (n, f)", "float[3] y_scale =  {2,6,12}, float[3] y_bias =  {20,60,120}"),
        ("y = Add (n, a)", "float[3] s =  {1,2,3}, float[3] y_bias =  {11,22,33}"),
    ],
)
def test_a_mul_or_an_add_alone_is_taken_in(rest: str, constants: str) -> None:
    before, after, _ = fused(
        f"n = InstanceNormalization (x, s, b) {rest}", graph=GRAPH, constants=AROUND
    )
    assert ops(after) == ["InstanceNormalization"]
    assert constants in text(after)
    assert_close(before, after)


def test_reshapes_alone_are_dropped_even_where_scale_and_bias_are_computed() -> None:
    before, after, _ = fused(
        "z = Reshape (x, flat) n = InstanceNormalization (z, u, w) o = Reshape (n, back)"
        " y = Mul (o, f)",
        graph="g (float[2,3,4,5] x, float[3] u, float[3] w) => (float[2,3,4,5] y)",
        constants=AROUND,
    )
    assert ops(after) == ["InstanceNormalization", "Mul"]
    assert_close(before, after)


@pytest.mark.parametrize(
    ("flat", "back", "constants"),
    [
        ("2, 1, 60", "2, 3, 4, 5", 1),  # one group
        ("1, 6, 20", "2, 3, 4, 5", 6),
        ("2, 3, 20", "2, 3, 5, 4", 3),
    ],
)
def test_reshapes_that_change_the_channels_or_the_shape_stay(
    flat: str, back: str, constants: int
) -> None:
    ones = ", ".join(["1"] * constants)
    shape = back.replace(" ", "")
    before, after, _ = fused(
        "z = Reshape (x, flat) n = InstanceNormalization (z, s, b) o = Reshape (n, back)"
        " y = Mul (o, f)",
        graph=f"g (float[2,3,4,5] x) => (float[{shape}] y)",
        constants=f"<float[{constants}] s = {{{ones}}}, float[{constants}] b = {{{ones}}},"
        f" int64[3] flat = {{{flat}}}, int64[4] back = {{{back}}}, float[3,1,1] f = {{2, 3, 4}}>",
    )
    assert ops(after) == ops(before)


@pytest.mark.parametrize(
    ("graph", "rest"),
    [
        (FIXED[:-1] + ", float[2,3,4,5] n)", "y = Mul (n, f)"),
        (FIXED[:-1] + ", float[2,3,4,5] z)", "y = Mul (n, f) z = Neg (n)"),
        (FIXED.replace(") =>", ", float[3,1,1] w) =>"), "y = Mul (n, w)"),
        (FIXED, "y = Mul (n, n)"),
    ],
)
def test_what_is_read_twice_kept_or_computed_is_left_alone(graph: str, rest: str) -> None:
    before, after, _ = fused(
        "n = InstanceNormalization (x, s, b) " + rest, graph=graph, constants=AROUND
    )
    assert ops(after) == ops(before)


def test_a_reshape_before_that_others_read_stays() -> None:
    before, after, _ = fused(
        "z = Reshape (x, flat) n = InstanceNormalization (z, s, b) y = Reshape (n, back)"
        " w = Neg (z)",
        graph=FIXED[:-1] + ", float[2,3,20] w)",
        constants=AROUND,
    )
    assert ops(after) == ops(before)


@pytest.mark.parametrize(
    "factor", ["30720", "1024"]
)  # 32768: too large; 2 ** -14 / 3: loses digits
def test_constants_that_leave_the_range_of_their_type_are_refused(factor: str) -> None:
    _, after, report = fused(
        "n = InstanceNormalization (x, s, b) [mul] y = Mul (n, f)",
        graph=GRAPH.replace("float", "float16"),
        constants="<float16[3] s = {17408, 15360, 13653}, float16[3] b = {0, 0, 0},"
        f" float16[3,1,1] f = {{{factor}, {factor}, {factor}}}>",
    )
    assert ops(after) == ["InstanceNormalization", "Mul"]
    assert report.skipped == {"mul": "the new scale does not fit float16"}


def test_operators_that_broadcast_by_attributes_are_left_alone() -> None:
    before, after, report = fused(
        "n = InstanceNormalization (x, s, b) y = Mul <broadcast = 1, axis = 0> (n, f)",
        graph="g (float[3,3,4,5] x) => (float[3,3,4,5] y)",
        constants=AROUND,
        head='<ir_version: 8, opset_import: ["" : 6]>',
    )
    assert ops(after) == ops(before)
    assert not report.skipped


# --- any shape ------------------------------------------------------------------------------------


@st.composite
def instances(draw: st.DrawFn) -> str:
    """Draw an instance normalisation of any rank, dynamic or not, spelt out or not."""
    rank = draw(st.integers(4, 5))
    channels = draw(st.integers(2, 3))
    dims = [draw(st.sampled_from(["N", "2"])), str(channels)]
    dims += [draw(st.sampled_from([f"D{axis}", "3"])) for axis in range(2, rank)]
    axes = [draw(st.sampled_from([axis, axis - rank])) for axis in range(2, rank)]

    def constant(name: str) -> str:
        lead = draw(st.sampled_from(["", "1,"]))
        values = ", ".join(str(index + 1) for index in range(channels))
        return f"float[{lead}{channels}{',1' * (rank - 2)}] {name} = {{{values}}}"

    end = draw(st.sampled_from(["q = Div (d, r)", "i = Reciprocal (r) q = Mul (i, d)"]))
    core = f"""
        m = ReduceMean <axes = {axes}> (x) d = Sub (x, m) p = Mul (d, d)
        v = ReduceMean <axes = {axes}> (p) e = Add (v, eps) r = Sqrt (e) {end} """
    behind = draw(
        st.sampled_from(["t = Mul (q, s) y = Add (b, t)", "y = Mul (s, q)", "y = Add (q, b)"])
    )
    shape = ",".join(dims)
    return (
        f"{HEAD} g (float[{shape}] x) => (float[{shape}] y)"
        f" <{constant('s')}, {constant('b')}, float eps = {{0.25}}> {{ {core} {behind} }}"
    )


@given(instances())
@settings(max_examples=40, deadline=None)
def test_every_shape_gives_the_same_numbers(drawn: str) -> None:
    before, after, _ = rewrite(drawn, FuseInstanceNormalization())
    assert ops(after) == ["InstanceNormalization"]
    assert_close(before, after)


# --- TensorRT -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "two", "eps"), [("float", 2, 1), ("float16", 16384, 15360)])
def test_tensorrt_builds_what_is_fused(tensorrt: Builder, dtype: str, two: int, eps: int) -> None:
    _, after, _ = fused(
        CORE + "[y] y = Div (d, r)",
        graph=GRAPH.replace("float", dtype).replace("N", "2").replace("H,W", "4,5"),
        constants=f"<{dtype} two = {{{two}}}, {dtype} eps = {{{eps}}}>",
    )
    assert ops(after) == ["InstanceNormalization"]
    assert tensorrt.refusal(after) == ""
