"""The file of costs that ``optc run --costs`` writes and ``partition.cost.measured`` of a spec reads.

It holds the constants that a run on some machine told, which it did not and why, and per stage what
was measured and what the constants make of it, so that a person can see how good the fit is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from optc.specs.compile_spec import Cost, Positive
from optc.specs.diagnostic import Diagnostic, Place, nearest

KIND: Final = "optc-costs"
SCHEMA_VERSION: Final = 1

ConstantName = Literal[
    "launch_us",
    "node_us",
    "copy_us",
    "copy_gb_s",
    "tensorrt_gflops",
    "tensorrt_gb_s",
    "fallback_gflops",
    "fallback_gb_s",
]
"""A key of `Cost` that a run can tell."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)


class StageTime(_Part):
    """What one stage took.

    Attributes:
        id: Of the stage, in the manifest of the package.
        runtime: What ran it.
        device: ``cpu``, or the name of the GPU.
        nodes: How many nodes ran, those of bodies round for round.
        flops: Arithmetic, at the shapes of the run.
        bytes: What its nodes read and write.
        copied: Tensors that went between GPU and host; copied_bytes, how large they are together.
        measured_us: Of its fastest run.
        predicted_us: What the cost model makes of it, with the constants of this file and the
            defaults of what it leaves out; on the host with ``call_us`` added.
        used: Whether the constants were fitted to it. What is simulated, or run by torch, tells
            nothing of them.
    """

    id: int
    runtime: str
    device: str
    nodes: int
    flops: int
    bytes: int
    copied: int = 0
    copied_bytes: int = 0
    measured_us: float
    predicted_us: float
    used: bool = True


class MeasuredCost(_Part):
    """The whole file.

    Attributes:
        kind: What tells it from other files.
        schema_version: Of the file.
        optc_version: Of the optc that wrote it.
        model: SHA-256 of the original model of the package that ran.
        target: Whose stages ran.
        repeat: Timed runs, after two that warm up.
        constants: Key of ``partition.cost`` -> its value on this machine.
        untold: Key -> why the run says nothing of it.
        call_us: What a stage on the host takes beside what the cost model knows of: that of the call
            itself. It is no constant of the model.
        error: Root of the mean square of how far off the prediction is, relative to what was
            measured, over the stages used; null where none was.
        environment: Versions and machine.
        stages: In running order.
    """

    kind: Literal["optc-costs"] = KIND
    schema_version: Literal[1] = SCHEMA_VERSION
    optc_version: str
    model: str = ""
    target: str = ""
    repeat: int = 1
    constants: Mapping[ConstantName, Positive]
    untold: Mapping[ConstantName, str] = {}
    call_us: float = 0.0
    error: float | None = None
    environment: Mapping[str, JsonValue] = {}
    stages: tuple[StageTime, ...] = ()

    def text(self) -> str:
        """Return it as it is written to a file."""
        data = self.model_dump(mode="json")
        return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def with_measured(
    cost: Cost, folder: Path, place: Place | None
) -> tuple[Cost, tuple[Diagnostic, ...]]:
    """Return ``cost`` with the constants of the file it names where it gives none itself.

    Args:
        cost: Of a spec.
        folder: Of the spec.
        place: Where the spec names the file.

    Returns:
        The cost, and what is wrong with the file: () where nothing is, or none is named.
    """
    if cost.measured is None:
        return cost, ()
    path = folder / cost.measured
    found = _read(path, place)
    if isinstance(found, Diagnostic):
        return cost, (found,)
    open_keys: dict[str, float] = {
        key: value for key, value in found.items() if getattr(cost, key) is None
    }
    return cost.model_copy(update=open_keys), ()


def _read(path: Path, place: Place | None) -> Mapping[ConstantName, float] | Diagnostic:
    todo = (
        "name a file that `optc run --costs` wrote; its path is taken from the folder of the spec"
    )
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        try:
            near = nearest(path.name, (each.name for each in path.parent.glob("*.json")))
        except OSError:
            near = None
        todo = f"there is `{near}`; or {todo}" if near else todo
        return Diagnostic("costs-not-found", f"there is no file {path}", todo, place)
    except (OSError, ValueError) as error:  # also a NUL in its name
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        return Diagnostic("not-costs", f"{path} cannot be read: {reason}", todo, place)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return Diagnostic("not-costs", f"{path} is not JSON", todo, place)
    if not isinstance(data, dict) or data.get("kind") != KIND:
        return Diagnostic("not-costs", f"{path} is no file of measured costs", todo, place)
    try:
        return MeasuredCost.model_validate(data).constants
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        problem = f"{path} is not as `optc run --costs` writes it: {where}: {first['msg']}"
        return Diagnostic("not-costs", problem, "measure again", place)
