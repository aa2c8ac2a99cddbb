"""What a spec is checked against: the outline of an ONNX file, read from its bytes.

An ONNX file is one protobuf message. Reading its wire format here, without onnx, takes some
hundredths of a second also for large models, as weights are skipped, not read. It is an outline for
checking names and shapes; whether the file is a sound model is for the loader to find out.

Field numbers are those of ``onnx.proto``: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final

Dim = int | str | None
"""Extent, name, or None where the model says nothing."""

MAX_BODIES: Final = 64
"""Deepest nesting of If, Loop and Scan bodies that is followed."""


class OutlineError(Exception):
    """The file cannot be read as an ONNX model."""


@dataclass(frozen=True, slots=True)
class Value:
    """An input, an output, or a tensor whose shape the model states.

    Attributes:
        name: Of the tensor.
        elem_type: ``TensorProto.DataType``; 0 for a value that is no tensor.
        dims: None where the model gives no shape.
    """

    name: str
    elem_type: int
    dims: tuple[Dim, ...] | None


@dataclass(frozen=True, slots=True)
class OutlineNode:
    """A node of the main graph, of a body or of a function."""

    name: str
    op_type: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    depth: int
    """0 in the main graph, else how many bodies deep."""
    index: int
    """Position in its graph."""


@dataclass
class Outline:
    """The outline of a model.

    Attributes:
        ir_version: Of the file.
        opsets: Domain -> version; ``ai.onnx`` is called ``""``.
        inputs: Of the main graph, initialisers of old models among them.
        outputs: Of the main graph.
        values: Tensors of the main graph whose shape the model states, beside these.
        initialisers: Names of the main graph's weights.
    """

    ir_version: int = 0
    opsets: dict[str, int] = field(default_factory=dict)
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    initialisers: set[str] = field(default_factory=set)
    _bytes: _Bytes = b""
    _nodes: list[_Span] = field(default_factory=list)
    _functions: list[_Span] = field(default_factory=list)

    @property
    def has_functions(self) -> bool:
        """Whether the model brings functions, whose nodes are in ``nodes`` too."""
        return bool(self._functions)

    @cached_property
    def functions(self) -> frozenset[tuple[str, str]]:
        """Domain and name of each function that the model brings."""
        found = set()
        for start, end in self._functions:
            name = domain = ""
            for number, value in _fields(self._bytes, start, end):
                match number, value:
                    case 1, (first, last):
                        name = _text(self._bytes, first, last)
                    case 10, (first, last):
                        domain = _text(self._bytes, first, last)
            found.add((domain, name))
        return frozenset(found)

    @cached_property
    def nodes(self) -> tuple[OutlineNode, ...]:
        """All nodes, those of bodies and functions included; read when first asked for.

        Raises:
            OutlineError: If the bytes are no nodes.
        """
        found: list[OutlineNode] = []
        _read_nodes(self._bytes, self._nodes, 0, found)
        for start, end in self._functions:
            spans = [v for number, v in _fields(self._bytes, start, end) if number == 7]
            _read_nodes(self._bytes, [s for s in spans if isinstance(s, tuple)], 1, found)
        return tuple(found)


_Bytes = bytes | mmap.mmap
_Span = tuple[int, int]


def read_outline(path: Path) -> Outline:
    """Return the outline of the ONNX file at ``path``.

    Raises:
        OutlineError: If it is not an ONNX file in protobuf's binary format, or is cut short.
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        try:
            data: _Bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise OutlineError("the file is empty") from error
    outline = Outline(_bytes=data)
    graphs = 0
    for number, value in _fields(data, 0, len(data)):
        match number, value:
            case 1, int():
                outline.ir_version = value
            case 7, (start, end):
                _read_graph(data, start, end, outline)
                graphs += 1
            case 8, (start, end):
                domain, version = "", 0
                for inner, item in _fields(data, start, end):
                    match inner, item:
                        case 1, (first, last):
                            domain = _text(data, first, last)
                        case 2, int():
                            version = item
                outline.opsets["" if domain == "ai.onnx" else domain] = version
            case 25, (start, end):
                outline._functions.append((start, end))
    if graphs != 1 or not outline.opsets:
        raise OutlineError("the file holds no ONNX graph")
    return outline


def _read_graph(data: _Bytes, start: int, end: int, outline: Outline) -> None:
    for number, value in _fields(data, start, end):
        if not isinstance(value, tuple):
            continue
        match number:
            case 1:
                outline._nodes.append(value)
            case 5:
                outline.initialisers.add(_name(data, *value, field=8))
            case 11:
                outline.inputs.append(_value(data, *value))
            case 12:
                outline.outputs.append(_value(data, *value))
            case 13:
                outline.values.append(_value(data, *value))
            case 15:  # a sparse tensor bears the name of its values
                for inner, item in _fields(data, *value):
                    if inner == 1 and isinstance(item, tuple):
                        outline.initialisers.add(_name(data, *item, field=8))


