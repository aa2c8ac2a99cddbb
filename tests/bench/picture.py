"""Pictures for models that read pictures: seeded, with words, shapes and noise on them.

They are no photographs, but what comes out of a network on them is spread as on photographs: smooth
areas, edges, texture, and text that one which reads text finds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
LOWEST_LINE, HIGHEST_LINE = 10, 64
"""Pixels that a line of text is high."""

PAGE = 96
"""Pixels: what is less high is one line of text."""


def takes_pictures(shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether inputs of these shapes look as if they were pictures."""
    return all(len(shape) == 4 and shape[1] in (1, 3) for shape in shapes.values())


def drawn(seed: int, shape: Sequence[int]) -> Any:
    """Return pictures in [-1, 1], of shape [batch, channels, height, width]."""
    batch, channels, height, width = shape
    pictures = [picture(seed * batch + index, height, width) for index in range(batch)]
    array = np.stack(pictures).astype(np.float32) / 127.5 - 1
    return np.ascontiguousarray(np.moveaxis(array, -1, 1)[:, :channels])


def picture(seed: int, height: int, width: int) -> Any:
    """Return a picture as uint8, [height, width, 3]."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(_ground(rng, height, width))
    draw = ImageDraw.Draw(image)
    if height < PAGE:
        _line(rng, draw, (4, 0), int(height * rng.uniform(0.5, 0.8)), width)
    else:
        for _ in range(int(rng.integers(2, 7))):
            _shape(rng, draw, height, width)
        top = int(rng.integers(0, PAGE))
        while top < height:
            size = int(rng.integers(LOWEST_LINE, min(HIGHEST_LINE, height // 3)))
            _line(rng, draw, (int(rng.integers(0, width // 2)), top), size, width)
            top += int(size * rng.uniform(1.2, 3))
    noise = rng.normal(0, rng.uniform(0, 12), (height, width, 3))
    return np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)


def _ground(rng: np.random.Generator, height: int, width: int) -> Any:
    """Return colours that go smoothly into each other."""
    corners = rng.integers(0, 256, (4, 5, 3)).astype(np.uint8)
    pull = rng.uniform(0, 1)  # from one colour all over to many
    corners = (corners[:1, :1] + pull * (corners.astype(float) - corners[:1, :1])).astype(np.uint8)
    return np.asarray(Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC))


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(each) for each in rng.integers(0, 256, 3))
    return red, green, blue


def _line(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, at: tuple[int, int], size: int, width: int
) -> None:
    """Write a few words."""
    letters = max(2, min(40, 2 * (width - at[0]) // size))
    words = [rng.choice(list(LETTERS), int(rng.integers(2, 9))) for _ in range(letters // 3 + 1)]
    text = " ".join("".join(word) for word in words)[:letters]
    draw.text(at, text, _colour(rng), ImageFont.load_default(size))


def _shape(rng: np.random.Generator, draw: ImageDraw.ImageDraw, height: int, width: int) -> None:
    """Draw an ellipse or a rectangle."""
    left, right = np.sort(rng.integers(0, width, 2)).tolist()
    top, bottom = np.sort(rng.integers(0, height, 2)).tolist()
    draws = draw.ellipse if rng.random() < 0.5 else draw.rectangle
    draws((left, top, right, bottom), fill=_colour(rng))
