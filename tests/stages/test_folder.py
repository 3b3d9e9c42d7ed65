"""Run folders: done once, redone when an input changes, continued, never half-written."""

import contextlib
import dataclasses
import errno
import gzip
import hashlib
import json
import os
import pathlib
import shutil
import threading

import numpy as np
import pytest
import yaml

from planearly import files, keys, parallel
from planearly.data.inputs import file_unit
from planearly.errors import UserError
from planearly.stages import folder as folder_module
from planearly.stages import training
from planearly.stages.claims import Busy
from planearly.stages.folder import Missing, Run
from planearly.stages.manifest import facts


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "out", keys.Recipe())


def stage(run, calls, name="a", settings=None, inputs=None):
    def build(folder):
        calls.append(name)
        (folder / "result").write_text(name)
        return {"found": len(calls)}

    return run.stage(name, settings or {}, inputs or {}, build)


def test_a_finished_stage_is_done_once(run):
    calls: list[str] = []
    first, second = stage(run, calls), stage(run, calls)
    assert first == second and calls == ["a"]
    assert facts(first)["found"] == 1
    assert stage(Run(run.out, run.recipe), calls) == first and calls == ["a"]


def test_a_change_redoes_exactly_what_depends_on_it(run):
    calls: list[str] = []
    for value in (1, 2, 1):
        top = stage(run, calls, "top", {"x": value})
        side = stage(run, calls, "side")
        stage(run, calls, "below", inputs={"top": top})
        stage(run, calls, "beside", inputs={"side": side})
    # the second value makes two stages again; going back to the first makes none
    assert calls == ["top", "side", "below", "beside", "top", "below"]


@pytest.mark.parametrize(("file", "what"), [
    ("recipe.yaml", "a file recipe.yaml that no run has noted there"),
    ("results.json", "a file results.json of something else"), ("report.html", "report.html"),
    ("bundle.json", "a bundle"), ("config.json", "a model")])
def test_a_folder_of_something_else_is_left_as_it_is(run, file, what):
    run.out.mkdir()
    (run.out / file).write_text("name: mine  # my own\n")
    with pytest.raises(UserError, match=f"holds .*{what}.*: choose another --out"), run.opened():
        pass
    assert [path.name for path in run.out.iterdir()] == [file]
    assert (run.out / file).read_text() == "name: mine  # my own\n"


def test_a_run_folder_that_was_copied_without_hidden_files_goes_on(run, tmp_path):
    with run.opened():
        pass
    (run.out / "results.json").write_text("{}")
    shutil.copytree(run.out, tmp_path / "copy", ignore=shutil.ignore_patterns(".*"))
    with Run(tmp_path / "copy", run.recipe).opened():
        pass


def test_what_killed_writers_left_goes_and_nothing_else(run):
    with run.opened():
        pass
    left = files.temporary_name(run.out / "results.json")
    left.write_text("half")
    files.temporary_name(run.out / "shared").mkdir()
    (run.out / ".mine.tmp").write_text("not of a writer of ours")
    with run.opened():
        pass
    assert sorted(path.name for path in run.out.iterdir()) == [
        ".lock", ".mine.tmp", "recipe.yaml"]


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_what_has_no_name_is_not_written(name):
    for writer in (files.atomic_write, files.atomic_folder):
        with pytest.raises(UserError, match="has no name"), writer(pathlib.Path(name)):
            pass


def test_a_file_in_the_way_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for place, says in (("file/a/b.json", "file is a file and no folder"),
                        ("folder", "folder, which is a folder: name a file in it"),
                        ("n" * 300, "choose a shorter one")):
        with pytest.raises(UserError, match=says):
            files.write_json(tmp_path / place, {})


def test_an_interrupted_stage_finds_what_it_left(run):
    seen = []

    def build(folder):
        seen.append(sorted(p.name for p in folder.iterdir()))
        if len(seen) == 1:
            (folder / "part").write_text("x")
            (folder / ".result.json.123.tmp").write_text("half of a file, by a killed writer")
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        run.stage("s", {}, {}, build)
    run.stage("s", {}, {}, build)
    assert seen == [[], ["part"]]


