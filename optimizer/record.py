"""What is written down: the manifest, and the report beside it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import onnx_graphsurgeon as gs

from optc import __version__
from optc.optimizer.compare import number
from optc.optimizer.engine import EngineBuilder
from optc.optimizer.package import PackageWriter
from optc.optimizer.partition import Plan, Round, profile_shapes
from optc.optimizer.precision_choice import Choice, kept_in
from optc.optimizer.precision_levels import Kept
from optc.optimizer.prepare import Prepared, type_of
from optc.optimizer.summary import Outcome
from optc.passes.graph import export_model, op_name, without_input_extents
from optc.passes.precision import DTYPES
from optc.passes.split import Stage, crossings
from optc.specs import manifest as written
from optc.specs.diagnostic import Diagnostic
from optc.specs.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Decided:
    """What partitioning came to.

    Attributes:
        plans: One per target, in the order of the spec.
        rounds: Of building.
        legalised: Stage in which nodes are rewritten -> name of such a node -> names of the passes
            that did.
        kept: Stage -> those of its nodes that compute in more than was asked for.
        noted: Stage -> name of a constant -> what became of its small numbers.
        choice: What nodes were chosen to compute in; None where nothing is lowered.
        asked: What was asked of TensorRT, by its kind -> how often.
    """

    plans: list[Plan]
    rounds: list[Round]
    legalised: Mapping[Stage, Mapping[str, tuple[str, ...]]]
    kept: Mapping[Stage, Sequence[Kept]]
    noted: Mapping[Stage, Mapping[str, str]]
    choice: Choice | None
    asked: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        prepared: Prepared,
        plans: list[Plan],
        rounds: list[Round],
        engines: EngineBuilder,
        choice: Choice | None,
    ) -> Self:
        """Return what ``plans`` came to, with what the stages say of themselves."""
        users: dict[Stage, list[Plan]] = {}
        for plan in plans:
            for stage in plan.stages:
                if stage.runtime == "tensorrt":
                    users.setdefault(stage, []).append(plan)
        kept = {
            stage: kept_in(
                stage.nodes,
                own,
                choice,
                engines.not_lowered(stage) if stage.lowered else {},
                prepared,
            )
            for stage, own in users.items()
            if choice is not None
        }
        legalised = {stage: engines.legalised(stage) for stage in users if stage.recipes}
        noted = {stage: engines.noted(stage) for stage in users if stage.lowered}
        return cls(plans, rounds, legalised, kept, noted, choice, engines.asked)

    @property
    def notes(self) -> Sequence[Diagnostic]:
        """What the user should know of the precision."""
        return self.choice.notes if self.choice else ()

    @property
    def stages(self) -> list[Stage]:
        """All stages of all targets, each once, in running order of the first that has them."""
        return list(dict.fromkeys(stage for plan in self.plans for stage in plan.stages))


def manifest_of(
    prepared: Prepared,
    decided: Decided,
    environment: Mapping[str, Any],
    *,
    folder: Path | None,
    files: Mapping[Stage, str],
    engines: Mapping[tuple[Stage, str], written.Engine],
) -> Manifest:
    """Return the manifest of the package.

    Args:
        prepared: The model.
        decided: What runs where.
        environment: Versions and machine.
        folder: Where the package is to be; None for a plan.
        files: Stage -> path of its ONNX in the package.
        engines: Stage and target name -> the engine's record; empty for a plan.
    """
    checked = prepared.checked
    spec = checked.spec
    ids = {stage: index for index, stage in enumerate(decided.stages)}
    return Manifest(
        optc_version=__version__,
        spec=written.SpecRecord(
            path=_seen_from(folder, checked.path) if folder else str(checked.path),
            sha256=checked.sha256,
        ),
        model=written.ModelRecord(
            path=_seen_from(checked.path.parent, checked.model_path),
            sha256=checked.model_sha256 or prepared.model.sha256,
            bytes=prepared.model.bytes,
            part=checked.part,
        ),
        precision=spec.precision.model_dump(mode="json"),
        evidence=_plain(decided.choice.evidence) if decided.choice else None,
        inputs=prepared.inputs,
        outputs=prepared.outputs,
        profiles=checked.profiles,
        stages=tuple(
            _stage(prepared, decided, stage, ids[stage], files[stage], engines)
            for stage in decided.stages
        ),
        targets=tuple(
            written.Target(
                name=plan.target.name,
                backend=plan.target.backend,
                compute_capability=plan.target.compute_capability,
                stages=tuple(ids[stage] for stage in plan.stages),
                crossings=_crossings(prepared, plan, ids),
                estimate_us=round(prepared.question.cost_model.split_us(plan.stages), 1),
            )
            for plan in decided.plans
        ),
        passes=tuple(
            written.PassRecord(
                name=record.name,
                fired=record.merged,
                removed=record.removed,
                declined=record.skipped,
                seconds=round(record.seconds, 4),
            )
            for record in prepared.passes.records
        ),
        libraries=prepared.operators.of_original,
        environment=_plain(dict(environment)),
        verify=None if spec.verify is None else spec.verify.model_dump(mode="json"),
        rounds=tuple(_plain(asdict(each)) for each in decided.rounds),
        oracle=decided.asked,
        modules=prepared.modules.recorded,
    )


def _seen_from(folder: Path, path: Path) -> str:
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def _stage(
    prepared: Prepared,
    decided: Decided,
    stage: Stage,
    number: int,
    file: str,
    engines: Mapping[tuple[Stage, str], written.Engine],
) -> written.Stage:
    question = prepared.question
    tensors = {t.name: t for t in prepared.graph.inputs}
    tensors.update((t.name, t) for node in prepared.graph.nodes for t in node.outputs)
    own = [plan for plan in decided.plans if stage in plan.stages]
    on_tensorrt = stage.runtime == "tensorrt"
    return written.Stage(
        id=number,
        runtime=stage.runtime,
        model=file,
        engines={
            plan.target.name: engines[stage, plan.target.name]
            for plan in own
            if (stage, plan.target.name) in engines
        },
        inputs=stage.inputs,
        outputs=stage.outputs,
        tensors={
            name: written.TensorType(**type_of(tensors[name]))
            for name in (*stage.inputs, *stage.outputs)
        },
        nodes=stage.nodes,
        repeated=stage.repeated,
        flops_share=round(question.share(stage), 6),
        estimate_us=round(question.cost_model.stage_us(stage), 1),
        why=() if on_tensorrt else _why(prepared, own, stage),
        legalised=_legalised(prepared, own, stage, decided.legalised.get(stage, {})),
        precision=_precision(
            prepared, stage, decided.kept.get(stage, ()), decided.noted.get(stage, {})
        ),
        profiles=tuple(
            {
                name: written.Shapes(min=low, opt=opt, max=high)
                for name, (low, opt, high) in profile.items()
            }
            for profile in (profile_shapes(question, stage.inputs) or () if on_tensorrt else ())
        ),
        unconfirmed=on_tensorrt and not all(plan.confirmed for plan in own),
        name=stage.name or _range_of(prepared, stage),
        module=_module(prepared, stage),
        libraries=prepared.operators.libraries_of(question.nodes_of(stage)),
        plugins=prepared.operators.plugins_of(question.nodes_of(stage)) if on_tensorrt else (),
    )


def _crossings(
    prepared: Prepared, plan: Plan, ids: Mapping[Stage, int]
) -> tuple[written.Crossing, ...]:
    """Return what passes between the stages of ``plan``, the largest first."""
    question = prepared.question
    found = [
        written.Crossing(
            tensor=crossing.tensor,
            maker=ids[plan.stages[crossing.maker]],
            readers=tuple(ids[plan.stages[reader]] for reader in crossing.readers),
            bytes=question.bytes_of(crossing.tensor),
            most_bytes=question.most_bytes_of(crossing.tensor),
            boundaries=crossing.boundaries,
        )
        for crossing in crossings(plan.stages)
    ]
    return tuple(sorted(found, key=lambda crossing: -(crossing.bytes or 0)))


def _module(prepared: Prepared, stage: Stage) -> str | None:
    """Return where the module of a torch stage stands in the package; None for other stages."""
    if stage.runtime != "torch":
        return None
    (node,) = [prepared.question.node(name) for name in stage.work]
    return prepared.modules.module_of(node)


def _range_of(prepared: Prepared, stage: Stage) -> str | None:
    """Return what the spec calls the range that ``stage`` stands for, if it does."""
    ranges = {each.node: each.operator.op for each in prepared.modules.replaced}
    return next((ranges[name] for name in stage.nodes if name in ranges), None)


def _why(prepared: Prepared, plans: Sequence[Plan], stage: Stage) -> tuple[written.Reason, ...]:
    """Return the refusals in ``stage``, those that TensorRT itself uttered first."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for plan in plans:
        for name in stage.nodes:
            if refused := plan.off.get(name):
                key = (name, refused.by, refused.text)
                found.setdefault(key, []).append(plan.target.name)
    order = {"spec": 0, "parser": 1, "builder": 2, "rule": 3}
    reasons = [
        written.Reason(
            node=name,
            op=op_name(prepared.question.node(name)),
            by=by,
            text=text,
            targets=tuple(targets),
            origins=tuple(prepared.passes.origins.get(name, ())),
        )
        for (name, by, text), targets in found.items()
    ]
    return tuple(sorted(reasons, key=lambda reason: order[reason.by]))


