"""Shared libraries from source, for tests that load some. Skips where the machine has no compiler."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

SOURCES = Path(__file__).parent / "models"
COMPILERS = {".c": ("cc", "gcc", "clang"), ".cc": ("c++", "g++", "clang++")}

Compiled = Callable[..., Path]
"""Name of a file in tests/models, or a file -> the library of it; further arguments are flags."""


def compiling_to(folder: Path) -> Compiled:
    """Return what compiles each source once with the same flags, into ``folder``."""

    @cache
    def compiled(source: str | Path, *flags: str) -> Path:
        path = SOURCES / source
        names = COMPILERS[path.suffix]
        compiler = next(filter(None, map(shutil.which, names)), None)
        if compiler is None:
            pytest.skip(f"no compiler for {path.suffix} here ({', '.join(names)})")
        made = folder / f"{path.stem}{''.join(flags)}.so"
        command: list[str | Path] = [compiler, "-O1", "-shared", "-fPIC", *flags, "-o", made, path]
        subprocess.run(command, check=True, capture_output=True)
        return made

    return compiled
