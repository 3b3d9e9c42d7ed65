"""What a study will cost: what cells share is counted once."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from planearly import config, methods
from planearly.cluster import shared
from planearly.cost import devices
from planearly.errors import UserError
from planearly.files import write_json
from planearly.study import forecast, grid, sharing
from small_runs import with_grid


def test_a_forecast_counts_shared_trainings_once(made):
    recipe = with_grid(
        made, {"methods": ["slm", "slm-d"]},
        {"methods": ["slm"], "over": {"finetune.replay_share": [0.1]}},
        {"methods": ["slm-is"], "over": {"spec_tokens": [300, 600]}}, spec_tokens=200)
    found = forecast.forecast(recipe, "a100")
    assert found["cells"] == 5
    # pretraining: slm and llm once, slm-is per set; fine-tuning: slm (2), llm, slm-d, slm-is (2)
    assert found["stages"] == 2 + 2 + 6
    assert found["total"]["flops"] == sum(m["flops"] for m in found["methods"].values())


def test_hours_of_workers_side_by_side_are_theirs_where_these_were_measured(
        made, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PLANEARLY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    recipe = with_grid(made, {"methods": ["slm", "slm-is"]}, spec_tokens=200)

    def calibrated(sharing, rate):
        write_json(devices.calibration_file(devices.here(), sharing=sharing), {
            "device": devices.here(), "kind": "cpu", "matmul_flops": 1e12, "when": "2026-01-01",
            "sharing": sharing, "matmul_kind": "bfloat16", "shapes": {"slm": {
                "d_model": 32, "flops_per_second": rate, "tokens_per_second": 1e3}}})

    def found(workers):
        made = forecast.forecast(recipe, workers=workers)
        assert made["hours"] == made["total"]["device_hours"]
        forecast.show(made)
        return made["hours"], capsys.readouterr().err

    calibrated(1, 1e9)
    (alone, said), (both, told) = found(None), found(2)
    assert alone == both and "worker" not in said
    assert "2 workers here: about" in told and "--workers 2 measures 2 side by side" in told
    calibrated(2, 3e9)
    assert found(1)[0] == alone
    hours, told = found(2)
    assert hours == pytest.approx(alone / 3)
    assert "2 workers here: about" in told and "measures" not in told
    assert forecast.forecast(recipe, "a100", 2)["hours"] is None
    elsewhere = forecast.forecast(replace(recipe, engine="ray"), workers=2)
    assert elsewhere["hours"] is None and not elsewhere["note"]
    over = with_grid(made, {"methods": ["slm"], "over": {"pretrain.precision": ["bf16", "fp32"]}},
                     spec_tokens=200)
    assert "the recipe names another precision" in forecast.forecast(over)["note"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)  # three of them have one to itself
    many = forecast.forecast(recipe, workers=3)
    assert many["hours"] == pytest.approx(many["total"]["device_hours"] / 3)
    five = forecast.forecast(recipe, workers=5)  # one GPU has two of them
    assert five["hours"] == pytest.approx(alone / 3 * 2 / 5)
    assert many["total"]["device_hours"] == pytest.approx(alone)


def test_teachers_of_other_budgets_begin_as_one(made):
    own, less = 16 * 8 * 40, 16 * 8 * 20
    over = {"spec_tokens": 200, "pretrain_tokens": own, "distill": {"teacher_tokens": own},
            "pretrain": {"batch_tokens": 128,
                         "optimizer": {"warmup_steps": 2, "schedule": "constant"}}}
    taught = {"methods": ["slm-d"], "over": {"distill.teacher_tokens": [less, own]}}

    def found(*blocks):
        return forecast.forecast(with_grid(made, *blocks, **over), "a100")

    both = found(taught)
    # one student and two teachers are pretrained, and fine-tuned for each
    assert both["stages"] == 1 + 2 + 2 * 2
    tuning = (both["total"]["tokens"] - 2 * own - less / 20) / 4
    assert 0 < tuning < less
    # the large model of the teacher's tokens is that teacher, fine-tuned too
    budgets = {"methods": ["llm"], "over": {"pretrain_tokens": [less, own]}}
    assert found(taught, budgets)["total"] == both["total"]
    alone = found(budgets)["total"]["tokens"]
    assert alone == pytest.approx(own + less / 20 + 2 * tuning)


def test_what_cells_add_is_what_the_study_costs(made):
    blocks = ({"methods": ["slm", "slm-d"]}, {"methods": ["slm-adapt", "slm"], "over": {
        "pretrain_tokens": [16 * 8 * 80, 16 * 8 * 40]}})
    recipe = with_grid(made, *blocks, spec_tokens=200, pretrain_tokens=16 * 8 * 40)
    cells = grid.cells(recipe, ["law"])
    found = forecast.added(cells)
    assert sum(found) == pytest.approx(
        forecast.forecast(replace(recipe, domains=["law"]), "a100")["total"]["flops"])
    assert [bool(work) for work in found] == [True] * len(cells)
    assert found[0] > 2 * forecast.added(cells[:2][::-1])[1]  # slm's training is slm-d's too
    assert forecast.added(grid.cells(replace(recipe, spec_tokens=None), ["law"])) == [1.0] * 5


@pytest.mark.parametrize("base", ["slm", "slm-pn"])
def test_a_forecast_counts_the_plateau_once(made, base):
    def tokens(*names):
        recipe = with_grid(made, {"methods": list(names)}, spec_tokens=200,
                           projected={"experts": 3})
        return forecast.forecast(recipe, "a100")["total"]["tokens"]

    shared = 17 * 8 * 16  # of 24 steps
    assert tokens(base, f"{base}-adapt") == pytest.approx(
        tokens(base) + tokens(f"{base}-adapt") - shared)


def test_budgets_of_other_slices_share_nothing(made, capsys):
    budgets = [1_000_000, 1_500_000, 10_000_000]

    def tokens(rank):
        recipe = with_grid(made, {"methods": ["slm-pn"], "over": {"pretrain_tokens": budgets}},
                           spec_tokens=200, projected={"experts": 3, "rank": rank})
        found = forecast.forecast(recipe, "a100")
        forecast.show(found)
        return found["total"]["tokens"], found["slices"]

    (fixed, silent), (chosen, told) = tokens(4), tokens(None)
    assert chosen - fixed == pytest.approx(0.7 * 1_500_000, rel=0.01)  # the second's begin
    assert not silent and [why.split(" at ")[0] for why in told] == [
        "4 slices", "4 slices", "12 slices"]
    assert f"projected network: {told[-1]}" in capsys.readouterr().err


def test_budgets_with_steps_of_other_sizes_share_nothing(made):
    budgets = [6_000_000, 10_000_000]  # steps of 2,048 and of 4,096 tokens where left open

    def tokens(step):
        recipe = with_grid(made, {"methods": ["slm"], "over": {"pretrain_tokens": budgets}},
                           spec_tokens=200, pretrain={"batch_tokens": step})
        return forecast.forecast(recipe, "a100")["total"]["tokens"]

    assert tokens(None) - tokens(2048) == pytest.approx(0.7 * 6_000_000, rel=0.01)


def test_a_method_of_the_table_is_in_the_forecast(made, monkeypatch):
    monkeypatch.setitem(methods.TABLE, "slm-new", methods.Method("slm-new", "SLM-new", "a new one"))
    found = forecast.forecast(with_grid(made, {"methods": ["slm", "slm-new"]}, spec_tokens=200),
                              "a100")
    assert found["cells"] == 2 and not found["impossible"]
    assert found["stages"] == 1 + 2  # one pretraining, which they share
    assert 0 < found["methods"]["slm-new"]["flops"] < found["methods"]["slm"]["flops"]


@pytest.mark.parametrize("rate, own", [
    ({"schedule": "constant"}, 1 / 20), ({"schedule": "wsd"}, 0.3), ({"schedule": "cosine"}, 1.0)])
def test_a_forecast_counts_the_steps_that_budgets_share_once(made, rate, own):
    long, short = 16 * 8 * 40, 16 * 8 * 20
    over = {"spec_tokens": 200, "pretrain_tokens": short,
            "pretrain": {"batch_tokens": 128, "optimizer": {"warmup_steps": 2, **rate}}}

    def tokens(*blocks):
        recipe = with_grid(made, {"methods": ["slm"]}, *blocks, **over)
        return forecast.forecast(recipe, "a100")["total"]["tokens"]

    tuning = tokens() - short
    both = tokens({"methods": ["slm"], "over": {"pretrain_tokens": [long]}})
    assert both == pytest.approx(2 * tuning + long + own * short)
    seeds = tokens({"methods": ["slm"], "over": {"pretrain_tokens": [long], "seed": [1]}})
    assert seeds == pytest.approx(2 * tuning + long + short)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["study-nano", "study-split", "study-smoke", "study-paper"])
def test_every_study_recipe_is_forecast(name, monkeypatch):
    monkeypatch.chdir(os.path.dirname(os.path.dirname(__file__)))
    recipe = config.load(name)
    if recipe.domains_root and not os.path.isdir(recipe.domains_root) and not recipe.domains:
        pytest.skip("the recipe's domains are not here")
    found = forecast.forecast(recipe, "a100")
    on_purpose = ["slm-pn"] if name == "study-smoke" else []
    assert [cell["cell"].split()[0] for cell in found["impossible"]] == on_purpose
    assert found["total"]["flops"] > 0


def test_a_forecast_tells_what_the_study_would_refuse(made, tmp_path):
    law = tmp_path / "law.json"
    shared.Shared({"name": "words", "digest": "e"}, 7,
                  {3: shared.Level("c", np.array([1.0, 2.0, 3.0]))}).save(law)
    for given, told in (({"domains": [str(law)]}, "'law' is given by its histogram, and a study"),
                        ({"generic": []}, "'generic' names no documents"),
                        ({"domains": [str(law)], "generic": ["pydocs"]}, "by its histogram")):
        recipe = with_grid(made, {"methods": ["slm-is"]}, spec_tokens=200, **given)
        with pytest.raises(UserError, match=told):
            forecast.forecast(recipe, "a100")


def test_a_forecast_looks_at_each_cell_a_bounded_number_of_times(made, monkeypatch):
    """Grids have tens of thousands of cells."""
    def looks(n):
        seen.clear()
        forecast.forecast(with_grid(made, {"methods": ["slm"], "over": {
            "seed": list(range(n)), "pretrain_tokens": [5_000, 10_000]}}, spec_tokens=200), "a100")
        return len(seen)

    seen: list[str] = []
    plain = sharing.generic
    monkeypatch.setattr(sharing, "generic", lambda name: seen.append(name) or plain(name))
    assert looks(8) <= 4 * looks(2)
