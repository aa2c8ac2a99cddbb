"""The spec a user writes, version 1, as models.

Every model here refuses unknown keys, takes no text for a number and no number for text, and is
frozen. The short forms that a spec may use (a path for ``model``, a number for a range, a name for
``precision``) are turned into the long form here, so that the rest of optc sees one shape only.

Nothing in here looks at a file: `optc.specs.check` reads the text, asks these models, and compares
with the model file.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, LiteralString, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainValidator,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import NullableSchema

Backend = Literal["tensorrt-rtx", "tensorrt"]
PrecisionName = Literal["fp32", "tf32", "fp16", "bf16", "int8", "fp8"]
Runtime = Literal["onnxruntime", "torch"]

LARGEST_DIM = 2**31 - 1
"""The largest extent of an axis that TensorRT takes."""

COMPUTE_CAPABILITIES: Mapping[Backend, tuple[str, ...]] = {
    "tensorrt-rtx": ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"),
}
"""What a backend builds for without the GPU at hand. A backend that is not here builds for the GPU
of the machine it runs on, whichever that is."""


def _fault(
    code: LiteralString, problem: str, todo: str | None = None, at: tuple[str | int, ...] = ()
) -> PydanticCustomError:
    """Return an error that `optc.specs.check` passes on as it stands.

    ``at``: keys and indices that lead from the checked value to the faulty part of it.
    """
    return PydanticCustomError(code, "{problem}", {"problem": problem, "todo": todo, "at": at})


Name = Annotated[str, Field(min_length=1)]
"""Of a tensor, node, op, symbol or pass: any text that is not empty."""


class Part(BaseModel):
    """A mapping of the spec.

    Attributes:
        expected: What may stand in its place, in the words of an error.
        from_text: Whether a text alone may stand in its place.
    """

    # Built when first used: `import optc.specs.compile_spec` stays cheap.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, defer_build=True)

    expected: ClassVar[str] = "a mapping"
    from_text: ClassVar[bool] = False

    @classmethod
    def keys(cls) -> dict[str, FieldInfo]:
        """Return the keys as a spec writes them, and the field of each."""
        return {field.alias or name: field for name, field in cls.model_fields.items()}


class ModelFile(Part):
    """The ONNX file to compile."""

    expected = "a path, or a mapping with `path` and `sha256`"
    from_text = True

    path: str = Field(
        min_length=1, description="Path of the ONNX file, relative to the folder of the spec."
    )
    sha256: str | None = Field(
        default=None,
        description="SHA-256 of the ONNX file, 64 hexadecimal digits. Where it is given, another "
        "file under that path is an error.",
        json_schema_extra={"pattern": "^[0-9a-fA-F]{64}$"},
    )

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: object) -> object:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("sha256")
    @classmethod
    def _is_a_hash(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch("[0-9a-fA-F]{64}", value):
            raise _fault(
                "bad-sha256",
                f"a SHA-256 has 64 hexadecimal digits, this has {len(value)} characters",
                "write what `sha256sum` prints for the model file, or leave `sha256` out",
            )
        return value and value.lower()

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Add the short form."""
        return _or({"type": "string", "minLength": 1}, schema, handler)


