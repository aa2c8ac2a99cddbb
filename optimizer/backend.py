"""Which TensorRT builds the engines, and whether this machine has it.

TensorRT for RTX (module ``tensorrt_rtx``) and TensorRT (module ``tensorrt``) have the same Python
interface, so one code path serves both (`optc.optimizer.tensorrt`). They differ in what they ask of
the machine: the first builds for any GPU it knows on a machine that has none, the second builds for
the GPU it finds.

Neither is imported here, nor anywhere else in the parent: only build children load them.
"""

from __future__ import annotations

import importlib.util
import site
import subprocess
import sys
from dataclasses import dataclass
from typing import Final

from optc.specs.compile_spec import COMPUTE_CAPABILITIES
from optc.specs.diagnostic import Diagnostic, EnvironmentFault, InputError, nearest


@dataclass(frozen=True, slots=True)
class Backend:
    """One library that builds engines.

    Attributes:
        name: As written in a spec.
        module: What Python imports.
        extra: The extra of optc that installs it.
        compute_capabilities: What it can build for ahead of time; empty where it can build for the
            GPU of this machine only.
    """

    name: str
    module: str
    extra: str
    compute_capabilities: tuple[str, ...] = ()

    @property
    def needs_gpu(self) -> bool:
        """Whether a build needs the GPU it is for."""
        return not self.compute_capabilities


BACKENDS: Final = {
    backend.name: backend
    for backend in (
        Backend(
            name="tensorrt-rtx",
            module="tensorrt_rtx",
            extra="rtx",
            compute_capabilities=COMPUTE_CAPABILITIES["tensorrt-rtx"],
        ),
        Backend(name="tensorrt", module="tensorrt", extra="tensorrt"),
    )
}


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA GPU, as its driver describes it."""

    name: str
    compute_capability: str
    driver: str
    memory_mib: int
    max_clock_mhz: int | None


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """What a backend can do here.

    Attributes:
        version: Of the library that was loaded; None where it could not be.
        reason: Why it cannot build here; None where it can.
    """

    backend: Backend
    version: str | None
    reason: str | None


def backend_of(name: str) -> Backend:
    """Return the backend a spec calls ``name``.

    Raises:
        InputError: If there is none (``unknown-backend``).
    """
    if name in BACKENDS:
        return BACKENDS[name]
    guess = nearest(name, BACKENDS)
    raise InputError(
        Diagnostic(
            code="unknown-backend",
            problem=f"there is no backend called `{name}`",
            todo=f"write `{guess}`" if guess else f"write one of {', '.join(BACKENDS)}",
        )
    )


def require(name: str) -> Backend:
    """Return the backend ``name`` if its module is installed and its GPU is there.

    Cheap: nothing is loaded. A library that is installed but broken shows when a child loads it.

    Raises:
        InputError: If there is no such backend (``unknown-backend``).
        EnvironmentFault: If it is not installed (``missing-backend``) or lacks its GPU (``no-gpu``).
    """
    backend = backend_of(name)
    if not is_installed(backend):
        raise EnvironmentFault(
            Diagnostic(
                code="missing-backend",
                problem=f"the backend `{name}` is not installed: there is no Python module "
                f"`{backend.module}`",
                todo=f"pip install 'optc[{backend.extra}]'",
            )
        )
    if backend.needs_gpu and not gpus():
        raise EnvironmentFault(
            Diagnostic(
                code="no-gpu",
                problem=f"the backend `{name}` builds only for the GPU of the machine it runs on, "
                "and the NVIDIA driver names none here",
                todo="run on a machine that has the target GPU, or use the backend "
                "`tensorrt-rtx`, which needs none to build",
            )
        )
    return backend


def is_installed(backend: Backend) -> bool:
    """Return whether Python would find the backend's module."""
    spec = importlib.util.find_spec(backend.module)
    # Type stubs alone leave a folder without code, which is a namespace package and has no origin.
    return spec is not None and spec.origin is not None


def available(name: str) -> BackendInfo:
    """Return what loading the backend in a process of its own says. Takes about 0.1 s."""
    backend = backend_of(name)
    try:
        require(name)
    except EnvironmentFault as fault:
        return BackendInfo(backend, None, fault.diagnostics[0].problem)
    code = f"import {backend.module} as trt; print(trt.__version__)"
    child = subprocess.run(
        [sys.executable, *interpreter_flags(), "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode != 0:
        last = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
        return BackendInfo(backend, None, f"`{backend.module}` does not load: {last}")
    return BackendInfo(backend, child.stdout.strip(), None)


def gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that the NVIDIA driver names; none where there is no driver."""
    fields = "name,compute_cap,driver_version,memory.total,clocks.max.sm"
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    if answer.returncode != 0:
        return ()
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines()]
    return tuple(
        Gpu(
            name=row[0],
            compute_capability=row[1],
            driver=row[2],
            memory_mib=int(row[3]) if row[3].isdigit() else 0,
            max_clock_mhz=int(row[4]) if row[4].isdigit() else None,
        )
        for row in rows
        if len(row) == 5
    )


def interpreter_flags() -> list[str]:
    """Return the flags a child interpreter runs with.

    -P and -E keep the working directory and PYTHONPATH out of it, so that a user's own
    ``tensorrt.py`` beside the model is never run. Not -I, which would also hide an optc that was
    installed with ``pip install --user``; where the parent has no user site, nor has the child.
    """
    return ["-P", "-E", *([] if site.ENABLE_USER_SITE else ["-s"])]
