from __future__ import annotations

import numpy as np
import pytest
from builder_says import Builder
from graphs import assert_same_numbers, rewrite, run, text

from optc.passes.fuse_mish import FuseMish

HEAD = '<ir_version: 8, opset_import: ["" : 18]>'
MISH = "s = Softplus(x) t = Tanh(s) [mul] y = Mul(x, t)"


def graph(body: str, dtype: str = "float") -> str:
    return f"{HEAD} g ({dtype}[2,n] x) => ({dtype}[2,n] y) {{ {body} }}"


@pytest.mark.parametrize("product", ["Mul(x, t)", "Mul(t, x)"])
@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_the_definition_becomes_one_mish(product: str, dtype: str) -> None:
    before, after, report = rewrite(graph(MISH.replace("Mul(x, t)", product), dtype), FuseMish())
    assert (
        text(after)
        == f"""\
g ({dtype}[2,n] x) => ({dtype}[2,n] y) {{
   [mul] y = Mish (x)
}}"""
    )
    assert report.merged == {"mul": ("Softplus_0", "Tanh_1", "mul")}
    tolerance = 1e-5 if dtype == "float" else 5e-3
    assert_same_numbers(before, after, rtol=tolerance, atol=tolerance, dynamic=30)
    if dtype == "float":
        special = {"x": np.array([[np.nan, np.inf, -np.inf, 100]] * 2, np.float32)}
        np.testing.assert_array_equal(run(after, special)["y"], run(before, special)["y"])


def test_an_older_model_is_raised() -> None:
    before, after, _ = rewrite(graph(MISH).replace('"" : 18', '"" : 9'), FuseMish())
    assert after.opset_import[0].version == 18
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "body",
    [
        "s = Softplus(x) t = Tanh(s) y = Add(x, t)",
        "s = Softplus(x) t = Sigmoid(s) y = Mul(x, t)",
        "o = Abs(x) s = Softplus(o) t = Tanh(s) y = Mul(x, t)",
    ],
)
def test_what_is_no_mish_is_left_alone(body: str) -> None:
    _, _, report = rewrite(graph(body), FuseMish())
    assert not report.rewritten
    assert not report.skipped


def test_a_type_without_a_kernel_is_left_alone() -> None:
    _, _, report = rewrite(graph(MISH, "double"), FuseMish())
    assert not report.rewritten


def test_a_value_that_is_read_elsewhere_is_kept() -> None:
    _, _, report = rewrite(graph(MISH), FuseMish(), points=("t",))
    assert report.skipped == {"mul": "a value on the way has another reader"}


def test_a_model_that_cannot_be_raised_is_left_alone() -> None:
    _, _, report = rewrite(
        f"""<ir_version: 8, opset_import: ["" : 11]>
        g (float[2,3,4] x) => (float[2,3,4] y, float[2,3,4] z) {{ {MISH} z = Softmax(x) }}""",
        FuseMish(),
    )
    assert report.skipped == {"mul": "the model cannot be raised to opset 18"}


@pytest.mark.parametrize("compute_capability", ["7.5", "8.6", "8.9"])
def test_tensorrt_takes_it(tensorrt: Builder, compute_capability: str) -> None:
    _, after, _ = rewrite(graph(MISH).replace("[2,n]", "[2,64]"), FuseMish())
    assert tensorrt.refusal(after, compute_capability=compute_capability) == ""
