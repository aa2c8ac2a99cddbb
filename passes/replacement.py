"""What passes share that write several nodes in place of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper

from optc.passes.contract import Facts, Report
from optc.passes.graph import Array, detach, nodes_in, redirect
from optc.passes.match import argument, names_of
from optc.passes.movement import reads_axes

Operand: TypeAlias = gs.Tensor | Array | np.generic | None
"""An input of a new node: a tensor, the value of a new constant, or None where it is left out."""


R = TypeVar("R", bound="Replacement")

Results: TypeAlias = Mapping[int, gs.Tensor] | gs.Tensor
"""What the outputs of a node now are, by their index; one tensor for the first."""


class Declined(Exception):
    """Why a node that is of the right kind is not replaced."""


@dataclass(slots=True)
class Replacement:
    """Nodes that are being written in place of ``node``.

    New nodes and constants are called after it; its outputs keep their names.

    Attributes:
        others: Nodes before it that the new ones stand for as well.
    """

    graph: gs.Graph
    facts: Facts
    node: gs.Node
    others: tuple[gs.Node, ...] = ()
    _new: list[gs.Node] = field(default_factory=list)

    def discard(self) -> None:
        """Take back what was written, so that nothing is known to read what it read."""
        for node in self._new:
            detach(node)

    def require_opset(self, version: int) -> None:
        """Make sure that the model imports at least ``version``; ask when all else is well.

        Raises:
            Declined: If it cannot be raised to it.
        """
        if not self.facts.reach_opset(version):
            raise Declined(f"the model cannot be raised to opset {version}")

    def input(self, index: int) -> gs.Tensor | None:
        """Return an input of the node, None where it is omitted."""
        return argument(self.node, index)

    def constant(self, value: Array | np.generic) -> gs.Constant:
        """Return a new constant."""
        array = np.asarray(value)
        return gs.Constant(self.facts.fresh_name(f"{self.node.name}_value"), array)

    def add(self, op: str, *inputs: Operand, domain: str = "", **attrs: Any) -> gs.Variable:
        """Add a node of one output and return what it makes.

        Args:
            op: Its operator.
            inputs: What it reads.
            domain: Of the operator.
            attrs: Its attributes; those that are None are left out.
        """
        [made] = self.add_with(1, op, *inputs, domain=domain, **attrs)
        return made

    def add_with(
        self, count: int, op: str, *inputs: Operand, domain: str = "", **attrs: Any
    ) -> list[gs.Variable]:
        """Add a node of ``count`` outputs and return what it makes."""
        name = self.facts.fresh_name(f"{self.node.name}_{op.lower()}")
        made = [gs.Variable(self.facts.fresh_name(f"{name}_out")) for _ in range(count)]
        node = gs.Node(
            op,
            name,
            attrs={key: value for key, value in attrs.items() if value is not None},
            inputs=[self._tensor(value) for value in inputs],
            outputs=made,
            domain=domain,
        )
        self._new.append(node)
        return made

    def _tensor(self, value: Operand) -> gs.Tensor:
        if value is None:
            return gs.Variable.empty()
        return value if isinstance(value, gs.Tensor) else self.constant(value)

    def along(self, op: str, tensor: gs.Tensor, axes: Sequence[int], **attrs: Any) -> gs.Variable:
        """Add a Squeeze, Unsqueeze or reduction over ``axes``, as the opset writes it."""
        if reads_axes(op, self.facts.opset):
            return self.add(op, tensor, np.array(axes, np.int64), **attrs)
        return self.add(op, tensor, axes=list(axes), **attrs)

    def cast(self, tensor: gs.Tensor, dtype: np.dtype[Any] | type) -> gs.Variable:
        """Add a Cast to ``dtype``."""
        return self.add("Cast", tensor, to=int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype))))

    def finish(self, report: Report, results: Results) -> None:
        """Put what was written in the place of the node, and say so in ``report``.

        Args:
            report: Of the pass.
            results: What the outputs of the node now are, by their index; one tensor for the first.
        """
        found = {0: results} if isinstance(results, gs.Tensor) else dict(results)
        outputs = [(output, found.get(index)) for index, output in enumerate(self.node.outputs)]
        detach(self.node)
        free = {id(made) for node in self._new for made in node.outputs}
        taken: dict[int, gs.Tensor] = {}  # what one output took over may be another output too
        for output, result in outputs:
            if not output.name or result is None:
                continue
            if id(result) not in free or id(result) in taken:
                result = self.add("Identity", taken.get(id(result), result))
            [maker] = result.inputs
            redirect(result, output)
            maker.outputs[next(i for i, t in enumerate(maker.outputs) if t is result)] = output
            taken[id(result)] = output
        self.graph.nodes.extend(self._new)
        for node in (each for new in self._new for each in nodes_in(new)):
            report.merged[node.name] = names_of(*self.others, self.node)


def replace_each(
    nodes: Sequence[gs.Node],
    facts: Facts,
    begin: Callable[[gs.Node], R],
    write: Callable[[R], Results],
) -> Report:
    """Put what ``write`` writes in the place of each of ``nodes``.

    Args:
        nodes: Of the graph at hand.
        facts: Of the pass.
        begin: Returns the replacement of a node, in which nothing is written yet.
        write: Writes it. Where it raises `Declined` nothing is left of it, and the report says why.
    """
    report = Report()
    _ = nodes and facts.shapes  # inferred before anything changes
    for node in nodes:
        new = begin(node)
        try:
            results = write(new)
        except Declined as reason:
            new.discard()
            report.skipped[node.name] = str(reason)
            continue
        new.finish(report, results)
    return report
