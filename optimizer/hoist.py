"""Opens control flow that no target takes: what of its bodies is work for an engine moves out.

An If or Loop with a refused node in its body runs in the fallback whole, with all the products in
it. Before anything is split,

    If(c) {A; R; B} else {C; B}     becomes     A;  If(c) {R} else {C};  B
    Loop(3) {A; R}                  becomes     A;  R;  A;  R;  A;  R

where R is refused, A cannot fail and reads nothing that the branch makes, and B is the same in both
branches. It happens where the cost model says that it pays: A is computed whether its branch is
taken or not, which is taken to be as likely as not; each round of a Loop costs launches and copies.
What some target takes whole stays whole, so that no target pays for what another gains, and one graph
serves all of them; so does what the spec wants in one stage.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import onnx_graphsurgeon as gs
from onnx import ModelProto

from optc.optimizer.cost import CostModel
from optc.optimizer.legalise import Legaliser
from optc.optimizer.oracle import Oracle
from optc.optimizer.partition import Legalised, Off, Question, Refused, by_rule, profile_shapes
from optc.optimizer.prepare import Prepared, rewrite
from optc.passes.flops import flops, is_product
from optc.passes.graph import Place, captures, export_model, reads
from optc.passes.open_branches import BRANCHES, OpenBranches, at_the_end, in_front
from optc.passes.unroll_loop import UnrollLoop, rounds_of
from optc.specs.compile_spec import Target

LIKELIHOOD = 0.5
"""Of either branch of an If. Nobody knows; a branch is there because it is taken at times."""

MOST_NODES = 2048
"""That a Loop may become. A graph that grows is slow to compile."""


@dataclass(frozen=True, slots=True)
class Asking:
    """Whom to ask about nodes in bodies, and for what.

    Attributes:
        oracle: Asked.
        legaliser_of: Returns what knows how nodes of a question can be rewritten.
        targets: All of them are asked about.
        place: How weights are written, as `export_model` takes it.
        folder: Where weights lie that ``place`` puts into files.
        tf32: Whether TF32 is on.
    """

    oracle: Oracle
    legaliser_of: Callable[[Question], Legaliser]
    targets: Sequence[Target]
    place: Place
    folder: Path
    tf32: bool

    def refused(self, question: Question, graph: gs.Graph, target: Target) -> Off:
        """Return the nodes of ``graph`` that ``target`` takes neither as they are nor rewritten."""
        if profile_shapes(question, [tensor.name for tensor in graph.inputs]) is None:
            why = Refused("rule", "nothing bounds an axis that it reads")
            return {node.name: why for node in graph.nodes}
        model = export_model(graph, place=self.place)
        off = by_rule(graph)
        off |= self.oracle.refusals(
            model,
            target.backend,
            folder=self.folder,
            compute_capability=target.compute_capability,
            profiles=partial(profile_shapes, question),
            tf32=self.tf32,
            off=off.keys(),
        )
        return self._less_legalised(off, question, model, target)

    def closed(self, question: Question, names: Collection[str]) -> set[str]:
        """Return which of the control-flow nodes ``names`` no target takes in any form."""
        model = export_model(question.graph, place=self.place)
        left = {
            name for name in names if name not in question.off or question.off[name].by == "rule"
        }
        for target in self.targets:
            off = question.off | self.oracle.refusals(
                model,
                target.backend,
                folder=self.folder,
                compute_capability=target.compute_capability,
                profiles=partial(profile_shapes, question),
                tf32=self.tf32,
                off=question.off.keys(),
            )
            off = {name: off[name] for name in left if name in off}
            left = set(self._less_legalised(off, question, model, target))
        return left

    def _less_legalised(
        self, off: Off, question: Question, model: ModelProto, target: Target
    ) -> Off:
        answers = self.legaliser_of(question).legalise(
            off, target, lambda: model, partial(profile_shapes, question)
        )
        return {n: why for n, why in off.items() if not isinstance(answers.get(n), Legalised)}


def open_bodies(prepared: Prepared, asking: Asking) -> None:
    """Move out of bodies what no engine could hold there and one can hold outside, where it pays.

    Args:
        prepared: Changed in place, its question with it.
        asking: Whom to ask.
    """
    question = prepared.question
    together = {name for each in (*question.units, *question.scopes.values()) for name in each}
    heavy = {
        node.name: node
        for node in prepared.graph.nodes
        if not node.domain
        and (node.op == "If" or (node.op == "Loop" and rounds_of(node) is not None))
        and is_product(node)
        and node.name not in together
    }
    if not heavy:
        return
    disabled = prepared.checked.spec.passes.disable
    names = asking.closed(question, heavy)
    closed = [node for name, node in heavy.items() if name in names]
    front: set[str] = set()
    behind: set[str] = set()
    opened: set[str] = set()
    for node in closed:
        if node.op == "If" and OpenBranches.name not in disabled:
            branches = _Branches(node, question, asking)
            after = branches.behind()
            before = branches.in_front(but=after)
            front |= before
            behind |= after.keys()
            pays = bool(before or after)
        else:
            pays = (
                node.op == "Loop"
                and UnrollLoop.name not in disabled
                and _pays_unrolled(node, question, asking)
            )
        if pays:
            opened.add(node.name)
    if opened:
        passes = [
            OpenBranches(frozenset(front), frozenset(behind)),
            UnrollLoop(most_nodes=MOST_NODES),
        ]
        rewrite(prepared, passes, opened)


class _Branches:
    """An If that no target takes."""

    def __init__(self, node: gs.Node, question: Question, asking: Asking) -> None:
        self._node = node
        self._question = question
        self._asking = asking

    def behind(self) -> dict[str, str]:
        """Return the nodes of the first branch that are to stand behind it, with their twins."""
        found: dict[str, str] = {}
        for index in range(len(self._node.outputs)):
            found |= self._behind_output(index)
        return found

    def in_front(self, but: Mapping[str, str]) -> set[str]:
        """Return the nodes that are to stand in front of it; those of ``but`` stand behind."""
        behind = {*but.keys(), *but.values()}
        found: set[str] = set()
        for name in BRANCHES:
            branch: gs.Graph = self._node.attrs[name]
            wanted = {node.name for node in branch.nodes} - behind
            nodes = self._taken(list(in_front(branch, self._question.shapes, wanted)), branch)
            if nodes:
                piece = _Piece(_part(self._question.graph, nodes, branch), self._question)
                if piece.us(()) < LIKELIHOOD * piece.us_in_fallback:
                    found.update(node.name for node in nodes)
        return found

    def _taken(self, nodes: list[gs.Node], branch: gs.Graph) -> list[gs.Node]:
        """Return those of ``nodes`` that have to do with products and that every target takes."""
        nodes = _with_products(nodes)
        for target in self._asking.targets:
            while nodes:
                part = _part(self._question.graph, nodes, branch)
                refused = self._asking.refused(self._question, part, target)
                if not refused:
                    break
                nodes = _with_products(_less(nodes, refused))
        return nodes

    def _behind_output(self, index: int) -> dict[str, str]:
        """Return what both branches end in alike for one output, as far as it pays."""
        pairs = list(at_the_end(self._node, index, self._question.shapes))
        best: tuple[float, int] = (0.0, 0)
        for length in range(1, len(pairs) + 1):
            nodes = [one for one, _ in pairs[length - 1 :: -1]]
            if not is_product(nodes[0]):  # a tail that begins with less brings nothing more
                continue
            part = _part(self._question.graph, nodes, self._node.attrs[BRANCHES[0]])
            piece = _Piece(part, self._question)
            times = [
                piece.us(self._asking.refused(self._question, part, target))
                for target in self._asking.targets
            ]
            best = max(best, (piece.us_in_fallback - max(times), length))
        return {one.name: other.name for one, other in pairs[: best[1]]}


def _pays_unrolled(loop: gs.Node, question: Question, asking: Asking) -> bool:
    """Whether the rounds of ``loop``, written out, are faster: worse on no target, better on one."""
    body: gs.Graph = loop.attrs["body"]
    rounds = rounds_of(loop) or 0
    if UnrollLoop(MOST_NODES).why_not(loop, rounds):
        return False
    part = _like(question.graph, body.nodes, [*body.inputs, *captures(body)], body.outputs)
    piece = _Piece(part, question)
    times = [piece.us(asking.refused(question, part, target)) for target in asking.targets]
    whole = piece.us_in_fallback
    return all(time <= whole for time in times) and any(time < whole for time in times)


class _Piece:
    """Nodes of a body as a graph of their own, whose inputs and outputs are on the host."""

    def __init__(self, graph: gs.Graph, question: Question) -> None:
        self._question = Question(
            graph=graph,
            shapes=question.shapes,
            profiles=question.profiles,
            off={},
            points=frozenset(),
            flops=flops(graph, question.shapes, question.profiles[0]),
            fallback=question.fallback,
            cost=question.cost,
        )

    def us(self, off: Iterable[str]) -> float:
        """Return the time of the piece with the nodes ``off`` in the fallback."""
        return CostModel(self._question).split_us(self._question.split(set(off)))

    @cached_property
    def us_in_fallback(self) -> float:
        """The time of the piece as part of a body that the fallback runs."""
        return self.us(node.name for node in self._question.graph.nodes)


def _with_products(nodes: list[gs.Node]) -> list[gs.Node]:
    """Return those of ``nodes`` that lead to a product of matrices, or read what one led to."""
    before: set[int] = set()  # tensors that products need
    for node in reversed(nodes):
        if is_product(node) or any(id(tensor) in before for tensor in node.outputs):
            before.update(id(tensor) for tensor in reads(node))
    behind: set[int] = set()  # tensors that products are needed for
    found = []
    for node in nodes:
        is_behind = is_product(node) or any(id(tensor) in behind for tensor in reads(node))
        if is_behind:
            behind.update(id(tensor) for tensor in node.outputs)
        if is_behind or any(id(tensor) in before for tensor in node.outputs):
            found.append(node)
    return found


def _less(nodes: list[gs.Node], refused: Collection[str]) -> list[gs.Node]:
    """Return ``nodes`` without those refused and all that reads what they make."""
    gone: set[int] = set()
    left = []
    for node in nodes:
        if node.name in refused or any(id(tensor) in gone for tensor in reads(node)):
            gone.update(id(tensor) for tensor in node.outputs)
        else:
            left.append(node)
    return left


def _part(whole: gs.Graph, nodes: Sequence[gs.Node], branch: gs.Graph) -> gs.Graph:
    """Return ``nodes`` of ``branch`` as a graph of their own, which gives what others read of it."""
    given = {id(tensor) for tensor in branch.outputs}
    made = {id(tensor) for node in nodes for tensor in node.outputs}
    read = {id(tensor): tensor for node in nodes for tensor in reads(node)}
    entering = [t for t in read.values() if id(t) not in made and not isinstance(t, gs.Constant)]
    inside = {id(node) for node in nodes}
    leaving = [
        tensor
        for node in nodes
        for tensor in node.outputs
        if id(tensor) in given or any(id(reader) not in inside for reader in tensor.outputs)
    ]
    return _like(whole, nodes, entering, leaving)


def _like(
    whole: gs.Graph,
    nodes: Sequence[gs.Node],
    inputs: Sequence[gs.Tensor],
    outputs: Sequence[gs.Tensor],
) -> gs.Graph:
    """Return a graph of ``nodes``, to be asked about: it shares nodes and tensors with ``whole``."""
    part = gs.Graph(list(nodes), list(inputs), list(outputs), name=whole.name)
    part.opset = whole.opset
    part.import_domains = whole.import_domains
    part.ir_version = whole.ir_version
    part.producer_name = "optc"
    part.producer_version = ""
    return part
