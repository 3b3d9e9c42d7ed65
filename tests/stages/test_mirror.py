"""A run folder in a store: what one machine finished, another has."""

import time

import pytest
import torch
from safetensors.torch import load_file

from planearly import storage
from planearly.errors import UserError
from planearly.files import read_json
from planearly.stages import mirror, pipeline
from planearly.train import loop, state
from small_runs import recipe, results
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


@pytest.mark.s3
def test_a_run_folder_on_a_server_of_s3(made, s3, machine, capsys):
    url, asked = f"{s3}/runs/mine", recipe(made, methods=["slm"])
    pipeline.run(asked, url, "prepare")
    first = results(here(url))
    machine()
    capsys.readouterr()
    pipeline.run(asked, url, "prepare")
    assert " 0 stages made" in capsys.readouterr().err and results(here(url)) == first
