"""Training one expert vector E* of a projected network alone, everything else frozen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from planearly import keys, parallel
from planearly.data.streams import Stream
from planearly.model.outside import AnyModel
from planearly.model.projected import Projected
from planearly.train import loop, optim
from planearly.train.trainable import Dense


class Vector:
    """One expert vector of a frozen network as a :class:`planearly.train.trainable.Trainable`."""

    def __init__(self, network: Projected, start: Tensor) -> None:
        self.network, self.body = network, network.body
        self.module = nn.Module()
        self.vector = nn.Parameter(start.detach().clone())
        self.module.register_parameter("vector", self.vector)

    def microbatches(self, groups: np.ndarray, rows: int) -> list[np.ndarray]:
        """As a dense model's: all rows run through the one vector."""
        return Dense(self.body).microbatches(groups, rows)

    def begin(self, groups: np.ndarray) -> None:
        self.network.project(self.vector.detach()[None])
        self.network.bind(0)

    def select(self, groups: np.ndarray) -> None:
        pass

    undivided = "a network of which one vector is trained"

    def divide(self, bf16: bool) -> bool:
        raise NotImplementedError(self.undivided)

    def end(self) -> None:
        gradient = self.network.return_gradients(bank_too=False)[0]
        self.vector.grad = gradient if self.vector.grad is None else self.vector.grad + gradient


def tune_vector(
    network: Projected, start: Tensor, stream: Stream, steps: int, settings: keys.Train,
    folder: Path, *, validate: Callable[[AnyModel], float], name: str = "expert vector",
    optimizer: optim.Settings | None = None, rate_keys: Mapping[str, float] | None = None,
    patience: int = 3, average: float = 0.0,
) -> tuple[Tensor, loop.Outcome]:
    """Train E* [m] alone on the specialization set, everything else frozen, with early stopping.

    Returns:
        The vector of the best validation, and the outcome of the training.
    """
    trainable = Vector(network.to(parallel.device()), start)

    def validate_vector(body: AnyModel) -> float:
        vector = trainable.vector.detach()[None]
        with torch.autocast(vector.device.type, enabled=False):  # as in training
            network.project(vector, gradients=False)
        network.bind(0)
        return validate(body)

    was_trained = [p for p in network.parameters() if p.requires_grad]
    for parameter in was_trained:
        parameter.requires_grad_(False)
    try:
        outcome = loop.train(trainable, stream, steps, settings, folder, name=name,
                             optimizer=optimizer, rate_keys=rate_keys,
                             validate=validate_vector, patience=patience, average=average)
    finally:
        for parameter in was_trained:
            parameter.requires_grad_(True)
    return trainable.vector.detach(), outcome
