"""What this machine can build and run, found out by trying."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from pydantic import JsonValue

from optc.optimizer.backend import BACKENDS, BackendInfo, Gpu, available, gpus
from optc.optimizer.builder import Workers
from optc.optimizer.job import ProbeJob, ProbeResult
from optc.specs.diagnostic import EnvironmentFault

LIBRARIES: Final = (
    "optc",
    "numpy",
    "onnx",
    "onnx-graphsurgeon",
    "onnxruntime",
    "onnxsim",
    "pillow",
    "tensorrt-rtx-cu13",
    "tensorrt",
    "cuda-python",
    "torch",
)
"""Distributions whose versions decide what comes out."""

EXTRAS: Final[Mapping[str, str]] = {"pillow": "images", "cuda-python": "gpu", "torch": "torch"}
"""Distributions that optc can do without -> the extra that installs them."""

_TRIAL: Final = """
    <ir_version: 8, opset_import: ["" : 17]>
    trial (float[1,1,4,4] x) => (float[1,1,4,4] y) <float[1,1,1,1] w = {2}> {
        c = Conv (x, w)
        y = Relu (c)
    }"""


@dataclass(frozen=True, slots=True)
class Machine:
    """The computer, as far as it matters to a build or a run."""

    system: str
    processor: str
    cores: int
    memory_mib: int
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True, slots=True)
class BackendReport:
    """What a backend can do here.

    Attributes:
        version: None where the library cannot be loaded.
        reason: Why nothing can be built with it; None where something can.
        targets: Compute capability, "portable" or "this GPU" -> None where a trial build worked,
            else why not.
    """

    name: str
    version: str | None
    reason: str | None
    targets: Mapping[str, str | None]


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """What this machine can build and run.

    Attributes:
        libraries: Distribution -> its version; None where it is not installed.
        providers: What onnxruntime can run on.
        fixed_addresses: Whether builds can run without address randomisation, so that a rebuild
            tends to give the same bytes; None where no backend loads.
    """

    python: str
    machine: Machine
    libraries: Mapping[str, str | None]
    providers: tuple[str, ...]
    backends: tuple[BackendReport, ...]
    fixed_addresses: bool | None

    def as_json(self) -> dict[str, JsonValue]:
        """Return the report for programs."""
        return asdict(self)

    def render(self) -> str:
        """Return the report as people read it."""
        machine = self.machine
        memory = f"{machine.memory_mib / 1024:.1f} GiB memory"
        lines = [
            "machine",
            f"  {machine.system}, {machine.processor}, {machine.cores} cores, {memory}",
        ]
        for gpu in machine.gpus:
            capability = f"compute capability {gpu.compute_capability}"
            lines.append(f"  GPU {gpu.name}, {capability}, driver {gpu.driver}")
        if not machine.gpus:
            lines.append("  no NVIDIA GPU: engines can be built (tensorrt-rtx), but not run here")
        lines += ["libraries", f"  python {self.python}"]
        for name, version in self.libraries.items():
            missing = "- not installed"
            if name in EXTRAS:
                missing += f" (pip install 'optc[{EXTRAS[name]}]')"
            lines.append(f"  {name} {version or missing}")
        lines.append(f"  onnxruntime runs on {', '.join(self.providers)}")
        for backend in self.backends:
            lines.append(f"backend {backend.name} {backend.version or ''}".rstrip())
            if backend.reason is not None:
                lines.append(f"  cannot build: {backend.reason}")
            lines += (
                f"  {target}: {'builds' if why_not is None else why_not}"
                for target, why_not in backend.targets.items()
            )
        if self.fixed_addresses is not None:
            lines.append("builds")
            lines.append(
                "  address randomisation is off in build processes"
                if self.fixed_addresses
                else "  this system keeps address randomisation on: engines of one model differ in "
                "a few bytes from build to build"
            )
        return "\n".join(lines)


def examine() -> DoctorReport:
    """Return what this machine can build and run. Takes a few seconds: it tries."""
    import onnxruntime

    with Workers() as workers:
        backends = tuple(_tried(available(name), workers) for name in BACKENDS)
        fixed_addresses = workers.fixed_addresses
    return DoctorReport(
        python=platform.python_version(),
        machine=machine(),
        libraries=libraries(),
        providers=tuple(onnxruntime.get_available_providers()),
        backends=backends,
        fixed_addresses=fixed_addresses,
    )


def environment(workers: Workers) -> dict[str, JsonValue]:
    """Return what a manifest says of the machine and the libraries that made a package."""
    return {
        "python": platform.python_version(),
        "machine": asdict(machine()),
        "libraries": {name: version for name, version in libraries().items() if version},
        "backends": dict(workers.versions),
        "fixed_addresses": workers.fixed_addresses,
    }


def machine() -> Machine:
    """Return what this computer is."""
    return Machine(
        system=platform.platform(terse=True),
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_mib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
        gpus=gpus(),
    )


def libraries() -> dict[str, str | None]:
    """Return the versions of `LIBRARIES`, without loading any."""
    found: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _tried(info: BackendInfo, workers: Workers) -> BackendReport:
    """Return what a tiny build for each target of a backend says."""
    name = info.backend.name
    if info.reason is not None:
        return BackendReport(name, info.version, info.reason, {})
    import onnx.parser

    model = onnx.parser.parse_model(_TRIAL).SerializeToString()
    targets = (*info.backend.compute_capabilities, None)
    unnamed = "this GPU" if info.backend.needs_gpu else "portable"
    jobs = [
        ProbeJob(model=model, backend=name, build=True, compute_capability=target)
        for target in targets
    ]
    try:
        results = workers.probe(jobs)
    except EnvironmentFault as fault:
        return BackendReport(name, info.version, fault.diagnostics[0].problem, {})
    return BackendReport(
        name,
        info.version,
        None,
        {
            target or unnamed: _why_not(result)
            for target, result in zip(targets, results, strict=True)
        },
    )


def _why_not(result: ProbeResult) -> str | None:
    return result.failure.text if result.failure else None


def _processor() -> str:
    """Return the model name of the CPU; the architecture where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()
