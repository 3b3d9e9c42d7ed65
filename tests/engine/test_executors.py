"""Every executor does every shard once, with the same bytes, whatever fails on the way."""

import dataclasses
import re
from collections import Counter
from pathlib import Path

import pytest

from planearly import processes
from planearly.cluster import assign, embed, neighbours, ngrams, select
from planearly.data import documents, duplicates, overlap, pack
from planearly.engine import local
from planearly.engine import work as engine
from planearly.engine.local import Inline, Local, Processes
from planearly.engine.on_ray import OnRay
from planearly.errors import UserError
from planearly.stages import pipeline, selection
from planearly.stages.folder import Run
from small_runs import recipe as small
from small_work import log, work
from small_work import made as left


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(engine, "PAUSE", 0.0)


@pytest.fixture(params=["one process", "local",
                        pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.slow])])
def executor(request):
    if request.param == "ray":
        request.getfixturevalue("cluster")
        return OnRay(2)
    return Local(2 if request.param == "local" else 1)


@pytest.fixture
def plain(tmp_path):
    """What is made where nothing fails."""
    assert Local(1).map(work(tmp_path / "plain"))[3] == {"key": "key 3", "double": 6}
    return left(tmp_path / "plain")


def alone(executor) -> bool:
    return isinstance(executor, Local) and executor.processes == 1


def test_what_fails_once_is_done_again_and_nothing_else_is(executor, plain, tmp_path):
    troubles = {1: "full disk", 3: "lost file", 4: "no memory", 6: "killed"}
    if alone(executor):
        del troubles[6]  # it would be this process
    out = tmp_path / "out"
    found = executor.map(work(out, troubles))
    assert [counts["double"] for counts in found] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert left(out) == plain
    begun = Counter(number for _, what, number in log(out) if what == "begin")
    ended = Counter(number for _, what, number in log(out) if what == "end")
    assert ended == Counter(range(8)) and begun == ended + Counter(set(troubles))


@pytest.mark.parametrize("trouble, sentence", [
    ("full disk", "doubling: shard 3 failed 3 times, the last time as the disk is full while"),
    ("no memory", r"shard 3 failed 3 times, .* as memory ran out \(cannot allocate 9 GB\)"),
    ("lost file", "shard 3 failed 3 times, .*nowhere: it does not exist"),
    ("killed", "shard 3 failed 3 times, .*(killed by signal 9|its Ray worker died)"),
    ("bad data", "^line 7 holds no text: mend it$")])
def test_what_fails_for_good_stops_with_its_name_and_what_is_done_stays(
        executor, tmp_path, trouble, sentence):
    if alone(executor) == (trouble == "killed"):
        pytest.skip("it would be this process, or costs seconds for what was seen already")
    out = tmp_path / "out"
    with pytest.raises(UserError, match=sentence):
        executor.map(work(out, {3: trouble}, once=False))
    tries = [what for _, what, number in log(out) if number == 3]
    assert tries == ["begin"] * (1 if trouble == "bad data" else 3)
    done = {number for number in range(8) if (out / "parts" / f"{number}.json").exists()}
    before = len(log(out))
    assert [c["double"] for c in executor.map(work(out))] == [2 * n for n in range(8)]
    assert {number for _, _, number in log(out)[before:]} == set(range(8)) - done


def test_a_slip_of_the_program_keeps_its_traceback(executor, tmp_path):
    with pytest.raises((KeyError, RuntimeError), match="slip of the pen") as caught:
        executor.map(work(tmp_path / "out", {3: "slip"}))
    if not alone(executor):
        assert "in _slip" in str(caught.value)


def test_a_worker_never_has_more_than_one_shard(executor, tmp_path):
    executor.map(work(tmp_path / "out", n=12))
    holds: dict[int, int] = {}
    for process, what, number in log(tmp_path / "out"):
        if what == "begin":
            assert process not in holds
            holds[process] = number
        else:
            assert holds.pop(process) == number
    assert not holds


