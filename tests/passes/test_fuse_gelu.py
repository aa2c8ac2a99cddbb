from __future__ import annotations

import numpy as np
import onnx
import pytest
from builder_says import Builder
from graphs import assert_same_numbers, rewrite, run, text

from optc.passes.fuse_gelu import FuseGelu

HEAD = '<ir_version: 9, opset_import: ["" : 20]>'
NUMBERS = """<float root = {1.4142135}, float inverse = {0.70710678}, float one = {1},
    float half = {0.5}, float two = {2}, float three = {3}, float k = {0.7978845608},
    float c = {0.044715}, float kc = {0.0356774081}>"""

ERF = {
    "as PyTorch writes it": "a = Div(x, root) e = Erf(a) s = Add(e, one) p = Mul(x, s) y = Mul(p, half)",
    "with a factor": "a = Mul(x, inverse) e = Erf(a) s = Add(one, e) p = Mul(s, x) y = Mul(half, p)",
    "halved first": "h = Mul(x, half) a = Div(x, root) e = Erf(a) s = Add(e, one) y = Mul(h, s)",
    "halved in the middle": "a = Div(x, root) e = Erf(a) s = Add(e, one) q = Mul(s, half) y = Mul(x, q)",
    "divided by 2": "a = Div(x, root) e = Erf(a) s = Add(e, one) p = Mul(x, s) y = Div(p, two)",
    "x times Phi": "a = Mul(inverse, x) e = Erf(a) f = Mul(e, half) s = Add(f, half) y = Mul(x, s)",
    "as a sum": "h = Mul(x, half) a = Div(x, root) e = Erf(a) p = Mul(h, e) y = Add(p, h)",
}
TANH = {
    "with Pow": """q = Pow(x, three) r = Mul(q, c) s = Add(x, r) u = Mul(s, k) e = Tanh(u)
        t = Add(e, one) p = Mul(x, t) y = Mul(p, half)""",
    "with products": """q = Mul(x, x) r = Mul(q, x) w = Mul(c, r) s = Add(w, x) u = Mul(k, s)
        e = Tanh(u) t = Add(one, e) h = Mul(half, x) y = Mul(t, h)""",
    "factored": """q = Mul(x, x) w = Mul(q, c) s = Add(w, one) v = Mul(x, k) u = Mul(v, s)
        e = Tanh(u) t = Add(e, one) f = Mul(t, half) y = Mul(f, x)""",
    "factored twice": """q = Pow(x, two) w = Mul(q, kc) s = Add(w, k) u = Mul(x, s)
        e = Tanh(u) t = Add(e, one) f = Mul(t, half) y = Mul(f, x)""",
}


def graph(body: str, dtype: str = "float") -> str:
    return f"{HEAD} g ({dtype}[2,n] x) => ({dtype}[2,n] y) {NUMBERS} {{ {body} }}"


@pytest.mark.parametrize("name", ERF)
def test_every_form_with_erf_becomes_one_gelu(name: str) -> None:
    before, after, report = rewrite(graph(ERF[name]), FuseGelu())
    assert [(n.op_type, list(n.input), list(n.attribute)) for n in after.graph.node] == [
        ("Gelu", ["x"], [])
    ]
    (merged,) = report.merged.values()
    assert len(merged) == len(before.graph.node)
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-7, dynamic=40)


@pytest.mark.parametrize("name", TANH)
def test_every_form_with_tanh_becomes_one_gelu(name: str) -> None:
    before, after, _ = rewrite(graph(TANH[name]), FuseGelu())
    last = len(before.graph.node) - 1
    assert (
        text(after)
        == f"""\
g (float[2,n] x) => (float[2,n] y) {{
   [Mul_{last}] y = Gelu <approximate: string = "tanh"> (x)
}}"""
    )
    assert_same_numbers(before, after, rtol=1e-4, atol=1e-6, dynamic=40)


def test_x_may_itself_be_a_sum() -> None:
    before, after, _ = rewrite(
        f"""{HEAD} g (float[2,3] in, float[2,3] bias) => (float[2,3] y) {NUMBERS} {{
            x = Add(in, bias)
            {TANH["with products"]}
        }}""",
        FuseGelu(),
    )
    assert [n.op_type for n in after.graph.node] == ["Add", "Gelu"]
    assert_same_numbers(before, after, rtol=1e-4, atol=1e-6)


def test_an_older_model_is_raised() -> None:
    source = graph(ERF["as PyTorch writes it"]).replace('"" : 20', '"" : 11')
    before, after, _ = rewrite(source, FuseGelu())
    assert [n.op_type for n in after.graph.node] == ["Gelu"]
    assert after.opset_import[0].version == 20
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-7)


