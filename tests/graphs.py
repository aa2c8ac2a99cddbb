"""What every test of a pass uses: text to model, a pass run on it, model to text, numbers compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, helper

from optc.passes.contract import Pass
from optc.passes.graph import export_model, import_model
from optc.passes.pipeline import PassRecord, optimise


def parsed(source: str) -> ModelProto:
    """Return the model that ``source`` (onnx.parser text) describes, shapes inferred and checked."""
    model = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(source), data_prop=True)
    onnx.checker.check_model(model)
    return model


def rewrite(
    source: str, pass_: Pass, *, points: tuple[str, ...] = ()
) -> tuple[ModelProto, ModelProto, PassRecord]:
    """Return the model before and after ``pass_`` ran to its fixpoint, and what it reported.

    Both models are checked, and a second run of the pass on the result must change nothing.
    """
    before = parsed(source)
    graph = import_model(before)
    report = optimise(graph, [pass_], points=points)
    after = export_model(graph, value_info=False)
    onnx.checker.check_model(after)
    again = optimise(import_model(after), [pass_], points=points)
    assert again.records[0].rewritten == 0, "a second run changed something"
    return before, after, report.records[0]


def text(model: ModelProto) -> str:
    """Return the graph as text, weights and all, line ends stripped."""
    printed = onnx.printer.to_text(model.graph)
    return "\n".join(line.rstrip() for line in printed.splitlines())


def seeded_inputs(model: ModelProto, *, seed: int = 0, dynamic: int = 2) -> dict[str, Any]:
    """Return inputs for ``model``; dynamic axes become ``dynamic``, integers are 0 to 3."""
    rng = np.random.default_rng(seed)
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = {}
    for info in model.graph.input:
        if info.name in constants:
            continue
        tensor = info.type.tensor_type
        shape = [d.dim_value if d.HasField("dim_value") else dynamic for d in tensor.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if dtype == np.bool_:
            inputs[info.name] = rng.integers(0, 2, shape).astype(dtype)
        elif np.issubdtype(dtype, np.integer):
            inputs[info.name] = rng.integers(0, 4, shape).astype(dtype)
        else:
            inputs[info.name] = rng.standard_normal(shape).astype(dtype)
    return inputs


def run(model: ModelProto, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return every output of ``model`` on onnxruntime, optimisations off."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def assert_same_numbers(
    before: ModelProto, after: ModelProto, *, rtol: float, atol: float = 0.0, dynamic: int = 2
) -> None:
    """Feed both models the same seeded input and compare every output, dtype and shape too."""
    inputs = seeded_inputs(before, dynamic=dynamic)
    expected, found = run(before, inputs), run(after, inputs)
    assert list(expected) == list(found)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=atol, err_msg=name)
