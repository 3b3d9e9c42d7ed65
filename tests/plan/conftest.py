"""Plans are made from data sheets, whatever this machine has measured."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def nothing_calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANEARLY_CACHE", str(tmp_path / "cache"))
