"""Fixtures that several test modules use."""

import io
import os
from collections import Counter
from typing import IO

import pytest
import torch
from hypothesis import is_hypothesis_test
from matplotlib.figure import Figure

import examples
from planearly import sharding
from planearly.cluster import embed
from small_cluster import cluster  # noqa: F401
from small_runs import Words, corpus
from small_stores import fresh_cache, hasty, memory, s3, s3_server, store  # noqa: F401


@pytest.fixture(autouse=True, scope="session")
def unflushed():
    """Nobody pulls the plug on a test: what it writes need not reach the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "load_embedder", lambda name, cache=None: Words())
    monkeypatch.setattr(embed, "_FEW", 1 << 20)  # other processes know no Words
    return corpus(tmp_path / "text")


@pytest.fixture
def unrendered(monkeypatch):
    """Figures are drawn and then not rendered, which takes most of the time of a report."""
    def blank(figure: Figure, file: IO, **_: object) -> None:
        svg = "<svg class='blank'></svg>"
        file.write(svg if isinstance(file, io.TextIOBase) else svg.encode())

    monkeypatch.setattr(Figure, "savefig", blank)


@pytest.fixture
def one_process(tmp_path):
    """A group of this process alone, in which tensors can be divided."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
    sharding._mesh.cache_clear()


def pytest_configure(config):
    if config.option.markexpr == "fuzz":
        examples.times = examples.FUZZ_TIMES


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):  # files that take long first: no core waits at the end
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: -slow[item.path])
    for item in items:
        if is_hypothesis_test(getattr(item, "obj", None)):
            item.add_marker("fuzz")