class Range(Part):
    """The extents a dynamic axis may have.

    Example:
        >>> Range.fixed(640)
        Range(min=640, opt=640, max=640)
        >>> str(Range(min=1, opt=4, max=8))
        '{min: 1, opt: 4, max: 8}'
    """

    expected = "a whole number, or a mapping with `min`, `opt` and `max`"

    min: int = Field(ge=0, le=LARGEST_DIM, description="Smallest extent.")
    opt: int = Field(
        ge=0, le=LARGEST_DIM, description="The extent to be fastest at, from `min` to `max`."
    )
    max: int = Field(ge=1, le=LARGEST_DIM, description="Largest extent.")

    @classmethod
    def fixed(cls, extent: int) -> Self:
        """Return the range that holds ``extent`` only."""
        return cls(min=extent, opt=extent, max=extent)

    @property
    def is_fixed(self) -> bool:
        """Whether the axis has one extent only."""
        return self.min == self.max

    def __str__(self) -> str:
        """Return the range as a spec writes it."""
        if self.is_fixed:
            return str(self.min)
        return f"{{min: {self.min}, opt: {self.opt}, max: {self.max}}}"

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: object) -> object:
        if isinstance(value, int) and not isinstance(value, bool):
            return {"min": value, "opt": value, "max": value}
        return value

    @model_validator(mode="after")
    def _is_ordered(self) -> Self:
        if not self.min <= self.opt <= self.max:
            low, opt, high = sorted((self.min, self.opt, self.max))
            raise _fault(
                "min-opt-max",
                f"min {self.min}, opt {self.opt}, max {self.max} are not in ascending order",
                f"write `{{min: {low}, opt: {opt}, max: {high}}}`, if that is what is meant",
            )
        return self

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Add the short form."""
        number = {"type": "integer", "minimum": 1, "maximum": LARGEST_DIM}
        return _or(number, schema, handler)


def _axis(value: object) -> str | int:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _fault("wrong-type", f"an axis is a name or a whole number, not {kind_of(value)}")
    if value == "":
        raise _fault("empty-value", "the name of an axis is empty", 'write a name, or "?"')
    if isinstance(value, int) and not -1 <= value <= LARGEST_DIM:
        raise _fault(
            "out-of-range",
            f"an axis cannot have the extent {value}",
            f"write a whole number from 1 to {LARGEST_DIM}, or a name for a dynamic axis",
        )
    return value


def kind_of(value: object) -> str:
    """Return what ``value`` is, in the words of an error."""
    match value:
        case None:
            return "nothing"
        case bool():
            return f"`{str(value).lower()}`"
        case int() | float():
            return f"the number {value}"
        case str():
            return f"the text `{value}`"
        case Mapping():
            return "a mapping"
        case _:
            return "a list"


Axis = Annotated[
    str | int,
    PlainValidator(_axis),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "integer", "minimum": -1, "maximum": LARGEST_DIM},
            ]
        }
    ),
]
Real = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(ge=1e-9, le=1e12, allow_inf_nan=False)]
"""A time or a rate, such that no sum and no quotient of them overflows."""
Names = Annotated[tuple[Name, ...], Field(strict=False, min_length=1)]
StageName = Annotated[str, Field(pattern="^[A-Za-z][A-Za-z0-9_.-]{0,63}$")]
"""A name that may stand in the name of a file."""


class Input(Part):
    """What the graph does not say about one of its inputs, or says badly."""

    shape: Annotated[tuple[Axis, ...], Field(strict=False)] | None = Field(
        default=None,
        description="One entry an axis, outermost first: a name for a dynamic axis (it renames "
        'what the model calls it), a number to pin it, "?" or -1 to call it `<input>_<axis>`. '
        "`[]` is a scalar. An axis that is fixed in the model must be given as it is there.",
    )
    range: Annotated[tuple[Real, Real], Field(strict=False)] | None = Field(
        default=None,
        description="Lowest and highest value of made-up input: floats are drawn from [low, high), "
        "integers from low to high, both included. Without it, floats are in [0, 1) and integers "
        "are 0 or 1.",
    )

    @field_validator("range")
    @classmethod
    def _is_ordered(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[0] > value[1]:
            low, high = value
            raise _fault(
                "range-order",
                f"the range starts at {low:g} and ends at {high:g}, below its start",
                f"write `[{high:g}, {low:g}]`, if that is what is meant",
            )
        return value


def _capability(value: object) -> str:
    text = str(value) if isinstance(value, int | float | str) else ""
    if isinstance(value, int) and not isinstance(value, bool):
        text += ".0"  # JSON writers print 8.0 as 8
    if isinstance(value, bool) or not re.fullmatch(r"\d{1,2}\.\d", text):
        raise _fault(
            "unknown-compute-capability",
            f"a compute capability is two numbers such as 8.6, not {kind_of(value)}",
            "write one of " + ", ".join(COMPUTE_CAPABILITIES["tensorrt-rtx"]),
        )
    return text


class Target(Part):
    """What to build engines for."""

    name: str = Field(
        min_length=1,
        max_length=64,
        description="Your name for it, unique in the spec. Engines stand in `engines/<name>/`, so "
        "it is made of letters, digits, `.`, `_` and `-`, and starts with a letter or digit.",
        json_schema_extra={"pattern": r"^[A-Za-z0-9][A-Za-z0-9._-]*$"},
    )
    backend: Backend = Field(
        default="tensorrt-rtx",
        description="What builds the engines: `tensorrt-rtx` needs no GPU; `tensorrt` needs the "
        "target GPU and an installation of TensorRT.",
    )
    compute_capability: (
        Annotated[
            str,
            PlainValidator(_capability),
            WithJsonSchema(
                {
                    "anyOf": [
                        {"type": "string", "pattern": r"^\d{1,2}\.\d$"},
                        {"type": "number", "minimum": 0, "exclusiveMaximum": 100},
                    ]
                }
            ),
        ]
        | None
    ) = Field(
        default=None,
        description="Compute capability of the GPU, as number or text. For `tensorrt-rtx` one of "
        + ", ".join(COMPUTE_CAPABILITIES["tensorrt-rtx"])
        + "; without it, one portable engine for Ampere and later. For `tensorrt`, that of the GPU "
        "at hand; without it, whichever that is.",
        examples=["8.6"],
    )

    @field_validator("name")
    @classmethod
    def _is_a_file_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            safe = re.sub(r"[^A-Za-z0-9._-]+", "-", value).strip("-._")
            raise _fault(
                "bad-target-name",
                f"a target cannot be called `{value}`: a folder is named after it",
                (f"write `{safe}`, or another name" if safe else "write a name")
                + " of letters, digits, `.`, `_` and `-` that starts with a letter or digit",
            )
        return value

    @model_validator(mode="after")
    def _is_known_to_the_backend(self) -> Self:
        known = COMPUTE_CAPABILITIES.get(self.backend)
        if known and self.compute_capability and self.compute_capability not in known:
            raise _fault(
                "unknown-compute-capability",
                f"{self.backend} does not build for compute capability {self.compute_capability}",
                f"write one of {', '.join(known)}, or none for one portable engine",
                ("compute_capability",),
            )
        return self


class Selector(Part):
    """Nodes of the original model: all of one op, or those whose name matches a pattern."""

    expected = 'a mapping with one of `op` and `node`, such as `{op: Softmax}` or `{node: "/a/*"}`'

    op: Name | None = Field(default=None, description="The op type, such as `Softmax`.")
    node: Name | None = Field(
        default=None,
        description="A node's name, or a pattern: `*` stands for any text (also with slashes), "
        "`?` for one character, `[ab]` for one of these.",
    )

    def matches(self, op: str, name: str) -> bool:
        """Return whether a node of the original model with this op and name is meant.

        Example:
            >>> Selector(node="/head/*").matches("Conv", "/head/0/Conv")
            True
        """
        if self.node is None:
            return op == self.op
        return name == self.node or fnmatch.fnmatchcase(name, self.node)

    def __str__(self) -> str:
        """Return the selector as a spec writes it."""
        return f"{{op: {self.op}}}" if self.node is None else f'{{node: "{self.node}"}}'

    @model_validator(mode="after")
    def _has_one(self) -> Self:
        if (self.op is None) == (self.node is None):
            raise _fault(
                "bad-selector",
                "this selects by both `op` and `node`" if self.op else "this selects nothing",
                'write one of them: `{op: Softmax}` or `{node: "/head/*"}`',
            )
        return self

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Say that it is one of the two."""
        json = handler.resolve_ref_schema(handler(schema))
        json["oneOf"] = [{"required": ["op"]}, {"required": ["node"]}]
        return json


