"""The study: its cells through the stages, and what becomes of those that fail."""

import contextlib
import errno

import pytest

from planearly.errors import UserError
from planearly.files import read_json
from planearly.stages.folder import Run
from planearly.stages.manifest import MANIFEST
from planearly.studies.paper import SUITE
from planearly.study import view
from planearly.study.run import study as whole_study
from planearly.study.view import RESULTS
from planearly.train import loop
from small_runs import with_grid


def study(recipe, out, **how):
    return whole_study(recipe, out, SUITE, **how)


@pytest.mark.slow
def test_impossible_cells_are_told_and_the_others_run(made, tmp_path):
    recipe = with_grid(made, {"methods": ["slm", "slm-pn", "nonsense"]},
                       {"methods": ["slm"], "over": {"spec_tokens": [-5, 300]}})
    out = tmp_path / "study"
    page = study(recipe, out)
    found = read_json(out / RESULTS)
    assert [(r["method"], r["settings"]["spec_tokens"]) for r in found["rows"]] == [
        ("slm", None), ("slm", 300)]
    reasons = {(s["method"], s["settings"]["spec_tokens"]): s["reason"] for s in found["skipped"]}
    assert "projected.experts" in reasons["slm-pn", None]
    assert "nonsense" in reasons["nonsense", None] and "spec_tokens" in reasons["slm", -5]
    assert not found["pending"] and page.exists()
    told = (out / "README.md").read_text("utf-8")
    assert "projected.experts" in told and "fine-tuning" in told.lower()
    row = found["rows"][0]
    assert len(row["nll_after"]) == len(row["nll_before"]) == len(row["tokens"])
    assert row["finetuning"]["validation"]


@pytest.mark.slow
def test_a_finished_cell_is_never_made_again(made, tmp_path):
    out = tmp_path / "study"
    one, both = {"methods": ["slm"]}, {"methods": ["slm", "slm-nopt"]}
    study(with_grid(made, both), out, only_report=True)
    found = read_json(out / RESULTS)
    assert len(found["pending"]) == 2 and not found["rows"]
    study(with_grid(made, one), out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob(MANIFEST)}
    assert before
    study(with_grid(made, both), out)
    again = {path: path.stat().st_mtime_ns for path in out.rglob(MANIFEST)}
    assert before.items() <= again.items() and len(again) == len(before) + 2
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
