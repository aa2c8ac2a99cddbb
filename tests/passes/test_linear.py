"""Folding into linear nodes: what all passes that use it share, and generated graphs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from graphs import assert_same_numbers, rewrite, run, text
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, helper, numpy_helper

from optc.passes.fold_add_before_conv import FoldAddBeforeConv
from optc.passes.fold_add_before_gemm import FoldAddBeforeGemm
from optc.passes.fold_add_into_conv import FoldAddIntoConv
from optc.passes.fold_add_into_gemm import FoldAddIntoGemm
from optc.passes.fold_batchnorm_before_conv import FoldBatchnormBeforeConv
from optc.passes.fold_batchnorm_before_gemm import FoldBatchnormBeforeGemm
from optc.passes.fold_batchnorm_into_conv import FoldBatchnormIntoConv
from optc.passes.fold_batchnorm_into_gemm import FoldBatchnormIntoGemm
from optc.passes.fold_mul_before_conv import FoldMulBeforeConv
from optc.passes.fold_mul_before_gemm import FoldMulBeforeGemm
from optc.passes.fold_mul_into_conv import FoldMulIntoConv
from optc.passes.fold_mul_into_gemm import FoldMulIntoGemm
from optc.passes.graph import export_model, import_model
from optc.passes.pipeline import optimise

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
ALL = (
    FoldBatchnormIntoConv,
    FoldBatchnormIntoGemm,
    FoldMulIntoConv,
    FoldAddIntoConv,
    FoldMulIntoGemm,
    FoldAddIntoGemm,
    FoldBatchnormBeforeConv,
    FoldBatchnormBeforeGemm,
    FoldAddBeforeConv,
    FoldMulBeforeConv,
    FoldAddBeforeGemm,
    FoldMulBeforeGemm,
)

# --- shared weights ------------------------------------------------------------------------------


def test_shared_weights_are_folded_once_where_all_their_readers_get_the_same_scale() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[1,1,2,2] x, float[1,1,4,4] z) => (float[1,2,2,2] y, float[1,2,4,4] v)
        <float[2,1,1,1] w = {1, 2}, float[2] b = {10, 20}, float[2,1,1] s = {3, 5},
         float[1,2,1,1] t = {3, 5}>
        {
            [near] c = Conv (x, w, b)
            [mul]  y = Mul (c, s)
            [far]  d = Conv (z, w, b)
            [mul2] v = Mul (t, d)
        }""",
        FoldMulIntoConv(),
    )
    assert (
        text(after)
        == """\
g (float[1,1,2,2] x, float[1,1,4,4] z) => (float[1,2,2,2] y, float[1,2,4,4] v)
   <float[2,1,1,1] w =  {3,10}, float[2] "near.bias" =  {30,100}, float[2] b =  {30,100}>
{
   [near] y = Conv (x, w, "near.bias")
   [far] v = Conv (z, w, b)
}"""
    )
    assert report.merged == {"near": ("near", "mul"), "far": ("far", "mul2")}
    assert_same_numbers(before, after, rtol=1e-6)


SHARED = "the weights of the Conv are shared with another node"


OTHER_READERS = [
    "[far] d = Conv (x, w) [other] v = Mul (d, t)",  # another scale
    "[far] d = Conv (x, w) [other] v = Relu (d)",  # none
    "[far] v = Conv (x, w)",  # the caller reads it
    "[far] d = Conv (x, w) [two] e = Mul (d, s) [three] v = Add (d, e)",  # two read it
    "[far] d = Conv <group = 2> (z, w) [other] v = Mul (d, s)",  # laid out another way
    "[far] d = ConvTranspose (x, w) [other] v = Mul (d, s)",
    "[far] v = Add (x, w)",  # not as weights
    "[far] d = Conv (w, w) [other] v = Mul (d, s)",  # twice
]


