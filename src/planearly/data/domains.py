"""A domain's documents as train, valid and test: as they come split, or split here.

A folder with ``train`` (and ``valid``, ``test``) files or subfolders is taken as split. What is
missing of valid and test, or all of it, is split off by document: documents are ordered by a seeded
hash of their text, so a split depends on nothing but the texts and the seed, and equal documents
never fall on two sides. A set of fewer than three documents (one long text file, say) is cut
inside its documents instead: the first paragraphs for train, the last for valid and test.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np

from planearly import keys
from planearly.data.documents import HashRange, Problems, Section, Unit, split_hash
from planearly.data.inputs import file_unit, folder_files, resolve
from planearly.data.readers import kind_of, read_documents
from planearly.data.text import sections
from planearly.errors import UserError

SPLITS = ("train", "valid", "test")
_NAMES = {"train": "train", "training": "train", "valid": "valid", "validation": "valid",
          "val": "valid", "dev": "valid", "test": "test"}


def domain_names(root: str) -> list[str]:
    """The domains of a folder: its subfolders, sorted.

    Raises:
        UserError: there is no such folder, or nothing in it.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise UserError(f"domains_root: {root} is not a folder")
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise UserError(f"domains_root: {root} has no subfolders, one per domain")
    return names


def domain_splits(root: str | None, entry: str, settings: keys.Data,
                  seed: int) -> dict[str, list[Unit]]:
    """The input files of a domain's train, valid and test documents.

    Args:
        root: folder of domains by name, or None.
        entry: a name under ``root``; or a file, folder, glob or ``hf://`` name.
        settings: ``held_out`` is the share of the documents for valid, and for test.
        seed: of the split.

    Raises:
        UserError: nothing there; no train split; too little text to hold any out.
    """
    named = Path(root).expanduser() / entry if root else None
    where = str(named) if named is not None and named.exists() else entry
    if where == entry and not entry.startswith("hf://") and not Path(entry).expanduser().exists():
        try:
            units = resolve([entry])
        except UserError as error:
            place = f"under domains_root ({root}) or as a path" if root else "as a path"
            raise UserError(f"the domain '{entry}' exists neither {place}"
                            if root else f"the domain '{entry}' does not exist {place}") from error
        given: dict[str, list[Unit]] = {"train": units}
    elif Path(where).expanduser().is_dir():
        given = _as_split(Path(where).expanduser()) or {"train": resolve([where])}
    else:
        given = {"train": resolve([where])}
    missing = [split for split in SPLITS[1:] if split not in given]
    if missing:
        given |= _hold_out(given["train"], missing, entry, settings, seed)
    return {split: given[split] for split in SPLITS}


def _as_split(folder: Path) -> dict[str, list[Unit]]:
    """The splits that a folder's names tell of; empty if they tell of none.

    Text files called train.txt, test.md and so on mean splits only where nothing else lies beside
    them but a README: in a folder of documentation test.md is a page like any other.
    """
    given: dict[str, list[Path]] = {}
    others = False
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.lower().startswith("readme."):
            continue
        if path.is_file() and kind_of(path) is None:
            continue
        split = _NAMES.get(re.split(r"[-_.]", path.name)[0].lower())
        if split is None:
            others = True
        else:
            given.setdefault(split, []).extend(folder_files(path) if path.is_dir() else [path])
    texts_only = all(path.parent == folder and kind_of(path) == "text"
                     for paths in given.values() for path in paths)
    if not given or (others and texts_only) or (texts_only and list(given) == ["train"]):
        return {}
    if not given.get("train"):
        raise UserError(f"{folder} has a {' and a '.join(given)} split but no train split")
    return {split: [file_unit(path) for path in paths] for split, paths in given.items() if paths}


def _hold_out(units: list[Unit], missing: list[str], entry: str, settings: keys.Data,
              seed: int) -> dict[str, list[Unit]]:
    """Split ``missing`` off the units' documents; the rest is train."""
    problems = Problems(settings.max_bad_share)
    hashes: list[int] = []
    cuttable = False
    for unit in units:
        for document in read_documents(unit, settings, problems):
            hashes.append(split_hash(document.text, seed))
            if len(hashes) <= 2:
                cuttable = cuttable or len(sections(document.text, len(missing) + 1)) > len(missing)
    problems.check()
    if not hashes:
        raise UserError(f"the domain '{entry}' holds no documents; {problems.first()}".rstrip("; "))
    order = np.unique(np.array(hashes, np.uint64))
    n = len(order)
    if n <= len(missing):
        if not cuttable or len(hashes) > 2:
            least = len(missing) + 1
            raise UserError(
                f"the domain '{entry}' holds {n} distinct document{'s' * (n > 1)}: to hold out "
                f"text for {' and '.join(missing)} it needs at least {least} documents, or "
                f"{least} paragraphs or lines in one of them"
            )
        parts = ("train", *missing)
        return {split: [dataclasses.replace(unit, keep=Section(split, parts, settings.held_out))
                        for unit in units] for split in parts}
    held = min(max(1, round(settings.held_out * n)), (n - 1) // len(missing))
    borders = [0, *(int(order[held * (i + 1)]) for i in range(len(missing))), 1 << 64]
    return {split: [dataclasses.replace(unit, keep=HashRange(seed, low, high)) for unit in units]
            for split, low, high in zip([*missing, "train"], borders, borders[1:], strict=False)}
