"""Runs passes: their order, the fixpoint, the checks between them, timing, and where nodes come from.

Passes run in the order of the registry, each on every body (innermost first) and then on the main
graph, round after round until a whole round changes nothing. A pass is not run again on a graph that
has not changed since it last had nothing to do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Origins, Part, Pass, Report
from optc.passes.graph import Names, all_nodes, bodies_of, reads, remove_dead, sorted_nodes
from optc.passes.precision import Lowering
from optc.passes.shape import Inference, Shapes

MAX_ROUNDS = 30
"""More rounds than any real model needed (at most 7); passes that undo each other end here."""


@dataclass(frozen=True, slots=True)
class Step:
    """One run of a pass that changed something.

    Attributes:
        number: 1 for the first that did.
        name: Of the pass.
        graph: The main graph, as it is now.
        merged: As in `Report`, over all graphs of the model.
        removed: As in `Report`.
    """

    number: int
    name: str
    graph: gs.Graph
    merged: Mapping[str, tuple[str, ...]]
    removed: Mapping[str, str]


AfterStep = Callable[[Step], None]


class PassError(Exception):
    """A pass left the graph broken. A fault of the pass, never of the user's model."""


@dataclass(slots=True)
class PassRecord:
    """What one pass did over all its runs.

    Attributes:
        name: The pass.
        seconds: Wall time of all its runs.
        runs: How often it ran.
        rewritten: Patterns it rewrote, over all runs.
        merged: As in `Report`; what a later run says of a node comes after what an earlier one said.
        removed: As in `Report`.
        skipped: As in `Report`, as of the last run.
        noted: As in `Report`.
        origins: Names of the original's nodes that it rewrote, or something that stands for them.
    """

    name: str
    seconds: float = 0.0
    runs: int = 0
    rewritten: int = 0
    merged: dict[str, tuple[str, ...]] = field(default_factory=dict)
    removed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    noted: dict[str, str] = field(default_factory=dict)
    origins: set[str] = field(default_factory=set)

    def add(self, later: PassRecord) -> None:
        """Add what the pass did in ``later`` runs."""
        self.seconds += later.seconds
        self.runs += later.runs
        self.rewritten += later.rewritten
        self.merged.update(later.merged)
        self.removed.update(later.removed)
        self.skipped = later.skipped
        self.noted.update(later.noted)
        self.origins |= later.origins


@dataclass(slots=True)
class PipelineReport:
    """What the passes did to a model.

    Attributes:
        records: One per pass, in running order.
        origins: Node of the result -> names of the original's nodes it stands for.
        rounds: Rounds until nothing changed.
        nodes_before: Number of nodes that came in, bodies included, constants not counted.
        nodes_after: Number of nodes that are left.
        seconds: Wall time of all.
    """

    records: list[PassRecord]
    origins: Origins
    rounds: int
    nodes_before: int
    nodes_after: int
    seconds: float

    def go_on(self, later: PipelineReport) -> None:
        """Take in what ``later`` passes did to the graph that these left."""

        def originals(names: Iterable[str]) -> tuple[str, ...]:
            return tuple(dict.fromkeys(o for name in names for o in self.origins.get(name, ())))

        records = {record.name: record for record in self.records}
        for record in later.records:
            record.origins = set(originals(record.origins))
            if record.name in records:
                records[record.name].add(record)
            else:
                self.records.append(record)
        self.origins = {name: originals(parts) for name, parts in later.origins.items()}
        self.rounds += later.rounds
        self.nodes_after = later.nodes_after
        self.seconds += later.seconds