def test_two_processes_do_not_share_a_folder(run):
    other = Run(run.out, run.recipe)
    with run.opened(), pytest.raises(UserError, match="another planearly works in"), other.opened():
        pass
    with other.opened():
        pass


def test_a_key_that_an_older_recipe_lacks_is_no_other_setting(run, capsys):
    with run.opened():
        pass
    noted = yaml.safe_load((run.out / "recipe.yaml").read_text())
    del noted["finetune"]["average"], noted["seed"]
    for context, told in ((run.recipe.context, False), (32, True)):
        (run.out / "recipe.yaml").write_text(yaml.safe_dump(noted))
        with Run(run.out, dataclasses.replace(run.recipe, context=context)).opened():
            said = capsys.readouterr().err
            assert ("other settings (context)" in said) is told
            assert ("other settings" in said) is told


def test_more_to_make_is_no_other_setting(run, capsys):
    with run.opened():
        pass
    grid = [{"methods": ["slm"], "over": {"seed": [0, 1]}}]
    more = dataclasses.replace(run.recipe, methods=["slm"], name="another",
                               study=keys.Study(grid=grid))
    with Run(run.out, more).opened():
        assert "other settings" not in capsys.readouterr().err
    assert yaml.safe_load((run.out / "recipe.yaml").read_text())["study"]["grid"] == grid
    with Run(run.out, dataclasses.replace(more, context=32, methods=[])).opened():
        assert "other settings (context): what" in capsys.readouterr().err


def test_processes_that_share_a_folder_have_one_recipe(run, monkeypatch, capsys):
    monkeypatch.setattr(folder_module, "_TURNS", 2)
    monkeypatch.setattr(folder_module, "_TURN", 0.0)

    def other(**settings) -> Run:
        return Run(run.out, keys.Recipe(**settings))

    with other(engine="shared").opened():
        with other(engine="shared", processes=3).opened():
            assert "divided among all" in capsys.readouterr().err
        with pytest.raises(UserError, match=r"do so with other settings \(context\)"), \
                other(engine="shared", context=32).opened():
            pass
        with pytest.raises(UserError, match=r"another planearly works .*engine=shared"), \
                run.opened():
            pass
    with run.opened():
        assert "other settings" not in capsys.readouterr().err  # who does the work is none
        with pytest.raises(UserError, match="another planearly works in"), \
                other(engine="shared").opened():
            pass
    assert not (run.out / ".engine").exists()


