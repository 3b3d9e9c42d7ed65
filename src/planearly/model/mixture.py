"""Hard mixture: one independent small model per cluster of the generic set (paper, section 3).

The special case of a projected network with as many slices as experts, E and M the identity, and
nothing shared. Nothing being shared, each expert is best trained alone, as a plain model on its
cluster's rows (recipe key ``mixture.expert``), on as many machines as there are experts; the class
here trains them all in one process.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from planearly.errors import UserError
from planearly.model.projected import by_group
from planearly.model.transformer import Shape, Transformer


class Mixture(nn.Module):
    """k dense models; a :class:`planearly.train.loop.Trainable`.

    They start from the same weights, each the plain model of this seed, so that their average is
    meaningful. A step's gradients are divided by the targets of all experts: to an optimiser that
    does not care for their scale (Adam, Muon), each expert trains on its own share of the batch.
    """

    def __init__(self, shape: Shape, experts: int, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.models = nn.ModuleList(Transformer(shape, seed) for _ in range(experts))
        self._selected = 0

    @property
    def module(self) -> nn.Module:
        return self

    @property
    def body(self) -> Transformer:
        """The expert selected last."""
        return self.model(self._selected)

    def model(self, expert: int) -> Transformer:
        """An expert's model.

        Raises:
            UserError: there is no such expert.
        """
        if not 0 <= expert < len(self.models):
            raise UserError(
                f"there is no expert {expert}: this mixture has 0 to {len(self.models) - 1}"
            )
        model = self.models[expert]
        assert isinstance(model, Transformer)
        return model

    def microbatches(self, groups: np.ndarray, rows: int) -> list[np.ndarray]:
        """Rows by cluster, one cluster a microbatch."""
        return by_group(groups, rows)

    def begin(self, groups: np.ndarray) -> None:
        """Nothing to prepare."""

    def select(self, groups: np.ndarray) -> None:
        """Let the body be the model of these rows' cluster."""
        self._selected = int(groups[0])
        self.model(self._selected)

    def end(self) -> None:
        """Give zeros to experts without rows: every process then sums the same gradients."""
        for parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    @property
    def count(self) -> int:
        """k, the number of experts."""
        return len(self.models)

    def blend(self, share: Tensor) -> Tensor:
        """Weights [k] of the experts in their average, of a histogram [k] of any positive scale."""
        return share / share.sum()

    @torch.no_grad()
    def materialise(self, expert: int | Tensor) -> dict[str, Tensor]:
        """Weights of one expert, or the average of all with weights [k] that sum to one."""
        if not isinstance(expert, Tensor):
            return {n: p.detach().clone() for n, p in self.model(expert).named_parameters()}
        share = expert.double()
        states = [dict(model.named_parameters()) for model in self.models]
        return {
            name: sum(s * state[name].double() for s, state in zip(share, states, strict=True))
            .to(first.dtype) for name, first in states[0].items()
        }
