from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Literal, get_args, get_origin

import onnx
import pytest
from onnx import TensorProto, helper
from spec_file import HEAD, MODEL, RANGES, VALID, checked, codes, faults, rendered, write_model

from optc.specs.check import check, data_files
from optc.specs.codes import CODES
from optc.specs.compile_spec import Part, Range
from optc.specs.diagnostic import SpecError
from optc.specs.model_problem import ResolvedInput
from optc.specs.onnx_ops import ONNX_OPS
from optc.specs.schema_problem import _CHOICES, _EXAMPLES

pytestmark = pytest.mark.usefixtures("beside_model")

SHA = "0" * 64

# A spec for each code that is wrong in this way only.
MISTAKES = {
    "empty-spec": "",
    "yaml-syntax": VALID + "a: [",
    "several-documents": VALID + "---\na: 1\n",
    "nested-too-deep": VALID + "a: " + "[" * 50,
    "spec-too-large": VALID + "#" * 300_000,
    "not-text": VALID + "\x00",
    "duplicate-key": VALID + "version: 1\n",
    "bad-key": VALID + "[a]: 1\n",
    "tag": VALID + "gate: !!python/object {}\n",
    "unknown-anchor": VALID + "verify: {data: *npz}\n",
    "unknown-key": VALID + "gates: {}\n",
    "missing-key": "model: m.onnx\n" + RANGES,
    "empty-value": VALID + "gate:\n",
    "wrong-type": VALID + "passes: []\n",
    "wrong-length": VALID + "inputs: {images: {range: [1]}}\n",
    "out-of-range": VALID + "gate: {min_tensorrt_flops: 95}\n",
    "not-a-number": VALID + "verify: {atol: .nan}\n",
    "min-opt-max": HEAD + RANGES.replace("opt: 4", "opt: 9"),
    "range-order": VALID + "inputs: {images: {range: [1, 0]}}\n",
    "unknown-version": VALID.replace("1", "2", 1),
    "unknown-precision": VALID + "precision: fp32x\n",
    "unknown-backend": VALID + "targets: [{name: a, backend: trt}]\n",
    "unknown-runtime": VALID + "fallback: {runtime: tflite}\n",
    "unknown-choice": VALID + "verify: {detections: [{boxes: a, scores: b, format: xyxy}]}\n",
    "unknown-compute-capability": VALID + "targets: [{name: a, compute_capability: 8.7}]\n",
    "bad-sha256": VALID.replace("m.onnx", "{path: m.onnx, sha256: abc}"),
    "bad-target-name": VALID + "targets: [{name: a/b}]\n",
    "duplicate-target": VALID + "targets: [{name: a}, {name: A}]\n",
    "bad-selector": VALID + "partition: {off_tensorrt: [{}]}\n",
    "dims-and-profiles": VALID + "profiles: [{batch: 1, height: 32, ids_0: 5}]\n",
    "not-in-this-version": VALID + "fallback: {runtime: torch}\n",
    "unknown-option": VALID + "passes: {options: {fold-constants: {growth_byte: 1}}}\n",
    "unknown-pass": VALID + "passes: {disable: [fuse-gelo]}\n",
    "costs-not-found": VALID + "partition: {cost: {measured: costs.json}}\n",
    "not-costs": VALID + "partition: {cost: {measured: m.onnx}}\n",
    "no-data": VALID + "verify: {data: '*.npz'}\n",
    "no-calibration": VALID + "precision: int8\n",
    "model-not-found": VALID.replace("m.onnx", "n.onnx"),
    "model-unreadable": VALID.replace("m.onnx", "."),
    "sha256-mismatch": VALID.replace("m.onnx", f"{{path: m.onnx, sha256: '{SHA}'}}"),
    "unknown-input": VALID + "inputs: {image: {}}\n",
    "rank-mismatch": HEAD + "dims: {ids_0: 5}\ninputs: {images: {shape: [1, 3, 32]}}\n",
    "fixed-axis": VALID + "inputs: {images: {shape: [batch, 4, height, 32]}}\n",
    "axis-without-range": HEAD + RANGES.replace(", ids_0: 5", ""),
    "unknown-symbol": VALID.replace("ids_0", "many: 1, manny: 1, ids_0"),
    "unknown-tensor": VALID + "partition: {points: [rr]}\n",
    "bad-point": VALID + "partition: {points: [images]}\n",
    "bad-stage-name": VALID + "partition: {scopes: {the stem: /stem/*}}\n",
    "incomplete-output": VALID + "operators: [{op: a::B, outputs: [{dtype: bool}], torch: b.pt}]\n",
    "no-runner": VALID + "operators: [{op: a::B, outputs: [{like: 0}]}]\n",
    "two-runners": VALID
    + "operators: [{op: a::B, outputs: [{like: 0}], torch: b.pt, onnxruntime: b.so}]\n",
    "module-not-found": VALID
    + "partition: {replace: [{name: a, from: [s], to: [r], torch: a.pt}]}\n",
    "bad-replacement": VALID
    + "partition: {replace: [{name: a, from: [s, s], to: [r], torch: m.onnx}]}\n",
    "cannot-stay-whole": VALID + "partition: {keep_together: [[{op: Conv}, {op: Add}]]}\n",
    "group-across-scopes": VALID
    + "partition: {scopes: {a: /stem/*}, keep_together: [[{op: Relu}, {op: GlobalAveragePool}]]}\n",
    "node-in-two-scopes": VALID + "partition: {scopes: {a: /stem/*, b: /stem/Relu}}\n",
    "point-inside-stage": VALID + "partition: {points: [s], scopes: {a: /stem/*}}\n",
    "unknown-output": VALID + "verify: {outputs: {boxez: {atol: 1}}}\n",
    "not-for-this-output": VALID + "verify: {outputs: {boxes: {agreement: 1}}}\n",
    "unknown-op": VALID + "partition: {off_tensorrt: [{op: Convv}]}\n",
    "unknown-node": VALID + "partition: {off_tensorrt: [{node: /tail/*}]}\n",
}


