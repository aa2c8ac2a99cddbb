"""What a person reads when a compile or a plan is done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from optc.optimizer.wording import count, percent, without_numbers
from optc.specs.diagnostic import Diagnostic, NotMetError
from optc.specs.manifest import Manifest, Stage

if TYPE_CHECKING:
    from rich.console import JustifyMethod
    from rich.table import Table

    from optc.optimizer.explain import Explanation
    from optc.optimizer.verify import Verification

WIDTH_OF_FILES = 160
"""Characters of a line where the output goes to a file or another program."""

MOST_CHARACTERS = 320
"""Characters of a reason shown to a person."""

MOST_REASONS = 12
"""Reasons shown to a person; the manifest has all."""


@dataclass(slots=True)
class Outcome:
    """What came of a compile.

    Attributes:
        spec: As the user wrote it.
        folder: Of the package.
        manifest: Of the package.
        seconds: Wall time of all.
        verification: What holding the package against the original gave.
        unmet: What of ``verify:`` and ``gate:`` is not met.
        notes: Warnings and notes.
        precision: What the search for precision found, as text; "" where there was none.
    """

    spec: Path
    folder: Path
    manifest: Manifest
    seconds: float
    verification: Verification | None = None
    unmet: list[Diagnostic] = field(default_factory=list)
    notes: list[Diagnostic] = field(default_factory=list)
    precision: str = ""

    @property
    def diagnostics(self) -> list[Diagnostic]:
        """All there is to say beside the result."""
        return [*self.notes, *self.unmet]

    @property
    def exit_code(self) -> int:
        """0, or 3 where something asked for is not met."""
        return NotMetError.exit_code if self.unmet else 0

    def check(self) -> None:
        """Raise NotMetError where something asked for is not met."""
        if self.unmet:
            raise NotMetError(*self.unmet)

    def as_json(self) -> dict[str, Any]:
        """Return the outcome for programs."""
        return {
            "ok": not self.unmet,
            "spec": str(self.spec),
            "output": str(self.folder),
            "seconds": round(self.seconds, 3),
            "manifest": self.manifest.model_dump(mode="json"),
            "verification": self.verification and self.verification.as_json(),
            "diagnostics": [d.as_json() for d in self.diagnostics],
        }

    def print(self) -> None:
        """Print the outcome for people."""
        print_stages(self.manifest)
        if self.precision:
            print(f"precision, simulated: {self.precision}")
        if self.verification is not None:
            print(self.verification.render())
        state = "written, but not all that was asked for is met" if self.unmet else "written"
        print(f"{self.folder}: {state}, in {self.seconds:.1f} s")


@dataclass(slots=True)
class Planned:
    """What a compile would do.

    Attributes:
        manifest: As it would be, without files and engines.
        explained: Why each target is split as it is; None where nobody asked.
        notes: Warnings and notes.
        precision: As in `Outcome`.
        picture: Of the stages, as an SVG.
    """

    manifest: Manifest
    explained: list[Explanation] | None = None
    notes: list[Diagnostic] = field(default_factory=list)
    precision: str = ""
    picture: str = ""

    @property
    def diagnostics(self) -> list[Diagnostic]:
        """All there is to say beside the result."""
        return self.notes

    def as_json(self) -> dict[str, Any]:
        """Return the plan for programs: the manifest without files and engines."""
        plan: dict[str, Any] = self.manifest.as_plan()
        if self.explained is not None:
            plan["explanation"] = [each.as_json() for each in self.explained]
        return plan

    def print(self) -> None:
        """Print the plan for people."""
        print_stages(self.manifest)
        if self.explained is not None:
            from optc.optimizer.explain_table import text_of

            print(text_of(self.explained))
        if self.precision:
            print(f"precision, simulated: {self.precision}")
        symbols = sorted({name for profile in self.manifest.profiles for name in profile})
        if symbols:
            print(f"symbols: {', '.join(symbols)}")


def print_stages(manifest: Manifest) -> None:
    """Print what runs where, and why not in TensorRT."""
    from rich.console import Console

    # Wide enough for the table where nobody reads along on a terminal; it is cropped there only.
    console = Console(markup=False, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = WIDTH_OF_FILES
    for target in manifest.targets:
        stages = manifest.stages_of(target)
        engines = [stage for stage in stages if stage.runtime == "tensorrt"]
        share = sum(stage.flops_share for stage in engines)
        capability = target.compute_capability
        what = f"compute capability {capability}" if capability else "portable"
        console.print(
            f"{target.name} ({target.backend}, {what}): {count(len(engines), 'engine')}, "
            f"{count(len(stages) - len(engines), 'fallback stage')}, "
            f"{percent(share)} of the FLOPs in TensorRT"
        )
        console.print(_table(stages, target.name))
    stages = manifest.stages
    lines = (*_rewritten(stages), *_kept(stages), *_reasons(stages))
    for line in lines:
        console.print(line)


def _table(stages: Sequence[Stage], target: str) -> Table:
    from rich import box
    from rich.table import Table

    named = any(stage.name is not None for stage in stages)
    headings: tuple[tuple[str, JustifyMethod], ...] = (
        ("stage", "right"),
        *((("name", "left"),) if named else ()),
        ("runtime    ", "left"),
        ("nodes", "right"),
        ("FLOPs", "right"),
        ("precision", "left"),
        ("engine", "right"),
    )
    rows = []
    for stage in stages:
        engine = stage.engines.get(target)
        size = f"{engine.bytes / 1e6:.1f} MB" if engine else ""
        rows.append(
            (
                str(stage.id),
                *((stage.name or "",) if named else ()),
                stage.runtime,
                str(len(stage.nodes)),
                percent(stage.flops_share),
                _precisions(stage),
                "unconfirmed" if stage.unconfirmed else size,
                _few(stage.outputs),
            )
        )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, (heading, side) in enumerate(headings):  # the names of outputs are cropped, no other
        width = max([len(heading), *(len(row[index]) for row in rows)])
        table.add_column(heading, justify=side, no_wrap=True, min_width=width)
    table.add_column("outputs", no_wrap=True, overflow="ellipsis", ratio=1)
    for row in rows:
        table.add_row(*row)
    return table


def _precisions(stage: Stage) -> str:
    """Return what ``stage`` computes in, by its FLOPs: the precision, or each with its share."""
    if stage.precision is None:
        return ""
    flops = stage.precision.flops
    if len(flops) < 2:
        return next(iter(flops), "")
    largest_first = sorted(flops, key=lambda name: -flops[name])
    return ", ".join(f"{name} {percent(flops[name])}" for name in largest_first)


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} and {len(names) - 1} more"


def _rewritten(stages: Iterable[Stage]) -> list[str]:
    """Return one line for each op and the passes that rewrote nodes of it."""
    # A node is one, in however many stages it stands for different targets.
    nodes = {
        (each.node, each.op, each.passes): None for stage in stages for each in stage.legalised
    }
    counted = Counter((op, passes) for _, op, passes in nodes)
    return [
        f"rewritten for TensorRT: {op} x{times}, by {', '.join(passes)}"
        for (op, passes), times in counted.items()
    ]


def _kept(stages: Iterable[Stage]) -> list[str]:
    """Return a line for each reason, other than its cost, to keep nodes in more than asked for."""
    kept = {
        (each.node, each.op, each.precision, each.by, " ".join(each.text.split())): None
        for stage in stages
        if stage.precision
        for each in stage.precision.kept
        if each.by != "search"
    }
    reasons = Counter((op, precision, by, text) for _, op, precision, by, text in kept)
    lines = []
    for (op, precision, by, text), times in reasons.most_common(MOST_REASONS):
        said = shorten(text, MOST_CHARACTERS, placeholder=" …")
        lines.append(f"kept in {precision}: {op} x{times}; {by}: {said}")
    if len(reasons) > MOST_REASONS:
        lines.append(f"and {len(reasons) - MOST_REASONS} more reasons in the manifest")
    return lines


def _reasons(stages: Iterable[Stage]) -> list[str]:
    """Return one line for each reason, the nodes it holds for counted by op.

    Words that differ only in numbers, or in the node they name, are one reason; of what TensorRT says
    of an op, the first counts. The manifest has every word of each.
    """
    ops: dict[tuple[str, str], Counter[str]] = {}
    words: dict[tuple[str, str], str] = {}
    for stage in stages:
        for reason in stage.why:
            text = " ".join(reason.text.replace(f"`{reason.node}`", "it").split())
            own = reason.op if reason.by in ("parser", "builder") else without_numbers(text)
            key = (reason.by, own)
            words.setdefault(key, text)
            ops.setdefault(key, Counter())[reason.op] += 1
    lines = []
    for key, counted in list(ops.items())[:MOST_REASONS]:
        listed = ", ".join(f"{op} x{n}" if n > 1 else op for op, n in counted.most_common(4))
        more = f" and {len(counted) - 4} other ops" if len(counted) > 4 else ""
        said = shorten(words[key], MOST_CHARACTERS, placeholder=" …")
        lines.append(f"not in TensorRT: {listed}{more}; {key[0]}: {said}")
    if len(ops) > MOST_REASONS:
        lines.append(f"and {len(ops) - MOST_REASONS} more reasons in the manifest")
    return lines
