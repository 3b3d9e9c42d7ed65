"""What a recipe will cost, stage by stage; and that a plan's own recipes cost what it says."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from examples import examples
from planearly import api, config, keys
from planearly.cli import app
from planearly.cost import devices
from planearly.data import corpora
from planearly.model import flops
from planearly.plan import law, recipes, sizes
from planearly.plan import predict as forecasts
from planearly.plan.inputs import OpenModel, PlanInput
from planearly.plan.options import CHECKPOINT, Row
from planearly.plan.predict import domain_names, predict
from planearly.plan.recommend import Plan, recommend
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


def recipe_of(made: Plan, row: Row) -> keys.Recipe:
    return config.override(yaml.safe_load(recipes.recipe(made, row, [], ["a"])))


def assert_costs_what_its_recipe_does(made: Plan, row: Row) -> None:
    """Before the domain is known and for it, within two steps of each training, half a percent, and
    what a recipe's share of adaptation leaves out after four digits."""
    recipe = recipe_of(made, row)
    for domain, planned in ((False, row.cost.generic), (True, row.cost.specialization)):
        hours = rounding = 0.0
        for stage in predict(recipe, made.given.device)["stages"]:
            if stage["stage"].endswith(".a") == domain:
                train = recipe.pretrain if stage["stage"].startswith("pretrain") \
                    else recipe.finetune
                steps = stage["tokens"] / train.step_tokens
                hours += stage["device_hours"]
                rounding += 2 * stage["device_hours"] / steps if steps else 0.0
        if row.method.startswith("llm-lora"):
            rounding *= recipe.lora.step_factor
        assert planned.device_hours == pytest.approx(hours, rel=0.005, abs=rounding), row.method


@cache
def line(limit: int) -> dict[str, law.Law]:
    """Laws of models of that limit's size, for which neither end of the line is always best."""
    params = flops.parameters(sizes.shape_for(limit))
    rows = [{"method": method, "domain": "d", "inference_params": params, "spec_tokens": M,
             "pretrain_tokens": times * params, "settings": {},
             "generic_cost": {"tokens": times * params * share},
             "ppl_after": math.exp(2 + 3 * times**-0.3 + 0.4 * share**2)}
            for times in (10, 20, 40, 80, 160)
            for method, share in (("slm", 1.0), ("slm-adapt", 0.7), ("slm-is", 0.0))]
    return {law.LINE: law.fit_line(rows, refits=2)}


@examples(40)
@given(device=st.sampled_from(["a100", "h100", "t4"]), devices_=st.sampled_from([1, 1, 8, 48]),
       limit=st.sampled_from([M, 5 * M, 31 * M, 126 * M, 771 * M]),
       per_parameter=st.floats(12, 1000), hours=st.tuples(
           *[st.one_of(st.none(), st.floats(0.3, 30))] * 2),
       spec=st.sampled_from([20_000, M, 8 * M]), domains=st.sampled_from([1, 7, 50]),
       runs=st.booleans(), entropy=st.sampled_from([None, 1.0, 4.0]))
@example(device="a100", devices_=1, limit=126 * M, per_parameter=160, hours=(None, None), spec=M,
         domains=50, runs=False, entropy=4.0)  # the projected network is taken, and blended
def test_every_plan_costs_what_its_recipes_do(
        device: str, devices_: int, limit: int, per_parameter: float,
        hours: tuple[float | None, float | None], spec: int, domains: int, runs: bool,
        entropy: float | None) -> None:
    """At hours around what a small model's pretraining takes before, and a fine-tuning after."""
    of = devices.find(device)
    fair = 20.0 * limit * flops.training(sizes.shape_for(limit)) / of.rate / 0.3 / 3600
    before, each = (None if times is None else times * fair * part
                    for times, part in zip(hours, (1.0, 0.1), strict=True))
    made = recommend(PlanInput(
        of, limit, round(per_parameter * limit), spec, domains, devices=devices_,
        generic_hours=before, specialization_hours=each, entropy=entropy,
        clusters=None if entropy is None else 64, laws=line(limit) if runs and spec == M else {}))
    if made.split:
        assert made.row(made.split.method).pretrain_tokens == pytest.approx(made.split.tokens)
    for row in made.rows:
        # a recipe does not say how many devices hold a bank
        if row.feasible and row.method != CHECKPOINT and (devices_ == 1 or "pn" not in row.method):
            assert_costs_what_its_recipe_does(made, row)


