"""Hold a package against its original model, output by output.

Both run on made-up input at the least, best and largest shapes of every optimisation profile, and
on the user's data, which may come in groups with demands of their own. The original runs on ONNX
Runtime with its optimisations off. What is not as asked (`optc.optimizer.criteria`) is held against
the original's own noise (`optc.optimizer.noise`), which is measured only then, and only for what is
compared element by element. For what is not explained by it, the first tensor inside the model that
differs is looked for.

`verify` answers ``optc verify`` and a spec's ``verify:``; `quick_check` is the one run that every
other compile makes, in which a difference is a warning.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt
from onnx import helper

from optc.optimizer.arrays import dtype_of, read_arrays
from optc.optimizer.compare import Difference, Tolerance, compare, is_inexact
from optc.optimizer.criteria import Criteria
from optc.optimizer.cut import cut_of
from optc.optimizer.detection import MIDDLE
from optc.optimizer.feed import Signature, checked_feed
from optc.optimizer.first_difference import Compared, FirstDifference, Search
from optc.optimizer.group_figures import GroupFigures, figures_of
from optc.optimizer.judgement import Judgement
from optc.optimizer.made_up import At, Bound, bytes_needed, made_up, shown_bytes, sizes
from optc.optimizer.noise import FACTOR, Floor, Noise, floors_covering, paired_rows
from optc.optimizer.part import Lead
from optc.optimizer.reference import Model, Rejected, flattened, owned
from optc.optimizer.runtime import Device, Package, RunReport, StageFailed
from optc.specs.compile_spec import PrecisionName, Range, Verify
from optc.specs.diagnostic import (
    Diagnostic,
    EnvironmentFault,
    InputError,
    NotMetError,
    OptcError,
    quoted,
)
from optc.specs.manifest import Manifest, Target
from optc.specs.model_problem import ResolvedInput

Array = npt.NDArray[Any]
Verdict = Literal["not met", "not asked", "within noise", "met"]
VERDICTS: tuple[Verdict, ...] = ("not met", "not asked", "within noise", "met")

QUICK = Verify(atol=1e-3, rtol=1e-3)
"""What the quick check of a package in fp32 warns beyond: a model that is wrong is off by far more.
In a lower precision it is what `optc verify` would ask."""

BY_ELEMENT = frozenset({"tolerance", "agreement", "output", "dtype", "shape", "finite"})
"""What the figures of a `Difference` tell all about."""
BROKEN = frozenset({"output", "dtype", "shape", "finite"})
"""What is wrong with an output on any input, be it noise."""
EXPLAINED_BY_NOISE = frozenset({"tolerance", "of_scale", "agreement", "shape", "finite"})
"""What an output may miss and yet be within the noise: the measures of single elements."""
LOOSENED: Mapping[str, str] = {
    "tolerance": "raise `verify.atol` and `verify.rtol`",
    "of_scale": "raise `verify.of_scale`",
    "sqnr_db": "lower `verify.sqnr_db`",
    "cosine": "lower `verify.cosine`",
    "agreement": "lower `verify.agreement`",
    "top_k": "lower `agreement` of `verify.top_k`",
    "scores": "say in `verify.outputs` what is asked of that output",
    "boxes_high": "lower `high` of `verify.detections`",
    "boxes_middle": "lower `middle` of `verify.detections`",
    "boxes_low": "lower `low` of `verify.detections`",
}
"""Metric -> how less is asked of it."""
COARSE = 0.1
"""Of the scale: what a tensor inside may be off by where the output is held to no such measure."""


class Unwritten(Package):
    """A package that is not in its place yet: nobody has hashed its files, so none is checked."""

    def _check(self, path: str) -> None:
        pass


class Runnable(Compared, Protocol):
    """What can be verified: a package."""

    @property
    def last_run(self) -> RunReport | None:
        """What its last run did."""
        ...


@dataclass(frozen=True, slots=True)
class Case:
    """One input that both models run on.

    Attributes:
        name: ``min``, ``profile 2, max``, or the path of the user's file.
        made_up: Whether optc made the input up.
        make: Gives the input; called once for each use, so that not all are kept.
        group: Name of its group; None for what is in no group of the spec's.
    """

    name: str
    made_up: bool
    make: Callable[[], dict[str, Array]]
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of one output in one case.

    Attributes:
        case: Name of the case.
        targets: Names of the targets it holds for; those of the same stages are run once.
        output: Name of the output.
        difference: How it differs; None for an output that is missing.
        floor: The noise of the original, where it was measured.
        rows: How rows have moved, where that explains something.
        group: Name of the group that the case is in.
        judgements: How it measures up to what is asked, the worst first.
    """

    case: str
    targets: tuple[str, ...]
    output: str
    verdict: Verdict
    difference: Difference | None
    floor: Floor | None = None
    rows: str | None = None
    group: str | None = None
    judgements: tuple[Judgement, ...] = ()

    @property
    def badness(self) -> tuple[float, float, float]:
        """What findings are sorted by, the worst first."""
        used = max((judgement.badness for judgement in self.judgements), default=0.0)
        return (VERDICTS.index(self.verdict), -used, -self.max_abs)

    @property
    def max_abs(self) -> float:
        """The largest difference of an element; 0 where none can be told."""
        return self.difference.max_abs if self.difference else 0.0

    @property
    def outputs(self) -> tuple[str, ...]:
        """The outputs that are off for the same reason: itself, or the boxes that it belongs to."""
        unmet = (each.outputs for each in self.judgements if not each.met)
        return next(unmet, (self.output,))

    @property
    def by_element(self) -> bool:
        """Whether ``atol`` and ``rtol``, or equality, is all that it was held against."""
        return all(judgement.metric in BY_ELEMENT for judgement in self.judgements)

    @property
    def of_boxes(self) -> bool:
        """Whether it is one of a set of boxes, of which single elements say nothing."""
        return any(judgement.metric.startswith("boxes") for judgement in self.judgements)

    @property
    def by_tolerance(self) -> bool:
        """Whether each element is held against a tolerance, or must be equal."""
        return any(judgement.metric in EXPLAINED_BY_NOISE for judgement in self.judgements)

    def as_json(self) -> dict[str, object]:
        """Return the finding for programs."""
        return {
            "case": self.case,
            "group": self.group,
            "targets": list(self.targets),
            "output": self.output,
            "verdict": self.verdict,
            "difference": self.difference and self.difference.as_json(),
            "noise": self.floor and self.floor.as_json(),
            "rows": self.rows,
            "judgements": [judgement.as_json() for judgement in self.judgements],
        }


