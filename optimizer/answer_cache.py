"""Keeps answers on disk: each a small file under its key, with a digest of what it says.

What cannot be read, is damaged or was half written is as good as none. What cannot be written costs
the next run its time, and nothing else. Many processes may use a folder at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Final

FORMAT: Final = 3
"""Of keys and answers, and of what is asked for an answer. Another one finds nothing of this one."""


def key_of(kind: str, *parts: object) -> str:
    """Return the key of an answer that depends on ``parts``: plain values, and bytes.

    Args:
        kind: What is answered.
        parts: Whatever the answer can depend on.
    """
    return hashlib.sha256(repr((FORMAT, kind, parts)).encode()).hexdigest()


class AnswerCache:
    """Answers by their keys."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, key: str) -> Any:
        """Return what was kept under ``key``, as JSON holds it; None where nothing was."""
        try:
            digest, _, body = self._file(key).read_text(encoding="utf-8").partition("\n")
        except (OSError, UnicodeDecodeError):
            return None
        return json.loads(body) if digest == _digest(key, body) else None

    def write(self, key: str, answer: Any) -> None:
        """Keep ``answer``, which JSON can hold, under ``key``."""
        body = json.dumps(answer)
        file = self._file(key)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor, new = tempfile.mkstemp(dir=file.parent, suffix=".new")
        except OSError:
            return
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as out:
                out.write(f"{_digest(key, body)}\n{body}")
            os.replace(new, file)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(new)

    def _file(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"


def _digest(key: str, body: str) -> str:
    return hashlib.sha256(f"{key} {body}".encode()).hexdigest()
