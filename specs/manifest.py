"""What optc writes back: the models of a package's ``manifest.json``, schema version 1.

The manifest is a contract with other programs. Within a schema version keys are only added, so
reading passes over keys it does not know; a file that is renamed, cut short or not ours is answered
with one clear error. All paths in it are relative to the package's folder and stay inside it.

Names of dtypes are numpy's and ml_dtypes' (``float32``, ``bool``, ``bfloat16``, ``float8_e4m3fn``,
``int4``), ``string`` for text. A value that is no tensor has what it is as ``dtype`` (``sequence``,
``map``, ``optional``) and no shape.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    JsonValue,
    ValidationError,
    model_validator,
)

from optc.specs.compile_spec import Range
from optc.specs.diagnostic import Diagnostic, InputError

SCHEMA_VERSION: Final = 1
FILE_NAME = "manifest.json"

Runtime = Literal["tensorrt", "onnxruntime", "torch"]
Shape = tuple[int | str, ...]
"""One entry an axis, outermost first: an extent, or the name of a dynamic axis."""


def _stays_inside(path: str) -> str:
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\0" in path:
        raise ValueError(f"`{path}` is not a path inside the package")
    return path


PackagePath = Annotated[str, AfterValidator(_stays_inside)]
"""A path inside the package, relative to its folder, with ``/`` between its parts."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Shapes(_Part):
    """The shapes of one engine input in one optimisation profile, as TensorRT takes them.

    Attributes:
        min: The smallest extent of each axis.
        opt: The extents that the engine is fastest at.
        max: The largest extent of each axis.
    """

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


class TensorType(_Part):
    """Dtype and shape of a value.

    Attributes:
        dtype: A name of numpy or ml_dtypes, such as ``float32`` or ``bfloat16``; ``string`` for
            text, ``sequence`` and the like for what is no tensor.
        shape: One entry an axis, outermost first: an extent, or the name of a dynamic axis. Null
            where the rank is not known, and for what is no tensor.
    """

    dtype: str
    shape: Shape | None


class Tensor(TensorType):
    """An input or output of the whole package.

    Attributes:
        name: As in the model.
        range: Of made-up values, lowest and highest; null where the spec gives none.
    """

    name: str
    range: tuple[float, float] | None = None


class SpecRecord(_Part):
    """The spec a package was made from.

    Attributes:
        path: Seen from the package's folder.
        sha256: Of the file.
    """

    path: str | None = None
    sha256: str


class Size(_Part):
    """A tensor of sizes, as whole numbers, that is the same in every run.

    Attributes:
        dtype: A name of numpy.
        shape: Its extents.
        values: Its elements, the last axis the fastest.
    """

    dtype: str
    shape: tuple[int, ...]
    values: tuple[int, ...]


class ModelPart(_Part):
    """A part of the original that a package was compiled from on its own.

    Where it begins, the inputs of the package are: tensors of the original of these names.

    Attributes:
        stage: What the spec calls it.
        outputs: Names of the tensors of the original that it ends with.
        sizes: Name of a tensor of the original that the part needs, and that is known -> its values.
        original_inputs: What the whole original takes.
        original_profiles: For each profile: symbol of the original's inputs -> its range.
    """

    stage: str
    outputs: tuple[str, ...]
    sizes: Mapping[str, Size] = {}
    original_inputs: tuple[Tensor, ...]
    original_profiles: tuple[Mapping[str, Range], ...] = ()


class ModelRecord(_Part):
    """The original model.

    Attributes:
        path: Relative to the spec's folder.
        sha256: Of the file.
        bytes: Its size, files with external data included.
        part: The part of it that the package was compiled from; null for the whole.
    """

    path: str
    sha256: str
    bytes: int
    part: ModelPart | None = None


class Engine(_Part):
    """An engine of one stage for one target.

    Attributes:
        file: Where it is in the package.
        sha256: Of the file. It proves that the file is whole, not that it is new: builds of one
            model may differ in a few bytes.
        bytes: Its size.
    """

    file: PackagePath
    sha256: str
    bytes: int


class Reason(_Part):
    """Why a node runs in the fallback.

    Attributes:
        node: Its name in ``model.onnx``.
        op: Its ONNX op, with the domain before a ``::`` where it is not the default one.
        by: Who refused it: ``rule``, ``parser``, ``builder``, ``spec``.
        text: In whose own words, or the rule's.
        targets: Names of the targets it holds for.
        origins: The nodes of the original model that ``node`` stands for.
    """

    node: str
    op: str
    by: str
    text: str
    targets: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()


