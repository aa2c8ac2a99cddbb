"""The command that explains, with the real parser: its text, its JSON and its picture."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import onnx
import pytest
from command import cli

from optc.optimizer.compile import compile_package
from optc.passes import registry
from optc.specs.check import check

MODEL = """
<ir_version: 9, opset_import: ["" : 17]>
g (float[batch,4,3,3] x) => (float[batch,4,3,3] y)
<float[4,4,1,1] w = {1,2,3,4,5,6,7,8,1,2,3,4,5,6,7,8}, int64[2] axes = {2, 3}>
{
    [first]  a = Conv (x, w)
    [det]    d = Det (a)
    [shape]  n = Unsqueeze (d, axes)
    [scale]  t = Mul (a, n)
    [last]   y = Conv (t, w)
}"""

SPEC = """
version: 1
model: m.onnx
dims: {batch: {min: 1, opt: 2, max: 4}}
targets: [{name: ampere, compute_capability: 8.6}]
partition: {cost: {keep_share: 1.0e-9}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder, with a model in which Det stands between two engines."""
    onnx.save(onnx.parser.parse_model(MODEL), tmp_path / "m.onnx")
    (tmp_path / "cut.yaml").write_text(f"{SPEC}passes: {{legalise: false}}\n")
    (tmp_path / "whole.yaml").write_text(SPEC)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_plan_is_followed_by_what_explains_it(folder: Path) -> None:
    done = cli("plan", "cut.yaml", "--explain", "--picture", "cut.svg")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ampere (tensorrt-rtx, compute capability 8.6): 2 engines")
    flat = " ".join(done.stdout.split())
    assert "cut 1, between engine 0 and engine 2: fallback stage 1 refused Det: det" in flat
    assert "1 Det det 2 → 1 1 → 0" in flat
    assert "take `legalise: false` out of `passes`: `decompose-det` rewrites it" in flat
    assert ET.parse(folder / "cut.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_the_explanation_is_a_key_of_the_json(folder: Path) -> None:
    document = json.loads(cli("plan", "cut.yaml", "--quick", "--explain", "--json").stdout)
    [explained] = document["explanation"]
    assert explained["targets"] == ["ampere"]
    [cut] = explained["cuts"]
    assert [each["node"] for each in cut["refused"]] == ["det"]
    [item] = explained["work"]
    assert item["saves"]["engines"] == 1
    assert item["then"]["bytes"] == 0
    crossing = document["targets"][0]["crossings"]
    assert sum(each["bytes"] * each["boundaries"] for each in crossing) == explained["now"]["bytes"]


def test_where_all_is_one_engine_nothing_is_cut(folder: Path) -> None:
    done = cli("plan", "whole.yaml", "--quick", "--explain")
    assert "ampere: nothing is cut\n" in done.stdout


@pytest.mark.parametrize("name", ["cut.yaml", "cut.png", "cut", "/dev/stdout"])
def test_a_picture_replaces_no_file_of_another_kind(folder: Path, name: str) -> None:
    before = (folder / "cut.yaml").read_bytes()
    done = cli("plan", "cut.yaml", "--picture", name)
    assert (done.returncode, done.stdout) == (2, "")
    assert "the name has to end in `.svg`" in done.stderr
    assert (folder / "cut.yaml").read_bytes() == before


def test_a_picture_that_cannot_be_written_is_an_error(folder: Path) -> None:
    done = cli("plan", "whole.yaml", "--quick", "--picture", "nowhere/cut.svg")
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no folder `nowhere`" in done.stderr
    (folder / "cut.svg").mkdir()
    done = cli("plan", "whole.yaml", "--quick", "--picture", "cut.svg")
    assert done.returncode == 1
    assert "error[cannot-write]: `cut.svg` cannot be written" in done.stderr


def test_a_package_holds_the_picture_of_its_stages(folder: Path) -> None:
    checked = check("cut.yaml", known_passes=registry.names, options_of=registry.options_of)
    outcome = compile_package(checked, folder / "out")
    assert "stages.svg" in outcome.manifest.files
    picture = (folder / "out" / "stages.svg").read_text(encoding="utf-8")
    assert "refused: Det" in picture
    assert "ampere (8.6): 2 engines, 1 fallback stage" in picture
