from __future__ import annotations

import numpy as np
import pytest
from builder_says import Builder
from graphs import parsed, rewrite, run

from optc.passes.decompose_compress import DecomposeCompress
from optc.passes.graph import export_model, import_model
from optc.passes.pipeline import optimise

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'


def compress(x: str, conditions: int | str, attributes: str, rank: int) -> str:
    shape = ",".join(f"d{axis}" for axis in range(rank))
    return (
        HEAD
        + f"""
        g (float[{x}] x, bool[{conditions}] condition) => (float[{shape}] y) {{
            [take] y = Compress {attributes} (x, condition)
        }}"""
    )


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    ("conditions", "attributes", "rank"),
    [(4, "<axis = 1>", 3), (3, "<axis = 1>", 3), (5, "<axis = -1>", 3), (40, "", 1), (7, "", 1)],
)
def test_it_takes_what_onnxruntime_takes(
    conditions: int, attributes: str, rank: int, share: float, tensorrt: Builder
) -> None:
    before, after, _ = rewrite(compress("2,4,5", conditions, attributes, rank), DecomposeCompress())
    rng = np.random.default_rng(conditions)
    x = rng.random((2, 4, 5), np.float32)
    inputs = {"x": x, "condition": rng.random(conditions) < share}
    expected, found = run(before, inputs)["y"], run(after, inputs)["y"]
    assert found.shape == expected.shape
    np.testing.assert_array_equal(found, expected)
    if share == 1.0:
        assert "Compress" in tensorrt.refusal(before)
        assert not tensorrt.refusal(after)


def test_a_dynamic_axis_needs_a_bound(tensorrt: Builder) -> None:
    before = parsed(compress("rows,3", "rows", "<axis = 0>", 2))
    graph = import_model(before)
    report = optimise(graph, [DecomposeCompress()], ranges={"rows": (1, 9)})
    assert not report.records[0].skipped
    after = export_model(graph, value_info=False)
    for rows in (1, 9):
        x = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
        inputs = {"x": x, "condition": np.arange(rows) % 2 == 0}
        np.testing.assert_array_equal(run(after, inputs)["y"], run(before, inputs)["y"])
    profile = {"x": ((1, 3), (4, 3), (9, 3)), "condition": ((1,), (4,), (9,))}
    assert not tensorrt.refusal(after, profiles=(profile,))


@pytest.mark.parametrize(
    ("x", "conditions", "reason"),
    [
        ("2,4,5", 6, "it may have more conditions than elements"),
        ("2,a,5", 4, "it may have more conditions than elements"),
        ("2,a,5", "a", "it has too many conditions, or any number"),
    ],
)
def test_what_is_left_and_why(x: str, conditions: int | str, reason: str) -> None:
    _, _, report = rewrite(compress(x, conditions, "<axis = 1>", 3), DecomposeCompress())
    assert report.skipped == {"take": reason}