@pytest.mark.parametrize("code", MISTAKES)
def test_each_mistake_has_its_code_and_no_other(code: str) -> None:
    assert codes(MISTAKES[code]) == [code]


def test_the_mistakes_are_all_there_are() -> None:
    elsewhere = {
        *("spec-not-found", "spec-unreadable", "json-syntax"),  # test_source
        *("input-without-shape", "op-not-in-model", "unused-calibration", "not-boxes"),  # below
        *("stages-in-a-circle", "point-is-no-cut"),  # test_stage_problem
    }
    from test_codes import codes_in

    checking = (
        *("source", "compile_spec", "schema_problem", "model_problem", "check"),
        *("stage_problem", "measured_cost", "replace_problem"),
    )
    used = {code for name in checking for code in codes_in(name)}
    assert used == elsewhere | MISTAKES.keys()
    assert used <= CODES.keys()


@pytest.mark.parametrize("code", [code for code in MISTAKES if code != "empty-spec"])
def test_each_mistake_has_a_place_in_the_file(code: str) -> None:
    (fault,) = faults(MISTAKES[code])
    if code == "spec-too-large":
        assert fault.place is None  # too large to be looked at
    else:
        assert fault.place is not None
        assert 1 <= fault.place.line <= MISTAKES[code].count("\n") + 1


def test_a_mistyped_pass() -> None:
    text = VALID + "passes:\n  disable:\n    - fold-constants\n    - fuse-gelo\n"
    assert (
        rendered(text)
        == """\
error[unknown-pass]: there is no pass called `fuse-gelo`
  --> spec.yaml:7:7
7 |     - fuse-gelo
  |       ^^^^^^^^^
  do: write `fuse-gelu`, or see all of them with `optc passes`"""
    )


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ("{fold-constants: {growth_bytes: 1000}}", None, ""),
        (
            "{fold-constants: {growth_bytes: 1.5}}",
            "wrong-type",
            "takes a whole number, not a number",
        ),
        ("{fold-constants: {growth_bytes: true}}", "wrong-type", "not true or false"),
        ("{fold-constants: {growth_bytes: -1}}", "out-of-range", "is -1"),
        ("{fold-constants: {growth_byte: 1}}", "unknown-option", "write `growth_bytes`"),
        ("{fuse-gelu: {tanh: true}}", "unknown-option", "it has no options"),
        ("{fuse-gelo: {}}", "unknown-pass", "write `fuse-gelu`"),
    ],
)
def test_options_of_passes_are_checked(options: str, code: str | None, words: str) -> None:
    text = VALID + f"passes: {{options: {options}}}\n"
    assert codes(text) == ([code] if code else [])
    assert words in rendered(text)


