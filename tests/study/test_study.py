"""The study: its cells through the stages, and what becomes of those that fail."""

import contextlib
import errno
import json
import re
import shutil

import numpy as np
import pytest

from planearly.cluster import shared
from planearly.errors import UserError
from planearly.files import read_json, write_json
from planearly.stages.folder import Run
from planearly.stages.manifest import MANIFEST
from planearly.studies.paper import SUITE
from planearly.study import view
from planearly.study.cells import Study, reason_in
from planearly.study.run import again, conclude
from planearly.study.run import study as whole_study
from planearly.study.view import RESULTS
from planearly.train import loop
from small_runs import with_grid


def study(recipe, out, **how):
    return whole_study(recipe, out, SUITE, **how)


@pytest.mark.slow
def test_impossible_cells_are_told_and_the_others_run(made, tmp_path):
    recipe = with_grid(made, {"methods": ["slm", "slm-pn"]},
                       {"methods": ["slm"], "over": {"spec_tokens": [-5, 300]}})
    out = tmp_path / "study"
    page = study(recipe, out)
    found = read_json(out / RESULTS)
    assert [(r["method"], r["settings"]["spec_tokens"]) for r in found["rows"]] == [
        ("slm", None), ("slm", 300)]
    reasons = {(s["method"], s["settings"]["spec_tokens"]): s["reason"] for s in found["skipped"]}
    assert "projected.experts" in reasons["slm-pn", None]
    assert "spec_tokens" in reasons["slm", -5]
    assert not found["pending"] and page.exists()
    told = (out / "README.md").read_text("utf-8")
    assert "projected.experts" in told and "fine-tuning" in told.lower()
    row = found["rows"][0]
    assert len(row["nll_after"]) == len(row["nll_before"]) == len(row["tokens"])
    assert row["finetuning"]["validation"]


@pytest.mark.slow
def test_rows_of_experts_are_routed_too_but_those_that_an_older_version_finished(made, tmp_path):
    recipe = with_grid(made, {"methods": ["slm", "slm-pn"]},
                       projected={"experts": 3, "rank": 2, "embedding": 3})
    out = tmp_path / "study"
    study(recipe, out)
    found = read_json(out / RESULTS)
    rows = {row["method"]: row for row in found["rows"]}
    assert rows["slm"]["nll_routed"] is None
    assert len(rows["slm-pn"]["nll_routed"]) == len(rows["slm-pn"]["tokens"])
    assert {"generic", "law"} <= found["entropies"].keys()
    (stage,) = out.glob("evaluate/slm-pn.law.routed-*")
    shutil.rmtree(stage)
    study(recipe, out, only_report=True)
    again = read_json(out / RESULTS)
    assert not again["pending"] and [row["nll_routed"] for row in again["rows"]] == [None, None]


def test_a_domain_without_texts_is_told_before_anything_is_made(made, tmp_path):
    law = tmp_path / "law.json"
    shared.Shared({"name": "words", "digest": "e"}, 7,
                  {3: shared.Level("c", np.array([1.0, 2.0, 3.0]))}).save(law)
    recipe = with_grid(made, {"methods": ["slm-is"]}, domains=[str(law)])
    with pytest.raises(UserError, match="'law' is given by its histogram, and a study fine-tunes"):
        study(recipe, tmp_path / "study")
    assert not list((tmp_path / "study").glob("*-*"))


def test_a_share_that_adaptation_does_not_read_is_told_once(made, tmp_path, capsys):
    over = {"pretrain.specialization_share": [0, 0.05, 0.1],
            "adapt.specialization_share": [0, 0.1], "seed": [0, 1]}

    def told(*methods):
        recipe = with_grid(made, {"methods": list(methods), "over": over}, generic=["nowhere"])
        with pytest.raises(UserError, match="nowhere"):  # it is told before anything is made
            study(recipe, tmp_path / "study")
        lines = capsys.readouterr().err.splitlines()
        return [share for share in ("0.05", "0.1") for line in lines if
                f"'pretrain.specialization_share' is {share}, which slm-adapt does not" in line]

    assert told("slm-is") == []
    assert told("slm-is", "slm-adapt") == ["0.05", "0.1"]


@pytest.mark.parametrize("only_report", [False, True])
@pytest.mark.parametrize("name", ["README.md", "index.html", "tables/a.txt", "figures/a.txt"])
def test_files_of_others_are_left_alone(made, tmp_path, only_report, name):
    file = tmp_path / "mine" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    top = re.escape(name.split("/")[0])
    with pytest.raises(UserError, match=rf"{top} is of something else, and a study would replace"):
        study(with_grid(made, {"methods": ["slm"]}), tmp_path / "mine", only_report=only_report)
    assert [path for path in (tmp_path / "mine").rglob("*") if path.is_file()] == [file]


@pytest.mark.parametrize("damage", [
    lambda found: found.pop("name"), lambda found: found.update(domains=None),
    lambda found: found["rows"].append({"settings": 3}),
    lambda found: found.update(rows=[3])])
