"""Keeps the ranges of quantised values, and tells how they change with the data.

They stand in a JSON file: what they are of, the files that they were taken from with the digests of
their content, and a line a tensor. A file that the spec names is the user's, to be kept beside it:
it may be read, compared and edited (what is edited holds until something above it changes). It is
replaced only by new ranges and only where it held ranges before; anything else under that path is
an error. Without one the file is in the cache folder, where a damaged one costs but a warning.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import onnx_graphsurgeon as gs
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from optc.optimizer.cache_folder import cache_folder
from optc.optimizer.calibration import Method, Run, calibrate
from optc.optimizer.progress import Progress
from optc.optimizer.samples import Sample
from optc.passes.graph import all_nodes
from optc.passes.quantisation import EightBits
from optc.specs.diagnostic import Diagnostic, EnvironmentFault, InputError

_NAMED: Final = 5
"""Files and tensors that a note names; of more, how many."""
_MOVED: Final = 0.01
"""Relative change from which a range counts as another one."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What ranges are of, but for the data.

    Attributes:
        model: SHA-256 of the model file.
        graph: What tells the optimised graph from others: see `identity_of`.
        precision: What the tensors are quantised to.
        method: How a range follows from the values.
        percentile: For that method; None for others.
    """

    model: str
    graph: str
    precision: EightBits
    method: Method
    percentile: float | None = None


@dataclass(frozen=True, slots=True)
class Ranges:
    """The ranges of quantised values.

    Attributes:
        amax: Name of a tensor -> the largest magnitude that its quantised values stand for; 0 where
            it was zero throughout. A tensor that was empty in every sample is not there.
        notes: What the user may want to know: that the data changed, and what came of it.
        reused: Whether nothing was run for them.
    """

    amax: Mapping[str, float]
    notes: tuple[Diagnostic, ...]
    reused: bool


class _File(BaseModel):
    """The file, from its first line to its last."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    optc_ranges: Literal[1]
    model: str
    graph: str
    precision: EightBits
    method: Method
    percentile: float | None
    data: dict[str, str]
    amax: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)] | None]

    @property
    def origin(self) -> Origin:
        return Origin(self.model, self.graph, self.precision, self.method, self.percentile)


def identity_of(graph: gs.Graph) -> str:
    """Return what changes when the name of a tensor may stand for something else.

    Passes give names of their own making to new tensors, so that another set of passes may give one
    to another tensor. Which nodes are there, and what they read and write, tells.
    """
    lines = sorted(
        repr((node.domain, node.op, [t.name for t in node.inputs], [t.name for t in node.outputs]))
        for node in all_nodes(graph)
    )
    return hashlib.sha256("\n".join(lines).encode(errors="surrogatepass")).hexdigest()


def ranges_of(
    origin: Origin,
    samples: Sequence[Sample],
    wanted: Collection[str],
    run: Run,
    *,
    file: Path | None = None,
    keep: bool = True,
    progress: Progress | None = None,
) -> Ranges:
    """Return the ranges of ``wanted``, kept ones where nothing has changed.

    Args:
        origin: What they are of.
        samples: The data. Files that only bear other names are the same data.
        wanted: Names of tensors. Where only some are not known yet, those alone are taken.
        run: Runs the model; called only where something is to be taken.
        file: Of the user's; None for one in the cache folder.
        keep: Whether the user's file may be written.
        progress: Told of each sample.

    Raises:
        InputError: ``damaged-ranges`` for the user's file; ``not-finite``.
        EnvironmentFault: ``disk-full``, ``cannot-write`` for the user's file.
    """
    store = _Store.of(file, origin)
    kept = store.read()
    data = {sample.name: sample.digest for sample in samples}
    same = (
        kept is not None
        and kept.origin == origin
        and sorted(kept.data.values()) == sorted(data.values())
    )
    known = dict(kept.amax) if kept is not None and same else {}
    missing = sorted(set(wanted) - known.keys())
    notes = list(store.warnings)
    if missing:
        if keep:
            store.check_writable()
        if kept is not None and not same:
            notes += _what_changed(store.path, kept, origin, data)
        percentile = origin.percentile if origin.percentile is not None else 100.0
        known |= dict.fromkeys(missing)
        known |= calibrate(
            run,
            samples,
            missing,
            origin.method,
            percentile,
            precision=origin.precision,
            progress=progress,
        )
        if kept is not None and not same and kept.model == origin.model:
            notes += _what_moved(kept.amax, known)
    now = _File(optc_ranges=1, **asdict(origin), data=data, amax=known)
    if now != kept and (keep or file is None):
        notes += store.write(now)
    amax = {name: found for name in wanted if (found := known[name]) is not None}
    return Ranges(amax, tuple(notes), reused=not missing)


# --- the file ------------------------------------------------------------------------------------


