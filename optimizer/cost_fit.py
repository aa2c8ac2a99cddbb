"""Fits the constants of the cost model to a measured run of a package.

The package runs to warm up and then some times for the clock. What a stage took is its fastest run:
whatever else the machine does only adds to it. Where engines ran on a GPU, their stages run again as
ONNX on the host, so that the fallback is measured on them, too. The work of each stage is counted on
its ONNX, at the shapes that the run had.

What a stage takes is a sum over constants: how often each counts, times what it stands for. Which of
arithmetic and traffic a node is bound by depends on the constants themselves, so that the fit is made
again until that settles. It is a least-squares fit of relative errors without negative times, in which
stages that the model knows nothing of count little, and beside each constant it gives how far that may
be off. A constant is told where that is at most half of it, or half of its default; a run of few stages
tells few of them.
"""

from __future__ import annotations

import errno
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import onnx

from optc import __version__
from optc.optimizer.cost import (
    PER_US,
    Constants,
    Work,
    copies_us,
    engine_us,
    fallback_us,
    time_text,
)
from optc.optimizer.doctor import libraries, machine
from optc.optimizer.runtime import LOW, Device, Package, StageRun
from optc.passes.flops import flops, traffic
from optc.passes.graph import import_model
from optc.passes.shape import infer
from optc.specs.diagnostic import Diagnostic, EnvironmentFault
from optc.specs.manifest import Stage
from optc.specs.measured_cost import ConstantName, MeasuredCost, StageTime

Vector = npt.NDArray[np.float64]

NAMES: tuple[ConstantName, ...] = get_args(ConstantName)

WIDE = 10.0
"""A constant may well be this many times its default: what is assumed before anything is measured."""

LEAST_NOISE, ASSUMED_NOISE = 0.1, 0.3
"""How far off the model is, relative: at the least, and where there are too few stages to tell."""

MEDIAN_OF_NORMAL = 1.4826
"""Standard deviation of a normal distribution, in medians of its magnitudes."""

CALL_US, CALL_WIDE = 20.0, 2.0
"""What a call of the fallback's runtime takes beside its nodes, give or take. It is fitted as well, so
that it does not go into the constants, and is none of the cost model: it is `optc run` that takes it."""

MOST_DOUBT = 0.5
"""A constant is told where its standard error is at most this share of it, or of its default."""

MAX_ROUNDS = 20


@dataclass(frozen=True, slots=True)
class Timing:
    """What one stage did, and how long that took.

    Attributes:
        run: Where it ran.
        microseconds: Of its fastest run.
        works: Of its nodes, at the shapes of the run.
        copied: Bytes of each tensor that went between GPU and host.
        used: Whether it tells anything of the constants.
    """

    run: StageRun
    microseconds: float
    works: tuple[Work, ...]
    copied: tuple[int, ...] = ()
    used: bool = True

    @property
    def on_host(self) -> bool:
        """Whether the fallback's runtime ran it."""
        return self.run.runtime != "tensorrt"

    def predicted(self, constants: Constants) -> float:
        """Return what the cost model makes of it, in microseconds."""
        if self.run.runtime == "tensorrt":
            return engine_us(constants, self.works) + copies_us(constants, self.copied)
        return fallback_us(constants, self.works)

    def counts(self, constants: Constants) -> dict[ConstantName, float]:
        """Return how often each constant counts: `predicted` is the sum of these times `unit`."""
        if self.run.runtime == "tensorrt":
            return {
                "launch_us": 1,
                "copy_us": len(self.copied),
                "copy_gb_s": sum(self.copied),
                **_bound(
                    [Work.of_all(self.works)],
                    ("tensorrt_gflops", constants.tensorrt_gflops),
                    ("tensorrt_gb_s", constants.tensorrt_gb_s),
                ),
            }
        return {
            "node_us": sum(each.steps for each in self.works),
            **_bound(
                self.works,
                ("fallback_gflops", constants.fallback_gflops),
                ("fallback_gb_s", constants.fallback_gb_s),
            ),
        }


