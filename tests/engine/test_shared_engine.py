"""Several planearly in one run folder: each shard by one of them, whoever of them dies."""

import json
import os
import re
import sys
import threading
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

import planearly
from planearly.data import documents
from planearly.engine.local import Local
from planearly.engine.shared import Shared
from planearly.errors import UserError
from planearly.stages import pipeline
from small_processes import fork
from small_runs import both, call, corpus, results
from small_runs import recipe as small
from small_work import help_from_elsewhere, log, made, until, work


@pytest.fixture
def helper(tmp_path):
    """Starts a process that helps with the works of a run folder."""
    started = []

    def start(seconds: float = 0.0) -> BaseProcess:
        started.append(fork(help_from_elsewhere, tmp_path, seconds))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


def led(tmp_path, begun=lambda: True, **more):
    """The counts of a work that this process leads, once others have begun."""
    class Leader(Shared):
        def carry_out(self, *arguments):
            until(begun)
            return super().carry_out(*arguments)

    return Leader(1, tmp_path).map(work(tmp_path / "out", **more))


def status(process: BaseProcess) -> int | None:
    process.join(60)
    return process.exitcode


def begun_by(process, out: Path) -> list[int]:
    return [number for by, what, number in log(out) if by == process.pid] if (
        out / "log").exists() else []


def test_two_divide_a_work(tmp_path, helper, monkeypatch):
    Local(1).map(work(tmp_path / "plain", n=30))
    monkeypatch.setenv("SMALL_WORK_SECONDS", "0.01")
    other = helper(0.01)
    found = led(tmp_path, lambda: begun_by(other, tmp_path / "out"), n=30)
    assert status(other) == 0
    assert [counts["double"] for counts in found] == [2 * number for number in range(30)]
    assert made(tmp_path / "out") == made(tmp_path / "plain")
    done = Counter(number for _, what, number in log(tmp_path / "out") if what == "begin")
    assert done == Counter(range(30))  # nothing twice
    assert {process for process, _, _ in log(tmp_path / "out")} == {os.getpid(), other.pid}
    assert not list((tmp_path / ".engine").iterdir())


def test_the_shard_of_one_that_dies_is_taken_over(tmp_path, helper):
    out, other = tmp_path / "out", helper(600)

    def kill_it_when_all_else_is_done():
        until(lambda: len(list((out / "parts").glob("*.json"))) == 7)
        other.kill()

    killer = threading.Thread(target=kill_it_when_all_else_is_done)
    killer.start()
    found = led(tmp_path, lambda: begun_by(other, out))
    killer.join()
    assert [counts["double"] for counts in found] == [2 * number for number in range(8)]
    (lost,) = begun_by(other, out)
    assert [number for _, what, number in log(out) if what == "begin"].count(lost) == 2


def test_what_no_leader_is_left_for_is_done_by_the_others(tmp_path, helper):
    """A leader that is killed leaves its work published; the next one finds it done."""
    asked = work(tmp_path / "out")
    shared = Shared(1, tmp_path)

    class Killed(BaseException):
        pass

    def publish_only(*arguments):
        kept = {path: path.read_bytes() for path in shared.folder.glob("*.json")}
        (locks,) = (path for path in shared.folder.iterdir() if path.is_dir())
        raise Killed(kept, locks)

    shared.carry_out = publish_only
    with pytest.raises(Killed) as caught:
        shared.map(asked)
    kept, locks = caught.value.args
    locks.mkdir()
    for path, content in kept.items():
        path.write_bytes(content)
    assert status(helper()) == 0
    before = len(log(tmp_path / "out"))
    assert before == 16
    assert Shared(1, tmp_path).map(asked)[7]["double"] == 14
    assert len(log(tmp_path / "out")) == before


def published(tmp_path, **changes) -> Shared:
    folder = tmp_path / ".engine"
    folder.mkdir()
    values = {"planearly": planearly.__version__, "name": "x", "unit": "x", "small": 0.0,
              "gpu": False, "known": True, "folder": "/", "function": "small_work:double",
              "shards": [], **changes}
    (folder / "a.json").write_text(json.dumps(values))
    return Shared(1, tmp_path)


