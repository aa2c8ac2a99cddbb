"""Named arrays in npz files, and the names of dtypes.

A key is the exact name of a tensor, whatever characters it has: it is a member's name inside the
zip file and never becomes a path. Nothing is pickled, in either direction.

Numpy's file format has no bfloat16, float8 or 4-bit types. Such an array is stored as ``np.save``
stores it, as opaque bytes (``|V2``, ``|V1``; a 4-bit element takes a byte), and `typed` gives it its
dtype back where one knows which it is. Text is stored as numpy's ``<U``.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import secrets
import shutil
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import ml_dtypes
import numpy as np
import numpy.typing as npt

from optc.specs.diagnostic import Diagnostic, EnvironmentFault, InputError, OptcError

Array = npt.NDArray[Any]

_SUFFIX = ".npy"
_EARLIEST = (1980, 1, 1, 0, 0, 0)
"""The time of every member: the same arrays give the same file."""
_ENCRYPTED = 1
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    ValueError,
    # A header is Python's notation for a dict, and numpy lets errors of Python's parser through.
    SyntaxError,
    tokenize.TokenError,
    RecursionError,
    MemoryError,
)
"""What reading a damaged member raises."""
_TEXT_KINDS = "UT"
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


# --- dtypes --------------------------------------------------------------------------------------


def dtype_name(dtype: npt.DTypeLike) -> str:
    """Return the name a manifest gives to ``dtype``.

    Example:
        >>> dtype_name(np.float32), dtype_name(">i8"), dtype_name(object), dtype_name("U3")
        ('float32', 'int64', 'string', 'string')
        >>> dtype_name(ml_dtypes.bfloat16)
        'bfloat16'
    """
    known = np.dtype(dtype)
    if known.kind in _TEXT_KINDS or known.hasobject:
        return "string"
    return str(known.newbyteorder("=").name)


def dtype_of(name: str) -> np.dtype[Any]:
    """Return the dtype that a manifest calls ``name``; text is ``object``, as runtimes give it.

    Raises:
        KeyError: If it is not the name of a dtype: ``sequence(float32)``.
    """
    if name == "string":
        return np.dtype(object)
    if hasattr(ml_dtypes, name):
        return np.dtype(cast(type, getattr(ml_dtypes, name)))
    try:
        known: np.dtype[Any] = np.dtype(name)
    except TypeError as error:
        raise KeyError(name) from error
    return known


def typed(array: Array, name: str) -> Array:
    """Return opaque bytes, as an npz file gives them, as the dtype called ``name`` that they are.

    Any other array comes back as it is: nothing is converted.
    """
    if array.dtype.kind == "V" and hasattr(ml_dtypes, name):
        dtype = dtype_of(name)
        if dtype.itemsize == array.dtype.itemsize and dtype != array.dtype:
            return array.view(dtype)
    return array


# --- reading -------------------------------------------------------------------------------------


def read_arrays(path: Path) -> dict[str, Array]:
    """Return the arrays of an npz file by name, in the order they stand in it.

    Args:
        path: Written by `write_arrays`, ``np.savez`` or ``np.savez_compressed``. Types that numpy
            does not know are opaque bytes: see `typed`.

    Raises:
        InputError: ``no-such-file``; ``not-npz``; ``damaged-npz`` where it is cut short or
            contradicts itself; ``pickled-array``; ``duplicate-array``.
    """
    with _opened(path) as archive:
        arrays: dict[str, Array] = {}
        for member in archive.infolist():
            name = member.filename.removesuffix(_SUFFIX)
            if name == member.filename:
                raise _fault(path, "not-npz", f"its member `{name}` is not an array")
            if name in arrays:
                raise _fault(path, "duplicate-array", f"it holds two arrays called `{name}`")
            if member.flag_bits & _ENCRYPTED:
                raise _fault(path, "not-npz", f"its member `{name}` is encrypted")
            try:
                array = _array(path, name, archive, member)
            except _DAMAGE as error:
                words = f"the array `{name}` cannot be read ({error})"
                raise _fault(path, "damaged-npz", words) from error
            except NotImplementedError as error:  # a compression that this Python lacks
                raise _fault(path, "not-npz", f"the array `{name}`: {error}") from error
            arrays[name] = array.astype(array.dtype.newbyteorder("="), copy=False)
    return arrays


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        with path.open("rb") as file:
            start = file.read(6)
        if start.startswith(b"PK"):
            raise _fault(path, "damaged-npz", "it is cut short or damaged") from error
        if start == b"\x93NUMPY":
            raise _fault(path, "not-npz", "it holds one array without a name (.npy)") from error
        raise _fault(path, "not-npz", "it is not a zip file") from error
    except FileNotFoundError as error:
        raise InputError(
            Diagnostic("no-such-file", f"there is no file `{path}`", "check the path")
        ) from error
    except OSError as error:
        raise _fault(path, "no-such-file", f"it cannot be read: {error.strerror}") from error
    with archive:
        yield archive


def _array(path: Path, name: str, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Array:
    # The header is read first: what it claims must fit what is there, before memory is taken.
    with archive.open(member) as data:
        version = np.lib.format.read_magic(data)
        if version not in _HEADERS:
            raise ValueError(f"version {version} of numpy's format is for structured arrays")
        shape, _, dtype = _HEADERS[version](data)
        if dtype.hasobject:
            raise _fault(path, "pickled-array", f"`{name}` is a pickled object array")
        if min(shape, default=0) < 0 or (
            data.tell() + math.prod(shape) * dtype.itemsize != member.file_size
        ):
            raise ValueError(f"its size does not fit its shape {shape} and dtype {dtype}")
    with archive.open(member) as data:
        array: Array = np.lib.format.read_array(data, allow_pickle=False)
    return array


def _fault(path: Path, code: str, problem: str) -> InputError:
    todo = "write it with np.savez(file, **{name: array}), arrays of numbers, bools or text"
    return InputError(Diagnostic(code, f"`{path}` is not taken: {problem}", todo))


# --- writing -------------------------------------------------------------------------------------


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write ``arrays``, in their order, to an npz file; it is there whole or not at all.

    Args:
        path: Replaced where it is a file. Its folder must exist.
        arrays: Name -> array. Arrays of Python strings become numpy text; nothing else changes.

    Raises:
        InputError: ``cannot-write-npz`` where the path or an array does not allow it.
        EnvironmentFault: ``disk-full``, ``cannot-write``.
    """
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_file() and not target.is_dir():
            # A pipe or device: not ours to replace, and zipfile wants to seek.
            with tempfile.TemporaryFile() as whole, target.open("wb") as out:
                _write(path, whole, arrays)
                whole.seek(0)
                shutil.copyfileobj(whole, out)
            return
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        staging = target.with_name(f".{target.name[:200]}.optc-{secrets.token_hex(4)}")
        try:
            with staging.open("xb") as out:
                _write(path, out, arrays)
            os.replace(staging, target)
        finally:
            staging.unlink(missing_ok=True)
    except OSError as error:
        raise _not_written(path, error) from error


