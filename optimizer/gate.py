"""Hold a package against the ``gate:`` of its spec: engines, what runs in them, what crosses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from optc.specs.compile_spec import Gate
from optc.specs.diagnostic import Diagnostic, PlaceOf, quoted
from optc.specs.manifest import Crossing, Manifest, Stage, Target

MOST_STAGES = 4
"""Fallback stages named in one diagnostic; the manifest has all."""

MOST_TENSORS = 3
"""Tensors that cross, likewise."""


def check_gate(gate: Gate, manifest: Manifest, place: PlaceOf) -> list[Diagnostic]:
    """Return what of ``gate`` is not met: a diagnostic for each target and each demand.

    Args:
        gate: What the spec asks for.
        manifest: Of the package, or of a plan.
        place: `CheckedSpec.place`.
    """
    problems = []
    for target in manifest.targets:
        stages = manifest.stages_of(target)
        if problem := _too_many_engines(gate, target, stages, place):
            problems.append(problem)
        if problem := _too_little_in_tensorrt(gate, target, stages, place):
            problems.append(problem)
        if problem := _too_much_crosses(gate, target, place):
            problems.append(problem)
    return problems


def _too_many_engines(
    gate: Gate, target: Target, stages: Sequence[Stage], place: PlaceOf
) -> Diagnostic | None:
    engines = sum(stage.runtime == "tensorrt" for stage in stages)
    if gate.max_engines is None or engines <= gate.max_engines:
        return None
    fallback = [stage for stage in stages if stage.runtime != "tensorrt"]
    if fallback:
        cause = f"they are cut apart by {_named(fallback, target)}"
        todo = "make TensorRT take these nodes, or allow as many engines with `max_engines`"
    else:
        cuts = [tensor for stage in stages[:-1] for tensor in stage.outputs[:1]]
        cause = f"no node is off TensorRT; the cuts are at {quoted(cuts)}"
        todo = "take these out of `partition.points`, or allow as many engines with `max_engines`"
    return Diagnostic(
        "gate-max-engines",
        f"target `{target.name}` needs {engines} engines, the gate allows {gate.max_engines}; "
        f"{cause}",
        todo,
        place("gate", "max_engines"),
    )


def _too_little_in_tensorrt(
    gate: Gate, target: Target, stages: Sequence[Stage], place: PlaceOf
) -> Diagnostic | None:
    # The shares in the manifest are rounded to six digits, each; a sum of 1 may come out below it.
    share = sum(stage.flops_share for stage in stages if stage.runtime == "tensorrt")
    slack = 0.5e-6 * len(stages)
    if gate.min_tensorrt_flops is None or share + slack >= gate.min_tensorrt_flops:
        return None
    fallback = [stage for stage in stages if stage.runtime != "tensorrt"]
    fallback.sort(key=lambda stage: -stage.flops_share)
    return Diagnostic(
        "gate-min-tensorrt-flops",
        f"on target `{target.name}` {share:.2%} of the FLOPs run in TensorRT, the gate asks for "
        f"{gate.min_tensorrt_flops:.2%}; the rest is in {_named(fallback, target)}",
        "make TensorRT take these nodes, or lower `min_tensorrt_flops`",
        place("gate", "min_tensorrt_flops"),
    )


def _too_much_crosses(gate: Gate, target: Target, place: PlaceOf) -> Diagnostic | None:
    allowed = gate.max_boundary_bytes
    if allowed is None:
        return None
    where = place("gate", "max_boundary_bytes")
    if unbounded := [each.tensor for each in target.crossings if each.most_bytes is None]:
        listed = quoted(unbounded, MOST_TENSORS)
        return Diagnostic(
            "gate-max-boundary-bytes",
            f"on target `{target.name}` nothing bounds the bytes of {listed} between stages, and "
            f"the gate allows {_bytes(allowed)}",
            "give the axes that have no bound a range under `dims`; `optc plan` names them",
            where,
        )
    crossing = sum(map(_weight, target.crossings))
    if crossing <= allowed:
        return None
    largest = sorted(target.crossings, key=lambda each: (-_weight(each), each.tensor))
    more = len(largest) - MOST_TENSORS
    named = ", ".join(map(_sent, largest[:MOST_TENSORS])) + (f", {more} more" if more > 0 else "")
    return Diagnostic(
        "gate-max-boundary-bytes",
        f"on target `{target.name}` up to {_bytes(crossing)} cross between stages in a call, the "
        f"gate allows {_bytes(allowed)}: {named}",
        "make TensorRT take the nodes that cut, move the cut with `partition.points` or "
        "`off_tensorrt`, or allow more with `max_boundary_bytes`",
        where,
    )


def _weight(crossing: Crossing) -> int:
    """Return the bytes of a tensor at its largest, at every boundary that it crosses."""
    return (crossing.most_bytes or 0) * crossing.boundaries


def _sent(crossing: Crossing) -> str:
    """Return a tensor that crosses in words: its name, its bytes, and from where to where."""
    readers = " and ".join(map(str, crossing.readers))
    times = f" x {crossing.boundaries} boundaries" if crossing.boundaries > 1 else ""
    return (
        f"`{crossing.tensor}` ({_bytes(crossing.most_bytes or 0)}{times}, from stage "
        f"{crossing.maker} to {readers})"
    )


def _bytes(number: int) -> str:
    """Return a number of bytes as a person compares it: exactly, and in groups of three digits.

    Example:
        >>> _bytes(4915200)
        '4,915,200 bytes'
    """
    return f"{number:,} {'byte' if number == 1 else 'bytes'}"


def _named(stages: Sequence[Stage], target: Target) -> str:
    """Return the stages in words: number, share, and the nodes that were refused."""
    parts = [
        f"stage {stage.id} ({stage.flops_share:.2%} of the FLOPs{_refused(stage, target)})"
        for stage in stages[:MOST_STAGES]
    ]
    if len(stages) > MOST_STAGES:
        parts.append(f"{len(stages) - MOST_STAGES} more")
    return ", ".join(parts)


def _refused(stage: Stage, target: Target) -> str:
    """Return what was refused in ``stage`` on ``target``: a node by name, several by their op."""
    nodes = {
        reason.node: reason.op
        for reason in stage.why
        if not reason.targets or target.name in reason.targets
    }
    if not nodes:
        return ""
    if len(nodes) == 1:
        ((node, op),) = nodes.items()
        return f": {op} `{node}`"
    ops = Counter(nodes.values()).most_common(3)
    counted = ", ".join(f"{count} {op}" if count > 1 else op for op, count in ops)
    return f": {counted}, first `{next(iter(nodes))}`"
