"""TensorRT's parser and builder, as build children use them.

Never imported in the parent. The child registers the library of its backend (``tensorrt_rtx`` or
``tensorrt``, which have one interface) under the name ``tensorrt`` before it imports this module,
so the code below reads, and is type-checked, as code for TensorRT.
"""

from __future__ import annotations

import mmap
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorrt as trt

from optc.optimizer.job import Profile, Reason, Refusal

Progress = Callable[[str, float], None]
"""Called with the name of a phase and the share of the build that is done."""

VERSION: str = trt.__version__

_NO_DRIVER = "(cudaError 35:"


@dataclass(frozen=True, slots=True)
class Request:
    """What to make of one serialised model.

    Attributes:
        model: File to read.
        folder: Where its external data lies. The process works there from now on.
        engine: File to write; None makes none.
        build: Whether to build what was parsed.
        deadline: Of `time.monotonic`.
    """

    model: Path
    folder: Path
    engine: Path | None
    build: bool
    compute_capability: str | None
    profiles: Sequence[Profile]
    tf32: bool
    deadline: float


@dataclass(slots=True)
class Outcome:
    """What came of a `Request`: ``reason`` and ``text`` say why not, where it failed."""

    reason: Reason | None = None
    text: str = ""
    refusals: tuple[Refusal, ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    engine_bytes: int = 0


class _Failure(Exception):
    def __init__(self, reason: Reason, text: str, refusals: Sequence[Refusal] = ()) -> None:
        self.outcome = Outcome(reason, text, tuple(refusals))


class _Log(trt.ILogger):
    """Writes to stderr, which is the job's log, and keeps the errors.

    ``trt.Logger`` would do the former only, and to stdout.
    """

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        if severity > trt.ILogger.Severity.INFO:
            return
        sys.stderr.write(f"[{severity.name}] {msg}\n")
        if severity <= trt.ILogger.Severity.ERROR:
            self.errors.append(msg)


@dataclass(slots=True)
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class _Monitor(trt.IProgressMonitor):
    """Forwards how far a build is, and asks it to stop once the deadline has passed."""

    def __init__(self, deadline: float, progress: Progress) -> None:
        super().__init__()
        self.deadline = deadline
        self.stopped = False
        self._progress = progress
        self._phases: dict[str, _Phase] = {}

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        self._phases[phase_name] = _Phase(parent_phase, num_steps)
        self._tell(phase_name)

    def step_complete(self, phase_name: str, step: int) -> bool:
        if phase := self._phases.get(phase_name):
            phase.done = step + 1
            self._tell(phase_name)
        self.stopped = self.stopped or time.monotonic() > self.deadline
        return not self.stopped

    def phase_finish(self, phase_name: str) -> None:
        self._phases.pop(phase_name, None)

    def _tell(self, name: str) -> None:
        fraction, at = 0.0, self._phases.get(name)
        while at is not None:
            fraction = min(1.0, (at.done + fraction) / max(1, at.steps))
            at = self._phases.get(at.parent) if at.parent else None
        self._progress(name, fraction)


_loaders: list[trt.Builder] = []
"""What has loaded plugins: their library lives as long."""


def load_plugins(path: Path) -> str | None:
    """Load a library of plugins into this process; return why it cannot be, or None.

    TensorRT reads the creators that its function ``getCreators`` gives.
    """
    log = _Log()
    builder = trt.Builder(log)  # before there is one, the registry has nobody to tell its errors
    _loaders.append(builder)
    registry = trt.get_plugin_registry()
    if registry.load_library(str(path)) is None:
        return _said(log, "it gives no reason")
    return None


def run(request: Request, progress: Progress) -> Outcome:
    """Parse, and build and write where asked. What the library refuses is in the outcome.

    The process's working directory becomes ``request.folder``: the parser is then told a name and
    no path, so that nothing in its memory, and with it in the engine, depends on where the model
    lies.
    """
    os.chdir(request.folder)
    try:
        return _run(request, progress)
    except _Failure as failure:
        return failure.outcome


def _run(request: Request, progress: Progress) -> Outcome:
    log = _Log()
    try:
        builder = trt.Builder(log)
    except TypeError as error:  # how pybind11 says that the library returned no builder
        raise _Failure("target", _said(log, str(error))) from error
    progress("Parsing", 0.0)
    network, parser = _parse(builder, log, request.model)
    outcome = Outcome(
        inputs=tuple(network.get_input(i).name for i in range(network.num_inputs)),
        outputs=tuple(network.get_output(i).name for i in range(network.num_outputs)),
    )
    if not request.build:
        return outcome
    monitor = _Monitor(request.deadline, progress)
    config = _config(builder, network, log, request)
    config.progress_monitor = monitor
    log.errors.clear()
    engine: trt.IHostMemory | None = builder.build_serialized_network(network, config)
    # The network's weights are the parser's memory: it must outlive the build.
    del parser
    if engine is None:
        if monitor.stopped:
            raise _Failure("timeout", "the build was stopped at its time limit")
        raise _Failure("builder", _said(log, "the builder returned no engine and gave no reason"))
    if request.engine is not None:
        progress("Writing engine", 1.0)
        outcome.engine_bytes = _write(request.engine, engine)
    return outcome


def _parse(
    builder: trt.Builder, log: _Log, model: Path
) -> tuple[trt.INetworkDefinition, trt.OnnxParser]:
    # Mapped, not read: the pages are given back before the build, when memory peaks.
    with model.open("rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:  # an empty file cannot be mapped
            raise _Failure("refused", f"{model.name} is empty") from error
    with data:
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)
        if parser.parse(data, model.name):
            return network, parser
    # supports_model_v2() would name the same nodes: both end where the first import fails.
    refusals = tuple(dict.fromkeys(_refusals(parser)))
    text = "; ".join(dict.fromkeys(r.text for r in refusals)) or _said(log, "the parser refused it")
    raise _Failure("refused", text, refusals)


def _refusals(parser: trt.OnnxParser) -> list[Refusal]:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    return [
        Refusal(
            node=error.node_name(),
            op=error.node_operator(),
            code=error.code().name,
            # The description alone may be no more than "false".
            text=_told(f"{error.code().name} in {error.func()}: {error.desc()}"),
        )
        for error in errors
    ]


def _config(
    builder: trt.Builder, network: trt.INetworkDefinition, log: _Log, request: Request
) -> trt.IBuilderConfig:
    config = builder.create_builder_config()
    if request.tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)  # it is on by default
    if request.compute_capability is not None:
        _aim(config, request.compute_capability)
    inputs = {network.get_input(i).name for i in range(network.num_inputs)}
    for profile in request.profiles:
        shapes = builder.create_optimization_profile()
        for name in profile.keys() & inputs:
            low, usual, high = (trt.Dims(list(shape)) for shape in profile[name])
            try:
                shapes.set_shape(name, low, usual, high)
            except RuntimeError as error:  # another rank than the input's, or min above max
                text = f"the library refuses the shapes for `{name}`: {_said(log, str(error))}"
                raise _Failure("builder", text) from error
        if config.add_optimization_profile(shapes) < 0:
            raise _Failure("builder", _said(log, "the builder refused an optimisation profile"))
    return config


