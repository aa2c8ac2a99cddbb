"""Shared libraries of ONNX Runtime custom operators: registered with sessions, tried in a child.

A library is code that runs in the process that loads it. Whether it loads at all is found out in a
child first: one that was made for another ONNX Runtime may end the process in which it is loaded.

This file is the child, too: ``python -m optc.optimizer.custom_library``. It is told the libraries
and the models to try in one line of JSON, and answers each with a line: null where it loads, else
why not.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optc.optimizer.backend import interpreter_flags
from optc.optimizer.package import sha256_of
from optc.specs.diagnostic import Diagnostic, EnvironmentFault

if TYPE_CHECKING:
    import onnxruntime as ort

Libraries = tuple[Path, ...]
"""Libraries that a session needs, each once."""

TRIAL_SECONDS = 60.0
"""A library that takes longer to load is not waited for."""


def register(options: ort.SessionOptions, libraries: Libraries) -> None:
    """Let a session with ``options`` have the operators of ``libraries``.

    Raises:
        Exception: One of `ort_errors.ORT_ERRORS`, where ONNX Runtime refuses a library.
    """
    for library in libraries:
        options.register_custom_ops_library(str(library.resolve()))


def require_loadable(libraries: Libraries) -> None:
    """Make sure that ONNX Runtime here loads ``libraries``, which are of a package.

    Raises:
        EnvironmentFault: ``library-not-loadable``.
    """
    untried = tuple(library for library in libraries if sha256_of(library) not in _LOADABLE)
    if not untried:
        return
    answers = try_out(untried)
    problems = [
        Diagnostic(
            "library-not-loadable",
            f"the library of custom operators `{library}` cannot be loaded here: {why}",
            "run the package on a machine like the one that it was compiled on, or compile it "
            "again with a library for this one",
        )
        for library, why in zip(untried, answers.libraries, strict=True)
        if why is not None
    ]
    if problems:
        raise EnvironmentFault(*problems)


_LOADABLE: set[str] = set()
"""Hashes of the libraries that a child of this process has loaded: none is tried twice."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What a child found out.

    Attributes:
        libraries: For each library why it cannot be loaded, or None.
        models: For each model why no session takes it, or None; empty unless all libraries load.
    """

    libraries: Sequence[str | None]
    models: Sequence[str | None]


def try_out(libraries: Libraries, models: Sequence[bytes] = ()) -> Answers:
    """Load ``libraries``, and ``models`` with all of them, in a child process.

    Args:
        libraries: Files.
        models: Serialised, without external data.
    """
    job = {
        "libraries": [str(library.resolve()) for library in libraries],
        "models": [base64.b64encode(model).decode() for model in models],
    }
    child = subprocess.Popen(
        [
            *(sys.executable, *interpreter_flags(), "-m", "optc.optimizer.custom_library"),
            *("--parent", str(os.getpid())),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        said, _ = child.communicate((json.dumps(job) + "\n").encode(), TRIAL_SECONDS)
        ending = _ending(child.returncode)
    except subprocess.TimeoutExpired:
        child.kill()
        said, _ = child.communicate()
        ending = f"it took more than {TRIAL_SECONDS:.0f} s"
    answers: list[str | None] = [json.loads(line) for line in said.splitlines()]
    count = len(libraries)
    if len(answers) < count:  # it ended over the one that it was at
        answers += [ending, *[None] * (count - len(answers) - 1)]
    tried, rest = answers[:count], answers[count:]
    loaded = (library for library, why in zip(libraries, tried, strict=True) if why is None)
    _LOADABLE.update(map(sha256_of, loaded))
    if any(tried):
        return Answers(tried, ())
    return Answers(tried, [*rest, *[ending] * (len(models) - len(rest))])


def _ending(code: int) -> str:
    if code < 0:
        return f"the process that tried it was ended by signal {-code}"
    return f"the process that tried it ended with exit code {code}"


# --- the child -----------------------------------------------------------------------------------


def main() -> None:
    """Load the libraries, then the models, that stdin gives."""
    from optc.optimizer.worker import answering

    answer = answering()

    job: dict[str, Any] = json.loads(sys.stdin.readline())
    libraries = tuple(map(Path, job["libraries"]))
    for library in libraries:
        answer(_why_not((library,), None))
    for model in job["models"]:
        answer(_why_not(libraries, base64.b64decode(model)))


def _why_not(libraries: Libraries, model: bytes | None) -> str | None:
    """Return why ``libraries``, or ``model`` with them, cannot be loaded; None where they can."""
    import onnxruntime as ort

    from optc.optimizer.ort_errors import ORT_ERRORS

    options = ort.SessionOptions()
    options.log_severity_level = 4  # the exception says it
    try:
        register(options, libraries)
        if model is not None:
            ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except ORT_ERRORS as error:
        return _told(str(error))
    return None


def _told(words: str) -> str:
    """Return what ONNX Runtime says, without the names that it puts before."""
    text = words.split(" : ", 3)[-1] if words.startswith("[ONNXRuntimeError]") else words
    return " ".join(text.split())[:600] or "no reason given"


if __name__ == "__main__":
    main()
