"""Token datasets: windows, resuming, duplicates, limits, reading."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from examples import examples
from planearly import files, keys
from planearly.data import build, documents, duplicates, shards, subset
from planearly.data import tokenizer as tk
from planearly.data.build import tokenize_corpus
from planearly.data.dataset import IGNORE, TokenDataset
from planearly.data.documents import Unit
from planearly.data.inputs import resolve
from planearly.engine.local import Local
from planearly.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"
CONTEXT = 16
PROSE = "a small model reads windows of text, and learns 12 things; não é 中文 \n \n\n"
WORDS = PROSE.split(" ")


def prose(seed: int, n: int = 40) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, n))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tk.save(tk.train([prose(i) for i in range(50)], keys.Tokenizer(vocab_size=320)), folder)
    return folder


def write(path: Path, texts, **fields) -> Path:
    records = ({"text": text, **fields} for text in texts)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def make(path: Path, tokenizer: Path, out: Path, context: int = CONTEXT, **more) -> TokenDataset:
    tokenize_corpus(resolve([str(path)]), tokenizer, context, keys.Data(), out, **more)
    return TokenDataset(out)


@pytest.fixture
def corpus(tmp_path) -> Path:
    (tmp_path / "corpus").mkdir()
    return tmp_path / "corpus"


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes()
            for p in sorted(folder.rglob("*")) if p.is_file()}


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


@pytest.mark.parametrize("bits", [1, 3, 16])
def test_the_lowest_ranks_are_those_of_a_sort_of_all(tmp_path, corpus, tokenizer, monkeypatch,
                                                     bits):
    monkeypatch.setattr(build, "_BINS", bits)
    write(corpus / "a.jsonl", [prose(i, 5) for i in range(60)])
    whole = make(corpus, tokenizer, tmp_path / "whole", 64)
    ranks = subset.Subset(0, 1.0).rank(whole.documents["hash"], Unit("a", "lines"))
    tokens = np.bincount(whole.windows["document"].astype(int), whole.windows["length"])
    for limit in (1, 40, 700):
        part = make(corpus, tokenizer, tmp_path / str(limit), 64, max_tokens=limit)
        order = np.argsort(ranks)
        many = int(np.searchsorted(np.cumsum(tokens[order]), limit)) + 1
        assert set(part.documents["hash"]) == set(whole.documents["hash"][order[:many]])


def windows_of(dataset: TokenDataset) -> list[tuple[int, ...]]:
    return [tuple(dataset.tokens(w).tolist()) for w in range(len(dataset))]


@pytest.mark.parametrize("limit", [1, 17, 100, 333, 10**9])
def test_a_limit_of_tokens_is_exact_and_a_larger_one_gives_a_superset(
        tmp_path, corpus, tokenizer, monkeypatch, limit):
    monkeypatch.setattr(documents, "_GROUP", 500)
    monkeypatch.setattr(shards, "_BATCH", 200)
    for name in "abc":
        write(corpus / f"{name}.jsonl", [prose(ord(name) * 100 + i, 12) for i in range(8)] * 2)
    whole = make(corpus, tokenizer, tmp_path / "whole", 64)
    part = make(corpus, tokenizer, tmp_path / "part", 64, max_tokens=limit)
    assert part.meta["n_tokens"] == min(limit, whole.meta["n_tokens"])
    assert set(part.documents["hash"]) <= set(whole.documents["hash"])
    assert part.meta["read"] == 48 == (
        part.meta["n_documents"] + part.meta["duplicates"] + part.meta["left_out"])
    full = {w[1:] for w in windows_of(whole)}
    broken = [w for w in windows_of(part) if w[1:] not in full]
    assert len(broken) <= 1 and all(any(f[:len(w) - 1] == w[1:] for f in full) for w in broken)
    loaded = tk.load(tokenizer)
    for document in range(len(part.documents)):
        text = "".join(part.texts(np.flatnonzero(part.windows["document"] == document), loaded))
        if "\ufffd" not in text:
            assert part.documents["bytes"][document] == len(text.encode())
    more = make(corpus, tokenizer, tmp_path / "more", 64, max_tokens=limit + 150)
    assert set(part.documents["hash"]) <= set(more.documents["hash"])


def test_a_limit_is_a_fair_sample_whatever_the_files(tmp_path, tokenizer, monkeypatch):
    texts = [f"{source} {prose(i)}" for source in ("a", "b") for i in range(400)]
    tokenized = []
    real = shards.run_job

    def run_job(job, advance):
        counts = real(job, advance)
        tokenized.append(counts["documents"])
        return counts

    monkeypatch.setattr(shards, "run_job", run_job)
    monkeypatch.setattr(subset, "_BYTES_PER_TOKEN", 3)
    found = {}
    for name, cuts in (("one", [0, 800]), ("many", [*range(0, 801, 50)])):
        folder = tmp_path / name
        folder.mkdir()
        for i, (start, stop) in enumerate(pairwise(cuts)):
            packed = "".join(json.dumps({"text": t}) + "\n" for t in texts[start:stop]).encode()
            place = folder / f"{i:03d}.jsonl"
            if i % 2:
                place = place.with_suffix(".jsonl.gz")
                packed = gzip.compress(packed)
            place.write_bytes(packed)
        found[name] = make(folder, tokenizer, tmp_path / f"{name}-out", max_tokens=3_000)
    assert windows_of(found["one"]) == windows_of(found["many"])
    assert tokenized[0] < 400  # not all of it was tokenized for a sample
    shares = [sum(t.startswith(s) for t in found["one"].texts(
        np.arange(len(found["one"])), tk.load(tokenizer))) for s in ("a ", "b ")]
    assert min(shares) > 0.3 * sum(shares)
    monkeypatch.setattr(subset, "_BYTES_PER_TOKEN", 0.02)  # too few at first: more is drawn
    tokenized.clear()
    short = make(tmp_path / "one", tokenizer, tmp_path / "short", max_tokens=3_000)
    assert len(tokenized) > 1 and tokenized[0] < 10
    assert windows_of(short) == windows_of(found["one"])


def test_of_a_large_dataset_on_the_hub_a_part_is_read(tmp_path, tokenizer, monkeypatch):
    local = write(tmp_path / "a.jsonl", [f"local {prose(i)}" for i in range(300)])
    read = []

    def records(unit, columns):
        for i in range(100_000):
            read.append(i)
            yield {"text": f"hub {unit.shard[0]} {prose(i)}"}

    monkeypatch.setattr("planearly.data.hub.records", records)
    size = local.stat().st_size
    units = [*resolve([str(local)]), *(Unit("hf://x", "hub", 50 * size, 0, (i, 2))
                                       for i in range(2))]
    tokenize_corpus(units, tokenizer, CONTEXT, keys.Data(), tmp_path / "out", max_tokens=6_000)
    dataset = TokenDataset(tmp_path / "out")
    assert dataset.meta["n_tokens"] == 6_000 and len(read) < 10_000
    units_of = np.bincount(dataset.documents["unit"], minlength=3)
    assert units_of[0] < 10 and units_of[1:].min() > 0.3 * units_of.sum()


def test_finished_work_is_not_done_again(tmp_path, corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(documents, "_GROUP", 1_200)
    for name in "abc":
        write(corpus / f"{name}.jsonl", [prose(ord(name) * 100 + i) for i in range(5)])
    make(corpus, tokenizer, tmp_path / "straight")
    real, made, stop = shards.run_job, [], [True]

    def run_job(job, advance):
        if stop and len(made) == 2:
            raise KeyboardInterrupt
        made.append(job.number)
        return real(job, advance)

    monkeypatch.setattr(shards, "run_job", run_job)
    with pytest.raises(KeyboardInterrupt):
        make(corpus, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out" / "dataset.json").exists()
    made.clear()
    stop.clear()
    make(corpus, tokenizer, tmp_path / "out")
    assert made == [2]
    assert content(tmp_path / "out") == content(tmp_path / "straight")
    made.clear()
    make(corpus, tokenizer, tmp_path / "out")
    assert made == []
    write(corpus / "b.jsonl", [prose(7)])
    (corpus / "c.jsonl").unlink()
    dataset = make(corpus, tokenizer, tmp_path / "out")
    assert len(dataset.documents) == 6 and made == [0, 1]  # remade, and the third shard is gone
    assert sorted(p.name for p in (tmp_path / "out").glob("tokens*")) == [
        "tokens-00000.bin", "tokens-00001.bin"]


SCRIPT = """
import sys
from pathlib import Path
from planearly import keys
from planearly.data import documents, shards
from planearly.data.inputs import resolve
from planearly.data.build import tokenize_corpus
from planearly.engine.local import Local
documents._GROUP = 200_000
if __name__ == "__main__":
    tokenize_corpus(resolve([sys.argv[1]]), Path(sys.argv[2]), 16, keys.Data(),
                    Path(sys.argv[3]), executor=Local(int(sys.argv[4])))
