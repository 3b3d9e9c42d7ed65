"""Corpora in stores are read as those of this machine are."""

import errno
import gzip
import io
import json
import socket
import sys
import urllib.request

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.config import conf, set_conf_env
from fsspec.registry import _registry

from planearly import keys, storage
from planearly.data import documents
from planearly.data import tokenizer as tk
from planearly.data.build import tokenize_corpus
from planearly.data.divide import divided
from planearly.data.documents import Problems, Unit
from planearly.data.domains import domain_names
from planearly.data.inputs import check_urls, resolve
from planearly.data.readers import read_documents
from planearly.engine.local import Local
from planearly.engine.work import passes
from planearly.errors import UserError
from small_documents import DATA, domain_splits, lines, texts, zstd
from small_stores import fill, put


def read(units: list[Unit]) -> list[tuple[str, str, int]]:
    """Text, source and line of all documents."""
    problems = Problems(1.0)
    return [(d.text, d.source, d.line) for unit in units
            for d in read_documents(unit, DATA, problems)]


def write(folder, name: str, data: bytes) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@pytest.fixture
def tree(tmp_path):
    folder = tmp_path / "tree"
    table = io.BytesIO()
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(40)]}), table, row_group_size=9)
    for name, data in {
            "a/x.jsonl": lines({"text": "a1", "source": "law"}, b"{broken", {"text": "a2"}),
            "a.jsonl.gz": gzip.compress(lines({"text": "packed"})),
            "a-b/z.jsonl.zst": zstd(lines({"text": "zst"}) * 3), "table.parquet": table.getvalue(),
            "a/README.md": b"beside data", "b/README.md": b"a page", "b/c/deep.txt": b"deep",
            "b/odd [1].txt": b"odd", ".hidden/h.jsonl": lines({"text": "no"}), ".h.txt": b"no",
            "image.png": b"no", "whole.json": json.dumps([{"text": "in a list"}] * 2).encode(),
            "wide.txt": "wide".encode("utf-16")}.items():
        write(folder, name, data)
    return folder


def test_documents_are_those_of_a_local_copy(store, tree, capsys):
    store = f"{store}/tree"
    fill(store, tree)
    for place in ("", "/*", "/**/*.txt", "/a*", "/*/", "/b/odd [1].txt", "/whole.json", "/?/x*"):
        ours = resolve([f"{tree}{place}"])
        theirs = resolve([store + place])
        assert read(theirs) == read(ours) and ours, place
        assert [unit.path.removeprefix(store) for unit in theirs] == [
            unit.path.removeprefix(str(tree)) for unit in ours]
        assert all(unit.stored and not unit.modified for unit in theirs)
    assert f"{store}: 1 files are passed over" in capsys.readouterr().err
    assert resolve([store, f"{store}/a"]) == resolve([store])


@pytest.mark.parametrize("names", [
    ("law/train.jsonl", "law/valid.jsonl", "law/test.jsonl"),
    ("law/train/a.jsonl", "law/dev/a.jsonl", "law/test/b/a.jsonl", "law/README.md"),
    ("law/data/train-00000-of-00001.jsonl", "law/data/test.jsonl"),
    ("law/train.jsonl", "law/other.jsonl"), ("law/a.jsonl", "law/b/c.jsonl"),
    ("law/train.txt", "law/test.txt", "law/intro.txt"), ("law/train.md", "law/valid.md"),
])
def test_domains_are_split_as_local_ones(memory, tmp_path, names, capsys):
    for name in names:
        data = [{"text": f"{name} {i}"} for i in range(20)]
        write(tmp_path / "all", name, lines(*data) if "json" in name else (
            f"{name} one\n\ntwo\n\nthree\n\nfour").encode())
    fill(f"{memory}/all", tmp_path / "all")

    def split(root, entry):
        said.clear()
        found = {part: [text for text, *_ in read(units)]
                 for part, units in domain_splits(root, entry, DATA, 0).items()}
        told = capsys.readouterr().err.replace(f"{memory}/all", "").replace(
            str(tmp_path / "all"), "")
        said.extend(line for line in told.splitlines() if "MB/s" not in line)
        return found, [*said]

    said: list[str] = []
    ours = split(str(tmp_path / "all"), "law")
    assert split(f"{memory}/all", "law") == ours == split(f"{memory}/all/", "law")
    assert split(None, f"{memory}/all/law") == ours == split(str(tmp_path), f"{memory}/all/law/")
    assert domain_names(f"{memory}/all") == ["law"]
    write(tmp_path, "here.jsonl", lines(*data))  # a domain by its own path, whatever the root
    assert split(f"{memory}/all", str(tmp_path / "here.jsonl"))[0]["test"]


