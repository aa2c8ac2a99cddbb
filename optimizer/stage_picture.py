"""Draws the stages of a package as an SVG: boxes are stages, arrows what they hand on.

Stages stand below one another in running order, each runtime in a column of its own. What a stage
hands to the next one goes straight down. What is read later leaves on the right, runs down a track
of its own and comes in on the right of each reader: no row holds more than one box, so that no line
crosses one. Targets that are split alike share a drawing.

It is text alone, the same for the same manifest, and readable on a light and on a dark page, in
print, and by people who see colours differently: what is not TensorRT has a broken border.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from optc.optimizer.svg import document, escaped, px, style_of, text
from optc.optimizer.wording import bytes_, count, percent
from optc.specs.manifest import Manifest, Stage, Target

BOX, LANE_GAP, MARGIN = 340, 28, 24
PILL_HEIGHT = 26
TRACK = 12
"""Pixels between lines that run down on the right."""

LABEL_ROOM = 176
"""Pixels on the right of the last column, for what is said of lines that come in there, if any do."""

DROP = 17
"""Pixels between lines that come into a box on the right."""

MOST_DROPS = 5
"""Lines that come into one box on the right, each with its label; further ones share the last."""

COMPACT = 12
"""With more stages than these, boxes are smaller."""

MOST_NAMES = 60
"""Names in what is shown when the pointer rests on something."""

RUNTIMES = {"tensorrt": "TensorRT", "onnxruntime": "ONNX Runtime", "torch": "torch"}

LIGHT = {
    "page": "#ffffff",
    "ink": "#1b1f24",
    "faint": "#59636e",
    "tensorrt": "#0072b2",
    "onnxruntime": "#b35900",
    "torch": "#a8447f",
    "ends": "#59636e",
}
DARK = {
    "page": "#0d1117",
    "ink": "#e6edf3",
    "faint": "#9198a1",
    "tensorrt": "#56b4e9",
    "onnxruntime": "#e69f00",
    "torch": "#e29ac4",
    "ends": "#9198a1",
}
COLOURS = """
  .page {{ fill: {page} }}
  text {{ fill: {ink} }}
  .note {{ fill: {faint} }}
  .tensorrt {{ stroke: {tensorrt}; fill: {tensorrt} }}
  .onnxruntime {{ stroke: {onnxruntime}; fill: {onnxruntime} }}
  .torch {{ stroke: {torch}; fill: {torch} }}
  .ends {{ stroke: {ends}; fill: {ends} }}"""
STYLE = style_of(
    """
  text { font: 12px system-ui, sans-serif }
  .title { font-size: 15px; font-weight: 600 }
  .head { font-weight: 600 }
  .label { font-size: 11px }
  .box { fill-opacity: .1; stroke-width: 1.5 }
  .onnxruntime.box { stroke-dasharray: 7 4 }
  .torch.box { stroke-dasharray: 2 3 }
  .ends.box { fill-opacity: 0; stroke-width: 1 }
  rect.bar, path.tip { stroke: none }
  path.line { fill: none; stroke-opacity: .75; stroke-linejoin: round }""",
    COLOURS,
    LIGHT,
    DARK,
)


def picture_of(manifest: Manifest, ops: Mapping[str, str]) -> str:
    """Return the stages of ``manifest`` as an SVG.

    Args:
        manifest: Of a package or a plan.
        ops: Name of a node of the optimised model -> its operator.
    """
    model = PurePosixPath(manifest.model.path).name
    shapes: list[str] = []
    top, width = 44.0, 0.0
    alike: dict[tuple[int, ...], list[Target]] = {}
    for target in manifest.targets:
        alike.setdefault(target.stages, []).append(target)
    for targets in alike.values():
        panel = _Panel(manifest, targets, ops)
        shapes += panel.draw(top)
        top += panel.height + MARGIN
        width = max(width, panel.width)
    title = f"Stages of {model}"
    width = max(width, 2 * MARGIN + _length(title, 15))
    note = "Arrows are what stages hand on: the wider, the more bytes at the usual shapes."
    shapes.append(text(MARGIN, top, _fitted(note, width - 2 * MARGIN, 11), "note label"))
    height = top + 16
    page = f'<rect class="page" width="{px(width)}" height="{px(height)}"/>'
    head = text(MARGIN, 28, title, "title")
    return document(title, width, height, STYLE, [page, head, *shapes])


@dataclass(slots=True)
class _Link:
    """What one row hands to another.

    Attributes:
        tensors: Name of each -> its bytes; None where they are not known.
    """

    maker: int
    reader: int
    tensors: dict[str, int | None] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(size or 0 for size in self.tensors.values())

    @property
    def is_sized(self) -> bool:
        return any(size is not None for size in self.tensors.values())

    @property
    def thickness(self) -> float:
        """Pixels: one more for each factor of ten from 1 kB."""
        return min(6.0, max(1.2, math.log10(max(self.bytes, 1)) - 1.8))

    def label(self, start: str = "") -> str:
        if not self.is_sized:
            what = ", ".join(self.tensors) if len(self.tensors) < 3 else _tensors(self.tensors)
        else:
            what = f"{_tensors(self.tensors)}, {bytes_(self.bytes)}"
        return f"{start}{what}"


@dataclass(slots=True)
class _Row:
    """A stage, or an end of the model, and where it stands."""

    kind: str
    lines: list[str]
    corner: str
    tip: str
    left: float = 0.0
    top: float = 0.0
    height: float = 0.0
    drops: list[list[_Link]] = field(default_factory=list)

    @property
    def middle(self) -> float:
        return self.left + BOX / 2

    @property
    def right(self) -> float:
        return self.left + BOX

    @property
    def bottom(self) -> float:
        return self.top + self.height


class _Panel:
    """The drawing of one way to split the model."""

    def __init__(
        self, manifest: Manifest, targets: Sequence[Target], ops: Mapping[str, str]
    ) -> None:
        self._targets = targets
        self._stages = manifest.stages_of(targets[0])
        self._compact = len(self._stages) > COMPACT
        self._gap = 26 if self._compact else 40
        self._links = _links(manifest, targets[0])
        self._rows = self._all_rows(manifest, ops)
        self._tracks = _tracks(self._links)
        lanes = len({row.left for row in self._rows})
        self._side = MARGIN + lanes * (BOX + LANE_GAP) - LANE_GAP  # right edge of the columns
        outermost = max(row.left for row in self._rows)
        around = [link for link in self._links if link.reader > link.maker + 1]
        if any(self._rows[link.reader].left == outermost for link in around):
            self._side += LABEL_ROOM
        elif around:
            self._side += TRACK
        tracks = max(self._tracks.values(), default=-1) + 1
        self._heading = f"{self._names()}: {self._counts()}"
        heading = 2 * MARGIN + _length(self._heading, 12)
        self.width = max(self._side + tracks * TRACK + MARGIN, heading)
        self.height = self._place()

    def _names(self) -> str:
        return ", ".join(
            f"{each.name} ({each.compute_capability or 'portable'})" for each in self._targets
        )

    def _counts(self) -> str:
        engines = [stage for stage in self._stages if stage.runtime == "tensorrt"]
        share = sum(stage.flops_share for stage in engines)
        return (
            f"{count(len(engines), 'engine')}, "
            f"{count(len(self._stages) - len(engines), 'fallback stage')}, "
            f"{percent(share)} of the FLOPs in TensorRT"
        )

    # --- rows

    def _all_rows(self, manifest: Manifest, ops: Mapping[str, str]) -> list[_Row]:
        kinds = [name for name in RUNTIMES if any(s.runtime == name for s in self._stages)]
        inputs = [tensor.name for tensor in manifest.inputs]
        outputs = [tensor.name for tensor in manifest.outputs]
        rows = [
            _end("inputs", inputs),
            *(self._row(stage, ops) for stage in self._stages),
            _end("outputs", outputs),
        ]
        for row in rows:
            lane = kinds.index(row.kind) if row.kind in kinds else 0
            row.left = MARGIN + lane * (BOX + LANE_GAP)
        return rows

    def _row(self, stage: Stage, ops: Mapping[str, str]) -> _Row:
        counted = Counter(ops.get(name, "?") for name in stage.nodes)
        refused = Counter(why.op for why in stage.why if why.by != "rule")
        off = refused or Counter(why.op for why in stage.why)
        said = f"{'refused' if refused else 'off'}: {_listed(off)}" if off else _listed(counted)
        size = f"{count(len(stage.nodes), 'node')} · {percent(stage.flops_share)} FLOPs"
        precision = _precisions(stage)
        head = str(stage.id) if stage.name is None else f"{stage.id} · {stage.name}"
        lines = [head, f"{size} · {precision}" if precision else size, said]
        if self._compact:
            size = f"{count(len(stage.nodes), 'node')} · {percent(stage.flops_share)}"
            lines = [head, f"{size} · {said}"]
        words = dict.fromkeys(
            f"{why.op} {why.node}; {why.by}: {' '.join(why.text.split())}" for why in stage.why
        )
        tip = [
            f"stage {head}, {RUNTIMES[stage.runtime]}, {precision}".removesuffix(", "),
            _listed(counted, most=99),
            *_some(words),
        ]
        return _Row(stage.runtime, lines, RUNTIMES[stage.runtime], "\n".join(tip))

    def _place(self) -> float:
        """Give every row its place; return the height of all."""
        for number, row in enumerate(self._rows):
            coming = [k for k in self._links if k.reader == number and k.maker < number - 1]
            coming.sort(key=lambda link: (-link.bytes, link.maker))
            row.drops = [[link] for link in coming[:MOST_DROPS]]
            if len(coming) > MOST_DROPS:
                row.drops[-1] = coming[MOST_DROPS - 1 :]
        top = 34.0
        for number, row in enumerate(self._rows):
            lines = PILL_HEIGHT if row.kind == "ends" else 14 + 17 * len(row.lines)
            leaving = number in self._tracks
            row.top = top
            row.height = max(lines, 6 + DROP * len(row.drops) + 12 * leaving)
            top = row.bottom + self._gap
        return top - self._gap

    # --- drawing

    def draw(self, top: float) -> Iterator[str]:
        """Yield the shapes, the panel's upper edge at ``top``."""
        for row in self._rows:
            row.top += top
        yield text(MARGIN, top + 12, self._heading, "head")
        for link in self._links:
            if link.reader == link.maker + 1:
                yield from self._straight(link)
        for maker in self._tracks:
            yield from self._around(maker)
        for row in self._rows:
            yield from self._box(row)
        for row in self._rows:
            yield from self._incoming(row)

    def _straight(self, link: _Link) -> Iterator[str]:
        above, below = self._rows[link.maker], self._rows[link.reader]
        x, y, to_x, to_y = above.middle, above.bottom, below.middle, below.top
        half = (to_y - y) / 2
        path = f"M{px(x)} {px(y)}C{px(x)} {px(y + half)} {px(to_x)} {px(y + half)} "
        path += f"{px(to_x)} {px(to_y - 5)}"
        tip = f"M{px(to_x)} {px(to_y)}l-5 -8h10z"
        yield _group(_tip(link), _line(path, above.kind, link), _point(tip, above.kind))
        # On the side from which the line does not come.
        side = -1 if x > to_x else 1
        room = BOX / 2 - 20
        label = _fitted(link.label(), room, 11)
        anchor = "end" if side < 0 else "start"
        yield text(to_x + side * 10, to_y - 8, label, "label", anchor)

    def _around(self, maker: int) -> Iterator[str]:
        """Yield what leaves a row on the right, as far as its last reader."""
        row = self._rows[maker]
        x, y = self._x_of(maker), self._exit(maker)
        links = [k for k in self._links if k.maker == maker and k.reader > maker + 1]
        together = _Link(maker, maker)
        for link in links:
            together.tensors.update(link.tensors)
        ends = [self._height_of(link) for link in links]
        path = f"M{px(row.right)} {px(y)}H{px(x)}V{px(max(ends))}"
        yield _group(_tip(together), _line(path, row.kind, max(links, key=lambda k: k.thickness)))

    def _x_of(self, maker: int) -> float:
        return self._side + self._tracks[maker] * TRACK + TRACK / 2

    def _exit(self, maker: int) -> float:
        return self._rows[maker].bottom - 8

    def _height_of(self, link: _Link) -> float:
        """Return how far down a line comes into the box of its reader."""
        row = self._rows[link.reader]
        position = next(n for n, drop in enumerate(row.drops) if link in drop)
        return row.top + DROP * (position + 1)

    def _incoming(self, row: _Row) -> Iterator[str]:
        """Yield the lines that come into a row on the right, each with what it brings."""
        for drop in row.drops:
            for link in drop:
                kind, x, y = self._rows[link.maker].kind, self._x_of(link.maker), 0.0
                y = self._height_of(link)
                path = f"M{px(x)} {px(y)}H{px(row.right + 6)}"
                tip = f"M{px(row.right)} {px(y)}l8 -4v8z"
                yield _group(_tip(link), _line(path, kind, link), _point(tip, kind))
            first = drop[0]
            if len(drop) == 1:
                start = f"{self._called(first.maker)}: "
                label = first.label(start)
            else:
                every = _Link(0, 0)
                for link in drop:
                    every.tensors.update(link.tensors)
                label = every.label(f"from {len(drop)} more: ")
            room = self._room(row)
            y = self._height_of(first) - first.thickness / 2 - 3
            yield text(row.right + 12, y, _fitted(label, room, 11), "label")

    def _called(self, number: int) -> str:
        if self._rows[number].kind == "ends":
            return self._rows[number].lines[0].split(":")[0]
        return f"from {self._stages[number - 1].id}"

    def _room(self, row: _Row) -> float:
        return self._side - row.right - 16

    def _box(self, row: _Row) -> Iterator[str]:
        corner = 13 if row.kind == "ends" else 4
        place = f'x="{px(row.left)}" y="{px(row.top)}" height="{px(row.height)}"'
        shapes = [f'<rect class="{row.kind} box" {place} width="{BOX}" rx="{corner}"/>']
        if row.kind != "ends":
            shapes.append(f'<rect class="{row.kind} bar" {place} width="6" rx="3"/>')
        x, room = row.left + 16, BOX - 28.0
        for number, line in enumerate(row.lines):
            first = number == 0
            left = room - (_length(row.corner, 12) + 8 if first and row.corner else 0)
            kind = "head" if first and row.kind != "ends" else ""
            factor = 1.08 if kind else 1.0
            fitted = _fitted(line, left / factor, 12)
            shapes.append(text(x, row.top + 20 + 17 * number - 2, fitted, kind))
        if row.corner:
            shapes.append(text(row.right - 12, row.top + 18, row.corner, "note", "end"))
        yield _group(row.tip, *shapes)


