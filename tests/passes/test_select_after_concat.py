from __future__ import annotations

import numpy as np
import pytest
from builder_says import Builder
from graphs import rewrite, run
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.passes.select_after_concat import SelectAfterConcat

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
COUNT = 12


def group(name: str, places: int = 5) -> str:
    """Return what an exporter makes of one class: the best of those above a threshold."""
    return f"""
        [g{name}] m{name} = Greater (s{name}, limit)
        [nz{name}] n{name} = NonZero (m{name})
        [tr{name}] i{name} = Transpose <perm = [1, 0]> (n{name})
        [gs{name}] v{name} = GatherND (s{name}, i{name})
        [gb{name}] b{name} = GatherND (boxes, i{name})
        [sh{name}] e{name} = Shape (v{name})
        [mi{name}] k{name} = Min (e{name}, most{places})
        [tk{name}] t{name}, r{name} = TopK (v{name}, k{name})
        [ga{name}] c{name} = Gather (b{name}, r{name})
        [st{name}] f{name} = Shape (t{name})
        [cs{name}] l{name} = ConstantOfShape <value = int64[1] {{{name}}}> (f{name})"""


def detector(extra: str = "", outputs: str = "") -> str:
    return (
        HEAD
        + f"""
        g (float[{COUNT}] s1, float[{COUNT}] s2, float[{COUNT},4] boxes)
            => (float[n] score, float[n,4] box, int64[n] label{outputs})
        <float limit = {{0.5}}, int64[1] most5 = {{5}}, int64[1] most3 = {{3}}>
        {{ {group("1")} {group("2", 3)}
            [score] score = Concat <axis = 0> (t1, t2)
            [box] box = Concat <axis = 0> (c1, c2)
            [label] label = Concat <axis = 0> (l1, l2) {extra}
        }}"""
    )


SCORE = st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.75, 1.0, np.inf, -np.inf, np.nan])


@settings(deadline=None, max_examples=60)
@given(st.lists(SCORE, min_size=2 * COUNT, max_size=2 * COUNT))
def test_the_same_are_selected_in_the_same_order(scores: list[float]) -> None:
    before, after, _ = rewrite(detector(), SelectAfterConcat())
    inputs = {
        "s1": np.array(scores[:COUNT], np.float32),
        "s2": np.array(scores[COUNT:], np.float32),
        "boxes": np.arange(COUNT * 4, dtype=np.float32).reshape(COUNT, 4),
    }
    found = run(after, inputs)
    for name, expected in run(before, inputs).items():
        assert found[name].dtype == expected.dtype
        np.testing.assert_array_equal(found[name], expected)


def test_one_extent_is_left_for_all_groups(tensorrt: Builder) -> None:
    before, after, report = rewrite(detector(), SelectAfterConcat())
    ops = [node.op_type for node in after.graph.node]
    assert "NonZero" not in ops
    assert ops.count("If") == 4  # 5 and 3 places are 8 at most, 1000
    assert not report.skipped
    assert "NonZero" in tensorrt.refusal(before)
    assert not tensorrt.refusal(after)


def test_fewer_scores_than_places_are_all_there_are() -> None:
    text = detector().replace("most5 = {5}", "most5 = {50}")
    before, after, _ = rewrite(text, SelectAfterConcat())
    inputs = {
        "s1": np.linspace(0, 1, COUNT, dtype=np.float32),
        "s2": np.ones(COUNT, np.float32),
        "boxes": np.zeros((COUNT, 4), np.float32),
    }
    for name, expected in run(before, inputs).items():
        np.testing.assert_array_equal(run(after, inputs)[name], expected)


@pytest.mark.parametrize(
    ("extra", "outputs"),
    [
        ("[more] z = Neg (v1)", ", float[z0] z"),  # what is selected has another reader
        ("[more] z = Identity (e2)", ", int64[1] z"),  # so has its extent
        ("", ", int64[a] r1"),  # the caller reads which are the best
        ("[more] z = Concat <axis = 0> (t1, s1)", ", float[z0] z"),  # it is put to others
    ],
)
def test_what_is_read_otherwise_is_left(extra: str, outputs: str) -> None:
    _, after, report = rewrite(detector(extra, outputs), SelectAfterConcat())
    assert not report.merged
    assert sum(node.op_type == "NonZero" for node in after.graph.node) == 2


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Greater (s1, limit)", "Less (s1, limit)"),
        ("GatherND (s1, i1)", "GatherND (s2, i1)"),
        ("TopK (v1, k1)", "TopK <largest = 0> (v1, k1)"),
        ("Concat <axis = 0> (c1, c2)", "Concat <axis = 0> (c1, boxes)"),
    ],
)
def test_what_is_no_selection_of_the_best_is_left(old: str, new: str) -> None:
    assert detector().count(old) == 1
    _, _, report = rewrite(detector().replace(old, new), SelectAfterConcat())
    assert not report.merged


def test_one_group_alone_is_left() -> None:
    text = detector().replace("(t1, t2)", "(t1)").replace("(c1, c2)", "(c1)")
    _, _, report = rewrite(text.replace("(l1, l2)", "(l1)"), SelectAfterConcat())
    assert not report.merged
