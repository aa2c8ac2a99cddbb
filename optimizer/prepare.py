"""From spec and model file to the optimised graph, its shapes, and what of it is off TensorRT."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from optc.optimizer.arrays import dtype_name
from optc.optimizer.asked_stages import AskedStages
from optc.optimizer.cut import cut_asked
from optc.optimizer.model_file import ModelFile, load_graph, read_model, without_functions
from optc.optimizer.modules import Modules
from optc.optimizer.operators import Operators
from optc.optimizer.partition import Off, Question, Refused, by_rule
from optc.optimizer.progress import Progress
from optc.optimizer.replace import replace_ranges
from optc.passes import registry
from optc.passes.branch_check import conditions_to_keep, has_branches_within_branches
from optc.passes.contract import Pass
from optc.passes.custom_operator import declare
from optc.passes.flops import flops
from optc.passes.graph import all_nodes, finish, nodes_in, reads, remove_dead
from optc.passes.pipeline import AfterStep, PipelineReport, optimise
from optc.passes.shape import Shapes, annotate, infer
from optc.specs.check import CheckedSpec
from optc.specs.compile_spec import Range
from optc.specs.diagnostic import Diagnostic
from optc.specs.manifest import Tensor
from optc.specs.model_problem import ResolvedInput
from optc.specs.stage_problem import asked_of


@dataclass(slots=True)
class Prepared:
    """A model ready to be split.

    Attributes:
        checked: The spec.
        model: The original model file.
        graph: The optimised graph, every tensor annotated with dtype and shape.
        passes: What the passes did, and which original nodes each node stands for.
        shapes: Of the optimised graph.
        question: What partitioning starts from; ``off`` holds what rules and the spec say.
        ops: Name of a node of the original, bodies included -> its op. For what a spec says of nodes.
        selected: Node of the original, of bodies too, that the spec keeps off TensorRT -> its words.
        asked: What the spec wants in one stage, in terms of the original.
        kept: Tensors that passes leave alone.
        modules: The torch modules that the spec gives, those in place of ranges too.
        notes: What the user should know.
    """

    checked: CheckedSpec
    model: ModelFile
    graph: gs.Graph
    passes: PipelineReport
    shapes: Shapes
    question: Question
    ops: dict[str, str]
    selected: Mapping[str, str]
    asked: AskedStages
    kept: frozenset[str]
    modules: Modules
    notes: list[Diagnostic]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The inputs, in the model's order."""
        return tuple(_tensor(tensor, self.checked.inputs) for tensor in self.graph.inputs)

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """The outputs, in the model's order."""
        return tuple(_tensor(tensor, {}) for tensor in self.graph.outputs)

    @property
    def operators(self) -> Operators:
        """The custom operators that the spec declares."""
        return Operators(self.checked)

    @property
    def profiles(self) -> tuple[dict[str, Range], ...]:
        """The optimisation profiles."""
        return self.checked.profiles


def _tensor(tensor: gs.Tensor, asked: Mapping[str, ResolvedInput]) -> Tensor:
    range_ = asked[tensor.name].range if tensor.name in asked else None
    return Tensor(name=tensor.name, range=range_, **type_of(tensor))


def type_of(tensor: gs.Tensor) -> dict[str, Any]:
    """Return dtype and shape of an annotated tensor, as a manifest has them."""
    proto = getattr(tensor, "proto", None)
    if proto is not None:
        return {"dtype": tensor.type.removesuffix("_type"), "shape": None}
    dtype = "unknown" if tensor.dtype is None else dtype_name(np.dtype(tensor.dtype))
    if tensor.shape is None or any(extent is None for extent in tensor.shape):
        return {"dtype": dtype, "shape": None}
    return {"dtype": dtype, "shape": tuple(tensor.shape)}


