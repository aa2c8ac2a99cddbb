from __future__ import annotations

from graphs import assert_same_numbers, rewrite

from optc.passes.trim_bodies import TrimBodies

HEAD = '<ir_version: 8, opset_import: ["" : 13]>'


def loop(state: str, body: str, outputs: str, signature: str, numbers: str = "") -> str:
    return f"""{HEAD} g (float[2] x, float[2] y) => ({signature})
        <int64 n = {{3}}, bool go = {{1}}{numbers}>
        {{ [loop] {outputs} = Loop (n, go, {state}) <body = b {body}> z = Relu(w) }}"""


INVARIANT = """(int64 i, bool c, float[2] a, float[2] s) => (bool d, float[2] a, float[2] t)
    { d = Identity(c) t = Add(s, a) }"""


def test_a_value_that_never_changes_is_read_from_outside() -> None:
    before, after, report = rewrite(
        loop("x, y", INVARIANT, "v, w", "float[2] z, float[2] k").replace(
            "z = Relu(w)", "z = Relu(w) k = Neg(v)"
        ),
        TrimBodies(),
    )
    (node,) = [n for n in after.graph.node if n.op_type == "Loop"]
    assert (list(node.input), list(node.output)) == (["n", "go", "y"], ["w"])
    body = node.attribute[0].g
    assert [list(n.input) for n in body.node] == [["c"], ["s", "x"]]
    assert [n.input[0] for n in after.graph.node if n.op_type == "Neg"] == ["x"]
    assert report.merged == {"loop": ("loop",)}
    assert_same_numbers(before, after, rtol=0)


IDLE = """(int64 i, bool c, float[2] a, float[2] s) => (bool d, float[2] e, float[2] t)
    { d = Identity(c) f = Neg(a) e = Add(f, s) t = Add(s, s) }"""


def test_a_value_that_only_makes_itself_is_dropped() -> None:
    before, after, _ = rewrite(loop("x, y", IDLE, "v, w", "float[2] z"), TrimBodies())
    (node,) = [n for n in after.graph.node if n.op_type == "Loop"]
    assert list(node.input) == ["n", "go", "y"]
    assert [n.op_type for n in node.attribute[0].g.node] == ["Identity", "Add"]
    assert_same_numbers(before, after, rtol=0)


def test_a_value_that_is_read_behind_is_kept() -> None:
    source = loop("x, y", IDLE, "v, w", "float[2] z, float[2] v")
    _, _, report = rewrite(source, TrimBodies())
    assert not report.rewritten


def test_a_value_that_another_needs_is_kept() -> None:
    body = IDLE.replace("t = Add(s, s)", "t = Add(s, a)")
    _, _, report = rewrite(loop("x, y", body, "v, w", "float[2] z"), TrimBodies())
    assert not report.rewritten


def test_an_unchanging_value_that_the_caller_reads_is_left() -> None:
    source = loop("x, y", INVARIANT, "v, w", "float[2] z, float[2] v")
    _, _, report = rewrite(source, TrimBodies())
    assert report.skipped == {"loop": "the caller reads a value that never changes"}


def test_a_value_that_is_collected_too_is_left() -> None:
    body = """(int64 i, bool c, float[2] a, float[2] s)
        => (bool d, float[2] a, float[2] t, float[2] a) { d = Identity(c) t = Add(s, a) }"""
    _, _, report = rewrite(loop("x, y", body, "v, w, u", "float[2] z"), TrimBodies())
    assert not report.rewritten


def test_swapped_values_are_no_constants() -> None:
    body = """(int64 i, bool c, float[2] a, float[2] s) => (bool d, float[2] s, float[2] a)
        { d = Identity(c) }"""
    _, _, report = rewrite(loop("x, y", body, "v, w", "float[2] z"), TrimBodies())
    assert not report.rewritten


def test_the_last_output_stays() -> None:
    body = "(int64 i, bool c, float[2] a) => (bool d, float[2] a) { d = Identity(c) }"
    _, _, report = rewrite(loop("x", body, "w", "float[2] z"), TrimBodies())
    assert not report.rewritten


def test_a_scan_is_trimmed_too() -> None:
    """An Identity hands it on: onnxruntime computes another result where nothing does."""
    before, after, _ = rewrite(
        f"""{HEAD} g (float[2] x, float[2] y, float[5,2] q) => (float[2] w, float[5,2] z)
        {{ [scan] v, w, z = Scan <num_scan_inputs = 1, body = b
            (float[2] a, float[2] s, float[2] e) => (float[2] b, float[2] t, float[2] o)
            {{ b = Identity(a) t = Add(s, e) o = Mul(t, a) }}> (x, y, q) }}""",
        TrimBodies(),
    )
    (node,) = after.graph.node
    assert list(node.input) == ["y", "q"]
    assert list(node.output) == ["w", "z"]
    assert_same_numbers(before, after, rtol=1e-6)
