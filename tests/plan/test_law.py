"""The loss law recovers what made the data, knows its range, and refuses beyond it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from planearly.errors import UserError
from planearly.plan import law

PARAMS, PRETRAIN, SPEC = (1e6, 4e6, 16e6), (5e6, 2e7, 8e7), (1e4, 1e5, 1e6)


def truth(n: float, d: float, s: float, shift: float = 0.0) -> float:
    return 1.8 + shift + 30 * n ** -0.25 + 40 * d ** -0.28 + 20 * s ** -0.30


def grid(noise: float = 0.0, seed: int = 0, domains: tuple[str, ...] = ("a",),
         specs: tuple[float, ...] = SPEC) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    return [{"method": "slm", "domain": name, "inference_params": n, "pretrain_tokens": d,
             "spec_tokens": s,
             "ppl_after": math.exp(truth(n, d, s, i) * math.exp(noise * random.normal()))}
            for n in PARAMS for d in PRETRAIN for s in specs for i, name in enumerate(domains)]


def test_without_noise_the_law_extrapolates_to_the_truth() -> None:
    fitted = law.fit(grid(), "slm", refits=5)
    assert max(map(abs, fitted.residuals)) < 1e-4
    for n, d, s in [(4e6, 2e7, 1e5), (1.6e8, 8e7, 1e5), (1.6e7, 8e8, 1e7)]:
        assert fitted.predict(n, d, s).nll_per_token == pytest.approx(truth(n, d, s), rel=0.005)


def test_intervals_hold_the_truth_and_are_not_vast() -> None:
    inside = 0
    for seed in range(10):
        fitted = law.fit(grid(0.005, seed), "slm", refits=60, seed=seed)
        point = fitted.predict(3.2e7, 4e8, 1e6)
        low, high = point.ci95
        inside += low <= math.exp(truth(3.2e7, 4e8, 1e6)) <= high
        assert high / low < 1.25
        assert point.extrapolation == pytest.approx(5)
    assert inside >= 8


def test_an_outlier_moves_the_law_little() -> None:
    rows = grid()
    rows[4]["ppl_after"] *= 3
    fitted = law.fit(rows, "slm", refits=2)
    assert fitted.predict(4e6, 2e7, 1e5).nll_per_token == \
        pytest.approx(truth(4e6, 2e7, 1e5), rel=0.01)
    assert max(fitted.residuals) > 0.1


def test_it_refuses_beyond_ten_times_and_off_an_axis_that_was_not_varied() -> None:
    fitted = law.fit(grid(specs=(1e5,)), "slm", refits=2)
    assert fitted.axes == ("params", "pretrain_tokens")
    assert fitted.predict(1.5e8, 8e8, 1e5).extrapolation == pytest.approx(10)
    with pytest.raises(UserError, match="params of 1M to 16M"):
        fitted.predict(1.7e8, 2e7, 1e5)
    with pytest.raises(UserError, match="pretrain_tokens"):
        fitted.predict(4e6, 4e5, 1e5)
    with pytest.raises(UserError, match="was not varied"):
        fitted.predict(4e6, 2e7, 1e6)


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(UserError, match="at least three values"):
        law.fit(grid()[:4], "slm")
    with pytest.raises(UserError, match=r"runs of slm-is \(0, with 0 of params"):
        law.fit(grid(), "slm-is")


def test_of_two_values_the_more_frequent_is_taken() -> None:
    rows = [row for row in grid() if row["inference_params"] != PARAMS[1]]
    fitted = law.fit([row for row in rows if row != rows[0]], "slm", refits=2)
    assert fitted.axes == ("pretrain_tokens", "spec_tokens")
    assert fitted.seen["params"] == (PARAMS[2], PARAMS[2]) and fitted.runs == 9


def test_sets_cut_at_documents_are_of_one_size() -> None:
    rows = grid(domains=("a", "b", "c"))
    for i, row in enumerate(rows):
        row["spec_tokens"] += i % 3 * 40
    # one size on one domain more must not cost the others their average
    rows.append({**rows[0], "domain": "d"})
    fitted = law.fit(rows, "slm", refits=2)
    assert fitted.runs == 27
    assert fitted.predict(4e6, 2e7, 1e5).nll_per_token == \
        pytest.approx(truth(4e6, 2e7, 1e5, 1.0), rel=0.002)


def test_of_a_study_only_the_rows_that_vary_sizes_count() -> None:
    row = {"method": "slm", "settings": {"spec_tokens": 5, "seed": 1, "finetune.replay_share": 0.0}}
    other = {"method": "slm", "settings": {"spec_tokens": 5, "finetune.replay_share": 0.2}}
    study = {"recipe": {"finetune": {"replay_share": 0.0}}, "rows": [row, other]}
    assert law.plain(study) == [row]
    assert law.plain({"rows": [{"method": "slm"}]}) == [{"method": "slm"}]
    # a student's budget is not all of its own where the teacher's is another
    rows = [{"method": "slm"}, {"method": "slm-d"}]
    assert law.plain({"rows": rows}) == rows
    assert law.plain({"rows": rows, "recipe": {"distill": {"teacher_tokens": 9}}}) == rows[:1]


def test_domains_are_averaged_as_the_papers_macro_average() -> None:
    fitted = law.fit(grid(domains=("a", "b")), "slm", refits=2)
    assert fitted.runs == 27
    middle = fitted.predict(4e6, 2e7, 1e5)
    assert middle.nll_per_token == pytest.approx(truth(4e6, 2e7, 1e5, 0.5), rel=0.002)


def test_the_description_names_fit_residual_and_range() -> None:
    text = law.fit(grid(0.005), "slm", refits=2).describe()
    assert "27 runs" in text and "residual" in text and "10 times" in text
