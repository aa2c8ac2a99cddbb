"""What a pass is, what it may know, and what it reports.

A pass rewrites one `onnx_graphsurgeon.Graph` in place: the main graph or the body of an If, Loop or
Scan. It does not recurse: the pipeline runs it on every body, innermost first. It holds options,
never state; it opens no file and prints nothing.

What the pipeline guarantees before a pass runs, and checks after each that changed something:
- every node has a name, and node and tensor names are unique over the whole model, bodies included;
- there are no ``Constant`` nodes: every constant is a ``gs.Constant`` tensor;
- ``graph.nodes`` is in topological order;
- a value read inside a body is the same tensor object as outside, so ``tensor.outputs`` lists the
  readers in bodies too. What it does not list are graph and body outputs: ask `Facts.is_kept`.
"""

from __future__ import annotations

import inspect
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from operator import itemgetter
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.graph import op_key
from optc.passes.opset import raise_opset

if TYPE_CHECKING:
    from optc.passes.dimension import Dim
    from optc.passes.graph import Array
    from optc.passes.precision import Lowering, NodePrecision
    from optc.passes.shape import Shapes

Group = Literal["clean", "fold", "fuse", "legalise", "lower"]
"""What a pass is for. Those that legalise run on the nodes that a target refuses or, where they are
named by ``--only``, on all that they know. Those that lower precision run where a spec asks for it."""


@dataclass(slots=True)
class Report:
    """What one run of a pass did to one graph.

    Attributes:
        merged: Name of a node that is left (or new) -> names of the nodes it now stands for, its
            own among them where it was there before.
        removed: Name of a node that is gone and that no other node stands for -> why.
        skipped: Name of a node where the pattern was met -> why it was left alone.
        noted: Name of a constant -> what became of its numbers that one may want to know.
        precisions: Of a pass that lowers: name of a new node -> what it is to compute in.
    """

    merged: dict[str, tuple[str, ...]] = field(default_factory=dict)
    removed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    noted: dict[str, str] = field(default_factory=dict)
    precisions: dict[str, NodePrecision] = field(default_factory=dict)

    @property
    def changed(self) -> bool:
        """Whether the graph differs from what came in."""
        return bool(self.merged or self.removed)


class Part:
    """The main graph or one body of a model, as it is when a pass sets out to run on it.

    Attributes:
        graph: The graph.
        conditional: Whether it is in a branch of an If.
    """

    def __init__(self, graph: gs.Graph, *, conditional: bool) -> None:
        self.graph = graph
        self.conditional = conditional

    @cached_property
    def index(self) -> dict[tuple[str, str], list[tuple[int, gs.Node]]]:
        """Domain and op -> such nodes, each with its position, in ascending order."""
        found: dict[tuple[str, str], list[tuple[int, gs.Node]]] = {}
        for place, node in enumerate(self.graph.nodes):
            found.setdefault(op_key(node), []).append((place, node))
        return found