def optimise(
    graph: gs.Graph,
    passes: Sequence[Pass],
    *,
    points: Iterable[str] = (),
    ranges: Mapping[str, tuple[int, int]] | None = None,
    after: AfterStep | None = None,
    stop_after: int | None = None,
    refused: frozenset[str] | None = None,
    lowering: Lowering | None = None,
) -> PipelineReport:
    """Run ``passes`` on ``graph``, in place, until none has anything left to do.

    Args:
        graph: In normal form (`passes.graph.import_model`).
        passes: In running order.
        points: Names of tensors that must stay, besides the outputs.
        ranges: Symbol -> its smallest and largest extent; the result need be right only for these.
        after: Sees the graph after each run that changed it: for dumps and for proofs.
        stop_after: The most steps, that is runs of a pass that change something: to find by hand
            the one that does harm.
        refused: Names of the nodes that a target refuses: what passes that legalise rewrite.
        lowering: What nodes are to compute in: what passes that lower precision follow.

    Raises:
        PassError: If a pass leaves the graph broken; it names the pass and what is wrong.
    """
    run = _Run(graph, passes, frozenset(points), ranges, after, stop_after, refused, lowering)
    return run.to_fixpoint()


class _Run:
    def __init__(
        self,
        graph: gs.Graph,
        passes: Sequence[Pass],
        points: frozenset[str],
        ranges: Mapping[str, tuple[int, int]] | None,
        after: AfterStep | None,
        stop_after: int | None,
        refused: frozenset[str] | None,
        lowering: Lowering | None,
    ) -> None:
        self.graph = graph
        self.passes = passes
        self.points = points
        self.after = after
        self.stop_after = math.inf if stop_after is None else stop_after
        self.refused = refused
        self.lowering = lowering
        self.version = 0  # counts changes; what was computed from an older graph is stale
        self.records = {p.name: PassRecord(p.name) for p in passes}
        self.origins: dict[str, tuple[str, ...]] = {n.name: (n.name,) for n in all_nodes(graph)}
        self.nodes_before = len(self.origins)
        self.inference = Inference(graph, ranges)
        self.changed: set[str] = set()  # nodes that were rewritten since shapes were inferred
        self.look_again()

    def look_again(self) -> None:
        """Find out anew what graphs there are and what of them must stay."""
        self.parts = list(_parts(self.graph))
        self.kept = frozenset(
            (*self.points, *(t.name for part in self.parts for t in part.graph.outputs))
        )
        self.known: Shapes | None = None

    @cached_property
    def names(self) -> Names:
        return Names(self.graph)

    def fresh_name(self, stem: str) -> str:
        return self.names.fresh(stem)

    def to_fixpoint(self) -> PipelineReport:
        start = time.perf_counter()
        idle_at: dict[str, int] = {}  # pass -> version at which it last changed nothing
        rounds = 0
        while rounds < MAX_ROUNDS:
            rounds += 1
            at_start = self.version
            for pass_ in self.passes:
                if idle_at.get(pass_.name) == self.version or self.version >= self.stop_after:
                    continue
                if not self.run(pass_):
                    idle_at[pass_.name] = self.version
            if self.version == at_start:
                break
        self.check(" or ".join(r.name for r in self.records.values() if r.rewritten))
        return PipelineReport(
            records=list(self.records.values()),
            origins={n.name: self.origins[n.name] for n in all_nodes(self.graph)},
            rounds=rounds,
            nodes_before=self.nodes_before,
            nodes_after=sum(1 for _ in all_nodes(self.graph)),
            seconds=time.perf_counter() - start,
        )

    def run(self, pass_: Pass) -> bool:
        """Run one pass on all graphs of the model and return whether it changed any."""
        record = self.records[pass_.name]
        record.skipped.clear()
        start = time.perf_counter()
        merged: dict[str, tuple[str, ...]] = {}
        removed: dict[str, str] = {}
        for part in self.parts:
            facts = Facts(
                part,
                self.graph,
                self.kept,
                self.shapes,
                self.fresh_name,
                refused=self.refused,
                lowering=self.lowering,
            )
            try:
                report = pass_.run(part.graph, facts)
            except Exception as error:
                error.add_note(f"in the pass `{pass_.name}` ({type(pass_).__module__})")
                raise
            self.note(record, report)
            merged.update(report.merged)
            removed.update(report.removed)
        changed = bool(merged or removed)
        if changed:
            self.settle(pass_)
        record.runs += 1
        record.seconds += time.perf_counter() - start
        if changed and self.after is not None:
            self.after(Step(self.version, pass_.name, self.graph, merged, removed))
        return changed

    def shapes(self) -> Shapes:
        """Return shapes as of the present version, computed once a version."""
        if self.known is None:
            self.known = self.inference.shapes(self.changed)
            self.changed.clear()
        return self.known

    def note(self, record: PassRecord, report: Report) -> None:
        record.rewritten += len(report.merged) + len(report.removed)
        record.merged.update(report.merged)
        record.removed.update(report.removed)
        record.skipped.update(report.skipped)
        record.noted.update(report.noted)
        self.changed.update(report.merged)
        for name, parts in report.merged.items():
            found = [origin for part in parts for origin in self.origins.get(part, ())]
            self.origins[name] = tuple(dict.fromkeys(found))
            record.origins.update(found)
        for name in report.removed:
            record.origins.update(self.origins.get(name, ()))
        if self.lowering is not None and report.precisions:
            nodes = {**self.lowering.nodes, **report.precisions}
            self.lowering = replace(self.lowering, nodes=nodes)

    def settle(self, pass_: Pass) -> None:
        """Bring the graph back to normal form after a change."""
        self.look_again()
        dead = []
        for part in reversed(self.parts):  # what an outer graph no longer needs, its bodies forget
            dead += remove_dead(part.graph, self.kept)
            part.graph.nodes = sorted_nodes(part.graph)
        if any(map(bodies_of, dead)):
            self.look_again()
        self.version += 1
        if not type(pass_).__module__.startswith("optc.passes."):  # ours are checked at the end
            self.check(pass_.name)

    def check(self, culprit: str) -> None:
        """Check what a pass may not break.

        Raises:
            PassError: Naming ``culprit``.
        """
        check(self.graph, culprit)
        for node in all_nodes(self.graph):
            if node.name not in self.origins:
                raise PassError(f"{culprit}: the new node `{node.name}` is not in its report")


