"""A part computes what the whole does there, wherever it is cut."""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter
from pathlib import Path

import networkx as nx
import numpy as np
import onnx
from generated import BATCH, models
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from onnx import ModelProto

from optc.optimizer.cut import cut_asked
from optc.optimizer.part import Lead, part_of
from optc.optimizer.reference import ORT_ERRORS, Model, Rejected
from optc.passes.graph import dataflow, import_model
from optc.specs.check import check
from optc.specs.diagnostic import SpecError

SETTINGS = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
came_of: Counter[str] = Counter()


@SETTINGS
@given(model=models(), seed=st.integers(0, 2**31))
def check_a_cut(model: ModelProto, seed: int) -> None:
    chosen = random.Random(seed)
    for index, node in enumerate(model.graph.node):
        node.name = f"n{index}"
    note(onnx.printer.to_text(model))
    view = dataflow(import_model(model))
    if not view:
        return
    first = chosen.choice(sorted(view))  # all that is on a way from one node to another
    last = chosen.choice(sorted({first, *nx.descendants(view, first)}))
    inside = {first, *nx.descendants(view, first)} & {last, *nx.ancestors(view, last)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        onnx.save(model, path)
        spec = Path(folder) / "spec.json"
        partition = {"scopes": {"part": sorted(inside)}}
        axes = [
            dim.dim_param or f"{given.name}_{axis}"
            for given in model.graph.input
            for axis, dim in enumerate(given.type.tensor_type.shape.dim)
            if not dim.HasField("dim_value")
        ]
        dims = dict.fromkeys(axes, BATCH)
        spec.write_text(
            json.dumps({"version": 1, "model": "m.onnx", "dims": dims, "partition": partition})
        )
        _compare(spec, path)


def _compare(spec: Path, path: Path) -> None:
    try:
        part = part_of(check(spec), "part")
    except SpecError as error:
        came_of.update(each.code for each in error.diagnostics)
        return
    cut = cut_asked(part)
    assert cut is not None
    assert part.part is not None
    rng = np.random.default_rng(0)
    whole = {
        "x": rng.uniform(-2, 2, (BATCH, 3, 4)).astype(np.float32),
        "z": rng.uniform(-2, 2, (3, 2)).astype(np.float32),
        "flag": np.array(True),
    }
    whole = {tensor.name: whole[tensor.name] for tensor in part.part.original_inputs}
    try:
        expected = Model(path).variant(list(cut.outputs)).run(whole)
    except (*ORT_ERRORS, Rejected):
        came_of["not for ONNX Runtime"] += 1
        return
    feeds = Lead(part.part, list(part.inputs), path, (), {}).feeds(whole)
    found = Model(path, cut=cut).runner.run(feeds)
    assert list(found) == list(cut.outputs)
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    came_of["the same"] += 1


def test_what_is_cut_out_computes_what_the_whole_does() -> None:
    came_of.clear()
    check_a_cut()
    assert came_of["the same"] > 30, came_of
