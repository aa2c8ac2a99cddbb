"""What the `operators` of a spec mean for a model: who runs its nodes, with which libraries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import onnx_graphsurgeon as gs
from onnx import helper

from optc.optimizer.custom_library import Libraries, try_out
from optc.optimizer.package import copy_in
from optc.optimizer.partition import Off, Plan, Question, Refused
from optc.passes.custom_operator import CustomOperator, declared, key_of
from optc.passes.dimension import Dim, substitute
from optc.passes.graph import Node, export_model, nodes_in, op_key
from optc.passes.shape import Profile, Shapes
from optc.specs.check import CheckedSpec
from optc.specs.compile_spec import Operator
from optc.specs.diagnostic import Diagnostic, EnvironmentFault, OptcError, Place, SpecError
from optc.specs.manifest import Runtime

FOLDER = "libraries"
"""Of a package, with the shared libraries that it brings."""

EMBEDDED_BYTES = 1 << 20
"""A node is tried with its constants up to this size: a library may ask for them when it loads."""


class Operators:
    """The custom operators of a spec.

    Args:
        checked: The spec, which names no operator twice and no file that is not there.
    """

    def __init__(self, checked: CheckedSpec) -> None:
        self._checked = checked
        self._folder = checked.path.parent
        self._known = {key_of(operator.op): operator for operator in checked.spec.operators}

    def declared(self) -> AbstractContextManager[None]:
        """Let shape inference know what they return."""
        return declared(map(CustomOperator.of, self._known.values()))

    @cached_property
    def libraries(self) -> Libraries:
        """The libraries of ONNX Runtime, each once."""
        return self._named(self._known.values(), "onnxruntime")

    @cached_property
    def plugins(self) -> Libraries:
        """The libraries of TensorRT plugins, each once."""
        return self._named(self._known.values(), "tensorrt")

    @cached_property
    def plugin_places(self) -> Mapping[Path, Place | None]:
        """Library of TensorRT plugins -> where the spec names it first."""
        return {
            library: next(
                self._place(operator, "tensorrt")
                for operator in self._known.values()
                if library in self._named([operator], "tensorrt")
            )
            for library in self.plugins
        }

    def _named(
        self, operators: Iterable[Operator], runner: Literal["onnxruntime", "tensorrt"]
    ) -> Libraries:
        names = (getattr(operator, runner) for operator in operators)
        return tuple(dict.fromkeys((self._folder / name).resolve() for name in names if name))

    def used_by(self, nodes: Iterable[gs.Node]) -> Iterator[tuple[gs.Node, Operator]]:
        """Yield the nodes that are custom ones, those in bodies too, with what they are."""
        for node in nodes:
            for each in nodes_in(node):
                if (found := self._known.get(op_key(each))) is not None:
                    yield each, found

    # --- who runs them ---------------------------------------------------------------------------

    def off(self, graph: gs.Graph) -> Off:
        """Return the nodes that the spec has another runtime than TensorRT run."""
        return {
            node.name: Refused("spec", f"operators: {operator.op} runs on {_RUNTIMES[runtime]}")
            for node, operator, runtime in self._elsewhere(graph)
        }

    def runtimes(self, graph: gs.Graph) -> dict[str, Runtime]:
        """Return name of a node of the main graph -> the runtime that has to run it where it is off.

        Of nodes that TensorRT runs with a plugin those are there that torch runs else.
        """
        found = {node.name: runtime for node, _, runtime in self._elsewhere(graph)}
        for node, operator in self.used_by(graph.nodes):
            if operator.torch is not None:
                found[node.name] = "torch"
        return found

    def _elsewhere(self, graph: gs.Graph) -> Iterator[tuple[gs.Node, Operator, Runtime]]:
        for node in graph.nodes:
            for _, operator in self.used_by([node]):
                if operator.tensorrt is None and (runtime := _runtime(operator)) is not None:
                    yield node, operator, runtime

    def run_by_plugins_alone(self, graph: gs.Graph) -> str | None:
        """Return an operator of ``graph`` that nothing but TensorRT runs; None where there is none."""
        for _, operator in self.used_by(graph.nodes):
            if _runtime(operator) is None:
                return operator.op
        return None

    # --- whether it is as declared ---------------------------------------------------------------

    def check(self, graph: gs.Graph, shapes: Shapes, profiles: Sequence[Profile]) -> None:
        """Make sure that nodes are as declared, and that the libraries here load and take them.

        Args:
            graph: The model.
            shapes: Of it.
            profiles: Ranges of its symbols. What is declared is tried at the ends of each, and at
                its usual extents: an engine is built for these.

        Raises:
            SpecError: ``not-as-declared``, ``library-not-loadable``, ``library-lacks-operator``.
        """
        problems = [*self._contradictions(graph, shapes, profiles), *self._unloadable(graph)]
        if problems:
            raise SpecError(*problems)

    def _contradictions(
        self, graph: gs.Graph, shapes: Shapes, profiles: Sequence[Profile]
    ) -> Iterator[Diagnostic]:
        for node, operator in self.used_by(graph.nodes):
            dims = [shapes.dims(t.name) if t.name else None for t in node.inputs]
            if found := CustomOperator.of(operator).contradictions(dims):
                yield Diagnostic(
                    "not-as-declared",
                    f"the node `{node.name}` is not as {operator.op} is declared: "
                    + "; ".join(found),
                    'declare the axes of its inputs as the model has them; "?" is any',
                    self._place(operator, "inputs"),
                )
                continue
            for extents in _corners(dims, profiles):
                if found := CustomOperator.of(operator).impossible(extents):
                    yield Diagnostic(
                        "not-as-declared",
                        f"the node `{node.name}` cannot be as {operator.op} is declared: "
                        + "; ".join(found),
                        "declare what it returns for every extent in `dims`, or narrow `dims`",
                        self._place(operator, "outputs"),
                    )
                    break

    def _unloadable(self, graph: gs.Graph) -> Iterator[Diagnostic]:
        """Try the libraries, and each kind of node with them, in a child process."""
        if not self.libraries:
            return
        models: dict[bytes, tuple[gs.Node, Operator]] = {}
        for node, operator in self.used_by(graph.nodes):
            if operator.onnxruntime and (model := _alone(node, graph)) is not None:
                models.setdefault(model, (node, operator))
        answers = try_out(self.libraries, list(models))
        for library, why in zip(self.libraries, answers.libraries, strict=True):
            if why is not None:
                named = next(
                    operator
                    for operator in self._known.values()
                    if library in self._named([operator], "onnxruntime")
                )
                yield Diagnostic(
                    "library-not-loadable",
                    f"ONNX Runtime cannot load `{named.onnxruntime}`: {why}",
                    "name a library of ONNX Runtime custom operators that was made for this kind "
                    "of machine and for a version of ONNX Runtime up to the one here",
                    self._place(named, "onnxruntime"),
                )
        for (node, operator), why in zip(models.values(), answers.models, strict=False):
            if why is not None:
                yield Diagnostic(
                    "library-lacks-operator",
                    f"with `{operator.onnxruntime}`, ONNX Runtime does not take the node "
                    f"`{node.name}` ({operator.op}): {why}",
                    "name the library that has the operator; its types are those that the model has, "
                    "and those under `outputs`",
                    self._place(operator, "onnxruntime"),
                )

    def _place(self, operator: Operator, key: str) -> Place | None:
        index = self._checked.spec.operators.index(operator)
        place = self._checked.place
        return place("operators", index, key) or place("operators", index)

    def check_plans(self, question: Question, plans: Sequence[Plan]) -> None:
        """Make sure that something runs every node.

        Raises:
            OptcError: ``no-runner-left``, where TensorRT refuses a node that only a plugin runs.
        """
        problems = []
        for plan in plans:
            for stage in plan.stages:
                if stage.runtime == "tensorrt":
                    continue
                for node, operator in self.used_by(question.nodes_of(stage)):
                    if _runtime(operator) is None:
                        why = next((plan.off[n] for n in stage.nodes if n in plan.off), None)
                        said = f", whose {why.by} says: {why.text}" if why else ""
                        problems.append(
                            Diagnostic(
                                "no-runner-left",
                                f"for the target `{plan.target.name}` the node `{node.name}` "
                                f"({operator.op}) does not run in TensorRT{said}; nothing else "
                                "runs it",
                                "name a library of ONNX Runtime or a torch module for it, too",
                                self._place(operator, "tensorrt"),
                            )
                        )
        if problems:
            raise OptcError(*problems)

    # --- in a package ----------------------------------------------------------------------------

    @cached_property
    def files(self) -> Mapping[Path, str]:
        """Library -> where it stands in the package."""
        found: dict[Path, str] = {}
        for library in (*self.libraries, *self.plugins):
            path, count = f"{FOLDER}/{library.name}", 1
            while path in found.values():  # of another folder
                count += 1
                path = f"{FOLDER}/{count}-{library.name}"
            found.setdefault(library, path)
        return found

    def copy_to(self, package: Path) -> None:
        """Copy the libraries to their places in the package.

        Raises:
            EnvironmentFault: ``library-unreadable``.
        """
        for library, path in self.files.items():
            copy_in(library, package / path, partial(_unreadable, library))

    @property
    def of_original(self) -> dict[str, str]:
        """Operator -> where in the package the library of ONNX Runtime is that has it."""
        return {
            operator.op: self.files[library]
            for operator in self._known.values()
            for library in self._named([operator], "onnxruntime")
        }

    def libraries_of(self, nodes: Iterable[gs.Node]) -> tuple[str, ...]:
        """Return where in the package the libraries of ONNX Runtime are that ``nodes`` need."""
        return self._in_package(nodes, "onnxruntime")

    def plugins_of(self, nodes: Iterable[gs.Node]) -> tuple[str, ...]:
        """Return where in the package the libraries of plugins are that ``nodes`` need."""
        return self._in_package(nodes, "tensorrt")

    def _in_package(
        self, nodes: Iterable[gs.Node], runner: Literal["onnxruntime", "tensorrt"]
    ) -> tuple[str, ...]:
        operators = (operator for _, operator in self.used_by(nodes))
        return tuple(self.files[library] for library in self._named(operators, runner))


_RUNTIMES: Mapping[Runtime, str] = {"onnxruntime": "ONNX Runtime", "torch": "torch"}


def _unreadable(library: Path, why: str) -> EnvironmentFault:
    return EnvironmentFault(
        Diagnostic(
            "library-unreadable",
            f"the library `{library}` cannot be read: {why}",
            "leave it where it is while optc compiles",
        )
    )


def _corners(
    inputs: Sequence[tuple[Dim, ...] | None], profiles: Sequence[Profile]
) -> Iterator[list[tuple[int | None, ...] | None]]:
    """Yield the extents of inputs at the least, usual and largest ones of each profile."""
    for profile in profiles:
        for at in ("min", "opt", "max"):
            extents: dict[str, Dim] = {name: getattr(of, at) for name, of in profile.items()}
            yield [
                None if dims is None else tuple(_fixed(substitute(dim, extents)) for dim in dims)
                for dims in inputs
            ]


def _fixed(dim: Dim) -> int | None:
    return dim if isinstance(dim, int) else None


def _runtime(operator: Operator) -> Runtime | None:
    """Return what runs an operator outside of TensorRT, or None."""
    if operator.torch is not None:
        return "torch"
    return "onnxruntime" if operator.onnxruntime is not None else None


def _alone(node: gs.Node, graph: gs.Graph) -> bytes | None:
    """Return a model of ``node`` and nothing else; None where a type is not known, or it is large."""
    constants = [tensor for tensor in node.inputs if isinstance(tensor, gs.Constant)]
    if sum(tensor._values.nbytes for tensor in constants) > EMBEDDED_BYTES:
        return None
    if any(t.name and t.dtype is None for t in (*node.inputs, *node.outputs)):
        return None
    read: list[gs.Tensor] = []
    for index, tensor in enumerate(node.inputs):
        name = f"i{index}" if tensor.name else ""
        if isinstance(tensor, gs.Constant):
            read.append(gs.Constant(name, tensor._values))
        else:
            read.append(gs.Variable(name, tensor.dtype))
    made = [gs.Variable(f"o{i}" if t.name else "", t.dtype) for i, t in enumerate(node.outputs)]
    alone = Node(node.op, "node", dict(node.attrs), read, made, node.domain)
    domains = graph.import_domains or [helper.make_opsetid("", graph.opset)]
    part = gs.Graph([alone], import_domains=domains, ir_version=10)
    part.inputs = [t for t in read if t.name and isinstance(t, gs.Variable)]
    part.outputs = [t for t in made if t.name]
    model = export_model(part, value_info=False)
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.ClearField("shape")
    return bytes(model.SerializeToString(deterministic=True))
