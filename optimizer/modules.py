"""The torch modules of a compile: which nodes they run, and where they stand in the package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import onnx_graphsurgeon as gs

from optc.optimizer.package import copy_in, sha256_of
from optc.optimizer.partition import Off, Refused
from optc.optimizer.replace import Replaced
from optc.optimizer.torch_module import SUFFIXES, ModuleRejected, TorchModule, kind_of
from optc.passes.custom_operator import Key, key_of
from optc.passes.graph import Node, all_nodes, export_model, op_key
from optc.passes.split import REPLACED
from optc.specs.check import CheckedSpec
from optc.specs.diagnostic import Diagnostic, EnvironmentFault, Place, SpecError
from optc.specs.manifest import Runtime

FOLDER = "modules"
"""Of a package, with the modules that it brings."""


class Modules:
    """The torch modules that a spec gives.

    Args:
        checked: The spec, which names no file that is not there.
        replaced: The nodes that stand for ranges.

    Attributes:
        replaced: As given.
        files: Operator, as domain and op -> the file of its module.
    """

    def __init__(self, checked: CheckedSpec, replaced: Sequence[Replaced]) -> None:
        self.replaced = tuple(replaced)
        self._place = checked.place
        self.files: dict[Key, Path] = {}
        self._keys: dict[Key, tuple[str | int, ...]] = {}  # of the entry in the spec
        self._loaded: dict[Path, TorchModule] = {}
        for index, operator in enumerate(checked.spec.operators):
            if operator.torch is not None:
                key = key_of(operator.op)
                self.files[key] = checked.path.parent / operator.torch
                self._keys[key] = ("operators", index)
        for index, each in enumerate(replaced):
            self.files[each.operator.key] = each.module
            self._keys[each.operator.key] = ("partition", "replace", index)

    def off(self, graph: gs.Graph) -> Off:
        """Return the nodes that stand for ranges, and by which words of the spec."""
        words = {each.operator.op: each.words for each in self.replaced}
        return {
            node.name: Refused("spec", words[node.op])
            for node in graph.nodes
            if node.domain == REPLACED and node.op in words
        }

    def runtimes(self, graph: gs.Graph) -> dict[str, Runtime]:
        """Return name of a node that stands for a range -> the runtime that has to run it."""
        return dict.fromkeys(self.off(graph), "torch")

    def origins(self, found: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        """Return which nodes of the original those of a graph stand for.

        Args:
            found: Name of a node -> which nodes it stands for, where a range counts as its node.
        """
        ranges = {each.node: each.origins for each in self.replaced}
        return {
            name: tuple(each for origin in origins for each in ranges.get(origin, (origin,)))
            for name, origins in found.items()
        }

    # -- whether they fit

    def check(self, graph: gs.Graph) -> list[Diagnostic]:
        """Make sure that the modules load here and take what their nodes give them; return notes.

        Raises:
            EnvironmentFault: ``missing-extra``, where torch is not installed.
            SpecError: ``bad-module``, ``torch-in-body``.
        """
        problems: dict[str, Diagnostic] = {}
        notes: dict[str, Diagnostic] = {}
        outside = {id(node) for node in graph.nodes}
        for node, key in self._used(graph):
            path = self.files[key]
            place = self._place(*self._keys[key], "torch")
            if id(node) not in outside:
                op = "::".join(key).removeprefix("::")
                text = (
                    "torch cannot run nodes in the body of a control-flow node: "
                    f"`{node.name}` ({op})"
                )
                todo = "run it with a library of ONNX Runtime, or export it outside of the body"
                problems.setdefault(text, Diagnostic("torch-in-body", text, todo, place))
                continue
            try:
                module = self.loaded(key)
            except ModuleRejected as error:
                problems.setdefault(str(error), _bad_module(str(error), place))
                continue
            proto = export_model(_alone(node, graph), value_info=False).graph.node[0]
            for why in module.problems(proto):
                text = f"`{path.name}` cannot run the node `{node.name}`: {why}"
                problems.setdefault(text, _bad_module(text, place))
            for name in module.ignored(proto):
                text = (
                    f"`{path.name}` is an exported program, in which arguments that are no tensors "
                    f"have the values that it was exported with: `{name}` of the node "
                    f"`{node.name}` is not given to it"
                )
                todo = "export it with the values that the model has"
                notes.setdefault(text, Diagnostic("attribute-not-given", text, todo, place, "note"))
        if problems:
            raise SpecError(*problems.values())
        return list(notes.values())

    def loaded(self, key: Key) -> TorchModule:
        """Return the module of an operator, loaded once.

        Raises:
            EnvironmentFault: ``missing-extra``.
            ModuleRejected: If it does not load.
        """
        path = self.files[key]
        if path not in self._loaded:
            self._loaded[path] = TorchModule(path)
        return self._loaded[path]

    def of_graph(self, graph: gs.Graph) -> dict[Key, TorchModule]:
        """Return the modules that nodes of ``graph`` run on, each loaded once.

        Raises:
            EnvironmentFault: ``missing-extra``.
            ModuleRejected: If one does not load, which `check` has found out.
        """
        return {key: self.loaded(key) for _, key in self._used(graph)}

    def _used(self, graph: gs.Graph) -> Iterator[tuple[gs.Node, Key]]:
        for node in all_nodes(graph):
            key = op_key(node)
            if key in self.files:
                yield node, key

    # -- in a package

    @cached_property
    def packaged(self) -> Mapping[Key, str]:
        """Operator -> where its module stands in the package; the same file is there once."""
        found: dict[Key, str] = {}
        known: dict[str, str] = {}
        for key, path in self.files.items():
            try:
                sha256, suffix = sha256_of(path), SUFFIXES[kind_of(path)]
            except OSError as error:
                raise _unreadable(path, error.strerror or str(error)) from error
            except ModuleRejected as error:
                raise _unreadable(path, str(error)) from error
            if sha256 not in known:
                stem = "".join(c if c.isalnum() or c in "-_." else "-" for c in key[1])
                name, count = f"{FOLDER}/{stem}{suffix}", 1
                while name in known.values():
                    count += 1
                    name = f"{FOLDER}/{stem}-{count}{suffix}"
                known[sha256] = name
            found[key] = known[sha256]
        return found

    def copy_to(self, package: Path) -> None:
        """Copy the modules to their places in the package.

        Raises:
            EnvironmentFault: ``module-unreadable``, where one is gone meanwhile.
        """
        for key, path in self.packaged.items():
            if not (package / path).exists():
                copy_in(self.files[key], package / path, partial(_unreadable, self.files[key]))

    def module_of(self, node: gs.Node) -> str | None:
        """Return where in the package the module of ``node`` stands; None where it has none."""
        key = op_key(node)
        return self.packaged[key] if key in self.files else None

    @property
    def recorded(self) -> dict[str, str]:
        """Operator as ``domain::op`` -> where its module stands in the package."""
        return {f"{domain}::{op}": path for (domain, op), path in self.packaged.items()}


def _bad_module(problem: str, place: Place | None) -> Diagnostic:
    todo = "save it with `torch.jit.save` or `torch.export.save`, taking what the node has"
    return Diagnostic("bad-module", problem, todo, place)


def _unreadable(path: Path, why: str) -> EnvironmentFault:
    return EnvironmentFault(
        Diagnostic(
            "module-unreadable",
            f"the module `{path}` cannot be read: {why}",
            "leave it where it is while optc compiles",
        )
    )


def _alone(node: gs.Node, graph: gs.Graph) -> gs.Graph:
    """Return a graph with a node of that op, its attributes and as many inputs, and no weights."""
    read = [gs.Variable(tensor.name) for tensor in node.inputs]
    made = [gs.Variable(tensor.name) for tensor in node.outputs]
    part = gs.Graph([Node(node.op, node.name, dict(node.attrs), read, made, node.domain)])
    part.import_domains, part.opset = graph.import_domains, graph.opset
    return part
