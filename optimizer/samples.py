"""Data of the user as input of the model: npz files, and images where a spec says how.

A sample is known by its content, not by its file: the same arrays in another npz file, compressed
or not, are the same sample, and so is the same picture in another format that loses nothing. Every
file is read once when the samples are listed, so that what is wrong with any of them is said before
long work begins; after that only what is asked for is in memory.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from onnx import helper

from optc.optimizer.arrays import dtype_name, dtype_of, read_arrays
from optc.optimizer.feed import Signature, checked_feed
from optc.optimizer.image_file import ImageReader, PlaceOf, reader_of
from optc.optimizer.made_up import is_float, made_up
from optc.optimizer.progress import Progress, Silent
from optc.specs.check import data_files
from optc.specs.compile_spec import Images
from optc.specs.diagnostic import Diagnostic, InputError
from optc.specs.manifest import Tensor
from optc.specs.model_problem import ResolvedInput

Array = npt.NDArray[Any]

_MOST_PROBLEMS: Final = 20
"""Said one by one; of more, how many."""

_TELLING_SIZE: Final = 64
_TELLING_VALUES: Final = 16
_LOOKED_AT: Final = 1024
"""Data of this many elements with more than so many values, looked for among so many elements, are
nothing that is alike by chance, such as a mask or padding."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One input that the model runs on.

    Attributes:
        name: Of its file, as the user may look for it.
        digest: SHA-256 of its content: what the model is given.
        load: Reads it again.
        marks: Digest of an array of it, or of one entry of its batch -> name of the input. Only of
            what is hardly alike by chance.
    """

    name: str
    digest: str
    load: Callable[[], dict[str, Array]]
    marks: Mapping[bytes, str] = field(default_factory=dict, repr=False)


def samples_of(
    folder: Path,
    patterns: Sequence[str],
    signature: Signature,
    images: Images | None = None,
    *,
    place: PlaceOf = lambda *keys: None,
    progress: Progress | None = None,
) -> list[Sample]:
    """Return the samples in the files that ``patterns`` name from ``folder``, each file once.

    Args:
        folder: Of the spec.
        patterns: See `optc.specs.check.data_files`. ``.npz`` files hold one array an input; any
            other file is taken for an image.
        signature: What the model takes.
        images: How an image becomes input. Other inputs of the model get made-up values, of the
            ranges that the spec gives.
        place: Keys below the part of the spec that has ``images`` -> where they stand.
        progress: Told of each file.

    Raises:
        InputError: All problems of all files: ``no-data``, ``bad-images``, ``bad-image``, those of
            `read_arrays` and of `checked_feed`.
        EnvironmentFault: ``missing-extra``: Pillow is not installed.
    """
    progress = progress or Silent()
    found: dict[Path, None] = {}
    problems = []
    for pattern in patterns:
        files = data_files(folder, pattern)
        found.update(dict.fromkeys(files))
        if not files:
            problems.append(Diagnostic("no-data", f"no file matches `{pattern}` in `{folder}`"))
    reader = None
    others = [path for path in found if path.suffix.lower() != ".npz"]
    if others:
        try:
            reader = _reader(others, signature, images, place)
        except InputError as error:
            problems += error.diagnostics
            found = dict.fromkeys(path for path in found if path.suffix.lower() == ".npz")
    samples = []
    for number, path in enumerate(found):
        name = str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
        progress.part("data", f"reading {name}", number / len(found))
        if reader is None or path.suffix.lower() == ".npz":
            load = partial(_from_npz, path, signature)
        else:
            load = partial(_from_image, path, reader, signature)
        try:
            feed = load()
        except InputError as error:
            problems += error.diagnostics
        else:
            samples.append(Sample(name, _digest(feed), load, _marks(feed)))
    progress.part("data", f"{len(found)} files", 1.0)
    if problems:
        raise InputError(*_shortened(problems))
    return samples


def _reader(
    paths: Sequence[Path], signature: Signature, images: Images | None, place: PlaceOf
) -> ImageReader:
    """Return what reads ``paths``, which are no npz files."""
    if images is not None:
        return reader_of(images, signature, place)
    more = f", like {len(paths) - 1} more files," if len(paths) > 1 else ""
    raise InputError(
        Diagnostic(
            "not-npz",
            f"`{paths[0]}`{more} is no npz file, and nothing says how it becomes input",
            "name npz files only; to calibrate with images, say in `calibration.images` how they "
            "are prepared",
        )
    )


def _from_npz(path: Path, signature: Signature) -> dict[str, Array]:
    return _checked(path, read_arrays(path), signature)


def _from_image(path: Path, reader: ImageReader, signature: Signature) -> dict[str, Array]:
    pixels = reader.read(path)
    [taken] = [tensor for tensor in signature.inputs if tensor.name == reader.input]
    extents = dict(zip(taken.shape or (), pixels.shape, strict=True))
    others = {
        tensor.name: _resolved(tensor, extents, signature)
        for tensor in signature.inputs
        if tensor is not taken
    }
    # What is made up differs from image to image, and depends on nothing but the image.
    given = made_up(others, {}, "opt", seed=zlib.crc32(pixels.tobytes()))
    return _checked(path, given | {reader.input: pixels}, signature)


def _resolved(
    tensor: Tensor, extents: Mapping[int | str, int], signature: Signature
) -> ResolvedInput:
    """Return ``tensor`` as a thing to make up, of the extents that fit the image."""
    profile = (signature.profiles or ({},))[0]

    def extent(axis: int | str) -> int:
        if isinstance(axis, int):
            return axis
        return extents[axis] if axis in extents else profile[axis].opt if axis in profile else 1

    dtype = int(helper.np_dtype_to_tensor_dtype(dtype_of(tensor.dtype)))
    return ResolvedInput(dtype, tuple(map(extent, tensor.shape or ())), tensor.range)


def _checked(path: Path, given: Mapping[str, Array], signature: Signature) -> dict[str, Array]:
    try:
        return checked_feed(signature, given, taker="model")
    except InputError as error:
        raise InputError(
            *(replace(each, problem=f"`{path}`: {each.problem}") for each in error.diagnostics)
        ) from error


# --- content -------------------------------------------------------------------------------------


def _digest(feed: Mapping[str, Array]) -> str:
    whole = hashlib.sha256()
    for name, array in feed.items():
        whole.update(json.dumps([name, dtype_name(array.dtype), array.shape]).encode())
        whole.update(_bytes(array))
    return whole.hexdigest()


def _bytes(array: Array) -> bytes | memoryview:
    if array.dtype.hasobject:
        return json.dumps(array.reshape(-1).tolist()).encode()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _marks(feed: Mapping[str, Array]) -> dict[bytes, str]:
    """Return what single arrays, and entries of a batch, are known by."""
    found: dict[bytes, str] = {}
    for name, array in feed.items():
        if not (is_float(array.dtype) or array.dtype == np.uint8):
            continue  # whole numbers are lengths, masks and positions: alike in many samples
        for row in array if array.ndim > 1 else array[None]:
            if _is_telling(row):
                digest = hashlib.sha256(dtype_name(row.dtype).encode())
                digest.update(_bytes(row))
                found[digest.digest()] = name
    return found


def _is_telling(row: Array) -> bool:
    if row.size < _TELLING_SIZE:
        return False
    bits = np.ascontiguousarray(row).reshape(-1).view(f"u{row.dtype.itemsize}")
    looked_at = bits[:: max(1, bits.size // _LOOKED_AT)]
    return len(np.unique(looked_at)) > _TELLING_VALUES


# --- leaks ---------------------------------------------------------------------------------------


def check_no_leak(calibration: Sequence[Sample], verification: Sequence[Sample]) -> None:
    """Make sure that nothing is used both to calibrate and to verify, under whatever name.

    Ranges that were made for an input fit it too well: its figures say little of others. The same
    is the whole input, one array of it, or one entry along the first axis of an array, that of
    batches. An array or entry that several samples of one side have says nothing of a sample.

    Raises:
        InputError: ``calibration-leak``, once for each pair of files.
    """
    found: dict[tuple[str, str], str | None] = {}
    by_digest = defaultdict(list)
    for sample in calibration:
        by_digest[sample.digest].append(sample.name)
    for sample in verification:
        found.update(dict.fromkeys((name, sample.name) for name in by_digest[sample.digest]))
    known, checked = _own_marks(calibration), _own_marks(verification)
    for mark in checked.keys() & known.keys():
        found.setdefault((known[mark][0], checked[mark][0]), known[mark][1])
    problems = [_leak(*pair, part) for pair, part in sorted(found.items(), key=lambda e: e[0])]
    if problems:
        raise InputError(*_shortened(problems))


def _own_marks(samples: Sequence[Sample]) -> dict[bytes, tuple[str, str]]:
    """Return the marks that one sample alone has -> its name, and that of the input."""
    count = Counter(mark for sample in samples for mark in sample.marks)
    return {
        mark: (sample.name, name)
        for sample in samples
        for mark, name in sample.marks.items()
        if count[mark] == 1
    }


def _leak(calibration: str, verification: str, part: str | None) -> Diagnostic:
    if calibration == verification:
        problem = f"`{calibration}` is named both to calibrate and to verify"
    elif part is None:
        problem = f"`{calibration}`, to calibrate, and `{verification}`, to verify, hold the same"
    else:
        problem = (
            f"`{calibration}`, to calibrate, and `{verification}`, to verify, share data of the "
            f"input `{part}`"
        )
    return Diagnostic(
        "calibration-leak",
        problem,
        "take it out of one of them: what ranges were made for cannot tell how good they are",
    )


def _shortened(problems: list[Diagnostic]) -> list[Diagnostic]:
    more = len(problems) - _MOST_PROBLEMS
    if more <= 0:
        return problems
    last = replace(problems[_MOST_PROBLEMS], problem=f"and {more} more like these")
    return [*problems[:_MOST_PROBLEMS], last]
