from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from optc.optimizer.hollow import LARGE, hollow

BIG = np.arange(LARGE, dtype=np.float32)
SMALL = np.arange(4, dtype=np.float32)


def model() -> ModelProto:
    """Return a model with large tensors as initialiser, as attribute, and inside a body."""
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(BIG + 1, "v"))
    body = helper.make_graph(
        [],
        "body",
        [],
        [helper.make_tensor_value_info("o", 1, None)],
        [numpy_helper.from_array(BIG + 2, "o")],
    )
    branch = helper.make_node("If", ["p"], ["i"], then_branch=body, else_branch=body)
    graph = helper.make_graph(
        [constant, branch],
        "g",
        [helper.make_tensor_value_info("p", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("i", 1, None)],
        [numpy_helper.from_array(BIG, "big"), numpy_helper.from_array(SMALL, "small")],
    )
    return helper.make_model(graph)


def tensors(proto: ModelProto) -> list[TensorProto]:
    branch = proto.graph.node[1].attribute[0].g
    return [proto.graph.initializer[0], proto.graph.node[0].attribute[0].t, branch.initializer[0]]


def test_large_tensors_refer_to_the_file_and_small_ones_stay(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(model(), path)
    data = path.read_bytes()
    found = hollow(memoryview(data), "m.onnx")
    assert found is not None
    assert len(found) < 2000
    hollowed = ModelProto.FromString(found)
    for index, tensor in enumerate(tensors(hollowed)):
        assert tensor.data_location == TensorProto.EXTERNAL
        np.testing.assert_array_equal(numpy_helper.to_array(tensor, str(tmp_path)), BIG + index)
    np.testing.assert_array_equal(numpy_helper.to_array(hollowed.graph.initializer[1]), SMALL)


def test_a_tensor_that_says_that_its_data_is_in_the_file_refers_to_it_too(tmp_path: Path) -> None:
    # ONNX Runtime's quantiser writes so, and of a field that stands twice the last one counts.
    proto = model()
    for tensor in tensors(proto):
        tensor.data_location = TensorProto.DEFAULT
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    found = hollow(memoryview(path.read_bytes()), "m.onnx")
    assert found is not None
    for index, tensor in enumerate(tensors(ModelProto.FromString(found))):
        assert tensor.data_location == TensorProto.EXTERNAL
        np.testing.assert_array_equal(numpy_helper.to_array(tensor, str(tmp_path)), BIG + index)


def test_all_but_the_weights_is_as_it_was(tmp_path: Path) -> None:
    original = model()
    found = hollow(memoryview(original.SerializeToString()), "m.onnx")
    assert found is not None
    hollowed = ModelProto.FromString(found)
    for proto in (original, hollowed):
        for branch in proto.graph.node[1].attribute:
            branch.g.initializer[0].Clear()
        for tensor in tensors(proto)[:2]:
            tensor.Clear()
    assert hollowed == original


def test_a_model_without_large_tensors_is_left_alone() -> None:
    small = helper.make_model(
        helper.make_graph([], "g", [], [], [numpy_helper.from_array(SMALL, "s")])
    )
    assert hollow(memoryview(small.SerializeToString()), "m.onnx") is None


@given(st.data())
def test_damaged_bytes_give_nothing_or_what_protobuf_reads(data: st.DataObject) -> None:
    damaged = bytearray(model().SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, 400))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    found = hollow(memoryview(bytes(damaged[:cut])), "m.onnx")
    assert found is None or len(found) < len(damaged)
