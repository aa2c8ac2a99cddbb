r"""Take out of the branches of an If what may as well stand in front of it, or behind.

    before                                      after

    x        c                                  x         c
    :        |                                  |         |
    :       If                                 Conv       |
    :.. then: [x -> Conv -> NonZero -> a        :         |
    :          a -> Cast -> MatMul W -> t]      p........If
    :.. else: [x -> Size -> b                           then: [p -> NonZero -> a]
               b -> Cast -> MatMul W -> e]              else: [x -> Size -> b]
             |                                            |
             y                                           Cast
                                                          |
                                                        MatMul W
                                                          |
                                                          y

Why it holds: a node in front reads nothing that the branch makes, and cannot fail: where the other
branch is taken, nobody reads its result. The last nodes of both branches do the same to what they
read, so they do it to whichever of the two the If gives. Exact.

What moves is chosen by who runs the pass: it pays where the If itself cannot run in an engine.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.determinism import is_deterministic
from optc.passes.graph import Node, bodies_of, op_key, reads
from optc.passes.shape import Shapes
from optc.passes.totality import is_total

BRANCHES = ("then_branch", "else_branch")


class OpenBranches(Pass):
    """Take out of the branches of an If what may stand in front of it, or behind."""

    name = "open-branches"

    def __init__(
        self, front: frozenset[str] = frozenset(), behind: frozenset[str] = frozenset()
    ) -> None:
        """Take out nodes by name.

        Args:
            front: Those that are to stand in front.
            behind: Those of first branches that are to stand behind.
        """
        self.front = front
        self.behind = behind

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Open the branches of the Ifs of ``graph``."""
        report = Report()
        opened: dict[int, tuple[list[gs.Node], list[gs.Node]]] = {}
        for node in facts.nodes("If"):
            front: list[gs.Node] = []
            behind: list[gs.Node] = []
            for name in BRANCHES:
                branch: gs.Graph = node.attrs[name]
                moved = list(in_front(branch, facts.shapes, self.front))
                for identity in _hoist(branch, moved, facts):
                    report.merged[identity.name] = (node.name,)
                front += moved
            for index in range(len(node.outputs)):
                for pair in list(at_the_end(node, index, facts.shapes)):
                    if pair[0].name not in self.behind:
                        break
                    for identity in _sink(node, index, pair, facts):
                        report.merged[identity.name] = (node.name,)
                    report.merged[pair[0].name] = (pair[0].name, pair[1].name)
                    behind.insert(0, pair[0])
            report.merged.update({moved.name: (moved.name,) for moved in front})
            opened[id(node)] = front, behind
        if report.changed:
            graph.nodes = [
                each
                for node in graph.nodes
                for front, behind in [opened.get(id(node), ([], []))]
                for each in (*front, node, *behind)
            ]
        return report


def in_front(
    branch: gs.Graph, shapes: Shapes, wanted: Collection[str] | None = None
) -> Iterator[gs.Node]:
    """Yield the nodes of ``branch`` that may be computed whether it is taken or not.

    Args:
        branch: Of an If.
        shapes: What is known of its tensors.
        wanted: Names of those that are to be; None for all.
    """
    own: set[int] = set()
    for node in branch.nodes:
        stays = wanted is not None and node.name not in wanted
        if stays or any(id(t) in own for t in reads(node)) or not is_total(node, shapes):
            own.update(id(tensor) for tensor in node.outputs)
        else:
            yield node


def at_the_end(node: gs.Node, index: int, shapes: Shapes) -> Iterator[tuple[gs.Node, gs.Node]]:
    """Yield the nodes that both branches end in alike, last first, for one output of an If.

    Of each pair all inputs are the same but one, which the pair before it makes.
    """
    values = [node.attrs[name].outputs[index] for name in BRANCHES]
    first = True
    while node.outputs[index].name:
        pair = [
            _lone_maker(v, node.attrs[b], given=first)
            for v, b in zip(values, BRANCHES, strict=True)
        ]
        if pair[0] is None or pair[1] is None:
            return
        other = _other_input(pair[0], pair[1])
        if other is None or not _are_alike(*other, shapes):
            return
        yield pair[0], pair[1]
        values, first = list(other), False


def _lone_maker(value: gs.Tensor, branch: gs.Graph, *, given: bool) -> gs.Node | None:
    """Return the node of ``branch`` that makes ``value`` for one reader; ``given``: for the caller."""
    times = sum(tensor is value for tensor in branch.outputs)
    if not value.inputs or times != given or len(value.outputs) != (not given):
        return None
    maker: gs.Node = value.inputs[0]
    is_own = any(maker is inner for inner in branch.nodes)
    return maker if is_own and len(maker.outputs) == 1 else None


