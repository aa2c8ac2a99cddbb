from __future__ import annotations

from pathlib import Path

import pytest
from spec_file import write_model


@pytest.fixture
def beside_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds m.onnx and is the current one."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path)
    return tmp_path
