"""Decides which nodes run in TensorRT, target by target, until every engine builds.

A round: split the graph by what is known to be off TensorRT, take off what could not be built as it
stands (an axis without a bound, a size that comes from outside, an engine that does not pay), build
the rest, and take off what the builder blames. Nodes only move off, so it ends; the number of rounds
is bounded, and past the bound what does not build goes to the fallback whole.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import onnx_graphsurgeon as gs

from optc.optimizer.cost import CostModel
from optc.optimizer.job import BuildFailure, BuildResult
from optc.passes.graph import nodes_in, reads
from optc.passes.legalising import Recipe
from optc.passes.precision import NodePrecision
from optc.passes.profile_check import why_not_at
from optc.passes.split import CutApart, Splitter, Stage, quantised, why_not_whole
from optc.passes.tensorrt_rule import shape_readers, why_not_its_rounds, why_not_its_types
from optc.specs.compile_spec import Cost, Range, Target
from optc.specs.diagnostic import Diagnostic, ModelError, OptcError, Place, SpecError, quoted
from optc.specs.manifest import Runtime

if TYPE_CHECKING:
    from optc.passes.shape import Shapes

MAX_ROUNDS = 16
"""Rounds of building before what still fails goes to the fallback as a whole."""

MAX_TRIALS = 64
"""Splits that are tried to find the engines that do not pay; past them, what is left stays."""

ProfileShapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Name of an input -> its min, opt and max shape."""