@dataclass(frozen=True, slots=True)
class NotCompared:
    """A case of which nothing was compared.

    Attributes:
        case: Its name.
        kind: Who is in the way: the original rejects the input, the package does not run on it, or
            it would be too large.
        words: Of whoever it is.
    """

    case: str
    kind: Literal["rejected", "failed", "too-large"]
    words: str


@dataclass(slots=True)
class Verification:
    """What holding a package against its original gave.

    Attributes:
        model: The original.
        criteria: What is asked of the outputs.
        reference: What ran the original.
        ran: What ran the package: one report a group of targets.
        with_engine: Numbers of the stages that are meant to run as engines.
        findings: One for each output of each case.
        judged: Group, case and judgement, for each thing that is asked in each case.
        not_compared: Cases that could not be run.
        first: The first tensor inside that differs, for the first finding that is not met.
        unmet: What is wrong, as errors.
        notes: Warnings and notes.
    """

    model: Path
    criteria: Criteria
    reference: str = ""
    ran: dict[str, RunReport] = field(default_factory=dict)
    with_engine: frozenset[int] = frozenset()
    findings: list[Finding] = field(default_factory=list)
    judged: list[tuple[str | None, str, Judgement]] = field(default_factory=list)
    not_compared: list[NotCompared] = field(default_factory=list)
    first: FirstDifference | None = None
    unmet: list[Diagnostic] = field(default_factory=list)
    notes: list[Diagnostic] = field(default_factory=list)

    @property
    def diagnostics(self) -> list[Diagnostic]:
        """All there is to say beside the table."""
        return [*self.notes, *self.unmet]

    @property
    def exit_code(self) -> int:
        """0, or 3 where the package is not what it should be."""
        return NotMetError.exit_code if self.unmet else 0

    def check(self) -> None:
        """Raise NotMetError where the package is not what it should be."""
        if self.unmet:
            raise NotMetError(*self.unmet)

    def as_json(self) -> dict[str, Any]:
        """Return everything for programs."""
        return {
            "ok": not self.unmet,
            "model": str(self.model),
            "precision": self.criteria.precision,
            "atol": self.criteria.asked.atol,
            "rtol": self.criteria.asked.rtol,
            "reference": self.reference,
            "ran": [report.as_json() for report in self.ran.values()],
            "engines_not_run": sorted(
                {
                    run.id
                    for report in self.ran.values()
                    for run in report.stages
                    if run.id in self.with_engine and run.runtime != "tensorrt"
                }
            ),
            "groups": [figures.as_json() for figures in self.groups()],
            "findings": [finding.as_json() for finding in self.worst_first()],
            "not_compared": [
                {"case": case.case, "kind": case.kind, "words": case.words}
                for case in self.not_compared
            ],
            "first_difference": self.first and self.first.as_json(),
            "diagnostics": [diagnostic.as_json() for diagnostic in self.diagnostics],
        }

    def worst_first(self) -> list[Finding]:
        """Return the findings, the worst one first."""
        return sorted(self.findings, key=lambda finding: finding.badness)

    def groups(self) -> list[GroupFigures]:
        """Return the figures of each group, the worst group first."""
        bad = Counter(each.group for each in self.findings if each.verdict == "not met")
        return figures_of(self.judged, bad)

    def render(self) -> str:
        """Return the text for people: the table, the low scores, what ran where."""
        from optc.optimizer.verify_table import text_of

        return text_of(self)


