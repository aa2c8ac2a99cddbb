"""A build failure as it is kept: numbers for the names of nodes and tensors."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from optc.optimizer.fingerprint import Fingerprint
from optc.optimizer.job import BuildFailure, Refusal


def failure_as_json(
    failure: BuildFailure | None, fingerprint: Fingerprint
) -> dict[str, Any] | None:
    """Return ``failure`` as it is kept, numbers for names."""
    if failure is None:
        return None
    return asdict(failure) | {
        "text": fingerprint.without_names(failure.text),
        "nodes": [fingerprint.number_of_node(name) for name in failure.nodes],
        "refusals": [
            [fingerprint.number_of_node(r.node), r.op, r.code, fingerprint.without_names(r.text)]
            for r in failure.refusals
        ],
        "log_tail": [fingerprint.without_names(line) for line in failure.log_tail],
    }


def failure_from(kept: dict[str, Any] | None, fingerprint: Fingerprint) -> BuildFailure | None:
    """Return what `failure_as_json` was given, for a model with the same fingerprint."""
    if kept is None:
        return None
    refusals = tuple(
        Refusal(_node(fingerprint, number), op, code, fingerprint.with_names(text))
        for number, op, code, text in kept["refusals"]
    )
    return BuildFailure(
        reason=kept["reason"],
        text=fingerprint.with_names(kept["text"]),
        refusals=refusals,
        nodes=tuple(fingerprint.nodes[number] for number in kept["nodes"]),
        signal=kept["signal"],
        log_tail=tuple(fingerprint.with_names(line) for line in kept["log_tail"]),
    )


def _node(fingerprint: Fingerprint, number: int) -> str:
    return fingerprint.nodes[number] if number >= 0 else ""
