"""The split of pretraining between before and per domain, by a planted law, by runs, or not known.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from planearly import methods
from planearly.cli import app
from planearly.cost import devices, model
from planearly.errors import UserError
from planearly.plan import law, recipes, split
from planearly.plan.inputs import PlanInput
from planearly.plan.recommend import Plan, recommend
from planearly.stages import trained
from planearly.units import short

M, B = 10**6, 10**9
SMALL = 121_641_984  # parameters of the plan for a limit of 126M
TOKENS = (B, 4 * B, 16 * B)


def truth(tokens: float, share: float, power: float = 4.7) -> float:
    """Planted: nats per token of a model of which ``share`` of the tokens were generic."""
    return 2.5 + 0.6 * (tokens / (4 * B)) ** -0.35 + 0.23 * share**power


def rows(shares: tuple[float, ...] = (1.0, 0.7, 0.4, 0.0), noise: float = 0.0,
         tokens: tuple[float, ...] = TOKENS, power: float = 4.7) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    return [{"method": split.member(1 - share).name, "domain": "law", "inference_params": SMALL,
             "pretrain_tokens": many, "spec_tokens": M, "generic_cost": {"tokens": share * many},
             "settings": {"adapt.share": 1 - share} if 0 < share < 1 else {},
             "ppl_after": math.exp(truth(many, share, power) + noise * random.normal())}
            for many in tokens for share in shares]


@pytest.fixture(scope="module")
def fitted() -> law.Law:
    return law.fit_line(rows(), refits=5)


def planned(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "device": devices.from_sheet(devices.SHEETS[0]), "limit": 126 * M,
        "generic_tokens": 150 * B, "spec_tokens": M, "generic_hours": 20.0,
        "specialization_hours": 6.0, "domains": 7}
    return recommend(PlanInput(**{**values, **changes}))


def test_a_planted_law_is_found_again(fitted: law.Law) -> None:
    assert fitted.axes == ("pretrain_tokens", "generic_share")
    assert fitted.coefficients[1] == pytest.approx(0.23, rel=0.02)
    assert fitted.exponents[1] == pytest.approx(4.7, rel=0.02)
    for tokens, share in ((2 * B, 0.9), (8 * B, 0.55), (50 * B, 0.2), (4 * B, 0.0)):
        assert fitted.predict(SMALL, tokens, M, share).nll_per_token == \
            pytest.approx(truth(tokens, share), rel=0.002)
    assert "generic_share^4.7" in fitted.describe()
    with pytest.raises(UserError, match=r"three shares of generic tokens.*there are 2"):
        law.fit_line(rows((1.0, 0.0)))
    noisy = law.fit_line(rows(noise=0.01, tokens=(*TOKENS, 64 * B)), refits=30)
    low, high = noisy.predict(SMALL, 8 * B, M, 0.55).ci95
    assert low < math.exp(truth(8 * B, 0.55)) < high < 1.1 * low


def test_the_split_beats_its_neighbours_on_the_law(fitted: law.Law) -> None:
    made = planned(laws={law.LINE: fitted}, specialization_hours=14.0)
    found = made.split
    assert found is not None and made.recommended == "slm-adapt" == found.method
    prices = split.Prices.of(made.setting)
    for share in split.shares():
        tokens = split.afforded(made.given, prices, np.array([share]), 0.0)[0]
        if tokens:
            assert found.nll is not None
            assert found.nll <= float(fitted.nll(SMALL, tokens, M, 1 - share)[0]) + 1e-12
    assert found.before <= 20 * (1 + 1e-9) and found.each <= 14 * (1 + 1e-9)
    row = made.row("slm-adapt")
    assert row.pretrain_tokens == pytest.approx(found.tokens)
    assert row.cost.generic.device_hours == pytest.approx(found.before)
    assert row.cost.specialization.device_hours == pytest.approx(found.each)
    assert row.perplexity is not None
    assert row.perplexity["nll_per_token"] == pytest.approx(found.nll)
    assert "the paper's Figure 1 takes slm-" in made.reason and "12 runs" in made.reason
    before, after = (short(found.tokens * each) for each in (
        1 - found.adapt_share, found.adapt_share))
    assert (f"{before} generic tokens before the domain is known and {after} per domain"
            in made.reason)
    recipe = yaml.safe_load(recipes.recipe(made, row, [], []))
    assert recipe["adapt"]["share"] == pytest.approx(found.adapt_share, abs=1e-4)
    assert recipe["methods"] == ["slm-adapt"]


@pytest.mark.parametrize(("before", "each", "takes"), [
    (100.0, 0.02, "slm"), (0.0, 20.0, "slm-is"), (10.0, 5.0, "slm-adapt")])
def test_the_budgets_decide(fitted: law.Law, before: float, each: float, takes: str) -> None:
    made = planned(laws={law.LINE: fitted}, generic_hours=before, specialization_hours=each)
    assert made.recommended == takes
    assert made.row(takes).feasible


def test_where_lateness_does_not_help_all_tokens_look_like_the_domain() -> None:
    """With a linear term, generic tokens cost as much as they bring, at these sizes."""
    linear = law.fit_line(rows(power=1.0), refits=2)
    late = law.fit_line(rows(), refits=2)
    shares = {name: planned(laws={law.LINE: each}, generic_hours=None,
                            specialization_hours=None).split for name, each in
              (("linear", linear), ("late", late))}
    assert shares["linear"] is not None and shares["late"] is not None
    assert shares["linear"].adapt_share > shares["late"].adapt_share


def test_without_both_budgets_it_costs_what_the_paper_s_choice_does(fitted: law.Law) -> None:
    made = planned(laws={law.LINE: fitted}, generic_hours=100.0, specialization_hours=None)
    figure = planned(paper=True, generic_hours=100.0, specialization_hours=None)
    assert made.paper[0] == figure.recommended
    assert made.row(made.recommended).total.device_hours <= \
        figure.row(figure.recommended).total.device_hours * 1.001
    assert f"cost what {figure.recommended} would in all" in made.reason


def test_the_paper_s_figure_stays(fitted: law.Law) -> None:
    figure, plain = planned(laws={law.LINE: fitted}, paper=True), planned()
    assert (figure.recommended, figure.reason, figure.split) == (*plain.paper, None)
    assert plain.recommended == plain.paper[0]
    assert any("is not known here: no law is fitted" in note for note in plain.notes)
    assert not any("is not known here" in note for note in figure.notes)


def test_a_law_does_not_speak_beyond_its_evidence(fitted: law.Law) -> None:
    other = planned(laws={law.LINE: fitted}, limit=60 * M)
    assert other.recommended == other.paper[0] and other.frontier() == []
    assert any("was not varied" in note for note in other.notes)
    vast = planned(laws={law.LINE: fitted}, generic_hours=1e5, specialization_hours=1e5,
                   generic_tokens=10**13)
    assert vast.recommended == vast.paper[0] and any("is outside" in note for note in vast.notes)
    far = planned(laws={law.LINE: fitted}, generic_hours=200.0, specialization_hours=40.0)
    assert "extrapolates" in far.reason
    narrow = law.fit_line(rows((1.0, 0.7, 0.5)), refits=2)
    with pytest.raises(UserError, match="shares of generic tokens of 50% to 100%: 0% is outside"):
        narrow.predict(SMALL, 4 * B, M, 0.0)
    assert "of the splits within its evidence" in planned(laws={law.LINE: narrow}).reason


def of_network(floor: float) -> law.Law:
    return replace(law.fit([{**row, "method": "slm-pn"} for row in rows((1.0,), tokens=(
        *TOKENS, 2 * B, 8 * B))], "slm-pn", refits=2), floor=floor)


def test_a_law_of_a_projected_network_is_heard(fitted: law.Law) -> None:
    better, worse = (planned(laws={law.LINE: fitted, "slm-pn": of_network(floor)}, domains=50)
                     for floor in (1.0, 3.0))
    assert better.paper[0] == "slm-pn" == better.recommended and better.split is None
    assert "the laws fitted to your own runs agree" in better.reason
    assert worse.recommended == "slm-adapt"


def test_without_a_law_the_runs_themselves_settle_it_or_do_not() -> None:
    runs = law.measured(rows((1.0, 0.7, 0.0), tokens=(4 * B,)))
    assert [run["method"] for run in runs] == ["slm", "slm-adapt", "slm-is"]

    def chosen(measured: list[dict[str, Any]], each: float) -> Plan:
        return planned(measured=measured, generic_hours=20.0, specialization_hours=each)

    clear = [{**run, "nll": run["nll"] + 0.1 * (run["method"] != "slm-is")} for run in runs]
    made = chosen(clear, 40.0)
    assert made.recommended == "slm-is" and "your own runs of 122M parameters" in made.reason
    assert "no law of them was fitted" in made.reason and made.split is None
    assert "; the paper's Figure 1 takes slm-pn" in made.reason
    for other in (chosen(clear, 6.0),  # the better has fewer tokens here
                  chosen([{**run, "nll": run["nll"] - 0.02 * (run["method"] == "slm-adapt")}
                          for run in runs], 40.0),  # two trainings of one kind differ as much
                  chosen([{**run, "params": SMALL / 50} for run in clear], 40.0)):
        assert other.recommended == other.paper[0]
        assert any("is not known here" in note for note in other.notes)


def test_the_frontier_has_the_ends_and_what_lies_between(fitted: law.Law) -> None:
    found = planned(laws={law.LINE: fitted}).frontier()
    assert {row["domains"] for row in found} == set(split.FRONTIER)
    assert {row["method"] for row in found} == set(law.line())
    prices = split.Prices.of(planned().setting)
    for row in found:
        assert row["nll"] == pytest.approx(truth(row["tokens"], 1 - row["adapt_share"]), rel=0.01)
        assert row["hours"] == pytest.approx(
            prices.total(row["domains"], row["tokens"], row["adapt_share"]))
        assert trained.methods.find(row["method"]) is split.member(row["adapt_share"])
        if 0 < row["adapt_share"] < 1:  # of all that cost the same
            between = split.shares()[1:-1]
            tokens = prices.bought(prices.once(row["hours"], row["domains"], between))
            others = fitted.nll(SMALL, tokens, M, 1 - between)
            assert row["nll"] <= others[(tokens > 0.999e8) & (tokens < 1.601e11)].min() + 1e-9


def test_the_curve_of_a_blended_network_pays_for_no_scoring() -> None:
    narrow, wide = (planned(laws={"slm-pn": of_network(2.0)}, entropy=entropy, clusters=64)
                    for entropy in (1.0, 4.0))
    scoring = model.expert_choice(narrow.setting, "slm-pn").device_hours
    curves = narrow.frontier([50]), wide.frontier([50])
    assert len(curves[0]) == len(curves[1]) > 10
    for scored, blended in zip(*curves, strict=True):
        assert scored["tokens"] == blended["tokens"]
        assert scored["hours"] - blended["hours"] == pytest.approx(50 * scoring, rel=1e-6)


def test_the_command_reads_a_study_and_the_flag(tmp_path: Path) -> None:
    study = tmp_path / "study.json"
    study.write_text(json.dumps({"recipe": {}, "rows": rows()}))
    asked = ["plan", "--inference-params", "126M", "--generic-tokens", "150B", "--spec-tokens",
             "1M", "--device", "a100", "--generic-hours", "20", "--specialization-hours", "6",
             "--domains", "7", "--results", str(study), "--json"]
    found, figure = (json.loads(CliRunner().invoke(app, words).stdout)
                     for words in (asked, [*asked, "--paper"]))
    assert found["recommended"] == "slm-adapt" and found["split"]["method"] == "slm-adapt"
    assert found["split"]["adapted_tokens"] == pytest.approx(
        found["split"]["tokens"] * found["split"]["adapt_share"])
    assert figure["recommended"] == found["paper"]["recommended"] and figure["split"] is None
    assert found["given"]["laws"]["line"].startswith("nats per token = ")


def test_the_line_is_in_the_table() -> None:
    assert law.line() == ["slm", "slm-is", "slm-adapt"]
    assert [split.member(share).name for share in (0, 0.5, 1)] == ["slm", "slm-adapt", "slm-is"]
    assert methods.find("slm-adapt").adapts
