from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from spec_file import write_model

from optc.specs.check import check
from optc.specs.compile_spec import Range
from optc.specs.likely import likely_range
from optc.specs.starter import InputOutline, decisions, starter_spec


def test_a_starter_spec_is_right_as_it_stands(tmp_path: Path) -> None:
    write_model(tmp_path)
    text = starter_spec(
        "m.onnx",
        [
            ("images", "float32", ["batch", 3, "height", 32]),
            ("ids", "int64", [None]),
            ("flag", "bool", []),
        ],
    )
    (tmp_path / "spec.yaml").write_text(text)
    spec = check(tmp_path / "spec.yaml")
    assert spec.profiles == (
        {
            "batch": Range(min=1, opt=4, max=8),
            "height": Range(min=320, opt=640, max=1280),
            "ids_0": Range(min=1, opt=4, max=8),
        },
    )
    assert [target.name for target in spec.spec.targets] == ["portable"]
    assert decisions(text) == []
    assert "#   images: float32 [batch, 3, height, 32]\n" in text
    assert "#   ids: int64 [ids_0]\n" in text


def test_what_needs_a_decision_is_marked_and_still_a_right_spec(tmp_path: Path) -> None:
    inputs: list[InputOutline] = [("x", "float32", ["a: b", None, 4]), ("y?", "float16", None)]
    graph = helper.make_graph(
        [], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["a: b", None, 4])], []
    )
    graph.input.add(name="y?").type.tensor_type.elem_type = TensorProto.FLOAT16
    (tmp_path / "m.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    text = starter_spec("m.onnx", inputs)
    lines = text.splitlines()
    assert [lines[number - 1].strip() for number in decisions(text)] == [
        '"y?": {shape: [batch, 3, 224, 224]}  # DECIDE: the model gives no shape for this input',
        "x_1: {min: 1, opt: 16, max: 64}  # DECIDE: nothing says what this axis is",
    ]
    (tmp_path / "spec.yaml").write_text(text)
    spec = check(tmp_path / "spec.yaml")
    assert spec.inputs["x"].shape == ("a: b", "x_1", 4)
    assert spec.inputs["y?"].shape == ("batch", 3, 224, 224)


def test_a_model_without_dynamic_axes_needs_no_dims() -> None:
    text = starter_spec("m.onnx", [("x", "float32", [1, 3])])
    assert "dims:" not in text
    assert starter_spec("m.onnx", [])


@pytest.mark.parametrize("name", ["495", "a b", "x\ny: 1", "#", "\u2028", "'", '"'])
def test_names_that_need_quotes(tmp_path: Path, name: str) -> None:
    value = helper.make_tensor_value_info(name, TensorProto.FLOAT, [name])
    model = helper.make_model(helper.make_graph([], "g", [value], []))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert onnx.load(tmp_path / "m.onnx").graph.input[0].name == name
    (tmp_path / "s.yaml").write_text(starter_spec("m.onnx", [(name, "float32", [name])]))
    assert check(tmp_path / "s.yaml").inputs[name].shape == (name,)


@pytest.mark.parametrize(
    ("symbol", "shape", "axis", "opt", "plain"),
    [
        ("batch_size", [None, 3], 0, 4, True),
        ("N", [None, 3, 8, 8], 0, 4, True),
        ("unk__214", [None, 3], 0, 4, True),
        ("sequence_length", [1, None], 1, 128, True),
        ("seq", [1, None, 8], 1, 128, True),
        ("frames", ["batch", 3, None, 160], 2, 128, True),
        ("n_frames", ["batch", None, 160], 1, 128, True),
        ("H", [1, 3, None, 8], 2, 640, True),
        ("image_width", [1, 3, None], 2, 640, True),
        ("p2o.DynamicDimension.1", [1, 3, None, 8], 2, 640, False),
        ("M1", ["N", None, "M2", 3], 1, 640, False),
        ("M2", ["N", "M1", None, 3], 2, 640, False),
        ("M1", ["N", None, "M2", "M3"], 1, 16, False),
        ("x_1", [1, None], 1, 128, False),
        ("x_1", [1, None, 8], 1, 16, False),
    ],
)
def test_likely_ranges(
    symbol: str, shape: list[str | int | None], axis: int, opt: int, plain: bool
) -> None:
    range_, doubt = likely_range(symbol, shape, axis)
    assert (range_.opt, doubt is None) == (opt, plain)
