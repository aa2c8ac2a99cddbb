from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optc.specs.compile_spec import Range
from optc.specs.diagnostic import InputError
from optc.specs.manifest import (
    Engine,
    Manifest,
    ModelRecord,
    Reason,
    Shapes,
    SpecRecord,
    Stage,
    Target,
    Tensor,
    TensorType,
    is_package,
    read_manifest,
)


def manifest() -> Manifest:
    engine = Engine(file="engines/ampere/00.engine", sha256="ab", bytes=2)
    return Manifest(
        optc_version="0.1.0",
        spec=SpecRecord(path="spec.yaml", sha256="cd"),
        model=ModelRecord(path="m.onnx", sha256="ef", bytes=9),
        inputs=(Tensor(name="x", dtype="float32", shape=("batch", 3)),),
        outputs=(Tensor(name="y", dtype="float32", shape=("batch", 3)),),
        profiles=({"batch": Range(min=1, opt=2, max=4)},),
        stages=(
            Stage(
                id=0,
                runtime="tensorrt",
                model="stages/00-tensorrt.onnx",
                engines={"ampere": engine},
                inputs=("x",),
                outputs=("h",),
                tensors={"h": TensorType(dtype="float32", shape=("batch", 3))},
                profiles=({"x": Shapes(min=(1, 3), opt=(2, 3), max=(4, 3))},),
                plugins=("libraries/p.so",),
            ),
            Stage(
                id=1,
                runtime="onnxruntime",
                model="stages/01-onnxruntime.onnx",
                inputs=("h",),
                outputs=("y",),
                why=(Reason(node="n", op="NonZero", by="parser", text="no", targets=("ampere",)),),
                module="modules/m.pt",
                libraries=("libraries/a.so",),
            ),
        ),
        targets=(
            Target(name="ampere", backend="tensorrt-rtx", compute_capability="8.6", stages=(0, 1)),
        ),
        modules={"acme::M": "modules/m.pt"},
        libraries={"acme::A": "libraries/a.so"},
        files={"model.onnx": "12"},
    )


def written(folder: Path, change: Callable[[dict[str, Any]], object] = lambda data: None) -> Path:
    data = json.loads(manifest().text())
    change(data)
    (folder / "manifest.json").write_text(json.dumps(data))
    return folder


def code_of(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_manifest(folder)
    return caught.value.diagnostics[0].code


def test_a_manifest_that_is_written_is_read_back_as_it_was(tmp_path: Path) -> None:
    assert read_manifest(written(tmp_path)) == manifest()


def test_stages_run_in_the_order_of_their_target() -> None:
    two = manifest()
    turned = two.target("ampere").model_copy(update={"stages": (1, 0)})
    assert [stage.id for stage in two.stages_of(turned)] == [1, 0]


def test_unknown_keys_of_a_newer_minor_version_are_passed_over(tmp_path: Path) -> None:
    def add(data: dict[str, Any]) -> None:
        data["colour"] = "red"
        data["stages"][0]["colour"] = "blue"

    assert read_manifest(written(tmp_path, add)) == manifest()


def test_a_plan_is_the_manifest_without_files_and_engines() -> None:
    plan = manifest().as_plan()
    whole = json.loads(manifest().text())
    del whole["files"]
    for stage in whole["stages"]:
        del stage["engines"]
    assert plan == whole


def test_moving_into_a_folder_moves_every_path() -> None:
    moved = manifest().moved_into("f1")
    assert (moved.graph, moved.report) == ("f1/model.onnx", "f1/report.json")
    assert [stage.model for stage in moved.stages] == [
        "f1/stages/00-tensorrt.onnx",
        "f1/stages/01-onnxruntime.onnx",
    ]
    assert moved.stages[0].engines["ampere"].file == "f1/engines/ampere/00.engine"
    assert moved.stages[0].plugins == ("f1/libraries/p.so",)
    assert moved.stages[1].libraries == ("f1/libraries/a.so",)
    assert moved.stages[1].module == "f1/modules/m.pt"
    assert dict(moved.modules) == {"acme::M": "f1/modules/m.pt"}
    assert dict(moved.libraries) == {"acme::A": "f1/libraries/a.so"}
    assert dict(moved.files) == {"f1/model.onnx": "12"}


def test_a_missing_folder_a_file_and_a_strange_folder_are_no_packages(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "manifest.json").write_text('{"name": "a browser extension", "version": 3}')
    for folder in (tmp_path / "none", file, tmp_path, strange):
        assert code_of(folder) == "not-a-package"
        assert not is_package(folder)


def test_a_manifest_cut_short_is_a_damaged_package(tmp_path: Path) -> None:
    text = manifest().text()
    (tmp_path / "manifest.json").write_text(text[: len(text) // 2])
    assert code_of(tmp_path) == "damaged-package"


def test_a_newer_schema_is_named_as_such(tmp_path: Path) -> None:
    assert code_of(written(tmp_path, lambda data: data.update(schema_version=2))) == "newer-package"
    assert is_package(tmp_path)


@pytest.mark.parametrize("path", ["../x.onnx", "/etc/passwd", "stages/../../x", ""])
def test_a_path_that_leaves_the_package_is_refused(tmp_path: Path, path: str) -> None:
    written(tmp_path, lambda data: data["stages"][0].update(model=path))
    assert code_of(tmp_path) == "damaged-package"


def test_a_target_that_runs_an_absent_stage_is_refused(tmp_path: Path) -> None:
    written(tmp_path, lambda data: data["targets"][0].update(stages=[0, 7]))
    assert code_of(tmp_path) == "damaged-package"


def test_deep_nesting_is_damage_and_no_crash(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    assert code_of(tmp_path) == "damaged-package"
