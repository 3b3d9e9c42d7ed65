"""Several workers in a study: what each uses, how they end, and that they make what one makes."""

import contextlib
import os
import shutil
import signal
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

from planearly import parallel, processes
from planearly.errors import UserError
from planearly.files import read_json
from planearly.stages import corpus as texts
from planearly.stages.claims import Busy
from planearly.stages.folder import Missing, Run
from planearly.stages.manifest import MANIFEST
from planearly.studies.paper import SUITE
from planearly.study import workers as module
from planearly.study.cells import Study
from planearly.study.run import study
from planearly.study.view import RESULTS
from planearly.study.workers import share_of_machine, work
from small_runs import call, corpus, forked, with_grid
from small_runs import recipe as small
from small_work import alive, children, until


def test_a_worker_that_stops_is_told_after_the_report(made, tmp_path, monkeypatch):
    out = tmp_path / "study"
    monkeypatch.setattr("planearly.study.run.spread", lambda *args: -9)
    recipe = with_grid(made, {"methods": ["slm-nopt", "slm"]})
    with pytest.raises(UserError, match="status -9"):
        study(recipe, out, SUITE, workers=2)
    assert not (out / RESULTS).exists()  # nothing is finished

    def one(recipe, out, many):
        this = Study(recipe, out)
        this.make_common()
        this.make(this.cells[0])
        return -9

    monkeypatch.setattr("planearly.study.run.spread", one)
    with pytest.raises(UserError, match="status -9"):
        study(recipe, out, SUITE, workers=2)
    found = read_json(out / RESULTS)
    assert len(found["rows"]) == len(found["pending"]) == 1


def test_workers_divide_what_this_process_may_use(monkeypatch):
    def shares(gpus, workers=2, **environment):
        for key in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
            monkeypatch.delenv(key, raising=False)
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        return [share_of_machine(number, workers) for number in range(workers)]

    def masks(found):
        return [share["CUDA_VISIBLE_DEVICES"] for share in found]

    def sharing(found):
        return [int(share.pop(processes.SHARING)) for share in found]

    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert masks(shares(2, 3)) == ["0", "1", "0"]
    assert masks(shares(2, CUDA_VISIBLE_DEVICES="4, 5")) == ["4", "5"]
    assert masks(shares(1, CUDA_VISIBLE_DEVICES="GPU-8932f937,-1,3")) == ["GPU-8932f937"] * 2
    for gpus in (0, 2):
        for workers, environment, threads in ((2, {}, "3"), (9, {}, "1"),
                                              (2, {"OMP_NUM_THREADS": "5"}, None)):
            assert [share.get("OMP_NUM_THREADS") for share in shares(gpus, workers, **environment)
                    ] == [threads] * workers
    assert sharing(shares(2, 2)) == [1, 1] and sharing(shares(2, 5)) == [3, 2, 3, 2, 3]
    assert sharing(shares(0, 3)) == [3, 3, 3]


def test_a_stage_that_another_process_makes_is_left_to_it(made, tmp_path):
    run = Run(tmp_path / "run", small(made), wait=False)
    run.out.mkdir()

    def build(folder):
        with pytest.raises(Busy):
            Run(run.out, small(made), wait=False).stage("one", {}, {}, lambda folder: None)

    made_folder = run.stage("one", {}, {}, build)
    assert (made_folder / MANIFEST).exists()
    with pytest.raises(Missing):
        Run(run.out, small(made), build=False).stage("two", {}, {}, lambda folder: None)


@pytest.mark.slow
def test_a_worker_comes_back_to_what_another_one_made(made, tmp_path, monkeypatch):
    out, recipe = tmp_path / "study", with_grid(made, {"methods": ["slm", "slm-nopt"]})
    first = Study(recipe, out, wait=False)
    out.mkdir()
    texts.kept(first.base)
    tried = []
    real = Study.make

    def busy_once(self, cell):
        tried.append(cell.method)
        if tried == ["slm"]:
            raise Busy("pretrain/slm")
        return real(self, cell)

    monkeypatch.setattr(Study, "make", busy_once)
    work(first)
    assert tried == ["slm", "slm-nopt", "slm"]


