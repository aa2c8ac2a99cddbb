"""The way through: spec and model in, package out.

    spec ─ check ─> CheckedSpec ─ for a stage, cut it out ─> CheckedSpec of a part
        ─ load model, replace ranges, run passes, infer shapes ─> Prepared
        ─ open control flow, calibrate, ask the parser, legalise, search the precision ─> Choice
        ─ split, drop what does not pay, lower, build, blame, again ─> Decided
        ─ write ─> package ─ hold against original and gate ─> Outcome

`compile_package` reads like this picture; each arrow is a function of another file. `plan_package`
is the same way into a folder that is thrown away.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from optc.optimizer.backend import gpus, require
from optc.optimizer.builder import Workers
from optc.optimizer.debug import dumps
from optc.optimizer.doctor import environment
from optc.optimizer.engine import EngineBuilder
from optc.optimizer.explain import explanations
from optc.optimizer.gate import check_gate
from optc.optimizer.hoist import Asking, open_bodies
from optc.optimizer.legalise import Legaliser
from optc.optimizer.lower import Lowerer
from optc.optimizer.operators import Operators
from optc.optimizer.oracle import Oracle
from optc.optimizer.package import PackageWriter, WeightStore, sha256_of, writing
from optc.optimizer.part import part_of
from optc.optimizer.partition import Off, begin, settle
from optc.optimizer.precision_choice import Chooser
from optc.optimizer.precision_levels import is_lowered
from optc.optimizer.prepare import Prepared, prepare
from optc.optimizer.progress import Progress, Silent
from optc.optimizer.record import (
    Decided,
    manifest_of,
    ops_of,
    path_of_stage,
    report_of,
    write_models,
)
from optc.optimizer.stage_picture import picture_of
from optc.optimizer.summary import Outcome, Planned
from optc.passes import registry
from optc.specs.check import CheckedSpec, check, files_matching
from optc.specs.compile_spec import Target, Verify
from optc.specs.diagnostic import Diagnostic, EnvironmentFault, InputError, nearest

if TYPE_CHECKING:
    from optc.optimizer.runtime import Package
    from optc.optimizer.verify import Verification


def compile_spec(
    spec: str | Path,
    output: str | Path | None = None,
    *,
    targets: Sequence[str] = (),
    stage: str | None = None,
) -> Package:
    """Compile the model that ``spec`` names, and return the package.

    Args:
        spec: Path of the spec file.
        output: Folder of the package; ``build/<spec name>`` where it is not given, and
            ``build/<spec name>-<stage>`` for a stage. A package that is there is replaced at once,
            when everything else is done.
        targets: Names of targets of the spec to build for; all, where none is named.
        stage: Name of the scope that is to be compiled on its own, in place of the whole model.

    Raises:
        SpecError: With every problem of the spec.
        ModelError: If the model cannot be read, or is damaged.
        NotMetError: If ``verify:`` or ``gate:`` is not met. The package is written all the same, so
            that it can be looked at.
        OptcError: Any other of its children, each of which says what to do.
    """
    from optc.optimizer.runtime import load

    checked = check(spec, known_passes=registry.names, options_of=registry.options_of)
    name = checked.path.stem + (f"-{stage}" if stage is not None else "")
    folder = Path(output) if output is not None else Path("build") / name
    compile_package(checked, folder, targets=targets, stage=stage).check()
    return load(folder)


def compile_package(
    checked: CheckedSpec,
    folder: Path,
    *,
    targets: Sequence[str] = (),
    stage: str | None = None,
    dump_after: str | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Compile what ``checked`` asks for to a package in ``folder`` and return what came of it.

    With the name of a scope as ``stage`` that alone is compiled.

    Raises:
        OptcError: As `compile_spec`, except that what is not met is in the outcome.
    """
    start = time.perf_counter()
    progress = progress or Silent()
    wanted = _targets(checked, targets)
    after = None if dump_after is None else dumps(folder, dump_after)
    operators = Operators(checked)
    with operators.declared(), writing(folder) as writer:
        with Workers(plugins=operators.plugin_places) as workers:
            _start(workers, wanted)
            prepared = prepare(_meant(checked, stage, progress), progress, after)
            # Known by the time it is written down: hashing and building are done side by side.
            hashing = Thread(target=lambda: prepared.model.sha256)
            hashing.start()
            decided, engines = _decided(
                prepared, wanted, workers, writer.weights, writer.folder, progress
            )
            hashing.join()
            progress.step("writing the package")
            files, records = write_models(prepared, decided, engines, writer)
            if decided.choice and decided.choice.picture:
                writer.write("precision.svg", decided.choice.picture)
            manifest = manifest_of(
                prepared,
                decided,
                environment(workers),
                folder=folder,
                files=files,
                engines=records,
            )
            writer.write("stages.svg", picture_of(manifest, ops_of(prepared)))
        notes = [*prepared.notes, *decided.notes]
        outcome = Outcome(checked.path, folder, manifest, 0.0, notes=notes)
        outcome.precision = decided.choice.text if decided.choice else ""
        progress.step("running the package against the original")
        _hold(prepared, outcome, writer, progress)
        writer.write(manifest.report, report_of(prepared, decided, outcome))
        outcome.manifest = writer.commit(manifest)
    outcome.seconds = time.perf_counter() - start
    return outcome