def test_a_shard_of_another_key_or_without_its_file_is_made_again(executor, tmp_path):
    out = tmp_path / "out"
    executor.map(work(out))
    (out / "2.txt").unlink()
    (out / "parts" / "5.json").write_text('{"key": "another"}')
    (out / "parts" / "6.json").write_text("{half")
    for number, text in ((0, "[1]"), (1, "7"), (3, "null"), (4, '"key"')):
        (out / "parts" / f"{number}.json").write_text(text)
    before = len(log(out))
    executor.map(work(out))
    assert {number for _, _, number in log(out)[before:]} == {0, 1, 2, 3, 4, 5, 6}


def test_who_watches_may_stop_the_work(executor, tmp_path):
    def seen(counts):
        if counts["double"] == 4:
            raise UserError("too much of it is bad")

    with pytest.raises(UserError, match="too much of it"):
        executor.map(work(tmp_path / "out"), seen)


def test_little_work_needs_no_processes(tmp_path, monkeypatch):
    little, much = (work(tmp_path / name, small=small) for name, small in (("a", 8), ("b", 7)))
    assert isinstance(Local(2).workers(little, little.shards, print), Inline)
    pool = Local(2).workers(much, much.shards, print)
    assert isinstance(pool, Processes) and len(pool.rested) == 2
    assert isinstance(Local(1).workers(much, much.shards, print), Inline)
    monkeypatch.setattr(local, "cores", lambda: 4)
    for sharing, many in ((1, 4), (2, 2), (3, 1), (9, 1)):
        monkeypatch.setenv(processes.SHARING, str(sharing))  # others have the rest
        workers = Local().workers(much, much.shards, print)
        assert (1 if isinstance(workers, Inline) else len(workers.rested)) == many
    few = work(tmp_path / "c").shards[:3]
    assert len(Local(20).workers(much, few * 3, print).rested) == 9
    assert len(Local(20).workers(work(tmp_path / "d"), few, print).rested) == 3


def test_progress_counts_every_shard_once(tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr("planearly.progress.Meter.advance",
                        lambda self, amount, note="": counted.append(amount))
    Local(2).map(work(tmp_path / "out", {3: "full disk"}))
    assert sum(counted) == pytest.approx(8 * 0.5)  # as much as the function told


def test_a_function_that_is_not_marked_is_no_work(tmp_path):
    with pytest.raises(ValueError, match="is not marked as a shard_function"):
        dataclasses.replace(work(tmp_path), function=log)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks for maps in /proc")
def test_a_worker_keeps_nothing_of_the_shards_before(made, tmp_path, monkeypatch):
    """In every data stage: when a shard begins, no more shards' files are mapped than when the
    first one did (those are the leading process's, which is the worker here)."""
    for module, name, size in (
            (documents, "_GROUP", 5_000), (duplicates, "_RANGE", 100), (overlap, "_SHARD", 100),
            (pack, "_RANGE", 300), (assign, "_BLOCK", 256), (assign, "_SMALL", 0),
            (embed, "_BLOCK", 256), (neighbours, "_ROWS", 256), (select, "BLOCK", 128),
            (neighbours, "BLOCK", 128), (ngrams, "_ROWS", 256)):
        monkeypatch.setattr(module, name, size)
    first, many = {}, Counter()

    def attempt(function, shard, *more):
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()
                  if re.search(r"tokens-\d|/part-\d|\d-\w+\.bin|grouped-\d|borders-\d", line)}
        work = function.__name__, shard.marker.parent
        assert mapped <= first.setdefault(work, mapped), (work, shard.name)
        many[function.__name__] += 1
        return engine.attempt(function, shard, *more)

    monkeypatch.setattr(local, "attempt", attempt)
    recipe = small(made, methods=["slm-is", "slm-knn", "slm-dsir"], processes=1)
    pipeline.run(recipe, tmp_path / "run", "weigh")
    with Run(tmp_path / "run", recipe).opened() as run:
        for draws in ("knn", "dsir"):
            selection.selection(run, draws, "law")
    assert set(many) == {"count_lines", "hand_over", "tokenize", "later_ones", "look_up",
                         "embed_shard", "assign_shard", "group_range", "pack_groups",
                         "search_shard", "weigh_shard"}
    assert min(many.values()) > 2, many
