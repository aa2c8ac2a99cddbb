"""Measures what low precision does to the outputs: runs a model on samples, nothing twice, in bounds.

What was measured is written to a journal line by line, so that a search that was ended goes on where
it stopped, and a search that is repeated runs nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from optc.optimizer.compare import is_inexact, wide
from optc.optimizer.made_up import is_float
from optc.optimizer.noise import moved
from optc.optimizer.precision_look import Looks
from optc.optimizer.progress import Progress
from optc.passes.graph import Array
from optc.passes.precision import NodePrecision
from optc.specs.compile_spec import SearchLimits

See = Callable[[str, Array], None]
"""Is shown tensors by name, one after the other."""


class Reference(Protocol):
    """What a run in fp32 gave, and what makes later runs on the same input short."""

    @property
    def outputs(self) -> Mapping[str, Array]:
        """The outputs of the model."""

    @property
    def nbytes(self) -> int:
        """The memory it takes."""


R = TypeVar("R", bound=Reference)


class Runs(Protocol[R]):
    """Runs a model with each of its nodes in a precision of its own."""

    def reference(self, feeds: Mapping[str, Array]) -> R:
        """Return what the model computes in fp32."""

    def run(
        self, reference: R, nodes: Mapping[str, NodePrecision], *, see: See | None = None
    ) -> dict[str, Array]:
        """Return the outputs with ``nodes`` in their precision and all others in fp32."""

    def tensors(
        self, feeds: Mapping[str, Array], wanted: Collection[str], see: See
    ) -> dict[str, Array]:
        """Show the ``wanted`` tensors of a run in fp32, each once, and return the outputs."""


class Judgement(Protocol):
    """How one output, or some that belong together, measure up."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""

    @property
    def badness(self) -> float:
        """The error as a multiple of what is allowed: up to 1 it is met."""


class Judge(Protocol):
    """Says how outputs measure up."""

    def judge(
        self, expected: Mapping[str, Array], found: Mapping[str, Array], group: str | None = None
    ) -> Sequence[Judgement]:
        """Return a judgement on each output, the worst first."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One input that precision is searched on.

    Attributes:
        name: What it is called, unlike any other's. With the journal's key it stands for the data.
        feeds: Returns the values of the inputs.
        group: Whose demands are made of the outputs; None for those made of all.
        expected: Returns what the outputs should be; None for what the model computes in fp32.
    """

    name: str
    feeds: Callable[[], Mapping[str, Array]]
    group: str | None = None
    expected: Callable[[], Mapping[str, Array]] | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """What an assignment of precisions costs.

    Attributes:
        badness: The error as a multiple of what is allowed, infinite where the output is no number.
        drift: The error relative to the output, in the Euclidean norm. It tells assignments apart
            that the demands call alike, as where the best class is the same with both.
        output: Name of the worst output.
    """

    badness: float
    drift: float
    output: str = ""

    @property
    def order(self) -> tuple[float, float]:
        """What costs are compared by."""
        return self.badness, self.drift


FREE = Cost(0.0, 0.0)

SEEDS = 2
"""How often inputs are moved to see the noise of a model."""


class Ended(Exception):
    """The limit of runs or of time has been reached."""


class Journal:
    """What was measured, in a file of one JSON document a line.

    Args:
        path: Made when something is written. A file that cannot be written is done without.
        key: Stands for all that a measurement depends on besides sample and precisions: model, data,
            demands. A file with another key is begun anew.

    Attributes:
        seen: Name of a sample -> what was seen of the tensors on it, as `Looks` writes it.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._header = json.dumps({"what": "optc precision search", "key": key})
        self._known: dict[tuple[str, str], Cost] = {}
        self.seen: dict[str, Any] = {}
        self._writable = True
        self._begun = self._read()

    def _read(self) -> bool:
        """Take in what is there; return whether the file is this search's."""
        try:
            header, *lines = self._path.read_text("utf-8", errors="replace").split("\n")
        except OSError:
            return False
        if header != self._header:
            return False
        for line in lines:
            try:
                entry = json.loads(line)
                if "seen" in entry:
                    self.seen[str(entry["sample"])] = entry["seen"]
                    continue
                cost = Cost(float(entry["badness"]), float(entry["drift"]), str(entry["output"]))
                self._known[str(entry["sample"]), str(entry["nodes"])] = cost
            except (ValueError, KeyError, TypeError):
                continue  # a line that was being written when the search was ended
        return True

    def __len__(self) -> int:
        return len(self._known)

    def get(self, sample: str, nodes: str) -> Cost | None:
        """Return what was measured; None where it was not."""
        return self._known.get((sample, nodes))

    def add(self, sample: str, nodes: str, cost: Cost) -> None:
        """Note a measurement."""
        self._known[sample, nodes] = cost
        self._write(
            {
                "sample": sample,
                "nodes": nodes,
                "badness": str(cost.badness),  # JSON has no infinity
                "drift": str(cost.drift),
                "output": cost.output,
            }
        )

    def add_seen(self, sample: str, seen: Mapping[str, Any]) -> None:
        """Note what was seen of the tensors on a sample."""
        self.seen[sample] = seen
        self._write({"sample": sample, "seen": seen})

    def _write(self, entry: Mapping[str, Any]) -> None:
        if not self._writable:
            return
        try:
            if not self._begun:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._path.write_text(self._header, "utf-8")
                self._begun = True
            # The line end comes first: whatever a run that was killed left is a line of its own.
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(entry))
        except OSError:
            self._writable = False  # the search itself needs no journal


