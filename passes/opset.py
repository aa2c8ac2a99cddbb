"""Raises the version of the default domain that a model imports, node by node, exactly.

Which operators a step from one version to the next changes is asked of ONNX's own schemas; what that
takes is in two tables here. `EXTENDED` has the changes that let every node stay as it is: more types,
another input that may be omitted, an attribute whose default is what was done before. `REWRITTEN` has
the others, each with the function that rewrites a node to mean the same, where it can. A change that
stands in neither is one that no node follows, or that onnxruntime has no kernel for (RoiAlign 22).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx import helper

from optc.passes.graph import DEFAULT_DOMAINS, Names, all_nodes

if TYPE_CHECKING:
    from optc.passes.shape import Shapes

OLDEST = 7
"""In older versions operators broadcast by attributes of their own; runtimes begin here as well."""

NEWEST = 24
"""No model is raised above this: the newest version that brings an operator worth fusing to.

TensorRT for RTX 1.7 and onnxruntime 1.32 read it, and the real models tried run as fast in it.
"""

EXTENDED = {
    8: "Max MaxPool Mean Min Sum",
    9: "Cast Flatten Gemm Greater Less MatMul PRelu",
    10: "AveragePool MaxPool",
    11: """ArgMax ArgMin AveragePool Compress Concat Conv DepthToSpace Equal Flatten Gather Gemm
        Hardmax If LogSoftmax Loop LpPool MaxPool MaxUnpool NonMaxSuppression ReduceL1 ReduceL2
        ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
        ReduceSumSquare Scan Slice Softmax Split Squeeze TopK Unsqueeze""",
    12: "ArgMax ArgMin Clip GatherND Max MaxPool Min Pow ReduceMax ReduceMin",
    13: """Abs Add ArgMax ArgMin Cast Ceil Clip Concat DepthToSpace DequantizeLinear Div
        Dropout Equal Exp Expand Flatten Floor Gather GatherElements GatherND Gemm Greater Identity If
        IsNaN LRN Less Log Loop MatMul Max Mean MeanVarianceNormalization Min Mod Mul Neg
        NegativeLogLikelihoodLoss NonZero Pad Pow QuantizeLinear Reciprocal ReduceL1 ReduceL2
        ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSumSquare Relu
        Reshape ScatterElements ScatterND Shape Sigmoid Sign Size Slice SoftmaxCrossEntropyLoss
        SpaceToDepth Sqrt Sub Sum Tanh Tile Transpose""",
    14: "Add CumSum Div GRU Identity LSTM Mul RNN Relu Reshape Sub",
    15: "BatchNormalization Pow Shape",
    16: """GreaterOrEqual Identity If LeakyRelu LessOrEqual Loop PRelu Scan ScatterElements ScatterND
        Where""",
    18: "LpPool OptionalGetElement OptionalHasElement Pad Resize ScatterElements ScatterND",
    19: """Cast CastLike DequantizeLinear Equal Identity If Loop Pad QuantizeLinear Reshape
        Resize Scan Shape Size""",
    20: "ConstantOfShape IsInf IsNaN ReduceMax ReduceMin",
    21: """Cast CastLike ConstantOfShape DequantizeLinear Flatten Identity If Loop Pad
        QLinearMatMul QuantizeLinear Reshape Scan Shape Size Squeeze Transpose Unsqueeze""",
    22: """Acos Acosh Asin Asinh Atan Atanh Conv ConvTranspose Cos Cosh DeformConv Det Dropout Elu
        EyeLike GRU GlobalAveragePool GlobalMaxPool GridSample HardSigmoid HardSwish
        InstanceNormalization LSTM LpNormalization LpPool MaxUnpool Mish NegativeLogLikelihoodLoss RNN
        Round Selu Sin Sinh Softplus Softsign Tan ThresholdedRelu""",
    23: """Cast CastLike ConstantOfShape DequantizeLinear Flatten Identity If Loop Pad
        QuantizeLinear Reshape Scan Shape Size Squeeze Transpose Unsqueeze""",
    24: """Cast CastLike ConstantOfShape DequantizeLinear Flatten Identity If Loop Pad
        QuantizeLinear Reshape Scan Shape Size SplitToSequence Squeeze TopK Transpose Unsqueeze""",
}
"""Version -> operators that only gained by it, read in the changelog of their schemas."""


LAST_VERSION = {"MeanVarianceNormalization": 17}
"""Operators whose schema defines them by reductions as they were until then, and ends with them."""


class _Draft:
    """A node as it will be, if all others can follow too."""

    def __init__(self, node: gs.Node, raising: _Raising) -> None:
        self.node = node
        self.op: str = node.op
        self.inputs: list[gs.Tensor] = list(node.inputs)
        self.outputs: list[gs.Tensor] = list(node.outputs)
        self.attrs: dict[str, Any] = dict(node.attrs)
        self._raising = raising

    def constant(self, argument: str, values: npt.ArrayLike, dtype: Any = np.int64) -> gs.Constant:
        """Return a constant to read as ``argument``: one for all nodes that read the same."""
        value = np.asarray(values, dtype)
        key = (value.dtype.name, value.shape, value.tobytes())
        found = self._raising.constants.get(key)
        if found is None:
            name = self._raising.fresh(f"{self.node.name}_{argument}")
            found = self._raising.constants[key] = gs.Constant(name, value)
        return found

    def dtype(self) -> np.dtype[Any] | None:
        """Return the type of the elements of the first input, or None where it is not known."""
        data = self.inputs[0]
        if isinstance(data, gs.Constant):
            dtype: np.dtype[Any] = np.dtype(data.dtype)
            return dtype
        return self._raising.shapes().dtype(data.name)

    def extents(self) -> tuple[Any, ...] | None:
        """Return the extents of the first input, or None where its rank is not known."""
        data = self.inputs[0]
        if isinstance(data, gs.Constant):
            return tuple(data.shape)
        return self._raising.shapes().dims(data.name)

    def apply(self) -> None:
        """Let the node be what this says."""
        self.node.op = self.op
        self.node.attrs = self.attrs
        self.node.inputs.clear()
        self.node.inputs.extend(self.inputs)
        while len(self.node.outputs) > len(self.outputs):
            self.node.outputs.pop()


Step = Callable[[_Draft], bool]
"""Rewrites a draft to mean the same one version on; returns whether it can."""


# --- the rewrites --------------------------------------------------------------------------------


def _axes_to_input(draft: _Draft) -> bool:
    """Squeeze, Unsqueeze, reductions: no axes and an empty list both mean all of them."""
    if axes := draft.attrs.pop("axes", None):
        draft.inputs.append(draft.constant("axes", axes))
    return True


def _unsqueeze(draft: _Draft) -> bool:
    """To insert no axis is said by an empty list, not by none."""
    draft.inputs.append(draft.constant("axes", draft.attrs.pop("axes")))
    return True


def _split_to_input(draft: _Draft) -> bool:
    if "split" in draft.attrs:
        draft.inputs.append(draft.constant("split", draft.attrs.pop("split")))
    return True


def _split_counts_outputs(draft: _Draft) -> bool:
    if len(draft.inputs) < 2 or not draft.inputs[1].name:
        del draft.inputs[1:]
        draft.attrs["num_outputs"] = len(draft.outputs)
    return True


def _softmax(draft: _Draft) -> bool:
    """Until 13 the axes from ``axis`` on were one; they still are where all but one have extent 1."""
    axis = draft.attrs.get("axis", 1)
    if axis != -1:
        extents = draft.extents()
        if extents is None or not -len(extents) <= axis < len(extents):
            return False
        first = axis % len(extents)
        wide = [index for index in range(first, len(extents)) if extents[index] != 1]
        if len(wide) > 1:
            return False
        axis = wide[0] if wide else first
    draft.attrs["axis"] = axis
    return True


def _batch_normalization_is_spatial(draft: _Draft) -> bool:
    return bool(draft.attrs.pop("spatial", 1))


def _has_one_output(draft: _Draft) -> bool:
    """BatchNormalization and Dropout: what further outputs hold has changed."""
    if any(tensor.name for tensor in draft.outputs[1:]):
        return False
    del draft.outputs[1:]  # not even as omitted ones are there as many as there were
    return True


def _dropout(draft: _Draft) -> bool:
    """Without an input that says so it does not train, and the ratio means nothing."""
    draft.attrs.pop("ratio", None)
    return _has_one_output(draft)


def _clip(draft: _Draft) -> bool:
    """The default bounds were float32's largest numbers; now they are those of the type."""
    dtype = draft.dtype()
    bounds = [draft.attrs.pop("min", None), draft.attrs.pop("max", None)]
    if dtype is None:
        return False
    limits = np.finfo(np.float32)
    for name, bound, default in zip(("min", "max"), bounds, (limits.min, limits.max), strict=True):
        if bound is None and dtype == np.float32:
            draft.inputs.append(gs.Variable.empty())
        else:
            with np.errstate(over="ignore"):  # beyond float16 it is infinite: no bound there either
                value = np.asarray(default if bound is None else bound).astype(dtype)
            draft.inputs.append(draft.constant(name, value, dtype))
    while not draft.inputs[-1].name:
        draft.inputs.pop()
    return True


