"""Likelihood of held-out text: nll per token, perplexity, bits per byte, and their intervals.

Every window is scored alone, one per row; padded positions never count. Likelihoods are log-softmax
in float32, sums are in float64. The interval treats documents as the independent units: tokens of
one document hang together, and an interval over tokens would be far too narrow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from planearly import parallel
from planearly.data.dataset import IGNORE
from planearly.model.outside import AnyModel
from planearly.progress import progress

if TYPE_CHECKING:
    from planearly.data.dataset import TokenDataset

Forward = Callable[[Tensor, Tensor], Tensor]
"""Token ids and targets, int64 [rows, time] (on the CPU) -> nats of each target [rows, time]."""

Rows = Callable[[np.ndarray], tuple[Any, Any]]
"""Numbers of windows -> inputs and targets int64 [rows, at least the longest window]."""

_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Most logits at once: more than 64 MB in float32 is slower on a CPU."""
_POSITIONS = {"cpu": 1 << 10, "cuda": 1 << 14}
"""Positions of one forward pass where the vocabulary is so large that their logits take turns."""


class Scores(NamedTuple):
    """Negative log-likelihoods in nats, and the windows and documents they belong to."""

    nll: np.ndarray
    """float32 [n_tokens], windows back to back."""
    lengths: np.ndarray
    """int64 [n_windows]: targets of each window."""
    documents: np.ndarray
    """int64 [n_windows]: number of the document that each window is a piece of."""

    def units(self) -> tuple[np.ndarray, np.ndarray]:
        """Sums over independent units: nll float64 [n_units], tokens int64 [n_units].

        A unit is a document, in the order of the documents' numbers. A single document is divided
        into its windows, and a single window into its tokens, for want of anything better.
        """
        if len(self.lengths) == 1:
            return self.nll.astype(np.float64), np.ones(len(self.nll), np.int64)
        starts = np.cumsum(self.lengths) - self.lengths
        nll = np.add.reduceat(self.nll, starts, dtype=np.float64) if len(starts) else self.nll
        found, unit = np.unique(self.documents, return_inverse=True)
        if len(found) == 1:
            return nll, self.lengths
        tokens = np.bincount(unit, self.lengths, len(found)).astype(np.int64)
        return np.bincount(unit, nll, len(found)), tokens


