"""Puts what is to be split into levels: the fewest engines, and then the fewest bytes between stages.

Items are the parts that cannot be cut, in topological order: nodes, or nodes that stay together. Each
is *on* TensorRT or off it. A level has two slots, first that of its fallback stage, then that of its
engine: slot = 2 * level + [on]. Arcs say which levels are possible,

    level(reader) >= level(maker) + step,    step = 1 from on to off, and where a point cuts, else 0

so the earliest levels need as many engines as the worst path alternates, which any scheme does.
Within them many items may stand elsewhere. A tensor counts at every slot it lives across:

    cost = sum over tensors of bytes * (last slot of its readers - slot of its maker)

That is an L-natural-convex function of the levels (Murota, Discrete Convex Analysis, 2003): where no
set of items can move up by one level and make it cheaper, no other levels are cheaper. The best set to
move is the smallest maximum closure of a small network, a minimum cut. From the earliest levels such
moves lead to the lowest of all cheapest placements, which does not depend on the order of the items.
Last, a fallback stage that could as well run with the next one does.

A set moves as far at once as what it gains stays the same, and only the surroundings of what moved are
looked at again; so the time is near-linear. The result is exact where no more than `MOST_ITEMS` items
that can move hang together; the largest of the detectors that were tried has 67.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from optc.passes.minimum_cut import ENDLESS, Network

MOST_ITEMS = 1000
"""Movable items that hang together and are looked at as a whole. Of more, the best is found among
the moves within a few levels at a time, which may miss one of thousands of items at once."""

SOURCE, SINK = "source", "sink"

Item = int


@dataclass(frozen=True, slots=True)
class Arc:
    """That ``reader`` stands at least ``step`` levels above ``maker``, which has a lower number."""

    maker: Item
    reader: Item
    step: int


@dataclass(frozen=True, slots=True)
class Passed:
    """A tensor that may pass between stages: its maker, its readers, and what it weighs."""

    maker: Item
    readers: tuple[Item, ...]
    weight: int


def place(on: Sequence[bool], arcs: Iterable[Arc], tensors: Iterable[Passed]) -> list[int]:
    """Return the level of each item.

    Args:
        on: For each item, whether it is on TensorRT. Items are in topological order.
        arcs: What stands above what. Readers of tensors are above their makers by arcs, too.
        tensors: What costs where it passes between stages. Inputs of the model are not among them:
            they come from the caller, whoever reads them.
    """
    return _Placement(on, arcs, tensors).levels()


def cost(on: Sequence[bool], levels: Sequence[int], tensors: Iterable[Passed]) -> int:
    """Return the bytes that pass between stages, each at every slot that it lives across."""
    return sum(
        t.weight
        * (max(2 * levels[r] + on[r] for r in t.readers) - 2 * levels[t.maker] - on[t.maker])
        for t in tensors
        if t.readers
    )


class _Placement:
    def __init__(self, on: Sequence[bool], arcs: Iterable[Arc], tensors: Iterable[Passed]) -> None:
        self.on = on
        self.above: list[list[tuple[Item, int]]] = [[] for _ in on]
        self.below: list[list[tuple[Item, int]]] = [[] for _ in on]
        for arc in arcs:
            self.above[arc.maker].append((arc.reader, arc.step))
            self.below[arc.reader].append((arc.maker, arc.step))
        self.tensors = [tensor for tensor in tensors if tensor.readers and tensor.weight]
        self.made: list[list[int]] = [[] for _ in on]  # by the number of the tensor
        self.read: list[list[int]] = [[] for _ in on]
        for number, tensor in enumerate(self.tensors):
            self.made[tensor.maker].append(number)
            for reader in tensor.readers:
                self.read[reader].append(number)
        self.level = self._earliest()
        self.latest = self._latest()
        self._held: dict[Item, bool] = {}

    def _earliest(self) -> list[int]:
        levels: list[int] = []
        for below in self.below:
            levels.append(max((levels[maker] + step for maker, step in below), default=0))
        return levels

    def _latest(self) -> list[int]:
        """Return the highest levels that need no further engine."""
        engines = max(
            (level for level, on in zip(self.level, self.on, strict=True) if on), default=-1
        )
        latest = [engines if on else engines + 1 for on in self.on]
        for item in reversed(range(len(latest))):
            ends = [latest[reader] - step for reader, step in self.above[item]]
            latest[item] = min([latest[item], *ends])
        return latest

    def levels(self) -> list[int]:
        """Move items up until no move makes it cheaper, and return the levels."""
        waiting = [item for item, level in enumerate(self.level) if level < self.latest[item]]
        while waiting:
            self._held = {}
            moved: set[Item] = set()
            seen: set[Item] = set()
            for item in waiting:
                if item in seen or self._is_held(item):
                    continue
                region = self._region(item)
                seen |= region
                for window in self._windows(region):
                    moved |= self._move(self._best_move(window))
            waiting = sorted(self._around(moved))
        self._join_fallbacks()
        return self.level

    def _join_fallbacks(self) -> None:
        """Move what is off TensorRT to the next level that has such items, where it costs nothing.

        That is one stage less. What the caller alone feeds and reads may stand anywhere.
        """
        off: dict[int, list[Item]] = {}
        for item, on in enumerate(self.on):
            if not on:
                off.setdefault(self.level[item], []).append(item)
        order = sorted(off)
        for level, beyond in pairwise(order):
            group = set(off[level])
            numbers = {n for item in group for n in (*self.made[item], *self.read[item])}
            before = self._cost(numbers)
            for item in group:
                self.level[item] = beyond
            if self._cost(numbers) > before or not all(map(self._is_possible, group)):
                for item in group:
                    self.level[item] = level
            else:
                off[beyond] += off.pop(level)

    def _cost(self, numbers: Iterable[int]) -> int:
        return cost(self.on, self.level, (self.tensors[number] for number in numbers))

    def _is_possible(self, item: Item) -> bool:
        level = self.level
        return level[item] <= self.latest[item] and all(
            level[reader] >= level[item] + step for reader, step in self.above[item]
        )

    def _windows(self, region: set[Item]) -> Iterable[set[Item]]:
        """Yield ``region``; if it is large, what can move by itself within a few levels of it."""
        if len(region) <= MOST_ITEMS:
            yield region
            return
        by_level: dict[int, list[Item]] = {}
        for item in region:
            by_level.setdefault(self.level[item], []).append(item)
        bands: list[list[Item]] = []
        for level in sorted(by_level):
            if not bands or len(bands[-1]) >= MOST_ITEMS // 2:
                bands.append([])
            bands[-1] += by_level[level]
        for lower, upper in zip(bands, [*bands[1:], []], strict=True):
            window = {*lower, *upper}
            for item in sorted(window, reverse=True):  # readers first
                if any(reader not in window for reader in self._tight(item)):
                    window.discard(item)
            yield window

    def _move(self, moving: set[Item]) -> set[Item]:
        """Move each connected part of ``moving`` as far as it goes; return what moved."""
        parts = list(self._parts(moving))
        for part, far in [(part, self._how_far(part)) for part in parts]:
            for item in part:
                self.level[item] += far
        return moving

    def _slot(self, item: Item) -> int:
        return 2 * self.level[item] + self.on[item]

    # --- which items can move up by one, and which have to do it together ------------------------

    def _is_held(self, item: Item) -> bool:
        """Whether ``item``, or what would have to move with it, is at its latest level."""
        held = self._held
        path = [item]
        while path:
            at = path[-1]
            if at in held:
                path.pop()
                continue
            tight = self._tight(at)
            if self.level[at] >= self.latest[at] or any(held.get(reader) for reader in tight):
                held[at] = True
            elif unknown := [reader for reader in tight if reader not in held]:
                path += unknown
                continue
            else:
                held[at] = False
            path.pop()
        return held[item]

    def _tight(self, item: Item) -> list[Item]:
        """Return the items that have to move where ``item`` moves by one level."""
        level = self.level
        return [reader for reader, step in self.above[item] if level[reader] == level[item] + step]

    def _payers(self, number: int) -> tuple[list[Item], list[Item]]:
        """Return the readers that make a tensor live longer: by two slots, and by one."""
        slots = [(self._slot(reader), reader) for reader in self.tensors[number].readers]
        last = max(slots)[0]
        return (
            [reader for slot, reader in slots if slot == last],
            [reader for slot, reader in slots if slot == last - 1],
        )

    def _region(self, start: Item) -> set[Item]:
        """Return the items that can move and that share a tensor or a tight arc, from ``start`` on."""
        found = {start}
        queue = [start]
        while queue:
            item = queue.pop()
            for near in self._near(item):
                if near not in found and not self._is_held(near):
                    found.add(near)
                    queue.append(near)
        return found

    def _near(self, item: Item) -> Iterable[Item]:
        yield from self._tight(item)
        for maker, step in self.below[item]:
            if self.level[item] == self.level[maker] + step:
                yield maker
        for number in self.made[item]:
            by_two, by_one = self._payers(number)
            yield from (*by_two, *by_one)
        for number in self.read[item]:
            by_two, by_one = self._payers(number)
            if item in by_two or item in by_one:
                yield from (self.tensors[number].maker, *by_two, *by_one)

    # --- the best set to move --------------------------------------------------------------------

    def _best_move(self, region: set[Item]) -> set[Item]:
        """Return the smallest set of ``region`` whose move up by one level saves the most."""
        network = Network()
        gains: dict[Item, int] = {}
        numbers: set[int] = set()
        for item in region:
            gains[item] = sum(2 * self.tensors[number].weight for number in self.made[item])
            numbers.update(self.read[item])
            for reader in self._tight(item):
                network.add(item, reader, ENDLESS)
        for number in numbers:
            weight = self.tensors[number].weight
            by_two, by_one = self._payers(number)
            two = [reader for reader in by_two if reader in region]
            one = [*two, *(reader for reader in by_one if reader in region)]
            for slot, payers in enumerate((one, two)):
                if len(payers) == 1:  # it pays by itself
                    gains[payers[0]] -= weight
                elif payers:
                    network.add((number, slot), SINK, weight)
                    for reader in payers:
                        network.add(reader, (number, slot), ENDLESS)
        total = 0
        for item, gain in gains.items():
            if gain > 0:
                network.add(SOURCE, item, gain)
                total += gain
            elif gain < 0:
                network.add(item, SINK, -gain)
        if not total or network.sink_side(SOURCE, SINK, below=total) is None:
            return set()  # whatever moves costs as much as it gains
        return {item for item in network.in_reach([SOURCE]) if isinstance(item, int)}

    def _parts(self, moving: set[Item]) -> Iterable[set[Item]]:
        """Yield the connected parts of ``moving``."""
        left = set(moving)
        while left:
            part = {left.pop()}
            queue = list(part)
            while queue:
                item = queue.pop()
                for near in self._near(item):
                    if near in left:
                        left.discard(near)
                        part.add(near)
                        queue.append(near)
            yield part

    def _how_far(self, part: set[Item]) -> int:
        """Return by how many levels ``part`` may move at once and gain the same by each."""
        far = min(self.latest[item] - self.level[item] for item in part)
        for item in part:
            for reader, step in self.above[item]:
                if reader not in part:
                    far = min(far, self.level[reader] - self.level[item] - step)
            for number in (*self.made[item], *self.read[item]):
                slots = [(self._slot(each), each in part) for each in self.tensors[number].readers]
                own = max((slot for slot, moves in slots if moves), default=None)
                others = max((slot for slot, moves in slots if not moves), default=None)
                if own is not None and others is not None and own < others:
                    far = min(far, max(1, (others - own) // 2))
        return far

    def _around(self, moved: set[Item]) -> set[Item]:
        """Return the items for which something may have changed as ``moved`` moved."""
        found = set(moved)
        for item in moved:
            found.update(maker for maker, _ in self.below[item])
            found.update(reader for reader, _ in self.above[item])
            for number in (*self.made[item], *self.read[item]):
                found.add(self.tensors[number].maker)
                found.update(self.tensors[number].readers)
        return {item for item in found if self.level[item] < self.latest[item]}