def _pad(draft: _Draft) -> bool:
    draft.inputs.append(draft.constant("pads", draft.attrs.pop("pads")))
    value = draft.attrs.pop("value", 0.0)
    if value != 0 and draft.attrs.get("mode", "constant") == "constant":
        dtype = draft.dtype()
        if dtype is None:
            return False
        draft.inputs.append(draft.constant("value", value, dtype))
    return True


def _slice(draft: _Draft) -> bool:
    for name in ("starts", "ends", "axes"):
        if name in draft.attrs:
            draft.inputs.append(draft.constant(name, draft.attrs.pop(name)))
    return True


def _top_k(draft: _Draft) -> bool:
    draft.inputs.append(draft.constant("k", [draft.attrs.pop("k")]))
    return True


def _upsample(draft: _Draft) -> bool:
    draft.inputs.append(draft.constant("scales", draft.attrs.pop("scales"), np.float32))
    return True


def _upsample_is_resize(draft: _Draft) -> bool:
    draft.op = "Resize"
    return True


def _resize_says_how(draft: _Draft) -> bool:
    """Version 10 scaled coordinates from 0; the nearest element was left of them, if not shrinking."""
    scales = draft.inputs[1]
    if draft.attrs.get("mode", "nearest") == "nearest":
        if not isinstance(scales, gs.Constant) or np.any(scales.values < 1):
            return False
        draft.attrs["nearest_mode"] = "floor"
    draft.attrs["coordinate_transformation_mode"] = "asymmetric"
    draft.inputs[1:] = [draft.constant("roi", [], np.float32), scales]
    return True