def _legalised(
    prepared: Prepared,
    plans: Sequence[Plan],
    stage: Stage,
    passes: Mapping[str, tuple[str, ...]],
) -> tuple[written.Legalised, ...]:
    """Return what is rewritten in ``stage``; targets that share it share the recipes."""
    return tuple(
        written.Legalised(
            node=recipe.node,
            op=op_name(prepared.question.node(recipe.node)),
            passes=passes[recipe.node],
            by=plans[0].recipes[recipe.node].refused.by,
            text=plans[0].recipes[recipe.node].refused.text,
        )
        for recipe in stage.recipes
    )


def _precision(
    prepared: Prepared, stage: Stage, kept: Sequence[Kept], noted: Mapping[str, str]
) -> written.StagePrecision:
    """Return what the nodes of ``stage`` compute in; one with bodies is what most in them are."""
    question = prepared.question
    whole = "tf32" if prepared.checked.spec.precision.default == "tf32" else "fp32"
    lowered = dict(stage.lowered)
    lowered |= {each.node: each.precision for each in kept if each.by != "spec"}
    counts: Counter[str] = Counter()
    flops: Counter[str] = Counter()
    for name in stage.nodes:
        inner = question.within(name)
        found = Counter(lowered[each] for each in inner if each in lowered)
        precision: str | None = found.most_common(1)[0][0] if found else None
        if precision in (None, "fp32"):
            precision = _float_of(question.node(name))
            precision = whole if precision == "fp32" and stage.runtime == "tensorrt" else precision
        if precision is not None:
            counts[precision] += 1
            flops[precision] += question.flops.get(name, 0)
    total = sum(flops.values())
    return written.StagePrecision(
        nodes=dict(counts),
        flops={name: round(share / total, 6) if total else 0.0 for name, share in flops.items()},
        constants=noted,
        kept=tuple(
            written.KeptNode(
                **asdict(each) | {"cost": number(each.cost)},
                origins=tuple(prepared.passes.origins.get(each.node, ())),
            )
            for each in kept
        ),
    )


