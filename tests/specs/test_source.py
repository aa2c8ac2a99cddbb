from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from optc.specs.diagnostic import SpecError
from optc.specs.source import MAX_BYTES, MAX_DEPTH, find, find_key, plain, read, written


def source_of(folder: Path, text: str, name: str = "spec.yaml") -> Any:
    path = folder / name
    path.write_text(text, encoding="utf-8", newline="")
    return read(path)


def fault_of(folder: Path, text: str | bytes, name: str = "spec.yaml") -> tuple[str, str]:
    """Return code and line:column of the last problem of a file that cannot be read."""
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(SpecError) as caught:
        read(path)
    last = caught.value.diagnostics[-1]
    return last.code, f"{last.place.line}:{last.place.column}" if last.place else ""


def test_values_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    source = source_of(
        tmp_path,
        "a: yes\nb: true\nc: 012\nd: 0x1F\ne: 0o17\nf: 1e-4\ng: 8.60\nh: ~\ni: 2001-01-01\n"
        "j: 1_000\nk: '8'\nl: |\n  two\n  lines\nm: -.inf\nn: 12:30\no: +3\np: .5\nq: Null\n",
    )
    assert plain(source.root) == {
        "a": "yes",
        "b": True,
        "c": 12,
        "d": 31,
        "e": 15,
        "f": 1e-4,
        "g": 8.6,
        "h": None,
        "i": "2001-01-01",
        "j": "1_000",
        "k": "8",
        "l": "two\nlines\n",
        "m": -math.inf,
        "n": "12:30",
        "o": 3,
        "p": 0.5,
        "q": None,
    }


def test_keys_are_text_as_written(tmp_path: Path) -> None:
    source = source_of(tmp_path, "1.0: a\ntrue: b\n~: c\n? x\n: d\n")
    assert plain(source.root) == {"1.0": "a", "true": "b", "~": "c", "x": "d"}


def test_every_key_and_value_has_its_place(tmp_path: Path) -> None:
    source = source_of(tmp_path, "a: {b: [1, 'two']}\r\né:\r\n  - x\r\n")
    place = source.place(find(source.root, "a", "b", 1))
    assert (place.line, place.column, place.length, place.text) == (1, 12, 5, "a: {b: [1, 'two']}")
    place = source.place(find_key(source.root, "é"))
    assert (place.line, place.column, place.length) == (2, 1, 1)
    place = source.place(find(source.root, "é", 0))
    assert (place.line, place.column, place.text) == (3, 5, "  - x")


def test_aliases_are_copies(tmp_path: Path) -> None:
    source = source_of(tmp_path, "a: &x [1, {b: 2}]\nc: *x\n")
    assert plain(source.root) == {"a": [1, {"b": 2}], "c": [1, {"b": 2}]}
    assert find(source.root, "a") is not find(source.root, "c")


@pytest.mark.parametrize(
    "value",
    [
        {"version": 1, "a": [1, -2.5, 1e10, True, None, "x"]},
        {"deep": [[[[{"a": {}}]]], []], "tab": "\t", "path": "a\\b/c", "smile": "😀", "q": '"'},
        {"": {"": 0}, "long" * 400: "key longer than YAML takes"},
    ],
)
@pytest.mark.parametrize("indent", [None, 1, "\t"])
@pytest.mark.parametrize("name", ["spec.json", "spec.yaml"])
def test_what_is_json_is_read_as_json(
    tmp_path: Path, value: dict[str, object], indent: int | str | None, name: str
) -> None:
    for ascii_only in (True, False):
        text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
        assert plain(source_of(tmp_path, text, name).root) == value


def test_a_flow_mapping_that_is_no_json_is_yaml(tmp_path: Path) -> None:
    assert plain(source_of(tmp_path, "{a: b, 'c': [d,]}  # x\n").root) == {"a": "b", "c": ["d"]}


def test_places_in_json(tmp_path: Path) -> None:
    source = source_of(tmp_path, '{\n  "a": [1,\n    {"b": "x"}]}', "spec.json")
    place = source.place(find(source.root, "a", 1, "b"))
    assert (place.line, place.column, place.length) == (3, 11, 3)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('{"a": }', "1:7"),
        ('{"a": 1,}', "1:9"),
        ('{"a" 1}', "1:6"),
        ('{"a": 1', "1:8"),
        ("{a: 1}", "1:2"),
        ('{"a": 01}', "1:8"),
        ('{"a": [1 2]}', "1:10"),
        ('{"a": "\n"}', "1:8"),
        ('{"a": "\\x"}', "1:8"),
        ('{"a": 1} 2', "1:10"),
        ('{"a": yes}', "1:7"),
        ("version: 1", "1:1"),
    ],
)
def test_a_json_file_that_is_no_json_says_where(tmp_path: Path, text: str, where: str) -> None:
    assert fault_of(tmp_path, text, "spec.json") == ("json-syntax", where)