def _bound(
    works: Sequence[Work], gflops: tuple[ConstantName, float], gb_s: tuple[ConstantName, float]
) -> dict[ConstantName, float]:
    """Return the FLOPs of what is bound by arithmetic, and the bytes of what is by its traffic."""
    found: dict[ConstantName, float] = {gflops[0]: 0.0, gb_s[0]: 0.0}
    for work in works:
        if work.flops / gflops[1] >= work.bytes / gb_s[1]:
            found[gflops[0]] += work.flops
        else:
            found[gb_s[0]] += work.bytes
    return found


def unit(name: ConstantName, value: float) -> float:
    """Return the microseconds that a constant stands for: one FLOP or byte of a rate.

    Example:
        >>> unit("node_us", 5.0), unit("copy_gb_s", 8.0)
        (5.0, 0.000125)
    """
    return value if name.endswith("_us") else 1 / (value * PER_US)


@dataclass(frozen=True, slots=True)
class Fit:
    """What timings tell of the constants.

    Attributes:
        constants: Those that they tell.
        untold: The others -> why not.
        call_us: What a stage on the host takes beside what the cost model knows of.
    """

    constants: Mapping[ConstantName, float]
    untold: Mapping[ConstantName, str]
    call_us: float = 0.0

    def over(self, defaults: Constants) -> Constants:
        """Return ``defaults`` with what was told in their place."""
        return replace(defaults, **{str(name): value for name, value in self.constants.items()})


def fit(timings: Sequence[Timing], defaults: Constants) -> Fit:
    """Return what ``timings`` tell of the constants."""
    rows = [each for each in timings if each.used and each.microseconds > 0]
    units = np.array([*(unit(name, getattr(defaults, name)) for name in NAMES), CALL_US])
    times = np.array([each.microseconds for each in rows])
    constants, values, errors = defaults, np.ones(len(units)), np.full(len(units), WIDE)
    counts = np.zeros((len(rows), len(units)))
    for _ in range(MAX_ROUNDS):
        before, counts = counts, np.zeros_like(counts)
        for index, row in enumerate(rows):
            now = row.counts(constants)
            counts[index] = [*(now.get(name, 0.0) for name in NAMES), row.on_host]
        if np.array_equal(counts, before):
            break
        values, errors = _solved(counts * units / times[:, None])
        found = zip(NAMES, (values * units)[:-1], strict=True)
        constants = replace(defaults, **{str(name): _value(name, each) for name, each in found})
    told: dict[ConstantName, float] = {}
    untold: dict[ConstantName, str] = {}
    for index, name in enumerate(NAMES):
        if not np.any(counts[:, index]):
            untold[name] = _nothing_on(name)
        elif errors[index] > MOST_DOUBT * max(values[index], 1.0):
            untold[name] = "the stages that ran are too few, or too much alike, to tell it"
        else:
            told[name] = float(f"{getattr(constants, name):.4g}")
    call_us = float(values[-1] * CALL_US) if errors[-1] <= MOST_DOUBT * max(values[-1], 1) else 0.0
    return Fit(told, untold, round(call_us, 1))


def _value(name: ConstantName, microseconds: float) -> float:
    """Return the constant that stands for so many microseconds: the other way round of `unit`."""
    return float(microseconds) if name.endswith("_us") else float(1 / (microseconds * PER_US))


def _nothing_on(name: ConstantName) -> str:
    engines = name.startswith(("launch", "copy", "tensorrt"))
    if engines:
        return (
            "no engine ran on a GPU"
            if not name.endswith(("gflops", "gb_s"))
            else ("no engine ran on a GPU that is bound by it")
        )
    return "no stage that ran on ONNX Runtime, unsimulated, is bound by it"