Judge = Literal["rule", "parser", "builder", "spec"]


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a node is off TensorRT: who says so, and in whose words."""

    by: Judge
    text: str


Off = dict[str, Refused]
"""Name of a node -> why it is off TensorRT."""


@dataclass(frozen=True, slots=True)
class Legalised:
    """A node that TensorRT refuses as it is, and takes as rewritten.

    Attributes:
        recipe: How it is rewritten.
        refused: Who refuses it as it is, and in whose words.
    """

    recipe: Recipe
    refused: Refused


@dataclass(slots=True)
class Plan:
    """What was decided for one target.

    Attributes:
        target: The target.
        off: Nodes off TensorRT.
        recipes: Name of a node that TensorRT refuses as it is -> how it is rewritten for it.
        lowered: Name of a node, of bodies too -> its precision, for those below fp32.
        raised: Name of a node that was to be lowered and that TensorRT takes in fp32 only -> who
            says so.
        stages: In running order.
        engines: Stage -> how its build went; every TensorRT stage has one, unless ``confirmed`` is
            false.
        confirmed: Whether every engine was built.
    """

    target: Target
    off: Off
    recipes: dict[str, Legalised] = field(default_factory=dict)
    lowered: dict[str, NodePrecision] = field(default_factory=dict)
    raised: dict[str, Refused] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    engines: dict[Stage, BuildResult] = field(default_factory=dict)
    confirmed: bool = False

    def take_off(self, refused: Off, legalise: Legalise) -> None:
        """Take nodes off TensorRT, except those that can be rewritten for it.

        What was rewritten and is refused nevertheless goes off: nothing is tried twice.
        """
        new = {name: why for name, why in refused.items() if name not in self.recipes}
        answers = legalise(new, self.target)
        self.recipes |= {name: a for name, a in answers.items() if isinstance(a, Legalised)}
        for name, why in refused.items():
            if name not in new:
                passes = ", ".join(self.recipes.pop(name).recipe.passes)
                self.off[name] = Refused(why.by, f"{why.text} (as rewritten by {passes})")
            elif name not in self.recipes:
                reason = answers.get(name)
                self.off[name] = Refused(why.by, f"{why.text} ({reason})") if reason else why

    def raise_precision(self, refused: Off, question: Question) -> Off:
        """Compute in fp32 what is refused and was lowered; return what is refused as it is."""
        left: Off = {}
        for name, why in refused.items():
            lowered = [inner for inner in question.within(name) if inner in self.lowered]
            for inner in lowered:
                del self.lowered[inner]
            if lowered:
                self.raised[name] = why
            else:
                left[name] = why
        return left


@dataclass(frozen=True, slots=True)
class Round:
    """One round of building, for the report.

    Attributes:
        target: Name of the target.
        stages: How many stages the split had; engines, how many of them are engines.
        built: Engines that built in this round.
        blamed: Node -> why it was taken off after this round.
        raised: Node -> why it computes in fp32 after this round.
    """

    target: str
    stages: int
    engines: int
    built: int
    blamed: Mapping[str, str]
    raised: Mapping[str, str]


Blame = Callable[[Stage, BuildFailure, Target], Off]
"""Names the nodes of a stage that keep it from building; all of them where nothing can be told."""

Build = Callable[[Sequence[tuple[Stage, Target]]], list[BuildResult]]

Legalise = Callable[[Off, Target], Mapping[str, Legalised | str]]
"""Says of nodes that a target refuses how they are rewritten so that it takes them, or why a pass that
knows them does not do so. Of the others it says nothing."""


@dataclass(slots=True)
class Question:
    """What partitioning starts from.

    Attributes:
        graph: The optimised graph, annotated.
        shapes: Its shapes.
        profiles: The optimisation profiles.
        off: Nodes off TensorRT for every target: by rule and by the spec.
        points: Tensors where a stage must end.
        flops: Node -> FLOPs.
        fallback: Runtime of what is off TensorRT.
        place_of_profiles: Where the spec gives extents.
        place_of_partition: Where the spec says what is to be one stage.
        units: Nodes that stay in one stage.
        scopes: Name of a stage -> the nodes it holds, and no others.
        runtimes: Name of a node -> the runtime that has to run it, if any has. Such nodes are in
            ``off``, too.
        cost: What running a stage is taken to cost.
    """

    graph: gs.Graph
    shapes: Shapes
    profiles: Sequence[Mapping[str, Range]]
    off: Off
    points: frozenset[str]
    flops: Mapping[str, int]
    fallback: Runtime = "onnxruntime"
    place_of_profiles: Place | None = None
    place_of_partition: Place | None = None
    units: Sequence[Collection[str]] = ()
    scopes: Mapping[str, Collection[str]] = field(default_factory=dict)
    runtimes: Mapping[str, Runtime] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    _splitter: Splitter | None = None
    _cost_model: CostModel | None = None
    _profiles_are_fine: bool = False
    _nodes: dict[str, gs.Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._nodes = {node.name: node for node in self.graph.nodes}

    def node(self, name: str) -> gs.Node:
        """Return the node called ``name``."""
        return self._nodes[name]

    def within(self, name: str) -> list[str]:
        """Return the name of a node and of those in its bodies."""
        return [each.name for each in nodes_in(self._nodes[name])]

    def nodes_of(self, stage: Stage) -> list[gs.Node]:
        """Return the nodes of ``stage``, repeated ones too."""
        return [self._nodes[name] for name in (*stage.nodes, *stage.repeated)]

    @property
    def splitter(self) -> Splitter:
        """What splits the graph."""
        if self._splitter is None:
            with self._in_one_stage():
                self._splitter = Splitter(
                    self.graph,
                    points=self.points,
                    is_free=self.is_free,
                    fallback=self.fallback,
                    bytes_of=self.bytes_of,
                    units=(*self.units, *self._quantised()),
                    scopes=self.scopes,
                    runtimes=self.runtimes,
                )
        return self._splitter

    def _quantised(self) -> list[list[str]]:
        """Return what is quantised together, but for what the spec cuts apart."""
        scope_of = {node: name for name, nodes in self.scopes.items() for node in nodes}
        return [
            unit
            for unit in quantised(self.graph)
            if len({scope_of.get(name) for name in unit}) == 1
            and self.points.isdisjoint(t.name for t in self._nodes[unit[0]].outputs)
        ]

    def split(self, off: Collection[str]) -> list[Stage]:
        """Return the stages of the graph with the nodes ``off`` off TensorRT.

        Raises:
            SpecError: ``cannot-stay-whole``, where something off TensorRT is in the way of a scope or
                group, such as arithmetic with sizes that any stage could have repeated.
        """
        with self._in_one_stage():
            return self.splitter.split(off)

    @contextmanager
    def _in_one_stage(self) -> Iterator[None]:
        """Say of what cannot stay whole that it is the spec's wish."""
        try:
            yield
        except CutApart as error:
            path = " -> ".join(f"`{name}`" for name in error.path)
            raise SpecError(
                Diagnostic(
                    "cannot-stay-whole",
                    "nodes that are to be one stage cannot be: a path leaves them and enters them "
                    f"again in the optimised model, {path}",
                    "let the scope, or the group of `keep_together`, hold what is on the way, too",
                    self.place_of_partition,
                )
            ) from error

    @property
    def cost_model(self) -> CostModel:
        """What tells the time of a split."""
        if self._cost_model is None:
            self._cost_model = CostModel(self)
        return self._cost_model

    def bytes_of(self, name: str) -> int | None:
        """Return the bytes of a tensor at the usual extents of the first profile.

        None where its type is not known, or nothing bounds an axis.
        """
        return self._bytes(name, self.profiles[0], "opt")

    def most_bytes_of(self, name: str) -> int | None:
        """Return the most bytes of a tensor in any profile; None as for `bytes_of`."""
        found = [self._bytes(name, profile, "max") for profile in self.profiles]
        known = [each for each in found if each is not None]
        return max(known) if len(known) == len(found) else None

    def _bytes(
        self, name: str, profile: Mapping[str, Range], end: Literal["opt", "max"]
    ) -> int | None:
        dims, dtype = self.shapes.dims(name), self.shapes.dtype(name)
        if dims is None or dtype is None:
            return None
        ranges = [self.shapes.axis_range(axis, profile) for axis in dims]
        extents = [getattr(each, end) for each in ranges if each is not None]
        return math.prod(extents) * dtype.itemsize if len(extents) == len(dims) else None

    def check_profiles(self) -> None:
        """Make sure that the model takes the shapes of every optimisation profile.

        Asked when a build failed, as the builder blames a node for what the profile did, or when
        the original rejects its input. Asked once: the answer does not change.

        Raises:
            SpecError: ``profile-breaks-model``.
            ModelError: ``invalid-shapes``, where no axis is dynamic.
        """
        if self._profiles_are_fine:
            return
        for profile in self.profiles:
            for end in ("opt", "min", "max"):
                extents = {name: int(getattr(r, end)) for name, r in profile.items()}
                if reason := why_not_at(self.graph, extents):
                    raise self._profile_fault(extents, reason)
        self._profiles_are_fine = True

    def _profile_fault(self, extents: Mapping[str, int], reason: str) -> OptcError:
        if not extents:
            return ModelError(
                Diagnostic(
                    "invalid-shapes",
                    f"the shapes in the model do not fit together, ONNX says: {reason}",
                    "export the model again",
                )
            )
        listed = ", ".join(f"{name} = {extent}" for name, extent in extents.items())
        return SpecError(
            Diagnostic(
                "profile-breaks-model",
                f"the model does not take the shapes of an optimisation profile: at {listed}, "
                f"ONNX says: {reason}",
                "give extents under `dims` or `profiles` that the model takes, often multiples of "
                "its largest stride, such as 32",
                self.place_of_profiles,
            )
        )

    def is_free(self, node: gs.Node) -> bool:
        """Whether ``node`` makes nothing but sizes, all of them known in terms of symbols."""
        made = [tensor.name for tensor in node.outputs]
        return bool(made) and all(map(self.shapes.is_size, made))

    def share(self, stage: Stage) -> float:
        """Return the share of the FLOPs that ``stage`` owns."""
        total = sum(self.flops.values())
        return sum(self.flops.get(name, 0) for name in stage.nodes) / total if total else 0.0


