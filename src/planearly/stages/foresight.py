"""What a way to draw the generic corpus is worth to a domain, told before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from planearly.data.dataset import IGNORE, TokenDataset
from planearly.data.pack import Rows
from planearly.data.sample import mix, permute
from planearly.evaluate import perplexity
from planearly.evaluate.trigrams import Trigrams, side_by_side
from planearly.files import read_array
from planearly.progress import say
from planearly.stages import corpus, training
from planearly.stages.folder import Run
from planearly.units import short

TOKENS = 1 << 20
"""Targets that a trigram model is counted on, at most."""
_AGAIN = 0.1  # of what is counted, at most, was counted before


def gain(run: Run, draws: str, name: str, packed: Path, weights: np.ndarray, rows: int,
         inputs: Mapping[str, Path]) -> Path:
    """By how much the generic corpus as it would be drawn foretells a domain better than as it is.

    The manifest has ``gain``, the nats per token of the domain's validation text under a trigram
    model of the whole corpus less those under one of what is drawn (above 0: what is drawn is more
    like the domain), its 95% interval over that text's documents ``ci95``, both models' ``corpus``
    and ``drawn``, and ``tokens``, about as many as each was counted on. With more of them the gain
    falls where the corpus is small: what is like the domain in it is then in both.

    Args:
        draws: how it is drawn, by the column of the table of methods.
        packed, weights: stage of packed rows, and the weights of their groups.
        rows: that pretraining will draw, of which the first are counted.
        inputs: stages that the weights come from.
    """
    recipe = run.recipe

    def build(folder: Path) -> dict[str, Any]:
        drawn, whole, tokens = models(run, packed, weights, rows)
        text = corpus.held_out(run, name, "valid")
        (ours, sizes), (theirs, _) = (model.score(*text).units() for model in (drawn, whole))
        pair = perplexity.paired(theirs, ours, sizes)
        found = {"gain": pair["difference"], "ci95": pair["ci95"], "units": pair["units"],
                 "corpus": float(theirs.sum() / sizes.sum()),
                 "drawn": float(ours.sum() / sizes.sum()), "tokens": tokens}
        say(f"  {explain(found)}")
        return found

    settings = {"tokens": TOKENS, "rows": rows, "valid_tokens": recipe.data.valid_tokens,
                "excluded": corpus.kept_digest(run), "seed": recipe.seed}
    return run.stage(f"foresight/{draws}.{name}", settings,
                     {"generic": corpus.generic(run), "domain": corpus.domain(run, name),
                      "rows": packed, **inputs}, build)


def models(run: Run, packed: Path, weights: np.ndarray,
           rows: int) -> tuple[Trigrams, Trigrams, int]:
    """Trigram models of what is drawn and of the corpus as it is, and the targets of each;
    arguments as of :func:`gain`."""
    n = counted(np.diff(Rows.load(packed).group_offsets), weights,
                min(-(-TOKENS // run.recipe.context), rows))
    batch = training.generic_stream(run, packed, weights).batch(0, n)
    inputs, targets = batch.inputs.numpy(), batch.targets.numpy()
    tokens = int((targets != IGNORE).sum())
    return Trigrams(inputs, targets, _vocabulary(run)), of_corpus(run, tokens), tokens


def counted(has: np.ndarray, weights: np.ndarray, most: int) -> int:
    """The number of rows drawn, ``most`` halved until at most a tenth of them come again: text that
    is read twice is counted twice, and a trigram model of it is surer than one that trains on it.

    Args:
        has, weights: rows and weight of every group ``[n_groups]``.
    """
    share = weights / weights.sum()
    while most > 1 and np.maximum(most * share - has, 0).sum() > _AGAIN * most:
        most //= 2
    return most


def explain(found: Mapping[str, Any]) -> str:
    """What :func:`gain` found, in a sentence."""
    better = found["gain"] >= 0
    low, high = sorted(bound if better else -bound for bound in found["ci95"])
    return (f"a trigram model of {short(found['tokens'])} tokens of what is drawn foretells its "
            f"validation text by {abs(found['gain']):.2f} nats per token [{low:.2f}, {high:.2f}] "
            f"{'better' if better else 'worse'} than one of as many of the corpus as it is")


def of_corpus(run: Run, tokens: int) -> Trigrams:
    """A trigram model of about so many targets of the generic corpus as it is, or of all of it."""
    dataset = TokenDataset(corpus.generic(run))
    excluded = read_array(corpus.kept(run) / "excluded.npy")
    size, key = len(dataset), mix(run.recipe.seed, 0x3643)
    some = min(size, 1 + int(tokens * size / dataset.meta["n_tokens"]))
    while True:
        windows = permute(np.arange(some), np.full(some, size), np.full(some, key))
        windows = windows[~excluded[dataset.windows["document"][windows].astype(np.int64)]]
        filled = np.cumsum(dataset.windows["length"][windows])
        if some == size or (len(filled) and filled[-1] >= tokens):
            break
        some = min(size, 2 * some)
    windows = windows[:int(np.searchsorted(filled, tokens)) + 1]
    return Trigrams(*dataset.rows(side_by_side(dataset, windows)), _vocabulary(run))


def _vocabulary(run: Run) -> int:
    return int(TokenDataset(corpus.generic(run)).meta["vocab_size"])
