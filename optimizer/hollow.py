"""An ONNX file without the bytes of its weights, which stay in the file.

Protobuf copies what it parses. So the bytes of each large tensor are taken out of the message before
it is parsed, and the tensor says where in the file they are, as if the model's own file were its
external data. Whoever needs the values maps them; a model of any size loads at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

LARGE: Final = 16 * 1024
"""Bytes of a tensor from which on they stay in the file."""

Kind = Literal["model", "graph", "node", "attribute", "tensor"]

_INSIDE: Final[Mapping[Kind, Mapping[int, Kind]]] = {
    "model": {7: "graph"},
    "graph": {1: "node", 5: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
    "tensor": {},
}
"""Message -> field number -> message, on the ways that lead to a tensor (onnx.proto)."""

_RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION, _EXTERNAL = 9, 13, 14, 1
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_DEEPEST = 200


class _Malformed(Exception):
    """The bytes are no message. Protobuf will say so in its own words."""


def hollow(data: memoryview, location: str) -> bytes | None:
    """Return a serialised model without the bytes of its large tensors.

    Args:
        data: The whole file.
        location: What the tensors give as the place of their data: the file's own name.

    Returns:
        None where there is no large tensor, or ``data`` is no well-formed message.
    """
    try:
        parts = _rewritten(data, 0, len(data), "model", location.encode(), 0)
    except _Malformed:
        return None
    return None if parts is None else b"".join(parts)


def _rewritten(
    data: memoryview, at: int, end: int, kind: Kind, location: bytes, depth: int
) -> list[bytes | memoryview] | None:
    """Return the parts of one message with large tensors hollowed out; None: as it is."""
    if end - at < LARGE:
        return None
    if depth > _DEEPEST:
        raise _Malformed
    parts: list[bytes | memoryview] = []
    reference = b""  # stands last: some writers say after the data that it is in the file
    kept_from = at  # what follows from here is taken over in one piece
    changed = False
    inside = _INSIDE[kind]
    while at < end:
        start = at
        tag, at = _varint(data, at, end)
        number, wire = tag >> 3, tag & 7
        if wire == _LENGTH:
            length, at = _varint(data, at, end)
            if length > end - at:
                raise _Malformed
            new: list[bytes | memoryview] | None = None
            if kind == "tensor" and number == _RAW_DATA and length >= LARGE:
                new, reference = [], _reference(location, at, length)
            elif number in inside and (
                body := _rewritten(data, at, at + length, inside[number], location, depth + 1)
            ):
                new = [_written(tag), _written(sum(map(len, body))), *body]
            at += length
            if new is not None:
                parts += [data[kept_from:start], *new]
                kept_from, changed = at, True
        elif wire == _VARINT:
            _, at = _varint(data, at, end)
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
            if at > end:
                raise _Malformed
        else:
            raise _Malformed
    return [*parts, data[kept_from:end], reference] if changed else None


def _reference(location: bytes, offset: int, length: int) -> bytes:
    """Return the fields of a TensorProto that say where its data is."""
    entries = {b"location": location, b"offset": b"%d" % offset, b"length": b"%d" % length}
    fields = b"".join(
        _field(_EXTERNAL_DATA, _field(1, key) + _field(2, value)) for key, value in entries.items()
    )
    return fields + _written(_DATA_LOCATION << 3 | _VARINT) + _written(_EXTERNAL)


def _field(number: int, content: bytes) -> bytes:
    return _written(number << 3 | _LENGTH) + _written(len(content)) + content


def _varint(data: memoryview, at: int, end: int) -> tuple[int, int]:
    """Return the number at ``at``, and where it ends."""
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _Malformed


def _written(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
