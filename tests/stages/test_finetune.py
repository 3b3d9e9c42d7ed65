"""Steps, rates and rows of a fine-tuning, without a run."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from planearly import keys, tensors
from planearly.model import flops, lora, outside, starts
from planearly.model.transformer import Transformer
from planearly.stages import corpus, finetune, pipeline, training
from planearly.train import loop, vector
from small_runs import recipe
from small_trainings import SHAPE, Words

RECIPE = keys.Recipe(context=16, finetune=keys.Finetune(
    batch_tokens=8 * 16, max_epochs=3, scratch_epochs=7,
    optimizer=keys.Optimizer(lr=1e-3, embedding_lr=1e-4), lr_scale=0.25))
EPOCH_ROWS = 100


class Generic(Words):
    """Other rows than the domain's."""

    def batch(self, start: int, stop: int) -> Any:
        return super().batch(1000 + start, 1000 + stop)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A domain of 100 rows, 30 tokens of which are used."""
    own = Words()
    own.dataset = SimpleNamespace(windows={"length": np.array([9, 10, 11, 12])})  # type: ignore
    monkeypatch.setattr(training, "domain_stream", lambda run, name: (own, EPOCH_ROWS))
    monkeypatch.setattr(training, "generic_stream", lambda run, rows, weights: Generic())
    monkeypatch.setattr(corpus, "specialization_windows",
                        lambda run, name: (None, np.array([0, 1, 2])))
    monkeypatch.setattr(starts, "folder", lambda recipe, large: Path("x") if large else None)
    return SimpleNamespace(recipe=RECIPE)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_replay_takes_its_share_of_each_step_and_leaves_the_passes(run: Any, share: float) -> None:
    replay = finetune.Replay(Path("rows"), np.ones(3), share) if share else None
    plan = finetune.tuning(run, "law", replay)
    assert plan.steps == math.ceil(3 * EPOCH_ROWS / (8 * (1 - share))) and plan.tokens == 30
    rows = plan.stream.batch(0, 64).inputs
    own = {tuple(row) for row in Words().batch(0, 64).inputs.tolist()}
    assert sum(tuple(row) not in own for row in rows.tolist()) == pytest.approx(64 * share, abs=1)


def test_the_rate_is_a_share_of_the_base_rate_but_from_scratch(run: Any) -> None:
    tuned = finetune.tuning(run, "law")
    rates = tuned.rates(RECIPE, 256)
    assert (rates.lr, rates.embedding_lr) == (pytest.approx(0.25e-3), pytest.approx(0.25e-4))
    assert rates.warmup_steps == tuned.steps // 10
    faster = tuned.rates(RECIPE, 256, steps=20, times=3.0)
    assert (faster.lr, faster.warmup_steps) == (pytest.approx(0.75e-3), 2)
    fresh = finetune.tuning(run, "law", scratch=True)
    assert fresh.steps == math.ceil(7 * EPOCH_ROWS / 8)
    assert fresh.rates(RECIPE, 256).lr == pytest.approx(1e-3)


@pytest.mark.parametrize("scale", [0.15, None])
@pytest.mark.parametrize("given", [{}, {"lr": 3e-3}, {"embedding_lr": 2e-3},
                                   {"lr": 3e-3, "embedding_lr": 2e-3}])
@pytest.mark.parametrize("kind", ["small", "large", "scratch", "vector"])
def test_the_keys_that_are_named_to_lower_the_rates_lower_them(
        run: Any, scale: float | None, given: dict[str, float], kind: str) -> None:
    """Whichever keys a recipe has, and whatever scales them: at a third of what is named, all
    rates are a third."""
    def made(tune: keys.Finetune) -> tuple[Any, dict[str, float]]:
        run.recipe = dataclasses.replace(RECIPE, finetune=tune)
        plan = finetune.tuning(run, "law", scratch=kind == "scratch", large=kind == "large")
        if kind == "vector":
            plan = dataclasses.replace(plan, rate_factor=1.0, scaled=False)
        return plan.rates(run.recipe, 256, times=2.0), plan.rate_keys(run.recipe, 256)

    tune = keys.Finetune(lr_scale=scale, optimizer=keys.Optimizer(**given))
    rates, named = made(tune)
    third: dict[str, Any] = {key.removeprefix("finetune."): value / 3
                             for key, value in named.items()}
    lower = tune.optimizer
    for key in ("lr", "embedding_lr"):
        lower = dataclasses.replace(lower, **{key: third.pop(f"optimizer.{key}",
                                                             getattr(lower, key))})
    lowered, _ = made(dataclasses.replace(tune, optimizer=lower, **third))
    assert (lowered.lr, lowered.embedding_lr) == pytest.approx(
        (rates.lr / 3, rates.embedding_lr / 3))
    scales = kind not in ("scratch", "vector")
    assert ("finetune.lr_scale" in named) == (scales and (scale is not None or not given))


def test_what_began_as_a_checkpoint_goes_on_at_its_rates(run: Any) -> None:
    run.recipe = dataclasses.replace(RECIPE, finetune=dataclasses.replace(
        RECIPE.finetune, lr_scale=None, optimizer=keys.Optimizer()))
    ours, opened, fresh = (finetune.tuning(run, "law", large=large, scratch=scratch) for
                           large, scratch in ((False, False), (True, False), (True, True)))
    assert [plan.continued for plan in (ours, opened, fresh)] == [False, True, False]
    base = ours.rates(run.recipe, 256).lr / 0.15  # a small set's share of pretraining's rate
    assert opened.rates(run.recipe, 256).lr == pytest.approx(base / 30)
    assert fresh.rates(run.recipe, 256).lr == pytest.approx(base)


def test_adapters_take_their_factor_of_steps_and_rate_and_end_merged(
        run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run.recipe = dataclasses.replace(RECIPE, finetune=dataclasses.replace(
        RECIPE.finetune, max_steps=2, compile="no", precision="fp32", patience=99))
    losses = itertools.count(9.0, -1.0)
    monkeypatch.setattr(training, "shape_made", lambda stage: SHAPE)
    monkeypatch.setattr(training, "load_model", lambda stage: Transformer(SHAPE, seed=1))
    monkeypatch.setattr(training, "validator", lambda run, name: lambda model: next(losses))
    monkeypatch.setattr(corpus, "domain", lambda run, name: tmp_path / name)
    facts: dict[str, Any] = {}
    run.stage = lambda name, values, inputs, build, **_: facts.update(build(tmp_path)) or tmp_path
    adapters = keys.Lora(rank=2, step_factor=3.0, lr_factor=2.0)
    stage = finetune.specialize(run, "slm-lora", "law", tmp_path / "slm", adapters=adapters,
                                replay=finetune.Replay(tmp_path / "rows", np.ones(3), 0.25))
    outcome = training.outcome_of(stage)
    assert outcome["steps"] == 6 and outcome["optimizer"]["lr"] == pytest.approx(0.5e-3)
    assert facts["cost"]["tokens"] == outcome["tokens"] and facts["spec_tokens"] == 30
    assert facts["cost"]["flops"] == outcome["tokens"] * flops.lora_training(SHAPE, 2)
    adapted = Transformer(SHAPE, seed=1)
    lora.add_adapters(adapted, adapters, RECIPE.seed)
    tensors.set_weights(adapted, tensors.load_tensors(stage / "adapters" / loop.FINAL)[0], "it")
    inputs = Words().batch(0, 2).inputs
    whole = outside.with_weights(SHAPE, stage / loop.FINAL)
    torch.testing.assert_close(whole(inputs), adapted(inputs))
    assert not torch.allclose(whole(inputs), Transformer(SHAPE, seed=1)(inputs))


def test_an_expert_s_vector_alone_is_trained_at_the_whole_rate(
        run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(training, "validator", lambda run, name: None)
    monkeypatch.setattr(vector, "tune_vector", lambda *_, **more: given.update(more))
    network: Any = SimpleNamespace(shape=SHAPE)
    finetune.finetune_vector(run, "law", network, torch.zeros(3), Path("x"), "t")
    assert given["optimizer"].lr == pytest.approx(1e-3)


def test_a_run_elsewhere_is_told_rates_in_numbers(
        run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the model did not begin as a checkpoint, and is tuned at the same rates."""
    monkeypatch.setattr(training, "shape_of", lambda run, large: SHAPE)
    for tune in (RECIPE.finetune, keys.Finetune(), keys.Finetune(
            optimizer=keys.Optimizer(embedding_lr=7e-4))):
        run.recipe = dataclasses.replace(RECIPE, finetune=tune)
        for large in (True, False):
            here = finetune.tuning(run, "law", large=large).rates(run.recipe, SHAPE.d_model)
            told = finetune.in_numbers(run, large, 30)
            elsewhere: Any = SimpleNamespace(recipe=dataclasses.replace(
                run.recipe, finetune=keys.Finetune(**{
                    **told, "optimizer": keys.Optimizer(**told["optimizer"])})))
            there = finetune.tuning(elsewhere, "law").rates(elsewhere.recipe, SHAPE.d_model)
            assert (there.lr, there.embedding_lr) == (
                pytest.approx(here.lr), pytest.approx(here.embedding_lr))


@pytest.mark.slow
def test_averages_are_kept_of_all_weights_and_of_adapters(made: Path, tmp_path: Path) -> None:
    out, found = tmp_path / "run", {}
    for share in (0.0, 0.5):
        tune = {"batch_tokens": 128, "compile": "no", "max_epochs": 1, "log_steps": 1,
                "patience": 99, "average": share}
        before = set(out.glob("specialize/*"))
        pipeline.run(recipe(made, methods=["slm", "llm-lora"], finetune=tune), out, "specialize")
        found[share] = sorted(set(out.glob("specialize/*")) - before)
    assert len(list(out.glob("pretrain/*"))) == 2
    for plain, averaged in zip(found[0.0], found[0.5], strict=True):
        assert plain.name[:-9] == averaged.name[:-9]
        lines = [[line["loss"] for line in training.metrics_of(stage) if "loss" in line]
                 for stage in (plain, averaged)]
        assert lines[0] == lines[1]
        best = [training.outcome_of(stage)["best_validation"] for stage in (plain, averaged)]
        assert best[0] != best[1]
        weights = [tensors.weights(training.load_model(stage)) for stage in (plain, averaged)]
        assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
