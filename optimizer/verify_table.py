"""A verification as text for people: the worst outputs first, then low scores, then what ran."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

from optc.optimizer.detection import BANDS
from optc.optimizer.noise import FACTOR
from optc.optimizer.runtime import RunReport, StageRun
from optc.optimizer.wording import printed

if TYPE_CHECKING:
    from optc.optimizer.verify import Finding, Verification

MOST_ROWS = 30
MOST_SCORES = 4
NO_GROUP = "(no group)"
METRICS = {
    "tolerance": "share used of atol and rtol",
    "of_scale": "largest error of the scale",
    "sqnr_db": "SQNR in dB",
    "cosine": "cosine",
    "top_k": "best entries the same",
    "agreement": "equal",
    "scores": "largest error of scores",
    "boxes_low": "boxes below 0.2 matched",
    "boxes_middle": "boxes 0.2 to 0.5 matched",
    "boxes_high": "boxes above 0.5 matched",
    "boxes_overlap": "mean overlap of boxes",
    "boxes_score": "mean difference of scores",
    "boxes_attached": "mean error of what boxes have",
}
WORDS = {
    "met": "met",
    "within noise": "within the noise of the original",
    "not asked": "off, not asked on noise",
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
    parts += _groups(verification)
    parts += _score_lines(findings)
    parts.append(_verdict(verification))
    parts.append(f"original: {verification.model} on {verification.reference}")
    with_engine = verification.with_engine
    parts += [_where(report, with_engine) for report in verification.ran.values()]
    return "\n".join(parts)


def _targets_differ(findings: list[Finding]) -> bool:
    return len({finding.targets for finding in findings}) > 1


def _table(findings: list[Finding], *, targets: bool) -> str:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("output", "case", *(["targets"] if targets else []), "verdict"):
        table.add_column(heading)
    measured = any(not finding.by_element for finding in findings)
    if measured:
        table.add_column("measured, and what is asked")
    for heading in ("max abs", "mean abs", "max rel", "outside", "noise"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("worst at")
    for finding in findings:
        row = [finding.output, _case(finding)]
        if targets:
            row.append(", ".join(finding.targets))
        row.append(WORDS[finding.verdict])
        if measured:
            row.append("\n".join(_measured(finding)))
        table.add_row(*row, *_figures(finding))
    return printed(table)


def _groups(verification: Verification) -> Iterator[str]:
    """Yield the figures by group, where there are groups, or boxes, whose cases are added up."""
    from rich import box
    from rich.table import Table

    groups = verification.groups()
    measures = [measure for figures in groups for measure in figures.measures]
    boxes = any(measure.metric.startswith("boxes") for measure in measures)
    if not boxes and all(figures.group is None for figures in groups):
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("group", "outputs", "measured"):
        table.add_column(heading)
    for heading in ("asked", "worst case", "mean", "in all", "cases"):
        table.add_column(heading, justify="right", no_wrap=True)
    for figures in groups:
        name = NO_GROUP if figures.group is None else figures.group
        for measure in figures.measures:
            table.add_row(
                name,
                ", ".join(measure.outputs),
                METRICS.get(measure.metric, measure.metric),
                f"{measure.limit:.4g}" if measure.limit else "",
                f"{measure.worst:.3g}",
                f"{measure.mean:.3g}",
                "" if measure.counts is None else "{} of {}".format(*measure.counts),
                str(measure.cases),
            )
    yield printed(table)


def _measured(finding: Finding) -> Iterator[str]:
    """Yield what was measured; of boxes once, beside their corners."""
    for judgement in finding.judgements:
        told = not finding.of_boxes or not judgement.met or judgement.metric in BANDS
        if told and judgement.outputs[0] == finding.output:
            yield judgement.words
    others = (each.outputs[0] for each in finding.judgements if each.outputs[0] != finding.output)
    for name in dict.fromkeys(others):
        yield f"with `{name}`"


def _case(finding: Finding) -> str:
    return finding.case if finding.group is None else f"{finding.group}: {finding.case}"


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
    if finding.of_boxes:
        return ("", "", "", "", noise, finding.rows or "")
    share = difference.share_outside
    return (
        f"{difference.max_abs:.1e}",
        f"{difference.mean_abs:.1e}",
        f"{difference.max_rel:.1e}",
        ""
        if not finding.by_tolerance
        else "0"
        if share == 0
        else f"{share:.2%}"
        if share >= 0.0001
        else f"{difference.outside}",
        noise,
        finding.rows or ("" if difference.worst is None else str(list(difference.worst))),
    )


def _score_lines(findings: list[Finding]) -> Iterator[str]:
    """Yield the error by score of outputs that are scores, the worst case of each."""
    told: set[str] = set()
    boxes = {finding.output for finding in findings if finding.of_boxes}
    for finding in findings:
        difference = finding.difference
        if difference is None or not difference.max_abs or finding.output in told | boxes:
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
    noise_only = sum(finding.verdict == "not asked" for finding in findings)
    met = len(findings) - bad - noisy - noise_only
    text = f"{met} of {len(findings)} outputs {verification.criteria}"
    if any(finding.of_boxes for finding in findings):
        text += ", or matched as boxes"
    if noisy:
        text += f", {noisy} within {FACTOR} times the noise of the original"
    if noise_only:
        text += f", {noise_only} not on made-up input, of which it is not asked"
    if bad:
        text += f", {bad} NOT"
    if verification.not_compared:
        cases = ", ".join(case.case for case in verification.not_compared)
        text += f"; not compared: {cases}"
    return text


def _where(report: RunReport, with_engine: AbstractSet[int]) -> str:
    """Return what ran the package; above all whether the engines themselves did."""
    engines = [run for run in report.stages if run.runtime == "tensorrt"]
    instead = [run for run in report.stages if run not in engines and run.id in with_engine]
    fallback = [run for run in report.stages if run not in engines and run not in instead]
    parts = []
    if engines:
        parts.append(f"{_stages(engines)} as engines on {engines[0].device}")
    if instead:
        why = "; ".join(dict.fromkeys(run.why for run in instead if run.why))
        parts.append(f"{_stages(instead)} as ONNX on ONNX Runtime, NOT as engines ({why})")
    torch = [run for run in fallback if run.runtime == "torch"]
    if rest := [run for run in fallback if run not in torch]:
        parts.append(f"{_stages(rest)} on ONNX Runtime, as fallback")
    if torch:
        device = "the CPU" if torch[0].device == "cpu" else torch[0].device
        parts.append(f"{_stages(torch)} on torch, on {device}")
    return f"package, target {report.target}: {'; '.join(parts)}"


def _stages(runs: Sequence[StageRun]) -> str:
    shown = ", ".join(str(run.id) for run in runs[:8]) + (", …" if len(runs) > 8 else "")
    return f"stage{'' if len(runs) == 1 else 's'} {shown}"
