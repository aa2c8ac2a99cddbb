"""Read a spec file into a tree that knows where each key and value stands.

A spec is YAML 1.2, read from the parser's events: nothing is built but text, numbers, truth values,
lists and mappings. What parses as JSON is read as JSON, by the rules of JSON. A file cannot make the
reader work without bound: its size, its nesting and what its aliases expand to are limited.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from json.decoder import scanstring  # type: ignore[attr-defined]  # typeshed lacks it
from pathlib import Path
from typing import Any, Final

from optc.specs.diagnostic import Diagnostic, Place, SpecError, nearest

MAX_BYTES: Final = 256 * 1024
MAX_DEPTH: Final = 32
MAX_NODES: Final = 20_000
LONGEST_LINE_SHOWN: Final = 400


@dataclass(slots=True, eq=False)
class Leaf:
    """A value without parts. ``start`` and ``end`` are offsets in the text."""

    start: int
    end: int
    value: str | int | float | bool | None


@dataclass(slots=True, eq=False)
class Items:
    """A list."""

    start: int
    end: int
    items: list[Node]


@dataclass(slots=True, eq=False)
class Table:
    """A mapping: key -> where the key stands, value. Keys are always text, as written.

    ``faulty``: keys that were there and were taken out, as their value is of no use.
    """

    start: int
    end: int
    entries: dict[str, tuple[Leaf, Node]]
    faulty: set[str] = field(default_factory=set)


Node = Leaf | Items | Table


def plain(node: Node) -> Any:
    """Return what ``node`` holds, as Python's own types."""
    match node:
        case Leaf():
            return node.value
        case Items():
            return [plain(item) for item in node.items]
        case Table():
            return {key: plain(value) for key, (_, value) in node.entries.items()}


def copy_of(node: Node) -> Node:
    """Return the same tree, made of other objects."""
    match node:
        case Leaf():
            return node
        case Items():
            return Items(node.start, node.end, [copy_of(item) for item in node.items])
        case Table():
            entries = {key: (at, copy_of(value)) for key, (at, value) in node.entries.items()}
            return Table(node.start, node.end, entries)


@dataclass(frozen=True)
class Source:
    """A spec file as it was read.

    Attributes:
        path: As the user wrote it.
        text: The whole file.
        sha256: Of the file's bytes.
        root: What the file holds.
        problems: Mistakes that did not keep the rest from being read.
    """

    path: Path
    text: str
    sha256: str
    root: Table
    problems: tuple[Diagnostic, ...] = ()

    def place(self, node: Node) -> Place:
        """Return where ``node`` stands: as much of it as is on its first line."""
        return self.lines.place(node.start, node.end)

    @cached_property
    def lines(self) -> _Lines:
        """The lines of the text."""
        return _Lines(self.path, self.text)


def find(node: Node | None, *keys: str | int) -> Node | None:
    """Return what stands below ``node`` at a path of keys and indices, or None."""
    for key in keys:
        match node, key:
            case Table(), str() if key in node.entries:
                node = node.entries[key][1]
            case Items(), int() if 0 <= key < len(node.items):
                node = node.items[key]
            case _:
                return None
    return node


def find_key(node: Node | None, *keys: str | int) -> Leaf | None:
    """Return the last key of a path below ``node`` as it stands in the file, or None."""
    *outer, last = keys
    table = find(node, *outer)
    if isinstance(table, Table) and isinstance(last, str) and last in table.entries:
        return table.entries[last][0]
    return None


class _Lines:
    def __init__(self, path: Path, text: str) -> None:
        self._file = str(path)
        self._text = text
        # YAML's line breaks; str.splitlines() knows more of them.
        self._starts = [0, *(end.end() for end in re.finditer(r"\r\n|\r|\n", text))]

    def place(self, start: int, end: int) -> Place:
        line = bisect_right(self._starts, start) - 1
        first = self._starts[line]
        last = self._starts[line + 1] if line + 1 < len(self._starts) else len(self._text)
        shown = self._text[first:last].rstrip("\r\n")
        length = max(1, min(end - first, len(shown.rstrip())) - (start - first))
        if len(shown) > LONGEST_LINE_SHOWN:
            shown = ""
        return Place(self._file, line + 1, start - first + 1, length, shown)


