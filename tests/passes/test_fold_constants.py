from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import assert_same_numbers, rewrite, run, text
from onnx import TensorProto, helper, numpy_helper

from optc.passes.fold_constants import FoldConstants
from optc.passes.graph import export_model, import_model
from optc.passes.pipeline import optimise

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'


def test_nodes_that_read_only_constants_become_their_value() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[1,2] x) => (float[1,2] y)
        <float[2,2] w = {1, 2, 3, 4}, float s = {10}>
        {
            [turn]  t = Transpose <perm = [1, 0]> (w)
            [scale] m = Mul (t, s)
            [mat]   y = MatMul (x, m)
        }""",
        FoldConstants(),
    )
    assert (
        text(after)
        == """\
g (float[1,2] x) => (float[1,2] y)
   <float[2,2] m =  {10,30,20,40}>
{
   [mat] y = MatMul (x, m)
}"""
    )
    assert report.removed == dict.fromkeys(("turn", "scale"), "what it computes is constant")
    assert_same_numbers(before, after, rtol=1e-6)


def test_an_output_that_is_constant_keeps_its_name() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[1] x) => (float[1] y, float[2] z)
        <float[2] w = {1, 2}>
        {
            y = Relu (x)
            n = Neg (w)
            z = Identity (n)
        }""",
        FoldConstants(),
    )
    assert [node.op_type for node in after.graph.node] == ["Relu"]
    assert_same_numbers(before, after, rtol=0)


def test_a_large_result_of_small_constants_stays() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[1] x) => (float[300,300] y)
        <int64[2] shape = {300, 300}, int64[1] three = {3}, float ten = {10}>
        {
            [fill] big = ConstantOfShape (shape)
            [plus] ones = Add (big, ten)
            [less] half = Sub (three, three)
            [use]  y = Add (ones, x)
        }""",
        FoldConstants(),
    )
    assert [node.op_type for node in after.graph.node] == ["ConstantOfShape", "Add", "Add"]
    assert set(report.skipped) == {"fill", "plus"}
    assert report.skipped["plus"] == "the model would grow by 360,000 bytes"
    assert after.ByteSize() < before.ByteSize() + 200


def test_a_large_value_folds_where_what_follows_from_it_is_small() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[1] x) => (float[1] y)
        <int64[2] shape = {300, 300}, float ten = {10}>
        {
            big = ConstantOfShape (shape)
            ones = Add (big, ten)
            most = ReduceMax <keepdims = 0> (ones)
            y = Add (most, x)
        }""",
        FoldConstants(),
    )
    assert [node.op_type for node in after.graph.node] == ["Add"]
    assert_same_numbers(before, after, rtol=0)