def test_another_version_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="is worked in by another version of planearly than"):
        published(tmp_path, planearly="0.0.1").help()


@pytest.mark.parametrize("text", ["", "{", "[1]", "7", "null"])
def test_what_is_published_and_is_no_work_is_one_sentence(tmp_path, text):
    helper = published(tmp_path)
    (tmp_path / ".engine" / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json does not say what work there is: remove the"):
        helper.help()


@pytest.mark.parametrize("name", ["os:system", "planearly.files:sweep", "planearly.files:none",
                                  "small_work:work", "antigravity:geohash"])
def test_what_is_published_calls_nothing_but_work_on_shards(tmp_path, name):
    with pytest.raises(UserError, match="which does no work on shards"):
        published(tmp_path, function=name).help()
    assert "antigravity" not in sys.modules


@pytest.mark.slow
def test_two_commands_prepare_a_run_folder_together(tmp_path, monkeypatch):
    root = corpus(tmp_path / "text")
    text = (root / "generic.jsonl").read_text().splitlines(keepends=True)
    (root / "many").mkdir()
    for i in range(12):
        (root / "many" / f"{i:02d}.jsonl").write_text("".join(
            line.replace(".", f" {i}.") for line in text))
    asked = small(root, methods=["slm"], generic=[str(root / "many")])
    (tmp_path / "recipe.yaml").write_text(json.dumps(asked.to_dict()))
    told = both(tmp_path, "prepare", tmp_path / "recipe.yaml", "--out", tmp_path / "both",
                "processes=1", "engine=shared")
    assert "".join(told).count("── generic") == 1  # one led each stage
    monkeypatch.setattr(documents, "_GROUP", 20_000)
    pipeline.run(asked, tmp_path / "alone", "prepare")

    assert results(tmp_path / "both") == results(tmp_path / "alone")
    assert len(list((tmp_path / "both").glob("generic-*/tokens-*"))) > 5


def stages_made(told: str) -> list[str]:
    return re.findall(r"^── (\S+)", told, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["run", "study"])
def test_two_commands_divide_the_trainings_of_a_folder(tmp_path, unrendered, verb):
    """Domains and experts of a run, cells of a study: each by one of the two, with the weights that
    one process alone ends with."""
    root = corpus(tmp_path / "text")
    if verb == "run":
        (root / "domains" / "sea").mkdir()
        for split in ("train", "valid", "test"):
            text = (root / f"domains/law/{split}.jsonl").read_text().replace("court", "harbour")
            (root / f"domains/sea/{split}.jsonl").write_text(text)
    more = {"methods": ["slm", "slm-mix"], "mixture": {"experts": 3}} if verb == "run" else {
        "methods": ["slm"], "study": {"grid": [{"methods": ["slm", "slm-nopt"],
                                                "over": {"seed": [0, 1]}}]}}
    asked = small(root, **more)
    (tmp_path / "recipe.yaml").write_text(json.dumps(asked.to_dict()))
    told = both(tmp_path, verb, tmp_path / "recipe.yaml", "--out", tmp_path / "both",
                "processes=1", "engine=shared")
    made = [stages_made(one) for one in told]
    assert max(Counter(made[0] + made[1]).values()) <= (1 if verb == "run" else 4)  # variants
    trained = [[name for name in one if name.startswith(("pretrain/", "specialize/"))]
               for one in made]
    folders = [path for kind in ("pretrain", "specialize")
               for path in (tmp_path / "both" / kind).iterdir()]
    assert min(map(len, trained)) and sum(map(len, trained)) == len(folders)
    call(verb, tmp_path / "recipe.yaml", "--out", tmp_path / "alone", "processes=1")
    alone, together = ({name: content for name, content in results(tmp_path / of).items()
                        if name.endswith(".safetensors")} for of in ("alone", "both"))
    assert alone == together and len(alone) >= len(folders)
    page = "report.html" if verb == "run" else "README.md"
    assert (tmp_path / "both" / page).is_file()
