"""The whole graph before and after, the least number of Casts, and the numbers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from builder_says import Builder
from generated import models
from graphs import assert_same_numbers, parsed, run, text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto

from optc.passes.graph import all_nodes, export_model, import_model
from optc.passes.lower_floats import FEWER_CASTS, CastValues, LowerFloats, fate, shortened
from optc.passes.pipeline import PassRecord, optimise
from optc.passes.precision import DTYPES, LARGEST, Float, Lowering, NodePrecision

HEAD = '<ir_version: 10, opset_import: ["" : 22]>\n'


def lowered(
    source: str | ModelProto,
    nodes: str | Iterable[str] = "all",
    precision: Float = "fp16",
    *,
    points: tuple[str, ...] = (),
) -> tuple[ModelProto, ModelProto, PassRecord]:
    """Return the model before and after the named nodes were lowered, and what was reported.

    The result must be valid in every respect, types and shapes included, and be left as it is by
    another run.
    """
    before = parsed(source) if isinstance(source, str) else source
    graph = import_model(before)
    if nodes == "all":
        nodes = [node.name for node in all_nodes(graph)]
    elif isinstance(nodes, str):
        nodes = nodes.split()
    lowering = Lowering(dict.fromkeys(nodes, precision))
    report = optimise(graph, [LowerFloats()], points=points, lowering=lowering)
    after = export_model(graph, value_info=False)
    onnx.checker.check_model(after, full_check=True)
    again = optimise(graph, [LowerFloats()], points=points, lowering=lowering)
    assert again.records[0].rewritten == 0, "a second run changed something"
    assert again.records[0].skipped == report.records[0].skipped
    assert ends(after) == ends(before)
    return before, after, report.records[0]


def ends(model: ModelProto) -> list[tuple[str, int]]:
    """Return name and type of each input and output."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [info for info in model.graph.input if info.name not in weights]
    return [(i.name, i.type.tensor_type.elem_type) for i in (*inputs, *model.graph.output)]


def casts(model: ModelProto) -> int:
    return sum(node.op == "Cast" for node in all_nodes(import_model(model)))


# --- where the Casts stand -----------------------------------------------------------------------


def test_what_is_lowered_reads_and_returns_the_short_type() -> None:
    before, after, report = lowered(
        HEAD
        + """
        g (float[1,1,2,2] x) => (float[1,2,2,2] y)
        <float[2,1,1,1] w = {1, 2}, float[2] b = {3, 4}>
        {
            [conv]    c = Conv (x, w, b)
            [relu]    r = Relu (c)
            [softmax] y = Softmax <axis = 1> (r)
        }""",
        "conv relu",
    )
    assert (
        text(after)
        == """\
g (float[1,1,2,2] x) => (float[1,2,2,2] y)
   <float16[2,1,1,1] w_float16 =  {15360,16384}, float16[2] b_float16 =  {16896,17408}>
{
   [x_float16_cast] x_float16 = Cast <to: int = 10> (x)
   [conv] c = Conv (x_float16, w_float16, b_float16)
   [relu] r_float16 = Relu (c)
   [r_cast] r = Cast <to: int = 1> (r_float16)
   [softmax] y = Softmax <axis: int = 1> (r)
}"""
    )
    assert report.merged == {
        "conv": ("conv",),
        "relu": ("relu",),
        "x_float16_cast": ("conv",),
        "r_cast": ("relu",),
    }
    assert not report.skipped
    assert_same_numbers(before, after, rtol=5e-3)


def test_all_readers_share_one_cast_each_way() -> None:
    _, after, _ = lowered(
        HEAD
        + """
        g (float[1,1,2,2] x) => (float[1,1,2,2] p, float[1,1,2,2] q, float[1,1,2,2] r)
        <float[1,1,1,1] w = {2}>
        {
            [a] c = Conv (x, w)
            [b] d = Conv (x, w)
            [s] s = Add (c, d)
            [p] p = Exp (s)
            [q] q = Log (s)
            [r] r = Sqrt (s)
        }""",
        "a b s",
    )
    assert (
        text(after)
        == """\
g (float[1,1,2,2] x) => (float[1,1,2,2] p, float[1,1,2,2] q, float[1,1,2,2] r)
   <float16[1,1,1,1] w_float16 =  {16384}>
{
   [x_float16_cast] x_float16 = Cast <to: int = 10> (x)
   [a] c = Conv (x_float16, w_float16)
   [b] d = Conv (x_float16, w_float16)
   [s] s_float16 = Add (c, d)
   [s_cast] s = Cast <to: int = 1> (s_float16)
   [p] p = Exp (s)
   [q] q = Log (s)
   [r] r = Sqrt (s)
}"""
    )


