"""Compile specs the way a user does, and hold each package to its contract and to the bare library.

    python tests/bench/compile_models.py SPEC... [--target NAME] [--work DIR]

For each spec, each step in a process of its own:

- bare: TensorRT for RTX alone parses and builds the unchanged model for one compute capability, with
  the spec's shapes; nothing else. Its time and memory are the yardstick.
- compile: ``optc compile --target NAME`` (one target), time and memory of the whole process tree.
- verify, run: exit codes of ``optc verify`` and ``optc run`` on made-up input.
- contract: every node of model.onnx in exactly one stage a target; each TensorRT stage's ONNX, parsed
  and built bare with the recorded profiles, gives an engine of the same I/O and about the same size.

Prints a line a spec, and what is wrong; exits 1 where anything is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

BARE = """
import json, sys
job = json.loads(sys.argv[1])
import tensorrt_rtx as trt
class Log(trt.ILogger):
    def log(self, severity, text):
        if severity <= trt.ILogger.ERROR: print(text, file=sys.stderr)
log = Log()
builder = trt.Builder(log)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, log)
if not parser.parse_from_file(job["model"]):
    sys.exit(3)
config = builder.create_builder_config()
config.clear_flag(trt.BuilderFlag.TF32)
if job["capability"]:
    config.num_compute_capabilities = 1
    config.set_compute_capability(
        getattr(trt.ComputeCapability, "SM" + job["capability"].replace(".", "")), 0)
for shapes in job["profiles"]:
    profile = builder.create_optimization_profile()
    for name, (low, opt, high) in shapes.items():
        profile.set_shape(name, low, opt, high)
    if shapes:
        config.add_optimization_profile(profile)
engine = builder.build_serialized_network(network, config)
if engine is None:
    sys.exit(4)
inputs = [network.get_input(i).name for i in range(network.num_inputs)]
outputs = [network.get_output(i).name for i in range(network.num_outputs)]
print(json.dumps({"bytes": engine.nbytes, "inputs": inputs, "outputs": outputs}))
"""


class Measured:
    """A command that was run: exit code, output, seconds, most memory of its process tree in MiB."""

    def __init__(self, command: list[str]) -> None:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.peak_mib = 0.0
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.05):
                self.peak_mib = max(self.peak_mib, memory_of(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        self.out, self.err = process.communicate()
        self.seconds = time.perf_counter() - start
        ended.set()
        watcher.join()
        self.code = process.returncode


def memory_of(root: int) -> float:
    """Return the proportional set size of a process and all below it, in MiB."""
    total, pending = 0, [root]
    while pending:
        pid = pending.pop()
        try:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
            for task in Path(f"/proc/{pid}/task").iterdir():
                pending += map(int, (task / "children").read_text().split())
        except (OSError, ValueError):
            continue  # it has ended meanwhile
    return total / 1024


def bare(model: Path, capability: str | None, profiles: list[dict[str, Any]]) -> Measured:
    """Parse and build ``model`` with the library alone."""
    job = {"model": str(model), "capability": capability, "profiles": profiles}
    return Measured([sys.executable, "-c", BARE, json.dumps(job)])


def dynamic_profiles(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the shapes of the package's own inputs in each optimisation profile."""
    found = []
    for profile in manifest["profiles"]:
        shapes = {}
        for tensor in manifest["inputs"]:
            if all(isinstance(axis, int) for axis in tensor["shape"]):
                continue
            shapes[tensor["name"]] = [
                [a if isinstance(a, int) else profile[a][end] for a in tensor["shape"]]
                for end in ("min", "opt", "max")
            ]
        found.append(shapes)
    return found


