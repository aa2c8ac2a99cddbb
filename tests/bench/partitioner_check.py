"""Holds our version of peers' partitioners against what there is of the originals.

Each check returns how many of some random graphs differ, or None where the original is not installed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from partitioner import (
    Dag,
    Engines,
    depth_order,
    index_order,
    merged_along_edges,
    merged_backwards,
    runs,
    waves,
)

OPSET = 18
SMALL = (5, 12, 40, 120)


def any_dag(seed: int) -> Dag:
    """Return a random graph of few or some nodes; each reads from two others at most."""
    random = np.random.default_rng(seed)
    nodes = int(random.choice(SMALL))
    window = int(random.choice([3, 8, 30, nodes]))
    share = float(random.choice([0.06, 0.2, 0.5]))
    reads = []
    for node in range(nodes):
        near = range(max(0, node - window), node)
        count = min(int(random.choice([0, 1, 1, 1, 2, 2, 2])), len(near))
        reads.append(sorted(random.choice(near, count, replace=False).tolist() if count else []))
    on = (random.random(nodes) >= share).tolist()
    return Dag(reads, [[node] for node in range(nodes)], [4] * nodes, on, ["Sum"] * nodes)


def model_of(dag: Dag) -> onnx.ModelProto:
    """Return ``dag`` as a model of whole numbers; what is off are operators that TensorRT refuses."""
    nodes = []
    for node, tensors in enumerate(dag.reads):
        inputs = [f"t{tensor}" for tensor in tensors] or ["x"]
        refused = ("BitwiseNot", "BitwiseAnd")[len(inputs) - 1]
        op = "Max" if dag.on[node] else refused
        outputs = [f"t{tensor}" for tensor in dag.makes[node]]
        nodes.append(helper.make_node(op, inputs, outputs, f"n{node}"))
    ends = [f"t{dag.makes[node][0]}" for node in range(len(dag)) if not dag.after[node]]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.INT32, [1])],
        [helper.make_tensor_value_info(name, TensorProto.INT32, [1]) for name in ends],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)


def number_of(node: Any) -> int:
    """Return the number of a node of such a model."""
    return int(node.name.removeprefix("n"))


def sorted_groups(groups: Any) -> Engines:
    """Return groups of nodes in an order of their own."""
    return sorted(sorted(group) for group in groups)


# --- the originals -------------------------------------------------------------------------------


def torch_differs(count: int, *, along_edges: bool) -> int | None:
    """Compare with torch.fx's partitioner."""
    try:
        import torch
    except ImportError:
        return None
    from torch import fx
    from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
    from torch.fx.passes.operator_support import OperatorSupportBase

    def operator(*values: Any) -> Any:
        return values

    def original(dag: Dag) -> Engines:
        graph = fx.Graph()
        entry = graph.placeholder("x")
        nodes: list[fx.Node] = []
        for makers in dag.before:
            nodes.append(graph.call_function(operator, tuple(nodes[m] for m in makers) or (entry,)))
        graph.output(tuple(nodes[node] for node in range(len(dag)) if not dag.after[node]))
        number = {node: index for index, node in enumerate(nodes)}

        class Support(OperatorSupportBase):  # type: ignore[misc]
            def is_node_supported(self, _: Any, node: fx.Node) -> bool:
                return node in number and dag.on[number[node]]

        found = CapabilityBasedPartitioner(
            fx.GraphModule(torch.nn.Module(), graph),
            Support(),
            allows_single_node_partition=True,
            skip_horizontal_fusion=along_edges,
        ).propose_partitions()
        return sorted_groups([number[node] for node in part.nodes] for part in found)

    rule = merged_along_edges if along_edges else merged_backwards
    dags = map(any_dag, range(count))
    return sum(original(dag) != sorted_groups(rule(dag)) for dag in dags)


def waves_differ(count: int) -> int | None:
    """Compare with the version in Python that ONNX Runtime has of its helper for providers."""
    from onnxruntime.tools.mobile_helpers.usability_checker import check_partitioning

    def original(dag: Dag) -> Engines:
        support = SimpleNamespace(is_op_supported=lambda node: dag.on[number_of(node)])
        found = check_partitioning(model_of(dag).graph, support, require_fixed_input_sizes=False)
        return sorted_groups([number_of(node) for node in part] for part in found.supported_groups)

    dags = map(any_dag, range(count))
    return sum(original(dag) != sorted_groups(waves(dag)) for dag in dags)


def order_differs(count: int, order: str, rule: Callable[[Dag], list[int]]) -> int | None:
    """Compare with the order in which ONNX Runtime runs the nodes of a model, listed in any order."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = getattr(ort.ExecutionOrder, order)
    options.enable_profiling = True
    options.log_severity_level = 4

    def original(dag: Dag, folder: str) -> list[int]:
        options.profile_file_prefix = str(Path(folder, "profile"))
        data = model_of(dag).SerializeToString()
        session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        session.run(None, {"x": np.ones(1, np.int32)})
        events = json.loads(Path(session.end_profiling()).read_text())
        names = [event["name"] for event in events if event["name"].endswith("_kernel_time")]
        return [int(name.removeprefix("n").removesuffix("_kernel_time")) for name in names]

    with tempfile.TemporaryDirectory() as folder:
        dags = [any_dag(seed).listed_anyhow(seed) for seed in range(count)]
        return sum(original(dag, folder) != rule(dag) for dag in dags)


def runs_differ(count: int) -> int | None:
    """Compare with the groups that TensorRT's parser makes of a model with refused nodes."""
    try:
        import tensorrt_rtx as trt
    except ImportError:
        return None

    class Log(trt.ILogger):  # type: ignore[misc]
        """Swallows what it is told."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            """Do nothing."""

    log = Log()
    builder = trt.Builder(log)

    def original(dag: Dag) -> Engines:
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, log)
        parser.supports_model_v2(model_of(dag).SerializeToString())
        return sorted_groups(parser.get_subgraph_nodes(n) for n in range(parser.num_subgraphs))

    dags = map(any_dag, range(count))
    return sum(original(dag) != sorted_groups(runs(dag, range(len(dag)))) for dag in dags)


CHECKS: dict[str, Callable[[int], int | None]] = {
    "torch.fx: partitions": lambda count: torch_differs(count, along_edges=False),
    "torch.fx, along edges: partitions": lambda count: torch_differs(count, along_edges=True),
    "ONNX Runtime, other providers: partitions": waves_differ,
    "ONNX Runtime: order by depth": lambda count: order_differs(count, "DEFAULT", depth_order),
    "ONNX Runtime: order by index": lambda count: order_differs(
        count, "PRIORITY_BASED", index_order
    ),
    "TensorRT's parser: groups of supported nodes": runs_differ,
}


def validate(count: int) -> int:
    """Run every check on ``count`` graphs; return 1 where anything differs."""
    wrong = False
    for name, check in CHECKS.items():
        differing = check(count)
        text = "not installed" if differing is None else f"{differing} of {count} graphs differ"
        print(f"{name:46} {text}", flush=True)
        wrong |= bool(differing)
    return int(wrong)
