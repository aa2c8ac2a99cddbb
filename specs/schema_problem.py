"""What is wrong with the keys and values of a spec, in a user's words."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Final, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from optc.specs.compile_spec import CompileSpec, DtypeName, Part, kind_of
from optc.specs.diagnostic import Diagnostic, Place, nearest, quoted
from optc.specs.source import Items, Leaf, Node, Source, Table, copy_of, find, plain, scalar

Path = tuple[str | int, ...]
"""Keys and indices that lead from the top of a spec to a value."""

_STAND_INS: Final[dict[str, Any]] = {"version": 1, "model": "?"}
_EXAMPLES: Final = {
    "version": "version: 1",
    "model": "model: model.onnx",
    "path": "path: model.onnx",
    "min": "min: 1",
    "opt": "opt: 4",
    "max": "max: 8",
    "name": "name: ampere",
    "precision": "precision: fp16",
    "data": 'data: "samples/*.npz"',
    "boxes": "boxes: boxes",
    "scores": "scores: scores",
    "op": "op: acme::Peaks",
    "outputs": "outputs: [{like: 0}]",
    "from": "from: [features]",
    "to": "to: [scores]",
    "torch": "torch: module.pt",
}
_CHOICES: Final[dict[str, tuple[str, str, tuple[str, ...]]]] = {
    "default": ("unknown-precision", "precision", ("fp32", "tf32", "fp16", "bf16", "int8", "fp8")),
    "backend": ("unknown-backend", "backend", ("tensorrt-rtx", "tensorrt")),
    "runtime": ("unknown-runtime", "fallback runtime", ("onnxruntime", "torch")),
    "precision": ("unknown-precision", "precision", ("fp32", "fp16", "bf16", "int8", "fp8")),
    "method": ("unknown-choice", "method", ("minmax", "percentile", "entropy", "mse")),
    "resize": ("unknown-choice", "way to resize", ("stretch", "letterbox", "crop")),
    "color": ("unknown-choice", "color", ("rgb", "bgr", "gray")),
    "layout": ("unknown-choice", "layout", ("nchw", "nhwc")),
    "format": ("unknown-choice", "format of boxes", ("corners", "center")),
    "dtype": ("unknown-choice", "type", get_args(DtypeName)),
}
_EXPECTED: Final = {
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "string_type": "a text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
}


def _parts(of: type[Part]) -> Iterator[tuple[str, type[Part]]]:
    for part in of.__subclasses__():
        yield part.__name__, part
        yield from _parts(part)


_PARTS: Final = dict(_parts(Part))
# Lists whose items stand for themselves: without a faulty one, the others are still meant.
_LISTS: Final = {
    ("targets",),
    ("profiles",),
    ("passes", "disable"),
    ("partition", "points"),
    ("partition", "off_tensorrt"),
    ("partition", "keep_together"),
    ("partition", "replace"),
    ("operators",),
    ("precision", "keep_fp32"),
    ("precision", "layers"),
    ("verify", "data"),
    ("verify", "detections"),
}
# Mappings whose keys do: what else stands in them is compared with the model all the same.
_TABLES: Final = {
    ("inputs",),
    ("dims",),
    ("partition",),
    ("partition", "cost"),
    ("partition", "scopes"),
    ("precision",),
    ("precision", "calibration"),
    ("precision", "search"),
    ("verify",),
    ("verify", "groups"),
    ("verify", "outputs"),
}


@dataclass(frozen=True)
class Reading:
    """The valid part of a spec, and what is wrong with the rest.

    Attributes:
        spec: The valid part; what is missing or faulty has its default.
        root: The tree it was read from: the file's without the faulty parts.
        problems: What is wrong with the rest.
        has_model: Whether ``spec.model`` is what the file says.
    """

    spec: CompileSpec
    root: Table
    problems: tuple[Diagnostic, ...]
    has_model: bool


def spec_of(source: Source) -> Reading:
    """Return the spec that ``source`` holds, and every problem of its keys and values."""
    root = source.root
    work = copy_of(root)
    assert isinstance(work, Table)
    problems: dict[tuple[str, Place | None], Diagnostic] = {}

    def note(diagnostic: Diagnostic) -> None:
        problems.setdefault((diagnostic.code, diagnostic.place), diagnostic)

    empty = list(_empty(work))
    for path in empty:
        note(_empty_value(source, work, path))
    _remove(work, [_unit(path) for path in empty])
    stand_ins: dict[str, Any] = {}
    while True:
        # A key that is there and faulty is not missing besides.
        faulty_keys = root.entries.keys() - work.entries.keys()
        stand_ins |= {key: value for key, value in _STAND_INS.items() if key in faulty_keys}
        try:
            spec = CompileSpec.model_validate({**plain(work), **stand_ins})
            break
        except ValidationError as error:
            faulty: list[Path] = []
            for detail in error.errors(include_url=False):
                at = (*detail["loc"], *detail.get("ctx", {}).get("at", ()))
                path = _there(work, at)
                if (diagnostic := _diagnostic(source, work, at, path, detail)) is not None:
                    note(diagnostic)
                if not path:
                    stand_ins[str(at[0])] = _STAND_INS[str(at[0])]
                else:
                    unit = _unit(path)
                    unknown = detail["type"] == "extra_forbidden" and len(unit) == 1
                    faulty.append(path if unknown else unit)
            _remove(work, faulty)
    return Reading(spec, work, tuple(problems.values()), "model" not in stand_ins)


def _empty(node: Node, path: Path = ()) -> Iterator[Path]:
    """Yield where nothing stands behind a key or dash."""
    match node:
        case Leaf(value=None):
            yield path
        case Items():
            for index, item in enumerate(node.items):
                yield from _empty(item, (*path, index))
        case Table():
            for key, (_, value) in node.entries.items():
                yield from _empty(value, (*path, key))


def _unit(path: Path) -> Path:
    """Return the smallest part around ``path`` without which the rest still means the same."""
    for length in range(len(path) - 1, 0, -1):
        outer = path[:length]
        in_table = length == 2 and outer[0] in ("inputs", "profiles")
        if in_table or outer in _LISTS or outer in _TABLES:
            return path[: length + 1]
    return path[:1]


def _there(root: Table, path: Path) -> Path:
    """Return the longest part of ``path`` that exists."""
    while path and find(root, *path) is None:
        path = path[:-1]
    return path


def _remove(root: Table, paths: Iterable[Path]) -> None:
    """Remove what stands at ``paths``, and the lists that this empties."""
    # All are looked up before the first is removed, as indices move.
    gone = [(path, find(root, *path[:-1]), find(root, *path)) for path in paths]
    emptied: list[Path] = []
    for path, outer, node in gone:
        match outer:
            case Table():
                outer.entries.pop(str(path[-1]), None)
                outer.faulty.add(str(path[-1]))
            case Items():
                outer.items[:] = [item for item in outer.items if item is not node]
                if not outer.items:
                    emptied.append(path[:-1])
    if emptied:
        _remove(root, emptied)


def _diagnostic(
    source: Source, root: Table, at: Path, path: Path, detail: ErrorDetails
) -> Diagnostic | None:
    """Return one error of pydantic as a diagnostic.

    Args:
        source: The file.
        root: The tree that was validated.
        at: Where pydantic found the error.
        path: As much of ``at`` as exists in the file: a short form has fewer levels.
        detail: The error.

    Returns:
        None for an error that only follows from others.
    """
    kind, context = detail["type"], detail.get("ctx", {})
    node = find(root, *path)
    assert node is not None, "the path was cut to what exists"
    place = source.place(node)
    if kind == "extra_forbidden":
        return _unknown_key(source, root, at)
    if kind == "missing":
        return _missing(source, root, at, path)
    # Of a short form, what the user wrote is shown, not what it was turned into.
    value = plain(node) if isinstance(node, Leaf) else detail["input"]
    label = f"`{label_of(path)}`"
    if isinstance(value, float) and not math.isfinite(value):
        problem = f"{label} is {source.text[node.start : node.end]}, which is no finite number"
        return Diagnostic("not-a-number", problem, "write a finite number", place)
    if "problem" in context:
        return Diagnostic(kind, context["problem"], context["todo"], place)
    match kind:
        case "literal_error":
            return _unknown_choice(at, value, place)
        case "too_short" if detail["input"]:
            return None  # it is short of faulty items, which have diagnostics of their own
        case "too_short":
            todo = "leave the key out, or list at least one"
            return Diagnostic("empty-value", f"{label} is an empty list", todo, place)
        case "string_too_short" if at[-1] == "[key]":
            outer = find(root, *path[:-1])
            assert isinstance(outer, Table), "only a mapping has keys"
            place = source.place(outer.entries[str(path[-1])][0])
            problem = f"a key of `{label_of(path[:-1])}` is empty"
            return Diagnostic("empty-value", problem, "write a name", place)
        case "string_too_short":
            return Diagnostic("empty-value", f"{label} is empty", "write a name", place)
        case "string_pattern_mismatch":
            if at[-1] == "[key]":
                outer = find(root, *path[:-1])
                assert isinstance(outer, Table), "only a mapping has keys"
                place = source.place(outer.entries[str(path[-1])][0])
            return Diagnostic(
                "bad-stage-name",
                f"a stage cannot be called `{value if at[-1] != '[key]' else path[-1]}`: files are "
                "named after it",
                "write at most 64 letters, digits, `.`, `_` and `-`, a letter first",
                place,
            )
        case "string_too_long":
            problem = f"{label} has more than {context['max_length']} characters"
            return Diagnostic("out-of-range", problem, "write a shorter name", place)
        case "too_long":
            problem = f"{label} has {context['actual_length']} values"
            return Diagnostic("wrong-length", problem, "write two: `[low, high]`", place)
        case "greater_than_equal":
            bound = f"{context['ge']:g}"
            problem = f"{label} is {value}, below {bound}"
            return Diagnostic("out-of-range", problem, f"write {bound} or more", place)
        case "greater_than":
            bound = f"{context['gt']:g}"
            problem = f"{label} is {value}, not above {bound}"
            return Diagnostic("out-of-range", problem, f"write more than {bound}", place)
        case "less_than_equal":
            bound = f"{context['le']:g}"
            problem = f"{label} is {value}, above {bound}"
            return Diagnostic("out-of-range", problem, f"write {bound} or less", place)
        case "float_type" if isinstance(value, int) and not isinstance(value, bool):
            return Diagnostic("out-of-range", f"{label} is larger than any float", None, place)
    part = _PARTS.get(context.get("class_name", ""))
    expected = _EXPECTED.get(kind) or (part and part.expected)
    if expected is None:
        return Diagnostic("wrong-type", f"{label}: {detail['msg']}", None, place)
    problem = f"{label} must be {expected}, not {kind_of(value)}"
    if part and part.from_text:
        kind = "string_type"
    return Diagnostic("wrong-type", problem, _retyped(source, kind, node), place)


def label_of(path: Path) -> str:
    """Return a path as a reader writes it.

    Example:
        >>> label_of(("targets", 0, "name"))
        'targets[0].name'
    """
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else key
    return text


def _unknown_key(source: Source, root: Table, at: Path) -> Diagnostic:
    *outer, last = at
    table = find(root, *outer)
    assert isinstance(table, Table), "only a mapping has keys"
    part = _part_at(tuple(outer))
    known = list(part.keys())
    near = nearest(str(last), known)
    where = f"`{label_of(tuple(outer))}`" if outer else "a spec"
    return Diagnostic(
        "unknown-key",
        f"{where} has no key `{last}`",
        f"write `{near}`" if near else f"the keys here are {quoted(known)}",
        source.place(table.entries[str(last)][0]),
    )


def _missing(source: Source, root: Table, at: Path, path: Path) -> Diagnostic | None:
    node = find(root, *path)
    assert node is not None, "the path was cut to what exists"
    place = source.place(node)
    if isinstance(node, Items):
        problem = f"`{label_of(path)}` has {len(node.items)} values"
        return Diagnostic("wrong-length", problem, "write two: `[low, high]`", place)
    if isinstance(node, Table):
        unknown = node.entries.keys() - _part_at(path).keys()
        if str(at[-1]) in node.faulty or nearest(str(at[-1]), unknown):
            return None  # it is there, faulty or misspelt, and reported as such
    if not path:
        # No part of the file is at fault: show where the file begins.
        place = Place(place.file, place.line, place.column, 1, place.text)
    key = str(at[-1])
    where = f"`{label_of(path)}`" if path else "the spec"
    return Diagnostic(
        "missing-key", f"{where} lacks the key `{key}`", f"add `{_EXAMPLES[key]}`", place
    )


def _unknown_choice(at: Path, value: object, place: Place) -> Diagnostic:
    code, noun, choices = _CHOICES[str(at[-1])]
    near = nearest(str(value), choices)
    return Diagnostic(
        code,
        f"there is no {noun} `{value}`",
        f"write `{near}`" if near else f"write one of {quoted(choices)}",
        place,
    )


def _empty_value(source: Source, root: Table, path: Path) -> Diagnostic:
    *outer, last = path
    table, node = find(root, *outer), find(root, *path)
    assert node is not None, "the path comes from the tree"
    if isinstance(table, Table):
        node = table.entries[str(last)][0]
    return Diagnostic(
        "empty-value",
        f"nothing stands behind `{label_of(path)}`",
        "write a value, or leave it out",
        source.place(node),
    )


def _retyped(source: Source, kind: str, node: Node) -> str | None:
    """Return how to write ``node`` so that it is of the type that is asked for."""
    if not isinstance(node, Leaf):
        return None
    written = source.text[node.start : node.end]
    if kind == "string_type":
        return f'put it in quotes: `"{written}"`'
    if kind == "tuple_type":
        return f"write a list: `[{written}]`"
    if isinstance(node.value, str) and isinstance(scalar(node.value), int | float):
        return f"write it without quotes: `{node.value}`"
    return None


def _part_at(path: Path) -> type[Part]:
    """Return the model of the mapping at ``path``."""
    kind: Any = CompileSpec
    for key in path:
        if isinstance(kind, type) and issubclass(kind, Part):
            kind = kind.keys()[str(key)].annotation
        else:
            kind = typing.get_args(kind)[0 if isinstance(key, int) else 1]
        while typing.get_origin(kind) in (Annotated, types.UnionType, typing.Union):
            kind = typing.get_args(kind)[0]
    part: type[Part] = kind
    return part