class _Store:
    """The file that ranges are kept in, and whose it is."""

    def __init__(self, path: Path, *, own: bool) -> None:
        self.path = path
        self.warnings: list[Diagnostic] = []
        self._own = own

    @classmethod
    def of(cls, file: Path | None, origin: Origin) -> _Store:
        if file is not None:
            return cls(file, own=True)
        key = hashlib.sha256(repr(asdict(origin)).encode()).hexdigest()
        return cls(cache_folder() / "ranges" / f"{key}.json", own=False)

    def read(self) -> _File | None:
        """Return what the file holds; None where there is none, or a damaged one that is ours."""
        try:
            return _File.model_validate_json(self.path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            why = f"it cannot be read: {error.strerror}"
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            where = ".".join(map(str, first["loc"]))
            why = f"{where}: {first['msg']}" if where else first["msg"]
        problem = f"`{self.path}` holds no ranges that this optc reads: {why}"
        if self._own:
            todo = "delete it to have it made anew, or name another file"
            raise InputError(Diagnostic("damaged-ranges", problem, todo))
        self.warnings.append(Diagnostic("damaged-ranges", problem, severity="warning"))
        return None

    def check_writable(self) -> None:
        """Make sure, before long work, that the user's file can be written."""
        folder = self.path.parent
        if self._own and folder.is_dir() and not os.access(folder, os.W_OK):
            raise self._fault(OSError(errno.EACCES, os.strerror(errno.EACCES)))

    def write(self, content: _File) -> list[Diagnostic]:
        """Write ``content``, whole or not at all; return a warning where it cannot be."""
        lines = content.model_copy(
            update={
                "data": dict(sorted(content.data.items())),
                "amax": dict(sorted(content.amax.items())),
            }
        )
        target = Path(os.path.realpath(self.path))
        staging = target.with_name(f".{target.name[:200]}.optc-{secrets.token_hex(4)}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                staging.write_bytes(lines.model_dump_json(indent=2).encode() + b"\n")
                os.replace(staging, target)
            finally:
                staging.unlink(missing_ok=True)
        except OSError as error:
            fault = self._fault(error)
            if self._own:
                raise fault from error
            [diagnostic] = fault.diagnostics
            problem = f"the ranges are not kept: {diagnostic.problem}"
            return [Diagnostic("ranges-not-written", problem, severity="warning")]
        return []

    def _fault(self, error: OSError) -> EnvironmentFault:
        problem = f"`{self.path}` cannot be written: {error.strerror or error}"
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            todo = "free some space, or write to another disk"
            return EnvironmentFault(Diagnostic("disk-full", problem, todo))
        todo = "name a file that you may write in `calibration.cache`"
        return EnvironmentFault(Diagnostic("cannot-write", problem, todo))


# --- what has changed ----------------------------------------------------------------------------


def _what_changed(
    path: Path, kept: _File, origin: Origin, data: Mapping[str, str]
) -> list[Diagnostic]:
    """Return why the kept ranges do not hold any more."""
    notes = []
    if others := _differences(kept.origin, origin):
        notes.append(
            _note("ranges-outdated", f"the ranges in `{path}` are taken anew: {', '.join(others)}")
        )
    added = sorted(data.keys() - kept.data.keys())
    removed = sorted(kept.data.keys() - data.keys())
    changed = sorted(
        name for name in data.keys() & kept.data.keys() if data[name] != kept.data[name]
    )
    parts = [
        f"{_files(names)} {what} ({_some([f'`{name}`' for name in names])})"
        for names, what in ((added, "added"), (removed, "removed"), (changed, "changed"))
        if names
    ]
    if parts:
        notes.append(
            _note("calibration-data-changed", f"the data to calibrate with: {', '.join(parts)}")
        )
    return notes


def _differences(kept: Origin, now: Origin) -> list[str]:
    if kept.model != now.model:
        return ["they are of another model file"]
    words = []
    if kept.graph != now.graph:
        words.append("the model is optimised in another way now")
    for name in ("precision", "method", "percentile"):
        old, new = getattr(kept, name), getattr(now, name)
        if old != new and None not in (old, new):
            words.append(f"`{name}` was {old} and is {new}")
    return words


def _what_moved(
    kept: Mapping[str, float | None], now: Mapping[str, float | None]
) -> list[Diagnostic]:
    """Return how far the ranges are from those that were kept."""
    moves = []
    for name in sorted(kept.keys() & now.keys()):
        old, new = kept[name], now[name]
        if old is not None and new is not None:
            moves.append((_distance(old, new), name, old, new))
    far = sorted((m for m in moves if m[0] > math.log1p(_MOVED)), key=lambda m: (-m[0], m[1]))
    if not moves:
        return []
    words = f"of {len(moves)} ranges {len(far) or 'none'} moved by more than {_MOVED:.0%}"
    if far:
        words += ": " + _some([f"`{name}` {_move(old, new)}" for _, name, old, new in far])
    return [_note("ranges-moved", words)]


def _distance(old: float, new: float) -> float:
    if old == new:
        return 0.0
    return abs(math.log(new / old)) if old and new else math.inf


def _move(old: float, new: float) -> str:
    share = f" ({new / old - 1:+.1%})" if old else ""
    return f"{old:.4g} -> {new:.4g}{share}"


def _files(names: Sequence[str]) -> str:
    return "1 file" if len(names) == 1 else f"{len(names)} files"


def _some(words: Sequence[str]) -> str:
    more = len(words) - _NAMED
    return ", ".join(words[:_NAMED]) + (f", and {more} more" if more > 0 else "")


def _note(code: str, problem: str) -> Diagnostic:
    return Diagnostic(code, problem, severity="note")
