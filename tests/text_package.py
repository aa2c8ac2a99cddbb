"""A tiny package of text files, each of which names the version it belongs to."""

from __future__ import annotations

from pathlib import Path

from optc.optimizer.package import check_file, writing
from optc.specs.manifest import Manifest, ModelRecord, SpecRecord, Stage, Target, read_manifest


def manifest(version: str = "0.1.0") -> Manifest:
    stage = Stage(
        id=0, runtime="onnxruntime", model="stages/00-onnxruntime.onnx", inputs=(), outputs=()
    )
    return Manifest(
        optc_version=version,
        spec=SpecRecord(sha256="0"),
        model=ModelRecord(path="m.onnx", sha256="0", bytes=0),
        inputs=(),
        outputs=(),
        stages=(stage,),
        targets=(Target(name="ampere", backend="tensorrt-rtx", stages=(0,)),),
    )


def write(folder: Path, version: str = "0.1.0") -> Manifest:
    with writing(folder) as writer:
        writer.write("model.onnx", f"model {version}")
        writer.write("stages/00-onnxruntime.onnx", f"stage {version}")
        writer.write("report.json", "{}")
        return writer.commit(manifest(version))


def check_files(folder: Path, manifest: Manifest) -> None:
    """Check every file of a package against its manifest."""
    for path in manifest.files:
        check_file(folder, manifest, path)


def read(folder: Path) -> str:
    """Return the version of a package after checking that all of it is of that version."""
    found = read_manifest(folder)
    check_files(folder, found)
    assert (folder / found.graph).read_text() == f"model {found.optc_version}"
    stage = folder / found.stages[0].model
    assert stage.read_text() == f"stage {found.optc_version}"
    return found.optc_version
