from __future__ import annotations

import json
from pathlib import Path

import pytest
from spec_file import VALID, checked, faults, rendered

from optc.specs.compile_spec import Cost
from optc.specs.measured_cost import MeasuredCost

pytestmark = pytest.mark.usefixtures("beside_model")

MEASURED = MeasuredCost(
    optc_version="0", constants={"node_us": 3.5, "fallback_gflops": 20.0}, untold={"copy_us": "no"}
)


def test_what_is_measured_comes_before_defaults_and_after_what_the_spec_says() -> None:
    Path("costs.json").write_text(MEASURED.text())
    cost = checked(
        VALID + "partition: {cost: {measured: costs.json, node_us: 7, copy_us: 2}}\n"
    ).cost
    assert cost == Cost(measured="costs.json", node_us=7, copy_us=2, fallback_gflops=20)


def test_the_cost_of_a_spec_without_a_file_is_its_own() -> None:
    assert checked(VALID + "partition: {cost: {launch_us: 9}}\n").cost == Cost(launch_us=9)
    assert checked(VALID).cost == Cost()


@pytest.mark.parametrize("value", ["1.0e+308", "1.0e-308", "0", "-1"])
def test_a_constant_of_which_no_time_can_be_computed_is_out_of_range(value: str) -> None:
    (fault,) = faults(VALID + f"partition: {{cost: {{copy_gb_s: {value}}}}}\n")
    assert fault.code == "out-of-range"


def test_a_file_that_is_not_there_is_told_with_its_place_and_the_nearest() -> None:
    Path("costs.json").write_text(MEASURED.text())
    assert (
        rendered(VALID + "partition:\n  cost: {measured: cost.json}\n")
        == """\
error[costs-not-found]: there is no file cost.json
  --> spec.yaml:5:20
5 |   cost: {measured: cost.json}
  |                    ^^^^^^^^^
  do: there is `costs.json`; or name a file that `optc run --costs` wrote; its path is taken from \
the folder of the spec"""
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is no file of measured costs"),
        ('{"kind": "other"}', "is no file of measured costs"),
        (json.dumps({"kind": "optc-costs"}), "optc_version: Field required"),
        (
            json.dumps({"kind": "optc-costs", "optc_version": "0", "constants": {"node_us": 0}}),
            "constants.node_us: Input should be greater than or equal to 0.000000001",
        ),
        (
            json.dumps({"kind": "optc-costs", "optc_version": "0", "constants": {"gpu": 1}}),
            "constants.gpu",
        ),
        (MEASURED.text().replace('_version": 1', '_version": 2'), "schema_version"),
    ],
)
def test_a_file_that_is_not_of_costs_is_told_with_its_place(text: str, words: str) -> None:
    Path("costs.json").write_text(text)
    (fault,) = faults(VALID + "partition: {cost: {measured: costs.json}}\n")
    assert fault.code == "not-costs"
    assert words in fault.problem
    assert fault.place is not None
    assert fault.place.line == 4


@pytest.mark.parametrize("name", ["folder.json", "binary.json"])
def test_what_cannot_be_read_is_told_likewise(name: str) -> None:
    Path("folder.json").mkdir()
    Path("binary.json").write_bytes(b"\xff\xfe\x00")
    (fault,) = faults(VALID + f"partition: {{cost: {{measured: {name}}}}}\n")
    assert (fault.code, "cannot be read" in fault.problem) == ("not-costs", True)