def _end(word: str, names: Sequence[str]) -> _Row:
    """Return where inputs come in or outputs go out."""
    return _Row(
        "ends", [f"{word}: {', '.join(names) or 'none'}"], "", "\n".join([word, *_some(names)])
    )


# --- what goes where -----------------------------------------------------------------------------


def _links(manifest: Manifest, target: Target) -> list[_Link]:
    """Return what rows hand to one another: the inputs are row 0, the outputs come last."""
    stages = manifest.stages_of(target)
    row_of = {stage.id: number for number, stage in enumerate(stages, start=1)}
    last = len(stages) + 1
    links: dict[tuple[int, int], _Link] = {}

    def add(maker: int, reader: int, tensor: str, size: int | None) -> None:
        link = links.setdefault((maker, reader), _Link(maker, reader))
        link.tensors[tensor] = size

    given = {tensor.name for tensor in manifest.inputs}
    wanted = [tensor.name for tensor in manifest.outputs]
    for stage in stages:
        for name in stage.inputs:
            if name in given:
                add(0, row_of[stage.id], name, None)
    for crossing in target.crossings:
        for reader in crossing.readers:
            add(row_of[crossing.maker], row_of[reader], crossing.tensor, crossing.bytes)
    made = {name: row_of[stage.id] for stage in stages for name in stage.outputs}
    for name in wanted:
        if name in made or name in given:
            add(made.get(name, 0), last, name, None)
    return [links[key] for key in sorted(links)]


