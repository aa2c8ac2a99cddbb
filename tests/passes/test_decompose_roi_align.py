"""`decompose-roi-align`: both modes and coordinates, any number of images and regions, the builder."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from builder_says import Builder
from graphs import rewrite, run
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.passes.decompose_roi_align import DecomposeRoiAlign


def roi_align(
    *,
    x: tuple[object, ...] = (1, 3, 10, 12),
    mode: str = "avg",
    coordinates: str | None = "half_pixel",
    samples: int = 2,
    scale: float = 0.5,
    bins: tuple[int, int] = (2, 3),
    dtype: str = "float",
    opset: int = 17,
) -> str:
    given_coordinates = f', coordinate_transformation_mode = "{coordinates}"' if coordinates else ""
    return f"""
        <ir_version: 8, opset_import: ["" : {opset}]>
        g ({dtype}[{", ".join(map(str, x))}] x, {dtype}[R, 4] rois, int64[R] indices)
        => ({dtype}[R, {x[1]}, {bins[0]}, {bins[1]}] y)
        {{
            [roi] y = RoiAlign <mode = "{mode}", sampling_ratio = {samples},
                                output_height = {bins[0]}, output_width = {bins[1]},
                                spatial_scale = {scale:f}{given_coordinates}> (x, rois, indices)
        }}"""


def feeds(
    shape: tuple[int, int, int, int], regions: int, seed: int = 0
) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    """Return images and regions inside, across and far outside of them, some of no extent."""
    rng = np.random.default_rng(seed)
    rois = rng.uniform(-12, 36, (regions, 4))
    rois[: regions // 2, 2:] = rois[: regions // 2, :2] + rng.uniform(0, 12, (regions // 2, 2))
    return {
        "x": rng.standard_normal(shape).astype(np.float32),
        "rois": rois.astype(np.float32),
        "indices": rng.integers(0, shape[0], regions),
    }


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("coordinates", ["half_pixel", "output_half_pixel", None])
@pytest.mark.parametrize(
    ("declared", "shape"),
    [
        ((1, 3, 10, 12), (1, 3, 10, 12)),
        ((3, 3, 10, 12), (3, 3, 10, 12)),
        (("N", 3, "H", "W"), (2, 3, 7, 5)),
        ((1, 3, "H", "W"), (1, 3, 1, 1)),
    ],
)
@pytest.mark.parametrize("regions", [0, 24])
def test_it_samples_every_region_at_once(
    mode: str,
    coordinates: str | None,
    declared: tuple[object, ...],
    shape: tuple[int, int, int, int],
    regions: int,
) -> None:
    before, after, report = rewrite(
        roi_align(x=declared, mode=mode, coordinates=coordinates), DecomposeRoiAlign()
    )
    assert ops(after).count("GridSample") == 1
    assert set(report.merged.values()) == {("roi",)}
    given_to_both = feeds(shape, regions)
    expected, found = run(before, given_to_both)["y"], run(after, given_to_both)["y"]
    assert found.shape == expected.shape == (regions, 3, 2, 3)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@given(
    shape=st.tuples(*(st.integers(1, high) for high in (3, 3, 9, 9))),
    regions=st.integers(0, 6),
    bins=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    samples=st.integers(1, 3),
    mode=st.sampled_from(["avg", "max"]),
    scale=st.sampled_from([1.0, 0.25, 0.3]),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_any_images_regions_and_bins(
    shape: tuple[int, int, int, int],
    regions: int,
    bins: tuple[int, int],
    samples: int,
    mode: str,
    scale: float,
    seed: int,
) -> None:
    source = roi_align(x=shape, mode=mode, samples=samples, bins=bins, scale=scale)
    before, after, _ = rewrite(source, DecomposeRoiAlign())
    given_to_both = feeds(shape, regions, seed)
    expected, found = run(before, given_to_both)["y"], run(after, given_to_both)["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_an_older_model_is_raised_and_its_pixels_are_not_shifted(mode: str) -> None:
    source = roi_align(coordinates=None, opset=12, mode=mode)
    before, after, _ = rewrite(source, DecomposeRoiAlign())
    assert after.opset_import[0].version >= 16
    given_to_both = feeds((1, 3, 10, 12), 24)
    expected, found = run(before, given_to_both)["y"], run(after, given_to_both)["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_an_image_does_not_touch_its_neighbours() -> None:
    before, after, _ = rewrite(roi_align(x=(3, 3, 10, 12)), DecomposeRoiAlign())
    given_to_both = feeds((3, 3, 10, 12), 24)
    given_to_both["x"][1] = np.nan
    given_to_both["indices"] = np.arange(24) % 2 * 2
    expected, found = run(before, given_to_both)["y"], run(after, given_to_both)["y"]
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_regions_far_outside_sample_nothing() -> None:
    before, after, _ = rewrite(roi_align(), DecomposeRoiAlign())
    given_to_both = feeds((1, 3, 10, 12), 2)
    given_to_both["rois"][:] = [[1e30, 0, 1e31, 8], [0, -1e30, 8, -50]]
    assert not run(before, given_to_both)["y"].any()
    assert not run(after, given_to_both)["y"].any()


def test_float16_is_sampled_in_float32() -> None:
    _, after, _ = rewrite(roi_align(dtype="float16"), DecomposeRoiAlign())
    wide, _, _ = rewrite(roi_align(), DecomposeRoiAlign())
    narrow = feeds((1, 3, 10, 12), 8)
    narrow |= {name: narrow[name].astype(np.float16) for name in ("x", "rois")}
    expected = run(wide, narrow | {k: narrow[k].astype(np.float32) for k in ("x", "rois")})["y"]
    found = run(after, narrow)["y"]
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, expected.astype(np.float16))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            roi_align(samples=0),
            "its sampling_ratio is 0: how many samples it takes depends on each region",
        ),
        (roi_align(dtype="double"), "it computes in float64"),
        (roi_align(x=(1, "C", 10, 12)), "its channels are not known"),
    ],
)
def test_what_it_leaves_alone(source: str, reason: str) -> None:
    before, after, report = rewrite(source, DecomposeRoiAlign())
    assert ops(after) == ops(before)
    assert report.skipped == {"roi": reason}


@pytest.mark.parametrize(
    ("compute_capability", "dtype", "mode", "is_dynamic"),
    [
        ("7.5", "float", "avg", False),
        ("8.6", "float", "avg", True),
        ("8.6", "float16", "max", False),
        ("8.9", "float", "max", True),
        ("8.9", "float16", "avg", True),
    ],
)
def test_tensorrt_takes_what_it_refused(
    tensorrt: Builder, compute_capability: str, dtype: str, mode: str, is_dynamic: bool
) -> None:
    shape = ("N", 3, "H", "W") if is_dynamic else (1, 3, 10, 12)
    before, after, _ = rewrite(roi_align(x=shape, dtype=dtype, mode=mode), DecomposeRoiAlign())
    images = ((1, 3, 8, 8), (2, 3, 10, 12), (4, 3, 20, 20)) if is_dynamic else ((1, 3, 10, 12),) * 3
    profile = {
        "x": images,
        "rois": ((0, 4), (20, 4), (50, 4)),
        "indices": ((0,), (20,), (50,)),
    }
    assert tensorrt.refusal(
        before, compute_capability=compute_capability, profiles=(profile,)
    ).startswith("refused")
    assert not tensorrt.refusal(after, compute_capability=compute_capability, profiles=(profile,))
