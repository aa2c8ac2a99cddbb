"""What stands in front of an If or behind it in place of in its branches."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from generated import models
from graphs import parsed, rewrite, run
from hypothesis import HealthCheck, given, note, settings
from onnx import ModelProto
from test_generated_graphs import expected_outputs, outputs

from optc.passes.graph import all_nodes, export_model, import_model
from optc.passes.open_branches import OpenBranches
from optc.passes.pipeline import optimise

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'


def choosing(then: str, other: str, *, more: str = "") -> str:
    """Return a model whose If gives `t` or `e`."""
    return f"""{HEAD} g (float[2,2] x, float[2,2] z, bool c, float[2,k] v) => (float[2,2] y)
        <float[2,2] w = {{1, 2, 3, 4}}, float[2,2] same = {{1, 2, 3, 4}}, float[2,2] u = {{5,6,7,8}},
         int64[1] third = {{2}}>
        {{ [before] o = Neg (z) [if] y = If (c) <
            then_branch = a () => (float[2,2] t) {{ {then} }},
            else_branch = b () => (float[2,2] e) {{ {other} }}> {more} }}"""


def everything(source: str) -> OpenBranches:
    """Return the pass that takes out all it can."""
    names = frozenset(node.name for node in all_nodes(import_model(parsed(source))))
    return OpenBranches(front=names, behind=names)


def ops(graph: onnx.GraphProto) -> list[str]:
    return [node.op_type for node in graph.node]


def branches(model: ModelProto) -> tuple[list[str], list[str]]:
    """Return the ops of both branches."""
    (node,) = [node for node in model.graph.node if node.op_type == "If"]
    bodies = {attr.name: ops(attr.g) for attr in node.attribute}
    return bodies["then_branch"], bodies["else_branch"]


def assert_same_both_ways(before: ModelProto, after: ModelProto, **given_: Any) -> None:
    rng = np.random.default_rng(0)
    for taken in (True, False):
        feed: dict[str, Any] = {
            name: rng.standard_normal((2, 2)).astype(np.float32) for name in "xzv"
        }
        feed |= {"c": np.array(taken), **given_}
        found = run(after, feed)
        for name, value in run(before, feed).items():
            assert found[name].shape == value.shape
            np.testing.assert_array_equal(found[name], value)


def opened(source: str) -> tuple[ModelProto, ModelProto, Any]:
    return rewrite(source, everything(source))


def test_what_reads_nothing_of_the_branch_stands_in_front() -> None:
    source = choosing(
        "[p] a1 = MatMul (x, w) [r] a2 = RandomNormalLike (a1) [m] a3 = Mul (a2, z) "
        "[s] a4 = Sub (a3, a3) [q] t = Add (a4, a1)",
        "[n] e = Abs (x)",
    )
    before, after, report = opened(source)
    assert ops(after.graph) == ["MatMul", "Abs", "If"]
    assert branches(after) == (["RandomNormalLike", "Mul", "Sub", "Add"], ["Identity"])
    assert report.merged["p"] == ("p",)
    assert_same_both_ways(before, after)


def test_only_what_is_wanted_moves() -> None:
    source = choosing("[p] a = MatMul (x, w) [q] t = Relu (a)", "[n] e = Abs (x)")
    before, after, _ = rewrite(source, OpenBranches(front=frozenset({"p"})))
    assert branches(after) == (["Relu"], ["Abs"])
    assert_same_both_ways(before, after)


def test_what_may_fail_stays_in_its_branch() -> None:
    source = choosing("[p] a = Gather <axis = 1> (v, third) [q] t = Add (x, a)", "[n] e = Abs (x)")
    before, after, report = rewrite(source, OpenBranches(front=frozenset({"p", "q"})))
    assert not report.rewritten
    feed = {"x": np.ones((2, 2), np.float32), "z": np.ones((2, 2), np.float32)}
    feed |= {"v": np.ones((2, 1), np.float32), "c": np.array(False)}
    np.testing.assert_array_equal(run(after, feed)["y"], run(before, feed)["y"])


TAIL = "[{0}m] {0}1 = MatMul ({0}0, {1}) [{0}r] {2} = Relu ({0}1)"


def test_the_last_nodes_of_both_branches_stand_behind() -> None:
    """Weights that are the same are the same, whatever they are called."""
    source = choosing(
        "[f] a0 = RandomUniform <shape = [2, 2], low = 1.0, high = 1.0> () "
        + TAIL.format("a", "w", "t"),
        "[g] b0 = Cosh (o) " + TAIL.format("b", "same", "e"),
    )
    before, after, report = rewrite(source, OpenBranches(behind=frozenset({"am", "ar"})))
    assert ops(after.graph) == ["Neg", "If", "MatMul", "Relu"]
    assert branches(after) == (["RandomUniform"], ["Cosh"])
    assert report.merged["am"] == ("am", "bm")
    assert_same_both_ways(before, after)


@pytest.mark.parametrize(
    ("then", "other"),
    [
        (TAIL.format("a", "w", "t"), TAIL.format("b", "u", "e")),
        ("[ar] t = MatMul (a0, w)", "[br] e = MatMul (w, b0)"),
        ("[ar] t = LeakyRelu <alpha = 0.1> (a0)", "[br] e = LeakyRelu <alpha = 0.2> (b0)"),
        ("[ar] t = Relu (a0)", "[br] e = Neg (b0)"),
        ("[ar] t = Mul (a0, a0)", "[br] e = Mul (b0, x)"),
    ],
)
def test_what_differs_stays(then: str, other: str) -> None:
    """Of two nodes in each branch at most the last moves; of one, none."""
    source = choosing("a0 = Sinh (x) " + then, "b0 = Cosh (o) " + other)
    before, after, report = rewrite(source, OpenBranches(behind=frozenset({"am", "ar"})))
    assert [len(branch) for branch in branches(after)] == [2, 2]
    assert [name for name in report.merged if name == "am"] == []
    assert_same_both_ways(before, after)


def test_a_value_that_is_read_twice_is_given_once() -> None:
    source = choosing("a0 = Sinh (x) [ar] t = Mul (a0, a0)", "b0 = Cosh (o) [br] e = Mul (b0, b0)")
    before, after, _ = rewrite(source, OpenBranches(behind=frozenset({"ar"})))
    assert ops(after.graph) == ["Neg", "If", "Mul"]
    assert_same_both_ways(before, after)


def test_a_value_from_outside_is_given_on() -> None:
    source = choosing("[ar] t = MatMul (x, w)", "b0 = Cosh (o) [br] e = MatMul (b0, w)")
    before, after, _ = rewrite(source, OpenBranches(behind=frozenset({"ar"})))
    assert branches(after) == (["Identity"], ["Cosh"])
    assert_same_both_ways(before, after)


def test_an_output_that_is_given_twice_is_left() -> None:
    source = f"""{HEAD} g (float[2,2] x, bool c, float[2,2] z, float[2,2] v)
        => (float[2,2] y, float[2,2] q) {{
        y, q = If (c) <
            then_branch = a () => (float[2,2] t, float[2,2] t) {{ a0 = Sinh (x) [tr] t = Relu (a0) }},
            else_branch = b () => (float[2,2] e, float[2,2] f) {{ b0 = Cosh (x) [er] e = Relu (b0)
                f = Neg (b0) }}> }}"""
    assert not rewrite(source, OpenBranches(behind=frozenset({"tr"})))[2].rewritten


@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(model=models(smooth=False))
def test_random_models_keep_their_numbers(model: ModelProto) -> None:
    """All that can move out of any branch does; both ways are compared."""
    note(onnx.printer.to_text(model))
    graph = import_model(model)
    names = frozenset(node.name for node in all_nodes(graph))
    optimise(graph, [OpenBranches(front=names, behind=names)])
    after = export_model(graph)
    note(onnx.printer.to_text(after))
    onnx.checker.check_model(after)
    for flag in (True, False):
        expected, found = expected_outputs(model, flag=flag), outputs(after, flag=flag)
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value)