def test_a_weight_that_others_read_in_fp32_stays_beside_its_short_copy() -> None:
    _, after, _ = lowered(
        HEAD
        + """
        g (float[2] x) => (float[2] y) <float[2,2] w = {1, 2, 3, 4}>
        {
            [a] a = MatMul (x, w)
            [b] b = MatMul (a, w)
            [c] y = MatMul (b, w)
        }""",
        "a b",
    )
    weights = {tensor.name: tensor.data_type for tensor in after.graph.initializer}
    assert weights == {"w": 1, "w_float16": 10}


def test_a_node_that_would_need_more_casts_is_left_in_fp32() -> None:
    body = """
        g (float[2] x) => (float[1] p, float[1] q) <float[2,2] w = {1, 2, 3, 4}>
        {
            [product] c = MatMul (x, w)
            [sigmoid] s = Sigmoid (c)
            [split]   p, q = Split <axis = 0, num_outputs = 2> (s)
        }"""
    _, after, report = lowered(HEAD + body)
    assert report.skipped == {"split": FEWER_CASTS}
    assert report.merged.keys() == {"product", "sigmoid", "x_float16_cast", "s_cast"}
    assert casts(after) == 2


def test_what_only_moves_follows_what_it_reads_where_that_saves_casts() -> None:
    body = """
        g (float[2,2] x) => (float[2,2] y) <float[2,2] w = {1, 2, 3, 4}, float[2,2] v = {0.5, 1, 2, 3}>
        {
            [a] c = MatMul (x, w)
            [t] t = Transpose (c)
            [m] m = Max (t, v)
            [b] y = MatMul (m, w)
        }"""
    before, after, report = lowered(HEAD + body, "a b")
    assert {"t", "m"} <= report.merged.keys()
    assert casts(after) == 2
    assert_same_numbers(before, after, rtol=5e-3)


def test_what_only_moves_stays_where_it_saves_nothing() -> None:
    body = """
        g (float[2,2] x) => (float[2,2] y) <float[2,2] w = {1, 2, 3, 4}>
        {
            [a] c = MatMul (x, w)
            [t] y = Transpose (c)
        }"""
    _, after, report = lowered(HEAD + body, "a")
    assert "t" not in report.merged
    assert casts(after) == 2


@pytest.mark.parametrize(
    "middle",
    ["m = Exp (c)", "m = Max (c, third)", "m = Max (c, x)", "m = LeakyRelu (c)"],
    ids=["it computes", "a constant would be rounded", "what it reads is in fp32", "it multiplies"],
)
def test_what_was_not_asked_for_is_not_rounded(middle: str) -> None:
    body = f"""
        g (float[2,2] x) => (float[2,2] y) <float[2,2] w = {{1, 2, 3, 4}}, float third = {{0.333}}>
        {{
            [a] c = MatMul (x, w)
            [m] {middle}
            [b] y = MatMul (m, w)
        }}"""
    _, after, report = lowered(HEAD + body, "a b")
    assert "m" not in report.merged
    assert casts(after) == 4


def test_bytes_become_numbers_of_the_short_type_at_once() -> None:
    body = """
        g (uint8[2] x) => (float[2] y) <float[2,2] w = {1, 2, 3, 4}>
        {
            [c] f = Cast <to = 1> (x)
            [a] y = MatMul (f, w)
        }"""
    before, after, _ = lowered(HEAD + body, "a")
    assert casts(after) == 2
    assert_same_numbers(before, after, rtol=0)


