"""Steps of trainings: as many as the tokens give, and where two budgets part."""

from dataclasses import replace

import pytest

from planearly import keys
from planearly.train.steps import (
    adapted_steps,
    branching_step,
    finetune_limits,
    generic_rows,
    planned_rows,
    planned_steps,
)


@pytest.mark.parametrize("tokens", [1, 1999, 2000, 10_500])
def test_steps_are_whole_and_rows_fill_them(tokens):
    recipe = keys.Recipe(context=100, pretrain_tokens=tokens,
                         pretrain=keys.Pretrain(batch_tokens=1024))  # ten rows of 100 tokens
    expected = max(tokens // 1000, 1)
    assert planned_steps(recipe) == expected and planned_rows(recipe) == 10 * expected
    assert planned_steps(recipe, share=0.01) == 1
    assert planned_steps(recipe, tokens=5000) == 5
    assert planned_steps(recipe, share=0.5, tokens=8000) == 4


@pytest.mark.parametrize(("tokens", "limit", "factor"), [
    (100_000, 2_000, 1 / 3), (1_000_000, 2_000, 1 / 3), (2_700_000, 2_000, 1 / 3),
    (2_900_000, 4_000, 1.0), (8_000_000, 4_000, 1.0), (23_000_000, 30_000, 1.0),
    (64_000_000, 30_000, 1.0)])
def test_limits_of_fine_tuning_are_the_papers(tokens, limit, factor):
    endless = keys.Finetune(max_epochs=1e9, scratch_epochs=1e9)
    papers = replace(endless, optimizer=keys.Optimizer(preset="paper"))
    assert finetune_limits(papers, tokens, 1000, 10) == (limit, factor)
    assert finetune_limits(papers, tokens, 1000, 10, scratch=True) == (limit, 1.0)
    # ours at a hundred times the rate
    assert finetune_limits(endless, tokens, 1000, 10) == (limit, pytest.approx(0.45 * factor))


def test_a_small_set_is_passed_over_a_few_times():
    finetune = keys.Finetune(max_epochs=3, scratch_epochs=7, lr_scale=0.1)
    assert finetune_limits(finetune, 5000, 25, 10) == (8, 0.1)
    assert finetune_limits(finetune, 5000, 25, 10, scratch=True) == (18, 1.0)
    assert finetune_limits(keys.Finetune(max_steps=4), 5000, 25, 10)[0] == 4
    assert finetune_limits(keys.Finetune(max_epochs=0.01), 5000, 25, 10)[0] == 1


def test_no_branch_where_the_rates_differ():
    optimizer = keys.Optimizer()
    assert branching_step(optimizer, 1000, 600) == 420
    assert branching_step(optimizer, 1000, 100) == 0  # a shorter warm-up
    assert branching_step(optimizer, 100, 1000) == 0
    assert branching_step(keys.Optimizer(schedule="cosine"), 1000, 600) == 0


def test_a_domains_own_share_is_not_drawn_of_the_generic_corpus():
    recipe = keys.Recipe(context=100, pretrain_tokens=10_000, pretrain=keys.Pretrain(
        batch_tokens=1000, specialization_share=0.3))
    assert (planned_rows(recipe), generic_rows(recipe)) == (100, 70)
    later = replace(recipe, pretrain=replace(
        recipe.pretrain, specialization_after=0.4))
    assert generic_rows(later) == 40 + 42


@pytest.mark.parametrize(("share", "schedule", "steps"), [
    (None, "wsd", (7, 3)), (None, "cosine", (0, 10)), (0.0, "wsd", (10, 0)), (0.4, "wsd", (6, 4)),
    (1.0, "wsd", (0, 10))])
def test_adapting_takes_its_share_or_the_decay(share, schedule, steps):
    recipe = keys.Recipe(context=100, pretrain_tokens=10_000, adapt=keys.Adapt(share=share),
                         pretrain=keys.Pretrain(batch_tokens=1000, optimizer=keys.Optimizer(
                             schedule=schedule)))
    assert adapted_steps(recipe) == steps