def test_a_mistyped_key() -> None:
    assert (
        rendered(VALID + "partition: {poinst: [r]}\n")
        == """\
error[unknown-key]: `partition` has no key `poinst`
  --> spec.yaml:4:13
4 | partition: {poinst: [r]}
  |             ^^^^^^
  do: write `points`"""
    )


def test_a_dynamic_axis_without_a_range() -> None:
    assert (
        rendered("version: 1\nmodel: m.onnx\ndims: {height: 32, ids_0: 5}\n")
        == """\
error[axis-without-range]: `batch` has no range: it is axis 0 of `images`
  --> spec.yaml:3:1
3 | dims: {height: 32, ids_0: 5}
  | ^^^^
  do: add `batch: {min: 1, opt: 4, max: 8}` to `dims`, or a number to pin it"""
    )


def test_dynamic_axes_without_any_ranges_get_one_line_to_add() -> None:
    todo = (
        "add the line `dims: {batch: {min: 1, opt: 4, max: 8}, "
        "height: {min: 320, opt: 640, max: 1280}, ids_0: {min: 1, opt: 4, max: 8}}`, "
        "with your numbers"
    )
    found = faults(HEAD)
    assert [(fault.code, fault.todo) for fault in found] == [("axis-without-range", todo)] * 3
    line = todo.removeprefix("add the line `").removesuffix("`, with your numbers")
    assert faults(HEAD + line + "\n") == ()


def test_a_mistyped_model() -> None:
    assert (
        rendered(VALID.replace("m.onnx", "n.onnx"))
        == """\
error[model-not-found]: there is no model n.onnx
  --> spec.yaml:2:8
2 | model: n.onnx
  |        ^^^^^^
  do: write `m.onnx`"""
    )


def test_a_range_in_the_wrong_order_with_tabs_and_other_scripts_before_it() -> None:
    text = HEAD + 'dims: {"größe":\t{min: 4, opt: 2, max: 8}, batch: 1, height: 1, ids_0: 1}\n'
    assert (
        rendered(text)
        == """\
error[min-opt-max]: min 4, opt 2, max 8 are not in ascending order
  --> spec.yaml:3:17
3 | dims: {"größe":\t{min: 4, opt: 2, max: 8}, batch: 1, height: 1, ids_0: 1}
  |                \t^^^^^^^^^^^^^^^^^^^^^^^^
  do: write `{min: 2, opt: 4, max: 8}`, if that is what is meant"""
    )


def test_text_for_a_number_and_a_number_for_text() -> None:
    found = faults(VALID.replace("height: 32", 'height: "32"') + "partition: {points: [495]}\n")
    assert [(fault.code, fault.todo) for fault in found] == [
        ("wrong-type", "write it without quotes: `32`"),
        ("wrong-type", 'put it in quotes: `"495"`'),
    ]


def test_all_problems_come_in_one_go_in_the_order_of_the_file() -> None:
    text = """\
version: 2
model: m.onnx
inputs:
  images: {shape: [batch, 3, height, 64], range: [0, .nan]}
  img: {}
dims:
  batch: {min: 1, opt: 4}
  heigth: 32
  ids_0: yes
targets:
  - {name: a, compute_capability: 8.8}
  - {nam: b}
precision: fp8
passes: {disable: [nothing]}
partition:
  points: [r, rr, 3]
  off_tensorrt: [{op: Rellu}, {node: /nothing}, {op: a, node: b}]
verify: {data: [1, no.npz]}
verify: {}
extra: 1
"""
    found = [(f.place.line if f.place else 0, f.code) for f in faults(text)]
    assert found == [
        (1, "unknown-version"),
        (4, "fixed-axis"),
        (4, "not-a-number"),
        (5, "unknown-input"),
        (6, "axis-without-range"),
        (7, "missing-key"),
        (8, "unknown-symbol"),
        (9, "wrong-type"),
        (11, "unknown-compute-capability"),
        (12, "unknown-key"),
        (13, "no-calibration"),
        (14, "unknown-pass"),
        (16, "unknown-tensor"),
        (16, "wrong-type"),
        (17, "unknown-op"),
        (17, "unknown-node"),
        (17, "bad-selector"),
        (18, "wrong-type"),
        (18, "no-data"),
        (19, "duplicate-key"),
        (20, "unknown-key"),
    ]


