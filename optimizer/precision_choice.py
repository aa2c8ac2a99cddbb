"""Chooses what each node computes in: calibrates what is quantised, searches what must be kept.

spec, rules ─ wanted ─> levels of each node
    ─ calibrate ─> ranges of quantised tensors
    ─ ask parser and builder ─ search on the simulator ─> Choice
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optc.optimizer.capability import check_targets
from optc.optimizer.oracle import Oracle
from optc.optimizer.partition import Off, Plan
from optc.optimizer.precision import Kept, Wanted, wanted
from optc.optimizer.prepare import Prepared
from optc.optimizer.progress import Progress
from optc.passes.flops import is_product
from optc.passes.precision import NodePrecision
from optc.specs.compile_spec import Target
from optc.specs.diagnostic import Diagnostic, Place


@dataclass(slots=True)
class Choice:
    """What each node computes in, and why.

    Attributes:
        nodes: Node of the main graph -> its precision, below fp32.
        kept: Node -> why it computes in more than the spec asks for.
        evidence: What was measured, for the manifest.
        picture: The trade-off as an SVG; None where nothing was measured.
        notes: What the user should know.
    """

    nodes: dict[str, NodePrecision]
    kept: dict[str, Kept]
    evidence: Mapping[str, Any] | None = None
    picture: str | None = None
    notes: list[Diagnostic] = field(default_factory=list)


class Chooser:
    """Chooses what each node of a model computes in.

    Args:
        prepared: The model, whose spec asks for less than fp32 somewhere.
        oracle: Asked what targets can.
        progress: Told of what goes on.
    """

    def __init__(self, prepared: Prepared, oracle: Oracle, progress: Progress) -> None:
        self._prepared = prepared
        self._oracle = oracle
        self._progress = progress
        self.wanted = wanted(prepared)

    @property
    def draft(self) -> dict[str, NodePrecision]:
        """Each node at its lowest."""
        return self.wanted.draft

    def is_lowered(self, name: str) -> bool:
        """Whether a node of the main graph is to be lowered."""
        return name in self.wanted.levels

    def keep(self, refused: Off) -> None:
        """Keep in fp32 what TensorRT takes in fp32 only."""
        for name, why in refused.items():
            if self.wanted.levels.pop(name, None):
                node = self._prepared.question.node(name)
                self.wanted.kept[name] = Kept(name, node.op, "fp32", why.by, why.text)

    def calibrated(self) -> dict[str, float]:
        """Return name of a tensor that is quantised -> the largest magnitude it stands for."""
        return {}

    def check_targets(self, targets: Sequence[Target]) -> None:
        """Make sure that all targets compute in what nodes are lowered to.

        Raises:
            SpecError: ``precision-not-on-target``.
        """
        precisions = {each for levels in self.wanted.levels.values() for each in levels}
        check_targets(precisions, targets, self._oracle, self._place)

    def _place(self, precision: NodePrecision) -> Place | None:
        """Return where the spec names ``precision``."""
        checked = self._prepared.checked
        for index, layer in enumerate(checked.spec.precision.layers):
            if layer.precision == precision:
                return checked.place("precision", "layers", index, "precision")
        return checked.place("precision", "default") or checked.place("precision")

    def choose(self, plans: Sequence[Plan]) -> Choice:
        """Return what each node computes in, and let ``plans`` do so."""
        nodes = {name: levels[0] for name, levels in self.wanted.levels.items()}
        choice = Choice(nodes, self.wanted.kept)
        for plan in plans:
            lower(plan, choice, self.wanted, self._prepared)
        return choice


def lower(plan: Plan, choice: Choice, wanted: Wanted, prepared: Prepared) -> None:
    """Let ``plan`` compute in what was chosen, where it is on TensorRT.

    A node that is rewritten for the target computes in fp32, as the search did not see what it
    became; but the product in it, if it is one, is the node's own.
    """
    chosen: dict[str, NodePrecision] = {}
    for name, precision in choice.nodes.items():
        rewritten = name in plan.recipes and not is_product(prepared.question.node(name))
        if name not in plan.off and not rewritten:
            chosen[name] = precision
    plan.lowered = wanted.spread(chosen)


def kept_in(
    nodes: Sequence[str],
    plans: Sequence[Plan],
    choice: Choice,
    not_lowered: Mapping[str, str],
    prepared: Prepared,
) -> list[Kept]:
    """Return those of ``nodes``, which a stage of ``plans`` has, that compute in more than asked for.

    Args:
        nodes: Names.
        plans: Of the targets that share the stage.
        choice: What was chosen.
        not_lowered: Name of a node that was to be lowered and could not be -> why.
        prepared: The model.
    """
    found = []
    for name in nodes:
        op = prepared.question.node(name).op
        if name in not_lowered:
            found.append(Kept(name, op, "fp32", "rule", not_lowered[name]))
        elif raised := plans[0].raised.get(name):
            found.append(Kept(name, op, "fp32", raised.by, raised.text))
        elif name in choice.kept:
            found.append(choice.kept[name])
        elif name in choice.nodes and name not in plans[0].lowered and name in plans[0].recipes:
            passes = ", ".join(plans[0].recipes[name].recipe.passes)
            found.append(Kept(name, op, "fp32", "rule", f"rewritten for TensorRT by {passes}"))
    return found
