from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from builder_says import Builder
from graphs import parsed
from onnx import ModelProto

from optc.passes.float_port import (
    NO_FLOATS,
    NOT_BUILT,
    RECURRENT,
    Ports,
    is_movement,
    nodes_of_sizes,
    ports,
)
from optc.passes.graph import all_nodes, import_model
from optc.passes.precision import Float
from optc.passes.shape import infer


def ports_of(
    body: str, precision: Float = "fp16", *, opset: int = 23, asked: int | None = None
) -> Ports | str:
    """Return the ports of the node `n` of the graph that ``body`` describes."""
    graph = import_model(parsed(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{body}'))
    shapes = infer(graph)

    def dtype_of(tensor: gs.Tensor) -> np.dtype[np.generic] | None:
        known = isinstance(tensor, gs.Constant)
        return np.dtype(tensor.dtype) if known else shapes.dtype(tensor.name)

    [node] = [node for node in all_nodes(graph) if node.name == "n"]
    sizes = nodes_of_sizes(graph, shapes)
    return ports(node, dtype_of, precision, opset=opset if asked is None else asked, sizes=sizes)


def test_what_shares_a_type_changes_together() -> None:
    body = """g (float[1,2,4,4] x, float[2,2,1,1] w, float[2] b) => (float[1,2,4,4] y)
    { [n] y = Conv (x, w, b) }"""
    assert ports_of(body) == Ports((0, 1, 2), (0,))
    assert ports_of(body, "bf16") == Ports((0, 1, 2), (0,))


def test_every_operand_of_a_variadic_changes() -> None:
    body = "g (float[1] a, float[1] b, float[1] c) => (float[3] y) { [n] y = Concat <axis=0> (a, b, c) }"
    assert ports_of(body) == Ports((0, 1, 2), (0,))


def test_what_an_older_version_lacks_is_had_of_the_newest_one() -> None:
    body = "g (float[1,2,4,4] x, float[2,2,1,1] w) => (float[1,2,4,4] y) { [n] y = Conv (x, w) }"
    assert ports_of(body, "bf16", opset=17) == "Conv takes no bfloat16 in version 17 of ONNX"
    assert ports_of(body, "bf16", opset=17, asked=24) == Ports((0, 1), (0,))


def test_integers_beside_floats_are_no_ports() -> None:
    body = "g (float[4] x, int64[2] i) => (float[2] y) { [n] y = Gather (x, i) }"
    assert ports_of(body) == Ports((0,), (0,))
    body = "g (bool[4] c, float[4] x, float[4] z) => (float[4] y) { [n] y = Where (c, x, z) }"
    assert ports_of(body) == Ports((1, 2), (0,))


def test_scales_of_a_resize_stay() -> None:
    body = """g (float[1,1,2,2] x, float[4] s) => (float[1,1,M,N] y)
    { [n] y = Resize <mode="linear"> (x, , s) }"""
    assert ports_of(body) == Ports((0,), (0,))


def test_statistics_stay_where_the_schema_lets_them() -> None:
    body = """g (float[1,2,2,2] x, float[2] s, float[2] b, float[2] m, float[2] v)
    => (float[1,2,2,2] y) { [n] y = BatchNormalization (x, s, b, m, v) }"""
    assert ports_of(body) == Ports((0,), (0,))
    assert ports_of(body, asked=13) == Ports((0, 1, 2, 3, 4), (0,))


def test_scales_of_quantised_values_stay_where_the_schema_lets_them() -> None:
    body = "g (float[4] x, float s, int8 z) => (int8[4] y) { [n] y = QuantizeLinear (x, s, z) }"
    assert ports_of(body) == Ports((0,), ())
    assert ports_of(body, opset=19) == Ports((0, 1), ())
    assert ports_of(body, opset=13) == "QuantizeLinear takes no float16 in version 13 of ONNX"
    body = "g (int8[4] x, float s) => (float[4] y) { [n] y = DequantizeLinear (x, s) }"
    assert ports_of(body) == Ports((), (0,))
    assert ports_of(body, opset=19) == Ports((1,), (0,))


@pytest.mark.parametrize(
    ("source", "to", "expected"),
    [
        ("bool", 1, Ports((), (0,))),
        ("uint8", 1, Ports((), (0,))),
        ("float16", 1, Ports((), (0,))),
        ("int64", 1, "float16 does not have all numbers of int64"),
        ("double", 1, "float16 does not have all numbers of float64"),
        ("bfloat16", 1, "float16 does not have all numbers of bfloat16"),
        ("float", 7, Ports((0,), ())),
        ("float", 10, Ports((0,), ())),
        ("float", 8, "text says how many digits a number has"),
        ("int64", 10, NO_FLOATS),
    ],
)
def test_a_cast_changes_on_its_float_side_if_no_number_is_lost(
    source: str, to: int, expected: Ports | str
) -> None:
    names = {1: "float", 7: "int64", 8: "string", 10: "float16"}
    body = f"g ({source}[2] x) => ({names[to]}[2] y) {{ [n] y = Cast <to={to}> (x) }}"
    assert ports_of(body) == expected


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "g (float a, float b) => (float[N] y) <float d = {1}> { [n] y = Range (a, b, d) }",
            "it counts, and a short type skips numbers",
        ),
        (
            "g () => (float[2] y) { [n] y = RandomNormal <shape=[2]> () }",
            "its numbers are drawn in fp32",
        ),
        (
            "g (float[2] x) => (float[2] y) { [n] y = Celu (x) }",
            "Celu takes no float16 in version 23 of ONNX",
        ),
        (
            "g (int64[2] x) => (int64[2] y) { [n] y = Neg (x) }",
            NO_FLOATS,
        ),
        (
            """g (bool c, float[2] x) => (float[2] y) { [n] y = If (c) <
            then_branch = t () => (float[2] u) { u = Neg (x) },
            else_branch = e () => (float[2] v) { v = Abs (x) }> }""",
            "what enters and leaves a body keeps its type",
        ),
        (
            """g (int64 k, float[8] x) => (float[M] y) { f = Cast <to=1> (k) [n] h = Sqrt (f)
            i = Cast <to=7> (h) a = Constant <value_ints=[-1]> () j = Reshape (i, a)
            z = Constant <value_ints=[0]> () y = Slice (x, z, j) }""",
            "it computes sizes or positions",
        ),
    ],
)
def test_what_stays_says_why(body: str, reason: str) -> None:
    assert ports_of(body) == reason