def prepare(checked: CheckedSpec, progress: Progress, after: AfterStep | None = None) -> Prepared:
    """Load the model of ``checked``, run the passes and infer shapes.

    To be called where the operators of the spec are declared, as all is that infers shapes.

    Raises:
        ModelError: If the model cannot be read or is damaged.
        SpecError: If custom operators are not as declared, their libraries or modules do not load,
            or a range cannot be replaced.
        EnvironmentFault: If a module is to run and torch is not installed.
    """
    spec = checked.spec
    progress.step("loading the model")
    model = _model(checked)
    graph = load_graph(model, checked.inputs)
    points = frozenset(p.tensor for p in spec.partition.points if p.tensor)
    selected = _selected(graph, checked)
    asked = AskedStages.of(
        graph,
        spec.partition,
        asked_of(spec.partition),
        lambda: infer(graph, opset=graph.opset, ranges=checked.symbol_ranges),
        checked.place,
    )
    kept = points | asked.kept | _boundary(graph, selected)
    if has_branches_within_branches(graph):
        trial = load_graph(model, checked.inputs)
        kept |= conditions_to_keep(trial, checked.symbol_ranges)
    ops = {node.name: node.op for node in all_nodes(graph)}
    ranges = checked.symbol_ranges
    replaced = replace_ranges(graph, checked, ranges)
    declare(each.operator for each in replaced)
    modules = Modules(checked, replaced)
    unfit = modules.check(graph)

    progress.step("running graph passes")
    passes = registry.passes(spec.passes.disable, options=spec.passes.options)
    report = optimise(graph, passes, points=kept, ranges=ranges, after=after)
    report.origins = modules.origins(report.origins)

    progress.step("inferring shapes")
    question = _question(checked, graph, report, selected, asked, modules)
    Operators(checked).check(graph, question.shapes, question.profiles)
    notes = [*_notes(checked, graph, points, question.scopes), *unfit]
    return Prepared(
        checked,
        model,
        graph,
        report,
        question.shapes,
        question,
        ops,
        selected,
        asked,
        kept,
        modules,
        notes,
    )


def rewrite(prepared: Prepared, passes: Sequence[Pass], refused: Collection[str]) -> None:
    """Rewrite nodes of a prepared graph for all targets, optimise again, and look at it anew.

    Args:
        prepared: Changed in place: its graph, what the passes did, shapes and question.
        passes: Those that rewrite.
        refused: Names of the nodes that they are to rewrite.
    """
    checked, graph, ranges = prepared.checked, prepared.graph, prepared.checked.symbol_ranges
    spec = checked.spec
    optimisers = registry.passes(spec.passes.disable, options=spec.passes.options)
    first = optimise(graph, passes, points=prepared.kept, ranges=ranges, refused=frozenset(refused))
    then = optimise(graph, optimisers, points=prepared.kept, ranges=ranges)
    for report in (first, then):
        prepared.passes.go_on(report)
    prepared.question = _question(
        checked, graph, prepared.passes, prepared.selected, prepared.asked, prepared.modules
    )
    prepared.shapes = prepared.question.shapes


def _question(
    checked: CheckedSpec,
    graph: gs.Graph,
    report: PipelineReport,
    selected: Mapping[str, str],
    asked: AskedStages,
    modules: Modules,
) -> Question:
    """Return what partitioning starts from; ``graph`` is completed and annotated.

    Tensors that passes left alone for the spec's sake, and that lead to no output, go: no stage can
    hold what nobody needs.
    """
    remove_dead(graph, frozenset(tensor.name for tensor in graph.outputs))
    finish(graph)
    for node in all_nodes(graph):  # finish() makes nodes that stand for none
        if node.name not in report.origins:
            report.origins = {**report.origins, node.name: ()}
    shapes = infer(graph, opset=graph.opset, ranges=checked.symbol_ranges)
    annotate(graph, shapes)
    operators = Operators(checked)
    off = by_rule(graph)
    off.update(_off_by_spec(graph, report, selected))
    off.update(operators.off(graph))
    off.update(modules.off(graph))
    spec = checked.spec
    question = Question(
        graph=graph,
        shapes=shapes,
        profiles=checked.profiles,
        off=off,
        points=asked.points | {p.tensor for p in spec.partition.points if p.tensor},
        flops=flops(graph, shapes, checked.profiles[0]),
        fallback=spec.fallback.runtime,
        runtimes={**operators.runtimes(graph), **modules.runtimes(graph)},
        place_of_profiles=checked.place("profiles", key=True) or checked.place("dims", key=True),
        place_of_partition=checked.place("partition", key=True),
        cost=checked.cost,
    )
    question.scopes, question.units = asked.on(
        graph,
        report.origins,
        lambda node: node.name not in off and question.is_free(node),
        alone={name for name, runtime in question.runtimes.items() if runtime == "torch"},
    )
    return question


