from __future__ import annotations

import numpy as np
import pytest
from builder_says import Builder
from graphs import parsed, rewrite, run
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from optc.passes.decompose_non_zero import DecomposeNonZero
from optc.passes.graph import export_model, import_model
from optc.passes.pipeline import optimise

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'


def non_zero(inputs: str, rank: int) -> str:
    return HEAD + f"g ({inputs} x) => (int64[{rank}, found] y) {{ [find] y = NonZero (x) }}"


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float16, np.int32, np.uint8, np.bool_]),
        hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4),
        elements=st.sampled_from([0, 1]),
    )
)
def test_it_finds_what_onnxruntime_finds(x: np.ndarray) -> None:
    names = {"float32": "float", "float16": "float16", "int32": "int32", "uint8": "uint8"}
    shape = ",".join(map(str, x.shape))
    source = non_zero(f"{names.get(x.dtype.name, 'bool')}[{shape}]", x.ndim)
    before, after, report = rewrite(source, DecomposeNonZero())
    assert "find" not in report.skipped
    np.testing.assert_array_equal(run(after, {"x": x})["y"], run(before, {"x": x})["y"])


def test_nan_and_minus_zero_are_told_apart() -> None:
    before, after, _ = rewrite(non_zero("float[6]", 1), DecomposeNonZero())
    x = np.array([np.nan, -0.0, 0.0, np.inf, 1e-45, -1], np.float32)
    assert run(after, {"x": x})["y"].tolist() == [[0, 3, 4, 5]]
    np.testing.assert_array_equal(run(after, {"x": x})["y"], run(before, {"x": x})["y"])


@pytest.mark.parametrize("rows", [0, 1, 3, 8])
def test_a_dynamic_axis_needs_a_bound(rows: int, tensorrt: Builder) -> None:
    before = parsed(non_zero("bool[3, rows]", 2))
    graph = import_model(before)
    report = optimise(graph, [DecomposeNonZero()], ranges={"rows": (0, 8)})
    assert not report.records[0].skipped
    after = export_model(graph, value_info=False)
    x = np.random.default_rng(rows).random((3, rows)) < 0.5
    np.testing.assert_array_equal(run(after, {"x": x})["y"], run(before, {"x": x})["y"])
    if rows == 8:
        profile = {"x": ((3, 0), (3, 4), (3, 8))}
        assert "NonZero" in tensorrt.refusal(before, profiles=(profile,))
        assert not tensorrt.refusal(after, profiles=(profile,))


@pytest.mark.parametrize("compute_capability", ["7.5", "8.6", "8.9"])
def test_tensorrt_takes_what_is_selected_on_to_a_product(
    compute_capability: str, tensorrt: Builder
) -> None:
    source = """
        g (float[50] x, float[50,8] rows) => (float16[found,4] y) {
            [limit] t = Constant <value_float = 0.5> ()
            [mask]  m = Greater (x, t)
            [find]  i = NonZero (m)
            [turn]  j = Transpose <perm = [1, 0]> (i)
            [take]  r = GatherND (rows, j)
            [half]  h = Cast <to = 10> (r)
            [ones]  w = ConstantOfShape <value = float16[1] {1}> (s)
            [prod]  y = MatMul (h, w)
        }"""
    source = source.replace("y) {", "y) <int64[2] s = {8, 4}> {")
    before, after, report = rewrite(HEAD + source, DecomposeNonZero())
    assert set(report.merged) >= {name for name in report.merged if name.startswith("find")}
    rng = np.random.default_rng(0)
    inputs = {"x": rng.random(50, np.float32), "rows": rng.random((50, 8), np.float32)}
    np.testing.assert_array_equal(run(after, inputs)["y"], run(before, inputs)["y"])
    assert "NonZero" in tensorrt.refusal(before, compute_capability=compute_capability)
    assert not tensorrt.refusal(after, compute_capability=compute_capability)


def test_the_output_keeps_its_name_and_the_bound_is_known_behind_it() -> None:
    _, after, _ = rewrite(non_zero("bool[5]", 1), DecomposeNonZero())
    assert [output.name for output in after.graph.output] == ["y"]
    assert sum(node.op_type == "If" for node in after.graph.node) == 3  # 5 is 101


def test_elements_that_nothing_bounds_are_left() -> None:
    _, _, report = rewrite(non_zero("bool[rows]", 1), DecomposeNonZero())
    assert report.skipped == {"find": "it looks at any number of elements"}


def test_too_many_elements_are_left() -> None:
    _, _, report = rewrite(non_zero("bool[1025, 1024]", 2), DecomposeNonZero())
    assert report.skipped == {"find": "it looks at 1049600 elements"}


def test_a_scalar_is_left() -> None:
    source = HEAD + "g (bool x) => (int64[a,b] y) { [find] y = NonZero (x) }"
    _, _, report = rewrite(source, DecomposeNonZero())
    assert report.skipped == {"find": "its input is a scalar: no axis that an index could be along"}


def test_one_in_a_body_is_left() -> None:
    source = """
        g (bool c, bool[4] x) => (int64[1,n] y) {
            [if] y = If (c) <
                then_branch = t () => (int64[1,a] p) { [find] p = NonZero (x) },
                else_branch = e () => (int64[1,b] q) { [other] q = NonZero (x) }
            >
        }"""
    _, _, report = rewrite(HEAD + source, DecomposeNonZero())
    assert set(report.skipped) == {"find", "other"}
    assert not report.merged