POSITIONS = """g (int64[4] i, float[4] x) => (float[4] y, int64[4] k) <float f = {0.1}>
    {
        [cast]   p = Cast <to=1> (i)
        [angle]  a = Mul (p, f)
        [wave]   c = Cos (a)
        [turn]   y = Mul (x, c)
        [floor]  b = Floor (a)
        [number] k = Cast <to=7> (b)
    }"""


def test_positions_stay_up_to_what_they_are_combined_with() -> None:
    graph = import_model(parsed(f'<ir_version: 10, opset_import: ["" : 23]>\n{POSITIONS}'))
    assert nodes_of_sizes(graph, infer(graph)) == {"angle", "wave", "floor", "number"}


def test_a_mask_that_is_made_of_integers_is_no_position() -> None:
    body = """g (int64[4] m) => (float[4] y) <float one = {1}, float low = {-3.4028234663852886e+38}>
    { c = Cast <to=1> (m) [invert] n = Sub (one, c) [mask] y = Mul (n, low) }"""
    graph = import_model(parsed(f'<ir_version: 10, opset_import: ["" : 23]>\n{body}'))
    assert nodes_of_sizes(graph, infer(graph)) == {"invert"}


def test_an_embedding_is_no_position() -> None:
    body = f"""g (int64[2] i) => (float[2,2] y) <float[3,2] table = {{{", ".join("123456")}}}>
    {{
        e = Gather (table, i)
        p = Cast <to=1> (i)
        s = Add (e, p)
        y = Sin (s)
    }}"""
    graph = import_model(parsed(f'<ir_version: 10, opset_import: ["" : 23]>\n{body}'))
    assert not nodes_of_sizes(graph, infer(graph))


def test_what_may_have_any_type_stays() -> None:
    here, other = gs.Variable("x", np.dtype(np.float32)), gs.Variable("z")
    node = gs.Node("Add", "n", inputs=[here, other], outputs=[gs.Variable("y", here.dtype)])
    assert ports(node, lambda tensor: tensor.dtype, "fp16") == "the type of `z` is not known"


