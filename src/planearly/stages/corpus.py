"""From documents to token datasets: the tokenizer, the generic corpus, the domains, overlaps."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from planearly import keys, parallel, storage
from planearly.cluster import shared
from planearly.data import domains, excerpts, inputs, limit, overlap, pydocs, subset, tokenizer
from planearly.data.build import tokenize_corpus
from planearly.data.dataset import TokenDataset
from planearly.data.documents import Unit, keep_from_json, keep_to_json
from planearly.data.domains import SPLITS
from planearly.data.hub import is_pinned
from planearly.errors import UserError
from planearly.export import bundle as bundles
from planearly.files import (
    digest,
    expanded,
    is_utf8,
    read_array,
    read_json,
    write_array,
    write_json,
)
from planearly.model import starts
from planearly.progress import say
from planearly.stages.folder import Missing, Run, once
from planearly.stages.manifest import facts

_LONGEST_NAME = 160
"""Bytes of a domain's name: with a method's and a fingerprint a folder's name may have 255."""
_FEW = 5
"""Documents under which it is said that they are few."""


@once
def sources(run: Run) -> tuple[list[str], str | None, list[str]]:
    """Where the documents are: the recipe's ``generic``, ``domains_root`` and ``domains``."""
    recipe = run.recipe
    if recipe.generic != [pydocs.NAME]:
        return recipe.generic, recipe.domains_root, recipe.domains

    def build(folder: Path) -> dict[str, Any]:
        return {"corpus": pydocs.build(folder)}

    installed = sorted(f"{d.name}=={d.version}" for d in metadata.distributions())
    made = run.stage("pydocs", {"installed": installed, "python": sys.version}, {}, build)
    own = recipe.domains_root is None and not recipe.domains
    return [str(made / "generic")], str(made / "domain") if own else recipe.domains_root, (
        recipe.domains)


def check(recipe: keys.Recipe) -> None:
    """Refuse what :func:`check_named` does, and places in stores that cannot be read, before
    anything is written.

    Raises:
        UserError: nothing is there, or the store cannot be asked.
    """
    check_named(recipe)
    inputs.check_urls([*recipe.generic, recipe.domains_root, *recipe.domains])


def check_named(recipe: keys.Recipe) -> None:
    """Refuse a recipe that needs a generic corpus and names none.

    Raises:
        UserError: it is such a one.
    """
    if recipe.reads_generic and not recipe.generic:
        raise UserError("recipe key 'generic' names no documents: give files, folders, globs, URLs,"
                        " hf://NAME or a corpus by name")


@contextlib.contextmanager
def pinned(run: Run) -> Iterator[dict[str, Any]]:
    """Commits of the run's datasets on the hub: resolved once, then a run asks nobody."""
    place = run.out / ".hub.json"
    with run.alone_among_others(place.name):
        known = read_json(place) if place.is_file() else {}
        if not isinstance(known, dict) or not all(map(is_pinned, known.values())):
            raise UserError(f"{place} does not hold the commits of datasets by name: remove it, "
                            "and those of now are taken")
        before = len(known)
        yield known
        if len(known) > before and parallel.rank() == 0:
            write_json(place, known)


@once
def domain_names(run: Run) -> dict[str, str]:
    """Name of each domain of the recipe -> the entry (name or path) that it was asked for by.

    Empty where the recipe has neither ``domains`` nor ``domains_root``: its domains are to come.

    Raises:
        UserError: ``domains_root`` holds no domains, two are of one name, or a name is too long
            or not UTF-8.
    """
    _, root, entries = sources(run)
    if not entries and root:
        entries = domains.domain_names(root)
    names: dict[str, str] = {}
    for entry in entries:
        name = domains.name_of(entry)
        if name in names:
            raise UserError(f"two domains are called '{name}': rename one of their folders")
        if not is_utf8(name):
            raise UserError(f"the domain '{name}' has a name that is not UTF-8, which the files of "
                            "its models could not bear: rename it, or name it by a link")
        if len(os.fsencode(name)) > _LONGEST_NAME:
            raise UserError(f"the domain '{name}' has a name of more than {_LONGEST_NAME} bytes, "
                            "which the folders of its stages could not bear: rename it, or name it "
                            "by a link")
        names[name] = entry
    return names


