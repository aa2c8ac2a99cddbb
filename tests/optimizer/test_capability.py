"""Whether targets compute in a precision, asked of the real builder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from optc.optimizer.builder import Workers
from optc.optimizer.capability import check_targets
from optc.optimizer.oracle import Oracle
from optc.passes.precision import NodePrecision
from optc.specs.compile_spec import Target
from optc.specs.diagnostic import Diagnostic, Place, SpecError


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    with Workers(1) as workers:
        yield Oracle(workers, tmp_path_factory.mktemp("cache"))


def refused(oracle: Oracle, precisions: set[NodePrecision], capability: str | None) -> list[str]:
    """Return the problems that a target of this compute capability has with ``precisions``."""
    place = Place("spec.yaml", 3, 1, 4, "precision: x")
    target = Target(name="gpu", compute_capability=capability)
    found: tuple[Diagnostic, ...] = ()
    try:
        check_targets(precisions, [target], oracle, lambda precision: place)
    except SpecError as error:
        found = error.diagnostics
    assert all(d.code == "precision-not-on-target" and d.place == place for d in found)
    return [d.problem for d in found]


@pytest.mark.parametrize(
    ("precision", "capability"),
    [("fp16", "7.5"), ("int8", "7.5"), ("bf16", "8.0"), ("fp8", "8.9"), ("fp32", "7.5")],
)
def test_the_oldest_target_of_a_precision_is_fine(
    oracle: Oracle, precision: NodePrecision, capability: str
) -> None:
    assert refused(oracle, {precision}, capability) == []


@pytest.mark.parametrize(("precision", "capability"), [("bf16", "7.5"), ("fp8", "8.6")])
def test_an_older_target_is_refused_in_the_words_of_the_builder(
    oracle: Oracle, precision: NodePrecision, capability: str
) -> None:
    (problem,) = refused(oracle, {precision, "fp16"}, capability)
    assert f"target `gpu` ({capability}) does not compute in {precision}; builder: " in problem
    assert "HW-specific datatypes" in problem


def test_a_portable_engine_computes_in_what_all_its_gpus_have(oracle: Oracle) -> None:
    assert refused(oracle, {"fp16", "bf16", "int8"}, None) == []
    (problem,) = refused(oracle, {"fp8"}, None)
    assert "target `gpu` (portable, from 8.0 on) does not compute in fp8" in problem
