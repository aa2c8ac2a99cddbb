"""Writes graphs in the precision that was decided: the last thing that happens to a stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import onnx_graphsurgeon as gs

from optc.optimizer.custom_library import Libraries
from optc.optimizer.mixed_runner import MixedRunner
from optc.optimizer.reference import OrtRunner, Runner
from optc.optimizer.simulation import simulated
from optc.optimizer.torch_module import TorchModule
from optc.passes.contract import Pass
from optc.passes.flops import is_product
from optc.passes.graph import Place, all_nodes, export_model, import_model
from optc.passes.legalising import Ranges
from optc.passes.pipeline import optimise
from optc.passes.precision import Float, Lowering, NodePrecision
from optc.passes.shape import annotate, infer


@dataclass(frozen=True, slots=True)
class Lowered:
    """A graph whose nodes compute in what was decided.

    Attributes:
        graph: The graph, annotated. It shares nothing with the one that it was made from.
        owners: Name of one of its nodes -> names of the nodes before that it stands for.
        skipped: Name of a node that could not be lowered as far as asked -> what it computes in, and
            why.
        noted: Name of a constant -> what became of its small numbers.
    """

    graph: gs.Graph
    owners: Mapping[str, tuple[str, ...]]
    skipped: Mapping[str, tuple[NodePrecision, str]]
    noted: Mapping[str, str]


class Lowerer:
    """Lowers copies of graphs.

    Args:
        passes: Returns the passes that lower. It is called when something is to be lowered.
        floats: What quantised nodes take and give.
        amax: Name of a tensor -> the largest magnitude that its quantised values stand for.
        place: How weights are written, as `export_model` takes it.
        folder: Where weights lie that ``place`` puts into files.
        ranges_of: Tells the extents of the symbols of a graph.
    """

    def __init__(
        self,
        *,
        passes: Callable[[], Sequence[Pass]],
        floats: Float,
        amax: Mapping[str, float],
        place: Place,
        folder: Path,
        ranges_of: Callable[[gs.Graph], Ranges],
    ) -> None:
        self._passes = passes
        self._floats = floats
        self._amax = amax
        self._place = place
        self._folder = folder
        self._ranges_of = ranges_of

    def lowered(
        self,
        graph: gs.Graph,
        nodes: Mapping[str, NodePrecision],
        owners: Mapping[str, tuple[str, ...]] | None = None,
    ) -> Lowered:
        """Return a copy of ``graph`` in which ``nodes`` compute in what is said.

        Args:
            graph: Not changed.
            nodes: Name of a node, of bodies too -> its precision.
            owners: Where some of the graph is rewritten: name of one of its nodes -> names of those
                that it stands for, which ``nodes`` speaks of. What a rewrite made of a lowered node
                computes in fp32, as it was not searched; but for its products, which are the node's.
        """
        model = export_model(graph, place=self._place)
        copy = import_model(model, self._folder)
        ranges = self._ranges_of(copy)
        wanted: dict[str, NodePrecision] = {}
        for node in all_nodes(copy):
            if precision := self._precision_of(node, nodes, owners):
                wanted[node.name] = precision
        lowering = Lowering(wanted, self._floats, self._amax)
        report = optimise(copy, self._passes(), ranges=ranges, lowering=lowering)
        annotate(copy, infer(copy, opset=copy.opset, ranges=ranges))
        skipped: dict[str, tuple[NodePrecision, str]] = {}
        for record in report.records:
            # What is not quantised is in floats all the same.
            left: NodePrecision = self._floats if record.name == "quantise-products" else "fp32"
            skipped |= {name: (left, why) for name, why in record.skipped.items()}
        noted = {name: what for record in report.records for name, what in record.noted.items()}
        return Lowered(copy, report.origins, skipped, noted)

    def simulated(
        self,
        lowered: Lowered,
        libraries: Libraries = (),
        modules: Mapping[tuple[str, str], TorchModule] = MappingProxyType({}),
    ) -> Runner:
        """Return what computes as ``lowered`` does, on ONNX Runtime, and on torch what has a module."""
        model = export_model(lowered.graph, place=self._place, value_info=False)
        model = simulated(model, self._folder)
        if not modules:
            return OrtRunner(model, self._folder, libraries=libraries)
        return MixedRunner(
            model,
            {},
            self._folder,
            lambda node: modules.get((node.domain, node.op_type)),
            lambda part, weights: OrtRunner(
                part, self._folder, weights=weights, libraries=libraries
            ),
        )

    def _precision_of(
        self,
        node: gs.Node,
        nodes: Mapping[str, NodePrecision],
        owners: Mapping[str, tuple[str, ...]] | None,
    ) -> NodePrecision | None:
        if owners is None or owners.get(node.name, (node.name,)) == (node.name,):
            return nodes.get(node.name)
        asked = {nodes.get(owner) for owner in owners[node.name]}
        if len(asked) > 1 or None in asked or not is_product(node):
            return None
        precision = asked.pop()
        return self._floats if precision in ("int8", "fp8") else precision
