r"""Write the rounds of a short Loop one behind the other.

    before                                  after

    2   true   x                            x
     \   |    /                             |
       Loop                                 Mul 3
       body: (i, go, a) -> (go, b, b)       | \
             [a -> Mul 3 -> b]              |  Unsqueeze
        |   \                               |     \
        y    all                            Mul 3  |
                                            | \    |
                                            |  Unsqueeze
                                            y     \|
                                                  Concat
                                                   |
                                                  all

Why it holds: the number of rounds is constant, and no round ends the Loop: the condition at the start is
true or not given, and the body gives back the one that it was given, or true. So the rounds are known,
each with its number as a constant. What the body reads from outside stands before the Loop. What it
gives out for each round is put together along a new first axis, as the Loop does.

The rule for size: all rounds together have no more than 64 nodes, an option; a single one has any
number. A runtime takes a step of a Loop apart from all others, and TensorRT optimises across none; but
a graph that grows is slow to compile, and little is gained where there is much to do in a round.

Needs: at least one round: of none, nobody knows the shape of what it would have given out.
Keeps: the names of the Loop's outputs. One that no node of the last round makes goes through an
Identity.
Skips, with the reason in the report: more nodes; bodies in the body; nodes that are not the same each
time they run. A Loop whose rounds only the run knows is not spoken of.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report, option
from optc.passes.determinism import is_deterministic
from optc.passes.graph import Node, all_nodes, bodies_of, detach, producer
from optc.passes.match import argument, number
from optc.passes.movement import reads_axes, sizes


@dataclass(frozen=True)
class UnrollLoop(Pass):
    """Write the rounds of a short Loop one behind the other."""

    name = "unroll-loop"

    most_nodes: int = option(64, "nodes that all rounds of a Loop may have together", least=1)

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Unroll the Loops of ``graph`` that are short."""
        report = Report()
        for loop in facts.nodes("Loop"):
            rounds = rounds_of(loop)
            if rounds is None:
                continue
            if reason := self.why_not(loop, rounds):
                report.skipped[loop.name] = reason
                continue
            for node, origin in _unrolled(loop, rounds, facts):
                graph.nodes.append(node)
                report.merged[node.name] = (origin,)
            for inner in all_nodes(loop.attrs["body"]):
                detach(inner)
            detach(loop)
            report.removed[loop.name] = f"it has {rounds} rounds, they are written out"
        return report

    def why_not(self, loop: gs.Node, rounds: int) -> str:
        """Return what speaks against unrolling, or nothing."""
        nodes = loop.attrs["body"].nodes
        if rounds > 1 and rounds * len(nodes) > self.most_nodes:
            return f"{rounds} rounds of {len(nodes)} nodes are more than {self.most_nodes} nodes"
        if any(bodies_of(node) for node in nodes):
            return "there are bodies in its body"
        if not all(is_deterministic(node) for node in nodes):
            return "a node of its body is not the same each time it runs"
        return ""


def rounds_of(loop: gs.Node) -> int | None:
    """Return how often the body of ``loop`` runs where that is constant and at least once."""
    most, start = argument(loop, 0), argument(loop, 1)
    trips = number(most)
    if trips is None or trips < 1 or not (start is None or number(start) == 1):
        return None
    body = loop.attrs["body"]
    going = body.outputs[0]
    while (identity := producer(going)) is not None and identity.op == "Identity":
        going = identity.inputs[0]
    return int(trips) if going is body.inputs[1] or number(going) == 1 else None


def _unrolled(loop: gs.Node, rounds: int, facts: Facts) -> Iterator[tuple[gs.Node, str]]:
    """Yield the nodes that do what ``loop`` does, each with the name of the one it stands for."""
    body = loop.attrs["body"]
    carried = list(loop.inputs[2:])
    collected: list[list[gs.Tensor]] = []
    going = gs.Constant(facts.fresh_name(f"{loop.name}_going"), np.array(True))
    for index in range(rounds):
        place = gs.Constant(facts.fresh_name(f"{loop.name}_round"), np.array(index, np.int64))
        values = {
            id(inner): outer
            for inner, outer in zip(body.inputs, [place, going, *carried], strict=True)
        }
        for node in body.nodes:
            outputs = [_like(tensor, values, facts) for tensor in node.outputs]
            inputs = [values.get(id(tensor), tensor) for tensor in node.inputs]
            name = facts.fresh_name(node.name)
            yield Node(node.op, name, dict(node.attrs), inputs, outputs, node.domain), node.name
        results = [values.get(id(tensor), tensor) for tensor in body.outputs[1:]]
        carried, given = results[: len(carried)], results[len(carried) :]
        collected.append(given)
    for value, output in zip(carried, loop.outputs, strict=False):
        if output.name:
            yield _named("Identity", [value], output, loop, facts), loop.name
    for position, output in enumerate(loop.outputs[len(carried) :]):
        if output.name:
            yield from _stacked([given[position] for given in collected], output, loop, facts)


def _like(tensor: gs.Tensor, values: dict[int, gs.Tensor], facts: Facts) -> gs.Tensor:
    """Return the tensor that stands for one of the body in this round, and note it in ``values``."""
    if not tensor.name:
        return gs.Variable.empty()
    made = gs.Variable(facts.fresh_name(tensor.name), tensor.dtype)  # extents may differ by round
    made.proto = getattr(tensor, "proto", None)
    values[id(tensor)] = made
    return made


def _stacked(
    values: list[gs.Tensor], output: gs.Tensor, loop: gs.Node, facts: Facts
) -> Iterator[tuple[gs.Node, str]]:
    """Yield what puts ``values`` together along a new first axis."""
    rows = []
    for value in values:
        inputs, attrs = [value], {"axes": [0]}
        if reads_axes("Unsqueeze", facts.opset):
            inputs, attrs = [value, sizes(facts, f"{loop.name}_axes", [0])], {}
        row = gs.Variable(facts.fresh_name(output.name), output.dtype)
        rows.append(row)
        yield Node("Unsqueeze", facts.fresh_name(loop.name), attrs, inputs, [row]), loop.name
    yield _named("Concat", rows, output, loop, facts, axis=0), loop.name


def _named(
    op: str, inputs: list[gs.Tensor], output: gs.Tensor, loop: gs.Node, facts: Facts, **attrs: int
) -> gs.Node:
    """Return a node that makes ``output`` in place of ``loop``."""
    loop.outputs[next(i for i, t in enumerate(loop.outputs) if t is output)] = gs.Variable.empty()
    return Node(op, facts.fresh_name(loop.name), attrs, inputs, [output])
