"""Schedules against their formulas, and where a shorter run parts from a longer one."""

import math

import pytest

from planearly.train import schedule


@pytest.mark.parametrize("kind", ["constant", "wsd", "cosine", "inverse-sqrt"])
def test_warm_up_rises_to_the_peak(kind):
    rising = [schedule.factor(kind, step, 110, 10, 0.3) for step in range(11)]
    assert rising[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rising[10] == pytest.approx(math.sqrt(10 / 11) if kind == "inverse-sqrt" else 1.0)


@pytest.mark.parametrize(("kind", "step", "expected"), [
    ("constant", 109, 1.0), ("inverse-sqrt", 39, 0.5), ("inverse-sqrt", 89, 1 / 3),
    ("cosine", 60, 0.55), ("cosine", 35, 0.55 + 0.45 / math.sqrt(2)), ("cosine", 110, 0.1),
    ("wsd", 77, 1.0), ("wsd", 93, 17 / 33), ("wsd", 109, 1 / 33), ("wsd", 110, 0.0)])
def test_after_it_each_goes_by_its_formula(kind, step, expected):
    assert schedule.factor(kind, step, 110, 10, 0.3) == pytest.approx(expected)


@pytest.mark.parametrize(("kind", "steps", "expected"), [
    ("wsd", 100, 70), ("wsd", 1, 0), ("cosine", 100, 0), ("constant", 100, 100),
    ("inverse-sqrt", 100, 100)])
def test_the_stable_part_is_at_a_longer_runs_rates(kind, steps, expected):
    assert schedule.stable(kind, steps, 0.3) == expected
    for step in range(expected):
        assert schedule.factor(kind, step, steps, 5, 0.3) == schedule.factor(
            kind, step, 10 * steps, 5, 0.3)
