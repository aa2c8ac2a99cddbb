"""What a split takes to run, as a model of time: whether an engine pays for its launch and copies.

    engine          launch_us + max(arithmetic, memory traffic) of all that is in it
    fallback stage  for each node: node_us + max(arithmetic, memory traffic)
    copy            copy_us + bytes / copy_gb_s

Engines run on the GPU, all else on the host. A tensor is copied once in each direction that it has
to go: from engine to engine it stays on the GPU, from fallback to fallback on the host. Inputs of
the model start on the host, and its outputs end there. Stages run one after another.

Arithmetic is the FLOPs of the nodes, traffic what each of them reads and writes, both at the opt
extents of the first profile. An axis that the data decide counts at its bound; one that nothing
bounds counts 1, so what lies behind it is taken for cheap on either side.

Sums are exactly rounded: a split costs the same in whatever order its nodes are listed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Self

from optc.passes.flops import tensor_bytes, traffic
from optc.passes.minimum_cut import ENDLESS, Network
from optc.specs.compile_spec import Cost

if TYPE_CHECKING:
    from optc.optimizer.partition import Question
    from optc.passes.split import Stage

PER_US = 1e3
"""GFLOP/s and GB/s are this many FLOPs and bytes in a microsecond."""


@dataclass(frozen=True, slots=True)
class Constants:
    """What the model multiplies with. The defaults are those that the spec names."""

    launch_us: float = 20.0
    node_us: float = 5.0
    copy_us: float = 10.0
    copy_gb_s: float = 12.0
    tensorrt_gflops: float = 5000.0
    tensorrt_gb_s: float = 300.0
    fallback_gflops: float = 50.0
    fallback_gb_s: float = 10.0

    @classmethod
    def of(cls, cost: Cost) -> Self:
        """Return the constants that a spec asks for, with the defaults of what it leaves open."""
        given = {each.name: getattr(cost, each.name) for each in fields(cls)}
        return cls(**{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True, slots=True)
class Work:
    """What running a node, or several as one, asks for.

    Attributes:
        flops: Arithmetic.
        bytes: Memory traffic.
        steps: How many nodes run.
    """

    flops: int
    bytes: int
    steps: int = 1

    @classmethod
    def of_all(cls, works: Iterable[Self]) -> Self:
        """Return the sum."""
        listed = list(works)
        return cls(
            sum(each.flops for each in listed),
            sum(each.bytes for each in listed),
            sum(each.steps for each in listed),
        )


def engine_us(constants: Constants, works: Iterable[Work]) -> float:
    """Return the time of an engine that does ``works``."""
    whole = Work.of_all(works)
    return constants.launch_us + max(
        whole.flops / (constants.tensorrt_gflops * PER_US),
        whole.bytes / (constants.tensorrt_gb_s * PER_US),
    )


def fallback_us(constants: Constants, works: Iterable[Work]) -> float:
    """Return the time that the fallback takes for ``works``, one node after another."""
    arithmetic = constants.fallback_gflops * PER_US
    memory = constants.fallback_gb_s * PER_US
    return math.fsum(
        each.steps * constants.node_us + max(each.flops / arithmetic, each.bytes / memory)
        for each in works
    )


def copies_us(constants: Constants, tensors: Iterable[int]) -> float:
    """Return the time to copy tensors of so many bytes each between GPU and host."""
    memory = constants.copy_gb_s * PER_US
    return math.fsum(constants.copy_us + each / memory for each in tensors)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an engine is taken to cost, and what its nodes would in the fallback instead.

    Attributes:
        stage: The engine.
        with_us: Its own time and that of the copies that it is a reason for.
        without_us: The same of its nodes in the fallback.
    """

    stage: Stage
    with_us: float
    without_us: float

    @property
    def gain_us(self) -> float:
        """What is won without the engine."""
        return self.with_us - self.without_us

    @property
    def reason(self) -> str:
        """Why it does not pay, for a person."""
        return (
            f"an engine of its own does not pay: about {time_text(self.with_us)} with it, "
            f"{time_text(self.without_us)} without (cost model)"
        )


def time_text(microseconds: float) -> str:
    """Return a time for a person.

    Example:
        >>> time_text(3.14159), time_text(45.2), time_text(52_300)
        ('3.1 us', '45 us', '52 ms')
    """
    if microseconds >= 10_000:
        return f"{microseconds / 1000:.0f} ms"
    return f"{microseconds:.0f} us" if microseconds >= 10 else f"{microseconds:.1f} us"