def test_a_graph_output_that_is_read_inside_is_cast_beside_its_producer() -> None:
    _, after, _ = lowered(
        HEAD
        + """
        g (float[2] x) => (float[2] y, float[2] c) <float[2,2] w = {1, 2, 3, 4}>
        {
            [a] c = MatMul (x, w)
            [b] y = MatMul (c, w)
        }"""
    )
    assert (
        text(after)
        == """\
g (float[2] x) => (float[2] y, float[2] c)
   <float16[2,2] w_float16 =  {15360,16384,16896,17408}>
{
   [x_float16_cast] x_float16 = Cast <to: int = 10> (x)
   [a] c_float16 = MatMul (x_float16, w_float16)
   [c_cast] c = Cast <to: int = 1> (c_float16)
   [b] y_float16 = MatMul (c_float16, w_float16)
   [y_cast] y = Cast <to: int = 1> (y_float16)
}"""
    )


def test_a_partition_point_keeps_its_type() -> None:
    body = """
        g (float[2] x) => (float[2] y) <float[2,2] w = {1, 2, 3, 4}>
        { [a] c = MatMul (x, w) [b] y = MatMul (c, w) }"""
    _, after, _ = lowered(HEAD + body, points=("c",))
    [cast] = [node for node in after.graph.node if node.output[0] == "c"]
    assert (cast.op_type, cast.attribute[0].i) == ("Cast", 1)


def test_types_may_be_mixed() -> None:
    body = """
        g (float[2] x) => (float[2] y) <float[2,2] w = {1, 2, 3, 4}>
        { [a] c = MatMul (x, w) [b] d = MatMul (c, w) [c] y = MatMul (d, w) }"""
    graph = import_model(parsed(HEAD + body))
    nodes: dict[str, NodePrecision] = {"a": "fp16", "b": "bf16", "c": "bf16"}
    optimise(graph, [LowerFloats()], lowering=Lowering(nodes))
    after = export_model(graph, value_info=False)
    onnx.checker.check_model(after, full_check=True)
    assert [t.data_type for t in after.graph.initializer] == [10, 16]


def test_nothing_is_done_where_nothing_is_asked_for() -> None:
    graph = import_model(parsed(HEAD + "g (float[2] x) => (float[2] y) { [r] y = Exp (x) }"))
    assert not optimise(graph, [LowerFloats()]).records[0].rewritten
    report = optimise(graph, [LowerFloats()], lowering=Lowering({"r": "fp32"}))
    assert not report.records[0].rewritten


# --- fewest Casts, against every choice there is -------------------------------------------------

UNARY = ("Exp", "Relu", "Transpose", "Sigmoid", "Identity")
BINARY = ("Add", "MatMul", "Max", "Mul")
EXACT = ("Relu", "Transpose", "Identity", "Max")


def random_model(rng: random.Random) -> ModelProto:
    values = ["x"]
    lines = []
    for number in range(rng.randint(2, 9)):
        op = rng.choice(UNARY + BINARY)
        reads = [rng.choice(values[-4:]) for _ in range(1 if op in UNARY else 2)]
        values.append(f"t{number}")
        lines.append(f"[n{number}] t{number} = {op} ({', '.join(reads)})")
    unread = [v for v in values[1:] if not any(f"{v})" in li or f"{v}," in li for li in lines)]
    outputs = sorted({*unread, rng.choice(values[1:])})
    ends = ", ".join(f"float[2,2] {name}" for name in outputs)
    return parsed(f"{HEAD} g (float[2,2] x) => ({ends}) {{ {' '.join(lines)} }}")


def fewest_casts(model: ModelProto, asked: set[str]) -> int:
    """Return the least number of Casts over all choices that are allowed, tried one by one."""
    nodes = {node.name: node for node in model.graph.node}
    maker = {node.output[0]: node for node in model.graph.node}
    kept = {info.name for info in model.graph.output}
    free = [n for n in nodes.values() if n.name in asked or n.op_type in EXACT]
    free = [n for n in free if n.op_type != "MatMul"]
    products = {n.name for n in nodes.values() if n.op_type == "MatMul"} & asked
    best = len(nodes) * 2
    for chosen in itertools.product((False, True), repeat=len(free)):
        low = products | {node.name for node, short in zip(free, chosen, strict=True) if short}
        made_low = {name for name, node in maker.items() if node.name in low}
        if any(not set(nodes[name].input) <= made_low for name in low - asked):
            continue
        count = 0
        for tensor in ("x", *maker):
            sides = {node.name in low for node in nodes.values() if tensor in node.input}
            sides |= {False} if tensor in kept else set()
            count += len(sides - {tensor in made_low})
        best = min(best, count)
    return best


