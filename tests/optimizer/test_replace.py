from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from graphs import text

from optc.optimizer.model_file import load_graph, read_model
from optc.optimizer.modules import Modules
from optc.optimizer.replace import Replaced, replace_ranges
from optc.passes.custom_operator import declare, declared
from optc.passes.graph import export_model
from optc.passes.shape import infer
from optc.passes.split import REPLACED
from optc.specs.check import check
from optc.specs.diagnostic import Diagnostic, SpecError

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'

CHAIN = """
g (float[batch,4] x) => (float[batch,2] y)
<float[4,3] w = {1,2,3,4,5,6,7,8,9,10,11,12}, float[3,2] v = {1,2,3,4,5,6}, float one = {1}>
{
    [first]  a = MatMul (x, w)
    [second] b = Relu (a)
    [third]  c = Add (b, one)
    [last]   y = MatMul (c, v)
}"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.pt").write_bytes(b"")


def replaced(
    model: str, *entries: str, dims: str = "{batch: {min: 1, opt: 2, max: 8}}"
) -> tuple[gs.Graph, list[Replaced]]:
    """Return the graph of ``model`` with what ``entries`` of `partition.replace` ask for."""
    onnx.save(onnx.parser.parse_model(HEAD + model), "m.onnx")
    lines = "".join(f"    - {{{entry}, torch: m.pt}}\n" for entry in entries)
    head = f"version: 1\nmodel: m.onnx\ndims: {dims}\n" if dims else "version: 1\nmodel: m.onnx\n"
    Path("spec.yaml").write_text(f"{head}partition:\n  replace:\n{lines}")
    checked = check("spec.yaml")
    graph = load_graph(read_model(checked.model_path), checked.inputs)
    ranges = {
        name: (
            min(p[name].min for p in checked.profiles),
            max(p[name].max for p in checked.profiles),
        )
        for name in checked.profiles[0]
    }
    return graph, replace_ranges(graph, checked, ranges)


def problems(model: str, *entries: str, **more: Any) -> list[Diagnostic]:
    with pytest.raises(SpecError) as caught:
        replaced(model, *entries, **more)
    return list(caught.value.diagnostics)


def dims_of(graph: gs.Graph, found: list[Replaced], *names: str) -> list[list[str]]:
    """Return the extents that shape inference gives for tensors, with the ranges declared."""
    with declared([]):
        declare(each.operator for each in found)
        shapes = infer(graph, opset=graph.opset)
    return [[str(dim) for dim in shapes.dims(name) or ()] for name in names]


# --- what becomes of a range ---------------------------------------------------------------------


def test_a_range_becomes_one_node() -> None:
    graph, (found,) = replaced(CHAIN, "name: middle, from: [a], to: [c]")
    assert (
        text(export_model(graph, value_info=False))
        == """\
