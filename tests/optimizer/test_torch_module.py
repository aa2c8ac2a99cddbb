from __future__ import annotations

import importlib
import importlib.util
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from modules import scripted
from onnx import helper, numpy_helper

from optc.optimizer import torch_module
from optc.optimizer.torch_module import (
    Expected,
    ModuleNode,
    ModuleRejected,
    TorchModule,
    kind_of,
    require_torch,
)
from optc.specs.diagnostic import EnvironmentFault

HAS_TORCH = importlib.util.find_spec("torch") is not None

SOURCE = """
def forward(self, x, scale: float = 1.0, twice: bool = False, shift: int = 0):
    y = x * scale + shift
    if twice:
        y = y + y
    return y, x.sum(-1)
"""


@pytest.fixture
def torch() -> Any:
    return require_torch()


@pytest.fixture
def module(tmp_path: Path) -> Callable[[str], TorchModule]:
    return lambda source: TorchModule(scripted(tmp_path / "module.pt", source))


def node_of(inputs: int = 1, outputs: int = 2, **attributes: Any) -> Any:
    return helper.make_node(
        "Op",
        [f"x{i}" for i in range(inputs)],
        [f"y{i}" for i in range(outputs)],
        domain="acme",
        **attributes,
    )


# --- what a file is, told without torch ----------------------------------------------------------


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(b"weights")
    with pytest.raises(ModuleRejected, match="it is no archive, or cut short"):
        kind_of(tmp_path / "m.pt")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModuleRejected, match=r"cannot be read: No such file"):
        kind_of(tmp_path / "m.pt")


def test_a_pickle_of_weights_is_told_from_a_program(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("m/data.pkl", b"")
    with pytest.raises(ModuleRejected, match=r"a pickle, as `torch.save` writes it,"):
        kind_of(tmp_path / "m.pt")


def test_without_torch_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    monkeypatch.setattr(torch_module, "torch_version", lambda: None)
    with pytest.raises(EnvironmentFault) as caught:
        require_torch()
    (problem,) = caught.value.diagnostics
    assert problem.code == "missing-extra"
    assert problem.todo == "pip install 'optc[torch]'"


def test_a_torch_that_does_not_load_is_told_from_one_that_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(name: str) -> Any:
        raise OSError("libtorch_cpu.so: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    monkeypatch.setattr(torch_module, "torch_version", lambda: "2.6.0")
    with pytest.raises(EnvironmentFault) as caught:
        require_torch()
    assert "torch 2.6.0 is installed and does not load: libtorch" in str(caught.value)


def test_a_result_is_held_against_type_rank_and_fixed_extents() -> None:
    wanted = Expected(np.dtype(np.float32), (None, 4))
    assert wanted.why_not(np.zeros((3, 4), np.float32)) is None
    assert wanted.why_not(np.zeros((0, 4), np.float32)) is None
    assert wanted.why_not(np.zeros((3, 4))) == "float64, and has to be float32"
    assert wanted.why_not(np.zeros((3, 5), np.float32)) == "of shape [3, 5], and has to be [?, 4]"
    assert wanted.why_not(np.zeros(4, np.float32)) == "of shape [4], and has to be [?, 4]"
    assert Expected(None, None).why_not(np.zeros(4, np.int8)) is None


# --- TorchScript ---------------------------------------------------------------------------------


@pytest.mark.torch
def test_torchscript_runs_on_arrays(module: Callable[[str], TorchModule]) -> None:
    loaded = module(SOURCE)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    first, second = loaded.run([x], {"scale": 2.0, "twice": 1, "shift": 1})
    np.testing.assert_array_equal(first, 4 * x + 2)
    np.testing.assert_array_equal(second, x.sum(-1))
    assert loaded.kind == "TorchScript"
    assert loaded.device == "cpu"
    assert loaded.engine.startswith("torch ")


DTYPES = [
    *("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"),
    *("bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64"),
]


@pytest.mark.torch
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3), (), (0, 4), (1,)])
def test_values_of_each_type_come_back_as_they_went(
    module: Callable[[str], TorchModule], name: str, shape: tuple[int, ...]
) -> None:
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    x = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    (y,) = module("def forward(self, x):\n    return x\n").run([x])
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, x)
    assert y.shape == shape


@pytest.mark.torch
def test_a_module_that_writes_into_its_argument_does_not_touch_the_callers(
    module: Callable[[str], TorchModule],
) -> None:
    x = np.ones(3, np.float32)
    x.flags.writeable = False
    (y,) = module("def forward(self, x):\n    return x.mul_(2)\n").run([x])
    np.testing.assert_array_equal(x, 1)
    np.testing.assert_array_equal(y, 2)