@pytest.mark.parametrize("seed", range(60))
def test_no_choice_needs_fewer_casts(seed: int) -> None:
    rng = random.Random(seed)
    model = random_model(rng)
    asked = {node.name for node in model.graph.node if rng.random() < 0.6}
    _, after, report = lowered(model, asked)
    assert casts(after) == fewest_casts(model, asked)
    for node in model.graph.node:
        if node.name in report.merged:
            assert node.name in asked or node.op_type in EXACT
        elif node.name in asked:
            assert node.op_type != "MatMul"


def test_a_long_chain_with_many_branches_is_done_at_once() -> None:
    lines = ["t0 = MatMul (x, w)"]
    for number in range(1, 6000):
        op = ("Relu", "Sigmoid", "Exp", "Transpose")[number % 4]
        lines.append(f"t{number} = {op} (t{number - 1})")
        if number % 50 == 0:
            lines.append(f"p{number} = MatMul (t{number}, t{number - 25})")
            lines.append(f"s{number} = Sqrt (p{number})")
    sums = ", ".join(f"s{number}" for number in range(50, 6000, 50))
    body = f"g (float[2,2] x) => (float[2,2] y) <float[2,2] w> {{ {' '.join(lines)} y = Sum ({sums}) }}"
    model = parsed(HEAD + body.replace("w> {", "w = {1, 2, 3, 4}> {"))
    graph = import_model(model)
    asked = [node.name for node in graph.nodes if node.op not in ("Sqrt", "Exp")]
    _, after, _ = lowered(model, asked)
    assert casts(after) < 6000


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    model=models(),
    share=st.sampled_from([0.3, 0.7, 1.0]),
    precision=st.sampled_from(["fp16", "bf16"]),
    forced=st.booleans(),
)
def test_whatever_is_asked_for_the_model_is_valid(
    model: ModelProto, share: float, precision: Float, forced: bool
) -> None:
    rng = random.Random(0)
    names = [node.name for node in all_nodes(import_model(model)) if rng.random() < share]
    with pytest.MonkeyPatch.context() as patch:
        if forced:  # each node on the side that it was asked to be on, not only products
            patch.setattr("optc.passes.lower_floats.is_product", lambda node: True)
        lowered(model, names, precision)


# --- bodies --------------------------------------------------------------------------------------


def test_nodes_in_bodies_are_lowered_and_what_crosses_keeps_its_type() -> None:
    body = """
        g (bool c, float[2] x) => (float[2] y) <float[2,2] w = {1, 2, 3, 4}>
        {
            [a] h = MatMul (x, w)
            [if] z = If (c) <
                then_branch = t () => (float[2] u) { [b] p = MatMul (h, w) [r] u = Relu (p) },
                else_branch = e () => (float[2] v) { [n] v = Exp (h) }
            >
            [d] y = MatMul (z, w)
        }"""
    before, after, report = lowered(HEAD + body, "a b d r")
    assert (
        text(after)
        == """\
g (bool c, float[2] x) => (float[2] y)
   <float16[2,2] w_float16 =  {15360,16384,16896,17408}>
{
   [x_float16_cast] x_float16 = Cast <to: int = 10> (x)
   [a] h_float16 = MatMul (x_float16, w_float16)
   [h_cast] h = Cast <to: int = 1> (h_float16)
   [if] z = If (c) <then_branch: graph = t () => (float[2] u) {
      [b] p = MatMul (h_float16, w_float16)
      [r] u_float16 = Relu (p)
      [u_cast] u = Cast <to: int = 1> (u_float16)
   }, else_branch: graph = e () => (float[2] v) {
      [n] v = Exp (h)
   }>
   [z_float16_cast] z_float16 = Cast <to: int = 10> (z)
   [d] y_float16 = MatMul (z_float16, w_float16)
   [y_cast] y = Cast <to: int = 1> (y_float16)
}"""
    )
    assert report.merged["u_cast"] == ("r",)
    assert_same_numbers(before, after, rtol=1e-2)


