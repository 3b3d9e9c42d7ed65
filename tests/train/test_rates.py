"""Rates are defined once, per kind of parameter and width; and what they do not change."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from planearly import config, keys
from planearly.data.streams import Batch
from planearly.model.transformer import Shape, Transformer
from planearly.train import loop, optim
from planearly.train.steps import finetune_limits
from planearly.train.trainable import Dense


@pytest.mark.parametrize("width", [64, 96, 192, 256])
def test_the_rates_of_small_models_are_what_they_were(width: int) -> None:
    for preset, lr, embedding in (("modern", 1e-2, 5e-3), ("adamw", 3e-3, 3e-3),
                                  ("paper", 1e-4, 1e-4)):
        found = optim.resolve(keys.Optimizer(preset=preset), 10_000, width)  # type: ignore[arg-type]
        assert (found.lr, found.embedding_lr) == (lr, embedding)
        assert not optim.deviations(keys.Optimizer(preset=preset), width, False)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["demo", "nano", "nano-pn", "study-nano", "study-smoke"])
def test_recipes_of_small_models_keep_their_rates_and_fingerprints(name: str) -> None:
    recipe = config.load(name)
    width = recipe.model.d_model
    tuned = optim.resolve_finetuning(recipe.finetune, recipe.pretrain.optimizer, 1000, width,
                                     factor=finetune_limits(recipe.finetune, 50_000, 200, 16)[1])
    assert (tuned.lr, tuned.embedding_lr) == pytest.approx((0.15 * 1e-2, 0.15 * 5e-3))
    assert not optim.finetuning_deviations(recipe.finetune, recipe.pretrain.optimizer, width, False)


def test_an_embedding_rate_that_fine_tuning_inherits_is_in_its_fingerprint() -> None:
    def found(own: float | None) -> dict[str, float | None]:
        finetune = keys.Finetune(optimizer=keys.Optimizer(embedding_lr=own))
        return optim.finetuning_deviations(finetune, keys.Optimizer(embedding_lr=1e-3), 256, False)

    assert found(None)["embedding_lr"] == 1e-3
    assert "embedding_lr" not in found(2e-3)  # its own is in its settings


def test_wider_models_take_lower_rates_by_kind_of_parameter() -> None:
    recipe = config.load("slm-126m")
    small, large = (optim.resolve(recipe.pretrain.optimizer, 10_000, shape.d_model)
                    for shape in (recipe.model, recipe.large))
    assert recipe.pretrain.optimizer.lr is None and recipe.finetune.optimizer.lr is None
    assert small.lr == pytest.approx(1e-2 / 2) and small.embedding_lr == pytest.approx(5e-3 / 2)
    assert large.lr / small.lr == pytest.approx(math.sqrt(1024 / 2816))
    adam = optim.resolve(keys.Optimizer(preset="adamw"), 10_000, 1024)
    assert (adam.lr, adam.embedding_lr) == pytest.approx((3e-3 / 4, 3e-3 / 2))
    set_by_hand = optim.resolve(keys.Optimizer(lr=0.004), 10_000, 1024)
    assert (set_by_hand.lr, set_by_hand.embedding_lr) == pytest.approx((0.004, 0.002))


def test_a_share_of_pretrainings_rate_is_that() -> None:
    recipe = config.load("slm-126m", ["finetune.lr_scale=0.25"])
    own = optim.resolve(recipe.pretrain.optimizer, 1000, 1024)

    def tuned(*settings: str, continued: bool = False) -> optim.Settings:
        made = config.load("slm-126m", ["finetune.lr_scale=0.25", *settings])
        factor = finetune_limits(made.finetune, 10**6, 1000, 32, continued=continued)[1]
        return optim.resolve_finetuning(made.finetune, made.pretrain.optimizer, 1000, 1024,
                                        continued, factor)

    assert tuned().lr == pytest.approx(own.lr / 4)
    assert tuned("pretrain.optimizer.lr=0.02").lr == pytest.approx(0.005)
    assert tuned("finetune.lr_scale=null").lr == pytest.approx(0.15 * own.lr)
    assert tuned("finetune.lr_scale=null", "finetune.optimizer.lr=0.003").lr == 0.003
    assert tuned("finetune.lr_scale=null", continued=True).lr == pytest.approx(own.lr / 30)


@pytest.mark.parametrize("preset", ["modern", "paper"])
def test_each_rate_that_fine_tuning_sets_is_taken_as_given(preset: str) -> None:
    base = optim.PRESETS[preset]

    def tuned(times: float = 1.0, scale: float | None = None, **given: float
              ) -> tuple[float, float]:
        own = keys.Optimizer(preset=preset, **given)  # type: ignore[arg-type]
        finetune = keys.Finetune(optimizer=own, lr_scale=scale)
        factor = finetune_limits(finetune, 100_000, 391, 16)[1]
        made = optim.resolve_finetuning(finetune, keys.Optimizer(preset=preset),  # type: ignore
                                        1000, 256, False, factor, times)
        return made.lr, made.embedding_lr

    small = optim.SMALL_SET_FACTOR[preset]
    assert tuned() == pytest.approx((small * base.lr, small * base.embedding_lr))
    assert tuned(embedding_lr=0.002) == pytest.approx((small * base.lr, 0.002))
    assert tuned(lr=0.004, embedding_lr=0.002) == (0.004, 0.002)
    assert tuned(lr=0.004) == pytest.approx((0.004, 0.004 * base.embedding_lr / base.lr))
    # a share that is given is of them, and adapters take their factor of all
    assert tuned(scale=0.5, embedding_lr=0.002) == pytest.approx((0.5 * base.lr, 0.001))
    assert tuned(3.0, embedding_lr=0.002) == pytest.approx((3 * small * base.lr, 0.006))


def test_an_embedding_rate_that_older_versions_scaled_is_told_apart() -> None:
    def apart(scale: float | None = None, lr: float | None = None, continued: bool = False,
              scaled: bool = True) -> bool:
        finetune = keys.Finetune(lr_scale=scale, optimizer=keys.Optimizer(
            lr=lr, embedding_lr=2e-3))
        return "embedding_factor" in optim.finetuning_deviations(
            finetune, keys.Optimizer(), 256, continued, scaled=scaled)

    assert apart()
    assert not (apart(scale=0.15) or apart(lr=4e-3) or apart(continued=True)
                or apart(scaled=False))


# A checkpoint goes on -----------------------------------------------------------------------------

class Text:
    """Random stretches of a text's bytes."""

    context = 64

    def __init__(self, text: np.ndarray) -> None:
        self.text = text

    def batch(self, start: int, stop: int) -> Batch:
        places = [np.random.default_rng(n).integers(len(self.text) - 65)
                  for n in range(start, stop)]
        rows = torch.from_numpy(np.stack([self.text[p:p + 65] for p in places]).astype(np.int64))
        return Batch(rows[:, :-1], rows[:, 1:], np.zeros(stop - start, int))


