"""Models made hard on purpose: the search keeps what low precision breaks, and little else.

What breaks a model is known by brute force: each node alone in low precision. In the end the model
is lowered as it was found, and the lowered model itself meets what was asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from graphs import run
from onnx import ModelProto, numpy_helper

from optc.optimizer.criteria import Criteria
from optc.optimizer.precision_measure import Sample
from optc.optimizer.precision_search import Candidate, Found, Problem, search
from optc.optimizer.simulation import simulated
from optc.optimizer.simulator import Simulator
from optc.passes.float_port import ports
from optc.passes.flops import flops
from optc.passes.graph import Array, export_model, import_model
from optc.passes.pipeline import optimise
from optc.passes.precision import Float, Lowering
from optc.passes.registry import lowerers
from optc.passes.shape import annotate, infer
from optc.specs.compile_spec import SearchLimits

HEAD = '<ir_version: 9, opset_import: ["" : 18]>\n'
MARGIN = SearchLimits().margin


@dataclass(frozen=True)
class Output:
    name: str
    dtype: str = "float32"
    shape: tuple[str | int, ...] | None = None


@dataclass
class Hard:
    """A model and its input, with all that a search asks of them."""

    model: ModelProto
    feeds: dict[str, Array]
    precision: Float = "fp16"

    def __post_init__(self) -> None:
        onnx.checker.check_model(self.model, full_check=True)
        self.graph = import_model(self.model)
        shapes = infer(self.graph)
        annotate(self.graph, shapes)
        counts = flops(self.graph, shapes, {})
        self.simulator = Simulator(self.graph, shapes, floats=self.precision)
        outputs = [Output(tensor.name) for tensor in self.graph.outputs]
        self.criteria = Criteria.of(None, self.precision, outputs)
        self.candidates = [
            self._candidate(node, counts[node.name])
            for node in self.graph.nodes
            if not isinstance(ports(node, _dtype_of, self.precision), str)
        ]

    def _candidate(self, node: gs.Node, count: int) -> Candidate:
        return Candidate(
            node.name,
            node.op,
            count,
            (self.precision, "fp32"),
            tuple(t.name for t in node.inputs if t.name and not isinstance(t, gs.Constant)),
            tuple(t.name for t in node.outputs),
        )

    def found(self, **limits: Any) -> Found:
        problem = Problem(
            self.simulator, [Sample("x", lambda: self.feeds)], self.criteria, self.candidates
        )
        return search(problem, SearchLimits(**limits))

    def badness(self, *names: str) -> float:
        """Return the error with these nodes alone in low precision."""
        reference = self.simulator.reference(self.feeds)
        found = self.simulator.run(reference, dict.fromkeys(names, self.precision))
        return self.criteria.badness(reference.outputs, found)

    def breaking(self) -> set[str]:
        """Return the nodes each of which breaks the model alone."""
        names = [candidate.name for candidate in self.candidates]
        return {name for name in names if self.badness(name) > MARGIN}

    def badness_when_lowered(self, found: Found) -> float:
        """Return the error of the model that the passes make of what was found."""
        graph = import_model(self.model)
        nodes = {n: p for n, p in found.nodes.items() if p != "fp32"}
        optimise(graph, lowerers(), lowering=Lowering(nodes, self.precision))
        model = export_model(graph)
        return self.criteria.badness(run(self.model, self.feeds), run(simulated(model), self.feeds))


def _dtype_of(tensor: gs.Tensor) -> np.dtype[Any] | None:
    return None if tensor.dtype is None else np.dtype(tensor.dtype)


def model_of(text: str, **weights: Array) -> ModelProto:
    """Return the model of a graph as text, with initialisers that are too large to be written."""
    model = onnx.parser.parse_model(HEAD + text)
    model.graph.initializer.extend(
        numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()
    )
    return model


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_keeps(hard: Hard, names: set[str], *, most_others: int = 0) -> Found:
    """Search, and hold what is kept against what breaks the model."""
    assert hard.breaking() == names
    found = hard.found()
    kept = {each.node for each in found.kept}
    assert found.met
    assert found.complete
    assert names <= kept
    assert len(kept - names) <= most_others
    assert hard.badness(*(c.name for c in hard.candidates if c.name not in kept)) <= MARGIN
    assert hard.badness_when_lowered(found) <= 1
    return found


def large_logits() -> Hard:
    text = """
    g (float[1,16,32] x) => (float[1,16,32] y)
    {
        [q] q = MatMul (x, wq)
        [k] k = MatMul (x, wk)
        [v] v = MatMul (x, wv)
        [turn] kt = Transpose <perm = [0, 2, 1]> (k)
        [scores] s = MatMul (q, kt)
        [shift] l = Add (s, shift)
        [softmax] p = Softmax <axis = -1> (l)
        [mix] y = MatMul (p, v)
    }"""
    weights = {f"w{name}": normal(32, 32, seed=i) * 0.12 for i, name in enumerate("qkv")}
    shift = 1000 + 3 * normal(16, 1)
    return Hard(model_of(text, **weights, shift=shift), {"x": normal(1, 16, 32, seed=5)})


def large_before_fused_norm() -> Hard:
    text = """
    g (float[1,16,32] x) => (float[1,16,32] y)
    {
        [product] a = MatMul (x, w)
        [relu] b = Relu (a)
        [offset] c = Add (b, offset)
        [norm] n = LayerNormalization <axis = -1> (c, gamma)
        [last] y = MatMul (n, v)
    }"""
    weights = {"w": normal(32, 32) / 6, "v": normal(32, 32, seed=1) / 6}
    vectors = {"offset": np.full(32, 1500.0), "gamma": np.ones(32)}
    return Hard(model_of(text, **weights, **vectors), {"x": normal(1, 16, 32, seed=2)})


def large_before_written_norm() -> Hard:
    text = """
    g (float[1,16,32] x) => (float[1,16,32] y)
    <float two = {2}, float eps = {0.001}, int64[1] last = {-1}>
    {
        [product] a = MatMul (x, w)
        [relu] b = Relu (a)
        [offset] c = Add (b, offset)
        [mean] m = ReduceMean (c, last)
        [centre] d = Sub (c, m)
        [square] e = Pow (d, two)
        [variance] f = ReduceMean (e, last)
        [eps] h = Add (f, eps)
        [sqrt] i = Sqrt (h)
        [divide] n = Div (d, i)
        [last] y = MatMul (n, v)
    }"""
    weights = {"w": normal(32, 32) / 6, "v": normal(32, 32, seed=1) / 6}
    offset = np.full(32, 1500.0)
    return Hard(model_of(text, **weights, offset=offset), {"x": normal(1, 16, 32, seed=2)})


def variance_of_large_values() -> Hard:
    text = """
    g (float[1,16,32] x) => (float[1,16,32] y)
    <float two = {2}, float eps = {0.001}, int64[1] last = {-1}>
    {
        [product] a = MatMul (x, w)
        [mean] m = ReduceMean (a, last)
        [centre] d = Sub (a, m)
        [square] e = Pow (d, two)
        [variance] f = ReduceMean (e, last)
        [eps] h = Add (f, eps)
        [sqrt] i = Sqrt (h)
        [divide] n = Div (d, i)
        [last] y = MatMul (n, v)
    }"""
    weights = {"w": 400 * normal(32, 32) / 6, "v": normal(32, 32, seed=1) / 6}
    return Hard(model_of(text, **weights), {"x": normal(1, 16, 32, seed=2)})


def exponentials() -> Hard:
    text = """
    g (float[4,32] x) => (float[4,1] y)
    <int64[1] last = {-1}>
    {
        [product] a = MatMul (x, w)
        [tanh] b = Tanh (a)
        [scale] c = Mul (b, scale)
        [exp] d = Exp (c)
        [sum] e = ReduceSum (d, last)
        [log] y = Log (e)
    }"""
    weights = {"w": normal(32, 32) / 6, "scale": np.full(32, 14.0)}
    return Hard(model_of(text, **weights), {"x": normal(4, 32, seed=2)})


def long_sum() -> Hard:
    text = """
    g (float[1,131072] x) => (float[1,1] y)
    <int64[1] last = {-1}, float scale = {0.00001}>
    {
        [sigmoid] a = Sigmoid (x)
        [double] b = Add (a, a)
        [sum] c = ReduceSum (b, last)
        [scale] d = Mul (c, scale)
        [tanh] y = Tanh (d)
    }"""
    return Hard(model_of(text), {"x": normal(1, 131072)})


def long_product() -> Hard:
    text = """
    g (float[2,131072] x) => (float[2,4] y)
    <float scale = {0.00001}>
    {
        [relu] a = Relu (x)
        [product] b = MatMul (a, w)
        [scale] c = Mul (b, scale)
        [tanh] y = Tanh (c)
    }"""
    weight = np.random.default_rng(1).uniform(1, 4, (131072, 4))
    return Hard(model_of(text, w=weight), {"x": normal(2, 131072)})


def overflow_in_one_channel() -> Hard:
    text = """
    g (float[1,3,16,16] x) => (float[1,8,16,16] y)
    {
        [first] a = Conv <pads = [1,1,1,1]> (x, w)
        [relu] b = Relu (a)
        [second] c = Conv <pads = [1,1,1,1]> (b, v)
        [scale] d = Mul (c, scale)
        [clip] e = Relu (d)
        [third] y = Conv <pads = [1,1,1,1]> (e, u)
    }"""
    v = normal(8, 8, 3, 3, seed=1) / 8
    v[5] = 30000 * np.abs(v[5])
    scale = np.ones((8, 1, 1))
    scale[5] = 1 / 30000
    weights = {"w": normal(8, 3, 3, 3) / 5, "v": v, "u": normal(8, 8, 3, 3, seed=3) / 8}
    return Hard(model_of(text, **weights, scale=scale), {"x": normal(1, 3, 16, 16, seed=2)})


def residual_with_outliers() -> Hard:
    """A channel of the residual stream grows, as in large language models, and a norm undoes it."""
    text = """
    g (float[1,16,32] x) => (float[1,16,32] y)
    {
        [up1] a = MatMul (x, w0)
        [act1] b = Relu (a)
        [down1] c = MatMul (b, d0)
        [add1] r = Add (x, c)
        [up2] e = MatMul (r, w1)
        [act2] f = Relu (e)
        [down2] g1 = MatMul (f, d1)
        [outlier] g2 = Mul (g1, outlier)
        [add2] s = Add (r, g2)
        [norm] n = LayerNormalization <axis = -1> (s, gamma)
        [head] y = MatMul (n, h)
    }"""
    outlier, gamma = np.ones(32), np.ones(32)
    outlier[7], gamma[7] = 6e4, 0.01
    weights = {name: normal(32, 32, seed=i) / 6 for i, name in enumerate(["w0", "d0", "w1", "d1"])}
    weights["d1"] *= 4
    model = model_of(text, **weights, h=normal(32, 32, seed=9), outlier=outlier, gamma=gamma)
    return Hard(model, {"x": normal(1, 16, 32, seed=2)})


BLOCKS = {
    "plain": """
        [{p}up] {p}a = MatMul ({x}, {p}w)
        [{p}act] {p}b = Relu ({p}a)
        [{p}down] {p}c = MatMul ({p}b, {p}v)
        [{p}add] {p}d = Add ({x}, {p}c)
        [{p}norm] {y} = LayerNormalization <axis = -1> ({p}d, ones)""",
    "logits": """
        [{p}scores] {p}a = MatMul ({x}, {p}w)
        [{p}shift] {p}b = Add ({p}a, thousand)
        [{p}softmax] {p}c = Softmax <axis = -1> ({p}b)
        [{p}mix] {p}d = MatMul ({p}c, {p}v)
        [{p}add] {y} = Add ({x}, {p}d)""",
    "offset": """
        [{p}up] {p}a = MatMul ({x}, {p}w)
        [{p}offset] {p}b = Add ({p}a, thousand)
        [{p}norm] {p}c = LayerNormalization <axis = -1> ({p}b, ones)
        [{p}down] {p}d = MatMul ({p}c, {p}v)
        [{p}add] {y} = Add ({x}, {p}d)""",
    "variance": """
        [{p}up] {p}a = MatMul ({x}, {p}w)
        [{p}scale] {p}b = Mul ({p}a, thousand)
        [{p}square] {p}c = Mul ({p}b, {p}b)
        [{p}variance] {p}d = ReduceMean ({p}c, last)
        [{p}sqrt] {p}e = Sqrt ({p}d)
        [{p}divide] {p}f = Div ({p}b, {p}e)
        [{p}down] {p}g = MatMul ({p}f, {p}v)
        [{p}add] {y} = Add ({x}, {p}g)""",
    "exponential": """
        [{p}up] {p}a = MatMul ({x}, {p}w)
        [{p}twelve] {p}b = Add ({p}a, twelve)
        [{p}exp] {p}c = Exp ({p}b)
        [{p}sum] {p}d = ReduceSum ({p}c, last)
        [{p}divide] {p}e = Div ({p}c, {p}d)
        [{p}mix] {p}f = MatMul ({p}e, {p}v)
        [{p}add] {y} = Add ({x}, {p}f)""",
}


def deep(kinds: list[str], *, precision: Float = "fp16", seed: int = 0) -> Hard:
    """Return blocks on top of each other; the name of a node starts with its block's number."""
    nodes, weights, value = "", {}, "x"
    for number, kind in enumerate(kinds):
        made = "y" if number == len(kinds) - 1 else f"x{number}"
        nodes += BLOCKS[kind].format(p=f"b{number}_", x=value, y=made)
        for k, name in enumerate("wv"):
            weights[f"b{number}_{name}"] = normal(32, 32, seed=100 * seed + 2 * number + k) / 6
        value = made
    text = f"""
    g (float[1,16,32] x) => (float[1,16,32] y)
    <float thousand = {{1500}}, float twelve = {{12}}, int64[1] last = {{-1}}>
    {{{nodes}
    }}"""
    model = model_of(text, **weights, ones=np.ones(32))
    return Hard(model, {"x": normal(1, 16, 32, seed=seed)}, precision)


