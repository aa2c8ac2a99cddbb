"""The picture is XML that any browser reads, with every stage and nothing outside its edges."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.optimizer.stage_picture import picture_of
from optc.specs.manifest import (
    Crossing,
    Manifest,
    ModelRecord,
    Reason,
    SpecRecord,
    Stage,
    StagePrecision,
    Target,
    Tensor,
)

SVG = "{http://www.w3.org/2000/svg}"
LONGEST = "/a/very/long/scope/" * 12
OPS = {"on": "Conv", "off": "NonZero"}


def stage(number: int, count: int, name: str | None = None) -> Stage:
    """Return one of ``count`` stages, on TensorRT and off it by turns."""
    on = number % 2 == 0
    why = Reason(node="off", op="NonZero", by="parser", text="no <creator> & no plugin")
    runtime = "tensorrt" if on else "torch" if number % 7 == 0 else "onnxruntime"
    return Stage(
        id=number,
        runtime=runtime,
        name=name,
        model=f"stages/{number:02d}-{runtime}.onnx",
        inputs=("x",) if number in (0, count - 2) else (),
        outputs=(f"t{number}",),
        nodes=("on",) if on else ("off",),
        flops_share=1 / count,
        why=() if on else (why,),
        precision=StagePrecision(flops={"fp16": 0.75, "fp32": 0.25}),
    )


def manifest(
    stages: list[Stage], *, more: tuple[Target, ...] = (), reach: int = 3, model: str = "m.onnx"
) -> Manifest:
    """Return a manifest in which each stage hands a tensor to the next ``reach`` ones."""
    ids = [each.id for each in stages]
    crossings = tuple(
        Crossing(
            tensor=f"t{number}",
            maker=number,
            readers=readers,
            bytes=None if number == 1 else 10 ** (number % 10),
            most_bytes=None,
            boundaries=1,
        )
        for number in ids
        if (readers := tuple(ids[number + 1 : number + 1 + reach]))
    )
    ampere = Target(
        name="ampere",
        backend="tensorrt-rtx",
        compute_capability="8.6",
        stages=tuple(ids),
        crossings=crossings,
    )
    return Manifest(
        optc_version="0",
        spec=SpecRecord(sha256="0"),
        model=ModelRecord(path=model, sha256="0", bytes=0),
        inputs=(Tensor(name="x", dtype="float32", shape=(1,)),),
        outputs=(
            Tensor(name=f"t{ids[-1]}", dtype="float32", shape=(1,)),
            Tensor(name="t0", dtype="float32", shape=(1,)),
        ),
        stages=tuple(stages),
        targets=(ampere, *more),
    )


def drawn(made: Manifest) -> ET.Element:
    return ET.fromstring(picture_of(made, OPS))


def texts(picture: ET.Element) -> list[str]:
    return [each.text or "" for each in picture.iter(f"{SVG}text")]


def boxes(picture: ET.Element) -> list[tuple[float, float, float, float]]:
    """Return left, top, right and bottom of the boxes, those of the ends among them."""
    found = []
    for each in picture.iter(f"{SVG}rect"):
        if (each.get("class") or "").endswith(" box"):
            x, y, width, height = (float(each.get(k, "")) for k in ("x", "y", "width", "height"))
            found.append((x, y, x + width, y + height))
    return found


def points(path: str) -> list[tuple[float, float]]:
    """Return where a path of ours goes through: M, H, V and C, all of them absolute."""
    x = y = 0.0
    found: list[tuple[float, float]] = []
    for command, rest in re.findall(r"([MHVC])([^MHVCl]*)", path):
        numbers = [float(each) for each in rest.split()]
        if command == "H":
            found.append((x := numbers[0], y))
        elif command == "V":
            found.append((x, y := numbers[0]))
        else:
            found += zip(numbers[::2], numbers[1::2], strict=True)
            x, y = found[-1]
    return found


def lines(picture: ET.Element) -> list[list[tuple[float, float]]]:
    return [
        points(each.get("d", ""))
        for each in picture.iter(f"{SVG}path")
        if (each.get("class") or "").endswith(" line")
    ]


@pytest.mark.parametrize("count", [1, 3, 8, 40])
def test_every_stage_is_there_in_order(count: int) -> None:
    picture = drawn(manifest([stage(n, count) for n in range(count)]))
    heads = [int(text) for text in texts(picture) if text.isdigit()]
    assert heads == [*range(count)]
    tops = [top for _, top, _, _ in boxes(picture)]
    assert len(tops) == count + 2
    assert tops == sorted(tops)


@pytest.mark.parametrize("count", [1, 3, 8, 40])
@pytest.mark.parametrize("reach", [1, 3, 20])
def test_nothing_is_outside_or_on_top_of_another(count: int, reach: int) -> None:
    picture = drawn(manifest([stage(n, count) for n in range(count)], reach=reach))
    _, _, width, height = map(float, picture.get("viewBox", "").split())
    rows = boxes(picture)
    for left, top, right, bottom in rows:
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
    for (_, _, _, bottom), (_, top, _, _) in itertools.pairwise(rows):
        assert bottom < top
    for line in lines(picture):
        for x, y in line:
            assert 0 <= x <= width
            assert 0 <= y <= height
    for each in picture.iter(f"{SVG}text"):
        assert 0 < float(each.get("x", "")) < width
        assert 0 < float(each.get("y", "")) < height


@pytest.mark.parametrize("reach", [3, 20])
def test_no_line_runs_through_a_box(reach: int) -> None:
    picture = drawn(manifest([stage(n, 40) for n in range(40)], reach=reach))
    rows = boxes(picture)
    for line in lines(picture):
        for (x, y), (to_x, to_y) in itertools.pairwise(line):
            for left, top, right, bottom in rows:
                # Segments along an axis; curves stay in the gap between two rows.
                beside = max(x, to_x) <= left or min(x, to_x) >= right
                assert beside or max(y, to_y) <= top or min(y, to_y) >= bottom


@pytest.mark.parametrize("reach", [3, 20])
def test_lines_that_run_down_side_by_side_keep_apart(reach: int) -> None:
    picture = drawn(manifest([stage(n, 40) for n in range(40)], reach=reach))
    down = [
        (x, min(y, to_y), max(y, to_y))
        for line in lines(picture)
        for (x, y), (to_x, to_y) in itertools.pairwise(line)
        if x == to_x and y != to_y and len(line) == 3
    ]
    assert down
    for (x, top, bottom), (other, its_top, its_bottom) in itertools.combinations(down, 2):
        assert x != other or bottom < its_top or its_bottom < top


def test_names_are_escaped_and_cut_to_their_box() -> None:
    evil = "<script>\"&'\x00"
    stages = [stage(0, 3, name=evil), stage(1, 3, name=LONGEST), stage(2, 3)]
    picture = drawn(manifest(stages, model=f"{evil}.onnx"))
    shown = texts(picture)
    clean = evil.replace("\x00", "\ufffd")
    assert f"0 · {clean}" in shown
    assert f"Stages of {clean}.onnx" in shown
    [cut] = [text for text in shown if text.startswith("1 · /a/very")]
    assert cut.endswith("…")
    assert len(cut) < 40
    tips = [each.text or "" for each in picture.iter(f"{SVG}title")]
    assert any(LONGEST in tip for tip in tips)


@given(st.text(max_size=40), st.text(max_size=40))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_any_name_makes_a_picture(name: str, model: str) -> None:
    stages = [stage(0, 3, name=name), stage(1, 3), stage(2, 3)]
    picture = drawn(manifest(stages, model=f"{model}.onnx"))
    assert len(boxes(picture)) == 5


def test_what_is_refused_and_what_crosses_is_said() -> None:
    picture = drawn(manifest([stage(n, 8) for n in range(8)]))
    shown = texts(picture)
    assert shown.count("refused: NonZero") == 4
    assert "1 node · 12.50% FLOPs · fp16 75%, fp32 25%" in shown
    assert "1 tensor, 10 kB" in shown  # straight down
    assert "from 4: 1 tensor, 10 kB" in shown  # around others
    assert "inputs: x" in shown
    tips = [each.text or "" for each in picture.iter(f"{SVG}title")]
    assert any("NonZero off; parser: no <creator> & no plugin" in tip for tip in tips)
    assert "t4 10 kB" in tips


def test_more_bytes_make_a_wider_line() -> None:
    picture = drawn(manifest([stage(n, 8) for n in range(8)], reach=1))
    widths = {
        group[0].text: float(group[1].get("stroke-width", ""))
        for group in picture.iter(f"{SVG}g")
        if group[1].get("class", "").endswith(" line")
    }
    assert widths["t3 1 kB"] < widths["t4 10 kB"] < widths["t5 100 kB"] < widths["t6 1 MB"]


def test_targets_that_are_split_alike_share_a_drawing() -> None:
    stages = [stage(n, 3) for n in range(3)]
    twin = Target(name="ada", backend="tensorrt-rtx", stages=(0, 1, 2))
    other = Target(name="turing", backend="tensorrt-rtx", compute_capability="7.5", stages=(1,))
    picture = drawn(manifest(stages, more=(twin, other)))
    heads = [text for text in texts(picture) if "engine" in text]
    assert heads == [
        "ampere (8.6), ada (portable): 2 engines, 1 fallback stage, 66.67% of the FLOPs in TensorRT",
        "turing (7.5): 0 engines, 1 fallback stage, 0.00% of the FLOPs in TensorRT",
    ]
    assert len(boxes(picture)) == 5 + 3


def test_a_model_without_stages_has_a_picture() -> None:
    made = manifest([stage(0, 1)])
    empty = made.model_copy(
        update={"stages": (), "targets": (Target(name="a", backend="b", stages=()),)}
    )
    assert len(boxes(drawn(empty))) == 2


def test_the_same_manifest_gives_the_same_picture() -> None:
    stages = [stage(n, 40) for n in range(40)]
    assert picture_of(manifest(stages), OPS) == picture_of(manifest(stages), OPS)
