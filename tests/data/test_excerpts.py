"""The text that a tokenizer is trained on: the same of the same documents, fair to all files."""

from __future__ import annotations

import gzip
import json
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from planearly import keys
from planearly.data import documents, excerpts
from planearly.data.documents import Problems, Unit
from planearly.data.excerpts import hand_over
from planearly.data.inputs import resolve
from planearly.engine.local import Local
from planearly.engine.work import shard_function
from small_documents import lines, zstd

DATA = keys.Data()


def written(path, texts):
    """A file of some texts, by its ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = lines(*({"text": text} for text in texts))
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path)
    else:
        path.write_bytes({".gz": gzip.compress, ".zst": zstd}.get(path.suffix, bytes)(data))
    return path


def drawn(path, n_bytes, folder, **more):
    return excerpts.draw(resolve([str(path)]), DATA, n_bytes, Problems(0.01), folder, **more)


def first(texts, n_bytes):
    """The definition: short texts in the order of their hashes, until there are enough."""
    order = sorted(texts, key=lambda text: blake2b(text.encode(), digest_size=8).digest())
    ends = np.cumsum([len(text) for text in order])
    return order[:int(np.searchsorted(ends, n_bytes)) + 1]


@examples(20)
@given(st.lists(st.sampled_from([".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"]), min_size=1,
                max_size=4), st.randoms(use_true_random=False), st.sampled_from([1, 700, 10**6]))
def test_a_sample_depends_on_the_documents_alone(tmp_path_factory, endings, random, n_bytes):
    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"{i} " + "word " * (i % 29) + "end" for i in range(200)]
    expected = first(texts, n_bytes)
    random.shuffle(texts)
    cuts = sorted(random.choices(range(1, 200), k=len(endings) - 1))
    for i, (begin, end) in enumerate(zip([0, *cuts], [*cuts, 200], strict=True)):
        written(folder / "in" / f"{random.randrange(10**6)}-{i}{endings[i]}",
                texts[begin:end] or [""])
    assert drawn(folder / "in", n_bytes, folder / "out") == expected
    assert not (folder / "out").exists()


def test_any_number_of_processes_draws_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_GROUP", 3_000)
    monkeypatch.setattr(excerpts, "_SMALL", 0.0)
    texts = [f"{i} " + "x" * 90 for i in range(500)]
    for i in range(10):
        written(tmp_path / "in" / f"{i}.jsonl", texts[50 * i:50 * i + 50])
    for processes in (1, 2):
        found = drawn(tmp_path / "in", 2_000, tmp_path / "out", executor=Local(processes))
        assert found == first(texts, 2_000)
    one, read = written(tmp_path / "one.jsonl", texts), []
    monkeypatch.setattr(excerpts, "hand_over", shard_function(lambda item, advance: (
        read.append(len(item["units"])), hand_over(item, advance))[1]))
    assert drawn(one, 2_000, tmp_path / "out", executor=Local(1)) == first(texts, 2_000)
    assert len(read) > 10  # in ranges of bytes


@pytest.mark.parametrize("guess", [0.001, 1_000])
def test_wrong_guesses_of_sizes_change_nothing(tmp_path, monkeypatch, guess):
    monkeypatch.setattr(documents, "_PACKED", guess)
    texts = [f"{i} " + "x" * 90 for i in range(300)]
    written(tmp_path / "a.jsonl.gz", texts)
    assert drawn(tmp_path / "a.jsonl.gz", 5_000, tmp_path / "out",
                 executor=Local(1)) == first(texts, 5_000)


def test_what_was_handed_over_is_used_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_GROUP", 5_000)
    texts = [f"{i} " + "x" * 90 for i in range(500)]
    for i in range(10):
        written(tmp_path / "in" / f"{i}.jsonl", texts[50 * i:50 * i + 50])
    calls, whole = [], excerpts.read_documents

    def read(unit, *rest):
        calls.append(unit.path)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return whole(unit, *rest)

    monkeypatch.setattr(excerpts, "read_documents", read)
    with pytest.raises(KeyboardInterrupt):
        drawn(tmp_path / "in", 2_000, tmp_path / "out", executor=Local(1))
    assert drawn(tmp_path / "in", 2_000, tmp_path / "out", executor=Local(1)) == first(texts, 2_000)
    assert len(calls) == 11  # the one that was interrupted is read again


def test_the_hub_gives_its_share(tmp_path, monkeypatch):
    written(tmp_path / "a.jsonl", [f"local {i} " + "x" * 90 for i in range(200)])
    monkeypatch.setattr("planearly.data.hub.records", lambda unit, columns: (
        {"text": f"hub {i} " + "x" * 90} for i in range(10**6)))
    here = resolve([str(tmp_path / "a.jsonl")])
    for size, least, most in ((0, 1, 1), (here[0].size, 0.2, 0.95)):  # 0: taken for 500 MB
        found = excerpts.draw([*here, Unit("hf://x", "hub", size)], DATA, 5_000, Problems(0.01),
                              tmp_path / "out", executor=Local(1))
        assert 5_000 <= sum(map(len, found)) < 5_200
        assert least <= np.mean([text.startswith("hub") for text in found]) <= most


def test_what_is_read_of_the_hub_stands_for_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(excerpts, "READ_AHEAD", 5)
    written(tmp_path / "a.jsonl", [f"local {i} " + "x" * 90 for i in range(2_000)])
    monkeypatch.setattr("planearly.data.hub.records", lambda unit, columns: (
        {"text": f"hub {i} " + "x" * 90} for i in range(10**6)))
    here = resolve([str(tmp_path / "a.jsonl")])
    found = excerpts.draw([*here, Unit("hf://x", "hub", here[0].size)], DATA, 20_000,
                          Problems(0.01), tmp_path / "out", executor=Local(1))
    assert 0.35 < np.mean([text.startswith("hub") for text in found]) < 0.65


def test_long_documents_are_cut(tmp_path):
    (tmp_path / "long.txt").write_text("word and more " * 20_000)
    found = drawn(tmp_path / "long.txt", 100_000, tmp_path / "out")
    assert 100_000 <= sum(map(len, found)) < 100_000 + 65_536
    assert max(map(len, found)) <= 65_536


def test_what_could_not_be_read_is_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "one"}, b"{", {"text": ""}))
    problems = Problems(0.5)
    excerpts.draw(resolve([str(tmp_path / "a.jsonl")]), DATA, 100, problems, tmp_path / "out")
    assert (problems.good, problems.bad, problems.empty) == (1, 1, 1)
    assert json.loads(json.dumps(problems.to_dict()))["examples"]
