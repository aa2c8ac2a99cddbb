"""Proves the passes on a model: after each that changed something, the numbers are still the same.

Before and after run on ONNX Runtime, its optimisations off, on seeded input of several shapes. What
differs by more than the noise floor of the model before (`optc.optimizer.noise`) ends the proof: the
first tensor that differs names the node, and the model before is kept with its input and the command
that shows it again.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from optc.optimizer.arrays import write_arrays
from optc.optimizer.compare import Tolerance, compare
from optc.optimizer.init import try_out
from optc.optimizer.made_up import Array, Bound, bytes_needed, made_up
from optc.optimizer.noise import Noise, floors_covering
from optc.optimizer.package import WeightStore
from optc.optimizer.progress import Progress
from optc.optimizer.reference import Model, Rejected, flattened
from optc.passes.graph import export_model
from optc.passes.pipeline import Step
from optc.specs.compile_spec import Range
from optc.specs.diagnostic import Diagnostic, ModelError, NotMetError

EXACTLY = Tolerance(atol=0.0, rtol=1e-6)
"""What no rounding explains away is looked at more closely; this is not yet a verdict."""

MOST_TENSORS = 512
"""Tensors that are looked at to find the first that differs."""


@dataclass(frozen=True, slots=True)
class Proven:
    """What was proven.

    Attributes:
        cases: Names of the inputs that before and after ran on.
        steps: Number and pass of each step, and its largest difference as a share of the largest
            number of the output.
    """

    cases: tuple[str, ...]
    steps: tuple[tuple[int, str, float], ...]

    def __str__(self) -> str:
        if not self.steps:
            return "nothing to prove: no pass changed the model"
        worst = max(step[2] for step in self.steps)
        count = "1 step changes" if len(self.steps) == 1 else f"{len(self.steps)} steps change"
        return (
            f"proven: {count} no output beyond the noise of the model; "
            f"at most {worst:.1e} of its scale; inputs: {'; '.join(self.cases)}"
        )


@dataclass(frozen=True, slots=True)
class Case:
    """One input of the proof: what it is called, its extents, and the arrays."""

    name: str
    extents: Mapping[str, int]
    feeds: Mapping[str, Array]


@dataclass(slots=True)
class Proof:
    """Holds each step against the one before.

    Attributes:
        cases: What both run on.
        steps: Number and pass of each step that was proven, and its largest difference as a share
            of the largest number of its output.
    """

    output: Path
    folder: Path
    cases: Sequence[Case]
    progress: Progress
    steps: list[tuple[int, str, float]] = field(default_factory=list)
    _store: WeightStore = field(init=False)
    _before: Path = field(init=False)
    _results: list[dict[str, Array]] = field(init=False)

    def begin(self, graph: gs.Graph) -> None:
        """Run the model as it is before any pass.

        Raises:
            ModelError: If ONNX Runtime takes it on none of the cases (``cannot-prove``).
        """
        self._store = WeightStore(self.folder)
        self._before = self._write(graph, 0)
        runner = Model(self._before).runner
        ran, self._results = [], []
        refusal = "no input could be made up"
        for case in self.cases:
            try:
                self._results.append(flattened(runner.run(case.feeds)))
            except Rejected as error:
                refusal = str(error)
            else:
                ran.append(case)
        self.cases = ran
        if not ran:
            raise ModelError(
                Diagnostic(
                    "cannot-prove",
                    f"the model does not run on made-up input: {refusal}",
                    "optimise without `--prove`, and verify with data of your own",
                )
            )

    def outcome(self) -> Proven:
        """Return what was proven so far."""
        return Proven(tuple(case.name for case in self.cases), tuple(self.steps))

    def step(self, step: Step) -> None:
        """Hold the graph after ``step`` against the one before.

        Raises:
            NotMetError: If it differs (``not-proven``).
        """
        self.progress.step(f"proving step {step.number}, {step.name}")
        after = self._write(step.graph, step.number)
        worst = 0.0
        results = []
        for case, expected in zip(self.cases, self._results, strict=True):
            try:
                found = flattened(Model(after).runner.run(case.feeds))
            except Rejected as error:
                raise self._failed(step, case, "", f"it no longer runs: {error}") from error
            except ModelError as error:
                words = error.diagnostics[0].problem
                raise self._failed(step, case, "", f"it no longer loads: {words}") from error
            results.append(found)
            worst = max(worst, self._check(step, case, after, expected, found))
        self.steps.append((step.number, step.name, worst))
        self._before, self._results = after, results

    # --- one step on one case --------------------------------------------------------------------

    def _check(
        self,
        step: Step,
        case: Case,
        after: Path,
        expected: Mapping[str, Array],
        found: Mapping[str, Array],
    ) -> float:
        """Return the largest difference as a share of the output's scale, within the noise."""
        differing = [name for name in expected if not _agree(expected[name], found.get(name))]
        if differing:
            noise = Noise(Model(self._before))
            want = {name: expected[name] for name in differing}
            got = {name: found[name] for name in differing if name in found}
            _, covered = floors_covering(noise, case.feeds, want, got, EXACTLY)
            if beyond := [name for name in differing if name not in covered]:
                name = beyond[0]
                words = _words(expected[name], found.get(name))
                node = self._first_node(step, case, after, name)
                raise self._failed(step, case, node, f"the output `{name}` {words}")
        return max((_share(expected[name], found[name]) for name in differing), default=0.0)

    def _first_node(self, step: Step, case: Case, after: Path, output: str) -> str:
        """Return the first rewritten node whose result is another; "" where none can be told."""
        before, rewritten = Model(self._before), Model(after)
        made = {
            name: node.name
            for node in rewritten.parts[0].graph.node
            for name in node.output
            if name in before.dataflow and name in rewritten.leading_to(output)
        }
        names = list(made)[:MOST_TENSORS]
        try:
            one = flattened(before.variant(names).run(case.feeds))
            two = flattened(rewritten.variant(names).run(case.feeds))
        except Rejected:
            return ""
        differing = {n: one[n] for n in names if n in one and not _agree(one[n], two.get(n))}
        found = {name: two[name] for name in differing if name in two}
        _, covered = floors_covering(
            Noise(before), case.feeds, differing, found, EXACTLY, list(differing)
        )
        return next((made[name] for name in differing if name not in covered), "")

    def _failed(self, step: Step, case: Case, node: str, problem: str) -> NotMetError:
        kept = self.output.parent / f"{self.output.name}.not-proven"
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        for path in (self._before, self._before.parent / "weights"):
            if path.is_dir():
                shutil.copytree(path, kept / path.name)
            elif path.exists():
                shutil.copy(path, kept / "before.onnx")
        write_arrays(kept / "inputs.npz", dict(case.feeds))
        command = shlex.join(
            [
                *("optc", "optimize", str(kept / "before.onnx"), "-o", str(kept / "after.onnx")),
                *("--only", step.name, "--prove"),
            ]
        )
        at = f", first at the node `{node}`" if node else ""
        origins = ", ".join(f"`{name}`" for name in step.merged.get(node, ())[:4])
        made_from = f" (made from {origins})" if origins else ""
        return NotMetError(
            Diagnostic(
                "not-proven",
                f"step {step.number}, `{step.name}`, changes the model{at}{made_from}: {problem}; "
                f"input: {case.name}",
                f"leave the pass out with `--disable {step.name}`; `{command}` shows it again, and "
                f"`{kept / 'inputs.npz'}` is the input",
            )
        )

    def _write(self, graph: gs.Graph, number: int) -> Path:
        path = self.folder / "stages" / f"{number:03d}.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(export_model(graph, place=self._store.for_stage).SerializeToString())
        return path


