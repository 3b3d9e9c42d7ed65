"""Stores to read from and write to, for tests: one in memory, and a server that speaks S3."""

import os
from pathlib import Path

import fsspec
import pytest

from planearly import storage


def fill(url: str, folder: Path) -> None:
    """Put the files of a folder into a store."""
    store, path = fsspec.url_to_fs(url)
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            store.pipe_file(f"{path}/{file.relative_to(folder).as_posix()}", file.read_bytes())


def put(url: str, data: bytes) -> str:
    store, path = fsspec.url_to_fs(url)
    store.pipe_file(path, data)
    return url


@pytest.fixture
def fresh_cache(monkeypatch, tmp_path_factory):
    """An empty folder for copies."""
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PLANEARLY_CACHE", str(place))
    storage.local.cache_clear()
    return place


@pytest.fixture
def memory(fresh_cache):
    """The URL of an empty folder in this process's memory."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pseudo_dirs[:] = [""]
    yield "memory:///here"
    store.store.clear()


@pytest.fixture(scope="session")
def s3_server():
    """A server of this machine that speaks S3, and its address."""
    pytest.importorskip("s3fs", reason="make s3 installs what these tests need")
    server = pytest.importorskip("moto.server", reason="make s3 installs what these tests need")
    import logging

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    started = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    yield f"http://{host}:{port}"
    started.stop()


@pytest.fixture
def s3(s3_server, fresh_cache, monkeypatch, tmp_path):
    """The URL of an empty bucket, whose server and credentials the environment names."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
            "AWS_ENDPOINT_URL": s3_server, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1", "AWS_CONFIG_FILE": str(tmp_path / "none")}.items():
        monkeypatch.setenv(name, value)
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    type(store).clear_instance_cache()
    for bucket in store.ls("", detail=False):
        store.rm(bucket, recursive=True)
    store.mkdir("bucket")
    yield "s3://bucket"
    type(store).clear_instance_cache()


@pytest.fixture
def hasty(monkeypatch):
    """Without pauses before a block is asked for again."""
    monkeypatch.setattr(storage, "_PAUSES", (0.0, 0.0, 0.0))


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.s3)])
def store(request, hasty):
    """The URL of an empty folder, of each kind of store."""
    return request.getfixturevalue(request.param)
