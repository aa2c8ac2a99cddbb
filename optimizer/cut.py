"""Cuts a part out of a model at tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper

from optc.optimizer.arrays import dtype_name, dtype_of
from optc.optimizer.model_parts import read_by
from optc.specs.check import CheckedSpec
from optc.specs.manifest import Manifest, Size, Tensor
from optc.specs.model_problem import ResolvedInput


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a model is cut.

    Attributes:
        inputs: What enters: tensors of the model, with their types.
        outputs: Names of what leaves.
        sizes: Name of a tensor whose values are known without computing anything -> these.
    """

    inputs: Sequence[Tensor]
    outputs: Sequence[str]
    sizes: Mapping[str, Size]

    def of(self, model: ModelProto) -> ModelProto:
        """Return what of ``model`` is computed between the inputs and the outputs.

        Args:
            model: Without functions. It is not changed. Initialisers that refer to files still do.

        Returns:
            A model in which every node has the name that it has in the graph of the whole.
        """
        graph = model.graph
        nodes = list(graph.node)
        makers = {name: index for index, node in enumerate(nodes) for name in node.output if name}
        entering = {tensor.name for tensor in self.inputs} | self.sizes.keys()
        needed: set[int] = set()
        read: set[str] = set(self.outputs)
        pending = [name for name in self.outputs if name not in entering]
        while pending:
            index = makers.get(pending.pop())
            if index is not None and index not in needed:
                needed.add(index)
                names = read_by(nodes[index])
                read |= names
                pending += names - entering
        part = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
        part.graph.name = graph.name or "graph"
        part.graph.node.extend(_named(nodes[index], index) for index in sorted(needed))
        part.graph.initializer.extend(
            tensor for tensor in graph.initializer if tensor.name in read - entering
        )
        part.graph.sparse_initializer.extend(
            sparse for sparse in graph.sparse_initializer if sparse.values.name in read - entering
        )
        part.graph.initializer.extend(
            numpy_helper.from_array(_array(size), name)
            for name, size in self.sizes.items()
            if name in read
        )
        own = {info.name: info for info in graph.input}
        part.graph.input.extend(own.get(each.name) or _info(each) for each in self.inputs)
        declared = {info.name: info for info in (*graph.value_info, *graph.output)}
        made = {name for index in needed for name in nodes[index].output}
        part.graph.value_info.extend(
            info for name, info in declared.items() if name in made and name not in self.outputs
        )
        part.graph.output.extend(
            declared.get(name) or ValueInfoProto(name=name) for name in self.outputs
        )
        return part


def cut_of(manifest: Manifest) -> Cut | None:
    """Return where the original is cut for the package of ``manifest``; None for a whole."""
    part = manifest.model.part
    return None if part is None else Cut(manifest.inputs, part.outputs, part.sizes)


def cut_asked(checked: CheckedSpec) -> Cut | None:
    """Return where the model is cut for ``checked``; None for a whole."""
    part = checked.part
    return None if part is None else Cut([*tensors_of(checked.inputs)], part.outputs, part.sizes)


def tensors_of(inputs: Mapping[str, ResolvedInput]) -> Iterator[Tensor]:
    """Yield the inputs of a spec as a manifest has them."""
    for name, given in inputs.items():
        dtype = (
            dtype_name(helper.tensor_dtype_to_np_dtype(given.dtype)) if given.dtype else "unknown"
        )
        yield Tensor(name=name, dtype=dtype, shape=given.shape, range=given.range)


def _named(node: NodeProto, index: int) -> NodeProto:
    """Return ``node`` with the name that it gets where the whole model is loaded."""
    if node.name:
        return node
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.name = f"{node.op_type}_{index}"
    return copy


def _array(size: Size) -> npt.NDArray[Any]:
    return np.array(size.values, dtype_of(size.dtype)).reshape(size.shape)


def _info(tensor: Tensor) -> ValueInfoProto:
    number = helper.np_dtype_to_tensor_dtype(dtype_of(tensor.dtype))
    return helper.make_tensor_value_info(tensor.name, number, tensor.shape)