def test_a_file_system_without_locks_is_one_sentence(run, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(UserError, match=r"cannot be locked \(No locks available\)"), run.opened():
        pass


def test_who_waits_for_a_stage_helps_with_its_work(run, monkeypatch):
    monkeypatch.setattr(folder_module, "_TURN", 0.0)
    calls: list[str] = []
    other = Run(run.out, keys.Recipe(engine="shared"))
    with run.opened():
        with run.claimed(other.folder("a", {}, {})) as _:
            helped = []

            def help() -> bool:
                helped.append(1)
                if len(helped) == 3:
                    raise UserError("line 7 holds no text")
                return len(helped) == 2

            monkeypatch.setattr(other.executor, "help", help)
            with pytest.raises(UserError, match="line 7"):
                stage(other, calls)
        assert stage(other, calls) and calls == ["a"] and len(helped) == 3


def test_other_settings_are_told_and_nothing_is_lost(run, capsys):
    calls: list[str] = []
    with run.opened():
        first = stage(run, calls, settings={"context": 256})
    other = Run(run.out, keys.Recipe(context=128))
    with other.opened():
        second = stage(other, calls, settings={"context": 128})
    assert "context" in capsys.readouterr().err
    assert first != second and (first / "result").exists()


@pytest.mark.parametrize("left", [b"\xff\xfe", b"a: [", b"- a"])
def test_a_recipe_in_the_folder_that_is_none_is_one_sentence_and_is_kept(run, left):
    run.out.mkdir(parents=True, exist_ok=True)
    (run.out / "recipe.yaml").write_bytes(left)
    with pytest.raises(UserError, match="is not the recipe of a run"), run.opened():
        pass
    assert (run.out / "recipe.yaml").read_bytes() == left


def test_digests_follow_content(run, tmp_path):
    run.out.mkdir()
    one = tmp_path / "x.txt"
    one.write_text("hello")
    before = run.file_digests([one])
    assert run.file_digests([one]) == before
    one.write_text("other")
    assert run.file_digests([one]) != before


RECORDS = '{"text": "a"}\n{"text": "b"}\n'


@pytest.mark.parametrize("text", [RECORDS, f"[{RECORDS}]", "\ufeff" + RECORDS])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_a_text_that_is_renamed_to_records_is_another_input(run, tmp_path, text, end):
    run.out.mkdir()
    data = gzip.compress(text.encode(), mtime=0) if end else text.encode()
    found = []
    for name in ("law.txt", "law.jsonl", "law.txt", "law.json"):
        for old in tmp_path.glob("law.*"):
            old.unlink()
        (tmp_path / f"{name}{end}").write_bytes(data)
        found.append(run.unit_digests([file_unit(tmp_path / f"{name}{end}")])[0])
    assert found[0] == found[2] != found[1] == found[3]


@pytest.mark.parametrize(("name", "text"), [
    ("law.jsonl", RECORDS), ("law.txt", "The court sits."), ("law.md", "[![a](b)](c)\n{{ d }}"),
    ("law.txt", "")])
def test_what_was_made_from_other_files_before_is_found(run, tmp_path, name, text):
    run.out.mkdir()
    (tmp_path / name).write_text(text)
    content = hashlib.sha256(text.encode()).hexdigest()
    assert run.unit_digests([file_unit(tmp_path / name)]) == [
        files.digest([content, [0, 1], "None"])]


@pytest.mark.parametrize("left", ["", "{", "[1]", "7", '"text"', "null"])
def test_digests_that_are_not_whole_are_worked_out_again(run, tmp_path, left):
    one = tmp_path / "one"
    one.write_text("1")
    found = run.file_digests([one])
    (run.out / ".digests.json").write_text(left)
    assert Run(run.out, run.recipe).file_digests([one]) == found


@pytest.mark.parametrize("left", ["", "{", "[1]", "7", '"a"', "null", "{}", '{"b": 1}'])
def test_an_object_of_another_kind_is_one_sentence(tmp_path, left):
    path = tmp_path / "note.json"
    path.write_text(left)
    with pytest.raises(UserError, match=r"note\.json is (damaged|not valid JSON) \(.+\): copy it"
                       ) as told:
        files.read_object(path, "a")
    assert "\n" not in str(told.value)
    path.write_text('{"a": 1, "b": 2}')
    assert files.read_object(path, "a") == {"a": 1, "b": 2}


@pytest.mark.parametrize("left", [b"", b"hello" * 100, b"PK\x03\x04junk", 20, 300, -200])
def test_a_damaged_array_is_one_sentence(tmp_path, left):
    path = tmp_path / "array.npy"
    files.write_array(path, np.arange(1000))
    whole = path.read_bytes()
    path.write_bytes(left if isinstance(left, bytes) else whole[:left] if left > 0
                     else whole[:30] + b"\xff" * -left)
    for mapped in (True, False):
        with pytest.raises(UserError, match=r"array\.npy is damaged \(.+\): copy it") as told:
            files.read_array(path, mapped)
        assert "\n" not in str(told.value)
    with pytest.raises(UserError, match="does not exist"):
        files.read_array(tmp_path / "none.npy")


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), files.atomic_write(path, "w") as handle:
        handle.write("half")
        raise RuntimeError
    assert files.read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "x.json"
    files.write_json(path, [1])
    monkeypatch.setattr(os, "fsync", full)
    for write in (lambda: files.write_json(path, [2]),
                  lambda: files.write_array(tmp_path / "x.npy", np.ones(3))):
        with pytest.raises(UserError, match=r"the disk is full while writing .*x\.") as caught:
            write()
        assert "\n" not in str(caught.value)
    folder = files.atomic_folder(tmp_path / "folder")
    with pytest.raises(UserError, match="the disk is full"), folder as inside:
        (inside / "file").write_text("x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.json"]
    assert json.loads(path.read_text()) == [1]


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, [0] * 1000)
    stop = threading.Event()
    bad = []

    def read():
        while not stop.is_set():
            if len(set(json.loads(path.read_text()))) != 1:
                bad.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(100):
        files.write_json(path, [i] * 1000)
    stop.set()
    reader.join()
    assert not bad


