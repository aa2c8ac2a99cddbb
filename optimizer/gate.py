"""Hold a package against the ``gate:`` of its spec: how many engines, how much runs in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

from optc.specs.compile_spec import Gate
from optc.specs.diagnostic import Diagnostic, Place
from optc.specs.manifest import Manifest, Stage, Target

MOST_STAGES = 4
"""Fallback stages named in one diagnostic; the manifest has all."""


class PlaceOf(Protocol):
    """Says where in the spec something stands."""

    def __call__(self, *keys: str | int) -> Place | None: ...  # noqa: D102 - said above


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
        cause = f"no node is off TensorRT; the cuts are at {_listed(cuts)}"
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


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
