"""A large file in parts holds what it holds as a whole."""

import gzip
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from planearly import keys
from planearly.data import documents
from planearly.data import tokenizer as tk
from planearly.data.build import tokenize_corpus
from planearly.data.dataset import TokenDataset
from planearly.data.divide import divided
from planearly.data.documents import Problems, Unit
from planearly.data.inputs import resolve
from planearly.data.readers import read_documents
from planearly.engine.local import Local
from planearly.errors import UserError
from small_documents import zstd

DATA = keys.Data(max_bad_share=0.9)
PACKED = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstd}


def odd_lines(seed: int) -> bytes:
    """Records of many lengths, and what else stands in a file of lines."""
    rng = np.random.default_rng(seed)
    lines = [json.dumps({"text": "\u00e9" + rng.bytes(2 * int(n)).hex(" ", 2), "source": "s"},
                        ensure_ascii=bool(n % 2)).encode() for n in rng.integers(0, 60, 80)]
    for place, odd in ((5, b""), (9, b"{broken"), (20, b"  "), (33, b'{"body": 1}'), (50, b"\xff")):
        lines.insert(place, odd)
    ends = rng.choice([b"\n", b"\r\n"], len(lines))
    return b"".join(line + end for line, end in zip(lines, ends, strict=True)).rstrip()


def read(units: list[Unit]):
    problems = Problems(1.0)
    found = [d for unit in units for d in read_documents(unit, DATA, problems)]
    return found, problems


@pytest.mark.parametrize("ending", PACKED)
@pytest.mark.parametrize("size", [100, 500, 3_000])
def test_lines_are_those_of_the_whole_file(tmp_path, monkeypatch, ending, size):
    monkeypatch.setattr("planearly.data.divide._BLOCK", 100)
    monkeypatch.setattr(documents, "_GROUP", size)
    path = tmp_path / f"a{ending}"
    path.write_bytes(PACKED[ending](odd_lines(size)))
    (unit,) = resolve([str(path)])
    parts = divided([unit], tmp_path / "parts", Local(1))
    assert len(parts) > 1 and {number for number, _ in parts} == {0}
    assert all(part.part and part.path == str(path) for _, part in parts)
    assert read([part for _, part in parts]) == read([unit])
    assert [Unit.from_json(json.loads(json.dumps(part.to_json()))) for _, part in parts] == [
        part for _, part in parts]
    assert sum(part.text_bytes for _, part in parts) == len(odd_lines(size))
    assert len(parts) <= 1.5 * len(odd_lines(size)) / size + 1
    monkeypatch.setattr(documents, "_GROUP", 2 * size)  # what was counted before is of other parts
    parts = divided([unit], tmp_path / "parts", Local(1))
    assert read([part for _, part in parts]) == read([unit])


def test_lines_that_begin_at_a_border_are_read_once(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(b'{"text": "%d"}\n' % i for i in range(10)))
    (unit,) = resolve([str(path)])
    whole = read([unit])
    for border in range(1, unit.size):
        before = path.read_bytes()[:border].count(b"\n")
        parts = [replace(unit, part=documents.Part(*place)) for place in (
            (0, border, 0, 1.0), (border, unit.size, before, 1.0))]
        assert read(parts) == whole


def test_row_groups_are_those_of_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_GROUP", 6_000)
    path = tmp_path / "a.parquet"
    texts = [f"{i} " * (i % 40 + 1) for i in range(500)]
    pq.write_table(pa.table({"text": texts, "n": range(500)}), path, row_group_size=10)
    (unit,) = resolve([str(path)])
    parts = [part for _, part in divided([unit], tmp_path / "parts", Local(1))]
    assert 3 < len(parts) < 50 and read(parts) == read([unit])
    pq.write_table(pa.table({"text": texts}), path)  # one group
    (unit,) = resolve([str(path)])
    parts = [part for _, part in divided([unit], tmp_path / "parts", Local(1))]
    assert read(parts) == read([unit])
    path.write_bytes(b"PAR1" + b"x" * 9_000 + b"PAR1")
    (unit,) = resolve([str(path)])
    assert divided([unit], tmp_path / "parts", Local(1)) == [(0, unit)]
    with pytest.raises(UserError, match="is damaged"):
        read([unit])


@pytest.mark.parametrize("content", [
    json.dumps([{"text": "a" * 50}] * 50).encode(),
    json.dumps([{"text": "a"}] * 90, indent=1).encode(),
    b"".join(json.dumps({"text": "b" * 50}).encode() + b"\r" for _ in range(50)),
    "".join(json.dumps({"text": "c" * 50}) + "\n" for _ in range(50)).encode("utf-16"),
    b'{"text": "only"}' + b" " * 3_000, b"\n" * 3_000])
def test_what_is_no_plain_lines_stays_whole(tmp_path, monkeypatch, content):
    monkeypatch.setattr(documents, "_GROUP", 500)
    (tmp_path / "a.json").write_bytes(content)
    (unit,) = resolve([str(tmp_path / "a.json")])
    assert divided([unit], tmp_path / "parts", Local(1)) == [(0, unit)]


def test_a_damaged_packed_file_is_the_same_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_GROUP", 500)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(map(odd_lines, range(40))))[:-400])
    (unit,) = resolve([str(path)])
    for fails in (lambda: divided([unit], tmp_path / "parts", Local(1)), lambda: read([unit])):
        with pytest.raises(UserError, match=r"a\.jsonl\.gz is damaged after line \d+ \(Compressed"):
            fails()


@pytest.mark.parametrize("ending", PACKED)
def test_a_dataset_of_a_divided_file_is_the_same(tmp_path, monkeypatch, ending):
    path = tmp_path / f"a{ending}"
    texts = [" ".join(np.random.default_rng(i % 90).choice(["sea", "ship", "12", "é"], 30))
             for i in range(100)]  # ten stand in it twice, far apart
    path.write_bytes(PACKED[ending]("".join(
        json.dumps({"text": text}) + "\n" for text in texts).encode() + b"{\n"))
    tk.save(tk.train(texts, keys.Tokenizer(vocab_size=300)), tmp_path / "tokenizer")
    monkeypatch.setattr("planearly.data.divide._BLOCK", 100)
    made = []
    for name, size, executor in (("whole", 1 << 20, Local(1)), ("parts", 800, Local(1)),
                                 ("two", 800, Local(2))):
        monkeypatch.setattr(documents, "_GROUP", size)
        monkeypatch.setattr("planearly.data.shards._POOL_MEGABYTES", 0)
        tokenize_corpus(resolve([str(path)]), tmp_path / "tokenizer", 16, DATA, tmp_path / name,
                        executor=executor)
        made.append(TokenDataset(tmp_path / name))
        assert not (tmp_path / name / "parts").exists()
    whole, *several = made
    for each in several:
        assert len(list(each.path.glob("tokens-*"))) > 3
        assert (each.documents == whole.documents).all()
        assert [each.tokens(w).tolist() for w in range(len(each))] == [
            whole.tokens(w).tolist() for w in range(len(whole))]
        assert {**each.meta, "key": ""} == {**whole.meta, "key": ""}
    assert [p.read_bytes() for p in sorted(several[0].path.iterdir())] == [
        p.read_bytes() for p in sorted(several[1].path.iterdir())]
