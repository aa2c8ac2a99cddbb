from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from command import cli
from graphs import parsed

from optc.optimizer.model_file import load_graph, read_model
from optc.optimizer.progress import Silent
from optc.optimizer.prove import Proof, cases_for
from optc.passes.contract import Facts, Pass, Report
from optc.passes.pipeline import optimise
from optc.specs.diagnostic import ModelError, NotMetError

SOURCE = """
<ir_version: 9, opset_import: ["" : 17]>
g (float[n,4] x) => (float[n,4] y) <float[4] w = {0.1, 0.7, 1.3, 2.9}, float[4] v = {3.1, 0.2, 5.3, 1.9}>
{
    [first]  a = Mul (x, w)
    [second] b = Sigmoid (a)
    [third]  c = Add (b, v)
    [fourth] y = Tanh (c)
}"""


class Nudge(Pass):
    """Move one weight a little: too much for rounding, too little for a careless tolerance."""

    name = "nudge"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Do so once."""
        [node] = facts.nodes("Add")
        if node.inputs[1].name == "nudged":
            return Report()
        node.inputs[1] = gs.Constant("nudged", node.inputs[1].values + np.float32(1e-3))
        return Report(merged={node.name: (node.name,)})


class Rescale(Pass):
    """Do in two nodes what one did, equal up to rounding."""

    name = "rescale"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Do so once."""
        for node in facts.nodes("Mul"):
            if node.inputs[1].name == "w":
                half = gs.Constant("third", (node.inputs[1].values / 3).astype(np.float32))
                node.inputs[1] = half
                middle = gs.Variable("middle", np.float32)
                more = gs.Node("Mul", "more", {}, [middle, gs.Constant("three", np.float32([3]))])
                more.outputs.append(node.outputs[0])
                node.outputs.clear()
                node.outputs.append(middle)
                graph.nodes.append(more)
                return Report(merged={node.name: (node.name,), "more": (node.name,)})
        return Report()


def prove(model: Path, output: Path, folder: Path, *passes: Pass) -> Proof:
    graph = load_graph(read_model(model))
    proof = Proof(output, folder, cases_for(model, graph), Silent())
    proof.begin(graph)
    optimise(graph, passes, after=proof.step)
    return proof


def saved(folder: Path, source: str = SOURCE) -> Path:
    path = folder / "model.onnx"
    onnx.save(parsed(source), path)
    return path


def test_what_is_equal_up_to_rounding_is_proven_on_several_shapes(tmp_path: Path) -> None:
    proof = prove(saved(tmp_path), tmp_path / "out", tmp_path / "proof", Rescale())
    [(number, name, worst)] = proof.steps
    assert (number, name) == (1, "rescale")
    assert worst < 1e-6
    assert len({case.extents["n"] for case in proof.cases}) > 1


def test_the_pass_and_node_that_change_the_numbers_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotMetError) as caught:
        prove(saved(tmp_path), tmp_path / "out", tmp_path / "proof", Rescale(), Nudge())
    [diagnostic] = caught.value.diagnostics
    assert diagnostic.code == "not-proven"
    assert "step 2, `nudge`" in diagnostic.problem
    assert "first at the node `third` (made from `third`)" in diagnostic.problem
    kept = tmp_path / "out.not-proven"
    before = onnx.load(kept / "before.onnx")
    assert [node.name for node in before.graph.node] == [
        "first",
        "more",
        "second",
        "third",
        "fourth",
    ]
    assert set(np.load(kept / "inputs.npz")) == {"x"}
    assert f"optc optimize {shlex.quote(str(kept / 'before.onnx'))}" in str(diagnostic.todo)


def test_a_model_that_does_not_run_cannot_be_proven(tmp_path: Path) -> None:
    source = """
    <ir_version: 9, opset_import: ["" : 17]>
    g (float[n,4] x) => (float[m] y) <int64[2] s = {5, 7}> { [r] y = Reshape (x, s) }"""
    model = onnx.parser.parse_model(source)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ModelError) as caught:
        prove(tmp_path / "model.onnx", tmp_path / "out", tmp_path / "proof")
    assert caught.value.diagnostics[0].code == "cannot-prove"


def optimised(folder: Path, *options: str) -> dict[str, Any]:
    done = cli("optimize", saved(folder), "-o", folder / "out.onnx", "--json", *options)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_command_line_proves(tmp_path: Path) -> None:
    found = optimised(tmp_path, "--prove")
    assert len(found["proof"]["cases"]) > 1


def test_only_one_pass_runs_where_one_is_named_and_steps_can_be_bounded(tmp_path: Path) -> None:
    assert [p["name"] for p in optimised(tmp_path, "--only", "fold-shapes")["passes"]] == [
        "fold-shapes"
    ]
    source = SOURCE.replace(
        "[second] b = Sigmoid (a)", "[same] d = Identity (a) [second] b = Sigmoid (d)"
    )
    for steps, nodes in ((0, 5), (1, 4)):
        done = cli(
            "optimize", saved(tmp_path, source), "-o", tmp_path / "o", f"--stop-after={steps}"
        )
        assert done.returncode == 0, done.stderr
        assert len(onnx.load(tmp_path / "o").graph.node) == nodes


def test_the_graph_after_a_pass_is_printed_to_stderr(tmp_path: Path) -> None:
    source = SOURCE.replace(
        "[second] b = Sigmoid (a)", "[same] d = Identity (a) [second] b = Sigmoid (d)"
    )
    model = saved(tmp_path, source)
    done = cli("optimize", model, "-o", tmp_path / "o", "--print-after", "remove-identities")
    assert "step 1: after remove-identities" in done.stderr
    assert "Sigmoid" in done.stderr
    assert "Sigmoid" not in done.stdout


def test_one_pass_is_explained(tmp_path: Path) -> None:
    done = cli("passes", "fold-constants")
    assert done.returncode == 0
    assert "Why it holds" in done.stdout
    unknown = cli("passes", "fold-constant")
    assert unknown.returncode == 2
    assert "write `fold-constants`" in unknown.stderr