@pytest.mark.torch
def test_what_a_module_keeps_is_not_given_away(tmp_path: Path, torch: Any) -> None:
    class Counter(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(2))

        def forward(self, x: Any) -> Any:
            self.total += x
            return self.total

    traced = torch.jit.trace(Counter(), (torch.zeros(2),))
    traced.save(str(tmp_path / "m.pt"))
    loaded = TorchModule(tmp_path / "m.pt")
    one = np.ones(2, np.float32)
    (first,) = loaded.run([one])
    before = first.copy()
    loaded.run([one])
    np.testing.assert_array_equal(first, before)


@pytest.mark.torch
def test_strided_results_come_out_in_order(module: Callable[[str], TorchModule]) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    transposed, expanded = module(
        "def forward(self, x):\n    return x.t(), x[:1].expand(4, 3)\n"
    ).run([x[:, ::-1]])
    np.testing.assert_array_equal(transposed, x[:, ::-1].T)
    np.testing.assert_array_equal(expanded, np.repeat(x[:1, ::-1], 4, 0))
    assert transposed.flags.c_contiguous


@pytest.mark.torch
def test_an_omitted_input_is_none(module: Callable[[str], TorchModule]) -> None:
    loaded = module(
        "def forward(self, x, y: Optional[Tensor], z):\n"
        "    return x + z if y is None else x + y + z\n"
    )
    one = np.ones(2, np.float32)
    node = helper.make_node("Op", ["x", "", "z"], ["o"], domain="acme")
    found = ModuleNode(node, loaded, {"z": one}).run({"x": one})
    np.testing.assert_array_equal(found["o"], 2)
    assert loaded.problems(node) == []


@pytest.mark.torch
def test_an_exception_inside_is_told_in_its_words(module: Callable[[str], TorchModule]) -> None:
    loaded = module("def forward(self, x, y):\n    return x @ y\n")
    with pytest.raises(ModuleRejected, match=r"`module.pt` fails: .*2x3 and 2x3"):
        loaded.run([np.zeros((2, 3), np.float32)] * 2)
    loaded = module('def forward(self, x):\n    assert False, "never mind"\n    return x\n')
    with pytest.raises(ModuleRejected, match=r"`module.pt` fails: .*never mind"):
        loaded.run([np.zeros(1, np.float32)])


@pytest.mark.torch
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("1", r"result 0 of `module.pt` is an int, not a tensor"),
        ("(x, 'a')", r"result 1 of `module.pt` is a str, not a tensor"),
        ("{'a': x}", r"result 0 of `module.pt` is a dict, not a tensor"),
    ],
)
def test_a_result_that_is_no_tensor_is_an_error(
    module: Callable[[str], TorchModule], body: str, words: str
) -> None:
    loaded = module(f"def forward(self, x):\n    return {body}\n")
    with pytest.raises(ModuleRejected, match=words):
        loaded.run([np.zeros(1, np.float32)])


@pytest.mark.torch
def test_text_is_nothing_for_a_module(module: Callable[[str], TorchModule]) -> None:
    loaded = module("def forward(self, x):\n    return x\n")
    with pytest.raises(ModuleRejected, match="is given object, a type that torch does not have"):
        loaded.run([np.array(["a"], object)])


# --- against the node it runs --------------------------------------------------------------------


@pytest.mark.torch
def test_attributes_go_by_name_as_the_types_that_forward_takes(
    module: Callable[[str], TorchModule],
) -> None:
    loaded = module(
        "def forward(self, x, sizes: List[int], ratios: List[float], table, mode: str,"
        " exact: bool, alpha: float):\n"
        "    y = x * sizes[0] * ratios[0] * table.sum() * alpha\n"
        "    return -y if exact and mode == 'neg' else y\n"
    )
    node = node_of(
        outputs=1,
        sizes=[2, 3],
        ratios=[0.5],
        table=numpy_helper.from_array(np.array([1, 2], np.float32)),
        mode="neg",
        exact=1,
        alpha=3,
    )
    assert loaded.problems(node) == []
    found = ModuleNode(node, loaded, {}).run({"x0": np.ones(2, np.float32)})
    np.testing.assert_array_equal(found["y0"], [-9, -9])


