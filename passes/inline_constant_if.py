r"""Replace an If whose condition is constant by the branch it takes.

    before                                  after

    true    x                                 x
      \     :                                 |
        If                                  Relu
        then: [x -> Relu -> r]                |
        else: [x -> Neg -> n]                 y
        |
        y

Why it holds: the branch is what the If computes. What a branch reads from outside stands before the
If, so it stands before the branch's nodes when they take the If's place.

Keeps: the names of the If's outputs. One that no node of the branch makes (it is a constant, or comes
from outside) goes through an Identity.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.graph import all_nodes, detach, is_constant, redirect


class InlineConstantIf(Pass):
    """Replace an If whose condition is constant by the branch it takes."""

    name = "inline-constant-if"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Inline the branches that are always taken in ``graph``."""
        report = Report()
        nodes: list[gs.Node] = []
        for node in graph.nodes:
            if node.op != "If" or node.domain or not is_constant(node.inputs[0]):
                nodes.append(node)
                continue
            branches = {True: node.attrs["then_branch"], False: node.attrs["else_branch"]}
            taken = bool(node.inputs[0].values.item())
            for inner in all_nodes(branches[not taken]):
                detach(inner)
            nodes += branches[taken].nodes
            for identity in connect(node, branches[taken], facts):
                nodes.append(identity)
                report.merged[identity.name] = (node.name,)
            detach(node)
            report.removed[node.name] = f"its condition is always {str(taken).lower()}"
        if report.changed:
            graph.nodes = nodes
        return report


def connect(node: gs.Node, branch: gs.Graph, facts: Facts) -> Iterator[gs.Node]:
    """Let ``branch`` make the outputs of ``node``; yield the nodes that this takes besides."""
    outputs = list(node.outputs)
    node.outputs.clear()
    made = {id(tensor) for inner in branch.nodes for tensor in inner.outputs}
    for value, output in zip(branch.outputs, outputs, strict=True):
        if not output.name:
            continue
        if id(value) not in made:
            yield gs.Node("Identity", facts.fresh_name(node.name), {}, [value], [output])
            continue
        made.remove(id(value))  # a branch may give one value twice
        maker = value.inputs[0]
        maker.outputs[maker.outputs.index(value)] = output
        redirect(value, output)
        _add_type(output, value)
        for index, other in enumerate(branch.outputs):
            if other is value:
                branch.outputs[index] = output


def _add_type(output: gs.Variable, value: gs.Variable) -> None:
    """Give ``output`` the type of the branch, where the If does not tell its own."""
    if output.dtype is None and getattr(output, "proto", None) is None:
        output.dtype, output.shape, output.proto = value.dtype, value.shape, value.proto