def test_the_states_of_a_loop_keep_their_type() -> None:
    body = """
        g (int64 n, bool c, float[2,2] x) => (float[2,2] y, float[k,2,2] s)
        {
            [loop] y, s = Loop (n, c, x) <body = b (int64 i, bool go, float[2,2] a)
                => (bool more, float[2,2] z, float[2,2] each)
            { more = Identity (go) [p] m = MatMul (a, x) [t] z = Tanh (m) [q] each = MatMul (z, x) }>
        }"""
    before, after, report = lowered(HEAD + body, "p t q loop")
    assert report.skipped == {"loop": "what enters and leaves a body keeps its type"}
    assert casts(after) == 4  # x outside; the state, once each way, and what is collected inside
    assert_same_numbers(before, after, rtol=2e-2, atol=2e-2)


# --- what stays, and why -------------------------------------------------------------------------


def test_a_weight_beyond_the_largest_number_keeps_its_node_in_fp32() -> None:
    body = """
        g (float[2] x) => (float[2] y)
        <float[2,2] w = {1, 70000, 1, 1}, float[2,2] v = {1, 65504, 1, 1}>
        { [a] m = MatMul (x, w) [b] y = MatMul (m, v) }"""
    _, _, report = lowered(HEAD + body)
    assert report.skipped == {"a": "float16 ends before 70000 in `w`"}
    _, _, report = lowered(HEAD + body, precision="bf16")
    assert report.skipped == {}


def test_infinities_are_numbers_of_the_short_type_too() -> None:
    value = np.array([1, -np.inf, np.nan], np.float32)
    assert not fate(gs.Constant("w", value), DTYPES["fp16"]).overflows
    assert fate(gs.Constant("w", value * 1e5), DTYPES["fp16"]).overflows


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_masks_write_for_infinity_becomes_the_largest_number(precision: Float) -> None:
    dtype, end = DTYPES[precision], np.finfo(np.float32).max
    values = np.array([[-end, end, 2], [-np.inf, np.inf, np.nan]], np.float32)
    largest = LARGEST[precision]
    expected = np.array([[-largest, largest, 2], [-np.inf, np.inf, np.nan]], np.float32)
    np.testing.assert_array_equal(shortened(values, dtype).astype(np.float32), expected)
    assert shortened(np.array(-end, np.float32), dtype) == -largest
    assert fate(gs.Constant("w", values), dtype).largest == 2


def test_rows_that_are_masked_as_a_whole_are_numbers_still() -> None:
    body = """
        g (float[2,2] x, bool[2,2] m) => (float[2,2] y)
        <float[2,2] w = {1, 2, 3, 4}, float low = {-3.4028234663852886e+38}>
        {
            [a] s = MatMul (x, w)
            [b] f = Where (m, s, low)
            [c] p = Softmax (f)
            [d] y = MatMul (p, w)
        }"""
    before, after, report = lowered(HEAD + body)
    assert not report.skipped
    inputs = {"x": np.ones((2, 2), np.float32), "m": np.array([[True, False], [False, False]])}
    expected, found = run(before, inputs), run(after, inputs)
    np.testing.assert_allclose(found["y"], expected["y"], rtol=5e-3)


def test_a_weight_of_which_nothing_is_left_keeps_its_node_in_fp32() -> None:
    body = """
        g (float[2,2] x) => (float[2,2] y) <float tiny = {1e-12}, float[2,2] w = {1, 2, 3, 4}>
        { [p] m = MatMul (x, w) [e] n = Mul (m, tiny) [q] y = MatMul (n, w) }"""
    _, _, report = lowered(HEAD + body)
    assert report.skipped == {"e": "nothing of `tiny` is left in float16: 1e-12 is 0 there"}


@pytest.mark.parametrize("guard", ["Add", "Max", "Clip"])
def test_what_keeps_others_from_0_does_that_in_the_short_type_too(guard: str) -> None:
    body = f"""
        g (float[2,2] x) => (float[2,2] y) <float tiny = {{1e-12}}, float[2,2] w = {{1, 2, 3, 4}}>
        {{ [p] m = MatMul (x, w) [e] n = {guard} (m, tiny) [d] d = Div (m, n) [q] y = MatMul (d, w) }}"""
    before, after, report = lowered(HEAD + body)
    assert not report.skipped
    assert report.noted == {"tiny": "1e-12 is the least number of float16 there"}
    zeros = {"x": np.zeros((2, 2), np.float32)}
    np.testing.assert_array_equal(run(after, zeros)["y"], run(before, zeros)["y"])


