"""Copies of what is in stores, and what is published there."""

import errno

import fsspec
import pytest

from planearly import storage
from planearly.errors import UserError
from small_stores import put


def test_a_copy_is_made_once_for_each_version(store, fresh_cache, tmp_path, monkeypatch, capsys):
    for name in ("config.json", "model.safetensors", "pickled.bin", "deep/er/x.json"):
        put(f"{store}/m/{name}", name.encode() * 1_000)
    names = ("*.json", "*.safetensors")
    folder = storage.local(f"{store}/m", names)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: name.encode() * 1_000 for name in ("config.json", "model.safetensors")}
    assert folder.name == "m" and folder.is_relative_to(fresh_cache)
    assert f"fetching {store}/m: 0.028 MB" in capsys.readouterr().err
    everything = storage.local(f"{store}/m")
    assert (everything / "deep/er/x.json").stat().st_size == 14_000
    one = storage.local(f"{store}/m/config.json")
    assert one.read_bytes() == b"config.json" * 1_000 and one.name == "config.json"

    def another():  # another process
        storage.local.cache_clear()
        capsys.readouterr()
        return storage.local(f"{store}/m", names), "fetching" in capsys.readouterr().err

    assert another() == (folder, False)
    put(f"{store}/m/config.json", b"{}")
    assert storage.local(f"{store}/m", names) == folder  # a process keeps what it began with
    changed, fetched = another()
    assert fetched and changed != folder and (changed / "config.json").read_bytes() == b"{}"
    assert storage.local(str(tmp_path)) == tmp_path
    for place, told in ((f"{store}/none", "does not exist"), (f"{store}/m/deep", r"no \*\.json")):
        with pytest.raises(UserError, match=told):
            storage.local(place, names)


def test_a_copy_that_was_interrupted_goes_on(memory, monkeypatch):
    for name in "abc":
        put(f"{memory}/m/{name}", name.encode() * 1_000)
    fetch, fetched = storage._fetch, []

    def stopped(file, start, stop):
        fetched.append(file.url[-1])
        if file.url.endswith("b") and len(fetched) == 2:
            raise KeyboardInterrupt
        return fetch(file, start, stop)

    monkeypatch.setattr(storage, "_fetch", stopped)
    with pytest.raises(KeyboardInterrupt):
        storage.local(f"{memory}/m")
    assert sorted(p.name for p in storage.local(f"{memory}/m").iterdir()) == ["a", "b", "c"]
    assert fetched == ["a", "b", "b", "c"]


@pytest.fixture
def model(tmp_path):
    """Files to publish, by name."""
    for name in ("config.json", "a.safetensors", "deep/b.bin"):
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_bytes(name.encode() * 1_000)
    return {path.relative_to(tmp_path / "model").as_posix(): path
            for path in (tmp_path / "model").rglob("*") if path.is_file()}


def test_only_what_changed_is_published(store, model, monkeypatch, capsys):
    url = f"{store}/models/law"
    put(f"{url}/of-another", b"stays")
    for name in model:
        put(f"{url}/{name}", b"half of an old one")
    done = []
    client = fsspec.url_to_fs(url)[0]
    put_file, rm_file = client.put_file, client.rm_file
    monkeypatch.setattr(client, "put_file", lambda here, there, **more: (
        done.append(f"+{there.rpartition('/')[2]}"), put_file(here, there, **more))[1])
    monkeypatch.setattr(client, "rm_file", lambda there: (
        done.append(f"-{there.rpartition('/')[2]}"), rm_file(there))[1])

    def published() -> list[str]:
        done.clear()
        sent = storage.publish(model, url, last="config.json")
        assert sent == sum(each[0] == "+" for each in done)
        there = storage.local(url)
        storage.local.cache_clear()
        assert {path.relative_to(there).as_posix(): path.read_bytes()
                for path in there.rglob("*") if path.is_file()} == {
            "of-another": b"stays", **{name: path.read_bytes() for name, path in model.items()}}
        return list(done)

    assert published() == ["-config.json", "+a.safetensors", "+b.bin", "+config.json"]
    assert f"publishing in {url}: 0.034 MB" in capsys.readouterr().err
    assert published() == []
    model["a.safetensors"].write_bytes(b"new")
    assert published() == ["-config.json", "+a.safetensors", "+config.json"]
    put(f"{url}/deep/b.bin", b"touched there")
    assert published() == ["-config.json", "+b.bin", "+config.json"]
    model["config.json"].write_bytes(b"{}")
    assert published() == ["+config.json"]
    del model["deep/b.bin"]
    assert published() == ["-config.json", "-b.bin", "+config.json"]


def test_publishing_that_was_interrupted_goes_on(memory, model, monkeypatch, hasty):
    url, sent, fails = f"{memory}/models", [], [OSError(errno.ECONNRESET, "reset")] * 2
    kind = type(fsspec.filesystem("memory"))
    put_file = kind.put_file

    def flaky(self, here, there, **more):
        if there.endswith("b.bin") and fails:
            raise fails.pop()
        sent.append(there.rpartition("/")[2])
        return put_file(self, here, there, **more)

    monkeypatch.setattr(kind, "put_file", flaky)
    fails.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        storage.publish(model, url, last="config.json")
    assert sent == ["a.safetensors"] and storage.look(f"{url}/config.json") is None
    assert storage.publish(model, url, last="config.json") == 2  # after two resets
    assert sent == ["a.safetensors", "b.bin", "config.json"]
    with pytest.raises(UserError, match="was changed by another while it was published"):
        monkeypatch.setattr(kind, "put_file", lambda self, here, there, **more: (
            put(f"{url}/c", b"another")))
        storage.publish({"c": model["config.json"]}, url)


@pytest.mark.s3
def test_where_nothing_can_be_published(s3, s3_server, model, monkeypatch):
    for url, told in (("s3://nobody/x", "no such bucket"), ("models", "is no URL of a store"),
                      ("foo://x", "foo:// is not known")):
        with pytest.raises(UserError, match=told):
            storage.check_writable(url)
    storage.check_writable(f"{s3}/models")
    assert storage.publish(model, f"{s3}/models") == 3
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    type(fsspec.filesystem("s3")).clear_instance_cache()
    for calls in (lambda: storage.check_writable(f"{s3}/models"),
                  lambda: storage.publish(model, f"{s3}/models")):
        with pytest.raises(UserError, match="cannot reach s3://bucket/models"):
            calls()