def test_an_atomic_folder_replaces_the_old_one(tmp_path):
    for content in ("one", "two"):
        with files.atomic_folder(tmp_path / "folder") as inside:
            (inside / content).write_text(content)
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_stage_of_other_settings_with_the_same_result_is_taken(run):
    calls: list[str] = []
    old = stage(run, calls, settings={"rate": 1, "compile": "yes"})

    def again(settings, same):
        return run.stage("a", settings, {}, lambda folder: calls.append("new"), same=same)

    assert again({"rate": 1}, [{"rate": 1, "compile": "yes"}]) == old and calls == ["a"]
    below = stage(run, calls, "below", inputs={"a": old})
    assert facts(below)["inputs"]["a"] == facts(old)["fingerprint"]
    assert again({"rate": 2}, [{"rate": 2, "compile": "yes"}]) != old and calls[-1] == "new"


def test_an_interrupted_stage_of_the_same_result_is_gone_on_with(run):
    seen = []

    def build(folder):
        seen.append(sorted(p.name for p in folder.iterdir()))
        (folder / "checkpoint").write_text("x")
        if len(seen) == 1:
            raise KeyboardInterrupt
        return {}

    older = {"rate": 1, "compile": "yes"}
    with pytest.raises(KeyboardInterrupt):
        run.stage("a", older, {}, build)
    # not while another process is at it
    with run.claimed(run.folder("a", older, {})):
        run._take_over([run.folder("a", older, {})], run.out / "elsewhere")
    assert not (run.out / "elsewhere").exists()
    made = run.stage("a", {"rate": 1}, {}, build, same=[older])
    assert seen == [[], ["checkpoint"]] and not run.folder("a", older, {}).exists()
    assert run.stage("a", {"rate": 1}, {}, build) == made and len(seen) == 2


def test_a_raised_version_makes_a_stage_again_and_says_so(run, capsys):
    calls: list[str] = []

    def build(folder):
        calls.append("made")

    first = run.stage("a", {"x": 1}, {}, build)
    assert "version" not in facts(first)
    second = run.stage("a", {"x": 1}, {}, build, version=2)
    assert second != first and len(calls) == 2 and facts(second)["version"] == 2
    told = capsys.readouterr().err
    assert "the code that makes a has changed since (version 2)" in told.replace("\n", " ")
    assert run.stage("a", {"x": 1}, {}, build, version=2) == second and len(calls) == 2
    run.stage("b", {}, {}, build, version=2)
    assert "has changed" not in capsys.readouterr().err


def test_a_manifest_holds_sizes_and_digests_of_its_files(run):
    def build(folder):
        (folder / "part").mkdir()
        (folder / "part" / "x").write_text("hello")
        (folder / "part" / ".y.1.tmp").write_text("by a worker that was killed")

    made = facts(run.stage("a", {}, {}, build))["files"]
    assert made == {"part/x": [5, hashlib.sha256(b"hello").hexdigest()]}


