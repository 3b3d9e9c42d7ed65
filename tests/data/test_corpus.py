"""Reading documents, setting bad ones aside, and splitting domains."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planearly import keys
from planearly.data.corpus import Problems, Section, read_documents, resolve
from planearly.data.domains import domain_names, domain_splits
from planearly.errors import UserError

DATA = keys.Data()
SHARED = Path(__file__).parents[3] / "shared" / "data"


def read(*paths, data: keys.Data = DATA):
    problems = Problems(data.max_bad_share)
    documents = [d for unit in resolve([str(p) for p in paths])
                 for d in read_documents(unit, data, problems)]
    problems.check()
    return documents, problems


def texts(*paths, data: keys.Data = DATA) -> list[str]:
    return [document.text for document in read(*paths, data=data)[0]]


def lines(*records) -> bytes:
    return b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n"
                    for r in records)


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


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


# Domains


def split_texts(root, entry, seed: int = 0, data: keys.Data = DATA) -> dict[str, list[str]]:
    return {split: [d.text for unit in units for d in read_documents(unit, data, Problems(0.01))]
            for split, units in domain_splits(str(root) if root else None, str(entry), data,
                                              seed).items()}


@pytest.mark.parametrize("names", [
    ("train.jsonl", "valid.jsonl", "test.jsonl"),
    ("train.txt", "validation.txt", "test.txt"),
    ("train/a.jsonl", "dev/a.jsonl", "test/a.jsonl"),
    ("train-00000-of-00001.jsonl", "val.jsonl", "test_set.jsonl"),
])
def test_a_split_folder_is_taken_as_it_is(tmp_path, names):
    for name in (*names, "README.md"):
        path = tmp_path / "law" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lines({"text": name}) if "json" in name else name.encode())
    found = split_texts(tmp_path, "law")
    assert found == {"train": [names[0]], "valid": [names[1]], "test": [names[2]]}
    assert split_texts(None, tmp_path / "law") == found
    assert domain_names(str(tmp_path)) == ["law"]


def test_missing_splits_are_split_off_train(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(lines(*({"text": f"t{i}"} for i in range(50))))
    (tmp_path / "test.jsonl").write_bytes(lines({"text": "kept"}))
    found = split_texts(None, tmp_path)
    assert found["test"] == ["kept"] and len(found["valid"]) == 5 and len(found["train"]) == 45


def test_only_a_test_split_is_an_error(tmp_path):
    (tmp_path / "test.jsonl").write_bytes(lines({"text": "x"}))
    with pytest.raises(UserError, match="has a test split but no train split"):
        domain_splits(None, str(tmp_path), DATA, 0)


def test_a_page_called_test_is_not_a_split(tmp_path):
    for name in ("install", "train", "test", "use", "more"):
        (tmp_path / f"{name}.md").write_text(f"about {name}")
    found = split_texts(None, tmp_path)
    assert sorted(sum(found.values(), [])) == sorted(  # noqa: RUF017
        f"about {n}" for n in ("install", "train", "test", "use", "more"))
    assert [len(found[s]) for s in ("train", "valid", "test")] == [3, 1, 1]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(3, 60), seed=st.integers(0, 5), repeats=st.integers(1, 3))
def test_splits_by_document_are_disjoint_complete_and_never_empty(tmp_path_factory, n, seed,
                                                                 repeats):
    path = tmp_path_factory.mktemp("domain") / "mine.jsonl"
    path.write_bytes(lines(*({"text": f"document {i}"} for i in range(n))) * repeats)
    found = split_texts(None, path, seed)
    sets = {split: set(found[split]) for split in found}
    assert set.union(*sets.values()) == {f"document {i}" for i in range(n)}
    assert sum(len(s) for s in sets.values()) == n  # equal documents stay together
    held = max(1, round(0.1 * n))
    assert len(sets["valid"]) == len(sets["test"]) == held
    assert split_texts(None, path, seed) == found


def test_the_split_depends_on_seed_and_text_not_on_place(tmp_path):
    records = [{"text": f"document {i}"} for i in range(40)]
    (tmp_path / "a.jsonl").write_bytes(lines(*records))
    (tmp_path / "b.jsonl").write_bytes(lines(*records[::-1]))
    a, b = split_texts(None, tmp_path / "a.jsonl"), split_texts(None, tmp_path / "b.jsonl")
    assert {s: sorted(t) for s, t in a.items()} == {s: sorted(t) for s, t in b.items()}
    assert split_texts(None, tmp_path / "a.jsonl", seed=1)["test"] != a["test"]


def test_one_long_document_is_cut_between_paragraphs(tmp_path):
    paragraphs = [f"Paragraph {i}.\nIts second line." for i in range(20)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    found = split_texts(None, tmp_path / "book.txt")
    assert found == {"train": ["\n\n".join(paragraphs[:16])],
                     "valid": ["\n\n".join(paragraphs[16:18])],
                     "test": ["\n\n".join(paragraphs[18:])]}


def test_three_sentences(tmp_path):
    (tmp_path / "lines.txt").write_text("One.\nTwo.\nThree.\n")
    assert split_texts(None, tmp_path / "lines.txt") == {
        "train": ["One."], "valid": ["Two."], "test": ["Three."]}
    (tmp_path / "records.jsonl").write_bytes(lines(*({"text": t} for t in "abc")))
    assert sorted(map(len, split_texts(None, tmp_path / "records.jsonl").values())) == [1, 1, 1]
    (tmp_path / "line.txt").write_text("One. Two. Three.")
    with pytest.raises(UserError, match=r"1 distinct document: .* least 3 documents, or 3 para"):
        domain_splits(None, str(tmp_path / "line.txt"), DATA, 0)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=r"holds no documents; .*empty"):
        domain_splits(None, str(tmp_path / "empty.txt"), DATA, 0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["a", "bb", "c c", "\n", "\n\n", " \n \n", "d"]), max_size=25),
       st.sampled_from([("train", "valid"), ("train", "valid", "test")]),
       st.floats(0.01, 0.49))
def test_sections_are_in_order_and_lose_no_word(parts, splits, held_out):
    text = "".join(parts).strip()
    taken = [Section(split, splits, held_out).take(text) for split in splits]
    assert " ".join(" ".join(taken).split()) == " ".join(text.split())
    assert all(taken) or (taken[0] == text and not any(taken[1:]))


def test_unknown_domain_and_root(tmp_path):
    with pytest.raises(UserError, match="the domain 'lw' exists neither under domains_root"):
        domain_splits(str(tmp_path), "lw", DATA, 0)
    with pytest.raises(UserError, match="the domain 'lw' does not exist"):
        domain_splits(None, "lw", DATA, 0)
    with pytest.raises(UserError, match="is not a folder"):
        domain_names(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="no subfolders"):
        domain_names(str(tmp_path))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not on this machine")
def test_real_domains():
    names = domain_names(str(SHARED / "domains"))
    assert len(names) == 9
    splits = domain_splits(str(SHARED / "domains"), "europarl", DATA, 0)
    problems = Problems(0.01)
    counts = {split: sum(1 for unit in units for _ in read_documents(unit, DATA, problems))
              for split, units in splits.items()}
    assert counts == {"train": 450, "valid": 65, "test": 52} and problems.bad == 0
