"""What a timed run of a package tells of the constants of the cost model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import cli
from hypothesis import given, settings
from hypothesis import strategies as st
from model_package import manifest_of, model_of, stage_of

from optc.optimizer.arrays import write_arrays
from optc.optimizer.cost import Constants, Work
from optc.optimizer.cost_fit import NAMES, Timing, fit, measure, write_costs
from optc.optimizer.package import writing
from optc.optimizer.runtime import Package, RunReport, StageRun
from optc.specs.diagnostic import EnvironmentFault
from optc.specs.manifest import StagePrecision, read_manifest
from optc.specs.measured_cost import MeasuredCost


def timing(
    works: list[Work], constants: Constants, *, copied: tuple[int, ...] = (), gpu: bool = False
) -> Timing:
    """Return the timing of a stage that takes exactly what the cost model says."""
    run = StageRun(0, "tensorrt" if gpu else "onnxruntime", "gpu" if gpu else "cpu", "f", 0.0, None)
    timed = Timing(run, 1.0, tuple(works), copied)
    return replace(timed, microseconds=timed.predicted(constants))


TRUE = Constants(
    launch_us=35,
    node_us=2,
    copy_us=25,
    copy_gb_s=20,
    tensorrt_gflops=20_000,
    tensorrt_gb_s=700,
    fallback_gflops=120,
    fallback_gb_s=4,
)
HOST = [
    [Work(10, 100)] * 50,
    [Work(10**9, 10**6)] * 4,
    [Work(10**5, 10**8)] * 3,
    [Work(10**8, 10**6), Work(10, 10**7), Work(1, 1)],
    [Work(10, 100)] * 400,
    [Work(10, 100)],
]
GPU = [
    ([Work(10**6, 10**5)], (10**3,)),
    ([Work(10**11, 10**7)], (10**3, 10**3)),
    ([Work(10**6, 10**9)], (10**3,) * 4),
    ([Work(10**6, 10**5)], (10**8, 10**3)),
    ([Work(10**6, 10**5)], (10**3,) * 40),
    ([Work(10**10, 10**8)], (10**6,) * 4),
]


def test_a_run_of_unlike_stages_tells_all_constants() -> None:
    timings = [timing(works, TRUE) for works in HOST]
    timings += [timing(works, TRUE, copied=copied, gpu=True) for works, copied in GPU]
    told = fit(timings, Constants())
    assert not told.untold
    assert told.constants == pytest.approx(
        {each.name: getattr(TRUE, each.name) for each in fields(TRUE)}, rel=0.05
    )


def test_a_run_on_the_host_tells_nothing_of_engines() -> None:
    told = fit([timing(works, TRUE) for works in HOST], Constants())
    assert told.constants == pytest.approx(
        {"node_us": 2, "fallback_gflops": 120, "fallback_gb_s": 4}, rel=0.05
    )
    assert set(told.untold) == set(NAMES) - told.constants.keys()
    assert told.untold["launch_us"] == "no engine ran on a GPU"


def test_a_stage_that_the_model_knows_nothing_of_spoils_nothing() -> None:
    timings = [timing(works, TRUE) for works in HOST]
    timings.append(replace(timings[0], microseconds=70 * timings[0].microseconds))
    told = fit(timings, Constants())
    assert told.constants == pytest.approx(
        {"node_us": 2, "fallback_gflops": 120, "fallback_gb_s": 4}, rel=0.1
    )


def test_what_calls_take_beside_is_no_constant_of_the_model() -> None:
    timings = [timing(works, TRUE) for works in HOST]
    called = [replace(each, microseconds=each.microseconds + 35) for each in timings]
    told = fit(called, Constants())
    assert told.call_us == pytest.approx(35, rel=0.05)
    assert told.constants["node_us"] == pytest.approx(2, rel=0.05)


def test_one_stage_tells_what_it_is_bound_by_and_no_more() -> None:
    told = fit([timing([Work(10**10, 10**6)] * 4, TRUE)], Constants())
    assert told.constants == pytest.approx({"fallback_gflops": 120}, rel=0.05)
    assert told.untold["node_us"].startswith("the stages that ran are too few")
    assert "is bound by it" in told.untold["fallback_gb_s"]


def test_stages_that_are_alike_do_not_tell_two_constants_apart() -> None:
    alike = [timing([Work(1, 10**5)] * count, TRUE) for count in (10, 20, 40)]
    told = fit(alike, Constants())
    assert {"node_us", "fallback_gb_s"} <= told.untold.keys()


def test_nothing_measured_tells_nothing() -> None:
    told = fit([replace(timing(HOST[0], TRUE), used=False)], Constants())
    assert not told.constants
    assert told.over(Constants()) == Constants()


@given(
    st.lists(
        st.tuples(
            st.lists(
                st.builds(
                    Work, st.integers(0, 10**10), st.integers(0, 10**9), st.integers(1, 1000)
                ),
                min_size=1,
                max_size=4,
            ),
            st.booleans(),
            st.lists(st.integers(0, 10**8), max_size=3),
            st.floats(1, 1e7),
        ),
        max_size=6,
    )
)
@settings(max_examples=60, deadline=None)
def test_whatever_was_measured_constants_are_positive_and_each_is_told_or_not(
    rows: list[tuple[list[Work], bool, list[int], float]],
) -> None:
    timings = [
        replace(timing(works, TRUE, gpu=gpu, copied=tuple(copied)), microseconds=measured)
        for works, gpu, copied, measured in rows
    ]
    told = fit(timings, Constants())
    assert told.constants.keys() | told.untold.keys() == set(NAMES)
    assert not told.constants.keys() & told.untold.keys()
    assert all(0 < value < float("inf") for value in told.constants.values())


# --- measuring -----------------------------------------------------------------------------------

WHOLE = """g (float[n,4] x) => (float[n,4] y)
    { a = Relu (x)  b = Sigmoid (a)  c = Add (b, x)  y = Mul (c, a) }"""
FIRST = "g (float[n,4] x) => (float[n,4] a) { a = Relu (x) }"
LAST = """g (float[n,4] a, float[n,4] x) => (float[n,4] y)
    { b = Sigmoid (a)  c = Add (b, x)  y = Mul (c, a) }"""
INPUTS = {"x": np.ones((3, 4), np.float32)}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Return a package of an engine that has no file, and a fallback stage."""
    folder = tmp_path / "package"
    with writing(folder) as writer:
        writer.write("model.onnx", model_of(WHOLE).SerializeToString())
        stages = [
            stage_of(writer, 0, FIRST, runtime="tensorrt"),
            stage_of(writer, 1, LAST, refused=["Sigmoid"]),
        ]
        stages[0] = stages[0].model_copy(update={"precision": StagePrecision(nodes={"fp32": 1})})
        writer.commit(manifest_of(WHOLE, stages))
    return folder


