r"""Let many short selections be one: choose the best of each group with a fixed number of places.

    before, for each group                   after

    v      (a column of scores)              v > t    v   -inf
    |    \                                      \     |   /
    |     Greater t   w                          Where
    |        |        |                            |
    |     NonZero     |                          TopK of K      w
    |      /    \     |                          /        \     |
    Gather       Gather                         |          Gather
       |            |                           |             |
    TopK of min(K, count)                     Concat        Concat     with those of other groups
       |        \   |                           |             |
       |        Gather                      Greater -inf      |
       |            |                           |             |
     Concat       Concat                    the indices where it is true
       |            |                           |      \      |
       y            z                         Gather    \__ Gather
                                                |             |
                                                y             z

Why it holds: a score above the threshold is above minus infinity, so the places that are left over in a
group come last, and can be told. Among equal scores the lower index comes first either way. Leaving out
those places after the Concat gives what is put together without them.

Exact. Only the extent after the Concat is decided by the data: what is an If for each bit of the number
of elements in each group is one for each bit of their sum (see `data_extent`).

Needs: the main graph; scores along one axis of known extent, above a threshold; nothing but such TopK,
Gather and Concat that reads what is selected, or its extent.
Keeps: names of y and z.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.data_extent import MOST_ELEMENTS, first, partition, total
from optc.passes.dimension import minimum
from optc.passes.graph import reads
from optc.passes.match import made_by
from optc.passes.replacement import Replacement

OPSET = 13
"""From this version on all operators used here are as they are written here."""

EXTENTS = frozenset({"Cast", "Concat", "Gather", "Identity", "Min", "ReduceMin", "Reshape"}) | {
    *("Shape", "Slice", "Squeeze", "Unsqueeze")
}
"""Operators by which exporters compute how many of what is selected are looked at."""


class SelectAfterConcat(Pass):
    """Choose the best of each group with a fixed number of places; leave out the empty ones at the end."""

    name = "select-after-concat"
    group = "legalise"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Put the selections of ``graph`` that end in one Concat together."""
        report = Report()
        roots = facts.nodes("NonZero")
        if len(roots) < 2 or facts.in_body:
            return report
        walk = _Walk(facts)
        for node in roots:
            walk.start(node)
        for node in graph.nodes:
            walk.visit(node)
        concats = walk.concats()
        if not concats or not facts.reach_opset(OPSET):
            return report
        _rewrite(graph, facts, report, concats)
        return report


@dataclass(eq=False, slots=True)
class _Group:
    """What one NonZero selects.

    Attributes:
        node: The NonZero.
        scores: What is above a threshold where the NonZero finds it.
        mask: Where that is.
        count: The number of scores.
        best: The TopK among those selected, and how many it may return; None before it is met.
        is_plain: Whether all that reads what is selected is known.
    """

    node: gs.Node
    scores: gs.Tensor
    mask: gs.Tensor
    count: int
    best: tuple[gs.Node, int] | None = None
    is_plain: bool = True


@dataclass(frozen=True, slots=True)
class _Value:
    """What a tensor is: of which group, and a kind.

    Kinds: ``grid``, ``column`` or ``index`` of what is selected; ``picked`` from ``source`` by it;
    ``extent`` of one of them; ``rank`` of the best among those picked; ``best`` of ``source``.
    """

    group: _Group
    kind: str
    source: gs.Tensor | np.generic | None = None


