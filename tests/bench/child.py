"""Runs tasks of a benchmark in processes of their own, so that a crash is one result among others.

A script lists its tasks by name, and begins with::

    if child.serve(TASKS):
        return 0

`call` then runs one of them in a new process of the same script. What a task reports with `answer`
counts even where the process dies later.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FLAG = "--child"
_REPORTED: dict[str, Any] = {}


def call(
    task: str, *arguments: Any, seconds: float = 600, variables: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return what ``task`` answers; under ``failure`` why it did not come to its end, if so.

    Args:
        task: Its name in what the script gives to `serve`.
        arguments: Anything that JSON can say.
        seconds: How long it may take.
        variables: The environment, where it is not this process's own.
    """
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, sys.argv[0], FLAG, file.name, json.dumps([task, *arguments])]
        failure = ""
        try:
            done = subprocess.run(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=seconds,
                env=variables,
                check=False,
            )
        except subprocess.TimeoutExpired:
            failure = f"no end in {seconds:g} s"
        else:
            if done.returncode:
                said = done.stderr.decode(errors="replace").strip().splitlines()
                failure = f"exit {done.returncode}: {said[-1][:200] if said else ''}"
        text = Path(file.name).read_text()
    found: dict[str, Any] = json.loads(text) if text else {}
    return found | {"failure": failure} if failure else found


def serve(tasks: Mapping[str, Callable[..., object]]) -> bool:
    """Whether this process was started by `call`; if so its task has been done."""
    if FLAG not in sys.argv[1:2]:
        return False
    task, *arguments = json.loads(sys.argv[3])
    tasks[task](*arguments)
    return True


def answer(**values: Any) -> None:
    """Add ``values`` to what `call` returns in the parent."""
    _REPORTED.update(values)
    Path(sys.argv[2]).write_text(json.dumps(_REPORTED))


def status_mib(field: str) -> float:
    """Return a field of this process's ``/proc/self/status``, such as ``VmHWM``, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> None:
    """Let ``VmHWM`` begin again at what is used now."""
    Path("/proc/self/clear_refs").write_text("5")
