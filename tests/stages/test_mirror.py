"""A run folder in a store: what one machine finished, another has."""

import time

import pytest
import torch
from safetensors.torch import load_file

from planearly import storage
from planearly.errors import UserError
from planearly.files import read_json
from planearly.stages import mirror, pipeline
from planearly.tensors import save_tensors
from planearly.train import loop, state
from small_runs import recipe, results
from small_stores import fill
from small_trainings import killed_after_steps


@pytest.fixture
def machine(monkeypatch, tmp_path_factory):
    """Go to another machine, whose cache is empty."""
    def another():
        monkeypatch.setenv("PLANEARLY_CACHE", str(tmp_path_factory.mktemp("machine")))
    another()
    return another


def here(url: str):
    return mirror.Mirror(url).folder


@pytest.mark.slow
def test_another_machine_goes_on_where_one_ended(made, memory, machine, tmp_path, capsys):
    url, asked = f"{memory}/runs/mine", recipe(made, methods=["slm"])
    ours = pipeline.run(asked, tmp_path / "local")
    theirs = pipeline.run(asked, url)
    assert [row["ppl_after"] for row in theirs["rows"]] == [
        row["ppl_after"] for row in ours["rows"]]
    first, local = results(here(url)), results(tmp_path / "local")
    assert first.keys() == local.keys()
    stages = len(list(here(url).rglob("manifest.json")))
    there = storage.tree(url)
    assert sum(name.endswith("manifest.json") for name in there) == stages > 8
    assert {"results.json", "report.html", "recipe.yaml"} < there.keys()

    machine()
    capsys.readouterr()
    pipeline.run(asked, url, "prepare")
    assert " 0 stages made" in capsys.readouterr().err
    assert not list(here(url).glob("model*")) and list(here(url).glob("generic-*/tokens*"))
    again = pipeline.run(asked, url)
    assert " 0 stages made" in capsys.readouterr().err
    assert again["rows"] == theirs["rows"]
    second = results(here(url))
    assert second | {"report.html": first["report.html"]} == first  # it names places of a machine
    assert storage.tree(url).keys() == there.keys()

    machine()
    pipeline.run(recipe(made, methods=["slm", "slm-nopt"]), url)
    told = capsys.readouterr().err
    assert "── specialize/slm-nopt.law" in told and "── pretrain/slm" not in told


@pytest.mark.slow
def test_another_machine_goes_on_from_the_last_checkpoint(
        made, memory, machine, tmp_path, monkeypatch, capsys):
    url, asked = f"{memory}/run", recipe(made, methods=["slm"])
    pipeline.run(asked, tmp_path / "whole", "pretrain")
    monkeypatch.setenv("PLANEARLY_CHECKPOINT_EVERY_STEP", "1")
    monkeypatch.setattr(mirror, "_SECONDS", 0.01)
    save, saves = state.save_training, []

    def waited(*words):
        save(*words)
        saves.append(words[0])
        if len(saves) == 6:  # the machine is lost after a checkpoint was sent
            until = time.monotonic() + 60
            while not any(name.endswith(loop.CHECKPOINT) for name in storage.tree(url)):
                assert time.monotonic() < until
                time.sleep(0.01)

    monkeypatch.setattr(state, "save_training", waited)
    killed_after_steps(9, lambda: pipeline.run(asked, url, "pretrain"))
    assert len(saves) >= 6
    machine()
    capsys.readouterr()
    pipeline.run(asked, url, "pretrain")
    told = capsys.readouterr().err
    assert "slm: continues after step" in told and "── generic" not in told
    one, two = (load_file(next(root.glob("pretrain/slm-*/final.safetensors")))
                for root in (tmp_path / "whole", here(url)))
    assert all(torch.equal(one[name], two[name]) for name in one)
    stage = next(here(url).glob("pretrain/slm-*"))
    sent = storage.tree(f"{url}/{stage.relative_to(here(url))}")
    assert {name for name in sent if name[0] != "."} == {
        path.name for path in stage.iterdir()} == {*read_json(stage / "manifest.json")["files"],
                                                   "manifest.json"}


def test_what_could_not_be_sent_is_sent_by_the_next_call(made, memory, machine, monkeypatch, hasty):
    url, asked = f"{memory}/run", recipe(made, methods=["slm"])
    publish, fails = storage.publish, [True]

    def lost(files, place, *words, **more):
        if "/tokenizer-" in place and fails:
            raise UserError("cannot reach the store")
        return publish(files, place, *words, **more)

    monkeypatch.setattr(storage, "publish", lost)
    with pytest.raises(UserError, match="cannot reach"):
        pipeline.run(asked, url, "prepare")
    assert not any("tokenizer" in name for name in storage.tree(url))
    fails.clear()
    pipeline.run(asked, url, "prepare")
    found = storage.tree(url)
    for stage in ("tokenizer", "generic", "domain/law", "kept"):
        assert any(name.startswith(f"{stage}-") and name.endswith("manifest.json")
                   for name in found)


