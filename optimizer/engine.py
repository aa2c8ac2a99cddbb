"""Asks TensorRT: what its parser refuses, whether a stage builds, and what keeps it from building."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx_graphsurgeon as gs
from onnx import ModelProto

from optc.optimizer.fingerprint import Fingerprint
from optc.optimizer.job import BuildFailure, BuildJob, BuildResult, Profile
from optc.optimizer.legalise import Legaliser
from optc.optimizer.lower import Lowerer
from optc.optimizer.oracle import Oracle
from optc.optimizer.package import WeightStore
from optc.optimizer.partition import (
    Legalised,
    Off,
    Question,
    Refused,
    key_of,
    profile_shapes,
)
from optc.optimizer.progress import Progress
from optc.passes.graph import all_nodes, export_model, nodes_in, without_input_extents
from optc.passes.precision import NodePrecision
from optc.passes.split import Stage, extract
from optc.specs.compile_spec import Target
from optc.specs.diagnostic import Diagnostic, EnvironmentFault

HOPELESS = frozenset({"timeout", "killed", "target"})
"""Failures that no other choice of nodes would mend at a bearable price: the stage goes whole."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A stage as a graph of its own.

    Attributes:
        graph: The graph. Where nothing was rewritten it shares nodes with the whole.
        owners: Name of one of its nodes, of bodies too -> nodes of the whole it stands for.
        legalised: Name of a node of the whole that is rewritten in it -> names of the passes that did.
        not_lowered: Name of a node of the whole that could not be lowered as far as asked -> what it
            computes in, and why.
        noted: Name of a constant -> what became of its small numbers.
    """

    graph: gs.Graph
    owners: Mapping[str, tuple[str, ...]]
    legalised: Mapping[str, tuple[str, ...]]
    not_lowered: Mapping[str, tuple[NodePrecision, str]]
    noted: Mapping[str, str]


class EngineBuilder:
    """Asks parser and builder on behalf of one model.

    Stages are written to ``folder`` under names made from their content, as they have no numbers
    yet; `optc.optimizer.record` renames what is kept. Where ``keep`` is false no engine is, and what
    has built before is not built again.
    """

    def __init__(
        self,
        question: Question,
        oracle: Oracle,
        store: WeightStore,
        folder: Path,
        progress: Progress,
        legaliser: Legaliser,
        lowerer: Lowerer,
        *,
        tf32: bool,
        keep: bool = True,
    ) -> None:
        self._question = question
        self._oracle = oracle
        self._store = store
        self._folder = folder / "stages"
        self._progress = progress
        self._tf32 = tf32
        self._keep = keep
        self._models: dict[Stage, Path] = {}
        self._fingerprints: dict[Stage, Fingerprint] = {}
        self._parts: dict[Stage, _Part] = {}
        self._legaliser = legaliser
        self._lowerer = lowerer
        self._draft: (
            tuple[Mapping[str, NodePrecision], ModelProto, Mapping[str, tuple[str, ...]]] | None
        ) = None
        self._folder.mkdir(parents=True, exist_ok=True)

    @property
    def asked(self) -> Mapping[str, int]:
        """What was asked of TensorRT so far, by its kind -> how often."""
        return self._oracle.counts.as_json()

    # --- the parser ------------------------------------------------------------------------------

    def refusals(self, target: Target, lowered: Mapping[str, NodePrecision]) -> Off:
        """Return the nodes of the whole graph that TensorRT refuses, before anything is split.

        Args:
            target: Whom to ask.
            lowered: Name of a node, of bodies too -> the precision that it is asked about in.
        """
        model, owners = self._lowered_whole(lowered) if lowered else (self._whole, None)
        found = self._oracle.refusals(
            model,
            target.backend,
            folder=self._folder,
            compute_capability=target.compute_capability,
            profiles=self._profiles,
            tf32=self._tf32,
            off=self._question.off.keys(),
        )
        if owners is not None:
            found = {owner: why for name, why in found.items() for owner in owners.get(name, ())}
        return {name: Refused(refused.by, refused.text) for name, refused in found.items()}

    def _lowered_whole(
        self, lowered: Mapping[str, NodePrecision]
    ) -> tuple[ModelProto, Mapping[str, tuple[str, ...]]]:
        """Return the whole graph as lowered, and which nodes its nodes stand for.

        All targets are asked about the same, so the last one is kept.
        """
        if self._draft is None or self._draft[0] != lowered:
            draft = self._lowerer.lowered(self._question.graph, lowered)
            model = export_model(draft.graph, place=self._store.for_stage)
            self._draft = (dict(lowered), model, draft.owners)
        return self._draft[1:]

    @cached_property
    def _whole(self) -> ModelProto:
        """The whole graph, every tensor typed."""
        return export_model(self._question.graph, place=self._store.for_stage)

    def legalise(self, refused: Off, target: Target) -> dict[str, Legalised | str]:
        """Return how nodes that ``target`` refuses are rewritten so that it takes them, or why not."""
        return self._legaliser.legalise(refused, target, lambda: self._whole, self._profiles)

    def _profiles(self, names: Sequence[str]) -> tuple[Profile, ...] | None:
        return profile_shapes(self._question, names)

    def legalised(self, stage: Stage) -> Mapping[str, tuple[str, ...]]:
        """Return name of a node that is rewritten in ``stage`` -> names of the passes that did."""
        return self._part(stage).legalised

    def not_lowered(self, stage: Stage) -> Mapping[str, tuple[NodePrecision, str]]:
        """Return name of a node that could not be lowered as far as asked -> what it is in, and why."""
        return self._part(stage).not_lowered

    def noted(self, stage: Stage) -> Mapping[str, str]:
        """Return name of a constant of ``stage`` -> what became of its small numbers."""
        return self._part(stage).noted

    # --- the builder -----------------------------------------------------------------------------

    def build(self, stages: Sequence[tuple[Stage, Target]]) -> list[BuildResult]:
        """Build the engines of ``stages`` side by side and return what came of each."""
        jobs = [self._job(stage, target) for stage, target in stages]
        labels = {
            job.engine: f"{target.name}, {len(stage.nodes)} nodes"
            for job, (stage, target) in zip(jobs, stages, strict=True)
        }
        self._store.hash_ahead()
        return self._oracle.build(
            [
                (job, self._fingerprints[stage])
                for job, (stage, _) in zip(jobs, stages, strict=True)
            ],
            keep=self._keep,
            on_done=lambda job, result: self._progress.part(labels[job.engine], "done", 1.0),
            on_progress=lambda job, phase, fraction: self._progress.part(
                labels[job.engine], phase, fraction
            ),
        )

    def _job(self, stage: Stage, target: Target) -> BuildJob:
        profiles = self._profiles(stage.inputs)
        assert profiles is not None, "settled_stages() lets no unbounded axis through"
        return BuildJob(
            model=self.model_of(stage),
            engine=self.engine_of(stage, target),
            backend=target.backend,
            compute_capability=target.compute_capability,
            profiles=profiles,
            tf32=self._tf32,
            nodes=[node.name for node in all_nodes(self._part(stage).graph)],
        )

    # --- blame -----------------------------------------------------------------------------------

    def blame(self, stage: Stage, failure: BuildFailure, target: Target) -> Off:
        """Return the nodes to take off TensorRT so that the rest of ``stage`` may build.

        In this order: what the parser or the builder named; what does not build alone; what
        bisection finds. Where none of that tells, the whole stage.

        Raises:
            EnvironmentFault: If the engine could not be written.
            InputError: If the model itself does not take the shapes of a profile.
        """
        if failure.reason == "output":
            raise EnvironmentFault(
                Diagnostic("cannot-write", failure.text, "make room, or choose another folder")
            )
        if failure.reason in HOPELESS:
            return dict.fromkeys(stage.work, Refused("builder", failure.text))
        found = self._owned(stage, {r.node: Refused("parser", r.text) for r in failure.refusals})
        if found:
            return found
        self._question.check_profiles()
        named = dict.fromkeys(failure.nodes, Refused("builder", failure.text))
        found = self._owned(stage, named)
        part = self._part(stage)
        model = export_model(part.graph, place=self._store.for_stage)
        ops = {
            node.op
            for node in part.graph.nodes
            if not named.keys().isdisjoint(each.name for each in nodes_in(node))
        }
        alone = self._oracle.refused_alone(
            model,
            [node.name for node in part.graph.nodes if not ops or node.op in ops],
            target.backend,
            folder=self._folder,
            compute_capability=target.compute_capability,
            profiles=self._profiles,
            tf32=self._tf32,
        )
        found |= self._owned(stage, alone)
        return found or self._bisected(stage, model, failure, target)

    def _bisected(
        self, stage: Stage, model: ModelProto, failure: BuildFailure, target: Target
    ) -> Off:
        suspects = self._oracle.bisect(
            model,
            target.backend,
            failure,
            folder=self._folder,
            compute_capability=target.compute_capability,
            profiles=self._profiles(stage.inputs) or (),
            tf32=self._tf32,
        )
        how = f"found by bisection in {suspects.builds} builds"
        blamed = dict.fromkeys(
            suspects.nodes, Refused("builder", f"{suspects.failure.text} ({how})")
        )
        return self._owned(stage, blamed) or dict.fromkeys(
            stage.work, Refused("builder", failure.text)
        )

    def _owned(self, stage: Stage, refused: Mapping[str, Refused]) -> Off:
        """Return ``refused`` by nodes of the main graph; sizes stay, as each stage has them."""
        owned = {*stage.nodes, *stage.repeated}.difference(stage.free)
        owners = self._part(stage).owners
        by_owner = {owner: why for name, why in refused.items() for owner in owners.get(name, ())}
        return {name: why for name, why in by_owner.items() if name in owned}

    def _part(self, stage: Stage) -> _Part:
        """Return ``stage`` as a graph of its own, rewritten as its recipes say."""
        if stage not in self._parts:
            graph = extract(self._question.graph, stage)
            owners: dict[str, tuple[str, ...]] = {n.name: (n.name,) for n in graph.nodes}
            legalised: dict[str, tuple[str, ...]] = {}
            not_lowered: dict[str, tuple[NodePrecision, str]] = {}
            noted: Mapping[str, str] = {}
            if stage.recipes:
                work = self._legaliser.rewritten(graph, stage.recipes)
                graph, owners = work.graph, work.owners
                # Beside others a node may be rewritten by other passes than on its own.
                legalised = {
                    recipe.node: tuple(work.fired.get(recipe.node, recipe.passes))
                    for recipe in stage.recipes
                }
            if stage.lowered:
                lowered = self._lowerer.lowered(graph, dict(stage.lowered), owners)
                graph = lowered.graph
                owners = {
                    name: tuple(dict.fromkeys(o for part in parts for o in owners.get(part, ())))
                    for name, parts in lowered.owners.items()
                }
                noted = lowered.noted
                asked = dict(stage.lowered)
                not_lowered = {n: why for n, why in lowered.skipped.items() if n in asked}
            # A failure may name a node in a body; what moves is the control-flow node around it.
            for node in graph.nodes:
                owners.update((inner.name, owners[node.name]) for inner in nodes_in(node))
            self._parts[stage] = _Part(graph, owners, legalised, not_lowered, noted)
        return self._parts[stage]

    # --- files -----------------------------------------------------------------------------------

    def model_of(self, stage: Stage) -> Path:
        """Return the file of ``stage`` as ONNX, written when first asked for."""
        if stage not in self._models:
            graph = self._part(stage).graph
            model = export_model(graph, place=self._store.for_stage, value_info=False)
            if stage.runtime != "tensorrt":
                model = without_input_extents(model)
            else:
                self._fingerprints[stage] = Fingerprint(
                    model, weights=True, digest_of=self._store.digest_of
                )
            path = self._folder / f"scrap-{len(self._models)}.onnx"
            path.write_bytes(model.SerializeToString())
            self._models[stage] = path
        return self._models[stage]

    def engine_of(self, stage: Stage, target: Target) -> Path:
        """Return where the engine of ``stage`` for ``target`` goes when it is built."""
        return self._folder / f"scrap-{key_of(stage, target)}.engine"

    def remove_scraps(self) -> None:
        """Remove the files of stages that did not stay."""
        for path in self._folder.glob("scrap-*"):
            path.unlink()