def test_large_activations_before_a_softmax() -> None:
    found = assert_keeps(large_logits(), {"shift", "softmax"})
    assert all(each.measured for each in found.kept)


def test_large_activations_before_a_norm() -> None:
    assert_keeps(large_before_fused_norm(), {"offset", "norm"})


def test_large_activations_before_a_norm_that_is_written_out() -> None:
    assert_keeps(large_before_written_norm(), {"offset", "mean", "centre"})


def test_the_variance_of_large_values() -> None:
    found = assert_keeps(variance_of_large_values(), {"square", "variance", "eps", "sqrt"})
    assert all("fp16 ends at 65504" in each.why for each in found.kept)


def test_exponentials() -> None:
    assert_keeps(exponentials(), {"exp", "sum", "log"})


def test_long_reductions() -> None:
    assert_keeps(long_sum(), {"sum", "scale"})
    assert_keeps(long_product(), {"product", "scale"})


def test_overflow_in_one_channel() -> None:
    assert_keeps(overflow_in_one_channel(), {"second", "scale"})


def test_outliers_in_a_residual_stream() -> None:
    # The outlier leaves little of the other channels, so that the roundings before it count, too.
    hard = residual_with_outliers()
    names = {"outlier", "add2", "norm"}
    rest = {candidate.name for candidate in hard.candidates} - names
    assert hard.badness(*rest) > 1
    assert_keeps(hard, names, most_others=1)


