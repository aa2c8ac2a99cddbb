"""What is asked of a build child, and what comes back: plain values that travel as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Shape = tuple[int, ...]

Profile = Mapping[str, tuple[Shape, Shape, Shape]]
"""One optimisation profile: name of an input -> its min, opt and max shape."""

Reason = Literal["refused", "builder", "target", "timeout", "crash", "killed", "output"]
"""Why there is no engine: the parser refused nodes; the builder gave up; the library cannot build
for this compute capability; time was up; the child crashed; something, most often the system for
want of memory, killed it; the engine could not be written."""


@dataclass(frozen=True, slots=True)
class BuildJob:
    """One engine to build. Each gets a process of its own.

    Attributes:
        model: The ONNX file. External data is looked for beside it.
        engine: Where the engine goes; its folder is there.
        backend: A name of `optc.optimizer.backend.BACKENDS`.
        compute_capability: "8.6"; None for one portable engine.
        profiles: Empty where no input has a dynamic axis.
        tf32: Whether float32 products may be computed in TF32.
        nodes: Names of the model's nodes, which are looked for in the text of a failure.
        time_limit_seconds: For parsing and building.
        log: Where the library's own words go; None keeps only the end of them, for a failure.
    """

    model: Path
    engine: Path
    backend: str
    compute_capability: str | None = None
    profiles: tuple[Profile, ...] = ()
    tf32: bool = False
    nodes: Sequence[str] = ()
    time_limit_seconds: float = 600.0
    log: Path | None = None


@dataclass(frozen=True, slots=True)
class ProbeJob:
    """One model to parse, and to build on trial where ``build`` says so. No engine is written.

    Attributes:
        model: An ONNX file, or a serialised model.
        folder: Where external data of a serialised model lies.
    """

    model: Path | bytes
    backend: str
    folder: Path | None = None
    build: bool = False
    compute_capability: str | None = None
    profiles: tuple[Profile, ...] = ()
    tf32: bool = False
    nodes: Sequence[str] = ()
    time_limit_seconds: float = 120.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """One node that the parser refuses.

    Attributes:
        node: Its name in the model; "" where the parser refuses the model as a whole.
        op: Its operator.
        code: The parser's own: ``UNSUPPORTED_NODE``.
        text: The parser's own words.
    """

    node: str
    op: str
    code: str
    text: str


@dataclass(frozen=True, slots=True)
class BuildFailure:
    """Why there is no engine.

    Attributes:
        text: The library's words, or ours where it had none: one paragraph.
        refusals: What the parser refused; empty where it did not come to that or refused nothing.
        nodes: Names of nodes of the model that ``text`` mentions.
        signal: Name of the signal that ended the child, "SIGSEGV"; None where none did.
        log_tail: The last lines that the library wrote.
    """

    reason: Reason
    text: str
    refusals: tuple[Refusal, ...] = ()
    nodes: tuple[str, ...] = ()
    signal: str | None = None
    log_tail: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What came of a `BuildJob`.

    Attributes:
        seconds: Of parsing, building and writing.
        peak_mib: The most memory that the child held; 0 where it ended without saying.
        engine_bytes: 0 where there is no engine.
        inputs: Names, as the engine has them.
        outputs: Names, as the engine has them.
        fixed_addresses: Whether address randomisation was off, which the same bytes from the same
            build need. It is not always enough: the library's own threads race on large models.
        failure: None where the engine is written.
    """

    seconds: float
    peak_mib: int = 0
    engine_bytes: int = 0
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    fixed_addresses: bool = False
    failure: BuildFailure | None = None


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What came of a `ProbeJob`.

    Attributes:
        failure: Why TensorRT does not take the model, or why there is no verdict. Its refusals are
            not always all: the parser stops at the first node whose import fails (see
            `optc.optimizer.oracle`).
    """

    seconds: float
    failure: BuildFailure | None = None

    @property
    def accepted(self) -> bool:
        """Whether TensorRT took the model."""
        return self.failure is None

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """What the parser refused."""
        return self.failure.refusals if self.failure else ()
