from __future__ import annotations

import ast
import re
from pathlib import Path

import optc.specs
from optc.specs import schema_problem
from optc.specs.codes import CODES

SPECS = Path(optc.specs.__path__[0])
MAKERS = {"Diagnostic", "missing_file", "refused", "_fault", "_fatal", "_error"}


def codes_in(module: str) -> set[str]:
    """Return the codes of the diagnostics that a module of specs/ makes."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((SPECS / f"{module}.py").read_text())):
        if isinstance(node, ast.Call):
            maker = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
            name = maker.id if isinstance(maker, ast.Name) else maker
            keywords = [word.value for word in node.keywords if word.arg == "code"]
            for value in [*node.args[:1], *keywords]:
                if name in MAKERS and isinstance(value, ast.Constant):
                    found.add(str(value.value))
    if module == "schema_problem":
        found |= {code for code, *_ in schema_problem._CHOICES.values()}
    return found


def test_every_code_is_explained() -> None:
    used = {code for path in SPECS.glob("*.py") for code in codes_in(path.stem)}
    assert len(used) > 40
    assert used <= CODES.keys(), f"not in codes.py: {sorted(used - CODES.keys())}"


def test_codes_and_explanations_are_well_formed() -> None:
    for code, meaning in CODES.items():
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", code)
        assert meaning.endswith(".")
        assert "\n" not in meaning
