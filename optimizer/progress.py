"""What a person sees while long work goes on: on stderr, and only on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, Protocol


class Progress(Protocol):
    """Told of what goes on. Never asked whether anyone looks."""

    def step(self, text: str) -> None:
        """A new stage of the work has begun."""

    def part(self, label: str, phase: str, fraction: float) -> None:
        """One of several things done side by side has come so far; 1 means it is done."""


class Silent:
    """Progress that nobody looks at."""

    def step(self, text: str) -> None:
        """Do nothing."""

    def part(self, label: str, phase: str, fraction: float) -> None:
        """Do nothing."""


class _OnTerminal:
    def __init__(self, bars: Any, name: str) -> None:
        self._bars = bars
        self._name = name
        self._main = bars.add_task(name, total=None)
        self._parts: dict[str, Any] = {}

    def step(self, text: str) -> None:
        for task in self._parts.values():
            self._bars.remove_task(task)
        self._parts.clear()
        self._bars.update(self._main, description=f"{self._name}: {text}")

    def part(self, label: str, phase: str, fraction: float) -> None:
        if label not in self._parts:
            self._parts[label] = self._bars.add_task(label, total=1.0)
        self._bars.update(self._parts[label], completed=fraction, description=f"  {label}: {phase}")


@contextlib.contextmanager
def progress(name: str) -> Iterator[Progress]:
    """Show progress under ``name`` while the block runs; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield Silent()
        return
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        yield _OnTerminal(bars, name)
