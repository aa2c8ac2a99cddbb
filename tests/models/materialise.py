"""Real models for tests, small enough for a repository: exported graphs whose weights are drawn.

Of each model there are two files here: ``NAME.onnx.xz``, the graph as it was exported with its
large weights left empty, and ``NAME.json``, which keeps mean, standard deviation and range of each.
A model that is given weights again computes nothing useful, yet every node, name and shape is the
exporter's, and activations stay in the range that a trained model has.

    python tests/models/materialise.py FOLDER [NAME...]
"""

from __future__ import annotations

import json
import lzma
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

HERE = Path(__file__).parent


def names() -> list[str]:
    """Return the names of the models there are."""
    return sorted(path.name.removesuffix(".onnx.xz") for path in HERE.glob("*.onnx.xz"))


def materialise(name: str, folder: Path, *, seed: int = 0) -> Path:
    """Write model ``name`` with weights to ``folder`` and return its path.

    Args:
        name: One of `names`.
        folder: Is made where it does not exist.
        seed: Of the weights; the same seed gives the same weights.
    """
    model = onnx.ModelProto.FromString(lzma.decompress((HERE / f"{name}.onnx.xz").read_bytes()))
    figures = json.loads((HERE / f"{name}.json").read_text())
    for tensor in model.graph.initializer:
        if tensor.name in figures:
            # One stream a weight: a model that gains a weight keeps the others as they are.
            random = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
            tensor.raw_data = _drawn(figures[tensor.name], tensor, random).tobytes()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.onnx"
    onnx.save(model, path)
    return path


def _drawn(
    figures: Mapping[str, float], tensor: onnx.TensorProto, random: np.random.Generator
) -> npt.NDArray[np.generic]:
    """Return values for ``tensor`` with the mean, deviation and range that ``figures`` give."""
    drawn = random.standard_normal(tuple(tensor.dims), dtype=np.float32)
    scaled = drawn * np.float32(figures["std"]) + np.float32(figures["mean"])
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.clip(scaled, figures["min"], figures["max"]).astype(dtype)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for wanted in sys.argv[2:] or names():
        print(materialise(wanted, Path(sys.argv[1])))
