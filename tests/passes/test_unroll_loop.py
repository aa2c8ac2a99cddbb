"""Loops of a few rounds."""

from __future__ import annotations

import pytest
from graphs import assert_same_numbers, rewrite, text
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.passes.unroll_loop import UnrollLoop

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'


def looping(
    nodes: str,
    *,
    rounds: int = 3,
    start: str = "yes",
    given_back: str = "go",
    going: str = "",
) -> str:
    """Return a model whose Loop carries `a` to `b` by ``nodes`` and gives out `r` in each round."""
    return f"""{HEAD} g (float[2,2] x, int64 n, bool c) => (float[2,2] y, float[k,2,2] all)
        <int64 m = {{{rounds}}}, bool yes = {{1}}, bool no = {{0}}, float[2] s = {{2, 3}}>
        {{
            [before] o = Neg (x)
            [loop] y, all = Loop (m, {start}, x) <
                body = one (int64 i, bool go, float[2,2] a)
                    => (bool {given_back}, float[2,2] b, float[2,2] r) {{ {going} {nodes} }}
            >
        }}"""


def test_two_rounds_stand_one_behind_the_other() -> None:
    before, after, report = rewrite(
        looping("[mul] b = Mul (a, s) [neg] r = Neg (b)", rounds=2), UnrollLoop()
    )
    ops = sorted(node.op_type for node in after.graph.node)
    assert ops == ["Concat", "Identity", *["Mul"] * 2, *["Neg"] * 2, *["Unsqueeze"] * 2]
    assert report.removed["loop"] == "it has 2 rounds, they are written out"
    assert "Loop" not in text(after)
    assert_same_numbers(before, after, rtol=0)


BODIES = {
    "the number of the round": "f = Cast <to = 1> (i) b = Add (a, f) r = Mul (b, f)",
    "from outside": "b = Add (a, o) r = Mul (x, o)",
    "given on": "b = Identity (a) r = Exp (a)",
    "one value twice": "b = Mul (a, s) r = Identity (b)",
    "the condition": "f = Cast <to = 1> (go) b = Add (a, f) r = Neg (a)",
    "never given out": "b = Mul (a, s) r = Identity (o)",
}


@pytest.mark.parametrize("nodes", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_what_a_body_may_do(nodes: str, rounds: int) -> None:
    before, after, _ = rewrite(looping(nodes, rounds=rounds), UnrollLoop())
    assert "Loop" not in text(after)
    assert_same_numbers(before, after, rtol=0)


CONDITIONS = {
    "not given": {"start": ""},
    "through an Identity": {"given_back": "on", "going": "on = Identity (go)"},
    "true": {"given_back": "on", "going": "on = Identity (yes)"},
}


@pytest.mark.parametrize("how", CONDITIONS.values(), ids=CONDITIONS)
def test_conditions_that_end_no_loop(how: dict[str, str]) -> None:
    before, after, _ = rewrite(looping("b = Mul (a, s) r = Neg (a)", **how), UnrollLoop())
    assert "Loop" not in text(after)
    assert_same_numbers(before, after, rtol=0)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 6),
    st.lists(st.sampled_from(["Mul", "Add", "Sub", "Max"]), min_size=1, max_size=5),
    st.lists(st.sampled_from(["a", "x", "o", "s", "f"]), min_size=5, max_size=5),
)
def test_any_body(rounds: int, ops: list[str], others: list[str]) -> None:
    nodes, last = ["f = Cast <to = 1> (i)"], "a"
    for index, (op, other) in enumerate(zip(ops, others, strict=False)):
        nodes.append(f"v{index} = {op} ({last}, {other})")
        last = f"v{index}"
    nodes += [f"b = Neg ({last})", f"r = Abs ({last})"]
    before, after, _ = rewrite(looping(" ".join(nodes), rounds=rounds), UnrollLoop())
    assert "Loop" not in text(after)
    assert_same_numbers(before, after, rtol=0)


MUL = "b = Mul (a, s) r = Neg (b)"
SILENT = {
    "none": looping(MUL, rounds=0),
    "only the run knows": looping(MUL).replace("Loop (m,", "Loop (n,"),
    "as long as": looping(MUL).replace("Loop (m,", "Loop (,"),
    "a start that is not known": looping(MUL, start="c"),
    "no start": looping(MUL, start="no"),
    "an end that is not known": looping(MUL, given_back="on", going="on = And (go, c)"),
    "an end": looping(MUL, given_back="on", going="on = Identity (no)"),
}


@pytest.mark.parametrize("source", SILENT.values(), ids=SILENT)
def test_a_loop_whose_rounds_are_not_known_is_not_spoken_of(source: str) -> None:
    _, _, report = rewrite(source, UnrollLoop())
    assert not report.rewritten
    assert not report.skipped


IF = """b = If (c) < then_branch = t () => (float[2,2] p) { p = Neg (a) },
    else_branch = e () => (float[2,2] q) { q = Exp (a) } > r = Neg (b)"""
LEFT = {
    "long": (looping(MUL, rounds=33), "33 rounds of 2 nodes are more than 64 nodes"),
    "bodies": (looping(IF), "there are bodies in its body"),
    "random": (
        looping("b = RandomNormalLike (a) r = Neg (b)"),
        "a node of its body is not the same each time it runs",
    ),
}


@pytest.mark.parametrize(("source", "reason"), LEFT.values(), ids=LEFT)
def test_what_is_left_alone(source: str, reason: str) -> None:
    _, _, report = rewrite(source, UnrollLoop())
    assert report.skipped == {"loop": reason}
    assert not report.rewritten


def test_the_size_is_an_option() -> None:
    _, _, report = rewrite(looping(MUL), UnrollLoop(most_nodes=5))
    assert report.skipped == {"loop": "3 rounds of 2 nodes are more than 5 nodes"}


def test_a_single_round_may_be_of_any_size() -> None:
    before, after, _ = rewrite(looping(MUL, rounds=1), UnrollLoop(most_nodes=1))
    assert "Loop" not in text(after)
    assert_same_numbers(before, after, rtol=0)
