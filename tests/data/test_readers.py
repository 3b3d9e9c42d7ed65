"""Reading documents, finding them, and setting bad ones aside."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from planearly import keys
from planearly.data.documents import Problems
from planearly.data.inputs import resolve
from planearly.data.readers import read_documents
from planearly.errors import UserError
from small_documents import DATA, lines, read, texts, zstd

RECORDS = [{"text": "first é", "source": "web", "id": 1}, {"text": "second", "n": None}]


@pytest.mark.parametrize("name, pack", [
    ("a.jsonl", bytes), ("a.json", bytes), ("a.ndjson", bytes), ("a.jsonl.gz", gzip.compress),
    ("a.jsonl.zst", zstd), ("two.jsonl.zst", lambda b: zstd(b[:20]) + zstd(b[20:])),
])
def test_json_lines_in_every_wrapping(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(lines(*RECORDS)))
    first, second = read(tmp_path)[0]
    assert (first.text, first.source, first.line, first.n_bytes) == ("first é", "web", 1, 8)
    assert (second.text, second.source, second.line) == ("second", name.split(".")[0], 2)
    assert first.file == str(tmp_path / name)


def test_parquet(tmp_path):
    table = pa.table({"text": ["one", None, "three"], "source": ["s", "s", None], "x": [1, 2, 3]})
    pq.write_table(table, tmp_path / "a.parquet")
    documents, problems = read(tmp_path / "a.parquet")
    assert [(d.text, d.source, d.line) for d in documents] == [("one", "s", 1), ("three", "a", 3)]
    assert problems.examples == [{"file": str(tmp_path / "a.parquet"), "line": 2,
                                  "why": "field 'text' holds a null, not text"}]
    with pytest.raises(UserError, match=r"no column 'body' \(it has text, source, x\)"):
        read(tmp_path / "a.parquet", data=keys.Data(text_field="body"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"a\.parquet is damaged"):
        read(tmp_path / "a.parquet")


def test_text_files_are_a_document_each(tmp_path):
    notes = tmp_path / "notes"
    (notes / "deep").mkdir(parents=True)
    (notes / "b.md").write_bytes(b"\xef\xbb\xbf# Title\r\n\r\ntext")
    (notes / "deep" / "a.txt").write_text("deep")
    (notes / "z.txt.gz").write_bytes(gzip.compress(b"packed"))
    documents, _ = read(notes)
    assert [d.text for d in documents] == ["# Title\n\ntext", "deep", "packed"]
    assert [d.source for d in documents] == ["notes", "deep", "notes"]


def test_resolve_is_sorted_skips_hidden_and_reads_once(tmp_path):
    for name in ("b.jsonl", "a.jsonl", ".hidden.jsonl", "sub/c.jsonl", ".git/d.jsonl",
                 "README.md", "image.png", "sub/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(lines({"text": name}))

    def found(*entries):
        return [str(Path(u.path).relative_to(tmp_path)) for u in resolve(list(entries))]

    every = ["a.jsonl", "b.jsonl", "sub/c.jsonl", "sub/notes.txt"]
    assert found(str(tmp_path)) == every
    assert found(str(tmp_path / "b.jsonl"), str(tmp_path)) == ["b.jsonl", "a.jsonl", *every[2:]]
    assert found(str(tmp_path / "*.jsonl")) == ["a.jsonl", "b.jsonl"]
    assert found(str(tmp_path / "**" / "*.jsonl")) == every[:3]


def test_nothing_there(tmp_path):
    (tmp_path / "image.png").write_bytes(b"x")
    for entry, message in ((tmp_path / "absent", "does not exist"),
                           (tmp_path, "holds no documents"),
                           (tmp_path / "*.jsonl", "holds no documents"),
                           (tmp_path / "image.png", "cannot tell its format")):
        with pytest.raises(UserError, match=message):
            resolve([str(entry)])
    with pytest.raises(UserError, match="no documents are named"):
        resolve([])


BAD = [
    (b'{"text": "cut off', "broken JSON at column 10: unterminated string starting"),
    (b'{"text": "caf\xe9"}', "not valid UTF-8"),
    ({"body": "x", "id": 2}, "no field 'text' (it has body, id); data.text_field names another"),
    ({}, "no field 'text' (it has no fields); data.text_field names another"),
    ({"text": 3}, "field 'text' holds a number, not text"),
    ({"text": ["a"]}, "field 'text' holds a list, not text"),
    (b'["text"]', "a JSON list, not an object with a field 'text'"),
    (b'{"text": "\\ud800"}', "the text holds half of a surrogate pair, which is not valid Unicode"),
    (b'{"a":' * 100_000, "broken JSON"),
]


@pytest.mark.parametrize("bad, why", BAD)
def test_a_bad_record_is_set_aside_with_its_line(tmp_path, bad, why):
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "good"}, b"", bad, {"text": "also"}))
    documents, problems = read(tmp_path / "a.jsonl")
    assert [d.text for d in documents] == ["good", "also"]
    assert (problems.good, problems.bad) == (2, 1)
    example = problems.examples[0]
    assert (example["file"], example["line"]) == (str(tmp_path / "a.jsonl"), 3)
    assert example["why"].startswith(why)


def test_empty_texts_and_files_are_passed_over_but_noted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"text": ""}, {"text": " \n"}, {"text": "x"}))
    (tmp_path / "b.jsonl").write_bytes(b"")
    (tmp_path / "c.txt").write_bytes(b"")
    documents, problems = read(tmp_path)
    assert len(documents) == 1 and (problems.bad, problems.empty) == (0, 4)
    assert problems.examples[2]["why"] == "the file is empty"


def test_a_text_file_that_is_not_utf8_is_left_out(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\ncaf\xe9")
    (tmp_path / "b.txt").write_bytes(b"fine")
    documents, problems = read(tmp_path)
    assert [d.text for d in documents] == ["fine"]
    assert problems.examples[0]["line"] == 3 and "UTF-8" in problems.examples[0]["why"]


def test_too_many_bad_records_stop_the_work(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(*[{"text": "good"}] * 297, *[b"{"] * 3))
    assert read(path)[1].bad == 3  # exactly 1%
    path.write_bytes(lines(*[{"text": "good"}] * 296, *[b"{"] * 3))
    with pytest.raises(UserError, match=r"3 of 299 records.*max_bad_share \(1\.00%\).*line 297"):
        read(path)
    path.write_bytes(lines({"text": "good"}, b"{", b"["))
    assert read(path)[1].bad == 2  # two slips are always forgiven
    path.write_bytes(lines(*[b"{"] * 2_000))
    problems = Problems(0.01)
    with pytest.raises(UserError, match="1000 of 1000"):  # not read to the end
        list(read_documents(resolve([str(path)])[0], DATA, problems))
    assert len(problems.examples) == 100


def test_damaged_archive_names_file_and_line(tmp_path):
    packed = zstd(lines(*({"text": f"{i} {i * 7919 % 104729}"} for i in range(60_000))))
    (tmp_path / "a.jsonl.zst").write_bytes(packed[:len(packed) // 2])
    with pytest.raises(UserError, match=r"a\.jsonl\.zst is damaged after line \d{3,}"):
        read(tmp_path)


def test_a_json_list_is_explained(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "x"}]')
    with pytest.raises(UserError, match="is one JSON list; write one object per line"):
        read(tmp_path)


def test_memory_does_not_grow_with_the_file(tmp_path):
    peaks = []
    for n in (2_000, 20_000):
        (tmp_path / "a.jsonl").write_bytes(lines({"text": "x" * 1_000}) * n)
        tracemalloc.start()
        problems = Problems(0.01)
        count = sum(1 for _ in read_documents(resolve([str(tmp_path)])[0], DATA, problems))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert count == n
    assert peaks[1] < 1.2 * peaks[0] + 1e5


def test_local_hugging_face_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    stored = datasets.DatasetDict({
        "train": datasets.Dataset.from_dict({"text": ["a", "b", "c"], "source": ["s", "s", "t"]}),
        "test": datasets.Dataset.from_dict({"text": ["d"], "source": ["s"]}),
    })
    stored.save_to_disk(tmp_path / "saved")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for split, part in stored.items():
        for i in range(2):
            part.shard(2, i, contiguous=True).to_parquet(
                tmp_path / "hub" / "data" / f"{split}-0000{i}-of-00002.parquet") if len(part) > 1 \
                else part.to_parquet(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet")
    for folder in ("saved", "hub"):
        entry = f"hf://{tmp_path / folder}"
        documents, _ = read(entry)
        assert [(d.text, d.source) for d in documents] == [("a", "s"), ("b", "s"), ("c", "t")]
        assert texts(f"{entry}:test") == ["d"]
        with pytest.raises(UserError, match=r"cannot read|no split"):
            read(f"{entry}:dev")
    assert len(resolve([f"hf://{tmp_path / 'hub'}"])) == 2  # a unit per shard
    with pytest.raises(UserError, match="there is no folder"):
        resolve([f"hf://{tmp_path / 'absent'}"])
    with pytest.raises(UserError, match="should be hf://NAME"):
        resolve(["hf://"])
