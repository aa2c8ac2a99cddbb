"""Runs packages: a target's stages in order, each where it can run best.

A stage that has an engine for the GPU of this machine runs on it. A stage that a torch module runs
is run by that, on the GPU where engines run and torch sees it too. Every other stage, and every
stage on a machine without that GPU, runs as ONNX on ONNX Runtime: the results are those of the same
graph, but that one in low precision is simulated (`optc.optimizer.simulation`): ONNX Runtime's own
kernels flatter. What ran where, and why not on an engine, is part of every run's report.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from optc.optimizer.arrays import dtype_of
from optc.optimizer.custom_library import Libraries, require_loadable
from optc.optimizer.feed import checked_feed
from optc.optimizer.package import check_file
from optc.specs.diagnostic import Diagnostic, EnvironmentFault, InputError, OptcError, nearest
from optc.specs.manifest import Manifest, Shapes, Stage, Target, Tensor, damaged_file, read_manifest

if TYPE_CHECKING:
    from optc.optimizer.gpu import Engine
    from optc.optimizer.reference import OrtRunner
    from optc.optimizer.torch_module import Expected, ModuleNode, TorchModule

Array = npt.NDArray[Any]
Device = Literal["auto", "cpu", "cuda"]
DEVICES: tuple[Device, ...] = ("auto", "cpu", "cuda")

LOW = frozenset({"fp16", "bf16", "int8", "fp8"})
"""Precisions that ONNX Runtime's CPU does not compute in as a GPU does."""


class StageFailed(OptcError):
    """A stage could not be loaded or run.

    Attributes:
        stage: The stage.
    """

    def __init__(self, stage: Stage, diagnostic: Diagnostic) -> None:
        super().__init__(diagnostic)
        self.stage = stage


@dataclass(frozen=True, slots=True)
class StageRun:
    """Where one stage ran.

    Attributes:
        id: Of the stage.
        runtime: What ran it: ``tensorrt``, ``onnxruntime`` or ``torch``.
        device: ``cpu``, or the name of the GPU.
        file: Of the package: the engine, the ONNX or the module that ran.
        seconds: Wall time, first use included.
        why: Why it did not run on an engine, and whether it is an estimate; None where it did.
    """

    id: int
    runtime: str
    device: str
    file: str
    seconds: float
    why: str | None