def contract_faults(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Return where a package is not as its contract says."""
    import onnx

    faults = []
    nodes = [n.name for n in onnx.load(folder / "model.onnx", load_external_data=False).graph.node]
    stages = {stage["id"]: stage for stage in manifest["stages"]}
    for target in manifest["targets"]:
        owned = Counter(name for id_ in target["stages"] for name in stages[id_]["nodes"])
        if owned != Counter(nodes):
            faults.append(f"{target['name']}: not every node is in exactly one stage")
        for id_ in target["stages"]:
            faults += stage_faults(folder, stages[id_], target)
    listed = set(manifest["files"]) | {"manifest.json"}
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    if listed != there:
        faults.append(f"files differ from the manifest: {sorted(listed ^ there)[:3]}")
    return faults


def stage_faults(folder: Path, stage: dict[str, Any], target: dict[str, Any]) -> list[str]:
    """Return where building a stage's ONNX bare gives another engine than the package's."""
    if stage["runtime"] != "tensorrt":
        return [] if stage["why"] else [f"stage {stage['id']} does not say why"]
    profiles = [
        {name: [s["min"], s["opt"], s["max"]] for name, s in profile.items()}
        for profile in stage["profiles"]
    ]
    built = bare(folder / stage["model"], target["compute_capability"], profiles)
    if built.code:
        return [f"stage {stage['id']} does not build bare: {built.err.strip()[-200:]}"]
    found = json.loads(built.out)
    faults = []
    if set(found["inputs"]) != set(stage["inputs"]) or found["outputs"] != stage["outputs"]:
        faults.append(f"stage {stage['id']}: I/O of the bare build differs")
    size = stage["engines"][target["name"]]["bytes"]
    if not 0.95 < found["bytes"] / size < 1.05:
        faults.append(f"stage {stage['id']}: {found['bytes']} bytes bare, {size} in the package")
    return faults


def write_inputs(manifest: dict[str, Any], path: Path) -> None:
    """Write made-up input at the best shapes of the first profile."""
    import numpy as np

    rng = np.random.default_rng(0)
    arrays = {}
    for tensor in manifest["inputs"]:
        profile = manifest["profiles"][0]
        shape = [a if isinstance(a, int) else profile[a]["opt"] for a in tensor["shape"]]
        low, high = tensor["range"] or (0, 1)
        if tensor["dtype"].startswith(("int", "uint", "bool")):
            array = rng.integers(int(low), int(high) + 1, shape)
        else:
            array = rng.uniform(low, high, shape)
        arrays[tensor["name"]] = array.astype(tensor["dtype"])
    np.savez(path, **arrays)


def examine(spec: Path, target: str | None, work: Path) -> tuple[str, list[str]]:
    """Return the line of a spec, and what is wrong."""
    optc = [sys.executable, "-m", "optc"]
    folder = work / spec.stem
    chosen = ["--target", target] if target else []
    compiled = Measured([*optc, "compile", str(spec), "-o", str(folder), *chosen])
    if compiled.code:
        return f"{spec.stem:<24} compile exits {compiled.code}", [compiled.err.strip()[-600:]]
    manifest = json.loads((folder / "manifest.json").read_text())
    one = manifest["targets"][0]
    original = spec.parent / manifest["model"]["path"]
    yardstick = bare(original, one["compute_capability"], dynamic_profiles(manifest))
    faults = contract_faults(folder, manifest)
    verified = Measured([*optc, "verify", str(folder)])
    write_inputs(manifest, work / "in.npz")
    files = ["--inputs", str(work / "in.npz"), "--outputs", str(work / "out.npz")]
    ran = Measured([*optc, "run", str(folder), *files])
    if verified.code:
        faults.append(f"verify exits {verified.code}: {verified.err.strip()[-400:]}")
    if ran.code:
        faults.append(f"run exits {ran.code}: {ran.err.strip()[-400:]}")
    stages = {stage["id"]: stage for stage in manifest["stages"]}
    engines = [stages[i] for i in one["stages"] if stages[i]["runtime"] == "tensorrt"]
    share = sum(stage["flops_share"] for stage in engines)
    whole = yardstick.code == 0
    if whole and compiled.seconds > 1.5 * yardstick.seconds + 3:
        faults.append("slower than 1.5 x bare + 3 s")
    if whole and compiled.peak_mib > 1.5 * yardstick.peak_mib:
        faults.append("more memory than 1.5 x bare")
    bare_text = f"{yardstick.seconds:6.1f} s {yardstick.peak_mib:5.0f} MiB" if whole else "refused"
    line = (
        f"{spec.stem:<24} bare {bare_text:<18} optc {compiled.seconds:6.1f} s "
        f"{compiled.peak_mib:5.0f} MiB  {len(engines)} engines of {len(one['stages'])} stages "
        f"{share:8.3%}  verify {verified.seconds:.1f} s, run {ran.seconds:.1f} s"
    )
    return line, faults


def main() -> int:
    """Examine every spec; return 1 where anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("specs", nargs="+", type=Path)
    parser.add_argument("--target", help="only this target of each spec")
    parser.add_argument("--work", type=Path, help="where the packages go")
    given = parser.parse_args()
    # A cache of the oracle's answers would flatter the second run.
    with tempfile.TemporaryDirectory() as folder:
        os.environ["OPTC_CACHE_DIR"] = str(Path(folder) / "cache")
        work = given.work or Path(folder)
        wrong = 0
        for spec in given.specs:
            line, faults = examine(spec, given.target, work)
            print(line, flush=True)
            for fault in faults:
                print(f"    WRONG: {fault}", flush=True)
            wrong += bool(faults)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
