"""The tables and claims of ways to split a budget, of generated rows."""

import math

import pytest

import small_studies
from planearly.studies.split import SUITE
from planearly.studies.split.rows import ADAPT, BLENDS, MIXED, as_dear, cost
from planearly.study import view
from planearly.study.compare import BUDGET, Arm, Cells
from small_studies import DOMAINS, claim, named

P = 4_000_000
ADAPTED = 1_200_000
TUNED = 250_000
GAINS = {"slm": 0.0, "slm-is": 0.4, "slm-adapt": 0.45, "slm-pn": 0.1, "slm-pn-adapt": 0.6}
KEYS = {ADAPT: 0.0, MIXED: 0.0, BLENDS: 0}


def row(method, domain, changes, gains):
    def level(name, settings, where):
        tokens = math.log2(settings.get(BUDGET, P) / P)
        text = 0.15 * (settings[ADAPT] > 0 or settings[MIXED] > 0)
        return (4.0 + 0.2 * DOMAINS.index(where) - gains[name] - 0.05 * tokens - text
                - 0.1 * (settings[BLENDS] > 0))

    settings = {BUDGET: P, "seed": 0, **KEYS, **changes}
    made = small_studies.row("slm", domain, settings, lambda *_: level(method, settings, domain))
    once = {"slm": 1, "slm-pn": 1, "slm-is": 0}.get(method, 1 - ADAPTED / P) * settings[BUDGET]
    own = settings[BUDGET] - once + TUNED
    both = [small_studies.cost(tokens, 1) for tokens in (once, own)]
    return {**made, "method": method, "settings": settings, "seed": settings["seed"],
            "k": 16 if method == "slm-pn" else 256,
            "generic_cost": both[0], "specialization_cost": both[1],
            "cost": {**small_studies.cost(once + own, 1), "money": None}}


def study(gains=GAINS):
    blocks = [
        ("slm", [{}, {BUDGET: 11_200_000}, {BUDGET: 62_800_000}]),
        ("slm-is", [{}, {BUDGET: 1_600_000}, {BUDGET: 1_256_000}, {MIXED: 0.05}]),
        ("slm-adapt", [{}, {ADAPT: 0.05}]),
        ("slm-pn", [{}, {BUDGET: 11_200_000}, {BLENDS: 16},
                    {BLENDS: 16, BUDGET: 11_200_000}]),
        ("slm-pn-adapt", [{}, {BLENDS: 16}])]
    rows = [row(method, domain, {**changes, "seed": seed}, gains) for method, all_changes in blocks
            for changes in all_changes for domain in DOMAINS for seed in (0, 1)]
    made = small_studies.study()
    recipe = made["recipe"] | {"pretrain_tokens": P}
    return {**made, "recipe": recipe, "rows": rows}


@pytest.fixture(scope="module")
def cells():
    return Cells(study())


def test_costs_are_paid_once_and_per_domain(cells):
    per = small_studies.PER_TOKEN
    assert cost(cells, Arm("slm-adapt"), 7) == pytest.approx(
        per * (P - ADAPTED + 7 * (ADAPTED + TUNED)))
    for n, budgets in ((7, (11_200_000, 1_600_000)), (50, (62_800_000, 1_256_000))):
        for method, budget in zip(("slm", "slm-is"), budgets, strict=True):
            found = as_dear(cells, method, Arm("slm-adapt"), n)
            assert found and found.changes[BUDGET] == budget
    assert as_dear(cells, "slm-pn", Arm("slm-adapt"), 50) is None  # none is as dear


def test_expectations_that_hold_are_told_so():
    made, judged = SUITE.of(study())
    assert {each.verdict for each in judged} == {"reproduced"}, [
        (each.text, each.verdict, each.evidence) for each in judged]
    assert all(each.ours for each in judged) and len(judged) == 15
    assert "34% of its FLOPs" in claim(judged, "Adapting one plain model").evidence
    names = {table.name for table in made}
    assert all(each.table in names for each in judged)


def test_expectations_that_fail_are_told_so():
    _, judged = SUITE.of(study({**GAINS, "slm-adapt": -0.1, "slm-pn": -0.2, "slm-pn-adapt": -0.3}))
    found = {each.text: each.verdict for each in judged}
    assert found.pop("5% of the domain's text makes slm-adapt better.") == "reproduced"
    assert found.pop("5% of the domain's text makes slm-is better.") == "reproduced"
    for text in [text for text in found if "trained on clusters" in text]:
        assert found.pop(text) == "reproduced"
    assert set(found.values()) == {"not reproduced"}


def test_the_front_is_what_is_better_than_cheaper_ways():
    made, _ = SUITE.of(study())
    for n in (1, 7, 50):
        rows = named(made, f"split-total-{n:02d}").rows
        assert [row["total_flops"] for row in rows] == sorted(row["total_flops"] for row in rows)
        for place, row in enumerate(rows):
            best = all(other["after"] > row["after"] for other in rows[:place])
            assert (row["front"] == "yes") is best
    assert len({row["series"] for row in rows}) == 9
    first = named(made, "split-domains").rows[0]
    assert first["difference_ci"][0] <= first["difference"] <= first["difference_ci"][1]


def test_what_is_better_at_one_seed_alone_is_not_on_the_front():
    made = study()
    dearer = [row for row in made["rows"] if row["method"] == "slm-is"
              and row["settings"][BUDGET] == 1_600_000 and row["seed"] == 1]
    for each in dearer:
        each["nll_after"] = [nats + 0.1 * n for nats, n in zip(
            each["nll_after"], each["tokens"], strict=True)]
    rows = named(SUITE.of(made)[0], "split-total-01").rows
    first, second = rows[:2]
    assert second["after"] < first["after"] and (first["front"], second["front"]) == ("yes", "")


def test_a_page_of_it_says_what_is_better_than_cheaper_ways():
    seen = view.view(study(), SUITE)
    assert not any("the paper's claims" in said for said in seen.summary)
    assert sum("better than the one before by more" in said for said in seen.summary) == 3


def test_without_rows_everything_is_said_to_be_missing():
    _, judged = SUITE.of({**study(), "rows": [row("slm", d, {}, GAINS) for d in DOMAINS]})
    assert {each.verdict for each in judged} == {"cannot be judged"}
    assert all(each.missing for each in judged)
