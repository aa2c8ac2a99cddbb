"""The folders of the repository are the package `optc`, one way round and light to import."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "specs": {"specs"},
    "passes": {"specs", "passes"},
    "optimizer": {"specs", "passes", "optimizer"},
}
HEAVY = [
    *("numpy", "onnx", "onnx_graphsurgeon", "onnxruntime", "tensorrt_rtx", "networkx", "rich"),
    "torch",
]


def test_every_package_folder_is_shipped() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(settings["tool"]["setuptools"]["packages"])
    found = {
        "optc." + ".".join(init.parent.relative_to(ROOT).parts)
        for folder in MAY_IMPORT
        for init in (ROOT / folder).rglob("__init__.py")
    } - {"optc.optimizer.face"}
    assert found | {"optc"} <= listed


def test_a_folder_with_code_is_a_package() -> None:
    for folder in MAY_IMPORT:
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), f"{path} would not be shipped"


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_one_way(folder: str) -> None:
    checked = 0
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module == "optc":
                modules = [f"optc.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            for module in modules:
                parts = module.split(".")
                if parts[0] != "optc":
                    continue
                allowed = MAY_IMPORT[folder] | {"__version__"}  # that anyone may ask for
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                assert {*parts[1:2]} <= allowed, f"{where} imports {module}"
                checked += 1
    assert checked > 0


@pytest.mark.parametrize(
    "statement",
    [
        "import optc, optc.specs",
        "import optc.specs.check, optc.specs.compile_spec",
        "from optc.optimizer import cli",
    ],
)
def test_what_every_command_imports_is_light(statement: str) -> None:
    code = f"import sys; {statement}; print(*sorted(set({HEAVY}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


def test_help_is_answered_lightly() -> None:
    code = (
        "import sys\n"
        "from optc.optimizer.cli import main\n"
        "sys.argv = ['optc', '--help']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        f"print('loaded', *(set({HEAVY}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "compile" in done.stdout
    assert done.stdout.splitlines()[-1].strip() in ("loaded", "loaded rich")


def test_the_links_for_type_checkers_lead_to_the_folders() -> None:
    links = ROOT / ".typing" / "optc"
    for folder in MAY_IMPORT:
        assert os.readlink(links / folder) == f"../../{folder}"
    for name in ("__init__.py", "__main__.py", "py.typed"):
        assert os.readlink(links / name) == f"../../optimizer/face/{name}"
        assert (links / name).is_file()


def test_the_users_own_modules_are_left_alone(tmp_path: Path) -> None:
    for name in MAY_IMPORT:
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name}.py was imported')")
    environment = os.environ | {"PYTHONPATH": "."}
    command = [sys.executable, "-m", "optc", "--version"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert "optc" in done.stdout