def large_model(nodes: str, outputs: str, rows: int = 200) -> onnx.ModelProto:
    """Return a model with a weight `w` of 160 kB, or of more rows."""
    model = onnx.parser.parse_model(f"{HEAD} g (float[1,{rows}] x) => ({outputs}) {{ {nodes} }}")
    weight = np.random.default_rng(0).standard_normal((rows, 200)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    onnx.checker.check_model(model)
    return model


def folded(
    model: onnx.ModelProto, *, small_bytes: int = 0
) -> tuple[onnx.ModelProto, dict[str, str]]:
    graph = import_model(model)
    report = optimise(graph, [FoldConstants(small_bytes=small_bytes)])
    after = export_model(graph)
    onnx.checker.check_model(after)
    columns = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    inputs = {"x": np.ones((1, columns), np.float32)}
    for name, value in run(model, inputs).items():
        np.testing.assert_allclose(run(after, inputs)[name], value, rtol=1e-3)
    return after, report.records[0].skipped


def test_a_large_weight_may_be_transposed_as_the_copy_takes_its_place() -> None:
    after, skipped = folded(
        large_model("t = Transpose (w) y = MatMul (x, t)", "float[1,200] y"),
    )
    assert [node.op_type for node in after.graph.node] == ["MatMul"]
    assert not skipped


FILL = (
    "s = Constant <value = int64[2] {200, 200}> () c = Constant <value = int64 {1}> ()"
    " f = ConstantOfShape (s)"
)
COMPUTED = {
    "computed": ("n = Neg (w) a = MatMul (x, w) y = MatMul (a, n)", 0),
    "computed, then moved": (
        "n = Neg (w) t = Transpose (n) a = MatMul (x, w) y = MatMul (a, t)",
        0,
    ),
    "moved": ("t = Transpose (w) a = MatMul (x, w) y = MatMul (a, t)", 1),
    "repeated": (f"{FILL} a = MatMul (x, w) y = MatMul (a, f)", 1),
    "repeated, then computed": (
        f"{FILL} r = CumSum (f, c) a = MatMul (x, w) y = MatMul (a, r)",
        2,
    ),
}


@pytest.mark.parametrize(("nodes", "left"), COMPUTED.values(), ids=COMPUTED)
def test_a_small_model_may_store_what_is_computed(nodes: str, left: int) -> None:
    model = large_model(nodes, "float[1,200] y")
    after, skipped = folded(model, small_bytes=400_000)
    assert len(after.graph.node) == 2 + left
    assert bool(skipped) == bool(left)
    _, skipped = folded(model, small_bytes=200_000)
    assert len(skipped) >= 1


def test_a_large_weight_that_is_still_read_gets_no_transposed_copy() -> None:
    after, skipped = folded(
        large_model(
            "[turn] t = Transpose (w) a = MatMul (x, t) y = MatMul (a, w)", "float[1,200] y"
        )
    )
    assert [node.op_type for node in after.graph.node] == ["Transpose", "MatMul", "MatMul"]
    assert skipped == {"turn": "the model would grow by 160,000 bytes"}


def test_one_weight_pays_for_one_copy_only() -> None:
    after, skipped = folded(
        large_model(
            "[a] t = Transpose (w) [b] n = Neg (w) m = MatMul (x, t) y = MatMul (m, n)",
            "float[1,200] y",
        )
    )
    assert len(after.graph.node) == 4
    assert set(skipped) == {"a", "b"}


def test_a_large_value_folds_where_it_is_little_beside_the_weights() -> None:
    shape = "shape = Constant <value = int64[2] {90, 200}> ()"
    nodes = f"{shape} i = ConstantOfShape (shape) a = MatMul (x, w) y = Sub (a, i)"
    after, skipped = folded(large_model(nodes, "float[90,200] y"))
    assert len(after.graph.node) == 3  # 72 kB beside 160 kB
    assert list(skipped.values()) == ["the model would grow by 72,000 bytes"]
    after, skipped = folded(large_model(nodes, "float[90,200] y", rows=1000))
    assert len(after.graph.node) == 2  # beside 800 kB
    assert not skipped


def test_a_large_weight_behind_identities_is_shared_not_copied() -> None:
    model = large_model(
        "i = Identity (w) j = Identity (i) a = MatMul (x, w) y = MatMul (a, j)", "float[1,200] y"
    )
    after, _ = folded(model)
    assert [node.op_type for node in after.graph.node] == ["MatMul", "MatMul"]
    assert len(after.graph.initializer) == 1


def test_a_large_weight_that_is_an_output_keeps_its_identity() -> None:
    after, skipped = folded(
        large_model("y = MatMul (x, w) [name] z = Identity (w)", "float[1,200] y, float[200,200] z")
    )
    assert len(after.graph.initializer) == 1
    assert skipped == {"name": "it gives a large constant the name of an output"}


def test_quantised_weights_stay_quantised() -> None:
    _, _, report = rewrite(
        HEAD
        + """
        g (float[1,2] x) => (float[1,2] y)
        <int8[2,2] w = {1, 2, 3, 4}, float s = {0.5}>
        {
            [dq] d = DequantizeLinear (w, s)
            y = MatMul (x, d)
        }""",
        FoldConstants(),
    )
    assert report.skipped == {"dq": "it says in which precision its reader computes"}
    assert not report.rewritten


def test_random_numbers_are_drawn_at_run_time() -> None:
    source = """
        g (float[2] x) => (float[2] y)
        <int64[1] shape = {2}>
        {
            zero = ConstantOfShape (shape)
            r = RandomNormalLike <seed = 1.0> (zero)
            s = RandomUniform <shape = [2]> ()
            a = Add (x, r)
            y = Add (a, s)
        }"""
    graph = import_model(onnx.parser.parse_model(HEAD + source))
    optimise(graph, [FoldConstants()])
    assert [node.op for node in graph.nodes] == [
        "RandomNormalLike",
        "RandomUniform",
        "Add",
        "Add",
    ]


def test_a_loop_that_reads_only_constants_folds_as_a_whole() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (int64[1] x) => (int64[1] y)
        <int64 n = {4}, bool go = {1}, int64[1] one = {1}, int64[1] two = {2}>
        {
            start = Add (one, one)
            last = Loop (n, go, start) <body = b (int64 i, bool c, int64[1] v) => (bool d, int64[1] w) {
                d = Identity (c)
                w = Mul (v, two)
            }>
            y = Add (x, last)
        }""",
        FoldConstants(),
    )
    assert (
        text(after)
        == """\
g (int64[1] x) => (int64[1] y)
   <int64[1] last =  {32}>
{
   [Add_2] y = Add (x, last)
}"""
    )
    assert_same_numbers(before, after, rtol=0)


def test_what_is_constant_in_a_body_folds_there() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (bool c, float[2] x) => (float[2] y)
        <float[2] w = {1, 2}>
        {
            n = Neg (w)
            y = If (c) <
                then_branch = t () => (float[2] a) { e = Exp (n)  m = Floor (e)  a = Add (x, m) },
                else_branch = f () => (float[2] b) { b = Ceil (n) }
            >
        }""",
        FoldConstants(),
    )
    (node,) = after.graph.node
    then, other = (attribute.g for attribute in node.attribute)
    assert [inner.op_type for inner in then.node] == ["Add"]
    assert not other.node
    assert_same_numbers(before, after, rtol=0)


