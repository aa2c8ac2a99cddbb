import numpy as np
import onnx
import pytest
from graphs import assert_same_numbers, rewrite, run, text
from onnx import numpy_helper

from optc.passes.graph import export_model, import_model
from optc.passes.pipeline import optimise
from optc.passes.remove_identities import RemoveIdentities

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'

CONSTANTS = """
    <float one = {1}, float[3] ones = {1, 1, 1}, float[2,1,1] wide = {1, 1}, float zero = {0},
     float minus = {-0.0}, int64 i1 = {1}, int64 i0 = {0}, int64[2] same = {2, 3},
     int64[2] all = {-1, 3}, int64[1] a0 = {0}, int64[1] a1 = {1}, int64[1] m1 = {-1},
     int64[1] big = {99}, int64[4] nopads = {0, 0, 0, 0}, int64[4] shift = {1, 0, -1, 0},
     float[2] scales = {1, 1}, float[2] nearly = {1.01, 1}, int64[2] twos = {1, 1},
     bool always = {1}, bool[1,3] never = {0, 0, 0}, bool[3] mixed = {1, 0, 1},
     float[0,3] nothing = {}, float empty = {0}>
"""

REMOVED = {
    "identity": "n = Identity (x)",
    "same type": "n = Cast <to = 1> (x)",
    "dropout": "n = Dropout (x, empty)",
    "same shape": "n = Reshape (x, same)",
    "same shape by inference": "n = Reshape (x, all)",
    "flatten": "n = Flatten (x)",
    "expand": "n = Expand (x, same)",
    "tile": "n = Tile (x, twos)",
    "perm": "n = Transpose <perm = [0, 1]> (x)",
    "slice": "n = Slice (x, a0, big, a1, a1)",
    "pad": "n = Pad (x, nopads)",
    "one concat": "n = Concat <axis = 0> (x)",
    "empty concat": "n = Concat <axis = 0> (nothing, x)",
    "resize": "n = Resize <mode = 'linear'> (x, , scales)",
    "resize to sizes": "n = Resize <mode = 'nearest'> (x, , , same)",
    "one sum": "n = Sum (x)",
    "clip": "n = Clip (x)",
    "times one": "n = Mul (x, one)",
    "one times": "n = Mul (ones, x)",
    "by one": "n = Div (x, ones)",
    "power": "n = Pow (x, i1)",
    "plus minus zero": "n = Add (x, minus)",
    "minus zero": "n = Sub (x, zero)",
    "always": "n = Where (always, e, zero)",
    "never": "n = Where (never, ones, x)",
    "turned twice": "t = Transpose (x) n = Transpose (t)",
    "negated twice": "t = Neg (x) n = Neg (t)",
    "up and down": "t = Cast <to = 11> (x) n = Cast <to = 1> (t)",
    "there and back": "t = Reshape (x, m1) u = Unsqueeze (t, a0) n = Reshape (u, same)",
    "squeezed": "t = Unsqueeze (x, a0) n = Squeeze (t, a0)",
}


def source_of(nodes: str) -> str:
    """Return a model with ``nodes`` between an Exp (their `x`) and a Relu (that reads `n`)."""
    words = nodes.replace("(x", "(e").replace(" x)", " e)").replace("'", '"')
    return f"{HEAD} g (float[2,3] x) => (y) {CONSTANTS} {{ e = Exp (x) {words} y = Abs (n) }}"


@pytest.mark.parametrize("nodes", REMOVED.values(), ids=REMOVED)
def test_what_changes_nothing_goes(nodes: str) -> None:
    before, after, _ = rewrite(source_of(nodes), RemoveIdentities())
    assert [node.op_type for node in after.graph.node][-1] == "Abs"
    assert after.graph.node[-1].input[0] == "e"
    assert_same_numbers(before, after, rtol=0)


STAYS = {
    "another type": "t = Cast <to = 10> (x) n = Cast <to = 1> (t)",
    "widened": "n = Mul (x, wide)",
    "zero of the wrong sign": "n = Add (x, zero)",
    "minus zero of the wrong sign": "n = Sub (x, minus)",
    "one less": "n = Sub (one, x)",
    "one over": "n = Div (one, x)",
    "another shape": "n = Reshape (x, m1)",
    "backwards": "n = Slice (x, m1, edge, a1, m1)",
    "shifted": "n = Pad (x, shift)",
    "scaled by a little": "n = Resize <mode = 'linear'> (x, , nearly)",
    "now and then": "n = Where (mixed, e, zero)",
    "chosen and widened": "n = Where (always, ones, x)",
    "turned once": "n = Transpose <perm = [1, 0]> (x)",
    "kept proportions": "n = Resize <keep_aspect_ratio_policy = 'not_larger'> (x, , , same)",
}