def sharing(nodes: str) -> str:
    """Return a model with a Conv and a Mul, where ``nodes`` read the weights, too."""
    return (
        HEAD
        + f"""
        g (float[1,2,1,1] x, float[1,4,1,1] z) => (float[1,2,1,1] y, float[n,2,1,1] v)
        <float[2,2,1,1] w = {{1, 2, 3, 4}}, float[2,1,1] s = {{3, 5}}, float t = {{2}}>
        {{ [conv] c = Conv (x, w) [mul] y = Mul (c, s) {nodes} }}"""
    )


@pytest.fixture
def nothing_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all weights be too large to be copied."""
    monkeypatch.setattr("optc.passes.linear.COPIED_BYTES", 0)


@pytest.mark.usefixtures("nothing_copied")
@pytest.mark.parametrize("nodes", OTHER_READERS)
def test_shared_weights_are_left_alone_where_one_reader_would_not_get_the_scale(
    nodes: str,
) -> None:
    before, after, report = rewrite(sharing(nodes), FoldMulIntoConv())
    assert report.rewritten == 0
    assert report.skipped["mul"] == SHARED
    assert_same_numbers(before, after, rtol=0)


@pytest.mark.parametrize("nodes", OTHER_READERS)
def test_a_small_weight_is_copied_where_one_reader_would_not_get_the_scale(nodes: str) -> None:
    before, after, report = rewrite(sharing(nodes), FoldMulIntoConv())
    assert report.merged["conv"] == ("conv", "mul")
    assert_same_numbers(before, after, rtol=1e-6)


@pytest.mark.usefixtures("nothing_copied")
def test_shared_weights_are_left_alone_where_one_result_is_a_partition_point() -> None:
    _, _, report = rewrite(
        HEAD
        + """
        g (float[1,1,2,2] x) => (float[1,2,2,2] y, float[1,2,2,2] v)
        <float[2,1,1,1] w = {1, 2}, float s = {3}>
        {
            [near] c = Conv (x, w)
            [mul]  y = Mul (c, s)
            [far]  d = Conv (x, w)
            [mul2] v = Mul (d, s)
        }""",
        FoldMulIntoConv(),
        points=("d",),
    )
    assert report.skipped == {"mul": SHARED, "mul2": "the Conv output has another reader"}


@pytest.mark.usefixtures("nothing_copied")
def test_shared_weights_that_are_transposed_for_one_reader_are_left_alone() -> None:
    _, _, report = rewrite(
        HEAD
        + """
        g (float[N,2] x) => (float[N,2] y, float[N,2] v)
        <float[2,2] w = {1, 2, 3, 4}, float[2] s = {3, 5}>
        {
            [near] c = Gemm (x, w)
            [mul]  y = Mul (c, s)
            [far]  d = Gemm <transB = 1> (x, w)
            [mul2] v = Mul (d, s)
        }""",
        FoldMulIntoGemm(),
    )
    reason = "the weights of the Gemm are shared with another node"
    assert report.skipped == {"mul": reason, "mul2": reason}


@pytest.mark.usefixtures("nothing_copied")
def test_weights_that_another_product_adds_are_not_taken_for_its_weights() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[N,1] x) => (float[N,2] y, float[N,2] v)
        <float[1,2] w = {1, 2}, float[1,2] u = {7, 8}, float[2] s = {3, 5}>
        {
            [near] c = MatMul (x, w)
            [mul]  y = Mul (c, s)
            [far]  d = MatMul (x, u)
            [add]  e = Add (d, w)
            [mul2] v = Mul (e, s)
        }""",
        FoldMulIntoGemm(),
    )  # the bias of `far` is copied, and then nobody shares the weights of `near`
    assert (
        text(after)
        == """\
g (float[N,1] x) => (float[N,2] y, float[N,2] v)
   <float[1,2] w =  {3,10}, float[1,2] u =  {21,40}, float[2] "add.bias" =  {3,10}>
{
   [near] y = MatMul (x, w)
   [far] d = MatMul (x, u)
   [add] v = Add (d, "add.bias")
}"""
    )
    assert report.rewritten == 2
    assert_same_numbers(before, after, rtol=1e-6)


