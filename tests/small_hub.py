"""A stand-in of the Hugging Face hub on this machine: dataset repositories out of folders.

A folder ``organisation/name`` is the dataset of that name, at one commit that follows from its
content. Every request is noted.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from planearly.data.shards import Job, run_job
from planearly.engine.work import shard_function
from small_documents import lines, zstd


def commit(repository: Path) -> str:
    text = [(p.relative_to(repository).as_posix(), p.read_bytes().hex()) for p in files(repository)]
    return hashlib.sha1(json.dumps(text).encode()).hexdigest()


def files(repository: Path) -> list[Path]:
    return sorted(path for path in repository.rglob("*") if path.is_file())


class _Requests(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        state: Any = self.server
        if state.down:
            self.close_connection = True
            return None
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path).strip("/")
        length = int(self.headers["Content-Length"] or 0)
        asked = urllib.parse.parse_qs(self.rfile.read(length).decode())
        state.asked.append(f"{self.command} {path}")
        kind, _, rest = path.removeprefix("api/").partition("/")
        name = "/".join(rest.split("/")[:2])
        repository = state.root / name
        if kind != "datasets" or not (repository / "README.md").is_file():
            return self.answer(404, {"error": "Repository not found"}, {
                "X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        verb, _, rest = rest[len(name):].strip("/").partition("/")
        inside = rest.partition("/")[2]  # after the commit
        sha = commit(repository)
        if verb == "resolve":
            return self.file(repository / inside, sha)
        if verb == "tree":
            return self.tree(repository, repository / inside)
        if verb == "paths-info":
            return self.answer(200, [self.entry(repository, repository / each)
                                     for each in asked["paths"] if (repository / each).exists()])
        return self.answer(200, {"id": name, "sha": sha, "private": False, "tags": [],
                                 "downloads": 0, "likes": 0, "siblings": [
                                     {"rfilename": p.relative_to(repository).as_posix()}
                                     for p in files(repository)]})

    do_HEAD = do_POST = do_GET

    def entry(self, repository: Path, path: Path) -> dict[str, Any]:
        kind = "file" if path.is_file() else "directory"
        return {"type": kind, "path": path.relative_to(repository).as_posix(),
                "size": path.stat().st_size if kind == "file" else 0, "oid": "0" * 40}

    def tree(self, repository: Path, folder: Path) -> None:
        if not folder.is_dir():
            return self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        deep = "recursive=true" in self.path.lower()
        found = sorted(folder.rglob("*") if deep else folder.iterdir())
        return self.answer(200, [self.entry(repository, path) for path in found])

    def file(self, path: Path, sha: str) -> None:
        if not path.is_file():
            return self.answer(404, {"error": "Entry not found"}, {
                "X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        data = path.read_bytes()
        tags = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": sha,
                "Accept-Ranges": "bytes"}
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            end = min(int(last) + 1 if last else len(data), len(data))
            tags["Content-Range"] = f"bytes {first}-{end - 1}/{len(data)}"
            return self.send(206, data[int(first):end], tags)
        return self.send(200, data, tags)

    def answer(self, status: int, values: Any, tags: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(values).encode(),
                  {"Content-Type": "application/json", **(tags or {})})

    def send(self, status: int, data: bytes, tags: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**tags, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextlib.contextmanager
def serving(root: Path) -> Iterator[Any]:
    """A hub of the repositories under ``root``: its ``address``, and what is ``asked`` of it;
    while it is ``down``, it hangs up."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Requests)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.root, server.asked, server.down = root, [], False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def note_loads() -> None:
    """Have every dataset that this process loads noted in the file ``NOTED_LOADS``."""
    import datasets

    real = datasets.load_dataset_builder
    if real.__module__ == __name__:
        return

    def load_dataset_builder(path: str, *words: Any, **more: Any) -> Any:
        _note(os.environ["NOTED_LOADS"], (words or (path,))[0])
        return real(path, *words, **more)

    datasets.load_dataset_builder = load_dataset_builder


@shard_function
def noting_loads(item: dict[str, Any], advance: Any) -> dict[str, Any]:
    """A shard of a corpus, tokenized by a process that notes what it loads."""
    note_loads()
    _note(f"{os.environ['NOTED_LOADS']}.jobs", item["number"])
    return run_job(Job.from_item(item), advance)


