"""Whether a model runs on made-up input of some sizes, found out in a child process.

    with Trials(model, inputs, deadline) as trials:
        trials.runs({"batch": 4})

Nothing is known of the model, so a run of it may be slow, take all memory or crash. The child has
bounds on both, and one that goes beyond them is killed, which counts as "does not run".

This file is the child, too: ``python -m optc.optimizer.trial``. It is told the model and its inputs
in one line of JSON, then one line of sizes a trial, and answers each with a line: null where it
worked, else why not.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from optc.optimizer.backend import interpreter_flags
from optc.optimizer.made_up import Bound, available_bytes, bytes_needed, made_up, shown_bytes
from optc.optimizer.ort_errors import ORT_ERRORS
from optc.optimizer.reference import OrtRunner, Rejected
from optc.optimizer.worker import answering
from optc.specs.compile_spec import Range
from optc.specs.model_problem import ResolvedInput

TRIAL_SECONDS = 4.0
"""A run that takes longer is ended."""

Sizes = dict[str, int]
"""Symbol -> extent."""


class NotLoadedError(Exception):
    """The model cannot be run at any size. The text says why."""


class Trials:
    """A model that is run at some sizes, each once.

    Args:
        model: Its file, which is trusted to be well-formed.
        inputs: Name -> dtype, shape and range.
        deadline: Of `time.monotonic`; after it nothing runs any more.

    Attributes:
        refusal: Why the model did not run the last time that it did not.
        exhausted: Whether some sizes did not run for want of time or memory: other sizes than those
            may be fine, and so may these on another machine.

    Raises:
        NotLoadedError: On entering.
    """

    def __init__(self, model: Path, inputs: Mapping[str, ResolvedInput], deadline: float) -> None:
        self.refusal = ""
        self.exhausted = False
        self._model, self._inputs, self._deadline = model, inputs, deadline
        self._bound = Bound.here()
        self._known: dict[tuple[tuple[str, int], ...], bool] = {}
        self._too_much: list[Sizes] = []
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self._started()
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._kill()

    @property
    def is_over(self) -> bool:
        """Whether the time for trials is over."""
        return time.monotonic() >= self._deadline

    def runs(self, sizes: Sizes) -> bool:
        """Whether the model takes these sizes; if not, ``refusal`` says why."""
        key = tuple(sorted(sizes.items()))
        if key not in self._known:
            if self.is_over:
                self.exhausted = True
                return False
            self._known[key] = self._run(sizes)
        return self._known[key]

    def _run(self, sizes: Sizes) -> bool:
        if any(all(sizes[s] >= extent for s, extent in much.items()) for much in self._too_much):
            return False  # no less than what was too much already
        if (needed := bytes_needed(self._inputs, _profile(sizes), "opt")) > self._bound.bytes:
            return self._was_too_much(sizes, f"{shown_bytes(needed)} of input are too large here")
        try:
            child = self._started()  # again, where one was killed
        except NotLoadedError:  # it did before: now there is no time for it
            self._kill()
            self.exhausted = True
            return False
        try:
            words = self._asked(child, sizes, TRIAL_SECONDS)
        except (TimeoutError, ChildProcessError) as error:
            self._kill()
            return self._was_too_much(sizes, str(error))
        if words is not None:
            self.refusal = words
        return words is None

    def _was_too_much(self, sizes: Sizes, why: str) -> bool:
        self.refusal, self.exhausted = why, True
        self._too_much.append(sizes)
        return False

    def _started(self) -> subprocess.Popen[bytes]:
        """Return the child, which has loaded the model."""
        if self._child is None:
            self._child = subprocess.Popen(
                [
                    *(sys.executable, *interpreter_flags(), "-m", "optc.optimizer.trial"),
                    *("--parent", str(os.getpid())),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,  # so that all that has been said is seen by select()
            )
            job = {
                "model": str(self._model.absolute()),
                "inputs": {name: dataclasses.asdict(i) for name, i in self._inputs.items()},
            }
            try:
                words = self._asked(self._child, job, self._deadline - time.monotonic())
            except (TimeoutError, ChildProcessError) as error:
                raise NotLoadedError(f"while loading it, {error}") from error
            if words is not None:
                raise NotLoadedError(words)
        return self._child

    def _asked(self, child: subprocess.Popen[bytes], message: Any, seconds: float) -> str | None:
        """Return the child's answer; raise an OSError of its kind where there is none."""
        assert child.stdin is not None, "it is a pipe"
        assert child.stdout is not None, "it is a pipe"
        seconds = max(0.0, min(seconds, self._deadline - time.monotonic()))
        try:
            data = memoryview((json.dumps(message) + "\n").encode())
            while data:
                data = data[child.stdin.write(data) :]
        except BrokenPipeError as error:
            raise ChildProcessError(_ending(child)) from error
        if not select.select([child.stdout], [], [], seconds)[0]:
            raise TimeoutError(f"more than {seconds:.0f} s went by")
        if not (line := child.stdout.readline()):
            raise ChildProcessError(_ending(child))
        words = json.loads(line)
        return None if words is None else str(words)

    def _kill(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None


def first_line(error: Exception) -> str:
    """Return the first line of what ``error`` says, printable and not too long."""
    line = (str(error).strip().splitlines() or ["no reason given"])[0]
    return "".join(c if c.isprintable() else " " for c in line)[:300]


def _profile(sizes: Sizes) -> dict[str, Range]:
    return {symbol: Range(min=0, opt=size, max=max(1, size)) for symbol, size in sizes.items()}


def _ending(child: subprocess.Popen[bytes]) -> str:
    code = child.wait()
    return f"the process ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"


# --- the child -----------------------------------------------------------------------------------


def main() -> None:
    """Load a model and run it at the sizes that stdin gives."""
    answer = answering()
    _bound_memory()

    job = json.loads(sys.stdin.readline())
    model = Path(job["model"])
    inputs = {
        name: ResolvedInput(
            given["dtype"],
            tuple(given["shape"]),
            tuple(given["range"]) if given["range"] is not None else None,
        )
        for name, given in job["inputs"].items()
    }
    try:
        runner = OrtRunner(model, model.parent, optimised=True)
    except ORT_ERRORS as error:
        answer(first_line(error))
        return
    answer(None)
    for line in sys.stdin:
        try:
            runner.run(made_up(inputs, _profile(json.loads(line)), "opt"))
        except (Rejected, MemoryError) as error:
            answer(first_line(error))
        else:
            answer(None)


def _bound_memory() -> None:
    """Let this process take no more than half of the memory that is available."""
    available = available_bytes()
    if available is None:
        return  # not on this system: the bound on the inputs has to do
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + available // 2
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY or limit < soft:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


if __name__ == "__main__":
    main()