@pytest.mark.usefixtures("nothing_copied")
def test_weights_that_the_caller_reads_are_left_alone() -> None:
    _, after, report = rewrite(
        HEAD
        + """
        g (float[1,1,2,2] x) => (float[1,2,2,2] y, float[2,1,1,1] w)
        <float[2,1,1,1] w = {1, 2}, float s = {3}>
        { [conv] c = Conv (x, w) [mul] y = Mul (c, s) }""",
        FoldMulIntoConv(),
    )
    assert report.skipped == {"mul": SHARED}
    assert "float[2,1,1,1] w =  {1,2}" in text(after)


@pytest.mark.usefixtures("nothing_copied")
def test_a_reader_in_a_body_keeps_shared_weights_as_they_are() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[1,1,2,2] x, bool p) => (float[1,2,2,2] y, float[1,2,2,2] v)
        <float[2,1,1,1] w = {1, 2}, float s = {3}>
        {
            [conv] c = Conv (x, w)
            [mul]  y = Mul (c, s)
            [if] v = If (p) <
                then_branch = then () => (float[1,2,2,2] a) {
                    [inner]  d = Conv (x, w)
                    [inner2] a = Mul (d, s)
                },
                else_branch = other () => (float[1,2,2,2] o) { o = Concat <axis = 1> (x, x) }
            >
        }""",
        FoldMulIntoConv(),
    )
    assert report.skipped == {"mul": SHARED, "inner2": SHARED}
    assert_same_numbers(before, after, rtol=0)


# --- generated graphs ----------------------------------------------------------------------------

Array = Any


@dataclass
class Chain:
    """A model under construction: what `x` went through so far, and what it looks like."""

    seed: int
    dtype: Any
    channel_axis: int
    spatial: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    value: str = "x"

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def constant(self, values: Array) -> str:
        name = f"k{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(values.astype(self.dtype), name))
        return name

    def normal(self, *shape: int) -> str:
        return self.constant(self.rng.standard_normal(shape))

    def scale(self, *shape: int) -> str:
        """Return a constant away from 0: one may divide by it, and float16 keeps its digits."""
        return self.constant(self.rng.uniform(0.5, 2, shape) * self.rng.choice([-1, 1], shape))

    def add(self, op: str, *inputs: str, **attributes: Any) -> None:
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [f"v_{name}"], name, **attributes))
        self.value = f"v_{name}"

    def model(self, input_shape: list[Any], outputs: list[str]) -> ModelProto:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        rank = self.channel_axis + 1 + self.spatial
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("x", kind, input_shape)],
            [helper.make_tensor_value_info(name, kind, [None] * rank) for name in outputs],
            self.constants,
        )
        opset = helper.make_opsetid("", 17)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=9)
        onnx.checker.check_model(model)
        return model


def extend(chain: Chain, draw: st.DrawFn, channels: int, *, may_spoil: bool) -> None:
    """Add one node that computes scale * x + shift per channel, or one that only looks like it."""
    op = draw(st.sampled_from(["Mul", "Div", "Add", "Sub", "Neg", "BatchNormalization"]))
    if op == "Neg":
        chain.add(op, chain.value)
        return
    if op == "BatchNormalization" and chain.channel_axis == 1:
        names = [chain.scale(channels), chain.normal(channels), chain.normal(channels)]
        names.append(chain.constant(chain.rng.uniform(0.5, 2, channels)))
        chain.add(op, chain.value, *names, epsilon=draw(st.sampled_from([1e-5, 0.1])))
        return
    op = "Mul" if op == "BatchNormalization" else op
    forms = [(), (1,), (channels, *[1] * chain.spatial)]
    if chain.channel_axis == 1:
        forms.append((1, channels, *[1] * chain.spatial))
    if may_spoil:
        forms.append((2, *[1] * (chain.channel_axis + chain.spatial)))  # varies over the batch
    shape = draw(st.sampled_from(forms))
    constant = chain.scale(*shape) if op in {"Mul", "Div"} else chain.normal(*shape)
    turned = op != "Div" and draw(st.booleans())
    chain.add(op, *((constant, chain.value) if turned else (chain.value, constant)))


@st.composite
def chains(draw: st.DrawFn) -> tuple[ModelProto, bool]:
    """Draw a model around one linear node, and whether all that follows it can be folded."""
    op = draw(st.sampled_from(["Conv", "ConvTranspose", "Gemm", "MatMul"]))
    dtypes = [np.float32, np.float32, np.float16]
    dtype = draw(st.sampled_from(dtypes if "Conv" in op else [*dtypes, np.float64]))
    group = draw(st.integers(1, 3)) if "Conv" in op else 1
    reads, makes = group * draw(st.integers(1, 3)), group * draw(st.integers(1, 3))
    spatial = draw(st.integers(1, 3)) if "Conv" in op else 0
    stacked = op == "MatMul" and draw(st.booleans())
    seed = draw(st.integers(0, 2**32 - 1))
    chain = Chain(seed, dtype, channel_axis=2 if stacked else 1, spatial=spatial)
    spoils = draw(st.booleans())

    for _ in range(draw(st.integers(0, 2))):
        extend(chain, draw, reads, may_spoil=False)
    first = len(chain.nodes) if "Conv" in op else 0
    has_bias = draw(st.booleans())
    if "Conv" in op:
        kernel = [draw(st.integers(1, 2)) for _ in range(spatial)]
        form = (makes, reads // group) if op == "Conv" else (reads, makes // group)
        inputs = [chain.value, chain.scale(*form, *kernel)]
        chain.add(
            op,
            *inputs,
            *([chain.normal(makes)] if has_bias else []),
            group=group,
            strides=[draw(st.integers(1, 2)) for _ in range(spatial)],
            dilations=[draw(st.integers(1, 2)) for _ in range(spatial)],
            pads=[draw(st.integers(0, 1)) for _ in range(2 * spatial)]
            if draw(st.booleans())
            else None,
        )
    elif op == "Gemm":
        transposed = draw(st.booleans())
        weights = chain.scale(*((makes, reads) if transposed else (reads, makes)))
        form = draw(st.sampled_from([(), (1,), (makes,), (1, makes)]))
        chain.add(
            op,
            chain.value,
            weights,
            *([chain.normal(*form)] if has_bias else []),
            transB=int(transposed),
            alpha=draw(st.sampled_from([1.0, 0.5])),
            beta=draw(st.sampled_from([1.0, 2.0])),
        )
    else:
        chain.add(op, chain.value, chain.scale(reads, makes))
    outputs = [chain.value] if spoils and draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 4))):
        extend(chain, draw, makes, may_spoil=spoils)
    if chain.value not in outputs:
        outputs.append(chain.value)
    shape: list[Any] = ["batch", *(["rows"] if stacked else []), reads, *[5] * spatial]
    return chain.model(shape, outputs), not (spoils or first or stacked)


@settings(deadline=None, max_examples=120)
@given(chains())
def test_generated_chains_compute_the_same_and_fold_to_one_node(
    drawn: tuple[ModelProto, bool],
) -> None:
    before, is_foldable = drawn
    graph = import_model(before)
    optimise(graph, [each() for each in ALL])
    after = export_model(graph)
    onnx.checker.check_model(after)
    dtype = helper.tensor_dtype_to_np_dtype(before.graph.input[0].type.tensor_type.elem_type)
    rng = np.random.default_rng(0)
    shape = [d.dim_value or 2 for d in before.graph.input[0].type.tensor_type.shape.dim]
    inputs = {"x": rng.standard_normal(shape).astype(dtype)}
    for name, expected in run(before, inputs).items():
        found = run(after, inputs)[name]
        assert found.dtype == expected.dtype
        # Digits are lost where a sum is much smaller than its terms: the largest value is the scale
        scale = max(1.0, float(np.abs(expected.astype(np.float64)).max(initial=0)))
        digits = 0.02 if dtype == np.float16 else 2e-5
        np.testing.assert_allclose(found, expected, rtol=0, atol=digits * scale)
    if is_foldable:
        assert len(after.graph.node) == 1


# --- what is no linear node, or a broken one -----------------------------------------------------


def test_an_operator_of_another_domain_is_not_spoken_of() -> None:
    model = onnx.parser.parse_model(
        """
        <ir_version: 9, opset_import: ["" : 17, "com.example" : 1]>
        g (float[1,1,2,2] x) => (float[1,2,2,2] y, float[1,2,2,2] z)
        <float[2,1,1,1] w = {1, 2}, float s = {3}>
        {
            [conv]  c = com.example.Conv (x, w)
            [mul]   y = Mul (c, s)
            [conv2] d = Conv (x, w)
            [mul2]  z = com.example.Mul (d, s)
        }"""
    )
    report = optimise(import_model(model), [FoldMulIntoConv()]).records[0]
    assert report.merged == report.skipped == {}


@pytest.mark.parametrize(
    ("shape", "numbers", "group"), [("[3,1,1,1]", "1, 2, 3", 2), ("[0,1,1,1]", "", 1)]
)
def test_weights_that_no_conv_can_have_are_left_alone(shape: str, numbers: str, group: int) -> None:
    model = onnx.parser.parse_model(
        HEAD
        + f"""
        g (float[1,2,2,2] x) => (float[1,C,2,2] y)
        <float{shape} w = {{{numbers}}}, float s = {{3}}>
        {{ [conv] c = Conv <group = {group}> (x, w) [mul] y = Mul (c, s) }}"""
    )
    report = optimise(import_model(model), [FoldMulIntoConv()]).records[0]
    listed = shape.replace(",", ", ")
    assert report.skipped == {"mul": f"the weights of the Conv have the shape {listed}"}


# --- arithmetic ----------------------------------------------------------------------------------


def test_bfloat16_is_folded_in_double_and_rounded_once() -> None:
    chain = Chain(0, ml_dtypes.bfloat16, channel_axis=1, spatial=0)
    weights = chain.constant(np.array([[1.0078125, -3.0]]))
    bias = chain.constant(np.array([1.0, 256.0]))
    chain.add("Gemm", "x", weights, bias)
    chain.add("Mul", "v_n0", chain.constant(np.array([1.0078125, 2.0])))
    graph = import_model(chain.model(["n", 1], ["v_n1"]))
    optimise(graph, [FoldMulIntoGemm()])
    weight, shifted = (numpy_helper.to_array(t) for t in export_model(graph).graph.initializer)
    assert weight.dtype == shifted.dtype == ml_dtypes.bfloat16
    assert weight.astype(float).tolist() == [[1.015625, -6.0]]  # 1.01568603515625, rounded
    assert shifted.astype(float).tolist() == [1.0078125, 512.0]


def test_looking_at_weights_that_are_left_alone_keeps_no_copy_of_them() -> None:
    chain = Chain(0, np.float16, channel_axis=1, spatial=2)
    chain.add("Conv", "x", chain.constant(np.full((1, 1, 1, 1), 60000)))
    chain.add("Mul", "v_n0", chain.constant(np.array(2.0)))
    graph = import_model(chain.model(["n", 1, 2, 2], ["v_n1"]))
    report = optimise(graph, [FoldMulIntoConv()]).records[0]
    assert report.skipped == {"n1": "the folded weights do not fit float16"}
    assert not isinstance(graph.nodes[0].inputs[1]._values, np.ndarray)
