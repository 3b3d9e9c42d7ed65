"""Hard mixture: one independent small model per cluster of the generic set (paper, section 3).

The special case of a projected network with as many slices as experts, E and M the identity, and
nothing shared. So nothing needs training together: each expert is trained alone, as a plain model
on its cluster's rows (:func:`planearly.stages.experts.pretrained_expert`), on one machine or on as
many as there are experts. The class here gathers what was trained.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from planearly.errors import UserError
from planearly.model.transformer import Shape, Transformer


class Mixture(nn.Module):
    """k dense models.

    They start from the same weights, each the plain model of this seed, so that their average is
    meaningful.
    """

    def __init__(self, shape: Shape, experts: int, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.models = nn.ModuleList(Transformer(shape, seed) for _ in range(experts))

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