def _note(path: str, what: Any) -> None:
    with open(path, "a") as handle:
        handle.write(f"{os.getpid()} {what}\n")


_FINEWEB = """---
license: odc-by
configs:
- config_name: default
  data_files: [{split: train, path: data/*/*}]
- config_name: sample-10BT
  data_files: [{split: train, path: sample/10BT/*}]
- config_name: CC-MAIN-2024-10
  data_files: [{split: train, path: data/CC-MAIN-2024-10/*}]
---
"""
_C4 = """---
license: [odc-by]
dataset_info:
- config_name: en
  features:
  - {name: text, dtype: string}
  - {name: timestamp, dtype: string}
  - {name: url, dtype: string}
  splits: [{name: train, num_bytes: 5000, num_examples: 4}]
configs:
- config_name: en
  data_files:
  - {split: train, path: en/c4-train.*.json.gz}
  - {split: validation, path: en/c4-validation.*.json.gz}
- config_name: realnewslike
  data_files: [{split: train, path: realnewslike/c4-train.*.json.gz}]
---
"""
_DCLM = """---
license: cc-by-4.0
dataset_info:
  features:
  - {name: bff_contained_ngram_count_before_dedupe, dtype: int64}
  - {name: language_id_whole_page_fasttext, struct: [{name: en, dtype: float64}]}
  - name: metadata
    struct: [{name: WARC-Date, dtype: "timestamp[s]"}, {name: WARC-Truncated, dtype: string}]
  - {name: text, dtype: string}
  - {name: url, dtype: string}
---
"""


def corpora(root: Path, texts: Any) -> None:
    """The corpora that have names, in their own layouts (files, fields, front matter), but small.

    Args:
        texts: of a name, the texts of the files of its training split.
    """
    def card(name: str, text: str) -> None:
        write(f"{name}/README.md", text.encode())

    def write(name: str, data: bytes) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)

    def other(*said: str) -> bytes:
        return lines(*({"text": text} for text in said))

    card("allenai/c4", _C4)
    for i, some in enumerate(texts("c4")):
        write(f"allenai/c4/en/c4-train.{i:05}-of-01024.json.gz", gzip.compress(lines(*(
            {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "u"} for text in some))))
    write("allenai/c4/en/c4-validation.00000-of-00008.json.gz", gzip.compress(other("valid")))
    write("allenai/c4/realnewslike/c4-train.00000-of-00512.json.gz", gzip.compress(other("news")))
    for name in ("fineweb", "fineweb-edu"):
        card(f"HuggingFaceFW/{name}", _FINEWEB)
        for place, parts in (("sample/10BT/{:03}_00000", texts(name)),
                             ("data/CC-MAIN-2024-10/000_{:05}", [["whole"]])):
            for i, some in enumerate(parts):
                path = root / f"HuggingFaceFW/{name}/{place.format(i)}.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(pa.table({
                    "text": some, "id": [f"<urn:uuid:{text[:9]}>" for text in some],
                    "dump": ["CC-MAIN-2024-10"] * len(some), "language_score": [0.9] * len(some),
                    "token_count": [len(text) for text in some]}), path)
    card("mlfoundations/dclm-baseline-1.0", _DCLM)
    for i, some in enumerate(texts("dclm")):
        write(f"mlfoundations/dclm-baseline-1.0/global-shard_{i + 1:02}_of_10/local-shard_0_of_10/"
              f"shard_{i:08}_processed.jsonl.zst", zstd(lines(*(
                  {"bff_contained_ngram_count_before_dedupe": 1, "url": "u", "text": text,
                   "language_id_whole_page_fasttext": {"en": 0.9},
                   "metadata": {"WARC-Date": "2013-05-18T05:48:54Z"}} for text in some))))
    card("monology/pile-uncopyrighted", "---\nlicense: other\n---\n")
    for i, some in enumerate(texts("pile")):  # in several frames, as parallel writers make them
        write(f"monology/pile-uncopyrighted/train/{i:02}.jsonl.zst", b"".join(
            zstd(lines({"text": text, "meta": {"pile_set_name": ("FreeLaw", "ArXiv")[n % 2]}}))
            for n, text in enumerate(some)))
    for split in ("val", "test"):
        write(f"monology/pile-uncopyrighted/{split}.jsonl.zst", zstd(other(split)))