def test_a_domain_that_is_not_there(memory, tmp_path):
    put(f"{memory}/law/a.txt", b"a")
    for root, entry, told in ((memory, "med", "exists neither under domains_root"),
                              (None, f"{memory}/med", "does not exist: check the bucket")):
        with pytest.raises(UserError, match=told):
            domain_splits(root, entry, DATA, 0)
    with pytest.raises(UserError, match="has no subfolders"):
        domain_names(f"{memory}/law")


@pytest.fixture
def asked(monkeypatch):
    """(start, stop) of every block that is asked for."""
    found: list[tuple[int, int]] = []
    fetch = storage._fetch
    monkeypatch.setattr(storage, "_fetch", lambda file, start, stop: (
        found.append((start, stop)), fetch(file, start, stop))[1])
    return found


def test_parts_of_large_files_are_asked_for_alone(memory, tmp_path, monkeypatch, asked):
    monkeypatch.setattr(storage, "_LEAST", 512)
    monkeypatch.setattr(storage, "_MOST", 2_048)
    monkeypatch.setattr("planearly.data.divide._BLOCK", 300)
    monkeypatch.setattr(documents, "_GROUP", 20_000)
    rows = [{"text": np.random.default_rng(i).bytes(100).hex()} for i in range(500)]
    table = io.BytesIO()
    pq.write_table(pa.table({"text": [row["text"] for row in rows]}), table, row_group_size=10)
    put(f"{memory}/a.jsonl", lines(*rows))
    put(f"{memory}/b.parquet", table.getvalue())
    put(f"{memory}/c.jsonl.zst", zstd(lines(*rows)))
    for unit in resolve([memory]):
        whole = read([unit])
        parts = [part for _, part in divided([unit], tmp_path / unit.path[-5:], Local(1))]
        assert len(parts) > 4 and read(parts) == whole and len(whole) == 500
        for part in parts:
            asked.clear()
            read([part])
            if part.part.stored:
                assert not asked
            elif unit.kind == "lines":
                assert all(part.part.start - 1 <= start and stop <= part.part.stop + 1_024
                           for start, stop in asked)
            else:
                assert sum(stop - start for start, stop in asked) < unit.size / 2
        if unit.kind == "lines" and not part.part.stored:
            asked.clear()
            divided([unit], tmp_path / "again", Local(1))
            assert sum(stop - start for start, stop in asked) < 2 * unit.size  # counted once


def test_blocks_grow_while_a_file_is_read_in_order(memory, monkeypatch, asked):
    monkeypatch.setattr(storage, "_LEAST", 100)
    monkeypatch.setattr(storage, "_MOST", 400)
    data = np.random.default_rng(0).bytes(5_000)
    file = storage.look(put(f"{memory}/a", data))
    with storage.reader(file) as handle:
        assert handle.read(10) == data[:10]
        assert asked == [(0, 100)]
        assert b"".join(iter(lambda: handle.read(50), b"")) == data[10:]
        assert [stop - start for start, stop in asked] == [100, 200, *[400] * 11, 300]
        assert handle.seek(-7, io.SEEK_END) == 4_993 and handle.read() == data[-7:]
        handle.seek(1_000)
        assert handle.read(2_000) == data[1_000:3_000] and handle.tell() == 3_000
        assert handle.seek(9_999) == 9_999 and handle.read() == b""


@pytest.mark.parametrize(("where", "name"), [
    *(("memory", f"a.{kind}") for kind in ("jsonl", "jsonl.zst", "jsonl.gz", "parquet", "txt")),
    pytest.param("s3", "a.jsonl.zst", marks=pytest.mark.s3)])