"""


def test_killed_and_started_again_ends_alike(tmp_path, corpus, tokenizer):
    for i in range(12):
        write(corpus / f"{i:02d}.jsonl", [prose(i * 1_000 + j, 200) for j in range(300)])
    (tmp_path / "go.py").write_text(SCRIPT)

    def start(out: str, processes: int = 1) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, tmp_path / "go.py", corpus, tokenizer, tmp_path / out, str(processes)],
            stderr=subprocess.DEVNULL)

    assert start("straight").wait() == 0
    parts = tmp_path / "killed" / "parts"
    for finished in (1, 4):
        process = start("killed")
        while process.poll() is None and len(list(parts.glob("*.json"))) < finished:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert len(list(parts.glob("*.json"))) >= finished
        with pytest.raises(UserError, match="does not exist"):
            TokenDataset(tmp_path / "killed")
    assert start("killed").wait() == 0
    assert content(tmp_path / "killed") == content(tmp_path / "straight")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_processes_end_with_their_killed_parent(tmp_path, corpus, tokenizer):
    for i in range(12):
        write(corpus / f"{i:02d}.jsonl", [prose(i * 1_000 + j, 400) for j in range(300)])
    script = SCRIPT.replace("200_000\n", "200_000; shards._POOL_MEGABYTES = 0\n")
    (tmp_path / "go.py").write_text(script)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "go.py", corpus, tokenizer, tmp_path / "out", "2"],
        stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / "out" / "parts").glob("*.json")):
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    assert len(children) >= 2
    for _ in range(200):
        if not any(Path(f"/proc/{child}").exists() for child in children):
            return
        time.sleep(0.05)
    pytest.fail("a process outlived its parent by ten seconds")


def test_a_pool_of_processes_makes_the_same(tmp_path, corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(documents, "_GROUP", 2_000)
    monkeypatch.setattr(shards, "_POOL_MEGABYTES", 0)
    for i in range(4):
        write(corpus / f"{i}.jsonl", [prose(i * 100 + j) for j in range(10)])
    make(corpus, tokenizer, tmp_path / "one", executor=Local(1))
    make(corpus, tokenizer, tmp_path / "two", executor=Local(2))
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert len(list((tmp_path / "two").glob("tokens*"))) == 4
    write(corpus / "3.jsonl", ["x"])
    (corpus / "3.jsonl").write_text("{\n" * 5)
    with pytest.raises(UserError, match="5 of 35 records"):
        make(corpus, tokenizer, tmp_path / "three", executor=Local(2))


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


def test_jobs_are_bounded_in_number(tmp_path, tokenizer):
    units = [Unit(f"{i}.txt", "text", 3_000) for i in range(20_000)]
    units += [Unit(f"{i}.jsonl", "lines", 40_000_000_000) for i in range(3)]
    work = shards.jobs(list(enumerate(units)), tokenizer, keys.Data(), tmp_path)
    assert [i for job in work for i, _ in job.units] == list(range(len(units)))
    assert len(work) < 10


def test_full_disk_is_one_sentence(tmp_path, tokenizer):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    units = resolve([str(write(tmp_path / "a.jsonl", [prose(1)]))])
    job = shards.jobs(list(enumerate(units)), tokenizer, keys.Data(), tmp_path / "out")[0]
    (tmp_path / "out").mkdir()
    temporary = files.temporary_name(job.shard)
    temporary.symlink_to("/dev/full")
    with pytest.raises(UserError, match="the disk is full"):
        shards.run_job(job, lambda _: None)
    assert not job.marker.exists()


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
