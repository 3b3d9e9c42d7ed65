"""From how many domains on a projected network costs less than importance sampling, at equal
perplexity."""

import math

import pytest

from planearly.report import chart
from planearly.studies.paper.crossing import passing
from planearly.study import view
from small_studies import DOMAINS, SHARED, claim, claims, named, repeated, study, tables

M = 1_000_000
BUDGETS = [4 * M, 8 * M, 16 * M]
TUNED = 5 * 50_000


def made(pn=2.95, slope=0.1, budgets=BUDGETS, seeds=3, methods=("slm-is", "slm-pn")):
    """slm-pn at ``pn`` nats whatever it costs, slm-is at 3 with 8M tokens and by ``slope`` better
    with each doubling."""
    def level(method, settings, domain):
        if method == "slm-pn":  # the cheapest is the best, by a hair
            return pn + 1e-4 * budgets.index(settings["pretrain_tokens"])
        return 3.0 - slope * math.log2(settings["pretrain_tokens"] / (8 * M))

    whole = study((list(methods), [{"pretrain_tokens": budget} for budget in budgets], DOMAINS),
                  level=level)
    return repeated(whole, level, seeds) if seeds else whole


def the(found):
    return claim(claims(found), "C(N) crosses over")


def test_the_tokens_at_which_sampling_is_as_good_are_interpolated():
    """0.05 nats better than with 8M tokens: half a doubling more of them."""
    rows = named(tables(made()), "figure-06-equal-quality").rows
    tokens = 8 * M * 2 ** 0.5
    generic = {row["budget"]: SHARED["slm-pn"] * row["budget"] for row in rows}
    assert sorted(generic) == BUDGETS
    for row in rows:
        assert row["tokens"] == pytest.approx(tokens, rel=3e-3) and row["domains"] == 4
        assert row["flops"] == row["hours"] == pytest.approx(
            generic[row["budget"]] / tokens, rel=3e-3)
        low, high = row["tokens_ci"]
        assert 8 * M < low < row["tokens"] < high < 16 * M
        least, most = row["flops_ci"]
        assert least == pytest.approx(generic[row["budget"]] / high, rel=1e-3)
        assert most == pytest.approx(generic[row["budget"]] / low, rel=1e-3)


def test_the_claim_is_by_the_best_network_and_its_interval():
    found = the(made())
    # 8M is the main budget, all are as good: the first, of 4M tokens, meets at 6.4M / 11.3M
    assert found.verdict == "not reproduced" and "at equal" not in found.evidence
    assert "with 11.3M [" in found.evidence and found.table == "figure-06-equal-quality"
    worse = the(made(pn=3.08))
    assert worse.verdict == "reproduced" and "in FLOPs at 1.4 [" in worse.evidence  # 6.4M / 4.6M

    def later(budgets):
        """Only the dearest network is any good."""
        def level(method, settings, domain):
            tokens = settings["pretrain_tokens"]
            if method == "slm-pn":
                return 3.0 if tokens == budgets[-1] else 4.0
            return 3.0 - 0.1 * math.log2(tokens / (8 * M))
        whole = study((["slm-is", "slm-pn"], [{"pretrain_tokens": n} for n in budgets], DOMAINS),
                      level=level)
        return repeated(whole, level, 3)

    far = the(later([4 * M, 8 * M, 64 * M]))
    assert far.verdict == "reproduced"  # 102.4M / 8M
    assert "in FLOPs at 12.8 [" in far.evidence and "over 4 of 4 domains" in far.evidence


def test_one_seed_does_not_judge_it():
    found = the(made(seeds=0))
    assert (found.verdict, found.one_seed) == ("cannot be judged", True)
    assert "Not judged: one seed." in found.evidence


def test_what_no_budgets_lie_around_is_judged_by_one_budget():
    for pn, words in ((2.5, "The cheapest of slm-pn that is not worse"),
                      (3.5, "No budget of slm-pn is as good as slm-is")):
        found = the(made(pn=pn))
        assert found.table == "figure-06-crossing" and words in found.evidence
        assert "figure-06-equal-quality" not in {table.name for table in tables(made(pn=pn))}
    assert the(made(budgets=[8 * M])).table == "figure-06-crossing"


def test_an_end_beyond_the_budgets_is_told_and_drawn():
    """0.001 nats better than with 16M tokens less what may be otherwise lies beyond them."""
    found = made(pn=2.9 + 1e-4)
    table = named(tables(found), "figure-06-equal-quality")
    low, high = table.rows[0]["tokens_ci"]
    assert low < 16 * M and high is None and table.rows[0]["flops_ci"][0] is None
    assert "beyond the budgets tried]" in the(found).evidence
    assert chart.draw(table) is not None
    assert "–]" in view.text(view.of(found, [table], []), "study_page.html.j2")


@pytest.mark.parametrize(("values", "place"), [
    ([-1.0, 1.0, 3.0], 0.5), ([-2.0, -1.0, 3.0], 1.25), ([0.0, 1.0, 2.0], 0.0),
    ([-1.0, -0.5, 0.0], 2.0), ([1.0, 2.0, 3.0], None), ([-3.0, -2.0, -1.0], None),
    ([0.0, 0.0, 0.0], None), ([1.0, -1.0, 1.0], 1.5)])
def test_where_values_pass_zero_on_their_way_up(values, place):
    assert passing([0.0, 1.0, 2.0], values) == place