def _tracks(links: Iterable[_Link]) -> dict[int, int]:
    """Return on which track on the right each row's line runs, for rows that are read later on.

    Two lines share a track where one ends above the row in which the other begins.
    """
    ends: dict[int, int] = {}
    for link in links:
        if link.reader > link.maker + 1:
            ends[link.maker] = max(link.reader, ends.get(link.maker, 0))
    taken: list[list[tuple[int, int]]] = []
    found: dict[int, int] = {}
    for maker, end in sorted(ends.items(), key=lambda each: (each[1] - each[0], each)):
        room = (
            number
            for number, spans in enumerate(taken)
            if all(end < begin or maker > other for begin, other in spans)
        )
        track = next(room, len(taken))
        if track == len(taken):
            taken.append([])
        taken[track].append((maker, end))
        found[maker] = track
    return dict(sorted(found.items()))


# --- shapes --------------------------------------------------------------------------------------


def _line(path: str, kind: str, link: _Link) -> str:
    return f'<path class="{kind} line" d="{path}" stroke-width="{px(link.thickness)}"/>'


def _point(path: str, kind: str) -> str:
    return f'<path class="{kind} tip" d="{path}"/>'


def _group(tip: str, *shapes: str) -> str:
    return f"<g><title>{escaped(tip)}</title>{''.join(shapes)}</g>"


