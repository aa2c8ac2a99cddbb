"""The ranges of quantised values, from runs of the model on typical input.

A quantised tensor is symmetric: its values stand for the numbers from -amax to amax, and what is
larger is clipped. Which amax is best is the question; four answers are to be had:

``minmax``      the largest magnitude that was seen. Nothing is clipped; one outlier takes
                precision from everything else.
``percentile``  the magnitude that the given share of all values, zeros too, is not above; where
                that share was zero, the largest.
``entropy``     the threshold at which the quantised values are distributed most as the values are:
                that of the least Kullback-Leibler divergence. Values of each sign are counted in
                1,025 to 2,048 bins from zero to the largest magnitude; each threshold from the
                128th bin on is tried; what is beyond it counts as its last bin; what a level of the
                quantised type stands for is spread evenly over those of its bins that hold
                anything. Zeros are left out: every symmetric range has them exactly, and after a
                ReLU they would outweigh all the rest.
``mse``         the threshold of the least mean squared error, rounding and clipping together.

The levels are those of the type: 127 equal steps for int8; for fp8 (e4m3) its 126 positive numbers,
which lie the closer the smaller they are, so that the range matters little there.

What it comes to: the signal-to-noise ratio of the outputs in dB, all products quantised, on photos that
were not calibrated with, of three networks with trained weights (a detector, YOLOv8n; a classifier of
how a page is turned; a recogniser of text with attention, in int8 only):

==========  ======================  ======================
            int8                    fp8
==========  ======================  ======================
minmax      29.3    25.6    17.6    26.6    17.3
percentile  31.0    23.4    23.8    26.5    17.0
entropy     31.1    17.6    10.7    26.8    15.2
mse         31.6    24.0    23.3    26.8    19.1
==========  ======================  ======================

``entropy`` looks at how often values occur and not at how large they are: it clips few but large
values readily, which HardSwish, pooling and attention do not forgive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from optc.optimizer.magnitude import RESOLUTION, Floats, Magnitudes, NotFinite
from optc.optimizer.progress import Progress, Silent
from optc.optimizer.samples import Sample
from optc.passes.quantisation import EightBits
from optc.specs.diagnostic import Diagnostic, InputError

Array = npt.NDArray[Any]
Method = Literal["minmax", "percentile", "entropy", "mse"]

Run = Callable[[Mapping[str, Array], Collection[str], Callable[[str, Array], None]], object]
"""Runs the model on its inputs and shows each tensor of the given names once."""

LEVELS: Final[Mapping[EightBits, Floats]] = {
    "int8": np.arange(128) / 127,
    "fp8": np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64) / 448,
}
"""The magnitudes that a quantised type has, as shares of the largest, in ascending order."""

_FIRST_THRESHOLD: Final = 128
"""In bins: below it a bin has a level of its own, and nothing is lost but what is clipped."""

_OCTAVES: Final = 24
_PER_OCTAVE: Final = 8
_FINER: Final = 8
"""Thresholds for the least error: first eight an octave, then eight times as many around the best."""

_ROUNDING: Final = 1e-9
"""Of the signal: errors that differ by less are the same."""


def calibrate(
    run: Run,
    samples: Sequence[Sample],
    wanted: Collection[str],
    method: Method = "entropy",
    percentile: float = 99.99,
    *,
    precision: EightBits = "int8",
    progress: Progress | None = None,
) -> dict[str, float]:
    """Return the amax of each tensor, in the order of their names.

    Each sample is loaded and run once, and nothing of it is kept but counts. The order of the
    samples does not matter.

    Args:
        run: What runs the model, such as `Simulator.tensors`.
        samples: Typical input.
        wanted: Names of the tensors.
        method: See above.
        percentile: For that method: in per cent.
        precision: What the tensors are quantised to.
        progress: Told of each sample.

    Returns:
        Name -> amax, a float32 written with as few digits as tell it apart. 0 for a tensor that was
        zero throughout. A tensor that was empty in every run is not there: nothing is known of it.

    Raises:
        InputError: ``not-finite``: a tensor holds NaN or an infinity for one of the samples.
    """
    progress = progress or Silent()
    seen = {name: Magnitudes(counted=method != "minmax") for name in sorted(wanted)}
    for number, sample in enumerate(samples):
        progress.part("calibration", f"running {sample.name}", number / len(samples))

        def see(name: str, array: Array, sample: Sample = sample) -> None:
            try:
                seen[name].add(array)
            except NotFinite as error:
                raise _not_finite(name, sample, error) from error

        run(sample.load(), seen.keys(), see)
    progress.part("calibration", f"{len(samples)} samples", 1.0)
    return {
        name: range_of(magnitudes, method, percentile, precision=precision)
        for name, magnitudes in seen.items()
        if magnitudes.size
    }


def _not_finite(name: str, sample: Sample, error: NotFinite) -> InputError:
    return InputError(
        Diagnostic(
            "not-finite",
            f"the tensor `{name}` holds {error} when the model runs on `{sample.name}`, so its "
            "range cannot be taken",
            "see whether that file is what the model expects, and leave it out if not; a tensor "
            "that is meant to hold it is kept out with `precision.layers`",
        )
    )


def range_of(
    magnitudes: Magnitudes,
    method: Method,
    percentile: float = 99.99,
    *,
    precision: EightBits = "int8",
) -> float:
    """Return the amax that ``method`` finds for values of these magnitudes."""
    if magnitudes.largest < np.finfo(np.float32).tiny:
        method = "minmax"  # below it the bins are not as narrow as the values are small
    match method:
        case "minmax":
            found = magnitudes.largest
        case "percentile":
            found = magnitudes.percentile(percentile) or magnitudes.largest
        case "entropy":
            found = _least_divergence(magnitudes, LEVELS[precision])
        case "mse":
            found = _least_error(magnitudes, LEVELS[precision])
    return float(str(np.float32(found)))


def _least_divergence(magnitudes: Magnitudes, levels: Floats) -> float:
    """Return the threshold of the least Kullback-Leibler divergence, the largest of several."""
    counts, width = _equal_bins(magnitudes)
    bins = counts.shape[1]
    if bins <= _FIRST_THRESHOLD:
        return magnitudes.largest
    thresholds = np.arange(bins, _FIRST_THRESHOLD - 1, -1)
    best = int(thresholds[np.argmin(_divergences(counts, thresholds, levels))])
    return magnitudes.largest if best == bins else best * width


def _equal_bins(magnitudes: Magnitudes) -> tuple[Floats, float]:
    """Return how many values but zeros fall into bins of one width from 0 on, and the width.

    A row for each sign. The bins are as wide as that of the largest magnitude; narrower ones fit
    into them exactly.
    """
    low, counts = magnitudes.sides()
    width = 2.0 ** math.floor(math.log2(low[-1])) / RESOLUTION
    places = (low / width).astype(np.int64)
    return np.stack([np.bincount(places, weights=side) for side in counts]), width


def _divergences(counts: Floats, thresholds: npt.NDArray[np.int64], levels: Floats) -> Floats:
    """Return for each threshold the divergence of the quantised values from the values.

    Args:
        counts: How many values fall into each bin, a row for each sign.
        thresholds: In bins, at least 1 and at most as many as there are.
        levels: As `LEVELS`.

    Source:
        S. Migacz, "8-bit Inference with TensorRT", 2017.
    """
    # All sums over bins are differences of sums from the first bin on.
    sums, filled, own = _sums(counts), _sums(counts > 0), _sums(_times_log(counts))
    inside = sums[:, thresholds]
    clipped = sums[:, -1:] - inside
    last = counts[:, thresholds - 1]
    middles = (levels[1:] + levels[:-1]) / 2
    starts = np.ceil(thresholds[:, None] * middles - 0.5).astype(np.int64)
    edges = np.hstack([np.zeros_like(starts[:, :1]), starts, thresholds[:, None]])

    # Sign, threshold, level -> how many values: quantised, in how many bins, and as they were.
    quantised = np.diff(sums[:, edges], axis=2)
    spread = np.diff(filled[:, edges], axis=2)
    values = quantised.copy()
    values[:, :, -1] += clipped
    spread[:, :, -1] += (last == 0) & (clipped > 0)
    for each in (quantised, spread, values):  # both signs have one level of zero
        each[0, :, 0] += each[1, :, 0]
        each[1, :, 0] = 0
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(values > 0, values * np.log(quantised / spread), 0.0).sum(axis=(0, 2))
    entropy = (own[:, thresholds - 1] + _times_log(last + clipped)).sum(axis=0)
    total, kept = counts.sum(), inside.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (entropy - logs) / total - np.log(total) + np.log(kept)
    return np.where(np.isfinite(found), found, np.inf)


def _times_log(counts: Floats) -> Floats:
    """Return n * log(n), which is 0 for 0."""
    found: Floats = counts * np.log(np.maximum(counts, 1))
    return found


def _sums(values: Array) -> Floats:
    """Return the sums of the first 0, 1, 2, ... of ``values`` along the last axis."""
    found: Floats = np.cumsum(values, axis=-1, dtype=np.float64)
    return np.insert(found, 0, 0.0, axis=-1)


def _least_error(magnitudes: Magnitudes, levels: Floats) -> float:
    """Return the threshold of the least squared error, the largest of several."""
    low, high, counts = magnitudes.bins()
    middle = (low + high) / 2
    sums = [_sums(counts * middle**power) for power in (0, 1, 2)]
    bounds = (levels[1:] + levels[:-1]) / 2

    def best_of(thresholds: Floats) -> float:
        """Return the best of ``thresholds``, which descend."""
        inner = np.searchsorted(middle, thresholds[:, None] * bounds)
        edges = np.pad(inner, ((0, 0), (1, 1)), constant_values=((0, 0), (0, len(middle))))
        many, once, squared = (np.diff(each[edges], axis=1) for each in sums)
        level = thresholds[:, None] * levels
        errors = (squared - 2 * level * once + level**2 * many).sum(axis=1)
        return float(thresholds[np.argmax(errors <= errors.min() + _ROUNDING * sums[2][-1])])

    largest = magnitudes.largest
    steps = np.arange(_OCTAVES * _PER_OCTAVE)
    near = best_of(largest * 2.0 ** (-steps / _PER_OCTAVE))
    around = near * 2.0 ** (-np.arange(-_FINER, _FINER + 1) / (_PER_OCTAVE * _FINER))
    return best_of(around[around <= largest])
