"""What a recipe will cost, stage by stage; and that a plan's own recipes cost what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from planearly import config
from planearly.cli import app
from planearly.cost import devices
from planearly.data import corpora
from planearly.plan import recipes
from planearly.plan.inputs import PlanInput
from planearly.plan.predict import domain_names, predict
from planearly.plan.recommend import recommend
from small_models import model_folder

M, B = 10**6, 10**9


@pytest.mark.parametrize(("limit", "generic", "spec"), [
    (4 * M, 60 * M, M), (4 * M, B, 100_000), (126 * M, 20 * B, 20 * M), (None, 150 * B, M)])
def test_a_planned_recipe_costs_what_the_plan_says(
        limit: int | None, generic: int, spec: int, tmp_path: Path) -> None:
    a100 = devices.find("a100")
    made = recommend(PlanInput(a100, limit, generic, spec))
    written = {path.stem: path for path in recipes.write(made, tmp_path, [], [])}
    assert {"slm", "slm-pn", "slm-is"} <= set(written)
    for method, path in written.items():
        found = predict(config.load(path, ["domains=[a]"]), a100)["total"]
        planned = made.row(method).total
        # steps are whole
        assert found["device_hours"] == pytest.approx(planned.device_hours, rel=0.005), method
        assert found["tokens"] == pytest.approx(planned.tokens, rel=0.005), method


def test_of_a_corpus_by_name_a_plan_tells_what_is_downloaded() -> None:
    def downloads(*settings: str) -> dict[str, float]:
        recipe = config.load("slm-126m", ["spec_tokens=1M", "domains=[a]", *settings])
        found = predict(recipe, devices.find("a100"))["corpora"]
        return {corpus["corpus"]: corpus["downloads"] for corpus in found}

    assert downloads() == {}  # it names a dataset, of which a plan knows nothing
    assert downloads("data.max_tokens=1M") == {}
    for name, corpus in corpora.TABLE.items():
        one = [f"generic=[{name}]", "tokenizer.path=x"]
        assert downloads(*one) == {name: corpus.download}
        part = downloads(*one, "data.max_tokens=100M")[name]
        assert part == pytest.approx(3.2e9 * corpus.download / corpus.text)
        sampled = downloads(one[0], "data.max_tokens=100M", "tokenizer.sample_bytes=10M")[name]
        assert sampled == pytest.approx(part * 3.4 / 3.2)
    both = downloads("generic=[c4,dclm]", "data.max_tokens=1B", "tokenizer.path=x")
    assert sum(both.values()) < 15e9 and both["dclm"] > both["c4"]


def stages_of(*settings: str) -> dict[str, dict[str, Any]]:
    recipe = config.load("slm-126m", ["spec_tokens=1M", "domains=[a]", "pretrain_tokens=1B",
                                      "projected.experts=16", *settings])
    return {entry["stage"]: entry for entry in predict(recipe, devices.find("a100"))["stages"]}


def test_domains_are_called_as_a_run_calls_them(tmp_path: Path) -> None:
    for name in ("law", ".git"):
        (tmp_path / name).mkdir()
    root = config.load("slm-126m", [f"domains_root={tmp_path}", "domains=[]"])
    assert domain_names(root) == ["law"]
    named = config.load("slm-126m", ["domains=[law.jsonl, texts/farm.v2.jsonl.gz, docs/]"])
    assert domain_names(named) == ["law", "farm", "docs"]


def test_the_best_tuned_expert_is_forecast_as_a_fine_tuning_of_each() -> None:
    found = stages_of("methods=[slm-pn]", "expert=best-tuned")
    one, all_ = found["specialize/slm-pn.a"], found["expert/slm-pn.a"]
    for what in ("tokens", "flops", "device_hours"):
        assert all_[what] == pytest.approx(16 * one[what])
    scored = stages_of("methods=[slm-pn]")["expert/slm-pn.a"]
    assert 0 < scored["flops"] < one["flops"]


def test_generic_rows_in_fine_tuning_are_forecast() -> None:
    """Passes are over the domain's own rows: half of a step's are generic, so there are twice as
    many steps."""
    few = ("methods=[slm, slm-nopt, slm-d]", "finetune.max_epochs=1", "finetune.scratch_epochs=1")
    plain, half = stages_of(*few), stages_of(*few, "finetune.replay_share=0.5")
    taught = stages_of(*few, "distill.on=importance")
    for what in ("tokens", "flops", "device_hours"):
        def ratio(name: str, of: dict[str, Any], what: str = what) -> float:
            return float(of[f"specialize/{name}.a"][what] / plain[f"specialize/{name}.a"][what])

        assert ratio("slm", half) == ratio("llm", half) == pytest.approx(2, rel=0.02)
        assert ratio("slm-d", half) == ratio("slm-d", taught) == pytest.approx(2, rel=0.02)
        assert ratio("slm", taught) == ratio("slm-nopt", half) == 1


def test_training_the_vector_of_an_expert_is_forecast() -> None:
    plain, tuned = (stages_of("methods=[slm-pn]", *more) for more in (
        (), ("projected.tune_vector=true",)))
    for what in ("tokens", "flops", "device_hours"):
        assert tuned["expert/slm-pn.a"][what] == pytest.approx(
            plain["expert/slm-pn.a"][what] + plain["specialize/slm-pn.a"][what])
    assert "expert/slm-mix.a" in stages_of("methods=[slm-mix]", "projected.tune_vector=true")


def test_stored_answers_are_forecast_as_one_pass_of_the_teacher() -> None:
    live, stored = (stages_of("methods=[slm-d]", *more)["specialize/slm-d.a"] for more in (
        (), ("distill.top_k=8",)))
    student = stages_of("methods=[slm]")["specialize/slm.a"]
    assert stored["tokens"] == live["tokens"] == student["tokens"]
    passes = live["tokens"] / M
    assert live["flops"] - student["flops"] == pytest.approx(
        passes * (stored["flops"] - student["flops"]))
    assert passes > 2


def test_a_teacher_from_outside_is_not_forecast_as_trained(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "teacher", context=1024)
    assert set(stages_of("methods=[slm-d]")) == {
        "pretrain/slm", "pretrain/llm", "specialize/llm.a", "specialize/slm-d.a"}
    found = stages_of("methods=[slm-d]", f"distill.teacher={folder}")
    assert set(found) == {"pretrain/slm", "specialize/slm-d.a"}
    plain = stages_of("methods=[slm]")["specialize/slm.a"]
    assert plain["flops"] < found["specialize/slm-d.a"]["flops"] < 1.1 * plain["flops"]


def test_a_teacher_is_forecast_with_tokens_of_its_own() -> None:
    less = "distill.teacher_tokens=250M"
    whole, alone = stages_of("methods=[slm-d]"), stages_of("methods=[slm-d]", less)
    assert set(alone) == set(whole) and alone["pretrain/slm"] == whole["pretrain/slm"]
    for what in ("tokens", "flops", "device_hours"):
        assert alone["pretrain/llm"][what] == pytest.approx(
            whole["pretrain/llm"][what] / 4, rel=0.01)
    # beside the large model of as many tokens as the rest it is another
    for order in ("slm-d, llm-lora, llm", "llm, llm-lora, slm-d"):
        both = stages_of(f"methods=[{order}]", less)
        assert both["pretrain/llm"] == whole["pretrain/llm"]
        assert both["pretrain/llm (teacher)"]["tokens"] == alone["pretrain/llm"]["tokens"]
        assert {"specialize/llm.a", "specialize/llm.a (teacher)", "specialize/llm-lora.a",
                "specialize/slm-d.a"} < set(both)
        assert len(both) == 7


def test_scoring_the_corpus_by_two_models_is_forecast() -> None:
    found = stages_of("methods=[slm-color]", "generic=[fineweb]", "selection.candidates=0.1")
    assert set(found) == {"pretrain/slm", "losses/slm", "losses/slm.a", "specialize/slm.a",
                          "pretrain/slm-color.a", "specialize/slm-color.a"}
    assert found["pretrain/slm"] | {"stage": ""} == found["pretrain/slm-color.a"] | {"stage": ""}
    scored, trained = found["losses/slm"]["flops"], found["pretrain/slm"]["flops"]
    assert found["losses/slm.a"]["flops"] == scored
    assert scored == pytest.approx(trained / 3, rel=0.01)  # as many tokens as pretraining, forward
    unknown = stages_of("methods=[slm-color]", "data.max_tokens=500M")["losses/slm"]
    assert unknown["flops"] == pytest.approx(scored / 2)


def test_scratch_is_forecast_with_its_own_passes() -> None:
    few, many = (stages_of("methods=[slm-nopt]", "finetune.max_epochs=1",
                           f"finetune.scratch_epochs={n}")["specialize/slm-nopt.a"]["tokens"]
                 for n in (1, 3))
    assert many == pytest.approx(3 * few, rel=0.05)


def test_adapting_an_expert_is_costed_as_a_dense_model() -> None:
    """C(N) = 0.7 P + 0.3 P N, and the projection is paid in the first part alone."""
    found = stages_of("methods=[slm-pn,slm-pn-adapt,slm]", "pretrain.batch_tokens=2048")
    plateau, own = found["pretrain/slm-pn-plateau"], found["pretrain/slm-pn-adapt.a"]
    whole, plain = found["pretrain/slm-pn"], found["pretrain/slm"]
    for key in ("tokens", "flops", "device_hours"):
        assert plateau[key] == pytest.approx(0.7 * whole[key], rel=0.01)
        assert own[key] == pytest.approx(0.3 * plain[key], rel=0.01)
    assert whole["flops"] > 1.01 * plain["flops"]
    assert "expert/slm-pn-adapt.a" in found
    assert whole["begun"] == pytest.approx(0.7, rel=0.01) and not plain["begun"]


def test_a_bank_costs_what_its_recipe_s_optimiser_does_with_it() -> None:
    """The paper's 46 slices at 262k tokens a step: AdamW moves them, Muon orthogonalises each."""
    asked = ["methods=[slm,slm-pn]", "spec_tokens=1M", "domains=[a]", "projected.rank=46",
             "projected.experts=16", "pretrain.batch_tokens=262144"]
    over = {}
    for preset in ("adamw", "modern"):
        found = predict(config.load("slm-126m", [*asked, f"pretrain.optimizer.preset={preset}"]),
                        devices.find("h200"))
        hours = {entry["stage"]: entry["device_hours"] for entry in found["stages"]}
        over[preset] = hours["pretrain/slm-pn"] / hours["pretrain/slm"]
    assert 1.1 < over["adamw"] < 1.2 and 1.35 < over["modern"] < 1.55


