"""Rewrites what TensorRT refuses into what it takes, and keeps only what TensorRT confirms.

Each refused node is cut out with the shape arithmetic that leads to it, rewritten by the passes that
legalise, and shown to the target's own parser and builder. Taken, it is on TensorRT as rewritten.
Refused once more, what is refused is rewritten again; where no pass knows more, the node stays off.
Of nodes that differ only in names, as those that a detector has for each of its classes, one is tried.

A rewrite has to pay: one that takes more than `MOST_TIMES` the FLOPs of the node, and more than
`SMALL_SHARE` of those of the model, costs more on the GPU than the crossing that it saves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx_graphsurgeon as gs
from onnx import ModelProto, TensorProto

from optc.optimizer.model_parts import ProfilesOf
from optc.optimizer.oracle import Oracle, likeness
from optc.optimizer.partition import Legalised, Off, Question, axis_ranges
from optc.passes.contract import Pass
from optc.passes.flops import flops
from optc.passes.graph import Place, StoredValues, export_model, import_model
from optc.passes.legalising import Legalisation, Ranges, Recipe
from optc.passes.shape import annotate, infer
from optc.specs.compile_spec import Range, Target

MOST_ROUNDS = 5
"""Rewrites of what a rewrite made. A quantised operator of another domain takes three."""

MOST_TIMES = 64
SMALL_SHARE = 0.02


@dataclass(slots=True)
class _Trial:
    """A refused node on its own, as rewritten so far.

    Attributes:
        alike: Its name, and those of the nodes for which it stands: they differ in nothing else.
    """

    alike: list[str]
    work: Legalisation
    then: list[frozenset[str]]

    @property
    def node(self) -> str:
        """The one that is rewritten."""
        return self.alike[0]

    @property
    def recipes(self) -> list[Recipe]:
        """How each of the nodes is rewritten."""
        passes, then = tuple(self.work.fired.get(self.node, ())), tuple(self.then)
        return [Recipe(node, passes, then) for node in self.alike]


class Legaliser:
    """Legalises nodes of one model.

    Args:
        question: The model, and where it is to run.
        oracle: Asked about each rewritten node.
        legalisers: Returns the passes that legalise. It is called when something is refused: most
            models have nothing that is, and it takes its time to import all of them.
        optimisers: The passes that optimise, for what the rewrites leave.
        place: How weights are written, as `export_model` takes it.
        folder: Where weights lie that ``place`` puts into files.
        tf32: Whether TF32 is on.
    """

    def __init__(
        self,
        question: Question,
        oracle: Oracle,
        *,
        legalisers: Callable[[], Sequence[Pass]],
        optimisers: Sequence[Pass],
        place: Place,
        folder: Path,
        tf32: bool,
    ) -> None:
        self._question = question
        self._oracle = oracle
        self._load_legalisers = legalisers
        self._optimisers = optimisers
        self._place = place
        self._folder = folder
        self._tf32 = tf32

    @cached_property
    def _legalisers(self) -> Sequence[Pass]:
        return self._load_legalisers()

    # --- a node on its own -----------------------------------------------------------------------

    def legalise(
        self,
        refused: Off,
        target: Target,
        model: Callable[[], ModelProto],
        profiles: ProfilesOf,
    ) -> dict[str, Legalised | str]:
        """Return how those of the nodes ``refused`` are rewritten that ``target`` then takes.

        For one that a pass knows and that is not rewritten, return why.

        Args:
            refused: Why they are off TensorRT; what the spec keeps off is left alone.
            target: Whom to ask.
            model: Returns the whole graph as a model, every tensor typed.
            profiles: Gives the optimisation profiles of a model that has the named inputs.
        """
        wanted = [name for name, why in refused.items() if why.by != "spec"]
        if not wanted or not self._legalisers:
            return {}
        parts = self._oracle.alone(model(), wanted)
        trials = []
        found: dict[str, Legalised | str] = {}
        for alike in _alike(parts, profiles):
            name = alike[0]
            work = self._begin(parts[name])
            if not work.rewrite([name]):
                why_not = work.declined.get(name)
            elif (why_not := self._why_dear(name, work.graph)) is None:
                trials.append(_Trial(alike, work, []))
            if why_not is not None:
                found.update(dict.fromkeys(alike, f"not rewritten: {why_not}"))
        for _ in range(MOST_ROUNDS):
            trials = self._tried(trials, refused, found, target, profiles)
            if not trials:
                break
        return found

    def _begin(self, part: ModelProto) -> Legalisation:
        graph = import_model(part, self._folder)
        ranges = self.ranges_of(graph)
        return Legalisation.of(graph, self._legalisers, self._optimisers, ranges)

    def _tried(
        self,
        trials: Sequence[_Trial],
        refused: Off,
        answers: dict[str, Legalised | str],
        target: Target,
        profiles: ProfilesOf,
    ) -> list[_Trial]:
        """Ask about ``trials``, add to ``answers``, and return those rewritten once more."""
        asked = []
        models = []
        shapes = []
        for trial in trials:
            graph = trial.work.graph
            found = profiles([tensor.name for tensor in graph.inputs])
            if found is None:
                continue
            annotate(graph, infer(graph, opset=graph.opset, ranges=trial.work.ranges))
            asked.append(trial)
            models.append(export_model(graph, place=_as_it_lies))
            shapes.append(found)
        verdicts = self._oracle.verdicts(
            models,
            target.backend,
            profiles=shapes,
            folder=self._folder,
            compute_capability=target.compute_capability,
            tf32=self._tf32,
        )
        again = []
        for trial, verdict in zip(asked, verdicts, strict=True):
            if verdict.refused is None:
                for recipe in trial.recipes:
                    answers[recipe.node] = Legalised(recipe, refused[recipe.node])
                continue
            passes = ", ".join(trial.recipes[0].passes)
            words = f"as rewritten by {passes} refused, too: {verdict.refused.text}"
            answers.update({recipe.node: words for recipe in trial.recipes})
            ops = verdict.ops or frozenset(node.op for node in trial.work.graph.nodes)
            if trial.work.rewrite_again({trial.node: ops}):
                trial.then.append(ops)
                again.append(trial)
        return again

    def _why_dear(self, name: str, rewritten: gs.Graph) -> str | None:
        """Return why the rewritten node does not pay; None if it does."""
        usual = axis_ranges(self._question, rewritten.inputs)[0]
        shapes = infer(rewritten, opset=rewritten.opset, ranges=_joined([usual]))
        cost = sum(flops(rewritten, shapes, usual).values())
        before, whole = self._question.flops.get(name, 0), sum(self._question.flops.values())
        if cost <= max(MOST_TIMES * before, SMALL_SHARE * whole):
            return None
        return (
            f"it would take {cost:.2g} FLOPs in place of {before:.2g}, which is more than "
            f"{MOST_TIMES} times as many and more than {SMALL_SHARE:.0%} of the model"
        )

    # --- nodes in their stage --------------------------------------------------------------------

    def rewritten(self, stage: gs.Graph, recipes: Sequence[Recipe]) -> Legalisation:
        """Return a copy of ``stage`` in which the nodes of ``recipes`` are rewritten."""
        work = self._begin(export_model(stage, place=self._place))
        work.follow(recipes)
        annotate(work.graph, infer(work.graph, opset=work.graph.opset, ranges=work.ranges))
        return work

    def ranges_of(self, graph: gs.Graph) -> Ranges:
        """Return the smallest and largest extent of each symbol that an input of a part has."""
        return _joined(axis_ranges(self._question, graph.inputs))


def _alike(parts: Mapping[str, ModelProto], profiles: ProfilesOf) -> list[list[str]]:
    """Return the names of ``parts``, those together that differ in nothing but names.

    What reads an axis without a bound is left out: no engine can hold it.
    """
    found: dict[bytes, list[str]] = defaultdict(list)
    for name, part in parts.items():
        shapes = profiles([info.name for info in part.graph.input])
        if shapes is not None:
            found[likeness(part, name, shapes)].append(name)
    return list(found.values())


def _as_it_lies(constant: gs.Constant) -> TensorProto | None:
    """Return what refers to a constant's file, if it lies in one: what is on trial is not written."""
    values = constant._values
    if not isinstance(values, StoredValues):
        return None
    return values.tensor if values.tensor.data_location == TensorProto.EXTERNAL else None


def _joined(profiles: Sequence[Mapping[str, Range]]) -> Ranges:
    """Return the smallest and largest extent of each symbol over all of ``profiles``."""
    return {
        name: (min(p[name].min for p in profiles), max(p[name].max for p in profiles))
        for name in profiles[0]
    }
