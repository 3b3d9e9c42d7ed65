"""Bundles: a pretrained projected network or mixture as one self-contained folder.

With it a data owner specialises offline, with none of the pretraining data: the experts, the
centroids that say which cluster a document is of, the identity of the embedder that they hold for,
the tokenizer, and the recipe.

    bundle.json           kind, shape, embedder, digests of the tokenizer and of all other files
    recipe.yaml           what the pretraining's recipe says of the model, and how to specialise it
    weights.safetensors   the bank, M, E and what is shared; or the mixture's models
    centroids.npy         float32 [k, dim], of the experts' clusters
    counts.npy            float64 [k], rows of generic text that each expert was trained on
    finest.npy            float32 [K, dim], the centroids that windows are assigned by
    parent.npy            int32 [K], the expert that each of these belongs to
    tokenizer/

A nested clustering assigns windows at its finest level and follows the parents from there; the
nearest of the merged centroids would be another partition. Without nesting K is k.

Clusters alone make a bundle too, of the kind ``clusters``: with it an owner counts how often the
domain visits each, for a pretraining by someone else (:mod:`planearly.cluster.shared`). It has
``centroids-K.npy`` and ``rows-K.npy`` (float64 [K], rows of generic text) of every level, and
``parent-K.npy`` where levels are nested.

The bundle of a method that adapts is one of clusters with the first part of its pretraining, from
which an owner goes on with generic text of their own:

    state.safetensors     weights and optimisers' state, of a model or a projected network
    metrics.jsonl         the losses until then
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from planearly import config, keys, methods, tensors
from planearly.cluster.embed import Embedder, load_embedder
from planearly.data import tokenizer
from planearly.errors import UserError
from planearly.files import (
    Damaged,
    atomic_folder,
    file_digest,
    read_array,
    read_json,
    write_array,
    write_json,
)
from planearly.model import choice
from planearly.model.choice import Experts
from planearly.model.projected import Projected
from planearly.model.transformer import Shape, Transformer
from planearly.train import state
from planearly.train.steps import adapted_steps

CLUSTERS = "clusters"
"""The kind of a bundle of clusters alone."""
_FORMAT = 2
WEIGHTS, STATE, METRICS = "weights.safetensors", "state.safetensors", "metrics.jsonl"
_INFO, _RECIPE = "bundle.json", "recipe.yaml"
_TOKENIZER = "tokenizer"
_FILES = "files"
_OF_RECIPE = ("seed", "context", "pretrain_tokens", "cluster", "model", "projected", "mixture",
              "expert", "pretrain", "finetune")
_OF_ADAPTING = (*_OF_RECIPE, "importance", "adapt")


@dataclass(frozen=True)
class Clusters:
    """The experts' clusters, and how a window finds its own."""

    centroids: np.ndarray
    """float32 [k, dim]"""
    counts: np.ndarray
    """float64 [k]"""
    finest: np.ndarray
    """float32 [K, dim]"""
    parent: np.ndarray
    """int32 [K]"""

    def save(self, folder: Path) -> None:
        """Write each array as a ``.npy`` file."""
        for name, array in vars(self).items():
            write_array(folder / f"{name}.npy", array)

    @classmethod
    def load(cls, folder: Path) -> Clusters:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: an array is missing or damaged.
        """
        arrays = []
        for part in fields(cls):
            path = folder / f"{part.name}.npy"
            with _whole(path):
                arrays.append(read_array(path, mapped=False))
        return cls(*arrays)

    def check(self, experts: int, where: str) -> None:
        """Refuse a clustering that does not give every expert its cluster, with text in it."""
        if (self.centroids.ndim, self.counts.ndim, self.finest.ndim, self.parent.ndim) != (
                2, 1, 2, 1) or self.centroids.shape[1] != self.finest.shape[1]:
            raise UserError(f"{where} has clusters of shapes that do not belong together: copy the "
                            "bundle again, whole")
        if not len(self.centroids) == len(self.counts) == experts:
            raise UserError(f"{where} has {len(self.centroids)} clusters and the network {experts} "
                            "experts: every expert needs the cluster that it was trained on")
        if len(self.finest) != len(self.parent) or not np.array_equal(
                np.unique(self.parent), np.arange(experts)):
            raise UserError(f"{where} does not lead from its {len(self.finest)} finest clusters to "
                            f"the {experts} of the experts: copy the bundle again, whole")
        check_counts(self.counts, where)


def check_counts(counts: np.ndarray, where: str) -> None:
    """Refuse a cluster without text, by the text [k] of each."""
    empty = np.flatnonzero(~(np.asarray(counts) > 0))
    if len(empty):
        raise UserError(f"{where} has no text to train on in {len(empty)} of {len(counts)} "
                        f"clusters, the first number {empty[0]}, whose experts would stay "
                        "untrained: choose fewer experts or give more generic text")


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[None]:
    """While a file of a bundle is read: tell in one sentence if it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"the bundle lacks {path}: copy it again, whole")
    try:
        yield
    except Damaged as error:
        raise _damaged(path, repr(error.__cause__ or error)) from error
    except (ArithmeticError, AttributeError, EOFError, LookupError, TypeError, ValueError,
            yaml.YAMLError) as error:
        raise _damaged(path, repr(error)) from error