class Legalised(_Part):
    """A node that TensorRT refuses as it is, and takes as the stage has it.

    Attributes:
        node: Its name in ``model.onnx``.
        op: Its operator.
        passes: Names of the passes that rewrote it.
        by: Who refuses it as it is.
        text: In whose words.
    """

    node: str
    op: str
    passes: tuple[str, ...]
    by: str
    text: str


class KeptNode(_Part):
    """A node that computes in more than the precision asked for.

    Attributes:
        node: Its name in ``model.onnx``.
        op: Its operator.
        precision: What it computes in: ``fp32``, ``fp16``, ``bf16``.
        by: Who wants it so: ``spec``, ``rule``, ``parser``, ``builder``, ``search``.
        text: Why, in whose words.
        cost: What its rounding alone takes of the tolerance, 1 for all of it and ``inf`` where it
            overflows; null where nobody measured it.
        origins: The nodes of the original model that ``node`` stands for.
    """

    node: str
    op: str
    precision: str
    by: str
    text: str
    cost: float | Literal["inf"] | None = None
    origins: tuple[str, ...] = ()


class StagePrecision(_Part):
    """What the nodes of a stage compute in.

    Attributes:
        nodes: Precision -> how many of the stage's nodes compute floats in it.
        flops: Precision -> its share of the FLOPs of these nodes, 0 to 1.
        kept: The nodes in more than the spec asks for.
        constants: Name of a constant of the stage -> what became of its smallest numbers, where they
            are below what the short type holds in full.
    """

    nodes: Mapping[str, int] = {}
    flops: Mapping[str, float] = {}
    kept: tuple[KeptNode, ...] = ()
    constants: Mapping[str, str] = {}


class Stage(_Part):
    """One part of the model, run by one runtime.

    Attributes:
        id: Its number; targets refer to it.
        runtime: What runs it.
        model: The stage as ONNX; every stage has one, whatever its runtime. That of a torch stage
            holds one node, which says what its module takes and gives.
        engines: Name of a target -> its engine. Empty for a fallback stage.
        inputs: Names of the tensors it reads, from the caller or from earlier stages.
        outputs: Names of the tensors it makes that later stages or the caller read.
        tensors: Name of an input or output -> its type.
        nodes: Names in ``model.onnx`` of the nodes that are this stage's. For each target, every
            node of ``model.onnx`` is in exactly one stage.
        repeated: Names in ``model.onnx`` of cheap nodes that are copied into this stage, too.
        flops_share: Share of the FLOPs of the whole model that its nodes have, 0 to 1, at the opt
            extents of the first profile.
        why: For a fallback stage: which nodes were refused. The others compute sizes for these.
        legalised: For a TensorRT stage: nodes that stand in it rewritten.
        precision: What its nodes compute in; null in a package of an older optc.
        profiles: What the engines were built with: for each of the package's profiles, in their
            order, the shapes of each input. Empty for a fallback stage.
        unconfirmed: In a plan: whether no build has shown that TensorRT takes the stage.
        name: What the spec calls the stage; null where it gives it no name.
        module: For a torch stage: the file of its module.
        libraries: Shared libraries of custom operators that ONNX Runtime has to load to run its
            ONNX.
        plugins: Shared libraries of plugins that TensorRT has to load to run its engines.
        estimate_us: Time that the cost model takes it to need, in microseconds, without the copies
            around it; null in a package of an older optc. Nothing of it was measured.
    """

    id: int
    runtime: Runtime
    model: PackagePath
    engines: Mapping[str, Engine] = {}
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tensors: Mapping[str, TensorType] = {}
    nodes: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    flops_share: float = 0.0
    why: tuple[Reason, ...] = ()
    legalised: tuple[Legalised, ...] = ()
    precision: StagePrecision | None = None
    profiles: tuple[Mapping[str, Shapes], ...] = ()
    unconfirmed: bool = False
    name: str | None = None
    module: PackagePath | None = None
    libraries: tuple[PackagePath, ...] = ()
    plugins: tuple[PackagePath, ...] = ()
    estimate_us: float | None = None


class Crossing(_Part):
    """A tensor that passes between stages.

    Attributes:
        tensor: Its name.
        maker: Id of the stage that makes it.
        readers: Ids of the stages that read it, in running order.
        bytes: At the opt extents of the first profile; null where an axis has no bound.
        most_bytes: At the largest extents of any profile; null likewise.
        boundaries: How many boundaries between stages that run after one another it lives across.
    """

    tensor: str
    maker: int
    readers: tuple[int, ...]
    bytes: int | None
    most_bytes: int | None
    boundaries: int