def needed_domains(run: Run, what: str) -> dict[str, str]:
    """As :func:`domain_names`, for ``what`` cannot do without.

    Raises:
        UserError: no domain is given.
    """
    names = domain_names(run)
    if not names:
        raise UserError(f"{what} needs a domain and none is given: set "
                        "'domains=[FOLDER_OF_YOUR_DOCUMENTS]', or 'domains_root' to a folder that "
                        "holds one folder per domain")
    return names


def histogram_file(run: Run, name: str) -> Path:
    """The file that a domain of the recipe would be given by; one of this machine."""
    entry, root = domain_names(run)[name], sources(run)[1]
    named = expanded(root) / entry if root else Path(entry)
    return named if named.exists() else expanded(entry)


@once
def histograms(run: Run) -> dict[str, shared.Shared]:
    """The domains of the recipe that are given by their histogram, without texts."""
    places = {name: histogram_file(run, name) for name in domain_names(run)}
    return {name: shared.load(place) for name, place in places.items()
            if place.suffix == ".json" and shared.is_shared(place)}


def texts(run: Run) -> list[str]:
    """The domains of the recipe whose texts are at hand."""
    return [name for name in domain_names(run) if name not in histograms(run)]


def _reading(run: Run) -> dict[str, Any]:
    """The settings of ``data`` that what is read depends on."""
    data = asdict(run.recipe.data)
    return {key: data[key] for key in ("text_field", "source_field", "max_bad_share")}


@once
def bundle(run: Run) -> Path:
    """The recipe's bundle, checked, as a stage: ``bundle/`` in its folder."""
    given = storage.local(run.recipe.bundle or "")
    files = run.file_digests(sorted(p for p in given.rglob("*") if p.is_file()))

    def build(folder: Path) -> dict[str, Any]:
        told = bundles.read_info(given)
        if "levels" in told:
            vocabulary, shape = bundles.check_clusters(given, told).vocab_size, told["shape"]
            if shape:
                bundles.check_plateau(given, told, vocabulary)
            bundles.check_files(given, told)
            shutil.copytree(given, folder / "bundle", dirs_exist_ok=True)
            return {"kind": told["kind"], "embedder": told["embedder"],
                    **({"shape": shape.to_dict(), "step": told["step"]} if shape
                       else {"shape": {"vocab_size": vocabulary}})}
        info = bundles.load_bundle(given, run.recipe.cluster.embedder)
        bundles.check_files(given, told)
        shutil.copytree(given, folder / "bundle", dirs_exist_ok=True)
        return {"kind": info.kind, "shape": info.model.shape.to_dict(),
                "embedder": {"name": info.embedder.name, "digest": info.embedder.digest}}

    return run.stage("bundle", {"files": files}, {}, build)


