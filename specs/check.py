"""Check a spec: its text, its keys and values, and all of it against the model it names.

Every problem of a file is found in one go: what is faulty is set aside, and the rest is compared
with the model all the same.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from optc.specs.compile_spec import CompileSpec, Cost, Range
from optc.specs.diagnostic import Diagnostic, Place, SpecError, nearest, quoted
from optc.specs.manifest import ModelPart
from optc.specs.measured_cost import with_measured
from optc.specs.model_outline import Outline, OutlineError, read_outline
from optc.specs.model_problem import Comparison, ResolvedInput
from optc.specs.operator_problem import operator_problems
from optc.specs.replace_problem import missing_modules
from optc.specs.schema_problem import Reading, spec_of
from optc.specs.source import Source, find, find_key, read

KnownPasses = Iterable[str] | Callable[[], Iterable[str]]
"""Names of the passes there are. A function is called only where a spec names passes."""

OptionsOf = Callable[[str], Mapping[str, tuple[type[object], float | None]]]
"""Name of a pass -> name of an option -> its type, and the least it may be if it is a number."""


@dataclass(frozen=True)
class CheckedSpec:
    """A spec without a mistake, and what it makes of the model's inputs.

    Attributes:
        spec: What the file says, with defaults.
        path: Of the file, as the user wrote it.
        sha256: Of the file.
        model_path: Of the model, taken from the folder of the spec.
        model_sha256: Of the model, where the spec gives one to compare with.
        inputs: The model's inputs, weights left out, by name in the model's order.
        profiles: One or more: each gives every symbol of ``inputs``, and the symbols inside the
            model that the user gave.
        cost: What things cost, with what was measured where the spec names a file of that.
        notes: What is no mistake and worth a word.
        outline_ok: Whether the model could be read for the check. Where not, ``inputs`` is empty
            and the model's loader has more to say.
        part: The part of the model that ``inputs`` enter, where not the whole is meant.
    """

    spec: CompileSpec
    path: Path
    sha256: str
    model_path: Path
    model_sha256: str | None
    inputs: dict[str, ResolvedInput]
    profiles: tuple[dict[str, Range], ...]
    cost: Cost
    notes: tuple[Diagnostic, ...]
    outline_ok: bool
    _source: Source = field(repr=False, compare=False)
    part: ModelPart | None = None

    @property
    def symbol_ranges(self) -> dict[str, tuple[int, int]]:
        """Smallest and largest extent of each symbol of the inputs, over all profiles."""
        symbols = {a for given in self.inputs.values() for a in given.shape if isinstance(a, str)}
        return {
            name: (
                min(profile[name].min for profile in self.profiles),
                max(profile[name].max for profile in self.profiles),
            )
            for name in symbols
        }

    def place(self, *keys: str | int, key: bool = False) -> Place | None:
        """Return where in the file something stands, for a diagnostic that refers to it.

        Args:
            *keys: Keys and indices from the top: ``"partition", "points", 0``.
            key: Whether the last key is meant, not its value.

        Returns:
            None where the file does not say it.
        """
        root = self._source.root
        node = find_key(root, *keys) if key else find(root, *keys)
        return None if node is None else self._source.place(node)


def check(
    path: str | Path,
    *,
    known_passes: KnownPasses | None = None,
    options_of: OptionsOf | None = None,
) -> CheckedSpec:
    """Return the spec in the file at ``path``, checked.

    Args:
        path: Of the spec file. Paths in the file are taken from its folder.
        known_passes: What ``passes`` may name; None where anything goes.
        options_of: Tells which options a known pass has, and their types; None where anything goes.

    Raises:
        SpecError: With every mistake in the file, in the order of its lines.
    """
    source = read(path)
    reading = spec_of(source)
    folder = source.path.parent
    problems = [
        *source.problems,
        *reading.problems,
        *_not_yet(source, reading),
        *_unknown_passes(source, reading, known_passes),
        *_wrong_options(source, reading, known_passes, options_of),
        *_missing_data(source, reading, folder),
        *_calibration_problems(source, reading),
        *missing_modules(
            reading.spec.partition.replace,
            reading.spec.partition.scopes,
            folder,
            partial(_place, source, reading),
        ),
    ]
    measured = _place(source, reading, "partition", "cost", "measured")
    cost, faults = with_measured(reading.spec.partition.cost, folder, measured)
    problems += faults
    model_path = folder / reading.spec.model.path
    model_sha256: str | None = None
    outline: Outline | None = None
    if reading.has_model:
        model_sha256, lacks = _model_file(source, reading, model_path)
        problems += lacks
        if not lacks:
            outline = _outline_of(model_path)
    inputs: dict[str, ResolvedInput] = {}
    profiles = reading.spec.profiles or (reading.spec.dims,)
    if outline is not None:
        comparison = Comparison(source, reading, outline)
        try:
            comparison.run()
            inputs, profiles = comparison.inputs, comparison.profiles
        except OutlineError:
            outline = None  # some node is broken: for the loader to say
        problems += comparison.problems
    problems += operator_problems(source, reading, folder, outline)
    errors = sorted((p for p in problems if p.severity == "error"), key=_order)
    if errors:
        raise SpecError(*errors)
    return CheckedSpec(
        spec=reading.spec,
        path=source.path,
        sha256=source.sha256,
        model_path=model_path,
        model_sha256=model_sha256,
        inputs=inputs,
        profiles=profiles,
        cost=cost,
        notes=tuple(sorted(problems, key=_order)),
        outline_ok=outline is not None,
        _source=source,
    )


def _order(problem: Diagnostic) -> tuple[int, int]:
    return (problem.place.line, problem.place.column) if problem.place else (0, 0)


def _place(source: Source, reading: Reading, *keys: str | int, key: bool = False) -> Place | None:
    node = find_key(reading.root, *keys) if key else find(reading.root, *keys)
    return None if node is None else source.place(node)


def _not_yet(source: Source, reading: Reading) -> list[Diagnostic]:
    """Return what is a valid spec and beyond this version."""
    spec = reading.spec
    found: list[Diagnostic] = []

    def add(problem: str, todo: str, *keys: str | int) -> None:
        place = _place(source, reading, *keys)
        found.append(Diagnostic("not-in-this-version", problem, todo, place))

    if spec.precision.default == "tf32" and spec.precision.keep_fp32:
        problem = "TensorRT switches TF32 for a whole engine: single nodes cannot be kept in fp32"
        add(problem, "leave `keep_fp32` out, or write `fp32`", "precision", "keep_fp32")
    if spec.fallback.runtime == "torch":
        problem = (
            "torch runs what a module is given for, under `operators` or `partition.replace`, and "
            "no operator of ONNX: these run on ONNX Runtime"
        )
        add(problem, "write `onnxruntime`, or leave `fallback` out", "fallback", "runtime")
    return found


def _unknown_passes(
    source: Source, reading: Reading, known_passes: KnownPasses | None
) -> list[Diagnostic]:
    passes = reading.spec.passes
    if not (passes.disable or passes.options) or known_passes is None:
        return []
    known = _names(known_passes)
    named: list[tuple[str, tuple[str, str | int], bool]]
    named = [(name, ("disable", index), False) for index, name in enumerate(passes.disable)]
    named += [(name, ("options", name), True) for name in passes.options]
    found = []
    for name, keys, is_key in named:
        if name in known:
            continue
        near = nearest(name, known)
        listing = "see all of them with `optc passes`"
        found.append(
            Diagnostic(
                "unknown-pass",
                f"there is no pass called `{name}`",
                f"write `{near}`, or {listing}" if near else listing,
                _place(source, reading, "passes", *keys, key=is_key),
            )
        )
    return found


def _wrong_options(
    source: Source,
    reading: Reading,
    known_passes: KnownPasses | None,
    options_of: OptionsOf | None,
) -> list[Diagnostic]:
    given = reading.spec.passes.options
    if not given or known_passes is None or options_of is None:
        return []
    found = []
    for name in given.keys() & set(_names(known_passes)):
        types = options_of(name)
        for option, value in given[name].items():
            keys = ("passes", "options", name, option)
            wanted, least = types.get(option, (None, None))
            if wanted is None:
                near = nearest(option, types)
                has = quoted(types) or "no options"
                found.append(
                    Diagnostic(
                        "unknown-option",
                        f"the pass `{name}` has no option `{option}`",
                        f"write `{near}`" if near else f"it has {has}",
                        _place(source, reading, *keys, key=True),
                    )
                )
            elif type(value) is not wanted and (wanted, type(value)) != (float, int):
                found.append(
                    Diagnostic(
                        "wrong-type",
                        f"the option `{option}` of the pass `{name}` takes {_NOUNS[wanted]}, "
                        f"not {_NOUNS[type(value)]}",
                        f"see `optc passes {name}`",
                        _place(source, reading, *keys),
                    )
                )
            elif least is not None and not isinstance(value, str) and value < least:
                found.append(
                    Diagnostic(
                        "out-of-range",
                        f"the option `{option}` of the pass `{name}` is {value}",
                        f"write {least:g} or more",
                        _place(source, reading, *keys),
                    )
                )
    return found


_NOUNS: Mapping[type[object], str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
}


def _names(known: KnownPasses) -> list[str]:
    return sorted(known() if callable(known) else known)


def _missing_data(source: Source, reading: Reading, folder: Path) -> list[Diagnostic]:
    """Return the patterns for data that match no file."""
    calibration, verify = reading.spec.precision.calibration, reading.spec.verify
    named: list[tuple[Iterable[str], tuple[str | int, ...]]] = []
    if calibration:
        named.append((calibration.data, ("precision", "calibration", "data")))
    if verify:
        named.append((verify.data or (), ("verify", "data")))
        named += [(g.data, ("verify", "groups", name, "data")) for name, g in verify.groups.items()]
    found = []
    for patterns, keys in named:
        for index, pattern in enumerate(patterns):
            if data_files(folder, pattern):
                continue
            # One pattern stands in place of a list, and patterns in place of a group.
            ways = ((*keys, index), keys, (*keys[:-1], index), keys[:-1])
            places = (_place(source, reading, *way) for way in ways)
            found.append(
                Diagnostic(
                    "no-data",
                    f"no file matches `{pattern}` in {folder}",
                    "check the path, which is taken from the folder of the spec",
                    next(filter(None, places), None),
                )
            )
    return found


def _calibration_problems(source: Source, reading: Reading) -> list[Diagnostic]:
    """Return where data to calibrate with are missing, are given in vain, or do not fit."""
    precision = reading.spec.precision
    quantised = [("default", precision.default)] + [
        (index, layer.precision) for index, layer in enumerate(precision.layers)
    ]
    wanting = [each for each in quantised if each[1] in ("int8", "fp8")]
    calibration = precision.calibration
    given = find_key(source.root, "precision", "calibration")
    if wanting and given is None:
        return [_no_calibration(source, reading, *each) for each in wanting]
    if calibration is None:
        return []  # faulty, which has been said
    if not wanting:
        problem = "the data to calibrate with are not used: nothing here is int8 or fp8"
        place = source.place(given) if given is not None else None
        todo = "leave `calibration` out, or ask for int8 or fp8"
        return [Diagnostic("unused-calibration", problem, todo, place, "note")]
    images = calibration.images
    if images is None:
        return []
    channels = 1 if images.color == "gray" else 3
    return [
        Diagnostic(
            "wrong-length",
            f"`{key}` has {len(numbers)} numbers, and `color: {images.color}` has {channels} "
            f"{'channel' if channels == 1 else 'channels'}",
            "write one number, or one for each channel",
            _place(source, reading, "precision", "calibration", "images", key),
        )
        for key, numbers in (("mean", images.mean), ("std", images.std))
        if len(numbers) not in (1, channels)
    ]


def _no_calibration(
    source: Source, reading: Reading, where: str | int, precision: str
) -> Diagnostic:
    keys = (
        ("precision", "default")
        if where == "default"
        else ("precision", "layers", where, "precision")
    )
    return Diagnostic(
        "no-calibration",
        f"{precision} needs data of yours to take the ranges of values from",
        'write `calibration: {data: "calibration/*.npz"}` below `precision`, with files of typical '
        "input that are not used to verify",
        _place(source, reading, *keys) or _place(source, reading, "precision"),
    )


DATA_SUFFIXES: Final = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".npz", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
"""Of the files that a folder stands for where it is named as data."""


def data_files(folder: Path, pattern: str) -> list[Path]:
    """Return the files of data that ``pattern`` matches from ``folder``, in order.

    A folder that it matches stands for the npz files and images in it.
    """
    found: list[Path] = []
    for path in files_matching(folder, pattern):
        if path.is_dir():
            found += sorted(p for p in path.iterdir() if p.suffix.lower() in DATA_SUFFIXES)
        else:
            found.append(path)
    return [path for path in found if path.is_file()]


def files_matching(folder: Path, pattern: str) -> list[Path]:
    """Return the paths that ``pattern`` matches from ``folder``, sorted; ``**`` is any depth."""
    return [folder / name for name in sorted(glob.glob(pattern, root_dir=folder, recursive=True))]


def _model_file(
    source: Source, reading: Reading, path: Path
) -> tuple[str | None, list[Diagnostic]]:
    """Return the SHA-256 of the model, where the spec gives one, and what is wrong with the file."""
    model = reading.spec.model
    place = _place(source, reading, "model", "path") or _place(source, reading, "model")
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest() if model.sha256 else None
    except (FileNotFoundError, NotADirectoryError):
        near = nearest(path.name, _models_in(path.parent))
        written = str(Path(model.path).parent / near) if near else ""
        return None, [
            Diagnostic(
                "model-not-found",
                f"there is no model {path}",
                f"write `{written}`"
                if near
                else "check the path, which is taken from the folder of the spec",
                place,
            )
        ]
    except OSError as error:
        problem = f"the model {path} cannot be read: {error.strerror}"
        return None, [Diagnostic("model-unreadable", problem, "name an ONNX file", place)]
    if found == model.sha256:
        return found, []
    return None, [
        Diagnostic(
            "sha256-mismatch",
            f"{path} is another file: its SHA-256 is {found}",
            "get the right model; or write this hash, if the model was meant to change",
            _place(source, reading, "model", "sha256"),
        )
    ]


def _models_in(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if name.endswith(".onnx"))
    except OSError:
        return []


def _outline_of(path: Path) -> Outline | None:
    try:
        return read_outline(path)
    except (OutlineError, OSError):
        return None  # for the loader to say: it reads all of it
