"""Fixtures that several test modules use."""

import pytest
import torch
from hypothesis import is_hypothesis_test

import examples
from planearly import sharding
from planearly.cluster import embed
from small_runs import Words, corpus
from small_stores import fresh_cache, hasty, memory, s3, s3_server  # noqa: F401


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "load_embedder", lambda name, cache=None: Words())
    monkeypatch.setattr(embed, "_FEW", 1 << 20)  # other processes know no Words
    return corpus(tmp_path / "text")


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
def pytest_collection_modifyitems(items):
    for item in items:
        if is_hypothesis_test(getattr(item, "obj", None)):
            item.add_marker("fuzz")
