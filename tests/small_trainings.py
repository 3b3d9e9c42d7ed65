"""A stream, a model and a training small enough for a test of the loop."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from planearly import keys, parallel, tensors
from planearly.data.dataset import IGNORE
from planearly.data.streams import Batch
from planearly.model.transformer import Shape, Transformer
from planearly.train import loop, update
from planearly.train.trainable import Dense

SHAPE = Shape(layers=2, d_model=32, heads=2, d_ff=48, vocab_size=50, context=16)


class Words:
    """A stream of rows that are a function of their place; every fourth row is half padding."""

    context = SHAPE.context

    def batch(self, start: int, stop: int) -> Batch:
        tokens = np.stack([
            np.random.default_rng(place).integers(0, 50, self.context + 1).cumsum() % 50
            for place in range(start, stop)
        ])
        targets = tokens[:, 1:].copy()
        targets[np.arange(start, stop) % 4 == 0, self.context // 2:] = IGNORE
        groups = np.arange(start, stop) % 3
        return Batch(torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(targets), groups)


def settings(**values) -> keys.Train:
    base = {"batch_tokens": 8 * 16, "log_steps": 3, "compile": "no", "precision": "fp32"}
    return keys.Train(**{**base, **values})


def run(folder: Path, steps: int = 12, train: keys.Train | None = None, **more):
    model = Transformer(SHAPE, seed=1)
    outcome = loop.train(
        Dense(model), Words(), steps, train or settings(), folder, name="t", **more)
    return outcome, tensors.load_tensors(folder / loop.FINAL)[0]


def run_apart(rank: int, folder: Path, steps: int, processes: int = 1) -> None:
    """The same in a process of its own, one of several that share it as torchrun has them do."""
    if processes > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29500 + os.getppid() % 1000)}
        parallel.start()
    torch.set_num_threads(1)
    train = settings(log_steps=1, checkpoint_seconds=0.0,
                     optimizer=keys.Optimizer(preset="paper", lr=1e-3))
    run(folder, steps, train, average=0.5)


def same(one, other) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


class Killed(BaseException):
    pass


def killed_after_steps(steps: int, train: Callable[[], object]) -> None:
    """Run a training that is killed in the step after so many."""
    accumulate, done = update.accumulate, []

    def interrupted(*args):
        if len(done) == steps:
            raise Killed
        done.append(1)
        return accumulate(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(update, "accumulate", interrupted)
        train()
