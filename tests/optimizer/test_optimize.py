from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import assert_same_numbers, parsed
from onnx import ModelProto, TensorProto, helper

import optc
from optc.optimizer.optimize import optimize_file
from optc.specs.diagnostic import EnvironmentFault, InputError, ModelError

SOURCE = """
<ir_version: 9, opset_import: ["" : 17]>
g (float[n,2] x) => (float[n,2] y) <float[2] one = {1, 1}, float[2] two = {2, 2}>
{
    [sum]  three = Add (one, two)
    [same] i = Identity (x)
    [mul]  y = Mul (i, three)
}"""


def test_a_model_in_memory_is_optimised_and_left_unchanged() -> None:
    model = parsed(SOURCE)
    before = model.SerializeToString()
    optimised, report = optc.optimize(model)
    assert model.SerializeToString() == before
    assert [node.name for node in optimised.graph.node] == ["mul"]
    assert report.passes.origins["mul"] == ("mul",)
    assert_same_numbers(model, optimised, rtol=0)


def test_a_file_is_optimised_into_another(tmp_path: Path) -> None:
    onnx.save(parsed(SOURCE), tmp_path / "in.onnx")
    optimised, _ = optc.optimize(tmp_path / "in.onnx")
    assert len(optimised.graph.node) == 1


def test_a_pass_that_is_left_out_does_not_run() -> None:
    optimised, _ = optc.optimize(parsed(SOURCE), disable=["fold-constants"])
    assert [node.op_type for node in optimised.graph.node] == ["Add", "Mul"]


def test_an_unknown_pass_is_named_with_the_nearest() -> None:
    with pytest.raises(InputError) as caught:
        optc.optimize(parsed(SOURCE), disable=["fold-constant"])
    assert "`fold-constants`" in str(caught.value.diagnostics[0].todo)


def with_(change: str) -> ModelProto:
    model = parsed(SOURCE)
    weight = model.graph.initializer[0]
    match change:
        case "empty":
            return ModelProto()
        case "old opset":
            model.opset_import[0].version = 6
        case "no outputs":
            del model.graph.output[:]
        case "short weight":
            weight.ClearField("float_data")
            weight.raw_data = b"abc"
        case "data outside":
            weight.ClearField("float_data")
            weight.data_location = TensorProto.EXTERNAL
            weight.external_data.add(key="location", value="/etc/hostname")
        case "unknown op":
            model.graph.node.append(helper.make_node("Nonsense", ["x"], ["z"]))
    return model


@pytest.mark.parametrize(
    "change", ["empty", "old opset", "no outputs", "short weight", "data outside", "unknown op"]
)
def test_a_damaged_model_in_memory_is_refused_as_its_file_is(change: str) -> None:
    with pytest.raises(ModelError):
        optc.optimize(with_(change))


def test_a_model_of_large_weights_in_memory_keeps_them() -> None:
    model = parsed(SOURCE)
    values = np.arange(64 * 1024, dtype=np.float32).reshape(-1, 2)
    model.graph.initializer.append(onnx.numpy_helper.from_array(values, "big"))
    model.graph.node.append(helper.make_node("Gather", ["big", "at"], ["row"], name="row"))
    at = onnx.numpy_helper.from_array(np.array(3, np.int64), "at")
    model.graph.initializer.append(at)
    model.graph.output.append(helper.make_tensor_value_info("row", TensorProto.FLOAT, [2]))
    optimised, _ = optc.optimize(model)
    assert_same_numbers(model, optimised, rtol=0)


def test_weights_that_were_beside_the_model_stay_beside_it(tmp_path: Path) -> None:
    weight = np.arange(32 * 1024, dtype=np.float32).reshape(128, 256)
    model = parsed(
        '<ir_version: 9, opset_import: ["" : 17]> g (float[n,128] x, float[128,256] w) => (float[n,256] y) { [i] z = Identity (x) [m] y = MatMul (z, w) }'
    )
    model.graph.input.pop()
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(model, tmp_path / "in.onnx", save_as_external_data=True, location="in.bin")
    optimize_file(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.data").stat().st_size == weight.nbytes
    assert (tmp_path / "out.onnx").stat().st_size < 1024
    optimised = onnx.load(tmp_path / "out.onnx")
    assert len(optimised.graph.node) == 1
    assert np.array_equal(onnx.numpy_helper.to_array(optimised.graph.initializer[0]), weight)
    optimize_file(tmp_path / "out.onnx", tmp_path / "out.onnx")  # over itself
    assert onnx.load(tmp_path / "out.onnx") == optimised


def test_weights_that_the_input_needs_are_not_written_over(tmp_path: Path) -> None:
    model = parsed(SOURCE)
    model.graph.initializer.append(
        onnx.numpy_helper.from_array(np.ones((200, 200), np.float32), "big")
    )
    model.graph.node.add(op_type="MatMul", input=["big", "big"], output=["out"])
    model.graph.output.add(name="out").type.tensor_type.elem_type = TensorProto.FLOAT
    onnx.save(model, tmp_path / "a.onnx", save_as_external_data=True, location="b.onnx.data")
    weights = (tmp_path / "b.onnx.data").read_bytes()
    for name in ("b.onnx.data", "b.onnx"):
        with pytest.raises(InputError) as caught:
            optimize_file(tmp_path / "a.onnx", tmp_path / name)
        assert caught.value.diagnostics[0].code == "would-overwrite"
    assert (tmp_path / "b.onnx.data").read_bytes() == weights


def test_a_folder_that_is_not_there_is_told_before_anything_is_done(tmp_path: Path) -> None:
    onnx.save(parsed(SOURCE), tmp_path / "in.onnx")
    with pytest.raises(EnvironmentFault) as caught:
        optimize_file(tmp_path / "in.onnx", tmp_path / "nowhere" / "out.onnx")
    assert "there is no folder" in caught.value.diagnostics[0].problem
