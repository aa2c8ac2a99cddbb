"""How a problem reads: its code, what is wrong, where, and what to do about it.

Every error that a user can cause is an `OptcError` carrying one or more `Diagnostic`. The command
line prints them and exits with the error's code; nothing else decides how an error looks.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a text file something stands.

    Attributes:
        file: The path as the user wrote it.
        line: Counted from 1.
        column: Counted from 1, in characters.
        length: Characters to underline, at least 1.
        text: The whole source line, without its line end.
    """

    file: str
    line: int
    column: int
    length: int = 1
    text: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One problem, in the user's words.

    Attributes:
        code: Stable, lower case, hyphens: ``unknown-pass``. Programs and tests rely on it.
        problem: What is, with the value found.
        todo: What to do about it; None where nothing helpful is known.
        place: Where it stands; None for a problem that has no place in a file.
        severity: ``error`` stops the work; ``warning`` and ``note`` do not.
    """

    code: str
    problem: str
    todo: str | None = None
    place: Place | None = None
    severity: Severity = "error"

    def render(self) -> str:
        """Return the text shown to a person: header, place with carets, what to do."""
        lines = [f"{self.severity}[{self.code}]: {self.problem}"]
        if self.place is not None:
            lines.append(f"  --> {self.place}")
            if self.place.text:
                number = str(self.place.line)
                lines.append(f"{number} | {self.place.text}")
                # Tabs are kept, so that the carets stand under what they mean.
                lead = "".join(
                    "\t" if c == "\t" else " " for c in self.place.text[: self.place.column - 1]
                )
                lines.append(f"{' ' * len(number)} | {lead}{'^' * max(1, self.place.length)}")
        if self.todo is not None:
            lines.append(f"  do: {self.todo}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, object]:
        """Return the same for programs; ``place`` is null where there is none."""
        place = self.place and {
            "file": self.place.file,
            "line": self.place.line,
            "column": self.place.column,
        }
        return {
            "severity": self.severity,
            "code": self.code,
            "problem": self.problem,
            "todo": self.todo,
            "place": place,
        }


class OptcError(Exception):
    """Something optc has to tell instead of a result: one or more diagnostics.

    ``exit_code`` is what the command line exits with: 1 where optc, its environment or a build
    failed, 2 where the user's input is at fault, 3 where a verification or gate was not met.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, *diagnostics: Diagnostic) -> None:
        super().__init__("\n".join(d.render() for d in diagnostics))
        self.diagnostics = diagnostics


class InputError(OptcError):
    """The user's input is at fault: an argument, an array, a folder."""

    exit_code = 2


class SpecError(InputError):
    """The spec file is at fault. Carries every problem found in it."""


class ModelError(InputError):
    """The model file is at fault."""


class EnvironmentFault(OptcError):
    """This machine lacks something: a backend, an extra, disk space, a GPU."""


class NotMetError(OptcError):
    """A verification or a gate was not met."""

    exit_code = 3


PlaceOf = Callable[..., Place | None]
"""Keys and indices from the top of a spec -> where that stands."""


def quoted(words: Iterable[str], most: int | None = None) -> str:
    """Return words for a sentence, the first ones of many.

    Example:
        >>> quoted(["x", "y", "z"], most=2)
        '`x`, `y` and 1 more'
    """
    shown = [f"`{word}`" for word in words]
    left = 0 if most is None else max(0, len(shown) - most)
    return ", ".join(shown[: len(shown) - left]) + (f" and {left} more" if left else "")


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice that ``word`` was most likely meant to be, or None.

    Example:
        >>> nearest("fold-mul-into-cnov", ["fold-mul-into-conv", "fold-constants"])
        'fold-mul-into-conv'
    """
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return found[0] if found else None
