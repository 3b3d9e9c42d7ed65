"""Budgets that branch off longer ones."""

import pytest
import torch

from planearly import tensors
from planearly.cost import ledger
from planearly.errors import UserError
from planearly.files import read_json
from planearly.stages.claims import Busy
from planearly.stages.folder import Run
from planearly.stages.manifest import MANIFEST
from planearly.stages.trained import pretrained
from planearly.studies.paper import SUITE
from planearly.study.cells import Study
from planearly.study.run import study
from planearly.study.view import RESULTS
from planearly.study.workers import work
from planearly.train import loop, metrics
from small_runs import recipe as small
from small_runs import with_grid


@pytest.mark.slow
@pytest.mark.parametrize("rate, at_step", [("wsd", 14), ("constant", 19)])
def test_a_budget_that_branches_off_ends_as_one_of_its_own(made, tmp_path, rate, at_step):
    long, short = 16 * 8 * 40, 16 * 8 * 20
    pretrain = {"batch_tokens": 128, "compile": "no", "log_steps": 8,
                "optimizer": {"warmup_steps": 2, "schedule": rate}}

    def run(out, tokens, branches):
        made_recipe = small(made, pretrain_tokens=tokens,
                            pretrain={**pretrain, "branch_tokens": branches})
        with Run(out, made_recipe).opened() as this:
            return pretrained(this, "slm")

    shared, alone = tmp_path / "shared", tmp_path / "alone"
    run(shared, long, [long, short])
    branched = run(shared, short, [long, short])
    single = run(alone, short, [])
    assert branched.name == single.name
    begun = read_json(branched / MANIFEST)["begun"]
    assert begun["at_step"] == at_step and begun["tokens"] > 0
    spent = ledger.add_up([shared])
    trained = [s["tokens"] for s in spent["stages"] if s["stage"].startswith("pretrain")]
    assert spent["total"]["tokens"] == sum(trained) - begun["tokens"]
    assert "begun" not in read_json(single / MANIFEST)
    told = [(r["step"], r["loss"]) for r in metrics.read(branched / "metrics.jsonl")]
    assert told == [(r["step"], r["loss"]) for r in metrics.read(single / "metrics.jsonl")]
    one, other = (tensors.load_tensors(p / loop.FINAL)[0] for p in (branched, single))
    assert all(torch.equal(one[name], other[name]) for name in other)


def budgets(root, *more):
    """A study of 20 steps, and of 40 and 12 after it."""
    return with_grid(
        root, {"methods": ["slm"]},
        {"methods": ["slm"], "over": {"pretrain_tokens": [16 * 8 * 40, 16 * 8 * 12]}}, *more,
        pretrain_tokens=16 * 8 * 20,
        pretrain={"batch_tokens": 128, "compile": "no", "optimizer": {"warmup_steps": 1}})


def pretrainings(out):
    """Steps of every finished pretraining, and the step at which it branched off another."""
    made = [read_json(path) for path in out.glob(f"pretrain/*/{MANIFEST}")]
    return {m["settings"]["steps"]: m.get("begun", {}).get("at_step") for m in made}


@pytest.mark.slow
def test_the_longest_budget_is_pretrained_first_unless_it_fails(made, tmp_path, monkeypatch):
    steps, real = [], loop.train

    def train(model, stream, n, *args, **kwargs):
        if kwargs["name"] == "slm":
            steps.append(n)
            if n in failing:
                raise FloatingPointError("the loss is not finite")
        return real(model, stream, n, *args, **kwargs)

    monkeypatch.setattr(loop, "train", train)
    failing = []
    study(budgets(made), tmp_path / "whole", SUITE)
    assert steps == [40, 20, 12] and pretrainings(tmp_path / "whole") == {40: None, 20: 14, 12: 8}
    steps.clear()
    failing = [40]
    out = tmp_path / "failing"
    with pytest.raises(UserError, match="1 cell failed"):
        study(budgets(made), out, SUITE)
    assert steps == [40, 20, 12] and pretrainings(out) == {20: None, 12: 8}
    skipped = read_json(out / RESULTS)["skipped"]
    assert [cell["settings"]["pretrain_tokens"] for cell in skipped] == [16 * 8 * 40]


@pytest.mark.slow
def test_students_and_teachers_whose_budgets_run_opposite_ways_begin_as_the_longest(made, tmp_path):
    long, short = 16 * 8 * 40, 16 * 8 * 20
    taught = [{"methods": ["slm-d"], "over": {
        "pretrain_tokens": [own], "distill.teacher_tokens": [teachers]}}
        for own, teachers in ((long, short), (short, long))]
    recipe = with_grid(made, *taught, pretrain={
        "batch_tokens": 128, "compile": "no", "optimizer": {"warmup_steps": 1}})
    study(recipe, tmp_path / "study", SUITE)
    found = [read_json(path) for path in (tmp_path / "study").glob(f"pretrain/*/{MANIFEST}")]
    begun = {(m["stage"], m["settings"]["steps"]): m.get("begun", {}).get("at_step") for m in found}
    assert begun == {(f"pretrain/{name}", steps): at for name in ("slm", "llm")
                     for steps, at in ((40, None), (20, 14))}


@pytest.mark.slow
def test_a_budget_waits_for_the_longer_one_that_another_worker_makes(made, tmp_path):
    out, recipe = tmp_path / "study", budgets(made, {"methods": ["slm-nopt"]})
    out.mkdir()
    whole = Study(recipe, out, wait=False)
    own, longest, shortest, other = whole.cells
    real, busy = loop.train, []

    def train(model, stream, n, *args, **kwargs):
        if kwargs["name"] == "slm" and n == 40:
            worker = Study(recipe, out, wait=False)
            for cell in (own, longest, shortest):
                with pytest.raises(Busy):
                    worker.make(cell)
                busy.append(cell)
            worker.make(other)
        return real(model, stream, n, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train", train)
        work(whole)
    assert busy == [own, longest, shortest]
    assert pretrainings(out) == {40: None, 20: 14, 12: 8}


@pytest.mark.slow
def test_a_finished_budget_does_not_call_for_a_longer_one(made, tmp_path):
    out = tmp_path / "study"
    study(small(made, study={"grid": [{"methods": ["slm"]}]}, pretrain_tokens=16 * 8 * 20,
                pretrain=budgets(made).to_dict()["pretrain"]), out, SUITE)
    before = {path: path.stat().st_mtime_ns for path in out.rglob(MANIFEST)}
    this = Study(budgets(made), out)
    this.make(this.cells[0])
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob(MANIFEST)}
