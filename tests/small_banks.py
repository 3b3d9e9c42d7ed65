"""A projected network and a stream small enough for a test."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planearly import keys
from planearly.data.dataset import IGNORE
from planearly.data.sample import Interleave
from planearly.data.streams import Batch
from planearly.model.transformer import Shape

GATED = Shape(layers=2, d_model=32, heads=2, d_ff=48, vocab_size=61, context=12)
PLAIN = Shape(layers=2, d_model=32, heads=2, d_ff=64, vocab_size=61, context=12, ffn="gelu",
              tie_embeddings=False)
SETTINGS = keys.Projected(experts=5, rank=3, embedding=4)
TRAIN = keys.Train(batch_tokens=8 * 12, microbatch_tokens=2 * 12, precision="fp32", compile="no",
                     log_steps=1, optimizer=keys.Optimizer(warmup_steps=1, clip=0.05))
HISTOGRAMS = torch.tensor([[1.0, 0, 0, 0, 0], [3, 1, 0, 0, 4], [1, 2, 3, 4, 5], [1, 1, 1, 1, 1],
                           [0, 0, 2, 1, 0]])


class Made:
    """A stream of tokens whose statistics depend on the group."""

    def __init__(self, experts: int, context: int = 12, break_at: int | None = None) -> None:
        self.context, self.experts, self.break_at = context, experts, break_at
        self.interleave = Interleave(np.arange(1, experts + 1), 3)

    def batch(self, start: int, stop: int) -> Batch:
        if self.break_at is not None and stop > self.break_at:
            raise KeyboardInterrupt
        groups, _ = self.interleave.draw(start, stop)
        tokens = np.stack([
            np.random.default_rng((7, place)).integers(0, 4 + 3 * group, self.context + 1)
            for place, group in zip(range(start, stop), groups, strict=True)
        ])
        inputs, targets = torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(tokens[:, 1:])
        targets = targets.clone()
        targets[np.arange(start, stop) % 3 == 0, -2:] = IGNORE
        return Batch(inputs, targets, groups)


def nll(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Summed loss in the parameters' own precision."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORE,
                           reduction="sum")
