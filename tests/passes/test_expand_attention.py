"""`expand-attention`: numbers of ONNX Runtime's own kernels, and what the builder says."""

from __future__ import annotations

import numpy as np
import pytest
from builder_says import Builder, profile_of
from graphs import assert_same_numbers, rewrite

from optc.passes.expand_attention import ExpandAttention

HEAD = '<ir_version: 9, opset_import: ["" : 17, "com.microsoft" : 1]>'
PASS = ExpandAttention()
MS = "com.microsoft"
DRAWN = np.random.default_rng(0).integers(-3, 4, (8, 24)) / 2
NUMBERS = ", ".join(map(str, DRAWN.reshape(-1)))
WEIGHTS = f"float[8,24] w = {{{NUMBERS}}}, float[24] b = {{{', '.join(map(str, DRAWN[0]))}}}"
QKV = "float[N,3,8] q, float[N,5,8] k, float[N,5,8] v"

FORMS = {
    "attention": f"""
        g (float[N,S,8] x) => (float[N,S,8] y) <{WEIGHTS}>
        {{ y = {MS}.Attention <num_heads = 2> (x, w, b) }}""",
    "with a mask": f"""
        g (float[N,3,8] x, bool[N,3] m) => (float[N,3,8] y) <{WEIGHTS}>
        {{ i = Cast <to = 6> (m)  y = {MS}.Attention <num_heads = 2> (x, w, b, i) }}""",
    "looking back": f"""
        g (float[N,S,8] x) => (float[N,S,8] y) <{WEIGHTS}>
        {{ y = {MS}.Attention <num_heads = 4, unidirectional = 1, scale = 0.3> (x, w, b) }}""",
    "with a bias of scores": f"""
        g (float[N,3,8] x, float[N,2,3,3] a) => (float[N,3,8] y) <{WEIGHTS}>
        {{ y = {MS}.Attention <num_heads = 2> (x, w, b, , , a) }}""",
    "of projections": f"""
        g ({QKV}) => (float[N,3,8] y) {{ y = {MS}.MultiHeadAttention <num_heads = 2> (q, k, v) }}""",
    "of projections with bias and mask": f"""
        g ({QKV}, bool[N,5] m) => (float[N,3,8] y) <{WEIGHTS}>
        {{ i = Cast <to = 6> (m)
           y = {MS}.MultiHeadAttention <num_heads = 2> (q, k, v, b, i) }}""",
}


@pytest.mark.parametrize("name", FORMS)
def test_it_is_what_onnxruntime_computes(name: str, tensorrt: Builder) -> None:
    before, after, report = rewrite(HEAD + FORMS[name], PASS)
    assert report.skipped == {}
    assert all(not node.domain for node in after.graph.node)
    assert_same_numbers(before, after, rtol=1e-4, atol=1e-5, dynamic=3)
    profiles = (profile_of(before),)
    assert (tensorrt.refusal(before, profiles=profiles) == "") == (name == "of projections")
    assert tensorrt.refusal(after, profiles=profiles) == ""


def test_an_older_model_is_raised() -> None:
    before, after, _ = rewrite(HEAD.replace("17", "11") + FORMS["with a mask"], PASS)
    assert after.opset_import[0].version >= 13
    assert_same_numbers(before, after, rtol=1e-4, atol=1e-5, dynamic=3)


REFUSALS = {
    "it goes on from keys and values of earlier steps": f"""
        g (float[1,3,8] x, float[2,1,2,4,4] p) => (float[1,3,8] y) <{WEIGHTS}>
        {{ [n] y = {MS}.Attention <num_heads = 2> (x, w, b, , p) }}""",
    "it turns queries and keys by their place (rotary embedding)": f"""
        g (float[1,3,8] x) => (float[1,3,8] y) <{WEIGHTS}>
        {{ [n] y = {MS}.Attention <num_heads = 2, do_rotary = 1> (x, w, b) }}""",
    "its mask is not [batch, keys]": f"""
        g (float[1,3,8] x, int32[1] m) => (float[1,3,8] y) <{WEIGHTS}>
        {{ [n] y = {MS}.Attention <num_heads = 2> (x, w, b, m) }}""",
    "its output `p` is read": f"""
        g (float[1,3,8] x) => (float[1,3,8] y, float[2,1,2,3,4] p) <{WEIGHTS}>
        {{ [n] y, p = {MS}.Attention <num_heads = 2> (x, w, b) }}""",
    "queries, keys and values are not three tensors of a known size of head": f"""
        g (float[1,3,2,3,4] q) => (float[1,3,8] y)
        {{ [n] y = {MS}.MultiHeadAttention <num_heads = 2> (q) }}""",
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_is_not_spelt_out_stays_and_says_why(reason: str) -> None:
    _, _, report = rewrite(HEAD + REFUSALS[reason], PASS)
    assert report.skipped == {"n": reason}
    assert not report.rewritten
