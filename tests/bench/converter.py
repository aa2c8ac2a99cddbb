"""The converters to fp16 that the benchmark compares, each called the way its users call it.

    python tests/bench/converter.py TOOL JOB.json

does one conversion and nothing else, as what it imports is timed too (`converted`): a job says
what to convert, and gets its answer written under ``answer``. An entry of `CONVERTERS` imports its
tool and returns what converts. Inputs and outputs of the model keep their types.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

OURS = "optc"
CAPABILITY = "8.9"
LOW: Final = "fp16"

ASIDE = ("building engines", "running the package", "verifying")
"""How steps of ``optc compile`` begin that no other converter does."""

WARM_UP = """
<ir_version: 8, opset_import: ["" : 17]>
warm_up (float[4, 3] x) => (float[4, 2] y) <float[3, 2] w = {1, 2, 3, 4, 5, 6}, float two = {2}> {
    t = MatMul (x, w)
    y = Mul (t, two)
}"""
"""A model with a little for each of the tools to do: some import what they need only then."""

Job = dict[str, Any]
"""What to convert: ``model``, its file; ``data``, npz files of input to look at; ``target``, an
empty folder for the result; ``dims``, symbol -> its least, usual and largest extent; ``precision``
and ``verify``, what our spec says of them beyond `LOW` and the data. Paths are absolute."""

Answer = dict[str, Any]
"""What came of it: ``parts``, the models, in the order they run; ``engines``, of each whether it is
for TensorRT; anything else that is worth telling."""

Converter = Callable[[Job], Answer]


def by_optc() -> Converter:
    """Return ours: ``optc compile``, whose stages are the parts."""
    from optc.optimizer.compile import compile_package
    from optc.optimizer.progress import Silent
    from optc.passes import registry
    from optc.specs.check import check

    class Steps(Silent):
        """How long each step took."""

        def __init__(self) -> None:
            self.begun: list[tuple[str, float]] = []

        def step(self, text: str) -> None:
            self.begun.append((text, time.perf_counter()))

        def seconds(self) -> dict[str, float]:
            ends = [start for _, start in self.begun[1:]] + [time.perf_counter()]
            found: dict[str, float] = {}
            for (text, start), end in zip(self.begun, ends, strict=True):
                found[text] = found.get(text, 0.0) + end - start
            return found

    def run(job: Job) -> Answer:
        target = Path(job["target"])
        spec = {
            "version": 1,
            "model": str(Path(job["model"]).resolve()),
            "targets": [{"name": "rtx", "compute_capability": CAPABILITY}],
            "precision": job.get("precision", LOW),
            "verify": {"data": job["data"]} | job.get("verify", {}),
        }
        if job["dims"]:
            spec["dims"] = {
                name: {"min": low, "opt": opt, "max": high}
                for name, (low, opt, high) in job["dims"].items()
            }
        path = target / "spec.json"
        path.write_text(json.dumps(spec))
        steps = Steps()
        checked = check(path, known_passes=registry.names, options_of=registry.options_of)
        outcome = compile_package(checked, target / "package", progress=steps)
        manifest = outcome.manifest
        stages = {stage.id: stage for stage in manifest.stages}
        order = [stages[id_] for id_ in manifest.targets[0].stages]
        return {
            "parts": [str(target / "package" / stage.model) for stage in order],
            "engines": [stage.runtime == "tensorrt" for stage in order],
            "steps": steps.seconds(),
            "unmet": [str(each.problem) for each in outcome.unmet],
        }

    return run


def by_autocast() -> Converter:
    """Return ModelOpt's AutoCast, which looks at the data, too: at all that is in one folder."""
    import os

    import onnx
    from modelopt.onnx.autocast import convert_to_mixed_precision

    def run(job: Job) -> Answer:
        with tempfile.TemporaryDirectory() as folder:
            for index, path in enumerate(job["data"]):
                os.symlink(path, Path(folder, f"{index}.npz"))
            model = convert_to_mixed_precision(
                job["model"],
                low_precision_type=LOW,
                keep_io_types=True,
                calibration_data=folder,
            )
        return written(onnx.save, model, job)

    return run


