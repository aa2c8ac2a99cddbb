"""The docs say what is so: the reference is fresh, links lead somewhere, codes and specs are real."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from optc.passes import registry
from optc.specs.codes import CODES
from optc.specs.schema_problem import spec_of
from optc.specs.source import read

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"
FOLDERS = ("specs", "passes", "optimizer")

MADE_AT_RUN_TIME = {
    "optimizer/runtime.py": {"unknown-device", "unknown-target", "unknown-tensor"},
    "specs/schema_problem.py": {
        "unknown-precision",
        "unknown-backend",
        "unknown-runtime",
        "unknown-choice",
    },
    "specs/operator_problem.py": {"library-not-found", "module-not-found"},
}
"""Codes that a file puts together or takes from a table, so that no call has them as a literal."""


def documents() -> list[Path]:
    """Return the Markdown files of the repository, those that git ignores left out."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]
    return [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]


# --- the reference -------------------------------------------------------------------------------


@cache
def pages() -> dict[str, str]:
    made: dict[str, str] = runpy.run_path(str(ROOT / "docs" / "generate.py"))["pages"]()
    return made


def test_the_reference_is_what_the_code_says() -> None:
    committed = {path.name: path.read_text(encoding="utf-8") for path in REFERENCE.glob("*.md")}
    stale = [name for name, text in pages().items() if committed.get(name) != text]
    assert not stale, f"run `python docs/generate.py`; it changes {stale}"
    assert committed.keys() == pages().keys()


def test_the_reference_tells_when_a_pass_does_not_happen() -> None:
    text = pages()["passes.md"]
    for name in (*registry.ORDER, *registry.LEGALISING):
        section = text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert "```text\nbefore" in section, f"{name} shows no graph"
        assert "**Why it holds" in section, f"{name} does not say why it holds"


# --- links ---------------------------------------------------------------------------------------


def prose(path: Path) -> str:
    """Return a document without its blocks and spans of code."""
    text = re.sub(
        r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a document."""
    text = re.sub(
        r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path) -> Iterator[str]:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


def test_the_architecture_names_each_file_that_runs_things_and_none_that_is_gone() -> None:
    text = (ROOT / "docs" / "explanation" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(?:optimizer/)?(\w+\.py)`", text.split("## The way through")[1]))
    passes = {file.name for file in (ROOT / "passes").glob("*.py")}
    files = {file.name for file in (ROOT / "optimizer").glob("*.py")} - {"__init__.py"}
    assert files - named == set()
    assert named - files - passes == set()


def test_links_lead_somewhere() -> None:
    broken = {
        str(path.relative_to(ROOT)): links
        for path in documents()
        if (links := [*broken_links(path)])
    }
    assert not broken


def test_each_page_of_the_docs_is_linked() -> None:
    linked = {
        (path.parent / link.partition("#")[0]).resolve()
        for path in documents()
        for link in re.findall(r"\]\(([^)\s]+)\)", prose(path))
    }
    pages_ = set((ROOT / "docs").rglob("*.md")) - {ROOT / "docs" / "README.md"}
    assert pages_ <= linked, f"nobody links to {sorted(map(str, pages_ - linked))}"


# --- codes ---------------------------------------------------------------------------------------


def codes_in(path: Path) -> set[str]:
    """Return the codes of the diagnostics that a file makes.

    A code is what is handed to a `Diagnostic`, or to a function of the same file that has a parameter
    called ``code``.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    places = {"Diagnostic": 0, **makers(tree)}
    found: set[str] = set()
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        function = call.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if name not in places:
            continue
        named = [keyword.value for keyword in call.keywords if keyword.arg == "code"]
        (value,) = named or call.args[places[name] : places[name] + 1]
        for each in (value.body, value.orelse) if isinstance(value, ast.IfExp) else (value,):
            if isinstance(each, ast.Constant):
                found.add(str(each.value))
            elif not isinstance(each, ast.Name):
                where = f"{path.relative_to(ROOT)}:{call.lineno}"
                known = str(path.relative_to(ROOT)) in MADE_AT_RUN_TIME
                assert known, f"{where}: add the codes to MADE_AT_RUN_TIME"
    return found | MADE_AT_RUN_TIME.get(str(path.relative_to(ROOT)), set())


def makers(tree: ast.AST) -> dict[str, int]:
    """Return the functions that take a code as text, and at which position."""
    found = {}
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        parameters = [a for a in function.args.args if a.arg not in ("self", "cls")]
        for position, parameter in enumerate(parameters):
            kind = ast.unparse(parameter.annotation) if parameter.annotation else ""
            if parameter.arg == "code" and kind in ("str", "LiteralString"):
                found[function.name] = position
    return found


def test_every_code_is_explained_and_every_explained_code_is_used() -> None:
    used = {
        code
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        for code in codes_in(path)
    }
    assert used - CODES.keys() == set(), "explain these in specs/codes.py"
    assert CODES.keys() - used == set(), "nothing uses these"


# --- specs ---------------------------------------------------------------------------------------


def specs_shown() -> list[tuple[str, str]]:
    """Return the whole specs that the docs show, each with where it stands."""
    return [
        (f"{path.relative_to(ROOT)} {number}", text)
        for path in documents()
        for number, text in enumerate(
            re.findall(r"^```yaml\n(.*?)^```", path.read_text("utf-8"), re.DOTALL | re.MULTILINE)
        )
        if re.search(r"^version: 1$", text, re.MULTILINE)
    ]


@pytest.mark.parametrize(("where", "text"), specs_shown(), ids=lambda value: value.split("\n")[0])
def test_a_spec_in_the_docs_is_one(where: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(text, encoding="utf-8")
    source = read(tmp_path / "spec.yaml")
    reading = spec_of(source)
    assert [problem.render() for problem in (*source.problems, *reading.problems)] == []