class Target(_Part):
    """Something the package was compiled for.

    Attributes:
        name: As in the spec.
        backend: What built its engines.
        compute_capability: Of the GPU it is for; null for portable engines, and for those of the
            GPU that was at hand.
        stages: Ids of its stages, in running order.
        crossings: What passes between them, but for inputs of the model; the largest first.
        estimate_us: Time that the cost model takes a call to need, copies included; as for a stage.
    """

    name: str
    backend: str
    compute_capability: str | None = None
    stages: tuple[int, ...]
    crossings: tuple[Crossing, ...] = ()
    estimate_us: float | None = None


class PassRecord(_Part):
    """What one pass did.

    Attributes:
        name: Of the pass.
        fired: Name of a node that is left -> names of the nodes it now stands for.
        removed: Name of a node that is gone -> why.
        declined: Name of a node where the pattern was met -> why it was left alone.
        seconds: Time it took, over all its runs.
    """

    name: str
    fired: Mapping[str, tuple[str, ...]] = {}
    removed: Mapping[str, str] = {}
    declined: Mapping[str, str] = {}
    seconds: float = 0.0


class Manifest(_Part):
    """The whole of ``manifest.json``.

    Attributes:
        schema_version: Of the manifest. Within a version keys are only added.
        optc_version: Of the optc that wrote it.
        spec: The spec.
        model: The original model.
        precision: What the spec asks for: ``default``, ``keep_fp32``, ``layers`` and the rest.
        evidence: Where precision is lowered: what was measured of it, on which data, and at which
            share of the FLOPs which error; null elsewhere.
        graph: The optimised model as one ONNX file.
        report: The long version of what the manifest says.
        inputs: Of the package, in the model's order.
        outputs: Of the package, in the model's order.
        profiles: For each optimisation profile: symbol -> its range.
        stages: Of all targets.
        targets: What the package was compiled for.
        modules: Operator, as ``domain::op`` -> the file of the torch module that runs it. With it the
            original model can be run, too, where it has that operator.
        libraries: Operator, as ``domain::op`` -> the shared library of ONNX Runtime custom operators
            that has it. With it the original model can be run, too.
        files: Path -> sha256 of every file of the package but this one.
        passes: What the graph passes did.
        environment: Versions, builder, machine.
        verify: What the spec asks of the result, as the verification takes it.
        rounds: The rounds of splitting and building, in their order.
        oracle: How often TensorRT was asked, by kind: ``parses`` of a whole model, ``probes`` of a
            node by the parser, ``trials`` of a node by the builder, ``bisections`` of a stage, ``builds``
            of engines; and how often that was saved, as the answer was ``remembered`` from this run
            or ``read`` from disk.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    optc_version: str
    spec: SpecRecord
    model: ModelRecord
    precision: JsonValue = "fp32"
    evidence: JsonValue = None
    graph: PackagePath = "model.onnx"
    report: PackagePath = "report.json"
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    profiles: tuple[Mapping[str, Range], ...] = ()
    stages: tuple[Stage, ...]
    targets: tuple[Target, ...]
    modules: Mapping[str, PackagePath] = {}
    libraries: Mapping[str, PackagePath] = {}
    files: Mapping[PackagePath, str] = {}
    passes: tuple[PassRecord, ...] = ()
    environment: Mapping[str, JsonValue] = {}
    verify: JsonValue = None
    rounds: tuple[JsonValue, ...] = ()
    oracle: Mapping[str, int] = {}

    @model_validator(mode="after")
    def _stages_exist(self) -> Self:
        ids = [stage.id for stage in self.stages]
        if len(set(ids)) != len(ids):
            raise ValueError("two stages have the same id")
        for target in self.targets:
            if missing := set(target.stages) - set(ids):
                raise ValueError(
                    f"target `{target.name}` runs stage {min(missing)}, which is absent"
                )
        return self

    def target(self, name: str) -> Target:
        """Return the target called ``name``; raises KeyError where there is none."""
        return {target.name: target for target in self.targets}[name]

    def stages_of(self, target: Target) -> tuple[Stage, ...]:
        """Return the stages of ``target`` in running order."""
        stages = {stage.id: stage for stage in self.stages}
        return tuple(stages[id_] for id_ in target.stages)

    def text(self) -> str:
        """Return the manifest as it is written to a file."""
        data = self.model_dump(mode="json")
        return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def as_plan(self) -> dict[str, JsonValue]:
        """Return what ``optc plan --json`` prints: the manifest without files and engines."""
        return self.model_dump(
            mode="json", exclude={"files": True, "stages": {"__all__": {"engines"}}}
        )

    def with_files(self, hashes: Mapping[str, str]) -> Manifest:
        """Return the manifest with the hash of every file, those of engines in their stages too."""
        stages = tuple(
            stage.model_copy(
                update={
                    "engines": {
                        target: engine.model_copy(update={"sha256": hashes[engine.file]})
                        for target, engine in stage.engines.items()
                    }
                }
            )
            for stage in self.stages
        )
        return self.model_copy(update={"files": hashes, "stages": stages})

    def moved_into(self, folder: str) -> Manifest:
        """Return the manifest of the same package with all of its files in a subfolder."""

        def moved(path: str) -> str:
            return f"{folder}/{path}"

        stages = tuple(
            stage.model_copy(
                update={
                    "model": moved(stage.model),
                    "engines": {
                        target: engine.model_copy(update={"file": moved(engine.file)})
                        for target, engine in stage.engines.items()
                    },
                    "module": moved(stage.module) if stage.module else None,
                    "libraries": tuple(map(moved, stage.libraries)),
                    "plugins": tuple(map(moved, stage.plugins)),
                }
            )
            for stage in self.stages
        )
        return self.model_copy(
            update={
                "graph": moved(self.graph),
                "report": moved(self.report),
                "modules": {op: moved(path) for op, path in self.modules.items()},
                "libraries": {op: moved(path) for op, path in self.libraries.items()},
                "stages": stages,
                "files": {moved(path): sha256 for path, sha256 in self.files.items()},
            }
        )


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of the package in ``folder``.

    Raises:
        InputError: ``not-a-package`` where there is no folder, no manifest or not one of ours;
            ``newer-package`` for a schema version that this optc does not know;
            ``damaged-package`` for a manifest that is cut short or contradicts itself.
    """
    data = _json_of(folder)
    version = data["schema_version"]
    if version != SCHEMA_VERSION:
        raise InputError(
            Diagnostic(
                "newer-package",
                f"the package `{folder}` has schema version {version!r}, made by optc "
                f"{data['optc_version']}; this optc reads version {SCHEMA_VERSION}",
                "read it with the optc that made it, or compile the package again",
            )
        )
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        found = [
            f"{'.'.join(str(part) for part in problem['loc']) or 'manifest'}: {problem['msg']}"
            for problem in error.errors()[:5]
        ]
        raise _damaged(
            folder, f"its {FILE_NAME} is not as it should be ({'; '.join(found)})"
        ) from (error)