def test_the_first_process_decides_whether_a_stage_is_finished(run, monkeypatch):
    """What the second one sees in its file system does not count, nor does it ask there."""
    calls: list[str] = []
    made = stage(run, calls)
    told = []

    def first_says(answer):
        def sum_scalars(*values):
            told.append(values)
            return [answer] if values != (0.0,) or answer else [0.0]
        return sum_scalars

    monkeypatch.setattr(parallel, "rank", lambda: 1)
    monkeypatch.setattr(parallel, "world", lambda: 2)
    monkeypatch.setattr(parallel, "sum_scalars", first_says(-1.0))
    with pytest.raises(Missing):  # it lies there, but the first does not see it yet
        Run(run.out, run.recipe, build=False).stage("a", {}, {}, lambda folder: None)
    monkeypatch.setattr(parallel, "sum_scalars", first_says(0.0))
    other = Run(run.out, run.recipe, build=False)
    (made / "manifest.json").rename(made / "hidden")
    assert other.stage("a", {}, {}, lambda folder: None) == made
    assert told and all(values == (0.0,) for values in told)
    # while the first works alone, nobody is asked
    told.clear()
    monkeypatch.setattr(parallel, "rank", lambda: 0)
    with run.by_first_alone():
        stage(run, calls, "alone")
    assert not told and calls == ["a", "alone"]


def test_a_run_that_only_shows_takes_stages_of_earlier_code(run, capsys):
    old = run.stage("a", {"x": 1}, {}, lambda folder: None)
    older = run.stage("a", {"x": 1, "layout": "older"}, {}, lambda folder: None)
    same = [{"x": 1, "layout": "older"}]
    shown = Run(run.out, run.recipe, build=False, earlier=True)
    with pytest.raises(Missing):
        Run(run.out, run.recipe, build=False).stage("a", {"x": 1}, {}, lambda folder: None,
                                                    version=3, same=same)
    capsys.readouterr()
    for _ in range(2):
        assert shown.stage("a", {"x": 1}, {}, lambda folder: None, version=3, same=same) == old
    assert capsys.readouterr().err.count("an earlier version of the code") == 1
    shutil.rmtree(old)
    assert shown.stage("a", {"x": 1}, {}, lambda folder: None, version=3, same=same) == older


def test_several_processes_hold_a_stage_against_other_runs(run, monkeypatch):
    """As experts of a mixture are trained side by side in one folder."""
    lock = run.out / "a"
    with run.claimed(lock):
        monkeypatch.setattr(parallel, "world", lambda: 2)
        with pytest.raises(Busy), Run(run.out, run.recipe).claimed(lock, wait=False):
            pass
        monkeypatch.setattr(parallel, "rank", lambda: 1)
        with Run(run.out, run.recipe).claimed(lock):  # follows the first
            pass


def test_a_stage_that_all_processes_fill_is_whole_when_its_files_are_listed(run, monkeypatch):
    events = []
    monkeypatch.setattr(parallel, "barrier", lambda: events.append("barrier"))
    contents = folder_module.contents
    monkeypatch.setattr(folder_module, "contents", lambda folder: (
        events.append("listed"), contents(folder))[1])
    run.stage("a", {}, {}, lambda folder: events.append("built"), every_rank=True)
    assert events == ["barrier", "built", "barrier", "listed", "barrier"]


@pytest.mark.parametrize("left", ["outcome.json", "arithmetic.json"])
def test_auto_is_the_precision_that_it_was_where_the_stage_was_made(run, left):
    auto, explicit = {"precision": "auto"}, {"precision": "fp32"}
    asked = {"same": [auto], "fits": training.as_precise(keys.Pretrain(precision="fp32"))}

    def build(folder):
        note = {"bf16": True, "rows": 4}
        files.write_json(folder / left, {"arithmetic": note} if left == "outcome.json" else note)
        if left == "arithmetic.json":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) if left == "arithmetic.json" else \
            contextlib.nullcontext():
        run.stage("a", auto, {}, build)
    made = run.stage("a", explicit, {}, lambda folder: {"new": not any(folder.iterdir())}, **asked)
    assert made == run.folder("a", explicit, {}) and facts(made)["new"]
