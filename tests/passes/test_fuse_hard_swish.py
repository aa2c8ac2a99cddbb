from __future__ import annotations

import numpy as np
import pytest
from builder_says import Builder
from graphs import assert_same_numbers, rewrite, run, text

from optc.passes.fuse_hard_swish import FuseHardSwish

HEAD = '<ir_version: 8, opset_import: ["" : 14]>'
NUMBERS = """<float zero = {0}, float one = {1}, float three = {3}, float six = {6},
    float sixth = {0.16666667}, float half = {0.5}>"""

FORMS = {
    "divided last": "a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) [last] y = Div(m, six)",
    "divided first": "a = Add(three, x) c = Clip(a, zero, six) d = Div(c, six) [last] y = Mul(d, x)",
    "with a factor": "a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) [last] y = Mul(m, sixth)",
    "x divided": "a = Add(x, three) c = Clip(a, zero, six) d = Mul(x, sixth) [last] y = Mul(d, c)",
    "from a HardSigmoid": "h = HardSigmoid<alpha=0.16666667,beta=0.5>(x) [last] y = Mul(x, h)",
    "clipped to 1": "s = Mul(x, sixth) a = Add(s, half) c = Clip(a, zero, one) [last] y = Mul(c, x)",
}


def graph(body: str, dtype: str = "float") -> str:
    return f"{HEAD} g ({dtype}[2,n] x) => ({dtype}[2,n] y) {NUMBERS} {{ {body} }}"


@pytest.mark.parametrize("name", FORMS)
def test_every_form_becomes_one_hard_swish(name: str) -> None:
    before, after, report = rewrite(graph(FORMS[name]), FuseHardSwish())
    assert (
        text(after)
        == """\
g (float[2,n] x) => (float[2,n] y) {
   [last] y = HardSwish (x)
}"""
    )
    assert len(report.merged["last"]) == len(before.graph.node)
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-6, dynamic=50)
    special = {"x": np.array([[np.nan, np.inf, -np.inf]] * 2, np.float32)}
    np.testing.assert_array_equal(run(after, special)["y"], run(before, special)["y"])


def test_an_older_model_is_raised() -> None:
    before, after, _ = rewrite(
        f"""<ir_version: 8, opset_import: ["" : 7]> g (float[9] x) => (float[9] y) {NUMBERS}
        {{ a = Add(x, three) c = Clip<min=0.0,max=6.0>(a) m = Mul(x, c) y = Div(m, six) }}""",
        FuseHardSwish(),
    )
    assert [n.op_type for n in after.graph.node] == ["HardSwish"]
    assert after.opset_import[0].version == 14
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "body",
    [
        "a = Add(x, one) c = Clip(a, zero, six) m = Mul(x, c) y = Div(m, six)",
        "a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) y = Div(m, three)",
        "a = Add(x, three) c = Clip(a, zero, three) m = Mul(x, c) y = Div(m, six)",
        "a = Add(x, three) c = Clip(a, zero, six) o = Abs(x) m = Mul(o, c) y = Div(m, six)",
        "h = HardSigmoid(x) y = Mul(x, h)",
    ],
)
def test_what_is_no_hard_swish_is_left_alone(body: str) -> None:
    _, _, report = rewrite(graph(body), FuseHardSwish())
    assert not report.rewritten
    assert not report.skipped


def test_a_type_without_a_kernel_is_left_alone() -> None:
    source = graph(FORMS["divided last"], "double").replace("float ", "double ")
    _, _, report = rewrite(source, FuseHardSwish())
    assert not report.rewritten


def test_a_value_that_is_read_elsewhere_is_kept() -> None:
    _, _, report = rewrite(graph(FORMS["divided last"]), FuseHardSwish(), points=("c",))
    assert report.skipped == {"last": "a value on the way has another reader"}


def test_a_model_that_cannot_be_raised_is_left_alone() -> None:
    _, _, report = rewrite(
        f"""<ir_version: 8, opset_import: ["" : 11]>
        g (float[2,3,4] x) => (float[2,3,4] y, float[2,3,4] z) {NUMBERS}
        {{ {FORMS["divided last"]} z = Softmax(x) }}""",
        FuseHardSwish(),
    )
    assert report.skipped == {"last": "the model cannot be raised to opset 14"}


def test_half_precision() -> None:
    """The float16 numbers are written as the parser takes them: as bits."""
    before, after, _ = rewrite(
        f"""{HEAD} g (float16[2,9] x) => (float16[2,9] y)
        <float16 zero = {{0}}, float16 three = {{16896}}, float16 six = {{17920}}>
        {{ {FORMS["divided last"]} }}""",
        FuseHardSwish(),
    )
    assert [n.op_type for n in after.graph.node] == ["HardSwish"]
    assert_same_numbers(before, after, rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize("compute_capability", ["7.5", "8.6", "8.9"])
def test_tensorrt_takes_it(tensorrt: Builder, compute_capability: str) -> None:
    _, after, _ = rewrite(graph(FORMS["divided last"]).replace("[2,n]", "[2,64]"), FuseHardSwish())
    assert tensorrt.refusal(after, compute_capability=compute_capability) == ""
