"""Fixtures that several test modules use."""

import pytest

from planearly.cluster import embed
from small_runs import Words, corpus


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "load_embedder", lambda name, cache=None: Words())
    return corpus(tmp_path / "text")
