import numpy as np
import onnx
from graphs import assert_same_numbers, rewrite, text
from onnx import numpy_helper

from optc.passes.graph import StoredValues, export_model, import_model
from optc.passes.merge_common_subexpressions import MergeCommonSubexpressions
from optc.passes.pipeline import optimise

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'


def test_nodes_that_compute_the_same_become_one_and_so_do_their_readers() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[2] x) => (float[2] y)
        {
            [a] p = Elu <alpha = 2.0> (x)
            [b] q = Elu <alpha = 2.0> (x)
            [c] r = Neg (p)
            [d] s = Neg (q)
            [e] y = Add (r, s)
        }""",
        MergeCommonSubexpressions(),
    )
    assert (
        text(after)
        == """\
g (float[2] x) => (float[2] y) {
   [a] p = Elu <alpha: float = 2> (x)
   [c] r = Neg (p)
   [e] y = Add (r, r)
}"""
    )
    assert report.merged == {"a": ("a", "b"), "c": ("c", "d")}
    assert_same_numbers(before, after, rtol=0)


def test_unlike_attributes_types_and_orders_are_told_apart() -> None:
    _, _, report = rewrite(
        HEAD
        + """
        g (float[2,2] x, float[2,2] z) => (float[2,2] y)
        <float[2,2] zero = {0, 0, 0, 0}, float[2,2] minus = {-0.0, -0.0, -0.0, -0.0}>
        {
            a = Elu <alpha = 2.0> (x)
            b = Elu <alpha = 1.0> (x)
            c = Sub (x, z)
            d = Sub (z, x)
            e = Add (x, zero)
            f = Add (x, minus)
            g = Transpose <perm = [1, 0]> (x)
            h = Transpose <perm = [0, 1]> (x)
            y = Sum (a, b, c, d, e, f, g, h)
        }""",
        MergeCommonSubexpressions(),
    )
    assert not report.rewritten


def test_the_name_of_an_output_is_taken_over() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[2] x) => (float[2] y, float[2] z)
        {
            [a] p = Exp (x)
            [b] y = Exp (x)
            [c] z = Neg (p)
        }""",
        MergeCommonSubexpressions(),
    )
    assert "[a] y = Exp (x)\n   [c] z = Neg (y)" in text(after)
    assert report.merged == {"a": ("a", "b")}
    assert_same_numbers(before, after, rtol=0)


def test_two_outputs_keep_two_nodes() -> None:
    _, after, report = rewrite(
        HEAD + "g (float[2] x) => (float[2] y, float[2] z) { [a] y = Exp (x)  [b] z = Exp (x) }",
        MergeCommonSubexpressions(),
    )
    assert len(after.graph.node) == 2
    assert report.skipped == {"b": "it computes what `a` does under another name"}


def test_random_numbers_are_not_merged() -> None:
    _, _, report = rewrite(
        HEAD
        + """
        g (float[2] x) => (float[2] y)
        {
            a = RandomNormalLike (x)
            b = RandomNormalLike (x)
            y = Sub (a, b)
        }""",
        MergeCommonSubexpressions(),
    )
    assert not report.rewritten


def test_operators_nobody_knows_are_not_merged() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 17, "my" : 1]>'
        "g (float[2] x) => (float[2] y) { a = my.Op (x)  b = my.Op (x)  y = Sub (a, b) }"
    )
    graph = import_model(model)
    assert optimise(graph, [MergeCommonSubexpressions()]).records[0].rewritten == 0


