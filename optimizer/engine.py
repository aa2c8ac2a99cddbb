"""Builds the engines of stages, and finds the nodes that keep one from being built."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from optc.optimizer.builder import Workers
from optc.optimizer.job import BuildFailure, BuildJob, BuildResult
from optc.optimizer.oracle import Oracle
from optc.optimizer.package import WeightStore
from optc.optimizer.partition import Off, Question, Refused, key_of, profiles_of
from optc.optimizer.progress import Progress
from optc.passes.graph import export_model
from optc.passes.split import Stage, extract
from optc.specs.compile_spec import Target


class EngineBuilder:
    """Asks parser and builder on behalf of one model.

    Stages are written to ``folder`` under names made from their content, as they have no numbers
    yet; `optc.optimizer.record` renames what is kept.
    """

    def __init__(
        self,
        question: Question,
        workers: Workers,
        oracle: Oracle,
        store: WeightStore,
        folder: Path,
        progress: Progress,
        *,
        tf32: bool,
    ) -> None:
        self._question = question
        self._workers = workers
        self._oracle = oracle
        self._store = store
        self._folder = folder / "stages"
        self._progress = progress
        self._tf32 = tf32
        self._models: dict[Stage, Path] = {}
        self._folder.mkdir(parents=True, exist_ok=True)

    def model_of(self, stage: Stage) -> Path:
        """Return the file of ``stage`` as ONNX, written when first asked for."""
        if stage not in self._models:
            part = extract(self._question.graph, stage)
            model = export_model(part, place=self._store.for_stage, value_info=False)
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

    def build(self, stages: Sequence[tuple[Stage, Target]]) -> list[BuildResult]:
        """Build the engines of ``stages`` side by side and return what came of each."""
        jobs = [self._job(stage, target) for stage, target in stages]
        labels = {
            job.engine: f"{target.name}, {len(stage.nodes)} nodes"
            for job, (stage, target) in zip(jobs, stages, strict=True)
        }
        return self._workers.build(
            jobs,
            on_done=lambda job, result: self._progress.part(labels[job.engine], "done", 1.0),
            on_progress=lambda job, phase, fraction: self._progress.part(
                labels[job.engine], phase, fraction
            ),
        )

    def _job(self, stage: Stage, target: Target) -> BuildJob:
        return BuildJob(
            model=self.model_of(stage),
            engine=self.engine_of(stage, target),
            backend=target.backend,
            compute_capability=target.compute_capability,
            profiles=profiles_of(self._question, stage),
            tf32=self._tf32,
            nodes=(*stage.nodes, *stage.repeated),
        )
