r"""Push Transposes through operators that work in any layout, to where they cancel.

    before                              after

    x                                   x
    |                                   |
    Conv                                Conv
    |                                   |
    Transpose 0 2 3 1    scale [C]      |     scale [C,1,1]
    |                   /               |    /
    Mul ---------------                 Mul
    |                                   |
    Softmax, axis 3                     Softmax, axis 1
    |                                   |
    Transpose 0 3 1 2                   |
    |                                   |
    Conv                                Conv

Why it holds: an operator that works element by element, along axes that it is told of, or that only
moves data gives the turned result if it reads turned inputs and the axes are renamed: arithmetic,
activations, comparisons, Cast, Concat, Split, Slice, Pad, Gather, Tile, Softmax, reductions, ArgMax,
Squeeze, QuantizeLinear and its inverse. Constants are turned when the pass runs.

Such operators that hang together are turned together, in the part of them where that leaves the fewest
Transposes: found as the smallest cut between what is there turned and what is not. It is done only if
there are strictly fewer Transposes then, so it comes to an end and never adds one on balance. Exact, but
for sums and means, which may add in another order.

Keeps: outputs in their layout. A tensor that is turned inside gets a new name.
Skips silently what would save nothing. Constants of more than 1 MiB are not turned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.graph import Node, detach, producer, redirect
from optc.passes.layout import Layout, is_free, layout_of, turn
from optc.passes.minimum_cut import Network
from optc.passes.movement import composed, inverse, perm_of

MOST_NODES = 2000
"""Operators that are turned together at most: finding a cut takes more than linear time."""

CANDIDATES = 2
"""Permutations that are tried of those that meet at the edge of a region."""

Perm = tuple[int, ...]


class PushTransposes(Pass):
    """Push Transposes through operators that work in any layout, to where they cancel."""

    name = "push-transposes"
    exactness = "exact, but for the order in which sums add"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Turn what is better turned in ``graph``."""
        report = Report()
        transposes = facts.nodes("Transpose")
        if not transposes:
            return report
        finder = _Finder(facts, {id(node) for node in graph.nodes})
        for transpose in transposes:
            if not transpose.outputs:  # cancelled
                continue
            for region in finder.regions_at(transpose):
                for perm in region.candidates():
                    turned = region.best(perm)
                    if region.cost(frozenset(), perm) > region.cost(turned, perm):
                        region.turn(turned, perm, graph, report)
                        break
        return report


class _Finder:
    """Finds regions; each operator is in one at most."""

    def __init__(self, facts: Facts, here: set[int]) -> None:
        self.facts = facts
        self.here = here
        self.layouts: dict[int, Layout | None] = {}
        self.visited: set[int] = set()

    def layout(self, node: gs.Node | None) -> Layout | None:
        """Return the layout of a node of the graph at hand."""
        if node is None or id(node) not in self.here:
            return None
        if id(node) not in self.layouts:
            self.layouts[id(node)] = layout_of(node, self.facts)
        return self.layouts[id(node)]

    def regions_at(self, transpose: gs.Node) -> Iterator[_Region]:
        """Yield the regions that end or begin with ``transpose``."""
        before = producer(transpose.inputs[0])
        for start in (before, *transpose.outputs[0].outputs):
            if start is not None and id(start) not in self.visited and self.layout(start):
                yield self.region(start)

    def region(self, start: gs.Node) -> _Region:
        nodes: dict[int, gs.Node] = {id(start): start}
        pending = [start]
        while pending and len(nodes) < MOST_NODES:
            for node in self.neighbours(pending.pop()):
                if id(node) not in nodes and id(node) not in self.visited:
                    nodes[id(node)] = node
                    pending.append(node)
        self.visited |= nodes.keys()
        layouts = {key: layout for key in nodes if (layout := self.layouts[key]) is not None}
        return _Region(nodes, layouts, self.facts, self.here)

    def neighbours(self, node: gs.Node) -> Iterator[gs.Node]:
        """Yield the nodes that share a tensor with ``node`` that is laid out in both."""
        layout = self.layout(node)
        assert layout is not None, "only such nodes are visited"
        for tensor in _laid_out(node, layout):
            for other in (*tensor.inputs, *tensor.outputs):
                found = self.layout(other)
                if found is not None and any(t is tensor for t in _laid_out(other, found)):
                    yield other