def _model(checked: CheckedSpec) -> ModelFile:
    """Return the model of ``checked``: the file's, or the part of it that is meant."""
    model = read_model(checked.model_path)
    cut = cut_asked(checked)
    return model if cut is None else replace(model, proto=cut.of(without_functions(model.proto)))


def _selected(graph: gs.Graph, checked: CheckedSpec) -> dict[str, str]:
    """Return the nodes of the original that the spec keeps off TensorRT -> by which words."""
    found: dict[str, str] = {}
    for selector in checked.spec.partition.off_tensorrt:
        for node in graph.nodes:
            matching = [n for n in nodes_in(node) if selector.matches(n.op, n.name)]
            if matching:  # a node of a body stays off where a pass takes it out of the body, too
                found.update(dict.fromkeys((node.name, *(n.name for n in matching)), str(selector)))
    return found


def _boundary(graph: gs.Graph, selected: Mapping[str, str]) -> frozenset[str]:
    """Return the tensors around the selected nodes: no pass may merge across them."""
    names: set[str] = set()
    for node in graph.nodes:
        if node.name in selected:
            names.update(t.name for t in reads(node) if not isinstance(t, gs.Constant) and t.inputs)
            names.update(t.name for t in node.outputs if t.name and t.outputs)
    return frozenset(names)


def _off_by_spec(graph: gs.Graph, report: PipelineReport, selected: Mapping[str, str]) -> Off:
    off: Off = {}
    for node in graph.nodes:
        for origin in report.origins.get(node.name, ()):
            if origin in selected:
                off[node.name] = Refused("spec", f"off_tensorrt: {selected[origin]}")
    return off


def _notes(
    checked: CheckedSpec, graph: gs.Graph, points: frozenset[str], scopes: Collection[str]
) -> list[Diagnostic]:
    """Return what became of points that no longer cut anything, and of scopes without nodes.

    Args:
        checked: The spec.
        graph: The optimised one.
        points: Tensors that the spec names.
        scopes: Names of those that have nodes.
    """
    notes = list(checked.notes)
    replaced = ", or in a range that is replaced" if checked.spec.partition.replace else ""
    made = {t.name for node in graph.nodes for t in node.outputs}
    for index, point in enumerate(p.tensor for p in checked.spec.partition.points):
        if point in points - made:
            notes.append(
                Diagnostic(
                    "point-is-no-cut",
                    f"the partition point `{point}` is an input or a constant{replaced}, or leads to "
                    "no output: no stage ends there",
                    "name a tensor that the model computes its outputs from",
                    checked.place("partition", "points", index),
                    severity="warning",
                )
            )
    for name in sorted(checked.spec.partition.scopes.keys() - scopes):
        notes.append(
            Diagnostic(
                "scope-is-no-stage",
                f"the scope `{name}` is no stage: its nodes are constants{replaced}, or lead to no "
                "output",
                "leave it out, or name nodes that the model computes its outputs with",
                checked.place("partition", "scopes", name, key=True),
                severity="warning",
            )
        )
    return notes
