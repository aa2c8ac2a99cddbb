"""Searches the fewest nodes that must compute in more precision than asked for.

All candidates at their lowest are tried first; where that is exact enough, nothing is left to do.
Else the candidates are halved again and again, always where the cost is: a group alone in low
precision, all others high, tells what it costs. First by range (what overflows), then by operator,
then by place. Independent roundings add up as squares, so what a set of groups costs together is
known roughly before it is measured; the cheapest in operations for the most cost are kept, and what
is predicted is corrected by what is measured. In the end each kept node is tried in low precision
once more, unless it was seen to break the tolerance alone.

Several levels are one question after another: which nodes need fp32 where the rest is in fp16, then
which of the rest may be in int8.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optc.optimizer.noise import FACTOR
from optc.optimizer.precision_look import Looks
from optc.optimizer.precision_measure import (
    FREE,
    Cost,
    Ended,
    Journal,
    Judge,
    Measurements,
    Runs,
    Sample,
)
from optc.optimizer.progress import Progress, Silent
from optc.passes.precision import LARGEST, NodePrecision
from optc.specs.compile_spec import SearchLimits

ENOUGH_SPLIT = 0.7
"""Share of the limits after which groups are not split any more: the rest is for trying them."""

RUNS_TO_TRY = 60
"""Runs that are left for trying where no group breaks the tolerance alone: where demands see errors
in steps, what groups cost alone says little, and trying says more."""

CURVE_SHARES = (0.25, 0.5, 0.75)
"""Shares of the operations in low precision that the trade-off is measured at, besides 0, 1 and
that of what is chosen."""

NOTHING = 0.05
"""Part of a group's cost: where one half has no more, the other is taken to have all of it."""

FAINT = 0.01
"""What a cost that the demands do not see counts: it decides only where theirs are alike."""

BITS: Mapping[NodePrecision, int] = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "fp8": 8}

DIGITS: Mapping[NodePrecision, int] = {"fp16": 10, "bf16": 7}
"""Float -> binary digits after the first."""

SMALLEST: Mapping[NodePrecision, float] = {"fp16": 2.0**-14, "bf16": 2.0**-126}
"""Float -> its smallest number with all digits."""

Levels = bytes
"""One byte a candidate: which of its precisions it has, 0 for the lowest."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node whose precision is searched.

    Attributes:
        name: Its name.
        op: Its operator.
        flops: Its operations.
        levels: The precisions it may have, the lowest first; where it is one, it stays.
        inputs: Names of the tensors that it reads in low precision, those that are no constants.
        outputs: Names of the tensors that it makes in low precision.
    """

    name: str
    op: str
    flops: float
    levels: tuple[NodePrecision, ...]
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Problem:
    """What is searched.

    Attributes:
        runs: The model.
        samples: What it runs on, at least one.
        judge: Says how the outputs measure up.
        candidates: The nodes that are not in fp32 for good, in topological order.
        other_flops: Operations of all other nodes.
    """

    runs: Runs[Any]
    samples: Sequence[Sample]
    judge: Judge
    candidates: Sequence[Candidate]
    other_flops: float = 0.0


@dataclass(frozen=True, slots=True)
class Ranked:
    """What the precision of one node costs.

    Attributes:
        node: Its name.
        op: Its operator.
        precision: What it computes in.
        lowest: The least that it could compute in.
        cost: What its lowest precision alone takes of the tolerance; 1 is all of it.
        measured: Whether the node was measured alone; else the cost is its part in that of a group.
        flops_share: Its part of the operations.
        why: The same in words, and why it is kept where it is.
    """

    node: str
    op: str
    precision: NodePrecision
    lowest: NodePrecision
    cost: float
    measured: bool
    flops_share: float
    why: str

    @property
    def kept(self) -> bool:
        """Whether it computes in more than its lowest."""
        return self.precision != self.lowest


