"""The graph passes alone: a model in, the same model made smaller out."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_graphsurgeon as gs
from onnx import ModelProto, TensorProto

from optc.optimizer.debug import dumps, prints
from optc.optimizer.model_file import load_graph, model_in_memory, read_model
from optc.optimizer.package import SHARED_BYTES
from optc.optimizer.progress import Progress, Silent
from optc.optimizer.weight_file import WeightFile
from optc.passes import registry
from optc.passes.contract import Pass
from optc.passes.graph import StoredValues, all_bodies, export_model, external_entry
from optc.passes.pipeline import AfterStep, PipelineReport, Step, optimise
from optc.specs.diagnostic import Diagnostic, EnvironmentFault, InputError

if TYPE_CHECKING:
    from optc.optimizer.prove import Proven

LARGEST_EMBEDDED = 1 << 30
"""Bytes of weights beyond which they are written beside the model: protobuf ends at 2 GiB."""


@dataclass(frozen=True, slots=True)
class Report:
    """What the passes did to a model.

    Attributes:
        passes: Pass by pass, and which original nodes each node stands for.
        proof: What was proven, where that was asked for.
    """

    passes: PipelineReport
    proof: Proven | None = None

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
            "proof": None if self.proof is None else asdict(self.proof),
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
        if self.proof is not None:
            lines.append(str(self.proof))
        return "\n".join(lines)


def optimize(
    model: str | Path | ModelProto, *, disable: Sequence[str] = (), only: Sequence[str] = ()
) -> tuple[ModelProto, Report]:
    """Run the graph passes on a model.

    Args:
        model: A file, or a model in memory, which is not changed.
        disable: Names of passes not to run.
        only: Names of the only passes to run; all, where none is named. One that legalises runs on
            every node it knows, not only on what a target refuses.

    Returns:
        The optimised model, weights embedded, and what was done.

    Raises:
        ModelError: If the model cannot be read or is damaged.
        InputError: If ``disable`` or ``only`` names no pass (``unknown-pass``).
    """
    passes = _chosen(disable, only)
    file = model_in_memory(model) if isinstance(model, ModelProto) else read_model(Path(model))
    graph = load_graph(file)
    report = optimise(graph, passes)
    return export_model(graph), Report(report)


@dataclass(frozen=True, slots=True)
class Looking:
    """What to see of the passes while they run. A pass may be ``all``.

    Attributes:
        print_after: The pass after which the graph is printed to stderr.
        dump_after: The pass after which it is saved beside the output.
        stop_after: The most steps, that is runs of a pass that change something.
        prove: Whether to hold the graph after each step against the one before.
    """

    print_after: str | None = None
    dump_after: str | None = None
    stop_after: int | None = None
    prove: bool = False


def optimize_file(
    model: Path,
    output: Path,
    *,
    disable: Sequence[str] = (),
    only: Sequence[str] = (),
    looking: Looking | None = None,
    progress: Progress | None = None,
) -> Report:
    """Run the graph passes on the file ``model`` and write the result to ``output``, at once.

    Weights go to ``<output>.data`` beside it where the model's own were in such a file, and where
    they are more than 1 GiB.

    Raises:
        OptcError: As `optimize`; also where ``output`` cannot be written (``cannot-write``), and,
            if asked for a proof, where a pass changes the numbers (``not-proven``).
    """
    progress, looking = progress or Silent(), looking or Looking()
    passes = _chosen(disable, only)
    watching: list[AfterStep] = []
    if looking.print_after is not None:
        watching.append(prints(looking.print_after))
    if looking.dump_after is not None:
        watching.append(dumps(output, looking.dump_after))
    progress.step("loading the model")
    graph = load_graph(read_model(model))
    beside = _weight_files(graph)
    _check_output(model, output, beside)
    with tempfile.TemporaryDirectory(prefix="optc-prove-") as folder:
        proof = None
        if looking.prove:
            from optc.optimizer.prove import Proof, cases_for

            progress.step("finding extents that the model takes")
            proof = Proof(output, Path(folder), cases_for(model, graph), progress)
            proof.begin(graph)
            watching.append(proof.step)

        def watch(step: Step) -> None:
            for each in watching:
                each(step)

        progress.step("running graph passes")
        report = optimise(
            graph, passes, after=watch if watching else None, stop_after=looking.stop_after
        )
        progress.step("writing the model")
        try:
            _write(graph, output, beside=bool(beside))
        except OSError as error:
            raise EnvironmentFault(
                Diagnostic(
                    "cannot-write", f"`{output}` cannot be written: {error.strerror or error}"
                )
            ) from error
    return Report(report, None if proof is None else proof.outcome())


def _chosen(disable: Sequence[str], only: Sequence[str]) -> list[Pass]:
    for name in (*disable, *only):
        registry.require(name)
    return registry.passes(disable, only=only)


def _values(graph: gs.Graph) -> list[Any]:
    """Return what holds the values of each constant of ``graph``, once."""
    parts = (graph, *all_bodies(graph))
    tensors = (t for part in parts for n in part.nodes for t in n.inputs)
    outputs = (t for part in parts for t in part.outputs)
    found = {id(t._values): t._values for t in (*tensors, *outputs) if isinstance(t, gs.Constant)}
    return list(found.values())


def _weight_files(graph: gs.Graph) -> set[Path]:
    """Return the files beside the model that weights of ``graph`` lie in."""
    return {
        values.file(external_entry(values.tensor)).resolve()
        for values in _values(graph)
        if isinstance(values, StoredValues) and values.tensor.data_location == TensorProto.EXTERNAL
    }


def _check_output(model: Path, output: Path, weights: set[Path]) -> None:
    """Make sure that nothing is written over what ``model`` still needs.

    Raises:
        InputError: If it would be (``would-overwrite``).
        EnvironmentFault: If there is no folder to write to (``cannot-write``).
    """
    if not output.parent.is_dir():
        raise EnvironmentFault(
            Diagnostic(
                "cannot-write",
                f"`{output}` cannot be written: there is no folder `{output.parent}`",
                "make it, or choose another one",
            )
        )
    data = output.with_name(f"{output.name}.data")
    taken = {output} if model.resolve() == output.resolve() else {output, data}
    for path in taken:
        if path.resolve() in weights:
            raise InputError(
                Diagnostic(
                    "would-overwrite",
                    f"`{path}` holds weights of `{model}`, and would be written over",
                    "choose another name with `-o`",
                )
            )


def _write(graph: gs.Graph, output: Path, *, beside: bool) -> None:
    """Write ``graph`` to ``output``, all of it or nothing.

    Where weights go beside it, what is there goes first: a model never stands beside weights of
    another.

    Args:
        graph: The model.
        output: Where it goes.
        beside: Whether its weights go into a file beside it, however few they are.
    """
    total = sum(values.nbytes for values in _values(graph))
    data = f"{output.name}.data"
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        staged = Path(folder)
        if total > (SHARED_BYTES if beside else LARGEST_EMBEDDED):
            with WeightFile(staged / data) as weights:
                model = export_model(graph, place=weights.place)
            (staged / output.name).write_bytes(model.SerializeToString())
            output.unlink(missing_ok=True)
            os.replace(staged / data, output.parent / data)
        else:
            (staged / output.name).write_bytes(export_model(graph).SerializeToString())
        os.replace(staged / output.name, output)
