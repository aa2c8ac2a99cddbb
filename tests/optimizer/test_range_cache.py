from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
import pytest

from optc.optimizer.range_cache import Origin, Ranges, identity_of, ranges_of
from optc.optimizer.samples import Sample
from optc.specs.diagnostic import EnvironmentFault, InputError

Array = npt.NDArray[Any]
ORIGIN = Origin(model="m0", graph="g0", precision="int8", method="minmax")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("OPTC_CACHE_DIR", str(folder))
    return folder


class Model:
    """Its tensors are its inputs; it counts its runs."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(
        self, feeds: Mapping[str, Array], wanted: Collection[str], see: Callable[[str, Array], None]
    ) -> None:
        self.runs += 1
        for name in wanted:
            see(name, feeds[name])


def sample(name: str, digest: str | None = None, **values: float) -> Sample:
    feed = {tensor: np.array([value], np.float32) for tensor, value in values.items()}
    return Sample(name, digest or name, lambda: feed)


ONE = sample("a.npz", x=1.5, y=0.1)
TWO = sample("b.npz", x=3, y=0.05)


def ranges(
    samples: Sequence[Sample] = (ONE, TWO),
    wanted: Collection[str] = ("y", "x"),
    origin: Origin = ORIGIN,
    **options: Any,
) -> tuple[Ranges, int]:
    """Return the ranges, and how often the model ran for them."""
    model = Model()
    return ranges_of(origin, samples, wanted, model, **options), model.runs


def said(found: Ranges) -> list[str]:
    return [f"{note.severity} {note.code}: {note.problem}" for note in found.notes]


# --- keeping -------------------------------------------------------------------------------------


def test_the_file_reads_as_what_it_is_a_line_a_tensor(tmp_path: Path) -> None:
    file = tmp_path / "deeper" / "ranges.json"
    ranges([TWO, ONE], file=file, origin=replace(ORIGIN, method="percentile", percentile=100))
    assert (
        file.read_text()
        == """\
{
  "optc_ranges": 1,
  "model": "m0",
  "graph": "g0",
  "precision": "int8",
  "method": "percentile",
  "percentile": 100.0,
  "data": {
    "a.npz": "a.npz",
    "b.npz": "b.npz"
  },
  "amax": {
    "x": 3.0,
    "y": 0.1
  }
}
"""
    )
    assert [path.name for path in file.parent.iterdir()] == ["ranges.json"]
    umask = os.umask(0)
    os.umask(umask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("own", [True, False])
def test_nothing_is_run_where_nothing_changed(tmp_path: Path, own: bool) -> None:
    file = tmp_path / "ranges.json" if own else None
    first, runs = ranges(file=file)
    assert (first.amax, first.notes, first.reused, runs) == ({"y": 0.1, "x": 3.0}, (), False, 2)
    [written] = tmp_path.rglob("*.json")
    before = written.stat().st_mtime_ns
    again, runs = ranges([TWO, ONE], file=file)
    assert (again.amax, again.notes, again.reused, runs) == (first.amax, (), True, 0)
    assert written.stat().st_mtime_ns == before


def test_files_under_other_names_are_the_same_data(tmp_path: Path) -> None:
    file = tmp_path / "ranges.json"
    ranges(file=file)
    found, runs = ranges([replace(ONE, name="c.npz"), TWO], file=file)
    assert (found.reused, found.notes, runs) == (True, (), 0)
    assert list(json.loads(file.read_text())["data"]) == ["b.npz", "c.npz"]


def test_only_the_tensors_that_are_missing_are_taken() -> None:
    ranges(wanted=["x"])
    found, runs = ranges()
    assert (found.amax, found.reused, runs) == ({"y": 0.1, "x": 3.0}, False, 2)
    assert ranges(wanted=["x"]) == (Ranges({"x": 3.0}, (), True), 0)


def test_a_tensor_that_was_empty_throughout_is_not_looked_for_again(cache: Path) -> None:
    empty = Sample("a.npz", "a", lambda: {"x": np.zeros(0, np.float32)})
    assert ranges([empty], ["x"]) == (Ranges({}, (), False), 1)
    assert ranges([empty], ["x"]) == (Ranges({}, (), True), 0)


def test_what_the_user_edits_is_used(tmp_path: Path) -> None:
    file = tmp_path / "ranges.json"
    ranges(file=file)
    file.write_text(file.read_text().replace("3.0", "2.5"))
    assert ranges(file=file)[0].amax == {"y": 0.1, "x": 2.5}


@pytest.mark.parametrize(
    "other",
    [
        {"model": "m1"},
        {"graph": "g1"},
        {"precision": "fp8"},
        {"method": "mse"},
        {"method": "percentile", "percentile": 99.0},
    ],
)
def test_the_cache_keeps_ranges_of_different_things_apart(other: dict[str, Any]) -> None:
    ranges()
    assert ranges(origin=replace(ORIGIN, **other))[1] == 2
    assert ranges()[1] == 0
    assert ranges(origin=replace(ORIGIN, **other))[1] == 0


# --- what has changed ----------------------------------------------------------------------------


@pytest.mark.parametrize("own", [True, False])
def test_changed_data_are_told_with_what_moved(tmp_path: Path, own: bool) -> None:
    file = tmp_path / "ranges.json" if own else None
    ranges([ONE, TWO, sample("c.npz", x=0, y=0)], file=file)
    changed = replace(sample("b.npz", x=1.2, y=0.1005), digest="other")
    found, runs = ranges([ONE, changed, sample("d.npz", x=1, y=0)], file=file)
    assert runs == 3
    assert found.amax == {"y": 0.1005, "x": 1.5}
    assert said(found) == [
        "note calibration-data-changed: the data to calibrate with: "
        + "1 file added (`d.npz`), 1 file removed (`c.npz`), 1 file changed (`b.npz`)",
        "note ranges-moved: of 2 ranges 1 moved by more than 1%: `x` 3 -> 1.5 (-50.0%)",
    ]
    assert said(ranges([ONE, changed, sample("d.npz", x=1, y=0)], file=file)[0]) == []


def test_the_tensors_that_moved_most_come_first_and_the_rest_is_counted() -> None:
    names = [f"t{number}" for number in range(8)]
    ranges([sample("a.npz", digest="1", **dict.fromkeys(names, 1.0))], names)
    factors = dict(zip(names, (1.5, 0.5, 1.2, 1.005, 1.1, 4, 0, 1.02), strict=True))
    found, _ = ranges([sample("a.npz", digest="2", **factors)], names)
    assert said(found)[1] == (
        "note ranges-moved: of 8 ranges 7 moved by more than 1%: `t6` 1 -> 0 (-100.0%), `t5` 1 -> 4 "
        "(+300.0%), `t1` 1 -> 0.5 (-50.0%), `t0` 1 -> 1.5 (+50.0%), `t2` 1 -> 1.2 (+20.0%), and 2 "
        "more"
    )


def test_a_range_that_was_zero_has_no_share_to_move_by() -> None:
    ranges([sample("a.npz", digest="1", x=0)], ["x"])
    found, _ = ranges([sample("a.npz", digest="2", x=5)], ["x"])
    assert said(found)[1] == "note ranges-moved: of 1 ranges 1 moved by more than 1%: `x` 0 -> 5"


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"model": "m1"}, ["they are of another model file"]),
        ({"graph": "g1"}, ["the model is optimised in another way now", "none moved"]),
        (
            {"method": "percentile", "percentile": 50.0},
            ["`method` was minmax and is percentile", "2 moved"],
        ),
        ({"precision": "fp8"}, ["`precision` was int8 and is fp8", "none moved"]),
    ],
)
def test_the_users_file_is_of_one_thing_and_says_when_it_is_of_another(
    tmp_path: Path, other: dict[str, Any], words: list[str]
) -> None:
    file = tmp_path / "ranges.json"
    ranges(file=file)
    found, runs = ranges(file=file, origin=replace(ORIGIN, **other))
    assert runs == 2
    text = "\n".join(said(found))
    assert "None" not in text
    assert text.startswith("note ranges-outdated: the ranges in `")
    assert all(word in text for word in words)
    assert ("ranges-moved" in text) == ("model" not in other)
    assert ranges(file=file, origin=replace(ORIGIN, **other))[1] == 0


def test_another_percentile_is_said(tmp_path: Path) -> None:
    file = tmp_path / "ranges.json"
    origin = replace(ORIGIN, method="percentile", percentile=99.0)
    ranges(file=file, origin=origin)
    found, _ = ranges(file=file, origin=replace(origin, percentile=99.9))
    assert "taken anew: `percentile` was 99.0 and is 99.9" in said(found)[0]


# --- files that are not as they should be --------------------------------------------------------

VALID = (
    '{"optc_ranges": 1, "model": "m0", "graph": "g0", "precision": "int8", "method": "minmax", '
    '"percentile": null, "data": {}, "amax": {}}'
)
RUBBISH = [
    "",
    "{",
    "[]",
    "null",
    "a: 1\n",
    "\x00",
    VALID.replace("1", "2", 1),
    VALID.replace('"amax": {}', '"amax": {"x": -1}'),
    VALID.replace('"amax": {}', '"amax": {"x": NaN}'),
    VALID.replace('"amax": {}', '"amax": {"x": "1"}'),
    VALID.replace('"amax": {}', '"amax": {}, "more": 1'),
    VALID.replace(', "amax": {}', ""),
    VALID.replace("minmax", "guess"),
]


@pytest.mark.parametrize("rubbish", RUBBISH)
def test_a_damaged_file_in_the_cache_costs_a_warning(cache: Path, rubbish: str) -> None:
    ranges()
    [file] = cache.rglob("*.json")
    file.write_text(rubbish)
    found, runs = ranges()
    assert (found.amax, runs) == ({"y": 0.1, "x": 3.0}, 2)
    assert [f"{n.severity} {n.code}" for n in found.notes] == ["warning damaged-ranges"]
    assert ranges() == (replace(found, notes=(), reused=True), 0)


@pytest.mark.parametrize("rubbish", RUBBISH)
def test_a_file_of_the_users_that_holds_something_else_is_left_alone(
    tmp_path: Path, rubbish: str
) -> None:
    file = tmp_path / "ranges.json"
    file.write_text(rubbish)
    with pytest.raises(InputError) as caught:
        ranges(file=file)
    [problem] = caught.value.diagnostics
    assert problem.code == "damaged-ranges"
    assert str(file) in problem.problem
    assert file.read_text() == rubbish


def test_a_folder_in_the_place_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="damaged-ranges"):
        ranges(file=tmp_path)


def test_a_cache_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("OPTC_CACHE_DIR", str(blocked))
    found, runs = ranges()
    assert (found.amax, runs) == ({"y": 0.1, "x": 3.0}, 2)
    assert [f"{n.severity} {n.code}" for n in found.notes] == ["warning ranges-not-written"]


def test_a_file_of_the_users_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(EnvironmentFault, match="cannot-write"):
        ranges(file=blocked / "ranges.json")


def test_a_read_only_folder_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model()
    monkeypatch.setattr(os, "access", lambda *args: False)  # root may write anywhere
    with pytest.raises(EnvironmentFault, match="cannot-write"):
        ranges_of(ORIGIN, [ONE], ["x"], model, file=tmp_path / "ranges.json")
    assert model.runs == 0


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "ranges.json"
    ranges([ONE], file=file)
    before = file.read_text()

    def full(path: Path, data: bytes) -> int:
        path.open("wb").close()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(EnvironmentFault, match="disk-full"):
        ranges(file=file)
    assert file.read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["ranges.json"]


def test_an_interrupt_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "ranges.json"
    ranges([ONE], file=file)
    before = file.read_text()

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ranges_of(ORIGIN, [TWO], ["x"], interrupted, file=file)
    assert file.read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["ranges.json"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "ranges.json")
    ranges(file=tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "ranges.json").is_file()


# --- which graph ---------------------------------------------------------------------------------


def graph_of(text: str) -> gs.Graph:
    head = '<ir_version: 9, opset_import: ["" : 17]> g (float[2] x) => (float[2] y)'
    return gs.import_onnx(onnx.parser.parse_model(head + text))


def test_a_graph_is_known_by_its_nodes_and_their_tensors() -> None:
    plain = identity_of(graph_of("{ a = Relu (x) b = Neg (x) y = Add (a, b) }"))
    assert plain == identity_of(graph_of("{ b = Neg (x) a = Relu (x) y = Add (a, b) }"))
    assert plain != identity_of(graph_of("{ a = Relu (x) b = Exp (x) y = Add (a, b) }"))
    assert plain != identity_of(graph_of("{ c = Relu (x) b = Neg (x) y = Add (c, b) }"))
    assert plain != identity_of(graph_of("{ a = Relu (x) b = Neg (a) y = Add (a, b) }"))
