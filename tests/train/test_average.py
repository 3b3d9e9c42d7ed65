"""Averages of weights: their formula, what is validated and kept, and nothing else changed."""

import json
from pathlib import Path

import pytest
import torch

from planearly import keys, tensors
from planearly.model import lora
from planearly.model.transformer import Transformer
from planearly.stages import training
from planearly.train import loop, metrics
from planearly.train.trainable import Dense
from small_trainings import SHAPE, Words, killed_after_steps, run, same, settings

STEPS, VALUES = 9, [9.0, 5.0, 4.0, 4.5, 3.0, 3.5, 3.2, 3.1, 3.3, 3.4]
"""The weights after step 4 are validated as the best."""


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.weights(model).items()}


def followed(folder: Path, adapters: bool, **more):
    """A training whose weights are validated after each step: those, and the final ones."""
    model = Transformer(SHAPE, seed=1)
    if adapters:
        lora.add_adapters(model, keys.Lora(rank=2), 0)
    seen: list[dict[str, torch.Tensor]] = []

    def validate(body) -> float:
        seen.append(weights(body))
        return VALUES[len(seen) - 1]

    outcome = loop.train(Dense(model), Words(), STEPS, settings(log_steps=1), folder, name="t",
                         validate=validate, validate_steps=1, patience=99, **more)
    return outcome, seen, weights(model), model


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_what_is_validated_and_kept_is_the_average(tmp_path, adapters, share):
    _, plain, _, _ = followed(tmp_path / "plain", adapters)
    outcome, averaged, final, model = followed(tmp_path / "mean", adapters, average=share)
    assert len(averaged) == STEPS + 1 and same(plain[0], averaged[0])
    for name in plain[0]:
        steps = torch.stack([state[name].double() for state in plain[1:]])
        mean = steps[0]
        for t in range(1, STEPS + 1):
            mean = mean + (steps[t - 1] - mean) / (1 + share * (t - 1))
            torch.testing.assert_close(averaged[t][name].double(), mean, rtol=1e-5, atol=1e-7)
            if share == 1.0:
                torch.testing.assert_close(mean, steps[:t].mean(0))
    assert outcome.best_step == 4 and same(final, averaged[4])
    assert not same(final, plain[4])
    if adapters:  # the merged model has the averaged factors' product
        merged = lora.merged(model)
        kept = tensors.load_tensors(tmp_path / "mean" / loop.FINAL)[0]
        assert same(kept, final) and all(torch.isfinite(value).all() for value in merged.values())
    lines = [[line["loss"] for line in metrics.read(tmp_path / name / "metrics.jsonl")
              if "loss" in line] for name in ("plain", "mean")]
    assert lines[0] == lines[1]  # the training itself goes on as without


def test_without_validation_the_last_average_is_kept(tmp_path):
    _, averaged, _, _ = followed(tmp_path / "seen", False, average=0.5)
    _, final = run(tmp_path / "blind", STEPS, settings(log_steps=1), average=0.5)
    assert same(final, averaged[STEPS])


@pytest.mark.parametrize("stop_at", [1, 4, 7])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, monkeypatch, stop_at):
    monkeypatch.setenv("PLANEARLY_CHECKPOINT_EVERY_STEP", "1")

    @torch.no_grad()
    def validate(model) -> float:
        batch = Words().batch(1000, 1004)
        return model.loss(batch.inputs, batch.targets).item()

    more = {"average": 0.3, "validate": validate, "validate_steps": 2, "patience": 2}
    whole, expected = run(tmp_path / "whole", **more)
    killed_after_steps(stop_at, lambda: run(tmp_path / "cut", **more))
    resumed, found = run(tmp_path / "cut", **more)
    assert same(expected, found) and whole.best_validation == resumed.best_validation


def test_a_training_without_averages_is_found_again():
    plain = keys.Finetune()
    values = {"train": training.train_settings(plain)}
    assert "average" not in json.dumps([values, *training.same_settings(values, plain)])
    averaged = training.train_settings(keys.Finetune(average=0.2))
    assert averaged == {**values["train"], "average": 0.2}