@pytest.mark.torch
@pytest.mark.parametrize(
    ("node", "words"),
    [
        (node_of(alpha=1.0), "has an attribute `alpha`, which its `forward` does not take"),
        (node_of(inputs=5), "the node gives it 5 tensors, its `forward` takes `x`"),
        (node_of(inputs=0), "needs `x`, and the node has neither a tensor nor an attribute"),
        (
            node_of(inputs=2, scale=1.0),
            "both a tensor and an attribute of the node are its `scale`",
        ),
    ],
)
def test_a_module_that_cannot_stand_for_a_node_is_told_beforehand(
    module: Callable[[str], TorchModule], node: Any, words: str
) -> None:
    (problem,) = module(SOURCE).problems(node)
    assert words in problem


@pytest.mark.torch
def test_the_number_and_the_types_of_results_are_held_against_the_node(
    module: Callable[[str], TorchModule],
) -> None:
    loaded = module(SOURCE)
    x = np.zeros((2, 3), np.float32)
    with pytest.raises(ModuleRejected, match=r"gives 2 tensors, and has to give 3: `y0`, `y1`"):
        ModuleNode(node_of(outputs=3), loaded, {}).run({"x0": x})
    node = ModuleNode(node_of(), loaded, {})
    expected = {"y1": Expected(np.dtype(np.int64), None)}
    with pytest.raises(
        ModuleRejected, match=r"result 1 of `module.pt`, `y1`, is float32, and has to be int64"
    ):
        node.run({"x0": x}, expected)


@pytest.mark.torch
def test_a_result_that_the_node_omits_is_dropped(module: Callable[[str], TorchModule]) -> None:
    node = helper.make_node("Op", ["x"], ["", "total"], domain="acme")
    found = ModuleNode(node, module(SOURCE), {}).run({"x": np.ones((2, 3), np.float32)})
    assert list(found) == ["total"]


# --- exported programs ---------------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path: Path, torch: Any) -> TorchModule:
    class Scaled(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((3,), 2.0))

        def forward(self, x: Any) -> Any:
            return x * self.weight, (x > 0).nonzero()

    program = torch.export.export(
        Scaled(), (torch.ones(2, 3),), dynamic_shapes={"x": {0: torch.export.Dim("n", max=8)}}
    )
    torch.export.save(program, str(tmp_path / "module.pt2"))
    return TorchModule(tmp_path / "module.pt2")


@pytest.mark.torch
def test_an_exported_program_runs_on_arrays(exported: TorchModule) -> None:
    assert exported.kind == "exported program"
    x = np.array([[1, 0, -1], [0, 0, 2], [0, 0, 0]], np.float32)
    scaled, places = exported.run([x])
    np.testing.assert_array_equal(scaled, 2 * x)
    np.testing.assert_array_equal(places, [[0, 0], [1, 2]])
    assert places.dtype == np.int64
    assert exported.run([np.zeros_like(x)])[1].shape == (0, 2)


@pytest.mark.torch
def test_an_exported_program_has_its_attributes_in_it(exported: TorchModule) -> None:
    node = node_of(alpha=1.0)
    assert exported.problems(node) == []
    assert exported.ignored(node) == ["alpha"]
    found = ModuleNode(node, exported, {}).run({"x0": np.ones((2, 3), np.float32)})
    np.testing.assert_array_equal(found["y0"], 2)


@pytest.mark.torch
def test_a_shape_that_a_program_was_not_exported_for_is_told_in_its_words(
    exported: TorchModule,
) -> None:
    with pytest.raises(ModuleRejected, match=r"`module.pt2` fails: .*8"):
        exported.run([np.ones((9, 3), np.float32)])


@pytest.mark.torch
def test_a_program_that_is_cut_short_is_refused(exported: TorchModule, tmp_path: Path) -> None:
    path = tmp_path / "module.pt2"
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "cut.pt2", "w") as cut:
        for name in archive.namelist():
            if not name.endswith("model.json"):
                cut.writestr(name, archive.read(name))
    with pytest.raises(ModuleRejected, match=r"torch does not load `.*cut.pt2`"):
        TorchModule(tmp_path / "cut.pt2")


@pytest.mark.gpu
@pytest.mark.torch
@pytest.mark.parametrize("kind", ["TorchScript", "exported program"])
def test_a_module_runs_on_the_gpu(tmp_path: Path, torch: Any, kind: str) -> None:
    x = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
    if kind == "TorchScript":
        path = scripted(tmp_path / "m.pt", SOURCE)
    else:

        class Made(torch.nn.Module):  # type: ignore[misc]
            def forward(self, x: Any) -> Any:
                return x + torch.ones(3), x.sum(-1)

        path = tmp_path / "m.pt2"
        torch.export.save(torch.export.export(Made(), (torch.ones(2, 3),)), str(path))
    on_cpu, on_gpu = TorchModule(path).run([x]), TorchModule(path, cuda=True).run([x])
    for a, b in zip(on_cpu, on_gpu, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