def score(forward: Forward, rows: Rows, lengths: np.ndarray, batch_tokens: int,
          advance: Callable[[int], object] = lambda tokens: None) -> np.ndarray:
    """Negative log-likelihood in nats of every target, float32, windows back to back.

    Windows are taken longest first, so that a batch holds windows of about one length.

    Args:
        lengths: int64 [n_windows], all positive.
        batch_tokens: positions of one forward pass (at least one window is taken).
        advance: told of every token scored.
    """
    lengths = np.asarray(lengths, np.int64)
    starts = np.cumsum(lengths) - lengths
    nll = np.empty(int(lengths.sum()), np.float32)
    order = np.argsort(-lengths, kind="stable")
    with torch.no_grad():
        taken = 0
        while taken < len(order):
            longest = int(lengths[order[taken]])
            ids = order[taken : taken + max(1, batch_tokens // longest)]
            taken += len(ids)
            inputs, targets = (torch.as_tensor(array)[:, :longest] for array in rows(ids))
            batch = forward(inputs, targets).cpu().numpy()
            for row, window in enumerate(ids):
                start, length = starts[window], lengths[window]
                nll[start : start + length] = batch[row, :length]
            advance(int(lengths[ids].sum()))
    return nll


def batch_tokens(vocab_size: int) -> int:
    """Positions of one forward pass, by the size of their logits."""
    kind = parallel.device().type
    return max(_POSITIONS[kind], _LOGITS[kind] // vocab_size)


def evaluate(forward: Forward, dataset: TokenDataset, windows: np.ndarray | None = None,
             name: str | None = None) -> Scores:
    """Score ``windows`` (all when None) of a token dataset, each once.

    Args:
        name: shown as progress; None is silent.
    """
    ids = np.arange(len(dataset)) if windows is None else np.asarray(windows)
    chosen = dataset.windows[ids]
    lengths = chosen["length"].astype(np.int64)
    size = batch_tokens(dataset.meta["vocab_size"])

    def rows(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return dataset.rows([ids[i : i + 1] for i in batch])

    if name:
        with progress(name, lengths.sum(), "tokens") as meter:
            nll = score(forward, rows, lengths, size, meter.advance)
    else:
        nll = score(forward, rows, lengths, size)
    return Scores(nll, lengths, chosen["document"].astype(np.int64))


def document_nll(forward: Forward, dataset: TokenDataset, windows: np.ndarray | None = None,
                 name: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Nll (float64) and tokens (int64) per document of a dataset; see :meth:`Scores.units`."""
    return evaluate(forward, dataset, windows, name).units()


def mean_nll(model: AnyModel, dataset: TokenDataset, windows: np.ndarray | None = None,
             bf16: bool | None = False) -> float:
    """Mean nll in nats per token: validation while training.

    Args:
        bf16: matrix products under bfloat16 autocast, twice as fast on a processor that has them;
            the mean is off by about one part in 100,000 (reported numbers are float32); None: as
            in the surrounding context.
    """
    nll, tokens = document_nll(forward_of(model, bf16), dataset, windows)
    return float(nll.sum() / tokens.sum())


def forward_of(model: AnyModel, bf16: bool | None = False) -> Forward:
    """The forward pass of a model, wherever its weights are; logits are made in parts."""
    device = next(model.parameters()).device
    positions = max(_LOGITS[device.type] // model.shape.vocab_size, 1)

    def forward(inputs: Tensor, targets: Tensor) -> Tensor:
        with contextlib.nullcontext() if bf16 is None else torch.autocast(
                device.type, torch.bfloat16, enabled=bf16):
            states = model.hidden(inputs.to(device)).flatten(0, 1).split(positions)
            parts = targets.to(device).flatten().split(positions)
            nats = [_nats(model.logits(some), wanted)
                    for some, wanted in zip(states, parts, strict=True)]
        return torch.cat(nats).view(targets.shape)

    return forward


def forward_whole(logits: Callable[[Tensor], Tensor], device: torch.device) -> Forward:
    """The same of a function from token ids to logits [rows, time, vocab]."""
    def forward(inputs: Tensor, targets: Tensor) -> Tensor:
        found = logits(inputs.to(device))
        return _nats(found.flatten(0, 1), targets.to(device).flatten()).view(targets.shape)

    return forward


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="none")


def summary(nll: np.ndarray, tokens: np.ndarray, n_bytes: int) -> dict[str, Any]:
    """What is reported of one evaluation.

    Args:
        nll: float64 [n_units] summed nats (:meth:`Scores.units`).
        tokens: int64 [n_units].
        n_bytes: UTF-8 bytes of all the text that was scored.

    Returns:
        ``perplexity`` with its 95% interval ``ci95``, ``bits_per_byte``, ``nll_per_token``,
        ``tokens`` and ``units`` (the number of independent units behind the interval).
    """
    mean, error, freedom = ratio(nll, tokens)
    return {
        "perplexity": _exp(mean),
        "bits_per_byte": float(nll.sum() / np.log(2) / n_bytes),
        "nll_per_token": mean,
        "tokens": int(tokens.sum()),
        "ci95": [_exp(bound) for bound in interval(mean, error, freedom)],
        "units": len(tokens),
    }


def _exp(nats: float) -> float:
    """A perplexity; infinite above about 709 nats, where no float holds it."""
    with np.errstate(over="ignore"):
        return float(np.exp(nats))


def paired(nll_a: np.ndarray, nll_b: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    """Difference of two models' mean nll on the same documents, a minus b: below 0, a is better.

    Returns:
        ``difference`` in nats per token, its 95% interval ``ci95``, and ``units``. An interval that
        leaves out 0 is a difference beyond chance.
    """
    mean, error, freedom = ratio(nll_a - nll_b, tokens)
    return {"difference": mean, "ci95": list(interval(mean, error, freedom)), "units": len(tokens)}


def macro(domains: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Macro-averaged perplexity (paper, section 4): exp of the mean of the domains' mean nll.

    Args:
        domains: (nll, tokens) of each domain, as for :func:`summary`; each weighs the same.

    Returns:
        ``perplexity``, ``nll_per_token``, ``ci95`` and ``domains`` (their number).
    """
    means, errors, freedoms = zip(*(ratio(*domain) for domain in domains), strict=True)
    mean = float(np.mean(means))
    variances = np.square(errors) / len(domains) ** 2
    total = float(variances.sum())
    # Welch-Satterthwaite: degrees of freedom of a sum of independent estimates.
    freedom = total**2 / float((variances**2 / freedoms).sum()) if total > 0 else 1.0
    return {
        "perplexity": _exp(mean),
        "nll_per_token": mean,
        "ci95": [_exp(bound) for bound in interval(mean, total**0.5, freedom)],
        "domains": len(domains),
    }


def average(perplexities: Sequence[float]) -> float:
    """The same average of perplexities whose documents are not at hand: their geometric mean."""
    return float(np.exp(np.mean(np.log(perplexities))))


def ratio(amounts: np.ndarray, sizes: np.ndarray) -> tuple[float, float, float]:
    """Ratio of two sums over independent units, its standard error, its degrees of freedom.

    The linearised (delta-method) variance of a ratio estimator: Cochran 1977, *Sampling
    Techniques*, section 2.11.
    """
    total = float(sizes.sum())
    mean = float(amounts.sum()) / total
    freedom = max(len(sizes) - 1, 1)
    deviations = amounts - mean * sizes
    return mean, float(np.sqrt(len(sizes) / freedom * np.square(deviations).sum())) / total, freedom


def interval(mean: float, error: float, freedom: float) -> tuple[float, float]:
    """Student's 95% interval."""
    from scipy.special import stdtrit

    half = float(stdtrit(freedom, 0.975)) * error
    return mean - half, mean + half