def verify(
    package: Runnable,
    model: Path,
    *,
    data: Sequence[Path] = (),
    groups: Mapping[str, Sequence[Path]] | None = None,
    asked: Verify | None = None,
    device: Device = "auto",
    seed: int = 0,
    step: Callable[[str], None] = lambda text: None,
) -> Verification:
    """Compare ``package`` with the original ``model`` on made-up input and on ``data``.

    Args:
        package: What `optc.load` gives, or an `Unwritten` one. Its manifest says the shapes, the
            profiles and the ranges of made-up values.
        model: The file of the original, which is trusted to be well-formed: it was compiled.
        data: npz files, one array an input.
        groups: Name of a group -> its npz files.
        asked: How exact the outputs must be; the defaults of the package's precision where it does
            not say.
        device: Where the package runs.
        seed: Of the made-up values.
        step: Told what is being done.

    Raises:
        InputError: If a file of ``data`` is not an input of the model.
        ModelError: ``cannot-run-original``.
    """
    manifest = package.manifest
    criteria = Criteria.of(asked, precision_of(manifest), manifest.outputs)
    lead = _lead(package, model)
    # How low precision may be is a matter of real input: what noise makes of it is only told.
    lenient = criteria.precision not in ("fp32", "tf32") and bool(data or groups)
    run = _Run(
        package,
        Model(model, package.libraries, package.modules, cut_of(manifest), package.results),
        Verification(model, criteria),
        device,
        lenient=lenient,
        step=step,
    )
    for case in itertools.chain(
        _made_up_cases(lead or manifest, run.result, seed),
        _data_cases(manifest, lead, data),
        *(_data_cases(manifest, lead, files, group) for group, files in (groups or {}).items()),
    ):
        run.compare(_behind(lead, case), _alike(manifest))
    run.conclude()
    return run.result


def quick_check(
    package: Runnable, model: Path, *, device: Device = "auto", seed: int = 0
) -> Verification:
    """Compare ``package`` with ``model`` once: first profile, best shapes, first target.

    A difference is a warning with its figures. A package that does not run where the original does,
    or that lacks an output, is an error.

    Raises:
        ModelError: ``cannot-run-original``.
    """
    manifest = package.manifest
    precision = precision_of(manifest)
    criteria = Criteria.of(QUICK if precision == "fp32" else None, precision, manifest.outputs)
    original = Model(model, package.libraries, package.modules, cut_of(manifest), package.results)
    lead = _lead(package, model)
    run = _Run(package, original, Verification(model, criteria), device, quick=True)
    result = run.result
    for case in itertools.islice(_made_up_cases(lead or manifest, result, seed, quick=True), 1):
        run.compare(_behind(lead, case), _alike(manifest)[:1])
    run.conclude()
    soft = {"verify-not-met", "nothing-verified"}
    result.notes += [
        replace(
            problem,
            severity="warning",
            todo="hold the package against the model with `optc verify`, on your own data; with a "
            "`verify:` in the spec, compiling does it",
        )
        for problem in result.unmet
        if problem.code in soft
    ]
    result.unmet = [problem for problem in result.unmet if problem.code not in soft]
    return result