def test_constants_with_the_same_bytes_become_one() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[2] x) => (float[2] y)
        <float[2] a = {1, 2}, float[2] b = {1, 2}, float[2] c = {1, 3}, float[1,2] d = {1, 2}>
        {
            p = Add (x, a)
            q = Mul (p, b)
            r = Sub (q, c)
            s = Mul (r, d)
            y = ReduceSum <keepdims = 0> (s, axis)
        }""".replace("<float[2] a", "<int64[1] axis = {0}, float[2] a"),
        MergeCommonSubexpressions(),
    )
    assert {tensor.name for tensor in after.graph.initializer} == {"a", "c", "d", "axis"}
    assert_same_numbers(before, after, rtol=0)


def test_strings_are_compared_by_their_text() -> None:
    before, after, _ = rewrite(
        '<ir_version: 9, opset_import: ["" : 20]>'
        """
        g (float[1] x) => (string[1] y, float[1] z)
        <string[1] a = {"one"}, string[1] b = {"one"}, string[1] c = {"two"}>
        {
            p = StringConcat (a, c)
            y = StringConcat (p, b)
            z = Relu (x)
        }""",
        MergeCommonSubexpressions(),
    )
    assert len(after.graph.initializer) == 2
    assert len(before.graph.initializer) == 3


def test_weights_are_read_only_where_another_may_be_the_same() -> None:
    model = onnx.parser.parse_model(
        HEAD + "g (float[1,200] x) => (float[1,100] y) { a = MatMul (x, v)  b = MatMul (a, w)"
        "  c = Add (b, w2)  y = MatMul (c, u) }"
    )
    rng = np.random.default_rng(0)
    for name, shape in {"v": (200, 200), "w": (200, 200), "w2": (1, 200), "u": (200, 100)}.items():
        array = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    graph = import_model(model)
    optimise(graph, [MergeCommonSubexpressions()])
    read = {node.inputs[1].name: node.inputs[1]._values for node in graph.nodes}
    assert len(read) == 4
    assert all(isinstance(values, StoredValues) for values in read.values())


def test_large_weights_are_shared_by_branches_small_ones_are_not() -> None:
    array = np.random.default_rng(0).standard_normal((200, 200)).astype(np.float32)
    model = onnx.parser.parse_model(
        HEAD
        + """
        g (bool c, float[1,200] x) => (float[1,200] y)
        {
            y = If (c) <
                then_branch = t () => (float[1,200] a) <float k = {2}>
                    { p = MatMul (x, w)  a = Mul (p, k) },
                else_branch = f () => (float[1,200] b) <float k2 = {2}>
                    { q = MatMul (x, w2)  b = Div (q, k2) }
            >
        }"""
    )
    for index, name in enumerate(("w", "w2")):
        body = model.graph.node[0].attribute[index].g
        body.initializer.append(numpy_helper.from_array(array, name))
    onnx.checker.check_model(model)
    graph = import_model(model)
    optimise(graph, [MergeCommonSubexpressions()])
    after = export_model(graph)
    assert [tensor.name for tensor in after.graph.initializer] == ["w"]
    bodies = [attribute.g for attribute in after.graph.node[0].attribute]
    assert [len(body.initializer) for body in bodies] == [1, 1]
    assert_same_numbers(model, after, rtol=1e-4)


def test_an_output_that_is_a_constant_keeps_its_own() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (bool c, float[2] x) => (float[2] y)
        <float[2] k = {1, 2}>
        {
            z = Add (x, k)
            i = If (c) <
                then_branch = t () => (float[2] a) <float[2] a = {1, 2}> { },
                else_branch = f () => (float[2] b) { b = Mul (z, k) }
            >
            y = Add (i, z)
        }""",
        MergeCommonSubexpressions(),
    )
    assert after.graph.node[1].attribute[0].g.initializer[0].name == "a"
    assert_same_numbers(before, after, rtol=0)


def test_convolutions_are_not_shared_before_their_normalisations_are_in_them() -> None:
    source = (
        HEAD
        + """
        g (float[1,1,2,2] x) => (float[1,1,2,2] y, float[1,1,2,2] z)
        <float[1,1,1,1] w = {2}, float[1] a = {1}, float[1] b = {2}>
        {
            c = Conv (x, w)
            d = Conv (x, w)
            y = BatchNormalization (c, a, a, a, a)
            z = BatchNormalization (d, b, b, b, b)
        }"""
    )
    _, after, _ = rewrite(source, MergeCommonSubexpressions())
    assert len(after.graph.node) == 4
    _, after, _ = rewrite(
        source.replace("BatchNormalization (c, a, a, a, a)", "Relu (c)").replace(
            "BatchNormalization (d, b, b, b, b)", "Neg (d)"
        ),
        MergeCommonSubexpressions(),
    )
    assert len(after.graph.node) == 3