@pytest.mark.parametrize(
    ("text", "code", "where"),
    [
        ("", "empty-spec", ""),
        ("# only a comment\n---\n", "empty-spec", ""),
        ("\ufeff", "empty-spec", ""),
        ("- a\n- b\n", "wrong-type", "1:1"),
        ("just text", "wrong-type", "1:1"),
        ("a: b: c", "yaml-syntax", "1:5"),
        ("a: [1, 2", "yaml-syntax", "1:9"),
        ("a:\n\tb: 1", "yaml-syntax", "2:1"),
        ("a: 1\n  b: 2", "yaml-syntax", "2:4"),
        ("a: 'open", "yaml-syntax", "1:9"),
        ("a: @b", "yaml-syntax", "1:4"),
        ("data: *.npz", "unknown-anchor", "1:7"),
        ("data: *npz", "unknown-anchor", "1:7"),
        ("a: &a [*a]", "unknown-anchor", "1:8"),
        ('a: "\\U99999999"', "yaml-syntax", "1:5"),
        ('a: "\\U00110000"', "yaml-syntax", "1:5"),
        ("a: 1\n---\nb: 2\n", "several-documents", "2:1"),
        ("[1, 2]: a", "bad-key", "1:1"),
        ("? {a: 1}\n: b", "bad-key", "1:3"),
        ("a: \x00", "not-text", "1:4"),
        (b"a: 1\nb: \xff\xfe", "not-text", "2:4"),
        ("a: 1".encode("utf-16"), "not-text", "1:1"),
        (b"\x08\x09\x12\x07pytorch", "not-text", "1:1"),
        ("a: " + "[" * 1000, "nested-too-deep", f"1:{MAX_DEPTH + 3}"),
        ("[" * 100_000, "nested-too-deep", f"1:{MAX_DEPTH + 1}"),
        ('{"a":' * 50_000, "nested-too-deep", f"1:{5 * MAX_DEPTH + 1}"),
        ("- " * 1000, "nested-too-deep", f"1:{2 * MAX_DEPTH + 1}"),
        ("a" * (MAX_BYTES + 1), "spec-too-large", ""),
    ],
)
def test_a_file_that_cannot_be_read_says_why_and_where(
    tmp_path: Path, text: str | bytes, code: str, where: str
) -> None:
    assert fault_of(tmp_path, text) == (code, where)


def test_what_aliases_expand_to_is_bounded(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20)
    )
    start = time.monotonic()
    assert fault_of(tmp_path, bomb)[0] == "spec-too-large"
    assert time.monotonic() - start < 5


def test_duplicate_keys_and_tags_are_found_and_reading_goes_on(tmp_path: Path) -> None:
    source = source_of(tmp_path, "a: 1\nb: {c: 2, c: 3}\na: 4\nd: !!python/object:os.system x\n")
    assert [(p.code, str(p.place).rpartition("spec.yaml:")[2]) for p in source.problems] == [
        ("duplicate-key", "2:11"),
        ("duplicate-key", "3:1"),
        ("tag", "4:4"),
    ]
    assert plain(source.root) == {"a": 1, "b": {"c": 2}, "d": "x"}


def test_duplicate_keys_are_found_in_json(tmp_path: Path) -> None:
    source = source_of(tmp_path, '{"a": 1, "a": 2}', "spec.json")
    assert [problem.code for problem in source.problems] == ["duplicate-key"]


@pytest.mark.parametrize("text", ['a: "\\0"', 'a: "\\e[31m"', '{"a": "\\ud800"}', '{"\\u0007": 1}'])
def test_control_characters_do_not_come_in_by_escapes(tmp_path: Path, text: str) -> None:
    source = source_of(tmp_path, text)
    assert [problem.code for problem in source.problems] == ["not-text"]
    str(plain(source.root)).encode()  # nothing is left that cannot be printed


def test_numbers_beyond_all_bounds_are_infinite(tmp_path: Path) -> None:
    source = source_of(tmp_path, f"a: {'9' * 5000}\nb: 1e999\n")
    assert plain(source.root) == {"a": math.inf, "b": math.inf}


def test_a_missing_file_and_a_folder_say_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("a: 1")
    with pytest.raises(SpecError) as caught:
        read(tmp_path / "spce.yaml")
    (fault,) = caught.value.diagnostics
    assert fault.code == "spec-not-found"
    assert fault.todo == f"did you mean `{tmp_path / 'spec.yaml'}`?"
    with pytest.raises(SpecError) as caught:
        read(tmp_path)
    (fault,) = caught.value.diagnostics
    assert fault.code == "spec-unreadable"
    assert fault.todo == f"name the spec in it: `{tmp_path / 'spec.yaml'}`"
    with pytest.raises(SpecError, match="spec-not-found"):
        read("a\0b")


@pytest.mark.parametrize("text", ["batch", "495", "a: b", "?", "", "é", "-1", "~", "a\nb", "*.npz"])
def test_written_text_is_read_back(tmp_path: Path, text: str) -> None:
    source = source_of(tmp_path, f"{written(text)}: {{a: {written(text)}}}")
    assert plain(source.root) == {text: {"a": text}}
