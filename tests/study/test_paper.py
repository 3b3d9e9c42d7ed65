"""Tables and claims of the paper's study, on generated rows."""

from __future__ import annotations

import copy
import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planearly import methods
from planearly.errors import UserError
from planearly.methods import Method
from planearly.report import run_page, table
from planearly.report.table import write
from planearly.studies.paper import SUITE
from planearly.study import sharing, spec, view
from planearly.study.compare import Cells
from small_studies import (
    BASE,
    DOMAINS,
    PER_TOKEN,
    claims,
    full,
    named,
    plain,
    study,
    tables,
)


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return full()


# Tables -----------------------------------------------------------------------------------------

def test_a_whole_grid_makes_every_table(whole: dict[str, Any]) -> None:
    made = tables(whole)
    names = [t.name for t in made]
    assert len(names) == len(set(names))
    assert set(names) == {
        "table-01-parameters", "table-02-throughput", "table-03-costs", "table-04-baselines",
        "table-05-experts", "table-08-budgets", "table-09-clusters", "table-10-clusters",
        "figure-01-which", "figure-03-generic", "figure-04-budget", "figure-05-set-size",
        "figure-06-total-cost-01",
        "figure-06-total-cost-07", "figure-06-total-cost-50", "figure-06-crossing",
        "figure-06-equal-quality",
        "figure-07-pn-experts", "figure-08-top-cluster", "figure-09-finetuning",
        "figure-10-importance-k", "figure-11-mix-k", "figure-12-domains-before",
        "figure-13-domains-after", "figure-14-lora", "extra-selectors", "extra-blend",
        "extra-mixed", "extra-replay", "extra-optimizer", "extra-variants", "extra-seeds",
        "extra-test-sets", "extra-ratios", "extra-routed", "extra-foresight"}
    for each in made:
        keys = {column.key for column in each.columns}
        assert each.rows and all(keys <= set(r) for r in each.rows), each.name
        if each.figure:
            drawn = {each.figure.x.key, each.figure.y.key, each.figure.series}
            assert all(drawn <= set(r) for r in each.rows), each.name
        for r in each.rows:
            for column in each.columns:
                if column.kind == "interval" and r[column.key] is not None:
                    low, high = r[column.key]
                    assert low is None or high is None or low <= high


def test_a_method_of_the_table_is_in_the_tables_and_on_the_pages(
        monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Method("slm-new", "SLM-new", "a new one"),
            Method("slm-else", "SLM-else", "of others", bank="projected", source="elsewhere"),
            Method("slm-pick", "SLM-pick", "that picks", draws="pick", source="elsewhere")]
    for one in rows:
        monkeypatch.setitem(methods.TABLE, one.name, one)
    made = study((["slm", *(one.name for one in rows)], [{}], DOMAINS))
    seen = view.view(made, SUITE)
    inside = {one.name: {t.name for t in seen.tables
                         if any(r.get("method") == one.name for r in t.rows)} for one in rows}
    assert inside["slm-new"] >= {"table-01-parameters", "table-03-costs", "table-04-baselines",
                                 "figure-13-domains-after"}
    assert inside["slm-else"] == {"table-01-parameters", "extra-methods", "extra-routed"}
    assert inside["slm-pick"] == {"table-01-parameters", "extra-selectors", "extra-foresight"}
    assert [one.name for one in seen.methods] == ["slm", "slm-new", "slm-else", "slm-pick"]
    page = view.text(seen, "study_page.html.j2")
    assert "<strong>SLM-new</strong>: a new one." in page and "SLM-new" in " ".join(seen.summary)
    assert sharing.generic("slm-new") == ["slm"] and sharing.generic("slm-else") == ["slm-else"]
    assert not sharing.generic("slm-pick") and sharing.depends("slm-pick", "selection.buckets")
    assert sharing.depends("slm-else", "projected.rank")
    assert not sharing.depends("slm-new", "importance.k")
    report = run_page.render(Path("run"), {"rows": [
        {"method": one.name, "domain": "law", "ppl_after": 3.0, "generic_ppl": 9.0}
        for one in rows]})
    assert "<strong>SLM-new</strong>: a new one." in report
    assert report.count("<small>routed</small>") == 1  # of the one with experts


def test_a_plateau_depends_on_its_base_s_keys_and_the_share() -> None:
    def depends(key: str) -> list[bool]:
        return [sharing.pretraining_depends(name, key)
                for name in ("slm-pn-plateau", "slm-pn-adapt", "slm-plateau")]

    assert depends("projected.rank") == [True, True, False]
    assert depends("adapt.share") == [True, True, True]
    assert depends("adapt.replay_share") == [False, True, False]
    assert depends("expert") == depends("spec_tokens") == [False, True, False]
    assert depends("adapt.specialization_share") == [False, True, False]
    assert depends("pretrain.specialization_share") == [False, False, False]
    assert sharing.pretraining_depends("slm-is", "pretrain.specialization_share")