class CostModel:
    """Tells the time of the stages of one graph.

    Args:
        question: The graph, its shapes, and what things cost.
    """

    def __init__(self, question: Question) -> None:
        self.constants = Constants.of(question.cost)
        self._question = question
        self._outputs = {tensor.name for tensor in question.graph.outputs}

    @cached_property
    def _works(self) -> Mapping[str, Work]:
        question = self._question
        moved = traffic(question.graph, question.shapes, question.profiles[0])
        return {
            name: Work(question.flops.get(name, 0), each.bytes, each.steps)
            for name, each in moved.items()
        }

    @cached_property
    def _bytes_of(self) -> Callable[[str], int]:
        question = self._question
        return tensor_bytes(question.graph, question.shapes, question.profiles[0])

    def stage_us(self, stage: Stage) -> float:
        """Return the time of ``stage``, without the copies around it."""
        works = [self._works[name] for name in (*stage.nodes, *stage.repeated)]
        time = engine_us if stage.runtime == "tensorrt" else fallback_us
        return time(self.constants, works)

    def split_us(self, stages: Sequence[Stage]) -> float:
        """Return the time of a whole split, copies included."""
        flow = _Flow(stages, self._outputs)
        on_gpu = {n for n, stage in enumerate(stages) if stage.runtime == "tensorrt"}
        copied = [name for name in flow.tensors if flow.is_copied(name, on_gpu)]
        return math.fsum((*map(self.stage_us, stages), self._copies_us(copied)))

    def losing(self, stages: Sequence[Stage], keep: Collection[int]) -> list[Verdict]:
        """Return the engines without which ``stages`` take the least time, the worst first.

        Each is held against its nodes on the host, with the cut as it is: what a new split comes
        to, `split_us` tells. As copies count once a tensor, that is a minimum cut between the GPU and
        the host, exact for any number of engines. Of several best answers it is the one that drops
        the fewest.

        Args:
            stages: A split.
            keep: Indices of engines that stay.
        """
        flow = _Flow(stages, self._outputs)
        on_gpu = {n for n, stage in enumerate(stages) if stage.runtime == "tensorrt"}
        dropped = self._cheaper_on_host(stages, flow, on_gpu, on_gpu.intersection(keep))
        left = on_gpu - dropped
        verdicts = [self._verdict(index, stages[index], flow, left) for index in dropped]
        return sorted(verdicts, key=lambda each: (-each.gain_us, sorted(each.stage.work)))

    def _cheaper_on_host(
        self, stages: Sequence[Stage], flow: _Flow, on_gpu: set[int], keep: set[int]
    ) -> set[int]:
        """Return the indices of engines on the host's side of a minimum cut."""
        network = Network()
        side: dict[int | None, Hashable] = {
            index: ("gpu" if index in keep else index) if index in on_gpu else "host"
            for index in range(len(stages))
        }
        side[None] = "host"  # the caller
        for index in on_gpu - keep:
            network.add("gpu", index, _capacity(self._host_us(stages[index])))
            network.add(index, "host", _capacity(self.stage_us(stages[index])))
        for name in flow.tensors:
            maker, readers = side[flow.maker(name)], {side[each] for each in flow.readers(name)}
            if readers == {maker}:
                continue
            capacity = _capacity(self._copies_us([name]))
            network.add(maker, ("to host", name), capacity)
            network.add(("to gpu", name), maker, capacity)
            for reader in readers:
                network.add(("to host", name), reader)
                network.add(reader, ("to gpu", name))
        host = network.sink_side("gpu", "host", ENDLESS)
        assert host is not None, "no cut costs that much"
        return {index for index in on_gpu - keep if index in host}

    def _verdict(self, index: int, stage: Stage, flow: _Flow, others: set[int]) -> Verdict:
        """Return what an engine costs beside the engines ``others``, and its nodes on the host."""
        around = dict.fromkeys((*stage.inputs, *stage.outputs))
        # What is copied either way is no part of either figure.
        with_it = {name for name in around if flow.is_copied(name, others, index)}
        without = {name for name in around if flow.is_copied(name, others)}
        return Verdict(
            stage,
            self.stage_us(stage) + self._copies_us(with_it - without),
            self._host_us(stage) + self._copies_us(without - with_it),
        )

    def _host_us(self, stage: Stage) -> float:
        return fallback_us(self.constants, (self._works[name] for name in stage.work))

    def _copies_us(self, names: Iterable[str]) -> float:
        return copies_us(self.constants, map(self._bytes_of, names))


def _capacity(microseconds: float) -> int:
    return min(round(microseconds * 1000), ENDLESS // 2)


class _Flow:
    """Who makes and who reads each tensor that enters or leaves a stage, by index; None: the caller."""

    def __init__(self, stages: Sequence[Stage], outputs: Iterable[str]) -> None:
        self._makers = {name: n for n, stage in enumerate(stages) for name in stage.outputs}
        self._readers: dict[str, set[int | None]] = {name: {None} for name in outputs}
        for index, stage in enumerate(stages):
            for name in stage.inputs:
                self._readers.setdefault(name, set()).add(index)
        self.tensors = dict.fromkeys((*self._readers, *self._makers))

    def maker(self, name: str) -> int | None:
        return self._makers.get(name)

    def readers(self, name: str) -> set[int | None]:
        return self._readers.get(name, set())

    def is_copied(self, name: str, on_gpu: set[int], also: int | None = None) -> bool:
        """Whether a tensor has a reader on the other side than where it is made."""

        def runs_there(index: int | None) -> bool:
            return index is not None and (index in on_gpu or index == also)

        made_there = runs_there(self.maker(name))
        return any(runs_there(reader) is not made_there for reader in self.readers(name))