def _damaged(path: Path, why: object) -> UserError:
    return UserError(f"{path} is damaged or of another version of planearly ({why}): copy the "
                     "bundle again, whole")


def adapts(kind: str) -> bool:
    """Whether a bundle of this kind is of a method that adapts."""
    return kind in methods.TABLE and methods.TABLE[kind].adapts is not None


def is_bundle(folder: Path) -> bool:
    """Whether a folder says to be a bundle."""
    return (folder / _INFO).is_file()


def of_clusters(folder: Path) -> bool:
    """Whether a folder says to be a bundle of clusters alone, of whatever version."""
    info = read_json(folder / _INFO) if is_bundle(folder) else None
    return isinstance(info, dict) and info.get("kind") == CLUSTERS


def kept_recipe(recipe: keys.Recipe, kind: str = "") -> dict[str, Any]:
    """The keys of a recipe that its bundle keeps.

    Not which documents were read, nor how or how much of them: of the domain that is its owner's
    to say.
    """
    values = recipe.to_dict()
    return {key: values[key] for key in (_OF_ADAPTING if adapts(kind) else _OF_RECIPE)}


@dataclass
class Bundle:
    """What is in a bundle, read and checked."""

    kind: str
    """The method that pretrained it."""
    model: Experts
    clusters: Clusters
    embedder: Embedder
    tokenizer: Path
    recipe: keys.Recipe


def save_bundle(folder: Path, method: str, model: Experts, *, clusters: Clusters,
                embedder: Embedder, tokenizer_folder: Path, recipe: keys.Recipe) -> None:
    """Write a bundle; an existing one of that name is replaced whole.

    Args:
        method: that pretrained the experts.

    Raises:
        UserError: experts and clusters do not match, or a cluster is empty.
    """
    clusters.check(model.count, "the clustering")
    with atomic_folder(folder) as temporary:
        tensors.save_tensors(temporary / WEIGHTS, tensors.weights(model), {})
        clusters.save(temporary)
        (temporary / _RECIPE).write_text(
            yaml.safe_dump(kept_recipe(recipe), sort_keys=False), "utf-8")
        shutil.copytree(tokenizer_folder, temporary / _TOKENIZER)
        write_json(temporary / _INFO, {
            "format": _FORMAT, "kind": method, "experts": model.count,
            "finest": len(clusters.finest),
            "shape": model.shape.to_dict(),
            "projected": asdict(model.settings) if isinstance(model, Projected) else None,
            "embedder": {"name": embedder.name, "digest": embedder.digest},
            "tokenizer": tokenizer.digest(temporary / _TOKENIZER),
            _FILES: _digests(temporary),
        })


@dataclass(frozen=True)
class Plateau:
    """The first part of a method that adapts.

    Attributes:
        method: that adapts from it.
        step: it ends at.
        state: file of :func:`planearly.train.state.save_training`.
        metrics: file of its losses.
    """

    method: str
    shape: Shape
    step: int
    state: Path
    metrics: Path


def save_clusters(folder: Path, arrays: Mapping[str, np.ndarray], levels: list[int], *,
                  embedder: Mapping[str, str], tokenizer_folder: Path,
                  recipe: keys.Recipe, plateau: Plateau | None = None) -> None:
    """Write a bundle of clusters, alone or with what a domain adapts from; an existing one of that
    name is replaced whole.

    Args:
        arrays: by name of the file, without its ending.
        levels: numbers of clusters.
        embedder: ``name`` and ``digest`` of what they were made with.
    """
    kind = plateau.method if plateau else CLUSTERS
    with atomic_folder(folder) as temporary:
        for name, array in arrays.items():
            write_array(temporary / f"{name}.npy", array)
        if plateau:
            shutil.copyfile(plateau.state, temporary / STATE)
            shutil.copyfile(plateau.metrics, temporary / METRICS)
        (temporary / _RECIPE).write_text(
            yaml.safe_dump(kept_recipe(recipe, kind), sort_keys=False), "utf-8")
        shutil.copytree(tokenizer_folder, temporary / _TOKENIZER)
        write_json(temporary / _INFO, {
            "format": _FORMAT, "kind": kind, "levels": levels, "embedder": dict(embedder),
            **({"shape": plateau.shape.to_dict(), "step": plateau.step} if plateau else {}),
            "tokenizer": tokenizer.digest(temporary / _TOKENIZER), _FILES: _digests(temporary)})


