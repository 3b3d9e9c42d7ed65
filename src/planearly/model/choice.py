"""Which expert of a projected network or mixture a domain gets (paper, section 4, Table 5).

``most-frequent``: that of the domain's most frequent cluster. ``lowest-loss``: the lowest loss on
the specialization set before fine-tuning. ``best-tuned``: the lowest validation loss after
fine-tuning each. ``blend`` (ours): E* = sum_c p(c | domain) E_c, projected once, for domains that
spread over many clusters; of a mixture, the average of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from planearly import keys, parallel, tensors
from planearly.errors import UserError
from planearly.model.mixture import Mixture
from planearly.model.projected import Projected
from planearly.model.transformer import Shape, Transformer
from planearly.progress import progress

Experts = Projected | Mixture

Loss = Callable[[Transformer], float]
"""Mean nats per token of a dense model on the specialization set, or a sample of it."""
Tune = Callable[[int, dict[str, Tensor]], float]
"""Fine-tunes an expert, given by its number and its weights; the best validation loss."""


@dataclass(frozen=True)
class Choice:
    """The expert of a domain, and why."""

    rule: str
    expert: int | None
    """Its number; None of a blend."""
    which: int | Tensor
    """What ``materialise`` takes: the number, or the blend's vector [m] (of a mixture, [k])."""
    share: float
    """Share of the domain's text in the expert's cluster (of a blend: in the clusters blended)."""
    losses: list[float] | None
    """Nats per token of every expert by the rule's measure; None where none was taken."""
    reason: str

    def facts(self) -> dict[str, Any]:
        """For the report: everything but the vector."""
        return {"rule": self.rule, "expert": self.expert, "share": self.share,
                "losses": self.losses, "reason": self.reason}


def choose(model: Experts, rule: str, counts: np.ndarray, *, loss: Loss | None = None,
           tune: Tune | None = None, of: str = "") -> Choice:
    """The expert of a domain by a rule of the recipe's key ``expert``.

    Args:
        counts: the domain's histogram over the model's clusters, float64 [k].
        loss: for ``lowest-loss``.
        tune: for ``best-tuned``.
        of: what part of the specialization set ``loss`` is taken on, such as "a sample of ".

    Raises:
        UserError: the histogram is of another number of clusters, or empty.
    """
    counts = np.asarray(counts, np.float64)
    if len(counts) != model.count:
        raise UserError(f"the domain was divided into {len(counts)} clusters and the network has "
                        f"{model.count} experts: use the clustering that it was trained with")
    if not counts.sum() > 0:
        raise UserError("the specialization set is empty: no expert can be chosen for it")
    share = counts / counts.sum()
    if rule == "most-frequent":
        best = int(share.argmax())
        return Choice(rule, best, best, float(share[best]), None,
                      f"cluster {best} holds {share[best]:.0%} of the domain, more than any other")
    if rule == "blend":
        some = share[share > 0]
        effective = float(np.exp(-(some * np.log(some)).sum()))
        return Choice(
            rule, None, model.blend(torch.from_numpy(share).float()), 1.0, None,
            f"the experts weighted by the domain's histogram, {effective:.1f} effective "
            f"of {model.count} clusters, {share.max():.0%} in the largest",
        )
    if rule == "lowest-loss" and loss is not None:
        losses = losses_of(model, loss)
        how = f"on {of}the specialization set before fine-tuning"
    elif rule == "best-tuned" and tune is not None:
        losses = [tune(i, model.materialise(i)) for i in range(model.count)]
        how = "on the validation set after fine-tuning each expert"
    else:
        raise ValueError(f"the rule '{rule}' needs a measure: give 'loss' for lowest-loss, "
                         "'tune' for best-tuned")
    order = np.argsort(losses, kind="stable")
    best = int(order[0])
    others = f", {losses[order[1]]:.4f} of the next" if len(losses) > 1 else ""
    return Choice(rule, best, best, float(share[best]), losses,
                  f"expert {best} has the lowest loss {how}: {losses[best]:.4f} nats per token"
                  f"{others}; its cluster holds {share[best]:.0%} of the domain")


def empty(bank: str, shape: Shape, experts: int, projected: keys.Projected) -> Experts:
    """Experts whose weights are to be set.

    Args:
        bank: of the table of methods: ``projected`` or ``mixture``.
        experts: how many a mixture has; a projected network has ``projected.experts``.
    """
    return Projected(shape, projected) if bank == "projected" else Mixture(shape, experts)


def losses_of(model: Experts, loss: Loss) -> list[float]:
    """Loss of every expert as it is, each brought to the device that computes."""
    dense = Transformer(model.shape).to(parallel.device())
    losses = []
    with progress("loss of every expert", model.count, "experts") as meter:
        for expert in range(model.count):
            tensors.set_weights(dense, model.materialise(expert), f"expert {expert}")
            losses.append(loss(dense))
            meter.advance(1)
    return losses


def similarity(model: Experts, centroids: np.ndarray) -> dict[str, Any]:
    """How alike the experts are, beside how alike their clusters are.

    Cosines [k, k] after the mean over experts is taken off: of the experts' coefficients in all
    projected matrices (of a mixture, of all weights), and of the centroids; and the correlation of
    the two over pairs of experts (None for fewer than three).
    """
    with torch.no_grad():
        if isinstance(model, Projected):
            parts = list(model.coefficients(model.experts).values())
        else:
            parts = [torch.stack(same).flatten(1)
                     for same in zip(*(m.parameters() for m in model.models), strict=True)]
        ours = _cosines([part.double().cpu().numpy() for part in parts])
    theirs = _cosines([np.asarray(centroids, np.float64)])
    pairs = np.triu_indices(len(ours), 1)
    known = len(ours) > 2 and ours[pairs].std() > 0 and theirs[pairs].std() > 0
    correlation = float(np.corrcoef(ours[pairs], theirs[pairs])[0, 1]) if known else None
    return {"experts": ours.tolist(), "centroids": theirs.tolist(), "correlation": correlation}


def _cosines(parts: list[np.ndarray]) -> np.ndarray:
    """Cosines [k, k] of points whose coordinates come in parts [k, any], about their mean."""
    gram = np.zeros((len(parts[0]), len(parts[0])))
    for part in parts:
        centred = part - part.mean(0)
        gram += centred @ centred.T
    norm = np.sqrt(np.maximum(np.diag(gram), 1e-24))
    return gram / np.outer(norm, norm)
