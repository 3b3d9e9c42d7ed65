"""Claims of the paper's study, on generated rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from planearly.study import seeds, view
from planearly.study.compare import Arm, Cells
from planearly.study.verdict import overall
from small_studies import (
    DOCUMENTS,
    DOMAINS,
    claim,
    claims,
    cost,
    full,
    named,
    of_one_seed,
    plain,
    repeated,
    row,
    study,
    tables,
)


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return full()


STARTS = [
    "Fine-tuning", "A small model that", "Training on", "SLM-is is", "SLM-is beats an SLM",
    "SLM-is beats even", "The advantage of SLM-is", "SLM-pn beats",
    "SLM-pn, its experts blended, beats", "SLM-mix, its experts blended, beats",
    "What sets SLM-pn apart", "32 experts are", "SLM-mix beats", "What sets SLM-mix apart",
    "SLM-pn fares worse", "Blending the experts gives SLM-pn", "SLM-mix fares worse",
    "Blending the experts gives SLM-mix", "SLM-pn's expert", "SLM-mix's expert",
    "SLM-pn beats SLM-mix", "Where inference allows it, the large model beats SLM",
    "Where inference allows it, the large model beats SLM-pn", "Distillation makes",
    "Distillation's gain", "Pretraining on the most", "LoRA", "C(N)",
    "More specialization text", "The more specialization text"]


def test_every_subset_of_a_grid_can_be_shown(whole: dict[str, Any]) -> None:
    draw = np.random.default_rng(0)
    for share in (0.1, 0.5):
        kept = [r for r in whole["rows"] if draw.random() < share]
        part = {**whole, "rows": kept, "entropies": {}}
        assert all(t.rows for t in tables(part))
        assert all(any(c.text.startswith(s) for c in claims(part)) for s in STARTS
                   if "its experts blended" not in s)



def test_claims_that_hold_are_reproduced(whole: dict[str, Any]) -> None:
    found = claims(repeated(whole))
    assert all(claim(found, start) for start in STARTS)
    assert all(c.text.startswith(tuple(STARTS)) for c in found)
    assert {c.text: c.verdict for c in found if c.verdict != "reproduced"} == {}
    assert "over all 4 domains" in claim(found, "SLM-is is").evidence
    assert all(c.table for c in found)


def opposite(method: str, settings: Mapping[str, Any], domain: str) -> float:
    """A world in which none holds but three, whose opposites would contradict others."""
    wide = domain == "wikipedia"
    data = math.log2(settings["spec_tokens"] / 50_000)
    level = 4.0 + 0.1 * data
    if method == "slm-nopt":
        level += 0.05 * data
    elif method == "slm-is":
        level += 0.2 + 0.05 * math.log2((settings["importance.k"] or 64) / 64)
    elif method in ("slm-pn", "slm-mix"):
        level += -0.2 - 0.05 * data if settings["expert"] != "blend" else 0.3
        level -= 0.1 * wide - 0.05 * (method == "slm-pn")
        level += 0.02 * (settings["projected.experts"] == 32)
        level -= 0.05 * (settings["expert"] == "most-frequent")
    elif method == "slm-d":
        level -= 0.5
    elif method == "slm-top":
        level -= 0.3
    elif method in ("llm", "llm-lora"):
        level += 0.1 + 0.3 * (method == "llm-lora")
    return level


def costly(made: dict[str, Any]) -> dict[str, Any]:
    for each in made["rows"]:
        if each["nll_before"]:
            each["nll_before"] = [0.5 * nats for nats in each["nll_before"]]
        if each["method"] == "slm-pn":  # dearer in every respect
            each["specialization_cost"] = cost(20_000_000, 3)
    return made


def test_claims_that_do_not_hold_are_not_reproduced() -> None:
    made = full(opposite)
    made["rows"].extend(row("slm", domain, {"pretrain_tokens": 64_000_000}, opposite)
                        for domain in DOMAINS)
    found = claims(costly(repeated(made, opposite)))
    verdicts = {start: claim(found, start).verdict for start in STARTS}
    for start in ("SLM-mix beats", "SLM-pn beats", "Distillation makes"):
        assert verdicts.pop(start) == "reproduced"
    assert set(verdicts.values()) == {"not reproduced"}, verdicts


def test_claims_without_a_difference_are_not_told_apart() -> None:
    def level(method: str, settings: Mapping[str, Any], domain: str) -> float:
        return 4.0 + 0.1 * (method == "slm-nopt")

    made = repeated(full(level), level)
    for each in made["rows"]:  # as much before as after, but for chance
        if each["nll_before"]:
            noise = np.random.default_rng(7).normal(0, 5, DOCUMENTS)
            each["nll_before"] = (np.array(each["nll_after"]) + noise - noise.mean()).tolist()
    found = claims(made)
    assert claim(found, "Fine-tuning").verdict == "not reproduced"  # surely less than the margin
    for start in ("SLM-is is", "The advantage of SLM-is", "SLM-pn beats",
                  "Blending the experts gives SLM-pn", "Pretraining on the most"):
        assert claim(found, start).verdict == "cannot be judged", start
        assert "Cannot be told apart: an interval includes 0" in claim(found, start).evidence
    eroded = claim(found, "What sets SLM-pn apart")
    assert eroded.verdict == "cannot be judged" and "No difference on the sm" in eroded.evidence
    assert claim(found, "SLM-mix fares worse").verdict == "cannot be judged"


def test_claims_without_rows_say_what_is_missing() -> None:
    found = claims(study((["slm", "slm-is"], [{}], DOMAINS)))
    best = claim(found, "SLM-is is")
    assert best.verdict == "cannot be judged"  # it beats slm, but no other was run
    assert "Rows are missing for: " in best.evidence and "slm-pn" in best.evidence
    assert claim(found, "LoRA").verdict == "cannot be judged"
    assert claim(found, "Distillation's gain").verdict == "cannot be judged"


def test_the_number_of_experts_is_judged_with_the_papers_slices_and_with_as_many_for_all() -> None:
    def level(method: str, settings: Mapping[str, Any], domain: str) -> float:
        gained = {16: 0.0, 32: 0.02, 64: 0.07}[settings["projected.experts"]]
        many = settings.get("projected.rank", 12) > 12
        return 4.0 - (gained if not many else 0.05) * (method == "slm-pn")

    found = [each for each in claims(repeated(full(level), level))
             if each.text.startswith("32 experts are")]
    assert [(each.setting, each.verdict, each.ours, bool(each.paper)) for each in found] == [
        (", with h = 12, 23 and 46", "reproduced", False, True),
        (", with h = 12", "not reproduced", True, False)]
    assert "(32 less 16) less (64 less 32): +0.030" in found[1].evidence
    missing = claim(claims(study((["slm", "slm-pn"], [{}], DOMAINS))), "32 experts are")
    assert missing.missing and missing.paper


def test_a_turn_in_the_growth_with_k_is_seen() -> None:
    def peaks(method: str, settings: Mapping[str, Any], domain: str) -> float:
        best = {16: 0.0, 64: -0.3, 256: -0.1, None: -0.1}
        return 4.0 + (best[settings["importance.k"]] if method == "slm-is" else 0.0)

    made = study((["slm"], [{}], DOMAINS),
                 (["slm-is"], [{"importance.k": k} for k in (16, 64, 256)], DOMAINS), level=peaks)
    grows = claim(claims(repeated(made, peaks)), "The advantage of SLM-is")
    assert grows.verdict == "not reproduced" and "does not grow all the way" in grows.evidence


def test_a_cheaper_worse_slm_says_nothing_of_distillation() -> None:
    cheap = study((["slm", "slm-d"], [{}], DOMAINS))  # a fifth of slm-d's FLOPs, and worse
    found = claim(claims(cheap), "Distillation's gain")
    assert found.verdict == "cannot be judged" and "No budget of slm settles it" in found.evidence


def test_what_hangs_on_the_budget_is_judged_at_each() -> None:
    def level(method: str, settings: Mapping[str, Any], domain: str) -> float:
        sign = 1 if settings["pretrain_tokens"] < 20_000_000 else -1
        return 4.0 + 0.1 * sign * (method == "slm-pn")

    made = full(level)
    made["rows"].extend(row(method, domain, {"pretrain_tokens": 32_000_000}, level)
                        for domain in DOMAINS for method in ("slm", "slm-pn"))
    found = claims(repeated(made, level))
    verdicts = {c.text: c.verdict for c in found if c.text.startswith("SLM-pn beats")}
    at = "SLM-pn beats SLM after fine-tuning on the small set, with {} tokens of pretraining."
    assert verdicts[at.format("8M")] == "not reproduced"
    assert verdicts[at.format("32M")] == "reproduced"
    pn = [c for c in found if c.statement == "SLM-pn beats SLM after fine-tuning on the small set."]
    assert len(pn) == 3 and overall(pn) == "depends on the setting"
    assert overall(pn[:1]) == pn[0].verdict
    summary = view.summary(made, pn, [])
    assert "paper's 1 claims, 0 came out as they say, 0 did not, 1 did at some" in summary[1]
    assert "these are 3 verdicts: 1, 2 and 0." in summary[1]


def test_a_large_model_overtakes_a_tuned_small_one_with_its_pretraining() -> None:
    def level(method: str, settings: Mapping[str, Any], domain: str) -> float:
        return 4.0 - 2.0 * (method == "llm" and settings["pretrain_tokens"] > 20_000_000)

    made = study((["slm", "llm"], [{}, {"pretrain_tokens": 32_000_000}], DOMAINS), level=level)
    found = [c for c in claims(repeated(made, level)) if c.text.startswith("A small model that")]
    assert [c.verdict for c in found] == ["reproduced", "not reproduced"]
    assert [c.text.split("not, ")[1] for c in found] == [
        "the large one with 8M tokens of pretraining.",
        "the large one with 32M tokens of pretraining."]
    assert not found[0].cause
    assert "llm (pretrain_tokens 8M, before fine-tuning)" in found[1].cause
    assert "the small one being the same: slm (after fine-tuning)" in found[1].cause


@pytest.mark.parametrize("few", [0.5, 0.32, 0.2])
def test_slm_with_an_experts_tokens_says_whether_a_mixture_lacks_tokens(few: float) -> None:
    """Ahead of it by 0.2; by 0.02, which is not told; behind it."""
    def level(method: str, settings: Mapping[str, Any], domain: str) -> float:
        return 4.0 + 0.3 * (method == "slm-mix") + few * (
            settings["pretrain_tokens"] == 500_000)  # of 8M and 16 experts

    made = study((["slm", "slm-mix"], [{}], DOMAINS),
                 (["slm"], [{"pretrain_tokens": 500_000}], DOMAINS), level=level)
    found = claim(claims(repeated(made, level)), "SLM-mix beats")
    assert found.verdict == "not reproduced"
    if few == 0.5:
        assert "Too few tokens for an expert, as 8M for all show: " in found.cause
        assert "-0.200 nats" in found.cause and "+0.500 nats" in found.cause
        assert "cluster has 47% of it here, and 79% in the paper" in found.cause
    else:
        assert found.cause == "No cell of this study shows why."


@pytest.mark.parametrize("worth", [0.8, 0.3])
def test_a_smaller_pair_says_whether_parameters_pay_more_there(worth: float) -> None:
    def level(method: str, settings: Mapping[str, Any], domain: str) -> float:
        return 4.0 - 0.3 * (method == "llm") + worth * (settings.get("model.d_model") == 12)

    made = study((["slm", "slm-is", "llm"], [{}], DOMAINS),
                 (["slm-is"], [{"model.d_model": 12}], DOMAINS), level=level)
    made = repeated(made, level)
    for each in made["rows"]:
        each["settings"] = {"model.d_model": made["recipe"]["model"]["d_model"],
                            **each["settings"]}
        each["inference_params"] = 70_000 if each["settings"]["model.d_model"] == 12 else 400_000
    found = claim(claims(made), "SLM-is beats even")
    assert found.verdict == "not reproduced"
    if worth > 0.5:
        assert "With 70k parameters against 400k" in found.cause
        assert "+0.500 nats per token" in found.cause and "further behind" in found.cause
    else:
        assert found.cause == "No cell of this study shows why."


def test_the_most_frequent_cluster_is_judged_at_each_number_of_clusters() -> None:
    def level(method: str, settings: Mapping[str, Any], domain: str) -> float:
        return 4.0 + 0.1 * (method == "slm-top") * (1 if settings["importance.k"] == 16 else -1)

    made = study((["slm-is", "slm-top"], [{"importance.k": k} for k in (16, 64)], DOMAINS),
                 level=level)
    found = [c for c in claims(repeated(made, level)) if c.text.startswith("Pretraining on the")]
    assert [(c.setting, c.verdict) for c in found] == [
        (", of 16 clusters", "reproduced"), (", of 64 clusters", "not reproduced")]
    assert len({c.statement for c in found}) == 1


def test_what_erodes_is_judged_at_the_largest_budget_with_two_set_sizes() -> None:
    def level(method: str, settings: Mapping[str, Any], domain: str) -> float:
        if settings["pretrain_tokens"] < 20_000_000:
            return 4.0 + 0.1 * (method == "slm-pn")
        return 4.0 - (method == "slm-pn") * (0.1 if settings["spec_tokens"] == 50_000 else 0.04)

    sizes = [{"spec_tokens": 50_000}, {"spec_tokens": 400_000}]
    both = (["slm", "slm-pn"], sizes, DOMAINS)
    small = claim(claims(study(both, level=level)), "What sets SLM-pn apart")
    assert small.verdict == "cannot be judged" and small.table == "figure-05-set-size"
    larger = [{**size, "pretrain_tokens": 32_000_000} for size in sizes]
    made = study(both, (["slm", "slm-pn"], larger, DOMAINS), level=level)
    found = claim(claims(repeated(made, level)), "What sets SLM-pn apart")
    assert found.verdict == "reproduced" and "with 32M tokens" in found.text
    assert found.table == "table-08-budgets"


def test_what_turns_into_its_opposite_does_not_erode() -> None:
    def level(method: str, settings: Mapping[str, Any], domain: str) -> float:
        return 4.0 + (method == "slm-pn") * (0.1 if settings["spec_tokens"] == 50_000 else -0.3)

    made = study((["slm", "slm-pn"], [{}, {"spec_tokens": 400_000}], DOMAINS), level=level)
    found = claim(claims(repeated(made, level)), "What sets SLM-pn apart")
    assert found.verdict == "cannot be judged" and "turns into its opposite" in found.evidence


def test_methods_meet_at_their_main_budgets() -> None:
    made = study((["slm", "slm-pn"], [{"pretrain_tokens": 32_000_000}], DOMAINS),
                 (["slm-is"], [{}], DOMAINS))
    made["recipe"]["study"] = {"main": {"slm": 32_000_000, "slm-pn": 32_000_000}}
    baselines = named(tables(made), "table-04-baselines")
    assert {r["method"]: r["budget"] for r in baselines.rows} == {
        "slm": 32_000_000, "slm-pn": 32_000_000, "slm-is": 8_000_000}
    assert claim(claims(repeated(made)), "SLM-pn beats").verdict == "reproduced"


def test_budgets_of_equal_compute_are_held_against_each_other() -> None:
    def level(method: str, settings: Mapping[str, Any], domain: str) -> float:
        return 4.0 - 1e-9 * settings["pretrain_tokens"] - 0.1 * (method == "slm-pn")

    budgets = {"slm": (8, 16, 32), "slm-pn": (5, 10, 32)}
    made = study(*(([method], [{"pretrain_tokens": many * 1_000_000} for many in of], DOMAINS)
                   for method, of in budgets.items()), level=level)
    made["recipe"]["study"] = {"equal_compute": [
        {"slm": slm * 1_000_000, "slm-pn": network * 1_000_000}
        for slm, network in zip(*budgets.values(), strict=True)]}
    assert Cells(made).budgets("slm-pn") == [(5_000_000, 8_000_000), (10_000_000, 16_000_000),
                                             (32_000_000, 32_000_000)]
    beats = [c for c in claims(repeated(made, level)) if c.text.startswith("SLM-pn beats SLM af")]
    assert [c.text.split("with ")[1] for c in beats] == [
        "5M tokens of pretraining against 8M.", "10M tokens of pretraining against 16M.",
        "32M tokens of pretraining."]
    assert {c.verdict for c in beats} == {"reproduced"}
    assert "-0.097 nats" in beats[0].evidence  # 0.003 of it the tokens
    assert all("18.57 against 19.31: -0.039 with 100 A100-hours" in c.paper for c in beats)
    by_budget = named(tables(made), "table-08-budgets")
    assert [round(r["difference"], 3) for r in by_budget.rows if r["method"] == "slm-pn"] == [
        -0.097, -0.094, -0.1]


def test_one_seed_judges_nothing_however_large_the_difference() -> None:
    def far(method: str, settings: Mapping[str, Any], domain: str) -> float:
        return 4.0 - 1.0 * (method == "slm-pn")

    once = study((["slm", "slm-pn"], [{}], DOMAINS), level=far)
    found = claim(claims(once), "SLM-pn beats")
    assert found.verdict == "cannot be judged" and found.one_seed
    assert "one seed, [" in found.evidence and "Not judged: one seed." in found.evidence
    alone = seeds.difference(Cells(once), Arm("slm-pn"), Arm("slm"))
    assert alone and alone.high < 0 and alone.spread == seeds.Spread(0.04, 2.0, 0)
    twice = claim(claims(study(
        (["slm", "slm-pn"], [{}], DOMAINS), (["slm", "slm-pn"], [{"seed": 1}], DOMAINS[:2]),
        level=far)), "SLM-pn beats")
    assert twice.verdict == "reproduced" and "over 2 seeds" in twice.evidence
    assert "over 2 of 4 domains (arxiv, freelaw)" in twice.evidence  # where the other seed is


@pytest.mark.parametrize("level", ["plain", "opposite", "peaks"])
def test_one_seed_judges_no_claim(level: str) -> None:
    def peaks(method: str, settings: Mapping[str, Any], domain: str) -> float:
        turn = 0.3 * (settings["importance.k"] == 64) if method == "slm-is" else 0.0
        lead = 0.0 if domain == "wikipedia" else 0.3
        return plain(method, settings, domain) - turn - lead * (method in ("slm-pn", "slm-mix"))

    world = {"plain": plain, "opposite": opposite, "peaks": peaks}[level]
    found = claims(of_one_seed(full(world)))
    assert {c.verdict for c in found} == {"cannot be judged"}
    assert claim(found, "C(N)").one_seed or level == "opposite"


def test_a_starved_mixture_is_not_judged() -> None:
    made = study((["slm", "slm-mix"], [{}], DOMAINS))
    for each in made["rows"]:
        each["inference_params"] = 600_000  # and 8M tokens over 16 experts
    made["rows"] += [{**each, "pretrain_tokens": 4_000_000, "settings": {
        **each["settings"], "pretrain_tokens": 4_000_000}} for each in made["rows"]]
    found = [each for each in claims(made) if each.text.startswith("SLM-mix beats SLM after")]
    assert [each.setting for each in found] == [
        ", with 4M tokens of pretraining", ", with 8M tokens of pretraining"]
    assert len({each.statement for each in found}) == 1
    assert {each.verdict for each in found} == {"cannot be judged"}
    assert "500k tokens each" in found[1].evidence