def _resize_omits(draft: _Draft) -> bool:
    """What is not given was an empty tensor, and is omitted now. One mode was dropped."""
    mode = draft.attrs.get("coordinate_transformation_mode", "half_pixel")
    if mode == "tf_half_pixel_for_nn":
        return False
    if mode != "tf_crop_and_resize":
        draft.inputs[1] = gs.Variable.empty()
    if len(draft.inputs) > 3 and draft.inputs[3].name:
        scales = draft.inputs[2]
        if isinstance(scales, gs.Constant) and 0 in scales.shape:
            draft.inputs[2] = gs.Variable.empty()
        return not draft.inputs[2].name
    return True


def _scatter(draft: _Draft) -> bool:
    draft.op = "ScatterElements"
    return True


def _one_hot(draft: _Draft) -> bool:
    """Until 11 an index below 0 was out of range; now it counts from the end."""
    indices, dtype = draft.inputs[0], draft.dtype()
    if dtype is not None and dtype.kind == "u":
        return True
    return isinstance(indices, gs.Constant) and not np.any(indices.values < 0)


def _conv_transpose(draft: _Draft) -> bool:
    """The sides that get the odd element of a computed padding were exchanged."""
    return draft.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID") and (
        "output_shape" not in draft.attrs
    )


def _takes_floats(draft: _Draft) -> bool:
    """Erf of integers was dropped."""
    dtype = draft.dtype()
    return dtype is not None and dtype.kind not in "iu"