@once
def tokenizer_folder(run: Run) -> Path:
    """The tokenizer: trained on the generic corpus, or taken from where the recipe says, or from
    the checkpoint that the run starts from."""
    recipe = run.recipe
    if recipe.bundle:
        return _tokenizer_of(run, bundle(run))
    if model := starts.tokenizer_source(recipe):
        return _tokenizer_of_checkpoint(run, model)
    with pinned(run) as known:
        units = inputs.resolve(sources(run)[0], known)
    settings: dict[str, Any] = asdict(recipe.tokenizer)
    by_place: list[dict[str, Any]] = []
    if recipe.tokenizer.path is None:
        settings |= {"generic": run.unit_digests(units), **_reading(run)}
    elif storage.is_url(recipe.tokenizer.path):
        copied = tokenizer.located(recipe.tokenizer.path)
        settings["files"] = run.file_digests(sorted(
            (copied if copied.is_dir() else copied.parent).glob("[a-z]*.json")))
    elif files := tokenizer.files_of(recipe.tokenizer.path):
        by_place.append(dict(settings))  # as it once was
        settings["files"] = run.file_digests(files)

    def build(folder: Path) -> dict[str, Any]:
        return tokenizer.build(recipe.tokenizer, recipe.data, units, folder, run.executor)

    def unchanged(folder: Path) -> bool:
        """Whether a tokenizer noted by its place alone is the one that is there now."""
        with tempfile.TemporaryDirectory() as now, contextlib.suppress(UserError):
            return bool(build(Path(now))["digest"] == facts(folder)["digest"])
        return False

    here = sum(unit.text_bytes for unit in units if unit.kind != "hub")
    sampled = recipe.tokenizer.sample_bytes
    other = here > excerpts.READ_AHEAD * sampled  # version 1 read heads of files, and all shards
    other = other or any(subset.head(unit, excerpts.read_share(units, sampled)) is None
                         for unit in units)
    return run.stage("tokenizer", settings, {}, build, same=by_place, fits=unchanged,
                     version=2 if other and recipe.tokenizer.path is None else 1)


def tokenizer_of(run: Run) -> tokenizer.Opened:
    """The run's tokenizer, opened."""
    return tokenizer.opened(tokenizer_folder(run))


def _tokenizer_of(run: Run, source: Path) -> Path:
    def build(folder: Path) -> dict[str, Any]:
        shutil.copytree(source / "bundle" / "tokenizer", folder, dirs_exist_ok=True)
        return {"vocab_size": facts(source)["shape"]["vocab_size"]}

    return run.stage("tokenizer", {}, {"bundle": source}, build)


def _tokenizer_of_checkpoint(run: Run, model: Path) -> Path:
    files = [model / name for name in starts.TOKENIZER_FILES if (model / name).is_file()]

    def build(folder: Path) -> dict[str, Any]:
        return tokenizer.build(keys.Tokenizer(path=str(model)), run.recipe.data, [], folder)

    settings = {"files": run.file_digests(files)}
    return run.stage("tokenizer", settings, {}, build,
                     same=[{**settings, "context": run.recipe.context}])  # as it once was


@once
def generic(run: Run) -> Path:
    """The generic corpus as one token dataset."""
    recipe = run.recipe
    with pinned(run) as known:
        units = inputs.resolve(sources(run)[0], known)
    tokens = tokenizer_folder(run)
    settings = {"context": recipe.context, "generic": run.unit_digests(units),
                "max_tokens": recipe.data.max_tokens, **_reading(run)}

    def build(folder: Path) -> dict[str, Any]:
        meta = tokenize_corpus(
            units, tokens, recipe.context, recipe.data, folder,
            max_tokens=recipe.data.max_tokens, name="generic corpus", executor=run.executor,
        )
        return {"corpus": meta}

    version = 2 if recipe.data.max_tokens else 1
    part = subset.subset(units, recipe.data.max_tokens)
    if part and any(part.most(unit) is None for unit in units):
        version = 3  # of some shards of many
    return run.stage("generic", settings, {"tokenizer": tokens}, build, version=version)


