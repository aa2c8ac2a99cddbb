"""What tests of several folders share."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from builder_says import Builder, builder
from models.materialise import materialise
from native import Compiled, compiling_to


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs torch where it is not installed: it is large, and few need it."""
    if importlib.util.find_spec("torch") is None:
        skip = pytest.mark.skip(reason="torch is not installed: pip install 'optc[torch]'")
        for item in items:
            if item.get_closest_marker("torch"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def real_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the function from the name of a model in tests/models to its file, made once."""
    folder = tmp_path_factory.mktemp("models")

    @cache
    def made(name: str) -> Path:
        return materialise(name, folder)

    return made


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Return the function from a source in tests/models to the shared library of it."""
    return compiling_to(tmp_path_factory.mktemp("libraries"))


@pytest.fixture(scope="session")
def tensorrt() -> Iterator[Builder]:
    """Return the real builder, which answers what it refuses."""
    with builder() as answers:
        yield answers
