"""Write model.onnx, a small detector, and the torch modules that run two parts of it.

    image ─ backbone ─ heads ─ decode ─ acme.vision::Peaks ─ gather ─ rescore ─ boxes, scores

- ``acme.vision::Peaks`` is an operator that ONNX does not have: the places where the score map is at
  its largest within a window. ``peaks.pt`` runs it (TorchScript).
- What rescores the candidates has learned weights: from a candidate's score and its largest overlap
  with a better one, a small network makes the final score. model.onnx has it in 26 nodes;
  ``rescore.pt2`` is the same in torch (an exported program), for the spec to put in their place.

The weights are drawn from a fixed seed: the model detects nothing useful, and the same everywhere.
Making the modules needs torch (``pip install 'optc[torch]'``); model.onnx does not.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

SIZE, WIDTH, HIDDEN = 96, 24, 16
HERE = Path(__file__).parent

GRAPH = """
<ir_version: 9, opset_import: ["" : 17, "acme.vision" : 1]>
detector (float[batch, 3, 96, 96] image) => (float[n, 4] boxes, float[n] scores, int64[n] of_image)
{
    [backbone_0] f0 = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (image, w0, b0)
    [backbone_1] f1 = Relu (f0)
    [backbone_2] f2 = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (f1, w1, b1)
    [backbone_3] f3 = Relu (f2)
    [backbone_4] f4 = Conv <pads = [1, 1, 1, 1]> (f3, w2, b2)
    [backbone_5] features = Relu (f4)

    [score_conv] s0 = Conv <pads = [1, 1, 1, 1]> (features, ws, bs)
    [score]      heat = Sigmoid (s0)
    [side_conv]  d0 = Conv <pads = [1, 1, 1, 1]> (features, wd, bd)
    [side]       d1 = Softplus (d0)
    [sides]      sides = Mul (d1, eight)
    [low]        low = Sub (grid, sides)
    [high]       high = Add (grid, sides)
    [corners]    corners = Concat <axis = 1> (low, high)
    [last]       corner_map = Transpose <perm = [0, 2, 3, 1]> (corners)

    [peaks]      places = acme.vision.Peaks <window = 5, threshold = 0.5> (heat)
    [pick_box]   boxes = GatherND (corner_map, places)
    [last_score] heat_map = Squeeze (heat, one)
    [pick_score] candidates = GatherND (heat_map, places)
    [image_of]   image_of = Slice (places, zero, one, one)
    [flat_image] of_image = Squeeze (image_of, one)

    [rescore_a]  a = Unsqueeze (boxes, one)
    [rescore_b]  b = Unsqueeze (boxes, zero)
    [rescore_a0] a0, a1 = Split <axis = 2> (a, halves)
    [rescore_b0] b0s, b1s = Split <axis = 2> (b, halves)
    [rescore_lo] lo = Max (a0, b0s)
    [rescore_hi] hi = Min (a1, b1s)
    [rescore_wh] wh0 = Sub (hi, lo)
    [rescore_in] wh = Relu (wh0)
    [rescore_ov] inter = ReduceProd <axes = [2], keepdims = 0> (wh)
    [rescore_sa] size_a = Sub (a1, a0)
    [rescore_aa] area_a = ReduceProd <axes = [2], keepdims = 0> (size_a)
    [rescore_sb] size_b = Sub (b1s, b0s)
    [rescore_ab] area_b = ReduceProd <axes = [2], keepdims = 0> (size_b)
    [rescore_s]  areas = Add (area_a, area_b)
    [rescore_u]  union = Sub (areas, inter)
    [rescore_i]  iou = Div (inter, union)
    [rescore_1]  s_row = Unsqueeze (candidates, one)
    [rescore_2]  s_col = Unsqueeze (candidates, zero)
    [rescore_i1] i_row = Unsqueeze (of_image, one)
    [rescore_i2] i_col = Unsqueeze (of_image, zero)
    [rescore_sm] same = Equal (i_row, i_col)
    [rescore_lt] worse = Less (s_row, s_col)
    [rescore_nd] rival = And (same, worse)
    [rescore_fl] mask = Cast <to = 1> (rival)
    [rescore_ms] rivals = Mul (iou, mask)
    [rescore_pd] padded = Pad (rivals, pads, nought)
    [rescore_mx] worst = ReduceMax <axes = [1], keepdims = 1> (padded)
    [rescore_ct] known = Concat <axis = 1> (s_row, worst)
    [rescore_h0] h0 = Gemm <transB = 1> (known, wh0_, bh0)
    [rescore_h1] h1 = Relu (h0)
    [rescore_h2] h2 = Gemm <transB = 1> (h1, wh1, bh1)
    [rescore_h3] h3 = Sigmoid (h2)
    [rescore_y]  scores = Squeeze (h3, one)
}
"""


def weights(seed: int = 0) -> dict[str, Any]:
    """Return the constants of the model by name."""
    random = np.random.default_rng(seed)

    def drawn(*shape: int) -> Any:
        scale = (2 / np.prod(shape[1:])) ** 0.5
        return (scale * random.standard_normal(shape)).astype(np.float32)

    rows = np.arange(SIZE // 4, dtype=np.float32) * 4 + 2
    x, y = np.meshgrid(rows, rows)
    return {
        "w0": drawn(WIDTH, 3, 3, 3),
        "b0": np.zeros(WIDTH, np.float32),
        "w1": drawn(WIDTH, WIDTH, 3, 3),
        "b1": np.zeros(WIDTH, np.float32),
        "w2": drawn(WIDTH, WIDTH, 3, 3),
        "b2": np.zeros(WIDTH, np.float32),
        "ws": drawn(1, WIDTH, 3, 3),
        "bs": np.full(1, 0.2, np.float32),
        "wd": drawn(2, WIDTH, 3, 3),
        "bd": np.full(2, 0.5, np.float32),
        "grid": np.stack([x, y])[None],
        "eight": np.float32(8),
        "wh0_": drawn(HIDDEN, 2),
        "bh0": np.full(HIDDEN, 0.1, np.float32),
        "wh1": drawn(1, HIDDEN),
        "bh1": np.zeros(1, np.float32),
        "zero": np.array([0]),
        "one": np.array([1]),
        "halves": np.array([2, 2]),
        "pads": np.array([0, 0, 0, 1]),
        "nought": np.float32(0),
    }


def detector() -> onnx.ModelProto:
    """Return the model."""
    model = onnx.parser.parse_model(GRAPH)
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(values), name) for name, values in weights().items()
    )
    return model


def write_modules(folder: Path) -> None:
    """Write ``peaks.pt`` and ``rescore.pt2``."""
    import torch
    from torch import Tensor

    class Peaks(torch.nn.Module):
        """What the operator does; it gets the attributes of its node by name."""

        def forward(self, heat: Tensor, window: int, threshold: float) -> Tensor:
            largest = torch.nn.functional.max_pool2d(heat, window, 1, window // 2)
            return ((heat == largest) & (heat > threshold))[:, 0].nonzero()

    class Rescore(torch.nn.Module):
        """What the nodes from `boxes`, `candidates` and `of_image` to `scores` do."""

        def __init__(self) -> None:
            super().__init__()
            self.hidden = torch.nn.Linear(2, HIDDEN)
            self.out = torch.nn.Linear(HIDDEN, 1)
            learned = weights()
            names = {"hidden.weight": "wh0_", "hidden.bias": "bh0"}
            names |= {"out.weight": "wh1", "out.bias": "bh1"}
            self.load_state_dict({k: torch.from_numpy(learned[v]) for k, v in names.items()})

        def forward(self, boxes: Tensor, candidates: Tensor, of_image: Tensor) -> Tensor:
            low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
            high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
            inter = (high - low).clamp(min=0).prod(-1)
            area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
            iou = inter / (area[:, None] + area[None] - inter)
            rival = (of_image[:, None] == of_image) & (candidates[:, None] < candidates)
            rivals = torch.nn.functional.pad(iou * rival, (0, 1))
            known = torch.stack([candidates, rivals.amax(1)], 1)
            return self.out(self.hidden(known).relu()).sigmoid()[:, 0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Peaks()).save(str(folder / "peaks.pt"))
    found = torch.export.Dim("found", min=0)
    program = torch.export.export(
        Rescore(),
        (torch.rand(5, 4), torch.rand(5), torch.zeros(5, dtype=torch.int64)),
        dynamic_shapes=({0: found}, {0: found}, {0: found}),
    )
    torch.export.save(program, folder / "rescore.pt2")


if __name__ == "__main__":
    model = detector()
    onnx.checker.check_model(model)
    onnx.save(model, HERE / "model.onnx")
    size = (HERE / "model.onnx").stat().st_size
    print(f"{HERE / 'model.onnx'}: {len(model.graph.node)} nodes, {size / 1e3:.0f} kB")
    write_modules(HERE)
    for name in ("peaks.pt", "rescore.pt2"):
        print(f"{HERE / name}: {(HERE / name).stat().st_size / 1e3:.0f} kB")