@once
def split(run: Run, name: str) -> dict[str, list[Unit]]:
    """The input files of a domain's splits.

    What the domain does not come with is held out by a stage, which reads its documents once.
    """
    recipe, entry = run.recipe, domain_names(run)[name]
    if name in histograms(run):
        raise UserError(f"the domain '{name}' is given by its histogram, {entry}, and this needs "
                        "its texts, which are with its owner: pretrain or adapt from the "
                        "histogram, and let the owner fine-tune and evaluate")
    with pinned(run) as known:
        given = domains.given_splits(sources(run)[1], entry, known)
    absent = domains.missing(given)
    if not absent:
        return given
    units = given["train"]
    settings = {"files": run.unit_digests(units), "held_out": recipe.data.held_out,
                "missing": absent, "seed": recipe.seed, **_reading(run)}
    if recipe.data.held_out_documents:
        settings["held_out_documents"] = recipe.data.held_out_documents

    def build(folder: Path) -> dict[str, Any]:
        made = domains.hold_out(units, absent, entry, recipe.data, recipe.seed, folder / "parts",
                                run.executor)
        return {"keep": {part: keep_to_json(of[0].keep) for part, of in made.items()}}

    try:
        keep = facts(run.stage(f"split/{name}", settings, {}, build))["keep"]
    except Missing:  # a run folder of before there was this stage, looked at
        with tempfile.TemporaryDirectory() as parts:
            return given | domains.hold_out(units, absent, entry, recipe.data, recipe.seed,
                                            Path(parts))
    return given | {part: [replace(unit, keep=keep_from_json(of)) for unit in units]
                    for part, of in keep.items()}


@once
def domain(run: Run, name: str) -> Path:
    """One domain: token datasets ``train``, ``valid`` and ``test``.

    ``train-excluded.npy`` masks the training documents that hold text of valid or test.
    """
    recipe = run.recipe
    splits = split(run, name)
    tokens = tokenizer_folder(run)
    settings = {"context": recipe.context, "held_out": recipe.data.held_out, "seed": recipe.seed,
                "splits": {split: run.unit_digests(units) for split, units in splits.items()},
                **_reading(run)}

    def build(folder: Path) -> dict[str, Any]:
        metas = {
            split: tokenize_corpus(
                splits[split], tokens, recipe.context, recipe.data, folder / split,
                name=f"{name} {split}", executor=run.executor,
            )
            for split in SPLITS
        }
        train, *held_out = (TokenDataset(folder / split) for split in SPLITS)
        mask, report, _ = overlap.held_out_overlap(train, held_out, folder / "parts",
                                                   run.executor)
        if mask.all():
            raise UserError(
                f"every training document of domain '{name}' also stands in its valid or test "
                "split: give the domain more or other documents"
            )
        tell_overlap(f"the training split of {name}", report)
        if (few := metas["test"]["n_documents"]) < _FEW:
            say(f"  warning: the test split of {name} has {few} document{'s' * (few > 1)}, too "
                f"few to judge a model by: {_more(recipe, splits['test'])}")
        write_array(folder / "train-excluded.npy", mask)
        return {"corpus": metas, "overlap": report}

    return run.stage(f"domain/{name}", settings, {"tokenizer": tokens}, build, version=2)


def _more(recipe: keys.Recipe, test: list[Unit]) -> str:
    """What gives a test split more documents: keys only where the split is our own."""
    if all(unit.keep is None for unit in test):
        return "give it more documents"
    most = recipe.data.held_out_documents
    key = "held_out_documents" if most and most < _FEW else "held_out"
    return ("give the domain more documents, or hold more of them out (recipe key "
            f"'data.{key}')")