def test_what_is_faulty_is_not_missing_besides() -> None:
    assert codes(VALID.replace("model: m.onnx", "model: 3")) == ["wrong-type"]
    assert codes(VALID.replace("model:", "modle:")) == ["unknown-key"]
    assert codes(VALID.replace("dims:", "dim:")) == ["unknown-key"]
    assert codes(VALID.replace("dims: {", "dims: [{").replace("}\n", "}]\n")) == ["wrong-type"]
    assert codes(VALID + "inputs: {images: {shape: [a, b, c, 1.5]}}\n") == ["wrong-type"]
    assert codes(VALID + "targets: [{name: 3}]\n") == ["wrong-type"]
    assert codes(HEAD + "profiles: [{batch: x, height: 1, ids_0: 1}, 3]\n") == ["wrong-type"] * 2


def test_booleans_are_no_numbers() -> None:
    assert codes(VALID.replace("32", "true")) == ["wrong-type"]
    assert codes(VALID.replace("1", "true", 1)) == ["unknown-version"]
    assert codes(VALID + "gate: {max_engines: true}\n") == ["wrong-type"]
    assert codes(VALID + "inputs: {images: {shape: [true, 3, height, 32]}}\n") == ["wrong-type"]
    assert codes(VALID + "targets: [{name: a, compute_capability: true}]\n") == [
        "unknown-compute-capability"
    ]


@pytest.mark.parametrize("huge", ["1" + "0" * 30, "1" + "0" * 400, "9" * 5000])
def test_huge_numbers(huge: str) -> None:
    beyond = {"out-of-range", "not-a-number"}
    (code,) = codes(VALID.replace("32", huge))
    assert code in beyond
    (code,) = codes(VALID + f"gate: {{max_engines: {huge}}}\n")
    assert code in beyond
    (code,) = codes(VALID + f"verify: {{atol: -{huge}}}\n")
    assert code in beyond
    (code,) = codes(VALID + f"inputs: {{images: {{shape: [{huge}, 3, height, 32]}}}}\n")
    assert code in beyond


# ---------------------------------------------------------------------- what a right spec means


def test_inputs_and_ranges() -> None:
    spec = checked(VALID + "inputs: {images: {range: [-1, 1]}}\n")
    assert spec.inputs == {
        "images": ResolvedInput(TensorProto.FLOAT, ("batch", 3, 32, 32), (-1.0, 1.0)),
        "ids": ResolvedInput(TensorProto.INT64, (5,)),
        "flag": ResolvedInput(TensorProto.BOOL, ()),
    }
    assert list(spec.inputs) == ["images", "ids", "flag"]
    assert spec.profiles == ({"batch": Range(min=1, opt=4, max=8)},)
    assert spec.notes == ()
    assert spec.outline_ok
    assert spec.model_path == Path("m.onnx")
    assert spec.sha256 == hashlib.sha256(Path("spec.yaml").read_bytes()).hexdigest()


def test_axes_are_renamed_and_pinned() -> None:
    spec = checked(
        HEAD
        + "inputs: {images: {shape: [n, 3, 64, 32]}, ids: {shape: [n]}, flag: {shape: []}}\n"
        + "dims: {n: {min: 2, opt: 2, max: 3}}\n"
    )
    assert [value.shape for value in spec.inputs.values()] == [("n", 3, 64, 32), ("n",), ()]
    assert spec.profiles == ({"n": Range(min=2, opt=2, max=3)},)