def _parts(graph: gs.Graph, *, conditional: bool = False) -> Iterator[Part]:
    """Yield ``graph`` and all bodies below it, innermost first."""
    for node in graph.nodes:
        for body in bodies_of(node):
            yield from _parts(body, conditional=conditional or node.op == "If")
    yield Part(graph, conditional=conditional)


def check(graph: gs.Graph, culprit: str) -> None:
    """Check the normal form of `passes.contract`.

    Raises:
        PassError: Naming ``culprit`` and the first thing found wrong.
    """
    seen: set[str] = set()
    _check_part(graph, {}, seen, set(), culprit)


def _check_part(
    graph: gs.Graph,
    outer: dict[str, gs.Tensor],
    nodes: set[str],
    tensors: set[str],
    culprit: str,
) -> None:
    visible = dict(outer)

    def make(tensor: gs.Tensor) -> None:
        if tensor.name in tensors:
            raise PassError(f"{culprit}: the tensor `{tensor.name}` is made twice")
        tensors.add(tensor.name)
        visible[tensor.name] = tensor

    for tensor in graph.inputs:
        make(tensor)
    for node in graph.nodes:
        if not node.name or node.name in nodes:
            raise PassError(f"{culprit}: a node has no name of its own: `{node.name}`, {node.op}")
        nodes.add(node.name)
        for tensor in reads(node):
            if not isinstance(tensor, gs.Constant) and visible.get(tensor.name) is not tensor:
                raise PassError(
                    f"{culprit}: `{node.name}` reads `{tensor.name}`, which nothing before it makes"
                )
        for body in (v for v in node.attrs.values() if isinstance(v, gs.Graph)):
            _check_part(body, visible, nodes, tensors, culprit)
        for tensor in node.outputs:
            if tensor.name:
                make(tensor)
    for tensor in graph.outputs:
        if not isinstance(tensor, gs.Constant) and visible.get(tensor.name) is not tensor:
            raise PassError(f"{culprit}: nothing makes the output `{tensor.name}`")
