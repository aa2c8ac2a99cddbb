from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optc.specs.axis_arithmetic import NotArithmetic, arithmetic, is_axis_name

NAMES = {"n": 5, "height": 33, "in": 7, "a.b": 2, "größe": 4}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (7, 7),
        ("7", 7),
        ("n", 5),
        ("in", 7),
        ("a.b * größe", 8),
        ("2*n + 1", 11),
        ("1 + 2*n", 11),
        ("n - 2 - 1", 2),
        ("n // 2 // 2", 1),
        ("(height + 31)//32 * n", 10),
        ("-n + 6", 1),
        ("- - n", 5),
        ("((n))", 5),
        (" n ", 5),
        ("n*(n-1)//2", 10),
    ],
)
def test_it_comes_to_what_python_makes_of_it(text: str | int, value: int) -> None:
    assert arithmetic(text).value(NAMES) == value


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "(", ")", "()", "n +", "+ n", "* n", "n n", "n 2", "2 n", "(n", "n)", "n / 2"),
        *("n % 2", "n ** 2", "n.", "2.5", "1e3", "n[0]", "f(n)", "n; n", "__import__('os')"),
        *("n if n else n", "lambda: n", "n == n", "~n", "'n'", "n,", "\x00", "n\n\\n", "("),
        *("(" * 100 + "n" + ")" * 100, "-" * 100 + "n", "n+" * 200 + "n"),
    ],
)
def test_nothing_else_is_read(text: str) -> None:
    if text == "n.":
        assert arithmetic(text).names == {"n."}  # a name, if an odd one
        return
    with pytest.raises(NotArithmetic):
        arithmetic(text)


@given(st.text(alphabet="n2+-*/() .a", max_size=40))
def test_whatever_is_read_is_what_python_reads(text: str) -> None:
    try:
        found = arithmetic(text)
        value = found.value(dict.fromkeys(found.names, 3))
    except (NotArithmetic, ZeroDivisionError):
        return
    source = text.strip().replace(".", "_")
    names = {name.replace(".", "_"): 3 for name in found.names}
    try:
        expected = eval(source, {}, names)
    except SyntaxError:
        return  # of numbers with leading zeros, and names next to numbers, Python has its own view
    assert value == expected


def test_names() -> None:
    assert arithmetic("2*n + (h - 1)//w").names == {"n", "h", "w"}
    assert arithmetic("n").name == "n"
    assert arithmetic("n + 0").name is None
    assert arithmetic(3).name is None


@pytest.mark.parametrize(
    ("text", "is_name"),
    [("n", True), ("in", True), ("a.b_2", True), ("2", False), ("n-1", False), (" n", False)],
)
def test_what_can_be_named(text: str, is_name: bool) -> None:
    assert is_axis_name(text) is is_name


def test_a_division_by_zero_is_one() -> None:
    with pytest.raises(ZeroDivisionError):
        arithmetic("n//0").value(NAMES)