def _solved(design: Vector) -> tuple[Vector, Vector]:
    """Return the factors on the defaults that make each row of ``design`` sum to 1, and their errors.

    Bayes' rule with a wide normal distribution around the defaults, so that directions in which the
    rows say nothing keep it. How far off a row may be is learnt from the rows: half of them are less
    so, and those that are off by much more, as the model knows nothing of what they do, count little.
    """
    rows, columns = design.shape
    prior = np.array([*[WIDE] * (columns - 1), CALL_WIDE]) ** -2
    freedom = rows - int(np.any(design, axis=0).sum())
    noise, weights = ASSUMED_NOISE, np.ones(rows)
    found, errors = np.ones(columns), prior**-0.5
    for _ in range(MAX_ROUNDS):
        found, errors = _without_negatives(design, np.sqrt(weights) / noise, prior)
        if freedom <= 0:
            break
        off = np.abs(design @ found - 1)
        before = noise
        noise = max(
            LEAST_NOISE, float(np.median(off)) * MEDIAN_OF_NORMAL * math.sqrt(rows / freedom)
        )
        weights = 1 / (1 + (off / (2 * noise)) ** 2)
        if math.isclose(noise, before, rel_tol=1e-3):
            break
    return found, errors


def _without_negatives(design: Vector, weights: Vector, prior: Vector) -> tuple[Vector, Vector]:
    """Solve by least squares; what comes out negative is nothing, and the others are solved again.

    It is then given its standard error, as it is somewhere below that.
    """
    design = design * weights[:, None]
    precision = design.T @ design + np.diag(prior)
    goal = design.T @ weights + prior
    errors = np.sqrt(np.diag(np.linalg.inv(precision)))
    active = np.ones(len(prior), bool)
    while True:
        found = np.zeros(len(prior))
        found[active] = np.linalg.solve(precision[np.ix_(active, active)], goal[active])
        if not np.any(found[active] <= 0):
            return np.where(active, found, errors), errors
        active &= found > 0


# --- measuring -----------------------------------------------------------------------------------


def measure(
    package: Package,
    inputs: Mapping[str, Any],
    *,
    target: str | None,
    device: Device,
    repeat: int,
) -> MeasuredCost:
    """Run ``package`` and return what that tells of the constants of the cost model.

    Args:
        package: What to run.
        inputs: As for `Package.run`.
        target: Likewise.
        device: Likewise.
        repeat: How many runs are timed.

    Raises:
        OptcError: As `Package.run`.
    """
    timings = _timings(package, inputs, target, device, repeat)
    assert package.last_run is not None, "it ran"
    ran = package.last_run.target
    if any(each.run.runtime == "tensorrt" for each in timings):
        again = _timings(package, inputs, ran, "cpu", repeat)
        on_gpu = {each.run.id for each in timings if each.run.runtime == "tensorrt"}
        timings += [each for each in again if each.run.id in on_gpu]
    told = fit(timings, Constants())
    constants = told.over(Constants())
    stages = tuple(_record(each, constants, told.call_us) for each in timings)
    off = [each.predicted_us / each.measured_us - 1 for each in stages if each.used]
    return MeasuredCost(
        optc_version=__version__,
        model=package.manifest.model.sha256,
        target=ran,
        repeat=repeat,
        constants=told.constants,
        untold=told.untold,
        call_us=told.call_us,
        error=round(math.sqrt(statistics.fmean(e * e for e in off)), 4) if off else None,
        environment=_environment(),
        stages=stages,
    )


def _environment() -> dict[str, Any]:
    """Return versions and machine as JSON holds them."""
    found = {"machine": asdict(machine()), "libraries": dict(libraries())}
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def _timings(
    package: Package, inputs: Mapping[str, Any], target: str | None, device: Device, repeat: int
) -> list[Timing]:
    warm = package.run(inputs, target=target, device=device)
    assert package.last_run is not None, "it ran"
    chosen = package.manifest.target(package.last_run.target)
    stages = package.manifest.stages_of(chosen)
    made = [name for stage in stages for name in stage.outputs]
    values = {**inputs, **warm}
    values |= package.run(inputs, target=chosen.name, device=device, keep=made)
    seconds: dict[int, list[float]] = {stage.id: [] for stage in stages}
    runs: dict[int, StageRun] = {}
    for _ in range(repeat):
        package.run(inputs, target=chosen.name, device=device)
        for run in package.last_run.stages:
            seconds[run.id].append(run.seconds)
            runs[run.id] = run
    return [
        _timing(package.path, stage, runs[stage.id], min(seconds[stage.id]), values)
        for stage in stages
    ]


