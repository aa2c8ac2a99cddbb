"""What a search for precision found: as text for people, and for a manifest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from optc.optimizer.compare import number
from optc.optimizer.wording import percent, printed

if TYPE_CHECKING:
    from rich.table import Table

    from optc.optimizer.precision_search import Found, Ranked

MOST_ROWS = 20
MOST_OTHERS = 5
MOST_RANKED = 200
"""Nodes in the manifest's ranking; those that are kept are all in it."""


def evidence_of(found: Found) -> dict[str, Any]:
    """Return what was measured, as JSON can hold it."""
    kept, others = found.kept, [ranked for ranked in found.ranking if not ranked.kept]
    shown = {each.node for each in (*kept, *others[: max(0, MOST_RANKED - len(kept))])}
    return {
        "share": found.share,
        "badness": number(found.badness),
        "badness_of_lowest": number(found.lowest),
        "margin": found.margin,
        "met": found.met,
        "complete": found.complete,
        "reason": found.reason,
        "samples": found.samples,
        "ranking": [_entry(each) for each in found.ranking if each.node in shown],
        "not_ranked": len(found.ranking) - len(shown),
        "curve": {
            "sample": found.curve_sample,
            "points": [
                {
                    "share": point.share,
                    "badness": number(point.badness),
                    "kept": point.kept,
                    "chosen": point.chosen,
                }
                for point in found.curve
            ],
        },
    }


def _entry(ranked: Ranked) -> dict[str, Any]:
    return {
        "node": ranked.node,
        "op": ranked.op,
        "precision": ranked.precision,
        "lowest": ranked.lowest,
        "cost": number(ranked.cost),
        "measured": ranked.measured,
        "flops_share": ranked.flops_share,
        "why": ranked.why,
    }


def text_of(found: Found) -> str:
    """Return what was found as a person reads it, without a line end at the end."""
    parts = [_verdict(found)]
    if found.reason:
        parts.append(found.reason)
    if len(found.curve) > 1:
        parts += [f"trade-off, measured on {found.curve_sample}:", _curve(found)]
    if shown := _worth_a_row(found):
        parts += ["what the precision of nodes costs, 1 being the tolerance:", _ranking(shown)]
        if left := len(found.kept) - sum(ranked.kept for ranked in shown):
            parts.append(f"and {left} more that are kept (see --json)")
    return "\n".join(parts)


def _verdict(found: Found) -> str:
    count = round(found.runs * found.samples)  # on one input each
    runs = f"{count} runs over {found.samples} input{'s' if found.samples > 1 else ''}"
    kept = len(found.kept)
    text = f"{percent(found.share)} of the FLOPs in low precision"
    if kept:
        text += f", {kept} node{'s' if kept > 1 else ''} kept in more"
    text += f"; error {found.badness:.3g} of the tolerance"
    if kept and found.lowest is not None:
        text += f", with none kept {found.lowest:.3g}"
    return f"{text}; {runs}, {found.seconds:.1f} s"


def _worth_a_row(found: Found) -> list[Ranked]:
    """Return those kept, and a few that cost the most of the others."""
    kept = list(found.kept)[:MOST_ROWS]
    others = [each for each in found.ranking if not each.kept and each.cost > 0]
    return sorted([*kept, *others[:MOST_OTHERS]], key=lambda each: -each.cost)


def _curve(found: Found) -> str:
    table = _table()
    for heading in ("FLOPs in low precision", "error", "nodes kept"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for point in found.curve:
        mark = "chosen" if point.chosen else ""
        table.add_row(f"{point.share:.1%}", f"{point.badness:.3g}", str(point.kept), mark)
    return printed(table)


def _ranking(ranked: Sequence[Ranked]) -> str:
    table = _table()
    table.add_column("node", overflow="fold")
    table.add_column("op")
    table.add_column("in")
    table.add_column("cost", justify="right", no_wrap=True)
    table.add_column("FLOPs", justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for each in ranked:
        cost = f"{each.cost:.3g}" if each.measured else f"~{each.cost:.2g}"
        table.add_row(each.node, each.op, each.precision, cost, percent(each.flops_share), each.why)
    return printed(table)


def _table() -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, pad_edge=False)
