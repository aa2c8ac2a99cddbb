"""What a file that is no ONNX model looks like, and what its owner can do about it."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import NamedTuple


class Kind(NamedTuple):
    """What a file looks like, with its article, and how to get an ONNX model instead."""

    what: str
    todo: str | None = None


_EXPORT_TORCH = "export it with `torch.onnx.export`"
_EXPORT_TENSORFLOW = "convert it with `python -m tf2onnx.convert`"
_UNPACK = "unpack it, and give the ONNX file inside"
_AS_BINARY = "save it in the binary format: `onnx.save(onnx.load(path), 'model.onnx')`"
_TORCH = Kind("a PyTorch checkpoint", _EXPORT_TORCH)
_FROM_ONNX = Kind("a model that was made from an ONNX model", "give the ONNX model itself")

_STARTS: dict[bytes, Kind] = {
    b"version https://git-lfs": Kind(
        "a Git LFS pointer: the model itself was not fetched", "fetch it with `git lfs pull`"
    ),
    b"\x1f\x8b": Kind("a gzip archive", _UNPACK),
    b"\xfd7zXZ\x00": Kind("an xz archive", _UNPACK),
    b"\x28\xb5\x2f\xfd": Kind("a Zstandard archive", _UNPACK),
    b"BZh": Kind("a bzip2 archive", _UNPACK),
    b"7z\xbc\xaf\x27\x1c": Kind("a 7z archive", _UNPACK),
    b"\x89HDF\r\n": Kind("an HDF5 file, as Keras writes it", _EXPORT_TENSORFLOW),
    b"\x80\x02": _TORCH,  # pickles, protocol 2 to 5
    b"\x80\x03": _TORCH,
    b"\x80\x04": _TORCH,
    b"\x80\x05": _TORCH,
    b"GGUF": Kind("a GGUF model, which holds weights but no graph"),
    b"\x93NUMPY": Kind("a NumPy array"),
    b"\x89PNG": Kind("a PNG image"),
    b"\xff\xd8\xff": Kind("a JPEG image"),
    b"GIF8": Kind("a GIF image"),
    b"%PDF": Kind("a PDF document"),
    b"\x7fELF": Kind("a program or library"),
    b"ftrt": Kind("a TensorRT engine", "give the ONNX model it was built from"),
    b"\x08\x01\x12": Kind("a TensorFlow SavedModel", _EXPORT_TENSORFLOW),
}

_TEXTS: dict[bytes, Kind] = {
    b"{": Kind("JSON", _AS_BINARY),
    b"ir_version": Kind("ONNX as text", _AS_BINARY),
    b"<ir_version": Kind("ONNX as text", "parse it with `onnx.parser.parse_model`, and save that"),
    b"<!doctype": Kind("a web page: a download that went wrong", "download it again"),
    b"<html": Kind("a web page: a download that went wrong", "download it again"),
    b"<?xml": Kind("XML"),
}


def kind_of(data: bytes) -> Kind | None:
    """Return what a file with these bytes looks like; None where nothing is known of it.

    Ask only for a file that could not be read as ONNX: nearly every start is the start of some
    message.
    """
    if not data.strip(b"\0"):
        return Kind("an empty file" if not data else "a file of zeros", "copy or export it again")
    if data.startswith(b"PK\x03\x04"):
        return _kind_of_zip(data)
    for start, kind in _STARTS.items():
        if data.startswith(start):
            return kind
    match data[4:8]:
        case b"TFL3":
            return Kind("a TensorFlow Lite model", "convert it with `tf2onnx.convert --tflite`")
        case b"ORTM":
            return _FROM_ONNX
    if data[8:10] == b'{"':
        return Kind("safetensors, which hold weights but no graph", _EXPORT_TORCH)
    return _kind_of_text(data[:4096])


def kind_of_folder(path: Path) -> Kind | None:
    """Return what the folder at ``path`` looks like; None where nothing is known of it."""
    if (path / "saved_model.pb").is_file():
        return Kind("a TensorFlow SavedModel", _EXPORT_TENSORFLOW)
    models = sorted(found.name for found in path.glob("*.onnx"))
    if models:
        return Kind(f"that of {_listed(models)}", f"give `{path / models[0]}`")
    return None


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:3]) + (" and more" if names[3:] else "")


def _kind_of_zip(data: bytes) -> Kind:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return Kind("a zip archive that is cut short", "copy it again")
    if any(name.endswith("data.pkl") for name in names):
        return _TORCH
    if any(name.endswith(".npy") for name in names):
        return Kind("a NumPy archive")
    if "config.json" in names and "metadata.json" in names:
        return Kind("a Keras model", _EXPORT_TENSORFLOW)
    return Kind("a zip archive", _UNPACK)


def _kind_of_text(start: bytes) -> Kind | None:
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for beginning, kind in _TEXTS.items():
        if text.replace(b"< ", b"<").replace(b"<\n", b"<").lstrip().startswith(beginning):
            return kind
    try:
        decoded = start.decode()
    except UnicodeDecodeError as error:
        if error.start < len(start) - 4:  # else a character is cut by the end of what is looked at
            return None
        decoded = start[: error.start].decode()
    return Kind("a text file") if decoded.replace("\n", " ").isprintable() else None