def test_a_question_mark_and_minus_one_mean_the_axis_s_own_name() -> None:
    spec = checked(
        HEAD
        + 'inputs: {images: {shape: ["?", 3, -1, 32]}}\n'
        + "dims: {images_0: {min: 1, opt: 1, max: 2}, images_2: 16, ids_0: 1}\n"
    )
    assert spec.inputs["images"].shape == ("images_0", 3, 16, 32)


def test_profiles_pin_what_they_all_pin() -> None:
    spec = checked(
        HEAD
        + "profiles:\n"
        + "  - {batch: 1, height: 32, ids_0: 5}\n"
        + "  - {batch: 8, height: 32, ids_0: {min: 5, opt: 5, max: 5}, found: 100}\n"
    )
    assert spec.inputs["images"].shape == ("batch", 3, 32, 32)
    assert spec.inputs["ids"].shape == (5,)
    assert spec.profiles == (
        {"batch": Range.fixed(1)},
        {"batch": Range.fixed(8), "found": Range.fixed(100)},
    )


def test_symbols_inside_the_model_may_be_given() -> None:
    inner = "found: {min: 0, opt: 10, max: 100}, many: 3, i_1: 7"
    spec = checked(VALID.replace("ids_0", f"{inner}, ids_0"))
    assert set(spec.profiles[0]) == {"batch", "found", "many", "i_1"}


@pytest.mark.parametrize(
    ("symbol", "todo"),
    [
        ("heigth", "write `height`"),
        ("images_0", "that axis is called `batch` here"),
        ("zzz", "the dynamic axes of the inputs are `batch`, `height`, `ids_0`"),
        ("i_x", None),
        ("nothing_1", None),
    ],
)
def test_a_symbol_that_nothing_has(symbol: str, todo: str | None) -> None:
    (fault,) = faults(VALID.replace("ids_0", f"{symbol}: 1, ids_0"))
    assert fault.code == "unknown-symbol"
    assert todo is None or fault.todo == todo


def test_the_old_name_of_a_renamed_axis_is_unknown() -> None:
    (fault,) = faults(
        HEAD
        + "inputs: {images: {shape: [n, 3, height, 32]}}\n"
        + "dims: {n: 1, batch: 2, height: 1, ids_0: 1}\n"
    )
    assert (fault.code, fault.todo) == ("unknown-symbol", "that axis is called `n` here")


def test_each_profile_gives_every_symbol() -> None:
    found = faults(HEAD + "profiles:\n  - {batch: 1, height: 2, ids_0: 1}\n  - {batch: 2}\n")
    assert [(f.code, f.place.line) for f in found if f.place] == [("axis-without-range", 5)] * 2
    found = faults(HEAD + "profiles:\n  - {batch: 1, height: 2}\n  - {batch: 2, height: 1}\n")
    assert [(f.code, f.place.line) for f in found if f.place] == [("axis-without-range", 3)]


@pytest.mark.parametrize(
    ("point", "problem"),
    [
        ("images", "is an input of the model"),
        ("w", "is a constant"),
        ("one", "is a constant"),
        ("t1", "is made inside the body"),
    ],
)
def test_where_a_stage_cannot_end(point: str, problem: str) -> None:
    (fault,) = faults(VALID + f"partition: {{points: [{point}]}}\n")
    assert fault.code == "bad-point"
    assert problem in fault.problem


@pytest.mark.parametrize(
    "selector",
    ["{op: Exp}", "{node: /head/then/*}", "{node: GlobalAveragePool_2}", "{node: '/*/Conv'}"],
)
def test_selectors_that_find_something(selector: str) -> None:
    spec = checked(
        VALID
        + f"partition: {{off_tensorrt: [{selector}], points: [r, boxes]}}\n"
        + f"precision: {{keep_fp32: [{selector}]}}\n"
    )
    assert spec.notes == ()


def test_a_known_op_that_the_model_lacks_is_a_note() -> None:
    spec = checked(VALID + "partition: {off_tensorrt: [{op: NonZero}]}\n")
    (note,) = spec.notes
    assert (note.severity, note.code) == ("note", "op-not-in-model")
    assert note.place is not None


def test_single_nodes_cannot_be_kept_out_of_tf32() -> None:
    text = VALID + "precision: {default: tf32, keep_fp32: [{op: Conv}]}\n"
    assert codes(text) == ["not-in-this-version"]
    assert codes(VALID + "precision: tf32\n") == []