class _Walk:
    """One walk over a graph, in order, from all NonZero nodes to the Concats."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.values: dict[int, _Value] = {}
        self.ends: list[tuple[gs.Node, list[_Value]]] = []

    def start(self, node: gs.Node) -> None:
        """Begin with a NonZero that finds scores above a threshold."""
        greater = made_by(node.inputs[0], "Greater")
        dims = self.facts.shapes.dims(node.inputs[0].name)
        if greater is None or dims is None or len(dims) != 1 or not isinstance(dims[0], int):
            return
        scores = greater.inputs[0]
        if self.facts.shapes.dims(scores.name) == dims and _is_float(scores, self.facts):
            group = _Group(node, scores, node.inputs[0], dims[0])
            self.values[id(node.outputs[0])] = _Value(group, "grid")

    def visit(self, node: gs.Node) -> None:
        """Say what ``node`` makes of what it reads."""
        known = [self.values[id(t)] for t in reads(node) if id(t) in self.values]
        if not known:
            return
        if self.is_end(node, known):
            self.ends.append((node, known))
            return
        group = known[0].group
        made = None
        if not node.domain and all(value.group is group for value in known):
            made = self.made(node, group, [self.values.get(id(t)) for t in node.inputs])
        kept = any(self.facts.is_kept(tensor) for tensor in node.outputs)
        if made is None or kept:
            for value in known:
                value.group.is_plain = False
            return
        for tensor, value in zip(node.outputs, made, strict=False):
            self.values[id(tensor)] = value

    def is_end(self, node: gs.Node, known: list[_Value]) -> bool:
        """Whether ``node`` puts the best of several groups together, and nothing else."""
        return (
            node.op == "Concat"
            and not node.domain
            and node.attrs["axis"] == 0
            and len(known) == len(node.inputs)
            and all(value.kind == "best" for value in known)
        )

    def made(
        self, node: gs.Node, group: _Group, values: list[_Value | None]
    ) -> list[_Value] | None:
        """Return what ``node`` makes, None where it is no part of the pattern."""
        kinds = tuple("" if value is None else value.kind for value in values)
        dims = self.facts.shapes.dims(node.outputs[0].name)
        if node.op in EXTENTS and (node.op == "Shape" or set(kinds) <= {"extent", ""}):
            return [_Value(group, "extent")]
        match node.op, kinds:
            case "Transpose", ("grid",):
                return [_Value(group, "column")]
            case "Squeeze", ("column", *_) if dims is not None and len(dims) == 1:
                return [_Value(group, "index")]
            case ("GatherND", ("", "column")) | ("Gather", ("", "index")):
                if self.is_row_of(node, group):
                    return [_Value(group, "picked", node.inputs[0])]
            case "Gather", ("picked", "rank") if not node.attrs.get("axis", 0):
                return [_Value(group, "best", values[0].source)]  # type: ignore[union-attr]
            case "TopK", ("picked", "extent") if self.is_best(node, group, values[0]):
                return [_Value(group, "best"), _Value(group, "rank")]
            case "ConstantOfShape", ("extent",) if group.best is not None:
                best = self.facts.shapes.dims(group.best[0].outputs[0].name)
                value = node.attrs.get("value")
                fill = np.float32(0) if value is None else value.values.reshape(-1)[0]
                return [_Value(group, "best", fill)] if dims == best else None
        return None

    def is_row_of(self, node: gs.Node, group: _Group) -> bool:
        """Whether ``node`` takes rows of a tensor that has one for each score."""
        dims = self.facts.shapes.dims(node.inputs[0].name)
        plain = not node.attrs.get("axis", 0) and not node.attrs.get("batch_dims", 0)
        return plain and bool(dims) and dims is not None and dims[0] == group.count

    def is_best(self, node: gs.Node, group: _Group, picked: _Value | None) -> bool:
        """Whether a TopK takes the best of the scores, all of them or a number that is known."""
        assert picked is not None, "the caller matched it"
        dims = [self.facts.shapes.dims(t.name) for t in (node.inputs[0], node.outputs[0])]
        if picked.source is not group.scores or group.best is not None or None in dims:
            return False
        if not node.attrs.get("largest", 1) or not node.attrs.get("sorted", 1):
            return False
        [(before,), (after,)] = dims  # type: ignore[misc]
        places = self.facts.shapes.interval(after)[1]
        if not places <= group.count or after != minimum(before, int(places)):
            return False
        group.best = node, int(places)
        return True

    def concats(self) -> dict[tuple[_Group, ...], list[tuple[gs.Node, list[_Value]]]]:
        """Return the Concats by the groups that they put together, where these are all known."""
        while True:
            mixed = [
                value.group
                for _, values in self.ends
                if not all(value.group.is_plain for value in values)
                for value in values
                if value.group.is_plain
            ]
            if not mixed:
                break
            for group in mixed:
                group.is_plain = False
        found = defaultdict(list)
        for node, values in self.ends:
            groups = tuple(value.group for value in values)
            if all(group.is_plain and group.best is not None for group in groups):
                found[groups].append((node, values))
        return {
            groups: nodes
            for groups, nodes in found.items()
            if len(groups) > 1 and sum(map(_places, groups)) <= MOST_ELEMENTS
        }


def _places(group: _Group) -> int:
    assert group.best is not None, "concats() lets no other group through"
    return group.best[1]


def _is_float(tensor: gs.Tensor, facts: Facts) -> bool:
    dtype = facts.shapes.dtype(tensor.name)
    return dtype is not None and np.dtype(dtype).kind == "f"


def _rewrite(
    graph: gs.Graph,
    facts: Facts,
    report: Report,
    concats: dict[tuple[_Group, ...], list[tuple[gs.Node, list[_Value]]]],
) -> None:
    best: dict[int, tuple[gs.Tensor, gs.Tensor]] = {}  # by id of the group
    for group in {id(g): g for groups in concats for g in groups}.values():
        new = Replacement(graph, facts, group.node)
        best[id(group)] = _best(new, group)
        new.finish(report, {})
    for groups, nodes in concats.items():
        selection: gs.Tensor | None = None
        for node, values in nodes:
            new = Replacement(graph, facts, node)
            if selection is None:
                selection = _selection(new, groups, [best[id(group)][0] for group in groups])
            parts = [_part(new, value, *best[id(value.group)]) for value in values]
            new.finish(report, new.add("Gather", new.add("Concat", *parts, axis=0), selection))


def _best(new: Replacement, group: _Group) -> tuple[gs.Tensor, gs.Tensor]:
    """Return the best scores and where they stand; behind them as many as are left over."""
    dtype = new.facts.shapes.dtype(group.scores.name)
    lowest = np.array(-np.inf, dtype)
    scores = new.add("Where", group.mask, group.scores, lowest)
    places = np.array([_places(group)], np.int64)
    found, where = new.add_with(2, "TopK", scores, places, axis=0)
    return found, where


def _selection(
    new: Replacement, groups: Sequence[_Group], scores: Sequence[gs.Tensor]
) -> gs.Tensor:
    """Return the indices of places that are not left over."""
    dtype = new.facts.shapes.dtype(groups[0].scores.name)
    joined = new.add("Concat", *scores, axis=0)
    taken = new.add("Greater", joined, np.array(-np.inf, dtype))
    count = total(new, new.cast(taken, np.int64))
    return first(new, partition(new, taken), count, sum(map(_places, groups)))


def _part(new: Replacement, value: _Value, scores: gs.Tensor, where: gs.Tensor) -> gs.Tensor:
    """Return what ``value`` is, with places left over."""
    if value.source is None:
        return scores
    if isinstance(value.source, gs.Tensor):
        return new.add("Gather", value.source, where, axis=0)
    return new.constant(np.full(_places(value.group), value.source))
