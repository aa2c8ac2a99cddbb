from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from optc.optimizer.backend import BACKENDS, Backend
from optc.optimizer.builder import Workers, named_in
from optc.optimizer.job import BuildJob, BuildResult, ProbeJob
from optc.specs.diagnostic import EnvironmentFault

RTX = "tensorrt-rtx"
HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
RELU = HEAD + "g (float[2,3] x) => (float[2,3] y) { [relu] y = Relu (x) }"
DYNAMIC = (
    HEAD
    + """
    g (float[n,3,8,8] x) => (float[n,4,8,8] y) <float[4,3,1,1] w = {1,2,3,4,5,6,7,8,9,10,11,12}> {
        [conv] c = Conv (x, w)
        [act]  y = Sigmoid (c)
    }"""
)
NON_ZERO = HEAD + "g (float[2,3] x) => (int64[2,n] y) { [find] y = NonZero (x) }"
NMS = (
    HEAD
    + """
    g (float[1,8,4] boxes, float[1,2,8] scores) => (int64[n,3] y)
    <int64 most = {3}, float iou = {0.5}, float score = {0.1}> {
        ["/post/nms"] y = NonMaxSuppression (boxes, scores, most, iou, score)
    }"""
)


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(2, grace_seconds=0.5) as pool:
        yield pool


def job(folder: Path, text: str = RELU, name: str = "model", **rest: object) -> BuildJob:
    model = folder / f"{name}.onnx"
    proto = parser.parse_model(text)
    onnx.save(proto, model)
    settings: dict[str, object] = {
        "backend": RTX,
        "compute_capability": "8.6",
        "nodes": tuple(node.name for node in proto.graph.node),
        "log": folder / f"{name}.log",
    }
    return BuildJob(model=model, engine=folder / f"{name}.engine", **(settings | rest))  # type: ignore[arg-type]


def build(workers: Workers, *jobs: BuildJob) -> BuildResult:
    [result] = workers.build(jobs)
    return result


