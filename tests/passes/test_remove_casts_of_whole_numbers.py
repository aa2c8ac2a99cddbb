"""`remove-casts-of-whole-numbers`: what is known to be whole, and what is not."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import rewrite, run, text

from optc.passes.remove_casts_of_whole_numbers import RemoveCastsOfWholeNumbers

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
CONSTANTS = "<float zero = {0}, float three = {3}, float half = {0.5}, float top = {255}>"


def body(*lines: str) -> str:
    """Return a graph whose `f` goes through integers of ``lines``' last Cast and back."""
    return (
        HEAD + f"g (float[N,4] x) => (float[N,4] y) {CONSTANTS} {{" + "\n".join(lines) + "\n"
        "[back] y = Cast <to = 1> (q) }"
    )


CLIPPED = "r = Round (x)  a = Add (r, three)  c = Clip (a, zero, top)"


def test_the_second_cast_reads_what_the_first_one_reads() -> None:
    before, after, report = rewrite(
        body(CLIPPED, "[there] q = Cast <to = 2> (c)"), RemoveCastsOfWholeNumbers()
    )
    assert "y = Cast <to: int = 1> (c)" in text(after)
    assert report.merged == {"back": ("there", "back")}
    x = {"x": np.array([[-1e9, -0.4, 0.5, 7.5], [1.5, 251.6, 260, 1e30]], np.float32)}
    np.testing.assert_array_equal(run(after, x)["y"], run(before, x)["y"])


@pytest.mark.parametrize(
    "lines",
    [
        (CLIPPED, "m = Max (c, three)  q = Cast <to = 2> (m)"),
        (CLIPPED, "m = Transpose <perm = [0, 1]> (c)  q = Cast <to = 6> (m)"),
        (CLIPPED, "m = Concat <axis = 0> (c, c)  q = Cast <to = 2> (m)"),
        (CLIPPED, "u = Cast <to = 2> (c)  f = Cast <to = 1> (u)  q = Cast <to = 7> (f)"),
        (CLIPPED, "m = Sub (c, three)  q = Cast <to = 5> (m)"),
    ],
    ids=["max", "moved", "concat", "cast", "sub"],
)
def test_whole_numbers_stay_whole(lines: tuple[str, ...]) -> None:
    _, _, report = rewrite(body(*lines), RemoveCastsOfWholeNumbers())
    assert "back" in report.merged


@pytest.mark.parametrize(
    "lines",
    [
        ("q = Cast <to = 2> (x)",),
        ("r = Round (x)  q = Cast <to = 2> (r)",),
        ("r = Round (x)  c = Clip (r, zero, top)  q = Cast <to = 2> (c)",),
        ("r = Round (x)  a = Add (r, half)  c = Clip (a, zero, top)  q = Cast <to = 2> (c)",),
        (CLIPPED, "m = Sub (c, three)  q = Cast <to = 2> (m)"),
        (CLIPPED, "q = Cast <to = 3> (c)"),
        (CLIPPED, "q = Cast <to = 9> (c)"),
        (CLIPPED, "m = Mul (c, half)  q = Cast <to = 2> (m)"),
    ],
    ids=["any", "no bounds", "-0.0", "half", "below 0", "too large", "bool", "product"],
)
def test_what_an_integer_would_change_goes_through_it(lines: tuple[str, ...]) -> None:
    _, _, report = rewrite(body(*lines), RemoveCastsOfWholeNumbers())
    assert not report.rewritten


def test_a_sign_of_zero_that_could_be_lost_is_real() -> None:
    lines = "r = Round (x)  c = Clip (r, zero, top)  q = Cast <to = 2> (c)"
    before, _, _ = rewrite(body(lines), RemoveCastsOfWholeNumbers())
    assert not np.any(np.signbit(run(before, {"x": np.full((1, 4), -0.4, np.float32)})["y"]))


def test_a_bound_of_the_run_may_lie_beyond_the_integer() -> None:
    source = """
        g (int8[3] x, uint8[1] y) => (float[3] z)
        {
            [one]  a = Cast <to = 1> (x)
            [two]  b = Cast <to = 1> (y)
            [bare] c = Squeeze (b)
            [clip] d = Clip (a, c)
            [int]  e = Cast <to = 3> (d)
            [out]  z = Cast <to = 1> (e)
        }"""
    _, after, _ = rewrite(HEAD + source, RemoveCastsOfWholeNumbers())
    assert [node.name for node in after.graph.node][-2:] == ["int", "out"]