@pytest.mark.parametrize("nodes", STAYS.values(), ids=STAYS)
def test_what_changes_something_stays(nodes: str) -> None:
    source = source_of(nodes).replace("float empty", "int64[1] edge = {-99}, float empty")
    _, _, report = rewrite(source.replace('"" : 17', '"" : 18'), RemoveIdentities())
    assert not report.rewritten


SUMS = {
    "product": "s = MatMul (x, w) y = Add (s, zeros)",
    "product on the right": "s = MatMul (x, w) y = Add (zeros, s)",
    "moved since": (
        "t = Transpose (x) u = MatMul (w, t) s = Transpose (u) m = Transpose (s)"
        " n = Transpose (m) y = Add (n, zeros)"
    ),
    "with a bias": "s = Gemm (x, w, b) y = Add (s, zeros)",
}


@pytest.mark.parametrize("nodes", SUMS.values(), ids=SUMS)
def test_a_sum_of_products_has_no_sign_of_zero_to_keep(nodes: str) -> None:
    before, after, _ = rewrite(
        f"""{HEAD} g (float[N,2] x) => (float[N,2] y)
        <float[2,2] w = {{1, 2, 3, 4}}, float[2] b = {{1, 2}}, float[2] zeros = {{0, 0}}>
        {{ {nodes} }}""",
        RemoveIdentities(),
    )
    assert "Add" not in [node.op_type for node in after.graph.node]
    assert_same_numbers(before, after, rtol=0)


def test_zeros_that_widen_a_sum_of_products_stay() -> None:
    _, _, report = rewrite(
        f"""{HEAD} g (float[1,2] x) => (float[3,2] y)
        <float[2,2] w = {{1, 2, 3, 4}}, float[3,1] zeros = {{0, 0, 0}}>
        {{ s = MatMul (x, w) y = Add (s, zeros) }}""",
        RemoveIdentities(),
    )
    assert not report.rewritten


def test_integers_have_one_zero() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (int64[2] x) => (int64[2] y)
        <int64 zero = {0}>
        { a = Add (zero, x)  b = Sub (a, zero)  y = Abs (b) }""",
        RemoveIdentities(),
    )
    assert [node.op_type for node in after.graph.node] == ["Abs"]
    assert_same_numbers(before, after, rtol=0)


def test_a_producer_takes_over_the_name_of_the_output() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[2] x) => (float[2] y, float[2] z)
        {
            [neg] n = Neg (x)
            [id]  y = Identity (n)
            [exp] z = Exp (n)
        }""",
        RemoveIdentities(),
    )
    assert "[neg] y = Neg (x)\n   [exp] z = Exp (y)" in text(after)
    assert report.removed == {"id": "it changes nothing"}
    assert_same_numbers(before, after, rtol=0)


def test_an_input_that_is_an_output_keeps_its_identity() -> None:
    _, _, report = rewrite(
        HEAD + "g (float[2] x) => (float[2] y) { [id] y = Identity (x) }", RemoveIdentities()
    )
    assert not report.rewritten
    assert report.skipped == {"id": "the output `y` is a value from outside"}


def test_a_value_with_two_names_keeps_both() -> None:
    _, _, report = rewrite(
        HEAD + "g (float[2] x) => (float[2] y, float[2] z) { y = Neg (x)  [id] z = Identity (y) }",
        RemoveIdentities(),
    )
    assert report.skipped == {"id": "the output `z` is also called `y`"}


def test_a_partition_point_keeps_its_name() -> None:
    _, after, _ = rewrite(
        HEAD + "g (float[2] x) => (float[2] y) { n = Neg (x)  p = Identity (n)  y = Exp (p) }",
        RemoveIdentities(),
        points=("p",),
    )
    assert "p = Neg (x)" in text(after)


def test_bodies_keep_the_identities_their_outputs_need() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (int64 n, float[2] x) => (float[2] y, float[2] z)
        <bool go = {1}>
        {
            w = Neg (x)
            y, z = Loop (n, go, x, x) <
                body = b (int64 i, bool c, float[2] v, float[2] u) =>
                    (bool d, float[2] o, float[2] p) {
                    d = Identity (c)
                    q = Identity (v)
                    r = Add (q, w)
                    o = Identity (r)
                    p = Identity (w)
                }
            >
        }""",
        RemoveIdentities(),
    )
    inner = after.graph.node[1].attribute[0].g.node
    found = [(node.op_type, list(node.input), list(node.output)) for node in inner]
    assert found == [
        ("Identity", ["c"], ["d"]),
        ("Add", ["v", "w"], ["o"]),
        ("Identity", ["w"], ["p"]),
    ]
    assert_same_numbers(before, after, rtol=0)


def test_dropout_stays_where_it_drops_or_its_mask_is_read() -> None:
    model = onnx.parser.parse_model(
        HEAD
        + """
        g (float[2] x) => (float[2] y, bool[2] m)
        <float half = {0.5}, bool yes = {1}>
        {
            [train] a = Dropout (x, half, yes)
            [mask]  b, m = Dropout (a)
            y = Neg (b)
        }"""
    )
    graph = import_model(model)
    record = optimise(graph, [RemoveIdentities()]).records[0]
    assert not record.rewritten
    assert record.skipped == {"mask": "its other outputs are read"}


def test_a_dynamic_axis_is_followed() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[N,3] x) => (float[N,3] y)
        <int64[2] keep = {0, 3}, int64[2] ones = {1, 1}>
        {
            a = Reshape (x, keep)
            b = Expand (a, ones)
            y = Neg (b)
        }""",
        RemoveIdentities(),
    )
    assert [node.op_type for node in after.graph.node] == ["Neg"]
    assert_same_numbers(before, after, rtol=0)


