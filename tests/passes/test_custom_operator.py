"""Operators that ONNX does not have: what is known of their outputs, and that passes keep off them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

from optc.passes import registry
from optc.passes.custom_operator import CustomOperator, CustomOutput, declaration_of, declared
from optc.passes.dimension import symbol
from optc.passes.graph import export_model, import_model
from optc.passes.pipeline import optimise
from optc.passes.shape import Inference, Shapes, infer
from optc.specs.compile_spec import Operator, Range

HEAD = '<ir_version: 9, opset_import: ["" : 17, "acme" : 1]>'
SYMBOLS = "g (float[b,3,H,W] x, float[b2,N] z) => (float y)"


def operator(**keys: Any) -> CustomOperator:
    entry = {"op": "acme::Peaks", "onnxruntime": "a.so", **keys}
    return CustomOperator.of(Operator.model_validate(entry))


def shapes(nodes: str, *operators: CustomOperator, head: str = SYMBOLS) -> Shapes:
    model = onnx.parser.parse_model(HEAD + head + " { " + nodes + " }")
    with declared(operators):
        return infer(import_model(model))


def shown(found: Shapes, name: str) -> tuple[str, ...] | None:
    dims = found.dims(name)
    return None if dims is None else tuple(map(str, dims))


def test_an_output_like_an_input_has_its_dtype_and_shape() -> None:
    found = shapes("y = acme.Peaks (x)", operator(outputs=[{"like": 0}]))
    assert shown(found, "y") == ("b", "3", "H", "W")
    assert found.dtype("y") == np.float32


def test_dtype_and_shape_can_be_said_beside_what_it_is_like() -> None:
    outputs = [
        {"like": 1, "dtype": "bfloat16"},
        {"like": 1, "shape": [7]},
        {"dtype": "string", "shape": []},
    ]
    found = shapes("y, s, t = acme.Peaks (x, z)", operator(outputs=outputs))
    assert (shown(found, "t"), found.dtype("t")) == ((), np.object_)
    assert (shown(found, "y"), found.dtype("y")) == (("b2", "N"), ml_dtypes.bfloat16)
    assert (shown(found, "s"), found.dtype("s")) == (("7",), np.float32)


def test_extents_follow_by_arithmetic_from_axes_of_the_inputs() -> None:
    found = shapes(
        "y = acme.Peaks (x, z)",
        operator(
            inputs=[["n", "c", "h", "w"], ["m", "k"]],
            outputs=[{"dtype": "int64", "shape": ["n", "2*c + k", "(h + 31)//32 * w", 4]}],
        ),
    )
    assert shown(found, "y") == ("b", "N + 6", "W*floor((H + 31)/32)", "4")
    assert found.dtype("y") == np.int64


def test_what_follows_goes_on_through_the_graph() -> None:
    found = shapes(
        "p = acme.Peaks (x) q = Relu (p) y = Concat <axis = 0> (q, q)",
        operator(inputs=[["n", "c", "h", "w"]], outputs=[{"dtype": "float32", "shape": ["n*c"]}]),
    )
    assert shown(found, "y") == ("b*6",)


def test_an_extent_that_the_data_decide_is_a_symbol_with_its_bound() -> None:
    found = shapes(
        "p, s = acme.Peaks (x) y = Relu (p)",
        operator(
            inputs=[["n", "c", "h", "w"]],
            outputs=[
                {"dtype": "float32", "shape": ["n", "found"]},
                {"dtype": "bool", "shape": ["2*found + 1"]},
            ],
            bounds={"found": "h*w//4"},
        ),
    )
    # It has the name by which `dims` of a spec gives any such axis a range.
    assert shown(found, "y") == ("b", "p_1")
    assert shown(found, "s") == ("p_1*2 + 1",)
    dims = found.dims("p")
    assert dims is not None
    assert found.data_dependent(dims[1])
    assert str(found.upper("p_1")) == "floor(H*W/4)"
    profile = {name: Range(min=8, opt=16, max=32) for name in ("H", "W", "b")}
    assert found.axis_range(dims[1], profile) == Range(min=0, opt=64, max=256)
    assert found.unbounded_symbols(dims[1], profile) == frozenset()


def test_each_node_has_extents_of_its_own() -> None:
    found = shapes(
        "p = acme.Peaks (x) q = acme.Peaks (x) y = Concat <axis = 0> (p, q)",
        operator(outputs=[{"dtype": "float32", "shape": ["found"]}]),
    )
    assert shown(found, "p") == ("p_0",)
    assert shown(found, "q") == ("q_0",)
    assert shown(found, "y") == ("p_0 + q_0",)
    assert found.upper("p_0") is None


def test_a_name_that_stands_in_arithmetic_only_is_named_after_the_first_output() -> None:
    found = shapes(
        "y, s = acme.Peaks (x)",
        operator(
            outputs=[{"like": 0}, {"dtype": "bool", "shape": ["2*k"]}],
            bounds={"k": 9},
        ),
    )
    assert shown(found, "s") == ("y_k*2",)
    assert found.upper("y_k") == 9


def test_an_omitted_output_does_not_name_anything() -> None:
    model = onnx.parser.parse_model(HEAD + SYMBOLS + " { q, y = acme.Peaks (x) }")
    model.graph.node[0].output[0] = ""
    two = operator(outputs=[{"dtype": "bool", "shape": ["k"]}, {"like": 0, "shape": [1, "k"]}])
    with declared([two]):
        found = infer(import_model(model))
    assert shown(found, "y") == ("1", "y_1")


def test_of_two_axes_that_are_said_to_be_one_the_known_one_counts() -> None:
    same = operator(
        inputs=[["n", "?", -1, "?"], ["n", "k"]],
        outputs=[{"dtype": "float32", "shape": ["n", "k"]}],
    )
    head = "g (float[b,3,H,W] x, float[5,N] z) => (float y)"
    assert shown(shapes("y = acme.Peaks (x, z)", same, head=head), "y") == ("5", "N")
    assert shown(shapes("y = acme.Peaks (x, z)", same), "y") == ("b", "N")


def test_what_is_not_known_of_an_input_is_not_known_of_the_output() -> None:
    head = "g (float x) => (float y)"
    rank = operator(inputs=[["n", "c"]], outputs=[{"like": 0}, {"dtype": "bool", "shape": ["n"]}])
    model = onnx.parser.parse_model(HEAD + head + "{ p, s = acme.Peaks (x) y = Relu (p) }")
    model.graph.input[0].type.tensor_type.ClearField("shape")
    with declared([rank]):
        found = infer(import_model(model))
    assert found.dims("p") is None
    assert found.dtype("p") == np.float32
    assert shown(found, "s") == ("s_0",)


def test_an_operator_without_a_declaration_is_as_it_was() -> None:
    found = shapes("y = acme.Peaks (x)")
    assert found.dtype("y") == np.float32  # as the output declares
    assert shown(found, "y") == ()
    assert shown(shapes("p = acme.Peaks (x) y = Relu (p)"), "p") is None


def test_a_declaration_goes_before_what_optc_knows_of_the_operator() -> None:
    mine = operator(op="com.microsoft::Gelu", outputs=[{"dtype": "float16", "shape": [1]}])
    head = '<ir_version: 9, opset_import: ["" : 17, "com.microsoft" : 1]>'
    text = head + SYMBOLS + "{ y = com.microsoft.Gelu (x) }"
    graph = import_model(onnx.parser.parse_model(text))
    assert shown(infer(graph), "y") == ("b", "3", "H", "W")
    with declared([mine]):
        assert shown(infer(graph), "y") == ("1",)


def test_declarations_hold_inside_only_and_add_up() -> None:
    one = operator(outputs=[{"like": 0}])
    two = operator(op="acme::Other", outputs=[{"like": 0}])
    nodes = import_model(
        onnx.parser.parse_model(HEAD + SYMBOLS + "{ p = acme.Peaks (x) y = acme.Other (p) }")
    ).nodes
    with declared([one]):
        with declared([two]):
            assert [declaration_of(node) for node in nodes] == [one, two]
        assert [declaration_of(node) for node in nodes] == [one, None]
    assert [declaration_of(node) for node in nodes] == [None, None]


def test_a_rule_can_be_made_of_expressions() -> None:
    made = CustomOperator(
        "acme",
        "Peaks",
        (("first axis", 3, "?", "?"),),
        (CustomOutput(dtype=np.dtype(np.int64), shape=(symbol("first axis") * 2, 4)),),
    )
    assert shown(shapes("y = acme.Peaks (x)", made), "y") == ("b*2", "4")


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([["n", 3, "h", "w"]], []),
        ([["n", 4, "h", "w"]], ["axis 1 of input 0 is 3, and is declared as 4"]),
        ([["n", "c"]], ["input 0 has 4 axes, and is declared with 2"]),
        (
            [["n", "c", "h", "w"], ["c", "k"]],
            ["axis 0 of input 1 is 5, and is declared as `c`, which is 3"],
        ),
        ([["?", -1, "?", "w"], ["a", "b"]], []),
        ([["n", "c", "h", "h"]], []),  # what cannot be told is believed
    ],
)
def test_what_is_not_as_declared_is_told(inputs: list[Any], words: list[str]) -> None:
    found = shapes("y = Identity (x)", head="g (float[b,3,H,W] x, float[5,N] z) => (float y)")
    made = operator(inputs=inputs, outputs=[{"like": 0}])
    assert made.contradictions([found.dims("x"), found.dims("z")]) == words
    assert made.contradictions([None, found.dims("z")][: len(inputs)]) == []


def test_inference_after_edits_knows_them_too() -> None:
    model = onnx.parser.parse_model(HEAD + SYMBOLS + "{ p = acme.Peaks (x) y = Relu (p) }")
    graph = import_model(model)
    with declared([operator(outputs=[{"like": 0}])]):
        inference = Inference(graph)
        assert shown(inference.shapes(()), "y") == ("b", "3", "H", "W")
        graph.nodes[0].inputs[0] = graph.inputs[1]
        assert shown(inference.shapes(()), "y") == ("b2", "N")


def test_bodies_hold_them_too() -> None:
    body = """
        s = ReduceSum <keepdims = 0> (x)
        c = Cast <to = 9> (s)
        y = If (c) <then_branch = t () => (float t1) { t1 = acme.Peaks (x) },
                    else_branch = e () => (float e1) { e1 = acme.Peaks (x) }>
    """
    found = shapes(body, operator(outputs=[{"like": 0}]))
    assert shown(found, "t1") == ("b", "3", "H", "W")
    assert shown(found, "y") == ("b", "3", "H", "W")


# --- passes --------------------------------------------------------------------------------------


def test_passes_leave_equal_nodes_alone_and_evaluate_none() -> None:
    """An operator of which nobody knows whether it draws random numbers is no common subexpression."""
    model = onnx.parser.parse_model(
        HEAD
        + """
        g (float[b,3] x) => (float[b,3] y, float[3] k)
        <float[3] w = {1, 2, 3}>
        {
            [one] p = acme.Peaks (x)
            [two] q = acme.Peaks (x)
            [sum] y = Add (p, q)
            [constant] k = acme.Peaks (w)
            [dead] r = acme.Peaks (x)
        }"""
    )
    graph = import_model(model)
    with declared([operator(outputs=[{"like": 0}])]):
        optimise(graph, registry.passes())
    assert [node.name for node in graph.nodes] == ["one", "two", "sum", "constant"]
    exported = export_model(graph).graph
    assert [tuple(node.input) for node in exported.node[:2]] == [("x",), ("x",)]
    assert list(exported.node[3].input) == ["w"]
    assert exported.node[0].domain == "acme"


def test_identities_and_casts_around_them_go_and_names_of_ops_mean_nothing() -> None:
    """An operator called Relu of another domain is none."""
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 17, "acme" : 1]>'
        """
        g (float[b,3] x) => (float[b,3] y)
        {
            [in]  a = Identity (x)
            [one] p = acme.Relu (a)
            [two] q = acme.Relu (p)
            [cast] c = acme.Cast <to = 1> (q)
            [out] y = Identity (c)
        }"""
    )
    graph = import_model(model)
    same = [{"like": 0}]
    with declared(
        [operator(op="acme::Relu", outputs=same), operator(op="acme::Cast", outputs=same)]
    ):
        optimise(graph, registry.passes())
    assert [(node.name, node.op, node.domain) for node in graph.nodes] == [
        ("one", "Relu", "acme"),
        ("two", "Relu", "acme"),
        ("cast", "Cast", "acme"),
    ]
