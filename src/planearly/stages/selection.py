"""The data-selection peers of cluster importance sampling, as stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from planearly import parallel
from planearly.cluster import select
from planearly.cluster.embed import open_embeddings
from planearly.cluster.neighbours import nearest_windows
from planearly.cluster.ngrams import weigh_windows
from planearly.cluster.select import Selection
from planearly.cost import ledger
from planearly.data.dataset import TokenDataset
from planearly.data.pack import Rows
from planearly.errors import UserError
from planearly.evaluate.windows import window_losses
from planearly.files import read_array, write_array
from planearly.model import flops
from planearly.progress import progress, say
from planearly.stages import clusters, corpus
from planearly.stages.folder import Run, once
from planearly.stages.manifest import facts
from planearly.stages.training import shape_made
from planearly.train import loop
from planearly.train.arithmetic import use_bf16
from planearly.train.steps import generic_rows

Choose = Callable[[Path], Selection]
"""Makes a selection; the folder is that of its stage, for what is handed over on the way."""


def candidates(run: Run) -> np.ndarray:
    """Numbers of the generic windows that selectors choose among, ascending."""
    generic = TokenDataset(corpus.generic(run))
    allowed = generic.windows_without(read_array(corpus.kept(run) / "excluded.npy"))
    some = max(round(run.recipe.selection.candidates * len(allowed)), min(len(allowed), 1))
    if some == len(allowed):
        return allowed
    drawn = np.random.default_rng(run.recipe.seed).permutation(len(allowed))[:some]
    return allowed[np.sort(drawn)]


@dataclass(frozen=True)
class Index:
    """What a selector chooses from, and what for.

    Attributes:
        generic: the generic corpus.
        candidates: its windows among which to choose.
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


def needed(run: Run, available: float, drawn: int | None = None) -> float:
    """Rows to select of ``available`` ones.

    As many as are passed over ``selection.epochs`` times where so many are drawn (None: those of
    pretraining); at most ``selection.share`` of the corpus, unless that meant more than
    ``importance.max_epochs`` passes.
    """
    recipe, planned = run.recipe, drawn or generic_rows(run.recipe)
    wish = min(planned / recipe.selection.epochs, recipe.selection.share * available)
    return min(max(wish, planned / recipe.importance.max_epochs, 1.0), available)


def index(run: Run, name: str, drawn: int | None = None) -> Index:
    generic = TokenDataset(corpus.generic(run))
    among = candidates(run)
    size = generic.windows["length"] / generic.context
    dataset, own = corpus.specialization_windows(run, name)
    return Index(generic, among, size, dataset, own,
                 needed(run, float(size[among].sum()), drawn))


def dsir(run: Run, name: str, drawn: int | None) -> tuple[dict[str, Path], Choose]:
    """Importance resampling on hashed n-grams."""
    def choose(folder: Path) -> Selection:
        has, by = index(run, name, drawn), corpus.tokenizer_of(run)
        windows = select.dsir(
            lambda ids: has.generic.texts(ids, by.tokenizer), has.candidates,
            lambda ids: has.dataset.texts(ids, by.tokenizer), has.own,
            has.size, has.need, run.recipe.seed,
            lambda gain: weigh_windows(has.generic, by, has.candidates, gain, folder / "parts",
                                       run.executor))
        return select.chosen(len(has.generic), windows)

    return {}, choose


def nearest(run: Run, name: str, drawn: int | None) -> tuple[dict[str, Path], Choose]:
    """Nearest neighbours by embedding."""
    embedded, mine = clusters.embeddings(run), clusters.domain_clusters(run, name)

    def choose(folder: Path) -> Selection:
        has = index(run, name, drawn)
        windows, rank = select.neighbours(
            has.candidates, clusters.domain_embeddings(run, name), has.size, has.need,
            lambda candidates, own, ranks: nearest_windows(
                embedded / "blocks", candidates, own, ranks, folder / "parts", run.executor))
        return select.chosen(len(has.generic), windows, ranks=rank)

    return {"embeddings": embedded, "domain-clusters": mine}, choose


def top_cluster(run: Run, name: str, drawn: int | None) -> tuple[dict[str, Path], Choose]:
    """Only the domain's most frequent cluster, at the k of importance sampling."""
    weights = clusters.importance_weights(run, name, drawn=drawn)
    mine = clusters.domain_clusters(run, name)
    clustered = clusters.clusters(run)

    def choose(folder: Path) -> Selection:
        has, k = index(run, name, drawn), facts(weights)["k"]
        share = np.asarray(has.dataset.windows["length"][has.own], np.float64)
        cluster = select.most_frequent(read_array(mine / f"assignment-{k}.npy")[has.own], share, k)
        assigned = read_array(clustered / f"assignment-{k}.npy")
        windows = has.candidates[assigned[has.candidates] == cluster]
        return select.chosen(len(has.generic), windows, k=k, cluster=cluster)

    return {"weights": weights, "domain-clusters": mine, "clusters": clustered}, choose


