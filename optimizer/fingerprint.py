"""What a model is apart from its names: what answers about it are kept under.

Nodes, tensors and symbols get numbers in the order in which they are met, which does not depend on
what they are called. So a model that differs in nothing but names has the same fingerprint, and what
was said of one node is said of the node with the same number in the other.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from optc.optimizer.job import Profile

DigestOf = Callable[[TensorProto], bytes | None]
"""Tells the values of a constant that lies in a file from others; None where it cannot."""

_SMALL_BYTES: Final = 1024
"""Constants up to this size count with their values: an axis, a zero point, a shape."""

_QUANTISERS: Final = frozenset({"QuantizeLinear", "DequantizeLinear"})

_NAME: Final = re.compile(r"[\w./:\-]*[\w]")
"""What may be a name in the words of the library."""
_HAS_OTHERS: Final = re.compile(r"[^A-Za-z]")
_HAS_LETTERS: Final = re.compile(r"[A-Za-z]")
_MARK: Final = re.compile("\x02([nt])([0-9]+)\x03")


class Fingerprint:
    """A model without its names.

    Args:
        model: Names are unique in it, bodies included.
        weights: Whether the values of all constants count. Else those do that TensorRT looks at when
            it says what it takes: small ones, sizes and indices, scales and zero points.
        digest_of: Asked for values that lie in a file and count.

    Attributes:
        digest: The same for models that differ in nothing but names.
        nodes: Names of the nodes, those of bodies too, by their numbers.
        complete: Whether it holds for another run, too: all values that count were told.
    """

    def __init__(
        self,
        model: ModelProto,
        *,
        weights: bool = False,
        digest_of: DigestOf = lambda tensor: None,
    ) -> None:
        self._weights = weights
        self._digest_of = digest_of
        self._tensors: dict[str, int] = {}
        self._symbols: dict[str, int] = {}
        self._parameters: set[str] = set()
        self.nodes: list[str] = []
        self.complete = True
        opsets = sorted((_domain(o.domain), o.version) for o in model.opset_import)
        functions = [f.SerializeToString(deterministic=True) for f in model.functions]
        content = (model.ir_version, opsets, functions, self._graph(model.graph))
        self.digest: bytes = hashlib.sha256(repr(content).encode()).digest()
        self._numbers = {name: number for number, name in enumerate(self.nodes)}

    def number(self, tensor: str) -> int:
        """Return the number of the tensor called ``tensor``; -1 where there is none."""
        return self._tensors.get(tensor, -1)

    def number_of_node(self, node: str) -> int:
        """Return the number of the node called ``node``; -1 where there is none."""
        return self._numbers.get(node, -1)

    def shapes_of(self, profiles: Sequence[Profile]) -> list[list[tuple[int, Any]]]:
        """Return ``profiles`` with the numbers of the inputs for their names."""
        return [
            sorted((self.number(name), tuple(map(tuple, shapes))) for name, shapes in each.items())
            for each in profiles
        ]

    def without_names(self, text: str) -> str:
        """Return ``text`` with numbers for the names that stand in it.

        A name without a digit or sign in it, or without a letter, stays: it may be a word or a size.
        """
        return _NAME.sub(lambda match: self._number_for(match[0]), text)

    def _number_for(self, word: str) -> str:
        # The builder names inner and repeated nodes with a number behind it.
        stem = re.sub(r"(_\d+)?$", "", word, count=1)
        for name in (word, stem):
            if not _HAS_OTHERS.search(name) or not _HAS_LETTERS.search(name):
                continue
            rest = word[len(name) :]
            if (number := self._numbers.get(name)) is not None:
                return f"\x02n{number}\x03{rest}"
            if (number := self._tensors.get(name)) is not None:
                return f"\x02t{number}\x03{rest}"
        return word

    def with_names(self, text: str) -> str:
        """Return ``text``, which `without_names` gave for a model with the same digest, with names."""
        tensors = list(self._tensors)

        def name(match: re.Match[str]) -> str:
            return (self.nodes if match[1] == "n" else tensors)[int(match[2])]

        return _MARK.sub(name, text)

    # --- the content -----------------------------------------------------------------------------

    def _graph(self, graph: GraphProto, *, is_body: bool = False) -> Any:
        for node in graph.node:
            if node.op_type in _QUANTISERS:
                self._parameters.update(node.input[1:])
        # In the order of the nodes, which does not depend on the names.
        nodes = [self._node(node) for node in graph.node]
        constants = [(self._name(tensor.name), tensor) for tensor in graph.initializer]
        inputs = [(self._name(info.name), info) for info in graph.input]
        outputs = [(self._name(info.name), info) for info in graph.output]
        constants.sort(key=_first)
        if not is_body:  # what a body takes and gives is told apart by its place
            inputs.sort(key=_first)
        return (
            nodes,
            [(number, self._constant(tensor)) for number, tensor in constants],
            [tensor.SerializeToString(deterministic=True) for tensor in graph.sparse_initializer],
            [(number, self._type(info)) for number, info in inputs],
            [(number, self._type(info)) for number, info in outputs],
        )

    def _node(self, node: NodeProto) -> Any:
        self.nodes.append(node.name)
        return (
            _domain(node.domain),
            node.op_type,
            node.overload,
            [self._attribute(a) for a in sorted(node.attribute, key=lambda a: a.name)],
            [self._name(name) for name in node.input],
            [self._name(name) for name in node.output],
        )

    def _attribute(self, attribute: AttributeProto) -> Any:
        bodies = list(_bodies_in(attribute))
        if bodies:
            return attribute.name, [self._graph(body, is_body=True) for body in bodies]
        return attribute.SerializeToString(deterministic=True)

    def _constant(self, tensor: TensorProto) -> Any:
        return tensor.data_type, tuple(tensor.dims), self._values(tensor)

    def _values(self, tensor: TensorProto) -> bytes | None:
        in_file = tensor.data_location == TensorProto.EXTERNAL
        counts = (
            self._weights
            or tensor.data_type == TensorProto.INT64
            or tensor.name in self._parameters
            or (not in_file and tensor.ByteSize() <= _SMALL_BYTES)
        )
        if not counts:
            return None
        if in_file:
            digest = self._digest_of(tensor)
            if digest is None:  # where they lie tells them apart for now, and no longer
                self.complete = False
                return repr([(entry.key, entry.value) for entry in tensor.external_data]).encode()
            return digest
        if tensor.HasField("raw_data"):
            return hashlib.sha256(tensor.raw_data).digest()
        plain = TensorProto()
        plain.CopyFrom(tensor)
        plain.ClearField("name")
        plain.ClearField("doc_string")
        return hashlib.sha256(plain.SerializeToString(deterministic=True)).digest()

    def _type(self, info: ValueInfoProto) -> Any:
        kind = info.type.WhichOneof("value")
        if kind != "tensor_type":
            return info.type.SerializeToString(deterministic=True)
        tensor = info.type.tensor_type
        if not tensor.HasField("shape"):
            return tensor.elem_type, None
        return tensor.elem_type, [
            dim.dim_value
            if dim.HasField("dim_value")
            else f"s{self._symbols.setdefault(dim.dim_param, len(self._symbols))}"
            if dim.dim_param
            else None
            for dim in tensor.shape.dim
        ]

    def _name(self, name: str) -> int:
        """Return the number of a tensor; -1 for an input or output that is left out."""
        return self._tensors.setdefault(name, len(self._tensors)) if name else -1


def _bodies_in(attribute: AttributeProto) -> Iterator[GraphProto]:
    if attribute.type == AttributeProto.GRAPH:
        yield attribute.g
    elif attribute.type == AttributeProto.GRAPHS:
        yield from attribute.graphs


def _first(pair: tuple[int, object]) -> int:
    return pair[0]


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain
