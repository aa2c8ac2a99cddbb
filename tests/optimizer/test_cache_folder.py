from __future__ import annotations

from pathlib import Path

import pytest

from optc.optimizer.cache_folder import cache_folder


def test_the_cache_is_where_the_user_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("OPTC_CACHE_DIR", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "optc"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/optc")
    monkeypatch.setenv("OPTC_CACHE_DIR", "/y")
    assert cache_folder() == Path("/y")