g (float[batch,4] x) => (float[batch,2] y)
   <float[4,3] w =  {1,2,3,4,5,6,7,8,9,10,11,12}, float[3,2] v =  {1,2,3,4,5,6}>
{
   [first] a = MatMul (x, w)
   [middle] c = optc.replaced.middle (a)
   [last] y = MatMul (c, v)
}"""
    )
    assert found.origins == ("second", "third")
    assert found.operator.key == (REPLACED, "middle")
    assert found.words == "partition.replace: middle"
    assert found.module.name == "m.pt"
    assert {entry.domain for entry in graph.import_domains} == {"", REPLACED}


def test_a_range_may_begin_at_an_input_and_end_at_an_output() -> None:
    graph, (found,) = replaced(CHAIN, "name: all, from: [x], to: [y]")
    assert [node.op for node in graph.nodes] == ["all"]
    assert dims_of(graph, [found], "y") == [["batch", "2"]]


def test_what_a_range_gives_has_the_extents_that_it_had() -> None:
    graph, found = replaced(CHAIN, "name: middle, from: [a], to: [c]")
    assert dims_of(graph, found, "c", "y") == [["batch", "3"], ["batch", "2"]]


def test_several_ranges_may_follow_each_other() -> None:
    graph, found = replaced(CHAIN, "name: one, from: [x], to: [b]", "name: two, from: [b], to: [y]")
    assert [node.op for node in graph.nodes] == ["one", "two"]
    assert dims_of(graph, found, "b", "y") == [["batch", "3"], ["batch", "2"]]


def test_a_node_that_bears_the_name_of_a_range_keeps_it() -> None:
    graph, (found,) = replaced(CHAIN, "name: first, from: [a], to: [c]")
    assert [node.name for node in graph.nodes] == ["first", "first_1", "last"]
    assert found.node == "first_1"


DATA_DEPENDENT = """
g (float[batch,4] x) => (float[n,4] y, float[m,1] z)
<float zero = {0}, int64[1] last = {-1}, int64[2] flat = {-1, 1}>
{
    [big]   a = Greater (x, zero)
    [where] w = NonZero (a)
    [turn]  t = Transpose <perm = [1, 0]> (w)
    [cut]   i = GatherND (x, t)
    [col]   z = Reshape (i, flat)
    [soft]  s = Softmax (x)
    [neg]   y = Neg (s)
}"""


def test_an_extent_that_the_data_decide_keeps_its_bound() -> None:
    graph, found = replaced(DATA_DEPENDENT, "name: pick, from: [a], to: [t]")
    with declared([]):
        declare(each.operator for each in found)
        shapes = infer(graph, opset=graph.opset)
    count, two = shapes.dims("t") or ()
    assert (str(count), two) == ("m", 2)  # as the output that it reaches declares it
    assert str(shapes.upper("m")) == "batch*4"


SHARED_SIZE = """
g (float[batch,4] x) => (float[batch,2] y, float[p,q] z)
<float[4,2] w = {1,2,3,4,5,6,7,8}, int64[1] minus = {-1}, int64[1] at = {0}>
{
    [mul]    a = MatMul (x, w)
    [shape]  s = Shape (a)
    [rows]   r = Gather (s, at)
    [target] t = Concat <axis = 0> (r, minus)
    [flat]   b = Reshape (a, t)
    [relu]   y = Relu (b)
    [other]  z = Reshape (x, t)
}"""


def test_sizes_that_are_read_elsewhere_too_stay() -> None:
    graph, (found,) = replaced(SHARED_SIZE, "name: head, from: [a], to: [y]")
    assert [node.name for node in graph.nodes] == [
        *("mul", "shape", "rows", "target"),
        *("other", "head"),
    ]
    assert found.origins == ("flat", "relu")


WITH_BODY = """
g (float[batch,4] x, bool c) => (float[batch,4] y)
{
    [abs] a = Abs (x)
    [exp] e = Exp (a)
    [if]  i = If (c)
      <then_branch = t () => (float[n,4] t1) { [inner] t1 = Neg (e) },
       else_branch = f () => (float[n,4] f1) { f1 = Sqrt (e) }>
    [last] y = Identity (i)
}"""


def test_bodies_go_with_their_node() -> None:
    graph, (found,) = replaced(WITH_BODY, "name: head, from: [a, c], to: [i]")
    assert [node.name for node in graph.nodes] == ["abs", "head", "last"]
    assert {"exp", "if", "inner"} <= set(found.origins)
    assert not graph.nodes[0].outputs[0].outputs[0].outputs[0].outputs[0].outputs[0].outputs


# --- what is in the way --------------------------------------------------------------------------

SIDE = """
g (float[batch,4] x, float[batch,4] side) => (float[batch,4] y)
{
    [abs]  a = Abs (x)
    [neg]  n = Neg (side)
    [exp]  e = Exp (n)
    [sum]  s = Add (a, e)
    [last] y = Relu (s)
}"""


def test_a_path_around_what_a_range_takes_is_shown() -> None:
    (problem,) = problems(SIDE, "name: head, from: [a], to: [y]")
    assert problem.code == "bad-replacement"
    assert problem.problem == (
        "`y` depends on `side`, an input of the model that is not under `from`: "
        "`side` -> neg -> exp -> sum -> last -> `y`"
    )
    assert problem.todo == "add `side` to `from`, or a tensor on that path"
    assert problem.place is not None
    assert (problem.place.line, problem.place.column) == (6, 35)


def test_a_size_that_is_fixed_is_no_path_around() -> None:
    model = """
    g (float[batch,4] x, float[2,8] image) => (float[batch,4] y)
    <int64[1] one = {1}>
    {
        [abs]   a = Abs (x)
        [shape] s = Shape (image)
        [width] w = Gather (s, one)
        [cast]  f = Cast <to = 1> (w)
        [last]  y = Div (a, f)
    }"""
    graph, (found,) = replaced(model, "name: head, from: [a], to: [y]")
    assert [node.op for node in graph.nodes] == ["Abs", "head"]
    assert found.origins == ("shape", "width", "cast", "last")[3:]


def test_a_fixed_size_of_a_tensor_inside_leads_out_of_nothing() -> None:
    model = """
    g (float[batch,4] x) => (float[batch,3] y, int64 n)
    <float[4,3] w = {1,2,3,4,5,6,7,8,9,10,11,12}, int64 one = {1}>
    {
        [mul]   a = MatMul (x, w)
        [relu]  b = Relu (a)
        [shape] s = Shape (b)
        [width] k = Gather (s, one)
        [cast]  f = Cast <to = 1> (k)
        [last]  y = Div (b, f)
        [twice] n = Add (k, k)
    }"""
    graph, (found,) = replaced(model, "name: head, from: [a], to: [y]")
    assert [node.op for node in graph.nodes] == ["MatMul", "Add", "head"]
    assert found.origins == ("relu", "last")
    assert dims_of(graph, [found], "y") == [["batch", "3"]]


def test_what_a_body_reads_is_a_path_around_too() -> None:
    (problem,) = problems(WITH_BODY, "name: head, from: [c], to: [i]")
    assert "`x` -> abs -> exp -> if -> `i`" in problem.problem


def test_a_tensor_inside_that_is_read_outside_is_told_with_its_reader() -> None:
    model = CHAIN.replace("MatMul (c, v)", "MatMul (c, v)\n    [spy] z = Neg (b)").replace(
        "(float[batch,2] y)", "(float[batch,2] y, float[batch,3] z)"
    )
    (problem,) = problems(model, "name: middle, from: [a], to: [c]")
    assert problem.problem == (
        "`b` is made inside the range `middle` and read by the node `spy`, which is outside of it"
    )
    assert problem.todo == "add `b` to `to`, and let the module give it, too"
    graph, _ = replaced(model, "name: middle, from: [a], to: [c, b]")
    assert [node.op for node in graph.nodes] == ["MatMul", "middle", "MatMul", "Neg"]


def test_an_output_of_the_model_is_read_by_its_caller() -> None:
    (problem,) = problems(
        CHAIN.replace("(float[batch,2] y)", "(float[batch,2] y, float[batch,3] b)"),
        "name: middle, from: [a], to: [c]",
    )
    assert "read by the caller: it is an output of the model" in problem.problem


def test_ranges_that_share_a_node_are_refused() -> None:
    (problem,) = problems(CHAIN, "name: one, from: [x], to: [c]", "name: two, from: [b], to: [y]")
    assert problem.problem == "the node `third` is in the range `two` and in the range `one`"


def test_a_range_that_needs_what_follows_from_it_is_shown() -> None:
    model = """
    g (float[batch,4] x) => (float[batch,4] y)
    {
        [abs]  a = Abs (x)
        [exp]  e = Exp (a)
        [neg]  n = Neg (e)
        [last] y = Add (a, n)
    }"""
    (problem,) = problems(model, "name: head, from: [x, n], to: [e, y]")
    assert problem.problem == (
        "the range `head` needs what follows from what it makes: "
        "the range `head` -> neg -> the range `head`"
    )


def test_ranges_that_need_each_other_are_shown() -> None:
    model = """
    g (float[batch,4] p, float[batch,4] q) => (float[batch,4] y, float[batch,4] z)
    {
        [a1] a = Abs (p)
        [b1] b = Exp (q)
        [a2] y = Neg (b)
        [b2] z = Sqrt (a)
    }"""
    found = problems(
        model, "name: one, from: [p, b], to: [a, y]", "name: two, from: [q, a], to: [b, z]"
    )
    assert "needs what follows from what it makes: the range" in found[0].problem


def test_a_range_that_nothing_leads_to_is_refused() -> None:
    (problem,) = problems(
        """
        g (float[batch,4] x) => (float[batch,4] y, float[batch,4] z)
        <float[1] w = {1}>
        {
            [abs] a = Abs (x)
            [exp] c = Exp (w)
            [one] y = Add (x, c)
            [two] z = Neg (a)
        }""",
        "name: head, from: [a], to: [c]",
    )
    assert problem.problem == "nothing leads from `a` to `c`"


def test_all_that_is_wrong_with_all_ranges_comes_at_once() -> None:
    model = SIDE.replace("{\n", "{\n    [spy] k = Sqrt (n)\n", 1).replace(
        "(float[batch,4] y)", "(float[batch,4] y, float[batch,4] k)"
    )
    found = problems(model, "name: head, from: [a], to: [y]", "name: neck, from: [side], to: [e]")
    assert len(found) == 2
    assert "`side` -> neg" in found[0].problem
    assert "read by the node `spy`" in found[1].problem


def test_a_sequence_cannot_be_given_by_a_module() -> None:
    (problem,) = problems(
        """
        g (float[batch,4] x) => (float[batch,2] y)
        <int64 at = {0}>
        {
            [abs]   a = Abs (x)
            [split] s = SplitToSequence <axis = 1> (a)
            [at]    y = SequenceAt (s, at)
        }""",
        "name: head, from: [a], to: [s]",
    )
    assert problem.problem == "`s` is no tensor, and a module takes and gives tensors"


# --- what can be told from the outline -----------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "code", "words"),
    [
        ("from: [aa], to: [c]", "unknown-tensor", "the model has no tensor `aa`"),
        ("from: [a], to: [w]", "bad-replacement", "`w` is a constant: no node computes it"),
        ("from: [w], to: [c]", "bad-replacement", "`w` is a constant: the module can have it"),
        ("from: [a], to: [x]", "bad-replacement", "`x` is an input of the model: no range ends"),
        ("from: [a, a], to: [c]", "bad-replacement", "`a` stands under `from` twice"),
        ("from: [a], to: [a]", "bad-replacement", "`a` stands under `from` and under `to`"),
    ],
)
def test_names_are_checked_before_anything_is_loaded(entry: str, code: str, words: str) -> None:
    (problem,) = problems(CHAIN, f"name: middle, {entry}")
    assert problem.code == code
    assert words in problem.problem
    assert problem.place is not None
    assert problem.place.line == 6


def test_two_ranges_cannot_give_one_tensor_or_bear_one_name() -> None:
    found = problems(CHAIN, "name: one, from: [a], to: [c]", "name: one, from: [b], to: [c]")
    assert [each.problem for each in found] == [
        "two replacements are called `one`",
        "both `one` and `one` are to give `c`",
    ]


def test_a_range_does_not_bear_the_name_of_a_scope() -> None:
    replaced(CHAIN, "name: middle, from: [a], to: [c]")
    text = Path("spec.yaml").read_text()
    check("spec.yaml")
    Path("spec.yaml").write_text(f"{text}  scopes: {{middle: last}}\n")
    with pytest.raises(SpecError) as caught:
        check("spec.yaml")
    (problem,) = caught.value.diagnostics
    assert problem.code == "bad-replacement"
    assert problem.problem == "a scope is called `middle`, too"
    assert problem.place is not None


def test_a_module_that_is_not_there_is_told_with_the_nearest_name() -> None:
    Path("m.pt").rename("m.pt2")
    (problem,) = problems(CHAIN, "name: middle, from: [a], to: [c]")
    assert problem.code == "module-not-found"
    assert problem.todo == "write `m.pt2`"


# --- modules beside it ---------------------------------------------------------------------------


def test_origins_lead_through_a_range() -> None:
    _, found = replaced(CHAIN, "name: middle, from: [a], to: [c]")

    class Spec:
        operators = ()

    class Checked:
        spec = Spec()

        def place(self, *keys: str | int) -> None:
            return None

    modules = Modules(Checked(), found)  # type: ignore[arg-type]
    assert modules.origins({"all": ("first", "middle"), "x": ()}) == {
        "all": ("first", "second", "third"),
        "x": (),
    }


def test_a_range_as_a_whole_computes_what_its_nodes_did() -> None:
    """What is left around a range gives, with the range's own nodes in it, what the model gave."""
    from optc.optimizer.reference import OrtRunner

    graph, _ = replaced(CHAIN, "name: middle, from: [a], to: [c]")
    before = OrtRunner(Path("m.onnx"), Path())
    model = export_model(graph)
    inner = onnx.parser.parse_graph(
        "middle (float[n,3] a) => (float[n,3] c) <float one = {1}> { b = Relu (a)\nc = Add (b, one) }"
    )
    function = onnx.helper.make_function(
        REPLACED,
        "middle",
        ["a"],
        ["c"],
        [
            onnx.helper.make_node("Constant", [], ["one"], value=inner.initializer[0]),
            *inner.node,
        ],
        [onnx.helper.make_opsetid("", 17)],
    )
    model.functions.append(function)
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    after = OrtRunner(model, Path())
    np.testing.assert_array_equal(before.run({"x": x})["y"], after.run({"x": x})["y"])