def _float_of(node: gs.Node) -> str | None:
    """Return the precision that a node has by itself: that of the floats it gives, else takes."""
    for tensor in (*node.outputs, *node.inputs):
        for precision, dtype in DTYPES.items():
            if precision != "int8" and tensor.dtype is not None and tensor.dtype == dtype:
                return precision
    return None


def ops_of(prepared: Prepared) -> dict[str, str]:
    """Return the op of each node of the optimised graph, by its name."""
    return {node.name: op_name(node) for node in prepared.graph.nodes}


def _plain(value: Any) -> Any:
    """Return ``value`` as JSON holds it."""
    return json.loads(json.dumps(value, default=str))


# --- files of a package --------------------------------------------------------------------------


def write_models(
    prepared: Prepared, decided: Decided, builder: EngineBuilder, writer: PackageWriter
) -> tuple[dict[Stage, str], dict[tuple[Stage, str], written.Engine]]:
    """Give every stage its number and its files their names; write the whole model too.

    Returns:
        Stage -> path of its ONNX; stage and target -> record of its engine.
    """
    files: dict[Stage, str] = {}
    engines: dict[tuple[Stage, str], written.Engine] = {}
    for index, stage in enumerate(decided.stages):
        files[stage] = path_of_stage(index, stage)
        builder.model_of(stage).rename(writer.folder / files[stage])
        for plan in decided.plans:
            if stage in plan.engines:
                path = f"engines/{plan.target.name}/{index:02d}.engine"
                (writer.folder / path).parent.mkdir(parents=True, exist_ok=True)
                builder.engine_of(stage, plan.target).rename(writer.folder / path)
                engines[stage, plan.target.name] = writer.engine(path)
    builder.remove_scraps()
    prepared.operators.copy_to(writer.folder)
    prepared.modules.copy_to(writer.folder)
    whole = without_input_extents(export_model(prepared.graph, place=writer.weights.for_model))
    writer.write("model.onnx", whole.SerializeToString())
    return files, engines


def path_of_stage(number: int, stage: Stage) -> str:
    """Return where the ONNX of a stage stands in the package."""
    return f"stages/{number:02d}-{stage.runtime}.onnx"


def report_of(prepared: Prepared, decided: Decided, outcome: Outcome) -> str:
    """Return the text of ``report.json``: the long version of what the manifest says.

    Args:
        prepared: The model and what the passes did.
        decided: What runs where, and the rounds it took.
        outcome: What verification and gate found.
    """
    passes = prepared.passes
    document = {
        "optc_version": __version__,
        "nodes": {"before": passes.nodes_before, "after": passes.nodes_after},
        "pass_rounds": passes.rounds,
        "pass_seconds": round(passes.seconds, 3),
        "origins": passes.origins,
        "rounds": [asdict(each) for each in decided.rounds],
        "cost": asdict(prepared.question.cost_model.constants),
        "oracle": decided.asked,
        "builds": [
            {
                "target": plan.target.name,
                "nodes": len(stage.nodes),
                "outputs": stage.outputs,
                "seconds": round(result.seconds, 3),
                "peak_mib": result.peak_mib,
                "engine_bytes": result.engine_bytes,
                "fixed_addresses": result.fixed_addresses,
            }
            for plan in decided.plans
            for stage, result in plan.engines.items()
        ],
        "verification": outcome.verification and outcome.verification.as_json(),
        "diagnostics": [diagnostic.as_json() for diagnostic in outcome.diagnostics],
    }
    return json.dumps(document, indent=1, default=str) + "\n"
