"""Figures, counts and tables as people read them."""

from __future__ import annotations

import io
import re
import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def percent(share: float) -> str:
    """Return ``share`` in percent; what is nearly nothing or nearly all is not said to be that.

    Example:
        >>> percent(1.0), percent(0.99998), percent(0.00001)
        ('100.00%', '>99.99%', '<0.01%')
    """
    if 0.9999 < share < 0.999999:
        return ">99.99%"
    return "<0.01%" if 0 < share < 0.0001 else f"{share:.2%}"


def bytes_(number: int) -> str:
    """Return a number of bytes for people.

    Example:
        >>> bytes_(0), bytes_(512), bytes_(1_230_000)
        ('0 B', '512 B', '1.23 MB')
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} B"


def count(number: int, noun: str) -> str:
    """Return ``number`` of what ``noun`` says."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def without_numbers(text: str) -> str:
    """Return ``text`` without numbers that stand by themselves.

    Example:
        >>> without_numbers("`n_1` takes 63.5 us, 20 without")
        '`n_1` takes # us, # without'
    """
    return re.sub(r"(?<![\w.])\d+(\.\d+)?(?![\w.])", "#", text)


def printed(table: Table, width: int | None = None) -> str:
    """Return ``table`` as text, by default as wide as the terminal."""
    from rich.console import Console

    if width is None:  # where nobody looks, as in a log of CI, lines may be as long as they need be
        width = max(shutil.get_terminal_size((160, 24)).columns, 100)
    text = io.StringIO()
    console = Console(file=text, width=width, markup=False, highlight=False, color_system=None)
    console.print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().strip("\n").splitlines())