def _timing(
    folder: Path, stage: Stage, run: StageRun, seconds: float, values: Mapping[str, Any]
) -> Timing:
    on_gpu = run.runtime == "tensorrt"
    simulated = (
        stage.runtime == "tensorrt"
        and not on_gpu
        and (stage.precision is None or not LOW.isdisjoint(stage.precision.nodes))
    )
    crossing = [values[name] for name in (*stage.inputs, *stage.outputs)] if on_gpu else []
    return Timing(
        run=run,
        microseconds=seconds * 1e6,
        works=_works(folder / stage.model, values),
        copied=tuple(int(np.asarray(value).nbytes) for value in crossing),
        used=run.runtime != "torch" and not simulated,
    )


def _works(path: Path, values: Mapping[str, Any]) -> tuple[Work, ...]:
    """Return the work of the nodes of a stage, where its inputs have the shapes of ``values``."""
    graph = import_model(onnx.load(path, load_external_data=False), path.parent)
    for tensor in graph.inputs:
        value = values[tensor.name]
        if isinstance(value, np.ndarray):
            tensor.shape = list(value.shape)
    shapes = infer(graph, opset=graph.opset)
    counted, moved = flops(graph, shapes, {}), traffic(graph, shapes, {})
    return tuple(Work(counted[name], each.bytes, each.steps) for name, each in moved.items())


def _record(timing: Timing, constants: Constants, call_us: float) -> StageTime:
    whole = Work.of_all(timing.works)
    return StageTime(
        id=timing.run.id,
        runtime=timing.run.runtime,
        device=timing.run.device,
        nodes=whole.steps,
        flops=whole.flops,
        bytes=whole.bytes,
        copied=len(timing.copied),
        copied_bytes=sum(timing.copied),
        measured_us=round(timing.microseconds, 1),
        predicted_us=round(timing.predicted(constants) + call_us * timing.on_host, 1),
        used=timing.used,
    )


# --- for people ----------------------------------------------------------------------------------


def render(measured: MeasuredCost) -> str:
    """Return what was measured, beside what the constants make of it, for a person."""
    lines = [f"measured in {measured.repeat} runs, the fastest of each stage:"]
    for stage in measured.stages:
        use = "" if stage.used else " (not used)"
        lines.append(
            f"  stage {stage.id} on {stage.runtime}, {stage.device}: "
            f"{time_text(stage.measured_us)}, by the cost model {time_text(stage.predicted_us)}{use}"
        )
    told = ", ".join(f"{name} {value:g}" for name, value in measured.constants.items())
    lines.append(f"told: {told or 'nothing'}")
    reasons: dict[str, list[str]] = {}
    for name, why in measured.untold.items():
        reasons.setdefault(why, []).append(name)
    lines += [f"not told: {', '.join(names)}: {why}" for why, names in reasons.items()]
    return "\n".join(lines)


def write_costs(path: Path, measured: MeasuredCost) -> None:
    """Write ``measured`` to a file; one that is there is replaced.

    Raises:
        EnvironmentFault: ``cannot-write``, ``disk-full``.
    """
    try:
        path.write_text(measured.text(), encoding="utf-8")
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        raise EnvironmentFault(
            Diagnostic(
                "disk-full" if full else "cannot-write",
                f"`{path}` cannot be written: {error.strerror or error}",
                "free some space, or write to another disk"
                if full
                else "choose a folder that is there and that you may write to",
            )
        ) from error
