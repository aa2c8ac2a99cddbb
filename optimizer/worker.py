"""The build child: ``python -m optc.optimizer.worker``, started by `optc.optimizer.builder`.

It speaks JSON, one object a line, over two pipes of its own. stdout and stderr belong to the native
libraries and go to the log of the job at hand. It dies with its parent, leaves Ctrl-C to it, and
turns address randomisation off for itself: some of TensorRT's decisions depend on the order of
addresses, so only then can the same build give the same bytes. (It does for models up to the size
of YOLOv5n and ResNet-50; on SE-ResNet-50 threads of the library race, and a few bytes vary.)
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import importlib
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optc.optimizer import tensorrt

_PR_SET_PDEATHSIG = 1
_ADDR_NO_RANDOMIZE = 0x0040000
_QUERY_PERSONALITY = 0xFFFFFFFF
_EXECUTED_AGAIN = "--executed-again"
_PROGRESS_INTERVAL_SECONDS = 0.05


def main() -> None:
    """Take jobs from the one pipe and answer on the other until the parent closes its end."""
    arguments = _arguments()
    die_with(arguments.parent)
    fixed_addresses = _fix_addresses(arguments.executed_again)
    leave_no_traces()
    answers = _Answers(arguments.answers)
    # See optc.optimizer.tensorrt: it is written for, and checked against, this name.
    sys.modules["tensorrt"] = importlib.import_module(arguments.module)
    from optc.optimizer import tensorrt

    for path in arguments.plugin:
        answers.send(event="plugin", path=path, why=None)  # it may end this process
        answers.send(event="plugin", path=path, why=tensorrt.load_plugins(Path(path)))
    threading.excepthook = _end
    answers.send(event="ready", version=tensorrt.VERSION, fixed_addresses=fixed_addresses)
    with os.fdopen(arguments.jobs, encoding="utf-8") as jobs:
        for line in jobs:
            job = json.loads(line)
            # A new thread allocates from an arena of its own, which is the same whatever Python
            # and earlier jobs have left in the main one. Without it a longer path, say, is
            # enough to change the engine.
            thread = threading.Thread(target=_run, args=(job, answers))
            thread.start()
            thread.join()
    # The interpreter's and the library's teardown would cost time and can only go wrong.
    os._exit(0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--jobs", type=int, required=True)
    parser.add_argument("--answers", type=int, required=True)
    parser.add_argument("--module", required=True)
    parser.add_argument("--plugin", action="append", default=[])
    parser.add_argument(_EXECUTED_AGAIN, action="store_true")
    return parser.parse_args()


def die_with(parent: int) -> None:
    """Have the system kill this process when the one that started it dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call above could notice
        os._exit(1)


def _fix_addresses(executed_again: bool) -> bool:
    """Turn address randomisation off, which takes effect with the next exec: do that once.

    Containers may forbid it; then builds work, and their bytes vary.
    """
    libc = ctypes.CDLL(None)
    before = libc.personality(_QUERY_PERSONALITY)
    if before != -1 and before & _ADDR_NO_RANDOMIZE:
        return True
    if executed_again or libc.personality(before | _ADDR_NO_RANDOMIZE) == -1:
        return False
    os.execv(sys.executable, [*sys.orig_argv, _EXECUTED_AGAIN])


def leave_no_traces() -> None:
    """Leave Ctrl-C to the parent, dump no core, and be the one that goes where memory runs out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash would dump beside the user's model
    faulthandler.enable()
    # Should memory run out, the system is to end this process and not optc.
    try:
        Path("/proc/self/oom_score_adj").write_text("500")
    except OSError:
        return  # not on this system: then it chooses by size, which is most often right too


def answering() -> Callable[[str | None], None]:
    """Begin a child that is asked on stdin, and return what answers: a line of JSON on stdout each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", type=int, required=True)
    die_with(parser.parse_args().parent)
    leave_no_traces()
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is no answer

    def answer(words: str | None) -> None:
        os.write(answers, (json.dumps(words) + "\n").encode())

    return answer


def _end(fault: threading.ExceptHookArgs) -> None:
    """Show a fault of ours and end: the parent finds the traceback in the log."""
    sys.excepthook(fault.exc_type, fault.exc_value or fault.exc_type(), fault.exc_traceback)
    sys.stderr.flush()
    os._exit(1)


class _Answers:
    """The way back to the parent. Safe to use from any thread."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._last_progress = 0.0

    def send(self, **answer: Any) -> None:
        data = memoryview((json.dumps(answer) + "\n").encode())
        with self._lock:
            while data:
                data = data[os.write(self._descriptor, data) :]

    def progress(self, phase: str, fraction: float) -> None:
        now = time.monotonic()
        if now - self._last_progress >= _PROGRESS_INTERVAL_SECONDS:
            self._last_progress = now
            self.send(event="progress", phase=phase, fraction=round(fraction, 3))


def _run(job: dict[str, Any], answers: _Answers) -> None:
    from optc.optimizer import tensorrt

    started = time.monotonic()
    if job["log"] is not None:
        _log_to(job["log"])
    outcome = tensorrt.run(_request(job, started), answers.progress)
    sys.stderr.flush()
    answers.send(
        event="done",
        reason=outcome.reason,
        text=outcome.text,
        refusals=[[r.node, r.op, r.code, r.text] for r in outcome.refusals],
        inputs=outcome.inputs,
        outputs=outcome.outputs,
        engine_bytes=outcome.engine_bytes,
        seconds=round(time.monotonic() - started, 3),
        peak_mib=_peak_mib(),
    )


def _request(job: dict[str, Any], started: float) -> tensorrt.Request:
    from optc.optimizer import tensorrt

    return tensorrt.Request(
        model=Path(job["model"]),
        folder=Path(job["folder"]),
        engine=Path(job["engine"]) if job["engine"] is not None else None,
        build=job["build"],
        compute_capability=job["compute_capability"],
        profiles=job["profiles"],
        tf32=job["tf32"],
        deadline=started + job["time_limit_seconds"],
    )


def _log_to(path: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _peak_mib() -> int:
    """Return the most memory this process has held.

    Not getrusage(): its figure starts at the size of the parent at the time of the fork.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) // 1024
    return 0


if __name__ == "__main__":
    main()
