"""Bundles: what a pretraining hands over to owners of domains, and the runs that begin with it.

A bundle of experts is specialised offline; one of a method that adapts goes on with generic text
that the owner has, by the stages of any other run: its clusters are the bundle's, and the first
part of its pretraining is :func:`planearly.stages.checkpoint.bundled`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from planearly import config, keys, storage
from planearly.errors import UserError
from planearly.export import bundle as bundles
from planearly.files import read_array
from planearly.methods import Method
from planearly.model import starts
from planearly.model.transformer import Shape
from planearly.plan import sizes
from planearly.stages import clusters, corpus, experts, finetune
from planearly.stages.folder import Run
from planearly.stages.manifest import facts
from planearly.train import loop
from planearly.train.steps import adapted_steps


def save_bundle(run: Run, row: Method, base: Path) -> Path:
    """What a method pretrains for all domains as a self-contained folder, ``bundle/`` of the stage.

    Args:
        base: the finished stage of it, by :func:`planearly.stages.trained.pretrain`.
    """
    clustered, recipe = clusters.clusters(run), run.recipe
    if starts.folder(recipe, row.large):  # which an owner's run cannot tell
        recipe = config.variant(recipe, {"finetune": finetune.in_numbers(run, row.large, 1)})

    def build(folder: Path) -> None:
        if row.adapts:
            step = adapted_steps(recipe)[0]
            arrays, ks = clusters.arrays(run)
            bundles.save_clusters(
                folder / "bundle", arrays, ks, embedder=facts(clustered)["embedder"],
                tokenizer_folder=corpus.tokenizer_folder(run), recipe=recipe,
                plateau=bundles.Plateau(
                    row.name, Shape(**facts(base)["shape"]), step, loop.branch_file(base, step),
                    base / bundles.METRICS))
            return
        k = experts.count(recipe, row.name)
        _, trained = experts.trained_rows(run, row.name)
        finest, parent = clusters.lineage(run, k)
        bundles.save_bundle(
            folder / "bundle", row.name, experts.load(run, row.name), clusters=bundles.Clusters(
                read_array(clustered / f"centroids-{k}.npy"), trained, finest, parent),
            embedder=clusters.embedder(run),
            tokenizer_folder=corpus.tokenizer_folder(run), recipe=recipe)

    settings = {"recipe": bundles.kept_recipe(recipe, row.name)}
    return run.stage(f"bundle/{row.name}", settings, {"model": base, "clusters": clustered}, build,
                     version=2)  # version 1 told no digests


_FIXED = ("generic", "methods", "pretrain_tokens", "cluster.k", "cluster.nested",
          "finetune.replay_share", "tokenizer.", "model.", "projected.", "mixture.", "pretrain.")
"""Recipe keys, and beginnings of keys, that are a bundle's to say."""
_FIXED_ADAPTING = (*(key for key in _FIXED if key not in ("generic", "finetune.replay_share")),
                   "context", "adapt.share")
"""The same of a bundle to adapt from, to which an owner brings generic text."""
_OWN = ("projected.tune_vector", "pretrain.branch_tokens", "pretrain.microbatch_tokens",
        "pretrain.compile", "pretrain.shard", "pretrain.log_steps", "pretrain.checkpoint_seconds")
"""Of these, what is the owner's to say: later steps, and how they are computed."""


def from_bundle(place: Path | str, documents: list[str], overrides: list[str]) -> keys.Recipe:
    """The recipe that specialises a bundle on documents: all of them, unless overridden.

    Args:
        place: the bundle's folder, or its URL, which the recipe keeps: a copy in the cache may go.

    Raises:
        UserError: not a bundle, or not whole; an override of the bundle or of the documents.
    """
    values = {**_brought(str(place)).to_dict(), "domains": documents, "name": "specialize"}
    recipe = config.override(values, overrides)
    for key in ("bundle", "domains"):
        if getattr(recipe, key) != values[key]:
            raise UserError(f"recipe key '{key}' is {getattr(recipe, key)}, and {values[key]} was "
                            "named before: name it once, without the key")
    return recipe


def _brought(place: str) -> keys.Recipe:
    """What a bundle says of a recipe that specialises it."""
    folder = storage.local(place)
    info = bundles.read_info(folder)
    kind = info["kind"]
    changes: dict[str, Any] = {
        "bundle": place if storage.is_url(place) else str(folder),
        "methods": [] if kind == bundles.CLUSTERS else [kind],
        "engine": "local", "processes": None}  # not those of where it was made
    if not bundles.adapts(kind):  # without a generic corpus to read
        changes["finetune.replay_share"] = 0.0
    if "levels" in info:
        changes["cluster.k"] = sorted(info["levels"])
    else:
        changes |= {"cluster.k": sorted({info["experts"], info["finest"]}), "cluster.nested": True}
    return config.variant(info["recipe"], changes)


def check(recipe: keys.Recipe) -> None:
    """Refuse a recipe that contradicts its bundle.

    Raises:
        UserError: a method that cannot begin with it, a key that it fixes and that has another
            value, or a context that is longer.
    """
    if not recipe.bundle:
        return
    recipe = sizes.settled(recipe)
    brought = sizes.settled(_brought(recipe.bundle or ""))
    kind = next(iter(brought.methods), bundles.CLUSTERS)
    for method in recipe.methods:
        if bundles.adapts(method) and method != kind:
            held = "clusters alone" if kind == bundles.CLUSTERS else f"those of {kind}" \
                if bundles.adapts(kind) else f"{kind} as its pretraining ended"
            raise UserError(
                f"{method} adapts from the weights and the optimiser's state that it has before "
                f"the learning rate falls, and the bundle {recipe.bundle} holds {held}: ask its "
                f"provider for that of 'planearly pretrain RECIPE methods=[{method}]'")
        if bundles.adapts(method) and recipe.adapt.draws == "color":
            raise UserError(
                "recipe key 'adapt.draws' is color, which chooses text by the losses of slm, and "
                f"the bundle {recipe.bundle} holds no model at the end of its pretraining: choose "
                "another way to draw")
    fixed = _FIXED_ADAPTING if bundles.adapts(kind) else _FIXED
    for place, asked in config.leaves(recipe.to_dict()):
        if (place.startswith(fixed) and place not in _OWN
                and asked != config.value_of(brought, place)):
            raise UserError(f"recipe key '{place}' is {asked}, but that is settled in the bundle "
                            f"{recipe.bundle}: leave the key out")
    if recipe.context > brought.context:
        raise UserError(f"recipe key 'context' is {recipe.context}, and the experts of the bundle "
                        f"{recipe.bundle} read {brought.context} tokens: give at most that")


def check_generic(recipe: keys.Recipe) -> None:
    """Refuse to adapt from a bundle to nothing.

    Raises:
        UserError: the recipe has no generic corpus.
    """
    if recipe.bundle and not recipe.reads_generic and any(map(bundles.adapts, recipe.methods)):
        raise UserError(
            f"{recipe.methods[0]} of the bundle {recipe.bundle} adapts to a domain on generic "
            "text, and recipe key 'generic' names none: give it with 'generic=[FILES]', or give "
            "the bundle's provider a histogram of the domain ('planearly weigh BUNDLE DOCUMENTS "
            "--share histogram.json')")