def _laid_out(node: gs.Node, layout: Layout) -> Iterator[gs.Tensor]:
    for index in layout.inputs:
        if not isinstance(node.inputs[index], gs.Constant):
            yield node.inputs[index]
    for index in layout.outputs:
        if node.outputs[index].name:
            yield node.outputs[index]


class _Region:
    """Operators that hang together and work in any layout, and the tensors they read and make."""

    def __init__(
        self,
        nodes: dict[int, gs.Node],
        layouts: dict[int, Layout],
        facts: Facts,
        here: Collection[int],
    ) -> None:
        self.here = here
        self.nodes = nodes
        self.layouts = layouts
        self.facts = facts
        self.rank = next(iter(layouts.values())).rank
        self.tensors: dict[int, gs.Tensor] = {}
        self.readers: dict[int, list[int]] = {}  # tensor -> nodes of the region
        self.makers: dict[int, int] = {}  # tensor -> node of the region
        for key, node in nodes.items():
            layout = layouts[key]
            for tensor in _laid_out(node, layout):
                if not is_free(tensor, facts):
                    self.tensors[id(tensor)] = tensor
            for index in layout.inputs:
                self.readers.setdefault(id(node.inputs[index]), []).append(key)
            for index in layout.outputs:
                self.makers[id(node.outputs[index])] = key
        # One that leads from the region back into it is turned on both sides: it counts as any node.
        self.inner = {
            id(node)
            for tensor in self.tensors.values()
            for node in tensor.outputs
            if node.op == "Transpose" and node.outputs and id(node.outputs[0]) in self.tensors
        }

    # What is around it

    def before(self, tensor: gs.Tensor) -> tuple[gs.Node, Perm] | None:
        """Return the Transpose that makes ``tensor``, and its permutation."""
        return self.transpose(producer(tensor))

    def after(self, tensor: gs.Tensor) -> list[tuple[gs.Node, Perm]]:
        """Return the Transposes that read ``tensor``, and their permutations."""
        found = map(self.transpose, tensor.outputs)
        return [pair for pair in found if pair is not None]

    def transpose(self, node: gs.Node | None) -> tuple[gs.Node, Perm] | None:
        if node is None or node.op != "Transpose" or node.domain:
            return None
        if id(node) in self.inner or id(node) not in self.here:
            return None
        perm = perm_of(node, self.facts.shapes)
        return None if perm is None or len(perm) != self.rank else (node, tuple(perm))

    def is_read_elsewhere(self, tensor: gs.Tensor) -> bool:
        """Whether someone needs ``tensor`` in the layout it has."""
        inside = set(self.readers.get(id(tensor), ())) | {id(n) for n, _ in self.after(tensor)}
        return self.facts.is_kept(tensor) or any(id(n) not in inside for n in tensor.outputs)

    def candidates(self) -> list[Perm]:
        """Return the permutations that would cancel most Transposes."""
        votes: Counter[Perm] = Counter()
        for tensor in self.tensors.values():
            if (maker := self.before(tensor)) is not None:
                votes[inverse(maker[1])] += 1
            votes.update({perm for _, perm in self.after(tensor)})
        return [perm for perm, _ in votes.most_common(CANDIDATES)]

    # What is best

    def best(self, perm: Perm) -> frozenset[int]:
        """Return the nodes that leave the fewest Transposes if they are turned by ``perm``."""
        every = frozenset(key for key, layout in self.layouts.items() if layout.allows(perm))
        if self.cost(every, perm) == 0:  # the usual case, and nothing is better
            return every
        network = Network()
        for key, layout in self.layouts.items():
            if not layout.allows(perm):
                network.add("plain", key)
        for key, tensor in self.tensors.items():
            maker = self.before(tensor)
            made: int | str = self.makers.get(key, "plain")
            if maker is not None and composed(maker[1], perm) == tuple(range(self.rank)):
                made = "turned"
            readers: set[int | str] = {*self.readers.get(key, ())}
            if self.is_read_elsewhere(tensor):
                readers.add("plain")
            if any(found == perm for _, found in self.after(tensor)):
                readers.add("turned")
            # One Transpose serves all that read a turned tensor plain, one all the other way round.
            network.add(("plain", key), made, 1)
            network.add(made, ("turned", key), 1)
            for reader in readers:
                network.add(reader, ("plain", key))
                network.add(("turned", key), reader)
        # Of equal cuts, the one that turns least.
        turned = network.sink_side("plain", "turned", self.cost(frozenset(), perm))
        return frozenset(key for key in self.nodes if turned is not None and key in turned)

    def cost(self, turned: frozenset[int], perm: Perm) -> int:
        """Return how many Transposes there are around and inside if ``turned`` are turned."""
        total = 0
        for key, tensor in self.tensors.items():
            readers = set(self.readers.get(key, ()))
            plain = bool(readers - turned) or self.is_read_elsewhere(tensor)
            after = self.after(tensor)
            direct = [found for _, found in after if found == perm]
            if (maker := self.before(tensor)) is not None:
                cancels = composed(maker[1], perm) == tuple(range(self.rank))
                total += (plain or bool(after)) + (bool(readers & turned) and not cancels)
            elif self.makers.get(key) in turned:
                total += plain + len(after) - len(direct)
            else:
                total += len(after) + (bool(readers & turned) and not direct)
        return total

    # Doing it

    def turn(self, turned: frozenset[int], perm: Perm, graph: gs.Graph, report: Report) -> None:
        """Turn the nodes ``turned`` by ``perm``."""
        news = {
            key: self.turned_tensor(tensor, turned, perm, graph, report)
            for key, tensor in self.tensors.items()
            if self.makers.get(key) in turned or turned & set(self.readers.get(key, ()))
        }
        for key in turned:
            node, layout = self.nodes[key], self.layouts[key]
            turn(node, layout, perm, self.facts)
            for index in layout.inputs:
                node.inputs[index] = news.get(id(node.inputs[index]), node.inputs[index])
            report.merged[node.name] = (node.name,)
        for key, tensor in self.tensors.items():
            if self.makers.get(key) in turned:
                self.restore(tensor, news[key], perm, graph, report)
        for tensor in self.tensors.values():
            maker = self.before(tensor)
            if maker is not None and not tensor.outputs and not self.facts.is_kept(tensor):
                report.removed[maker[0].name] = "what reads it works in any layout"

    def turned_tensor(
        self,
        tensor: gs.Tensor,
        turned: frozenset[int],
        perm: Perm,
        graph: gs.Graph,
        report: Report,
    ) -> gs.Tensor:
        """Return what ``tensor`` is in the new layout."""
        source, names = tensor, (self.nodes[next(iter(turned))].name,)
        order = perm
        if (maker := self.before(tensor)) is not None:
            source, order = maker[0].inputs[0], composed(maker[1], perm)
            names = (maker[0].name,)
            if order == tuple(range(self.rank)):
                return source
        direct = [node for node, found in self.after(tensor) if found == perm]
        if self.makers.get(id(tensor)) in turned:
            if direct:
                output = direct[0].outputs[0]
                report.removed[direct[0].name] = "what it reads works in any layout"
                detach(direct[0])
                return output
            return gs.Variable(self.facts.fresh_name(f"{tensor.name}_turned"), tensor.dtype)
        if direct:
            return direct[0].outputs[0]
        return self.transposed(source, order, names, graph, report)

    def transposed(
        self,
        source: gs.Tensor,
        perm: Perm,
        names: tuple[str, ...],
        graph: gs.Graph,
        report: Report,
        output: gs.Tensor | None = None,
    ) -> gs.Tensor:
        """Append a Transpose of ``source`` and return what it makes."""
        name = self.facts.fresh_name(f"{source.name}_transpose")
        if output is None:
            output = gs.Variable(self.facts.fresh_name(f"{name}_output"), source.dtype)
        node = Node("Transpose", name, {"perm": list(perm)}, [source], [output], domain="")
        graph.nodes.append(node)
        report.merged[name] = names
        return output

    def restore(
        self, tensor: gs.Tensor, new: gs.Tensor, perm: Perm, graph: gs.Graph, report: Report
    ) -> None:
        """Let the turned producer of ``tensor`` make ``new``, and give others what they read."""
        maker = self.nodes[self.makers[id(tensor)]]
        back = inverse(perm)
        for node, found in self.after(tensor):
            report.merged[node.name] = (node.name,)
            node.inputs[0] = new
            node.attrs["perm"] = list(composed(back, found))
            if found == perm and not self.facts.is_kept(node.outputs[0]):
                redirect(node.outputs[0], new)
        place = next(i for i, output in enumerate(maker.outputs) if output is tensor)
        maker.outputs[place] = new
        if tensor.outputs or self.facts.is_kept(tensor):
            self.transposed(new, back, (maker.name,), graph, report, tensor)
