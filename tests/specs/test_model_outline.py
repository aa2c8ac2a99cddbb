from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from spec_file import write_model

from optc.specs.model_outline import MAX_BODIES, OutlineError, Value, read_outline


def written(folder: Path, model: onnx.ModelProto) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_the_outline_of_a_model(tmp_path: Path) -> None:
    outline = read_outline(write_model(tmp_path))
    assert outline.ir_version == 9
    assert outline.opsets == {"": 17}
    assert outline.inputs == [
        Value("images", TensorProto.FLOAT, ("batch", 3, "height", 32)),
        Value("ids", TensorProto.INT64, (None,)),
        Value("flag", TensorProto.BOOL, ()),
    ]
    assert outline.outputs[0] == Value("boxes", TensorProto.FLOAT, ("batch", "found"))
    assert outline.initialisers == {"w"}
    assert [(n.name, n.op_type, n.outputs, n.depth, n.index) for n in outline.nodes] == [
        ("/stem/Conv", "Conv", ("s",), 0, 0),
        ("/stem/Relu", "Relu", ("r",), 0, 1),
        ("", "GlobalAveragePool", ("p",), 0, 2),
        ("", "Constant", ("one",), 0, 3),
        ("/head/Add", "Add", ("a",), 0, 4),
        ("/head/If", "If", ("i",), 0, 5),
        ("/head/then/Exp", "Exp", ("t1",), 1, 0),
        ("", "Neg", ("e1",), 1, 0),
        ("/head/Flatten", "Flatten", ("boxes",), 0, 6),
        ("", "Identity", ("kept",), 0, 7),
    ]
    assert outline.nodes[4].inputs == ("p", "one")


def test_every_way_an_axis_is_unknown(tmp_path: Path) -> None:
    graph = helper.make_graph([], "g", [], [])
    value = graph.input.add(name="x")
    value.type.tensor_type.elem_type = TensorProto.FLOAT
    dims = value.type.tensor_type.shape.dim
    dims.add()
    dims.add(dim_param="?")
    dims.add(dim_param="")
    dims.add(dim_value=-1)
    dims.add(dim_value=0)
    dims.add(dim_param="n")
    graph.input.add(name="rankless").type.tensor_type.elem_type = TensorProto.FLOAT16
    graph.input.append(
        helper.make_tensor_sequence_value_info("several", TensorProto.FLOAT, shape=None)
    )
    outline = read_outline(written(tmp_path, helper.make_model(graph)))
    assert outline.inputs == [
        Value("x", TensorProto.FLOAT, (None, None, None, None, 0, "n")),
        Value("rankless", TensorProto.FLOAT16, None),
        Value("several", 0, None),
    ]


def test_functions_and_sparse_weights_are_seen(tmp_path: Path) -> None:
    dense = numpy_helper.from_array(np.ones(1, np.float32), "sparse_w")
    graph = helper.make_graph([], "g", [], [])
    graph.sparse_initializer.append(
        helper.make_sparse_tensor(dense, numpy_helper.from_array(np.zeros(1, np.int64)), [4])
    )
    function = helper.make_function(
        "my", "Twice", ["x"], ["y"], [helper.make_node("Mish", ["x"], ["y"])], []
    )
    model = helper.make_model(graph, functions=[function])
    model.opset_import.append(helper.make_opsetid("my", 3))
    outline = read_outline(written(tmp_path, model))
    assert outline.initialisers == {"sparse_w"}
    assert [(node.op_type, node.depth) for node in outline.nodes] == [("Mish", 1)]
    assert outline.opsets["my"] == 3


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a model",
        b"PK\x03\x04" + bytes(100),
        bytes(1000),
        b"\xff" * 1000,
        b"\x3a\x05\x0a",
        b"\x3a\x00",
        b"\x08" + b"\x80" * 20,
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    with pytest.raises(OutlineError):
        read_outline(path)


def test_a_damaged_model_is_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    path = write_model(tmp_path)
    whole = path.read_bytes()
    dice = random.Random(3)
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(dice.randint(1, 4)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        path.write_bytes(data[: dice.randint(1, len(data))] if dice.random() < 0.5 else data)
        try:
            assert read_outline(path).nodes is not None
        except OutlineError:
            continue


def test_nesting_without_end_is_refused(tmp_path: Path) -> None:
    body = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [], [])
    data = body.SerializeToString()
    for _ in range(MAX_BODIES + 1):  # protobuf itself refuses to write this: nested by hand
        data = _field(1, _field(5, _field(6, data)) + _field(4, b"If"))
    path = tmp_path / "m.onnx"
    path.write_bytes(_field(7, data) + _field(8, b"\x10\x11"))
    with pytest.raises(OutlineError, match="nested deeper"):
        _ = read_outline(path).nodes


def _field(number: int, data: bytes) -> bytes:
    length, size = b"", len(data)
    while size > 127:
        length += bytes([size & 127 | 128])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + data


def test_weights_are_skipped_not_read(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.zeros(50_000_000, np.uint8), "w")
    nodes = [helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"], name=f"n{i}") for i in range(5000)]
    path = written(tmp_path, helper.make_model(helper.make_graph(nodes, "g", [], [], [weight])))
    start = time.process_time()
    outline = read_outline(path)
    assert len(outline.nodes) == 5000
    assert outline.initialisers == {"w"}
    assert time.process_time() - start < 2  # some 0.05 s; looking at each byte takes far longer