def is_package(folder: Path) -> bool:
    """Whether ``folder`` holds a manifest of ours, of whatever version."""
    try:
        _json_of(folder)
    except InputError:
        return False
    return True


def _json_of(folder: Path) -> dict[str, Any]:
    """Return the JSON of a manifest that is ours."""
    path = folder / FILE_NAME
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        what = f"holds no {FILE_NAME}" if folder.is_dir() else "does not exist"
        raise _not_a_package(folder, f"it {what}") from error
    except NotADirectoryError as error:
        raise _not_a_package(folder, "it is a file") from error
    except OSError as error:
        raise _not_a_package(folder, f"its {FILE_NAME} cannot be read: {error.strerror}") from error
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(folder, f"its {FILE_NAME} is not JSON ({error})") from error
    if not isinstance(data, dict) or not {"schema_version", "optc_version"} <= data.keys():
        raise _not_a_package(folder, f"its {FILE_NAME} is not one that optc wrote")
    return data


def _not_a_package(folder: Path, reason: str) -> InputError:
    return InputError(
        Diagnostic(
            "not-a-package",
            f"`{folder}` is not an optc package: {reason}",
            "give the folder that `optc compile` wrote",
        )
    )


def _damaged(folder: Path, reason: str) -> InputError:
    return InputError(
        Diagnostic(
            "damaged-package",
            f"the package `{folder}` is damaged: {reason}",
            "compile it again",
        )
    )


def damaged_file(folder: Path, path: str, reason: str) -> InputError:
    """Return the error for one file of the package in ``folder`` that is not as recorded."""
    return _damaged(folder, f"`{path}` {reason}")
