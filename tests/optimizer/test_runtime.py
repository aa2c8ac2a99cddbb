from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from model_package import HEAD, manifest_of, model_of, one_stage_package, stage_of

import optc
from optc.optimizer import gpu
from optc.optimizer.gpu import Device, NoGpu
from optc.optimizer.package import writing
from optc.optimizer.reference import OrtRunner
from optc.optimizer.runtime import Executor, StageFailed, _profile_for, load
from optc.specs.compile_spec import Range
from optc.specs.diagnostic import EnvironmentFault, InputError, OptcError
from optc.specs.manifest import Engine, Shapes, Stage, StagePrecision, Target

WHOLE = """g (float[n,4] x) => (float[n,4] y, int64[2,k] where) {
    h = Relu (x)
    where = NonZero (h)
    y = Add (h, h)
}"""
FIRST = "first (float[n,4] x) => (float[n,4] h) { h = Relu (x) }"
SECOND = "second (float[n,4] h) => (int64[2,k] where) { where = NonZero (h) }"
THIRD = "third (float[n,4] h) => (float[n,4] y) { y = Add (h, h) }"
BATCH = Range(min=1, opt=2, max=4)
X = np.array([[1, -1, 2, 0]], np.float32)


def three_stages(folder: Path, *, engine: bytes = b"no engine") -> Path:
    """Write a package whose first and third stage have engines, for two targets."""
    with writing(folder) as writer:
        writer.write("model.onnx", model_of(WHOLE).SerializeToString())
        writer.write("engines/ampere/00.engine", engine)
        record = writer.engine("engines/ampere/00.engine")
        shapes = ({"x": Shapes(min=(1, 4), opt=(2, 4), max=(4, 4))},)
        stages = [
            stage_of(writer, 0, FIRST, runtime="tensorrt", profiles=shapes).model_copy(
                update={"engines": {"ampere": record, "ada": record}}
            ),
            stage_of(writer, 1, SECOND, refused=["NonZero"]),
            stage_of(writer, 2, THIRD, runtime="tensorrt"),
        ]
        targets = [
            Target(name=name, backend="tensorrt-rtx", compute_capability=cc, stages=order)
            for name, cc, order in (("ampere", "8.6", (0, 1, 2)), ("ada", "8.9", (0, 2, 1)))
        ]
        writer.commit(manifest_of(WHOLE, stages, [{"n": BATCH}], targets))
    return folder


def code_of(error: pytest.ExceptionInfo[OptcError]) -> str:
    return error.value.diagnostics[0].code


# --- results -------------------------------------------------------------------------------------


def test_stages_run_in_order_and_outputs_come_in_the_models_order(tmp_path: Path) -> None:
    package = optc.load(three_stages(tmp_path / "p"))
    results = package.run({"x": X})
    assert list(results) == ["y", "where"]
    np.testing.assert_array_equal(results["y"], [[2, 0, 4, 0]])
    np.testing.assert_array_equal(results["where"], [[0, 0], [0, 2]])
    assert results["where"].dtype == np.int64
    assert [tensor.name for tensor in package.inputs] == ["x"]
    assert [tensor.name for tensor in package.outputs] == ["y", "where"]


def test_each_target_runs_its_own_stages(tmp_path: Path) -> None:
    package = load(three_stages(tmp_path / "p"))
    package.run({"x": X}, target="ada")
    assert package.last_run is not None
    assert package.last_run.target == "ada"
    assert [run.id for run in package.last_run.stages] == [0, 2, 1]


IN_FP16 = """g (float[n] x) => (float[n] y) {
    h = Cast <to: int = 10> (x)
    a = Exp (h)
    b = Log (a)
    y = Cast <to: int = 1> (b)
}"""