def test_a_model_of_ir_version_3_lists_weights_as_inputs(beside_model: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    w = helper.make_tensor("w", TensorProto.FLOAT, [2], [1, 2])
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [x, helper.make_tensor_value_info("w", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
        [w],
    )
    (beside_model / "m.onnx").write_bytes(
        helper.make_model(graph, ir_version=3).SerializeToString()
    )
    assert list(checked(HEAD).inputs) == ["x"]
    (fault,) = faults(HEAD + "inputs: {w: {}}\n")
    assert fault.problem == "the model has no input `w`: that is a weight"


def test_an_input_without_a_shape_needs_one(beside_model: Path) -> None:
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [], [])
    graph.input.add(name="x").type.tensor_type.elem_type = TensorProto.FLOAT
    (beside_model / "m.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    assert codes(HEAD) == ["input-without-shape"]
    spec = checked(HEAD + "inputs: {x: {shape: [n, 2]}}\ndims: {n: 3}\n")
    assert spec.inputs["x"].shape == (3, 2)


def test_a_broken_model_does_not_hide_the_spec_s_own_mistakes(beside_model: Path) -> None:
    (beside_model / "m.onnx").write_bytes(b"this is no model")
    assert codes(VALID + "gate: {max_engines: 0}\n") == ["out-of-range"]
    spec = checked(VALID)
    assert not spec.outline_ok
    assert spec.inputs == {}


def test_the_hash_of_the_model_is_compared_and_kept(beside_model: Path) -> None:
    sha256 = hashlib.sha256((beside_model / "m.onnx").read_bytes()).hexdigest()
    text = VALID.replace("m.onnx", f"{{path: m.onnx, sha256: {sha256.upper()}}}")
    assert checked(text).model_sha256 == sha256
    assert checked(VALID).model_sha256 is None


def test_paths_are_taken_from_the_folder_of_the_spec(
    beside_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (beside_model / "data").mkdir()
    (beside_model / "data" / "a.npz").write_bytes(b"")
    (beside_model / "spec.yaml").write_text(VALID + "verify: {data: 'data/*.npz'}\n")
    monkeypatch.chdir("/")
    spec = check(beside_model / "spec.yaml")
    assert spec.model_path == beside_model / "m.onnx"


def test_patterns_that_match_nothing_are_shown_where_they_stand(beside_model: Path) -> None:
    write(beside_model, "a.npz", "data/b.jpg", "empty/note.txt")
    text = (
        VALID
        + """\
precision:
  default: int8
  calibration:
    data: [a.npz, c.npz, data, empty]
verify:
  data: '*.npy'
  groups:
    hard: bad/*.npz
    long: [a.npz, worse/*.npz]
    full: {data: [a.npz, worst/*.npz]}
    none: {data: '*.zip', atol: 1}
"""
    )
    found = faults(text)
    assert {fault.code for fault in found} == {"no-data"}
    places = [fault.place for fault in found]
    assert [p and p.text[p.column - 1 : p.column - 1 + p.length] for p in places] == [
        "c.npz",
        "empty",
        "'*.npy'",
        "bad/*.npz",
        "worse/*.npz",
        "worst/*.npz",
        "'*.zip'",
    ]


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")


def test_a_folder_of_data_stands_for_the_files_in_it(tmp_path: Path) -> None:
    write(tmp_path, "d/b.npz", "d/a.JPG", "d/c.txt", "e/c.txt", "x.npz")
    (tmp_path / "d" / "folder.npz").mkdir()
    assert data_files(tmp_path, "d") == [tmp_path / "d" / "a.JPG", tmp_path / "d" / "b.npz"]
    assert data_files(tmp_path, "[de]/*.txt") == [tmp_path / "d/c.txt", tmp_path / "e/c.txt"]
    assert data_files(tmp_path, "**/*.npz") == [tmp_path / "d" / "b.npz", tmp_path / "x.npz"]


@pytest.mark.parametrize(
    ("precision", "place"),
    [
        ("int8", "int8"),
        ("fp8", "fp8"),
        ("{default: int8}", "int8"),
        (
            "{default: fp16, layers: [{op: Relu, precision: fp16}, {op: Conv, precision: fp8}]}",
            "fp8",
        ),
    ],
)
def test_what_is_quantised_needs_data(precision: str, place: str) -> None:
    [fault] = faults(VALID + f"precision: {precision}\n")
    assert fault.code == "no-calibration"
    assert fault.place
    start = fault.place.column - 1
    assert fault.place.text[start : start + fault.place.length] == place


def calibrated(precision: str, more: str = "") -> str:
    return VALID + f"precision: {{default: {precision}, calibration: {{data: a.npz{more}}}}}\n"


def test_data_are_not_missing_where_they_are_faulty(beside_model: Path) -> None:
    write(beside_model, "a.npz")
    assert codes(calibrated("int8")) == []
    assert codes(calibrated("int8", ", method: guess")) == ["unknown-choice"]
    assert codes(VALID + "precision: {default: int8, calibration: 3}\n") == ["wrong-type"]


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_data_that_nothing_needs_are_worth_a_note(beside_model: Path, precision: str) -> None:
    write(beside_model, "a.npz")
    [note] = checked(calibrated(precision)).notes
    assert (note.code, note.severity) == ("unused-calibration", "note")
    assert note.place
    layers = f"precision: {{default: {precision}, layers: [{{op: Conv, precision: int8}}], "
    assert checked(VALID + layers + "calibration: {data: a.npz}}\n").notes == ()


@pytest.mark.parametrize(
    ("images", "found"),
    [
        ("{}", []),
        ("{mean: [1], std: [2]}", []),
        ("{mean: [1, 2, 3], std: [1, 2, 3]}", []),
        ("{mean: [1, 2]}", ["wrong-length"]),
        ("{mean: [1, 2, 3, 4], std: [1, 2]}", ["wrong-length", "wrong-length"]),
        ("{color: gray, mean: [1, 2, 3]}", ["wrong-length"]),
        ("{color: gray, mean: [1]}", []),
    ],
)
def test_there_is_one_number_or_one_a_channel(
    beside_model: Path, images: str, found: list[str]
) -> None:
    write(beside_model, "a.npz")
    assert codes(calibrated("int8", f", images: {images}")) == found


def parts() -> list[type[Part]]:
    found: list[type[Part]] = []
    new = Part.__subclasses__()
    while new:
        found += new
        new = [each for part in new for each in part.__subclasses__()]
    return found


def test_every_choice_and_every_key_that_is_needed_has_its_words() -> None:
    fields = [
        (name, field.annotation, field.is_required())
        for part in parts()
        for name, field in part.keys().items()
    ]
    assert len(fields) > 50
    for name, annotation, required in fields:
        if get_origin(annotation) is Literal and name != "version":
            assert set(get_args(annotation)) <= set(_CHOICES[name][2])
        if required:
            assert name in _EXAMPLES


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("verify: {groups: {a: {}}}", 'add `data: "samples/*.npz"`'),
        ("precision: {calibration: {}}", 'add `data: "samples/*.npz"`'),
        ("precision: {layers: [{op: Conv}]}", "add `precision: fp16`"),
        ("precision: {layers: [{op: Conv, precision: tf32}]}", "there is no precision `tf32`"),
        ("precision: {calibration: {data: a, method: entrpy}}", "write `entropy`"),
        ("verify: {detections: [{scores: a}]}", "add `boxes: boxes`"),
        ("verify: {detections: [{boxes: a}]}", "add `scores: scores`"),
    ],
)
def test_what_precision_and_verify_need(text: str, words: str) -> None:
    assert words in rendered(VALID + text + "\n")


def test_the_passes_are_asked_for_only_where_a_spec_names_some() -> None:
    asked: list[str] = []

    def passes() -> list[str]:
        asked.append("asked")
        return ["fuse-gelu"]

    Path("spec.yaml").write_text(VALID)
    check("spec.yaml", known_passes=passes)
    assert asked == []
    Path("spec.yaml").write_text(VALID + "passes: {disable: [fuse-gelu]}\n")
    check("spec.yaml", known_passes=passes)
    assert asked == ["asked"]


def test_later_stages_find_places() -> None:
    spec = checked(VALID + "partition: {points: [r]}\n")
    assert str(spec.place("partition", "points", 0)) == "spec.yaml:4:22"
    assert str(spec.place("dims", "batch")) == "spec.yaml:3:15"
    assert str(spec.place("dims", "batch", key=True)) == "spec.yaml:3:8"
    assert spec.place("precision") is None


def test_line_ends_of_windows_and_aliases_and_json() -> None:
    assert codes(VALID.replace("\n", "\r\n")) == []
    assert codes(VALID.replace("height: 32", "height: &x 32").replace("5}", "*x}")) == []
    assert codes('{"version": 1, "model": "m.onnx"}', "spec.json") == ["axis-without-range"] * 3


def test_the_error_carries_exit_code_2() -> None:
    with pytest.raises(SpecError) as caught:
        checked("")
    assert caught.value.exit_code == 2


def test_the_ops_are_those_of_onnx() -> None:
    schemas = onnx.defs.get_all_schemas_with_history()
    installed = {schema.name for schema in schemas if schema.domain in ("", "ai.onnx.ml")}
    assert installed - ONNX_OPS == set(), "onnx has new ops: add them to specs/onnx_ops.py"


def test_demands_name_outputs_of_the_model() -> None:
    groups = "{hard: {data: spec.yaml, outputs: {keep: {agreement: 1}}}}"
    boxes = "[{boxes: boxes, scores: score, labels: kept}, {boxes: boxes, scores: boxes}]"
    text = VALID + (
        f"verify:\n  groups: {groups}\n  outputs: {{boxes: {{of_scale: 1}}, kept: {{atol: 1}}}}\n"
        f"  detections: {boxes}\n"
    )
    assert [(f.code, f.place.line if f.place else 0, f.todo) for f in faults(text)] == [
        ("unknown-output", 5, "write `kept`"),
        ("unknown-output", 7, "its outputs are `boxes`, `kept`"),
    ]


def test_an_output_without_four_corners_is_no_box(beside_model: Path) -> None:
    write_model(beside_model, MODEL.replace("float[batch, found] boxes", "float[batch, 5] boxes"))
    fault = "`boxes` is [batch, 5]: its last axis does not hold four corners"
    text = VALID + "verify: {detections: [{boxes: boxes, scores: kept}]}\n"
    assert [(each.code, each.problem) for each in faults(text)] == [("not-boxes", fault)]
    assert codes(text.replace("scores: kept", "scores: boxes")) == []


def test_measures_of_numbers_say_nothing_of_booleans(beside_model: Path) -> None:
    write_model(
        beside_model,
        MODEL.replace("kept = Identity (ids)", "kept = Equal (ids, ids)").replace(
            "int64[many] kept", "bool[many] kept"
        ),
    )
    text = VALID + "verify: {outputs: {kept: {agreement: 1, cosine: 0.5, top_k: {}}}}\n"
    assert codes(text) == ["not-for-this-output"] * 2


def test_what_stands_beside_a_mistake_is_compared_all_the_same() -> None:
    text = VALID + (
        "precision: {default: fp16, keep_fp32: [{op: Sofmax}],\n"
        "  layers: [{op: Conv, precision: int9}, {node: /nope, precision: fp16}],\n"
        "  calibration: {data: none/*.npz, percentile: 3}, search: {max_runs: 0}}\n"
        "verify: {atol: -1, groups: {hard: bad/*.npz}, outputs: {nothing: {cosine: 1}}}\n"
    )
    assert Counter(codes(text)) == {
        "unknown-op": 1,
        "unknown-precision": 1,
        "unknown-node": 1,
        "no-data": 2,
        "out-of-range": 3,
        "unknown-output": 1,
    }


@pytest.mark.parametrize(
    "partition",
    ["points: [zzzzzzzz]", "replace: [{name: r, from: [zzzzzzzz], to: [features], torch: m.pt}]"],
)
def test_a_tensor_that_no_name_comes_near_has_a_way_out_too(partition: str) -> None:
    found = [
        f for f in faults(VALID + f"partition: {{{partition}}}\n") if f.code == "unknown-tensor"
    ]
    assert found
    assert found[0].todo == "name the output of a node of the main graph"
