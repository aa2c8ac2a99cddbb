"""Where optc keeps what it can find out again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder that OPTC_CACHE_DIR names, else the one for optc in the user's caches."""
    if own := os.environ.get("OPTC_CACHE_DIR"):
        return Path(own)
    users = os.environ.get("XDG_CACHE_HOME")
    return (Path(users) if users else Path.home() / ".cache") / "optc"