def linear(run: Run, name: str, drawn: int | None) -> tuple[dict[str, Path], Choose]:
    """A linear head on the embeddings."""
    embedded, mine = clusters.embeddings(run), clusters.domain_clusters(run, name)

    def choose(folder: Path) -> Selection:
        has = index(run, name, drawn)
        with progress("scoring windows", len(has.candidates), "windows") as meter:
            windows = select.linear(
                open_embeddings(embedded / "blocks"), has.candidates,
                clusters.domain_embeddings(run, name), has.size, has.need, run.recipe.seed,
                meter.advance)
        return select.chosen(len(has.generic), windows)

    return {"embeddings": embedded, "domain-clusters": mine}, choose


@once
def losses(run: Run, model: Path) -> Path:
    """Mean nats per token of the windows that selectors choose among, under a trained model.

    ``nats.npy`` float64 [n_candidates].

    Args:
        model: finished training stage.
    """
    recipe, everything, made = run.recipe, corpus.generic(run), facts(model)
    method, domain = made["method"], made["domain"]
    stage = f"losses/{method}.{domain}" if domain else f"losses/{method}"

    def build(folder: Path) -> dict[str, Any]:
        dataset, among, shape = TokenDataset(everything), candidates(run), shape_made(model)
        nats, seconds = window_losses(
            dataset, among, model / loop.FINAL, shape,
            use_bf16(recipe.pretrain.precision, parallel.device()), folder / "parts", run.executor)
        write_array(folder / "nats.npy", nats)
        tokens = int(dataset.windows["length"][among].sum())
        return {"method": method, "domain": domain, "shape": shape.to_dict(),
                "cost": ledger.book(stage, tokens, tokens * flops.forward(shape), seconds,
                                    price_per_hour=recipe.cost.price_per_hour,
                                    currency=recipe.cost.currency)}

    settings = {"candidates": recipe.selection.candidates, "seed": recipe.seed,
                "excluded": corpus.kept_digest(run), "precision": recipe.pretrain.precision}
    return run.stage(stage, settings, {"generic": everything, "model": model}, build)


def loss_reduction(run: Run, name: str, drawn: int | None, base: Path,
                   tuned: Path) -> tuple[dict[str, Path], Choose]:
    """The fall of a window's loss when a model is fine-tuned on the domain (CoLoR-Filter)."""
    before, after = losses(run, base), losses(run, tuned)

    def choose(folder: Path) -> Selection:
        has = index(run, name, drawn)
        fall = read_array(before / "nats.npy") - read_array(after / "nats.npy")
        return select.chosen(len(has.generic),
                             select.highest(has.candidates, fall, has.size, has.need))

    return {"before": before, "after": after}, choose


SELECTORS: dict[str, Callable[..., tuple[dict[str, Path], Choose]]] = {
    "dsir": dsir, "knn": nearest, "top": top_cluster, "linear": linear, "color": loss_reduction}
"""By the column ``draws`` of the table of methods: of a run, a domain, the rows that will be drawn
(None: those of pretraining) and what else is needed."""


@once
def selection(run: Run, draws: str, name: str, *models: Path, drawn: int | None = None) -> Path:
    """What a selector takes of the generic corpus for a domain: packed rows and ``weights.npy``.

    Methods that draw alike share it, whatever they train.

    Args:
        models: finished training stages that it chooses by, where it does.
        drawn: rows that will be drawn (default: those of the recipe's pretraining).
    """
    recipe = run.recipe
    inputs, choose = SELECTORS[draws](run, name, drawn, *models)
    rows = drawn or generic_rows(recipe)
    everything = corpus.generic(run)
    chosen = asdict(recipe.selection)
    if chosen["candidates"] == 1.0:
        del chosen["candidates"]  # which older versions did not have
    settings: dict[str, Any] = {
        "selection": chosen, "max_epochs": recipe.importance.max_epochs,
        "rows": rows, "spec_tokens": recipe.spec_tokens,
        "seed": recipe.seed, "excluded": corpus.kept_digest(run),
    }

    def build(folder: Path) -> dict[str, Any]:
        made = choose(folder)
        groups = folder / "parts" / "groups.npy"  # a folder that packing removes
        write_array(groups, made.groups)
        packed = clusters.pack(run, groups, len(made.weights), folder)
        epochs = _explain(run, draws, name, Rows.load(folder), rows)
        write_array(folder / "weights.npy", made.weights)
        return {**packed, **made.notes, "epochs": epochs,
                "windows": int((made.groups >= 0).sum())}

    return run.stage(f"selection/slm-{draws}.{name}", settings,
                     {"generic": everything, "domain": corpus.domain(run, name), **inputs}, build,
                     version=2 if draws == "dsir" else 1)


def _explain(run: Run, draws: str, name: str, rows: Rows, drawn: int) -> float:
    """Say what pretraining will see, before it starts; returns its passes over the selection, of
    which it draws so many rows.

    Raises:
        UserError: nothing was selected.
    """
    if not len(rows):
        raise UserError(
            f"the selector '{draws}' finds no generic text for domain '{name}': give more generic "
            "text, fewer clusters, or leave its methods out")
    epochs = drawn / len(rows)
    say(f"  {len(rows)} rows are selected; pretraining passes over them {epochs:.1f} times")
    if epochs > run.recipe.importance.warn_epochs:
        beyond = " (its cap on repetition cannot be held here)" if (
            epochs > run.recipe.importance.max_epochs) else ""
        say(f"  warning: the selector '{draws}' repeats its selection more than "
            f"{run.recipe.importance.warn_epochs:g} times{beyond}: give more generic text or "
            "fewer tokens of pretraining")
    return epochs
