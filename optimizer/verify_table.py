"""A verification as text for people: the worst outputs first, then low scores, then what ran."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

from optc.optimizer.noise import FACTOR
from optc.optimizer.runtime import RunReport

if TYPE_CHECKING:
    from optc.optimizer.verify import Finding, Verification

MOST_ROWS = 30
MOST_SCORES = 4
WORDS = {
    "met": "met",
    "within noise": "within the noise of the original",
    "not met": "NOT MET",
}


def text_of(verification: Verification) -> str:
    """Return ``verification`` as a person reads it, without a line end at the end."""
    findings = verification.worst_first()
    parts = []
    if findings:
        parts.append(_table(findings[:MOST_ROWS], targets=_targets_differ(findings)))
        if len(findings) > MOST_ROWS:
            parts.append(f"and {len(findings) - MOST_ROWS} outputs that are nearer (see --json)")
    parts += _score_lines(findings)
    parts.append(_verdict(verification))
    parts.append(f"original: {verification.model} on {verification.reference}")
    parts += [_where(report) for report in verification.ran.values()]
    return "\n".join(parts)


def _targets_differ(findings: list[Finding]) -> bool:
    return len({finding.targets for finding in findings}) > 1


def _table(findings: list[Finding], *, targets: bool) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("output", "case", *(["targets"] if targets else []), "verdict"):
        table.add_column(heading)
    for heading in ("max abs", "mean abs", "max rel", "outside", "noise"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("worst at")
    for finding in findings:
        names = [finding.output, finding.case, *([", ".join(finding.targets)] if targets else [])]
        table.add_row(*names, WORDS[finding.verdict], *_figures(finding))
    # Where nobody looks, as in a log of CI, lines may be as long as they need to be.
    width = max(shutil.get_terminal_size((160, 24)).columns, 100)
    text = io.StringIO()
    console = Console(file=text, width=width, markup=False, highlight=False, color_system=None)
    console.print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().strip("\n").splitlines())


def _figures(finding: Finding) -> tuple[str, ...]:
    difference, floor = finding.difference, finding.floor
    if difference is None:
        return ("", "", "", "missing", "", "")
    if difference.dtypes is not None:
        return ("", "", "", " is not ".join(reversed(difference.dtypes)), "", "")
    noise = "" if floor is None else f"{floor.max_abs:.1e}"
    if not difference.same_shape:
        shapes = f"{list(difference.found_shape)}, not {list(difference.expected_shape)}"
        return ("", "", "", shapes, noise, finding.rows or "")
    share = difference.share_outside
    return (
        f"{difference.max_abs:.1e}",
        f"{difference.mean_abs:.1e}",
        f"{difference.max_rel:.1e}",
        "0" if share == 0 else f"{share:.2%}" if share >= 0.0001 else f"{difference.outside}",
        noise,
        finding.rows or ("" if difference.worst is None else str(list(difference.worst))),
    )


def _score_lines(findings: list[Finding]) -> Iterator[str]:
    """Yield the error by score of outputs that are scores, the worst case of each."""
    told: set[str] = set()
    for finding in findings:
        difference = finding.difference
        if difference is None or not difference.max_abs or finding.output in told:
            continue
        told.add(finding.output)
        if difference.bands and len(told) <= MOST_SCORES:
            bands = ", ".join(
                f"{band.low:g} to {band.high:g}: {band.max_abs:.1e} at most of {band.elements}"
                for band in difference.bands
            )
            yield f"error of `{finding.output}` by score ({finding.case}): {bands}"


def _verdict(verification: Verification) -> str:
    findings = verification.findings
    bad = sum(finding.verdict == "not met" for finding in findings)
    noisy = sum(finding.verdict == "within noise" for finding in findings)
    tolerance = verification.tolerance
    allowed = f"atol {tolerance.atol:g}, rtol {tolerance.rtol:g}"
    text = f"{len(findings) - bad - noisy} of {len(findings)} outputs within {allowed}"
    if noisy:
        text += f", {noisy} within {FACTOR} times the noise of the original"
    if bad:
        text += f", {bad} NOT"
    if verification.not_compared:
        cases = ", ".join(case.case for case in verification.not_compared)
        text += f"; not compared: {cases}"
    return text


def _where(report: RunReport) -> str:
    """Return what ran the package; above all whether the engines themselves did."""
    own = [run for run in report.stages if run.runtime == "tensorrt"]
    ort = [run for run in report.stages if run.runtime != "tensorrt"]
    parts = []
    if own:
        parts.append(f"{_stages([run.id for run in own])} as engines on {own[0].device}")
    if ort:
        reasons = dict.fromkeys(run.why for run in ort if run.why)
        why = f" ({'; '.join(reasons)})" if reasons else ""
        parts.append(
            f"{_stages([run.id for run in ort])} as ONNX on ONNX Runtime on the CPU, its "
            f"optimisations on; no engine was run for them{why}"
        )
    return f"package, target {report.target}: {', and '.join(parts) or 'no stage'}"


def _stages(ids: list[int]) -> str:
    shown = ", ".join(map(str, ids[:8])) + (", …" if len(ids) > 8 else "")
    return f"stage{'' if len(ids) == 1 else 's'} {shown}"