def by_rule(graph: gs.Graph) -> Off:
    """Return the nodes whose types TensorRT does not have, or that it takes and gets wrong."""
    return {
        node.name: Refused("rule", reason)
        for node in graph.nodes
        if (reason := why_not_its_types(node) or why_not_its_rounds(node))
    }


def begin(
    targets: Sequence[Target], refused: Mapping[str, Off], question: Question, legalise: Legalise
) -> list[Plan]:
    """Return a plan for each target: what is off TensorRT and what is rewritten, before any split.

    Args:
        targets: What to build for.
        refused: Name of a target -> nodes that the parser refuses for it.
        question: What is known beforehand.
        legalise: Asked for what is refused, before it goes to the fallback.
    """
    plans = [Plan(target, {}) for target in targets]
    for plan in plans:
        plan.take_off({**refused[plan.target.name], **question.off}, legalise)
    return plans


def settle(
    question: Question, plans: Sequence[Plan], build: Build | None, blame: Blame, legalise: Legalise
) -> list[Round]:
    """Split and build until every engine of ``plans`` is there; return the rounds that it took.

    Args:
        question: What is known beforehand.
        plans: What `begin` gave. Completed in place.
        build: Builds engines side by side; None: nothing is built and the plans are unconfirmed.
        blame: Asked for each stage that did not build.
        legalise: Asked for what is refused, before it goes to the fallback.
    """
    rounds: list[Round] = []
    for plan in plans:
        plan.stages = settled_stages(question, plan)
    if build is None:
        return rounds
    for number in itertools.count():  # nodes only move off, so it ends
        open_jobs = [
            (stage, plan)
            for plan in plans
            for stage in plan.stages
            if stage.runtime == "tensorrt" and stage not in plan.engines
        ]
        if not open_jobs:
            break
        results = build([(stage, plan.target) for stage, plan in open_jobs])
        blamed: dict[str, Off] = {}
        for (stage, plan), result in zip(open_jobs, results, strict=True):
            if result.failure is None:
                plan.engines[stage] = result
                continue
            if number >= MAX_ROUNDS:
                text = f"no engine after {MAX_ROUNDS} rounds: {result.failure.text}"
                found = {name: Refused("builder", text) for name in stage.work}
            else:
                found = blame(stage, result.failure, plan.target)
            blamed.setdefault(plan.target.name, {}).update(found)
        for plan in plans:
            own = [result for (_, p), result in zip(open_jobs, results, strict=True) if p is plan]
            if not own:
                continue
            found = blamed.get(plan.target.name, {})
            taken_off = plan.raise_precision(found, question)
            rounds.append(
                Round(
                    target=plan.target.name,
                    stages=len(plan.stages),
                    engines=sum(stage.runtime == "tensorrt" for stage in plan.stages),
                    built=sum(result.failure is None for result in own),
                    blamed={name: refused.text for name, refused in taken_off.items()},
                    raised={name: why.text for name, why in found.items() if name not in taken_off},
                )
            )
            if found:
                plan.take_off(taken_off, legalise)
                plan.stages = settled_stages(question, plan)
    for plan in plans:
        plan.engines = {s: plan.engines[s] for s in plan.stages if s.runtime == "tensorrt"}
        plan.confirmed = True
    return rounds


