"""What ONNX Runtime raises, in a file of its own: who loads it need not load onnx."""

from __future__ import annotations

from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

ORT_ERRORS: tuple[type[Exception], ...] = (
    ort_state.EPFail,
    ort_state.Fail,
    ort_state.InvalidArgument,
    ort_state.InvalidGraph,
    ort_state.InvalidProtobuf,
    ort_state.NoModel,
    ort_state.NoSuchFile,
    ort_state.NotImplemented,
    ort_state.RuntimeException,
    RuntimeError,  # the binding's own: a dtype it does not know
    ValueError,  # a missing input
    MemoryError,
)
"""What ONNX Runtime raises; it has no base class of its own."""


def first_line(error: BaseException) -> str:
    """Return what an error says, or its kind, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