# --- cases ---------------------------------------------------------------------------------------


def precision_of(manifest: Manifest) -> PrecisionName:
    """Return the lowest precision that the package was compiled for."""
    told = manifest.precision
    name = told.get("default") if isinstance(told, Mapping) else told
    return next((known for known in get_args(PrecisionName) if known == name), "fp32")


def _alike(manifest: Manifest) -> list[tuple[Target, ...]]:
    """Return the targets, those of the same stages together."""
    groups: dict[tuple[int, ...], list[Target]] = {}
    for target in manifest.targets:
        groups.setdefault(target.stages, []).append(target)
    return [tuple(group) for group in groups.values()]


def _lead(package: Runnable, model: Path) -> Lead | None:
    """Return what of ``model`` comes before the part that is in ``package``; None for a whole."""
    part = package.manifest.model.part
    if part is None:
        return None
    names = [tensor.name for tensor in package.manifest.inputs]
    return Lead(part, names, model, package.libraries, package.modules)


def _behind(lead: Lead | None, case: Case) -> Case:
    """Return ``case``, made up for the whole model, as one of the part that ``lead`` leads to."""
    if lead is None or not case.made_up:
        return case
    return replace(case, make=lambda: lead.feeds(case.make()))


def _made_up_cases(
    signature: Signature, result: Verification, seed: int, *, quick: bool = False
) -> Iterator[Case]:
    """Yield the cases of made-up input: min, opt and max of each profile, each shape once.

    Quick: opt of the first profile; where that is too large min, if it is far from the bound.
    """
    inputs: dict[str, ResolvedInput] = {}
    for tensor in signature.inputs:
        try:
            dtype = int(helper.np_dtype_to_tensor_dtype(dtype_of(tensor.dtype)))
        except KeyError:
            dtype = 0
        if not dtype or tensor.shape is None:
            result.notes.append(
                Diagnostic(
                    "no-made-up-input",
                    f"no input is made up: `{tensor.name}` ({tensor.dtype}) is no tensor of known "
                    "rank",
                    "give real inputs with `verify: {data: ...}` in the spec, or `--data`",
                    severity="warning",
                )
            )
            return
        inputs[tensor.name] = ResolvedInput(dtype, tensor.shape, tensor.range)
    seen = set()
    # The best shapes first: where all are the same, it is they that are named.
    levels: tuple[At, ...] = ("opt", "min") if quick else ("opt", "min", "max")
    profiles: Sequence[Mapping[str, Range]] = signature.profiles or ({},)
    bound = Bound.here()
    for index, profile in enumerate(profiles[:1] if quick else profiles):
        for at in levels:
            shapes = tuple(sizes(given.shape, profile, at) for given in inputs.values())
            if shapes in seen:
                continue
            seen.add(shapes)
            name = f"profile {index + 1}, {at}" if len(profiles) > 1 else at
            # Quick, min is the case to fall back on: not one that is nearly too large as well.
            most, words = bound.bytes, str(bound)
            if quick and at == "min":
                most, words = most // 4, f"{shown_bytes(most // 4)}, a quarter of {bound}"
            if (needed := bytes_needed(inputs, profile, at)) > most:
                words = f"{shown_bytes(needed)} of made-up input, and optc makes up at most {words}"
                result.not_compared.append(NotCompared(name, "too-large", words))
                continue

            def make(profile: Mapping[str, Range] = profile, at: At = at) -> dict[str, Array]:
                return made_up(inputs, profile, at, seed)

            yield Case(name, True, make)


def _data_cases(
    manifest: Manifest, lead: Lead | None, data: Sequence[Path], group: str | None = None
) -> Iterator[Case]:
    """Yield a case for each file of ``data``; for a part, they may hold inputs of the whole."""
    for path in data:

        def make(path: Path = path) -> dict[str, Array]:
            arrays = read_arrays(path)
            try:
                if lead is not None and lead.takes(arrays):
                    return lead.feeds(checked_feed(lead, arrays, taker="model"))
                return checked_feed(manifest, arrays)
            except InputError as error:
                raise InputError(
                    *(replace(d, problem=f"`{path}`: {d.problem}") for d in error.diagnostics)
                ) from error

        yield Case(str(path), False, make, group)


