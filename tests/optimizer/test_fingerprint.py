from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser

from optc.optimizer.fingerprint import Fingerprint

HEAD = '<ir_version: 10, opset_import: ["" : 17]>'
SQUEEZE = """
    g (float[batch,1,3] x, float[batch,1,3] y) => (float[batch,3] z)
    <int64[1] one = {1}, float[3] scale = {1, 2, 3}> {
        [flat] a = Squeeze (x, one)
        [other] b = Squeeze (y, one)
        [sum] c = Add (a, b)
        [act] d = LeakyRelu <alpha = 0.5> (c)
        [last] z = Mul (d, scale)
    }"""


def digest(text: str, *, weights: bool = False) -> bytes:
    return Fingerprint(parser.parse_model(HEAD + text), weights=weights).digest


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[flat]", "[squeeze_1]"),
        ("x", "input.1"),
        ("one", "axes"),
        ("batch", "n"),
        ("g (", "main_graph ("),
    ],
)
def test_a_model_with_other_names_has_the_same_fingerprint(old: str, new: str) -> None:
    renamed = SQUEEZE.replace(old, f'"{new}"' if "." in new else new)
    assert renamed != SQUEEZE
    assert digest(renamed) == digest(SQUEEZE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("alpha = 0.5", "alpha = 0.25"),
        ("LeakyRelu <alpha = 0.5>", "Elu <alpha = 0.5>"),
        ("float[batch,1,3] y", "float16[batch,1,3] y"),
        ("float[batch,1,3] y", "float[other,1,3] y"),
        ("float[batch,1,3] y", "float[7,1,3] y"),
        ("float[batch,1,3] y)", "float[batch,1,3] y, int64[1] one)"),
        ("int64[1] one = {1}", "int64[1] one = {2}"),
        ("{1, 2, 3}", "{1, 2, 4}"),
        ("Add (a, b)", "Add (b, a)"),
        ("Add (a, b)", "Add (a, a)"),
    ],
)
def test_whatever_an_answer_can_depend_on_makes_another_fingerprint(old: str, new: str) -> None:
    changed = SQUEEZE.replace(old, new)
    if "int64[1] one)" in new:  # computed elsewhere, no longer constant
        changed = changed.replace("int64[1] one = {1}, ", "")
    assert changed != SQUEEZE
    assert digest(changed) != digest(SQUEEZE)


def test_the_opset_and_the_ir_version_count() -> None:
    for head in (HEAD.replace("17", "18"), HEAD.replace("10", "9")):
        other = parser.parse_model(head + SQUEEZE)
        assert Fingerprint(other).digest != digest(SQUEEZE)


def with_constant(
    values: np.ndarray[tuple[int, ...], np.dtype[np.generic]], *, scale: bool = False
) -> onnx.ModelProto:
    constant = numpy_helper.from_array(values, "w")
    if scale:
        x = helper.make_tensor_value_info("x", onnx.TensorProto.INT8, [2, len(values)])
        node = helper.make_node("DequantizeLinear", ["x", "w"], ["y"], name="dq", axis=1)
    else:
        x = helper.make_tensor_value_info("x", constant.data_type, list(values.shape))
        node = helper.make_node("Add", ["x", "w"], ["y"], name="add")
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    return helper.make_model(helper.make_graph([node], "g", [x], [y], [constant]))


LARGE = np.arange(1000)


def differ(values: np.ndarray[tuple[int, ...], np.dtype[np.generic]], **rest: bool) -> bool:
    """Return whether one value of a constant of a model makes another fingerprint."""
    other = values.copy()
    other[-1] = 3
    scale = rest.pop("scale", False)
    return (
        Fingerprint(with_constant(values, scale=scale), **rest).digest
        != Fingerprint(with_constant(other, scale=scale), **rest).digest
    )


def test_of_large_constants_those_values_count_that_tensorrt_looks_at() -> None:
    assert not differ(LARGE.astype(np.float32))
    assert not differ(LARGE.astype(np.int8).repeat(2))
    assert differ(LARGE.astype(np.int64))  # sizes and indices
    assert differ(LARGE.astype(np.float32), scale=True)  # a scale has to be above zero
    assert differ(LARGE[:10].astype(np.float32))  # may be anything


def test_all_values_count_where_weights_do() -> None:
    assert differ(LARGE.astype(np.float32), weights=True)
    assert differ(LARGE.astype(np.int8).repeat(2), weights=True)


def in_file(location: str) -> onnx.ModelProto:
    model = with_constant(LARGE.astype(np.float32))
    [tensor] = model.graph.initializer
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return model


def test_values_in_a_file_are_told_apart_by_who_wrote_them_and_never_read() -> None:
    one, same, other = (
        Fingerprint(
            in_file(location),
            weights=True,
            digest_of=lambda t: t.external_data[0].value[:1].encode(),
        )
        for location in ("a1", "a2", "b1")
    )
    assert one.digest == same.digest != other.digest
    assert one.complete
    # Where nobody knows them they hold for as long as the file is what it is.
    unknown = Fingerprint(in_file("a1"), weights=True)
    assert not unknown.complete
    assert unknown.digest != Fingerprint(in_file("a2"), weights=True).digest
    assert Fingerprint(in_file("a1")).digest == Fingerprint(in_file("a2")).digest
    assert Fingerprint(in_file("a1")).complete


def test_names_in_a_text_are_those_of_the_other_model() -> None:
    first = Fingerprint(parser.parse_model(HEAD + SQUEEZE.replace("flat", "squeeze_1")))
    second = Fingerprint(parser.parse_model(HEAD + SQUEEZE.replace("flat", '"/head/Squeeze"')))
    said = "squeeze_1: an error at squeeze_1_41, not at squeeze_12 or 17 (a.cpp:7)"
    plain = first.without_names(said)
    assert "squeeze_1:" not in plain
    assert first.with_names(plain) == said
    assert (
        second.with_names(plain)
        == "/head/Squeeze: an error at /head/Squeeze_41, not at squeeze_12 or 17 (a.cpp:7)"
    )


def test_words_and_numbers_are_not_taken_for_names() -> None:
    text = "add is not supported for x of rank 1"
    assert Fingerprint(with_constant(LARGE)).without_names(text) == text