def test_numbers_that_are_all_too_small_become_the_least_of_the_type() -> None:
    values = np.array([1e-12, -1e-9, 0], np.float32)
    found = shortened(values, DTYPES["fp16"])
    np.testing.assert_array_equal(found, np.array([2**-24, -(2**-24), 0], np.float16))
    beside_others = shortened(np.array([1e-12, 1], np.float32), DTYPES["fp16"])
    np.testing.assert_array_equal(beside_others, np.array([0, 1], np.float16))


def test_small_numbers_of_weights_are_noted() -> None:
    body = """
        g (float[2] x) => (float[2] y) <float[2,2] w = {1, 1e-9, 1e-6, 0}>
        { [p] y = MatMul (x, w) }"""
    _, _, report = lowered(HEAD + body)
    [note] = report.noted.values()
    assert report.noted.keys() == {"w"}
    assert note == "of 3 numbers 1 are 0 in float16, and 1 so small that they lose digits"


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_fate_of_numbers_is_what_rounding_does(precision: Float) -> None:
    rng = np.random.default_rng(0)
    dtype = DTYPES[precision]
    exponents = rng.uniform(-46, 38, 5000)
    values = (rng.choice([-1, 1], 5000) * 10.0**exponents).astype(np.float32)
    values[:7] = [0, 65504, 65519.996, 65520, 2**-24, 2**-25, np.nextafter(2**-25, 1, dtype="f4")]
    for chunk in (values, values[:3], values[:4], *np.array_split(values, 50)):
        found = fate(gs.Constant("w", chunk), dtype)
        with np.errstate(over="ignore"):
            short = chunk.astype(dtype).astype(np.float32)
        assert found.overflows == bool(np.isinf(short).any())
        assert found.lost == np.count_nonzero((short == 0) & (chunk != 0))
        assert found.largest == np.abs(chunk).max()


def test_sizes_and_coordinates_stay_in_fp32() -> None:
    body = """
        g (float[1,1,2,2] x, int64 k) => (float[1,1,h,w] y)
        <float[1,1,1,1] w = {2}, float[2] one = {1, 1}, int64[1] shape = {1}>
        {
            [conv]   c = Conv (x, w)
            [cast]   f = Cast <to = 1> (k)
            [half]   s = Sqrt (f)
            [list]   l = Reshape (s, shape)
            [scales] r = Concat <axis = 0> (one, l, l)
            [resize] y = Resize <mode = "linear"> (c, , r)
        }"""
    _, after, report = lowered(HEAD + body)
    assert report.skipped == dict.fromkeys(
        ("cast", "half", "list", "scales"), "it computes sizes or positions"
    )
    assert {"conv", "resize"} <= report.merged.keys()
    assert casts(after) == 3


def test_an_operator_without_a_short_version_says_so() -> None:
    body = "g (float[2] x) => (float[2] y) { [c] y = Celu (x) }"
    _, _, report = lowered(HEAD + body)
    assert report.skipped == {"c": "Celu takes no float16 in version 22 of ONNX"}


def test_what_has_no_floats_is_not_spoken_of() -> None:
    body = "g (int64[2] x) => (int64[2] y) { [c] y = Neg (x) }"
    _, _, report = lowered(HEAD + body)
    assert not report.skipped
    assert not report.merged


# --- versions ------------------------------------------------------------------------------------


def test_a_model_is_raised_to_where_there_is_bfloat16() -> None:
    body = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[1,1,4,4] x) => (float[1,1,2,2] y) <float[1,1,1,1] w = {2}>
        { [c] c = Conv (x, w) [p] y = MaxPool <kernel_shape = [2,2], strides = [2,2]> (c) }"""
    _, after, report = lowered(body, precision="bf16")
    assert after.opset_import[0].version == 22
    assert {"c", "p"} <= report.merged.keys()
    _, after, _ = lowered(body, precision="fp16")
    assert after.opset_import[0].version == 17


def test_a_model_that_cannot_be_raised_is_lowered_as_far_as_it_goes() -> None:
    body = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[1,1,6] x) => (float[1,1,n] y) <float[1,1,1] w = {2}>
        {
            [c] c = Conv (x, w)
            [r] r = Relu (c)
            [p] y = MaxPool <kernel_shape = [2], strides = [3], ceil_mode = 1> (r)
        }"""
    _, after, report = lowered(body, "c p", precision="bf16")
    assert after.opset_import[0].version == 17
    assert report.skipped == {
        "c": "Conv takes no bfloat16 in version 17 of ONNX",
        "p": "MaxPool takes no bfloat16 in version 17 of ONNX",
    }