def settled_stages(question: Question, plan: Plan) -> list[Stage]:
    """Return the stages of ``plan``.

    What no engine could hold as it stands is taken off first, then the engines that do not pay.
    """
    stages = _buildable(question, plan.off)
    stages = _paying(question, plan.off, stages)
    return [_as_planned(stage, plan, question) for stage in stages]


def _buildable(question: Question, off: Off) -> list[Stage]:
    """Return the stages with ``off``, and with what no engine could hold as it stands added to it."""
    while True:
        off.update(_kept_together(question, off))
        stages = question.split(off)
        problem = why_not_whole(question.graph, stages)
        assert problem is None, problem
        moved: Off = {}
        for stage in stages:
            if stage.runtime == "tensorrt":
                moved.update(_unbounded(question, stage) or _sized_from_outside(question, stage))
        if not moved:
            return stages
        off.update(moved)


def _kept_together(question: Question, off: Off) -> Off:
    """Return the nodes that are off TensorRT because one of their scope or group is."""
    scope_of = {node: name for name, nodes in question.scopes.items() for node in nodes}
    asked = {name for unit in question.units for name in unit}

    def who(name: str) -> str:
        if name in scope_of:
            return f"the scope `{scope_of[name]}` is one stage and"
        return "`keep_together`" if name in asked else "the unit around a quantised operator"

    return {
        name: Refused(
            "rule",
            f"{who(name)} holds `{cause}` too, which is off TensorRT ({off[cause].by}: "
            f"{off[cause].text})",
        )
        for name, cause in question.splitter.drags(off).items()
    }