def _aim(config: Any, compute_capability: str) -> None:
    """Have the engine built for ``compute_capability``, where the library can choose.

    Only TensorRT for RTX can, and the stubs are TensorRT's, hence ``Any``. TensorRT builds for the
    GPU it runs on.
    """
    known = getattr(trt, "ComputeCapability", None)
    if known is None:
        return
    target = getattr(known, "SM" + compute_capability.replace(".", ""), None)
    if target is None:
        names = ", ".join(name for name in known.__members__ if name.startswith("SM"))
        text = f"this version cannot build for compute capability {compute_capability}, only for {names}"
        raise _Failure("target", text)
    config.num_compute_capabilities = 1
    config.set_compute_capability(target, 0)


def _write(path: Path, engine: trt.IHostMemory) -> int:
    try:
        with path.open("wb") as file:
            return file.write(memoryview(engine))
    except OSError as error:
        raise _Failure("output", f"the engine could not be written: {error}") from error


def _said(log: _Log, otherwise: str) -> str:
    return _told("\n".join(dict.fromkeys(log.errors))) or otherwise


def _told(text: str) -> str:
    """Return ``text`` without the lines that only say that this machine has no GPU driver.

    TensorRT for RTX adds one to many an error where there is none. Building needs none, so it
    never is the reason, and would be taken for it.
    """
    lines = text.splitlines()
    return "\n".join(line for line in lines if _NO_DRIVER not in line) or text
