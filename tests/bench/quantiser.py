"""The quantisers to int8 that the benchmark compares, each called the way its users call it.

    python tests/bench/quantiser.py TOOL JOB.json

does one quantisation and nothing else, as converter.py does conversions. A job also says with what
to calibrate: npz files under ``calibration``. Quantised values are symmetric and weights are
quantised per channel: TensorRT takes no others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from converter import OURS, Answer, Converter, Job, by_optc, convert

from optc.passes.graph import opset_of

PER_CHANNEL = 13
"""The first opset in which Q and DQ have an axis."""


def by_onnxruntime(method: str, *ops: str) -> Callable[[], Converter]:
    """Return ONNX Runtime's static quantiser, after what it needs to be done before.

    The model is raised to the opset in which scales may be per channel. Of the preprocessing the
    symbolic part is left out: it fails on models of other exporters. Biases stay floats: TensorRT
    has no Q or DQ of int32. Of the operators only ``ops`` are quantised, where some are named.
    """

    def imported() -> Converter:
        from onnxruntime.quantization import (
            CalibrationDataReader,
            CalibrationMethod,
            QuantFormat,
            QuantType,
            quantize_static,
        )
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(CalibrationDataReader):
            """The calibration data, read one by one."""

            def __init__(self, paths: list[str]) -> None:
                self._inputs: Iterator[dict[str, Any]] = (dict(np.load(path)) for path in paths)

            def get_next(self) -> dict[str, Any] | None:
                return next(self._inputs, None)

        def run(job: Job) -> Answer:
            before, after = (str(Path(job["target"], name)) for name in ("pre.onnx", "model.onnx"))
            model = onnx.load(job["model"])
            if opset_of(model) < PER_CHANNEL:
                model = onnx.version_converter.convert_version(model, PER_CHANNEL)
            quant_pre_process(model, before, skip_symbolic_shape=True)
            quantize_static(
                before,
                after,
                Reader(job["calibration"]),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(ops) or None,
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod[method],
                extra_options={
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                    "QuantizeBias": False,
                },
            )
            return {"parts": [after], "engines": [True]}

        return run

    return imported


PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""What TensorRT is fastest at in int8; all else costs exactness and saves little."""

QUANTISERS: dict[str, Callable[[], Converter]] = {
    OURS: by_optc,
    "onnxruntime, minmax": by_onnxruntime("MinMax"),
    "onnxruntime, entropy": by_onnxruntime("Entropy"),
    "products, entropy": by_onnxruntime("Entropy", *PRODUCTS),
    "products, percentile": by_onnxruntime("Percentile", *PRODUCTS),
}

if __name__ == "__main__":
    sys.exit(convert(QUANTISERS))