@pytest.mark.parametrize("entropy", [1.0, 4.0])
def test_only_what_scores_its_experts_pays_for_it_and_a_mixture_is_never_blended(
        entropy: float) -> None:
    made = recommend(PlanInput(devices.find("a100"), 126 * M, 20 * B, M, 50, entropy=entropy,
                               clusters=64))
    plain = made.row("slm").cost.specialization.device_hours
    for method, blended in (("slm-pn", entropy > 3), ("slm-pn-adapt", entropy > 3),
                            ("slm-mix", False)):
        row = made.row(method)
        assert row.feasible
        assert recipe_of(made, row).expert == ("blend" if blended else "lowest-loss"), method
        assert_costs_what_its_recipe_does(made, row)
        if not row.cost.method.endswith("adapt"):
            more = row.cost.specialization.device_hours - plain
            assert more == 0 if blended else more > 0.05 * plain, method


def test_a_short_pretraining_per_domain_is_priced_at_its_own_step() -> None:
    """By hand: 98.2M tokens at 32,768 a step, each of which takes 8 x 3 ms to launch."""
    made = recommend(PlanInput(devices.find("h100"), 5 * M, 300 * M, M, 7))
    row = made.row("slm-is")
    tuning = made.row("slm").cost.specialization.device_hours
    assert row.pretrain_tokens == pytest.approx(98.2e6, rel=0.001)
    assert row.cost.specialization.device_hours - tuning == pytest.approx(
        row.pretrain_tokens / 32_768 * 0.024 / 3600, rel=1e-6)
    even = next(e for e in made.break_evens if set(e["methods"]) == {"slm-is", "slm-pn"})
    assert even["domains"] == pytest.approx(1.06, abs=0.01)


def test_a_split_is_priced_at_the_step_of_its_tokens() -> None:
    made = recommend(PlanInput(devices.find("a100"), M, B, M, 1, generic_hours=0.02,
                               laws=line(M)))
    assert made.split is not None
    row = made.row(made.split.method)
    assert row.pretrain_tokens == pytest.approx(made.split.tokens)
    assert row.cost.specialization.device_hours == pytest.approx(made.split.each)
    assert_costs_what_its_recipe_does(made, row)


def test_hours_per_domain_are_in_the_recipes() -> None:
    """0.005 A100-hours pay 304 of the thousand steps of a fine-tuning."""
    made = recommend(PlanInput(devices.find("a100"), 126 * M, 20 * B, M, 50,
                               specialization_hours=0.005))
    feasible = [row for row in made.rows if row.feasible]
    assert {"slm", "slm-pn"} <= {row.method for row in feasible}
    assert recipe_of(made, made.row("slm")).finetune.max_steps == 304
    for row in feasible:
        found = predict(recipe_of(made, row), made.given.device)["stages"]
        assert sum(stage["device_hours"] for stage in found
                   if stage["stage"].endswith(".a")) <= 0.005
        assert_costs_what_its_recipe_does(made, row)


def test_a_student_s_steps_are_those_that_are_paid_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """15 times the plain student's, more passes than a fine-tuning may make by itself."""
    made = recommend(PlanInput(devices.find("a100"), 126 * M, 20 * B, M, 50,
                               teacher=OpenModel("t", 771 * M)))
    row = made.row("slm-d")
    recipe = recipe_of(made, row)
    assert recipe.finetune.max_steps == 15_000 and recipe.finetune.max_epochs == 123
    monkeypatch.setattr(forecasts, "_teacher", lambda recipe: replace(
        sizes.shape_for(771 * M), context=1024))
    assert_costs_what_its_recipe_does(made, row)


def test_a_fine_tuning_is_forecast_at_its_recipe_s_step() -> None:
    """Of a model so small that a step takes as long as launching it does."""
    hours = [stages_of("methods=[slm]", "model.d_model=64", "model.heads=2", "model.d_ff=128",
                       f"finetune.batch_tokens={batch}", f"finetune.max_steps={steps}"
                       )["specialize/slm.a"]["device_hours"]
             for batch, steps in ((2048, 200), (4096, 100))]
    assert hours[0] == pytest.approx(2 * hours[1])


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


@pytest.mark.parametrize(("precision", "device", "said"), [
    ("auto", "a100", ""), ("bf16", "a100", ""), ("fp32", "t4", ""),
    ("fp32", "a100", "hours are at the rate of bfloat16, and the recipe names another precision: "
                     "`planearly calibrate` there with this recipe measures that"),
    ("bf16", "t4", "hours are at the rate of float32, and the recipe names another precision: "
                   "`planearly calibrate` there with this recipe measures that"),
    ("auto", "t4", "T4 has no fast bfloat16: training computes in float32 there, and hours are at "
                   "that rate (8.1 TFLOP/s)")])
def test_hours_at_another_precisions_rate_are_told(precision: str, device: str, said: str) -> None:
    found = api.plan("slm-126m", device=device, spec_tokens="1M", domains=["a"],
                     pretrain={"precision": precision})
    assert found["note"] == said


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