# --- models that are short already ---------------------------------------------------------------


def test_casts_of_the_model_are_counted_with_the_others() -> None:
    body = """
        g (float[2,2] x) => (float[2,2] y) <float16[2,2] w = {15360, 16384, 16896, 17408}>
        {
            [down] h = Cast <to = 10> (x)
            [a]    p = MatMul (h, w)
            [up]   f = Cast <to = 1> (p)
            [e]    e = Sigmoid (f)
            [back] g = Cast <to = 10> (e)
            [b]    q = MatMul (g, w)
            [end]  y = Cast <to = 1> (q)
        }"""
    before, after, report = lowered(HEAD + body, "e")
    assert (
        text(after)
        == """\
g (float[2,2] x) => (float[2,2] y)
   <float16[2,2] w =  {15360,16384,16896,17408}>
{
   [down] h = Cast <to: int = 10> (x)
   [a] p = MatMul (h, w)
   [e] e = Sigmoid (p)
   [b] q = MatMul (e, w)
   [end] y = Cast <to: int = 1> (q)
}"""
    )
    assert report.removed.keys() == {"up", "back"}
    assert_same_numbers(before, after, rtol=5e-3)


def test_a_cast_that_is_there_serves_the_new_readers_too() -> None:
    body = """
        g (float[2,2] x) => (float[2,2] y, float16[2,2] h) <float[2,2] w = {1, 2, 3, 4}>
        {
            [down] h = Cast <to = 10> (x)
            [a]    y = MatMul (x, w)
        }"""
    _, after, report = lowered(HEAD + body, "a")
    assert casts(after) == 2
    assert "down" not in report.removed


def test_an_output_in_the_short_type_stays_under_its_name() -> None:
    body = """
        g (float[2,2] x) => (float16[2,2] y) <float[2,2] w = {1, 2, 3, 4}>
        { [a] c = MatMul (x, w) [down] y = Cast <to = 10> (c) }"""
    before, after, _ = lowered(HEAD + body, "a")
    assert_same_numbers(before, after, rtol=5e-3)


def test_a_model_in_the_short_type_is_left_as_it_is() -> None:
    body = """
        g (float16[2,2] x) => (float16[2,2] y) <float16[2,2] w = {15360, 16384, 16896, 17408}>
        { [a] c = MatMul (x, w) [r] y = Relu (c) }"""
    _, _, report = lowered(HEAD + body)
    assert not report.rewritten
    assert not report.skipped


# --- quantised values ----------------------------------------------------------------------------

QUANTISED = """
    g (float[1,1,2,2] x) => (float[1,1,2,2] y)
    <float s = {0.5}, float[1] t = {1e-6}, int8 z = {0}, int8[1,1,1,1] w = {3}, int8[1] zs = {0}>
    {
        [q] i = QuantizeLinear (x, s, z)
        [d] f = DequantizeLinear (i, s, z)
        [v] v = DequantizeLinear <axis = 0> (w, t, zs)
        [c] y = Conv (f, v)
    }"""


def test_what_is_dequantised_has_the_short_type_and_scales_keep_theirs() -> None:
    before, after, report = lowered('<ir_version: 10, opset_import: ["" : 17]>' + QUANTISED, "c")
    assert (
        text(after)
        == """\
g (float[1,1,2,2] x) => (float[1,1,2,2] y)
   <float s =  {0.5}, int8 z =  {0}, int8[1,1,1,1] w =  {3}, float[1] t =  {1e-06}, int8[1] zs =  {0}>
{
   [q] i = QuantizeLinear (x, s, z)
   [d] f = DequantizeLinear <output_dtype: int = 10> (i, s, z)
   [v] v = DequantizeLinear <axis: int = 0, output_dtype: int = 10> (w, t, zs)
   [c] y_float16 = Conv (f, v)
   [y_cast] y = Cast <to: int = 1> (y_float16)
}"""
    )
    assert after.opset_import[0].version == 23
    assert report.merged.keys() == {"c", "d", "v", "y_cast"}
    assert_same_numbers(before, after, rtol=5e-3, atol=1e-5)


