"""Explains a split: for each cut who refused what, and what crosses; and what to support first.

A *cut* is what lies between two engines that run after one another: the fallback stages there, or
a partition point. It is forced by those refused nodes of it that lie on a path with the most
engines: without them the engines on both sides of it could be one.

The *work list* says of each kind of refused node what the split would be without it. That is not
estimated: the split is made again, and what followed from it (an engine that does not pay, a size
that came from outside, an axis without a bound) is decided anew. What is assumed is that TensorRT
takes the node in the engine that it would be part of; only a build could tell.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from optc.optimizer.arrays import dtype_name
from optc.optimizer.partition import Off, Plan, Question, Refused, settled_stages
from optc.passes import registry
from optc.passes.graph import dataflow, op_name, reads
from optc.passes.split import REPLACED, Stage, crossings
from optc.specs.compile_spec import Passes, Range

if TYPE_CHECKING:
    from optc.optimizer.prepare import Prepared
    from optc.optimizer.record import Decided

MOST_SPLITS, FEWEST_SPLITS = 48, 8
NODES_SPLIT = 60_000
"""How often a graph is split for an explanation: `NODES_SPLIT` by its nodes, within these bounds."""

Kind = Literal["node", "point", "scope", "range"]


@dataclass(frozen=True, slots=True)
class Tally:
    """What a split comes to.

    Attributes:
        engines: How many engines; fallback_stages, how many other stages.
        bytes: What crosses between stages, each tensor at every boundary that it lives across, at
            the opt extents of the first profile.
        most_bytes: The same at the largest extents of any profile.
        unbounded: Tensors among them that no bound is known for; they count for nothing in both.
        flops_share: Share of the FLOPs in engines.
    """

    engines: int
    fallback_stages: int
    bytes: int
    most_bytes: int
    unbounded: int
    flops_share: float


@dataclass(frozen=True, slots=True)
class Refusal:
    """A node off TensorRT.

    Attributes:
        node: Its name in the optimised model.
        op: Its operator, with its domain before a ``::``.
        by: Who refused it.
        text: In whose words.
        follows: Whether it is off as a consequence of the split: TensorRT would take the node.
        origins: The nodes of the original model that it stands for.
    """

    node: str
    op: str
    by: str
    text: str
    follows: bool
    origins: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sent:
    """A tensor that crosses a cut.

    Attributes:
        tensor: Its name.
        dtype: Of its elements; None where it is not known.
        shape: Extents, or expressions over the symbols of the inputs; None where the rank is not
            known.
        bytes: At the opt extents of the first profile; None where nothing bounds an axis.
        most_bytes: At the largest extents of any profile; likewise.
    """

    tensor: str
    dtype: str | None
    shape: tuple[int | str, ...] | None
    bytes: int | None
    most_bytes: int | None


@dataclass(frozen=True, slots=True)
class Cut:
    """What lies between two engines that run after one another, or at an end of the model.

    Attributes:
        before: Id of the engine before it; None at the start of the model.
        after: Id of the engine after it; None at its end.
        stages: Ids of the fallback stages between; () where a point or a scope cuts.
        refused: The refused nodes that force it.
        others: How many nodes more are refused in these stages, without forcing it.
        points: The partition points at it, where there is no stage between.
        scopes: The scopes that end or begin at it, likewise.
        enters: What the stages between read that engines and stages before them make. Where there
            is none between: what crosses.
        leaves: What they make that stages after them read.
        passes: What crosses without being read in between.
        within: What passes between the stages between, and no further.
    """

    before: int | None
    after: int | None
    stages: tuple[int, ...]
    refused: tuple[Refusal, ...]
    others: int
    points: tuple[str, ...]
    scopes: tuple[str, ...]
    enters: tuple[Sent, ...]
    leaves: tuple[Sent, ...]
    passes: tuple[Sent, ...]
    within: tuple[Sent, ...]


@dataclass(frozen=True, slots=True)
class Alone:
    """What one of several nodes would save: ``then`` is what the split would come to without it."""

    node: str
    then: Tally


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that could be done about the cuts.

    Attributes:
        kind: Whether it is about refused nodes, a partition point, a scope, or an axis that lacks
            a range.
        what: The operator, the point, the scope, or the axis.
        by: Who refused it.
        text: In whose words; of several alike those of the first.
        nodes: The refused nodes, or those that are off for want of a range.
        then: What the split would come to; None where that was not looked at.
        alone: The nodes that save engines by themselves, where there are several.
        todo: What the user can do.
    """

    kind: Kind
    what: str
    by: str
    text: str
    nodes: tuple[str, ...]
    todo: str
    then: Tally | None = None
    alone: tuple[Alone, ...] = ()