@pytest.mark.parametrize("recorded", [None, StagePrecision(nodes={"fp16": 2})])
def test_a_stage_in_low_precision_is_simulated_where_its_engine_does_not_run(
    tmp_path: Path, recorded: StagePrecision | None
) -> None:
    with writing(tmp_path / "p") as writer:
        writer.write("model.onnx", model_of(IN_FP16).SerializeToString())
        stage = stage_of(writer, 0, IN_FP16, runtime="tensorrt")
        stage = stage.model_copy(update={"precision": recorded})
        writer.commit(manifest_of(IN_FP16, [stage], [{"n": BATCH}]))
    package = load(tmp_path / "p")
    x = np.array([0.1, 1.3, 2.7], np.float32)
    found = package.run({"x": x}, device="cpu")["y"]
    exact = np.exp(x.astype(np.float16).astype(np.float32)).astype(np.float16)
    expected = np.log(exact.astype(np.float32)).astype(np.float16)
    np.testing.assert_array_equal(found, expected.astype(np.float32))
    assert np.abs(found - x).max() > 1e-4
    assert package.last_run is not None
    [run] = package.last_run.stages
    assert run.why == "the CPU was asked for; an estimate, simulated in fp16"


@pytest.mark.parametrize(
    ("runtime", "recorded"),
    [("onnxruntime", None), ("tensorrt", StagePrecision(nodes={"fp32": 2}))],
)
def test_what_runs_as_it_would_anyway_is_no_estimate(
    tmp_path: Path, runtime: str, recorded: StagePrecision | None
) -> None:
    with writing(tmp_path / "p") as writer:
        writer.write("model.onnx", model_of(IN_FP16).SerializeToString())
        stage = stage_of(writer, 0, IN_FP16, runtime=runtime)
        stage = stage.model_copy(update={"precision": recorded})
        writer.commit(manifest_of(IN_FP16, [stage], [{"n": BATCH}]))
    package = load(tmp_path / "p")
    package.run({"x": np.array([0.1], np.float32)}, device="cpu")
    assert package.last_run is not None
    [run] = package.last_run.stages
    assert run.why is not None
    assert "estimate" not in run.why


def test_tensors_between_stages_come_back_when_asked_for(tmp_path: Path) -> None:
    package = load(three_stages(tmp_path / "p"))
    results = package.run({"x": X}, keep=["h", "x"])
    assert list(results) == ["y", "where", "h", "x"]
    np.testing.assert_array_equal(results["h"], [[1, 0, 2, 0]])
    with pytest.raises(InputError, match="write `h`") as error:
        package.run({"x": X}, keep=["hh"])
    assert code_of(error) == "unknown-tensor"


def test_a_tensor_is_let_go_after_its_last_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[bool] = []
    seen: list[weakref.ref[Any]] = []
    run = OrtRunner.run

    def watched(self: OrtRunner, feeds: dict[str, Any]) -> dict[str, Any]:
        alive.append(any(ref() is not None for ref in seen))
        results = run(self, feeds)
        seen.extend(weakref.ref(value) for name, value in results.items() if name == "a")
        return results

    monkeypatch.setattr(OrtRunner, "run", watched)
    texts = [
        f"g (float[n] {a}) => (float[n] {b}) {{ {b} = Neg ({a}) }}" for a, b in ("xa", "ab", "by")
    ]
    with writing(tmp_path / "p") as writer:
        stages = [stage_of(writer, index, text) for index, text in enumerate(texts)]
        results = Executor(writer.folder, stages, ["y"]).run({"x": np.ones(3, np.float32)})
    assert alive == [False, True, False]
    assert results["y"].tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("string", np.array(["a", "bü", ""])),
        ("bool", np.array([True, False])),
        ("uint8", np.array([1, 255], np.uint8)),
        ("int64", np.array([1, -(2**60)])),
        ("double", np.array([0.1])),
        ("float16", np.array([0.5], np.float16)),
        ("bfloat16", np.array([0.5, 3], ml_dtypes.bfloat16)),
        ("float", np.zeros((0,), np.float32)),
    ],
)
def test_every_dtype_passes_through_two_stages(tmp_path: Path, kind: str, value: Any) -> None:
    texts = [
        f"g ({kind}[n] {a}) => ({kind}[n] {b}) {{ {b} = Identity ({a}) }}" for a, b in ("xh", "hy")
    ]
    whole = f"g ({kind}[n] x) => ({kind}[n] y) {{ y = Identity (x) }}"
    with writing(tmp_path / "p") as writer:
        stages = [stage_of(writer, index, text) for index, text in enumerate(texts)]
        writer.commit(manifest_of(whole, stages))
    found = load(tmp_path / "p").run({"x": value})["y"]
    assert found.shape == value.shape
    assert found.dtype == (object if kind == "string" else value.dtype)
    assert (found == value).all()


