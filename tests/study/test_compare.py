"""Which cells are held against each other, by how much they differ, and what seeds do to it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from examples import examples
from planearly.study import compare, seeds
from planearly.study.compare import Arm, Cells
from small_studies import (
    ALL,
    DOMAINS,
    study,
)


def test_a_paired_macro_difference_agrees_with_the_textbook() -> None:
    made = study((["slm", "slm-is"], [{}], DOMAINS[:3]))
    cells = Cells(made)
    found = compare.difference(cells, Arm("slm-is"), Arm("slm"))
    assert found is not None and found.domains == DOMAINS[:3]
    means, variances, freedoms = [], [], []
    for domain in DOMAINS[:3]:
        a, b = (next(r for r in made["rows"] if (r["method"], r["domain"]) == (m, domain))
                for m in ("slm-is", "slm"))
        d, n = np.subtract(a["nll_after"], b["nll_after"]), np.array(a["tokens"], float)
        mean = d.sum() / n.sum()
        means.append(mean)
        variances.append(np.var(d - mean * n, ddof=1) * len(n) / n.sum() ** 2)
        freedoms.append(len(n) - 1)
    v = np.array(variances) / 9
    half = stats.t.ppf(0.975, v.sum() ** 2 / (v**2 / freedoms).sum()) * np.sqrt(v.sum())
    assert found.nats == pytest.approx(np.mean(means), rel=1e-9)
    assert found.interval == pytest.approx([np.mean(means) - half, np.mean(means) + half], rel=1e-9)


def test_pairing_narrows_the_interval() -> None:
    cells = Cells(study((["slm", "slm-is"], [{}], DOMAINS)))
    found = compare.difference(cells, Arm("slm-is"), Arm("slm"))
    alone = compare.macro(list(cells.rows(Arm("slm")).values()))
    assert found and alone
    assert found.high - found.low < 0.2 * np.diff(np.log(alone["ci95"]))[0]


def test_only_shared_domains_with_the_same_documents_are_compared() -> None:
    made = study((["slm"], [{}], DOMAINS), (["slm-is"], [{}], DOMAINS[1:]))
    other = next(r for r in made["rows"] if (r["method"], r["domain"]) == ("slm-is", DOMAINS[3]))
    other["tokens"] = [n + 1 for n in other["tokens"]]
    found = compare.difference(Cells(made), Arm("slm-is"), Arm("slm"))
    assert found and found.domains == DOMAINS[1:3]


def test_cells_of_other_settings_are_never_taken() -> None:
    cells = Cells(study((["slm"], [{"spec_tokens": 400_000}], DOMAINS),
                        (["slm-is"], [{}], DOMAINS)))
    assert cells.rows(Arm("slm")) == {}
    assert compare.difference(cells, Arm("slm-is"), Arm("slm")) is None
    assert cells.rows(Arm("slm-is", {"context": 512})) == {}  # a key that the grid does not vary
    assert cells.values(Arm("slm"), "spec_tokens") == [400_000]


def test_another_seed_that_disagrees_takes_the_side_away() -> None:
    def flips(method: str, settings: Mapping[str, Any], domain: str) -> float:
        return 4.0 + (method == "slm-is") * (-0.2 if settings["seed"] == 0 else 0.1)

    made = study((["slm", "slm-is"], [{}, {"seed": 1}], DOMAINS), level=flips)
    found = seeds.difference(Cells(made), Arm("slm-is"), Arm("slm"))
    assert found and found.own.high < 0 and found.side() == 0
    assert [seed.nats for seed in found.others] == pytest.approx([0.1], abs=0.01)


@given(st.lists(st.tuples(st.sampled_from(ALL), st.sets(st.sampled_from(DOMAINS), min_size=1)),
                min_size=1, max_size=6, unique_by=lambda each: each[0]))
@examples(25)
def test_no_cell_is_lost_from_an_average(grid: list[tuple[str, set[str]]]) -> None:
    cells = Cells(study(*(([method], [{}], sorted(of)) for method, of in grid)))
    parts = compare.blocks(cells, [Arm(method) for method, _ in grid])
    assert {arm.method for _, arms in parts for arm in arms} == {method for method, _ in grid}
    assert len({tuple(domains) for domains, _ in parts}) == len(parts)
    for domains, arms in parts:
        assert domains and all(set(domains) <= set(cells.rows(arm)) for arm in arms)


def test_one_cell_of_few_domains_does_not_take_the_others_theirs() -> None:
    few = DOMAINS[:1]
    cells = Cells(study((ALL[:-1], [{}], DOMAINS), (ALL[-1:], [{}], few)))
    parts = compare.blocks(cells, [Arm(method) for method in ALL])
    assert [(domains, len(arms)) for domains, arms in parts] == [(DOMAINS, 7), (few, 8)]
    # what nearly all lack is held over what they have
    cells = Cells(study((ALL[:1], [{}], DOMAINS), (ALL[1:], [{}], DOMAINS[:2])))
    parts = compare.blocks(cells, [Arm(method) for method in ALL])
    assert [(domains, len(arms)) for domains, arms in parts] == [(DOMAINS[:2], 8)]


def test_another_seed_counts_for_a_weighted_contrast_where_it_has_every_domain() -> None:
    further = [{"seed": 1}]
    weights = {"arxiv": 1.0, "wikipedia": -1.0}
    for domains, many in ((DOMAINS, 2), (DOMAINS[:2], 1)):
        cells = Cells(study((["slm", "slm-pn"], [{}], DOMAINS),
                            (["slm", "slm-pn"], further, domains)))
        found = seeds.estimate(cells, [(1.0, Arm("slm-pn")), (-1.0, Arm("slm"))], weights=weights)
        assert found and found.seeds == many


def test_the_spread_over_seeds_is_not_averaged_away_over_domains() -> None:
    shift = {0: 0.0, 1: 0.06}

    def drawn(method: str, settings: Mapping[str, Any], domain: str) -> float:
        return 4.0 - (method == "slm-is") * (0.2 + shift[settings["seed"]])

    few, many = (Cells(study((["slm", "slm-is"], [{}, {"seed": 1}], DOMAINS[:n]), level=drawn))
                 for n in (1, 4))
    one, four = (seeds.difference(cells, Arm("slm-is"), Arm("slm")) for cells in (few, many))
    assert one and four
    # of one pair: two of another study's and its own are what all have in common
    common = (2 * 0.04**2 + 0.06**2 / 2) / 3
    variance = (3 * common + 0.06**2 / 2) / 4
    assert four.spread.deviation == pytest.approx(variance**0.5, rel=1e-6)
    assert one.spread.deviation == pytest.approx(variance**0.5, rel=1e-6)
    assert four.spread.freedom == one.spread.freedom == 4
    assert four.nats == pytest.approx(-0.23, abs=1e-6)
    half = stats.t.ppf(0.975, 4) * (variance / 2) ** 0.5
    assert (four.high - four.low) / 2 == pytest.approx(half, rel=0.01)


@pytest.mark.parametrize(("deviation", "uneven", "own"), [
    (0.0, 0.0, 0.0), (0.007, 0.0, 0.01), (0.03, 0.0, 0.03), (0.06, 0.0, 0.0), (0.03, 0.5, 0.0)])
def test_intervals_over_seeds_hold_the_truth_as_often_as_they_say(
        deviation: float, uneven: float, own: float) -> None:
    """Of a study of eight methods on two domains at two seeds, which move a method by a deviation
    that may be another for each, and each domain on its own besides."""
    draw, held = np.random.default_rng(0), []
    methods = ["slm", "slm-is", "slm-pn", "slm-mix", "llm", "slm-d", "slm-dsir", "slm-knn"]
    for _ in range(25):
        of = deviation * np.exp(uneven * draw.normal(size=8) - uneven**2)
        moved = (draw.normal(size=(8, 2, 1)) * of[:, None, None]
                 + own * draw.normal(size=(8, 2, 2)))

        def drawn(method: str, settings: Mapping[str, Any], domain: str,
                  moved: np.ndarray = moved) -> float:
            return 4.0 + float(moved[methods.index(method), settings["seed"],
                                     DOMAINS.index(domain)])

        cells = Cells(study((methods, [{}, {"seed": 1}], DOMAINS[:2]), level=drawn))
        for a, b in itertools.combinations(methods, 2):
            for within in (DOMAINS[:2], DOMAINS[:1]):
                found = seeds.difference(cells, Arm(a), Arm(b), within)
                assert found
                held.append(found.low <= 1e-9 and found.high >= -1e-9)
    assert np.mean(held) > 0.94


def test_a_comparison_at_main_budgets_counts_beside_those_at_equal_ones() -> None:
    budgets = {"slm": (8_000_000, 2_000_000), "slm-d": (2_000_000,)}
    made = study(*(([method], [{"pretrain_tokens": budget, "seed": seed} for budget in of
                               for seed in (0, 1)], DOMAINS) for method, of in budgets.items()))
    made["recipe"]["study"] = {"main": {"slm": 8_000_000, "slm-d": 2_000_000}}
    found = seeds.difference(Cells(made), Arm("slm"), Arm("slm-d"))
    assert found and found.spread.repeated == pytest.approx(2 / (1 + 0.7**2))


def test_budgets_that_branch_off_one_phase_are_not_so_many_seeds() -> None:
    """What a seed does to two budgets of a pair is correlated by 0.7, in kept studies and here."""
    draw, held = np.random.default_rng(0), []
    methods, budgets = ["slm", "slm-is", "slm-pn", "llm"], [2_000_000, 4_000_000, 8_000_000]
    changes = [{"pretrain_tokens": budget, "seed": seed} for budget in budgets for seed in (0, 1)]
    for _ in range(40):
        moved = 0.03 * (0.7**0.5 * draw.normal(size=(4, 1, 2))
                        + 0.3**0.5 * draw.normal(size=(4, 3, 2)))

        def drawn(method: str, settings: Mapping[str, Any], domain: str,
                  moved: np.ndarray = moved) -> float:
            return 4.0 + float(moved[methods.index(method),
                                     budgets.index(settings["pretrain_tokens"]), settings["seed"]])

        cells = Cells(study((methods, changes, DOMAINS[:1]), level=drawn))
        for a, b in itertools.combinations(methods, 2):
            found = seeds.difference(cells, Arm(a), Arm(b))
            assert found and found.spread.repeated == pytest.approx(3 / (1 + 2 * 0.7**2))
            held.append(found.low <= 1e-9 and found.high >= -1e-9)
    assert np.mean(held) > 0.94


def test_a_method_that_a_seed_moves_far_does_not_widen_the_others_intervals() -> None:
    draw, widths, held = np.random.default_rng(0), [], []
    methods = ["slm", "slm-is", "slm-pn", "slm-mix", "llm", "slm-d", "slm-dsir", "slm-knn"]
    for _ in range(10):
        moved = 0.007 * draw.normal(size=(8, 2))
        moved[methods.index("slm-mix")] *= 12

        def drawn(method: str, settings: Mapping[str, Any], domain: str,
                  moved: np.ndarray = moved) -> float:
            return 4.0 + float(moved[methods.index(method), settings["seed"]])

        cells = Cells(study((methods, [{}, {"seed": 1}], DOMAINS[:2]), level=drawn))
        for a, b in itertools.combinations([m for m in methods if m != "slm-mix"], 2):
            found = seeds.difference(cells, Arm(a), Arm(b))
            assert found
            widths.append((found.high - found.low) / 2)
            held.append(found.low <= 1e-9 and found.high >= -1e-9)
    assert np.mean(held) > 0.94
    # where the mixture is no different, 0.038; its variance averaged in made it 0.08
    assert np.mean(widths) < 0.05


@pytest.mark.parametrize("tuning", [0.0, 0.002, 0.01, 0.03])
def test_fine_tunings_of_one_pretraining_are_judged_by_what_comes_after_it(tuning: float) -> None:
    """A seed moves the pretraining, and all that is tuned from it, by 0.04; and each by its own."""
    draw, widths, held = np.random.default_rng(0), [], []
    methods, shares = ["slm", "slm-is", "slm-pn", "llm"], [0.0, 0.2, 0.4]
    changes = [{"finetune.replay_share": share, "seed": seed}
               for share in shares for seed in (0, 1)]
    for _ in range(20):
        moved = 0.04 * draw.normal(size=(4, 1, 2)) + tuning * draw.normal(size=(4, 3, 2))

        def drawn(method: str, settings: Mapping[str, Any], domain: str,
                  moved: np.ndarray = moved) -> float:
            return 4.0 + float(moved[methods.index(method), shares.index(
                settings["finetune.replay_share"]), settings["seed"]])

        cells = Cells(study((methods, changes, DOMAINS[:2]), level=drawn))
        for method, (a, b) in itertools.product(methods, itertools.combinations(shares, 2)):
            found = seeds.difference(cells, Arm(method, {"finetune.replay_share": a}),
                                     Arm(method, {"finetune.replay_share": b}))
            assert found and found.seeds == 2
            widths.append((found.high - found.low) / 2)
            held.append(found.low <= 1e-9 and found.high >= -1e-9)
    assert np.mean(held) > 0.94
    # as of other pretrainings it was 0.08 and more however little came after
    assert np.mean(widths) < 0.015 + 4 * tuning


def test_what_comes_after_a_pretraining_is_told_from_another_pretraining() -> None:
    cells = Cells(study((["slm", "slm-is", "slm-pn", "llm", "llm-lora", "slm-d"], [
        {}, {"spec_tokens": 400_000}, {"expert": "blend"}, {"pretrain_tokens": 4_000_000},
        {"importance.k": 16}, {"distill.teacher_tokens": 4_000_000}], DOMAINS)))

    def alike(a: Arm, b: Arm) -> bool:
        return seeds.tuned(cells, [(1.0, a), (-1.0, b)])

    larger, blend = {"spec_tokens": 400_000}, {"expert": "blend"}
    assert alike(Arm("slm"), Arm("slm", larger)) and alike(Arm("llm-lora"), Arm("llm"))
    assert alike(Arm("slm-pn"), Arm("slm-pn", blend)) and alike(Arm("slm-d"), Arm("slm-d", larger))
    # importance sampling draws by the set; a taught model has another's pretraining as well
    assert not alike(Arm("slm-is"), Arm("slm-is", larger))
    assert not alike(Arm("slm-is"), Arm("slm-is", {"importance.k": 16}))
    assert not alike(Arm("slm-d"), Arm("slm-d", {"distill.teacher_tokens": 4_000_000}))
    assert not alike(Arm("slm"), Arm("slm-d")) and not alike(Arm("slm"), Arm("slm-pn"))
    assert not alike(Arm("slm"), Arm("slm", {"pretrain_tokens": 4_000_000}))
    assert not alike(Arm("slm"), Arm("slm", when="before"))
    # made twice, as where rows of two folders were gathered: as unlike as two pretrainings
    for row in cells.rows(Arm("slm", larger)).values():
        row["generic_cost"] = {**row["generic_cost"], "device_hours": 7.5}
    assert not alike(Arm("slm"), Arm("slm", larger))
    for row in cells.rows(Arm("slm", larger)).values():
        row["generic_cost"] = cells.rows(Arm("slm"))[row["domain"]]["generic_cost"]
    # a difference of differences, as of an advantage that a larger set takes away
    assert seeds.tuned(cells, [(1.0, Arm("slm-pn")), (-1.0, Arm("slm-pn", larger)),
                               (-1.0, Arm("slm")), (1.0, Arm("slm", larger))])


def test_pretrainings_of_one_domain_made_twice_are_told_by_what_they_said_before_it() -> None:
    """Nothing of theirs is paid before the domain is known, so no duration tells them apart."""
    replay, draw = {"finetune.replay_share": 0.2}, np.random.default_rng(0)
    cells = Cells(study((["slm-is"], [{}, replay], DOMAINS)))
    terms = [(1.0, Arm("slm-is", replay)), (-1.0, Arm("slm-is"))]
    assert seeds.tuned(cells, terms)
    row = cells.rows(Arm("slm-is", replay))[DOMAINS[0]]
    assert row["generic_cost"]["device_hours"] == 0
    row["nll_before"] = np.add(row["nll_before"], draw.normal(size=len(row["tokens"]))).tolist()
    assert not seeds.tuned(cells, terms)


def test_fine_tunings_of_pretrainings_made_twice_are_no_more_pairs_than_there_are() -> None:
    """Two of each: of three differences between four fine-tunings one is of pretrainings."""
    shares = [{"finetune.replay_share": share} for share in (0.0, 0.1, 0.2, 0.3)]
    made = study((["slm"], [{**share, "seed": seed} for share in shares for seed in (0, 1)],
                  DOMAINS))
    pairs, freedom = seeds._tunings(Cells(made))
    assert (len(pairs), freedom) == (6, 3)
    for row in made["rows"]:
        if row["settings"]["finetune.replay_share"] > 0.1:
            row["generic_cost"] = {**row["generic_cost"], "device_hours": 7.5}
    pairs, freedom = seeds._tunings(Cells(made))
    assert (len(pairs), freedom) == (2, 2)


def test_where_the_pair_has_one_seed_the_study_tells_the_spread() -> None:
    def drawn(method: str, settings: Mapping[str, Any], domain: str) -> float:
        return 4.0 + 0.02 * settings["seed"] * (method == "slm-is")

    cells = Cells(study((["slm", "slm-is", "llm"], [{}, {"seed": 1}], DOMAINS),
                        (["slm-pn"], [{}], DOMAINS), level=drawn))
    found = seeds.difference(cells, Arm("slm-pn"), Arm("slm"))
    # three pairs, two of which moved by 0.02; two methods beside the first were made again
    common = (2 * 0.04**2 + 2 * (0.02**2 / 2) * 2 / 3) / 4
    assert found and found.spread.repeated == 0 and found.spread.freedom == 4
    assert found.spread.deviation == pytest.approx(common**0.5, rel=1e-6)


def test_methods_with_main_budgets_of_their_own_tell_each_other_s_spread() -> None:
    def drawn(method: str, settings: Mapping[str, Any], domain: str) -> float:
        return 4.0 + 0.02 * settings["seed"] * (method == "slm-is")

    seeds_of = [{"seed": seed} for seed in (0, 1)]
    made = study((["slm-is"], seeds_of, DOMAINS), (["slm"], [
        {**at, "pretrain_tokens": 32_000_000} for at in seeds_of], DOMAINS), level=drawn)
    made["recipe"]["study"] = {"main": {"slm": 32_000_000}}
    found = seeds.difference(Cells(made), Arm("slm-is"), Arm("slm"))
    assert found and found.seeds == 2 and found.spread.repeated == 1


def test_a_contrast_of_four_has_twice_a_pairs_variance() -> None:
    cells = Cells(study((["slm", "slm-pn"], [{}], DOMAINS)))
    pair = seeds.spread(cells, [(1.0, Arm("slm-pn")), (-1.0, Arm("slm"))], DOMAINS)
    other = {"pretrain_tokens": 4_000_000}
    four = seeds.spread(cells, [(1.0, Arm("slm-pn")), (-1.0, Arm("slm")),
                                (-1.0, Arm("slm-pn", other)), (1.0, Arm("slm", other))],
                        DOMAINS)
    assert four.deviation == pytest.approx(pair.deviation * 2**0.5)