def test_choosing_by_a_fine_tuned_model_depends_on_how_it_is_fine_tuned() -> None:
    def depends(key: str) -> list[bool]:
        return [sharing.pretraining_depends(name, key) for name in ("slm-color", "slm-linear")]

    assert depends("finetune.average") == [True, False]
    assert depends("selection.candidates") == [True, True]
    assert depends("expert") == depends("lora.rank") == depends("importance.k") == [False, False]


def test_what_adaptation_depends_on_is_what_it_draws_by():
    def of(draws):
        return [sharing.pretraining_depends("slm-adapt", key, draws) for key in (
            "importance.k", "selection.epochs", "finetune.max_epochs", "adapt.draws")]

    assert of(None) == of("importance") == [True, False, False, True]
    assert of("generic") == [False, False, False, True]
    assert of("dsir") == [False, True, False, True]
    assert of("color") == [False, True, True, True]
    assert not sharing.pretraining_depends("slm-plateau", "adapt.draws", "dsir")
    assert not sharing.pretraining_depends("slm-knn", "adapt.draws", "dsir")


def test_a_device_is_named_once_whatever_rows_it_shares(whole: dict[str, Any]) -> None:
    made = copy.deepcopy(whole)
    for each, of in zip(made["rows"], ("a box", "a box, a card", "none"), strict=False):
        each["cost"]["device"] = of
    found = dict(view.facts(made))["Device"]
    assert found == "a box, a card" == spec.devices(Cells(made))


def test_tables_hold_the_rows_numbers(whole: dict[str, Any]) -> None:
    made = tables(whole)
    base = [r for r in whole["rows"] if r["method"] == "slm" and r["settings"] == BASE]
    nats = [sum(r["nll_after"]) / sum(r["tokens"]) for r in base]
    slm, other = (r for r in named(made, "table-04-baselines").rows if r["method"] in
                  ("slm", "slm-is") and r["set"] == 50_000)
    assert slm["after"] == pytest.approx(math.exp(np.mean(nats)))
    assert slm["difference"] is None and other["difference"] == pytest.approx(-0.24, abs=0.01)
    assert slm["hours"] == pytest.approx(8.25e6 * PER_TOKEN / 1e15)
    few, many = (next(r for r in named(made, f"figure-06-total-cost-{n}").rows
                      if r["method"] == "slm-is" and r["budget"] == 8_000_000)
                 for n in ("01", "50"))
    assert many["total_flops"] == pytest.approx(50 * few["total_flops"])
    ratio = next(r for r in named(made, "extra-ratios").rows
                 if r["method"] == "slm" and r["budget"] == 8_000_000)
    assert ratio["deployed"] == pytest.approx(8e6 / base[0]["inference_params"])
    assert ratio["own"] == pytest.approx(8e6 / 50_000)
    assert ratio["papers_deployed"] == "360.8 to 1,912"  # 100 and 530 hours at 2.2 per 1B, of 126M
    assert (ratio["times"], ratio["papers_times"], ratio["cluster"]) == (1.0, 1.0, None)
    network = next(r for r in named(made, "extra-ratios").rows
                   if r["method"] == "slm-pn" and r["budget"] == 8_000_000)
    assert network["papers_times"] == pytest.approx(1422 / 126)
    assert network["cluster"] == pytest.approx(8e6 / whole["recipe"]["context"] / 16)
    assert network["papers_cluster"].startswith("847,7")  # 100 hours at 3.6 per 1B, 32 clusters
    wide = next(r for r in named(made, "table-10-clusters").rows if r["domain"] == "wikipedia")
    assert (wide["papers16"], wide["papers64"], wide["k16"]) == (1.73, 3.20, 3.5)
    share = next(r for r in named(made, "table-09-clusters").rows if r["domain"] == "arxiv")
    assert (share["papers16"], share["papers64"]) == (0.92, 0.55)
    # generic 1.6 x 8M once, against 8M per domain
    cross = next(r for r in named(made, "figure-06-crossing").rows if r["budget"] == 8_000_000)
    assert cross["flops"] == pytest.approx(1.6) and cross["tokens"] == pytest.approx(1.0)