def cases_for(model: Path, graph: gs.Graph) -> list[Case]:
    """Return what the model is run on: its smallest, usual and largest extents that it was seen to take.

    Args:
        model: The ONNX file.
        graph: What is in it.
    """
    tried = try_out(model, graph)
    if not tried.inputs and graph.inputs:
        return []
    bound = Bound.here().bytes
    found: dict[tuple[tuple[str, int], ...], Case] = {}
    for at in ("opt", "min", "max"):
        extents = {symbol: int(getattr(r, at)) for symbol, (r, _) in tried.ranges.items()}
        profile = {symbol: Range.fixed(extent) for symbol, extent in extents.items()}
        if bytes_needed(tried.inputs, profile, "opt") > bound:
            continue
        listed = ", ".join(f"{symbol} = {extent}" for symbol, extent in extents.items())
        feeds = made_up(tried.inputs, profile, "opt")
        found.setdefault(tuple(extents.items()), Case(listed or "as declared", extents, feeds))
    if len(found) == 1:  # no axis is dynamic: other numbers in place of other extents
        [case] = found.values()
        profile = {symbol: Range.fixed(extent) for symbol, extent in case.extents.items()}
        again = made_up(tried.inputs, profile, "opt", seed=1)
        return [case, Case(f"{case.name}, other numbers", case.extents, again)]
    return list(found.values())


def _words(expected: Array, found: Array | None) -> str:
    """Return in words how ``found`` differs."""
    if found is None:
        return "is missing"
    difference = compare(expected, found, EXACTLY)
    if difference.dtypes is not None:
        return f"was {difference.dtypes[0]} and is {difference.dtypes[1]}"
    if not difference.same_shape:
        return f"had the shape {difference.expected_shape} and has {difference.found_shape}"
    return (
        f"is off by up to {difference.max_abs:.3g}, in {difference.outside} of "
        f"{difference.elements} elements; worst at {list(difference.worst or ())}: "
        f"{difference.expected} became {difference.found}"
    )


def _agree(expected: Array, found: Array | None) -> bool:
    return found is not None and compare(expected, found, EXACTLY).agrees


def _share(expected: Any, found: Any) -> float:
    """Return the largest difference over the largest number."""
    if np.shape(expected) != np.shape(found) or np.asarray(expected).dtype.kind not in "fiu":
        return 0.0
    one, two = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    scale = float(np.max(np.abs(one), initial=0.0, where=np.isfinite(one))) or 1.0
    gap = np.abs(one - two)
    return float(np.max(gap, initial=0.0, where=np.isfinite(gap))) / scale