def test_what_is_no_study_json_is_one_sentence(damage, tmp_path):
    found = {"name": "s", "recipe": {}, "rows": [], "domains": ["law"]}
    damage(found)
    file = tmp_path / "study.json"
    file.write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"is not a study\.json as 'planearly study' writes it"):
        again(file, tmp_path / "out", lambda name: SUITE)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_finished_cell_is_never_made_again(made, tmp_path):
    out = tmp_path / "study"
    one, both = {"methods": ["slm"]}, {"methods": ["slm", "slm-nopt"]}
    with pytest.raises(UserError, match=r"none of the study's 2 cells is finished in .*study: run"):
        study(with_grid(made, both), out, only_report=True)
    assert not (out / RESULTS).exists() and not (out / "index.html").exists()
    study(with_grid(made, one), out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob(MANIFEST)}
    assert before
    study(with_grid(made, both), out)
    after = {path: path.stat().st_mtime_ns for path in out.rglob(MANIFEST)}
    assert before.items() <= after.items() and len(after) == len(before) + 2
    assert len(read_json(out / RESULTS)["rows"]) == 2


@pytest.mark.slow
def test_a_report_needs_no_lock_and_leaves_all_or_nothing(made, tmp_path, monkeypatch):
    out, recipe = tmp_path / "study", with_grid(made, {"methods": ["slm-nopt"]})
    study(recipe, out)
    (out / "tables" / "of-an-earlier-grid.csv").touch()
    other = with_grid(made, {"methods": ["slm-nopt", "slm"]}, name="other")
    with Run(out, recipe).opened():
        before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}

        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(view, "text", interrupted)
            study(other, out, only_report=True)
        assert before == {p: p.read_bytes() for p in before}
        study(other, out, only_report=True)
    found = read_json(out / RESULTS)
    assert found["name"] == "other" and len(found["rows"]) == len(found["pending"]) == 1
    assert (out / "recipe.yaml").read_bytes() == before[out / "recipe.yaml"]
    assert not (out / "tables" / "of-an-earlier-grid.csv").exists()
    assert list(out.glob("tables/*.csv")) and list(out.glob("figures/*.svg"))
    assert not (out / ".report").exists()


@pytest.mark.slow
def test_a_failure_is_noted_and_tried_again(made, tmp_path, monkeypatch):
    out, recipe = tmp_path / "study", with_grid(made, {"methods": ["slm", "slm-nopt"]})
    real = loop.train

    def broken(*args, **kwargs):
        if kwargs["name"].startswith("slm-nopt"):
            raise FloatingPointError("the loss is not finite")
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "train", broken)
    with pytest.raises(UserError, match="1 cell failed, slm-nopt on law as: Floating"):
        study(recipe, out)
    found = read_json(out / RESULTS)
    assert [r["method"] for r in found["rows"]] == ["slm"]
    reason = found["skipped"][0]["reason"]
    assert "not finite" in reason
    log = out / reason.partition("traceback: ")[2].split()[0]
    assert "in broken" in log.read_text("utf-8")
    monkeypatch.setattr(loop, "train", real)
    study(recipe, out)
    assert not read_json(out / RESULTS)["skipped"] and not log.exists()


@pytest.mark.parametrize("text", ["{", "[1]", "7", "null", "{}"])
def test_a_damaged_note_of_a_failure_is_none(made, tmp_path, text):
    out = tmp_path / "study"
    this = Study(with_grid(made, {"methods": ["slm-nopt"]}), out, build=False)
    note = this.failed(this.cells[0])
    write_json(note, {"reason": "it was late"})
    note.with_name("other.json").write_text(text)
    assert reason_in(note) == "it was late" and reason_in(note.with_name("other.json")) is None
    assert [one["reason"] for one in conclude(this, SUITE)[1]] == ["it was late"]
    note.write_text(text)
    with pytest.raises(UserError, match="none of the study's 1 cells is finished"):
        conclude(this, SUITE)


@pytest.mark.slow
@pytest.mark.parametrize("times", [2, 3])
def test_a_failure_of_the_machine_is_tried_three_times(made, tmp_path, monkeypatch, times):
    out, recipe = tmp_path / "study", with_grid(made, {"methods": ["slm-nopt"]})
    real, tried = loop.train, []

    def short_of_disk(*args, **kwargs):
        tried.append(1)
        if len(tried) <= times:
            raise OSError(errno.ENOSPC, "No space left on device", "somewhere")
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "train", short_of_disk)
    monkeypatch.setattr("planearly.study.cells.PAUSE", 0.0)
    told = contextlib.nullcontext() if times == 2 else pytest.raises(
        UserError, match=r"1 cell failed, slm-nopt on law as: .*No space left")
    with told:
        study(recipe, out)
    assert len(tried) == 3 and len(read_json(out / RESULTS)["rows"]) == (times == 2)


@pytest.mark.slow
def test_what_cells_share_fails_once_in_a_session(made, tmp_path, monkeypatch):
    out, tried = tmp_path / "study", []
    recipe = with_grid(made, {"methods": ["slm"], "over": {"spec_tokens": [None, 300]}})

    def broken(*args, **kwargs):
        tried.append(kwargs["name"])
        raise KeyError("no such thing")

    monkeypatch.setattr(loop, "train", broken)
    for times in (1, 2):
        with pytest.raises(UserError, match="2 cells failed"):
            study(recipe, out)
        assert tried == ["slm"] * times
    one, other = read_json(out / RESULTS)["skipped"]
    assert "KeyError: 'no such thing'" in one["reason"] and one["reason"] == other["reason"]