def test_a_wrong_declared_output_shape_is_not_believed() -> None:
    model = onnx.parser.parse_model(
        HEAD
        + """
        g (float[2,3] x) => (float[2,3] y)
        <int64[2] shape = {3, 2}>
        { n = Neg (x)  y = Reshape (n, shape) }"""
    )
    graph = import_model(model)
    optimise(graph, [RemoveIdentities()])
    assert [node.op for node in graph.nodes] == ["Neg", "Reshape"]


def test_transposes_become_one() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[2,3,4] x) => (float[4,3,2] y)
        {
            [a] t = Transpose <perm = [1, 2, 0]> (x)
            [b] u = Transpose <perm = [1, 0, 2]> (t)
            [c] y = Neg (u)
        }""",
        RemoveIdentities(),
    )
    assert "[b] u = Transpose <perm: ints = [2, 1, 0]> (x)" in text(after)
    assert report.merged == {"b": ("a", "b")}
    assert_same_numbers(before, after, rtol=0)


def test_a_transpose_that_another_node_reads_is_not_repeated() -> None:
    _, _, report = rewrite(
        HEAD
        + """
        g (float[2,3,4] x) => (float[4,3,2] y, float[3,4,2] z)
        {
            t = Transpose <perm = [1, 2, 0]> (x)
            y = Transpose <perm = [1, 0, 2]> (t)
            z = Neg (t)
        }""",
        RemoveIdentities(),
    )
    assert not report.rewritten


def test_casts_become_one_where_the_first_loses_nothing() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float16[2] x) => (int64[2] y, bool[2] z)
        {
            a = Cast <to = 1> (x)
            y = Cast <to = 7> (a)
            b = Cast <to = 6> (x)
            z = Cast <to = 9> (b)
        }""",
        RemoveIdentities(),
    )
    assert [(node.op_type, node.input[0]) for node in after.graph.node] == [
        ("Cast", "x"),
        ("Cast", "x"),
        ("Cast", "b"),
    ]
    assert_same_numbers(before, after, rtol=0)


def test_a_cast_to_text_keeps_the_type_it_is_made_from() -> None:
    _, _, report = rewrite(
        HEAD + "g (int64[2] x) => (string[2] y) { a = Cast <to = 11> (x)  y = Cast <to = 8> (a) }",
        RemoveIdentities(),
    )
    assert not report.rewritten


def test_bits_are_kept_even_of_zeros_and_nan() -> None:
    source = source_of("a = Add (x, minus) b = Sub (a, zero) c = Mul (b, one) n = Pow (c, one)")
    before, after, _ = rewrite(source.replace("y = Abs (n)", "y = Neg (n)"), RemoveIdentities())
    assert len(after.graph.node) == 2
    odd = np.array([[0.0, -0.0, np.nan], [np.inf, -np.inf, 1e-45]], np.float32)
    expected, found = run(before, {"x": odd})["y"], run(after, {"x": odd})["y"]
    assert np.array_equal(np.signbit(expected[0, :2]), np.signbit(found[0, :2]))
    np.testing.assert_array_equal(found, expected)


def test_fp16_and_older_operators() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 9]>
        g (float16[1,1,2,2] x) => (float16[1,1,2,2] y)
        <float[4] scales = {1, 1, 1, 1}>
        {
            a = Mul (x, one)
            b = Pad <pads = [0, 0, 0, 0, 0, 0, 0, 0]> (a)
            c = Slice <starts = [0], ends = [99], axes = [2]> (b)
            d = Upsample (c, scales)
            e = Dropout <ratio = 0.5> (d)
            y = Neg (e)
        }"""
    )
    model.graph.initializer.append(numpy_helper.from_array(np.float16([1]), "one"))
    graph = import_model(model)
    optimise(graph, [RemoveIdentities()])
    assert [node.op_type for node in export_model(graph).graph.node] == ["Neg"]