def _other_input(one: gs.Node, other: gs.Node) -> tuple[gs.Tensor, gs.Tensor] | None:
    """Return what two nodes that do the same read that is not the same; None where they differ."""
    if op_key(one) != op_key(other):
        return None
    if bodies_of(one) or not is_deterministic(one) or not _are_same(one.attrs, other.attrs):
        return None
    if len(one.inputs) != len(other.inputs):
        return None
    pairs = {
        (id(a), id(b)): (a, b)
        for a, b in zip(one.inputs, other.inputs, strict=True)
        if not _is_same(a, b)
    }
    found = list(pairs.values())
    if len(found) != 1 or any(isinstance(t, gs.Constant) or not t.name for t in found[0]):
        return None
    a, b = found[0]
    # What is read twice, once as the same and once as the other, is told apart by place.
    return (a, b) if not any(a is t or b is t for t in _same_inputs(one, other)) else None


def _are_alike(one: gs.Tensor, other: gs.Tensor, shapes: Shapes) -> bool:
    """Whether an If can give either: tensors of one type."""
    dtype = shapes.dtype(one.name)
    return (
        dtype is not None
        and dtype == shapes.dtype(other.name)
        and not shapes.is_sequence(one.name)
        and not shapes.is_sequence(other.name)
    )


def _same_inputs(one: gs.Node, other: gs.Node) -> list[gs.Tensor]:
    return [a for a, b in zip(one.inputs, other.inputs, strict=True) if _is_same(a, b)]


def _are_same(some: dict[str, object], others: dict[str, object]) -> bool:
    """Whether two nodes have the same attributes: plain ones, told apart by type, too."""
    plain = all(isinstance(v, int | float | str | list) for v in (*some.values(), *others.values()))
    return plain and repr(sorted(some.items())) == repr(sorted(others.items()))


def _is_same(a: gs.Tensor, b: gs.Tensor) -> bool:
    if a is b or (not a.name and not b.name):
        return True
    if not isinstance(a, gs.Constant) or not isinstance(b, gs.Constant):
        return False
    if np.dtype(a.dtype) != np.dtype(b.dtype) or tuple(a.shape) != tuple(b.shape):
        return False
    return np.asarray(a.values).tobytes() == np.asarray(b.values).tobytes()


def _hoist(branch: gs.Graph, moved: list[gs.Node], facts: Facts) -> Iterator[gs.Node]:
    """Take ``moved`` out of ``branch``; yield the nodes that give on what it gave out itself."""
    gone = {id(node) for node in moved}
    branch.nodes = [node for node in branch.nodes if id(node) not in gone]
    made = {id(tensor) for node in moved for tensor in node.outputs}
    for index, tensor in enumerate(branch.outputs):
        if id(tensor) in made:
            yield _given_on(branch, index, tensor, facts)


def _given_on(branch: gs.Graph, index: int, tensor: gs.Tensor, facts: Facts) -> gs.Node:
    """Let ``branch`` give ``tensor``, which it does not make or gives already, by an Identity."""
    given = gs.Variable(facts.fresh_name(tensor.name), facts.dtype(tensor))
    identity = Node("Identity", facts.fresh_name(tensor.name), {}, [tensor], [given])
    branch.nodes.append(identity)
    branch.outputs[index] = given
    return identity


def _sink(
    node: gs.Node, index: int, pair: tuple[gs.Node, gs.Node], facts: Facts
) -> Iterator[gs.Node]:
    """Let the first of ``pair`` do behind ``node`` what both do in its branches."""
    values = _other_input(*pair)
    assert values is not None, "at_the_end() gives no other pair"
    chosen = gs.Variable(facts.fresh_name(values[0].name), facts.dtype(values[0]))
    output = node.outputs[index]
    for name, value, gone in zip(BRANCHES, values, pair, strict=True):
        branch: gs.Graph = node.attrs[name]
        branch.nodes = [inner for inner in branch.nodes if inner is not gone]
        own = {id(tensor) for inner in branch.nodes for tensor in inner.outputs}
        own -= {id(tensor) for place, tensor in enumerate(branch.outputs) if place != index}
        branch.outputs[index] = value
        if id(value) not in own:
            yield _given_on(branch, index, value, facts)
    left, right = pair
    for place, tensor in enumerate(left.inputs):
        if tensor is values[0]:
            left.inputs[place] = chosen
    right.inputs.clear()
    right.outputs.clear()
    left.outputs.clear()
    node.outputs[index] = chosen
    left.outputs.append(output)
