from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from model_package import model_of
from onnx import TensorProto, helper, numpy_helper

from optc.optimizer.reference import (
    EvaluatorRunner,
    Model,
    OrtRunner,
    Rejected,
    flattened,
)
from optc.specs.diagnostic import ModelError


def saved(folder: Path, text: str) -> Model:
    onnx.save(model_of(text), folder / "m.onnx")
    return Model(folder / "m.onnx")


def test_the_original_runs_without_optimisations(tmp_path: Path) -> None:
    model = saved(tmp_path, "g (float[N] x) => (float[N] y) { y = Neg (x) }")
    assert model.runner.run({"x": np.ones(2, np.float32)})["y"].tolist() == [-1, -1]
    assert "its optimisations off" in model.runner.engine
    assert (model.runner.inputs, model.runner.outputs) == (("x",), ("y",))


def test_an_input_that_does_not_fit_is_rejected_in_the_runtimes_words(tmp_path: Path) -> None:
    model = saved(tmp_path, "g (float[N,4] x) => (float[N,4] y) { y = Neg (x) }")
    with pytest.raises(Rejected, match="Got: 5 Expected: 4"):
        model.runner.run({"x": np.zeros((1, 5), np.float32)})
    with pytest.raises(Rejected, match="missing"):
        model.runner.run({})
    with pytest.raises(Rejected, match="double"):
        model.runner.run({"x": np.zeros((1, 4))})


def test_a_model_that_onnxruntime_does_not_know_runs_on_onnx(tmp_path: Path) -> None:
    """No kernel for a float64 Conv on the CPU: onnx's own reference has one."""
    text = """g (double[1,1,4,4] x) => (double[1,1,2,2] y) { y = Conv (x, w) }"""
    model = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 21]> ' + text)
    weight = np.linspace(0.1, 0.9, 9).reshape(1, 1, 3, 3)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    onnx.save(model, tmp_path / "m.onnx")
    original = Model(tmp_path / "m.onnx")
    found = original.runner.run({"x": np.ones((1, 1, 4, 4))})["y"]
    np.testing.assert_allclose(found, 4.5)
    assert isinstance(original.runner, EvaluatorRunner)
    assert original.runner.engine.startswith("onnx.reference")
    assert "NOT_IMPLEMENTED" in original.runner.engine
    assert original.optimised() is None
    exposed = original.variant(["y"], lambda name, array: array * 2)
    np.testing.assert_allclose(exposed.run({"x": np.ones((1, 1, 4, 4))})["y"], 9)


def test_a_model_that_nothing_runs_is_an_error_that_quotes_both(tmp_path: Path) -> None:
    node = helper.make_node("Nonsense", ["x"], ["y"], domain="com.example")
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N"]) for n in "xy")
    graph = helper.make_graph([node], "g", [x], [y])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.example", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"Nonsense.*onnx\.reference") as caught:
        _ = Model(tmp_path / "m.onnx").runner
    assert caught.value.diagnostics[0].code == "cannot-run-original"


def test_an_ir_version_that_is_too_new_is_lowered_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optc.optimizer import ort_errors, reference

    class Older(OrtRunner):
        """An ONNX Runtime that reads IR version 10 at most."""

        def __init__(self, model: Path | onnx.ModelProto, *args: object, **more: object) -> None:
            proto = model if isinstance(model, onnx.ModelProto) else onnx.load(model)
            if proto.ir_version > 10:
                raise ort_errors.ort_state.Fail("Unsupported model IR version")
            super().__init__(model, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(reference, "OrtRunner", Older)
    proto = model_of("g (float[N] x) => (float[N] y) { y = Neg (x) }")
    proto.ir_version = 13
    onnx.save(proto, tmp_path / "m.onnx")
    model = Model(tmp_path / "m.onnx")
    assert "read as IR version 10, not 13" in model.runner.engine
    x = {"x": np.ones(1, np.float32)}
    assert model.runner.run(x)["y"] == model.variant(["y"]).run(x)["y"] == -1


def test_a_product_with_weights_of_8_bits_keeps_its_other_operand_in_floats() -> None:
    text = """g (float[4,64] x) => (float[4,8] y) <float s = {0.01}>
              { d = DequantizeLinear (w, s)  y = MatMul (x, d) }"""
    model = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 21]> ' + text)
    rng = np.random.default_rng(0)
    weights = rng.integers(-127, 128, (64, 8)).astype(np.int8)
    model.graph.initializer.append(numpy_helper.from_array(weights, "w"))
    x = rng.standard_normal((4, 64)).astype(np.float32)
    found = OrtRunner(model, Path(), optimised=True).run({"x": x})["y"]
    np.testing.assert_allclose(found, x @ (weights * np.float32(0.01)), atol=1e-4)


