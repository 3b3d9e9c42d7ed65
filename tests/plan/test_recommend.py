"""The paper's Figure 1 at its settings, what lies beyond it, and what a plan is written as."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from planearly import config, methods
from planearly.cost import devices
from planearly.errors import UserError
from planearly.model import flops
from planearly.model.starts import shape as training_shape
from planearly.plan import page, recipes, sizes
from planearly.plan.inputs import OpenModel, PlanInput
from planearly.plan.law import Law
from planearly.plan.options import CHECKPOINT
from planearly.plan.predict import note as noted
from planearly.plan.predict import predict
from planearly.plan.recommend import Plan, recommend
from planearly.stages import trained
from small_models import model_folder

M, B = 10**6, 10**9


def planned(**changes: Any) -> Plan:
    """The paper's setting: c4, 1M tokens of a domain, a limit of 126M, 650 A100-hours before."""
    values: dict[str, Any] = {
        "device": devices.from_sheet(devices.SHEETS[0]), "limit": 126 * M,
        "generic_tokens": 150 * B, "spec_tokens": M, "generic_hours": 650,
        "specialization_hours": 1, "domains": 50}
    return recommend(PlanInput(**{**values, **changes}))


# Figure 1 ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("spec_tokens", [M, 8 * M, 64 * M])
@pytest.mark.parametrize("domains", [1, 50])
def test_a_large_inference_budget_takes_the_large_model(spec_tokens: int, domains: int) -> None:
    for limit in (771 * M, 1500 * M, None):
        made = planned(limit=limit, spec_tokens=spec_tokens, domains=domains,
                       specialization_hours=130)
        assert made.recommended == "llm"


def test_a_small_model_and_a_large_specialization_budget_take_importance_sampling() -> None:
    made = planned(specialization_hours=130, domains=1)
    assert made.recommended == "slm-is"
    assert made.row("slm-is").cost.generic.device_hours == 0
    assert made.row("slm-is").cost.specialization.device_hours == pytest.approx(130)