def test_the_selector_of_adaptation_is_costed_and_what_it_shares_counted_once() -> None:
    asked = ["methods=[slm-adapt]", "adapt.draws=color", "spec_tokens=1M", "domains=[a]"]
    found = predict(config.load("slm-126m", asked), devices.find("a100"))
    flops = {entry["stage"]: entry["flops"] for entry in found["stages"]}
    assert {"losses/slm", "losses/slm.a", "specialize/slm.a"} < flops.keys()
    assert found["total"]["flops"] == pytest.approx(
        sum(flops.values()) - flops["pretrain/slm-plateau"])


def test_a_recipe_is_costed_stage_by_stage() -> None:
    asked = ["plan", "slm-126m", "spec_tokens=1M", "domains=[a,b]", "methods=[slm,slm-is]",
             "pretrain_tokens=1B", "--device", "a100", "--json"]
    found = json.loads(CliRunner().invoke(app, asked).stdout)
    hours = {entry["stage"]: entry["device_hours"] for entry in found["stages"]}
    assert set(hours) == {"pretrain/slm", "specialize/slm.a", "specialize/slm.b",
                          "pretrain/slm-is.a", "pretrain/slm-is.b", "specialize/slm-is.a",
                          "specialize/slm-is.b"}
    assert hours["pretrain/slm"] == hours["pretrain/slm-is.a"] == \
        pytest.approx(2.2, rel=0.10)  # the fit to Table 2, tests/cost/test_cost_model.py
    assert found["total"]["device_hours"] == pytest.approx(sum(hours.values()))
