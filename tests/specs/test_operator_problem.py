"""What is said of `operators` that cannot be, and of operators that the model has and nobody knows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from spec_file import checked, codes, faults, rendered, write_model
from test_codes import codes_in

from optc.specs.codes import CODES
from optc.specs.operator_entry import operator_entry
from optc.specs.operator_problem import _FILES

MODEL = """
<ir_version: 9, opset_import: ["" : 17, "acme" : 1, "com.microsoft" : 1]>
g (float[batch, 3, height, 32] images, bool flag) => (float[batch, found] y, float[n] i)
{
    [stem] s = acme.Swirl (images)
    [gelu] t = com.microsoft.Gelu (s)
    [peaks] p, q = acme.Peaks (t, images)
    y = Identity (p)
    [if] i = If (flag)
      <then_branch = t () => (float[n] t1) { [inner] t1 = acme.Swirl (p) },
       else_branch = e () => (float[n] e1) { e1 = Neg (p) }>
}
"""
HEAD = """\
version: 1
model: m.onnx
dims: {batch: {min: 1, opt: 4, max: 8}, height: 32}
"""
SWIRL = """\
  - op: acme::Swirl
    outputs: [{like: 0}]
    onnxruntime: swirl.so
"""
PEAKS = """\
  - op: acme::Peaks
    inputs: [[n, c, h, w], [n, "?", -1, 32]]
    outputs:
      - {like: 0, shape: [n, k, (h + 1)//2]}
      - {dtype: int64, shape: [2*k, c]}
    bounds: {k: h*w}
    onnxruntime: swirl.so
"""
VALID = HEAD + "operators:\n" + SWIRL + PEAKS

# A spec for each code that is wrong in this way only.
MISTAKES = {
    "operator-without-domain": VALID + SWIRL.replace("acme::Swirl", "Whirl"),
    "not-custom": VALID + SWIRL.replace("acme::Swirl", "ai.onnx::Conv"),
    "operator-twice": VALID + SWIRL,
    "library-not-found": VALID.replace("swirl.so", "swirl.dll", 1),
    "module-not-found": VALID.replace("onnxruntime: swirl.so\n", "torch: s.pt\n").replace(
        "torch: s.pt", "onnxruntime: swirl.so", 1
    ),
    "bad-axis": VALID.replace("[n, c, h, w]", "[n, c, h, w, a-b]"),
    "bad-arithmetic": VALID.replace("(h + 1)//2", "(h + 1/2"),
    "unknown-axis": VALID.replace("(h + 1)//2", "(hh + 1)//2"),
    "wrong-arity": VALID.replace("    inputs: [[n, c, h, w], ", "    inputs: [[n, c, h, w], [], "),
    "like-beyond-inputs": VALID.replace("like: 0, shape", "like: 2, shape"),
    "torch-in-body": VALID.replace("onnxruntime: swirl.so", "torch: swirl.so", 1),
    "undeclared-operator": HEAD + "operators:\n" + SWIRL,
}


@pytest.fixture(autouse=True)
def _beside_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path, MODEL)
    (tmp_path / "swirl.so").touch()


def test_what_is_right_has_no_problems() -> None:
    spec = checked(VALID)
    assert spec.notes == ()
    assert [operator.op for operator in spec.spec.operators] == ["acme::Swirl", "acme::Peaks"]


@pytest.mark.parametrize("code", MISTAKES)
def test_each_mistake_has_its_code_and_a_place(code: str) -> None:
    found = [fault for fault in faults(MISTAKES[code]) if fault.severity == "error"]
    assert [fault.code for fault in found] == [code]
    assert found[0].place is not None


def test_the_mistakes_are_all_there_are() -> None:
    notes = {"operator-not-in-model", "unbounded-extent", "library-unreadable"}  # below
    used = codes_in("operator_problem") | {code for code, _ in _FILES.values()}
    assert used == MISTAKES.keys() | notes
    assert used <= CODES.keys()


def test_all_of_them_come_at_once() -> None:
    text = VALID.replace("swirl.so", "x.so").replace("(h + 1)//2", "h +").replace("h*w", "j")
    found = ["bad-arithmetic", "library-not-found", "library-not-found", "unknown-axis"]
    assert sorted(codes(text)) == found


def test_an_operator_that_nobody_knows_comes_with_the_entry_to_write() -> None:
    assert (
        rendered(HEAD)
        == """\
error[undeclared-operator]: neither ONNX nor ONNX Runtime has acme::Swirl, which `/stem` and `/inner` are
  --> spec.yaml:2:8
2 | model: m.onnx
  |        ^^^^^^
  do: say under `operators` what it returns and who runs it, such as
      operators:
        - op: acme::Swirl
          inputs: [[n, c, h, w]]
          outputs: [{like: 0}]
          onnxruntime: libswirl.so  # or a module on torch: `torch: swirl.pt`
error[undeclared-operator]: neither ONNX nor ONNX Runtime has acme::Peaks, which `/peaks` is
  --> spec.yaml:2:8
2 | model: m.onnx
  |        ^^^^^^
  do: say under `operators` what it returns and who runs it, such as
        - op: acme::Peaks
          inputs: [[n, c, h, w], [n1, c1, h1, w1]]
          outputs: [{like: 0}, {like: 0}]
          onnxruntime: libpeaks.so  # or a module on torch: `torch: peaks.pt`"""
    )


def test_the_entry_to_write_is_right_as_far_as_it_can_be() -> None:
    entries = "".join(
        f"  {line}\n"
        for op, ranks, outputs in (("acme::Swirl", [4], 1), ("acme::Peaks", [4, 4], 2))
        for line in operator_entry(op, ranks, outputs)
    )
    assert set(codes(HEAD + "operators:\n" + entries)) == {"library-not-found"}


def test_an_operator_that_is_nearly_declared_is_to_be_renamed() -> None:
    found = faults(VALID.replace("acme::Peaks", "acme::Peeks"))
    assert [fault.code for fault in found if fault.severity == "error"] == ["undeclared-operator"]
    assert found[-1].todo == "write it in place of `acme::Peeks`, which the model does not have"


def test_nothing_is_undeclared_where_an_entry_cannot_be_read() -> None:
    assert codes(VALID.replace("outputs: [{like: 0}]", "outputs: [{lik: 0}]")) == ["unknown-key"]


def test_functions_that_the_model_brings_need_no_entry(tmp_path: Path) -> None:
    write_model(
        tmp_path,
        """
        <ir_version: 9, opset_import: ["" : 17, "own" : 1]>
        g (float[3] x) => (float[3] y) { y = own.Twice (x) }
        <domain: "own", opset_import: ["" : 17]> Twice (a) => (b) { b = Add (a, a) }
        """,
    )
    assert codes("version: 1\nmodel: m.onnx\n") == []


def test_an_operator_that_the_model_lacks_is_a_note() -> None:
    spec = checked(VALID + SWIRL.replace("acme::Swirl", "acme::Peek"))
    assert [(note.code, note.severity) for note in spec.notes] == [
        ("operator-not-in-model", "note")
    ]
    assert spec.notes[0].todo == "the nearest is `acme::Peaks`"


def test_a_name_that_is_nearly_an_axis_is_a_note() -> None:
    text = VALID.replace("[n, c, h, w]", "[n, c, height, w]").replace("k: h*w", "k: 9")
    spec = checked(text.replace("k, (h + 1)//2", "k, heigth"))
    [note] = spec.notes
    assert (note.code, note.severity) == ("unbounded-extent", "note")
    assert note.todo is not None
    assert "`height`" in note.todo


@pytest.mark.parametrize("name", ["x" * 5000, "m.onnx/x.so", ".", "no/such/folder/x.so"])
def test_a_path_that_leads_nowhere(name: str) -> None:
    assert codes(VALID.replace("swirl.so", name)) == ["library-not-found"] * 2


@pytest.mark.parametrize(("name", "why"), [(".", "a folder"), ("/dev/null", "no regular file")])
def test_what_is_there_and_no_file_is_not_called_missing(name: str, why: str) -> None:
    found = faults(VALID.replace("swirl.so", name))
    assert [fault.code for fault in found] == ["library-not-found"] * 2
    assert all(fault.problem.endswith(f": that is {why}") for fault in found)
    assert all(fault.todo and "check the path" in fault.todo for fault in found)


def test_a_folder_of_that_name_is_not_what_was_meant(tmp_path: Path) -> None:
    (tmp_path / "swirl.d").mkdir()
    for fault in faults(VALID.replace("swirl.so", "swirl.d")):
        assert fault.todo == "write `swirl.so`"


def test_a_file_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "swirl.so")
    assert codes(VALID) == ["library-unreadable"] * 2


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("h // 0", "divides by zero"),
        ("2 - 3", "no axis has the extent 2 - 3"),
        ('"?"', "`?` is no part of arithmetic"),
        ("-1", "no axis has the extent -1"),
        ("h / 2", "`/` is no part of arithmetic"),
    ],
)
def test_what_an_extent_cannot_be(written: str, problem: str) -> None:
    [fault] = faults(VALID.replace("(h + 1)//2", written))
    assert fault.code == "bad-arithmetic"
    assert problem in fault.problem


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("k: h*w", "k: h*v", "no input has an axis that is called `v`"),
        ("k: h*w", "k: h*w, h: 3", "`h` is an axis of an input: it needs no bound"),
        ("k: h*w", "k: h*w, kk: 3", "no output has an axis that is called `kk`"),
        ("2*k, c", "2*kk, c", "no input has an axis that is called `kk`"),
    ],
)
def test_names_that_nothing_has(before: str, after: str, problem: str) -> None:
    assert problem in [fault.problem for fault in faults(VALID.replace(before, after))]


def test_an_operator_may_leave_optional_outputs_out(tmp_path: Path) -> None:
    write_model(
        tmp_path, MODEL.replace("y = Identity (p)", "y = Identity (p) r = acme.Peaks (p, t)")
    )
    assert codes(VALID) == []
