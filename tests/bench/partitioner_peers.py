"""Compares how optc cuts graphs with how ONNX Runtime and torch.fx do.

    python tests/bench/partitioner_peers.py [DIR...] [--nodes N]... [--seeds N] [--json FILE]
    python tests/bench/partitioner_peers.py --validate N

What peers do is written anew from what is public of it (partitioner.py); nothing of theirs runs here,
but for what ``--validate`` holds our version of their rules against, on N random graphs each:
torch.fx's own partitioner, where torch is installed; ONNX Runtime's own topological order, and its
own Python version of the rule of providers other than TensorRT's; the groups that TensorRT's parser
itself makes of a model with refused nodes. What ONNX Runtime's TensorRT provider makes of these
groups cannot be run without a GPU.

Without DIRs: random graphs like those of networks with some nodes refused. Each is listed in other
orders, too: a cut should not depend on it.

With DIRs, which are packages: the models in them. What is off TensorRT is what the manifest says, for
each target, and is the same for all; so is the graph, the optimised one. Where TensorRT refuses most
is seen with ``passes: {legalise: false}`` and ``partition: {cost: {keep_share: 0}}`` in the specs.
Engines of peers that hold nothing but the arithmetic of sizes do not count.

    engines     how many there are
    rest        stages outside them, as few as there can be with these engines
    across      MB at the boundaries of stages that run after one another, a tensor at each
    sent        MB that pass between stages, a tensor once
    seconds     of CPU that the rule takes, in Python

Below the tables: by how much fewer ours has, as geometric means; where a peer has fewer engines, or
as many engines and stages and less across; how our time grows. Engines of a peer that wait for each
other are left out of the figures. Exits 1 where a peer has fewer engines anywhere, ours depends on the
order, or our time grows by more than the power 1.2 of the nodes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import onnx
from growth import slope
from partitioner import (
    PEERS,
    CycleError,
    Dag,
    Engines,
    Figures,
    figures,
    graph_of,
    parts_of,
    running_order,
    stages_of,
)

from optc.optimizer.partition import Question
from optc.passes.graph import import_model, reads
from optc.passes.shape import infer
from optc.specs.manifest import read_manifest

OURS = "optc"
NODES = (250, 1_000, 5_000, 20_000, 50_000)
LISTINGS = 2
MOST_EXPONENT = 1.2
LONGEST_SECONDS = 100
"""A rule that is expected to take longer is left out. That of torch.fx takes time with the square."""


@dataclass(slots=True)
class Result:
    """What one rule made of one graph; see the head of this file.

    Attributes:
        engines: In the graph as it is listed.
        listings: How many engines there are in each of the listings.
        same: Whether each listing gives the same stages.
        failure: Why there is nothing.
    """

    engines: int = 0
    rest: int = 0
    across: float = math.nan
    sent: float = math.nan
    seconds: float = math.nan
    listings: list[int] = field(default_factory=list)
    same: bool = True
    failure: str = ""

    @classmethod
    def of(cls, found: Figures, seconds: float) -> Result:
        """Return the figures of one cut."""
        return cls(found.engines, found.fallbacks, found.across / 1e6, found.sent / 1e6, seconds)


@dataclass(slots=True)
class Row:
    """A graph and what the rules made of it."""

    name: str
    nodes: int
    refused: int
    results: dict[str, Result] = field(default_factory=dict)


def timed(rule: Callable[[], Any], repeat: int = 3) -> tuple[Any, float]:
    """Return what ``rule`` returns and the least of its times; long ones are taken once."""
    best = math.inf
    for _ in range(repeat):
        start = time.process_time()
        found = rule()
        best = min(best, time.process_time() - start)
        if best > 1:
            break
    return found, best


def peer_result(dag: Dag, engines: Engines, seconds: float) -> Result:
    """Return what the engines of a peer come to."""
    try:
        parts = running_order(dag, engines)
    except CycleError:
        return Result(engines=len(engines), seconds=seconds, failure="its engines make a cycle")
    return Result.of(figures(parts, dag.sizes.__getitem__), seconds)


# --- random graphs -------------------------------------------------------------------------------


def random_row(nodes: int, seed: int, peers: Iterable[str]) -> Row:
    """Cut one random graph by every rule, in several listings."""
    dag = Dag.like_a_network(nodes, seed)
    row = Row(f"{nodes} nodes, seed {seed}", nodes, dag.on.count(False))
    others = [dag.listed_otherwise(1000 * seed + n) for n in range(LISTINGS)]

    graph = graph_of(dag)
    stages, seconds = timed(lambda: stages_of(dag, graph))
    ours = Result.of(figures(parts_of(stages), lambda tensor: dag.sizes[int(str(tensor))]), seconds)
    cut = {(s.runtime, frozenset(map(int, s.nodes))) for s in stages}
    for other, were in others:
        again = stages_of(other, graph_of(other))
        ours.listings.append(sum(stage.runtime == "tensorrt" for stage in again))
        ours.same &= cut == {(s.runtime, frozenset(were[int(n)] for n in s.nodes)) for s in again}
    row.results[OURS] = ours

    for name in peers:
        engines, seconds = timed(lambda rule=PEERS[name]: rule(dag), repeat=1)
        result = peer_result(dag, engines, seconds)
        cuts = {frozenset(map(frozenset, engines))}
        for other, were in others if seconds < LONGEST_SECONDS / 10 else ():
            engines = PEERS[name](other)
            result.listings.append(len(engines))
            cuts.add(frozenset(frozenset(were[node] for node in each) for each in engines))
        result.same = len(cuts) == 1
        row.results[name] = result
    return row


def random_rows(sizes: Sequence[int], seeds: int) -> Iterator[Row]:
    """Yield what comes of each random graph; rules that become too slow are left out."""
    seconds: dict[str, list[tuple[int, float]]] = {name: [] for name in PEERS}
    for nodes in sizes:
        quick = [
            name
            for name, known in seconds.items()
            if not known or known[-1][1] * (nodes / known[-1][0]) ** 2 < LONGEST_SECONDS
        ]
        for seed in range(seeds):
            row = random_row(nodes, seed, quick)
            for name in quick:
                seconds[name].append((nodes, row.results[name].seconds))
            yield row


# --- packages ------------------------------------------------------------------------------------


def package_rows(folder: Path) -> Iterator[Row]:
    """Cut the model of a package by every rule, for each target that refuses some of it."""
    manifest = read_manifest(folder)
    graph = import_model(onnx.load(folder / manifest.graph, load_external_data=False), folder)
    ranges = {
        name: (min(p[name].min for p in profiles), max(p[name].max for p in profiles))
        for profiles in [manifest.profiles]
        for name in profiles[0]
    }
    shapes = infer(graph, opset=graph.opset, ranges=ranges)
    question = Question(graph, shapes, manifest.profiles, {}, frozenset(), {})
    free = {node.name for node in graph.nodes if question.is_free(node)}
    for target in manifest.targets:
        off = {
            name
            for stage in manifest.stages_of(target)
            if stage.runtime != "tensorrt"
            for name in stage.nodes
            if name not in free or name in {reason.node for reason in stage.why}
        }
        if off:
            yield package_row(f"{folder.name}, {target.name}", question, free, off)


def package_row(name: str, question: Question, free: set[str], off: set[str]) -> Row:
    """Cut the graph of ``question`` by every rule."""
    dag, names = dag_of(question, off)
    row = Row(name, len(dag), len(off))
    stages, seconds = timed(lambda: question.split(off))
    parts = parts_of(stages)
    row.results[OURS] = Result.of(
        figures(parts, lambda tensor: question.bytes_of(str(tensor)) or 0), seconds
    )
    for peer, rule in PEERS.items():
        engines, seconds = timed(lambda rule=rule: rule(dag), repeat=1)
        working = [each for each in engines if any(names[node] not in free for node in each)]
        row.results[peer] = peer_result(dag, working, seconds)
    return row


def dag_of(question: Question, off: set[str]) -> tuple[Dag, list[str]]:
    """Return the graph of ``question`` as partitioners see it, and the names of its nodes."""
    nodes = question.graph.nodes
    number: dict[str, int] = {}
    for node in nodes:
        for tensor in node.outputs:
            if tensor.name:
                number[tensor.name] = len(number)
    return Dag(
        [sorted({number[t.name] for t in reads(node) if t.name in number}) for node in nodes],
        [[number[t.name] for t in node.outputs if t.name] for node in nodes],
        [question.bytes_of(name) or 0 for name in number],
        [node.name not in off for node in nodes],
        [node.op for node in nodes],
    ), [node.name for node in nodes]


# --- what it comes to ----------------------------------------------------------------------------


HEAD = f"{'':22}{'engines':>9}{'rest':>7}{'across':>12}{'sent':>11}{'seconds':>9}  other listings"


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a line a rule, as means over ``rows``."""
    for name in (OURS, *PEERS):
        tried = [row.results[name] for row in rows if name in row.results]
        found = [result for result in tried if not result.failure]
        if not found:
            yield f"  {name:20}  {tried[0].failure if tried else 'too slow'}"
            continue
        means = [
            statistics.fmean(getattr(each, key) for each in found)
            for key in ("engines", "rest", "across", "sent", "seconds")
        ]
        counts = [count for each in found for count in each.listings]
        listed = f"{statistics.fmean(counts):.1f} engines" if counts else ""
        same = sum(each.same for each in found)
        yield (
            f"  {name:20}{means[0]:9.1f}{means[1]:7.1f}{means[2]:12.3f}{means[3]:11.3f}"
            f"{means[4]:9.3f}  {listed}{f', the same in {same} of {len(found)}' if counts else ''}"
            + (f"; {len(tried) - len(found)} cyclic" if len(tried) > len(found) else "")
        )


