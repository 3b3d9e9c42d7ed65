"""What each change of a recipe's settings does, of generated rows."""

import pytest

from planearly.studies import suite
from planearly.study import view
from small_studies import DOMAINS, named, plain, study

SHARE = "pretrain.specialization_share"
GAINS = {(0.1, None): -0.3, (0.0, 64): 0.001, (0.1, 64): 0.25}
SUITE = suite("variants")


def level(method, settings, domain):
    gain = GAINS.get((settings[SHARE], settings["importance.k"]), 0.0)
    return plain("slm", {**settings, "importance.k": None}, domain) + gain


def made():
    both = [{"seed": seed} for seed in (0, 1)]
    changes = [{}, {SHARE: 0.1}, {"importance.k": 64}]
    return study((["slm-is"], [{**each, **seed} for each in changes for seed in both], DOMAINS),
                 (["slm-is"], [{SHARE: 0.1, "importance.k": 64}], DOMAINS[:2]), level=level)


def test_variants_are_held_against_the_recipe_over_seeds():
    tables, claims = SUITE.of(made())
    rows = named(tables, "variants").rows
    assert not claims
    assert [row["setting"] for row in rows] == [
        f"{SHARE} 0.1", "importance.k 64", f"importance.k 64, {SHARE} 0.1"]
    assert [row["difference"] for row in rows] == pytest.approx([-0.3, 0.001, 0.25], abs=1e-6)
    assert [row["seeds"] for row in rows] == ["-0.300, -0.300", "+0.001, +0.001", "+0.250"]
    assert rows[0]["over"] == "all 4 domains" and rows[2]["over"].startswith("2 of 4")
    low, high = rows[0]["difference_ci"]
    assert -0.4 < low < -0.3 < high < -0.2
    assert rows[0]["times"] == 1.0


def test_the_page_tells_which_variants_are_ahead_and_asks_no_claims():
    found = view.view(made(), SUITE)
    better, counted = found.summary
    assert better.startswith("Better than the recipe's own settings by more than chance, in nats "
                             f"per token: slm-is with {SHARE} 0.1 -0.300 [")
    assert counted == ("Of 3 variants, 1 cannot be told from the recipe's own settings, and 1 are "
                       "of one seed, which does not say.")
    for template in ("readme.md.j2", "study_page.html.j2"):
        page = view.text(found, template)
        assert "claims</h2>" not in page and "## The claims" not in page
        assert "the claims below" not in page and "over seeds" in page


def test_a_study_without_variants_has_no_table_of_them():
    tables, _ = SUITE.of(study((["slm", "slm-is"], [{}], DOMAINS)))
    assert "variants" not in {table.name for table in tables}
    assert not [sentence for sentence in SUITE.sentences(tables) if "variants" in sentence]
