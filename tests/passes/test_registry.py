from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from optc.passes import registry
from optc.passes.contract import Pass
from optc.passes.fold_constants import FoldConstants
from optc.specs.diagnostic import EnvironmentFault


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: str) -> None:
    """Put a distribution into ``folder`` that brings the pass ``name``, and ``folder`` on the path."""
    info = folder / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[optc.passes]\n{name} = stranger:Stranger\n")
    (folder / "stranger.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "stranger", raising=False)


GOOD = """
from optc.passes.contract import Pass, Report
class Stranger(Pass):
    "Does nothing."
    name = "do-nothing"
    def run(self, graph, facts):
        return Report()
"""


def test_every_built_in_pass_loads_and_bears_its_name() -> None:
    for name in registry.BUILT_IN:
        found = registry.load(name)
        assert issubclass(found, Pass)
        assert found.name == name


@pytest.mark.parametrize("name", registry.BUILT_IN)
def test_the_passes_that_an_explanation_names_are_there(name: str) -> None:
    known = set(registry.BUILT_IN)
    verbs = {each.split("-")[0] for each in known}
    words = re.findall(r"`([a-z]+(?:-[a-z0-9]+)+)`", registry.load(name).explanation())
    assert {word for word in words if word.split("-")[0] in verbs} <= known


def test_a_plugin_runs_after_what_is_built_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "do-nothing", GOOD)
    assert registry.names() == (*registry.BUILT_IN, "do-nothing")
    assert registry.load("do-nothing").summary() == "Does nothing."


@pytest.mark.parametrize(
    ("name", "code", "problem"),
    [
        ("do-nothing", "raise RuntimeError('no licence')", "no licence"),
        ("do-nothing", "Stranger = 3", "no subclass"),
        ("do-something", GOOD, "calls itself `do-nothing`"),
        ("do-nothing", "import not_installed", "not_installed"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: str, problem: str
) -> None:
    install(tmp_path, monkeypatch, name, code)
    with pytest.raises(EnvironmentFault) as caught:
        registry.load(name)
    diagnostic = caught.value.diagnostics[0]
    assert diagnostic.code == "bad-plugin"
    assert f"`{name}`" in diagnostic.problem
    assert problem in diagnostic.problem


def test_a_plugin_that_takes_the_name_of_a_built_in_pass_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "fold-constants", GOOD)
    with pytest.raises(EnvironmentFault) as caught:
        registry.names()
    assert caught.value.diagnostics[0].code == "bad-plugin"


def test_a_pass_gets_the_options_that_are_given() -> None:
    passes = registry.passes(options={"fold-constants": {"growth_bytes": 7}})
    [found] = [each for each in passes if isinstance(each, FoldConstants)]
    assert found.growth_bytes == 7
    assert registry.options_of("fold-constants")["growth_bytes"] == (int, 0)
    assert registry.options_of("remove-dead") == {}


def test_only_the_named_passes_come_in_running_order_also_those_that_legalise() -> None:
    names = ["decompose-deform-conv", "fold-shapes", "remove-dead"]
    assert [each.name for each in registry.passes(only=names)] == names[::-1]
    assert not {each.name for each in registry.passes()} & set(registry.LEGALISING)
    assert [each.name for each in registry.legalisers()] == list(registry.LEGALISING)