def check_clusters(folder: Path, info: Mapping[str, Any]) -> tokenizer.Opened:
    """Refuse a bundle of clusters whose parts do not belong together; its tokenizer.

    Args:
        info: of :func:`read_info`.

    Raises:
        UserError: an array is missing, damaged or of another size; or another tokenizer.
    """
    nested, widths = info["recipe"].cluster.nested, set()
    for finer, k in zip([None, *info["levels"]], info["levels"], strict=False):
        arrays = {f"centroids-{k}": 2, f"rows-{k}": 1}
        if nested and finer:
            arrays[f"parent-{finer}"] = 1
        for name, axes in arrays.items():
            path = folder / f"{name}.npy"
            with _whole(path):
                array = read_array(path, mapped=False)
            size = finer if name.startswith("parent") else k
            if (array.ndim, len(array)) != (axes, size) or not np.isfinite(array).all() or (
                    name.startswith("parent") and not set(array.tolist()) <= set(range(k))):
                raise UserError(f"{path} does not hold what belongs to its {k} clusters: copy the "
                                "bundle again, whole")
            widths |= {array.shape[1]} if axes == 2 else set()
    tokens = tokenizer.opened(folder / _TOKENIZER)
    if tokens.digest != info["tokenizer"] or len(widths) > 1:
        raise UserError(f"the tokenizer or the centroids in {folder} are not those that it was "
                        "made with: copy the bundle again, whole")
    return tokens


def check_plateau(folder: Path, info: Mapping[str, Any], vocabulary: int) -> None:
    """Refuse a bundle whose state no domain could adapt from.

    Args:
        info: of :func:`read_info`.
        vocabulary: entries of its tokenizer.

    Raises:
        UserError: the state, or a part of it, is missing, damaged or of another model or step.
    """
    path, shape, recipe = folder / STATE, info["shape"], info["recipe"]
    with _whole(path):
        found, note = tensors.load_tensors(path)
        reached = note["outcome"]["steps"]
    if not (folder / METRICS).is_file():
        raise UserError(f"the bundle lacks {folder / METRICS}: copy it again, whole")
    if not state.has_moments(found):
        raise UserError(f"{path} has weights alone, and adaptation goes on with the optimiser's "
                        "state as well: ask its provider for the whole bundle")
    if not reached == info["step"] == adapted_steps(recipe)[0] or vocabulary > shape.vocab_size:
        raise UserError(f"{path} is not the state from which the recipe beside it adapts: copy the "
                        "bundle again, whole")
    bank = methods.find(info["kind"]).bank
    tensors.set_weights(
        choice.empty(bank, shape, recipe.projected.experts, recipe.projected) if bank
        else Transformer(shape), found, path)


def _kinds() -> list[str]:
    """Kinds of bundles: methods whose pretraining for all domains is one, and clusters alone."""
    return [*(row.name for row in methods.TABLE.values() if row.bundled), CLUSTERS]


def read_info(folder: Path) -> dict[str, Any]:
    """What ``bundle.json`` says, its ``shape`` (None: clusters alone), and the ``recipe`` of the
    pretraining.

    Raises:
        UserError: not a bundle, one of another version, or not whole.
    """
    if not (folder / _INFO).is_file():
        raise UserError(f"{folder} is not a bundle: it has no {_INFO}; give the folder that "
                        f"pretraining {' or '.join(_kinds()[:-1])} saved, or the clusters that "
                        "'planearly cluster --share' did")
    info = read_json(folder / _INFO)
    if not isinstance(info, dict):
        info = {}
    if info.get("format") != _FORMAT or info.get("kind") not in _kinds():
        raise UserError(f"{folder} is a bundle of format {info.get('format')} and kind "
                        f"{info.get('kind')}, which this version of planearly does not "
                        "read: make it again by 'planearly pretrain'")
    needed = ["tokenizer"]
    with _whole(folder / _INFO):
        if info["kind"] == CLUSTERS or adapts(info["kind"]):
            info["levels"] = sorted((int(k) for k in info["levels"]), reverse=True)
            info["levels"][0]
            needed += ["step"] if adapts(info["kind"]) else []
        else:
            needed += ["experts", "finest", "projected"]
        try:
            shape = None if info["kind"] == CLUSTERS else _shape(info["shape"])
        except UserError as error:
            raise _damaged(folder / _INFO, error) from error
        for key in needed:
            info[key]
        for key in ("name", "digest"):
            info["embedder"][key]
        saved = info.get(_FILES, {}).get(_RECIPE)
    with _whole(folder / _RECIPE):
        if saved not in (None, file_digest(folder / _RECIPE)):
            raise _altered(folder / _RECIPE)
        values = yaml.safe_load((folder / _RECIPE).read_text("utf-8"))
        try:
            recipe = config.build(keys.Recipe, dict(values), "")
        except UserError as error:
            raise _damaged(folder / _RECIPE, error) from error
    if shape and shape.context != recipe.context:
        raise _damaged(folder / _INFO, f"a context of {shape.context}, and of {recipe.context} in "
                                       f"{_RECIPE}")
    return {**info, "shape": shape, "recipe": recipe}


