"""The data-selection peers of cluster importance sampling, as stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from planearly.cluster import select
from planearly.cluster.neighbours import nearest_windows
from planearly.cluster.ngrams import weigh_windows
from planearly.cluster.select import Selection
from planearly.data.dataset import TokenDataset
from planearly.data.pack import Rows
from planearly.errors import UserError
from planearly.files import read_array, write_array
from planearly.progress import say
from planearly.stages import clusters, corpus
from planearly.stages.folder import Run, facts, once
from planearly.train.steps import generic_rows

Choose = Callable[[Path], Selection]
"""Makes a selection; the folder is that of its stage, for what is handed over on the way."""


@dataclass(frozen=True)
class Index:
    """What a selector chooses from, and what for.

    Attributes:
        generic: the generic corpus.
        candidates: its windows that may be trained on.
        size: share of a row that each of its windows fills, float64 ``[n_windows]``.
        dataset, own: the domain's training text, and the windows of the specialization set.
        need: rows to select.
    """

    generic: TokenDataset
    candidates: np.ndarray
    size: np.ndarray
    dataset: TokenDataset
    own: np.ndarray
    need: float


def needed(run: Run, available: float) -> float:
    """Rows to select of ``available`` ones.

    As many as pretraining passes over ``selection.epochs`` times; at most ``selection.share`` of
    the corpus, unless that meant more than ``importance.max_epochs`` passes.
    """
    recipe, planned = run.recipe, generic_rows(run.recipe)
    wish = min(planned / recipe.selection.epochs, recipe.selection.share * available)
    return min(max(wish, planned / recipe.importance.max_epochs, 1.0), available)


def index(run: Run, name: str) -> Index:
    generic = TokenDataset(corpus.generic(run))
    excluded = read_array(corpus.kept(run) / "excluded.npy")
    candidates = generic.windows_without(excluded)
    size = generic.windows["length"] / generic.context
    dataset, own = corpus.specialization_windows(run, name)
    return Index(generic, candidates, size, dataset, own,
                 needed(run, float(size[candidates].sum())))


def dsir(run: Run, name: str) -> tuple[dict[str, Path], Choose]:
    """Importance resampling on hashed n-grams."""
    def choose(folder: Path) -> Selection:
        has, by = index(run, name), corpus.tokenizer_of(run)
        windows = select.dsir(
            lambda ids: has.generic.texts(ids, by.tokenizer), has.candidates,
            lambda ids: has.dataset.texts(ids, by.tokenizer), has.own,
            has.size, has.need, run.recipe.seed,
            lambda gain: weigh_windows(has.generic, by, has.candidates, gain, folder / "parts",
                                       run.executor))
        return select.chosen(len(has.generic), windows)

    return {}, choose


def nearest(run: Run, name: str) -> tuple[dict[str, Path], Choose]:
    """Nearest neighbours by embedding."""
    embedded, mine = clusters.embeddings(run), clusters.domain_clusters(run, name)

    def choose(folder: Path) -> Selection:
        has = index(run, name)
        windows, rank = select.neighbours(
            has.candidates, clusters.domain_embeddings(run, name), has.size, has.need,
            lambda candidates, own, ranks: nearest_windows(
                embedded / "blocks", candidates, own, ranks, folder / "parts", run.executor))
        return select.chosen(len(has.generic), windows, ranks=rank)

    return {"embeddings": embedded, "domain-clusters": mine}, choose


def top_cluster(run: Run, name: str) -> tuple[dict[str, Path], Choose]:
    """Only the domain's most frequent cluster, at the k of importance sampling."""
    weights, mine = clusters.importance_weights(run, name), clusters.domain_clusters(run, name)
    clustered = clusters.clusters(run)

    def choose(folder: Path) -> Selection:
        has, k = index(run, name), facts(weights)["k"]
        share = np.asarray(has.dataset.windows["length"][has.own], np.float64)
        cluster = select.most_frequent(read_array(mine / f"assignment-{k}.npy")[has.own], share, k)
        assigned = read_array(clustered / f"assignment-{k}.npy")
        windows = has.candidates[assigned[has.candidates] == cluster]
        return select.chosen(len(has.generic), windows, k=k, cluster=cluster)

    return {"weights": weights, "domain-clusters": mine, "clusters": clustered}, choose


SELECTORS = {"dsir": dsir, "knn": nearest, "top": top_cluster}
"""By the column ``draws`` of the table of methods."""


@once
def selection(run: Run, draws: str, name: str) -> Path:
    """What a selector takes of the generic corpus for a domain: packed rows and ``weights.npy``.

    Methods that draw alike share it, whatever they train.
    """
    recipe = run.recipe
    inputs, choose = SELECTORS[draws](run, name)
    everything = corpus.generic(run)
    settings: dict[str, Any] = {
        "selection": asdict(recipe.selection), "max_epochs": recipe.importance.max_epochs,
        "rows": generic_rows(recipe), "spec_tokens": recipe.spec_tokens,
        "seed": recipe.seed, "excluded": corpus.kept_digest(run),
    }

    def build(folder: Path) -> dict[str, Any]:
        made = choose(folder)
        groups = folder / "parts" / "groups.npy"  # a folder that packing removes
        write_array(groups, made.groups)
        packed = clusters.pack(run, groups, len(made.weights), folder)
        epochs = _explain(run, draws, name, Rows.load(folder))
        write_array(folder / "weights.npy", made.weights)
        return {**packed, **made.notes, "epochs": epochs,
                "windows": int((made.groups >= 0).sum())}

    return run.stage(f"selection/slm-{draws}.{name}", settings,
                     {"generic": everything, "domain": corpus.domain(run, name), **inputs}, build,
                     version=2 if draws == "dsir" else 1)


def _explain(run: Run, draws: str, name: str, rows: Rows) -> float:
    """Say what pretraining will see, before it starts; returns its passes over the selection.

    Raises:
        UserError: nothing was selected.
    """
    if not len(rows):
        raise UserError(
            f"the selector '{draws}' finds no generic text for domain '{name}': give more generic "
            "text, fewer clusters, or leave its methods out")
    epochs = generic_rows(run.recipe) / len(rows)
    say(f"  {len(rows)} rows are selected; pretraining passes over them {epochs:.1f} times")
    if epochs > run.recipe.importance.warn_epochs:
        beyond = " (its cap on repetition cannot be held here)" if (
            epochs > run.recipe.importance.max_epochs) else ""
        say(f"  warning: the selector '{draws}' repeats its selection more than "
            f"{run.recipe.importance.warn_epochs:g} times{beyond}: give more generic text or "
            "fewer tokens of pretraining")
    return epochs