def _tip(link: _Link) -> str:
    """Return what is shown of a line when the pointer rests on it."""
    sizes = {name: "" if n is None else f" {bytes_(n)}" for name, n in link.tensors.items()}
    return "\n".join(_some([f"{name}{size}" for name, size in sizes.items()]))


def _some(names: Iterable[str]) -> list[str]:
    listed = list(names)
    if len(listed) <= MOST_NAMES:
        return listed
    return [*listed[:MOST_NAMES], f"and {len(listed) - MOST_NAMES} more"]


def _precisions(stage: Stage) -> str:
    """Return what ``stage`` computes in, most first, each with its share where they are several."""
    flops = stage.precision.flops if stage.precision else {}
    ordered = sorted(flops, key=lambda name: (-flops[name], name))
    shares = [f"{name} {flops[name]:.0%}" for name in ordered if flops[name] >= 0.005]
    return ", ".join(shares) if len(shares) > 1 else ordered[0] if ordered else ""


def _tensors(names: Mapping[str, object]) -> str:
    return count(len(names), "tensor")


def _listed(counts: Counter[str], most: int = 8) -> str:
    ordered = sorted(counts.items(), key=lambda each: (-each[1], each[0]))
    shown = [f"{op} ×{number}" if number > 1 else op for op, number in ordered[:most]]
    return ", ".join([*shown, "…"] if len(ordered) > most else shown)


def _fitted(text: str, room: float, size: int) -> str:
    """Return as much of ``text`` as ``room`` pixels hold."""
    if _length(text, size) <= room:
        return text
    kept = ""
    for character in text:
        if _length(f"{kept}{character}…", size) > room:
            break
        kept += character
    return f"{kept.rstrip()}…"


def _length(text: str, size: int) -> float:
    """Return about how many pixels ``text`` takes, rather too many: fonts differ."""
    return sum(_width(character) for character in text) * size


def _width(character: str) -> float:
    """Return the width of a character, as a part of the size of the font."""
    if unicodedata.east_asian_width(character) in "WF":
        return 1.0
    if unicodedata.combining(character):
        return 0.0
    if character in "iljtfrI.,:;'|!()[]/ ·-":
        return 0.40
    return 0.98 if character in "mwMW%@…—" else 0.72 if character.isupper() else 0.64