class Facts:
    """What a pass may know beyond the graph it is given.

    Attributes:
        kept: Names of tensors that must stay, under their name: graph outputs, outputs of bodies,
            partition points.
        conditional: Whether the graph is in a branch of an If. It may be the branch that is never
            taken with the extents at hand, where sizes need not fit together.
        refused: Names of the nodes that a target refuses, for passes that legalise; None for others.
        lowering: What nodes are to compute in, for passes that lower precision; None for others.
    """

    def __init__(
        self,
        part: Part,
        model: gs.Graph,
        kept: frozenset[str],
        shapes: Callable[[], Shapes],
        fresh: Callable[[str], str],
        *,
        refused: frozenset[str] | None = None,
        lowering: Lowering | None = None,
    ) -> None:
        self.conditional = part.conditional
        self.kept = kept
        self.refused = refused
        self.lowering = lowering
        self._part = part
        self._model = model
        self._shapes = shapes
        self._fresh = fresh
        self._beyond: float = math.inf  # the lowest version that the model was seen not to reach

    @property
    def in_body(self) -> bool:
        """Whether the graph at hand is the body of an If, Loop or Scan."""
        return self._part.graph is not self._model

    @property
    def opset(self) -> int:
        """Version of the default domain that the model imports."""
        return int(self._model.opset)

    def reach_opset(self, version: int) -> bool:
        """Return whether the model imports at least ``version`` of the default domain.

        An older model is raised to it, all its nodes rewritten, where each of them can follow
        exactly. Ask only when everything else speaks for the rewrite that needs it.
        """
        if self.opset < version < self._beyond and not raise_opset(
            self._model, version, self._shapes, self._fresh
        ):
            self._beyond = version  # not asked of all nodes again for every pattern
        return self.opset >= version

    def nodes(self, *ops: str, domain: str = "") -> list[gs.Node]:
        """Return the nodes of the graph at hand with one of ``ops``, in topological order.

        Those of ``domain``; for a pass that legalises only those that the target refuses.
        A pass looks for its pattern from these, so that what has not changed is not searched again.
        """
        index = self._part.index
        found = [entry for op in ops for entry in index.get((domain, op), ())]
        if len(ops) > 1:
            found.sort(key=itemgetter(0))
        return [
            node
            for _, node in found
            if node.outputs  # what the pass took out since has none
            and node.op in ops
            and (self.refused is None or node.name in self.refused)
        ]

    @property
    def shapes(self) -> Shapes:
        """Shapes, dtypes and known integer values of all tensors, as of the start of this pass.

        Computed when first asked for. A tensor made since is not in it.
        """
        return self._shapes()

    def dims(self, tensor: gs.Tensor) -> tuple[Dim, ...] | None:
        """Return the extents of a tensor that may be a constant, also one made since; see `shapes`."""
        if isinstance(tensor, gs.Constant):
            return tuple(tensor.shape)
        return self.shapes.dims(tensor.name)

    def dtype(self, tensor: gs.Tensor) -> np.dtype[Any] | None:
        """Return the type of a tensor that may be a constant, also one made since; see `shapes`."""
        if isinstance(tensor, gs.Constant):
            found: np.dtype[Any] = np.dtype(tensor.dtype)
            return found
        return self.shapes.dtype(tensor.name)

    def constant(self, tensor: gs.Tensor | None) -> Array | None:
        """Return the value of a constant, or of a small tensor that is the same in every run."""
        if tensor is None:
            return None
        if isinstance(tensor, gs.Constant):
            return np.asarray(tensor.values)
        return self.shapes.constant(tensor.name)

    def is_kept(self, tensor: gs.Tensor) -> bool:
        """Whether ``tensor`` must stay under its name whatever happens to its producer."""
        return tensor.name in self.kept

    def is_shared(self, tensor: gs.Tensor) -> bool:
        """Whether anyone besides one single node reads ``tensor``."""
        return len(tensor.outputs) != 1 or self.is_kept(tensor)

    def fresh_name(self, stem: str) -> str:
        """Return a tensor or node name that nothing in the model bears, made from ``stem``."""
        return self._fresh(stem)


@dataclass(frozen=True, slots=True)
class Option:
    """Something that a spec may set of a pass.

    Attributes:
        type: int, float, bool or str.
        default: What holds where it is not set.
        help: What it is, in one phrase.
        least: The least that a number may be; None for no bound.
    """

    type: type[Any]
    default: Any
    help: str
    least: float | None = None


def option(default: Any, help_: str, *, least: float | None = None) -> Any:
    """Return a field of a pass that a spec may set."""
    return field(default=default, metadata={"help": help_, "least": least})


class Pass(ABC):
    """A named rewrite of a graph, in place. Holds options, never state.

    Attributes:
        name: As written in a spec: a verb phrase with hyphens. The file has the same words.
        group: What it is for, as the reference lists it. All run to one fixpoint, in the order of the
            registry.
        exactness: What the rewrite does to the numbers, in one phrase for the reference.
    """

    name: ClassVar[str]
    group: ClassVar[Group] = "fold"
    exactness: ClassVar[str] = "exact"

    @abstractmethod
    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Rewrite ``graph`` in place and say what was done."""

    @classmethod
    def options(cls) -> dict[str, Option]:
        """Return what a spec may set of the pass: the fields of one that is a dataclass."""
        if not is_dataclass(cls):
            return {}
        return {
            f.name: Option(
                type(f.default), f.default, str(f.metadata["help"]), f.metadata.get("least")
            )
            for f in fields(cls)
        }

    @classmethod
    def explanation(cls) -> str:
        """Return all there is to know of the pass, for a person to read."""
        facts = [
            f"{cls.name}: {cls.summary()}",
            f"group: {cls.group}",
            f"exactness: {cls.exactness}",
        ]
        facts += [
            f"option {name}: {option.help} ({option.type.__name__}, by default {option.default})"
            for name, option in cls.options().items()
        ]
        text = inspect.cleandoc(sys.modules[cls.__module__].__doc__ or cls.__doc__ or "")
        return "\n".join(facts) + f"\n\n{text}"

    @classmethod
    def as_json(cls) -> dict[str, Any]:
        """Return the same for programs."""
        return {
            "name": cls.name,
            "group": cls.group,
            "exactness": cls.exactness,
            "summary": cls.summary(),
            "explanation": cls.explanation(),
            "options": {
                name: {"type": option.type.__name__, "default": option.default, "help": option.help}
                for name, option in cls.options().items()
            },
        }

    @classmethod
    def summary(cls) -> str:
        """Return the first line of the class's docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0]


Origins = Mapping[str, tuple[str, ...]]
"""Name of a node in the optimised model -> names of the original's nodes it stands for."""
