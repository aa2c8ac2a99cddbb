"""A model with nodes that torch modules run, in as few parts on ONNX Runtime as they leave.

    level(v) = max over what v reads, made by u, of level(u) + [a module runs u, and none runs v]

What ONNX Runtime runs of one level is one part; the modules of that level run after it, one after
another in the order of the model. Only what leads to the outputs is run.

A part is made when it is first reached: the types of what enters it are those of the arrays at hand,
so that nothing has to be inferred of what modules give.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, NodeProto, ValueInfoProto, helper

from optc.optimizer.model_parts import read_by
from optc.optimizer.ort_errors import ORT_ERRORS, first_line
from optc.optimizer.reference import LOWER_IR_VERSION, Array, Rejected, Runner, Values
from optc.optimizer.torch_module import (
    Expected,
    ModuleMismatch,
    ModuleNode,
    ModuleRejected,
    TorchModule,
)
from optc.passes.graph import StoredValues
from optc.specs.diagnostic import Diagnostic, InputError

Open = Callable[[ModelProto, Mapping[str, Array]], Runner]
"""Makes a runner of a part, given those of the weights that it reads."""


@dataclass(slots=True)
class _Part:
    """What runs in one go.

    Attributes:
        nodes: Of the model, in its order.
        module: What runs them, where that is a module; it is one node then.
        reads: Names of what is given or made before, and is read.
        makes: Names of what is read later or asked for.
        runner: What runs them, once it is made.
    """

    nodes: list[NodeProto]
    module: TorchModule | None = None
    reads: list[str] = field(default_factory=list)
    makes: list[str] = field(default_factory=list)
    runner: Runner | ModuleNode | None = None


class MixedRunner:
    """A model, ready to run, of which modules run some nodes.

    Args:
        model: The model, without functions. Not copied.
        weights: Name of an initialiser -> values that the model does not hold itself.
        folder: Where the external data of its other initialisers is.
        module_of: Tells what runs a node; None for ONNX Runtime.
        open_: Makes a runner of what is left to ONNX Runtime.
        results: Name of a tensor -> what it has to be, where that is known.

    Attributes:
        engine: What runs it, in words.
        inputs: Names of the inputs it must be given.
        outputs: Names of its outputs, in order.
    """

    def __init__(
        self,
        model: ModelProto,
        weights: Mapping[str, Array],
        folder: Path,
        module_of: Callable[[NodeProto], TorchModule | None],
        open_: Open,
        results: Mapping[str, Expected] = MappingProxyType({}),
    ) -> None:
        self._model = model
        self._weights = weights
        self._folder = folder
        self._open = open_
        self._results = results
        graph = model.graph
        self._initialisers = {tensor.name: tensor for tensor in graph.initializer}
        self._given = {v.name: v for v in graph.input if v.name not in self._initialisers}
        self.inputs = tuple(self._given)
        self.outputs = tuple(value.name for value in graph.output)
        self._parts = self._cut([(node, module_of(node)) for node in graph.node])
        engines = {part.module.engine for part in self._parts if part.module}
        on_ort = sum(part.module is None for part in self._parts)
        self.engine = (
            f"ONNX Runtime {ort.__version__} on the CPU, in {on_ort} "
            f"{'part' if on_ort == 1 else 'parts'} beside {' and '.join(sorted(engines))}"
        )

    # -- cutting

    def _cut(self, nodes: Sequence[tuple[NodeProto, TorchModule | None]]) -> list[_Part]:
        reads = [read_by(node) - self._initialisers.keys() for node, _ in nodes]
        needed = self._needed(nodes, reads)
        level: dict[str, tuple[int, bool]] = {}  # tensor -> of its maker, and whether a module is
        parts: dict[tuple[int, int], _Part] = {}
        for index, (node, module) in enumerate(nodes):
            if index not in needed:
                continue
            before = [level[name] for name in reads[index] if name in level]
            own = max((at + (by and module is None) for at, by in before), default=0)
            key = (own, 0 if module is None else index + 1)
            parts.setdefault(key, _Part([], module)).nodes.append(node)
            level.update((name, (own, module is not None)) for name in node.output if name)
        ordered = [parts[key] for key in sorted(parts)]
        self._connect(ordered)
        return ordered

    def _needed(
        self,
        nodes: Sequence[tuple[NodeProto, TorchModule | None]],
        reads: Sequence[Collection[str]],
    ) -> set[int]:
        """Return the indices of the nodes that lead to the outputs."""
        wanted, needed = set(self.outputs), set()
        for index in reversed(range(len(nodes))):
            if not wanted.isdisjoint(nodes[index][0].output):
                needed.add(index)
                wanted.update(reads[index])
        return needed

    def _connect(self, parts: Sequence[_Part]) -> None:
        """Tell each part what it reads and what of it is read by others."""
        maker: dict[str, int] = {}
        for number, part in enumerate(parts):
            for node in part.nodes:
                maker.update(dict.fromkeys(filter(None, node.output), number))
        asked = set(self.outputs)
        for number, part in enumerate(parts):
            read = dict.fromkeys(name for node in part.nodes for name in sorted(read_by(node)))
            part.reads = [
                name for name in read if name in self._given or maker.get(name, number) != number
            ]
            asked.update(part.reads)
        for part in parts:
            made = (name for node in part.nodes for name in node.output)
            part.makes = [name for name in made if name and name in asked]

    # -- running

    def run(self, feeds: Mapping[str, Array]) -> Values:
        """Return all outputs in order.

        Raises:
            Rejected: If the model does not take ``feeds``, or a module fails on them.
            InputError: ``bad-module``, if a module gives something else than its node.
        """
        values: dict[str, Any] = {**self._constants(self.outputs), **feeds}
        last = {name: number for number, part in enumerate(self._parts) for name in part.reads}
        for number, part in enumerate(self._parts):
            given = {name: values[name] for name in part.reads if name in values}
            values |= self._run(part, given)
            for name in part.reads:
                if last[name] == number and name not in self.outputs:
                    values.pop(name, None)
        return {name: values[name] for name in self.outputs if name in values}

    def _run(self, part: _Part, given: Mapping[str, Any]) -> Mapping[str, Any]:
        if part.runner is None:
            part.runner = self._opened(part, given)
        if isinstance(part.runner, ModuleNode):
            try:
                return part.runner.run(given, self._results)
            except ModuleMismatch as error:
                todo = "mend the module, or what the spec says that it takes and gives"
                raise InputError(Diagnostic("bad-module", str(error), todo)) from error
            except ModuleRejected as error:
                raise Rejected(str(error)) from error
        return part.runner.run(given)

    def _opened(self, part: _Part, given: Mapping[str, Any]) -> Runner | ModuleNode:
        if part.module is not None:
            (node,) = part.nodes
            return ModuleNode(node, part.module, self._constants(node.input))
        model = self._model_of(part, given)
        names = {tensor.name for tensor in model.graph.initializer}
        weights = {name: array for name, array in self._weights.items() if name in names}
        try:
            return self._open(model, weights)
        except ORT_ERRORS as error:
            raise Rejected(first_line(error)) from error

    def _constants(self, names: Collection[str]) -> dict[str, Array]:
        found = {}
        for name in names:
            if name in self._weights:
                found[name] = self._weights[name]
            elif name in self._initialisers and name not in self._given:
                found[name] = StoredValues(self._initialisers[name], self._folder).load()
        return found

    def _model_of(self, part: _Part, given: Mapping[str, Any]) -> ModelProto:
        whole = self._model
        model = ModelProto(
            ir_version=min(whole.ir_version, LOWER_IR_VERSION), opset_import=whole.opset_import
        )
        graph = model.graph
        graph.name = whole.graph.name or "part"
        graph.node.extend(part.nodes)
        read = {name for node in part.nodes for name in read_by(node)}
        graph.initializer.extend(
            tensor for name, tensor in self._initialisers.items() if name in read
        )
        graph.input.extend(
            self._given[name] if name in self._given else _typed(name, given[name])
            for name in part.reads
        )
        graph.output.extend(ValueInfoProto(name=name) for name in part.makes)
        return model


def _typed(name: str, value: Any) -> ValueInfoProto:
    """Return the declaration of a tensor that holds what ``value`` does, in any shape."""
    if isinstance(value, list) and value and isinstance(value[0], np.ndarray):
        number = helper.np_dtype_to_tensor_dtype(value[0].dtype)
        return helper.make_tensor_sequence_value_info(name, number, None)
    if not isinstance(value, np.ndarray):
        raise Rejected(f"`{name}` is no tensor, and passes between parts of the model")
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), None)
