"""Write model.onnx, PP-OCRv4's text detector, and page.npz, a page with some text to try it on.

The model is taken out of a package of PyPI: pip brings the wheel alone, to a temporary folder, and
nothing is installed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

PACKAGE = "rapidocr-onnxruntime==1.4.4"
MEMBER = "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx"

HEIGHT, WIDTH = 320, 480
DOT = 4
"""Pixels of the page that a dot of a glyph is high and wide."""
LINES = ((40, 50), (150, 220), (240, 30))
"""Top and left of each line of text, in pixels."""
GLYPHS = {
    "E": ("11111", "10000", "10000", "11110", "10000", "10000", "11111"),
    "T": ("11111", "00100", "00100", "00100", "00100", "00100", "00100"),
    "X": ("10001", "10001", "01010", "00100", "01010", "10001", "10001"),
}


def fetched() -> bytes:
    """Return the model's bytes.

    Raises:
        subprocess.CalledProcessError: If pip cannot bring the package; ``stderr`` says why.
    """
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
        wheel_only = ["--no-deps", "--only-binary", ":all:", "--dest", folder]
        subprocess.run([*pip, *wheel_only, PACKAGE], check=True, capture_output=True, text=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(MEMBER)


def page() -> npt.NDArray[np.float32]:
    """Return a white page [1, 3, HEIGHT, WIDTH], from -1 to 1, with the word TEXT on each line."""
    rows = ["0".join(GLYPHS[letter][row] for letter in "TEXT") for row in range(7)]
    dots = np.array([[dot == "1" for dot in row] for row in rows])
    ink = dots.repeat(DOT, axis=0).repeat(DOT, axis=1)
    grey = np.ones((HEIGHT, WIDTH), np.float32)
    for top, left in LINES:
        grey[top : top + ink.shape[0], left : left + ink.shape[1]][ink] = -0.8
    return np.tile(grey, (1, 3, 1, 1))


if __name__ == "__main__":
    path = Path(__file__).with_name("model.onnx")
    try:
        content = fetched()
    except subprocess.CalledProcessError as error:
        sys.exit(
            f"{error.stderr.strip()}\n\npip could not bring {PACKAGE}, which holds the model.\n"
            "This example needs a network, or a package index that pip is set up for; the others\n"
            "make their models themselves."
        )
    path.write_bytes(content)
    np.savez(path.with_name("page.npz"), x=page())
    print(f"{path}: {len(content) / 1e6:.1f} MB, from {PACKAGE}; and page.npz")
