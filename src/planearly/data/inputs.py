"""The input files behind files, folders, globs and names of Hugging Face datasets."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from planearly.data import hub
from planearly.data.documents import Unit
from planearly.data.readers import KNOWN, kind_of
from planearly.errors import UserError


def resolve(paths: list[str]) -> list[Unit]:
    """The input files behind files, folders, globs and ``hf://NAME[/CONFIG][:SPLIT]`` names.

    Folders are searched to the bottom, sorted; hidden files, files of other kinds and a README
    beside JSON lines or Parquet are passed over. A file named twice is read once.

    Raises:
        UserError: nothing is there, or nothing that can be read.
    """
    if not paths:
        raise UserError("no documents are named: give files, folders, globs or hf://NAME")
    units: dict[str, Unit] = {}
    for entry in paths:
        if entry.startswith("hf://"):
            units.update((f"{entry}#{u.shard[0]}", u) for u in hub.resolve(entry))
            continue
        for path in _files(entry):
            units.setdefault(os.path.realpath(path), file_unit(path))
    return list(units.values())


def file_unit(path: Path) -> Unit:
    kind, status = kind_of(path), path.stat()
    assert kind is not None
    return Unit(str(path), kind, status.st_size, status.st_mtime_ns)


def _files(entry: str) -> list[Path]:
    path = Path(entry).expanduser()
    if path.is_file():
        if kind_of(path) is None:
            raise UserError(f"{entry}: cannot tell its format by its name; it should be {KNOWN}")
        return [path]
    if path.is_dir():
        found = folder_files(path)
    elif glob.has_magic(entry):
        found = []
        for match in sorted(Path(m) for m in glob.glob(str(path), recursive=True)):
            found += folder_files(match) if match.is_dir() else [match] * bool(kind_of(match))
    else:
        raise UserError(f"{entry} does not exist")
    if not found:
        raise UserError(f"{entry} holds no documents: no file there is {KNOWN}")
    return found


def folder_files(folder: Path) -> list[Path]:
    """The document files of a folder, to the bottom, sorted."""
    found: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        here = [Path(parent, name) for name in names
                if not name.startswith(".") and kind_of(Path(name))]
        if any(kind_of(path) != "text" for path in here):
            here = [path for path in here if not path.name.lower().startswith("readme.")]
        found += here
    return sorted(found)
