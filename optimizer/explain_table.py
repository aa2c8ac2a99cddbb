"""Shows an explanation to people: the cuts one by one, then the work list as a table."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

from optc.optimizer.wording import bytes_, count, percent, printed, without_numbers

if TYPE_CHECKING:
    from rich.table import Table

    from optc.optimizer.explain import Cut, Explanation, Item, Refusal, Sent, Tally

WIDTH = 100
"""Characters of a line, unless the terminal is narrower."""

MOST_NAMES = 4
"""Nodes or tensors named to a person; the JSON names all."""

LONGEST_EXTENT = 24
"""Characters of an extent shown to a person."""

MOST_ITEMS = 20
"""Lines of the work list shown to a person."""

MOST_CHARACTERS = 320
"""Characters of a reason shown to a person."""

LABEL = 14
"""Characters before what a line says of a cut."""


def text_of(explanations: Sequence[Explanation]) -> str:
    """Return ``explanations`` as text, without a line that is cut off."""
    width = WIDTH
    if sys.stdout.isatty():
        width = max(60, min(WIDTH, shutil.get_terminal_size().columns))
    lines = [line for each in explanations for line in ("", *_lines(each, width))]
    return "\n".join(line.rstrip() for line in lines)


def _lines(explained: Explanation, width: int) -> Iterator[str]:
    names = ", ".join(explained.targets)
    if not explained.cuts:
        yield f"{names}: nothing is cut"
        return
    now = explained.now
    yield (
        f"{names}: {count(len(explained.cuts), 'cut')}, {_size(now.bytes, now.most_bytes)} "
        f"between stages{_unknown(now)}"
    )
    for number, cut in enumerate(explained.cuts, start=1):
        yield ""
        yield from _cut(number, cut, width)
    yield ""
    yield from _work(explained, width)


# --- a cut ---------------------------------------------------------------------------------------


def _cut(number: int, cut: Cut, width: int) -> Iterator[str]:
    left = "the start" if cut.before is None else f"engine {cut.before}"
    right = "the end" if cut.after is None else f"engine {cut.after}"
    what = ""
    if cut.stages:
        plural = "stages" if len(cut.stages) > 1 else "stage"
        what = f": fallback {plural} {', '.join(map(str, cut.stages))}"
    yield f"cut {number}, between {left} and {right}{what}"
    for group in alike(cut.refused):
        first = group[0]
        label = "follows" if first.follows else "refused"
        yield from _said(label, f"{_ops(group)}: {_few([each.node for each in group])}", width)
        yield from _said(f" by {first.by}", _short(first.text), width)
    if cut.others:
        yield from _said("beside", f"{count(cut.others, 'refused node')} that force nothing", width)
    if cut.points:
        yield from _said("point", _few(cut.points), width)
    if cut.scopes:
        yield from _said("scope", _few(cut.scopes), width)
    for label, sent in (
        ("goes in" if cut.stages else "crosses", cut.enters),
        ("within", cut.within),
        ("comes out", cut.leaves),
        ("passes by", cut.passes),
    ):
        if sent:
            yield from _sent(label, sent, width)


def alike(refused: Iterable[Refusal]) -> list[list[Refusal]]:
    """Return ``refused`` in groups with the same judge and op, or the same words of a rule."""
    groups: dict[tuple[bool, str, str], list[Refusal]] = {}
    for each in refused:
        key = each.op if each.by in ("parser", "builder") else without_numbers(each.text)
        groups.setdefault((each.follows, each.by, key), []).append(each)
    return list(groups.values())


def _ops(refused: Sequence[Refusal]) -> str:
    counts = Counter(each.op for each in refused)
    return _few([f"{op} x{n}" if n > 1 else op for op, n in counts.most_common()])


def _sent(label: str, sent: Sequence[Sent], width: int) -> Iterator[str]:
    """Yield what crosses: how much, then the largest tensors, a line each."""
    known = [each for each in sent if each.bytes is not None and each.most_bytes is not None]
    size = _size(sum(e.bytes or 0 for e in known), sum(e.most_bytes or 0 for e in known))
    unknown = len(sent) - len(known)
    more = f" and {unknown} of unknown size" if unknown else ""
    yield from _said(label, f"{count(len(sent), 'tensor')}, {size}{more}", width)
    for each in sent[:MOST_NAMES]:
        usual = "?" if each.bytes is None else bytes_(each.bytes)
        yield from _said("", f"{usual:>7}  {_type(each)}  {each.tensor}", width, indent=11)
    if len(sent) > MOST_NAMES:
        yield from _said("", f"{'':>7}  and {len(sent) - MOST_NAMES} more", width)


def _type(sent: Sent) -> str:
    if sent.shape is None:
        return f"{sent.dtype or '?'} of unknown rank"
    extents = [each if len(str(each)) <= LONGEST_EXTENT else "…" for each in sent.shape]
    return f"{sent.dtype or '?'} [{', '.join(map(str, extents))}]"


# --- the work list -------------------------------------------------------------------------------


def _work(explained: Explanation, width: int) -> Iterator[str]:
    if not explained.work:
        yield "there is nothing to support: no node is refused"
        return
    yield "what it would save, if TensorRT took it; most first"
    yield from ("", *printed(_table(explained), width).splitlines(), "")
    for number, item in enumerate(explained.work[:MOST_ITEMS], start=1):
        yield from _said(f"{number} {item.by}", _short(item.text), width)
        for words in _alone(item):
            yield from _said(" alone", words, width)
        yield from _said(" do", item.todo, width)
    if len(explained.work) > MOST_ITEMS:
        yield f"and {len(explained.work) - MOST_ITEMS} more; `--json` has all"
    if explained.unseen:
        yield f"{count(explained.unseen, 'node')} more were not looked at alone"
    if explained.pair is not None:
        first, second = (number + 1 for number in explained.pair.items)
        words = f"neither saves a stage alone; {_left(explained.pair.then)}"
        yield from _said(f"{first} and {second}", words, width)


def _alone(item: Item) -> Iterator[str]:
    """Yield what nodes leave that save engines alone, those together that leave the same."""
    groups: dict[Tally, list[str]] = {}
    for each in item.alone:
        groups.setdefault(each.then, []).append(each.node)
    for then, names in list(groups.items())[:MOST_NAMES]:
        yield f"{_few(names)}{', each' if len(names) > 1 else ''}: {_left(then)}"
    if len(groups) > MOST_NAMES:
        more = sum(len(names) for names in list(groups.values())[MOST_NAMES:])
        yield f"and {count(more, 'node')} that save less"


def _table(explained: Explanation) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("what", overflow="fold", ratio=1)
    for heading in ("engines", "fallback", "between stages", "FLOPs in TensorRT"):
        table.add_column(heading, justify="right", overflow="fold")
    now = explained.now
    for number, item in enumerate(explained.work[:MOST_ITEMS], start=1):
        table.add_row(str(number), _what(item), *_change(now, item.then))
    if len(explained.work) > 1 and explained.all is not None:
        table.add_row("", "all of these together", *_change(now, explained.all))
    return table


def _what(item: Item) -> str:
    if item.kind == "node":
        several = f" x{len(item.nodes)}" if len(item.nodes) > 1 else ""
        ops = item.what.split(", ")
        return f"{_few(ops)}{several}" if len(item.nodes) > 1 else f"{item.what} {item.nodes[0]}"
    return {"point": "point", "scope": "scope", "range": "range of"}[item.kind] + f" {item.what}"


def _change(now: Tally, then: Tally | None) -> tuple[str, str, str, str]:
    if then is None:
        return ("not looked at", "", "", "")
    return (
        _from_to(str(now.engines), str(then.engines)),
        _from_to(str(now.fallback_stages), str(then.fallback_stages)),
        _from_to(bytes_(now.bytes), bytes_(then.bytes)) + _unknown(then),
        _from_to(percent(now.flops_share), percent(then.flops_share)),
    )


def _from_to(now: str, then: str) -> str:
    return now if now == then else f"{now} → {then}"


def _left(then: Tally) -> str:
    """Return what is left of the split."""
    return (
        f"{count(then.engines, 'engine')}, {count(then.fallback_stages, 'fallback stage')}, "
        f"{bytes_(then.bytes)} between stages, {percent(then.flops_share)} of the FLOPs in TensorRT"
    )


# --- words ---------------------------------------------------------------------------------------


def _size(usual: int, most: int) -> str:
    return bytes_(usual) if usual == most else f"{bytes_(usual)} (at most {bytes_(most)})"


def _unknown(tally: Tally) -> str:
    return f" + {count(tally.unbounded, 'tensor')} of unknown size" if tally.unbounded else ""


def _few(listed: Sequence[str]) -> str:
    more = len(listed) - MOST_NAMES
    shown = ", ".join(listed[:MOST_NAMES] if more > 0 else listed)
    return f"{shown} and {more} more" if more > 0 else shown


def _short(text: str) -> str:
    said = " ".join(text.split())
    return said if len(said) <= MOST_CHARACTERS else f"{said[: MOST_CHARACTERS - 2]} …"


def _said(label: str, words: str, width: int, *, indent: int = 0) -> list[str]:
    """Return ``words`` in lines behind ``label``; all but the first go in by ``indent`` more."""
    lines = wrap(
        words,
        width - LABEL,
        break_on_hyphens=False,
        subsequent_indent=" " * indent,
        drop_whitespace=True,
    ) or [""]
    labels = [f"  {label}", *[""] * len(lines)]
    return [f"{head:<{LABEL}}{line}" for head, line in zip(labels, lines, strict=False)]