def _name(data: _Bytes, start: int, end: int, *, field: int) -> str:
    name = ""
    for number, value in _fields(data, start, end):
        if number == field and isinstance(value, tuple):
            name = _text(data, *value)
    return name


def _value(data: _Bytes, start: int, end: int) -> Value:
    name, elem_type, dims = "", 0, None
    for number, value in _fields(data, start, end):
        match number, value:
            case 1, (first, last):
                name = _text(data, first, last)
            case 2, (first, last):
                for kind, tensor in _fields(data, first, last):
                    if kind == 1 and isinstance(tensor, tuple):
                        elem_type, dims = _tensor_type(data, *tensor)
    return Value(name, elem_type, dims)


def _tensor_type(data: _Bytes, start: int, end: int) -> tuple[int, tuple[Dim, ...] | None]:
    elem_type, dims = 0, None
    for number, value in _fields(data, start, end):
        match number, value:
            case 1, int():
                elem_type = value
            case 2, (first, last):
                spans = (v for inner, v in _fields(data, first, last) if inner == 1)
                dims = tuple(_dim(data, *span) for span in spans if isinstance(span, tuple))
    return elem_type, dims


def _dim(data: _Bytes, start: int, end: int) -> Dim:
    dim: Dim = None
    for number, value in _fields(data, start, end):
        match number, value:
            case 1, int():
                dim = value if value < 1 << 63 else None  # a negative extent means unknown
            case 2, (first, last):
                text = _text(data, first, last)
                dim = None if text in ("", "?", "-1") else text
    return dim


def _read_nodes(data: _Bytes, spans: list[_Span], depth: int, found: list[OutlineNode]) -> None:
    """Append the nodes at ``spans``, each followed by those of its bodies."""
    if depth > MAX_BODIES:
        raise OutlineError(f"bodies are nested deeper than {MAX_BODIES}")
    for index, (start, end) in enumerate(spans):
        name = op_type = domain = ""
        inputs: list[str] = []
        outputs: list[str] = []
        bodies: list[_Span] = []
        for number, value in _fields(data, start, end):
            if not isinstance(value, tuple):
                continue
            match number:
                case 1:
                    inputs.append(_text(data, *value))
                case 2:
                    outputs.append(_text(data, *value))
                case 3:
                    name = _text(data, *value)
                case 4:
                    op_type = _text(data, *value)
                case 5 if data.find(b"\x32", *value) >= 0 or data.find(b"\x5a", *value) >= 0:
                    # One of these bytes begins a body; without both there is none to look for.
                    for inner, body in _fields(data, *value):
                        if inner in (6, 11) and isinstance(body, tuple):
                            bodies.append(body)
                case 7:
                    domain = _text(data, *value)
        found.append(
            OutlineNode(
                name,
                op_type,
                "" if domain == "ai.onnx" else domain,
                tuple(inputs),
                tuple(outputs),
                depth,
                index,
            )
        )
        for first, last in bodies:
            inside = [v for number, v in _fields(data, first, last) if number == 1]
            _read_nodes(data, [s for s in inside if isinstance(s, tuple)], depth + 1, found)


def _text(data: _Bytes, start: int, end: int) -> str:
    try:
        return data[start:end].decode("utf-8")
    except UnicodeDecodeError as error:
        raise OutlineError(f"a name at byte {start} is not UTF-8") from error


def _fields(data: _Bytes, start: int, end: int) -> Iterator[tuple[int, int | _Span]]:
    """Yield number and value of each field: a number as it is, bytes as (start, end)."""
    at = start
    while at < end:
        # Most keys and lengths take one byte; the loop in `_varint` is for the rest.
        key = data[at]
        at += 1
        if key > 127:
            key, at = _varint(data, at - 1, end)
        kind = key & 7
        if kind == 2:
            if at >= end:
                raise OutlineError(f"the file is cut short at byte {at}")
            length = data[at]
            at += 1
            if length > 127:
                length, at = _varint(data, at - 1, end)
            first, at = at, at + length
            if at > end:
                raise OutlineError(f"a field at byte {first} ends beyond its message")
            yield key >> 3, (first, at)
        elif kind == 0:
            value, at = _varint(data, at, end)
            yield key >> 3, value
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
            if at > end:
                raise OutlineError(f"the file is cut short at byte {end}")
        else:
            raise OutlineError(f"byte {at - 1} begins no field of a protobuf message")


def _varint(data: _Bytes, at: int, end: int) -> tuple[int, int]:
    """Return the number at ``at`` and where the next field begins."""
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (1 << 64) - 1, at
        shift += 7
    raise OutlineError(f"the number that ends at byte {at} is cut short or too long")
