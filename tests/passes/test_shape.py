from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from graphs import run
from shape_check import Witness

from optc.passes.dimension import Dim, ceil_division, maximum, minimum, symbol
from optc.passes.graph import all_tensors, export_model, import_model
from optc.passes.shape import Shapes, annotate, infer
from optc.specs.compile_spec import Range

N, H, W = symbol("n"), symbol("h"), symbol("w")


def graph_of(source: str, opset: int = 17) -> gs.Graph:
    head = f'<ir_version: 9, opset_import: ["" : {opset}]>'
    return import_model(onnx.parser.parse_model(head + source))


def inferred(source: str, opset: int = 17) -> Shapes:
    return infer(graph_of(source, opset))


def held_against_a_run(source: str, *inputs: dict[str, np.ndarray], opset: int = 17) -> Shapes:
    """Return what is inferred, after it was compared with all tensors of runs with ``inputs``."""
    graph = graph_of(source, opset)
    shapes = infer(graph)
    for tensor in [tensor for node in graph.nodes for tensor in node.outputs]:
        if tensor not in graph.outputs:
            graph.outputs.append(tensor)
    model = export_model(graph, value_info=False)
    for feeds in inputs:
        witness = Witness(shapes, feeds)
        for name, array in run(model, feeds).items():
            assert witness.contradictions(name, array) == []
    return shapes


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


# Extents


@pytest.mark.parametrize(
    ("node", "dims"),
    [
        ("Relu (x)", (N, 3, H, W)),
        ("Conv (x, k3)", (N, 8, H - 2, W - 2)),
        ("Conv <pads = [1,1,1,1]> (x, k3)", (N, 8, H, W)),
        (
            "Conv <pads = [1,1,1,1], strides = [2,2]> (x, k3)",
            (N, 8, (H + 1) // 2, (W + 1) // 2),
        ),
        ("Conv <dilations = [2,2]> (x, k3)", (N, 8, H - 4, W - 4)),
        (
            'Conv <auto_pad = "SAME_UPPER", strides = [2,2]> (x, k3)',
            (N, 8, ceil_division(H, 2), ceil_division(W, 2)),
        ),
        ("ConvTranspose <strides = [2,2]> (x, k3t)", (N, 8, 2 * H + 1, 2 * W + 1)),
        ("MaxPool <kernel_shape = [2,2], strides = [2,2]> (x)", (N, 3, H // 2, W // 2)),
        (
            "MaxPool <kernel_shape = [2,2], strides = [2,2], ceil_mode = 1> (x)",
            (N, 3, ceil_division(H, 2), ceil_division(W, 2)),
        ),
        ("GlobalAveragePool (x)", (N, 3, 1, 1)),
        ("Transpose <perm = [0,2,3,1]> (x)", (N, H, W, 3)),
        ("Flatten (x)", (N, 3 * H * W)),
        ("Reshape (x, split_channels)", (N, 3, H * W)),
        ("Concat <axis = 2> (x, x)", (N, 3, 2 * H, W)),
        ("Slice (x, one, minus, two)", (N, 3, maximum(H - 2, 0), W)),
        ("Slice (x, minus, low, two, minus)", (N, 3, H, W)),
        ("Tile (x, fours)", (4 * N, 12, 4 * H, 4 * W)),
        ("Resize (x, , doubled)", (N, 3, 2 * H, 2 * W)),
        ("Resize (x, , halved)", (N, 3, H // 2, W // 2)),
        ("ReduceMean <axes = [2,3], keepdims = 0> (x)", (N, 3)),
        ("ArgMax <axis = 1> (x)", (N, 1, H, W)),
        ("MatMul (x, right)", (N, 3, H, 5)),
        ('Einsum <equation = "nchw,nkhw->nck"> (x, x)', (N, 3, 3)),
        ("DepthToSpace <blocksize = 2> (deep)", (N, 2, 2 * H, 2 * W)),
        ("Add (x, bias)", (N, 3, H, W)),
        ("Gather <axis = 1> (x, one)", (N, 1, H, W)),
        ("Pad (x, pads)", (N, 3, H + 3, W)),
    ],
)
def test_extents_are_exact_expressions(node: str, dims: tuple[Dim, ...]) -> None:
    weights = {
        "k3": floats(8, 3, 3, 3),
        "k3t": floats(3, 8, 3, 3),
        "right": floats(7, 5),
        "bias": floats(3, 1, 1),
        "doubled": np.array([1, 1, 2, 2], np.float32),
        "halved": np.array([1, 1, 0.5, 0.5], np.float32),
        "split_channels": np.array([0, 3, -1]),
        "one": np.array([1]),
        "two": np.array([2]),
        "minus": np.array([-1]),
        "low": np.array([-(2**63) + 1]),
        "fours": np.array([4] * 4),
        "pads": np.array([0, 0, 1, 0, 0, 0, 2, 0]),
    }
    source = f"g (float[n,3,h,w] x, float[n,8,h,w] deep) => (float[] y) {{ y = {node} }}"
    model = onnx.parser.parse_model('<ir_version: 9, opset_import: ["" : 17]>' + source)
    for name, value in weights.items():
        if name in model.graph.node[0].input:
            model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    model.graph.output[0].type.tensor_type.ClearField("shape")
    model.graph.output[0].type.tensor_type.ClearField("elem_type")
    graph = import_model(model)
    shapes = infer(graph)
    assert shapes.dims("y") == dims
    exported = export_model(graph, value_info=False)
    for n, h, w in ((1, 6, 7), (2, 9, 7)):
        feeds = {"x": floats(n, 3, h, w), "deep": floats(n, 8, h, w)}
        (found,) = run(exported, feeds).values()
        assert Witness(shapes, feeds).contradictions("y", found) == []


def test_unlike_symbols_broadcast_to_the_larger_and_a_number_wins() -> None:
    shapes = inferred(
        """g (float[a,c] x, float[b,c] y, float[7,1] z) => (float[m,c] s, float[k,c] t)
        { s = Add (x, y)  t = Mul (x, z) }"""
    )
    assert shapes.dims("s") == (maximum(symbol("a"), symbol("b")), symbol("c"))
    assert shapes.dims("t") == (7, symbol("c"))


# Values


def test_shape_arithmetic_is_followed_and_cancels() -> None:
    shapes = held_against_a_run(
        """g (float[n,c,h,w] x) => (float[p,q,r] y)
        <int64 i = {2}, int64 two = {2}, int64[1] axis = {0}, int64[2] rest = {0, -1}>
        {
            s = Shape (x)
            hh = Gather (s, i)
            half = Div (hh, two)
            even = Mul (half, two)
            odd = Sub (hh, even)
            f = Cast <to = 1> (hh)
            g2 = Cast <to = 1> (two)
            up = Div (f, g2)
            c2 = Ceil (up)
            whole = Cast <to = 7> (c2)
            lost = Sub (whole, odd)
            l = Unsqueeze (lost, axis)
            t = Concat <axis = 0> (l, rest)
            y = Reshape (x, t)
        }""",
        {"x": floats(1, 2, 4, 3)},
        {"x": floats(3, 4, 6, 5)},
    )
    value = shapes.value("whole")
    assert value is not None
    assert value.item() == ceil_division(H, 2)
    lost = shapes.value("lost")
    assert lost is not None
    # ceil(h/2) - (h - 2*floor(h/2)), an expression that needs no help to be right
    assert lost.item() == ceil_division(H, 2) - (H - H // 2 * 2)


def test_the_pattern_by_which_exporters_expand_is_decided() -> None:
    # torch asks whether a target says -1 ("keep"); an extent never does.
    shapes = held_against_a_run(
        """g (float[n,1] x) => (float[p,q] y)
        <int64[1] five = {5}, int64[1] zero = {0}, int64[1] one = {1}, int64[2] minus = {-1, -1}>
        {
            s = Shape (x)
            n = Slice (s, zero, one)
            target = Concat <axis = 0> (n, five)
            keep = Equal (target, minus)
            rank = Shape (target)
            ones = ConstantOfShape <value = int64[1] {1}> (rank)
            chosen = Where (keep, ones, target)
            y = Expand (x, chosen)
        }""",
        {"x": floats(4, 1)},
    )
    assert shapes.dims("y") == (N, 5)


def test_weights_are_not_read() -> None:
    graph = graph_of(
        "g (float[n,3] x) => (float[n,k] y) <float[3,400] w = {0}> { y = MatMul (x, w) }"
    )
    (weight,) = (t for t in all_tensors(graph).values() if isinstance(t, gs.Constant))
    stored = weight._values
    assert infer(graph).dims("y") == (N, 400)
    assert weight._values is stored


def test_a_float_that_no_integer_holds_is_not_followed() -> None:
    shapes = inferred(
        """g (float[n] x) => (int64[2] y)
        <float[2] large = {1e30, 3}> { y = Cast <to = 7> (large) }"""
    )
    assert shapes.dims("y") == (2,)
    assert shapes.constant("y") is None


def test_a_bound_of_a_clip_that_only_the_run_knows_bounds_nothing() -> None:
    shapes = held_against_a_run(
        """g (int64 most) => (int64 y, int64 z)
        <int64 nine = {9}, int64 zero = {0}> { y = Clip (nine, , most)  z = Clip (most, zero, nine) }""",
        {"most": np.array(3)},
        {"most": np.array(-3)},
    )
    assert shapes.constant("y") is None
    value = shapes.value("z")
    assert value is not None
    assert shapes.interval(value.item()) == (0, 9)


# Data-dependent axes


def test_a_count_is_bounded_by_what_is_counted() -> None:
    shapes = held_against_a_run(
        """g (float[n,4] x) => (int64[2,c] z, float[c] picked)
        { z = NonZero (x)  at = Transpose (z)  picked = GatherND (x, at) }""",
        {"x": np.eye(3, 4, dtype=np.float32)},
        {"x": np.zeros((2, 4), np.float32)},
    )
    count = symbol("c")
    assert shapes.dims("z") == (2, count)
    assert shapes.dims("picked") == (count,)  # found by the same indices
    assert shapes.upper("c") == 4 * N
    assert shapes.data_dependent(count)
    assert not shapes.data_dependent(4 * N)


def test_of_a_scalar_non_zero_gives_the_rows_that_it_gives() -> None:
    """None by the definition, one by onnxruntime, which runs it."""
    source = "g (float x) => (int64[a,b] z) { z = NonZero (x) }"
    ones, zeros = {"x": np.ones((), np.float32)}, {"x": np.zeros((), np.float32)}
    shapes = held_against_a_run(source, ones, zeros)
    assert [shapes.interval(dim) for dim in shapes.dims("z") or ()] == [(0, 1), (0, 1)]


def test_two_counts_of_one_tensor_are_one_symbol() -> None:
    shapes = inferred(
        "g (bool[n] x) => (int64[1,a] y, int64[1,b] z) { y = NonZero (x)  z = NonZero (x) }"
    )
    assert shapes.dims("y") == shapes.dims("z")


def test_top_k_of_what_may_be_fewer_is_a_minimum() -> None:
    # torchvision: k = min(1000, number of candidates)
    shapes = held_against_a_run(
        """g (float[n] x) => (float[k] v, int64[k] i)
        <float limit = {0}, int64[1] most = {3}, int64[1] all = {-1}, int64 axis = {0}>
        {
            mask = Greater (x, limit)
            found = NonZero (mask)
            at = Reshape (found, all)
            picked = Gather (x, at)
            count = Shape (picked)
            both = Concat <axis = 0> (most, count)
            k = ReduceMin <keepdims = 0> (both)
            k1 = Reshape (k, all)
            v, i = TopK (picked, k1)
        }""",
        {"x": np.array([1, -1, 2, 3, 4, 5], np.float32)},
        {"x": np.array([1, -1], np.float32)},
    )
    (dim,) = shapes.dims("v") or ()
    assert dim == minimum(3, symbol("found_1"))
    assert shapes.upper("found_1") == N


def test_what_non_max_suppression_keeps_is_bounded() -> None:
    shapes = inferred(
        """g (float[1,n,4] boxes, float[1,5,n] scores) => (int64[kept,3] y, int64[few,3] z)
        <int64[1] most = {7}, int64[1] zero = {0}>
        { y = NonMaxSuppression (boxes, scores, most)  z = Slice (y, zero, most) }"""
    )
    assert shapes.upper("kept") == 5 * minimum(7, N)
    (few, _) = shapes.dims("z") or ()
    profile = {"n": Range(min=1, opt=4, max=100)}
    assert shapes.axis_range(few, profile) == Range(min=0, opt=7, max=7)
    assert shapes.axis_range(symbol("kept"), profile) == Range(min=0, opt=20, max=35)


def test_a_slice_that_the_data_ends_is_no_longer_than_its_axis() -> None:
    shapes = held_against_a_run(
        """g (float[n,8] x, int64[1] stop) => (float[n,k] y)
        <int64[1] zero = {0}, int64[1] one = {1}, int64[1] five = {5}>
        { end = Min (stop, five)  y = Slice (x, zero, end, one) }""",
        {"x": floats(2, 8), "stop": np.array([3])},
        {"x": floats(2, 8), "stop": np.array([9])},
        {"x": floats(2, 8), "stop": np.array([-2])},
    )
    assert shapes.upper("k") == 8


def test_a_bound_is_found_through_both_branches_of_an_if() -> None:
    shapes = held_against_a_run(
        """g (float[n] x, bool c) => (int64[k] y)
        <int64[1] all = {-1}, int64[1] zero = {0}, int64[2] two = {5, 6}>
        {
            y = If (c) <
                then_branch = t () => (int64[p] a) { z = NonZero (x)  a = Reshape (z, all) },
                else_branch = e () => (int64[2] b) { b = Identity (two) }
            >
        }""",
        {"x": floats(4), "c": np.array(True)},
        {"x": floats(4), "c": np.array(False)},
    )
    assert shapes.dims("y") == (symbol("k"),)
    assert shapes.axis_range(symbol("k"), {"n": Range(min=1, opt=5, max=9)}) == Range(
        min=0, opt=5, max=9
    )


def test_an_if_that_is_decided_has_the_shape_of_its_branch() -> None:
    shapes = inferred(
        """g (float[n,4] x) => (float[n,2] y)
        <int64 one = {1}, int64 four = {4}, int64[2] two = {-1, 2}>
        {
            s = Shape (x)
            w = Gather (s, one)
            c = Equal (w, four)
            y = If (c) <
                then_branch = t () => (float[p,q] a) { a = Reshape (x, two) },
                else_branch = e () => (float[r,v] b) { b = Identity (x) }
            >
        }"""
    )
    assert shapes.dims("y") == (2 * N, 2)


def test_nothing_is_known_of_what_nothing_bounds() -> None:
    shapes = inferred(
        "g (int64 k) => (int64[r] y) <int64 z = {0}, int64 o = {1}> { y = Range (z, k, o) }"
    )
    (dim,) = shapes.dims("y") or ()
    assert shapes.axis_range(dim, {}) is None
    assert shapes.unbounded_symbols(dim, {}) == {"r"}
    # A range in the profile bounds it after all.
    assert shapes.axis_range(dim, {"r": Range(min=1, opt=2, max=3)}) == Range(min=1, opt=2, max=3)


def test_an_input_symbol_without_a_range_is_named() -> None:
    shapes = inferred("g (float[n,m] x) => (float[k,m] y) { y = Concat <axis = 0> (x, x) }")
    (dim, _) = shapes.dims("y") or ()
    assert shapes.unbounded_symbols(dim, {"m": Range(min=1, opt=1, max=1)}) == {"n"}


# Loops and scans


def test_a_loop_stacks_as_often_as_it_runs() -> None:
    shapes = held_against_a_run(
        """g (float[n] x) => (float[n] last, float[6,n] all)
        <int64 six = {6}, bool yes = {1}>
        {
            last, all = Loop (six, yes, x) <
                body = b (int64 i, bool on, float[] v) => (bool go, float[] next, float[] seen)
                { go = Identity (yes)  next = Add (v, v)  seen = Identity (next) }
            >
        }""",
        {"x": floats(3)},
    )
    assert shapes.dims("last") == (N,)
    assert shapes.dims("all") == (6, N)


def test_what_grows_in_a_loop_has_no_bound() -> None:
    shapes = held_against_a_run(
        """g (float[n] x) => (float[m] y)
        <int64 three = {3}, bool yes = {1}>
        {
            y = Loop (three, yes, x) <
                body = b (int64 i, bool on, float[k] v) => (bool go, float[j] next)
                { go = Identity (on)  next = Concat <axis = 0> (v, x) }
            >
        }""",
        {"x": floats(2)},
    )
    assert shapes.dims("y") == (symbol("m"),)
    assert shapes.upper("m") is None


def test_a_loop_that_may_stop_early_is_bounded_by_its_limit() -> None:
    shapes = held_against_a_run(
        """g (float[n] x) => (float[m,n] y)
        <int64 five = {5}, bool yes = {1}, int64 two = {2}>
        {
            y = Loop (five, yes) <
                body = b (int64 i, bool on) => (bool go, float[] seen)
                { go = Less (i, two)  seen = Identity (x) }
            >
        }""",
        {"x": floats(2)},
    )
    (trips, width) = shapes.dims("y") or ()
    assert width == N
    assert shapes.axis_range(trips, {}) == Range(min=0, opt=5, max=5)


def test_a_scan_runs_along_its_axis() -> None:
    shapes = held_against_a_run(
        """g (float[k] start, float[steps,k] x) => (float[k] last, float[steps,k] all)
        {
            last, all = Scan (start, x) <
                num_scan_inputs = 1,
                body = b (float[] v, float[] row) => (float[] next, float[] seen)
                { next = Add (v, row)  seen = Identity (next) }
            >
        }""",
        {"start": floats(3), "x": floats(4, 3)},
    )
    assert shapes.dims("all") == (symbol("steps"), symbol("k"))


# Ranges


def test_a_range_follows_from_the_profile() -> None:
    shapes = inferred("g (float[n,3,h,w] x) => (float[n,3,a,b] y) { y = Relu (x) }")
    profile = {"h": Range(min=32, opt=640, max=1280)}
    stride = (H + 31) // 32
    assert shapes.axis_range(stride, profile) == Range(min=1, opt=20, max=40)
    assert shapes.axis_range(0, {}) == Range(min=0, opt=0, max=1)
    assert shapes.interval(H)[0] == 1


def test_ranges_decide_what_the_model_alone_does_not() -> None:
    source = """g (float[n,h] x) => (float[n,k] y)
        <int64[1] seven = {-7}, int64[1] end = {99}, int64[1] one = {1}>
        { y = Slice (x, seven, end, one) }"""
    graph = graph_of(source)
    assert infer(graph, ranges={"h": (16, 64)}).dims("y") == (N, 7)
    (_, free) = infer(graph).dims("y") or ()
    assert free != 7


# Names


def test_an_unnamed_axis_bears_the_name_of_its_input() -> None:
    shapes = inferred("g (float[?,3] x) => (float[?,3] y) { y = Relu (x) }")
    assert shapes.dims("y") == (symbol("x_0"), 3)
    assert shapes.input_symbols == {"x_0"}


def test_an_operator_that_nobody_knows_is_believed() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 17, "mine" : 1]>'
        "g (float[n,3] x) => (float[n,5] y, float[q] z) { y = mine.Magic (x)  z = mine.More (x) }"
    )
    shapes = infer(import_model(model))
    assert shapes.dims("y") == (N, 5)
    assert shapes.dims("z") == (symbol("q"),)
    assert shapes.upper("q") is None


def test_annotate_writes_numbers_symbols_and_stable_names() -> None:
    graph = graph_of(
        """g (float[n,3,h,w] x) => (float[1,2,3,4] y)
        { a = MaxPool <kernel_shape = [2,2], strides = [2,2]> (x)  b = Relu (a)  y = Relu (b) }"""
    )
    annotate(graph, infer(graph))
    tensors = all_tensors(graph)
    assert tensors["y"].shape == ["n", 3, "floor(h/2)", "floor(w/2)"]  # the declared one is wrong
    assert tensors["a"].shape == tensors["y"].shape
    assert tensors["a"].dtype == np.float32
    assert tensors["x"].shape == ["n", 3, "h", "w"]
    again = infer(graph)
    assert again.dims("y") == infer(graph).dims("a")


def test_of_a_node_that_breaks_its_own_rules_the_declaration_is_believed() -> None:
    shapes = inferred(
        """g (float[n,3] x) => (float[m] y, float[k,2] z)
        <int64[1] axis = {2}>
        { y = Squeeze (x, axis)  z = Transpose <perm = [0,1,2]> (x) }"""
    )
    assert shapes.dims("y") == (symbol("m"),)
    assert shapes.dims("z") == (symbol("k"), 2)


def test_large_constants_of_shape_keep_their_extents_only() -> None:
    shapes = inferred(
        """g (float[n] x) => (float[a,b] y)
        <int64[2] size = {100000, 100000}> { y = ConstantOfShape (size) }"""
    )
    assert shapes.dims("y") == (100000, 100000)
    assert shapes.value("y") is None