def test_scalars_and_outputs_that_are_inputs_work(tmp_path: Path) -> None:
    text = (
        "g (float x, int64[n,0] e) => (float y, float x, int64[n,0] f) {y = Neg(x) f = Identity(e)}"
    )
    stage = "g (float x, int64[n,0] e) => (float y, int64[n,0] f) { y = Neg (x) f = Identity (e) }"
    with writing(tmp_path / "p") as writer:
        writer.commit(manifest_of(text, [stage_of(writer, 0, stage)]))
    found = load(tmp_path / "p").run({"x": np.float32(2), "e": np.zeros((3, 0), np.int64)})
    assert list(found) == ["y", "x", "f"]
    assert (found["y"], found["x"]) == (-2, 2)
    assert found["y"].shape == ()
    assert found["f"].shape == (3, 0)


def test_stages_run_before_there_is_a_package(tmp_path: Path) -> None:
    with writing(tmp_path / "p") as writer:
        stages = [stage_of(writer, 0, FIRST), stage_of(writer, 1, THIRD)]
        executor = Executor(writer.folder, stages, ["y"])
        np.testing.assert_array_equal(executor.run({"x": X})["y"], [[2, 0, 4, 0]])
        assert [(run.id, run.runtime) for run in executor.runs] == [
            (0, "onnxruntime"),
            (1, "onnxruntime"),
        ]


# --- what ran where ------------------------------------------------------------------------------


def test_the_report_says_where_each_stage_ran_and_why(tmp_path: Path) -> None:
    package = load(three_stages(tmp_path / "p"))
    package.run({"x": X}, device="cpu")
    report = package.last_run
    assert report is not None
    assert [(run.runtime, run.device, run.file) for run in report.stages] == [
        ("onnxruntime", "cpu", "stages/00-tensorrt.onnx"),
        ("onnxruntime", "cpu", "stages/01-onnxruntime.onnx"),
        ("onnxruntime", "cpu", "stages/02-tensorrt.onnx"),
    ]
    assert [run.why for run in report.stages] == [
        "the CPU was asked for",
        "fallback for NonZero",
        "the CPU was asked for",
    ]
    assert json.loads(json.dumps(report.as_json()))["target"] == "ampere"
    first, *lines = report.render().splitlines()
    assert first == "target ampere"
    assert lines[1].startswith("  stage 1: stages/01-onnxruntime.onnx on onnxruntime, cpu, ")
    assert lines[1].endswith(" ms (fallback for NonZero)")


def no_gpu() -> Device:
    raise NoGpu("no GPU: none was bought")


def test_without_a_gpu_auto_says_so_and_cuda_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "visible_device", no_gpu)
    package = load(three_stages(tmp_path / "p"))
    package.run({"x": X})
    assert package.last_run is not None
    assert package.last_run.stages[0].why == "no GPU: none was bought"
    with pytest.raises(EnvironmentFault, match="none was bought") as error:
        package.run({"x": X}, device="cuda")
    assert code_of(error) == "no-gpu"
    assert error.value.exit_code == 1


def test_a_gpu_that_no_target_is_for_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "visible_device", lambda: Device("Some GPU", "7.5"))
    package = load(three_stages(tmp_path / "p"))
    package.run({"x": X})
    assert package.last_run is not None
    assert package.last_run.stages[0].why == (
        "the engines are for compute capability 8.6, Some GPU has 7.5; "
        "the engines are for compute capability 8.9, Some GPU has 7.5"
    )
    with pytest.raises(EnvironmentFault, match=r"compute capability 7\.5 to the spec") as error:
        package.run({"x": X}, device="cuda")
    assert code_of(error) == "no-matching-target"


def test_the_target_of_the_gpu_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "visible_device", lambda: Device("Some GPU", "8.9"))
    monkeypatch.setattr(gpu, "is_installed", lambda backend: True)
    package = load(three_stages(tmp_path / "p"))
    monkeypatch.setattr(gpu, "Engine", lambda backend, data, plugins: engine_fault())
    package.run({"x": X})
    assert package.last_run is not None
    assert package.last_run.target == "ada"
    assert [run.why for run in package.last_run.stages] == [
        "made by another version",
        "it has no engine for ada",
        "fallback for NonZero",
    ]


def engine_fault() -> None:
    raise gpu.EngineFault("made by another version")