def _write(path: Path, out: IO[bytes], arrays: Mapping[str, Array]) -> None:
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(_member_name(path, name), date_time=_EARLIEST)
            with archive.open(member, "w", force_zip64=True) as data:
                np.lib.format.write_array(data, _storable(path, name, array), allow_pickle=False)


def _member_name(path: Path, name: str) -> str:
    member = name + _SUFFIX
    try:
        size = len(member.encode())
    except UnicodeEncodeError:
        size = 0
    if "\0" in name or not 0 < size < 1 << 16:
        raise _not_storable(path, f"a zip file cannot hold a name like {name[:80]!r}")
    return member


def _storable(path: Path, name: str, array: Array) -> Array:
    array = np.asanyarray(array)
    if array.dtype.hasobject or array.dtype.kind == "T":
        items = array.reshape(-1).tolist()
        if not all(isinstance(item, str) for item in items):
            raise _not_storable(path, f"`{name}` holds objects that are neither numbers nor text")
        if any(item.endswith("\0") for item in items):
            raise _not_storable(path, f"`{name}` holds text that ends in NUL, which numpy drops")
        return array.astype(np.str_)
    return array


def _not_storable(path: Path, problem: str) -> InputError:
    return InputError(Diagnostic("cannot-write-npz", f"`{path}` is not written: {problem}"))


def _not_written(path: Path, error: OSError) -> OptcError:
    problem = f"`{path}` is not written: {error.strerror or error}"
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return EnvironmentFault(
            Diagnostic("disk-full", problem, "free some space, or write to another disk")
        )
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        todo = "give the path of a file in a folder that exists"
        return InputError(Diagnostic("cannot-write-npz", problem, todo))
    return EnvironmentFault(
        Diagnostic("cannot-write", problem, "choose a folder that you may write to")
    )
