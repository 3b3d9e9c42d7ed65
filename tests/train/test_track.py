"""What a training logs goes to a tracker once, whatever happens to either."""

from __future__ import annotations

import itertools
import sys
from types import ModuleType, SimpleNamespace

import pytest

from planearly.errors import UserError
from planearly.files import read_json
from planearly.stages import doctor, pipeline
from planearly.train import loop, metrics, track
from small_runs import recipe
from small_trainings import killed_after_steps, run, same, settings


@pytest.fixture(autouse=True)
def nothing_given_up(monkeypatch):
    monkeypatch.setattr(track, "_given_up", set())


def cut_and_gone_on_with(out, kind, monkeypatch, at=(4, 8)):
    """A tracked training of 12 steps that is killed twice, with one checkpoint at step 5."""
    def tracked():
        with track.following(kind, out, {"seed": 1}):
            return run(out / "pretrain" / "t", train=settings(log_steps=1), validate_steps=3,
                       validate=lambda model: sum(p.sum().item() for p in model.parameters()))

    calls = itertools.count(1)
    monkeypatch.setattr(loop, "_time_to_save", lambda *_: next(calls) == at[0] + 1 + 5)
    for steps in at:
        killed_after_steps(steps, tracked)
    outcome, weights = tracked()
    assert outcome.steps == 12
    return metrics.read(out / "pretrain" / "t" / "metrics.jsonl"), weights


def points(records):
    """(name, step, value) of records, sorted; of validations that value alone."""
    return sorted((name, record["step"], value) for record in records
                  for name, value in record.items()
                  if name != "step" and (name == "validation" or "validation" not in record))


def lasting(found):
    """Without what is measured anew."""
    return [each for each in found if each[0] not in ("seconds", "tokens_per_second")]


def test_tensorboard_reads_every_line_of_metrics_once(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    logged, _ = cut_and_gone_on_with(tmp_path / "out", "tensorboard", monkeypatch)
    assert len(logged) == 12 + 4
    found = [(value.tag, event.step, value.simple_value)
             for file in (tmp_path / "out" / "tensorboard" / "pretrain" / "t").iterdir()
             for event in LegacyEventFileLoader(str(file)).Load() for value in event.summary.value]
    assert len(found) == len({each[:2] for each in found})
    assert [each[:2] for each in sorted(found)] == [each[:2] for each in points(logged)]
    assert [each[2] for each in sorted(found)] == pytest.approx(
        [each[2] for each in points(logged)], rel=1e-6)


class Service(ModuleType):
    """As much of wandb and of trackio as is used; notes what is logged in which run."""

    def __init__(self, name, works=lambda *_: True):
        super().__init__(name)
        self.runs, self.points, self.open, self.works = [], [], 0, works
        self.Settings = dict

    def init(self, project, **values):
        if not self.works("init"):
            raise ConnectionError("\n no route\nto host")
        self.runs.append((values.get("id"), values["name"], values["config"]))
        self.open += 1

        def log(record, step=None):
            if not self.works("log"):
                raise OSError("gone")
            step = record["step"] if step is None else step
            self.points.append({**record, "step": step})

        def finish():
            self.open -= 1

        return SimpleNamespace(log=log, finish=finish, offline=True,
                               define_metric=lambda *_, **__: None)


@pytest.fixture(params=["wandb", "trackio"])
def service(request, monkeypatch):
    made = Service(request.param)
    monkeypatch.setitem(sys.modules, request.param, made)
    return made


def test_a_service_gets_every_line_of_metrics_once(tmp_path, monkeypatch, service):
    logged, _ = cut_and_gone_on_with(tmp_path / "out", service.__name__, monkeypatch)
    assert lasting(points(service.points)) == lasting(points(logged))
    assert len(service.runs) == 3 and len({each[:2] for each in service.runs}) == 1
    assert service.runs[0][2] == {"seed": 1} and "pretrain/t" in service.runs[0][1]
    assert service.open == 0


@pytest.mark.parametrize("text", ["{", "[1]", "7", "{}", '{"id": "x"}', '{"id": "x", "last": 1}'])
def test_where_nobody_knows_what_was_sent_all_is_sent_again(tmp_path, service, text):
    note = tmp_path / service.__name__ / "a" / "sent.json"
    note.parent.mkdir(parents=True)
    note.write_text(text)
    with track.following(service.__name__, tmp_path, {}):
        run(tmp_path / "a", train=settings(log_steps=1))
    steps = [point["step"] for point in service.points if "loss" in point]
    assert steps == sorted(set(steps)) and len(steps) > 3
    assert read_json(note)["last"]["loss"] == steps[-1]


@pytest.mark.parametrize("breaks", ["init", "log"])
def test_a_service_out_of_reach_stops_nothing(tmp_path, monkeypatch, service, breaks, capsys):
    calls = itertools.count()
    service.works = lambda what: what != breaks or (what == "log" and next(calls) < 3)
    _, untracked = run(tmp_path / "untracked")
    with track.following(service.__name__, tmp_path, {}):
        for name in "ab":
            assert same(untracked, run(tmp_path / name, train=settings(log_steps=1))[1])
    why = "no route" if breaks == "init" else "gone"
    assert capsys.readouterr().err.count(
        f"track={service.__name__} is given up ({why}): training goes on") == 1
    assert len(service.points) == (0 if breaks == "init" else 3)


def test_a_tracker_that_is_not_installed_is_told_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(track.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb is not installed: pip install 'planearly\["):
        pipeline.run(recipe(tmp_path, track="wandb"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tracking_makes_nothing_again(made, tmp_path, capsys):
    out = tmp_path / "run"
    pipeline.run(recipe(made, methods=["slm"]), out, "pretrain")
    assert not (out / "tensorboard").exists()
    capsys.readouterr()
    pipeline.run(recipe(made, methods=["slm"], track="tensorboard"), out, "pretrain")
    told = capsys.readouterr().err
    assert " 0 stages made" in told and "other settings" not in told
    pipeline.run(recipe(made, methods=["slm"], track="tensorboard", seed=1), out, "pretrain")
    trained = {path.parent.relative_to(out / "tensorboard").as_posix().rpartition("-")[0]
               for path in (out / "tensorboard").rglob("events*")}
    assert trained == {"pretrain/slm"}
    assert doctor.examine(out).findings == []