def plan_package(
    checked: CheckedSpec,
    *,
    targets: Sequence[str] = (),
    stage: str | None = None,
    build: bool = True,
    explain: bool = False,
    progress: Progress | None = None,
) -> Planned:
    """Return what compiling would decide. Nothing is written but the oracle's cache.

    Args:
        checked: The spec.
        targets: Names of targets of the spec; all, where none is named.
        stage: Name of the scope that is meant in place of the whole model.
        build: Whether engines are built on trial; where not, they are marked unconfirmed.
        explain: Whether it is to say why the stages are what they are.
        progress: Told of what goes on.

    Raises:
        OptcError: As `compile_spec`.
    """
    progress = progress or Silent()
    wanted = _targets(checked, targets)
    operators = Operators(checked)
    with (
        Workers(plugins=operators.plugin_places) as workers,
        # There, as what a killed process leaves behind there is removed by the next.
        tempfile.TemporaryDirectory(dir=workers.folder) as folder,
        operators.declared(),
    ):
        _start(workers, wanted)
        prepared = prepare(_meant(checked, stage, progress), progress)
        store = WeightStore(Path(folder))
        decided, _ = _decided(
            prepared, wanted, workers, store, Path(folder), progress, build=build, plan=True
        )
        store.close()
        files = {stage: path_of_stage(n, stage) for n, stage in enumerate(decided.stages)}
        manifest = manifest_of(
            prepared, decided, environment(workers), folder=None, files=files, engines={}
        )
        explained = None
        if explain:
            progress.step("splitting again without what was refused")
            explained = explanations(prepared, decided)
    return Planned(
        manifest,
        explained,
        picture=picture_of(manifest, ops_of(prepared)),
        notes=[*prepared.notes, *decided.notes],
        precision=decided.choice.text if decided.choice else "",
    )