def measured_of(package: Package, **options: Any) -> MeasuredCost:
    return measure(package, INPUTS, **{"target": None, "device": "auto", "repeat": 2, **options})


def test_the_work_of_a_stage_is_counted_at_the_shapes_of_the_run(package: Path) -> None:
    measured = measured_of(Package(package, read_manifest(package)))
    assert [(s.id, s.runtime, s.device, s.used) for s in measured.stages] == [
        (0, "onnxruntime", "cpu", True),
        (1, "onnxruntime", "cpu", True),
    ]
    assert [(s.nodes, s.flops, s.bytes) for s in measured.stages] == [
        (1, 12, 2 * 48),
        (3, 36, 8 * 48),
    ]
    assert all(stage.measured_us > 0 for stage in measured.stages)
    assert measured.repeat == 2
    assert measured.target == "ampere"
    assert measured.untold["launch_us"] == "no engine ran on a GPU"
    libraries = measured.environment["libraries"]
    assert isinstance(libraries, dict)
    assert "onnxruntime" in libraries


def test_what_is_simulated_is_shown_and_not_used(package: Path) -> None:
    manifest = read_manifest(package)
    first = manifest.stages[0].model_copy(update={"precision": StagePrecision(nodes={"fp16": 1})})
    manifest = manifest.model_copy(update={"stages": (first, manifest.stages[1])})
    assert [s.used for s in measured_of(Package(package, manifest)).stages] == [False, True]