def test_scales_that_must_change_and_lose_digits_keep_their_node_in_fp32() -> None:
    pool = "[p] y = MaxPool <kernel_shape = [1,2], strides = [1,3], ceil_mode = 1> (m)"
    source = QUANTISED.replace("y = Conv", "m = Conv").replace("(f, v)", f"(f, v) {pool}")
    head = '<ir_version: 10, opset_import: ["" : 19]>'
    _, after, report = lowered(head + source.replace("[1,1,2,2] y", "[1,1,n,m] y"), "c")
    assert after.opset_import[0].version == 19
    assert report.skipped == {"v": "the scales `t` lose digits in float16", "q": FEWER_CASTS}
    assert {"c", "d"} <= report.merged.keys()


# --- weights are not copied, and numbers come out ------------------------------------------------


def test_weights_are_converted_when_they_are_written() -> None:
    body = """
        g (float[2] x) => (float[2] y) <float[2,2] w = {1, 2, 3, 1e-9}>
        { [p] y = MatMul (x, w) }"""
    graph = import_model(parsed(HEAD + body))
    optimise(graph, [LowerFloats()], lowering=Lowering({"p": "bf16"}))
    [product] = [node for node in graph.nodes if node.op == "MatMul"]
    values = product.inputs[1]._values
    assert isinstance(values, CastValues)
    assert values.nbytes == 8
    assert isinstance(export_model(graph), ModelProto)
    assert isinstance(product.inputs[1]._values, CastValues)


NETWORK = """
    g (float[1,3,16,16] x, float[8,3,3,3] w, float[8] s, float[8] b, float[8] m, float[8] v,
       float[8,8,3,3] u, float[16,10] f, float[10] e) => (float[1,10] y)
    <float[4] scales = {1, 1, 2, 2}>
    {
        [conv]   c = Conv <pads = [1,1,1,1]> (x, w)
        [norm]   n = BatchNormalization (c, s, b, m, v)
        [relu]   r = Relu (n)
        [pool]   p = MaxPool <kernel_shape = [2,2], strides = [2,2]> (r)
        [next]   q = Conv <pads = [1,1,1,1]> (p, u)
        [resize] z = Resize <mode = "linear"> (q, , scales)
        [concat] k = Concat <axis = 1> (z, r)
        [mean]   a = GlobalAveragePool (k)
        [flat]   l = Flatten (a)
        [gemm]   o = Gemm (l, f, e)
        [end]    y = Softmax (o)
    }"""


def network() -> ModelProto:
    """Return a small network with seeded weights."""
    model = parsed(HEAD + NETWORK)
    rng = np.random.default_rng(0)
    for info in list(model.graph.input)[1:]:
        shape = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        values = rng.standard_normal(shape).astype(np.float32) / 4
        values = np.abs(values) if info.name == "v" else values
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, info.name))
        model.graph.input.remove(info)
    return model


def test_a_whole_network_needs_two_casts_and_gives_about_the_same() -> None:
    before, after, report = lowered(network())
    assert casts(after) == 2
    assert not report.skipped
    assert_same_numbers(before, after, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("precision", "capability"),
    [("fp16", "7.5"), ("fp16", "8.9"), ("bf16", "8.0"), ("bf16", "8.9")],
)
def test_the_builder_takes_it(tensorrt: Builder, precision: Float, capability: str) -> None:
    _, after, report = lowered(network(), precision=precision)
    assert not report.skipped
    assert tensorrt.refusal(after, compute_capability=capability) == ""


@pytest.mark.parametrize(("precision", "opset"), [("fp16", 17), ("bf16", 17)])
def test_the_builder_takes_fp32_scales_beside_the_short_type(
    tensorrt: Builder, precision: Float, opset: int
) -> None:
    source = f'<ir_version: 10, opset_import: ["" : {opset}]>' + QUANTISED
    _, after, _ = lowered(source, "c", precision)
    assert tensorrt.refusal(after, compute_capability="8.9") == ""
