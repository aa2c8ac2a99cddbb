"""Where two models that should give the same numbers part ways: the first tensor that differs.

Tensors that bear one name in both models are compared, a few at a time, so that no more of them are
in memory at once than `AT_ONCE`. That they mean the same in both is what every pass promises: a
value that is left keeps its name.

The search narrows down: of the tensors that lead to one that differs, those that lead to one that
agrees are taken to agree. That is a guess, as a maximum or a threshold can hide a difference; only
floats count for it, and in the end the nearest tensors before the one that was found are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import networkx as nx
import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from optc.optimizer.compare import Difference, Tolerance, compare, is_inexact
from optc.optimizer.custom_library import Libraries
from optc.optimizer.noise import Noise, floors_covering
from optc.optimizer.reference import Model, Rejected, flattened
from optc.optimizer.runtime import Device
from optc.optimizer.torch_module import Expected
from optc.specs.manifest import Manifest, Target

Array = npt.NDArray[Any]
AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class FirstDifference:
    """The first tensor that differs.

    Attributes:
        tensor: Its name, the same in both models.
        node: The node of the original that makes it.
        op: That node's op.
        rewritten: The node of the optimised model that makes it.
        stage: Number of the stage that it differs in, where ``model.onnx`` as a whole is right.
        difference: How it differs.
    """

    tensor: str
    node: str
    op: str
    rewritten: str
    stage: int | None
    difference: Difference

    def as_json(self) -> dict[str, object]:
        """Return it for programs."""
        return {
            "tensor": self.tensor,
            "node": self.node,
            "op": self.op,
            "rewritten_node": self.rewritten,
            "stage": self.stage,
            **self.difference.as_json(),
        }


@dataclass(frozen=True, slots=True)
class Looked:
    """What looking at some tensors gave.

    Attributes:
        off: Those that differ, and how.
        telling: Those that agree and would show it if what they are computed from did not.
    """

    off: Mapping[str, Difference]
    telling: AbstractSet[str]


class Compared(Protocol):
    """What is compared with the original: a package."""

    @property
    def path(self) -> Path:
        """Its folder."""
        ...

    @property
    def manifest(self) -> Manifest:
        """What it says of itself."""
        ...

    @property
    def results(self) -> Mapping[str, Expected]:
        """Name of a tensor that a module gives -> what it has to be."""
        ...

    @property
    def modules(self) -> Mapping[tuple[str, str], Path]:
        """Operator, as domain and op -> the torch module that runs it."""
        ...

    @property
    def libraries(self) -> Libraries:
        """Libraries of custom operators, with which ONNX Runtime runs the original."""
        ...

    def run(
        self,
        inputs: Mapping[str, Any],
        *,
        target: str | None = None,
        device: Device = "auto",
        keep: Collection[str] = (),
    ) -> dict[str, Any]:
        """Return its outputs, then the tensors between stages that are to be kept."""
        ...


@dataclass(frozen=True, slots=True)
class Search:
    """Looks for the first difference between an original and a package, on one input.

    Attributes:
        original: The original model.
        noise: Its noise.
        package: What is compared with it.
        tolerance: What a tensor may differ by; a difference within the noise is none either.
        device: Where the package runs.
    """

    original: Model
    noise: Noise
    package: Compared
    tolerance: Tolerance
    device: Device

    def run(
        self, feeds: Mapping[str, Array], output: str, target: Target
    ) -> FirstDifference | None:
        """Return the first difference on the way to ``output``, or None where there is none.

        First ``model.onnx`` is compared with the original: what differs there, a pass has done.
        Then what goes between the stages of ``target`` is compared with ``model.onnx``.
        """
        path = self.package.path / self.package.manifest.graph
        package = self.package
        whole = Model(path, package.libraries, package.modules, results=package.results)
        return self._in_graph(whole, feeds, output) or self._in_stages(whole, feeds, target)

    def _in_graph(
        self, whole: Model, feeds: Mapping[str, Array], output: str
    ) -> FirstDifference | None:
        makers, new_makers = _makers(self.original), _makers(whole)
        if output not in makers:
            return None  # an input or a constant, handed through
        leading = self.original.leading_to(output)

        def differing(names: Sequence[str]) -> Looked:
            def found(part: Sequence[str]) -> Mapping[str, Any]:
                return whole.variant(part).run(feeds)

            return self._looked_at(self.original, self.noise, feeds, names, found)

        candidates = [name for name in makers if name in new_makers and name in leading]
        first = first_of(candidates, self.original.dataflow, differing)
        if first is None:
            return None
        name, difference = first
        node = makers[name]
        return FirstDifference(
            name, node.name, node.op_type, new_makers[name].name, None, difference
        )

    def _in_stages(
        self, whole: Model, feeds: Mapping[str, Array], target: Target
    ) -> FirstDifference | None:
        stages = self.package.manifest.stages_of(target)
        makers = _makers(whole)
        made_in = {name: stage for stage in stages for name in stage.outputs if name in makers}
        kept = self.package.run(feeds, target=target.name, device=self.device, keep=[*made_in])
        noise = Noise(whole)
        for name, stage in made_in.items():
            off = self._looked_at(whole, noise, feeds, [name], lambda part: kept).off
            if off:
                node = makers[name]
                return FirstDifference(
                    name, node.name, node.op_type, node.name, stage.id, off[name]
                )
        return None

    def _looked_at(
        self,
        model: Model,
        noise: Noise,
        feeds: Mapping[str, Array],
        names: Sequence[str],
        run: Callable[[Sequence[str]], Mapping[str, Any]],
    ) -> Looked:
        """Compare what ``run`` gives for ``names`` with what ``model`` gives."""
        try:
            expected, found = flattened(model.variant(names).run(feeds)), flattened(run(names))
        except Rejected:
            # One of them cannot be made an output. Alone, it cannot be looked at.
            half = len(names) // 2
            parts = (names[:half], names[half:]) if half else ()
            split = [self._looked_at(model, noise, feeds, part, run) for part in parts]
            return Looked(
                {name: difference for each in split for name, difference in each.off.items()},
                {name for each in split for name in each.telling},
            )
        common = [name for name in names if name in expected and name in found]  # no sequences
        differences = {n: compare(expected[n], found[n], self.tolerance) for n in common}
        off = {name: each for name, each in differences.items() if not each.agrees}
        telling = {n for n in common if n not in off and is_inexact(expected[n])}
        if off:
            _, covered = floors_covering(
                noise,
                feeds,
                {name: expected[name] for name in off},
                {name: found[name] for name in off},
                self.tolerance,
                list(off),
            )
            off = {name: each for name, each in off.items() if name not in covered}
        return Looked(off, telling)


def _makers(model: Model) -> dict[str, NodeProto]:
    """Return each tensor of the main graph that a node makes, in order, with the node."""
    return {name: node for name, node in model.dataflow.nodes(data="node") if node is not None}


def first_of(
    candidates: Sequence[str],
    dataflow: nx.DiGraph,
    look: Callable[[Sequence[str]], Looked],
) -> tuple[str, Difference] | None:
    """Return the first of ``candidates`` that differs, though what leads to it agrees.

    Args:
        candidates: Names of tensors, in topological order.
        dataflow: The tensors; an edge from what is read to what is made.
        look: Looks at the tensors it is given.
    """
    found: tuple[str, Difference] | None = None
    left, untested, leading = list(candidates), set(candidates), set(candidates)
    cleared: set[str] = set()
    coming_back = False
    while left:
        sample = _spread(left)
        untested -= set(sample)
        looked = look(sample)
        off = next((name for name in sample if name in looked.off), None)
        if off is not None:
            found, leading = (off, looked.off[off]), nx.ancestors(dataflow, off)
            if coming_back:
                cleared = set()  # something hid the difference: the guesses were wrong
        for name in looked.telling:
            cleared |= nx.ancestors(dataflow, name)
        open_ = (untested & leading) - cleared
        coming_back = not open_ and found is not None
        if coming_back and found is not None:
            open_ = untested & _nearest(found[0], dataflow, set(candidates))
        left = [name for name in candidates if name in open_]
    return found


def _nearest(name: str, dataflow: nx.DiGraph, among: AbstractSet[str]) -> set[str]:
    """Return those of ``among`` that lead to ``name`` with none of them in between."""
    near: set[str] = set()
    seen, pending = {name}, [name]
    while pending:
        for before in dataflow.predecessors(pending.pop()):
            if before in seen:
                continue
            seen.add(before)
            if before in among:
                near.add(before)
            else:
                pending.append(before)
    return near


def _spread(names: Sequence[str]) -> list[str]:
    """Return up to `AT_ONCE` of ``names``, evenly spread, the last one among them."""
    places: Iterable[float] = np.linspace(0, len(names) - 1, min(AT_ONCE, len(names)))
    return [names[round(place)] for place in places]
