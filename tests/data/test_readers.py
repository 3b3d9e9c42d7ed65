"""Reading documents, finding them, and setting bad ones aside."""

from __future__ import annotations

import codecs
import contextlib
import datetime
import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from planearly import files, keys
from planearly.data import jsonlines
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
    with pytest.raises(UserError, match=r"a\.parquet is damaged.*: copy or download it"):
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


def test_a_name_that_begins_like_an_unknown_user_s_is_a_file_s(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~nosuch.txt").write_text("a text")
    assert [unit.path for unit in resolve(["~nosuch.txt"])] == ["~nosuch.txt"]


def test_nothing_there(tmp_path):
    (tmp_path / "image.png").write_bytes(b"x")
    for entry, message in ((tmp_path / "absent", "does not exist"),
                           (tmp_path, "holds no documents"),
                           (tmp_path / "*.jsonl", "holds no documents"),
                           (tmp_path / "image.png", "cannot tell its format")):
        with pytest.raises(UserError, match=message):
            resolve([str(entry)])
    with pytest.raises(UserError, match=r"~nosuch/law\.jsonl does not exist: check"):
        resolve(["~nosuch/law.jsonl"])
    with pytest.raises(UserError, match="no documents are named"):
        resolve([])


BAD = [
    (b'{"text": "cut off', "broken JSON at column 10: unterminated string starting"),
    (b'{"text": "caf\xe9"}', "not valid UTF-8"),
    ({"body": "x", "id": 2}, "no field 'text' (it has body, id); "
     "data.text_field (of evaluate: --text-field) names another"),
    ({}, "no field 'text' (it has no fields); "
     "data.text_field (of evaluate: --text-field) names another"),
    ({"planearly": "histogram"}, "a domain's histogram, not documents: a recipe takes the file "
                                 "itself, unpacked and ending in .json"),
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
    (tmp_path / "d.jsonl").write_bytes(b"\n \n")
    documents, problems = read(tmp_path)
    assert len(documents) == 1 and (problems.bad, problems.empty) == (0, 5)
    assert [example["why"] for example in problems.examples] == [
        *["the text is empty"] * 2, *["the file is empty"] * 2, "the file holds no records"]


def test_a_text_file_that_is_not_utf8_is_left_out(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthree\ncaf\xe9")
    (tmp_path / "b.txt").write_bytes(b"fine")
    documents, problems = read(tmp_path)
    assert [d.text for d in documents] == ["fine"]
    assert problems.examples[0]["line"] == 4 and "UTF-8" in problems.examples[0]["why"]


def test_too_many_bad_records_stop_the_work(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(*[{"text": "good"}] * 297, *[b"{"] * 3))
    assert read(path)[1].bad == 3  # exactly 1%
    path.write_bytes(lines(*[{"text": "good"}] * 296, *[b"{"] * 3))
    with pytest.raises(UserError, match=(
            r"3 of 299 records.*more than 1\.00% \(of a recipe: data\.max_bad_share\).*line 297")):
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


PRETTY = json.dumps([{"text": "one"}, {"text": "two"}, {"text": "three"}], indent=2)


@pytest.mark.parametrize("name, text, lines_of", [
    ("list.json", '[{"text": "one"}, {"text": "two"},\n{"text": "three"}]', [1, 1, 2]),
    ("list.json", PRETTY, [2, 5, 8]), ("list.jsonl", PRETTY, [2, 5, 8]),
    ("one.json", '{"text": "one"}{\n"text": "two"\n}\n\n{"text": "three"}', [1, 1, 5]),
])
def test_json_over_several_lines(tmp_path, name, text, lines_of):
    (tmp_path / name).write_text(text)
    documents, problems = read(tmp_path)
    assert [(d.text, d.line) for d in documents] == list(
        zip(["one", "two", "three"], lines_of, strict=True))
    assert problems.bad == problems.empty == 0
    for cut in range(1, len(text) - 1, 7):  # broken somewhere: told, whatever it is taken for
        (tmp_path / name).write_text(text[:cut])
        with contextlib.suppress(UserError):
            assert (found := read(tmp_path)[1]).good + found.bad + found.empty > 0


def test_a_json_list_too_large_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonlines, "_MOST_WHOLE", 1 << 20)
    (tmp_path / "a.json").write_text('[{"text": "x"}]' + " " * (1 << 20))
    with pytest.raises(UserError, match="one JSON list of more than 1 MB; write one object per"):
        read(tmp_path)


TEXT = "Первая строка, 中文.\nSecond line with words\nthird\n"
JSON = lines({"text": "first é"}, {"text": "second"}).decode()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be",
                                      "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(tmp_path, encoding, end):
    (tmp_path / "a.txt").write_bytes(TEXT.replace("\n", end).encode(encoding))
    (tmp_path / "b.jsonl").write_bytes(JSON.replace("\n", end).encode(encoding))
    documents, problems = read(tmp_path)
    assert [d.text for d in documents] == [TEXT, "first é", "second"]
    assert list(problems.guessed.values()) == [encoding] * (2 * encoding.endswith(("le", "be")))


@pytest.mark.parametrize("data, why", [
    ("naïve café".encode("latin-1"), "not valid UTF-8"),
    ("中文没有空格".encode("utf-16-le"), "not valid UTF-8"),
    (bytes(range(256)) * 9, "it holds control characters, as binary data does"),
    (b"\x00\x01\x02\x03" * 99, "it holds control characters, as binary data does"),
    (codecs.BOM_UTF16_LE + b"abc", "not valid UTF-8"),
])
def test_a_text_in_no_known_encoding_is_left_out(tmp_path, data, why):
    (tmp_path / "a.txt").write_bytes(data)
    documents, problems = read(tmp_path)
    assert not documents and problems.bad == 1
    assert problems.examples[0]["why"] == f"{why}; the file is left out"


def test_half_a_utf16_file_is_damaged(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(JSON.encode("utf-16")[:-5] + b"\xd8")
    with pytest.raises(UserError, match="is damaged after line 1"):
        read(tmp_path)


@pytest.mark.parametrize("record, why", [
    (b'{"text": "a", "text": "b"}', "field 'text' stands in it twice"),
    (b'{"text": NaN}', "field 'text' holds a number, not text"),
    (b'{"te\\ud83dxt": 1}', "no field 'text' (it has te\\ud83dxt); "
     "data.text_field (of evaluate: --text-field) names another"),
])
def test_odd_records_are_set_aside(tmp_path, record, why):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good", "n": Infinity}\n' + record + b"\n")
    documents, problems = read(tmp_path)
    assert [d.text for d in documents] == ["good"]
    assert problems.examples[0]["why"] == why


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_numbers_of_any_length_are_beside_the_text(tmp_path, name):
    long = '{"id": 1' + "0" * 5000 + ', "text": "kept", "x": NaN}'
    text = f'{long}\n{{"text": "too"}}\n' if name == "a.jsonl" else f'[{long},\n {{"text": "too"}}]'
    (tmp_path / name).write_text(text)
    found, problems = read(tmp_path)
    assert [one.text for one in found] == ["kept", "too"] and not problems.bad
    (tmp_path / name).write_text(text.replace('"id"', '"text": "lost", "id"'))
    found, problems = read(tmp_path)
    assert [one.text for one in found] == ["too"]
    assert problems.examples[0]["why"] == "field 'text' stands in it twice"


def test_fields_of_records_inside_are_their_own(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "one", "more": {"text": "two"}}\n{"text": "a \\"text\\" b"}\n')
    assert texts(tmp_path) == ["one", 'a "text" b']


def test_names_that_are_not_unicode(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    for name in (b"a\xff.txt", b"line\nend.txt"):
        with open(folder + b"/" + name, "wb") as handle:
            handle.write(b"some text")
    (tmp_path / "b.jsonl").write_bytes(
        b'{"text": "x", "source": "bad \\ud83d name"}\n{"text": "y", "source": "a\\nb"}\n{\n')
    documents, problems = read(tmp_path)
    assert [d.source for d in documents] == [
        "bad \\ud83d name", "a\\nb", "caf\\udce9", "caf\\udce9"]
    files.write_json(tmp_path / "told.json", [problems.to_dict(), [d.file for d in documents]])
    assert files.read_json(tmp_path / "told.json")[1][2] == documents[2].file


def test_packed_files_of_nothing_and_with_padding(tmp_path):
    packed = gzip.compress(lines({"text": "x"}))
    for name, data in (("a.jsonl.gz", gzip.compress(b"")), ("b.jsonl.zst", zstd(b"")),
                       ("c.jsonl.gz", packed + bytes(700)), ("d.jsonl", b"\n \n"),
                       ("e.jsonl.gz", packed + packed)):
        (tmp_path / name).write_bytes(data)
    documents, problems = read(tmp_path)
    assert len(documents) == 3 and problems.empty == 3
    for cut in (1, 9, 11, len(packed) - 1):
        (tmp_path / "c.jsonl.gz").write_bytes(packed[:cut])
        with pytest.raises(UserError, match=r"c\.jsonl\.gz is damaged after line \d"):
            read(tmp_path)
    packed = zstd(lines({"text": "x"}))
    for cut in (1, 9, len(packed) - 1):
        (tmp_path / "c.jsonl.gz").unlink(missing_ok=True)
        (tmp_path / "c.jsonl.zst").write_bytes(packed[:cut])
        with pytest.raises(UserError, match=r"c\.jsonl\.zst is damaged after line \d"):
            read(tmp_path)


@pytest.mark.parametrize("column, told", [
    (pa.array([b"one", b"two"]), None), (pa.array([b"one", b"\xff", b"two"]), "not valid UTF-8"),
    (pa.array(["one", "two"], pa.large_string()), None),
    (pa.array(["one", "two"]).dictionary_encode(), None),
    (pa.array(["one", "two", None]), "field 'text' holds a null, not text"),
    (pa.array([None, None], pa.null()), "field 'text' holds a null, not text"),
])
def test_parquet_columns_that_hold_text(tmp_path, column, told):
    sources = pa.array([datetime.date(9999, 1, 1)] * len(column))
    pq.write_table(pa.table({"text": column, "source": sources}), tmp_path / "a.parquet")
    documents, problems = read(tmp_path)
    if column.type != pa.null():
        assert [(d.text, d.source) for d in documents] == [("one", "a"), ("two", "a")]
    assert [e["why"] for e in problems.examples][:1] == ([told] if told else [])


def test_bytes_are_decoded_as_files_are_and_binary_text_is_set_aside(tmp_path):
    text = "A letter to the editor of the paper"
    rows = [text.encode(), text.encode("utf-16"), text.encode("utf-16-le"), bytes(range(30)) * 9]
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet")
    documents, problems = read(tmp_path / "a.parquet")
    assert [d.text for d in documents] == [text] * 3
    assert problems.bad == 1 and "control characters" in problems.first()
    assert list(problems.guessed.values()) == ["utf-16-le"]
    (tmp_path / "b.jsonl").write_bytes(lines({"text": "\0".join(text)}, {"text": "a\x0bb\x01\0"}))
    documents, problems = read(tmp_path / "b.jsonl")
    assert [d.line for d in documents] == [2] and "control characters" in problems.first()


def test_a_few_control_characters_are_no_binary_data(tmp_path):
    for number in (0, 3, 50, 51):  # of 1,000
        text = "\0" * number + "a" * (1000 - number)
        (tmp_path / f"{number}.jsonl").write_bytes(lines({"text": text}, {"text": "good"}))
        documents, problems = read(tmp_path / f"{number}.jsonl")
        assert (len(documents), problems.bad) == ((1, 1) if number > 50 else (2, 0))


def test_parquet_columns_that_do_not(tmp_path):
    for column in (pa.array([1]), pa.array([["a"]]), pa.array([{"x": "a"}]), pa.array([True])):
        pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
        with pytest.raises(UserError, match=r"column 'text' holds .*, not text"):
            read(tmp_path)
    doubled = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(doubled, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="has 2 columns 'text': rename all but one"):
        read(tmp_path)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    assert read(tmp_path)[1].empty == 1


def test_links_are_followed_once_and_what_cannot_be_read_is_told(tmp_path, capsys):
    real, other = tmp_path / "real", tmp_path / "other"
    for folder in (real / "deep", other):
        folder.mkdir(parents=True)
    (real / "a.txt").write_text("a")
    (real / "deep" / "b.txt").write_text("b")
    (other / "c.txt").write_text("c")
    (real / "scan.pdf").write_text("x")
    (real / "loop").symlink_to(real)
    (real / "self").symlink_to(real / "self")
    (real / "linked").symlink_to(other)
    (real / "again").symlink_to(other)
    (real / "same.txt").symlink_to(real / "a.txt")
    (real / "gone.jsonl").symlink_to("nowhere.jsonl")
    os.mkfifo(real / "pipe.txt")
    assert sorted(texts(real)) == ["a", "b", "c"]
    told = capsys.readouterr().err
    for part in ("gone.jsonl is passed over: a link that leads nowhere",
                 "pipe.txt is passed over: it is no regular file",
                 "2 files are passed over, as their names say no known format (.pdf 1, self 1)"):
        assert part in told
    for entry, message in (("pipe.txt", "neither a file nor a folder"), ("self", "leads nowhere"),
                           ("gone.jsonl", "is a link that leads nowhere: mend or remove it")):
        with pytest.raises(UserError, match=message):
            resolve([str(real / entry)])
    assert texts(real / "*.txt") == ["a"]


def test_of_what_is_passed_over_the_most_frequent_kinds_are_told(tmp_path, capsys):
    for kind, many in (("pdf", 2), ("png", 5), ("doc", 1), ("css", 1), ("xls", 3), ("JPG", 2)):
        for i in range(many):
            (tmp_path / f"{i}.{kind}").touch()
    (tmp_path / "a.txt").write_text("text")
    assert len(resolve([str(tmp_path)])) == 1
    assert ("14 files are passed over, as their names say no known format "
            "(.png 5, .xls 3, .jpg 2, .pdf 2, ...)") in capsys.readouterr().err


def test_a_file_that_changes_or_goes_after_it_was_listed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "x"}))
    unit = resolve([str(path)])[0]
    path.write_bytes(lines({"text": "x"}, {"text": "y"}))
    with pytest.raises(UserError, match="has changed since it was listed: start again"):
        list(read_documents(unit, DATA, Problems(0.01)))
    path.unlink()
    with pytest.raises(UserError, match=r"a\.jsonl does not exist"):
        list(read_documents(unit, DATA, Problems(0.01)))


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser reads everything")
def test_what_may_not_be_read(tmp_path, capsys):
    (tmp_path / "closed").mkdir(mode=0)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(UserError, match=r"cannot read .*a\.txt \(Permission denied\)"):
        read(tmp_path)
    assert "closed is passed over: it cannot be read" in capsys.readouterr().err


def test_a_broken_record_of_a_hub_folder_is_named(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_bytes(lines(*[{"text": "x"}] * 5, b'{"text": broken'))
    with pytest.raises(UserError, match=r"shard 1 of 1 cannot be read after row \d"):
        read(f"hf://{tmp_path}")


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


def test_a_source_may_stand_inside_another_field(tmp_path):
    records = [{"text": "a", "meta": {"set": "x"}}, {"text": "b", "meta": None}]
    (tmp_path / "lines.jsonl").write_bytes(lines(*records, {"text": "c", "meta.set": "z"}))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "table.parquet")
    for name, found in (("lines.jsonl", ["x", "lines", "z"]), ("table.parquet", ["x", "table"])):
        documents, _ = read(tmp_path / name, data=keys.Data(source_field="meta.set"))
        assert [document.source for document in documents] == found