@dataclass(frozen=True, slots=True)
class Point:
    """One point of the trade-off.

    Attributes:
        share: Part of the operations in the lowest precision.
        badness: The error as a multiple of what is allowed.
        kept: How many nodes are kept.
        chosen: Whether it is what was chosen.
    """

    share: float
    badness: float
    kept: int
    chosen: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found.

    Attributes:
        nodes: Each candidate -> its precision.
        ranking: What the nodes cost, the costliest first.
        curve: The trade-off between operations in low precision and error, by share.
        curve_sample: Name of the sample that the curve was measured on; of all samples the worst.
        share: Part of the operations in the lowest precision.
        lowest: Error of all at the lowest, as a multiple of what is allowed; None where the search
            was ended before that was known.
        badness: That of what was chosen.
        met: Whether what was chosen is exact enough, or as exact as the model is in fp32.
        complete: Whether no limit ended the search.
        reason: Why it is not met or not complete, or what else is to be known; else empty.
        runs: Runs of the model, each on all samples.
        reused: Runs on one sample that the journal had.
        seconds: How long it took.
        samples: Number of samples.
        margin: Share of the tolerance that might be used up.
    """

    nodes: Mapping[str, NodePrecision]
    ranking: tuple[Ranked, ...]
    curve: tuple[Point, ...]
    curve_sample: str
    share: float
    lowest: float | None
    badness: float
    met: bool
    complete: bool
    reason: str
    runs: float
    reused: int
    seconds: float
    samples: int
    margin: float

    @property
    def kept(self) -> tuple[Ranked, ...]:
        """The nodes that are kept in more than their lowest precision."""
        return tuple(ranked for ranked in self.ranking if ranked.kept)


def search(
    problem: Problem,
    limits: SearchLimits,
    progress: Progress | None = None,
    *,
    journal: Journal | None = None,
    clock: Callable[[], float] = time.monotonic,
    memory_mib: int = 2048,
) -> Found:
    """Return the precision of each candidate: as low as the demands allow.

    The same problem gives the same answer, unless the time was too short: then it is the best that
    was measured to be exact enough, in the worst case everything at its highest.

    Args:
        problem: What is searched.
        limits: How long.
        progress: Is told of each run.
        journal: What was measured before, and takes down what is measured now.
        clock: Seconds since some time in the past.
        memory_mib: What may be held of runs in fp32.
    """
    measurements = Measurements(
        problem.runs,
        problem.samples,
        problem.judge,
        limits,
        journal=journal,
        progress=progress or Silent(),
        clock=clock,
        memory_mib=memory_mib,
    )
    return _Search(problem, limits, measurements).found()


@dataclass(slots=True)
class _Group:
    """Candidates that are measured together, alone in low precision.

    Attributes:
        nodes: Indices, in the order in which they are split.
        cost: What they cost.
        weight: ``cost`` as one number.
        parts: Each of them -> its part in the cost, once it was asked for.
    """

    nodes: tuple[int, ...]
    cost: Cost
    weight: float
    parts: dict[int, float] | None = None


class _Search:
    def __init__(
        self, problem: Problem, limits: SearchLimits, measurements: Measurements[Any]
    ) -> None:
        self.samples = problem.samples
        self.candidates = problem.candidates
        self.margin = self.limit = limits.margin
        self.measurements = measurements
        self.top: Levels = bytes(len(c.levels) - 1 for c in self.candidates)
        self.bottom: Levels = bytes(len(self.candidates))
        self.flops = sum(c.flops for c in self.candidates) + problem.other_flops
        self.bits = min((BITS[c.levels[0]] for c in self.candidates), default=0)
        # Keeping a node costs its operations, and the Casts around it, however few they are.
        few = 1.0 / max(1, len(self.candidates))
        self.price = [c.flops / (self.flops or 1.0) + few for c in self.candidates]
        self.looks = Looks(t for c in self.candidates for t in (*c.inputs, *c.outputs))
        self.alone: dict[tuple[int, int], Cost] = {}  # candidate, level -> cost of it alone
        self.together: dict[tuple[int, int], _Group] = {}  # the same -> smallest group with it
        self.full: dict[Levels, tuple[Cost, int]] = {}  # measured on all samples; the worst of them
        self.possible = True
        self.reasons: list[str] = []
        self.lowest: Cost | None = None
        self.hot = 0  # the sample that is the worst with all at the lowest

    # --- the way through it ----------------------------------------------------------------------

    def found(self) -> Found:
        complete = True
        try:
            self._hold_against_what_is_possible()
            chosen = self._lowered()
        except Ended:
            complete, chosen = False, self._best()
            self.reasons.append(
                "a limit ended the search: what is chosen is the best that was measured"
            )
        badness = self.full[chosen][0].badness if chosen in self.full else 0.0
        return Found(
            nodes=self._nodes(chosen),
            ranking=self._ranking(chosen),
            curve=self._curve(chosen),
            curve_sample=self.samples[self.hot].name,
            share=self._share(chosen),
            lowest=None if self.lowest is None else self.lowest.badness,
            badness=badness,
            met=self.possible and badness <= max(1.0, self.limit),
            complete=complete,
            reason="; ".join(self.reasons),
            runs=self.measurements.runs,
            reused=self.measurements.reused,
            seconds=self.measurements.seconds,
            samples=len(self.samples),
            margin=self.margin,
        )

    def _hold_against_what_is_possible(self) -> None:
        """Where the demands are not met with all at their highest, demand no more than that.

        What is searched shall at least not become much worse.
        """
        nodes = self._nodes(self.top)
        fixed = any(precision != "fp32" for precision in nodes.values())
        if not fixed and all(sample.expected is None for sample in self.samples):
            self.full[self.top] = FREE, 0
            return
        cost, _ = self._measure(self.top)
        if cost.badness <= self.limit:
            return
        self.possible = False
        self.measurements.hold_against(nodes)
        self.full = {self.top: (FREE, 0)}
        what = "what is set by hand" if fixed else "the model in fp32"
        self.reasons.append(
            f"{what} alone {_words(cost)}, and what is searched is held against that instead"
        )

    def _lowered(self) -> Levels:
        """Return the candidates as low as the demands allow."""
        if self.bottom == self.top:
            return self.top
        self.measurements.look(0, self.looks, self._nodes(self.bottom))
        self.lowest, self.hot = self._measure(self.bottom)
        state, deepest = self.top, max(self.top)
        if self.lowest.badness <= self.limit:
            # Of candidates with fewer levels little is known: they have little to do with it.
            lowest = [i for i, top in enumerate(self.top) if top == deepest]
            above = bytes(min(top, 1) for top in self.top)
            self._note(_Group(tuple(lowest), self.lowest, self.lowest.badness), above)
            return self.bottom
        self._allow_for_noise()
        if self.lowest.badness <= self.limit:
            return self.bottom
        for depth in range(1, deepest + 1):
            moves = [i for i, top in enumerate(self.top) if top >= depth == top - state[i] + 1]
            # Squares add up: half of the tolerance leaves three quarters for what comes below.
            limit = self.limit if depth == deepest else self.limit / 2
            state = self._lower(state, moves, limit)
        if deepest > 1:
            state = self._given_back(state, range(len(state)), self.limit)
        return state

    def _allow_for_noise(self) -> None:
        """Raise the limit to what cannot be told from the noise of the model in fp32.

        Where the demands are finer than that any node breaks them, and to keep them all would be no
        use: the GPU's own fp32 does not meet them either.
        """
        noise = self.measurements.noise(self.hot)
        if self.limit < FACTOR * noise.badness < math.inf:
            self.limit = FACTOR * noise.badness
            self.reasons.append(
                f"inputs moved by one unit in their last place {_words(noise, 'cost')} in fp32, and "
                f"{FACTOR} times as much is taken for noise"
            )

    def _lower(self, base: Levels, moves: Sequence[int], limit: float) -> Levels:
        """Return ``base`` with as many of ``moves`` one level lower as the demands allow."""
        low = set(moves)
        while low:
            cost, sample = self._measure(_down(base, low), enough=limit)
            self._note(_Group(tuple(sorted(low)), cost, cost.badness), base)
            if cost.badness <= limit:
                break
            low -= self._culprits(base, sorted(low), sample, limit)
        return self._given_back(_down(base, low), [i for i in moves if i not in low], limit)

    def _given_back(self, state: Levels, nodes: Iterable[int], limit: float) -> Levels:
        """Return ``state`` with as many of ``nodes`` one level lower as the demands allow.

        Left out are those that were seen to break them alone.
        """
        left = [
            i
            for i in nodes
            if state[i] and self.alone.get((i, state[i] - 1), FREE).badness <= limit
        ]
        left.sort(key=lambda i: (self._value_of(i, state[i] - 1), i))
        open_ = [left] if left else []
        while open_:  # a stack: the half that costs less first
            part = open_.pop()
            lower = _down(state, part)
            cost, _ = self._measure(lower, enough=limit)
            if cost.badness <= limit:
                state = lower
            elif len(part) > 1:
                middle = len(part) // 2
                open_ += [part[middle:], part[:middle]]
        return state

    def _best(self) -> Levels:
        """Return the lowest that was measured to be exact enough."""

        def gain(state: Levels) -> float:
            levels = zip(self.price, self.top, state, strict=True)
            return sum(price * (top - level) for price, top, level in levels)

        within = [state for state, (cost, _) in self.full.items() if cost.badness <= self.limit]
        if not any(state != self.top for state in within):
            within += [state for state, (cost, _) in self.full.items() if cost.badness <= 1]
        return max(within, key=lambda state: (gain(state), state), default=self.top)

    # --- finding what costs ----------------------------------------------------------------------

    def _culprits(self, base: Levels, low: Sequence[int], sample: int, limit: float) -> set[int]:
        """Return those of ``low`` that must not be one level lower than in ``base`` on a sample."""
        self.measurements.look(sample, self.looks)
        whole = self._cost(sample, _down(base, low))
        groups = [_Group(self._order(low), whole, whole.badness)]
        while open_ := [g for g in groups if g.weight > limit and len(g.nodes) > 1]:
            if self.measurements.used >= ENOUGH_SPLIT:
                break
            self._split(groups, max(open_, key=self._priority), base, sample, whole)
        kept = [g for g in groups if g.weight > limit]
        factor = 0.0  # what is measured is this multiple of what is predicted
        while True:
            wide = [g for g in kept if len(g.nodes) > 1]
            if factor and wide and self.measurements.runs_left > RUNS_TO_TRY:
                self._split(groups, max(wide, key=self._priority), base, sample, whole)
                kept = self._chosen(groups, factor, limit)
                continue
            rest = [g for g in groups if not any(g is k for k in kept)]
            cost = self._cost(sample, _down(base, (i for g in rest for i in g.nodes)))
            if cost.badness <= limit or not rest:
                return {i for g in kept for i in g.nodes}
            predicted = math.sqrt(sum(g.weight**2 for g in rest))
            if not predicted:
                return set(low)  # nothing tells them apart
            if math.isfinite(cost.badness):
                factor = max(cost.badness / predicted, 1.1 * factor)
            else:  # together they overflow
                factor = max(limit / predicted, 2 * factor)
            kept = self._chosen(groups, factor, limit)

    def _chosen(self, groups: Sequence[_Group], factor: float, limit: float) -> list[_Group]:
        """Return the groups to keep so that the others should stay within ``limit``."""
        kept = [group for group in groups if group.weight > limit]
        others = [group for group in groups if group.weight <= limit]
        left = 0.0
        for group in sorted(others, key=self._value):
            left += group.weight**2
            if factor**2 * left > limit**2:
                kept.append(group)
        return kept

    def _split(
        self, groups: list[_Group], group: _Group, base: Levels, sample: int, whole: Cost
    ) -> None:
        """Put the parts of ``group`` in its place, each measured alone."""
        *others, last = self._parts(group.nodes)
        parts = [self._measured(nodes, base, sample, whole) for nodes in others]
        little = min(NOTHING * group.weight, sys.float_info.max)
        if len(last) > 1 and all(part.weight <= little for part in parts):
            parts.append(_Group(last, group.cost, group.weight))  # it is what is left
        else:
            parts.append(self._measured(last, base, sample, whole))
        place = next(k for k, each in enumerate(groups) if each is group)
        groups[place : place + 1] = parts
        for part in parts:
            self._note(part, base)

    def _note(self, group: _Group, base: Levels) -> None:
        """Remember what is known of the candidates of a group one level below ``base``."""
        for i in group.nodes:
            key = i, base[i] - 1
            known = self.together.get(key)
            if known is None or len(group.nodes) < len(known.nodes):
                self.together[key] = group
            if len(group.nodes) == 1:
                before = self.alone.get(key, FREE)
                self.alone[key] = max(before, group.cost, key=lambda cost: cost.order)

    def _measured(self, nodes: tuple[int, ...], base: Levels, sample: int, whole: Cost) -> _Group:
        """Return what candidates cost one level below ``base``, all others at their highest."""
        lower = bytearray(self.top)
        for i in nodes:
            lower[i] = base[i] - 1
        cost = self._cost(sample, bytes(lower))
        return _Group(nodes, cost, _weight(cost, whole))

    def _priority(self, group: _Group) -> tuple[float, int]:
        """Return what to split first: where most may be given back."""
        return sum(self.price[i] for i in group.nodes), -group.nodes[0]

    def _value(self, group: _Group) -> tuple[float, int]:
        """Return how much error it saves to keep a group, for its price."""
        return group.weight**2 / sum(self.price[i] for i in group.nodes), -group.nodes[0]

    def _order(self, nodes: Sequence[int]) -> tuple[int, ...]:
        """Return ``nodes`` as they are split: what overflows, then cheap operators to dear ones."""
        flops: dict[str, list[float]] = {}
        for i in nodes:
            flops.setdefault(self.candidates[i].op, []).append(self.candidates[i].flops)
        mean = {op: sum(each) / len(each) for op, each in flops.items()}

        def key(i: int) -> tuple[bool, float, str, int]:
            op = self.candidates[i].op
            return not self._overflows(i), mean[op], op, i

        return tuple(sorted(nodes, key=key))

    def _parts(self, nodes: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return the parts that a group is split into.

        What overflows is parted from the rest, and then one from the other: nearly each of them will
        cost all there is. Else a group is halved, between operators where it has several.
        """
        ends = sum(self._overflows(i) for i in nodes)
        if ends == len(nodes) and len(nodes) / len(self.samples) < self.measurements.runs_left / 4:
            return [(i,) for i in nodes]
        if 0 < ends < len(nodes):
            return [nodes[:ends], nodes[ends:]]
        ops = [self.candidates[i].op for i in nodes]
        bounds = [k for k in range(1, len(nodes)) if ops[k] != ops[k - 1]]
        middle = min(bounds or range(1, len(nodes)), key=lambda k: abs(2 * k - len(nodes)))
        return [nodes[:middle], nodes[middle:]]

    # --- measuring -------------------------------------------------------------------------------

    def _nodes(self, state: Levels) -> dict[str, NodePrecision]:
        both = zip(self.candidates, state, strict=True)
        return {candidate.name: candidate.levels[level] for candidate, level in both}

    def _cost(self, sample: int, state: Levels) -> Cost:
        return self.measurements.cost(sample, self._nodes(state))

    def _measure(self, state: Levels, *, enough: float = math.inf) -> tuple[Cost, int]:
        """Return the highest cost on any sample, and on which; above ``enough`` the first such."""
        if state in self.full:
            return self.full[state]
        cost, sample = self.measurements.worst(self._nodes(state), enough=enough)
        if cost.badness <= enough:
            self.full[state] = cost, sample
        return cost, sample

    def _overflows(self, i: int) -> bool:
        """Whether a low float cannot hold what a candidate reads or makes."""
        floats = [LARGEST[level] for level in self.candidates[i].levels if level in DIGITS]
        largest = self._largest(i)
        return largest is not None and largest[1] > min(floats, default=math.inf)

    def _largest(self, i: int) -> tuple[str, float] | None:
        """Return the tensor of a candidate that gets the largest, and its magnitude."""
        return self.looks.most((*self.candidates[i].inputs, *self.candidates[i].outputs))

    # --- what is told of it ----------------------------------------------------------------------

    def _weight_of(self, i: int, level: int) -> float:
        """Return what a candidate costs at a level, as well as it is known."""
        if (cost := self.alone.get((i, level))) is not None:
            return cost.badness
        group = self.together.get((i, level))
        return self._part_in(group, i) if group else 0.0

    def _part_in(self, group: _Group, i: int) -> float:
        """Return a candidate's part in the cost of a group, estimated by where error comes up."""
        if group.parts is None:
            grown = [self._grown(k) for k in group.nodes]
            squares = sum(each**2 for each in grown)
            if not math.isfinite(squares):
                parts = [group.weight if math.isinf(each) else 0.0 for each in grown]
            elif squares:
                parts = [group.weight * each / math.sqrt(squares) for each in grown]
            else:
                parts = [group.weight / math.sqrt(len(grown))] * len(grown)
            group.parts = dict(zip(group.nodes, parts, strict=True))
        return group.parts[i]

    def _value_of(self, i: int, level: int) -> float:
        """Return how much error it saves not to have a candidate at a level, for its price."""
        return self._weight_of(i, level) ** 2 / self.price[i]

    def _grown(self, i: int) -> float:
        return self.looks.grown(self.candidates[i].inputs, self.candidates[i].outputs)

    def _share(self, state: Levels) -> float:
        """Return the part of the operations that is in the lowest precision of all."""
        low = (c.flops for i, c in enumerate(self.candidates) if self._is_lowest(i, state[i]))
        return sum(low) / self.flops if self.flops else 0.0

    def _is_lowest(self, i: int, level: int) -> bool:
        return BITS[self.candidates[i].levels[level]] == self.bits

    def _ranking(self, chosen: Levels) -> tuple[Ranked, ...]:
        ranked = [self._ranked(i, chosen[i]) for i, top in enumerate(self.top) if top]
        return tuple(sorted(ranked, key=lambda each: -each.cost))

    def _ranked(self, i: int, level: int) -> Ranked:
        candidate = self.candidates[i]
        asked = max(level - 1, 0)  # what was tried last
        alone = self.alone.get((i, asked))
        return Ranked(
            node=candidate.name,
            op=candidate.op,
            precision=candidate.levels[level],
            lowest=candidate.levels[0],
            cost=self._weight_of(i, asked),
            measured=alone is not None,
            flops_share=candidate.flops / self.flops if self.flops else 0.0,
            why=self._why(i, asked, kept=level > 0),
        )

    def _why(self, i: int, level: int, *, kept: bool) -> str:
        """Return in words what a candidate costs at a level, and why it is not there if it is not."""
        low = self.candidates[i].levels[level]
        words = []
        if low in DIGITS and (largest := self._largest(i)):
            name, most = largest
            if most > LARGEST[low]:
                words.append(f"`{name}` reaches {most:.3g}, {low} ends at {LARGEST[low]:.5g}")
            elif kept:
                step = 2.0 ** -DIGITS[low] * max(2.0 ** math.floor(math.log2(most)), SMALLEST[low])
                words.append(f"`{name}` reaches {most:.3g}, where {low} goes in steps of {step:g}")
        alone, group = self.alone.get((i, level)), self.together.get((i, level))
        if alone is not None:
            words.append(f"alone in {low} it {_words(alone)}")
            if kept and alone.badness <= self.limit:
                words[-1] += ", too much beside the others"
        elif group is not None:
            count = len(group.nodes)
            words.append(f"one of {count} that all together in {low} {_words(group.cost, 'cost')}")
        elif kept:
            words.append(f"not searched in {low}")
        return "; ".join(words)

    def _curve(self, chosen: Levels) -> tuple[Point, ...]:
        """Return the trade-off on the hardest sample, from all at the highest to all at the lowest.

        Up to what is chosen, nodes are lowered the cheapest first; then those that are kept are.
        """
        if self.lowest is None:
            return ()
        states = {self.top: None, **dict.fromkeys(self._between(chosen)), chosen: None}
        states[self.bottom] = None
        points = []
        for state in states:
            try:
                cost = self._cost(self.hot, state)
            except Ended:
                continue  # others were measured
            kept = sum(level > 0 for level in state)
            points.append(Point(self._share(state), cost.badness, kept, state == chosen))
        return tuple(sorted(points, key=lambda point: (point.share, -point.kept)))

    def _between(self, chosen: Levels) -> Iterator[Levels]:
        """Yield assignments from all at the highest over ``chosen`` to all at the lowest."""
        whole = self._share(self.bottom)
        wanted = list(CURVE_SHARES if chosen != self.bottom else CURVE_SHARES[1:2])
        state, share = bytearray(self.top), 0.0
        for goal in (chosen, self.bottom):
            moves = [i for i, level in enumerate(goal) if level < state[i]]
            for i in sorted(moves, key=lambda i: (self._value_of(i, goal[i]), i)):
                state[i] = goal[i]
                if self._is_lowest(i, goal[i]):
                    share += self.candidates[i].flops / (self.flops or 1.0)
                if wanted and share >= wanted[0] * whole:
                    wanted = [each for each in wanted if share < each * whole]
                    yield bytes(state)


def _down(state: Levels, nodes: Iterable[int]) -> Levels:
    """Return ``state`` with each of ``nodes`` one level lower."""
    lower = bytearray(state)
    for i in nodes:
        lower[i] -= 1
    return bytes(lower)


def _weight(cost: Cost, whole: Cost) -> float:
    """Return a cost as one number; where the demands see none, a little by what drifts."""
    if not math.isfinite(cost.badness) or not math.isfinite(cost.drift):
        return max(cost.badness, FAINT)
    if not whole.drift or not math.isfinite(whole.drift):
        return cost.badness
    return max(cost.badness, FAINT * min(cost.drift / whole.drift, 1.0))


def _words(cost: Cost, verb: str = "costs") -> str:
    """Return an error in words."""
    if not math.isfinite(cost.badness):
        return f"{verb} all: `{cost.output}` is no number any more"
    of = f"the tolerance of `{cost.output}`" if cost.output else "the tolerance"
    if cost.badness > 1:
        return f"{verb} {cost.badness:.3g} times {of}"
    return f"{verb} {100 * cost.badness:.2g} % of {of}"