class OnGpu(Package):
    """A package whose engines are said to run on a GPU, unless the CPU is asked for."""

    def run(self, inputs: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        device = options.pop("device")
        found = super().run(inputs, device="cpu", **options)
        if device != "cpu":
            assert self.last_run is not None
            on_gpu = replace(self.last_run.stages[0], runtime="tensorrt", device="a GPU")
            self.last_run = RunReport(self.last_run.target, (on_gpu, *self.last_run.stages[1:]))
        return found


def test_engines_are_measured_with_their_copies_and_once_more_on_the_host(package: Path) -> None:
    measured = measured_of(OnGpu(package, read_manifest(package)))
    assert [(s.id, s.runtime, s.copied, s.copied_bytes) for s in measured.stages] == [
        (0, "tensorrt", 2, 96),
        (1, "onnxruntime", 0, 0),
        (0, "onnxruntime", 0, 0),
    ]


def test_the_command_writes_a_file_that_a_spec_reads(package: Path, tmp_path: Path) -> None:
    write_arrays(tmp_path / "in.npz", INPUTS)
    costs = tmp_path / "costs.json"
    given = ("--inputs", tmp_path / "in.npz", "--outputs", tmp_path / "out.npz")
    done = cli("run", package, *given, "--costs", costs, "--repeat", 2)
    assert done.returncode == 0, done.stderr
    assert "measured in 2 runs, the fastest of each stage:" in done.stdout
    assert "not told: launch_us, copy_us: no engine ran on a GPU" in done.stdout
    assert done.stdout.endswith(f"costs: {costs}\n")
    measured = MeasuredCost.model_validate_json(costs.read_text())
    (tmp_path / "m.onnx").write_bytes(model_of(WHOLE).SerializeToString())
    (tmp_path / "spec.yaml").write_text(
        "version: 1\nmodel: m.onnx\ndims: {n: 3}\n"
        "partition: {cost: {measured: costs.json, copy_us: 1}}\n"
    )
    from optc.specs.check import check

    cost = check(tmp_path / "spec.yaml").cost
    assert Constants.of(cost) == replace(Constants(), **dict(measured.constants), copy_us=1)


def test_the_command_replaces_no_file_of_its_inputs_or_outputs(
    package: Path, tmp_path: Path
) -> None:
    given = tmp_path / "in.npz"
    write_arrays(given, INPUTS)
    before = given.read_bytes()
    out = tmp_path / "out.npz"
    done = cli("run", package, "--inputs", given, "--outputs", given)
    assert (done.returncode, "the file of the inputs" in done.stderr) == (2, True)
    done = cli("run", package, "--inputs", given, "--outputs", out, "--costs", out)
    assert (done.returncode, "has to end in `.json`" in done.stderr) == (2, True)
    assert given.read_bytes() == before
    assert not out.exists()


def test_the_command_tells_programs_what_it_measured(package: Path, tmp_path: Path) -> None:
    write_arrays(tmp_path / "in.npz", INPUTS)
    costs = tmp_path / "costs.json"
    given = ("--inputs", tmp_path / "in.npz", "--outputs", tmp_path / "out.npz")
    done = cli("run", package, *given, "--costs", costs, "--repeat", 1, "--json")
    document = json.loads(done.stdout)["costs"]
    assert document.pop("file") == str(costs)
    assert document == json.loads(costs.read_text())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--repeat", "3"], "it says how often to run for `--costs`"),
        (["--repeat", "0", "--costs", "c.json"], "'--repeat'"),
    ],
)
def test_a_number_of_runs_is_for_costs(
    package: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    write_arrays(tmp_path / "in.npz", INPUTS)
    done = cli("run", package, "--inputs", tmp_path / "in.npz", "--outputs", "o.npz", *options)
    assert done.returncode == 2
    assert words in " ".join(done.stderr.split())


def test_a_file_that_cannot_be_written_is_the_fault_of_the_machine(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault) as fault:
        write_costs(tmp_path / "nowhere" / "c.json", MeasuredCost(optc_version="0", constants={}))
    assert [each.code for each in fault.value.diagnostics] == ["cannot-write"]