def by_onnxconverter_common() -> Converter:
    """Return onnxconverter-common's, which lowers all but what it knows to be refused."""
    import onnx
    from onnxconverter_common import float16

    def run(job: Job) -> Answer:
        model = float16.convert_float_to_float16(onnx.load(job["model"]), keep_io_types=True)
        return written(onnx.save, model, job)

    return run


def by_onnxruntime() -> Converter:
    """Return ONNX Runtime's, which lowers all but what it knows to be refused."""
    import onnx
    from onnxruntime.transformers import float16

    def run(job: Job) -> Answer:
        model = float16.convert_float_to_float16(onnx.load(job["model"]), keep_io_types=True)
        return written(onnx.save, model, job)

    return run


def written(save: Callable[[Any, str], object], model: Any, job: Job) -> Answer:
    """Save the one model that a tool made."""
    path = str(Path(job["target"], "model.onnx"))
    save(model, path)
    return {"parts": [path], "engines": [True]}


CONVERTERS: dict[str, Callable[[], Converter]] = {
    OURS: by_optc,
    "autocast": by_autocast,
    "onnxconverter-common": by_onnxconverter_common,
    "onnxruntime": by_onnxruntime,
}


def ready(converter: Converter, precision: Any) -> Converter:
    """Return a converter, used once."""
    import numpy as np
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        model, target = Path(folder, "model.onnx"), Path(folder, "target")
        onnx.save(onnx.parser.parse_model(WARM_UP), model)
        data = []
        for index in range(2):  # to calibrate on and to search on
            data.append(str(Path(folder, f"in{index}.npz")))
            np.savez(data[index], x=np.full((4, 3), index + 1, np.float32))
        target.mkdir()
        if isinstance(precision, dict) and "calibration" in precision:
            calibration = precision["calibration"] | {"data": data[1:]}
            precision = precision | {"calibration": calibration}
        job = {"model": str(model), "data": data[:1], "target": str(target), "dims": {}}
        converter(job | {"precision": precision, "calibration": data[1:]})
    return converter


def converted(script: str, tool: str, job: Job, path: Path, limit_seconds: float) -> Answer:
    """Run ``tool`` of ``script`` on a job, written to ``path``, and return its answer.

    Beside what the tool answers it has ``seconds``, without those of `ASIDE`, and ``whole``: the
    same with the start of the process and the imports. Under ``failure`` it says why it has
    nothing.
    """
    path.write_text(json.dumps(job | {"started": time.time()}))
    command = [sys.executable, str(Path(__file__).with_name(script)), tool, str(path)]
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=limit_seconds, cwd=path.parent, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failure": f"no end in {limit_seconds:g} s"}
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        return {"failure": f"exit {done.returncode}: {said[-1][:300] if said else ''}"}
    answer: Answer = json.loads(path.read_text())["answer"]
    steps: dict[str, float] = answer.get("steps", {})
    answer["seconds"] -= sum(took for step, took in steps.items() if step.startswith(ASIDE))
    answer["whole"] = answer["seconds"] + answer["imports"]
    return answer


def convert(tools: Mapping[str, Callable[[], Converter]]) -> int:
    """Do the conversion that the command line names."""
    tool, path = sys.argv[1:]
    job = json.loads(Path(path).read_text())
    converter = tools[tool]()
    imports = time.time() - job["started"]
    converter = ready(converter, job.get("precision", LOW))
    start = time.perf_counter()
    answer = converter(job)
    answer |= {"seconds": time.perf_counter() - start, "imports": imports}
    Path(path).write_text(json.dumps(job | {"answer": answer}))
    return 0


if __name__ == "__main__":
    sys.exit(convert(CONVERTERS))