def test_the_time_left_is_by_the_work_left_of_all_workers(made, tmp_path, monkeypatch, capsys):
    """Of six cells the first was there before; the third and the last are another worker's, the
    last not yet come to here."""
    this = Study(with_grid(made, {"methods": ["slm", "slm-nopt"], "over": {"seed": [0, 1, 2]}},
                           domains=["law"]), tmp_path)
    now = 1e9
    monkeypatch.setattr(Study, "make_common", lambda self: None)
    monkeypatch.setattr(module.time, "time", lambda: now)
    monkeypatch.setattr(module.forecast, "added", lambda cells: [100.0, 30, 60, 10, 0, 90])

    def make(cell):
        nonlocal now
        number = this.cells.index(cell)
        now += 30 * (number in (1, 4))
        if number == 1:
            this.settle(this.cells[5], now)
        if number == 3:
            raise UserError("it is impossible")
        folder = tmp_path / f"{number}"
        folder.mkdir(exist_ok=True)
        (folder / MANIFEST).touch()
        at = now - 60 if number == 0 else now
        os.utime(folder / MANIFEST, (at, at))
        return folder

    monkeypatch.setattr(this, "make", make)
    made_here = iter([0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2])
    monkeypatch.setattr(this, "stages_made", lambda: next(made_here))
    work(this)
    told = [line for line in capsys.readouterr().err.splitlines() if " so far" in line]
    assert [line.partition(":")[0] for line in told] == ["cell 3 of 6", "cell 6 of 6"]
    # 30 and 90 of the 190 that were not there before, in half a minute, and then all
    assert [line.partition("; ")[2] for line in told] == [
        "30 s so far, about 18 s left", "1 min 00 s so far, about 0 s left"]
    now = 1e9
    made_here = iter([0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1])
    shutil.rmtree(tmp_path / ".settled")
    monkeypatch.setattr(module.forecast, "added", lambda cells: [0.0, 0.1, 60, 0, 5000, 0.2])
    work(this)
    assert next(line for line in capsys.readouterr().err.splitlines()
                if " so far" in line).endswith("; 30 s so far")


@pytest.fixture
def two_seeds(tmp_path):
    """The file of a recipe whose study has four cells and two pretrainings."""
    path = tmp_path / "tiny.yaml"
    # nothing that processes measure, each for itself
    train = {"batch_tokens": 128, "compile": "no", "precision": "fp32",
             "optimizer": {"preset": "adamw"}}
    asked = with_grid(corpus(tmp_path / "text"), {
        "methods": ["slm", "slm-nopt"], "domains": [], "over": {"seed": [0, 1]}},
        pretrain=train, finetune={**train, "max_epochs": 1})
    path.write_text(yaml.safe_dump(asked.to_dict()))
    return path


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_workers_end_with_the_study_in_the_middle_of_a_training(two_seeds, tmp_path):
    out = tmp_path / "study"
    for number, status in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        for left in out.glob("pretrain/*/arithmetic.json"):
            left.unlink()
        told = tmp_path / f"{number}.txt"
        process = forked(told, "study", two_seeds, "pretrain_tokens=100M", "processes=1",
                         "--out", out, "--workers", 2, begin=os.setsid)
        try:
            until(lambda: len(list(out.glob("pretrain/*/arithmetic.json"))) == 2, 300)
            workers = children(process.pid)
            assert len(workers) == 2
            os.kill(process.pid, number)
            process.join(60)
            assert process.exitcode == status
            if number == signal.SIGKILL:
                until(lambda workers=workers: not any(map(alive, workers)))
            assert not any(map(alive, workers))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        said = told.read_text().splitlines()  # all that could write ended
        assert not [line for line in said if line.startswith("Traceback")]
        goes_on = [line for line in said if "continues from here" in line]
        assert goes_on == (said[-1:] if number == signal.SIGTERM else [])


@pytest.mark.slow
def test_two_workers_make_what_one_makes(two_seeds, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    rows = {}
    for workers in (1, 2):
        out = tmp_path / f"by-{workers}"
        call("study", two_seeds, "processes=1", "--out", out, "--workers", workers)
        found = read_json(out / RESULTS)
        assert not found["pending"] and not found["skipped"]
        rows[workers] = [(r["method"], r["settings"], r["nll_after"]) for r in found["rows"]]
    assert len(rows[1]) == 4 and rows[1] == rows[2]


def holder(lock):
    """The process that holds a locked file; None: none does."""
    inode = f":{lock.stat().st_ino}"
    found = [int(words[4]) for line in Path("/proc/locks").read_text().splitlines()
             if (words := line.split())[1] == "FLOCK" and words[5].endswith(inode)]
    return found[0] if found else None


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="looks for locks in /proc")
def test_workers_of_a_cluster_make_what_one_process_makes_though_one_is_killed(
        two_seeds, tmp_path, cluster):
    longer = "pretrain_tokens=60k"
    one, many = tmp_path / "one", tmp_path / "many"
    with parallel.one_thread():  # as a worker's, which has one core
        call("study", two_seeds, longer, "processes=1", "--out", one)

    def kill():
        until(lambda: list(many.glob("pretrain/*/arithmetic.json")), 300)
        training = next(many.glob("pretrain/*/arithmetic.json")).parent.name
        os.kill(holder(many / ".locks" / f"pretrain--{training}"), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    said = call("study", two_seeds, longer, "engine=ray", "--out", many).stderr
    killer.join()
    assert "cells by 2 workers of the Ray cluster" in said and " of 4: slm on law" in said
    assert said.count("failed, as its Ray worker died") == 1
    begun = Counter(line for line in said.splitlines() if line.startswith("── "))
    assert begun["── pretrain/slm"] == 3  # of two seeds, and one of them again
    assert begun["── specialize/slm.law"] == begun["── specialize/slm-nopt.law"] == 2
    found = {out: [(r["method"], r["settings"], r["nll_after"])
                   for r in read_json(out / RESULTS)["rows"]] for out in (one, many)}
    assert len(found[one]) == 4 and found[one] == found[many]