def test_initialisers_that_are_inputs_too_need_not_be_given(tmp_path: Path) -> None:
    model = model_of("g (float[N,2] x, float[2] w) => (float[N,2] y) { y = Add (x, w) }")
    model.graph.initializer.append(numpy_helper.from_array(np.ones(2, np.float32), "w"))
    onnx.save(model, tmp_path / "m.onnx")
    original = Model(tmp_path / "m.onnx")
    assert original.runner.inputs == ("x",)
    assert original.runner.run({"x": np.ones((1, 2), np.float32)})["y"].tolist() == [[2, 2]]


def test_types_that_numpy_does_not_know_pass(tmp_path: Path) -> None:
    model = saved(
        tmp_path,
        """g (bfloat16[N] x) => (bfloat16[N] y, float8e4m3fn[N] z, float[N] f) {
            y = Identity (x)  f = Cast <to = 1> (x)  z = Cast <to = 17> (x) }""",
    )
    x = np.array([0.5, 1, -3], ml_dtypes.bfloat16)
    found = model.runner.run({"x": x})
    assert found["y"].dtype == ml_dtypes.bfloat16
    assert found["z"].dtype == ml_dtypes.float8_e4m3fn
    for array in found.values():
        assert array.astype(np.float32).tolist() == [0.5, 1, -3]
    empty = model.runner.run({"x": x[:0]})
    assert all(array.shape == (0,) for array in empty.values())


def test_any_tensor_can_be_made_an_output(tmp_path: Path) -> None:
    text = "g (float[N] x) => (float[N] y) <float two = {2}> { h = Mul (x, two) y = Neg (h) }"
    model = saved(tmp_path, text)
    found = model.variant(["h", "y"]).run({"x": np.ones(1, np.float32)})
    assert {name: array.tolist() for name, array in found.items()} == {"h": [2], "y": [-2]}
    with pytest.raises(Rejected):
        model.variant(["nowhere"])
    assert model.runner.outputs == ("y",)


def test_constants_in_bodies_are_changed_too(tmp_path: Path) -> None:
    text = """g (float[N] x, bool c) => (float[N] y) {
        y = If (c) <
            then_branch = t () => (float[N] a) <float k = {3}> { a = Mul (x, k) },
            else_branch = e () => (float[N] b) { k2 = Constant <value = float {5}> () b = Mul (x, k2) }
        > }"""
    model = saved(tmp_path, text)
    changed = model.variant(change=lambda name, array: array * 2)
    for chosen, factor in ((True, 6), (False, 10)):
        given = {"x": np.ones(1, np.float32), "c": np.array(chosen)}
        assert changed.run(given)["y"].tolist() == [factor]
        assert model.runner.run(given)["y"].tolist() == [factor / 2]


def test_dataflow_goes_through_bodies_and_not_through_shapes(tmp_path: Path) -> None:
    text = """g (float[N] x, bool c) => (float[N] y, int64[1] s) {
        h = Neg (x)
        s = Shape (h)
        y = If (c) <
            then_branch = t () => (float[N] a) { a = Abs (h) },
            else_branch = e () => (float[N] b) { b = Identity (x) }
        > }"""
    model = saved(tmp_path, text)
    assert model.leading_to("y") == {"y", "h", "x", "c"}
    assert model.leading_to("s") == {"s"}


def test_sequences_and_maps_are_taken_apart() -> None:
    one = np.ones(1)
    flat = flattened({"s": [one, one], "m": [{"a": 1.0}], "none": None, "t": one})
    assert list(flat) == ["s[0]", "s[1]", "m[0][a]", "t"]
