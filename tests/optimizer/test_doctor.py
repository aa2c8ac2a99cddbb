from __future__ import annotations

import json
from dataclasses import replace

import onnxruntime
import pytest

from optc.optimizer.backend import BACKENDS, gpus, is_installed
from optc.optimizer.builder import Workers
from optc.optimizer.doctor import DoctorReport, environment, examine


@pytest.fixture(scope="module")
def report() -> DoctorReport:
    return examine()


def test_every_target_is_tried_with_a_real_build(report: DoctorReport) -> None:
    [rtx] = [backend for backend in report.backends if backend.name == "tensorrt-rtx"]
    assert rtx.reason is None
    assert dict(rtx.targets) == dict.fromkeys(
        ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1", "portable")
    )


@pytest.mark.skipif(is_installed(BACKENDS["tensorrt"]), reason="TensorRT is installed")
def test_what_is_missing_is_said(report: DoctorReport) -> None:
    [backend] = [backend for backend in report.backends if backend.name == "tensorrt"]
    assert backend.reason is not None
    assert "not installed" in backend.reason
    assert "cannot build: the backend `tensorrt` is not installed" in report.render()


def test_a_library_that_optc_can_do_without_is_told_with_its_extra(report: DoctorReport) -> None:
    without = replace(report, libraries={**report.libraries, "torch": None})
    assert "  torch - not installed (pip install 'optc[torch]')" in without.render()
    installed = replace(report, libraries={**report.libraries, "torch": "2.6.0"})
    assert "  torch 2.6.0\n" in installed.render()


def test_the_report_is_for_people_and_for_programs(report: DoctorReport) -> None:
    text = report.render()
    assert f"onnxruntime {onnxruntime.__version__}" in text
    assert "8.6: builds" in text
    assert ("no NVIDIA GPU" in text) == (not gpus())
    plain = json.loads(json.dumps(report.as_json()))
    assert plain["libraries"]["onnxruntime"] == onnxruntime.__version__
    assert plain["backends"][0]["targets"]["8.6"] is None


def test_a_manifest_learns_what_made_the_package() -> None:
    with Workers(1) as workers:
        version = workers.version("tensorrt-rtx")
        found = environment(workers)
    assert found["backends"] == {"tensorrt-rtx": version}
    assert isinstance(found["fixed_addresses"], bool)
    json.dumps(found)