def _shape(values: Any) -> Shape:
    """The shape that ``bundle.json`` tells, of a model that there can be."""
    rest = dict(values)
    sizes = rest.pop("vocab_size"), rest.pop("context")
    if not all(type(size) is int and size > 0 for size in sizes):
        raise UserError(f"a vocabulary and a context of {sizes[0]!r} and {sizes[1]!r}")
    return Shape.of(config.variant(keys.Recipe(), {"model": rest}).model, *sizes)


def check_files(folder: Path, info: Mapping[str, Any]) -> None:
    """Refuse a bundle of which a file is not as it was saved; of one that was saved before bundles
    told digests, nothing is known.

    Args:
        info: of :func:`read_info`.

    Raises:
        UserError: a file is missing or another.
    """
    with _whole(folder / _INFO):
        known = {folder / name: value for name, value in info.get(_FILES, {}).items()}
    for path, value in known.items():
        with _whole(path):
            if file_digest(path) != value:
                raise _altered(path)


def _altered(path: Path) -> UserError:
    return UserError(f"{path} is not as it was saved, by its digest in {_INFO}: copy the bundle "
                     "again, whole")


def _digests(folder: Path) -> dict[str, str]:
    """Digests of the files of a bundle, by their paths in it."""
    return {path.relative_to(folder).as_posix(): file_digest(path)
            for path in sorted(folder.rglob("*")) if path.is_file()}


def load_bundle(folder: Path, embedder: str | None = None, cache: Path | None = None) -> Bundle:
    """Read a bundle and check that its parts fit each other and what is installed here.

    Args:
        embedder: where its embedder is here, as :func:`fitting_embedder`.

    Raises:
        UserError: not a bundle; its embedder is absent here, or another than the centroids were
            made with; the number of clusters differs from that of experts; a cluster is empty;
            weights or tokenizer do not fit the shape.
    """
    info = read_info(folder)
    shape = info["shape"]
    clusters = Clusters.load(folder)
    clusters.check(info["experts"], str(folder))
    tokens = tokenizer.opened(folder / _TOKENIZER)
    if tokens.digest != info["tokenizer"] or tokens.vocab_size > shape.vocab_size:
        raise UserError(f"the tokenizer in {folder} is not the one its experts were trained with: "
                        "copy the bundle again, whole")
    settings = config.variant(keys.Recipe(), {"projected": info["projected"] or {}}).projected
    model = choice.empty(str(methods.find(info["kind"]).bank), shape, info["experts"], settings)
    if model.count != info["experts"]:
        raise UserError(f"{folder / _INFO} speaks of {info['experts']} experts and of "
                        f"{model.count}: copy the bundle again, whole")
    path = folder / WEIGHTS
    tensors.set_weights(model, tensors.load_tensors(path)[0], path)
    return Bundle(info["kind"], model, clusters,
                  fitting_embedder(folder, info["embedder"], embedder, cache),
                  folder / _TOKENIZER, info["recipe"])


def fitting_embedder(folder: Path | str, made_with: Mapping[str, str], name: str | None = None,
                     cache: Path | None = None) -> Embedder:
    """The embedder that the clusters of a bundle hold for.

    Args:
        made_with: its ``name`` and ``digest``.
        name: where it is here (default: what it was called); its content has to be the same.

    Raises:
        UserError: it is absent here, or another.
    """
    name = name or made_with["name"]
    try:
        embedder = load_embedder(name, cache)
    except UserError as error:
        raise UserError(
            f"the clusters of {folder} were made with the embedder '{made_with['name']}', and "
            f"'{name}' cannot be loaded here; say where it is with cluster.embedder=FOLDER, only "
            f"its content counts ({error})") from error
    if embedder.digest != made_with["digest"]:
        raise UserError(f"the embedder '{name}' installed here is not the one that the clusters of "
                        f"{folder} were made with, '{made_with['name']}' (digests "
                        f"{embedder.digest[:12]} and {made_with['digest'][:12]}): name that one "
                        "with cluster.embedder")
    return embedder