def test_what_another_machine_wrote_is_not_replaced_by_older(
        memory, monkeypatch, tmp_path, hasty):
    def on(name, text=None):
        """Work on a machine, which writes this; what is in the store then."""
        monkeypatch.setenv("PLANEARLY_CACHE", str(tmp_path / name))
        copy = mirror.Mirror(f"{memory}/run")
        copy.open()
        if text is not None:
            (copy.folder / "results.json").write_text(text)
        copy.close()
        return storage.reader(storage.tree(copy.url)["results.json"]).read()

    assert on("a", "[1]") == b"[1]"
    assert on("b") == b"[1]" and on("b", "[2]") == b"[2]"  # as large
    assert on("a") == b"[2]" and on("b", "[3, 4]") == b"[3, 4]"
    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot reach"):
        patch.setattr(storage, "publish", unreachable)
        on("b", "[5]")
    assert on("b") == b"[5]"  # sent by the next call
    (here(f"{memory}/run") / ".store.json").unlink()  # a copy made by an earlier planearly
    assert on("b") == b"[5]" and on("a") == b"[5]"


@pytest.mark.parametrize("left", ["", "{", "[1]", "7", '"text"', "null"])
def test_where_nobody_knows_what_was_agreed_the_store_s_are_taken(memory, machine, hasty, left):
    copy = mirror.Mirror(f"{memory}/run")
    copy.open()
    (copy.folder / "results.json").write_text("[1]")
    copy.close()
    (copy.folder / "results.json").write_text("[2]")
    (copy.folder / ".store.json").write_text(left)
    copy.open()
    assert (copy.folder / "results.json").read_text() == "[1]"
    assert read_json(copy.folder / ".store.json").keys() == {"results.json"}


def unreachable(*words, **more):
    raise UserError("cannot reach the store")


@pytest.fixture
def training(memory, machine):
    """Start a training on this machine: the files that it finds of the stage, and their folder."""
    def start():
        copy = mirror.Mirror(f"{memory}/run")
        copy.open()
        stage = copy.folder / "pretrain" / "slm-1234"
        stage.mkdir(parents=True, exist_ok=True)
        with copy.following(stage):
            return {path.name: path.read_bytes() for path in stage.iterdir()}, stage
    return start


def checkpoint(place, steps):
    place.mkdir(parents=True, exist_ok=True)
    save_tensors(place / loop.CHECKPOINT, {"a": torch.full((9,), steps)}, {
        "outcome": {"steps": steps}})
    (place / loop.BEST).write_bytes(b"best of %d" % steps)
    (place / "metrics.jsonl").write_bytes(b"lines of %d" % steps)
    return {path.name: path.read_bytes() for path in place.iterdir()}


def test_a_checkpoint_comes_whole_or_not_at_all(memory, training, tmp_path, monkeypatch, hasty):
    sent = checkpoint(tmp_path / "sent", 900)
    fill(f"{memory}/run/pretrain/slm-1234", tmp_path / "sent")
    fetch = storage.fetch

    def lost(url, files):
        fetch(url, {path: file for path, file in files.items() if path.name == loop.BEST})
        if files:
            unreachable()

    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot reach"):
        patch.setattr(storage, "fetch", lost)
        training()
    later = checkpoint(tmp_path / "sent", 901)  # of the same sizes
    fill(f"{memory}/run/pretrain/slm-1234", tmp_path / "sent")
    found, stage = training()
    assert found == later != sent
    assert [path.name for path in stage.parent.iterdir()] == [stage.name]


def test_the_later_checkpoint_is_gone_on_from(memory, training, tmp_path):
    sent = checkpoint(tmp_path / "sent", 900)
    fill(f"{memory}/run/pretrain/slm-1234", tmp_path / "sent")
    found, stage = training()
    assert found == sent
    own = stage / "branch-50.safetensors"  # of what the store has no copy
    own.write_bytes(b"own")
    checkpoint(stage, 100)
    assert training()[0] == {**sent, own.name: b"own"}
    for damaged in (b"", b"?" * 99, b"\2" + bytes(7) + b"{}"):
        (stage / loop.CHECKPOINT).write_bytes(damaged)
        assert training()[0] == {**sent, own.name: b"own"}
    later = checkpoint(stage, 901)
    assert training()[0] == later
    (stage / loop.CHECKPOINT).unlink()
    (stage / loop.OUTCOME).write_text("{}")  # done here, and not yet sent
    assert loop.CHECKPOINT not in training()[0]


@pytest.mark.s3
def test_a_run_folder_on_a_server_of_s3(made, s3, machine, capsys):
    url, asked = f"{s3}/runs/mine", recipe(made, methods=["slm"])
    pipeline.run(asked, url, "prepare")
    first = results(here(url))
    machine()
    capsys.readouterr()
    pipeline.run(asked, url, "prepare")
    assert " 0 stages made" in capsys.readouterr().err and results(here(url)) == first
