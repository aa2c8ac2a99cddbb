"""Draws the trade-off between FLOPs in low precision and error, as an SVG.

It is text alone, the same for the same points, and readable on a light and on a dark page.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from optc.optimizer.svg import document, escaped, px, style_of, text

if TYPE_CHECKING:
    from optc.optimizer.precision_search import Found, Point

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 84, 24, 56, 64

LIGHT = {"ink": "#1b1f24", "faint": "#6e7781", "line": "#0969da", "bad": "#cf222e"}
DARK = {"ink": "#e6edf3", "faint": "#8d96a0", "line": "#4493f8", "bad": "#f85149"}
COLOURS = """
  text {{ fill: {ink} }}
  .note {{ fill: {faint} }}
  .axis {{ stroke: {ink} }}
  .grid {{ stroke: {faint} }}
  .limit {{ stroke: {bad} }}
  .limit-text {{ fill: {bad} }}
  .curve, .chosen {{ stroke: {line} }}
  .point {{ fill: {line} }}"""
STYLE = style_of(
    """
  text { font: 12px system-ui, sans-serif }
  .title { font-size: 15px; font-weight: 600 }
  .grid { stroke-opacity: .3 }
  .limit { stroke-dasharray: 6 4 }
  .curve, .chosen { fill: none; stroke-width: 2 }""",
    COLOURS,
    LIGHT,
    DARK,
)

FEWEST_DECADES, MOST_DECADES = 2, 9


def picture_of(found: Found) -> str | None:
    """Return the trade-off that a search found, as an SVG; None where there is none."""
    if len(found.curve) < 2:
        return None
    return curve_svg(
        found.curve,
        title="Error against the share of FLOPs in low precision",
        note=f"measured on {found.curve_sample}",
        margin=found.margin,
    )


def curve_svg(points: Sequence[Point], *, title: str, note: str = "", margin: float = 1.0) -> str:
    """Return points of a trade-off as an SVG, by share.

    The axis of the error is logarithmic. Errors of 0 stand at its lower end, and infinite ones on
    an edge above it, marked as such.

    Args:
        points: At least one.
        title: Stands above.
        note: Stands below it, such as what was measured.
        margin: Share of the tolerance that might be used up.
    """
    axes = _Axes(points)
    shapes = [
        *_frame(axes),
        *_limits(axes, margin),
        *_curve(axes, points),
        text(LEFT, 22, title, "title"),
    ]
    if note:
        shapes.append(text(LEFT, 40, note, "note"))
    return document(title, WIDTH, HEIGHT, STYLE, shapes)


class _Axes:
    """Where shares and errors stand on the picture."""

    def __init__(self, points: Sequence[Point]) -> None:
        errors = [p.badness for p in points if 0 < p.badness < math.inf]
        self.infinite = any(math.isinf(p.badness) for p in points)
        low = math.floor(math.log10(min([*errors, 1.0])))
        high = math.ceil(math.log10(max([*errors, 1.0])))
        high = max(high, 1)
        low = min(max(low, high - MOST_DECADES), high - FEWEST_DECADES)
        self.low, self.high = low, high

    def x(self, share: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * min(max(share, 0.0), 1.0)

    def y(self, error: float) -> float:
        room = HEIGHT - TOP - BOTTOM
        if math.isinf(error):
            return TOP
        top = TOP + (16 if self.infinite else 0)
        decades = math.log10(error) if error > 0 else self.low
        part = (min(max(decades, self.low), self.high) - self.low) / (self.high - self.low)
        return TOP + room - part * (TOP + room - top)


def _frame(axes: _Axes) -> Iterator[str]:
    """Yield axes, ticks and what they say."""
    left, right, bottom = LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM
    step = max(1, -(-(axes.high - axes.low) // 6))
    for decade in range(axes.low, axes.high + 1, step):
        y = axes.y(10.0**decade)
        yield _line(left, y, right, y, "grid")
        yield text(left - 8, y + 4, f"{10.0**decade:g}", anchor="end")
    if axes.infinite:
        yield text(left - 8, TOP + 4, "∞", anchor="end")
    for percent in (0, 25, 50, 75, 100):
        x = axes.x(percent / 100)
        yield _line(x, bottom, x, bottom + 5, "axis")
        yield text(x, bottom + 20, f"{percent} %", anchor="middle")
    yield _line(left, bottom, right, bottom, "axis")
    yield _line(left, TOP, left, bottom, "axis")
    yield text((left + right) / 2, HEIGHT - 16, "FLOPs in low precision", anchor="middle")
    middle = (TOP + bottom) / 2
    yield (
        f'<text transform="translate(20 {px(middle)}) rotate(-90)" text-anchor="middle">'
        "error, as a multiple of the tolerance</text>"
    )


def _limits(axes: _Axes, margin: float) -> Iterator[str]:
    """Yield the tolerance, and the part of it that might be used up."""
    y = axes.y(1.0)
    yield _line(LEFT, y, WIDTH - RIGHT, y, "limit")
    yield text(LEFT + 8, y - 5, "tolerance", "limit-text")
    if margin < 1:
        y = axes.y(margin)
        yield _line(LEFT, y, WIDTH - RIGHT, y, "limit")
        yield text(LEFT + 8, y + 14, f"searched for: {margin:.0%} of it", "limit-text")


def _curve(axes: _Axes, points: Sequence[Point]) -> Iterator[str]:
    places = [(axes.x(p.share), axes.y(p.badness)) for p in points]
    yield f'<polyline class="curve" points="{" ".join(f"{px(x)},{px(y)}" for x, y in places)}"/>'
    for point, (x, y) in zip(points, places, strict=True):
        words = f"{point.share:.1%} of the FLOPs, {_error(point.badness)}, {point.kept} kept"
        yield (
            f'<circle class="point" cx="{px(x)}" cy="{px(y)}" r="3.5">'
            f"<title>{escaped(words)}</title></circle>"
        )
        if point.chosen:
            yield f'<circle class="chosen" cx="{px(x)}" cy="{px(y)}" r="8"/>'
            # Below: the curve comes from the left, and goes up to the right.
            anchor, place = ("end", WIDTH - RIGHT) if point.share > 0.5 else ("start", x + 12)
            words = f"chosen: {point.share:.1%}, {_error(point.badness)}"
            yield text(place, min(y + 34, HEIGHT - BOTTOM - 6), words, anchor=anchor)


def _error(badness: float) -> str:
    return "no number" if math.isinf(badness) else f"{badness:.3g} of the tolerance"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{px(x1)}" y1="{px(y1)}" x2="{px(x2)}" y2="{px(y2)}"/>'
