"""What is read, what is refused and how: no model file makes more than a `ModelError`."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser

from optc.optimizer.model_file import load_graph, read_model
from optc.passes.graph import all_tensors, export_model
from optc.specs.codes import CODES
from optc.specs.diagnostic import ModelError

LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"
HEAD = '<ir_version: 9, opset_import: ["" : 17]>\n'
SMALL = (
    HEAD
    + """
    g (float[batch,4] x, bool flag) => (float[batch,4] y)
    <float[4] w = {1, 2, 3, 4}>
    {
        t = Add (x, w)
        two = Constant <value = float[1] {2}> ()
        y = If (flag) <
            then_branch = a () => (float[batch,4] p) { p = Mul (t, two) },
            else_branch = b () => (float[batch,4] q) { q = Relu (t) }
        >
    }"""
)
CALLS = """
    <ir_version: 9, opset_import: ["" : 17, "local" : 1]>
    g (float[2] x) => (float[2] y) { y = local.twice <alpha = 0.5> (x) }
    <domain: "local", opset_import: ["" : 17, "local" : 1]>
    twice <alpha> (a) => (b) { t = LeakyRelu <alpha: float = @alpha> (a) b = local.once (t) }
    <domain: "local", opset_import: ["" : 17]>
    once (a) => (b) { b = Neg (a) }