@once
def kept(run: Run) -> Path:
    """Which generic documents may be trained on.

    ``excluded.npy`` masks the generic documents that hold valid or test text of a domain of the
    recipe, those that its training split has as well, and those held out to report the generic
    perplexity on, whose windows are in ``generic-test.npy``; without a domain these last alone.
    Its digest (not the domains) is what pretraining depends on: a domain that overlaps with nothing
    costs no new pretraining.
    """
    names = texts(run)
    everything = generic(run)
    folders = {name: domain(run, name) for name in names}
    settings = {"held_out_tokens": run.recipe.data.generic_eval_tokens, "seed": run.recipe.seed}

    def build(folder: Path) -> dict[str, Any]:
        dataset = TokenDataset(everything)
        held_out = [TokenDataset(path / split) for path in folders.values()
                    for split in ("valid", "test")]
        trains = [TokenDataset(path / "train") for path in folders.values()]
        mask, report, also = overlap.held_out_overlap(dataset, held_out, folder / "parts",
                                                      run.executor, trains)
        if not names:
            say("  no domain's texts are given: generic text that a later domain tests on is not "
                "left out")
        tell_overlap("the generic corpus", report)
        for found in also:
            mask[found] = True
        if mask.all():
            raise UserError(
                f"every document of the generic corpus also stands in {' or '.join(names)}: the "
                "domain is the corpus itself, or holds all of it; give 'generic' other text, or "
                "'domains' documents of your domain alone"
            )
        left = int((~mask).sum())
        test = limit.documents_up_to(dataset, ~mask, settings["held_out_tokens"],
                                     run.recipe.seed + 1)
        mask[np.unique(dataset.windows["document"][test])] = True
        if mask.all() and left < _FEW:
            raise UserError(
                f"the generic corpus is {left} document{'s' * (left > 1)}"
                f"{' besides what the domains hold' * (left < len(mask))}, and all were held out "
                "to report on: give it as several documents, or set 'data.generic_eval_tokens' to 0"
            )
        if mask.all():
            raise UserError(
                "nothing of the generic corpus is left to train on after holding out "
                f"{settings['held_out_tokens']} tokens: give more text or lower "
                "'data.generic_eval_tokens'"
            )
        write_array(folder / "excluded.npy", mask)
        write_array(folder / "generic-test.npy", test)
        duplicates = {name: len(found) for name, found in zip(names, also, strict=True)}
        return {"overlap": report, "also_in_train": duplicates,
                "excluded": digest(np.flatnonzero(mask)), "generic_test_windows": len(test)}

    # version 2 held out a window where none is asked for
    return run.stage("kept", settings, {"generic": everything, **folders}, build,
                     version=2 if settings["held_out_tokens"] else 3)


def tell_overlap(where: str, report: dict[str, Any]) -> None:
    """Say what held-out text was found in a training set."""
    if report["documents"]:
        first = ", ".join(f"{key} {value}" for key, value in report["examples"][0].items())
        say(f"  {report['documents']} documents of {where} hold text of a valid or test split and "
            f"are left out of training; the first: {first}")


def kept_digest(run: Run) -> str:
    return facts(kept(run))["excluded"]


@once
def training_windows(run: Run, name: str) -> tuple[TokenDataset, np.ndarray]:
    """The domain's training text and all of its windows that are free of held-out text."""
    path = domain(run, name)
    dataset = TokenDataset(path / "train")
    return dataset, dataset.windows_without(read_array(path / "train-excluded.npy"))


@once
def specialization_windows(run: Run, name: str) -> tuple[TokenDataset, np.ndarray]:
    """The domain's training windows: at most ``spec_tokens`` tokens, free of held-out text."""
    path = domain(run, name)
    dataset = TokenDataset(path / "train")
    allowed = ~read_array(path / "train-excluded.npy")
    return dataset, limit.documents_up_to(dataset, allowed, run.recipe.spec_tokens, run.recipe.seed)


@once
def held_out(run: Run, name: str, split: str) -> tuple[TokenDataset, np.ndarray]:
    """The domain's windows of ``valid`` or ``test``, up to the recipe's number of tokens."""
    dataset = TokenDataset(domain(run, name) / split)
    allowed = np.ones(len(dataset.documents), bool)
    most = run.recipe.data.valid_tokens if split == "valid" else run.recipe.data.eval_tokens
    return dataset, limit.documents_up_to(dataset, allowed, most, run.recipe.seed)


def has_generic_test(run: Run) -> bool:
    """Whether the run holds generic text out to report on."""
    return run.recipe.reads_generic and run.recipe.data.generic_eval_tokens > 0


def generic_test(run: Run) -> tuple[TokenDataset, np.ndarray]:
    """Held-out windows of the generic corpus (:func:`has_generic_test`)."""
    return TokenDataset(generic(run)), read_array(kept(run) / "generic-test.npy")