def test_one_node_that_cannot_be_computed_does_not_stop_the_others() -> None:
    source = """
        g (float[1] x, bool c) => (float[1] y)
        <float[2] w = {1, 2}, int64[1] beyond = {7}, float[1] one = {1}>
        {
            a = Neg (one)
            y = If (c) <
                then_branch = t () => (float[1] p) {
                    [fine] f = Exp (one) [bad] g = Gather (w, beyond) [sum] h = Add (f, g)
                    p = Add (x, h)
                },
                else_branch = e () => (float[1] q) { q = Add (x, a) }
            >
        }"""
    model = onnx.parser.parse_model(HEAD + source)
    graph = import_model(model)
    report = optimise(graph, [FoldConstants()]).records[0]
    assert set(report.skipped) == {"bad"}
    assert "out of data bounds" in report.skipped["bad"]
    then = graph.nodes[0].attrs["then_branch"]
    assert [node.name for node in then.nodes][:2] == ["bad", "sum"]
    after = export_model(graph)
    inputs = {"x": np.ones(1, np.float32), "c": np.array(False)}
    np.testing.assert_array_equal(run(after, inputs)["y"], run(model, inputs)["y"])


TYPES = {
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "double": TensorProto.DOUBLE,
    "uint8": TensorProto.UINT8,
    "float8": TensorProto.FLOAT8E4M3FN,
    "int4": TensorProto.INT4,
}


