"""`dequantise-lstm`: how close it is to ONNX Runtime's kernel, and what the builder says."""

from __future__ import annotations

import numpy as np
import pytest
from builder_says import Builder, profile_of
from graphs import rewrite, run, seeded_inputs

from optc.passes.dequantise_lstm import DequantiseLstm

HEAD = '<ir_version: 9, opset_import: ["" : 17, "com.microsoft" : 1]>'
PASS = DequantiseLstm()


def numbers(seed: int, *shape: int) -> str:
    drawn = np.random.default_rng(seed).integers(-100, 100, int(np.prod(shape)))
    return "{" + ", ".join(map(str, drawn)) + "}"


WEIGHTS = f"int8[2,4,12] w = {numbers(0, 2, 4, 12)}, int8[2,3,12] r = {numbers(1, 2, 3, 12)}"
GRIDS = {
    "a direction": "float[2] s = {0.005, 0.01}, int8[2] z = {0, 3}",
    "a column": f"float[2,12] s = {{{', '.join(['0.005', '0.01'] * 12)}}}, "
    f"int8[2,12] z = {{{', '.join(['0'] * 24)}}}",
}


@pytest.mark.parametrize("of", GRIDS)
def test_it_is_close_to_onnxruntime(of: str, tensorrt: Builder) -> None:
    before, after, report = rewrite(
        HEAD
        + f"""
        g (float[5,N,4] x) => (float[5,2,N,3] y, float[2,N,3] h) <{WEIGHTS}, {GRIDS[of]}>
        {{
            [n] y, h = com.microsoft.DynamicQuantizeLSTM
                <direction = "bidirectional", hidden_size = 3>
                (x, w, r, , , , , , s, z, s, z)
        }}""",
        PASS,
    )
    assert set(report.merged.values()) == {("n",)}
    assert {node.op_type for node in after.graph.node} == {"LSTM"}
    inputs = seeded_inputs(before, dynamic=3)
    expected, found = run(before, inputs), run(after, inputs)
    for name, value in expected.items():
        assert found[name].shape == value.shape
        np.testing.assert_allclose(found[name], value, atol=0.02)  # steps of 1/255, in [-1, 1]

    profiles = (profile_of(before),)
    assert tensorrt.refusal(before, profiles=profiles)
    assert tensorrt.refusal(after, profiles=profiles) == ""


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("float[1] s, int8[1] z", "its weights or their scale are computed at run time"),
        ("int8[1] z", "its zero points are computed at run time"),
    ],
)
def test_what_is_computed_at_run_time_stays_and_says_why(given: str, reason: str) -> None:
    scale = "" if "s," in given else ", float[1] s = {0.01}"
    _, _, report = rewrite(
        HEAD
        + f"""
        g (float[5,1,4] x, {given}) => (float[5,1,1,3] y)
        <int8[1,4,12] w = {numbers(0, 1, 4, 12)}, int8[1,3,12] r = {numbers(1, 1, 3, 12)}{scale}>
        {{
            [n] y = com.microsoft.DynamicQuantizeLSTM <hidden_size = 3>
                (x, w, r, , , , , , s, z, s, z)
        }}""",
        PASS,
    )
    assert report.skipped == {"n": reason}
    assert not report.rewritten