def test_a_file_that_changes_is_told(request, monkeypatch, hasty, where, name):
    store = request.getfixturevalue(where)
    monkeypatch.setattr(storage, "_LEAST", 1 << 14)
    monkeypatch.setattr(storage, "_MOST", 1 << 14)

    def content(seed: int) -> bytes:
        rows = [np.random.default_rng(seed + i).bytes(40).hex() for i in range(3_000)]
        plain = lines(*({"text": row} for row in rows))
        if name.endswith("parquet"):
            table = io.BytesIO()
            pq.write_table(pa.table({"text": rows}), table)
            return table.getvalue()
        return {"a.jsonl.zst": zstd, "a.jsonl.gz": gzip.compress}.get(name, bytes)(plain)

    place = put(f"{store}/{name}", content(0))
    (unit,) = resolve([place])
    put(place, content(1_000))
    with pytest.raises(UserError, match=f"{name} has changed since it was listed: start again"):
        read([unit])
    (again,) = resolve([place])
    assert again != unit and read([again])
    fetch, count = storage._fetch, [0]

    def changing(file, start, stop):
        count[0] += 1
        if count[0] == 2:
            put(place, content(2_000))
        return fetch(file, start, stop)

    monkeypatch.setattr(storage, "_fetch", changing)
    with pytest.raises(UserError, match=f"{name} has changed since it was listed: start again"):
        read([again])
    (again,) = resolve([place])
    store, path = fsspec.url_to_fs(place)
    store.rm(path)
    with pytest.raises(UserError, match=f"{name} (has changed|does not exist)"):
        read([again])


def test_a_lost_connection_is_tried_again(memory, monkeypatch, hasty):
    (unit,) = resolve([put(f"{memory}/a.jsonl", lines(*[{"text": "x" * 100}] * 50))])
    store = type(fsspec.filesystem("memory"))
    cat, failures = store.cat_file, [0]

    def flaky(self, path, start=None, end=None, **more):
        failures[0] += 1
        if failures[0] in (1, 3):
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
        if failures[0] == 2:
            return cat(self, path, start, end - 1)
        return cat(self, path, start, end)

    monkeypatch.setattr(store, "cat_file", flaky)
    assert len(read([unit])) == 50 and failures == [4]
    failures[0] = -100
    monkeypatch.setattr(store, "cat_file", lambda self, path, start=None, end=None: b"")
    with pytest.raises(UserError, match=r"cannot reach memory:.*a\.jsonl \(0 bytes came") as told:
        read([unit])
    assert passes(told.value)  # the engine tries the shard again


@pytest.mark.parametrize(("url", "told"), [
    ("foo://x/y", "'foo://x/y': foo:// is not known; give s3://"),
    ("abfs://box/x", r"abfs:// needs a package: pip install 'adlfs'"),
    ("s3://b/x", r"s3:// needs a package: pip install 'planearly\[s3\]'"),
    ("gs://b/x", r"gs:// needs a package: pip install 'planearly\[gcs\]'"),
])
def test_schemes_that_cannot_be_read(monkeypatch, url, told):
    for package, scheme in (("s3fs", "s3"), ("gcsfs", "gs"), ("adlfs", "abfs")):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(_registry, scheme, raising=False)
    for calls in (resolve, check_urls):
        with pytest.raises(UserError, match=told):
            calls([url])


def test_what_is_not_there(store):
    put(f"{store}/a/x.png", b"x")
    for url, told in ((f"{store}/none", "/none does not exist: check the bucket and the name"),
                      (f"{store}/a/x.png", "cannot tell its format by its name"),
                      (f"{store}/a", "holds no documents"), (f"{store}/*.txt", "holds no docu")):
        with pytest.raises(UserError, match=told):
            resolve([url])
    check_urls([f"{store}/a", f"{store}/a/*.txt", "a", None, "hf://x"])
    for url in (f"{store}/b/*/x", f"{store}/none"):
        with pytest.raises(UserError, match="does not exist: check the bucket and the name"):
            check_urls([url])