def test_without_a_budget_a_small_corpus_is_read_as_often_as_it_is_worth() -> None:
    least = 10 * flops.parameters(planned().setting.small)
    for corpus, tokens in ((2 * least, 2 * least), (least // 2, least), (least // 5, None)):
        row = planned(generic_tokens=corpus, generic_hours=None, specialization_hours=None,
                      domains=1).row("slm")
        assert row.feasible == (tokens is not None)
        if tokens is None:
            assert "too few: 304M are needed, read 4 times" in row.why
        else:
            assert row.pretrain_tokens == pytest.approx(tokens, rel=1e-6)


@pytest.mark.parametrize("domains", [1, 7, 50])
def test_a_small_model_and_a_small_specialization_budget_take_a_projected_network(
        domains: int) -> None:
    assert planned(domains=domains).recommended == "slm-pn"


def test_many_domains_take_a_projected_network_whatever_each_may_cost() -> None:
    few, many = (planned(specialization_hours=130, domains=n) for n in (4, 6))
    assert few.recommended == "slm-is" and many.recommended == "slm-pn"
    even = next(e for e in few.break_evens if set(e["methods"]) == {"slm-is", "slm-pn"})
    assert even["domains"] == pytest.approx(650 / 130, rel=0.02)
    assert even["cheaper_below"] == "slm-is"
    assert planned(specialization_hours=130, domains=1, domains_later=49).recommended == "slm-pn"


@pytest.mark.parametrize(("domains", "words"), [(1, "one domain"), (4, "4 domains")])
def test_the_reason_counts_the_domains(domains: int, words: str) -> None:
    reason = planned(specialization_hours=130, domains=domains).reason
    assert f"and for {words} it costs less than a shared pretraining" in reason


def test_where_neither_memory_nor_text_allows_experts_the_plain_model_is_left() -> None:
    small = replace(devices.from_sheet(devices.SHEETS[0]), memory=4e9)
    made = planned(device=small, generic_tokens=3 * B // 2)
    assert made.recommended == "slm" and not made.row("slm-mix").feasible
    assert made.reason == ("the plain small model is what the budgets afford: projected network: "
                           f"{made.row('slm-pn').why}")
    assert "GB of memory on every device" in made.row("slm-pn").why


@pytest.mark.parametrize("tokens", [150 * B, 100 * B, 20 * B, 1000 * B])
def test_a_plan_says_how_often_it_reads_the_corpus(tokens: int) -> None:
    made = planned(generic_tokens=tokens)
    passes = made.row(made.recommended).pretrain_tokens / tokens
    assert passes <= 4 and (tokens < 1000 * B or passes < 1)
    told = [note for note in made.notes if "reads the generic corpus" in note]
    assert len(told) == (passes > 1.01)
    for note in told:
        assert note.startswith(f"{made.recommended} reads the generic corpus {passes:.1f} times")


def test_without_hours_the_curves_cross_at_equal_quality() -> None:
    """126M parameters, 20B tokens, no budgets: at equal tokens they would cross at one domain."""
    found = {n: planned(device=devices.find("h100"), generic_tokens=20 * B, generic_hours=None,
                        specialization_hours=None, domains=n) for n in (1, 3, 4)}
    assert [made.recommended for made in found.values()] == ["slm-is", "slm-is", "slm-pn"]
    made = found[3]
    assert made.row("slm-is").pretrain_tokens / made.row("slm-pn").pretrain_tokens \
        == pytest.approx((130 / 2.2) / (650 / 3.6))
    even = next(e for e in made.break_evens if set(e["methods"]) == {"slm-is", "slm-pn"})
    assert 3.5 < even["domains"] < 4.1 and "equal quality" in even["at"] and "paper" in even["at"]
    assert "equal quality" in made.reason and any("33% of the tokens" in n for n in made.notes)


@pytest.mark.parametrize(("device", "network"), [("a100", 3.7), ("h100", 4.0)])
def test_the_crossings_of_the_documents(device: str, network: float) -> None:
    """docs/planning.md, "Crossing at equal quality"."""
    found = planned(device=devices.find(device), generic_tokens=20 * B, generic_hours=None,
                    specialization_hours=None, domains=1).break_evens
    with_importance = {(set(even["methods"]) - {"slm-is"}).pop(): round(even["domains"], 1)
                       for even in found if "slm-is" in even["methods"]}
    assert with_importance | {"slm-pn": network, "slm": 4.1, "slm-mix": 5.0} == with_importance


def test_equal_quality_is_what_ones_own_laws_predict() -> None:
    def law(floor: float) -> Law:
        return Law(axes=("pretrain_tokens",), scale=(1e9,), floor=floor, coefficients=(1.0,),
                   exponents=(0.3,), seen={
                       "params": (1.2e8, 1.25e8), "pretrain_tokens": (1e9, 2e10),
                       "spec_tokens": (1e6, 1e6)},
                   residuals=(0.01, -0.01), refits=((floor, 1.01, 0.3), (floor, 0.99, 0.3)), runs=9)

    made = planned(generic_tokens=20 * B, generic_hours=None, specialization_hours=None,
                   laws={"slm-is": law(1.9), "slm-pn": law(2.0)})
    tokens = made.row("slm-is").pretrain_tokens
    assert 1.9 + (tokens / 1e9) ** -0.3 == pytest.approx(2.0 + 20 ** -0.3)
    even = next(e for e in made.break_evens if set(e["methods"]) == {"slm-is", "slm-pn"})
    assert "laws" in even["at"]


def test_a_bank_too_large_for_one_device_takes_a_mixture_or_is_divided() -> None:
    t4 = devices.from_sheet(next(s for s in devices.SHEETS if s.name == "T4"))
    made = planned(device=t4, generic_hours=10_000)
    assert made.recommended == "slm-mix" and "memory" in made.row("slm-pn").why
    assert any("float32" in note for note in made.notes)
    several = planned(device=t4, devices=4, generic_hours=10_000)
    assert several.recommended == "slm-pn" and several.row("slm-pn").cost.sharded
    assert several.row("slm-pn").why.endswith("; sharded over 4 devices")
    assert any("slm-pn is sharded over 4 devices" in note for note in several.notes)
    assert not several.row("slm").cost.sharded and "sharded" not in several.row("slm").why


@examples(60)
@given(devices_=st.sampled_from([1, 2, 8]), gigabytes=st.sampled_from([24, 80, 141]),
       limit=st.integers(30 * M, 8 * B), tokens=st.sampled_from([B, 150 * B, 15_000 * B]),
       spec=st.sampled_from([M, 64 * M]), domains=st.sampled_from([1, 50]),
       teacher=st.sampled_from([None, 771 * M, 70 * B]), checkpoint=st.booleans())
def test_no_plan_recommends_what_cannot_start(
        devices_: int, gigabytes: int, limit: int, tokens: int, spec: int, domains: int,
        teacher: int | None, checkpoint: bool) -> None:
    card = replace(devices.find("h100"), memory=gigabytes * 1e9)
    made = planned(device=card, devices=devices_, limit=limit, generic_tokens=tokens,
                   spec_tokens=spec, domains=domains, generic_hours=None,
                   specialization_hours=None, teacher=teacher and OpenModel("t", teacher),
                   checkpoint=OpenModel("c", limit) if checkpoint else None)
    chosen = made.row(made.recommended)
    assert chosen.feasible or made.recommended == CHECKPOINT
    if checkpoint and not chosen.feasible:
        assert chosen.why in made.reason and "smaller open checkpoint" in made.reason
    for row in made.rows:
        if row.feasible:
            assert row.microbatch_tokens >= made.setting.small.context
            assert row.train_bytes_per_device <= 0.9 * card.memory
            assert ("sharded over" in row.why) == row.cost.sharded
    # by hand: weights, gradients and one moment, whole on a card or a part on each
    whole = flops.parameters(made.setting.large) * 12
    if (large := made.row("llm")).feasible:
        assert whole / (devices_ if large.cost.sharded else 1) < gigabytes * 1e9
        assert not large.cost.sharded or whole > 0.3 * gigabytes * 1e9
    if devices_ == 1:
        assert not any(row.cost.sharded for row in made.rows)


@pytest.mark.parametrize("count", [1, 8])
def test_the_large_model_is_sized_to_what_the_devices_hold(count: int) -> None:
    """An 8B model's weights, moments and gradients are 96 GB: too much for one card of 80."""
    made = planned(device=devices.find("h100"), devices=count, limit=8 * B, generic_hours=None,
                   generic_tokens=15_000 * B, specialization_hours=None)
    assert made.recommended == "llm" and made.row("llm").cost.sharded == (count == 8)
    low, high = (2 * B, 6 * B) if count == 1 else (7 * B, 8 * B)
    assert low < flops.parameters(made.setting.large) < high
    assert any("the memory of one H100" in note for note in made.notes) == (count == 1)


def test_what_devices_send_each_other_is_told() -> None:
    given = {"generic_tokens": 10**11, "limit": 126_000_000}
    assert all(row.traffic is None for row in planned(**given).rows)
    for name, rate in (("h100", 450e9), ("t4", 16e9)):
        plan = planned(**given, devices=8, device=devices.find(name))
        found = plan.row(plan.recommended).traffic
        assert found is not None and found.links == pytest.approx(found.sent / rate)
        plain, params = plan.row("slm").traffic, flops.parameters(plan.setting.small)
        assert plain is not None and 7 * params < plain.sent < 10 * params * 7 / 8
        assert found.network == pytest.approx(found.sent / 12.5e9) and found.computing > 0
        assert plain.network / 2 < plain.narrow < 0.7 * plain.network  # Muon's updates stay
        (note,) = [note for note in plan.notes if "a device sends the others" in note]
        assert ("is slow" in note) == (found.network > 0.25 * found.computing)
        assert ("travel in bfloat16" in note) == ("is slow" in note)
        assert plan.to_dict()["methods"][0]["traffic"]["sent"] > 0
    apart = planned(generic_tokens=5 * B, devices=2, device=devices.find("h100"))
    (note,) = [note for note in apart.notes if "a device sends the others" in note]
    assert "then travel in bfloat16" in note and ": between machines that is slow" in note


def test_a_named_checkpoint_that_cannot_start_is_not_asked_for_again() -> None:
    card = replace(devices.find("h100"), memory=24e9)
    made = planned(device=card, limit=None, generic_tokens=0,
                   checkpoint=OpenModel("open-8b", 8 * B))
    assert "open-8b is out: a training step of one row needs" in made.reason
    assert "--checkpoint" not in made.reason and "no limit" not in made.reason


def test_a_method_of_the_table_is_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    new = methods.Method("slm-new", "SLM-new", "small model of a new kind", draws="importance",
                         tune="lora")
    monkeypatch.setitem(methods.TABLE, "slm-new", new)
    made = planned(specialization_hours=130, domains=1)
    row = made.row("slm-new")
    assert row.feasible and row.why.startswith("small model of a new kind")
    assert row.cost.generic.device_hours == 0 < row.cost.specialization.device_hours
    assert "slm-new" in str(page.section(made))
    recipe = config.load("slm-126m", ["spec_tokens=1M", "domains=[a]", "methods=[slm-new]"])
    stages = [entry["stage"] for entry in predict(recipe, devices.find("a100"))["stages"]]
    assert stages == ["pretrain/slm-new.a", "specialize/slm-new.a"]


@pytest.mark.parametrize("row", [
    methods.Method("slm-new", "SLM-new", "small model of a new bank", bank="new"),  # type: ignore
    methods.Method("slm-new", "SLM-new", "small model drawn anew", draws="new"),
    methods.Method("slm-new", "SLM-new", "small model tuned anew", tune="new")])  # type: ignore
def test_a_value_that_no_rule_knows_is_planned_too(
        row: methods.Method, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods.TABLE, "slm-new", row)
    for hours in (None, 130):
        made = planned(specialization_hours=hours)
        assert made.row("slm-new").why and "slm-new" in str(page.section(made))
        new = [e for e in made.break_evens if "slm-new" in e["methods"]]
        assert not any("equal quality" in e["at"] for e in new)


def test_methods_of_others_are_not_recommended() -> None:
    made = planned(generic_tokens=20 * B, generic_hours=2, domains=1)
    assert made.row("slm-adapt").feasible and not made.row("slm").feasible
    assert made.recommended == CHECKPOINT and "nothing can be pretrained here" in made.reason


def test_curves_are_not_crossed_at_tokens_that_are_there_by_arithmetic() -> None:
    made = planned(specialization_hours=None)
    crossed = [set(e["methods"]) for e in made.break_evens]
    assert {"slm", "slm-is"} in crossed and made.row("slm-knn").feasible
    assert {"slm", "slm-knn"} not in crossed and {"slm-pn", "slm-dsir"} not in crossed
    for each in (made, planned(specialization_hours=1, generic_hours=650, domains=50)):
        assert each.row("slm-adapt").feasible
        assert not any("slm-adapt" in e["methods"] for e in each.break_evens)


@pytest.mark.parametrize("asked", ["a1000", "abacus", None])
def test_a_device_that_nobody_measured_is_planned_by_another_and_marked(
        asked: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "here", lambda: "Some Processor x2")
    found = devices.find_or_nearest(asked)
    assert found.stands_in_for == (asked or "Some Processor x2") and found.name != asked
    made = planned(device=found)
    note = next(n for n in made.notes if "nothing is known" in n)
    assert "FLOPs are exact" in note and ("did you mean 'a100'" in note) == (asked == "a1000")
    assert "`planearly calibrate` there" in note
    assert noted(config.load("slm-126m"), found) == note
    assert "in place of" in str(page.section(made)) and made.to_dict()["device"] == found.label
    if asked is None:
        assert found.memory == devices.memory_here()


# Beyond it ---------------------------------------------------------------------------------------

def test_without_a_generic_budget_an_open_checkpoint_is_adapted() -> None:
    smol = OpenModel("open-120m", 120 * M)
    for changes in ({"generic_hours": 0}, {"generic_tokens": 0}):
        assert planned(checkpoint=smol, **changes).recommended == CHECKPOINT
        missing = planned(**changes)
        assert missing.recommended == CHECKPOINT and "--checkpoint" in missing.reason
    continued = planned(checkpoint=smol, generic_hours=0).row(CHECKPOINT)
    assert continued.pretrain_tokens > 0
    assert continued.cost.specialization.device_hours <= 1.001


def test_a_checkpoint_beyond_the_inference_limit_is_not_recommended() -> None:
    made = planned(checkpoint=OpenModel("open-1b", B), generic_hours=0)
    assert "exceed the limit" in made.row(CHECKPOINT).why


@pytest.mark.parametrize(("spec_tokens", "clusters"),
                         [(M, 1024), (300_000, 256), (100_000, 64), (20_000, 16), (5_000, 4)])
def test_a_small_set_takes_fewer_clusters_and_says_why(spec_tokens: int, clusters: int) -> None:
    made = planned(spec_tokens=spec_tokens, specialization_hours=130, domains=1)
    assert made.clusters == clusters
    assert any("too few to estimate" in note for note in made.notes) == (clusters < 1024)


def test_what_adapts_keeps_to_both_budgets() -> None:
    adapts = next(name for name, row in methods.TABLE.items() if row.adapts)
    row = planned(specialization_hours=10, generic_hours=650).row(adapts)
    assert row.cost.specialization.device_hours == pytest.approx(10)
    assert row.cost.generic.device_hours == pytest.approx(10 * 0.7 / 0.3, rel=0.01)
    short_of = planned(specialization_hours=0.05, generic_hours=650).row(adapts)
    assert not short_of.feasible and "per domain" in short_of.why


def test_three_sentences_are_too_few_for_a_histogram() -> None:
    made = planned(spec_tokens=60, specialization_hours=130, domains=1)
    assert "histogram" in made.row("slm-is").why and made.recommended == "slm-pn"


@pytest.mark.parametrize(("entropy", "clusters", "wide"), [
    (3.20, 64, True), (4.54, 256, True), (5.64, 1024, True),  # wikipedia in the paper
    (3.60, 64, True), (6.12, 1024, True),  # openwebtext2
    (2.5, 64, False), (3.5, 1024, False), (4.2, 1024, False)])
def test_a_wide_domain_takes_a_blend_or_importance_sampling(entropy: float, clusters: int,
                                                            wide: bool) -> None:
    small = planned(entropy=entropy, clusters=clusters)
    assert small.recommended == "slm-pn"
    assert small.expert == ("blend" if wide else "lowest-loss")
    assert ("wide" in small.reason) == wide
    large = planned(entropy=entropy, clusters=clusters, specialization_hours=130, domains=1)
    assert large.recommended == "slm-is"


@pytest.mark.parametrize("foreseen", [None, 0.5, 0.15, 0.14, -0.2])
def test_importance_sampling_with_far_fewer_tokens_is_left_where_it_has_nothing_to_draw(
        foreseen: float | None) -> None:
    moved = foreseen is not None and foreseen < 0.15
    made = planned(foreseen=foreseen, specialization_hours=130, domains=1)
    times = made.row("slm").pretrain_tokens / made.row("slm-is").pretrain_tokens
    assert times > 3 and made.recommended == ("slm" if moved else "slm-is")
    assert (f"by only {foreseen or 0:.2f} nats per token" in made.reason) == moved
    assert (f"has {times:.1f} times its tokens" in made.reason) == moved
    assert made.paper[0] == "slm-is"
    assert any("`planearly weigh`" in note and "--foreseen" in note
               for note in made.notes) == (foreseen is None)
    for others in ({"generic_hours": 6}, {"generic_hours": None}):  # no fewer tokens than slm
        equal = planned(foreseen=foreseen, specialization_hours=200, domains=1,
                        generic_tokens=100 * B, **others)
        assert equal.recommended == "slm-is"
    for others, figure in (({}, "slm-pn"), ({"limit": 771 * M}, "llm"), (
            {"paper": True, "specialization_hours": 130, "domains": 1}, "slm-is")):
        assert planned(foreseen=foreseen, **others).recommended == figure


def test_without_a_budget_for_a_plain_model_resampling_stays_whatever_is_foreseen() -> None:
    made = planned(foreseen=0.0, generic_hours=0, specialization_hours=130, domains=1)
    assert made.recommended == "slm-is"


def test_distillation_only_where_a_teacher_exists() -> None:
    short_corpus = {"generic_tokens": 200 * M, "generic_hours": 100, "domains": 1}
    assert not planned(**short_corpus).row("slm-d").feasible
    taught = planned(**short_corpus, teacher=OpenModel("open-771m", 771 * M))
    assert taught.recommended == "slm-d"
    rich = planned(teacher=OpenModel("open-771m", 771 * M))
    assert rich.recommended == "slm-pn" and any("teacher" in note for note in rich.notes)


@examples(60)
@given(limit=st.sampled_from([5 * M, 126 * M, 771 * M, None]),
       generic_hours=st.sampled_from([0, 1, 100, 650, None]),
       hours=st.sampled_from([0, 0.01, 1, 130, None]), domains=st.integers(1, 100),
       tokens=st.sampled_from([0, M, B, 150 * B]), spec=st.sampled_from([60, M, 64 * M]),
       teacher=st.booleans())
def test_whatever_is_asked_the_advice_keeps_to_the_budgets(
        limit: int | None, generic_hours: float | None, hours: float | None, domains: int,
        tokens: int, spec: int, teacher: bool) -> None:
    made = planned(limit=limit, generic_hours=generic_hours, specialization_hours=hours,
                   domains=domains, generic_tokens=tokens, spec_tokens=spec,
                   teacher=OpenModel("t", 771 * M) if teacher else None)
    assert [row.method for row in made.rows] == [*methods.TABLE, CHECKPOINT]
    chosen = made.row(made.recommended)
    assert chosen.feasible or made.recommended == CHECKPOINT
    for row in made.rows:
        assert row.feasible or row.why
        if row.feasible:
            assert limit is None or row.cost.inference_params <= limit
            assert generic_hours is None or \
                row.cost.generic.device_hours <= generic_hours * 1.001 + 1e-9
            assert hours is None or row.cost.specialization.device_hours <= hours * 1.001 + 1e-9
            assert row.pretrain_tokens <= 4 * tokens
        if row.method == "slm-d":
            assert row.feasible <= teacher
    json.dumps(made.to_dict())


# Sizes -------------------------------------------------------------------------------------------

def test_the_papers_limits_give_the_papers_shapes() -> None:
    small, large = sizes.shape_for(126 * M), sizes.shape_for(771 * M)
    assert (small.layers, small.d_model, small.d_ff, small.heads) == (7, 1024, 4096, 8)
    assert (large.layers, large.d_model, large.d_ff, large.heads) == (7, 2816, 11264, 22)
    made = planned()
    assert made.setting.small == small and made.setting.large == large
    assert planned(limit=771 * M).setting.large == large
    assert planned(limit=771 * M).setting.small == small


def test_the_total_is_what_all_domains_cost_now_and_later() -> None:
    for row in planned(domains=20, domains_later=30).rows:
        both = row.cost.generic + row.cost.specialization * 50
        assert row.total.device_hours == pytest.approx(both.device_hours)


# Perplexity, recipes, pages -----------------------------------------------------------------------

def test_perplexity_comes_from_a_law_where_it_covers_the_case() -> None:
    law = Law(axes=("pretrain_tokens",), scale=(1e9,), floor=2.0, coefficients=(1.0,),
              exponents=(0.3,), seen={"params": (1.2e8, 1.25e8), "pretrain_tokens": (1e10, 1e11),
                                      "spec_tokens": (1e6, 1e6)},
              residuals=(0.01, -0.01), refits=((2.0, 1.01, 0.3), (2.0, 0.99, 0.3)), runs=9)
    made = planned(laws={"slm": law})
    found = made.row("slm").perplexity
    tokens = made.row("slm").pretrain_tokens
    assert found is not None
    assert found["perplexity"] == pytest.approx(math.exp(2 + (tokens / 1e9) ** -0.3))
    assert made.row("slm-pn").perplexity is None
    far = planned(laws={"slm": law}, spec_tokens=64 * M).row("slm")
    assert far.perplexity is None and "outside" in far.perplexity_note


@pytest.mark.parametrize("limit", [4 * M, 126 * M])
def test_recipes_load_and_hold_the_plans_shapes(limit: int, tmp_path: Path) -> None:
    made = planned(limit=limit, specialization_hours=130, price=2.0,
                   teacher=OpenModel("t", 771 * M))
    written = recipes.write(made, tmp_path, ["corpus.jsonl"], ["mine.jsonl"])
    assert {"slm-pn.yaml", "slm-is.yaml", "slm.yaml"} <= {path.name for path in written}
    for path in written:
        loaded = config.load(path)
        assert loaded.methods == [path.stem] and loaded.generic == ["corpus.jsonl"]
        assert loaded.model.d_model == made.setting.small.d_model
        assert loaded.pretrain_tokens == max(round(made.row(path.stem).pretrain_tokens), 1)
        assert loaded.cost.price_per_hour == 2.0


@pytest.mark.parametrize(("generic", "hours", "methods"), [
    (150 * B, 0, ["slm-is"]), (150 * B, None, ["slm-is"]), (0, 0, ["slm"])])
def test_the_recipe_of_an_open_checkpoint_runs_up_to_its_folder(
        generic: int, hours: float | None, methods: list[str], tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "open", context=64)
    checkpoint = OpenModel(str(folder), 120 * M, 64)
    made = planned(checkpoint=checkpoint, generic_tokens=generic, generic_hours=hours)
    written = recipes.write(made, tmp_path, ["corpus.jsonl"] if generic else [], ["mine.jsonl"])
    loaded = config.load(next(path for path in written if path.stem == CHECKPOINT))
    assert loaded.methods == methods and loaded.start == str(folder) and loaded.context == 64
    assert loaded.pretrain_tokens == round(made.row(CHECKPOINT).pretrain_tokens)
    assert loaded.reads_generic == bool(generic)
    trained.check(loaded)
    assert training_shape(loaded).vocab_size == 300
    with pytest.raises(UserError, match="reads 64 tokens"):
        trained.check(config.load(tmp_path / f"{CHECKPOINT}.yaml", ["context=128"]))


def test_the_page_is_whole_and_escaped() -> None:
    made = planned(specialization_hours=130, checkpoint=OpenModel("<script>", 120 * M))
    html = str(page.section(made))
    feasible = [row.method for row in made.rows if row.feasible]
    assert "<svg" in html and "nan" not in html
    for name in feasible:
        curve = methods.label(name) + (", recommended" if name == made.recommended else "")
        assert curve in html or name == CHECKPOINT, name  # in the legend of the curves
    assert html.count("<tr") == 1 + len(made.rows)
    assert "<script>" not in html and "&lt;script&gt;" in html