"""


def model(source: str = SMALL) -> ModelProto:
    return parser.parse_model(source)


def saved(folder: Path, proto: ModelProto | bytes, name: str = "m.onnx") -> Path:
    path = folder / name
    path.write_bytes(proto if isinstance(proto, bytes) else proto.SerializeToString())
    return path


def loaded(folder: Path, proto: ModelProto) -> gs.Graph:
    return load_graph(read_model(saved(folder, proto)))


def refusal(path: Path) -> tuple[str, str]:
    """Return the code and text of the error that ``path`` is refused with."""
    with pytest.raises(ModelError) as caught:
        load_graph(read_model(path))
    assert {diagnostic.code for diagnostic in caught.value.diagnostics} <= CODES.keys()
    return caught.value.diagnostics[0].code, str(caught.value)


# --- what is read --------------------------------------------------------------------------------


def test_a_model_is_read_with_its_size_and_hash(tmp_path: Path) -> None:
    path = saved(tmp_path, model())
    file = read_model(path)
    assert file.bytes == path.stat().st_size
    assert file.sha256 == sha256(path.read_bytes()).hexdigest()
    graph = load_graph(file)
    assert [node.op for node in graph.nodes] == ["Add", "If"]
    onnx.checker.check_model(export_model(graph), full_check=True)


@pytest.mark.parametrize("opset", range(7, onnx.defs.onnx_opset_version() + 1))
def test_every_opset_from_7_on_is_read(tmp_path: Path, opset: int) -> None:
    proto = model(HEAD + "g (float[2] x) => (float[2] y) { y = Relu (x) }")
    proto.opset_import[0].version = opset
    graph = loaded(tmp_path, proto)
    assert graph.opset == opset
    onnx.checker.check_model(export_model(graph))


def test_old_models_get_a_newer_ir_version_and_lose_inputs_that_are_weights() -> None:
    file = read_model(LIGHT / "light_squeezenet.onnx")
    assert file.proto.ir_version == 3
    assert len(file.proto.graph.input) > 1
    graph = load_graph(file)
    assert [tensor.name for tensor in graph.inputs] == ["data_0"]
    assert export_model(graph).ir_version >= 8


def test_functions_are_inlined(tmp_path: Path) -> None:
    graph = loaded(tmp_path, model(CALLS))
    assert [(node.op, node.domain) for node in graph.nodes] == [("LeakyRelu", ""), ("Neg", "")]
    assert graph.nodes[0].attrs == {"alpha": 0.5}
    assert [entry.domain for entry in graph.import_domains] == [""]


def test_functions_are_inlined_around_weights(tmp_path: Path) -> None:
    proto = model(CALLS.replace("=> (float[2] y) {", "=> (float[2] y) <float[2] w = {3, 4}> {"))
    proto.graph.node[0].input[0] = "w"
    graph = loaded(tmp_path, proto)
    assert graph.nodes[0].inputs[0].values.tolist() == [3, 4]


def test_an_unsorted_graph_is_read(tmp_path: Path) -> None:
    proto = model(HEAD + "g (float[2] x) => (float[2] y) { t = Relu (x) y = Neg (t) }")
    proto.graph.node.reverse()  # ONNX Runtime takes such models
    assert [node.op for node in loaded(tmp_path, proto).nodes] == ["Relu", "Neg"]


def test_a_custom_op_is_read_and_its_domain_imported(tmp_path: Path) -> None:
    graph = loaded(tmp_path, model(HEAD + "g (float[2] x) => (float[2] y) { y = mine.Op (x) }"))
    assert {entry.domain: entry.version for entry in graph.import_domains} == {"": 17, "mine": 1}


def test_a_model_without_ops_of_onnx_itself_gets_an_opset(tmp_path: Path) -> None:
    proto = model(HEAD + "g (float[2] x) => (float[2] y) { y = com.microsoft.Gelu (x) }")
    proto.opset_import[0].domain = "com.microsoft"
    proto.opset_import[0].version = 1
    assert loaded(tmp_path, proto).opset == 17


def test_outputs_may_be_inputs_or_constants(tmp_path: Path) -> None:
    source = HEAD + "g (float[2] x) => (float[2] x, float[1] c) <float[1] c = {7}> {}"
    graph = loaded(tmp_path, model(source))
    assert graph.outputs[0] is graph.inputs[0]
    assert graph.outputs[1].values.tolist() == [7]


def test_an_output_without_a_declared_shape_is_read(tmp_path: Path) -> None:
    proto = model()
    proto.graph.output[0].ClearField("type")
    assert loaded(tmp_path, proto).outputs[0].name == "y"


def test_a_sparse_initialiser_is_read(tmp_path: Path) -> None:
    assert loaded(tmp_path, sparse([1, 6])).nodes[0].inputs[1].values.tolist() == [
        [0, 5, 0, 0],
        [0, 0, 6, 0],
    ]


def sparse(at: list[int], dims: tuple[int, ...] = (2, 4)) -> ModelProto:
    proto = model(HEAD + "g (float[2,4] x) => (float[2,4] y) { y = Add (x, w) }")
    proto.graph.sparse_initializer.append(
        helper.make_sparse_tensor(
            helper.make_tensor("w", TensorProto.FLOAT, [2], [5, 6]),
            helper.make_tensor("at", TensorProto.INT64, [len(at)], at),
            dims,
        )
    )
    return proto


# --- shapes from the spec ------------------------------------------------------------------------


def shapes(**axes: list[str | int]) -> dict[str, Any]:
    return {name: SimpleNamespace(shape=shape) for name, shape in axes.items()}


def test_axes_without_a_name_are_called_after_their_input(tmp_path: Path) -> None:
    proto = model(HEAD + "g (float[?,3,batch] x) => (float[?,3,batch] y) { y = Relu (x) }")
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = -1
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param in ("", "?")
    assert loaded(tmp_path, proto).inputs[0].shape == ["x_0", "x_1", "batch"]


def test_resolved_shapes_rename_and_pin_inside_too(tmp_path: Path) -> None:
    source = (
        HEAD
        + """g (float[n,s] x) => (float[n,s] y, float[m] z)
        <float[n,s,k] t> { t = mine.Op (x) y = mine.Op (t) z = mine.Op (t) }"""
    )
    file = read_model(saved(tmp_path, model(source)))
    graph = load_graph(file, shapes(x=["batch", 16]))
    assert graph.inputs[0].shape == ["batch", 16]
    assert graph.tensors()["t"].shape == ["batch", 16, "k"]
    assert graph.outputs[1].shape == ["m"]


def test_a_symbol_that_became_two_says_nothing_inside(tmp_path: Path) -> None:
    source = HEAD + "g (float[n] a, float[n] b) => (float[n] y) { y = mine.Op (a, b) }"
    graph = load_graph(read_model(saved(tmp_path, model(source))), shapes(a=["p"], b=["q"]))
    assert graph.outputs[0].shape == [None]


def test_a_symbol_of_the_inside_is_not_taken_for_a_new_one_of_an_input(tmp_path: Path) -> None:
    source = HEAD + "g (float[n] x) => (float[batch] y) { y = mine.Op (x) }"
    graph = load_graph(read_model(saved(tmp_path, model(source))), shapes(x=["batch"]))
    assert graph.outputs[0].shape == [None]


# --- files that are no model ---------------------------------------------------------------------


def archive(*names: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for name in names:
            file.writestr(name, b"1")
    return data.getvalue()


WHOLE = parser.parse_model(SMALL).SerializeToString()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "an empty file"),
        (bytes(1000), "a file of zeros"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "a PNG image"),
        (archive("archive/data.pkl", "archive/data/0"), "a PyTorch checkpoint"),
        (archive("a.npy"), "a NumPy archive"),
        (archive("config.json", "metadata.json", "model.weights.h5"), "a Keras model"),
        (archive("m.onnx"), "a zip archive"),
        (archive("m.onnx")[:40], "a zip archive that is cut short"),
        (b"\x80\x02}q\x00.", "a PyTorch checkpoint"),
        (gzip.compress(WHOLE), "a gzip archive"),
        (lzma.compress(WHOLE), "an xz archive"),
        (bz2.compress(WHOLE), "a bzip2 archive"),
        (b"\x1c\x00\x00\x00TFL3" + bytes(20), "TensorFlow Lite"),
        (b"\x40\0\0\0\0\0\0\0" + b'{"w":{"dtype":"F32"}}', "safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7\n", "`git lfs pull`"),
        (b"\x08\x01\x12\x05\x0a\x03\x12\x01a", "a TensorFlow SavedModel"),
        (b'{"irVersion": "8"}', "JSON"),
        (b'ir_version: 8\ngraph { name: "g" }\n', "ONNX as text"),
        (SMALL.encode(), "ONNX as text"),
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        ("Grüße\n".encode() * 1000, "a text file"),
        (b"\xc3\x28" * 50, "is not an ONNX file"),
    ],
)
def test_a_file_that_is_no_model_is_named(tmp_path: Path, data: bytes, words: str) -> None:
    code, text = refusal(saved(tmp_path, data))
    assert code == "not-onnx"
    assert words in text


def test_a_model_that_is_cut_short_is_called_damaged(tmp_path: Path) -> None:
    for size in (len(WHOLE) - 1, len(WHOLE) // 2, 40):
        assert refusal(saved(tmp_path, WHOLE[:size]))[0] == "damaged-model"


def test_what_is_no_file_is_refused_unread(tmp_path: Path) -> None:
    assert refusal(tmp_path / "missing.onnx")[0] == "model-not-found"
    assert refusal(saved(tmp_path, b"") / "below")[0] == "model-unreadable"
    os.mkfifo(tmp_path / "pipe")  # reading it would hang
    assert refusal(tmp_path / "pipe")[0] == "model-unreadable"
    (tmp_path / "circle").symlink_to("circle")
    assert refusal(tmp_path / "circle")[0] == "model-unreadable"


def test_a_folder_is_looked_into_for_the_model(tmp_path: Path) -> None:
    assert refusal(tmp_path)[0] == "model-unreadable"
    saved(tmp_path, model())
    assert f"do: give `{tmp_path / 'm.onnx'}`" in refusal(tmp_path)[1]
    saved(tmp_path, b"", "saved_model.pb")
    assert "TensorFlow SavedModel" in refusal(tmp_path)[1]


def test_a_file_beyond_what_protobuf_reads_is_refused_unread(tmp_path: Path) -> None:
    path = saved(tmp_path, WHOLE)
    os.truncate(path, 3 * 2**30)
    assert refusal(path)[0] == "model-too-large"


# --- models at fault -----------------------------------------------------------------------------

Change = Callable[[ModelProto], object]


def renamed(old: str, new: bytes) -> bytes:
    """Return the small model with the bytes of a name replaced by others of that length."""
    assert len(old) == len(new)
    return WHOLE.replace(b"\x01" + old.encode(), b"\x01" + new)


def deep(levels: int) -> bytes:
    """Return a model with If in If, put together as bytes: protobuf would refuse to build it."""

    def field(number: int, data: bytes) -> bytes:
        size, rest = b"", len(data)
        while rest > 127:
            size, rest = size + bytes([rest & 127 | 128]), rest >> 7
        return bytes([number << 3 | 2]) + size + bytes([rest]) + data

    graph = b""
    for _ in range(levels):
        attribute = field(1, b"then_branch") + field(6, graph) + b"\xa0\x01\x05"
        graph = field(1, field(4, b"If") + field(5, attribute))
    return b"\x08\x09" + field(7, graph) + field(8, b"\x10\x11")


FAULTS: dict[str, tuple[str, Change]] = {
    "opset 6": ("unsupported-opset", lambda m: setattr(m.opset_import[0], "version", 6)),
    "opset of the future": (
        "unsupported-opset",
        lambda m: setattr(m.opset_import[0], "version", onnx.defs.onnx_opset_version() + 1),
    ),
    "two opsets": (
        "unsupported-opset",
        lambda m: m.opset_import.append(helper.make_opsetid("ai.onnx", 13)),
    ),
    "no opset": ("damaged-model", lambda m: m.opset_import.pop()),
    "no opset for ONNX's own ops": (
        "unsupported-opset",
        lambda m: setattr(m.opset_import[0], "domain", "elsewhere"),
    ),
    "IR version of the future": (
        "unsupported-ir-version",
        lambda m: setattr(m, "ir_version", onnx.IR_VERSION + 1),
    ),
    "missing tensor": ("missing-tensor", lambda m: m.graph.node[0].input.append("nowhere")),
    "missing output": ("missing-tensor", lambda m: setattr(m.graph.output[0], "name", "nowhere")),
    "output without a name": ("missing-tensor", lambda m: setattr(m.graph.output[0], "name", "")),
    "cycle": ("cyclic", lambda m: m.graph.node[0].input.__setitem__(1, "y")),
    "node that reads itself": ("cyclic", lambda m: m.graph.node[0].input.__setitem__(1, "t")),
    "tensor made twice": ("made-twice", lambda m: m.graph.node.append(m.graph.node[0])),
    "initialiser twice": (
        "made-twice",
        lambda m: m.graph.initializer.append(m.graph.initializer[0]),
    ),
    "input twice": ("made-twice", lambda m: m.graph.input.append(m.graph.input[0])),
    "output twice": ("duplicate-output", lambda m: m.graph.output.append(m.graph.output[0])),
    "no outputs": ("no-outputs", lambda m: m.graph.output.pop()),
    "no graph": ("damaged-model", lambda m: m.ClearField("graph")),
    "input without a type": ("untyped-input", lambda m: m.graph.input[0].ClearField("type")),
    "unknown type of an input": (
        "damaged-model",
        lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 99),
    ),
    "unknown op": ("invalid-model", lambda m: setattr(m.graph.node[0], "op_type", "Addd")),
    "unknown attribute": (
        "invalid-model",
        lambda m: m.graph.node[0].attribute.append(helper.make_attribute("axis", 1)),
    ),
    "too many inputs": ("invalid-model", lambda m: m.graph.node[0].input.append("x")),
    "constant without a value": (
        "damaged-model",
        lambda m: m.graph.node[1].attribute[0].ClearField("t"),
    ),
    "constant of the wrong kind": (
        "damaged-model",
        lambda m: setattr(m.graph.node[1].attribute[0], "name", "value_float"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_model_is_refused(tmp_path: Path, fault: str) -> None:
    code, change = FAULTS[fault]
    proto = model()
    change(proto)
    assert refusal(saved(tmp_path, proto))[0] == code


def set_weight(**fields: Any) -> Change:
    def change(proto: ModelProto) -> None:
        proto.graph.initializer[0].CopyFrom(
            TensorProto(**{"name": "w", "dims": [4], "data_type": TensorProto.FLOAT, **fields})
        )

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_weight(raw_data=bytes(15)), "15 bytes of data, its shape [4] asks for 16"),
        (set_weight(raw_data=bytes(17)), "asks for 16"),
        (set_weight(float_data=[1.0] * 3), "3 values of data, its shape [4] asks for 4"),
        (set_weight(), "0 values"),
        (set_weight(dims=[-4], raw_data=bytes(16)), "the shape [-4]"),
        (
            set_weight(dims=[2**40, 2**40], raw_data=bytes(16)),
            "shape [1099511627776, 1099511627776]",
        ),
        (set_weight(dims=[2**40, 4], raw_data=bytes(16)), "asks for 17592186044416"),
        (set_weight(dims=[2**62, 0], raw_data=b""), "the shape [4611686018427387904, 0]"),
        (set_weight(data_type=0, raw_data=bytes(16)), "element type 0"),
        (set_weight(data_type=77, raw_data=bytes(16)), "element type 77"),
        (set_weight(data_type=TensorProto.STRING, string_data=[b"a"]), "1 strings"),
        (set_weight(data_type=TensorProto.COMPLEX64, float_data=[1.0] * 4), "asks for 8"),
        (set_weight(data_type=TensorProto.INT4, dims=[3], raw_data=b"\x12"), "asks for 2"),
        (set_weight(raw_data=bytes(16), segment=TensorProto.Segment(begin=0, end=4)), "segment"),
    ],
)
def test_a_weight_that_is_not_whole_is_refused(tmp_path: Path, change: Change, words: str) -> None:
    proto = model()
    change(proto)
    code, text = refusal(saved(tmp_path, proto))
    assert code == "damaged-model"
    assert "the initialiser `w`" in text
    assert words in text


def test_all_weights_at_fault_are_named_at_once(tmp_path: Path) -> None:
    proto = model()
    set_weight()(proto)
    proto.graph.node[1].attribute[0].t.dims[0] = 9
    with pytest.raises(ModelError) as caught:
        read_model(saved(tmp_path, proto))
    assert len(caught.value.diagnostics) == 2


def test_a_sparse_initialiser_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    for proto in (sparse([1, 8]), sparse([-1, 2]), sparse([1, 2], (2**32, 2**31)), sparse([1])):
        assert refusal(saved(tmp_path, proto))[0] == "damaged-model"


@pytest.mark.parametrize("name", ["x", "t", "y", "a", "g"])
def test_names_that_are_no_text_are_refused(tmp_path: Path, name: str) -> None:
    code, text = refusal(saved(tmp_path, renamed(name, b"\xff")))
    assert code == "bad-name"
    assert r"b'\xff'" in text


@pytest.mark.parametrize("levels", [40, 10_000])
def test_absurd_nesting_is_refused(tmp_path: Path, levels: int) -> None:
    assert refusal(saved(tmp_path, deep(levels)))[0] == "damaged-model"


def test_functions_without_end_are_refused(tmp_path: Path) -> None:
    proto = model(CALLS)
    proto.functions[1].node[0].op_type = "twice"
    proto.functions[1].node[0].domain = "local"
    assert refusal(saved(tmp_path, proto))[0] == "recursive-function"

    head, _, _ = CALLS.partition("g (")
    source = head + "g (float[2] x) => (float[2] y) { y = local.f9 (x) }"
    for level in range(10):  # each calls the one before ten times
        call = f"local.f{level - 1}" if level else "Neg"
        calls = " ".join(f"t{index + 1} = {call} (t{index})" for index in range(10))
        source += f"""
            <domain: "local", opset_import: ["" : 17, "local" : 1]>
            f{level} (t0) => (t10) {{ {calls} }}"""
    code, text = refusal(saved(tmp_path, model(source)))
    assert code == "model-too-large"
    assert "11,111,111,111 nodes" in text


# --- external data -------------------------------------------------------------------------------


def external(folder: Path, location: str = "w.bin", **entries: str) -> Path:
    """Save the small model with its weight in ``w.bin`` and an entry that says ``location``."""
    proto = model()
    (weight,) = proto.graph.initializer
    (folder / "w.bin").write_bytes(bytes(8) + numpy_helper.to_array(weight).tobytes())
    set_weight(data_location=TensorProto.EXTERNAL)(proto)
    said = {"location": location, "offset": "8", "length": "16", **entries}
    for key, value in said.items():
        proto.graph.initializer[0].external_data.add(key=key, value=value)
    return saved(folder, proto)


def weight_of(path: Path) -> list[float]:
    values: list[float] = load_graph(read_model(path)).tensors()["w"].values.tolist()
    return values


def test_external_data_is_read_and_counted(tmp_path: Path) -> None:
    path = external(tmp_path)
    assert weight_of(path) == [1, 2, 3, 4]
    file = read_model(path)
    assert file.external == (tmp_path / "w.bin",)
    assert file.bytes == path.stat().st_size + 24


def test_external_data_may_be_below_the_folder_and_a_link_within_it(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    path = external(tmp_path, "sub/w.bin")
    (tmp_path / "sub/w.bin").symlink_to("../w.bin")
    assert weight_of(path) == [1, 2, 3, 4]


def test_a_model_that_is_a_link_may_have_its_data_where_it_is(tmp_path: Path) -> None:
    for folder in ("blobs", "snapshot"):
        (tmp_path / folder).mkdir()
    external(tmp_path / "blobs")
    for name in ("m.onnx", "w.bin"):
        (tmp_path / "snapshot" / name).symlink_to(f"../blobs/{name}")
    assert weight_of(tmp_path / "snapshot/m.onnx") == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"location": "../w.bin"}, "leads out of the model's folder"),
        ({"location": "sub/../../w.bin"}, "leads out of the model's folder"),
        ({"location": "/etc/hostname"}, "absolute path"),
        ({"location": "missing.bin"}, "cannot be read"),
        ({"location": ""}, "no usable location"),
        ({"location": "a" * 5000}, "cannot be read"),
        ({"location": "w.bin\0"}, "no usable location"),
        ({"location": "."}, "not a regular file"),
        ({"location": "pipe"}, "not a regular file"),
        ({"location": "out.bin"}, "a link out of the model's folder"),
        ({"location": "out/w.bin"}, "a link out of the model's folder"),
        ({"location": "device"}, "a link out of the model's folder"),
        ({"location": "circle"}, "w` has its data in `circle`"),
        ({"offset": "9"}, "at bytes 9 to 25, but that file has 24"),
        ({"offset": "-8"}, "is no number"),
        ({"offset": "8.5"}, "is no number"),
        ({"offset": "9" * 30}, "which no file reaches"),
        ({"length": "12"}, "has 12 bytes in `w.bin`, its shape [4] asks for 16"),
    ],
)
def test_external_data_that_is_elsewhere_or_not_whole_is_refused(
    tmp_path: Path, entries: dict[str, str], words: str
) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "model"
    outside.mkdir()
    folder.mkdir()
    (folder / "sub").mkdir()
    path = external(folder, **entries)
    for place in (outside, tmp_path):
        shutil.copy(folder / "w.bin", place)
    os.mkfifo(folder / "pipe")
    (folder / "out.bin").symlink_to(outside / "w.bin")
    (folder / "out").symlink_to(outside)
    (folder / "device").symlink_to("/dev/zero")
    (folder / "circle").symlink_to("circle")
    code, text = refusal(path)
    assert code == "external-data"
    assert words in text


def test_external_data_beyond_memory_is_not_read(tmp_path: Path) -> None:
    rows = 3 * 2**30 // 4096
    proto = model(HEAD + f"g (float[n,{rows}] x) => (float[n,1024] y) {{ y = MatMul (x, w) }}")
    proto.graph.initializer.add()
    set_weight(dims=[rows, 1024], data_location=TensorProto.EXTERNAL)(proto)
    proto.graph.initializer[0].external_data.add(key="location", value="w.bin")
    path = saved(tmp_path, proto)
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(3 * 2**30)  # a hole: it takes no space
    code = (
        "import sys; from pathlib import Path\n"
        "from optc.optimizer.model_file import load_graph, read_model\n"
        "graph = load_graph(read_model(Path(sys.argv[1])))\n"
        "assert graph.tensors()['w'].values.shape[1] == 1024\n"
        "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], check=True, capture_output=True, text=True
    )
    assert int(done.stdout) < 500 * 1024  # KiB


# --- whatever else -------------------------------------------------------------------------------

SEEDS = {
    "small": model().SerializeToString(),
    "functions": model(CALLS).SerializeToString(),
    "sparse": sparse([1, 6]).SerializeToString(),
    "squeezenet": (LIGHT / "light_squeezenet.onnx").read_bytes(),
}


def survives(path: Path) -> bool:
    """Whether the model is taken, and what was made of it can be used; else it is refused."""
    try:
        graph = load_graph(read_model(path))
    except ModelError:
        return False
    for tensor in all_tensors(graph).values():
        if isinstance(tensor, gs.Constant):
            np.asarray(tensor.values)
    export_model(graph).SerializeToString()
    return True


@pytest.mark.parametrize("seed", SEEDS)
def test_bytes_changed_at_random_do_no_harm(tmp_path: Path, seed: str) -> None:
    rng = random.Random(seed)
    taken = 0
    for _ in range(150):
        data = bytearray(SEEDS[seed])
        match rng.randrange(4):
            case 0:
                del data[rng.randrange(len(data)) :]
            case 1:
                start = rng.randrange(len(data))
                del data[start : start + rng.choice([1, 2, 40])]
            case _:
                for _ in range(rng.choice([1, 1, 4])):
                    data[rng.randrange(len(data))] = rng.choice([0, 127, 128, 255, 10, 8])
        taken += survives(saved(tmp_path, bytes(data)))
    assert taken < 150


@pytest.mark.parametrize("seed", SEEDS)
def test_fields_changed_at_random_do_no_harm(tmp_path: Path, seed: str) -> None:
    rng = random.Random(seed)
    taken = 0
    for _ in range(150):
        proto = ModelProto.FromString(SEEDS[seed])
        for _ in range(rng.choice([1, 1, 2, 4])):
            change_a_field(proto, rng)
        taken += survives(saved(tmp_path, proto))
    assert 0 < taken < 150


def change_a_field(proto: ModelProto, rng: random.Random) -> None:
    """Remove, double or overwrite one field, anywhere in the model."""
    messages: list[Message] = []
    pending: list[Message] = [proto]
    while pending:
        message = pending.pop()
        messages.append(message)
        for field, value in message.ListFields():
            if field.message_type is not None:
                pending.extend(value if field.is_repeated else [value])
    message = rng.choice(messages)
    field = rng.choice(message.DESCRIPTOR.fields)
    if not field.is_repeated:
        if field.message_type is not None or rng.random() < 0.2:
            message.ClearField(field.name)
        else:
            setattr(message, field.name, value_for(field, rng))
        return
    values = getattr(message, field.name)
    if values and rng.random() < 0.5:
        del values[rng.randrange(len(values))]
    elif field.message_type is None:
        values.append(value_for(field, rng))
    elif values:
        copy = rng.choice(list(values)).SerializeToString()
        values.add().ParseFromString(copy)
    else:
        values.add()


def value_for(field: FieldDescriptor, rng: random.Random) -> Any:
    match field.type:
        case field.TYPE_STRING:
            return rng.choice(["", "x", "t", "y", "w", "Constant", "If", "ai.onnx", "../w", "?"])
        case field.TYPE_BYTES:
            return rng.randbytes(rng.randrange(20))
        case field.TYPE_FLOAT | field.TYPE_DOUBLE:
            return rng.choice([0.0, -1.0, float("nan"), float("inf")])
        case field.TYPE_ENUM:
            return rng.choice(list(field.enum_type.values_by_number))
        case field.TYPE_INT32:
            return rng.choice([0, 1, -1, 300, 2**31 - 1, -(2**31)])
        case field.TYPE_UINT64:
            return rng.choice([0, 1, 2**64 - 1])
        case _:
            return rng.choice([0, 1, -1, 3, 2**40, 2**63 - 1, -(2**63)])
