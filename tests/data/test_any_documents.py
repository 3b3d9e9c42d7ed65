"""Whatever lies in a folder: documents in are documents used and told, without a traceback."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from examples import examples
from planearly import keys
from planearly.data import tokenizer as tk
from planearly.data.build import tokenize_corpus
from planearly.data.dataset import TokenDataset
from planearly.data.documents import Problems
from planearly.data.formats import kind_of
from planearly.data.inputs import resolve
from planearly.data.readers import read_documents
from planearly.errors import UserError
from small_documents import domain_splits, zstd

DATA = keys.Data(max_bad_share=1.0)
pytestmark = pytest.mark.fuzz

WORDS = st.sampled_from(["rose", "the sea", "नमस्ते", "中文字", "\u0301", "\x00", "\x1b[31m",
                         "\ufeff", "\u2028", "\r\n", "\n\n", " ", "\t", "<|endoftext|>", "😀",
                         "ภาษาไทย", "x" * 500, " " * 300, '"', "\\", "text"])
UNICODE = st.characters(exclude_categories=["Cs"])
TEXT = st.one_of(st.text(UNICODE, max_size=80), st.lists(WORDS, max_size=8).map("".join))
VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-10**400, 10**400), st.floats(), TEXT,
              st.just("\ud83d")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        TEXT | st.just("text"), inner, max_size=3), max_leaves=6)
RECORD = st.one_of(
    st.builds(lambda text: {"text": text}, TEXT),
    st.builds(lambda text, source: {"text": text, "source": source}, TEXT, VALUE), VALUE)


def as_lines(records) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def as_bytes(value) -> bytes | None:
    return value.encode("utf-8", "replace") if isinstance(value, str) else None


@st.composite
def files(draw) -> tuple[str, bytes, int]:
    """A name, what the file holds, and how many records that are."""
    kind = draw(st.sampled_from(["lines", "list", "pretty", "utf-16", "texts", "txt", "rows"]))
    if kind == "txt":
        text = draw(TEXT)
        encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))
        return draw(st.sampled_from([".txt", ".md"])), text.encode(encoding), 1
    if kind == "rows":
        values = [as_bytes(draw(TEXT)) if draw(st.booleans()) else None
                  for _ in range(draw(st.integers(0, 4)))]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"text": pa.array(values, pa.binary())}), sink)
        return ".parquet", sink.getvalue().to_pybytes(), len(values)
    records = draw(st.lists(RECORD, max_size=5))
    if kind == "list":
        return ".json", json.dumps(records).encode(), len(records)
    if kind == "pretty":
        records = [record for record in records if isinstance(record, dict) and record]
        return ".json", "\n".join(json.dumps(r, indent=2) for r in records).encode(), len(records)
    data = as_lines(records)
    if kind == "utf-16":
        return ".jsonl", data.decode().encode("utf-16"), len(records)
    if kind == "texts" and records:  # one of the lines is no JSON at all
        return ".ndjson", data + b'{"text": \xff\n', len(records) + 1
    name, pack = draw(st.sampled_from([(".jsonl", bytes), (".jsonl.gz", gzip.compress),
                                       (".jsonl.zst", zstd)]))
    return name, pack(data), len(records)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tk.save(tk.train(["the rose by the sea"] * 3, keys.Tokenizer(vocab_size=300)), folder)
    return folder


def fuzzed(count: int, *strategies):
    """Run a function inside a test on examples of the strategies."""
    def run(test) -> None:
        examples(count, database=None,
                 suppress_health_check=list(HealthCheck))(given(*strategies)(test))()
    return run


def test_documents_in_are_documents_used_and_told(tmp_path, tokenizer):
    folder, out = tmp_path / "in", tmp_path / "out"

    @fuzzed(20, st.lists(files(), min_size=1, max_size=4), st.none() | st.integers(1, 300))
    def _(made, max_tokens):
        for place in (folder, out):
            shutil.rmtree(place, ignore_errors=True)
        folder.mkdir()
        for i, (ending, data, _) in enumerate(made):
            (folder / f"{i}{ending}").write_bytes(data)
        units = resolve([str(folder)])
        problems = Problems(1.0)
        texts = [document.text for unit in units
                 for document in read_documents(unit, DATA, problems)]
        nothing = sum("the file" in e["why"] and e["line"] == 0 for e in problems.examples)
        assert problems.good == len(texts)
        assert problems.good + problems.bad + problems.empty - nothing == sum(
            n - (n > 0 and not data) for _, data, n in made)
        distinct = len({" ".join(text.split()) for text in texts})
        try:
            tokenize_corpus(units, tokenizer, 16, DATA, out, max_tokens=max_tokens)
        except UserError as error:
            assert not texts, error
            return
        dataset = TokenDataset(out)
        meta = dataset.meta
        assert (meta["read"], meta["set_aside"], meta["empty"]) == (
            problems.good, problems.bad, problems.empty)
        assert meta["read"] == meta["n_documents"] + meta["duplicates"] + meta["left_out"]
        assert len(dataset.documents) == meta["n_documents"]
        if not max_tokens:
            assert meta["n_documents"] == distinct and meta["left_out"] == 0
        with contextlib.suppress(UserError):  # too little to hold out text
            splits = domain_splits(None, str(folder), DATA, 0)
            told = Problems(1.0)
            found = {split: {" ".join(d.text.split()) for unit in units
                             for d in read_documents(unit, DATA, told)}
                     for split, units in splits.items()}
            if distinct > 2:
                assert sum(map(len, found.values())) == distinct
                assert len(set().union(*found.values())) == distinct


def test_any_bytes_are_read_or_told(tmp_path):
    seeds = st.one_of(st.binary(max_size=200), files().map(lambda made: made[1]))
    endings = st.sampled_from([".jsonl", ".json", ".txt", ".md", ".parquet", ".jsonl.gz",
                               ".txt.zst"])

    @fuzzed(160, seeds, endings, st.integers(0, 300), st.binary(max_size=3))
    def _(data, ending, place, other):
        path = tmp_path / f"a{ending}"
        path.write_bytes(data[:place] + other + data[place + 1:])
        problems = Problems(1.0)
        began = time.monotonic()
        with contextlib.suppress(UserError):
            used = list(read_documents(resolve([str(path)])[0], DATA, problems))
            assert len(used) + problems.bad + problems.empty > 0
            assert all(document.text.encode() for document in used)
        assert time.monotonic() - began < 5


NAME = st.one_of(
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1,
            max_size=20),
    st.sampled_from(["train", "test", "valid", "README", "a b", "caf\udce9", "line\nend", ".hidden",
                     "-rf", "*", "[a]", "é" * 40])).filter(lambda name: name not in (".", ".."))
ENTRY = st.tuples(st.lists(NAME, min_size=1, max_size=3),
                  st.sampled_from(["", ".txt", ".jsonl", ".md", ".JSONL", ".txt.gz", ".pdf"]),
                  st.sampled_from(["file", "file", "file", "link", "gone", "up", "pipe", "closed",
                                   "empty"]))


def test_any_folder_is_read_or_told(tmp_path, capsys):
    folder = tmp_path / "folder"

    @fuzzed(80, st.lists(ENTRY, min_size=1, max_size=6))
    def _(entries):
        for parent, _, _ in os.walk(folder):
            os.chmod(parent, 0o755)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        made = []
        for number, (names, ending, kind) in enumerate(entries):
            path = folder.joinpath(*names)
            path = path.with_name(path.name + ending)
            with contextlib.suppress(OSError, ValueError):
                path.parent.mkdir(parents=True, exist_ok=True)
                if os.path.lexists(path):
                    continue
                if kind == "link":
                    path.symlink_to(made[-1] if made else "nowhere")
                elif kind in ("gone", "up"):
                    path.symlink_to("nowhere" if kind == "gone" else "..")
                elif kind == "pipe":
                    os.mkfifo(path)
                else:
                    data = json.dumps({"text": f"document {number}"}).encode() * (kind != "empty")
                    path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
                    made += [path] * (kind == "file")
                    if kind == "closed" and os.geteuid():
                        path.chmod(0)
        problems = Problems(1.0)
        expected = {path for path in made if kind_of(path)
                    and not any(part.startswith(".") for part in path.relative_to(folder).parts)
                    and not path.name.lower().startswith("readme.")}
        try:
            used = [document for unit in resolve([str(folder)])
                    for document in read_documents(unit, DATA, problems)]
        except UserError as error:
            nothing = "holds no documents" in str(error) and not expected
            assert nothing or "cannot read" in str(error) or "is damaged" in str(error)
            return
        real = {os.path.realpath(document.file) for document in used}
        assert real >= {os.path.realpath(path) for path in expected}
        with contextlib.suppress(UserError):
            domain_splits(None, str(folder), DATA, 0)
        capsys.readouterr()