def children(of: int) -> list[int]:
    """Return the processes whose parent is ``of``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[1]) == of and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_an_engine_is_built_and_described(workers: Workers, tmp_path: Path) -> None:
    result = build(workers, job(tmp_path))
    assert result.failure is None
    assert result.engine_bytes == (tmp_path / "model.engine").stat().st_size > 0
    assert (result.inputs, result.outputs) == (("x",), ("y",))
    assert result.peak_mib > 10
    assert "Input filename" in (tmp_path / "model.log").read_text()


def test_the_library_writes_to_the_log_and_not_to_our_streams(
    workers: Workers, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build(workers, job(tmp_path, NON_ZERO))
    assert capfd.readouterr() == ("", "")


def test_a_dynamic_axis_is_built_with_its_profiles(workers: Workers, tmp_path: Path) -> None:
    def profile(least: int, usual: int, most: int) -> dict[str, tuple[tuple[int, ...], ...]]:
        return {"x": ((least, 3, 8, 8), (usual, 3, 8, 8), (most, 3, 8, 8))}

    two = (profile(1, 2, 4), profile(8, 8, 8))
    assert build(workers, job(tmp_path, DYNAMIC, profiles=two)).failure is None
    failure = build(workers, job(tmp_path, DYNAMIC)).failure
    assert failure is not None
    assert failure.reason == "builder"
    assert "no optimization profile" in failure.text


def test_a_profile_may_name_tensors_that_are_no_inputs(workers: Workers, tmp_path: Path) -> None:
    shape = ((2, 3), (2, 3), (2, 3))
    assert build(workers, job(tmp_path, profiles=({"x": shape, "other": shape},))).failure is None


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((4, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 8)), "Invalid optimization profiles"),
        (((-1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8)), "the library refuses the shapes for `x`"),
        (((1, 3, 8), (2, 3, 8), (4, 3, 8)), "has 4 dimensions but profile 0 has 3"),
    ],
)
def test_a_profile_that_does_not_fit_the_input_is_a_failure(
    workers: Workers, tmp_path: Path, shapes: tuple[tuple[int, ...], ...], words: str
) -> None:
    failure = build(workers, job(tmp_path, DYNAMIC, profiles=({"x": shapes},))).failure
    assert failure is not None
    assert failure.reason == "builder"
    assert words in failure.text
    assert "cudaError" not in failure.text  # the library adds this where there is no GPU


def test_external_weights_beside_the_model_are_found(workers: Workers, tmp_path: Path) -> None:
    static = job(tmp_path, DYNAMIC.replace("[n,", "[1,"))
    model = onnx.load(static.model)
    weights = numpy_helper.from_array(np.ones((4, 3, 1, 1), np.float32), "w")
    model.graph.initializer[0].CopyFrom(weights)
    (tmp_path / "weights").mkdir()
    onnx.save(
        model, static.model, save_as_external_data=True, location="weights/w.bin", size_threshold=0
    )
    assert build(workers, static).failure is None
    [probed] = workers.probe(
        [ProbeJob(model=static.model.read_bytes(), backend=RTX, folder=tmp_path)]
    )
    assert probed.accepted


def test_what_the_parser_refuses_is_named(workers: Workers, tmp_path: Path) -> None:
    failure = build(workers, job(tmp_path, NON_ZERO)).failure
    assert failure is not None
    assert failure.reason == "refused"
    [refusal] = failure.refusals
    assert (refusal.node, refusal.op, refusal.code) == ("find", "NonZero", "UNSUPPORTED_NODE")
    assert "importNonZero" in refusal.text
    assert not (tmp_path / "model.engine").exists()


def test_a_node_that_the_builder_names_is_found_in_its_words(
    workers: Workers, tmp_path: Path
) -> None:
    failure = build(workers, job(tmp_path, NMS)).failure
    assert failure is not None
    assert failure.reason == "builder"
    assert "has no runners that implement it" in failure.text
    assert failure.nodes == ("/post/nms",)
    assert failure.log_tail


@pytest.mark.parametrize("content", [b"", b"\x00\xff not a model"])
def test_a_file_that_is_no_model_is_a_failure(
    workers: Workers, tmp_path: Path, content: bytes
) -> None:
    broken = job(tmp_path)
    broken.model.write_bytes(content)
    failure = build(workers, broken).failure
    assert failure is not None
    # The parser takes some bytes that are no model for an empty one; the builder does not.
    assert failure.reason in ("refused", "builder")
    assert failure.text


def test_an_unknown_compute_capability_is_a_failure_that_lists_the_known(
    workers: Workers, tmp_path: Path
) -> None:
    failure = build(workers, job(tmp_path, compute_capability="9.9")).failure
    assert failure is not None
    assert failure.reason == "target"
    assert "SM86" in failure.text


def test_an_engine_that_cannot_be_written_is_a_failure(workers: Workers, tmp_path: Path) -> None:
    blocked = job(tmp_path)
    blocked.engine.mkdir()
    failure = build(workers, blocked).failure
    assert failure is not None
    assert failure.reason == "output"
    assert "Is a directory" in failure.text


def test_tf32_is_off_unless_it_is_asked_for(workers: Workers, tmp_path: Path) -> None:
    text = """
        g (float[16,64] x) => (float[16,64] y) <int64[2] s = {64, 64}> {
            w = ConstantOfShape <value = float[1] {0.5}> (s)
            y = MatMul (x, w)
        }"""
    jobs = [job(tmp_path, HEAD + text, str(tf32), tf32=tf32) for tf32 in (False, True)]
    assert all(result.failure is None for result in workers.build(jobs))
    exact, rounded = (job.engine.read_bytes() for job in jobs)
    assert exact != rounded


def test_results_come_in_the_order_of_the_jobs_and_callbacks_as_they_are_done(
    workers: Workers, tmp_path: Path
) -> None:
    jobs = [job(tmp_path, text, str(i)) for i, text in enumerate((RELU, NON_ZERO, RELU, NMS))]
    done: dict[str, BuildResult] = {}
    phases: list[tuple[str, float]] = []
    results = workers.build(
        jobs,
        on_done=lambda job, result: done.update({job.model.stem: result}),
        on_progress=lambda job, phase, fraction: phases.append((phase, fraction)),
    )
    assert [result.failure and result.failure.reason for result in results] == [
        None,
        "refused",
        None,
        "builder",
    ]
    assert [done[str(i)] for i in range(4)] == results
    assert ("Parsing", 0.0) in phases
    assert all(0.0 <= fraction <= 1.0 for _, fraction in phases)


def test_the_same_build_gives_the_same_bytes_wherever_it_happens(
    workers: Workers, tmp_path: Path
) -> None:
    deep = tmp_path / "a-folder-with-a-long-name" / "and-another-one-inside-of-it"
    deep.mkdir(parents=True)
    profile = {"x": ((1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8))}
    jobs = [job(folder, DYNAMIC, profiles=(profile,)) for folder in (tmp_path, deep, tmp_path)]
    digests = set()
    for each in jobs:
        result = build(workers, each)
        if not result.fixed_addresses:
            pytest.skip("this system does not let address randomisation be turned off")
        digests.add(hashlib.sha256(each.engine.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_a_time_limit_stops_a_build(workers: Workers, tmp_path: Path) -> None:
    failure = build(workers, job(tmp_path, time_limit_seconds=0.0)).failure
    assert failure is not None
    assert failure.reason == "timeout"
    assert failure.signal is None


def strike(number: signal.Signals) -> tuple[Callable[[BuildJob, str, float], None], list[int]]:
    """Return a callback that sends a signal to all children, once, and what it sent it to."""
    struck: list[int] = []

    def on_progress(job: BuildJob, phase: str, fraction: float) -> None:
        if not struck:
            struck.extend(children(os.getpid()))
            for pid in struck:
                os.kill(pid, number)

    return on_progress, struck


@pytest.mark.parametrize(
    ("number", "reason", "name"),
    [
        (signal.SIGSEGV, "crash", "SIGSEGV"),
        (signal.SIGABRT, "crash", "SIGABRT"),
        (signal.SIGKILL, "killed", "SIGKILL"),
        (signal.SIGSTOP, "timeout", None),
    ],
)
def test_a_child_that_falls_is_a_failure_of_its_job_and_is_replaced(
    tmp_path: Path, number: signal.Signals, reason: str, name: str | None
) -> None:
    with Workers(1, grace_seconds=0.2) as workers:
        on_progress, struck = strike(number)
        [result] = workers.build([job(tmp_path, time_limit_seconds=1.0)], on_progress=on_progress)
        assert result.failure is not None
        assert (result.failure.reason, result.failure.signal) == (reason, name)
        assert struck
        assert not any(map(is_alive, struck))
        assert build(workers, job(tmp_path)).failure is None
    assert not set(struck) & set(children(os.getpid()))


def test_an_interrupt_ends_all_children_at_once(tmp_path: Path) -> None:
    before = set(children(os.getpid()))

    def interrupt(job: BuildJob, phase: str, fraction: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Workers(2) as workers:
        workers.build([job(tmp_path), job(tmp_path, name="other")], on_progress=interrupt)
    assert set(children(os.getpid())) == before


PARENT = """
import json, sys, threading, time
from optc.optimizer.builder import Workers
workers = Workers(2)
thread = threading.Thread(target=workers.start, args=("tensorrt-rtx",))
thread.start()
thread.join()
workers.version("tensorrt-rtx")
print(json.dumps([worker.process.pid for worker in workers._workers]), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_children_die_with_a_parent_that_is_killed(number: signal.Signals) -> None:
    # The parent starts its child from a thread that has ended since: it must not die with that.
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = json.loads(parent.stdout.readline())
    time.sleep(0.2)
    assert pids
    assert all(map(is_alive, pids))
    parent.send_signal(number)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 5
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_alive, pids))


