from __future__ import annotations

import numpy as np
import pytest
from graphs import rewrite, run

from optc.passes.inline_if_not_empty import InlineIfNotEmpty

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'

GUARDED = """
    g (float[n,4] boxes, float[n] scores, int64[n] labels) => (int64[kept] y)
    <int64 zero = {0}, int64[0] none = {}, float one = {1}, int64[1] first = {0},
     int64[1] second = {1}, int64[1] third = {2}, int64[1] most = {100}, float[1] limit = {0.5}>
    {
        [shape] s = Shape (boxes)
        [size] p = ReduceProd <keepdims = 0> (s)
        [empty] e = Equal (p, zero)
        [if] y = If (e) <
            then_branch = t () => (int64[0] nothing) { [none] nothing = Identity (none) },
            else_branch = f () => (int64[k] keep) {
                [largest] m = ReduceMax <keepdims = 0> (boxes)
                [float] l = Cast <to = 1> (labels)
                [step] u = Add (m, one)
                [offset] o = Mul (l, u)
                [column] c = Unsqueeze (o, second)
                [apart] a = Add (boxes, c)
                [batch] b = Unsqueeze (a, first)
                [class] d = Unsqueeze (scores, first)
                [both] q = Unsqueeze (d, first)
                [nms] r = NonMaxSuppression (b, q, most, limit)
                [box] w = Gather <axis = 1> (r, third)
                [flat] keep = Squeeze (w, second)
            }
        >
    }"""
BODY_OF_NONE = "{ [none] nothing = Identity (none) }"


def guarded() -> str:
    """Return a batched suppression as exporters write it, the empty branch a constant."""
    return HEAD + GUARDED.replace(
        BODY_OF_NONE, "{ [none] nothing = Constant <value = int64[0] {}> () }"
    ).replace("int64[0] none = {}, ", "")


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_what_guards_against_no_boxes_goes(count: int) -> None:
    before, after, report = rewrite(guarded(), InlineIfNotEmpty())
    assert not any(node.op_type == "If" for node in after.graph.node)
    assert report.removed == {"if": "its branch returns nothing where it reads nothing"}
    rng = np.random.default_rng(count)
    inputs = {
        "boxes": rng.random((count, 4), np.float32),
        "scores": rng.random(count, np.float32),
        "labels": rng.integers(0, 3, count),
    }
    expected, found = run(before, inputs)["y"], run(after, inputs)["y"]
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("(r, third)", "(r, labels)", "`box`, Gather, is not seen to work on empty tensors"),
        ("float[n] scores", "float[m] scores", "not seen to work on empty tensors"),
        ("float[n,4] boxes", "float[n,m] boxes", "more than one extent"),
        ("ReduceMax <keepdims", "ReduceMean <keepdims", "`largest`, ReduceMean, is not seen"),
        ("[flat] keep = Squeeze (w, second)", "[flat] keep = Add (labels, zero)", None),
        (
            "[flat] keep = Squeeze (w, second)",
            "[flat] keep = Shape (labels)",
            "not seen to be empty",
        ),
    ],
)
def test_what_stays_and_why(old: str, new: str, reason: str | None) -> None:
    assert guarded().count(old) == 1
    _, _, report = rewrite(guarded().replace(old, new), InlineIfNotEmpty())
    if reason is None:
        assert report.removed
    else:
        assert reason in report.skipped["if"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Equal (p, zero)", "Greater (p, zero)"),
        ("int64[0] {}", "int64[1] {7}"),
        ("ReduceProd <keepdims = 0> (s)", "ReduceMax <keepdims = 0> (s)"),
    ],
)
def test_other_ifs_are_no_pattern(old: str, new: str) -> None:
    text = guarded().replace("int64[0] nothing", "int64[z] nothing")
    assert text.count(old) == 1
    _, _, report = rewrite(text.replace(old, new), InlineIfNotEmpty())
    assert not report.skipped
    assert not report.removed