@pytest.mark.s3
def test_what_a_server_of_s3_refuses(s3, s3_server, monkeypatch):
    url = put(f"{s3}/a.jsonl", lines({"text": "a"}))
    fsspec.filesystem("s3").chmod(url, acl="public-read")
    (unit,) = resolve([url])

    def told(url: str) -> str:
        type(fsspec.filesystem("s3")).clear_instance_cache()
        with pytest.raises(UserError) as caught:
            resolve([url])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "s3://nobody/a.jsonl does not exist (no such bucket)" in told("s3://nobody/a.jsonl")
    assert "no such bucket" in told("s3://nobody/*.jsonl")
    request = urllib.request.Request(f"{s3_server}/moto-api/reset-auth", b"0",
                                     {"Content-Type": "text/plain"}, method="POST")
    urllib.request.urlopen(request).close()
    try:
        assert f"the store refuses {url}" in told(url)
        with pytest.raises(UserError, match=r"the store refuses .* check what your credential"):
            read([unit])
    finally:
        request.data = b"inf"
        urllib.request.urlopen(request).close()
    with monkeypatch.context() as without:
        without.delenv("AWS_ACCESS_KEY_ID")
        assert f"{url} needs credentials (Unable to locate credentials)" in told(url)
        without.setenv("FSSPEC_S3_ANON", "true")
        set_conf_env(named := {})  # as at the start of a process
        without.setitem(conf, "s3", named["s3"])
        type(fsspec.filesystem("s3")).clear_instance_cache()
        assert read(resolve([url]))  # the object is public
    type(fsspec.filesystem("s3")).clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert f"cannot reach {url} (Could not connect to the endpoint" in told(url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    assert "Invalid endpoint: nonsense" in told(url)


@pytest.mark.s3
@pytest.mark.slow
def test_other_processes_write_the_dataset_of_a_local_copy(s3, tmp_path, monkeypatch):
    many = [" ".join(np.random.default_rng(i % 90).choice(["sea", "ship", "12", "é"], 30))
            for i in range(200)]
    table = io.BytesIO()
    pq.write_table(pa.table({"text": many[:90]}), table, row_group_size=10)
    write(tmp_path / "all", "a.jsonl", lines(*({"text": text} for text in many)) + b"{\n")
    write(tmp_path / "all", "b.parquet", table.getvalue())
    write(tmp_path / "all", "c.jsonl.zst", zstd(lines(*({"text": text} for text in many))))
    fill(s3, tmp_path / "all")
    tk.save(tk.train(many, keys.Tokenizer(vocab_size=300)), tmp_path / "tokenizer")
    monkeypatch.setattr("planearly.data.shards._POOL_MEGABYTES", 0)
    monkeypatch.setattr(documents, "_GROUP", 4_000)
    made = []
    for place in (str(tmp_path / "all"), s3):
        out = tmp_path / f"out{len(made)}"
        tokenize_corpus(resolve([place]), tmp_path / "tokenizer", 16, keys.Data(max_bad_share=0.9),
                        out, name="all", executor=Local(2))
        made.append({path.name: path.read_bytes() for path in out.glob("*")
                     if path.is_file() and path.suffix != ".json"})
    assert made[0] == made[1] and sum(map(len, made[0].values())) > 10_000


def test_names_are_texts_too(memory):
    put(f"{memory}/ab cd/é #1.txt", b"odd")
    assert texts(f"{memory}/ab cd/é #1.txt") == texts(f"{memory}/*/*.txt") == ["odd"]


def test_folders_of_this_machine_by_url_are_made(tmp_path):
    url = (tmp_path / "new" / "models").as_uri()
    write(tmp_path, "a.txt", b"text")
    storage.check_writable(url)
    assert storage.publish({"law/a.txt": tmp_path / "a.txt"}, url) == 1
    with storage.written(f"{url}/further/b.txt") as place:
        place.write_bytes(b"more")
    assert {name: storage.local(file.url).read_bytes() for name, file in storage.tree(url).items()
            if name.endswith(".txt")} == {"law/a.txt": b"text", "further/b.txt": b"more"}
    with pytest.raises(UserError, match=r"/none does not exist: check the address$"):
        storage.local(f"{url}/none")
    with pytest.raises(UserError, match=r"cannot be read or written .*Not a directory"):
        storage.check_writable((tmp_path / "a.txt" / "models").as_uri())


def test_a_place_of_the_web_without_a_server_is_no_place_without_files(hasty):
    pytest.importorskip("aiohttp")
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a.jsonl"
    for ask in (resolve, check_urls):
        with pytest.raises(UserError, match=f"cannot reach {url} .*check the connection"):
            ask([url])
