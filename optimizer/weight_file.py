"""The large constants of one model, streamed into a file beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO, Self

import onnx_graphsurgeon as gs
from onnx import TensorProto

from optc.optimizer.package import ALIGNMENT, SHARED_BYTES, element_type, raw_bytes
from optc.passes.graph import StoredValues, external_entry

PIECE = 1 << 22
"""Bytes copied at a time from an external file: mapped pages would count as memory held."""


class WeightFile:
    """A file of weights that is being written. Its ``place`` is for `export_model`.

    Args:
        path: Where it goes. The model that refers to it has to stand in the same folder.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[int, tuple[Any, TensorProto]] = {}

    def __enter__(self) -> Self:
        self._out: BinaryIO = self._path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()

    def place(self, constant: gs.Constant) -> TensorProto | None:
        """Return what refers to the values of ``constant``; None: they are better embedded."""
        values = constant._values
        if values.nbytes <= SHARED_BYTES:
            return None
        if id(values) not in self._entries:
            offset = -(-self._out.tell() // ALIGNMENT) * ALIGNMENT
            self._out.seek(offset)
            if not self._write(values):
                return None
            entry = TensorProto(
                data_type=element_type(values),
                dims=constant.shape,
                data_location=TensorProto.EXTERNAL,
            )
            for key, value in (
                ("location", self._path.name),
                ("offset", str(offset)),
                ("length", str(self._out.tell() - offset)),
            ):
                entry.external_data.add(key=key, value=value)
            self._entries[id(values)] = values, entry  # held, so that no other gets its id
        return self._entries[id(values)][1]

    def _write(self, values: Any) -> bool:
        """Write ``values`` as ONNX stores them; return whether they can be: text cannot."""
        if isinstance(values, StoredValues) and values.tensor.data_location == TensorProto.EXTERNAL:
            source, start, length = external_entry(values.tensor)
            left = values.nbytes if length is None else length
            with values.file((source, start, length)).open("rb") as file:
                file.seek(start)
                while left and (piece := file.read(min(PIECE, left))):
                    self._out.write(piece)
                    left -= len(piece)
            return True
        data = raw_bytes(values)
        if data is None:
            return False
        self._out.write(data.data)
        return True