def test_what_a_killed_parent_left_is_removed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    parent.stdout.readline()
    [theirs] = tmp_path.iterdir()
    with Workers(1):
        assert theirs.exists()
        parent.kill()
        parent.wait()
        parent.stdout.close()
        with Workers(1):
            assert not theirs.exists()
            assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == []


def test_files_of_the_user_are_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx", "optimizer", "json", "onnx", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("import os; os.abort()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", ".")
    with Workers(1) as workers:
        assert build(workers, job(tmp_path)).failure is None


def test_a_library_that_does_not_load_is_said_with_its_last_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(BACKENDS, "other", Backend("other", "colorsys", "rtx", ("8.6",)))
    with Workers(1) as workers, pytest.raises(EnvironmentFault) as caught:
        workers.version("other")
    [diagnostic] = caught.value.diagnostics
    assert diagnostic.code == "broken-backend"
    assert "AttributeError" in diagnostic.problem


def test_a_child_killed_while_it_loads_is_no_broken_installation() -> None:
    with Workers(1) as workers:
        workers.start("tensorrt-rtx")
        [worker] = workers._workers
        os.kill(worker.process.pid, signal.SIGKILL)
        with pytest.raises(EnvironmentFault) as caught:
            workers.version("tensorrt-rtx")
    [diagnostic] = caught.value.diagnostics
    assert "killed from outside" in diagnostic.problem
    assert "memory" in (diagnostic.todo or "")


def test_children_are_shared_by_probes_and_not_by_builds(tmp_path: Path) -> None:
    probe = ProbeJob(model=parser.parse_model(RELU).SerializeToString(), backend=RTX, build=True)
    with Workers(1) as workers:
        workers.start(RTX)
        seen = []
        for _ in range(2):
            [result] = workers.probe([probe])
            assert result.accepted
            seen.append(workers._workers[0].process.pid)
        assert seen[0] == seen[1]
        assert build(workers, job(tmp_path)).failure is None
        assert not is_alive(seen[0])


def test_nodes_are_named_by_whole_words_only() -> None:
    nodes = ["conv", "conv_1", "/head/conv", "a.b", "odd name (x)", ""]
    assert named_in("node conv_1 failed", nodes) == ("conv_1",)
    assert named_in("{ForeignNode[/head/conv...a.b]}", nodes) == ("/head/conv", "a.b")
    assert named_in("in odd name (x): no", nodes) == ("odd name (x)",)
    assert named_in("convolution, deconv, conv/x", nodes) == ()
    assert named_in("conv_7 has no runners", nodes) == ("conv",)


def test_pools_may_be_closed_from_another_thread() -> None:
    workers = Workers(1)
    workers.start(RTX)
    [pid] = [worker.process.pid for worker in workers._workers]
    thread = threading.Thread(target=workers.close)
    thread.start()
    thread.join()
    assert not is_alive(pid)
