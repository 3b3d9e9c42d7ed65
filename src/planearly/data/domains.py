"""A domain's documents as train, valid and test: as they come split, or split here.

A folder of ``train`` and ``valid`` or ``test`` files or subfolders is taken as split, one of
``train`` alone too if nothing else lies in it. What is missing of valid and test, or all of it, is
split off by document: documents are ordered by a seeded hash of their text, so a split depends on
nothing but the texts and the seed, and equal documents never fall on two sides. The files are read
in parallel; memory is that of the hashes. A set of fewer than three documents (one long text file,
say) is cut inside its documents instead: the first paragraphs for train, the last for valid and
test.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from array import array
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from planearly import files, keys, storage
from planearly.data.divide import divided
from planearly.data.documents import (
    HashRange,
    Problems,
    Section,
    Unit,
    grouped,
    split_hash,
)
from planearly.data.formats import bare_name
from planearly.data.inputs import children, is_there, resolve
from planearly.data.readers import read_documents
from planearly.data.text import sections
from planearly.engine.local import Local
from planearly.engine.work import Advance, Executor, Shard, Work, shard_function
from planearly.errors import UserError, printable
from planearly.progress import say

_SMALL = 100.0  # megabytes: up to this, starting processes costs more than they save

SPLITS = ("train", "valid", "test")
_NAMES = {"train": "train", "training": "train", "valid": "valid", "validation": "valid",
          "val": "valid", "dev": "valid", "test": "test"}
_SPLIT_END = re.compile(  # law_train: said, not taken
    rf".*[-_. ]({'|'.join(_NAMES)})", re.DOTALL)
_SPLIT_NAME = re.compile(  # train, test_set, valid.v2, train-00000-of-00001, train_part_3
    rf"({'|'.join(_NAMES)})([-_. ]?(set|data|split))?"
    r"([-_. ]?(part|shard|v)?[-_. ]?\d+([-_. ]of[-_. ]\d+)?)?")


def domain_names(root: str) -> list[str]:
    """The domains of a folder: its subfolders, sorted.

    Raises:
        UserError: there is no such folder, or nothing in it.
    """
    folder = files.expanded(root)
    if storage.is_url(root):
        names = [name for name in storage.folders_in(root) if not name.startswith(".")]
    elif not folder.is_dir():
        raise UserError(f"domains_root: {root} is not a folder")
    else:
        names = sorted(p.name for p in folder.iterdir()
                       if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise UserError(f"domains_root: {root} has no subfolders, one per domain")
    return names


def name_of(entry: str) -> str:
    """What a domain is called that is asked for by a name, a path or a URL."""
    return Path(entry.rstrip("/")).name.split(".")[0] or "domain"


def given_splits(root: str | None, entry: str,
                 pinned: dict[str, Any] | None = None) -> dict[str, list[Unit]]:
    """The input files of the splits that a domain comes with, ``train`` at least; reads none.

    Args:
        root: folder of domains by name, or None.
        entry: a name under ``root``; or a file, folder, glob, URL or ``hf://`` name.
        pinned: as of :func:`planearly.data.inputs.resolve`.

    Raises:
        UserError: nothing there, or no train split.
    """
    where, is_folder = _place(root, entry)
    if where == entry and not is_there(entry):
        place = f"under domains_root ({root}) nor as a path" if root else "as a path"
        told = f"exists neither {place}" if root else f"does not exist {place}"
        raise UserError(f"the domain '{entry}' {told}: check its name")
    return (is_folder and _as_split(where)) or {"train": resolve([where], pinned)}


def _place(root: str | None, entry: str) -> tuple[str, bool]:
    """Where a domain is, under ``root`` or by itself, and whether it is a folder."""
    if storage.is_url(entry) or (root and storage.is_url(root)):
        url = entry if storage.is_url(entry) else storage.join(str(root), entry)
        found = storage.look(url)
        if found:
            return found.url, found.is_folder
        return entry, False
    named = files.expanded(root) / entry if root else None
    path = named if named is not None and named.exists() else files.expanded(entry)
    return (str(path), True) if path.is_dir() else (str(named) if path == named else entry, False)


def missing(given: dict[str, list[Unit]]) -> list[str]:
    """The splits that have to be held out of ``train``."""
    return [split for split in SPLITS[1:] if split not in given]


def _as_split(folder: str) -> dict[str, list[Unit]]:
    """The splits that a folder's names tell of; empty if they tell of none.

    Names mean splits where there is a ``train`` and another one, or nothing else but a README. Text
    files called train.txt, test.md and so on do so only where nothing else lies beside them: in a
    folder of documentation test.md is a page like any other. Where all lies in one subfolder, as
    in ``data/`` of a dataset of the hub, its names are asked.

    Raises:
        UserError: there is a split but none for training, and nothing else.
    """
    given: dict[str, list[Unit]] = {}
    others: list[str] = []
    texts_only, sole = True, ""
    for name, is_folder, units in children(folder):
        if not units:
            continue
        meant = _SPLIT_NAME.fullmatch(bare_name(name).lower())
        if meant is None:
            others.append(name)
            sole = name if is_folder else ""
        else:
            given.setdefault(_NAMES[meant[1]], []).extend(units)
            texts_only = texts_only and not is_folder and units[0].kind == "text"
    if not given and len(others) == 1 and sole:
        if storage.is_url(folder):
            return _as_split(storage.join(folder, sole))
        path = Path(folder) / sole
        return {} if path.is_symlink() else _as_split(str(path))
    if not given or (texts_only and (others or list(given) == ["train"])):
        ends = {_NAMES[found[1]]: name for name in others
                if (found := _SPLIT_END.fullmatch(bare_name(name).lower()))}
        some = _first(given) if others else []
        if "train" in given and len(given) > 1 and others:
            say(f"{folder}: {_some(some)} are not taken for splits, as {_some(others)} lies beside "
                "these texts: all is used and split anew")
        elif "train" in ends and len(ends) > 1:
            say(f"{folder}: {_some(list(ends.values()))} are not taken for splits, whose names "
                "begin with 'train', 'valid' or 'test': all is used and split anew")
        return {}
    if others and not ("train" in given and len(given) > 1):
        say(f"{folder}: {', '.join(_first(given))} is not taken for a split, as {_some(others)} "
            "lies beside: all is used and split anew")
        return {}
    if not given.get("train"):
        raise UserError(f"{folder} has a {' and a '.join(given)} split but no train split")
    if others:
        say(f"{folder} is taken as split by its names; {_some(others)} belongs to no split and is "
            "left out")
    return given


def _first(given: dict[str, list[Unit]]) -> list[str]:
    """The name of a file of each split."""
    return [Path(units[0].path).name for units in given.values()]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return printable(", ".join(names[:3])) + more


def hold_out(units: list[Unit], missing: list[str], entry: str, settings: keys.Data,
             seed: int, folder: Path, executor: Executor | None = None) -> dict[str, list[Unit]]:
    """Split ``missing`` off the units' documents, which are read; the rest is train.

    Args:
        folder: for what the shards hand over; it is removed at last.
        executor: who reads (None: processes of this machine).

    Raises:
        UserError: no documents, or too few to split; a damaged file; too many bad records.
    """
    executor = executor or Local()
    problems = Problems(settings.max_bad_share)
    read = [unit for _, unit in divided(
        units, folder / "divided", executor, unpack=False)]
    shards = []
    for number, group in enumerate(grouped(read)):
        item: dict[str, Any] = {
            "units": [unit.to_json() for _, unit in group], "settings": asdict(settings),
            "seed": seed, "sections": len(missing) + 1, "to": str(folder / f"{number:05d}.npy")}
        shards.append(Shard(
            f"{number} ({group[0][1].path})", sum(unit.text_bytes for _, unit in group) / 1e6, item,
            folder / f"{number:05d}.json", files.digest(item), (Path(item["to"]),)))
    found = executor.map(Work(f"splitting {entry}", "MB", hash_documents, shards, small=_SMALL,
                              known=all(unit.size for unit in units if unit.kind == "hub")))
    for counts in found:
        problems.add(counts["problems"])
    problems.check()
    hashes = np.concatenate([np.empty(0, np.uint64),
                             *(files.read_array(shard.made[0]) for shard in shards)])
    cuttable = any(counts["cuttable"] for counts in found)
    shutil.rmtree(folder, ignore_errors=True)
    if not len(hashes):
        raise UserError(f"the domain '{entry}' holds no documents; {problems.first()}".rstrip("; ")
                        + ": name files that hold text")
    order = np.unique(hashes)
    n = len(order)
    if n <= len(missing):
        if not cuttable or len(hashes) > 2:
            least = len(missing) + 1
            other = ("or each of them once, which is then cut inside" if cuttable else
                     f"or {least} paragraphs or lines in one of them")
            raise UserError(
                f"the domain '{entry}' holds {n} distinct document{'s' * (n > 1)}: to hold out "
                f"text for {' and '.join(missing)} it needs at least {least} "
                f"{'distinct ' * cuttable}documents, {other}"
            )
        parts = ("train", *missing)
        return {split: [dataclasses.replace(unit, keep=Section(split, parts, settings.held_out))
                        for unit in units] for split in parts}
    held = min(max(1, round(settings.held_out * n)), (n - 1) // len(missing),
               settings.held_out_documents or n)
    borders = [0, *(int(order[held * (i + 1)]) for i in range(len(missing))), 1 << 64]
    return {split: [dataclasses.replace(unit, keep=HashRange(seed, low, high)) for unit in units]
            for split, low, high in zip([*missing, "train"], borders, borders[1:], strict=False)}


@shard_function
def hash_documents(item: dict[str, Any], advance: Advance) -> dict[str, Any]:
    """Write the split hashes of some units' documents, uint64 [n]; tell whether one of the first
    two could be cut inside."""
    settings, cuttable = keys.Data(**item["settings"]), False
    problems, hashes = Problems(settings.max_bad_share), array("Q")
    for unit in map(Unit.from_json, item["units"]):
        for document in read_documents(unit, settings, problems):
            hashes.append(split_hash(document.text, item["seed"]))
            if len(hashes) <= 2:
                cuttable |= len(sections(document.text, item["sections"])) >= item["sections"]
            advance(document.n_bytes / 1e6)
    files.write_array(Path(item["to"]), np.array(hashes, np.uint64))
    return {"documents": len(hashes), "cuttable": cuttable, "problems": problems.to_dict()}
