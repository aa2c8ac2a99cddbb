"""The command line, as a process of its own."""

from __future__ import annotations

import subprocess
import sys


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Return what ``optc`` with these arguments printed, and its exit code."""
    command = [sys.executable, "-m", "optc", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)