def test_infinities_and_nan_come_out_as_before() -> None:
    before, after, _ = rewrite(graph(ERF["as PyTorch writes it"]), FuseGelu())
    special = {"x": np.array([[np.nan, np.inf, -np.inf, -0.0]] * 2, np.float32)}
    np.testing.assert_array_equal(run(after, special)["y"], run(before, special)["y"])


def test_half_precision_has_its_own_tolerance() -> None:
    """0x3DA8 and the like are float16 as the parser takes it."""
    before, after, _ = rewrite(
        f"""{HEAD} g (float16[2,8] x) => (float16[2,8] y)
        <float16 root = {{15784}}, float16 one = {{15360}}, float16 half = {{14336}}>
        {{ {ERF["as PyTorch writes it"]} }}""",
        FuseGelu(),
    )
    assert [n.op_type for n in after.graph.node] == ["Gelu"]
    assert_same_numbers(before, after, rtol=5e-3, atol=1e-3)


def test_nodes_of_a_body_are_fused() -> None:
    before, after, _ = rewrite(
        f"""{HEAD} g (bool cond, float[2,n] x) => (float[2,n] z) {NUMBERS} {{
            z = If (cond) <
                then_branch = t () => (float[2,n] y) {{ {ERF["halved first"]} }},
                else_branch = f () => (float[2,n] o) {{ o = Identity(x) }}
            >
        }}""",
        FuseGelu(),
    )
    assert [n.op_type for n in after.graph.node[0].attribute[0].g.node] == ["Gelu"]
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-7)


NOT_A_GELU = {
    "another root": "a = Div(x, two) e = Erf(a) s = Add(e, one) p = Mul(x, s) y = Mul(p, half)",
    "another shift": "a = Div(x, root) e = Erf(a) s = Add(e, two) p = Mul(x, s) y = Mul(p, half)",
    "not halved": "a = Div(x, root) e = Erf(a) s = Add(e, one) y = Mul(x, s)",
    "another value": "a = Div(x, root) e = Erf(a) s = Add(e, one) o = Abs(x) p = Mul(o, s) y = Mul(p, half)",
    "another cube": TANH["with Pow"].replace("Mul(q, c)", "Mul(q, half)"),
    "a square": TANH["with Pow"].replace("Pow(x, three)", "Pow(x, two)"),
}


@pytest.mark.parametrize("name", NOT_A_GELU)
def test_what_is_no_gelu_is_left_alone(name: str) -> None:
    _, _, report = rewrite(graph(NOT_A_GELU[name]), FuseGelu())
    assert not report.rewritten
    assert not report.skipped


def test_types_without_a_kernel_are_left_alone() -> None:
    source = graph(TANH["with products"], "double").replace("float ", "double ")
    _, _, report = rewrite(source, FuseGelu())
    assert not report.rewritten


def test_a_value_that_another_node_reads_is_kept() -> None:
    _, _, report = rewrite(
        f"""{HEAD} g (float[2] x) => (float[2] y, float[2] z) {NUMBERS}
        {{ {ERF["as PyTorch writes it"]} z = Abs(a) }}""",
        FuseGelu(),
    )
    assert list(report.skipped.values()) == ["a value on the way has another reader"]


def test_a_value_that_the_caller_reads_is_kept() -> None:
    _, _, report = rewrite(graph(ERF["as PyTorch writes it"]), FuseGelu(), points=("e",))
    assert list(report.skipped.values()) == ["a value on the way has another reader"]


def test_a_constant_that_widens_is_left_alone() -> None:
    _, _, report = rewrite(
        f"""{HEAD} g (float[2] x) => (float[1,2] y)
        {NUMBERS.replace("float half = {0.5}", "float[1,1] half = {0.5}")}
        {{ {ERF["as PyTorch writes it"]} }}""",
        FuseGelu(),
    )
    assert list(report.skipped.values()) == ["a constant of a higher rank widens it"]


def test_a_model_that_cannot_be_raised_is_left_alone() -> None:
    _, _, report = rewrite(
        f"""<ir_version: 8, opset_import: ["" : 11]>
        g (float[2,3,4] x) => (float[2,3,4] y, float[2,3,4] z) {NUMBERS}
        {{ {ERF["as PyTorch writes it"]} z = Softmax(x) }}""",
        FuseGelu(),
    )
    assert list(report.skipped.values()) == ["the model cannot be raised to opset 20"]


@pytest.mark.parametrize("compute_capability", ["7.5", "8.6", "8.9"])
def test_tensorrt_takes_it(tensorrt: Builder, compute_capability: str) -> None:
    for body in (ERF["halved first"], TANH["with Pow"]):
        _, after, _ = rewrite(graph(body).replace("[2,n]", "[2,64]"), FuseGelu())
        onnx.checker.check_model(after, full_check=True)
        assert tensorrt.refusal(after, compute_capability=compute_capability) == ""
