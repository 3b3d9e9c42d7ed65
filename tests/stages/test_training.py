"""What trainings have in common: the rows of a domain, and what is booked."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from planearly import keys, parallel
from planearly.errors import UserError
from planearly.stages import corpus, training
from planearly.train import loop
from planearly.train.objective import NextToken

CONTEXT = 4


class Windows:
    """A dataset whose windows hold one token again and again: their number."""

    context = CONTEXT

    def __init__(self, lengths: list[int]) -> None:
        self.windows = {"length": np.array(lengths)}

    def __len__(self) -> int:
        return len(self.windows["length"])

    def rows(self, row_windows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        lengths = self.windows["length"]
        found = np.full((len(row_windows), CONTEXT), -100)
        for row, windows in zip(found, row_windows, strict=True):
            row[:lengths[windows].sum()] = np.repeat(windows, lengths[windows])
        return np.maximum(found, 0), found


def test_an_epoch_of_a_domain_is_each_of_its_own_windows_once(
        monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, used = [4, 2, 3, 4, 1, 2, 4, 4], np.array([0, 1, 3, 5, 7])
    monkeypatch.setattr(corpus, "specialization_windows",
                        lambda run, name: (Windows(lengths), used))
    orders = set()
    for seed in (0, 1):
        run: Any = SimpleNamespace(recipe=keys.Recipe(context=CONTEXT, seed=seed))
        stream, rows = training.domain_stream(run, "law")
        assert rows == 4  # two windows of half the context share one
        for epoch in range(3):
            batch = stream.batch(rows * epoch, rows * (epoch + 1))
            seen = batch.targets[batch.targets >= 0]
            assert sorted(seen.tolist()) == np.repeat(used, np.array(lengths)[used]).tolist()
            orders.add(tuple(batch.targets[:, 0].tolist()))
    assert len(orders) > 2


@pytest.mark.parametrize("text", ["{", "[1]", "7", "null"])
def test_of_a_note_that_is_none_nothing_is_known(tmp_path: Path, text: str) -> None:
    asked = keys.Recipe(pretrain=keys.Pretrain(precision="fp32")).pretrain
    (tmp_path / loop.OUTCOME).write_text('{"arithmetic": {"bf16": true}}')
    assert not training.as_precise(asked)(tmp_path)
    (tmp_path / loop.OUTCOME).write_text(text)
    assert training.as_precise(asked)(tmp_path)
    with pytest.raises(UserError, match=r"outcome\.json is (damaged|not valid JSON)"):
        loop.outcome_in(tmp_path)


def test_a_training_is_booked_for_all_devices_and_with_what_its_objective_spent(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "world", lambda: 4)
    run: Any = SimpleNamespace(recipe=keys.Recipe(
        cost=keys.Cost(price_per_hour=36.0, currency="EUR")))
    outcome = loop.Outcome(tokens=1_000, seconds=90.0, clock_seconds=180.0, saving_seconds=9.0)
    plain = training.book(run, "pretrain/slm", outcome, 2e4)
    assert (plain["stage"], plain["tokens"], plain["flops"]) == ("pretrain/slm", 1_000, 2e7)
    assert plain["device_hours"] == pytest.approx(360 / 3600)
    assert plain["saving_hours"] == pytest.approx(36 / 3600) and plain["sharing"] == 2.0
    assert (plain["money"], plain["currency"]) == (pytest.approx(3.96), "EUR")
    goal = NextToken()
    goal.flops_before, goal.seconds_before = 5e6, 40.0  # of all devices together
    goal.flops_per_token, goal.teacher_width = 1e4, 64
    taught = training.book(run, "s", outcome, 2e4, goal)
    assert taught["tokens"] == 1_000 and taught["flops"] == 3.5e7
    assert taught["device_hours"] == pytest.approx(400 / 3600)
    assert taught["teacher"] == {"flops": 1.5e7, "d_model": 64} and "teacher" not in plain
