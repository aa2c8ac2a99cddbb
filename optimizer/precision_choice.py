"""Chooses what each node computes in: calibrates what is quantised, searches what must be kept.

spec, rules ─ wanted ─> levels of each node
    ─ calibrate ─> ranges of quantised tensors
    ─ ask parser and builder ─ search on the simulator ─> Choice
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any

import numpy.typing as npt
import onnx_graphsurgeon as gs

from optc import __version__
from optc.optimizer import precision_measure as measure
from optc.optimizer.cache_folder import cache_folder
from optc.optimizer.capability import check_targets
from optc.optimizer.criteria import Criteria
from optc.optimizer.lower import Lowerer
from optc.optimizer.made_up import At, Bound, bytes_needed, made_up, sizes
from optc.optimizer.node_session import give_back_memory
from optc.optimizer.oracle import Oracle
from optc.optimizer.ort_errors import ORT_ERRORS
from optc.optimizer.part import Lead
from optc.optimizer.partition import Off, Plan
from optc.optimizer.precision_levels import Judge, Kept, Wanted, wanted
from optc.optimizer.precision_picture import picture_of
from optc.optimizer.precision_report import evidence_of, text_of
from optc.optimizer.precision_search import Candidate, Found, Problem, search
from optc.optimizer.prepare import Prepared
from optc.optimizer.progress import Progress
from optc.optimizer.range_cache import Origin, identity_of, ranges_of
from optc.optimizer.reference import Rejected, Runner
from optc.optimizer.samples import Sample, check_no_leak, samples_of
from optc.optimizer.simulator import Reference, See, Simulator
from optc.passes.flops import is_product
from optc.passes.precision import DTYPES, NodePrecision
from optc.passes.quantisation import EightBits, is_eight_bits, least_capability
from optc.specs.compile_spec import Target, Verify
from optc.specs.diagnostic import Diagnostic, ModelError, Place

Array = npt.NDArray[Any]

MARGINS = (1.0, 0.6, 0.35)
"""Shares of the margin that are searched for, one after the other, until what is then written is exact
enough, too."""

MADE_UP = "made-up input"
"""How the names of samples begin that nobody gave."""


@dataclass(slots=True)
class Choice:
    """What each node computes in, and why.

    Attributes:
        nodes: Node of the main graph -> its precision, below fp32.
        kept: Node -> why it computes in more than the spec asks for.
        evidence: What was measured, for the manifest.
        text: The same for people.
        picture: The trade-off as an SVG; None where nothing was measured.
        notes: What the user should know.
    """

    nodes: dict[str, NodePrecision]
    kept: dict[str, Kept]
    evidence: Mapping[str, Any] | None = None
    text: str = ""
    picture: str | None = None
    notes: list[Diagnostic] = field(default_factory=list)


class Chooser:
    """Chooses what each node of a model computes in.

    Args:
        prepared: The model, whose spec asks for less than fp32 somewhere.
        oracle: Asked what targets can.
        progress: Told of what goes on.
        keep_ranges: Whether the file that the spec names for them may be written.
    """

    def __init__(
        self, prepared: Prepared, oracle: Oracle, progress: Progress, *, keep_ranges: bool
    ) -> None:
        self._keep_ranges = keep_ranges
        self._prepared = prepared
        self._oracle = oracle
        self._progress = progress
        self._notes: list[Diagnostic] = []
        self._amax: dict[str, float] = {}
        self.wanted = wanted(prepared)

    @property
    def draft(self) -> dict[str, NodePrecision]:
        """Each node at its lowest."""
        return self.wanted.draft

    def is_lowered(self, name: str) -> bool:
        """Whether a node of the main graph is to be lowered."""
        return name in self.wanted.levels

    def keep(self, refused: Off) -> None:
        """Keep in fp32 what TensorRT takes in fp32 only."""
        for name, why in refused.items():
            if self.wanted.levels.pop(name, None):
                self._keep(name, "fp32", why.by, why.text)

    def _keep(self, name: str, precision: NodePrecision, by: Judge, text: str) -> None:
        node = self._prepared.question.node(name)
        self.wanted.kept[name] = Kept(name, node.op, precision, by, text)

    # --- before anything is built ----------------------------------------------------------------

    def check_targets(self, targets: Sequence[Target]) -> None:
        """Make sure that all targets compute in what nodes are lowered to.

        Raises:
            SpecError: ``precision-not-on-target``.
        """
        precisions = {each for levels in self.wanted.levels.values() for each in levels}
        check_targets(precisions, targets, self._oracle, self._place)

    def _place(self, precision: NodePrecision) -> Place | None:
        """Return where the spec names ``precision``."""
        checked = self._prepared.checked
        for index, layer in enumerate(checked.spec.precision.layers):
            if layer.precision == precision:
                return checked.place("precision", "layers", index, "precision")
        return checked.place("precision", "default") or checked.place("precision")

    # --- ranges ----------------------------------------------------------------------------------

    def calibrated(self) -> dict[str, float]:
        """Return name of a tensor that is quantised -> the largest magnitude it stands for.

        Raises:
            OptcError: As `ranges_of` and `samples_of`.
        """
        checked, graph = self._prepared.checked, self._prepared.graph
        spec = checked.spec.precision
        wanted = self.wanted.operands
        if not wanted or spec.calibration is None:
            return {}
        self._progress.step("calibrating")
        for _, data in self._verification:
            check_no_leak(self._calibration, data)
        asked = spec.calibration

        def run(feeds: Mapping[str, Array], names: Collection[str], see: See) -> object:
            return simulator().tensors(feeds, names, see)

        @cache
        def simulator() -> Simulator:  # made only where something is to be run
            return Simulator(
                graph,
                self._prepared.shapes,
                floats=self.wanted.floats,
                libraries=self._prepared.operators.libraries,
                modules=self._prepared.modules.of_graph(graph),
            )

        tensors = {
            node.inputs[index].name: None
            for node in graph.nodes
            if node.name in wanted
            for index in wanted[node.name].activations
        }
        ranges = ranges_of(
            Origin(
                model=self._prepared.model.sha256,
                graph=identity_of(graph),
                precision=self._eight_bits,
                method=asked.method,
                percentile=asked.percentile if asked.method == "percentile" else None,
            ),
            self._calibration,
            tensors,
            run,
            file=checked.path.parent / asked.cache if asked.cache else None,
            keep=self._keep_ranges,
            progress=self._progress,
        )
        self._notes += ranges.notes
        self._amax = dict(ranges.amax)
        return self._amax

    @property
    def _eight_bits(self) -> EightBits:
        """What is quantised, is quantised to this."""
        used = {level for levels in self.wanted.levels.values() for level in levels}
        return "fp8" if "fp8" in used else "int8"

    # --- the search ------------------------------------------------------------------------------

    def choose(self, plans: Sequence[Plan], lowerer: Lowerer) -> Choice:
        """Return what each node computes in, and let ``plans`` do so.

        Args:
            plans: One for each target.
            lowerer: Says what of that is written.
        """
        self._leave_out(plans)
        levels = self.wanted.levels
        nodes = {name: each[0] for name, each in levels.items()}
        choice = Choice(nodes, self.wanted.kept, notes=self._notes)
        if any(len(each) > 1 for each in levels.values()):
            self._search(choice, lowerer)
            give_back_memory()  # engines are built next
        choice.nodes = {name: p for name, p in choice.nodes.items() if p != "fp32"}
        for plan in plans:
            lower(plan, choice, self.wanted, self._prepared)
        return choice

    def _leave_out(self, plans: Sequence[Plan]) -> None:
        """Leave in fp32 what runs in no engine as it is."""
        for name in list(self.wanted.levels):
            rewritten = not is_product(self._prepared.question.node(name))
            if all(name in p.off or (rewritten and name in p.recipes) for p in plans):
                del self.wanted.levels[name]

    def _search(self, choice: Choice, lowerer: Lowerer) -> None:
        """Search the nodes that cost too much, and note in ``choice`` what was found."""
        spec = self._prepared.checked.spec
        samples = self._samples()
        if not samples:
            self._not_measured("there is no input to measure it on")
            return
        self._progress.step("searching the precision of each node")
        question = self._prepared.question
        candidates = [
            self._candidate(node, self.wanted.levels[node.name])
            for node in self._prepared.graph.nodes
            if node.name in self.wanted.levels
        ]
        simulator = Simulator(
            self._prepared.graph,
            self._prepared.shapes,
            floats=self.wanted.floats,
            amax=self._amax,
            libraries=self._prepared.operators.libraries,
            modules=self._prepared.modules.of_graph(self._prepared.graph),
        )
        criteria = Criteria.of(spec.verify, spec.precision.default, self._prepared.outputs)
        problem = Problem(
            runs=_Spread(simulator, self.wanted),
            samples=samples,
            judge=criteria,
            candidates=candidates,
            other_flops=sum(question.flops.values()) - sum(each.flops for each in candidates),
        )
        try:
            for share in MARGINS:
                margin = spec.precision.search.margin * share
                limits = spec.precision.search.model_copy(update={"margin": margin})
                found = search(problem, limits, self._progress, journal=self._journal(problem))
                written = self._as_written(found, lowerer)
                if written is None:
                    break
                badness = _badness(simulator, written, samples, criteria)
                if badness <= max(1.0, found.badness):
                    break
        except ModelError as error:
            if samples[0].name.startswith(MADE_UP):
                words = "; ".join(diagnostic.problem for diagnostic in error.diagnostics)
                self._not_measured(f"the model does not run on made-up input: {words}")
                return
            raise
        choice.nodes.update(found.nodes)
        choice.kept |= {
            each.node: Kept(each.node, each.op, each.precision, "search", each.why, each.cost)
            for each in found.kept
        }
        choice.evidence = evidence_of(found)
        choice.text = text_of(found)
        choice.picture = picture_of(found)
        if not found.met or not found.complete:
            self._notes.append(self._shortfall(found))

    def _as_written(self, found: Found, lowerer: Lowerer) -> Runner | None:
        """Return the model as it is written, simulated; None where that is as it was searched.

        A node is left in fp32 where that saves Casts. It then rounds less, and yet what comes out may
        be further off: errors cancel, and do so no more. Others are written in parts, or round where
        the search does not.
        """
        asked = self.wanted.spread(found.nodes)
        lowered = lowerer.lowered(self._prepared.graph, asked)
        if self.wanted.lowest == "fp16" and not asked.keys() & lowered.skipped.keys():
            return None
        try:
            return lowerer.simulated(
                lowered,
                self._prepared.operators.libraries,
                self._prepared.modules.of_graph(lowered.graph),
            )
        except ORT_ERRORS:
            return (
                None  # the whole in one piece is not what will run: verification has the last word
            )

    def _not_measured(self, why: str) -> None:
        self._notes.append(
            Diagnostic(
                "precision-not-measured",
                f"nothing is known of what {self.wanted.lowest} costs: {why}",
                "give real inputs with `verify: {data: ...}`",
                self._place(self.wanted.lowest),
                severity="warning",
            )
        )

    def _candidate(self, node: gs.Node, levels: tuple[NodePrecision, ...]) -> Candidate:
        question = self._prepared.question
        inputs = [t for t in node.inputs if t.name and not isinstance(t, gs.Constant)]
        return Candidate(
            name=node.name,
            op=node.op,
            flops=question.flops.get(node.name, 0),
            levels=levels,
            inputs=tuple(t.name for t in inputs if t.dtype == DTYPES["fp32"]),
            outputs=tuple(t.name for t in node.outputs if t.name and t.dtype == DTYPES["fp32"]),
        )

    def _shortfall(self, found: Found) -> Diagnostic:
        return Diagnostic(
            "precision-search-ended" if found.met else "precision-not-met",
            f"the search for precision: {found.reason or 'what was chosen is not exact enough'}",
            "raise `precision.search.max_runs` and `max_seconds`"
            if not found.complete
            else "raise the tolerance under `verify`, or choose a higher precision",
            self._place(self.wanted.lowest),
            severity="warning",
        )

    # --- what it is searched on ------------------------------------------------------------------

    def _samples(self) -> list[measure.Sample]:
        """Return what to search on: data to verify with, else to calibrate with, else made-up input.

        Input is made up only where there is nothing else: noise says little of what real input needs.
        """
        checked = self._prepared.checked
        precision = checked.spec.precision
        data = [
            measure.Sample(sample.name, sample.load, group)
            for group, samples in self._verification
            for sample in samples
        ]
        quantised = self.wanted.lowest in ("int8", "fp8")
        if quantised and not data and precision.calibration:
            data = [measure.Sample(sample.name, sample.load) for sample in self._calibration]
            self._notes.append(
                Diagnostic(
                    "searched-on-calibration",
                    "the precision of nodes is searched on the data to calibrate with, which fit "
                    "the ranges better than others will",
                    "give other inputs with `verify: {data: ...}`",
                    checked.place("precision", "calibration"),
                    severity="note",
                )
            )
        return _evenly(data, precision.search.max_samples) or list(self._made_up())

    @cached_property
    def _calibration(self) -> list[Sample]:
        """The samples to calibrate with."""
        checked = self._prepared.checked
        calibration = checked.spec.precision.calibration
        if calibration is None:
            return []
        found = samples_of(
            checked.path.parent,
            calibration.data,
            self._lead or self._prepared,
            calibration.images,
            place=lambda *keys: checked.place("precision", "calibration", *keys),
            progress=self._progress,
        )
        return self._lead.samples(found) if self._lead else found

    @cached_property
    def _lead(self) -> Lead | None:
        """What leads to a scope that is compiled on its own; None for a whole model."""
        prepared, checked = self._prepared, self._prepared.checked
        if checked.part is None:
            return None
        return Lead(
            checked.part,
            list(checked.inputs),
            checked.model_path,
            prepared.operators.libraries,
            prepared.modules.files,
        )

    @cached_property
    def _verification(self) -> list[tuple[str | None, list[Sample]]]:
        """Each group of samples to verify with; None for what is in no group."""
        checked = self._prepared.checked
        return [
            (
                group,
                self._samples_in(patterns),
            )
            for group, patterns in _patterns(checked.spec.verify)
        ]

    def _samples_in(self, patterns: Sequence[str]) -> list[Sample]:
        checked, lead = self._prepared.checked, self._lead
        found = samples_of(
            checked.path.parent, patterns, lead or self._prepared, progress=self._progress
        )
        return lead.samples(found) if lead else found

    def _made_up(self) -> Iterator[measure.Sample]:
        """Yield made-up input of the shapes that verification has, each once."""
        lead = self._lead
        inputs = lead.asked if lead else self._prepared.checked.inputs
        if not all(tensor.dtype for tensor in inputs.values()):
            return  # a sequence or a map
        seen = set()
        levels: tuple[At, ...] = ("opt", "min", "max")
        for index, profile in enumerate((lead or self._prepared).profiles):
            for at in levels:
                shapes = tuple(sizes(given.shape, profile, at) for given in inputs.values())
                if shapes in seen or bytes_needed(inputs, profile, at) > Bound.here().bytes:
                    continue
                seen.add(shapes)
                name = f"{MADE_UP}, profile {index + 1}, {at}"
                make = partial(made_up, inputs, profile, at)
                yield measure.Sample(name, lead.kept(name, make) if lead else make)

    def _journal(self, problem: Problem) -> measure.Journal:
        """Return the journal of this search: of this model, data, and demands."""
        checked = self._prepared.checked
        asked = checked.spec.model_dump(mode="json", include={"precision", "verify", "inputs"})
        asked["precision"].pop("search")
        depends_on = [
            __version__,
            self._prepared.model.sha256,
            checked.part and checked.part.stage,
            asked,
            [profile.items() for profile in self._prepared.profiles],
            [(each.name, each.levels) for each in problem.candidates],
            sorted(self._amax.items()),
            [sample.digest for _, samples in self._verification for sample in samples],
        ]
        key = hashlib.sha256(json.dumps(depends_on, default=str).encode()).hexdigest()
        return measure.Journal(cache_folder() / "precision" / f"{key[:32]}.jsonl", key)


def _badness(
    simulator: Simulator,
    written: Runner,
    samples: Sequence[measure.Sample],
    criteria: Criteria,
) -> float:
    """Return the largest error of what is written, as a multiple of what is allowed."""
    worst = 0.0
    for sample in samples:
        feeds = sample.feeds()
        expected = simulator.reference(feeds).outputs
        try:
            found = written.run(feeds)
        except Rejected:
            return math.inf
        worst = max(worst, criteria.badness(expected, found, sample.group))
    return worst


class _Spread:
    """A simulator that is told of a node with bodies what is meant for the nodes in them."""

    def __init__(self, simulator: Simulator, wanted: Wanted) -> None:
        self._simulator = simulator
        self._wanted = wanted

    def reference(self, feeds: Mapping[str, Array]) -> Reference:
        return self._simulator.reference(feeds)

    def run(
        self, reference: Reference, nodes: Mapping[str, NodePrecision], *, see: See | None = None
    ) -> dict[str, Array]:
        return self._simulator.run(reference, self._wanted.spread(nodes), see=see)

    def tensors(
        self, feeds: Mapping[str, Array], wanted: Collection[str], see: See
    ) -> dict[str, Array]:
        return self._simulator.tensors(feeds, wanted, see)


def _patterns(verify: Verify | None) -> Iterator[tuple[str | None, Sequence[str]]]:
    """Yield each group of data to verify with, and its files; None for what is in no group."""
    if verify is not None:
        if verify.data:
            yield None, verify.data
        for name, group in verify.groups.items():
            yield name, group.data


def _evenly(samples: list[measure.Sample], most: int) -> list[measure.Sample]:
    """Return at most ``most`` samples, taken evenly from all."""
    if len(samples) <= most:
        return samples
    return [samples[number * len(samples) // most] for number in range(most)]


def lower(plan: Plan, choice: Choice, wanted: Wanted, prepared: Prepared) -> None:
    """Let ``plan`` compute in what was chosen, where it is on TensorRT.

    A node that is rewritten for the target computes in fp32, as the search did not see what it
    became; but the product in it, if it is one, is the node's own. Where the target would multiply
    floats whatever is quantised, nothing is.
    """
    chosen: dict[str, NodePrecision] = {}
    for name, precision in choice.nodes.items():
        node = prepared.question.node(name)
        if name in plan.off or (name in plan.recipes and not is_product(node)):
            continue
        in_vain = is_eight_bits(precision) and is_in_vain(node.op, precision, plan.target)
        chosen[name] = wanted.floats if in_vain else precision
    plan.lowered = wanted.spread(chosen)


def is_in_vain(op: str, precision: EightBits, target: Target) -> bool:
    """Whether ``target`` multiplies floats where operands are quantised."""
    least, has = least_capability(op, precision), target.compute_capability
    if has is None or least is None:
        return least is None
    return tuple(map(int, has.split("."))) < tuple(map(int, least.split(".")))


def kept_in(
    nodes: Sequence[str],
    plans: Sequence[Plan],
    choice: Choice,
    not_lowered: Mapping[str, tuple[NodePrecision, str]],
    prepared: Prepared,
) -> list[Kept]:
    """Return those of ``nodes``, which a stage of ``plans`` has, that compute in more than asked for.

    Args:
        nodes: Names.
        plans: Of the targets that share the stage.
        choice: What was chosen.
        not_lowered: Name of a node that could not be lowered as far as asked -> what it computes in,
            and why.
        prepared: The model.
    """
    plan = plans[0]
    found = []
    for name in nodes:
        op, chosen = prepared.question.node(name).op, choice.nodes.get(name)
        if name in not_lowered:
            precision, why = not_lowered[name]
            found.append(Kept(name, op, precision, "rule", why))
        elif raised := plan.raised.get(name):
            found.append(Kept(name, op, "fp32", raised.by, raised.text))
        elif name in choice.kept:
            found.append(choice.kept[name])
        elif chosen and name in plan.recipes and name not in plan.lowered:
            passes = ", ".join(plan.recipes[name].recipe.passes)
            found.append(Kept(name, op, "fp32", "rule", f"rewritten for TensorRT by {passes}"))
        elif chosen and is_eight_bits(chosen) and plan.lowered.get(name) != chosen:
            least = least_capability(op, chosen)
            why = f"TensorRT multiplies {op} in {chosen} from compute capability {least} on"
            found.append(Kept(name, op, plan.lowered[name], "rule", why))
    return found