@dataclass(frozen=True, slots=True)
class Together:
    """Things that save together what each alone does not.

    Attributes:
        items: Positions in the work list, from 0.
        then: What the split would come to.
    """

    items: tuple[int, ...]
    then: Tally


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why the stages of a target, or of several with the same, are what they are.

    Attributes:
        targets: Their names.
        now: What the split comes to.
        cuts: In running order.
        work: What could be done, what saves most first.
        all: What the split would come to if all of it were done; None where there is nothing.
        pair: The two that save stages together though neither does alone; None where there is no
            such pair among those looked at.
        splits: How many changes of the split that took.
        unseen: Nodes that force a cut alone and that were not looked at, as there are too many.
    """

    targets: tuple[str, ...]
    now: Tally
    cuts: tuple[Cut, ...]
    work: tuple[Item, ...]
    all: Tally | None = None
    pair: Together | None = None
    splits: int = 0
    unseen: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return it for programs; each item says what it ``saves`` beside what is ``then``."""
        document = asdict(self)
        entries = [*document["work"], document["pair"]]
        entries += [each for item in document["work"] for each in item["alone"]]
        for entry in entries:
            if entry is not None and entry["then"] is not None:
                entry["saves"] = saved(document["now"], entry["then"])
        return document


def saved(now: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is less in ``then`` than ``now``; of FLOPs in engines, what is more."""
    found = {key: now[key] - then[key] for key in now if key != "flops_share"}
    return {**found, "flops_share": round(then["flops_share"] - now["flops_share"], 6)}


def explanations(prepared: Prepared, decided: Decided) -> list[Explanation]:
    """Return why each target is split as it is; targets that are split alike share one."""
    alike: dict[tuple[Any, ...], list[Plan]] = {}
    for plan in decided.plans:
        key = (tuple(plan.stages), tuple(sorted((n, w.by, w.text) for n, w in plan.off.items())))
        alike.setdefault(key, []).append(plan)
    return [
        explain(
            prepared.question,
            plans[0],
            targets=tuple(plan.target.name for plan in plans),
            ids={stage: number for number, stage in enumerate(decided.stages)},
            origins=prepared.passes.origins,
            passes=prepared.checked.spec.passes,
        )
        for plans in alike.values()
    ]


def explain(
    question: Question,
    plan: Plan,
    *,
    targets: Sequence[str] = (),
    ids: Mapping[Stage, int] | None = None,
    origins: Mapping[str, Sequence[str]] | None = None,
    passes: Passes | None = None,
) -> Explanation:
    """Return why ``plan``, which is settled, has the stages that it has.

    Args:
        question: What it started from. It is left as it is.
        plan: What was decided.
        targets: Whom it holds for; by default the plan's.
        ids: Number of each stage; by default in running order.
        origins: Name of a node -> the nodes of the original that it stands for.
        passes: Which passes the spec lets run, for what to do.
    """
    ids = ids or {stage: number for number, stage in enumerate(plan.stages)}
    described = _Description(question, plan, ids, origins or {})
    cuts = tuple(described.cuts())
    now = _tally(question, plan.stages)
    names = tuple(targets) or (plan.target.name,)
    if not cuts:
        return Explanation(names, now, (), ())
    return _WorkList(question, plan, now, cuts, passes or Passes()).explanation(names)


def _following(question: Question, plan: Plan) -> Off:
    """Return what is off in ``plan`` as a consequence of how it is split."""
    return {
        name: why for name, why in plan.off.items() if why.by == "rule" and name not in question.off
    }


def _tally(question: Question, stages: Sequence[Stage]) -> Tally:
    engines = [stage for stage in stages if stage.runtime == "tensorrt"]
    usual = most = unbounded = 0
    for crossing in crossings(stages):
        known = question.bytes_of(crossing.tensor)
        largest = question.most_bytes_of(crossing.tensor)
        usual += (known or 0) * crossing.boundaries
        most += (largest or 0) * crossing.boundaries
        unbounded += largest is None
    share = sum(question.share(stage) for stage in engines)
    return Tally(len(engines), len(stages) - len(engines), usual, most, unbounded, round(share, 6))


# --- the cuts ------------------------------------------------------------------------------------


class _Description:
    """Says what lies between the engines of a plan."""

    def __init__(
        self,
        question: Question,
        plan: Plan,
        ids: Mapping[Stage, int],
        origins: Mapping[str, Sequence[str]],
    ) -> None:
        self._question = question
        self._plan = plan
        self._ids = ids
        self._origins = origins
        self._crossings = crossings(plan.stages)
        self._follows = _following(question, plan)

    def cuts(self) -> Iterator[Cut]:
        """Yield the cuts in running order."""
        stages = self._plan.stages
        engines = [n for n, stage in enumerate(stages) if stage.runtime == "tensorrt"]
        for left, right in itertools.pairwise([-1, *engines, len(stages)]):
            is_end = left < 0 or right == len(stages)
            if right - left > 1 or not is_end:
                yield self._cut(left, right)

    def _cut(self, left: int, right: int) -> Cut:
        """Return the cut between two engines, each given by its position."""
        stages = self._plan.stages
        between = stages[left + 1 : right]
        refused = [name for stage in between for name in stage.nodes if name in self._plan.off]
        longest = max((self._engines_along[name] for name in refused), default=0)
        forcing = [name for name in refused if self._engines_along[name] == longest]
        sides = [stages[n].name for n in (left, right) if 0 <= n < len(stages)]
        parts: dict[str, list[str]] = {"enters": [], "leaves": [], "passes": [], "within": []}
        for crossing in self._crossings:
            if crossing.maker >= right or crossing.readers[-1] <= left:
                continue
            made_before, read_after = crossing.maker <= left, crossing.readers[-1] >= right
            read_between = any(left < reader < right for reader in crossing.readers)
            if made_before:
                part = "enters" if read_between or not between else "passes"
            else:
                part = "leaves" if read_after else "within"
            parts[part].append(crossing.tensor)
        points = [name for name in parts["enters"] if name in self._question.points]
        return Cut(
            before=self._ids[stages[left]] if left >= 0 else None,
            after=self._ids[stages[right]] if right < len(stages) else None,
            stages=tuple(self._ids[stage] for stage in between),
            refused=tuple(self._refusal(name) for name in forcing),
            others=len(refused) - len(forcing),
            points=() if between else tuple(points),
            scopes=() if between else tuple(dict.fromkeys(name for name in sides if name)),
            **{part: self._sent(names) for part, names in parts.items()},
        )

    def _refusal(self, name: str) -> Refusal:
        why = self._plan.off[name]
        op = op_name(self._question.node(name))
        origins = tuple(self._origins.get(name, ()))
        return Refusal(name, op, why.by, why.text, name in self._follows, origins)

    def _sent(self, names: Iterable[str]) -> tuple[Sent, ...]:
        """Return the tensors ``names``, the largest first."""
        found = []
        for name in names:
            dims, dtype = self._question.shapes.dims(name), self._question.shapes.dtype(name)
            found.append(
                Sent(
                    tensor=name,
                    dtype=None if dtype is None else dtype_name(dtype),
                    shape=None
                    if dims is None
                    else tuple(dim if isinstance(dim, int) else str(dim) for dim in dims),
                    bytes=self._question.bytes_of(name),
                    most_bytes=self._question.most_bytes_of(name),
                )
            )
        return tuple(sorted(found, key=lambda sent: -(sent.bytes or 0)))

    @cached_property
    def _engines_along(self) -> dict[str, int]:
        """For each node off TensorRT, how many engines the worst path through it needs."""
        view = dataflow(self._question.graph)
        order = list(view)
        free = {name for stage in self._plan.stages for name in stage.free}
        on = {n for s in self._plan.stages if s.runtime == "tensorrt" for n in s.work}
        points = self._question.points
        edges = [(u, v, points.isdisjoint(names)) for u, v, names in view.edges(data="tensors")]
        up: dict[str, list[tuple[str, bool]]] = {name: [] for name in order}
        down: dict[str, list[tuple[str, bool]]] = {name: [] for name in order}
        for maker, reader, joined in edges:
            up[reader].append((maker, joined))
            down[maker].append((reader, joined))
        before = _engines_up_to(order, up, on, free)
        after = _engines_up_to(order[::-1], down, on, free)
        return {name: before[name] + after[name] for name in order if name not in on | free}


def _engines_up_to(
    order: Sequence[str],
    sources: Mapping[str, Sequence[tuple[str, bool]]],
    on: Collection[str],
    free: Collection[str],
) -> dict[str, int]:
    """Return how many engines a path needs that ends at a node, its own among them.

    Args:
        order: The nodes, each after its sources.
        sources: Node -> what it comes after, each with whether the two may be in one stage.
        on: Nodes on TensorRT.
        free: Nodes that every stage may repeat, and that so cut nothing.
    """
    # Each passes two numbers on: for readers that may join it in an engine, and for the others.
    passed: dict[str, tuple[int, int]] = {}
    found: dict[str, int] = {}
    for name in order:
        joining = apart = 0
        for source, joined in sources[name]:
            its_joining, its_apart = passed[source]
            joining = max(joining, its_joining if joined else 0)
            apart = max(apart, its_apart, 0 if joined else its_joining)
        found[name] = max(1, joining, apart + 1) if name in on else max(joining, apart)
        if name in free:
            passed[name] = (joining, apart)
        else:
            passed[name] = (found[name], 0) if name in on else (0, found[name])
    return found


# --- the work list -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Change:
    """What is done about a split: refused nodes that are taken, words of the spec that go."""

    nodes: frozenset[str] = frozenset()
    points: frozenset[str] = frozenset()
    scopes: frozenset[str] = frozenset()
    symbols: frozenset[str] = frozenset()

    def __or__(self, other: _Change) -> _Change:
        return _Change(
            self.nodes | other.nodes,
            self.points | other.points,
            self.scopes | other.scopes,
            self.symbols | other.symbols,
        )


@dataclass(slots=True)
class _Found:
    """An item of the work list and what it changes, while it is being looked at."""

    item: Item
    change: _Change


class _WorkList:
    """Splits again without what was refused."""

    def __init__(
        self,
        question: Question,
        plan: Plan,
        now: Tally,
        cuts: tuple[Cut, ...],
        passes: Passes,
    ) -> None:
        self._question = question
        self._plan = plan
        self._now = now
        self._cuts = cuts
        causes = [[each.node for each in cut.refused if not each.follows] for cut in cuts]
        self._forcing = frozenset(name for names in causes for name in names)
        # Where several force a cut, in series or side by side, none of them does away with it.
        self._forcing_alone = frozenset(names[0] for names in causes if len(names) == 1)
        self._passes = passes
        room = NODES_SPLIT // max(1, len(question.graph.nodes))
        self._left = max(FEWEST_SPLITS, min(MOST_SPLITS, room))
        self._done = 0
        self._unseen = 0
        self._follows = _following(question, plan)
        self._causes = {name: why for name, why in plan.off.items() if name not in self._follows}

    def explanation(self, targets: tuple[str, ...]) -> Explanation:
        """Return the whole, with the work list sorted by what is saved."""
        found = self._found()
        if not found:
            return Explanation(targets, self._now, self._cuts, ())
        self._keep_what_stays()
        every = _Change()
        for each in found:
            every |= each.change
        together = self._then(every)
        for each in found:
            if self._left > 0:
                then = together if len(found) == 1 else self._then(each.change)
                each.item = replace(each.item, then=then)
        found.sort(key=lambda each: self._rank(each.item.then))
        for each in found:
            each.item = replace(each.item, alone=self._alone(each.item))
        pair = self._pair(found)
        work = tuple(each.item for each in found)
        return Explanation(
            targets, self._now, self._cuts, work, together, pair, self._done, self._unseen
        )

    def _rank(self, then: Tally | None) -> tuple[float, ...]:
        """Return a key that sorts by what is saved, most first; what was not looked at comes last."""
        if then is None:
            return (1, 0, 0, 0, 0)
        now = self._now
        return (
            0,
            then.engines - now.engines,
            then.bytes - now.bytes,
            now.flops_share - then.flops_share,
            then.fallback_stages - now.fallback_stages,
        )

    # --- what there is to do

    def _found(self) -> list[_Found]:
        """Return what could be done; what forces a cut, and stands for most nodes, first."""
        groups: dict[tuple[str, ...], list[str]] = {}
        for name, why in self._causes.items():
            groups.setdefault(_likeness(op_name(self._question.node(name)), name, why), []).append(
                name
            )
        found = [self._of_nodes(names) for names in groups.values()]
        found.sort(
            key=lambda each: (
                self._forcing.isdisjoint(each.change.nodes),
                -len(each.change.nodes),
            )
        )
        return [*found, *self._ranges(), *self._words_of_the_spec()]

    def _of_nodes(self, names: Sequence[str]) -> _Found:
        why = self._causes[names[0]]
        ops = Counter(op_name(self._question.node(name)) for name in names)
        what = ", ".join(ops)
        item = Item("node", what, why.by, why.text, tuple(names), self._todo(names[0], why))
        return _Found(item, _Change(nodes=frozenset(names)))

    def _ranges(self) -> Iterator[_Found]:
        """Yield the axes that nothing bounds, of what nodes read that are off for that."""
        shapes, profiles = self._question.shapes, self._question.profiles
        readers: dict[str, list[str]] = {}
        for name in self._follows:
            symbols = {
                symbol
                for tensor in reads(self._question.node(name))
                for dim in shapes.dims(tensor.name) or ()
                for profile in profiles
                for symbol in shapes.unbounded_symbols(dim, profile)
            }
            for symbol in symbols:
                readers.setdefault(symbol, []).append(name)
        for symbol in sorted(readers):
            nodes = readers[symbol]
            text = f"nothing bounds `{symbol}`"
            todo = f"give `{symbol}` a range under `dims`"
            item = Item("range", symbol, "rule", text, tuple(nodes), todo)
            yield _Found(item, _Change(symbols=frozenset([symbol])))

    def _words_of_the_spec(self) -> Iterator[_Found]:
        for point in sorted(self._question.points):
            item = Item(
                "point", point, "spec", "partition.points", (), "take it out of `partition.points`"
            )
            yield _Found(item, _Change(points=frozenset([point])))
        for scope in self._question.scopes:
            item = Item(
                "scope", scope, "spec", "partition.scopes", (), "take it out of `partition.scopes`"
            )
            yield _Found(item, _Change(scopes=frozenset([scope])))

    def _todo(self, name: str, why: Refused) -> str:
        """Return what the user can do about a node that ``why`` keeps off TensorRT."""
        node = self._question.node(name)
        if node.domain == REPLACED:
            return "take it out of `partition.replace`, so that the nodes themselves are compiled"
        if name in self._question.runtimes:
            return "give its operator a TensorRT plugin: `tensorrt` under `operators`"
        if why.by == "spec":
            return "take it out of `partition.off_tensorrt`"
        if why.by == "rule":
            return "export it with other types or attributes"
        rewriter = f"decompose-{_kebab(str(node.op))}"
        known = rewriter if rewriter in registry.LEGALISING else None
        if not self._passes.legalise:
            by = f"`{known}` rewrites it" if known else "a pass may rewrite it"
            return f"take `legalise: false` out of `passes`: {by}"
        if known in self._passes.disable:
            return f"take `{known}` out of `passes.disable`: it rewrites such nodes"
        if node.domain:
            return "give it a TensorRT plugin under `operators`, or `partition.replace` it"
        return "change it before the export, or write a pass that rewrites it"

    # --- what it would save

    def _keep_what_stays(self) -> None:
        """Keep off what no longer follows from anything: nodes only ever move off."""
        again = Plan(self._plan.target, dict(self._causes))
        self._settled(self._question, again)
        self._causes |= {n: w for n, w in self._follows.items() if n not in again.off}

    def _then(self, change: _Change) -> Tally:
        """Return what the split comes to once ``change`` is made."""
        off = {name: why for name, why in self._causes.items() if name not in change.nodes}
        plan = Plan(self._plan.target, off)
        stages = self._settled(self._changed(change), plan)
        # Tensors are as large as they are: a range that is made up here says nothing of it.
        return _tally(self._question, stages)

    def _settled(self, question: Question, plan: Plan) -> list[Stage]:
        self._left -= 1
        self._done += 1
        return settled_stages(question, plan)

    def _changed(self, change: _Change) -> Question:
        question = self._question
        runtimes = {n: r for n, r in question.runtimes.items() if n not in change.nodes}
        if not (
            change.points
            or change.scopes
            or change.symbols
            or len(runtimes) < len(question.runtimes)
        ):
            return question
        given = dict.fromkeys(change.symbols, Range(min=1, opt=1, max=1))
        return replace(
            question,
            points=question.points - change.points,
            scopes={n: s for n, s in question.scopes.items() if n not in change.scopes},
            runtimes=runtimes,
            profiles=[{**given, **profile} for profile in question.profiles],
            _splitter=None,
        )

    def _alone(self, item: Item) -> tuple[Alone, ...]:
        """Return the nodes of ``item`` that save engines alone, of those that alone force a cut."""
        names = [name for name in item.nodes if name in self._forcing_alone]
        if len(item.nodes) < 2:
            return ()
        tried = names[: max(0, self._left)]
        self._unseen += len(names) - len(tried)
        found = [Alone(name, self._then(_Change(nodes=frozenset([name])))) for name in tried]
        saving = [alone for alone in found if alone.then.engines < self._now.engines]
        return tuple(sorted(saving, key=lambda alone: self._rank(alone.then)))

    def _pair(self, found: Sequence[_Found]) -> Together | None:
        """Return the best pair that saves stages, of those of which neither does alone."""
        idle = [
            number
            for number, each in enumerate(found)
            if each.item.then is not None and not self._saves_stages(each.item.then)
        ]
        best: Together | None = None
        for first, second in itertools.combinations(idle, 2):
            if self._left <= 0:
                break
            then = self._then(found[first].change | found[second].change)
            better = best is None or self._rank(then) < self._rank(best.then)
            if better and self._saves_stages(then):
                best = Together((first, second), then)
        return best

    def _saves_stages(self, then: Tally) -> bool:
        """Whether there are fewer engines, or as many and fewer other stages."""
        now = self._now
        return (then.engines, then.fallback_stages) < (now.engines, now.fallback_stages)


def _likeness(op: str, name: str, why: Refused) -> tuple[str, ...]:
    """Return what nodes have in common of which the same would have to be done."""
    if why.by == "spec":  # a line of the spec, whichever ops it names
        return (why.by, why.text)
    return (why.by, op, without_names(why.text.replace(name, "#")))


def without_names(text: str) -> str:
    """Return ``text`` without what differs between nodes that are alike: names and numbers.

    Example:
        >>> without_names("nothing bounds `n_1`: /a/b takes 63 us")
        'nothing bounds #: # takes # us'
    """
    words = re.sub(r"`[^`]*`|'[^']*'|\"[^\"]*\"|\S*/\S*|\d+(\.\d+)?", "#", text)
    return " ".join(words.split())


def _kebab(op: str) -> str:
    """Return the name of an op as passes are called.

    Example:
        >>> _kebab("NonMaxSuppression"), _kebab("DFT")
        ('non-max-suppression', 'dft')
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", op).lower()