class Measurements(Generic[R]):
    """The cost of assignments on samples: each measured once.

    Args:
        runs: The model.
        samples: What it runs on.
        judge: Says how the outputs measure up.
        limits: How much may be run.
        journal: What was measured before.
        progress: Is told of each run.
        clock: Seconds since some time in the past.
        memory_mib: What may be held of runs in fp32; beyond it they are run again when needed.
    """

    def __init__(
        self,
        runs: Runs[R],
        samples: Sequence[Sample],
        judge: Judge,
        limits: SearchLimits,
        *,
        journal: Journal | None,
        progress: Progress,
        clock: Callable[[], float],
        memory_mib: int = 2048,
    ) -> None:
        self.samples = samples
        self.reused = 0
        self._runs = runs
        self._judge = judge
        self._limits = limits
        self._journal = journal
        self._progress = progress
        self._clock = clock
        self._began = clock()
        self._memory = memory_mib << 20
        self._held: OrderedDict[int, tuple[R, Mapping[str, Array]]] = OrderedDict()
        self._known: dict[tuple[int, str], Cost] = {}
        self._done = 0
        self._looked: set[int] = set()
        self._first = list(range(len(samples)))
        self._base: Mapping[str, NodePrecision] | None = None

    @property
    def runs(self) -> float:
        """Runs made so far, each on all samples."""
        return self._done / len(self.samples)

    @property
    def runs_left(self) -> float:
        """Runs that the limits allow yet, at the pace so far."""
        left = self._limits.max_runs - self.runs
        seconds = self.seconds
        if not seconds or not self.runs:
            return left
        return min(left, (self._limits.max_seconds - seconds) * self.runs / seconds)

    @property
    def seconds(self) -> float:
        """Seconds since the search began."""
        return self._clock() - self._began

    @property
    def used(self) -> float:
        """Share of the limits that is used up, 0 to 1 or a little more."""
        return max(self.runs / self._limits.max_runs, self.seconds / self._limits.max_seconds)

    def hold_against(self, nodes: Mapping[str, NodePrecision]) -> None:
        """Expect from now on what the model computes with ``nodes`` in their precision."""
        self._base = _below_fp32(nodes)
        self._held.clear()
        self._known.clear()

    def cost(
        self, sample: int, nodes: Mapping[str, NodePrecision], *, see: See | None = None
    ) -> Cost:
        """Return what ``nodes`` in their precision, all others in fp32, cost on a sample.

        Args:
            sample: Index of the sample.
            nodes: Name -> precision of those that are not in fp32.
            see: Is shown the tensors, where the model has to run.

        Raises:
            Ended: If it would need a run beyond the limits.
        """
        nodes = _below_fp32(nodes)
        if not nodes and self._base is None and self.samples[sample].expected is None:
            return FREE
        return self._once(sample, self._digest(nodes), lambda: self._measured(sample, nodes, see))

    def noise(self, sample: int) -> Cost:
        """Return what it costs to move the inputs by one unit in their last place, all in fp32.

        Raises:
            Ended: If it would need a run beyond the limits.
        """
        if not any(is_float(array.dtype) for array in self.samples[sample].feeds().values()):
            return FREE
        costs = [
            self._once(sample, f"noise {seed}", partial(self._moved, sample, seed))
            for seed in range(SEEDS)
        ]
        return max(costs, key=lambda cost: cost.order)

    def _once(self, sample: int, what: str, measure: Callable[[], Cost]) -> Cost:
        """Return what ``measure`` gives, unless it is known."""
        if known := self._known.get((sample, what)):
            return known
        name = self.samples[sample].name
        found = self._journal.get(name, what) if self._journal is not None else None
        if found is None:
            if self._done >= self._limits.max_runs * len(self.samples) or self.used >= 1:
                raise Ended
            count, most = self._done // len(self.samples) + 1, self._limits.max_runs
            self._progress.part("precision search", f"run {count} of at most {most}", self.used)
            found = measure()
            self._done += 1
            if self._journal is not None:
                self._journal.add(name, what, found)
        else:
            self.reused += 1
        self._known[sample, what] = found
        return found

    def worst(
        self, nodes: Mapping[str, NodePrecision], *, enough: float = math.inf
    ) -> tuple[Cost, int]:
        """Return the highest cost of ``nodes`` on any sample, and the sample's index.

        A cost above ``enough`` is returned at once. The samples that were the worst before come
        first, as they will most often be it again.
        """
        worst: tuple[Cost, int] | None = None
        for sample in list(self._first):
            cost = self.cost(sample, nodes)
            if worst is None or cost.order > worst[0].order:
                worst = cost, sample
            if cost.badness > enough:
                break
        assert worst is not None, "there is a sample"
        self._first.remove(worst[1])
        self._first.insert(0, worst[1])
        return worst

    def look(
        self, sample: int, looks: Looks, nodes: Mapping[str, NodePrecision] | None = None
    ) -> None:
        """Look at tensors in fp32, and at how they differ with ``nodes`` in their precision.

        Nothing is run for what the journal has.

        Raises:
            Ended: If it would need a run beyond the limits.
        """
        if sample in self._looked:
            return
        self._looked.add(sample)
        name = self.samples[sample].name
        if self._journal is not None and looks.take_in(self._journal.seen.get(name)):
            return
        if looks.names:
            self._runs.tensors(self.samples[sample].feeds(), looks.names, looks.see_reference)
        if nodes is not None:
            self.cost(sample, nodes, see=looks.see_lowered)
        looks.forget()
        if self._journal is not None:
            self._journal.add_seen(name, looks.as_json())

    def _digest(self, nodes: Mapping[str, NodePrecision]) -> str:
        text = json.dumps([nodes, self._base])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _measured(self, sample: int, nodes: Mapping[str, NodePrecision], see: See | None) -> Cost:
        reference, expected = self._expected(sample)
        found = self._runs.run(reference, nodes, see=see) if nodes else reference.outputs
        return self._judged(expected, found, sample)

    def _moved(self, sample: int, seed: int) -> Cost:
        reference, _ = self._expected(sample)
        random = np.random.default_rng(seed)
        feeds = self.samples[sample].feeds()
        others = {name: moved(array, random, 1) for name, array in sorted(feeds.items())}
        return self._judged(reference.outputs, self._runs.reference(others).outputs, sample)

    def _judged(
        self, expected: Mapping[str, Array], found: Mapping[str, Array], sample: int
    ) -> Cost:
        judgements = self._judge.judge(expected, found, self.samples[sample].group)
        if not judgements:
            return Cost(0.0, drift(expected, found))
        worst = judgements[0]
        badness = math.inf if math.isnan(worst.badness) else float(worst.badness)
        return Cost(badness, drift(expected, found), ", ".join(worst.outputs))

    def _expected(self, sample: int) -> tuple[R, Mapping[str, Array]]:
        """Return the run in fp32 and what the outputs should be."""
        if sample in self._held:
            self._held.move_to_end(sample)
            return self._held[sample]
        data = self.samples[sample]
        reference = self._runs.reference(data.feeds())
        expected: Mapping[str, Array] = reference.outputs
        if self._base is not None:
            expected = self._runs.run(reference, self._base)
        elif data.expected is not None:
            expected = data.expected()
        self._held[sample] = reference, expected
        while len(self._held) > 1 and sum(r.nbytes for r, _ in self._held.values()) > self._memory:
            self._held.popitem(last=False)
        return reference, expected


def _below_fp32(nodes: Mapping[str, NodePrecision]) -> dict[str, NodePrecision]:
    return {name: nodes[name] for name in sorted(nodes) if nodes[name] != "fp32"}


def drift(expected: Mapping[str, Array], found: Mapping[str, Array]) -> float:
    """Return the largest relative error, in the Euclidean norm, of the outputs that are floats.

    Where the expected value is no finite number it does not count. An output whose shape is another
    has the error 1.
    """
    both = [name for name in expected if name in found]
    return max((_drift(expected[name], found[name]) for name in both), default=0.0)


def _drift(expected: Array, found: Array) -> float:
    if not is_inexact(expected):
        return 0.0
    if expected.shape != found.shape:
        return 1.0
    there = np.isfinite(expected)
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.linalg.norm(wide(found[there]) - wide(expected[there]))
    if not np.isfinite(error):
        return math.inf
    if error == 0:
        return 0.0
    norm = np.linalg.norm(wide(expected[there]))
    return float(error / norm) if norm else math.inf
