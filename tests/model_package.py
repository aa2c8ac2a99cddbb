"""Packages made by hand from small models: each stage a text, no compiler involved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from optc.optimizer.arrays import dtype_name
from optc.optimizer.package import PackageWriter, writing
from optc.specs.compile_spec import Range
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
)

HEAD = '<ir_version: 10, opset_import: ["" : 21]> '


def model_of(text: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(HEAD + text)
    onnx.checker.check_model(model)
    return model


def type_of(info: onnx.ValueInfoProto) -> TensorType:
    if not info.type.HasField("tensor_type"):
        return TensorType(dtype=str(info.type.WhichOneof("value")), shape=None)
    tensor = info.type.tensor_type
    shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return TensorType(
        dtype="string"
        if tensor.elem_type == TensorProto.STRING
        else dtype_name(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)),
        shape=shape,
    )


def stage_of(
    writer: PackageWriter,
    number: int,
    text: str,
    *,
    runtime: Any = "onnxruntime",
    refused: Sequence[str] = (),
    engines: Mapping[str, Engine] | None = None,
    profiles: Sequence[Mapping[str, Shapes]] = (),
) -> Stage:
    """Write one stage and return its record."""
    model = model_of(text)
    path = f"stages/{number:02d}-{runtime}.onnx"
    writer.write(path, model.SerializeToString())
    values = (*model.graph.input, *model.graph.output)
    return Stage(
        id=number,
        runtime=runtime,
        model=path,
        inputs=tuple(value.name for value in model.graph.input),
        outputs=tuple(value.name for value in model.graph.output),
        tensors={value.name: type_of(value) for value in values},
        engines=engines or {},
        profiles=tuple(profiles),
        why=tuple(Reason(node=op, op=op, by="parser", text="no") for op in refused),
    )


def manifest_of(
    whole: str,
    stages: Sequence[Stage],
    profiles: Sequence[Mapping[str, Range]] = (),
    targets: Sequence[Target] | None = None,
) -> Manifest:
    """Return the manifest of a package whose model is ``whole``."""
    graph = model_of(whole).graph

    def tensors(infos: Any) -> tuple[Tensor, ...]:
        return tuple(Tensor(name=info.name, **type_of(info).model_dump()) for info in infos)

    ids = tuple(stage.id for stage in stages)
    return Manifest(
        optc_version="0.1.0",
        spec=SpecRecord(sha256="0"),
        model=ModelRecord(path="m.onnx", sha256="0", bytes=0),
        inputs=tensors(graph.input),
        outputs=tensors(graph.output),
        profiles=tuple(profiles),
        stages=tuple(stages),
        targets=tuple(targets)
        if targets is not None
        else (Target(name="ampere", backend="tensorrt-rtx", compute_capability="8.6", stages=ids),),
    )


def one_stage_package(folder: Path, text: str, *profiles: Mapping[str, Range]) -> Path:
    """Write a package of one fallback stage, which is the whole model."""
    with writing(folder) as writer:
        writer.write("model.onnx", model_of(text).SerializeToString())
        writer.commit(manifest_of(text, [stage_of(writer, 0, text)], profiles))
    return folder