@pytest.mark.parametrize("type_", TYPES.values(), ids=TYPES)
def test_every_type_folds_to_what_the_runtime_computes(type_: int) -> None:
    nodes = [
        helper.make_node("Reshape", ["w", "shape"], ["s"]),
        helper.make_node("Cast", ["s"], ["r"], to=type_),
        helper.make_node("Cast", ["r"], ["back"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "back"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2])],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2]),
            helper.make_tensor_value_info("r", type_, [2, 2]),
        ],
        [
            numpy_helper.from_array(np.array([1.1, 2.7, 3.3, 4.9], np.float32), "w"),
            numpy_helper.from_array(np.array([2, 2]), "shape"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    graph = import_model(model)
    optimise(graph, [FoldConstants()])
    assert [node.op for node in graph.nodes] == ["Add"]
    after = export_model(graph)
    onnx.checker.check_model(after)
    assert graph.outputs[1].dtype == helper.tensor_dtype_to_np_dtype(type_)
    inputs = {"x": np.zeros((2, 2), np.float32)}
    for each in (model, after):  # numpy knows nothing of most of these types
        del each.graph.output[1]
    np.testing.assert_array_equal(run(after, inputs)["y"], run(model, inputs)["y"])


def test_strings_fold() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 20]> g (float[1] x) => (float[1] y, string[2] z)'
        '<string[2] a = {"b", "c"}> { y = Relu (x) z = StringConcat (a, a) }'
    )
    graph = import_model(model)
    optimise(graph, [FoldConstants()])
    after = export_model(graph)
    assert len(after.graph.node) == 1
    assert run(after, {"x": np.zeros(1, np.float32)})["z"].tolist() == ["bb", "cc"]


def test_an_operator_without_a_kernel_is_computed_by_the_reference() -> None:
    before, after, _ = rewrite(
        '<ir_version: 9, opset_import: ["" : 17]>'
        """
        g (double[2] x) => (double[2] y)
        <double[2] w = {0.5, 2}>
        {
            e = Erf (w)
            y = Add (x, e)
        }""",
        FoldConstants(),
    )
    assert [node.op_type for node in after.graph.node] == ["Add"]
    (weight,) = map(numpy_helper.to_array, after.graph.initializer)
    np.testing.assert_allclose(weight, [0.5204998778130465, 0.9953222650189527], rtol=1e-7)
    assert weight.dtype == np.float64
    assert len(before.graph.node) == 2


def test_a_sequence_folds_only_together_with_what_reads_it() -> None:
    source = """
        g (float[1] x) => (float[1] y, float[2] z, seq(float[1]) s)
        <float[1] a = {1}, float[1] b = {2}, int64 at = {1}>
        {
            [make] q = SequenceConstruct (a, b)
            [take] t = SequenceAt (q, at)
            y = Add (x, t)
            [join] z = ConcatFromSequence <axis = 0> (q)
            [give] s = SequenceInsert (q, a)
        }"""
    graph = import_model(onnx.parser.parse_model(HEAD + source))
    optimise(graph, [FoldConstants()])
    left = "SequenceConstruct SequenceAt Add ConcatFromSequence SequenceInsert"
    assert " ".join(node.op for node in graph.nodes) == left
    graph = import_model(onnx.parser.parse_model(HEAD + source.replace(", seq(float[1]) s", "")))
    optimise(graph, [FoldConstants()])
    assert [node.op for node in graph.nodes if node.op != "SequenceInsert"] == ["Add"]


def test_weights_in_external_files_fold(tmp_path: Path) -> None:
    model = large_model("t = Transpose (w) y = MatMul (x, t)", "float[1,200] y")
    expected = run(model, {"x": np.ones((1, 200), np.float32)})
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin")
    graph = import_model(onnx.load(tmp_path / "m.onnx", load_external_data=False), tmp_path)
    optimise(graph, [FoldConstants()])
    after = export_model(graph)
    assert [node.op_type for node in after.graph.node] == ["MatMul"]
    found = run(after, {"x": np.ones((1, 200), np.float32)})
    np.testing.assert_allclose(found["y"], expected["y"], rtol=1e-3)
