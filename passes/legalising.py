"""Rewrites refused nodes of a graph by the passes that legalise.

One rewrite may not do: what it makes may be refused in turn (a quantised convolution becomes a
DequantizeLinear that the target refuses as well). So it goes in rounds, each followed by the
optimising passes. What was refused in each round is a `Recipe`: tried on the node alone, it is then
followed in the stage that the node is part of.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from optc.passes.contract import Pass
from optc.passes.graph import all_nodes
from optc.passes.pipeline import PipelineReport, optimise

Ranges = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a refused node is rewritten.

    Attributes:
        node: Its name.
        passes: Names of the passes that rewrite it on its own, in the order in which they first did.
        then: Round by round after the first, the ops among what it became that are refused in turn.
    """

    node: str
    passes: tuple[str, ...]
    then: tuple[frozenset[str], ...] = ()


@dataclass(slots=True)
class Legalisation:
    """A graph whose refused nodes are being rewritten, in place.

    Attributes:
        graph: The graph.
        owners: Name of a node of ``graph`` -> names of the nodes it came in with that it stands for.
        fired: Name of a node it came in with -> names of the passes that legalised it or what it
            became, in the order in which they first did.
        declined: Name of a refused node -> why a pass that knows it left it alone.
    """

    graph: gs.Graph
    legalisers: Sequence[Pass]
    optimisers: Sequence[Pass]
    ranges: Ranges
    owners: dict[str, tuple[str, ...]]
    fired: dict[str, list[str]]
    declined: dict[str, str]

    @classmethod
    def of(
        cls,
        graph: gs.Graph,
        legalisers: Sequence[Pass],
        optimisers: Sequence[Pass],
        ranges: Ranges,
    ) -> Legalisation:
        """Return ``graph``, in normal form, as it is before the first round."""
        owners: dict[str, tuple[str, ...]] = {n.name: (n.name,) for n in all_nodes(graph)}
        return cls(graph, legalisers, optimisers, ranges, owners, {}, {})

    def rewrite(self, refused: Collection[str]) -> bool:
        """Rewrite the nodes ``refused``, then optimise; return whether anything was rewritten."""
        report = optimise(
            self.graph, self.legalisers, ranges=self.ranges, refused=frozenset(refused)
        )
        for record in report.records:
            self.declined.update(record.skipped)
            for owner in {owner for name in record.origins for owner in self.owners[name]}:
                fired = self.fired.setdefault(owner, [])
                if record.name not in fired:
                    fired.append(record.name)
        self._follow(report)
        if not any(record.rewritten for record in report.records):
            return False
        self._follow(optimise(self.graph, self.optimisers, ranges=self.ranges))
        return True

    def rewrite_again(self, ops: Mapping[str, frozenset[str]]) -> bool:
        """Rewrite what nodes became that is refused in turn.

        Args:
            ops: Name of a node as it came in -> ops of what it became that are refused.
        """
        refused = [
            node.name
            for node in self.graph.nodes
            if any(node.op in ops.get(owner, ()) for owner in self.owners[node.name])
        ]
        return self.rewrite(refused)

    def follow(self, recipes: Sequence[Recipe]) -> None:
        """Rewrite the nodes of ``recipes`` as these say."""
        self.rewrite([recipe.node for recipe in recipes])
        for number in range(max((len(recipe.then) for recipe in recipes), default=0)):
            self.rewrite_again(
                {
                    recipe.node: recipe.then[number]
                    for recipe in recipes
                    if number < len(recipe.then)
                }
            )

    def _follow(self, report: PipelineReport) -> None:
        """Say for each node that is there now which of the first ones it stands for."""
        self.owners = {
            name: tuple(dict.fromkeys(owner for part in parts for owner in self.owners[part]))
            for name, parts in report.origins.items()
        }