def read(path: str | Path) -> Source:
    """Read the spec file at ``path``.

    Raises:
        SpecError: If it is no file, no text, or neither YAML nor JSON; if it is too large, nested
            too deep, or expands to too much; if it is not a mapping.
    """
    path = Path(path)
    data = _bytes_of(path)
    text = _text_of(path, data)
    reader = _Reader(_Lines(path, text), text)
    root = reader.read_json() if path.suffix == ".json" else reader.read()
    if root is None:
        raise SpecError(
            Diagnostic(
                "empty-spec",
                f"{path} is empty",
                "write a spec, or let `optc init MODEL` write one to start from",
            )
        )
    if not isinstance(root, Table):
        found = "a list" if isinstance(root, Items) else "a single value"
        raise SpecError(
            Diagnostic(
                "wrong-type",
                f"a spec is a mapping of keys such as `version` and `model`; this is {found}",
                "start from what `optc init MODEL` writes",
                reader.lines.place(root.start, root.end),
            )
        )
    return Source(path, text, hashlib.sha256(data).hexdigest(), root, tuple(reader.problems))


def _bytes_of(path: Path) -> bytes:
    def refused(code: str, problem: str, todo: str | None) -> SpecError:
        return SpecError(Diagnostic(code, problem, todo))

    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        near = nearest(path.name, _specs_in(path.parent))
        todo = f"did you mean `{path.parent / near}`?" if near else "check the path"
        raise refused("spec-not-found", f"there is no file {path}", todo) from error
    except IsADirectoryError as error:
        specs = _specs_in(path)
        todo = f"name the spec in it: `{path / specs[0]}`" if specs else "name a spec file"
        raise refused("spec-unreadable", f"{path} is a folder", todo) from error
    except OSError as error:
        raise refused("spec-unreadable", f"{path}: {error.strerror}", None) from error
    except ValueError as error:  # a NUL in the path
        raise refused("spec-not-found", f"{str(path)!r} is no path", None) from error
    if len(data) > MAX_BYTES:
        raise refused(
            "spec-too-large",
            f"{path} has more than {MAX_BYTES // 1024} KiB",
            "is this the spec, or the model? The model is named by the key `model`",
        )
    return data


def _specs_in(folder: Path) -> list[str]:
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []
    return [name for name in names if name.endswith((".yaml", ".yml", ".json"))]


_CONTROL = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x84\x86-\x9f\ufffe\uffff]")


def _text_of(path: Path, data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8-sig")
        place = _Lines(path, before).place(len(before), len(before))
        raise SpecError(
            Diagnostic(
                "not-text",
                f"{path} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}",
                "save the spec as UTF-8; if this is the model, name it by the key `model` of one",
                Place(place.file, place.line, place.column),
            )
        ) from error
    if control := _CONTROL.search(text):
        place = _Lines(path, text).place(control.start(), control.end())
        raise SpecError(
            Diagnostic(
                "not-text",
                f"{path} is not a text file: it holds the character U+{ord(control[0]):04X}",
                "save the spec as UTF-8 text",
                Place(place.file, place.line, place.column),
            )
        )
    return text


class _NotJsonError(Exception):
    def __init__(self, offset: int, expected: str) -> None:
        super().__init__(expected)
        self.offset = offset
        self.expected = expected


_SPACE = re.compile(r"[ \t\r\n]*")
_JSON_WORD = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?|[A-Za-z]+", re.ASCII)
_BEYOND_UNICODE = re.compile(r"\\U(?!000|0010)[0-9a-fA-F]{8}")
_PLAIN = re.compile(r"[\w/.][\w/.+-]*")
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_OTHER_BASE = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_WORDS: Final[dict[str, bool | float | None]] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
    **{sign + word: math.inf for sign in ("", "+") for word in (".inf", ".Inf", ".INF")},
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), -math.inf),
}
_JSON_NAMES: Final[dict[str, bool | float | None]] = {
    "null": None,
    "true": True,
    "false": False,
    # Not JSON, but what many programs write. A spec refuses them by name.
    "NaN": math.nan,
    "Infinity": math.inf,
}


