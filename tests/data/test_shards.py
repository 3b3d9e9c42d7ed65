"""A dataset in shards: by several processes, killed and started again, each shard once."""

from __future__ import annotations

import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from planearly import files, keys
from planearly.data import documents, shards
from planearly.data.dataset import TokenDataset
from planearly.data.documents import Unit
from planearly.data.inputs import resolve
from planearly.engine.local import Local
from planearly.errors import UserError
from small_datasets import content, make, make_apart, prose, write
from small_processes import fork
from small_work import alive, children, until


@pytest.mark.parametrize("text", ["{", "[1]", "7", "{}"])
def test_a_damaged_note_of_a_dataset_is_written_anew(tmp_path, corpus, tokenizer, text):
    write(corpus / "a.jsonl", [prose(i) for i in range(5)])
    made = make(corpus, tokenizer, tmp_path / "out").meta
    note = tmp_path / "out" / "dataset.json"
    note.write_text(text)
    with pytest.raises(UserError, match=r"dataset\.json is (damaged|not valid JSON)"):
        TokenDataset(note.parent)
    assert make(corpus, tokenizer, note.parent).meta == made


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


def test_killed_and_started_again_ends_alike(tmp_path, corpus, tokenizer):
    for i in range(12):
        write(corpus / f"{i:02d}.jsonl", [prose(i * 1_000 + j, 200) for j in range(300)])

    def start(out: str) -> BaseProcess:
        return fork(make_apart, corpus, tokenizer, tmp_path / out)

    straight = start("straight")
    straight.join()
    assert straight.exitcode == 0
    parts = tmp_path / "killed" / "parts"
    for finished in (1, 4):
        process = start("killed")
        while process.is_alive() and len(list(parts.glob("*.json"))) < finished:
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert len(list(parts.glob("*.json"))) >= finished
        with pytest.raises(UserError, match="does not exist"):
            TokenDataset(tmp_path / "killed")
    process = start("killed")
    process.join()
    assert process.exitcode == 0
    assert content(tmp_path / "killed") == content(tmp_path / "straight")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_processes_end_with_their_killed_parent(tmp_path, corpus, tokenizer):
    for i in range(12):
        write(corpus / f"{i:02d}.jsonl", [prose(i * 1_000 + j, 400) for j in range(300)])
    process = fork(make_apart, corpus, tokenizer, tmp_path / "out", 2)
    while process.is_alive() and not list((tmp_path / "out" / "parts").glob("*.json")):
        time.sleep(0.002)
    workers = children(process.pid)
    process.kill()
    process.join()
    assert len(workers) >= 2
    until(lambda: not any(map(alive, workers)), 10)


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
