"""Bundles: a pretrained projected network or mixture as one self-contained folder.

With it a data owner specialises offline, with none of the pretraining data: the experts, the
centroids that say which cluster a document is of, the identity of the embedder that they hold for,
the tokenizer, and the recipe.

    bundle.json           kind, shape, embedder, digest of the tokenizer
    recipe.yaml           the recipe of the pretraining
    weights.safetensors   the bank, M, E and what is shared; or the mixture's models
    centroids.npy         float32 [k, dim]
    counts.npy            float64 [k], the generic corpus's histogram in window-equivalents
    tokenizer/
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from planearly import config
from planearly.cluster.embed import Embedder, load_embedder
from planearly.data import tokenizer
from planearly.errors import UserError
from planearly.files import atomic_folder, read_array, read_json, write_array, write_json
from planearly.model.mixture import Mixture
from planearly.model.projected import Projected
from planearly.model.transformer import Shape
from planearly.specialize.experts import Experts
from planearly.train import checkpoint

_FORMAT = 1
_KINDS = {"slm-pn": Projected, "slm-mix": Mixture}
_INFO, _RECIPE, _WEIGHTS = "bundle.json", "recipe.yaml", "weights.safetensors"
_CENTROIDS, _COUNTS, _TOKENIZER = "centroids.npy", "counts.npy", "tokenizer"


@dataclass
class Bundle:
    """What is in a bundle, read and checked."""

    kind: str
    """``slm-pn`` or ``slm-mix``."""
    model: Experts
    centroids: np.ndarray
    """float32 [k, dim]"""
    counts: np.ndarray
    """float64 [k]"""
    embedder: Embedder
    tokenizer: Path
    recipe: config.Recipe


def save_bundle(folder: Path, model: Experts, *, centroids: np.ndarray, counts: np.ndarray,
                embedder: Embedder, tokenizer_folder: Path, recipe: config.Recipe) -> None:
    """Write a bundle; an existing one of that name is replaced whole.

    Raises:
        UserError: experts and clusters do not match, or a cluster is empty.
    """
    check_clusters(model.count, centroids, counts, "the clustering")
    kind = next(name for name, cls in _KINDS.items() if isinstance(model, cls))
    with atomic_folder(folder) as temporary:
        checkpoint.save_tensors(temporary / _WEIGHTS, checkpoint.weights(model), {})
        write_array(temporary / _CENTROIDS, np.asarray(centroids, np.float32))
        write_array(temporary / _COUNTS, np.asarray(counts, np.float64))
        (temporary / _RECIPE).write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False), "utf-8")
        shutil.copytree(tokenizer_folder, temporary / _TOKENIZER)
        write_json(temporary / _INFO, {
            "format": _FORMAT, "kind": kind, "experts": model.count,
            "shape": model.shape.to_dict(),
            "projected": asdict(model.settings) if isinstance(model, Projected) else None,
            "embedder": {"name": embedder.name, "digest": embedder.digest},
            "tokenizer": tokenizer.digest(temporary / _TOKENIZER),
        })


def read_info(folder: Path) -> dict[str, Any]:
    """What ``bundle.json`` says, and the ``recipe`` of the pretraining as plain values.

    Raises:
        UserError: not a bundle, or one of another version.
    """
    if not (folder / _INFO).is_file():
        raise UserError(f"{folder} is not a bundle: it has no {_INFO}; "
                        "give the folder that pretraining slm-pn or slm-mix saved")
    info = read_json(folder / _INFO)
    if info.get("format") != _FORMAT or info.get("kind") not in _KINDS:
        raise UserError(f"{folder} is a bundle of format {info.get('format')} and kind "
                        f"{info.get('kind')}, which this version of planearly does not read")
    return {**info, "recipe": yaml.safe_load((folder / _RECIPE).read_text("utf-8"))}


def load_bundle(folder: Path, cache: Path | None = None) -> Bundle:
    """Read a bundle and check that its parts fit each other and what is installed here.

    Raises:
        UserError: not a bundle; its embedder is absent here, or another than the centroids were
            made with; the number of clusters differs from that of experts; a cluster is empty;
            weights or tokenizer do not fit the shape.
    """
    info = read_info(folder)
    recipe = config.build(config.Recipe, info["recipe"], "")
    shape = Shape(**info["shape"])
    centroids, counts = (read_array(folder / name, mapped=False) for name in (_CENTROIDS, _COUNTS))
    check_clusters(info["experts"], centroids, counts, str(folder))
    entries = tokenizer.vocab_size(tokenizer.load(folder / _TOKENIZER))
    if tokenizer.digest(folder / _TOKENIZER) != info["tokenizer"] or entries > shape.vocab_size:
        raise UserError(f"the tokenizer in {folder} is not the one its experts were trained with: "
                        "copy the bundle again, whole")
    model: Experts
    if info["kind"] == "slm-pn":
        settings = config.build(config.Projected, info["projected"], "projected")
        model = Projected(shape, settings)
    else:
        model = Mixture(shape, info["experts"])
    if model.count != info["experts"]:
        raise UserError(f"{folder / _INFO} speaks of {info['experts']} experts and of "
                        f"{model.count}: copy the bundle again, whole")
    path = folder / _WEIGHTS
    checkpoint.set_weights(model, checkpoint.load_tensors(path)[0], path)
    return Bundle(info["kind"], model, centroids, counts,
                  _embedder(folder, info["embedder"], cache),
                  folder / _TOKENIZER, recipe)


def check_clusters(experts: int, centroids: np.ndarray, counts: np.ndarray, where: str) -> None:
    """Refuse a clustering that does not give every expert its cluster, with text in it."""
    if not len(centroids) == len(counts) == experts:
        raise UserError(f"{where} has {len(centroids)} clusters and the network {experts} experts: "
                        "every expert needs the cluster that it was trained on")
    empty = np.flatnonzero(~(np.asarray(counts) > 0))
    if len(empty):
        raise UserError(f"{where} has no text in cluster {empty[0]}, whose expert would stay "
                        "untrained: choose fewer experts or give more generic text")


def _embedder(folder: Path, made_with: dict[str, str], cache: Path | None) -> Embedder:
    name = made_with["name"]
    try:
        embedder = load_embedder(name, cache)
    except UserError as error:
        raise UserError(f"the clusters of {folder} were made with the embedder '{name}', "
                        f"which cannot be loaded here: {error}") from error
    if embedder.digest != made_with["digest"]:
        raise UserError(f"the embedder '{name}' installed here is not the one that the clusters of "
                        f"{folder} were made with (digests {embedder.digest[:12]} and "
                        f"{made_with['digest'][:12]}): install that version of it")
    return embedder