def _roi_align(draft: _Draft) -> bool:
    draft.attrs["coordinate_transformation_mode"] = "output_half_pixel"
    return True


def _average_pool(draft: _Draft) -> bool:
    """The extents that rounding up and automatic padding lead to were defined anew."""
    return not draft.attrs.get("ceil_mode", 0) and (
        draft.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    )


def _begins_inside(draft: _Draft) -> bool:
    """Windows that begin in the padding at the end were counted before, where extents round up."""
    if not draft.attrs.get("ceil_mode", 0):
        return True
    if draft.attrs.get("auto_pad", "NOTSET") != "NOTSET":
        return False
    kernel = draft.attrs["kernel_shape"]
    strides = draft.attrs.get("strides", [1] * len(kernel))
    dilations = draft.attrs.get("dilations", [1] * len(kernel))
    ends = draft.attrs.get("pads", [0] * 2 * len(kernel))[len(kernel) :]
    # The last window of an extent that is rounded up begins less than a stride past where it fits.
    return all(
        end + stride <= dilation * (size - 1) + 1
        for size, stride, dilation, end in zip(kernel, strides, dilations, ends, strict=True)
    )


def _dft(draft: _Draft) -> bool:
    """The axis counted from 1 where it was not given."""
    if len(draft.inputs) < 2:
        draft.inputs.append(gs.Variable.empty())
    draft.inputs.append(draft.constant("axis", draft.attrs.pop("axis", 1)))
    return True