class Later(Text):
    """Others of them."""

    def batch(self, start: int, stop: int) -> Batch:
        return super().batch(start + 10**6, stop + 10**6)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["modern", "adamw"])
def test_a_checkpoint_continued_by_default_keeps_what_it_knew(tmp_path: Path, preset: str) -> None:
    sources = sorted(Path(os.__file__).parent.glob("*.py"))  # of the standard library
    text = np.frombuffer(b"\0".join(path.read_bytes() for path in sources), np.uint8)
    held_out, text = text[:40_000], text[40_000:]
    inputs = torch.from_numpy(held_out[:-1][:39_936].astype(np.int64)).view(-1, 64)
    targets = torch.from_numpy(held_out[1:][:39_936].astype(np.int64)).view(-1, 64)
    shape = Shape(layers=2, d_model=64, heads=2, d_ff=176, vocab_size=256, context=64)
    train = keys.Pretrain(batch_tokens=1024, compile="no", precision="fp32",
                          optimizer=keys.Optimizer(preset=preset))  # type: ignore[arg-type]

    def nats(model: Transformer) -> float:
        with torch.no_grad():
            return float(model.loss(inputs, targets)) / targets.numel()

    model = Transformer(shape, 1)
    loop.train(Dense(model), Text(text), 600, train, tmp_path / "a", name="first")
    before, state = nats(model), {k: v.clone() for k, v in model.state_dict().items()}
    rises = {}
    for continued in (True, False):
        model.load_state_dict(state)
        seen = []

        def watch(model: Transformer, seen: list[float] = seen) -> float:
            seen.append(nats(model))
            return seen[-1]

        rate = replace(optim.resolve(train.optimizer, 100, 64, continued), schedule="constant")
        loop.train(Dense(model), Later(text), 100, train, tmp_path / str(continued),
                   name="on", optimizer=rate, validate=watch, validate_steps=50)
        rises[continued] = max(math.exp(value - before) - 1 for value in seen)
    assert rises[True] < 0.02 < rises[False]
