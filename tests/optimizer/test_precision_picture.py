"""The picture is XML that any browser reads, and says what was measured."""

from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as ET

import pytest

from optc.optimizer.precision_picture import curve_svg
from optc.optimizer.precision_search import Point

SVG = "{http://www.w3.org/2000/svg}"

POINTS = [
    Point(0.0, 0.0, 20),
    Point(0.5, 0.02, 12),
    Point(0.96, 0.61, 2, chosen=True),
    Point(1.0, 31.0, 0),
]


def drawn(points: list[Point], **more: object) -> ET.Element:
    text = curve_svg(points, title="a <title> & more", **more)  # type: ignore[arg-type]
    return ET.fromstring(text)


def of_class(picture: ET.Element, kind: str) -> list[ET.Element]:
    return [each for each in picture.iter() if each.get("class") == kind]


def texts(picture: ET.Element) -> list[str]:
    return [each.text or "" for each in picture.iter(f"{SVG}text")]


def test_text_is_escaped() -> None:
    picture = drawn(POINTS, note="measured on <b> & 'c'")
    assert "a <title> & more" in texts(picture)
    assert "measured on <b> & 'c'" in texts(picture)


def test_every_point_is_there_in_order_and_on_the_picture() -> None:
    picture = drawn(POINTS)
    points = of_class(picture, "point")
    across = [float(each.get("cx", "")) for each in points]
    assert across == sorted(across)
    assert len(points) == len(POINTS)
    down = [float(each.get("cy", "")) for each in points]
    assert down == sorted(down, reverse=True)  # a larger error stands higher
    _, _, width, height = map(float, picture.get("viewBox", "").split())
    assert 0 < min(across) <= max(across) < width
    assert 0 < min(down) <= max(down) < height
    assert points[2][0].text == "96.0% of the FLOPs, 0.61 of the tolerance, 2 kept"


def test_the_chosen_point_and_the_tolerance_are_marked() -> None:
    picture = drawn(POINTS)
    [ring] = of_class(picture, "chosen")
    chosen = of_class(picture, "point")[2]
    assert (ring.get("cx"), ring.get("cy")) == (chosen.get("cx"), chosen.get("cy"))
    [line] = of_class(picture, "limit")
    assert float(line.get("y1", "")) < float(chosen.get("cy", ""))
    assert "tolerance" in texts(picture)
    assert len(of_class(drawn(POINTS, margin=0.8), "limit")) == 2


def test_errors_are_on_a_logarithmic_axis() -> None:
    points = [Point(0.1, 0.01, 3), Point(0.2, 0.1, 2), Point(0.3, 1.0, 1), Point(0.4, 10.0, 0)]
    down = [float(each.get("cy", "")) for each in of_class(drawn(points), "point")]
    steps = [before - after for before, after in itertools.pairwise(down)]
    assert steps == pytest.approx([steps[0]] * 3, abs=0.2)
    assert {"0.01", "0.1", "1", "10"} <= set(texts(drawn(points)))


def test_what_is_no_number_stands_above_all() -> None:
    picture = drawn([*POINTS[:3], Point(1.0, math.inf, 0)])
    points = of_class(picture, "point")
    down = [float(each.get("cy", "")) for each in points]
    assert down[-1] == min(down)
    assert down[-1] < float(of_class(picture, "limit")[0].get("y1", ""))
    assert "∞" in texts(picture)
    assert points[-1][0].text == "100.0% of the FLOPs, no number, 0 kept"


@pytest.mark.parametrize(
    "points",
    [
        [Point(0.0, 0.0, 0)],
        [Point(0.0, 0.0, 0), Point(1.0, 0.0, 0, chosen=True)],
        [Point(0.0, 0.0, 1), Point(1.0, 1e-12, 0, chosen=True)],
        [Point(0.0, 0.0, 1, chosen=True), Point(1.0, math.inf, 0)],
        [Point(0.0, 0.0, 1, chosen=True), Point(1.0, 1e30, 0)],
    ],
)
def test_extremes_stay_on_the_picture(points: list[Point]) -> None:
    picture = drawn(points)
    for each in picture.iter():
        for key in ("cx", "cy", "x", "y", "x1", "x2", "y1", "y2"):
            if (place := each.get(key)) is not None:
                assert 0 <= float(place) <= 640
    assert len(texts(picture)) < 30


def test_the_same_points_give_the_same_picture() -> None:
    assert curve_svg(POINTS, title="t") == curve_svg(POINTS, title="t")


def test_it_is_readable_in_the_dark() -> None:
    style = drawn(POINTS).find(f"{SVG}style")
    assert style is not None
    assert "prefers-color-scheme: dark" in (style.text or "")