# --- comparing -----------------------------------------------------------------------------------


class _Run:
    """Compares case after case and gathers what comes of it."""

    def __init__(
        self,
        package: Runnable,
        original: Model,
        result: Verification,
        device: Device,
        *,
        quick: bool = False,
        lenient: bool = False,
        step: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.result = result
        self._lenient = lenient
        self._package = package
        self._original = original
        self._noise = Noise(original, more=not quick)
        self._quick = quick
        self._first_told = False
        self._device = device
        self._step = step
        self._compared = 0
        self._with_values: dict[str, bool] = {}
        self._largest: dict[str, float] = {}
        self._atol: dict[str, float] = {}
        result.reference = original.runner.engine
        stages = package.manifest.stages
        result.with_engine = frozenset(s.id for s in stages if s.runtime == "tensorrt")
        for name in sorted(set(original.runner.inputs) - {t.name for t in package.manifest.inputs}):
            result.unmet.append(
                Diagnostic(
                    "verify-input-missing",
                    f"the original has an input `{name}`, the package does not",
                    "compile it again from this model; if that does not help, it is a fault of optc",
                )
            )

    def compare(self, case: Case, groups: Sequence[tuple[Target, ...]]) -> None:
        """Run both models on ``case`` and compare every output, for each group of targets."""
        self._step(f"verifying: {case.name}")
        try:
            feeds = case.make()
            expected = flattened(self._original.runner.run(feeds))
            if self._quick:  # original and package are not in memory at once
                expected = {name: owned(value) for name, value in expected.items()}
                self._original.release()
        except Rejected as error:
            self._rejected(case, str(error))
            return
        for name, array in expected.items():
            inexact = is_inexact(array)
            finite = array[np.isfinite(array)] if inexact else array
            self._with_values[name] = self._with_values.get(name, False) or finite.size > 0
            if inexact and finite.size:
                largest = float(np.abs(finite).max())
                self._largest[name] = max(self._largest.get(name, 0.0), largest)
                limit = self.result.criteria.tolerance(name, array, case.group)
                if math.isinf(limit.of_scale) and math.isfinite(limit.atol):
                    self._atol[name] = limit.atol
        for group in groups:
            found = self._found(case, feeds, group)
            if found is not None:
                self._compared += 1
                self._judge(case, feeds, expected, found, group)

    def _found(
        self, case: Case, feeds: Mapping[str, Array], group: Sequence[Target]
    ) -> dict[str, Array] | None:
        try:
            found = self._package.run(feeds, target=group[0].name, device=self._device)
        except (InputError, EnvironmentFault):  # damaged, or a library is missing: of no case
            raise
        except OptcError as error:
            words = "; ".join(diagnostic.problem for diagnostic in error.diagnostics)
            self._failed(case, group[0], error, words)
            self.result.not_compared.append(NotCompared(case.name, "failed", words))
            return None
        if self._package.last_run is not None:
            self.result.ran[group[0].name] = self._package.last_run
        return flattened(found)

    def _failed(self, case: Case, target: Target, error: OptcError, words: str) -> None:
        """Note that the package does not run on ``case``, and whether that is its fault."""
        where = f"case {case.name}, target `{target.name}`"
        if isinstance(error, StageFailed) and error.stage.runtime == "torch":
            self.result.unmet.append(
                Diagnostic(
                    "package-does-not-run",
                    f"{where}: the original runs, the package does not: {words}",
                    error.diagnostics[0].todo,
                )
            )
        elif not self._original.by_evaluator or not isinstance(error, StageFailed):
            self.result.unmet.append(
                Diagnostic(
                    "package-does-not-run",
                    f"{where}: the original runs, the package does not: {words}",
                    "leave passes out one by one with `passes: {disable: [...]}` to find the one "
                    "that is at fault, and report it",
                )
            )
        elif error.stage.runtime == "tensorrt":  # its engine runs where its GPU is
            self.result.notes.append(
                Diagnostic(
                    "cannot-check-here",
                    f"{where}: nothing was compared, as without the GPU stage {error.stage.id} runs "
                    f"on ONNX Runtime, which does not take the original either: {words}",
                    "run `optc verify` on a machine that has the GPU",
                    severity="warning",
                )
            )
        else:
            self.result.unmet.append(
                Diagnostic(
                    "no-runtime",
                    f"{where}: stage {error.stage.id} is left to ONNX Runtime, which does not take "
                    f"the original either: {words}",
                    "replace the operator it names in the model, or install an ONNX Runtime that "
                    "has it",
                )
            )

    def _judge(
        self,
        case: Case,
        feeds: Mapping[str, Array],
        expected: Mapping[str, Array],
        found: Mapping[str, Array],
        group: Sequence[Target],
    ) -> None:
        judged = self.result.criteria.judge(expected, found, case.group)
        self.result.judged += [(case.group, case.name, judgement) for judgement in judged]
        tolerances = {
            name: self.result.criteria.tolerance(name, array, case.group)
            for name, array in expected.items()
        }
        differences = {
            name: compare(array, found[name], tolerances[name])
            for name, array in expected.items()
            if name in found
        }
        off = {name for judgement in judged if not judgement.met for name in judgement.outputs}
        lenient = case.made_up and self._lenient
        floors, covered = (
            ({}, set()) if lenient else self._noise_of(case, feeds, expected, found, judged)
        )
        targets = tuple(target.name for target in group)
        for name, array in expected.items():
            verdict: Verdict = "met"
            rows = None
            if name in off:
                verdict = "within noise" if name in covered else "not met"
                if lenient and not any(name in j.outputs and j.metric in BROKEN for j in judged):
                    verdict = "not asked"
            if name in off and name in found:
                pairing = paired_rows(array, found[name], tolerances[name])
                rows = str(pairing) if pairing and pairing.explains else None
            finding = Finding(
                case.name,
                targets,
                name,
                verdict,
                differences.get(name),
                floors.get(name),
                rows,
                case.group,
                tuple(judgement for judgement in judged if name in judgement.outputs),
            )
            self.result.findings.append(finding)
            unsolved = verdict == "not met" and name in found and self.result.first is None
            if unsolved and not self._quick:
                self._step(f"verifying: {case.name}, looking for the first difference")
                tolerance = tolerances[name]
                if tolerance == Tolerance():
                    tolerance = Tolerance(of_scale=COARSE)
                search = Search(self._original, self._noise, self._package, tolerance, self._device)
                self.result.first = search.run(feeds, name, group[0])

    def _noise_of(
        self,
        case: Case,
        feeds: Mapping[str, Array],
        expected: Mapping[str, Array],
        found: Mapping[str, Array],
        judged: Sequence[Judgement],
    ) -> tuple[dict[str, Floor], set[str]]:
        """Return the noise of the outputs, and which it explains; measured where that may help.

        The noise is one of single elements, so it has nothing to say of an output that is held
        against a measure of the whole.
        """
        criteria = self.result.criteria
        off = {name for judgement in judged if not judgement.met for name in judgement.outputs}
        whole = {
            name
            for judgement in judged
            if not judgement.met and judgement.metric not in EXPLAINED_BY_NOISE
            for name in judgement.outputs
        }
        asked = {name: found[name] for name in off - whole}
        if not asked:
            return {}, set()
        self._step(f"verifying: {case.name}, measuring the noise of the original")
        tolerances = {
            name: criteria.tolerance(name, array, case.group) for name, array in expected.items()
        }
        return floors_covering(self._noise, feeds, expected, asked, tolerances)

    def _rejected(self, case: Case, words: str) -> None:
        if not case.made_up:
            raise InputError(
                Diagnostic(
                    "data-rejected",
                    f"`{case.name}`: the original model does not run on it: {words}",
                    "verify with inputs that the original takes",
                )
            )
        self.result.not_compared.append(NotCompared(case.name, "rejected", words))

    # -- what it comes to

    def conclude(self) -> None:
        """Say in diagnostics what the findings come to."""
        result = self.result
        self._note_not_compared()
        if blank := [name for name, told in self._with_values.items() if not told]:
            result.notes.append(
                Diagnostic(
                    "nothing-to-compare",
                    f"in no case {quoted(blank)} held a number (no rows, or only NaN): nothing is "
                    "known of it",
                    "give real inputs with `verify: {data: ...}` in the spec, or `--data`",
                    severity="warning",
                )
            )
        self._note_below_tolerance()
        self._note_boxes_not_compared()
        self._note_made_up()
        told: set[tuple[str | None, str]] = set()
        for finding in result.worst_first():
            if finding.verdict == "not met" and (finding.group, finding.output) not in told:
                told |= {(finding.group, name) for name in finding.outputs}
                result.unmet.append(self._problem_of(finding))
        if not self._compared and not result.unmet:
            result.unmet.append(
                Diagnostic(
                    "nothing-verified",
                    "in no case the original and the package both ran: nothing is known of what "
                    "the package computes",
                    "give real inputs with `verify: {data: ...}` in the spec, or `--data`",
                )
            )

    def _note_made_up(self) -> None:
        """Say what low precision makes of noise, where real input decides."""
        off = [each for each in self.result.worst_first() if each.verdict == "not asked"]
        if off:
            names = quoted(list(dict.fromkeys(each.output for each in off)))
            words = next(judgement.words for judgement in off[0].judgements if not judgement.met)
            self.result.notes.append(
                Diagnostic(
                    "made-up-not-met",
                    f"on made-up input {names} is further off than is asked on your data: {words}",
                    "nothing, if your data are like what the model will see",
                    severity="note",
                )
            )

    def _note_below_tolerance(self) -> None:
        """Say which outputs are so small that the tolerance lets anything like zero pass."""
        for atol in sorted(set(self._atol.values())):
            small = {
                name: size
                for name, size in self._largest.items()
                if 0 < size <= atol == self._atol[name]
            }
            if not small or self._quick:
                continue
            shown = ", ".join(f"`{name}` (at most {size:.2g})" for name, size in small.items())
            self.result.notes.append(
                Diagnostic(
                    "output-below-tolerance",
                    f"in every case all of {shown} was below atol {atol:g}: zeros would have passed",
                    "give real inputs with `verify: {data: ...}` in the spec or `--data`, or ask "
                    "for a smaller `atol`",
                    severity="note",
                )
            )

    def _note_boxes_not_compared(self) -> None:
        """Say which boxes were in no case of a kind that tells something."""
        compared: dict[tuple[str, ...], int] = {}
        for _, _, judgement in self.result.judged:
            if judgement.metric.startswith("boxes") and judgement.metric != "boxes_attached":
                kind = judgement.metric in ("boxes_high", "boxes_middle")
                count = judgement.counts[1] if kind and judgement.counts else 0
                compared[judgement.outputs] = compared.get(judgement.outputs, 0) + count
        for outputs, count in compared.items():
            if not count and not self._quick:
                self.result.notes.append(
                    Diagnostic(
                        "nothing-to-compare",
                        f"in no case {quoted(outputs)} held a box that scores {MIDDLE:g} or more "
                        "and stays clear of the model's own cut: little is known of the boxes",
                        "give real inputs with `verify: {data: ...}` in the spec, or `--data`",
                        severity="warning",
                    )
                )

    def _note_not_compared(self) -> None:
        for case in self.result.not_compared:
            if case.kind == "rejected":
                guess = _likely_at_fault(self._package.manifest)
                self.result.notes.append(
                    Diagnostic(
                        "made-up-input-rejected",
                        f"case {case.case} was not compared: the original model does not run on "
                        f"made-up input: {case.words}",
                        f"say what the values are, such as `inputs: {{{guess}: {{range: [0, 9]}}}}`"
                        " in the spec, or give real inputs with `verify: {data: ...}` or `--data`",
                        severity="warning",
                    )
                )
            elif case.kind == "too-large":
                self.result.notes.append(
                    Diagnostic(
                        "made-up-input-too-large",
                        f"case {case.case} was not compared: it would take {case.words}",
                        "give a real input of that size with `verify: {data: ...}` or `--data`",
                        severity="warning",
                    )
                )

    def _problem_of(self, finding: Finding) -> Diagnostic:
        difference = finding.difference
        outputs = finding.outputs
        where = f"output{'s' if len(outputs) > 1 else ''} {quoted(outputs)}, case {finding.case}"
        where += f", {_targets(finding.targets)}"
        if finding.group is not None:
            where = f"group `{finding.group}`, {where}"
        if difference is None:
            return Diagnostic(
                "verify-output-missing",
                f"{where}: the package does not give it",
                "compile the package again; if that does not help, it is a fault of optc",
            )
        unmet = [judgement for judgement in finding.judgements if not judgement.met]
        parts = [judgement.words for judgement in unmet if judgement.metric not in BY_ELEMENT]
        if finding.by_element or not parts:
            parts.append(described(difference))
        elif len(outputs) == 1 and difference.worst is not None:
            parts.append(f"the worst: {_values(difference)}")
        parts[0] = f"{where}: {parts[0]}"
        if finding.rows:
            parts.append(finding.rows)
        if finding.floor is not None:
            parts.append(noise_in_words(finding.floor))
        first = self.result.first
        leading = self._original.leading_to(finding.output)
        if first is not None and first.tensor in leading and not self._first_told:
            self._first_told = True  # one is enough: outputs mostly fail for the same reason
            parts.append(_first_in_words(first))
        return Diagnostic("verify-not-met", "; ".join(parts), self._what_to_do(finding, first))

    def _what_to_do(self, finding: Finding, first: FirstDifference | None) -> str:
        ways = []
        rewritten = first.rewritten if first is not None else ""
        fired = [p.name for p in self._package.manifest.passes if rewritten in p.fired]
        if fired:
            ways.append(f"try without what rewrote it: `passes: {{disable: [{', '.join(fired)}]}}`")
        metrics = [each.metric for each in finding.judgements if not each.met]
        if metrics and all(metric in LOOSENED for metric in metrics):
            if self.result.criteria.precision not in ("fp32", "tf32"):
                ways.append("keep more in a higher precision with `precision: {keep_fp32: [...]}`")
            asked = " and ".join(dict.fromkeys(LOOSENED[metric] for metric in metrics))
            ways.append(f"if this is exact enough, {asked}")
        return "; ".join(ways) or "compile again without some passes to find the one at fault"


def _first_in_words(first: FirstDifference) -> str:
    place = f"made by {first.op} `{first.node}`" if first.node else f"made by {first.op}"
    if first.stage is not None:
        place += f", in stage {first.stage} (`model.onnx` as a whole is right)"
    what = described(first.difference)
    return f"the first tensor inside that differs is `{first.tensor}`, {place}: {what}"


def described(difference: Difference) -> str:
    """Return in words how an output differs."""
    if difference.dtypes is not None:
        return f"it is {difference.dtypes[1]}, the original gives {difference.dtypes[0]}"
    if not difference.same_shape:
        found, expected = list(difference.found_shape), list(difference.expected_shape)
        return f"its shape is {found}, the original gives {expected}"
    text = _values(difference)
    if difference.allowed is not None:
        text += f" (allowed: {difference.allowed:.3g})"
    return (
        f"{text}; {difference.outside} of {difference.elements} elements "
        f"({difference.share_outside:.2%}) are outside the tolerance"
    )


def noise_in_words(floor: Floor) -> str:
    """Return what the noise of the original is."""
    if not floor.samples:
        return "the noise of the original could not be measured"
    parts = []
    if floor.max_abs:
        parts.append(
            f"at most {floor.max_abs:.2g}, {floor.mean_abs:.2g} in the mean, and {FACTOR} times "
            "that is allowed among values of like size"
        )
    if floor.unequal:
        parts.append(f"at most {floor.unequal} elements change")
    if floor.rows_move:
        parts.append(f"rows change places, up to {floor.unpaired} come or go")
    return f"the noise of the original: {'; '.join(parts) or 'none'} ({floor.samples} samples)"


def _values(difference: Difference) -> str:
    index = list(difference.worst or ())
    return f"at {index} it is {difference.found!r}, not {difference.expected!r}"


def _targets(names: Sequence[str]) -> str:
    return f"{'target' if len(names) == 1 else 'targets'} {quoted(names)}"


def _likely_at_fault(manifest: Manifest) -> str:
    """Return the input whose made-up values are the least like real ones: the first of integers."""
    names = [tensor.name for tensor in manifest.inputs if tensor.range is None]
    ids = [t.name for t in manifest.inputs if "int" in t.dtype and t.name in names]
    return next(iter((*ids, *names)), manifest.inputs[0].name if manifest.inputs else "input")