def test_only_what_is_held_in_fp32_is_left_of_a_node_that_was_lowered() -> None:
    body = """g (float16[1,1,2,2] x, float[4] s) => (float16[1,1,M,N] y)
    { [n] y = Resize <mode="linear"> (x, , s) }"""
    assert ports_of(body) == NO_FLOATS


def test_an_operator_that_is_not_of_onnx_stays() -> None:
    node = gs.Node("FusedConv", "n", domain="com.microsoft")
    assert ports(node, lambda _: None, "fp16") == "`com.microsoft` defines it, not ONNX"


@pytest.mark.parametrize(
    ("op", "attrs", "moves"),
    [
        ("Reshape", {}, True),
        ("MaxPool", {}, True),
        ("Relu", {}, True),
        ("Resize", {"mode": "nearest"}, True),
        ("Resize", {"mode": "linear"}, False),
        ("ScatterND", {}, True),
        ("ScatterND", {"reduction": "add"}, False),
        ("Add", {}, False),
        ("LeakyRelu", {}, False),
    ],
)
def test_movement_is_what_copies_or_chooses(op: str, attrs: dict[str, str], moves: bool) -> None:
    assert is_movement(gs.Node(op, "n", attrs=attrs)) == moves
    assert not is_movement(gs.Node(op, "n", attrs=attrs, domain="com.microsoft"))


ONE: dict[Float, tuple[str, int]] = {
    "fp32": ("float", 1),
    "fp16": ("float16", 0x3C00),
    "bf16": ("bfloat16", 0x3F80),
}
"""Precision -> its type, and 1 in it, as models are written in text."""

NODES = {
    "ConvTranspose": ({"w": [2, 2, 3, 3]}, "[1,2,4,4] => [1,2,6,6]", "ConvTranspose (x, w)"),
    "GRU": (
        {"w": [1, 6, 4], "r": [1, 6, 2]},
        "[3,1,4] => [3,1,1,2]",
        "GRU <hidden_size = 2> (x, w, r)",
    ),
    "LpNormalization": ({}, "[2,4] => [2,4]", "LpNormalization (x)"),
    "LpPool": ({}, "[1,2,4,4] => [1,2,3,3]", "LpPool <kernel_shape = [2,2]> (x)"),
    **{
        f"{op} with lengths": (
            {"w": [1, 2 * gates, 4], "r": [1, 2 * gates, 2]},
            "[3,1,4] => [3,1,1,2]",
            f"{op} <hidden_size = 2> (x, w, r, , s)",
        )
        for op, gates in (("GRU", 3), ("LSTM", 4), ("RNN", 1))
    },
}
"""Name -> weights, shapes of input and output, and the node."""


def model_of(name: str, precision: Float) -> ModelProto:
    """Return the model of one node in ``precision``, its weights 1."""
    weights, shapes, call = NODES[name]
    kind, one = ONE[precision]
    values = [
        f"{kind}{shape} {weight} = {{{', '.join([str(one)] * math.prod(shape))}}}"
        for weight, shape in weights.items()
    ]
    read, made = shapes.split(" => ")
    return parsed(
        f"""<ir_version: 10, opset_import: ["" : 22]>
        g ({kind}{read} x) => ({kind}{made} y) <{", ".join([*values, "int32[1] s = {2}"])}>
        {{ [n] y = {call} }}"""
    )


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *((op, precision) for precision in NOT_BUILT for op in NOT_BUILT[precision]),
        *((f"{op} with lengths", precision) for op in RECURRENT for precision in ("fp16", "bf16")),
    ],
)
def test_the_builder_takes_in_fp32_only_what_is_left_in_it(
    tensorrt: Builder, name: str, precision: Float
) -> None:
    assert tensorrt.refusal(model_of(name, "fp32"), compute_capability="8.9") == ""
    assert tensorrt.refusal(model_of(name, precision), compute_capability="8.9") != ""
    [node] = import_model(model_of(name, "fp32")).nodes
    found = ports(node, lambda tensor: np.dtype(tensor.dtype), precision)
    assert isinstance(found, str)
    assert found.startswith("TensorRT builds")