def _grid_sample(draft: _Draft) -> bool:
    mode = draft.attrs.get("mode", "bilinear")
    draft.attrs["mode"] = {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
    return True


REDUCTIONS = (
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax"),
    *("ReduceMean", "ReduceMin", "ReduceProd", "ReduceSumSquare"),
)

REWRITTEN: dict[tuple[str, int], Step] = {
    ("AveragePool", 19): _average_pool,
    ("AveragePool", 22): _begins_inside,
    ("BatchNormalization", 9): _batch_normalization_is_spatial,
    ("BatchNormalization", 14): _has_one_output,
    ("Clip", 11): _clip,
    ("ConvTranspose", 11): _conv_transpose,
    ("DFT", 20): _dft,
    ("Dropout", 10): _has_one_output,
    ("Dropout", 12): _dropout,
    ("Erf", 13): _takes_floats,
    ("GridSample", 20): _grid_sample,
    ("Hardmax", 13): _softmax,
    ("LogSoftmax", 13): _softmax,
    ("MaxPool", 22): _begins_inside,
    ("OneHot", 11): _one_hot,
    ("Pad", 11): _pad,
    **{(op, 18): _axes_to_input for op in REDUCTIONS},
    ("ReduceSum", 13): _axes_to_input,
    ("Resize", 11): _resize_says_how,
    ("Resize", 13): _resize_omits,
    ("RoiAlign", 16): _roi_align,
    ("Scatter", 11): _scatter,
    ("Slice", 10): _slice,
    ("Softmax", 13): _softmax,
    ("Split", 13): _split_to_input,
    ("Split", 18): _split_counts_outputs,
    ("Squeeze", 13): _axes_to_input,
    ("TopK", 10): _top_k,
    ("Unsqueeze", 13): _unsqueeze,
    ("Upsample", 9): _upsample,
    ("Upsample", 10): _upsample_is_resize,
}
"""Operator and the version that changed it -> what makes a node of the version before follow."""


# --- the whole model -----------------------------------------------------------------------------


def changes(op: str, after: int, to: int) -> list[int]:
    """Return the versions above ``after``, up to ``to``, that changed ``op`` of the default domain."""
    found: list[int] = []
    while onnx.defs.has(op, to, ""):
        since = onnx.defs.get_schema(op, to, "").since_version
        if since <= after:
            break
        found.append(since)
        to = since - 1
    return found[::-1]


def _stays(op: str, version: int) -> bool:
    return op in EXTENDED.get(version, "").split()


@dataclass(slots=True)
class _Raising:
    """One attempt: from which version to which, and what the rewrites ask."""

    after: int
    to: int
    shapes: Callable[[], Shapes]
    fresh: Callable[[str], str]
    plans: dict[tuple[str, int], list[tuple[int, Step]] | None] = field(default_factory=dict)
    constants: dict[Any, gs.Constant] = field(default_factory=dict)

    def plan(self, op: str, after: int) -> list[tuple[int, Step]] | None:
        """Return what a node of ``op`` has to do, in order; None where it cannot follow."""
        key = (op, after)
        if key not in self.plans:
            versions = [v for v in changes(op, after, self.to) if not _stays(op, v)]
            steps = [(version, REWRITTEN.get((op, version))) for version in versions]
            known = [(version, step) for version, step in steps if step is not None]
            can = len(known) == len(steps) and self.to <= LAST_VERSION.get(op, NEWEST)
            # An operator that ONNX does not have at all has no versions.
            is_there = onnx.defs.has(op, after, "") or not onnx.defs.has(op, "")
            self.plans[key] = known if can and is_there else None
        return self.plans[key]

    def draft(self, node: gs.Node) -> _Draft | None:
        """Return ``node`` as it has to be, or None where it cannot follow."""
        draft = _Draft(node, self)
        after = self.after
        while after < self.to:
            op, plan = draft.op, self.plan(draft.op, after)
            if plan is None:
                return None
            for version, step in plan:
                if not step(draft):
                    return None
                after = version
                if draft.op != op:
                    break  # its further changes are those of the operator that it has become
            else:
                return draft
        return draft


def raise_opset(
    graph: gs.Graph,
    version: int,
    shapes: Callable[[], Shapes],
    fresh: Callable[[str], str] | None = None,
) -> bool:
    """Rewrite every node of the model ``graph``, bodies included, to mean the same in ``version``.

    Args:
        graph: The main graph. Nodes stay the same objects.
        version: Of the default domain.
        shapes: Says the types and extents of tensors, where a rewrite depends on them.
        fresh: Makes names that nothing in the model bears.

    Returns:
        Whether the model now imports ``version`` or a later one. Where one node cannot follow
        exactly nothing is changed.
    """
    if graph.opset >= version:
        return True
    if graph.opset < OLDEST or version > NEWEST:
        return False
    raising = _Raising(graph.opset, version, shapes, fresh or Names(graph).fresh)
    drafts: list[_Draft] = []
    for node in all_nodes(graph):
        if node.domain:
            continue
        plan = raising.plan(node.op, graph.opset)
        if plan is None:
            return False
        if plan:
            draft = raising.draft(node)
            if draft is None:
                return False
            drafts.append(draft)
    for draft in drafts:
        draft.apply()
    _import(graph, version)
    return True


def _import(graph: gs.Graph, version: int) -> None:
    graph.opset = version
    others = [entry for entry in graph.import_domains or () if entry.domain not in DEFAULT_DOMAINS]
    graph.import_domains = [helper.make_opsetid("", version), *others]
    least = helper.find_min_ir_version_for(graph.import_domains, True)
    graph.ir_version = max(graph.ir_version or 0, least)