def _paying(question: Question, off: Off, stages: list[Stage]) -> list[Stage]:
    """Return the stages without the engines that do not pay, whose nodes are added to ``off``.

    Those without which the cost model takes the split to be fastest are dropped together, and the
    graph is split again: only what makes the new split faster counts. Where it does not, the worse
    half of them is tried. Where only points cut, and where no engine would be left, all stay.
    """
    if all(stage.runtime == "tensorrt" for stage in stages):
        return stages
    cost = question.cost_model
    found, dropped, time = stages, dict(off), cost.split_us(stages)
    proven: set[tuple[str, ...]] = set()  # work of engines that a new split showed to pay
    trials = 0
    while trials < MAX_TRIALS:
        kept = _kept(question, found, proven)
        losing = cost.losing(found, kept)
        if not losing:
            break
        staying = {name for index in kept for name in found[index].work}
        while True:
            trials += 1
            trial = dict(dropped)
            for verdict in losing:
                trial.update(dict.fromkeys(verdict.stage.work, Refused("rule", verdict.reason)))
            split = _buildable(question, trial)
            # A new cut can take more off: an axis that nothing bounds there, a size from outside.
            if staying.isdisjoint(trial) and (new_time := cost.split_us(split)) < time:
                found, dropped, time = split, trial, new_time
                break
            if len(losing) == 1:
                proven.add(losing[0].stage.work)
                break
            losing = losing[: len(losing) // 2]
    if all(stage.runtime != "tensorrt" for stage in found):
        return stages
    off.update(dropped)
    return found


def _kept(
    question: Question, stages: Sequence[Stage], proven: Collection[tuple[str, ...]]
) -> list[int]:
    """Return the indices of the engines that stay whatever they cost.

    Those that the spec asks for by a name or a point, and those with enough of the FLOPs.
    """
    flops = question.flops
    enough = question.cost.keep_share * (sum(flops.values()) or 1)
    return [
        index
        for index, stage in enumerate(stages)
        if stage.runtime == "tensorrt"
        and (
            stage.work in proven
            or _is_asked_for(question, stage)
            or sum(flops.get(name, 0) for name in stage.nodes) >= enough
        )
    ]


def _is_asked_for(question: Question, stage: Stage) -> bool:
    """Whether the spec wants a stage there: it has a name, or a point is at its edge."""
    return stage.name is not None or not question.points.isdisjoint((*stage.inputs, *stage.outputs))


def _as_planned(stage: Stage, plan: Plan, question: Question) -> Stage:
    """Return ``stage`` with what of its nodes is rewritten and lowered."""
    if stage.runtime != "tensorrt":
        return stage
    own = (*stage.nodes, *stage.repeated)
    inner = own if not plan.lowered else [each for name in own for each in question.within(name)]
    return replace(
        stage,
        recipes=tuple(plan.recipes[name].recipe for name in own if name in plan.recipes),
        lowered=tuple((name, plan.lowered[name]) for name in inner if name in plan.lowered),
    )


def _unbounded(question: Question, stage: Stage) -> Off:
    """Return the nodes of ``stage`` that read an axis for which nothing gives a range."""
    found: Off = {}
    for name in stage.inputs:
        dims = question.shapes.dims(name)
        if dims is None:
            reason = f"the rank of `{name}` is not known"
            symbols: set[str] = set()
        else:
            symbols = {
                symbol
                for dim in dims
                for profile in question.profiles
                if question.shapes.axis_range(dim, profile) is None
                for symbol in question.shapes.unbounded_symbols(dim, profile)
            }
            if not symbols:
                continue
            listed = quoted(sorted(symbols))
            reason = (
                f"nothing bounds {listed}, an axis of `{name}`, which enters the engine here; "
                "give it a range under `dims` in the spec"
            )
        found.update(dict.fromkeys(_readers(question, stage, name), Refused("rule", reason)))
    return found


def _readers(question: Question, stage: Stage, name: str) -> list[str]:
    """Return what reads ``name`` in ``stage``, itself or through free nodes, which move nowhere."""
    inside = {*stage.nodes, *stage.repeated}
    work = set(stage.work)
    seen = {name}
    found = []
    for node in question.graph.nodes:
        if node.name in inside and any(tensor.name in seen for tensor in reads(node)):
            if node.name in work:
                found.append(node.name)
            else:
                seen.update(tensor.name for tensor in node.outputs)
    return found


def _sized_from_outside(question: Question, stage: Stage) -> Off:
    readers = shape_readers(question.nodes_of(stage), stage.inputs)
    return {
        reader: Refused(
            "rule",
            f"a size it needs depends on the values of `{name}`, which enters the engine here; "
            "TensorRT takes no sizes from outside",
        )
        for reader, name in readers.items()
        if reader in stage.work
    }


def profile_shapes(question: Question, names: Sequence[str]) -> tuple[ProfileShapes, ...] | None:
    """Return the optimisation profiles of an engine with the inputs ``names``.

    Returns:
        For each profile of the spec, the shapes of the inputs with a dynamic axis; () where none
        has one, None where a rank is not known or an axis has no bound.
    """
    dims = {name: question.shapes.dims(name) for name in names}
    found = []
    for profile in question.profiles:
        shapes = {}
        for name, axes in dims.items():
            if axes is None:
                return None
            if all(isinstance(axis, int) for axis in axes):
                continue
            ranges = [question.shapes.axis_range(axis, profile) for axis in axes]
            known = [r for r in ranges if r is not None]
            if len(known) < len(ranges):
                return None
            shapes[name] = (
                tuple(r.min for r in known),
                tuple(r.opt for r in known),
                tuple(r.max for r in known),
            )
        found.append(shapes)
    return tuple(found) if any(found) else ()


def axis_ranges(question: Question, inputs: Sequence[gs.Tensor]) -> list[dict[str, Range]]:
    """Return the extents of the axes of ``inputs``, by the names that the axes bear.

    Args:
        question: Tells them.
        inputs: Tensors of its graph, or of a part of it that was exported, annotated.

    Returns:
        One mapping for each profile, all with the same names: those that every profile bounds.
    """
    found: list[dict[str, Range]] = []
    for profile in question.profiles:
        ranges = {
            axis: question.shapes.axis_range(dim, profile)
            for tensor in inputs
            if tensor.shape is not None and (dims := question.shapes.dims(tensor.name)) is not None
            for axis, dim in zip(tensor.shape, dims, strict=True)
            if isinstance(axis, str)
        }
        found.append({name: known for name, known in ranges.items() if known is not None})
    everywhere = set(found[0]).intersection(*found)
    return [{name: each[name] for name in found[0] if name in everywhere} for each in found]


def key_of(stage: Stage, target: Target) -> str:
    """Return a file name for the engine of ``stage`` while it has no number yet."""
    text = repr((stage, target.name))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
