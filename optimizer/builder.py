"""Build children, seen from the parent: started early, watched, and replaced when they fall.

    with Workers() as workers:
        workers.start("tensorrt-rtx")      # loads TensorRT while the parent does something else
        ...
        results = workers.build(jobs)

Whatever happens to a child, a crash, a hang, the system killing it, is a `BuildFailure` in the
result of its job. Whatever happens to the parent, its children die with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import math
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from optc.optimizer.backend import Backend, backend_of, interpreter_flags, require
from optc.optimizer.job import (
    BuildFailure,
    BuildJob,
    BuildResult,
    ProbeJob,
    ProbeResult,
    Reason,
    Refusal,
)
from optc.optimizer.package import sha256_of
from optc.specs.diagnostic import Diagnostic, EnvironmentFault, OptcError, Place, SpecError

_START_LIMIT_SECONDS: Final = 60.0
_GRACE_SECONDS: Final = 5.0
_FOLDER_PREFIX: Final = "optc-workers-"
_LOG_TAIL_LINES: Final = 20
_LOG_TAIL_BYTES: Final = 16_384

OnDone = Callable[[BuildJob, BuildResult], None]
OnProgress = Callable[[BuildJob, str, float], None]


class Workers:
    """Build children, as many side by side as there are cores and jobs.

    An engine is built in a process that has built nothing before, so that building it again gives
    the same bytes; models that are only probed share a few. Not for several threads at once.

    Args:
        count: The most children at a time; by default one a core that this process may use.
        plugins: Libraries of TensorRT plugins that every child loads first, each with the place of
            the spec that names it.
        grace_seconds: How long after its time limit a child may take to stop by itself.
    """

    def __init__(
        self,
        count: int | None = None,
        *,
        plugins: Mapping[Path, Place | None] | None = None,
        grace_seconds: float = _GRACE_SECONDS,
    ) -> None:
        self.count = count or len(os.sched_getaffinity(0))
        self._places = {str(path.resolve()): place for path, place in (plugins or {}).items()}
        self._plugins = {Path(path): sha256_of(Path(path)) for path in self._places}
        self._grace_seconds = grace_seconds
        self._workers: list[_Worker] = []
        self._versions: dict[str, str] = {}
        self._fixed_addresses: bool | None = None
        self._selector = selectors.DefaultSelector()
        _remove_leftovers()
        self._folder = tempfile.TemporaryDirectory(prefix=_FOLDER_PREFIX)
        self._lock = _locked(Path(self._folder.name))
        # The system tells a child of the death of the thread that started it, not of the process:
        # so one thread, which lives as long as the pool, starts them all.
        self._starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="optc-workers")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill all children and wait for their end."""
        self._starter.shutdown()
        self._retire(list(self._workers))
        self._selector.close()
        self._folder.cleanup()
        os.close(self._lock)

    def start(self, backend: str, children: int = 1) -> None:
        """Start children in the background, until there are as many as are wanted.

        Raises:
            EnvironmentFault: If the backend is not installed (``missing-backend``, ``no-gpu``).
        """
        found = require(backend)
        there = sum(worker.backend == found for worker in self._workers)
        for _ in range(there, min(children, self.count)):
            self._spawn(found)

    @property
    def folder(self) -> Path:
        """A folder for what lasts as long as the children; one that is left over the next removes."""
        return Path(self._folder.name)

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the libraries that children have loaded so far, by backend."""
        return dict(self._versions)

    @property
    def fixed_addresses(self) -> bool | None:
        """Whether address randomisation is off in the children; None before the first has said."""
        return self._fixed_addresses

    def version(self, backend: str) -> str:
        """Return the version of the library, as a child that loaded it says.

        Raises:
            EnvironmentFault: If it is not installed or does not load (``broken-backend``).
        """
        while backend not in self._versions:
            self.start(backend)
            self._listen()
            self._bury()
        return self._versions[backend]

    def identity(self, backend: str) -> str:
        """Return all that answers of the library depend on: its version, and the plugins.

        Raises:
            EnvironmentFault: As `version`.
            SpecError: ``library-not-loadable``.
        """
        return " ".join((self.version(backend), *sorted(self._plugins.values())))

    def probe(self, jobs: Sequence[ProbeJob]) -> list[ProbeResult]:
        """Return what TensorRT says of each model, in the order of ``jobs``.

        Raises:
            EnvironmentFault: If a backend is not installed or does not load.
        """
        tasks = [_Task(job) for job in jobs]
        self._run(tasks)
        return [task.probe_result() for task in tasks]

    def build(
        self,
        jobs: Sequence[BuildJob],
        on_done: OnDone | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[BuildResult]:
        """Build each job's engine; return what came of it, in the order of ``jobs``.

        Args:
            on_done: Called with each result as it comes.
            on_progress: Called with the name of a phase and the share of the build that is done,
                at most 20 times a second for each build.

        Raises:
            EnvironmentFault: If a backend is not installed or does not load.
        """

        def done(task: _Task) -> None:
            if on_done is not None and isinstance(task.job, BuildJob):
                on_done(task.job, task.build_result())

        def progress(task: _Task, phase: str, fraction: float) -> None:
            if on_progress is not None and isinstance(task.job, BuildJob):
                on_progress(task.job, phase, fraction)

        # What was probed with builds nothing, and would take memory beside what does.
        self._retire([w for w in self._workers if w.ready and w.task is None and not w.fresh])
        tasks = [_Task(job) for job in jobs]
        self._run(tasks, done, progress)
        return [task.build_result() for task in tasks]

    def _run(
        self,
        tasks: Sequence[_Task],
        done: Callable[[_Task], None] = lambda task: None,
        progress: Callable[[_Task, str, float], None] = lambda task, phase, fraction: None,
    ) -> None:
        for backend in {task.job.backend for task in tasks}:
            require(backend)
        waiting = list(tasks)
        try:
            while waiting or any(worker.task for worker in self._workers):
                self._assign(waiting)
                for worker, answer in self._listen():
                    task = worker.task
                    assert task is not None, "a child speaks only of the job it has"
                    if answer["event"] == "progress":
                        progress(task, answer["phase"], answer["fraction"])
                    else:
                        task.finish(worker, answer)
                        worker.rest()
                        if task.is_build:
                            self._retire([worker])
                        done(task)
                for task in self._bury():
                    done(task)
        finally:  # an interrupt, or a callback that raises: nobody waits for the rest
            self._retire([worker for worker in self._workers if worker.task])

    def _assign(self, waiting: list[_Task]) -> None:
        """Give jobs to the children that are idle, and start children for jobs that are left."""
        for worker in self._workers:
            task = next((task for task in waiting if task.suits(worker)), None)
            if task is not None:
                waiting.remove(task)
                worker.take(task, self._grace_seconds)
        starting = sum(not worker.ready for worker in self._workers)
        for task in waiting[starting:]:
            if len(self._workers) >= self.count:
                idle = [w for w in self._workers if w.ready and w.task is None]
                if not idle:
                    return
                self._retire(idle[:1])  # it suited none of the jobs
            self._spawn(backend_of(task.job.backend))

    def _listen(self) -> list[tuple[_Worker, dict[str, Any]]]:
        """Wait until a child speaks, ends or is out of time; return the news of jobs."""
        next_deadline = min((worker.deadline for worker in self._workers), default=math.inf)
        timeout = None if next_deadline == math.inf else max(0, next_deadline - time.monotonic())
        news = []
        for key, _ in self._selector.select(timeout):
            worker: _Worker = key.data
            for answer in worker.read():
                if answer["event"] == "plugin":
                    worker.plugin = answer["path"]
                    if answer["why"] is not None:
                        raise self._no_plugin(worker.plugin, answer["why"])
                elif answer["event"] == "ready":
                    worker.greet(answer)
                    self._versions[worker.backend.name] = answer["version"]
                    self._fixed_addresses = worker.fixed_addresses
                else:
                    news.append((worker, answer))
        return news

    def _bury(self) -> list[_Task]:
        """Remove children that ended or are out of time; return the jobs that fell with them."""
        lost = [worker for worker in self._workers if worker.is_lost]
        self._retire(lost)
        for worker in lost:
            if worker.task is not None:
                worker.task.lose(worker)
            elif not worker.ready:
                raise self._broken(worker)
        return [worker.task for worker in lost if worker.task is not None]

    def _spawn(self, backend: Backend) -> None:
        self._starter.submit(self._spawn_here, backend).result()

    def _spawn_here(self, backend: Backend) -> None:
        # Added by the thread that starts it: an interrupt of the caller cannot come in between.
        worker = _Worker(backend, Path(self._folder.name), self._plugins)
        self._workers.append(worker)
        self._selector.register(worker.answers, selectors.EVENT_READ, worker)

    def _retire(self, workers: Iterable[_Worker]) -> None:
        for worker in workers:
            self._workers.remove(worker)
            self._selector.unregister(worker.answers)
            worker.end()

    def _no_plugin(self, path: str, why: str) -> SpecError:
        return SpecError(
            Diagnostic(
                "library-not-loadable",
                f"TensorRT cannot load the library of plugins `{path}`: {why}",
                "name a library of plugins that was made for the version of TensorRT here",
                self._places[path],
            )
        )

    def _broken(self, worker: _Worker) -> OptcError:
        reason, text, _ = worker.verdict()
        if worker.plugin:
            return self._no_plugin(worker.plugin, text)
        name = worker.backend.name
        reinstall = (
            f"install it again: pip install --force-reinstall 'optc[{worker.backend.extra}]'"
        )
        said = "".join(f"\n  {line}" for line in worker.tail())
        return EnvironmentFault(
            Diagnostic(
                code="broken-backend",
                problem=f"the backend `{name}` does not load in a process of its own: {text}{said}",
                todo="make room in memory, and run it again" if reason == "killed" else reinstall,
            )
        )


class _Worker:
    """One child process and the pipes to it."""

    def __init__(self, backend: Backend, folder: Path, plugins: Iterable[Path]) -> None:
        self.backend = backend
        self.plugins = list(plugins)
        self.plugin = ""  # that it is loading, or loaded last
        self.ready = False
        self.fresh = True
        self.fixed_addresses = False
        self.task: _Task | None = None
        self.deadline = time.monotonic() + _START_LIMIT_SECONDS
        self._ended = False
        self._unread = b""
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        self.log = self.folder / "log"
        jobs_here, self._jobs = os.pipe()
        self.answers, answers_there = os.pipe()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, *interpreter_flags(), "-m", "optc.optimizer.worker"),
                    *("--parent", str(os.getpid()), "--module", backend.module),
                    *("--jobs", str(jobs_here), "--answers", str(answers_there)),
                    *(part for path in self.plugins for part in ("--plugin", str(path))),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(jobs_here, answers_there),
                env=_environment(backend, self.folder) if self.plugins else None,
                start_new_session=True,  # Ctrl-C in the terminal is the parent's to handle
            )
        os.close(jobs_here)
        os.close(answers_there)

    @property
    def is_lost(self) -> bool:
        """Whether it ended, or did not answer in time."""
        return self._ended or time.monotonic() > self.deadline

    @property
    def log_of_job(self) -> Path:
        """Where the library's words on the job at hand go."""
        chosen = self.task.job.log if self.task and isinstance(self.task.job, BuildJob) else None
        return self.log if chosen is None else chosen.absolute()

    def greet(self, answer: dict[str, Any]) -> None:
        self.ready = True
        self.fixed_addresses = answer["fixed_addresses"]
        self.deadline = math.inf

    def take(self, task: _Task, grace_seconds: float) -> None:
        self.task, self.fresh = task, False
        task.started = time.monotonic()
        self.deadline = task.started + task.job.time_limit_seconds + grace_seconds
        message = task.message(self.folder) | {"log": str(self.log_of_job)}
        # Where it has ended meanwhile, the next read tells.
        with contextlib.suppress(BrokenPipeError):
            data = memoryview(json.dumps(message).encode() + b"\n")
            while data:
                data = data[os.write(self._jobs, data) :]

    def rest(self) -> None:
        self.task, self.deadline = None, math.inf

    def read(self) -> list[dict[str, Any]]:
        """Return what it has said since; nothing where a line is not yet whole."""
        data = os.read(self.answers, 65_536)
        self._ended = not data
        *lines, self._unread = (self._unread + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def end(self) -> None:
        """Kill it, if it is still there, and wait until it is gone."""
        self._killed_by_us = self.process.poll() is None and not self._ended
        if self._killed_by_us:
            self.process.kill()
        self.process.wait()
        os.close(self._jobs)
        os.close(self.answers)

    def verdict(self) -> tuple[Reason, str, str | None]:
        """Return why it ended: the reason, in words, and the name of the signal, if any."""
        status = self.process.returncode
        if self._killed_by_us:
            return "timeout", "the build did not end within its time limit and was killed", None
        if status >= 0:
            return "crash", f"the build process ended with exit status {status}", None
        name = signal.Signals(-status).name
        if -status == signal.SIGKILL:
            text = "the build process was killed from outside, most often for want of memory"
            return "killed", text, name
        return "crash", f"the library crashed with {name}", name

    def tail(self) -> tuple[str, ...]:
        """Return the last lines of the log."""
        try:
            with self.log_of_job.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except FileNotFoundError:  # it ended before it could begin one
            return ()
        return tuple(text.splitlines()[-_LOG_TAIL_LINES:])


@dataclass(slots=True, eq=False)
class _Task:
    """A job on its way through the pool."""

    job: BuildJob | ProbeJob
    started: float = 0.0
    seconds: float = 0.0
    fixed_addresses: bool = False
    answer: dict[str, Any] = field(default_factory=dict)
    failure: BuildFailure | None = None

    @property
    def is_build(self) -> bool:
        """Whether an engine is to be kept, so that a process of its own is called for."""
        return isinstance(self.job, BuildJob)

    def suits(self, worker: _Worker) -> bool:
        """Return whether ``worker`` can take this now."""
        free = worker.ready and worker.task is None and not worker.is_lost
        fitting = worker.backend.name == self.job.backend and (worker.fresh or not self.is_build)
        return free and fitting

    def message(self, folder: Path) -> dict[str, Any]:
        """Return what the child is told. A serialised model goes to a file in ``folder``."""
        job = self.job
        if isinstance(job.model, bytes):
            model = folder / "model.onnx"
            model.write_bytes(job.model)
        else:
            model = job.model.absolute()
        build = isinstance(job, BuildJob) or job.build
        engine = job.engine.absolute() if isinstance(job, BuildJob) else None
        beside = job.folder if isinstance(job, ProbeJob) and job.folder else model.parent
        return {
            "model": str(model),
            "folder": str(beside.absolute()),
            "engine": None if engine is None else str(engine),
            "build": build,
            "compute_capability": job.compute_capability,
            "profiles": [dict(profile) for profile in job.profiles],
            "tf32": job.tf32,
            "time_limit_seconds": job.time_limit_seconds,
        }

    def finish(self, worker: _Worker, answer: dict[str, Any]) -> None:
        """Keep what the child said."""
        self.answer = answer
        self.seconds = answer["seconds"]
        self.fixed_addresses = worker.fixed_addresses
        if answer["reason"] is not None:
            self.failure = BuildFailure(
                reason=answer["reason"],
                text=answer["text"],
                refusals=tuple(Refusal(*fields) for fields in answer["refusals"]),
                nodes=named_in(answer["text"], self.job.nodes),
                log_tail=worker.tail(),
            )

    def lose(self, worker: _Worker) -> None:
        """Make a failure of the end of the child that had this."""
        self.seconds = round(time.monotonic() - self.started, 3)
        reason, text, signal_name = worker.verdict()
        tail = worker.tail()
        self.failure = BuildFailure(
            reason=reason,
            text=text,
            nodes=named_in("\n".join(tail), self.job.nodes),
            signal=signal_name,
            log_tail=tail,
        )

    def build_result(self) -> BuildResult:
        """Return what a `BuildJob` is answered with."""
        return BuildResult(
            seconds=self.seconds,
            peak_mib=self.answer.get("peak_mib", 0),
            engine_bytes=self.answer.get("engine_bytes", 0),
            inputs=tuple(self.answer.get("inputs", ())),
            outputs=tuple(self.answer.get("outputs", ())),
            fixed_addresses=self.fixed_addresses,
            failure=self.failure,
        )

    def probe_result(self) -> ProbeResult:
        """Return what a `ProbeJob` is answered with."""
        return ProbeResult(seconds=self.seconds, failure=self.failure)


def named_in(text: str, nodes: Iterable[str]) -> tuple[str, ...]:
    """Return which of ``nodes`` are named in ``text``, each as a whole word.

    TensorRT names an inner or repeated node with a number behind it; such a name counts only
    where no node bears it exactly.

    Example:
        >>> named_in("/head/Relu_1_41 has no runners", ["/head/Relu", "/head/Relu_1", "Relu"])
        ('/head/Relu_1',)
    """
    # A letter, digit, underscore or slash beside it makes it part of another name.
    mentioned = [name for name in nodes if name and name in text]
    exact = [n for n in mentioned if re.search(rf"(?<![\w/]){re.escape(n)}(?![\w/])", text)]
    if exact:
        return tuple(exact)
    return tuple(n for n in mentioned if re.search(rf"(?<![\w/]){re.escape(n)}_\d+(?![\w/])", text))


def _locked(folder: Path) -> int:
    """Mark ``folder`` as in use for as long as this process lives; return what to close."""
    new = folder / "new"
    descriptor = os.open(new, os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    new.rename(folder / "lock")  # only now may others take it for a sign of life
    return descriptor


def _remove_leftovers() -> None:
    """Remove the folders of pools whose process was killed before it could."""
    for lock in Path(tempfile.gettempdir()).glob(f"{_FOLDER_PREFIX}*/lock"):
        try:
            with lock.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
        except OSError:
            continue  # in use, another user's, or removed by another process meanwhile


def _environment(backend: Backend, folder: Path) -> dict[str, str]:
    """Return an environment in which the parser finds the library that it adds plugins to.

    It opens that under its name without a version, which Python's packages of TensorRT for RTX do
    not have; where it does not find it, it ends the process.
    """
    package = importlib.util.find_spec(f"{backend.module}_libs")
    places = package.submodule_search_locations if package is not None else None
    for place in places or ():
        for library in Path(place).glob("lib*.so.*"):
            link = folder / (library.name.partition(".so")[0] + ".so")
            if not link.exists():
                link.symlink_to(library)
    searched = (str(folder), os.environ.get("LD_LIBRARY_PATH"))
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, searched))}
