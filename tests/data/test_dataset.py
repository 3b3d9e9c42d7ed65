"""Token datasets: windows, duplicates, reading."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from examples import examples
from planearly import keys
from planearly.data import build, documents, duplicates, shards
from planearly.data import tokenizer as tk
from planearly.data.build import tokenize_corpus
from planearly.data.dataset import IGNORE, TokenDataset
from planearly.data.inputs import resolve
from planearly.engine.local import Local
from planearly.errors import UserError
from small_datasets import content, make, prose, write

SHARED = Path(__file__).parents[3] / "shared" / "data"


@examples(40)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"])
                              | st.sampled_from("\n\t\r\v\x1b\x7f\x85"), min_size=1, max_size=120)
                      .filter(lambda t: not t.isspace()), min_size=1, max_size=6),
       context=st.integers(8, 20))
def test_every_token_is_predicted_once_in_order(tmp_path_factory, tokenizer, texts, context):
    folder = tmp_path_factory.mktemp("corpus")
    dataset = make(write(folder / "a.jsonl", texts), tokenizer, folder / "out", context)
    loaded = tk.load(tokenizer)
    unique = [t for i, t in enumerate(texts)
              if " ".join(t.split()) not in {" ".join(o.split()) for o in texts[:i]}]
    assert len(dataset.documents) == len(unique)
    inputs, targets = dataset.rows([np.array([i]) for i in range(len(dataset))])
    for number, text in enumerate(unique):
        mine = np.flatnonzero(dataset.windows["document"] == number)
        stream = [0, *loaded.encode(text, add_special_tokens=False).ids, 0]
        seen, shown = [], []
        for window in mine:
            length = int(dataset.windows["length"][window])
            assert length == context or window == mine[-1]
            assert (targets[window, length:] == IGNORE).all()
            seen += targets[window, :length].tolist()
            shown += inputs[window, :length].tolist()
        assert seen == stream[1:] and shown == stream[:-1]
        assert dataset.documents["bytes"][number] == len(text.encode())
    assert dataset.meta["n_tokens"] == dataset.windows["length"].sum()
    assert dataset.meta["n_bytes"] == dataset.documents["bytes"].sum()
    assert dataset.meta["n_windows"] == len(dataset) and dataset.meta["eot"] == 0


def test_rows_lay_windows_side_by_side(tmp_path, corpus, tokenizer):
    for name in "ab":
        write(corpus / f"{name}.jsonl", [prose(ord(name) * 100 + i, 5) for i in range(20)])
    units = resolve([str(corpus)])
    work = shards.jobs(list(enumerate(units)), tokenizer, keys.Data(), tmp_path / "out")
    assert len(work) == 1  # small files share a job
    dataset = make(corpus, tokenizer, tmp_path / "out", 64)
    pairs = [np.array([3, 17]), np.array([39]), np.array([], int), np.array([5, 30, 8])]
    inputs, targets = dataset.rows(pairs)
    assert inputs.shape == targets.shape == (4, 64) and inputs.dtype == targets.dtype == np.int64
    for row, pair in enumerate(pairs):
        tokens = [dataset.tokens(w).astype(int) for w in pair]
        expected = np.concatenate([[], *(t[1:] for t in tokens)])
        assert targets[row].tolist() == [*expected, *[IGNORE] * (64 - len(expected))]
        expected = np.concatenate([[], *(t[:-1] for t in tokens)])
        assert inputs[row].tolist() == [*expected, *[0] * (64 - len(expected))]
    with pytest.raises(ValueError, match="more than 64"):
        dataset.rows([np.arange(30)])


def test_texts_decode_without_end_tokens(tmp_path, tokenizer):
    texts = [prose(1), "short"]
    dataset = make(write(tmp_path / "a.jsonl", texts), tokenizer, tmp_path / "out", 1_000)
    loaded = tk.load(tokenizer)
    assert dataset.texts([1, 0], loaded) == ["short", texts[0]]
    assert dataset.text(0, loaded) == texts[0]
    assert dataset.place(1) == f"{tmp_path / 'a.jsonl'} line 2"


def test_duplicates_are_dropped_and_the_first_stays(tmp_path, corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(duplicates, "_RANGE", 3)  # several ranges of hashes
    monkeypatch.setattr(build, "_CHUNK", 2)
    texts = [prose(i, 3 + i) for i in range(10)]
    write(corpus / "a.jsonl", [*texts[:5], texts[2], texts[0].replace(" ", "\n ")], source="one")
    write(corpus / "b.jsonl", [texts[4], *texts[5:]], source="two")
    dataset = make(corpus, tokenizer, tmp_path / "out", 1_000)
    assert dataset.texts(np.arange(10), tk.load(tokenizer)) == texts
    assert dataset.meta["duplicates"] == 3
    assert dataset.documents["line"].tolist() == [1, 2, 3, 4, 5, 2, 3, 4, 5, 6]
    assert dataset.documents["unit"].tolist() == [0] * 5 + [1] * 5
    assert dataset.meta["sources"] == ["one", "two"]
    lengths = dataset.windows["length"]
    assert dataset.meta["source_tokens"] == [lengths[:5].sum(), lengths[5:].sum()]


def test_duplicates_of_any_shards_are_found_by_any_worker(tmp_path, corpus, tokenizer,
                                                          monkeypatch):
    """As one dictionary of all hashes finds them, whatever the ranges and whoever looks."""
    monkeypatch.setattr(documents, "_GROUP", 300)
    rng, texts = np.random.default_rng(0), [prose(i, 4) for i in range(40)]
    said = [[texts[i] for i in rng.integers(0, 40, 12)] for _ in range(5)]
    for name, some in enumerate(said):
        write(corpus / f"{name}.jsonl", some)
    first: dict[str, tuple[int, int]] = {}
    for unit, some in enumerate(said):
        for line, text in enumerate(some, 1):
            first.setdefault(text, (unit, line))
    found = {}
    for name, size, many in (("one", 1 << 20, 1), ("ranges", 7, 1), ("workers", 7, 2)):
        monkeypatch.setattr(duplicates, "_RANGE", size)
        monkeypatch.setattr(duplicates, "_SMALL", 0 if many > 1 else 1e9)
        dataset = make(corpus, tokenizer, tmp_path / name, executor=Local(many))
        records = dataset.documents
        assert sorted(zip(records["unit"].tolist(), records["line"].tolist(), strict=True)) == \
            sorted(first.values())
        found[name] = content(tmp_path / name)
    assert found["one"] == found["ranges"] == found["workers"]


def test_windows_of_documents_and_of_all_but_some(tmp_path, corpus, tokenizer, monkeypatch):
    texts = [prose(i, 5 + 20 * (i % 3)) for i in range(9)]
    dataset = make(write(corpus / "a.jsonl", texts), tokenizer, tmp_path / "out")
    of = dataset.windows["document"].astype(int)
    for some in ([4, 0, 8], [3], [], range(9)):
        assert dataset.windows_of(np.array(some, np.int64)).tolist() == [
            window for document in some for window in np.flatnonzero(of == document)]
    excluded = np.isin(np.arange(9), [0, 4, 5])
    for chunk in (1 << 20, 7, 2):
        monkeypatch.setattr("planearly.data.dataset._CHUNK", chunk)
        assert dataset.windows_without(excluded).tolist() == np.flatnonzero(
            ~excluded[of]).tolist()


def test_one_huge_document(tmp_path, tokenizer):
    text = "\n".join(prose(i, 500) for i in range(1_000))
    (tmp_path / "huge.txt").write_text(text)
    dataset = make(tmp_path / "huge.txt", tokenizer, tmp_path / "out", 128)
    assert len(dataset.documents) == 1 and dataset.meta["n_bytes"] == len(text.encode())
    ids = np.concatenate([dataset.tokens(w)[1:] for w in range(len(dataset))])
    assert ids[-1] == 0 and (ids[:-1] != 0).all()
    assert tk.load(tokenizer).decode(ids[:-1].tolist(), skip_special_tokens=False) == text


def test_wide_vocabulary_takes_four_bytes(tmp_path, tokenizer):
    narrow = make(write(tmp_path / "a.jsonl", [prose(1)]), tokenizer, tmp_path / "narrow")
    wider = tk.load(tokenizer)
    wider.add_tokens([f"extra{i}" for i in range(70_000)])
    tk.save(wider, tmp_path / "wider")
    wide = make(tmp_path / "a.jsonl", tmp_path / "wider", tmp_path / "wide")
    assert (narrow.meta["dtype"], wide.meta["dtype"]) == ("<u2", "<u4")
    assert (narrow.rows([[0]])[1] == wide.rows([[0]])[1]).all()


def test_empty_corpus_is_one_sentence(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", ["", " "])
    with pytest.raises(UserError, match=r"the domain's text: no documents .*a\.jsonl.* is empty"):
        make(tmp_path / "a.jsonl", tokenizer, tmp_path / "out", name="the domain's text")
    with pytest.raises(UserError, match="does not exist"):
        TokenDataset(tmp_path / "out")


def test_text_that_the_tokenizer_does_not_know_is_refused(tmp_path):
    known = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "sea": 2}, unk_token="<unk>"))
    known.pre_tokenizer = pre_tokenizers.Whitespace()
    tk.save(known, tmp_path / "tok", "</s>")
    write(tmp_path / "a.jsonl", ["sea " * 99 + "bo", "sea"])
    assert make(tmp_path / "a.jsonl", tmp_path / "tok", tmp_path / "out").meta["unknown_bytes"] == 2
    write(tmp_path / "b.jsonl", ["sea sea", "море"])
    with pytest.raises(UserError, match="8 of 15 bytes of the domain are unknown"):
        make(tmp_path / "b.jsonl", tmp_path / "tok", tmp_path / "out", name="the domain")


def test_bad_records_are_recorded(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [prose(i) for i in range(5)])
    path.write_bytes(path.read_bytes() + b'{"text": \n{"body": "x"}\n')
    meta = make(path, tokenizer, tmp_path / "out").meta
    assert (meta["read"], meta["set_aside"]) == (5, 2)
    assert [(e["file"], e["line"]) for e in meta["bad"]] == [(str(path), 6), (str(path), 7)]


def test_sources_beyond_a_number_are_counted_together(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(shards, "MAX_SOURCES", 3)
    records = [{"text": f"text {i}", "source": f"url{i}"} for i in range(9)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    dataset = make(tmp_path / "a.jsonl", tokenizer, tmp_path / "out")
    assert dataset.meta["sources"] == ["url0", "url1", "url2", "other"]
    assert dataset.documents["source"].tolist() == [0, 1, 2, 3, 3, 3, 3, 3, 3]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not on this machine")
def test_real_text_comes_back(tmp_path):
    units = resolve([str(SHARED / "domains" / "europarl" / "valid.jsonl.zst")])
    meta = tk.build(keys.Tokenizer(vocab_size=2_000, sample_bytes=500_000), keys.Data(), units,
                    tmp_path / "tok")
    assert meta["vocab_size"] == 2_000
    tokenize_corpus(units, tmp_path / "tok", 256, keys.Data(), tmp_path / "out")
    dataset, loaded = TokenDataset(tmp_path / "out"), tk.load(tmp_path / "tok")
    from planearly.data.documents import Problems
    from planearly.data.readers import read_documents
    texts = [d.text for d in read_documents(units[0], keys.Data(), Problems(0.01))]
    for number in range(0, len(texts), 9):
        mine = np.flatnonzero(dataset.windows["document"] == number)
        ids = np.concatenate([dataset.tokens(w)[1:] for w in mine])
        assert ids[:-1].tolist() == loaded.encode(texts[number], add_special_tokens=False).ids
    rows = [np.array([i]) for i in range(64)]
    dataset.rows(rows)
    start = time.process_time()
    for _ in range(50):
        dataset.rows(rows)
    assert (time.process_time() - start) / 50 < 0.005


def test_documents_begin_with_the_tokenizers_begin_token(tmp_path, tokenizer):
    folder = tmp_path / "tok"
    tk.save(tk.load(tokenizer), folder, tk.EOT, begin="e")
    begin = tk.load(folder).token_to_id("e")
    file = write(tmp_path / "a.jsonl", ["a first text of some length", "another"])
    dataset, plain = (make(file, which, tmp_path / which.name, 6) for which in (folder, tokenizer))
    firsts = np.diff(dataset.windows["document"].astype(int), prepend=-1) == 1
    streams = [[d.tokens(i) for i in range(len(d))] for d in (dataset, plain)]
    for first, ours, theirs in zip(firsts, *streams, strict=True):
        assert ours[0] == (begin if first else theirs[0])
        assert ours[1:].tolist() == theirs[1:].tolist()
    # what a model sees of every window begins so: in rows of its own, and side by side with others
    several = [np.array([i]) for i in range(len(dataset))]
    shown, targets = dataset.rows(several)
    assert (shown[:, 0] == begin).all()
    inputs, same = plain.rows(several)
    assert (shown[:, 1:] == inputs[:, 1:]).all() and (targets == same).all()
    last = [int(np.flatnonzero(dataset.windows["document"] == d)[-1]) for d in (0, 1)]
    lengths = dataset.windows["length"][last].tolist()
    assert sum(lengths) <= 6
    (together,), _ = dataset.rows([np.array(last)])
    assert together[0] == together[lengths[0]] == begin
