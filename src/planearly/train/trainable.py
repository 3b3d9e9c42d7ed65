"""What the loop trains: a module, and the dense model that runs its microbatches."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from torch import nn

from planearly import sharding
from planearly.model import outside
from planearly.model.outside import AnyModel
from planearly.model.transformer import Transformer


class Trainable(Protocol):
    """A model the loop can train: microbatches run through one dense ``body``.

    A dense model is its own body (:class:`Dense`). A projected network makes the dense weights of
    the groups in a step once, binds them to the body microbatch by microbatch, and returns their
    gradients to its own parameters at the end of the step.
    """

    @property
    def module(self) -> nn.Module:
        """Holds the trained parameters."""

    @property
    def body(self) -> AnyModel:
        """Runs a microbatch."""

    def microbatches(self, groups: np.ndarray, rows: int) -> list[np.ndarray]:
        """Divide a step's rows, given by their groups, into index arrays of at most ``rows``."""

    def begin(self, groups: np.ndarray) -> None:
        """A step with rows of these groups starts."""

    def select(self, groups: np.ndarray) -> None:
        """The next microbatch holds rows of these groups."""

    def end(self) -> None:
        """All microbatches are done: gradients of ``module`` are to be complete."""

    @property
    def undivided(self) -> str | None:
        """What of it cannot be divided among processes; None: it can."""

    def divide(self, bf16: bool) -> bool:
        """Divide what is large of ``module`` among the processes, see :mod:`planearly.sharding`.

        Args:
            bf16: layers compute in it.

        Returns:
            Whether a microbatch takes all processes together; if not, a step's begin and end do.
        """


class Dense:
    """A dense model as a :class:`Trainable`."""

    def __init__(self, model: AnyModel) -> None:
        self.module = self.body = model

    def microbatches(self, groups: np.ndarray, rows: int) -> list[np.ndarray]:
        return np.array_split(np.arange(len(groups)), math.ceil(len(groups) / rows))

    def begin(self, groups: np.ndarray) -> None:
        pass

    def select(self, groups: np.ndarray) -> None:
        pass

    def end(self) -> None:
        pass

    @property
    def undivided(self) -> str | None:
        if not all(parameter.requires_grad for parameter in self.body.parameters()):
            return "a model whose adapters alone are trained"
        return None if outside.layers(self.body) else "a model whose layers are not found"

    def divide(self, bf16: bool) -> bool:
        # a model of others may have matrices that are not to be rounded
        narrow = bf16 and isinstance(self.body, Transformer)
        sharding.divide_layers(self.body, outside.layers(self.body), "hidden", narrow)
        return True