HARD_BLOCKS: dict[Float, dict[str, set[str]]] = {
    "fp16": {
        "logits": {"shift", "softmax"},
        "offset": {"offset", "norm"},
        "variance": {"square", "variance", "sqrt"},
        "exponential": {"exp", "sum", "divide"},
    },
    # The range is that of fp32, so nothing overflows.
    "bf16": {
        "logits": {"shift", "softmax"},
        "offset": {"offset", "norm"},
        "variance": set(),
        "exponential": set(),
    },
}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize(
    "hard",
    [
        {0: "variance", 4: "exponential", 6: "offset"},
        {1: "variance", 2: "logits", 4: "exponential", 9: "offset"},
        {0: "logits", 11: "offset"},
        {},
    ],
    ids=lambda hard: "-".join(hard.values()) or "harmless",
)
def test_a_deep_model_with_few_hard_places(hard: dict[int, str], precision: Float) -> None:
    model = deep([hard.get(number, "plain") for number in range(12)], precision=precision)
    assert len(model.candidates) >= 59
    breaking = {
        f"b{number}_{name}"
        for number, kind in hard.items()
        for name in HARD_BLOCKS[precision][kind]
    }
    found = assert_keeps(model, breaking)
    assert found.runs <= 60


def test_what_int8_breaks_falls_back_to_fp16_and_then_to_fp32() -> None:
    """A channel of large numbers takes all steps of int8 from the others, another overflows fp16."""
    text = """
    g (float[1,8,16,16] x) => (float[1,8,16,16] y)
    {
        [plain1] a = Conv <pads = [1,1,1,1]> (x, w0)
        [relu1] b = Relu (a)
        [plain2] c = Conv <pads = [1,1,1,1]> (b, w1)
        [outlier] d = Mul (c, outlier)
        [coarse] e = Conv (d, w2)
        [relu2] f = Relu (e)
        [overflow] h = Conv <pads = [1,1,1,1]> (f, w3)
        [scale] i = Mul (h, scale)
        [plain3] y = Conv <pads = [1,1,1,1]> (i, w4)
    }"""
    weights = {f"w{n}": normal(8, 8, 3, 3, seed=n) / 8 for n in (0, 1, 3, 4)}
    outlier, scale = np.ones((8, 1, 1)), np.full((8, 1, 1), 1e-5)
    outlier[3] = 3000
    weights["w2"] = normal(8, 8, 1, 1, seed=2)
    weights["w2"][:, 3] /= 3000
    weights["w3"] *= 1e5 / 4
    model = model_of(text, **weights, outlier=outlier, scale=scale)
    feeds = {"x": normal(1, 8, 16, 16, seed=9)}
    hard = Hard(model, feeds)
    amax: dict[str, float] = {}
    names = [t.name for node in hard.graph.nodes for t in node.inputs]
    hard.simulator.tensors(feeds, names, lambda n, a: amax.update({n: float(np.abs(a).max())}))
    candidates = [
        replace(each, levels=("int8", *each.levels)) if each.op == "Conv" else each
        for each in hard.candidates
    ]
    simulator = Simulator(hard.graph, infer(hard.graph), floats="fp16", amax=amax)
    criteria = Criteria.of(None, "int8", [Output("y")])
    problem = Problem(simulator, [Sample("x", lambda: feeds)], criteria, candidates)
    found = search(problem, SearchLimits())
    kept = {each.node: each.precision for each in found.kept}
    assert kept == {"coarse": "fp16", "overflow": "fp32", "scale": "fp32"}
    assert {found.nodes[name] for name in ("plain1", "plain2", "plain3")} == {"int8"}
    assert found.met
    assert found.complete
