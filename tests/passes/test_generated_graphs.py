"""Random models through each pass and through all of them: the numbers stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from generated import BATCH, models
from hypothesis import HealthCheck, given, note, reject, settings
from onnx import ModelProto

from optc.passes.evaluation import RUNTIME_ERRORS
from optc.passes.graph import export_model, import_model
from optc.passes.pipeline import optimise
from optc.passes.registry import ORDER, load, passes

SETTINGS = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
EXACT = [name for name in ORDER if load(name).exactness == "exact"]


def outputs(model: ModelProto, *, flag: bool) -> dict[str, Any]:
    """Return the outputs on ONNX Runtime, with the same kernels for constants and for the rest."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    rng = np.random.default_rng(0)
    feeds = {
        "x": rng.uniform(-2, 2, (BATCH, 3, 4)).astype(np.float32),
        "z": rng.uniform(-2, 2, (3, 2)).astype(np.float32),
        "flag": np.array(flag),
    }
    names = [output.name for output in session.get_outputs()]
    given = {i.name for i in session.get_inputs()}
    values = session.run(names, {name: v for name, v in feeds.items() if name in given})
    return dict(zip(names, values, strict=True))


def optimised(model: ModelProto, names: list[str]) -> ModelProto:
    note(onnx.printer.to_text(model))
    graph = import_model(model)
    optimise(graph, [load(name)() for name in names])
    after = export_model(graph)
    onnx.checker.check_model(after)
    note(onnx.printer.to_text(after))
    return after


def expected_outputs(model: ModelProto, *, flag: bool) -> dict[str, Any]:
    """Return the outputs of a drawn model; pass over those that ONNX Runtime stumbles upon.

    Its Cast remover, which cannot be turned off, forgets that a body reads what it removes.
    """
    try:
        return outputs(model, flag=flag)
    except RUNTIME_ERRORS:
        reject()


def assert_same_bits(model: ModelProto, names: list[str]) -> None:
    expected = {flag: expected_outputs(model, flag=flag) for flag in (False, True)}
    after = optimised(model, names)
    for flag, values in expected.items():
        found = outputs(after, flag=flag)
        for name, value in values.items():
            assert found[name].shape == value.shape, name
            np.testing.assert_array_equal(found[name], value, err_msg=name)
            numbers = ~np.isnan(value)
            signs = np.signbit(found[name])[numbers], np.signbit(value)[numbers]
            np.testing.assert_array_equal(*signs, err_msg=f"{name}: sign of zero")


@pytest.mark.parametrize("name", EXACT)
@SETTINGS
@given(model=models())
def test_an_exact_pass_keeps_every_bit(name: str, model: ModelProto) -> None:
    assert_same_bits(model, [name])


@SETTINGS
@given(model=models())
def test_all_exact_passes_together_keep_every_bit(model: ModelProto) -> None:
    assert_same_bits(model, EXACT)


@SETTINGS
@given(model=models(smooth=True))
def test_all_passes_keep_the_numbers(model: ModelProto) -> None:
    expected = {flag: expected_outputs(model, flag=flag) for flag in (False, True)}
    after = optimised(model, [pass_.name for pass_ in passes()])
    for flag, values in expected.items():
        found = outputs(after, flag=flag)
        for name, value in values.items():
            assert found[name].shape == value.shape, name
            scale = float(np.max(np.abs(value), initial=1e-3))
            np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5 * scale)