@dataclass(frozen=True, slots=True)
class RunReport:
    """What one run of a package did."""

    target: str
    stages: tuple[StageRun, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the report for programs."""
        return asdict(self)

    def render(self) -> str:
        """Return the report for people, one line a stage."""
        lines = [f"target {self.target}"]
        for run in self.stages:
            line = f"  stage {run.id}: {run.file} on {run.runtime}, {run.device}, "
            line += f"{run.seconds * 1e3:.1f} ms"
            lines.append(f"{line} ({run.why})" if run.why else line)
        return "\n".join(lines)


def load(folder: Path | str) -> Package:
    """Return the package in ``folder``.

    Its files are read when they are first used, and checked against the manifest then.

    Raises:
        InputError: As `optc.specs.manifest.read_manifest` does.
    """
    path = Path(folder)
    return Package(path, read_manifest(path))


class Package:
    """A compiled model, ready to run.

    Attributes:
        path: Its folder.
        manifest: What it says of itself.
        last_run: What the last `run` did; None before the first.
    """

    def __init__(self, path: Path, manifest: Manifest, *, once: bool = False) -> None:
        """Take a package that is in ``path``; ``once`` as for `Executor`."""
        self.path = path
        self.manifest = manifest
        self._once = once
        self.last_run: RunReport | None = None
        self._executors: dict[tuple[str, bool], Executor] = {}

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Names, dtypes and shapes of what `run` takes."""
        return self.manifest.inputs

    @property
    def libraries(self) -> Libraries:
        """Libraries of custom operators, checked, with which ONNX Runtime runs the original.

        Raises:
            InputError: ``damaged-package``.
            EnvironmentFault: ``library-not-loadable``.
        """
        return libraries_in(self.path, tuple(self.manifest.libraries.values()), self._check)

    @property
    def modules(self) -> dict[tuple[str, str], Path]:
        """Operator, as domain and op -> the torch module that runs it, sound as far as is known.

        Raises:
            InputError: ``damaged-package``.
        """
        found = {}
        for name, path in self.manifest.modules.items():
            self._check(path)
            domain, _, op = name.rpartition("::")
            found[domain, op] = self.path / path
        return found

    @property
    def results(self) -> dict[str, Expected]:
        """Name of a tensor that a module gives -> what it has to be."""
        torch = (stage for stage in self.manifest.stages if stage.runtime == "torch")
        return {name: each for stage in torch for name, each in _expected(stage).items()}

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """Names, dtypes and shapes of what `run` gives, in the model's order."""
        return self.manifest.outputs

    def run(
        self,
        inputs: Mapping[str, Any],
        *,
        target: str | None = None,
        device: Device = "auto",
        keep: Collection[str] = (),
    ) -> dict[str, Any]:
        """Return all outputs for ``inputs``, by name, in the model's order.

        Args:
            inputs: Name -> array, of exactly the dtype and a shape the package was compiled for.
            target: Whose stages to run. None: the one whose engines this machine's GPU runs, else
                the first.
            device: ``auto`` uses engines where they run, ``cpu`` never, ``cuda`` insists on it.
            keep: Names of tensors that pass between stages, to be returned after the outputs.

        Raises:
            InputError: For inputs that are not what the package takes, all problems at once; for a
                target or a tensor that it does not have; for a package that is damaged.
            EnvironmentFault: ``no-gpu``, ``no-matching-target`` with ``device="cuda"``.
            StageFailed: If a runtime does not load or run a stage.
        """
        if device not in DEVICES:
            raise _unknown("device", device, DEVICES)
        if target is not None:
            _known_target(self.manifest, target)
        feed = checked_feed(self.manifest, inputs)
        chosen = _choose(self.manifest, target, device)
        key = (chosen.target.name, chosen.device is not None)
        if key not in self._executors:
            self._executors[key] = Executor(
                self.path,
                self.manifest.stages_of(chosen.target),
                [tensor.name for tensor in self.outputs],
                placement=chosen,
                check=self._check,
                once=self._once,
            )
        executor = self._executors[key]
        executor.placement = chosen
        results = executor.run(feed, keep=keep)
        self.last_run = RunReport(chosen.target.name, executor.runs)
        return results

    def _check(self, path: str) -> None:
        check_file(self.path, self.manifest, path)


def libraries_in(folder: Path, paths: Sequence[str], check: Callable[[str], None]) -> Libraries:
    """Return the libraries at ``paths`` in a package: sound, as ``check`` says, and loadable."""
    paths = tuple(dict.fromkeys(paths))
    for path in paths:
        check(path)
    libraries = tuple(folder / path for path in paths)
    require_loadable(libraries)
    return libraries


# --- which target, where -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Placement:
    """Whose stages run, and on what.

    Attributes:
        device: Name of the GPU that runs engines; None where none does.
        why: Why no engine runs; None where they do.
    """

    target: Target
    device: str | None = None
    why: str | None = None


def _choose(manifest: Manifest, name: str | None, device: Device) -> Placement:
    from optc.optimizer.gpu import NoGpu, visible_device, why_not

    targets = [manifest.target(name)] if name is not None else list(manifest.targets)
    if device == "cpu":
        return Placement(targets[0], why="the CPU was asked for")
    try:
        gpu = visible_device()
    except NoGpu as fault:
        if device == "auto":
            return Placement(targets[0], why=str(fault))
        raise EnvironmentFault(
            Diagnostic("no-gpu", str(fault), "run with `--device auto`, which needs none")
        ) from fault
    reasons = {t.name: why_not(t.backend, t.compute_capability, gpu) for t in targets}
    for target in targets:
        if reasons[target.name] is None:
            return Placement(target, device=gpu.name)
    reason = "; ".join(dict.fromkeys(filter(None, reasons.values())))
    if device == "auto":
        return Placement(targets[0], why=reason)
    raise EnvironmentFault(
        Diagnostic(
            "no-matching-target",
            f"no engine of the package runs on this machine: {reason}",
            f"add a target with compute capability {gpu.compute_capability} to the spec, or run "
            "with `--device auto`",
        )
    )


def _known_target(manifest: Manifest, name: str) -> None:
    names = [target.name for target in manifest.targets]
    if name not in names:
        raise _unknown("target", name, names)


def _unknown(what: str, name: str, known: Sequence[str]) -> InputError:
    guess = nearest(name, known)
    return InputError(
        Diagnostic(
            f"unknown-{what}",
            f"the package has no {what} called `{name}`",
            f"write `{guess}`" if guess else f"write one of {', '.join(known)}",
        )
    )


# --- running stages ------------------------------------------------------------------------------


class Executor:
    """Runs stages in order, wherever their files are: in a package, or not in one yet.

    What a stage needs is loaded when it first runs, and kept. Values that pass between stages are
    let go after their last reader.

    Args:
        folder: What the stages' files are relative to.
        stages: In running order.
        outputs: Names of the tensors to return.
        placement: Where engines run; None: nowhere, ONNX Runtime runs all.
        check: Called with the path of each file before it is read.
        once: Whether this is for one run: ONNX Runtime does not optimise, and a stage is let go
            when it has run.

    Attributes:
        runs: Where the stages of the last run ran.
    """

    def __init__(
        self,
        folder: Path,
        stages: Sequence[Stage],
        outputs: Sequence[str],
        *,
        placement: Placement | None = None,
        check: Callable[[str], None] = lambda path: None,
        once: bool = False,
    ) -> None:
        self._once = once
        self.placement = placement
        self.runs: tuple[StageRun, ...] = ()
        self._folder = folder
        self._stages = tuple(stages)
        self._outputs = tuple(outputs)
        self._check = check
        self._checked: set[str] = set()
        self._sessions: dict[int, OrtRunner] = {}
        self._simulated: dict[int, str] = {}  # id of a stage -> the precisions that were simulated
        self._engines: dict[int, Engine | str] = {}
        self._modules: dict[tuple[str, bool], TorchModule] = {}  # by file, and whether on the GPU
        self._module_nodes: dict[tuple[int, bool], ModuleNode] = {}  # by stage, likewise
        self._last_reader = {
            name: index for index, stage in enumerate(self._stages) for name in stage.inputs
        }

    def run(self, feed: Mapping[str, Any], *, keep: Collection[str] = ()) -> dict[str, Any]:
        """Return the outputs, then what is to be kept, by name.

        Args:
            feed: Name -> value of every input of the model.
            keep: Names of tensors that pass between stages.

        Raises:
            InputError: ``unknown-tensor`` if no stage gives a tensor to keep.
            StageFailed: If a runtime does not load or run a stage.
        """
        from optc.optimizer.reference import owned

        wanted = list(dict.fromkeys((*self._outputs, *keep)))
        made = [*feed, *(name for stage in self._stages for name in stage.outputs)]
        for name in keep:
            if name not in made:
                raise _unknown("tensor", name, made)
        values = dict(feed)
        runs = []
        for index, stage in enumerate(self._stages):
            results, run = self._run_stage(stage, self._values(values, stage.inputs))
            runs.append(run)
            if self._once:
                results = {name: owned(value) for name, value in results.items()}
                self._sessions.pop(stage.id, None)
            values |= results
            for name in (*stage.inputs, *stage.outputs):
                if self._last_reader.get(name, -1) <= index and name not in wanted:
                    values.pop(name, None)
        self.runs = tuple(runs)
        return self._values(values, wanted)

    def _values(self, values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        for name in names:
            if name not in values:
                raise damaged_file(self._folder, "manifest.json", f"has no stage give `{name}`")
        return {name: values[name] for name in names}

    def _run_stage(self, stage: Stage, given: dict[str, Any]) -> tuple[dict[str, Any], StageRun]:
        start = time.perf_counter()
        engine, profile, why = self._engine_for(stage, given)
        if stage.runtime == "torch":
            found, device = self._on_torch(stage, given)
            runtime, file = "torch", str(stage.module)
        elif engine is None:
            found = self._on_onnxruntime(stage, given)
            runtime, device, file = "onnxruntime", "cpu", stage.model
            if stage.id in self._simulated:
                why = f"{why}; an estimate, simulated in {self._simulated[stage.id]}"
        else:
            found = self._on_tensorrt(stage, engine, profile, given)
            assert self.placement is not None, "an engine was chosen"
            assert self.placement.device is not None, "an engine was chosen"
            runtime, device = "tensorrt", self.placement.device
            file = stage.engines[self.placement.target.name].file
        seconds = round(time.perf_counter() - start, 6)
        results = self._values(found, stage.outputs)
        return results, StageRun(stage.id, runtime, device, file, seconds, why)

    # -- ONNX Runtime

    def _on_onnxruntime(self, stage: Stage, given: dict[str, Any]) -> dict[str, Any]:
        from optc.optimizer.reference import Rejected

        session = self._session(stage)
        try:
            return session.run(self._values(given, session.inputs))
        except Rejected as error:
            raise StageFailed(
                stage,
                Diagnostic(
                    "stage-failed",
                    f"ONNX Runtime does not run stage {stage.id} (`{stage.model}`): {error}",
                    "where the original model fails on this input too, the input is at fault; "
                    "`optc verify` compares the two",
                ),
            ) from error

    def _session(self, stage: Stage) -> OrtRunner:
        from optc.optimizer.ort_errors import ORT_ERRORS

        if stage.id not in self._sessions:
            for path in self._files_of(stage):
                self._check_once(path)
            try:
                self._sessions[stage.id] = self._opened(stage)
            except ORT_ERRORS as error:
                raise StageFailed(
                    stage,
                    Diagnostic(
                        "stage-not-loadable",
                        f"ONNX Runtime does not load stage {stage.id} (`{stage.model}`): {error}",
                        "its words name what it lacks; `optc doctor` shows the versions here",
                    ),
                ) from error
        return self._sessions[stage.id]

    def _opened(self, stage: Stage) -> OrtRunner:
        """Return what runs the ONNX of ``stage``; that of an engine in low precision is simulated."""
        import onnx

        from optc.optimizer.reference import OrtRunner
        from optc.optimizer.simulation import short_floats, simulated

        path = self._folder / stage.model
        libraries = libraries_in(self._folder, stage.libraries, self._check_once)
        lowered = LOW & stage.precision.nodes.keys() if stage.precision else set()
        if stage.runtime == "tensorrt" and (lowered or stage.precision is None):
            model = onnx.load(path, load_external_data=False)
            if lowered := lowered or short_floats(model):
                self._simulated[stage.id] = " and ".join(sorted(lowered))
                model = simulated(model, path.parent)
                return OrtRunner(model, path.parent, libraries=libraries)
        return OrtRunner(path, path.parent, optimised=not self._once, libraries=libraries)

    def _files_of(self, stage: Stage) -> Iterator[str]:
        yield stage.model
        weights = Path(stage.model).parent / "weights"
        for file in sorted((self._folder / weights).glob("*.bin")):
            yield (weights / file.name).as_posix()

    def _check_once(self, path: str) -> None:
        if path not in self._checked:
            self._check(path)
            self._checked.add(path)

    # -- torch

    def _on_torch(self, stage: Stage, given: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """Return what the module of ``stage`` gives, and the device that it ran on."""
        from optc.optimizer.torch_module import ModuleRejected

        node = self._module_node(stage)
        try:
            found = node.run(given, _expected(stage))
        except ModuleRejected as error:
            raise StageFailed(
                stage,
                Diagnostic(
                    "stage-failed",
                    f"torch does not run stage {stage.id} (`{stage.module}`): {error}",
                    "mend the module, or what the spec says that it takes and gives",
                ),
            ) from error
        return found, node.module.device

    def _module_node(self, stage: Stage) -> ModuleNode:
        """Return what runs ``stage``; stages with one module share it."""
        from optc.optimizer.torch_module import ModuleNode, ModuleRejected, TorchModule, sees_gpu

        if stage.module is None:
            raise damaged_file(
                self._folder, "manifest.json", f"names no module for the torch stage {stage.id}"
            )
        cuda = self.placement is not None and self.placement.device is not None and sees_gpu()
        if (stage.id, cuda) not in self._module_nodes:
            for path in (stage.module, *self._files_of(stage)):
                self._check_once(path)
            try:
                if (stage.module, cuda) not in self._modules:
                    module = TorchModule(self._folder / stage.module, cuda=cuda)
                    self._modules[stage.module, cuda] = module
            except ModuleRejected as error:
                raise StageFailed(
                    stage,
                    Diagnostic(
                        "stage-not-loadable",
                        f"torch does not load the module of stage {stage.id}: {error}",
                        "its words name what it lacks; `optc doctor` shows the versions here",
                    ),
                ) from error
            self._module_nodes[stage.id, cuda] = ModuleNode.of_model(
                self._folder / stage.model, self._modules[stage.module, cuda]
            )
        return self._module_nodes[stage.id, cuda]

    # -- TensorRT

    def _engine_for(
        self, stage: Stage, given: Mapping[str, Any]
    ) -> tuple[Engine | None, int, str | None]:
        """Return the engine that runs ``stage`` and the profile that holds ``given``, or why not."""
        if stage.runtime == "torch":
            return None, 0, "; ".join(reason.text for reason in stage.why) or "its module"
        if stage.runtime != "tensorrt":
            refused = ", ".join(dict.fromkeys(reason.op for reason in stage.why))
            return None, 0, f"fallback for {refused}" if refused else "fallback"
        if self.placement is None or self.placement.device is None:
            return None, 0, self.placement.why if self.placement else "no engine was asked for"
        if self.placement.target.name not in stage.engines:
            return None, 0, f"it has no engine for {self.placement.target.name}"
        profile, why = _profile_for(stage, given)
        if why is not None:
            return None, 0, why
        engine = self._engine(stage, self.placement.target)
        if isinstance(engine, str):
            return None, 0, engine
        return engine, profile, None

    def _engine(self, stage: Stage, target: Target) -> Engine | str:
        """Return the engine, or why it cannot be used: one made by another version of TensorRT."""
        from optc.optimizer.gpu import Engine, EngineFault

        if stage.id not in self._engines:
            file = stage.engines[target.name].file
            for path in (file, *stage.plugins):
                self._check_once(path)
            plugins = [self._folder / path for path in stage.plugins]
            try:
                data = (self._folder / file).read_bytes()
                self._engines[stage.id] = Engine(target.backend, data, plugins)
            except EngineFault as error:
                self._engines[stage.id] = str(error)
        return self._engines[stage.id]

    def _on_tensorrt(
        self, stage: Stage, engine: Engine, profile: int, given: Mapping[str, Any]
    ) -> dict[str, Any]:
        from optc.optimizer.gpu import EngineFault

        try:
            found = engine.run(given, profile)
        except EngineFault as error:
            raise StageFailed(
                stage,
                Diagnostic(
                    "stage-failed",
                    f"the engine of stage {stage.id} does not run: {error}",
                    "run with `--device cpu` to go on without it",
                ),
            ) from error
        return {name: _as_recorded(stage, name, array) for name, array in found.items()}


def _expected(stage: Stage) -> dict[str, Expected]:
    """Return what the outputs of ``stage`` have to be."""
    from optc.optimizer.torch_module import Expected

    return {
        name: Expected(
            None if type_.dtype == "unknown" else dtype_of(type_.dtype),
            None
            if type_.shape is None
            else tuple(axis if isinstance(axis, int) else None for axis in type_.shape),
        )
        for name, type_ in stage.tensors.items()
        if name in stage.outputs
    }


def _profile_for(stage: Stage, given: Mapping[str, Any]) -> tuple[int, str | None]:
    """Return the index of the profile that holds the shapes and is nearest, or why none does."""
    shapes = {name: np.shape(given[name]) for name in stage.inputs}
    outside = [_outside(profile, shapes) for profile in stage.profiles]
    fitting = [index for index, reason in enumerate(outside) if reason is None]
    if stage.profiles and not fitting:
        return 0, " and ".join(dict.fromkeys(reason for reason in outside if reason))
    return min(fitting, key=lambda index: _distance(stage.profiles[index], shapes), default=0), None


def _outside(profile: Mapping[str, Shapes], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return which axis ``profile`` does not hold, or None."""
    for name, ranges in profile.items():
        axes = zip(shapes[name], ranges.min, ranges.max, strict=True)
        for axis, (extent, low, high) in enumerate(axes):
            if not low <= extent <= high:
                return f"axis {axis} of `{name}` is {extent}, its engine takes {low} to {high}"
    return None


def _distance(profile: Mapping[str, Shapes], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return how far ``shapes`` are from those that ``profile`` is fastest at."""
    return sum(
        abs(extent - opt)
        for name, ranges in profile.items()
        for extent, opt in zip(shapes[name], ranges.opt, strict=True)
    )


def _as_recorded(stage: Stage, name: str, array: Array) -> Array:
    """Return an engine's output in the dtype the stage has as ONNX: TensorRT has no float64."""
    recorded = stage.tensors.get(name)
    return array if recorded is None else array.astype(dtype_of(recorded.dtype), copy=False)
