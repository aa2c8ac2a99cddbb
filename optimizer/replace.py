"""Puts one node in place of a range of nodes that a torch module stands for: `partition.replace`.

    before                              after

    features                            features
       |                                   |
    Conv -> Relu -> Gemm                 rescore      (of the domain optc.replaced)
       |                                   |
    scores                              scores

Done when the model is loaded, before any pass. From then on the node is a custom operator like any
other: what it returns is told by what shape inference says of the range (`CustomOperator`), and a
module on torch runs it. The original model is not touched, so verification holds the whole package
against it.

A range is what lies between the tensors `from` and the tensors `to`. It can be cut out where

- all that leads to a `to` tensor comes through the `from` tensors, or is constant;
- nothing outside reads what it makes, but for the `to` tensors; sizes and constants that are read
  elsewhere too are computed there again;
- it needs nothing that it makes itself, and shares no node with another range.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import networkx as nx
import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper

from optc.passes.custom_operator import CustomOperator, CustomOutput
from optc.passes.dimension import Dim, Interval, substitute, symbols
from optc.passes.graph import (
    Names,
    Node,
    bodies_of,
    detach,
    nodes_in,
    reads,
    redirect,
    remove_dead,
    sorted_nodes,
)
from optc.passes.shape import Shapes, infer
from optc.passes.split import REPLACED
from optc.specs.check import CheckedSpec
from optc.specs.compile_spec import Replacement
from optc.specs.diagnostic import Diagnostic, SpecError, quoted

MOST_SHOWN = 6
"""Nodes of a path that are told; those in the middle are left out."""

MOST_BOUNDS = 6
"""How many of them may rest on one another."""


@dataclass(frozen=True, slots=True)
class Replaced:
    """A node that stands for a range.

    Attributes:
        node: Its name.
        origins: Names of the nodes of the range.
        operator: What it returns.
        module: The file of what runs it.
        words: How the spec asks for it.
    """

    node: str
    origins: tuple[str, ...]
    operator: CustomOperator
    module: Path
    words: str


@dataclass(slots=True)
class _Range:
    """The nodes between `from` and `to`, by index in the graph.

    Attributes:
        index: Of the entry in the spec.
        asked: The entry.
        leading: All nodes that lead to a `to` tensor from the `from` tensors or from constants.
        inside: Those of them that go.
    """

    index: int
    asked: Replacement
    leading: set[int] = field(default_factory=set)
    inside: set[int] = field(default_factory=set)


def replace_ranges(
    graph: gs.Graph, checked: CheckedSpec, ranges: Mapping[str, Interval]
) -> list[Replaced]:
    """Replace what the spec asks for in ``graph`` and return the nodes that stand for it.

    Args:
        graph: As it was loaded. Edited in place.
        checked: The spec.
        ranges: Smallest and largest extent of each symbol of the inputs.

    Raises:
        SpecError: ``bad-replacement``, with every range that cannot be cut out and what is in the
            way.
    """
    asked = checked.spec.partition.replace
    if not asked:
        return []
    shapes = infer(graph, opset=graph.opset, ranges=ranges)
    _fold_sizes(graph, shapes, {name for each in asked for name in (*each.from_, *each.to)})
    cutter = _Cutter(graph, shapes, checked)
    found = [cutter.range_of(index, each) for index, each in enumerate(asked)]
    cutter.check_together([each for each in found if each is not None])
    if cutter.problems:
        raise SpecError(*cutter.problems)
    done = [cutter.described(each) for each in found if each is not None]
    if cutter.problems:
        raise SpecError(*cutter.problems)
    for each, described in zip(found, done, strict=True):
        assert each is not None, "a range that is not found is a problem"
        cutter.cut_out(each, described)
    imported = {entry.domain for entry in graph.import_domains}
    if REPLACED not in imported:
        graph.import_domains = [*graph.import_domains, helper.make_opsetid(REPLACED, 1)]
    graph.nodes = sorted_nodes(graph)
    remove_dead(graph, frozenset(tensor.name for tensor in graph.outputs))
    return done


def _fold_sizes(graph: gs.Graph, shapes: Shapes, ends: Collection[str]) -> None:
    """Make constants of the sizes that are the same in every run, but for ``ends``.

    An exporter computes them from tensors on both sides of a range, and passes would fold them: they
    are nothing that leads around a range, or out of it.
    """
    names = Names(graph)
    kept = {*ends, *(tensor.name for tensor in graph.outputs)}
    for node in graph.nodes:
        for tensor in () if bodies_of(node) else node.outputs:
            value = shapes.constant(tensor.name) if tensor.name not in kept else None
            if value is not None:
                redirect(tensor, gs.Constant(names.fresh(f"{tensor.name}_value"), np.array(value)))
    remove_dead(graph, frozenset(kept))


class _Cutter:
    """Finds ranges in one graph, says what is in their way, and cuts them out."""

    def __init__(self, graph: gs.Graph, shapes: Shapes, checked: CheckedSpec) -> None:
        self.problems: list[Diagnostic] = []
        self.graph = graph
        self.shapes = shapes
        self.checked = checked
        self.nodes = list(graph.nodes)
        self.reads = [list(reads(node)) for node in self.nodes]
        self.maker = {
            tensor.name: index
            for index, node in enumerate(self.nodes)
            for tensor in node.outputs
            if tensor.name
        }
        self.readers: dict[str, list[int]] = {}
        for index, read in enumerate(self.reads):
            for name in dict.fromkeys(tensor.name for tensor in read):
                self.readers.setdefault(name, []).append(index)
        self.tensors: dict[str, gs.Tensor] = {tensor.name: tensor for tensor in graph.inputs}
        for node, read in zip(self.nodes, self.reads, strict=True):
            self.tensors.update((tensor.name, tensor) for tensor in (*read, *node.outputs))
        self.outputs = {tensor.name for tensor in graph.outputs}
        self.names = Names(graph)

    def problem(self, problem: str, todo: str, *keys: str | int) -> None:
        path = ("partition", "replace", *keys)
        self.problems.append(
            Diagnostic("bad-replacement", problem, todo, self.checked.place(*path))
        )

    # -- one range

    def range_of(self, index: int, asked: Replacement) -> _Range | None:
        """Return the range of an entry of the spec, or None where something is in its way."""
        told = len(self.problems)
        for key, names in (("from", asked.from_), ("to", asked.to)):
            for at, name in enumerate(names):
                self._check_tensor(key, name, index, at)
        if len(self.problems) > told:
            return None
        found = _Range(index, asked)
        self._follow_back(found)
        if len(self.problems) == told:
            self._choose_inside(found)
        return found if len(self.problems) == told else None

    def _check_tensor(self, key: str, name: str, index: int, at: int) -> None:
        tensor = self.tensors.get(name)
        place = (index, key, at)
        if tensor is None or (key == "to" and name not in self.maker):
            self.problem(
                f"no node of the main graph makes `{name}`",
                "name a tensor that a node of the main graph makes",
                *place,
            )
        elif self.shapes.is_sequence(name) or getattr(tensor, "proto", None) is not None:
            self.problem(
                f"`{name}` is no tensor, and a module takes and gives tensors",
                "let the range begin or end where tensors are",
                *place,
            )

    def _follow_back(self, found: _Range) -> None:
        """Gather what leads to the `to` tensors; an input of the model on the way is a problem."""
        asked = found.asked
        ends = set(asked.from_)
        towards: dict[str, tuple[int, str]] = {}  # tensor -> who reads it, and what that makes
        pending = deque(asked.to)
        met = False
        while pending:
            name = pending.popleft()
            maker = self.maker.get(name)
            if maker is None:
                self.problem(
                    f"`{self._end_of(name, towards)}` depends on `{name}`, an input of the model that is not under `from`: "
                    + self._path(name, towards),
                    f"add `{name}` to `from`, or a tensor on that path",
                    found.index,
                    "to",
                )
                return
            if maker in found.leading:
                continue
            found.leading.add(maker)
            for tensor in self.reads[maker]:
                if tensor.name in ends:
                    met = True
                elif not isinstance(tensor, gs.Constant) and tensor.name not in towards:
                    towards[tensor.name] = (maker, name)
                    pending.append(tensor.name)
        if not met:
            listed = quoted(asked.from_)
            self.problem(
                f"nothing leads from {listed} to {quoted(asked.to)}",
                "name tensors under `from` that the others are computed from",
                found.index,
                "from",
            )

    def _end_of(self, name: str, towards: Mapping[str, tuple[int, str]]) -> str:
        while name in towards:
            name = towards[name][1]
        return name

    def _path(self, name: str, towards: Mapping[str, tuple[int, str]]) -> str:
        """Return the way from ``name`` to a `to` tensor, in words."""
        nodes = []
        start = name
        while name in towards:
            node, name = towards[name]
            nodes.append(self.nodes[node].name)
        return " -> ".join([f"`{start}`", *_shortened(nodes), f"`{name}`"])

    def _choose_inside(self, found: _Range) -> None:
        """Tell what of the range goes: what is read elsewhere must be sizes or constants."""
        asked = found.asked
        ends, given = set(asked.to), set(asked.from_)
        staying: set[int] = set()
        dependent: set[str] = set()
        for index in sorted(found.leading):
            node, read = self.nodes[index], self.reads[index]
            if any(t.name in given or t.name in dependent for t in read):
                dependent.update(tensor.name for tensor in node.outputs if tensor.name)
                if not self._is_size(node) or not all(
                    t.name in given
                    or isinstance(t, gs.Constant)
                    or self.maker.get(t.name) not in found.leading - staying
                    for t in read
                ):
                    continue
            if not any(tensor.name in ends for tensor in node.outputs):
                staying.add(index)
        found.inside = found.leading - staying
        for index in sorted(found.inside):
            for tensor in self.nodes[index].outputs:
                if not tensor.name or tensor.name in ends:
                    continue
                outside = [i for i in self.readers.get(tensor.name, ()) if i not in found.inside]
                outside = [i for i in outside if i not in staying or self._is_needed(i, found)]
                if tensor.name in given:
                    who = "under `from`"
                    todo = "leave it out, or let the range begin behind it"
                    self.problem(
                        f"`{tensor.name}` is {who}, and made inside the range `{asked.name}`",
                        todo,
                        found.index,
                        "from",
                    )
                elif outside or tensor.name in self.outputs:
                    reader = (
                        f"by the node `{self.nodes[outside[0]].name}`, which is outside of it"
                        if outside
                        else "by the caller: it is an output of the model"
                    )
                    self.problem(
                        f"`{tensor.name}` is made inside the range `{asked.name}` and read "
                        f"{reader}",
                        f"add `{tensor.name}` to `to`, and let the module give it, too",
                        found.index,
                        "to",
                    )

    def _is_size(self, node: gs.Node) -> bool:
        """Whether ``node`` makes nothing but sizes, which can be computed in several places."""
        names = [tensor.name for tensor in node.outputs if tensor.name]
        return bool(names) and all(map(self.shapes.is_size, names))

    def _is_needed(self, index: int, found: _Range) -> bool:
        """Whether something outside the range reads what the node ``index`` makes."""
        return any(
            reader not in found.leading
            for tensor in self.nodes[index].outputs
            for reader in self.readers.get(tensor.name, ())
        ) or any(tensor.name in self.outputs for tensor in self.nodes[index].outputs)

    # -- all of them together

    def check_together(self, found: Sequence[_Range]) -> None:
        """Refuse ranges that share nodes, and those that need what they make themselves."""
        owner: dict[int, _Range] = {}
        for each in found:
            shared = sorted(index for index in each.inside if index in owner)
            if shared:
                other = owner[shared[0]].asked.name
                self.problem(
                    f"the node `{self.nodes[shared[0]].name}` is in the range `{each.asked.name}` "
                    f"and in the range `{other}`",
                    "let one end where the other begins",
                    each.index,
                )
                return
            owner.update(dict.fromkeys(each.inside, each))
        view = nx.DiGraph()
        labels: dict[object, str] = {}

        def part(index: int) -> object:
            each = owner.get(index)
            label = self.nodes[index].name if each is None else f"the range `{each.asked.name}`"
            key: object = index if each is None else ("range", each.index)
            labels[key] = label
            return key

        for index, read in enumerate(self.reads):
            for tensor in read:
                maker = self.maker.get(tensor.name)
                if maker is not None and part(maker) != part(index):
                    view.add_edge(part(maker), part(index))
        for each in found:
            for name in each.asked.from_:
                if name in self.maker and part(self.maker[name]) != ("range", each.index):
                    view.add_edge(part(self.maker[name]), ("range", each.index))
        try:
            circle = [edge[0] for edge in nx.find_cycle(view)]
        except nx.NetworkXNoCycle:
            return
        first = next(n for n, key in enumerate(circle) if isinstance(key, tuple))
        circle = circle[first:] + circle[:first]
        each = next(r for r in found if ("range", r.index) == circle[0])
        path = [labels[key] for key in circle]
        shown = " -> ".join([path[0], *_shortened(path[1:]), path[0]])
        self.problem(
            f"the range `{each.asked.name}` needs what follows from what it makes: {shown}",
            "take apart what is before and what is behind that path, or take the path into the "
            "range",
            each.index,
            "from",
        )

    # -- cutting out

    def described(self, found: _Range) -> Replaced:
        """Return the node that is to stand for a range."""
        asked = found.asked
        operator = self._operator(found)
        for at, (name, output) in enumerate(zip(asked.to, operator.outputs, strict=True)):
            if output.dtype is None or output.dtype == np.object_:
                what = "not known" if output.dtype is None else "text, which torch does not have"
                self.problem(
                    f"the type of `{name}` is {what}",
                    "let the range end at another tensor",
                    found.index,
                    "to",
                    at,
                )
        path = self.checked.path.parent / asked.torch
        words = f"partition.replace: {asked.name}"
        origins = tuple(
            inner.name for index in sorted(found.inside) for inner in nodes_in(self.nodes[index])
        )
        return Replaced(self.names.fresh(asked.name), origins, operator, path, words)

    def _operator(self, found: _Range) -> CustomOperator:
        """Return what shape inference says of the range alone, over the axes of what it takes."""
        asked = found.asked
        names: dict[Dim, str] = {}
        intervals: dict[str, Interval] = {}
        given: list[tuple[str | int, ...]] = []
        inputs: list[gs.Tensor] = []
        for tensor_name in asked.from_:
            dims = self.shapes.dims(tensor_name)
            axes: list[str | int] = []
            for axis, dim in enumerate(dims or ()):
                if isinstance(dim, int):
                    axes.append(dim)
                    continue
                if dim not in names:
                    names[dim] = f"{tensor_name}[{axis}]"
                    intervals[names[dim]] = self.shapes.interval(dim)
                axes.append(names[dim])
            given.append(tuple(axes))
            dtype = self.shapes.dtype(tensor_name)
            inputs.append(gs.Variable(tensor_name, dtype, None if dims is None else axes))
        known = set(asked.from_)
        inputs += [tensor for tensor in self.graph.inputs if tensor.name not in known]
        part = gs.Graph([self.nodes[index] for index in sorted(found.leading)], inputs, [])
        part.opset, part.import_domains = self.graph.opset, self.graph.import_domains
        inferred = infer(part, opset=self.graph.opset, ranges=intervals)
        outputs = [
            CustomOutput(dtype=inferred.dtype(name), shape=inferred.dims(name)) for name in asked.to
        ]
        bounds: dict[str, Dim] = {}
        taken = {name for axes in given for name in axes if isinstance(name, str)}
        for output in outputs:
            for dim in output.shape or ():
                for name in symbols(dim) - taken:
                    bound = _bound(name, inferred, taken)
                    if bound is not None:
                        bounds[name] = bound
        return CustomOperator(REPLACED, asked.name, tuple(given), tuple(outputs), bounds)

    def cut_out(self, found: _Range, replaced: Replaced) -> None:
        """Put the node in the place of the range."""
        tensors = [self.tensors[name] for name in found.asked.to]
        for index in sorted(found.inside):
            for each in nodes_in(self.nodes[index]):
                detach(each)
        node = Node(
            found.asked.name,
            replaced.node,
            inputs=[self.tensors[name] for name in found.asked.from_],
            outputs=tensors,
            domain=REPLACED,
        )
        gone = {id(self.nodes[index]) for index in found.inside}
        self.graph.nodes = [each for each in self.graph.nodes if id(each) not in gone]
        self.graph.nodes.append(node)


def _bound(name: str, shapes: Shapes, taken: Iterable[str]) -> Dim | None:
    """Return what an inner symbol never exceeds, over the symbols ``taken`` alone."""
    bound = shapes.upper(name)
    known = set(taken)
    for _ in range(MOST_BOUNDS):  # a bound may rest on that of another
        if bound is None or symbols(bound) <= known:
            return bound
        inner = {each: shapes.upper(each) for each in symbols(bound) - known}
        meant = {each: upper for each, upper in inner.items() if upper is not None}
        if len(meant) < len(inner):
            return None
        bound = substitute(bound, meant)
    return None


def _shortened(names: Sequence[str]) -> list[str]:
    if len(names) <= MOST_SHOWN:
        return list(names)
    half = MOST_SHOWN // 2
    return [*names[:half], "…", *names[-half:]]