def scalar(text: str) -> str | int | float | bool | None:
    """Return what an unquoted ``text`` means in YAML 1.2 (core schema).

    Example:
        >>> [scalar(word) for word in ("8", "8.6", "1e-4", "no", "true", "~", "a b")]
        [8, 8.6, 0.0001, 'no', True, None, 'a b']
    """
    if text in _WORDS:
        return _WORDS[text]
    if _OTHER_BASE.fullmatch(text):
        return int(text, 0)
    if _INT.fullmatch(text) and len(text) <= 100:
        return int(text)
    # Python refuses to convert very long integers; what no double holds is infinite.
    return float(text) if _FLOAT.fullmatch(text) else text


def written(text: str) -> str:
    """Return ``text`` as a spec has to write it: in quotes, where it would mean something else.

    Example:
        >>> [written(text) for text in ("batch", "/head/Conv", "495", "a: b", "?")]
        ['batch', '/head/Conv', '"495"', '"a: b"', '"?"']
    """
    if _PLAIN.fullmatch(text) and scalar(text) == text:
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


class _Reader:
    """Builds the tree, from YAML or from JSON."""

    def __init__(self, lines: _Lines, text: str) -> None:
        self.lines = lines
        self.text = text
        self.problems: list[Diagnostic] = []
        self._nodes = 0
        self._anchors: dict[str, tuple[Node, int]] = {}
        self._open: set[str] = set()

    def read(self) -> Node | None:
        """Return what the text holds, or None where it holds nothing."""
        if self.text.lstrip()[:1] in ("{", "["):
            try:
                return self._json_document()
            except _NotJsonError:
                self.problems.clear()
                self._nodes = 0
        return self._yaml_document()

    def read_json(self) -> Node | None:
        """Return what the text of a JSON file holds, or None where it holds nothing."""
        if not self.text.strip():
            return None
        try:
            return self._json_document()
        except _NotJsonError as error:
            raise self._fatal(
                "json-syntax",
                f"this is not valid JSON: {error.expected}",
                "correct it, or call the file `.yaml`, if YAML is meant",
                error.offset,
            ) from error

    # ------------------------------------------------------------------ both

    def _fatal(
        self, code: str, problem: str, todo: str | None, start: int, end: int | None = None
    ) -> SpecError:
        start = min(start, len(self.text))
        place = self.lines.place(start, start + 1 if end is None else end)
        return SpecError(*self.problems, Diagnostic(code, problem, todo, place))

    def _counted(self, nodes: int, start: int) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            raise self._fatal(
                "spec-too-large",
                f"the spec holds more than {MAX_NODES} values, aliases expanded",
                "write less; a spec says what differs from the defaults",
                start,
            )

    def _not_deeper(self, depth: int, start: int) -> None:
        if depth > MAX_DEPTH:
            raise self._fatal(
                "nested-too-deep",
                f"the spec is nested deeper than {MAX_DEPTH} levels",
                "no key of a spec needs more than five levels",
                start,
            )

    def _add(self, entries: dict[str, tuple[Leaf, Node]], key: Leaf, value: Node) -> None:
        name = str(key.value)
        if name in entries:
            first = self.lines.place(entries[name][0].start, entries[name][0].end)
            self.problems.append(
                Diagnostic(
                    "duplicate-key",
                    f"the key `{name}` is there twice; first in line {first.line}",
                    "keep one of them",
                    self.lines.place(key.start, key.end),
                )
            )
            return
        entries[name] = (key, value)

    def _clean(self, value: str, start: int, end: int) -> str:
        """Return text from escapes: surrogates joined, control characters refused."""
        joined = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        bad = _CONTROL.search(value)
        if bad is None and (joined.count("\ufffd") == value.count("\ufffd")):
            return joined
        self.problems.append(
            Diagnostic(
                "not-text",
                f"this text holds the character U+{ord(bad[0]):04X}"
                if bad
                else "this text holds half of a surrogate pair",
                "write it without; no name in a model needs it",
                self.lines.place(start, end),
            )
        )
        return _CONTROL.sub("\ufffd", joined)

    # ------------------------------------------------------------------ JSON

    def _json_document(self) -> Node:
        node, end = self._json(self._skip(0), 1)
        end = self._skip(end)
        if end != len(self.text):
            raise _NotJsonError(end, "more text follows the end")
        return node

    def _skip(self, offset: int) -> int:
        space = _SPACE.match(self.text, offset)
        assert space is not None, "the pattern matches the empty text"
        return space.end()

    def _json(self, start: int, depth: int) -> tuple[Node, int]:
        self._not_deeper(depth, start)
        self._counted(1, start)
        match self.text[start : start + 1]:
            case "{":
                return self._json_table(start, depth)
            case "[":
                return self._json_items(start, depth)
            case '"':
                return self._json_text(start)
        word = _JSON_WORD.match(self.text, start)
        if word is None or (word[0].isalpha() and word[0] not in _JSON_NAMES):
            raise _NotJsonError(start, "a value is expected here")
        value = _JSON_NAMES[word[0]] if word[0] in _JSON_NAMES else scalar(word[0])
        return Leaf(start, word.end(), value), word.end()

    def _json_text(self, start: int) -> tuple[Leaf, int]:
        if self.text[start : start + 1] != '"':
            raise _NotJsonError(start, "a key in double quotes is expected here")
        try:
            value, end = scanstring(self.text, start + 1, True)
        except json.JSONDecodeError as error:
            raise _NotJsonError(error.pos, f"in this text: {error.msg}") from error
        return Leaf(start, end, self._clean(value, start, end)), end

    def _json_table(self, start: int, depth: int) -> tuple[Node, int]:
        entries: dict[str, tuple[Leaf, Node]] = {}
        end = self._skip(start + 1)
        while self.text[end : end + 1] != "}" or entries:
            key, end = self._json_text(end)
            end = self._skip(end)
            if self.text[end : end + 1] != ":":
                raise _NotJsonError(end, "`:` is expected here")
            value, end = self._json(self._skip(end + 1), depth + 1)
            self._add(entries, key, value)
            end = self._skip(end)
            if self.text[end : end + 1] == "}":
                break
            end = self._after_comma(end, "}")
        return Table(start, end + 1, entries), end + 1

    def _json_items(self, start: int, depth: int) -> tuple[Node, int]:
        items: list[Node] = []
        end = self._skip(start + 1)
        while self.text[end : end + 1] != "]" or items:
            item, end = self._json(end, depth + 1)
            items.append(item)
            end = self._skip(end)
            if self.text[end : end + 1] == "]":
                break
            end = self._after_comma(end, "]")
        return Items(start, end + 1, items), end + 1

    def _after_comma(self, offset: int, closing: str) -> int:
        if self.text[offset : offset + 1] != ",":
            raise _NotJsonError(offset, f"`,` or `{closing}` is expected here")
        return self._skip(offset + 1)

    # ------------------------------------------------------------------ YAML

    def _yaml_document(self) -> Node | None:
        from ruamel.yaml import YAML
        from ruamel.yaml.error import MarkedYAMLError

        events = YAML(typ="safe", pure=True).parse(self.text)
        try:
            return self._yaml_root(events)
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            offset = len(self.text) if mark is None else mark.index
            what = " ".join(filter(None, (error.context, error.problem)))
            raise self._fatal(
                "yaml-syntax", f"this is not valid YAML: {what}", self._yaml_todo(offset), offset
            ) from error
        except (ValueError, OverflowError) as error:  # the parser's own chr() of an escape
            escape = _BEYOND_UNICODE.search(self.text)
            raise self._fatal(
                "yaml-syntax",
                "this is not valid YAML: the escape is no character of Unicode",
                "the last one is `\\U0010FFFF`",
                *(escape.span() if escape else (0,)),
            ) from error

    def _yaml_todo(self, offset: int) -> str:
        """Return what is most likely to do about a syntax error at ``offset``."""
        character = self.text[offset : offset + 1]
        before = self.text[max(0, offset - 1) : offset]
        if character == "\t":
            return "indent with spaces; YAML takes no tabs there"
        for mark in (character, before):
            if mark and mark in "*&!@`%|>":
                return f"put a value that starts with `{mark}` in quotes"
        return "look for a missing quote, bracket, colon or space, here or in the line before"

    def _yaml_root(self, events: Iterator[Any]) -> Node | None:
        from ruamel.yaml.events import DocumentStartEvent, NodeEvent

        root: Node | None = None
        documents = 0
        for event in events:
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self._fatal(
                        "several-documents",
                        "the file holds more than one YAML document",
                        "keep one spec a file; `optc compile` takes several files",
                        event.start_mark.index,
                        event.end_mark.index,
                    )
            elif isinstance(event, NodeEvent):
                root = self._yaml(event, events, 1)
        return None if isinstance(root, Leaf) and root.value is None else root

    def _yaml(self, event: Any, events: Iterator[Any], depth: int) -> Node:
        from ruamel.yaml.events import AliasEvent, MappingStartEvent, ScalarEvent

        start, end = event.start_mark.index, event.end_mark.index
        self._not_deeper(depth, start)
        if isinstance(event, AliasEvent):
            return self._yaml_alias(event.anchor, start, end)
        before = self._nodes
        self._counted(1, start)
        if event.tag is not None and event.tag != "":
            self.problems.append(
                Diagnostic(
                    "tag",
                    f"the tag `{event.tag}` says what type a value has; a spec takes no tags",
                    "leave it out; put a value in quotes to make it text",
                    self.lines.place(start, end),
                )
            )
        if event.anchor is not None:
            self._open.add(event.anchor)
        node: Node
        if isinstance(event, ScalarEvent):
            text = self._clean(event.value, start, end)
            node = Leaf(start, end, text if event.style else scalar(text))
        elif isinstance(event, MappingStartEvent):
            node = self._yaml_table(start, events, depth)
        else:
            node = self._yaml_items(start, events, depth)
        if event.anchor is not None:
            self._open.discard(event.anchor)
            self._anchors[event.anchor] = (node, self._nodes - before)
        return node

    def _yaml_alias(self, name: str, start: int, end: int) -> Node:
        if name in self._anchors and name not in self._open:
            node, nodes = self._anchors[name]
            self._counted(nodes, start)
            return copy_of(node)
        inside = name in self._open
        raise self._fatal(
            "unknown-anchor",
            f"`*{name}` stands inside of what it refers to"
            if inside
            else f"`*{name}` refers to an anchor `&{name}` that is not there",
            None if inside else "put a value that starts with `*` in quotes, if it is text",
            start,
            end,
        )

    def _yaml_table(self, start: int, events: Iterator[Any], depth: int) -> Node:
        from ruamel.yaml.events import MappingEndEvent, ScalarEvent

        entries: dict[str, tuple[Leaf, Node]] = {}
        for event in events:
            if isinstance(event, MappingEndEvent):
                return Table(start, event.end_mark.index, entries)
            at, end = event.start_mark.index, event.end_mark.index
            if not isinstance(event, ScalarEvent):
                raise self._fatal(
                    "bad-key", "a key is a text", "write the key as plain text", at, end
                )
            key = Leaf(at, end, self._clean(event.value, at, end))
            self._add(entries, key, self._yaml(next(events), events, depth + 1))
        raise AssertionError("the parser closes each mapping or raises")

    def _yaml_items(self, start: int, events: Iterator[Any], depth: int) -> Node:
        from ruamel.yaml.events import SequenceEndEvent

        items: list[Node] = []
        for event in events:
            if isinstance(event, SequenceEndEvent):
                return Items(start, event.end_mark.index, items)
            items.append(self._yaml(event, events, depth + 1))
        raise AssertionError("the parser closes each list or raises")