@pytest.mark.parametrize(
    ("wanted", "device", "why"),
    [
        ("8.6", "8.6", None),
        ("8.6", "8.9", "the engines are for compute capability 8.6, G has 8.9"),
        (None, "12.0", None),
        (None, "7.5", "portable engines need compute capability 8.0, G has 7.5"),
    ],
)
def test_engines_match_a_device_by_compute_capability(
    monkeypatch: pytest.MonkeyPatch, wanted: str | None, device: str, why: str | None
) -> None:
    monkeypatch.setattr(gpu, "is_installed", lambda backend: True)
    assert gpu.why_not("tensorrt-rtx", wanted, Device("G", device)) == why


def test_a_backend_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "is_installed", lambda backend: False)
    said = gpu.why_not("tensorrt-rtx", "8.6", Device("G", "8.6"))
    assert said == "`tensorrt_rtx` is not installed (pip install 'optc[rtx]')"


def test_a_tensor_outside_its_engines_profile_runs_that_stage_as_onnx(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "visible_device", lambda: Device("Some GPU", "8.6"))
    monkeypatch.setattr(gpu, "is_installed", lambda backend: True)
    folder = three_stages(tmp_path / "p")
    package = load(folder)
    narrow = ({"x": Shapes(min=(2, 4), opt=(2, 4), max=(4, 4))},)
    stages = [
        stage.model_copy(update={"profiles": narrow}) if stage.id == 0 else stage
        for stage in package.manifest.stages
    ]
    package.manifest = package.manifest.model_copy(update={"stages": tuple(stages)})
    package.run({"x": X})
    assert package.last_run is not None
    assert package.last_run.stages[0].why == "axis 0 of `x` is 1, its engine takes 2 to 4"


def test_the_nearest_of_the_profiles_that_hold_a_shape_is_chosen() -> None:
    wide = {"x": Shapes(min=(1, 4), opt=(16, 4), max=(16, 4))}
    narrow = {"x": Shapes(min=(1, 4), opt=(2, 4), max=(4, 4))}

    def chosen(batch: int) -> tuple[int, str | None]:
        stage = stage_without_file().model_copy(update={"profiles": (wide, narrow)})
        return _profile_for(stage, {"x": np.zeros((batch, 4))})

    assert chosen(3) == (1, None)
    assert chosen(5) == (0, None)
    assert str(chosen(17)[1]).split(" and ") == [
        "axis 0 of `x` is 17, its engine takes 1 to 16",
        "axis 0 of `x` is 17, its engine takes 1 to 4",
    ]


def stage_without_file() -> Stage:
    return Stage(id=0, runtime="tensorrt", model="a.onnx", inputs=("x",), outputs=("y",))


# --- errors --------------------------------------------------------------------------------------


def test_bad_input_is_told_before_anything_runs(tmp_path: Path) -> None:
    package = load(three_stages(tmp_path / "p"))
    with pytest.raises(InputError) as error:
        package.run({"x": np.zeros((9, 4))})
    assert {d.code for d in error.value.diagnostics} == {"wrong-dtype", "outside-profiles"}
    assert package.last_run is None


def test_unknown_targets_and_devices_are_told_those_there_are(tmp_path: Path) -> None:
    package = load(three_stages(tmp_path / "p"))
    with pytest.raises(InputError, match="write `ampere`") as error:
        package.run({"x": X}, target="amper")
    assert code_of(error) == "unknown-target"
    with pytest.raises(InputError) as error:
        package.run({"x": X}, device="gpu")  # type: ignore[arg-type]
    assert code_of(error) == "unknown-device"


def test_a_stage_that_was_changed_does_not_run(tmp_path: Path) -> None:
    folder = three_stages(tmp_path / "p")
    other = model_of(
        "second (float[n,4] h) => (int64[2,k] where) {c = Neg (h) where = NonZero (c)}"
    )
    (folder / "stages/01-onnxruntime.onnx").write_bytes(other.SerializeToString())
    with pytest.raises(InputError, match="01-onnxruntime") as error:
        load(folder).run({"x": X})
    assert code_of(error) == "damaged-package"