Selectors = Annotated[tuple[Selector, ...], Field(strict=False)]


LayerPrecision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]


class Layer(Selector):
    """Nodes of the original model, and what they are to compute in."""

    expected = "a mapping with `op` or `node`, and `precision`"

    precision: LayerPrecision = Field(
        description="What the nodes compute in, whatever the search for exactness finds."
    )


def _listed(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Patterns = Annotated[
    tuple[Name, ...],
    Field(strict=False, min_length=1),
    BeforeValidator(_listed),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
            ]
        }
    ),
]
"""Names of files with `*`, `?`, `[ab]` and `**`, one or a list."""

Numbers = Annotated[tuple[Real, ...], Field(strict=False, min_length=1, max_length=4)]


class Images(Part):
    """How an image file becomes the values of an input."""

    input: Name | None = Field(
        default=None, description="The input that takes the image; needed where there are several."
    )
    size: Annotated[tuple[int, int], Field(strict=False)] | None = Field(
        default=None,
        description="Height and width that the image is brought to. Without it those that the "
        "model has, or the opt extents of the first profile.",
    )
    resize: Literal["stretch", "letterbox", "crop"] = Field(
        default="stretch",
        description="How: `stretch` changes the aspect; `letterbox` keeps it and fills the rest; "
        "`crop` keeps it and cuts off what is too much, equally on both sides.",
    )
    fill: int = Field(default=114, ge=0, le=255, description="What `letterbox` fills with.")
    color: Literal["rgb", "bgr", "gray"] = Field(
        default="rgb", description="Order of the channels."
    )
    layout: Literal["nchw", "nhwc"] = Field(default="nchw", description="Order of the axes.")
    scale: Real = Field(
        default=1 / 255, description="What each value, 0 to 255, is multiplied by first."
    )
    mean: Numbers = Field(
        default=(0.0,), description="Subtracted after scaling: one number, or one a channel."
    )
    std: Numbers = Field(
        default=(1.0,), description="Divided by after that: one number, or one a channel."
    )

    @field_validator("std")
    @classmethod
    def _is_not_zero(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if 0.0 in value:
            raise _fault("out-of-range", "`std` is divided by and cannot be 0", "write 1.0")
        return value

    @field_validator("size")
    @classmethod
    def _has_an_extent(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and min(value) < 1:
            raise _fault("out-of-range", f"an image cannot have the size {list(value)}")
        return value


class Calibration(Part):
    """What the ranges of quantised values are taken from."""

    data: Patterns = Field(
        description="Files of typical input, relative to the folder of the spec: `.npz`, one array "
        "an input, or images, with `images`. None of them may be used to verify with, too."
    )
    images: Images | None = Field(
        default=None, description="How images become input; needed where `data` names images."
    )
    method: Literal["minmax", "percentile", "entropy", "mse"] = Field(
        default="mse",
        description="How the range of a tensor follows from its values: the largest magnitude; the "
        "one that `percentile` of them stay below; the one that keeps their distribution best "
        "(least Kullback-Leibler divergence); the one of the least mean squared error.",
    )
    percentile: Real = Field(
        default=99.99, gt=50, le=100, description="For `percentile`: in per cent."
    )
    cache: Name | None = Field(
        default=None,
        description="File for the ranges, relative to the folder of the spec, to be checked in "
        "beside it. Without it they are kept in the cache folder of the user.",
    )


class SearchLimits(Part):
    """How long the search for the nodes that need more precision may take."""

    max_runs: int = Field(
        default=200, ge=1, le=1_000_000, description="Most runs of the model, each on all samples."
    )
    max_seconds: Real = Field(
        default=600, gt=0, description="Most wall time; what was found by then is used."
    )
    max_samples: int = Field(
        default=8,
        ge=1,
        le=1_000_000,
        description="Most inputs that are searched on, taken evenly from the data of `verify`.",
    )
    margin: Real = Field(
        default=0.8,
        gt=0,
        le=1,
        description="Share of the tolerance that may be used up: the GPU adds in another order.",
    )


class Precision(Part):
    """What the engines compute in."""

    expected = "a precision, or a mapping with `default` and `keep_fp32`"

    default: PrecisionName = Field(
        default="fp32",
        description="Lowest precision. Nodes that would cost more exactness than `verify` allows "
        "are kept in a higher one; with int8 and fp8 what is not quantised computes in fp16.",
    )
    keep_fp32: Selectors = Field(
        default=(), description="Nodes that stay in fp32, named as in the original model."
    )
    layers: Annotated[tuple[Layer, ...], Field(strict=False)] = Field(
        default=(),
        description="Nodes whose precision is set by hand, named as in the original model; of "
        "several that name a node the last counts.",
    )
    calibration: Calibration | None = Field(
        default=None, description="Data for the ranges of quantised values: for int8 and fp8."
    )
    search: SearchLimits = Field(
        default_factory=SearchLimits,
        description="How long the search for the nodes that need more precision may take.",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: object) -> object:
        return {"default": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Add the short form."""
        names = ["fp32", "tf32", "fp16", "bf16", "int8", "fp8"]
        return _or({"type": "string", "enum": names}, schema, handler)


class Passes(Part):
    """Which graph passes run."""

    disable: Annotated[tuple[Name, ...], Field(strict=False)] = Field(
        default=(), description="Passes that must not run; `optc passes` lists them."
    )
    options: Mapping[Name, Mapping[Name, bool | int | float | str]] = Field(
        default={},
        description="Name of a pass -> its options; `optc passes PASS` tells which it has.",
    )
    legalise: bool = Field(
        default=True,
        description="Whether nodes that TensorRT refuses are rewritten into what it takes.",
    )


class Point(Part):
    """Where a stage must end: at a tensor, or behind all nodes whose name matches a pattern."""

    expected = 'the name of a tensor, or a mapping such as `{node: "/backbone/*"}`'
    from_text = True

    tensor: Name | None = Field(
        default=None, description="A tensor of the original model. Its name alone says the same."
    )
    node: Name | None = Field(
        default=None,
        description="A node's name, or a pattern: a stage ends at every tensor that goes from a "
        "node which matches to one that does not.",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: object) -> object:
        return {"tensor": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _has_one(self) -> Self:
        if (self.tensor is None) == (self.node is None):
            raise _fault(
                "bad-point",
                "this names both a tensor and nodes" if self.tensor else "this names no tensor",
                'write the name of a tensor, or `{node: "/backbone/*"}`',
            )
        return self

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Add the short form."""
        return _or({"type": "string", "minLength": 1}, schema, handler)


class Replacement(Part):
    """A range of nodes that a torch module stands for."""

    name: StageName = Field(
        description="What the node in place of the range is called, and its stage.",
    )
    from_: Names = Field(
        alias="from",
        description="Tensors of the original model that the module takes, in the order of its "
        "arguments.",
    )
    to: Names = Field(
        description="Tensors of the original model that it gives, in the order of its results. "
        "What is computed on the way from the ones to the others is replaced.",
    )
    torch: Name = Field(
        description="File of the module, relative to the folder of the spec: TorchScript, or an "
        "exported program (`.pt2`).",
    )


class Cost(Part):
    """What running a stage is taken to cost, to tell whether an engine pays."""

    measured: Name | None = Field(
        default=None,
        description="File that `optc run --costs` wrote on a machine like the one that will run "
        "the package, relative to the folder of the spec. What is given beside it counts more.",
    )
    launch_us: Positive | None = Field(
        default=None, description="Time to launch an engine, in microseconds; by default 20."
    )
    node_us: Positive | None = Field(
        default=None,
        description="Time that the fallback takes for a node beside its arithmetic, in "
        "microseconds; by default 5.",
    )
    copy_us: Positive | None = Field(
        default=None,
        description="Time for a copy between GPU and host beside its bytes, in microseconds; by "
        "default 10.",
    )
    copy_gb_s: Positive | None = Field(
        default=None, description="Bytes copied between GPU and host, in GB/s; by default 12."
    )
    tensorrt_gflops: Positive | None = Field(
        default=None, description="Arithmetic in engines, in GFLOP/s; by default 5000."
    )
    tensorrt_gb_s: Positive | None = Field(
        default=None, description="Memory traffic in engines, in GB/s; by default 300."
    )
    fallback_gflops: Positive | None = Field(
        default=None, description="Arithmetic in the fallback, in GFLOP/s; by default 50."
    )
    fallback_gb_s: Positive | None = Field(
        default=None, description="Memory traffic in the fallback, in GB/s; by default 10."
    )
    keep_share: Real = Field(
        default=0.01,
        ge=0,
        le=1,
        description="An engine with this share of the FLOPs or more is kept whatever it costs, 0 "
        "to 1.",
    )


class Partition(Part):
    """Where the model is cut, beyond what TensorRT itself asks for."""

    points: Annotated[tuple[Point, ...], Field(strict=False)] = Field(
        default=(), description="Tensors of the original model at which a stage must end."
    )
    scopes: dict[StageName, Patterns] = Field(
        default_factory=dict,
        description="Name of a stage -> the nodes it holds, and no others: a pattern for their "
        "names, or a list.",
    )
    keep_together: Annotated[
        tuple[Annotated[Selectors, Field(min_length=1)], ...], Field(strict=False)
    ] = Field(
        default=(),
        description="Groups of nodes that stay in one stage, each a list of selectors. Where one "
        "is off TensorRT, all of its group are.",
    )
    off_tensorrt: Selectors = Field(
        default=(),
        description="Nodes that must not run in TensorRT, named as in the original model.",
    )
    replace: Annotated[tuple[Replacement, ...], Field(strict=False)] = Field(
        default=(), description="Ranges of nodes that torch modules stand for."
    )
    cost: Cost = Field(
        default_factory=Cost,
        description="What tells whether an engine pays for its launch and the copies around it.",
    )


class Fallback(Part):
    """What runs the stages that TensorRT does not take."""

    runtime: Runtime = Field(
        default="onnxruntime",
        description="`torch` runs what `operators` and `partition.replace` give a module for, and "
        "no operator of ONNX.",
    )


DtypeName = Literal[
    "float32",
    "float16",
    "bfloat16",
    "float64",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
    "string",
]


class OperatorOutput(Part):
    """How dtype and shape of an output of a custom operator follow from its inputs."""

    like: int | None = Field(
        default=None,
        ge=0,
        le=LARGEST_DIM,
        description="Position of the input whose dtype and shape it has, from 0, where the keys "
        "below do not say otherwise.",
    )
    dtype: DtypeName | None = Field(default=None, description="Type of its elements.")
    shape: Annotated[tuple[Axis, ...], Field(strict=False)] | None = Field(
        default=None,
        description="One entry an axis: a number, the name of an axis of `inputs`, or arithmetic "
        "with both (`+ - * //` and brackets). A name that no input has is an extent which the "
        "data decide.",
    )

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if self.like is None and (self.dtype is None or self.shape is None):
            what = "dtype" if self.dtype is None else "shape"
            raise _fault(
                "incomplete-output",
                f"nothing says which {what} this output has",
                f"add `{what}`, or `like: 0` for that of the first input",
            )
        return self


class Operator(Part):
    """An operator that ONNX does not have: what it returns, and who runs it."""

    op: Name = Field(
        description="Domain and op, such as `acme.vision::Peaks`. A model has the domain of each "
        "node; optc shows both in this form."
    )
    inputs: Annotated[
        tuple[Annotated[tuple[Axis, ...], Field(strict=False)], ...], Field(strict=False)
    ] = Field(
        default=(),
        description="For each input, names (or numbers) of its axes, for `outputs` to refer to.",
    )
    outputs: Annotated[tuple[OperatorOutput, ...], Field(strict=False)] = Field(
        min_length=1, description="What it returns, in order."
    )
    bounds: dict[Name, Axis] = Field(
        default_factory=dict,
        description="Name of an extent that the data decide -> what it never exceeds: a number, or "
        "arithmetic with axes of `inputs`. An engine behind it needs that.",
    )
    onnxruntime: Name | None = Field(
        default=None,
        description="Shared library of ONNX Runtime custom operators that runs it, relative to the "
        "folder of the spec.",
    )
    torch: Name | None = Field(
        default=None,
        description="File of a module that runs it on libtorch: TorchScript, or an exported "
        "program (`.pt2`). It gets the inputs in order, and the node's attributes by name.",
    )
    tensorrt: Name | None = Field(
        default=None,
        description="Shared library of TensorRT plugins with which engines that hold it are built "
        "and run.",
    )

    @model_validator(mode="after")
    def _has_a_runner(self) -> Self:
        if self.onnxruntime is not None and self.torch is not None:
            raise _fault(
                "two-runners",
                f"both `onnxruntime` and `torch` are to run {self.op}",
                "keep one of them",
                ("torch",),
            )
        if self.onnxruntime is None and self.torch is None and self.tensorrt is None:
            raise _fault(
                "no-runner",
                f"nothing says who runs {self.op}",
                "name a file under `onnxruntime`, `torch` or `tensorrt`",
            )
        return self


class TopK(Part):
    """How often the best entries of an output must be the same."""

    k: int = Field(default=1, ge=1, description="How many of the largest are compared, as a set.")
    axis: int = Field(default=-1, description="Along which axis.")
    agreement: Real = Field(
        default=0.99, ge=0, le=1, description="Least share of positions where they are the same."
    )


class Exactness(Part):
    """How near an output must be to what the original model gives. All that is said must hold."""

    atol: Real | None = Field(
        default=None, ge=0, description="Absolute tolerance; 1e-4 where only `rtol` is given."
    )
    rtol: Real | None = Field(
        default=None,
        ge=0,
        description="Tolerance relative to the original value; 1e-4 where only `atol` is given.",
    )
    of_scale: Real | None = Field(
        default=None,
        ge=0,
        description="Tolerance relative to the largest magnitude of the original's output.",
    )
    sqnr_db: Real | None = Field(
        default=None,
        description="Least ratio of signal to quantisation noise over an output, in decibels.",
    )
    cosine: Real | None = Field(
        default=None, ge=-1, le=1, description="Least cosine similarity over an output."
    )
    agreement: Real | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Least share of equal elements, for integers and booleans.",
    )
    top_k: TopK | None = Field(
        default=None, description="How often the best entries must be the same: for class scores."
    )


class Detections(Part):
    """Outputs that together are boxes: compared as sets, matched by overlap and class."""

    boxes: Name = Field(
        description="Output with the corners of the boxes, four along the last axis; or with "
        "corners, score and class in 5, 6 or 7 columns, and then `scores` names it as well."
    )
    scores: Name = Field(description="Output with the score of each box, from 0 to 1.")
    labels: Name | None = Field(default=None, description="Output with the class of each box.")
    format: Literal["corners", "center"] = Field(
        default="corners",
        description="`corners`: x1, y1, x2, y2 (or y before x); `center`: x, y, width, height.",
    )
    iou: Real = Field(
        default=0.5, gt=0, le=1, description="Least overlap (intersection over union) of a match."
    )
    high: Real | None = Field(
        default=None, ge=0, le=1, description="Least share matched of boxes with scores above 0.5."
    )
    middle: Real | None = Field(
        default=None, ge=0, le=1, description="Of those with scores from 0.2 to 0.5."
    )
    low: Real | None = Field(
        default=None, ge=0, le=1, description="Of those with scores below 0.2."
    )


class Demands(Exactness):
    """What is asked of the outputs on some inputs."""

    outputs: dict[Name, Exactness] = Field(
        default_factory=dict,
        description="Name of an output -> what is asked of it in place of what is asked of all.",
    )
    detections: Annotated[tuple[Detections, ...], Field(strict=False)] = Field(
        default=(),
        description="Outputs that together are boxes with scores. Without it they are recognised "
        "by their shapes.",
    )


class Group(Demands):
    """Inputs that are verified and reported on their own, such as the hard cases."""

    expected = "a pattern, a list of patterns, or a mapping with `data`"

    data: Patterns = Field(
        description="Input files (`.npz`, one array an input), relative to the folder of the spec."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_patterns(cls, value: object) -> object:
        return {"data": value} if isinstance(value, str | list | tuple) else value

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Add the short form."""
        return _or({"type": ["string", "array"]}, schema, handler)


class Verify(Demands):
    """How exactly the package must compute what the original model does.

    Where nothing is asked of an output, the defaults of `precision.default` hold.
    """

    data: Patterns | None = Field(
        default=None,
        description="Input files to verify with (`.npz`, one array an input), a pattern or a list "
        "of patterns, relative to the folder of the spec. Made-up input is used besides.",
    )
    groups: dict[Name, Group] = Field(
        default_factory=dict,
        description="Name of a group of inputs -> its files, and what is asked of the outputs on "
        "them in place of what is asked of all.",
    )


class Gate(Part):
    """What the package must keep to; where it does not, `optc compile` exits with 3."""

    max_engines: int | None = Field(
        default=None, ge=1, le=LARGEST_DIM, description="Most engines a target may need."
    )
    min_tensorrt_flops: Real | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Least share of the floating-point operations that runs in engines, 0 to 1, "
        "on every target.",
    )
    max_boundary_bytes: int | None = Field(
        default=None,
        ge=0,
        description="Most bytes that may cross between stages in one call, on every target, at the "
        "largest extents of any profile. A tensor counts at every boundary that it crosses.",
    )


def _portable() -> tuple[Target, ...]:
    return (Target(name="portable"),)


class CompileSpec(Part):
    """What to compile, for which GPUs, and how exact the result must be."""

    version: Literal[1] = Field(description="Version of this format: 1.")
    model: ModelFile = Field(description="The ONNX file to compile: its path, or a mapping.")
    inputs: dict[Name, Input] = Field(
        default_factory=dict,
        description="Name of an input -> what the graph does not say about it, or says badly.",
    )
    dims: dict[Name, Range] = Field(
        default_factory=dict,
        description="Name of a dynamic axis -> its range. A number pins it. Each dynamic axis of "
        "the inputs has its range here, or in every profile; an axis that comes up inside the "
        "model may have one too, under the name that `optc plan` prints.",
    )
    profiles: Annotated[tuple[dict[Name, Range], ...], Field(strict=False)] = Field(
        default=(),
        min_length=1,
        description="Several optimisation profiles, instead of `dims`: each gives every dynamic "
        "axis of the inputs.",
    )
    targets: Annotated[tuple[Target, ...], Field(strict=False)] = Field(
        default_factory=_portable,
        min_length=1,
        description="What to build engines for. Without it: one target called `portable`, built by "
        "`tensorrt-rtx` for Ampere and later.",
    )
    precision: Precision = Field(
        default_factory=Precision,
        description="What the engines compute in: a name, or a mapping.",
    )
    passes: Passes = Field(default_factory=Passes, description="Which graph passes run.")
    partition: Partition = Field(
        default_factory=Partition,
        description="Where the model is cut, beyond what TensorRT itself asks for.",
    )
    operators: Annotated[tuple[Operator, ...], Field(strict=False)] = Field(
        default=(), description="Operators of the model that ONNX does not have."
    )
    fallback: Fallback = Field(
        default_factory=Fallback, description="What runs the stages that TensorRT does not take."
    )
    verify: Verify | None = Field(
        default=None,
        description="How exactly the package must compute what the original model does. Where it "
        "is given, `optc compile` verifies.",
    )
    gate: Gate | None = Field(
        default=None,
        description="What the package must keep to; where it does not, `optc compile` exits with "
        "3.",
    )

    @field_validator("version", mode="before")
    @classmethod
    def _is_one(cls, value: object) -> object:
        if value != 1 or not isinstance(value, int) or isinstance(value, bool):
            problem = f"this optc reads version 1 of the spec, not {kind_of(value)}"
            raise _fault("unknown-version", problem, "write `version: 1`")
        return value

    @model_validator(mode="after")
    def _gives_ranges_once(self) -> Self:
        if self.dims and self.profiles:
            raise _fault(
                "dims-and-profiles",
                "the spec has both `dims` and `profiles`",
                "keep one of them; a range that holds in every profile is repeated in each",
                ("profiles",),
            )
        return self

    @field_validator("targets")
    @classmethod
    def _have_their_own_names(cls, targets: tuple[Target, ...]) -> tuple[Target, ...]:
        # Engines stand in a folder per target, and some file systems ignore case.
        names = [target.name.casefold() for target in targets]
        for index, target in enumerate(targets):
            if names.index(names[index]) < index:
                raise _fault(
                    "duplicate-target",
                    f"two targets are called `{target.name}`",
                    "give each target a name of its own",
                    (index, "name"),
                )
        return targets


def _or(
    short: dict[str, Any], schema: CoreSchema, handler: GetJsonSchemaHandler
) -> JsonSchemaValue:
    """Return the JSON Schema of a part that has a short form too."""
    json = handler.resolve_ref_schema(handler(schema))
    long = {key: json.pop(key) for key in list(json) if key not in ("title", "description")}
    json["anyOf"] = [short, long]
    return json


class _SpecSchema(GenerateJsonSchema):
    def nullable_schema(self, schema: NullableSchema) -> JsonSchemaValue:
        """Leave null out: a key without a value is an error in a spec."""
        return self.generate_inner(schema["schema"])


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a spec, short forms included."""
    schema = CompileSpec.model_json_schema(schema_generator=_SpecSchema)
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        "title": "optc compile spec, version 1",
        **_tidy(schema),
    }


def _tidy(schema: Any, *, names: bool = False) -> Any:
    """Return ``schema`` as a spec's author wants to read it.

    Titles made from names go, and so does ``default: null``, which no spec may say; of a docstring
    stays the first paragraph. ``names``: the keys are names of a spec, not words of JSON Schema.
    """
    if isinstance(schema, list):
        return [_tidy(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    tidied: dict[str, Any] = {}
    for key, value in schema.items():
        if not names and (key == "title" or (key == "default" and value is None)):
            continue
        tidied[key] = _tidy(value, names=not names and key in ("properties", "$defs"))
        if not names and key == "description":
            tidied[key] = value.split("\n\n")[0]
    return tidied
