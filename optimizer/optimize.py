"""The graph passes alone: a model in, the same model made smaller out."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto

from optc.optimizer.model_file import load_graph, model_in_memory, read_model
from optc.passes import registry
from optc.passes.graph import export_model
from optc.passes.pipeline import PipelineReport, optimise
from optc.specs.diagnostic import Diagnostic, EnvironmentFault

LARGEST_EMBEDDED = 1 << 30
"""Bytes of weights beyond which they are written beside the model: protobuf ends at 2 GiB."""


@dataclass(frozen=True, slots=True)
class Report:
    """What the passes did to a model.

    Attributes:
        passes: Pass by pass, and which original nodes each node stands for.
    """

    passes: PipelineReport

    def as_json(self) -> dict[str, Any]:
        """Return the report for programs."""
        return {
            "nodes": {"before": self.passes.nodes_before, "after": self.passes.nodes_after},
            "rounds": self.passes.rounds,
            "seconds": round(self.passes.seconds, 4),
            "passes": [
                {
                    "name": record.name,
                    "rewritten": record.rewritten,
                    "seconds": round(record.seconds, 4),
                    "fired": record.merged,
                    "removed": record.removed,
                    "declined": record.skipped,
                }
                for record in self.passes.records
            ],
            "origins": self.passes.origins,
        }

    def render(self) -> str:
        """Return the report for people: a line a pass that did or declined anything."""
        passes = self.passes
        width = max((len(record.name) for record in passes.records), default=0)
        lines = [
            f"{record.name:<{width}}  {record.rewritten:>6} rewritten"
            f"  {len(record.skipped):>5} left alone  {record.seconds:>7.3f} s"
            for record in passes.records
            if record.rewritten or record.skipped
        ]
        lines.append(
            f"{passes.nodes_before} -> {passes.nodes_after} nodes in {passes.rounds} rounds, "
            f"{passes.seconds:.2f} s"
        )
        return "\n".join(lines)


def optimize(
    model: str | Path | ModelProto, *, disable: Sequence[str] = ()
) -> tuple[ModelProto, Report]:
    """Run the graph passes on a model.

    Args:
        model: A file, or a model in memory, which is not changed.
        disable: Names of passes not to run.

    Returns:
        The optimised model, weights embedded, and what was done.

    Raises:
        ModelError: If the model cannot be read or is damaged.
        InputError: If ``disable`` names no pass (``unknown-pass``).
    """
    for name in disable:
        registry.require(name)
    file = model_in_memory(model) if isinstance(model, ModelProto) else read_model(Path(model))
    graph = load_graph(file)
    report = optimise(graph, registry.passes(disable))
    return export_model(graph), Report(report)


def optimize_file(model: Path, output: Path, *, disable: Sequence[str] = ()) -> Report:
    """Run the graph passes on the file ``model`` and write the result to ``output``, at once.

    Weights of more than 1 GiB go to ``<output>.data`` beside it.

    Raises:
        OptcError: As `optimize`; also where ``output`` cannot be written (``cannot-write``).
    """
    optimised, report = optimize(model, disable=disable)
    try:
        _write(optimised, output)
    except OSError as error:
        raise EnvironmentFault(
            Diagnostic("cannot-write", f"`{output}` cannot be written: {error.strerror or error}")
        ) from error
    return report


def _write(model: ModelProto, output: Path) -> None:
    weights = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        staged = Path(folder) / output.name
        data = f"{output.name}.data"
        if weights > LARGEST_EMBEDDED:
            onnx.save_model(model, staged, save_as_external_data=True, location=data)
            os.replace(Path(folder) / data, output.parent / data)
        else:
            onnx.save_model(model, staged)
        os.replace(staged, output)