def test_a_stage_that_onnxruntime_does_not_know_is_said_so(tmp_path: Path) -> None:
    head = HEAD.replace("[", '["strange" : 1, ')
    model = onnx.parser.parse_model(head + "g (float[n] x) => (float[n] y) { y = strange.Op (x) }")
    with writing(tmp_path / "p") as writer:
        stage = stage_of(writer, 0, "g (float[n] x) => (float[n] y) { y = Neg (x) }")
        writer.write(stage.model, model.SerializeToString())
        executor = Executor(writer.folder, [stage], ["y"])
        with pytest.raises(StageFailed, match="strange") as error:
            executor.run({"x": np.ones(1, np.float32)})
    assert code_of(error) == "stage-not-loadable"


def test_a_stage_that_does_not_take_the_values_is_said_so(tmp_path: Path) -> None:
    text = "g (float[n] x, int64[k] i) => (float[k] y) { y = Gather (x, i) }"
    package = load(one_stage_package(tmp_path / "p", text))
    with pytest.raises(StageFailed, match="stage 0") as error:
        package.run({"x": np.ones(2, np.float32), "i": np.array([9])})
    assert code_of(error) == "stage-failed"
    assert error.value.exit_code == 1


def test_a_manifest_whose_stages_do_not_meet_is_damaged(tmp_path: Path) -> None:
    with writing(tmp_path / "p") as writer:
        writer.commit(manifest_of(WHOLE, [stage_of(writer, 0, THIRD)]))
    with pytest.raises(InputError, match="`h`") as error:
        load(tmp_path / "p").run({"x": X})
    assert code_of(error) == "damaged-package"


# --- engines -------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_the_gpu_of_this_machine_is_named() -> None:
    device = gpu.visible_device()
    assert device.name
    assert float(device.compute_capability) >= 5


def test_where_cuda_finds_no_gpu_its_words_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code = "from optc.optimizer.gpu import NoGpu, visible_device as find\ntry: find()\n"
    code += "except NoGpu as fault: print(fault)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "GPU" in done.stdout or "cuda-python" in done.stdout


def built_here(
    text: str, low: tuple[int, ...], opt: tuple[int, ...], high: tuple[int, ...]
) -> bytes:
    """Return an engine for the GPU of this machine."""
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model_of(text).SerializeToString())
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape(network.get_input(0).name, low, opt, high)
    config.add_optimization_profile(profile)
    return bytes(builder.build_serialized_network(network, config))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("op", "kind", "dtype"),
    [
        ("Relu", "float", np.float32),
        ("Relu", "float16", np.float16),
        ("Neg", "int64", np.int64),
        ("Not", "bool", np.bool_),
    ],
)
def test_an_engine_gives_what_onnxruntime_gives(
    tmp_path: Path, op: str, kind: str, dtype: Any
) -> None:
    text = f"g ({kind}[n,4] x) => ({kind}[n,4] y) {{ y = {op} (x) }}"
    device = gpu.visible_device()
    shapes = Shapes(min=(0, 4), opt=(2, 4), max=(4, 4))
    with writing(tmp_path / "p") as writer:
        writer.write("engines/here/00.engine", built_here(text, shapes.min, shapes.opt, shapes.max))
        record: Engine = writer.engine("engines/here/00.engine")
        stage = stage_of(
            writer, 0, text, runtime="tensorrt", engines={"here": record}, profiles=[{"x": shapes}]
        )
        target = Target(
            name="here",
            backend="tensorrt-rtx",
            compute_capability=device.compute_capability,
            stages=(0,),
        )
        writer.commit(manifest_of(text, [stage], targets=[target]))
    package = load(tmp_path / "p")
    for batch in (3, 0, 4, 9):
        value = np.arange(batch * 4).reshape(batch, 4).astype(dtype)
        found = package.run({"x": value}, device="cuda")["y"]
        assert package.last_run is not None
        (run,) = package.last_run.stages
        assert run.runtime == ("onnxruntime" if batch == 9 else "tensorrt")
        expected = package.run({"x": value}, device="cpu")["y"]
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.gpu
def test_an_engine_of_rubbish_falls_back_and_says_so(tmp_path: Path) -> None:
    device = gpu.visible_device()
    package = load(three_stages(tmp_path / "p", engine=b"rubbish"))
    here = package.manifest.target("ampere").model_copy(
        update={"compute_capability": device.compute_capability}
    )
    package.manifest = package.manifest.model_copy(update={"targets": (here,)})
    package.run({"x": X})
    assert package.last_run is not None
    assert "deserialised" in str(package.last_run.stages[0].why)
