from __future__ import annotations

import pytest

from optc.optimizer.backend import BACKENDS, available, backend_of, gpus, is_installed, require
from optc.specs.diagnostic import EnvironmentFault, InputError

TENSORRT = is_installed(BACKENDS["tensorrt"])


def test_an_unknown_backend_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(InputError) as caught:
        backend_of("tensorrt_rtx")
    [diagnostic] = caught.value.diagnostics
    assert diagnostic.code == "unknown-backend"
    assert diagnostic.todo == "write `tensorrt-rtx`"


@pytest.mark.skipif(TENSORRT, reason="TensorRT is installed")
def test_a_backend_that_is_not_installed_says_which_extra_brings_it() -> None:
    # Where its type stubs are installed there is a folder `tensorrt` without code: no backend.
    with pytest.raises(EnvironmentFault) as caught:
        require("tensorrt")
    [diagnostic] = caught.value.diagnostics
    assert diagnostic.code == "missing-backend"
    assert diagnostic.todo == "pip install 'optc[tensorrt]'"
    assert available("tensorrt").reason == diagnostic.problem


@pytest.mark.skipif(bool(gpus()), reason="there is a GPU")
def test_a_backend_that_needs_a_gpu_is_refused_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optc.optimizer.backend.is_installed", lambda backend: True)
    with pytest.raises(EnvironmentFault) as caught:
        require("tensorrt")
    assert caught.value.diagnostics[0].code == "no-gpu"


def test_tensorrt_for_rtx_is_loaded_and_tells_its_version() -> None:
    info = available("tensorrt-rtx")
    assert info.reason is None
    assert info.version is not None
    assert info.version.split(".")[0].isdigit()


@pytest.mark.gpu
def test_the_driver_names_the_gpu() -> None:
    assert all(gpu.name and gpu.compute_capability for gpu in gpus())
    assert gpus()
