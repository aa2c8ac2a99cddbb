from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import combinations, product

import pytest

from optc.passes.placement import Arc, Item, Passed, cost, place


class Case:
    """Items, arcs and tensors, from edges and from which of them a point cuts."""

    def __init__(
        self,
        on: tuple[bool, ...],
        edges: list[tuple[Item, Item]],
        weights: list[int],
        seed: int = 0,
    ) -> None:
        self.on = on
        cuts = random.Random(seed)
        self.cut = {edge: cuts.random() < 0.1 for edge in edges}
        self.arcs = [
            Arc(u, v, int(on[u] and (cut or not on[v]))) for (u, v), cut in self.cut.items()
        ]
        readers: dict[Item, list[Item]] = {}
        for maker, reader in edges:
            readers.setdefault(maker, []).append(reader)
        self.tensors = [Passed(m, tuple(found), weights[m]) for m, found in readers.items()]

    def brute_force(self) -> tuple[int, int, list[int]]:
        """Return the fewest engines, then the fewest bytes, then the lowest levels of all these.

        Stages run one after another: fallback 0, engine 0, fallback 1, ... Each item is put into
        each of them that is of its kind, and what cannot run in that order is left out.
        """
        for engines in range(len(self.on) + 1):
            found = list(self._orders(engines, []))
            if found:
                least = min(cost(self.on, levels, self.tensors) for levels in found)
                best = [each for each in found if cost(self.on, each, self.tensors) == least]
                return engines, least, [min(levels) for levels in zip(*best, strict=True)]
        raise AssertionError("an engine for each item is always possible")

    def _orders(self, engines: int, levels: list[int]) -> Iterator[list[int]]:
        item = len(levels)
        if item == len(self.on):
            if {level for level, on in zip(levels, self.on, strict=True) if on} == set(
                range(engines)
            ):
                yield levels
            return
        for level in range(engines if self.on[item] else engines + 1):
            slot = 2 * level + self.on[item]
            if all(
                2 * levels[maker] + self.on[maker] + (cut and self.on[maker] and self.on[item])
                <= slot
                for (maker, reader), cut in self.cut.items()
                if reader == item
            ):
                yield from self._orders(engines, [*levels, level])

    def check(self) -> None:
        levels = place(self.on, self.arcs, self.tensors)
        engines = len({level for level, on in zip(levels, self.on, strict=True) if on})
        fewest, least, lowest = self.brute_force()
        assert (engines, cost(self.on, levels, self.tensors)) == (fewest, least), self.tensors
        # What differs from the lowest of these moved up to other items that are off TensorRT.
        moved = [item for item, level in enumerate(levels) if level != lowest[item]]
        assert not any(self.on[item] or levels[item] < lowest[item] for item in moved), self.cut
        assert len(self._fallbacks(levels)) <= len(self._fallbacks(lowest)) - bool(moved)

    def _fallbacks(self, levels: list[int]) -> set[int]:
        return {level for level, on in zip(levels, self.on, strict=True) if not on}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_on_every_graph_of_up_to_five_items_nothing_is_better(size: int) -> None:
    pairs = list(combinations(range(size), 2))
    draw = random.Random(size)
    for number, chosen in enumerate(product((False, True), repeat=len(pairs))):
        edges = [pair for pair, there in zip(pairs, chosen, strict=True) if there]
        for on in product((False, True), repeat=size):
            weights = [draw.randrange(4) for _ in range(size)]
            Case(on, edges, weights, seed=number).check()


@pytest.mark.parametrize("seed", range(150))
def test_on_a_sample_of_larger_graphs_nothing_is_better(seed: int) -> None:
    draw = random.Random(seed)
    size = draw.randrange(6, 13)
    edges = [pair for pair in combinations(range(size), 2) if draw.random() < 3.5 / size]
    on = tuple(draw.random() < 0.6 for _ in range(size))
    Case(on, edges, [draw.randrange(1, 9) for _ in range(size)], seed=seed).check()


def test_levels_do_not_depend_on_the_order_of_the_items() -> None:
    draw = random.Random(7)
    size = 120
    edges = [(u, v) for u, v in combinations(range(size), 2) if v - u < 12 and draw.random() < 0.15]
    on = tuple(draw.random() < 0.8 for _ in range(size))
    weights = [draw.randrange(1, 1000) for _ in range(size)]
    expected = place(on, Case(on, edges, weights).arcs, Case(on, edges, weights).tensors)
    for _ in range(5):
        names = _another_order(size, edges, draw)
        number = {name: index for index, name in enumerate(names)}
        case = Case(on, edges, weights)
        arcs = [Arc(number[a.maker], number[a.reader], a.step) for a in case.arcs]
        tensors = [
            Passed(number[t.maker], tuple(number[r] for r in t.readers), t.weight)
            for t in case.tensors
        ]
        draw.shuffle(arcs)
        draw.shuffle(tensors)
        found = place([on[name] for name in names], arcs, tensors)
        assert [found[number[item]] for item in range(size)] == expected


def _another_order(size: int, edges: list[tuple[int, int]], draw: random.Random) -> list[int]:
    """Return the items in another topological order."""
    waiting = {item: {u for u, v in edges if v == item} for item in range(size)}
    order: list[int] = []
    while waiting:
        item = draw.choice([item for item, makers in waiting.items() if not makers])
        del waiting[item]
        for makers in waiting.values():
            makers.discard(item)
        order.append(item)
    return order


def test_what_shrinks_its_input_runs_early_and_what_enlarges_it_late() -> None:
    # 0 on -> 1 off -> 2 on, and beside it 0 -> 3 -> 2, where 3 is free to run before or after 1.
    on = (True, False, True, True)
    # In topological order: 0, 1, 3, 2.
    arcs = [Arc(0, 1, 1), Arc(0, 2, 0), Arc(1, 3, 0), Arc(2, 3, 0)]
    for weight, level in ((10, 0), (30, 1)):
        tensors = [Passed(0, (1, 2), 20), Passed(1, (3,), 1), Passed(2, (3,), weight)]
        assert place((on[0], on[1], on[3], on[2]), arcs, tensors) == [0, 1, level, 1]


def test_what_the_caller_alone_feeds_and_reads_is_no_fallback_stage_of_its_own() -> None:
    # 0 on -> 1 off; 2 off, and 3 off behind it, beside them.
    on, arcs = (True, False, False, False), [Arc(0, 1, 1), Arc(2, 3, 0)]
    assert place(on, arcs, [Passed(0, (1,), 9), Passed(2, (3,), 9)]) == [0, 1, 1, 1]
