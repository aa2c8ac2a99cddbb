"""Arithmetic with axes, as `operators` of a spec writes it: ``2*n + 1``, ``(height + 31)//32``.

Numbers, names, ``+ - * //`` and brackets, and nothing else: it is read by the few lines below and
never by Python, so nothing that a spec says is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

_TOKEN: Final = re.compile(r"\s*(?:(?P<number>\d+)|(?P<name>[^\W\d][\w.]*)|(?P<sign>//|[-+*()]))")
_DEEPEST: Final = 32
"""Brackets and signs inside each other."""
_LONGEST: Final = 256
"""Characters."""


class NotArithmetic(ValueError):
    """The text is no arithmetic with axes; the message tells why."""


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """A number, a name, or two of these and the sign between them.

    Example:
        >>> sorted(arithmetic("(height + 31)//32 * n").names)
        ['height', 'n']
        >>> arithmetic("(height + 31)//32 * n").value({"height": 33, "n": 5})
        10
        >>> arithmetic(7).value({})
        7
    """

    sign: str
    left: Arithmetic | int | str
    right: Arithmetic | None = None

    @property
    def names(self) -> frozenset[str]:
        """The names in it."""
        if not isinstance(self.left, Arithmetic):
            return frozenset({self.left}) if isinstance(self.left, str) else frozenset()
        return self.left.names | (self.right.names if self.right else frozenset())

    @property
    def name(self) -> str | None:
        """The name that is all of it, or None."""
        return self.left if isinstance(self.left, str) else None

    def value(self, names: Mapping[str, Any]) -> Any:
        """Return what it comes to.

        Args:
            names: What each name stands for: anything that has the four operations.

        Raises:
            ZeroDivisionError: If something is divided by zero.
        """
        if isinstance(self.left, int):
            return self.left
        if isinstance(self.left, str):
            return names[self.left]
        left = self.left.value(names)
        assert self.right is not None, "a sign stands between two"
        right = self.right.value(names)
        match self.sign:
            case "+":
                return left + right
            case "-":
                return left - right
            case "*":
                return left * right
            case _:
                return left // right


def is_axis_name(text: str) -> bool:
    """Whether arithmetic can refer to an axis of this name."""
    match = _TOKEN.fullmatch(text)
    return match is not None and match.lastgroup == "name" and text == text.strip()


def arithmetic(text: str | int) -> Arithmetic:
    """Return ``text`` as it is to be worked out.

    Raises:
        NotArithmetic: If it is something else.
    """
    if isinstance(text, int):
        return Arithmetic("", text)
    if len(text) > _LONGEST:
        raise NotArithmetic(f"it has {len(text)} characters, and at most {_LONGEST} are read")
    reader = _Reader(_tokens(text))
    found = reader.sum(0)
    if reader.rest:
        raise NotArithmetic(f"nothing can follow there: `{reader.rest[0]}`")
    return found


def _tokens(text: str) -> list[str]:
    found: list[str] = []
    at, end = 0, len(text.rstrip())
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None:
            odd = text[at:].lstrip()[0]
            raise NotArithmetic(f"`{odd}` is no part of arithmetic")
        found.append(match[match.lastgroup or 0])
        at = match.end()
    return found


class _Reader:
    """Reads from the front of what is left: sums of products of single things."""

    def __init__(self, tokens: list[str]) -> None:
        self.rest = tokens

    def sum(self, depth: int) -> Arithmetic:
        found = self.product(depth)
        while self.rest and self.rest[0] in "+-":
            found = Arithmetic(self.rest.pop(0), found, self.product(depth))
        return found

    def product(self, depth: int) -> Arithmetic:
        found = self.single(depth)
        while self.rest and self.rest[0] in ("*", "//"):
            found = Arithmetic(self.rest.pop(0), found, self.single(depth))
        return found

    def single(self, depth: int) -> Arithmetic:
        if depth > _DEEPEST:
            raise NotArithmetic(f"it is nested deeper than {_DEEPEST}")
        if not self.rest:
            raise NotArithmetic("something is missing at its end")
        token = self.rest.pop(0)
        if token == "(":
            found = self.sum(depth + 1)
            if not self.rest or self.rest.pop(0) != ")":
                raise NotArithmetic("a bracket is not closed")
            return found
        if token == "-":
            return Arithmetic("-", Arithmetic("", 0), self.single(depth + 1))
        if token in (")", "+", "*", "//"):
            raise NotArithmetic(f"`{token}` stands where a number or name is to be")
        return Arithmetic("", int(token) if token.isdecimal() else token)
