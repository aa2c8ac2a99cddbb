"""What to say of a path in a spec at which there is no file."""

from __future__ import annotations

import os
from pathlib import Path

from optc.specs.diagnostic import Diagnostic, Place, nearest


def missing_file(
    code: str, what: str, folder: Path, written: str, place: Place | None
) -> Diagnostic:
    """Return the error for a path that leads to no file, with the name that was likely meant.

    Args:
        code: Of the error.
        what: What the file would be, such as `library`.
        folder: What the path is relative to.
        written: The path, as the spec has it.
        place: Where the spec has it.
    """
    path = folder / written
    near = nearest(path.name, _files_in(path.parent))
    problem = f"there is no {what} `{path}`"
    if os.path.isdir(path):
        problem += ": that is a folder"
    elif os.path.exists(path):
        problem += ": that is no regular file"
    return Diagnostic(
        code,
        problem,
        f"write `{Path(written).parent / near}`"
        if near
        else "check the path, which is taken from the folder of the spec",
        place,
    )


def _files_in(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_file())
    except (OSError, ValueError):
        return []  # a path that cannot be, or that may not be looked into