@pytest.mark.parametrize("made", [
    study(), study((["slm"], [{}], DOMAINS[:1])), study((["llm-lora"], [{}], DOMAINS[:2])),
    study((["slm-top"], [{"importance.k": 16}], DOMAINS[:1])),
    study((["slm-pn"], [{"expert": "blend"}], DOMAINS)),
    study((["slm-nopt", "slm"], [{"spec_tokens": 400_000}], DOMAINS[:1])),
], ids=["empty", "one cell", "lora alone", "top alone", "blend alone", "not the base"])
def test_missing_rows_leave_tables_out(made: dict[str, Any]) -> None:
    names = {t.name for t in tables(made)}
    assert not names & {"table-08-budgets", "figure-06-crossing", "figure-14-lora",
                        "figure-08-top-cluster", "extra-selectors", "extra-seeds"}
    for each in claims(made):
        assert each.table in names | {""} and each.evidence
        if each.text.split()[0] not in ("Fine-tuning", "Training"):
            assert each.verdict == "cannot be judged"


def test_embedders_are_compared_in_the_part_of_the_corpus_that_each_had() -> None:
    part = {"data.max_tokens": 1_000_000}
    made = study((["slm", "slm-is"], [{}, part, {**part, "cluster.embedder": "sentence-bert"}],
                  DOMAINS[:2]))
    rows = named(tables(made), "extra-selectors").rows
    found = [(r["method"], r["embedder"], r["pool"]) for r in rows]
    assert found == [("slm", None, "of 1M"), ("slm-is", "static", "of 1M"),
                     ("slm-is", "sentence-bert", "of 1M"), ("slm", None, None),
                     ("slm-is", "static", None)]
    assert [r["difference"] is None for r in rows] == [True, False, False, True, False]
    assert len({r["bar"] for r in rows}) == len(rows)


def test_students_of_several_teachers_are_held_against_slm_of_as_many_tokens() -> None:
    def taught(method: str, settings: Mapping[str, Any], domain: str) -> float:
        tokens = settings["pretrain_tokens"]
        teacher = settings.get("distill.teacher_tokens") or tokens
        return 4.0 - 1e-8 * tokens - 1e-8 * teacher * (method == "slm-d")

    budgets = [{"pretrain_tokens": tokens} for tokens in (2_000_000, 8_000_000)]
    alike = study((["slm", "slm-d"], budgets, DOMAINS[:2]), level=taught)
    assert "extra-teachers" not in {t.name for t in tables(alike)}
    made = study((["slm", "slm-d"], budgets, DOMAINS[:2]),
                 (["slm-d"], [{"distill.teacher_tokens": 4_000_000}], DOMAINS[:2]), level=taught)
    rows = named(tables(made), "extra-teachers").rows
    assert [(r["budget"], r["teacher"], r["series"]) for r in rows] == [
        (2_000_000, 2_000_000, "student of 2M"), (8_000_000, 4_000_000, "student of 8M"),
        (8_000_000, 8_000_000, "student of 8M")]
    assert [r["difference"] for r in rows] == pytest.approx([-0.02, -0.04, -0.08], abs=1e-6)


def test_slices_of_the_bank_are_held_against_slm_at_the_same_budget() -> None:
    few, own = {"projected.rank": 4}, {"projected.rank": 12}
    made = study((["slm", "slm-pn"], [own, {**own, "pretrain_tokens": 2_000_000}], DOMAINS[:2]),
                 (["slm-pn"], [few, {**few, "expert": "blend"}], DOMAINS[:2]))
    rows = named(tables(made), "extra-slices").rows
    assert [(r["budget"], r["setting"], r["rule"]) for r in rows] == [
        (8_000_000, 4, "lowest-loss"), (2_000_000, 12, "lowest-loss"),
        (8_000_000, 12, "lowest-loss"), (8_000_000, 4, "blend")]
    assert all(r["difference"] is not None for r in rows)
    alone = study((["slm", "slm-pn"], [{}], DOMAINS[:2]))
    assert "extra-slices" not in {t.name for t in tables(alone)}


def test_written_tables_read_back(whole: dict[str, Any], tmp_path: Path) -> None:
    made = tables(whole)
    write(made, tmp_path)
    for each in made:
        assert table.read(tmp_path / f"{each.name}.json") == each
        with open(tmp_path / f"{each.name}.csv", newline="", encoding="utf-8") as handle:
            lines = list(csv.DictReader(handle))
        assert len(lines) == len(each.rows)
    baselines = named(made, "table-04-baselines")
    with open(tmp_path / "table-04-baselines.csv", newline="", encoding="utf-8") as handle:
        for line, r in zip(csv.DictReader(handle), baselines.rows, strict=True):
            assert float(line["after"]) == r["after"]
            assert [float(line["after_ci_low"]), float(line["after_ci_high"])] == r["after_ci"]
            assert (line["difference"] == "") == (r["difference"] is None)
    (tmp_path / "other.json").write_text('{"name": "x"}')
    with pytest.raises(UserError, match=r"other\.json is not a table"):
        table.read(tmp_path / "other.json")