def fewer(rows: Sequence[Row]) -> Iterator[str]:
    """Yield by how much fewer ours has than each peer, where both have some."""
    for name in PEERS:
        pairs = [
            (row.results[OURS], row.results[name])
            for row in rows
            if name in row.results and not row.results[name].failure
        ]
        parts = []
        for key in ("engines", "across", "sent"):
            ratios = [
                getattr(ours, key) / getattr(theirs, key)
                for ours, theirs in pairs
                if getattr(ours, key) > 0 and getattr(theirs, key) > 0
            ]
            if ratios:
                change = statistics.geometric_mean(ratios) - 1
                less = "MORE" if change > 0 else "fewer" if key == "engines" else "less"
                parts.append(f"{abs(change):.1%} {less} {key}")
        more = sum(theirs.engines > ours.engines for ours, theirs in pairs)
        yield (
            f"  than {name:15}{', '.join(parts)}; fewer engines in {more} of {len(pairs)}"
            if parts
            else f"  than {name:15}nothing to compare"
        )


def faults(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Return what is wrong with ours, and where a peer is better though not wrong."""
    wrong, better = [], []
    for row in rows:
        ours = row.results[OURS]
        if not ours.same or set(ours.listings) - {ours.engines}:
            wrong.append(f"{row.name}: ours depends on the listing: {ours.listings}")
        for name in PEERS:
            theirs = row.results.get(name)
            if theirs is None or theirs.failure:
                continue
            if theirs.engines < ours.engines:
                wrong.append(
                    f"{row.name}: {theirs.engines} engines by {name}, {ours.engines} by us"
                )
            elif (
                theirs.engines == ours.engines
                and theirs.rest <= ours.rest
                and theirs.across < ours.across
            ):
                better.append(
                    f"{row.name}: {theirs.across:.3f} MB across by {name}, {ours.across:.3f} by us"
                )
    return wrong, better


def exponent_of(rows: Sequence[Row]) -> float:
    """Return the exponent by which our time grows with the nodes; nan for a single size."""
    points = [(row.nodes, row.results[OURS].seconds) for row in rows if row.nodes >= 1_000]
    return slope(points) if len({nodes for nodes, _ in points}) > 1 else math.nan


def show(group: Sequence[Row], title: str) -> None:
    """Print the table of some graphs."""
    print(f"\n{title}\n{HEAD}")
    print("\n".join(table(group)), flush=True)


def report(rows: Sequence[Row], *, grows: bool) -> bool:
    """Print what all tables come to; return whether anything is wrong."""
    print("\nours has")
    print("\n".join(fewer(rows)))
    wrong, better = faults(rows)
    for line in better:
        print(f"better: {line}")
    if grows and not math.isnan(exponent := exponent_of(rows)):
        print(f"\nour time grows with the power {exponent:.3f} of the nodes")
        if exponent > MOST_EXPONENT:
            wrong.append(f"at most the power {MOST_EXPONENT} was wanted")
    for line in wrong:
        print(f"WRONG: {line}")
    return bool(wrong)


def main() -> int:
    """Compare; return 1 where anything is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packages", nargs="*", type=Path, metavar="DIR")
    parser.add_argument("--nodes", type=int, action="append", help=f"[default: {NODES}]")
    parser.add_argument("--seeds", type=int, default=5, help="graphs of a size [default: 5]")
    parser.add_argument(
        "--validate", type=int, metavar="N", help="hold the rules against peers' own"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here, too")
    given = parser.parse_args()
    if given.validate:
        from partitioner_check import validate

        return validate(given.validate)
    rows: list[Row] = []
    if given.packages:
        for row in (row for folder in given.packages for row in package_rows(folder)):
            show([row], f"{row.name}: {row.nodes} nodes, {row.refused} off TensorRT")
            rows.append(row)
    else:
        graphs = random_rows(sorted(given.nodes or NODES), given.seeds)
        for nodes, group in groupby(graphs, key=lambda row: row.nodes):
            rows += (found := list(group))
            show(found, f"{nodes} nodes, mean of {len(found)} graphs")
    wrong = report(rows, grows=not given.packages)
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
