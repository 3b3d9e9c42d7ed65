"""Fixtures that several test modules use."""

import pytest

from planearly.cluster import embed
from small_runs import Words, corpus


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "load_embedder", lambda name, cache=None: Words())
    return corpus(tmp_path / "text")


def pytest_collection_modifyitems(config, items):
    if "fuzz" not in config.option.markexpr:
        for item in items:
            if "fuzz" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="only with -m fuzz"))