def test_averages_of_a_table_are_over_the_same_domains(whole: dict[str, Any]) -> None:
    half = study((["slm", "slm-is", "slm-pn"], [{}], DOMAINS), (["llm"], [{}], DOMAINS[:1]))
    baselines = named(tables(half), "table-04-baselines")
    wide, narrow = ([r["method"] for r in baselines.rows if r["domains"] == n] for n in (4, 1))
    assert wide == ["slm", "slm-is", "slm-pn"] and narrow == [*wide, "llm"]
    assert {r["over"] for r in baselines.rows} == {"all 4 domains", "1 of 4 domains (arxiv)"}
    parts = {r["over"]: {x["drawn"] for x in baselines.rows if x["over"] == r["over"]}
             for r in baselines.rows}
    assert parts == {"all 4 domains": {True}, "1 of 4 domains (arxiv)": {False}}
    budgets = named(tables(whole), "table-08-budgets")
    assert {r["budget"] for r in budgets.rows if r["drawn"]} == {
        r["settings"]["pretrain_tokens"] for r in whole["rows"]}


def test_the_best_is_named_within_each_limit() -> None:
    def level(method: str, settings: Mapping[str, Any], domain: str) -> float:
        return plain(method, settings, domain) - 0.1 * (method == "llm")

    found = named(tables(full(level)), "figure-01-which").rows
    best = {(r["inference"], r["per_domain"], r["limit"] > 0): r["method"] for r in found}
    assert best["small", "fine-tuning alone", False] == "slm-nopt"
    assert best["small", "pretraining too", False] == "slm-is"
    assert best["small", "fine-tuning alone", True] == "slm"  # slm-pn of as many tokens is dearer
    assert best["large", "fine-tuning alone", True] == "llm"
    assert ("large", "fine-tuning alone", False) not in best
    for line in found:
        assert line["generic_flops"] <= 1.1 * line["limit"]


def test_what_cannot_be_told_from_the_best_is_level_with_it() -> None:
    def level(method: str, settings: Mapping[str, Any], domain: str) -> float:
        return 3.0 - 0.2 * (method == "slm-is") - 0.001 * (method == "slm-pn")

    def which(level: Any) -> tuple[list[dict[str, Any]], list[str]]:
        budgets = [{"pretrain_tokens": tokens, "seed": seed} for tokens in (4_000_000, 8_000_000)
                   for seed in (0, 1)]
        made = tables(study((["slm", "slm-pn", "slm-is"], budgets, DOMAINS), level=level))
        return named(made, "figure-01-which").rows, SUITE.sentences(made)

    rows, said = which(level)
    alone = [r for r in rows if r["per_domain"] == "fine-tuning alone"]
    assert [(r["method"], r["level"]) for r in alone] == [
        ("slm", None), ("slm-pn", "slm, 19.9")]  # slm-pn of as many tokens is dearer
    assert alone[1]["told"] == f"SLM-pn {alone[1]['after']:.1f}, level with SLM"
    owned = [r for r in rows if r["per_domain"] == "pretraining too"]
    assert {(r["method"], r["level"]) for r in owned} == {("slm-is", None)}
    assert [r["drawn"] for r in owned] == [True] + [False] * (len(owned) - 1)
    assert owned[0]["limits"].startswith("0 to ")
    assert ", level with SLM" in said[1] and "; next" not in said[1]
    assert "; next" in which(lambda method, settings, domain: level(method, settings, domain)
                             - 0.3 * (method == "slm"))[1][1]
    # budgets that buy nothing that can be told are not worth their cost
    assert [words.partition("FLOPs in all): ")[2].count("SLM") for words in said[-3:]] == [1, 2, 2]
    assert all("SLM (4M)" in words and "(8M)" not in words for words in said[-2:]), said


def test_every_pair_of_experts_and_slices_is_shown() -> None:
    of = [{"projected.experts": experts, "projected.rank": h}
          for experts, h in ((16, 4), (16, 12), (32, 23))]
    found = named(tables(study((["slm"], [{"projected.rank": 12}], DOMAINS),
                                (["slm-pn"], of, DOMAINS))), "figure-07-pn-experts")
    assert [(r["setting"], r["beside"], r["series"]) for r in found.rows] == [
        ("16", "4", "h = 4"), ("16", "12", "h = 12"), ("32", "23", "h = 23")]
    assert all(r["difference"] is not None for r in found.rows)