def verify_package(
    folder: Path,
    *,
    model: Path | None = None,
    data: Sequence[str] | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Hold the package in ``folder`` against its original model.

    Args:
        folder: Of the package.
        model: The original; by default where the manifest says it was, seen from the package.
        data: Patterns of npz files, one array an input; by default the spec's, if it has any.
        atol: Absolute tolerance, in place of all that the spec asks of floats.
        rtol: Relative tolerance, likewise. Where only one is given, the other is the spec's, else
            1e-4.
        progress: Told of what goes on.

    Raises:
        OptcError: If package, model or data cannot be read.
    """
    from optc.optimizer.runtime import load
    from optc.optimizer.verify import verify

    package = load(folder)
    manifest = package.manifest
    asked = Verify.model_validate(manifest.verify or {})
    home = Path(os.path.normpath(folder / (manifest.spec.path or ""))).parent
    original = model if model is not None else Path(os.path.normpath(home / manifest.model.path))
    _check_original(original, manifest.model.sha256, given=model is not None)
    files = _data_files(home, asked.data or ()) if data is None else _data_files(Path(), data)
    groups = _group_files(home, asked) if data is None else {}
    if atol is not None or rtol is not None:
        asked = Verify(
            atol=atol if atol is not None else asked.atol,
            rtol=rtol if rtol is not None else asked.rtol,
            detections=asked.detections,
        )
    return verify(
        package,
        original,
        data=files,
        groups=groups,
        asked=asked,
        step=(progress or Silent()).step,
    )


# --- the arrows ----------------------------------------------------------------------------------


def _meant(checked: CheckedSpec, stage: str | None, progress: Progress) -> CheckedSpec:
    """Return ``checked``, or what of it is about the scope ``stage`` alone."""
    if stage is None:
        return checked
    progress.step("cutting the stage out of the model")
    return part_of(checked, stage)


def _targets(checked: CheckedSpec, names: Sequence[str]) -> tuple[Target, ...]:
    """Return the targets that are called ``names``, in the order of the spec; all without names."""
    known = {target.name: target for target in checked.spec.targets}
    problems = []
    for name in names:
        if name not in known:
            guess = nearest(name, known)
            problems.append(
                Diagnostic(
                    "unknown-target",
                    f"`{checked.path}` has no target called `{name}`",
                    f"write `{guess}`" if guess else f"write one of {', '.join(known)}",
                )
            )
    if problems:
        raise InputError(*problems)
    return tuple(_aimed(target) for target in known.values() if not names or target.name in names)


def _aimed(target: Target) -> Target:
    """Return ``target`` with the compute capability that its engines will be for.

    Raises:
        EnvironmentFault: If its backend is missing, or builds for the GPU at hand only and that is
            another (``other-gpu``).
    """
    backend = require(target.backend)
    if not backend.needs_gpu:
        return target
    here = gpus()[0]
    if target.compute_capability not in (None, here.compute_capability):
        raise EnvironmentFault(
            Diagnostic(
                "other-gpu",
                f"target `{target.name}` is for compute capability {target.compute_capability}; the "
                f"backend `{backend.name}` builds for the GPU at hand, {here.name}, which has "
                f"{here.compute_capability}",
                "compile on a machine that has the target's GPU, or use `tensorrt-rtx`",
            )
        )
    return target.model_copy(update={"compute_capability": here.compute_capability})


def _start(workers: Workers, targets: Sequence[Target]) -> None:
    """Let TensorRT load in the background while the model is read and optimised.

    One child is to ask the parser, one to build: an engine is built in a child that did nothing else.
    """
    for backend in dict.fromkeys(target.backend for target in targets):
        workers.start(backend, children=2)


def _decided(
    prepared: Prepared,
    targets: Sequence[Target],
    workers: Workers,
    store: WeightStore,
    folder: Path,
    progress: Progress,
    *,
    build: bool = True,
    plan: bool = False,
) -> tuple[Decided, EngineBuilder]:
    """Ask the parser what it refuses, choose precisions, then build and blame until all builds.

    For a plan nothing of the user's is written, and for a quick one nothing is built.
    """
    spec = prepared.checked.spec
    oracle = Oracle(workers, digest_of=store.digest_of)
    tf32 = spec.precision.default == "tf32"
    stages = folder / "stages"
    legaliser_of = partial(
        Legaliser,
        oracle=oracle,
        legalisers=partial(registry.legalisers, spec.passes.disable, spec.passes.options)
        if spec.passes.legalise
        else tuple,
        optimisers=registry.passes(spec.passes.disable, options=spec.passes.options),
        place=store.for_stage,
        folder=stages,
        tf32=tf32,
    )
    open_bodies(prepared, Asking(oracle, legaliser_of, targets, store.for_stage, stages, tf32))
    question = prepared.question
    legaliser = legaliser_of(question)
    chooser = None
    if is_lowered(spec.precision):
        chooser = Chooser(prepared, oracle, progress, keep_ranges=not plan)
    if chooser:
        chooser.check_targets(targets)
    lowerer = Lowerer(
        passes=partial(registry.lowerers, spec.passes.options),
        floats=chooser.wanted.floats if chooser else "fp32",
        amax=chooser.calibrated() if chooser else {},
        place=store.for_stage,
        folder=stages,
        ranges_of=legaliser.ranges_of,
    )
    engines = EngineBuilder(
        question,
        oracle,
        store,
        folder,
        progress,
        legaliser,
        lowerer,
        tf32=tf32,
        keep=not plan,
    )
    progress.step("asking TensorRT what it takes")
    refused = {target.name: _refused(engines, target, chooser) for target in targets}
    plans = begin(targets, refused, question, engines.legalise)
    choice = chooser.choose(plans, lowerer) if chooser else None
    progress.step("building engines")
    rounds = settle(
        question, plans, engines.build if build else None, engines.blame, engines.legalise
    )
    prepared.operators.check_plans(question, plans)
    return Decided.of(prepared, plans, rounds, engines, choice), engines


def _refused(engines: EngineBuilder, target: Target, chooser: Chooser | None) -> Off:
    """Return what ``target`` refuses; what it refuses as lowered only is kept in fp32."""
    if chooser is None:
        return engines.refusals(target, {})
    refused = engines.refusals(target, chooser.draft)
    if not any(chooser.is_lowered(name) for name in refused):
        return refused
    as_it_is = engines.refusals(target, {})
    chooser.keep({name: why for name, why in refused.items() if name not in as_it_is})
    return as_it_is


def _hold(prepared: Prepared, outcome: Outcome, writer: PackageWriter, progress: Progress) -> None:
    """Hold the package, still in its staging folder, against the original model and the gate."""
    from optc.optimizer.verify import Unwritten, quick_check, verify

    checked = prepared.checked
    asked = checked.spec.verify
    package = Unwritten(writer.folder, outcome.manifest, once=asked is None)
    if asked is not None:
        outcome.verification = verify(
            package,
            checked.model_path,
            data=_data_files(checked.path.parent, asked.data or ()),
            groups=_group_files(checked.path.parent, asked),
            asked=asked,
            step=progress.step,
        )
    elif op := prepared.operators.run_by_plugins_alone(prepared.graph):
        outcome.notes.append(
            Diagnostic(
                "nothing-verified",
                f"only engines run {op}, so there is no original to hold the package against",
                "name a library of ONNX Runtime for it under `operators`, too",
                severity="warning",
            )
        )
    else:
        outcome.verification = quick_check(package, checked.model_path)
    if outcome.verification is not None:
        if any(case.kind == "rejected" for case in outcome.verification.not_compared):
            prepared.question.check_profiles()
        outcome.notes += outcome.verification.notes
        outcome.unmet += outcome.verification.unmet
    if checked.spec.gate is not None:
        outcome.unmet += check_gate(checked.spec.gate, outcome.manifest, checked.place)


def _data_files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Return the npz files that ``patterns`` name, seen from ``folder``, each once.

    Raises:
        InputError: If a pattern matches nothing (``missing-data``).
    """
    found: dict[Path, None] = {}
    problems = []
    for pattern in patterns:
        files = files_matching(folder, pattern)
        found.update(dict.fromkeys(files))
        if not files:
            problems.append(
                Diagnostic(
                    "missing-data",
                    f"no file matches `{pattern}`" + (f" in `{folder}`" if folder.parts else ""),
                    "name npz files that hold one array for each input of the model",
                )
            )
    if problems:
        raise InputError(*problems)
    return list(found)


def _group_files(folder: Path, asked: Verify) -> dict[str, list[Path]]:
    """Return the npz files of each group, seen from ``folder``.

    Raises:
        InputError: As `_data_files`.
    """
    return {name: _data_files(folder, group.data) for name, group in asked.groups.items()}


def _check_original(path: Path, sha256: str, *, given: bool) -> None:
    """Make sure that ``path`` is the model that the package was made from.

    Raises:
        InputError: ``missing-model``, ``other-model``.
    """
    try:
        found = sha256_of(path)
    except OSError as error:
        raise InputError(
            Diagnostic(
                "missing-model",
                f"the original model `{path}` cannot be read: {error.strerror}",
                "name it" + (" another way" if given else " with `--model`"),
            )
        ) from error
    if found != sha256:
        raise InputError(
            Diagnostic(
                "other-model",
                f"`{path}` is not the model that this package was compiled from: its SHA-256 is "
                f"{found[:12]}…, not {sha256[:12]}…",
                "compile the package again, or name the original with `--model`",
            )
        )
