"""The input files behind files, folders and globs, of this machine or of a store, and names of
Hugging Face datasets."""

from __future__ import annotations

import difflib
import functools
import glob
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, TypeVar

from planearly import storage
from planearly.data import corpora, hub
from planearly.data.documents import Unit
from planearly.data.formats import KNOWN, kind_of
from planearly.errors import UserError, printable
from planearly.files import expanded, reading_error
from planearly.progress import say

_UNKNOWN = f"{{}}: cannot tell its format by its name; it should be {KNOWN}"
_NOTHING = f"{{}} holds no documents: no file there is {KNOWN}"
_Path = TypeVar("_Path", bound=PurePath)


def resolve(paths: list[str], pinned: dict[str, Any] | None = None) -> list[Unit]:
    """The input files behind files, folders, globs, URLs of these (:mod:`planearly.storage`),
    ``hf://NAME[/CONFIG][:SPLIT]`` names and corpora by name (:mod:`planearly.data.corpora`).

    Folders are searched to the bottom, sorted (:func:`folder_files`). A file named twice is read
    once.

    Args:
        pinned: commits of datasets on the hub, by entry; those that are found out are added.

    Raises:
        UserError: nothing is there, or nothing that can be read; a store that cannot be asked.
    """
    if not paths:
        raise UserError("no documents are named: give files, folders, globs or hf://NAME")
    units: dict[str, Unit] = {}
    for entry in paths:
        if (corpus := corpora.TABLE.get(entry)) and not os.path.lexists(entry):
            _tell(f"{entry} is the corpus {corpus.entry}, {corpus.licence}")
            units.update((f"{corpus.entry}#{u.shard[0]}", replace(
                u, source_field=corpus.source_field)) for u in hub.resolve(corpus.entry, pinned))
            continue
        if entry.startswith("hf://"):
            units.update((f"{entry}#{u.shard[0]}", u) for u in hub.resolve(entry, pinned))
            continue
        if storage.is_url(entry):
            units.update((unit.path, unit) for unit in _stored(entry))
            continue
        for path in _files(entry):
            real = os.path.realpath(path)
            # a file's own name says its format better than a link's
            if real not in units or (os.path.islink(units[real].path) and not path.is_symlink()):
                units[real] = file_unit(path)
    return list(units.values())


def is_there(entry: str) -> bool:
    """Whether an entry of :func:`resolve` names or matches anything, of whatever kind."""
    path = str(expanded(entry))
    return entry in corpora.TABLE or "://" in entry or os.path.lexists(path) or (
        glob.has_magic(path) and any(glob.iglob(path, recursive=True)))


def file_unit(path: Path) -> Unit:
    kind = kind_of(path)
    assert kind is not None
    try:
        status = path.stat()
    except OSError as error:
        raise reading_error(error, path) from error
    return Unit(str(path), kind, status.st_size, status.st_mtime_ns)


def check_urls(entries: list[str | None]) -> None:
    """Refuse URLs at which there is nothing, without reading or listing what there is.

    Args:
        entries: as of :func:`resolve`, others of which are left alone.

    Raises:
        UserError: nothing is there, or the store cannot be asked.
    """
    for entry in filter(storage.is_url, entries):
        place = str(entry)
        while glob.has_magic(place) and storage.look(place) is None:
            place = place.rpartition("/")[0]
        if not storage.is_url(place) or storage.look(place) is None:
            raise storage.absent(str(entry))


def children(folder: str) -> Iterator[tuple[str, bool, list[Unit]]]:
    """(name, whether it is a folder, its documents) of what lies in a folder, by name; neither what
    is hidden nor READMEs."""
    def aside(name: str) -> bool:
        return name.startswith(".") or name.lower().startswith("readme.")

    if not storage.is_url(folder):
        for path in sorted(Path(folder).iterdir()):
            if not aside(path.name):
                within = folder_files(path) if path.is_dir() else known_files([path], folder)
                yield path.name, path.is_dir(), [file_unit(each) for each in within]
        return
    files = storage.files_under(folder)
    for name in sorted({storage.within(file.url, folder).partition("/")[0] for file in files}):
        if not aside(name):
            place = storage.join(folder, name)
            inside = [file for file in files if file.url.startswith(f"{place}/")]
            yield name, bool(inside), (_stored_files(inside, place) if inside else _stored_units(
                [file for file in files if file.url == place], folder))


def _stored(entry: str) -> list[Unit]:
    """The input files behind the URL of a file, a folder or a glob."""
    found = storage.look(entry)
    if found is None and glob.has_magic(entry):
        named = PurePath(entry).parts  # what is hidden is matched by its own name alone
        matches = [match for match in storage.matching(entry) if not any(
            part.startswith(".") and part not in named for part in PurePath(match.url).parts)]
        units = [unit for match in matches if match.is_folder
                 for unit in _stored_files(storage.files_under(match.url), match.url)]
        units += _stored_units([match for match in matches if not match.is_folder], entry)
        units.sort(key=lambda unit: PurePath(unit.path))
    elif found is None:
        raise storage.absent(entry)
    elif found.is_folder:
        units = _stored_files(storage.files_under(found.url), found.url)
    elif kind_of(PurePath(found.url)) is None:
        raise UserError(_UNKNOWN.format(entry))
    else:
        units = _stored_units([found], entry)
    if not units:
        raise UserError(_NOTHING.format(entry))
    return units


def _stored_files(files: list[storage.Entry], folder: str) -> list[Unit]:
    """The documents among the files of a folder in a store."""
    shown = [file for file in files if not any(
        part.startswith(".") for part in storage.within(file.url, folder).split("/"))]
    units = _stored_units(shown, folder)
    beside = {PurePath(unit.path).parent for unit in units if unit.kind != "text"}
    return [unit for unit in units if PurePath(unit.path).parent not in beside
            or not PurePath(unit.path).name.lower().startswith("readme.")]


def _stored_units(files: list[storage.Entry], place: str) -> list[Unit]:
    known = set(_known([PurePath(file.url) for file in files], place))
    return [Unit(file.url, kind, file.size, revision=file.version) for file in files
            if PurePath(file.url) in known and (kind := kind_of(PurePath(file.url)))]


def _files(entry: str) -> list[Path]:
    path = expanded(entry)
    try:
        mode = path.stat().st_mode if os.path.lexists(path) else None
    except OSError as error:
        if path.is_symlink():
            raise UserError(f"{entry} is a link that leads nowhere: mend or remove it") from error
        raise reading_error(error, entry) from error
    except ValueError:  # a zero byte
        mode = None
    if mode is not None and stat.S_ISDIR(mode):
        found = folder_files(path)
    elif mode is not None and not stat.S_ISREG(mode):
        raise UserError(f"{entry} is neither a file nor a folder: write what comes out of it to a "
                        "file, and give that")
    elif mode is not None:
        if kind_of(path) is None:
            raise UserError(_UNKNOWN.format(entry))
        return [path]
    elif glob.has_magic(entry):
        found = []
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        for match in matches:
            if match.is_dir():
                found += folder_files(match)
        found += known_files([match for match in matches if not match.is_dir()], entry)
        found.sort()
    else:
        near = difflib.get_close_matches(entry, corpora.TABLE, 1, 0.7)
        raise UserError(f"{entry} does not exist: check the path"
                        + (f", or did you mean the corpus '{near[0]}'?" if near else ""))
    if not found:
        raise UserError(_NOTHING.format(entry))
    return found


def folder_files(folder: Path) -> list[Path]:
    """The document files of a folder, to the bottom, sorted.

    Links are followed, to each folder once. What is passed over for its name, or because it cannot
    be read, is told; hidden files and READMEs beside data are not.
    """
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    roots = [folder]

    def unreadable(error: OSError) -> None:
        _tell(f"{error.filename} is passed over: it cannot be read ({error.strerror})")

    while roots:
        for parent, folders, names in os.walk(roots.pop(0), onerror=unreadable):
            here = os.stat(parent)
            if (here.st_dev, here.st_ino) in seen:
                folders.clear()
                continue
            seen.add((here.st_dev, here.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            roots += [path for name in folders if (path := Path(parent, name)).is_symlink()]
            files = known_files([Path(parent, name) for name in names if name[0] != "."], folder)
            if any(kind_of(path) != "text" for path in files):
                files = [path for path in files if not path.name.lower().startswith("readme.")]
            found += files
    return sorted(found)


def known_files(paths: list[Path], place: Path | str) -> list[Path]:
    """Those of the paths that are files of a known format; the others are told."""
    found = []
    for path in _known(paths, place):
        try:
            regular = stat.S_ISREG(path.stat().st_mode)
        except OSError as error:
            link = "a link that leads nowhere" if path.is_symlink() else error.strerror
            _tell(f"{path} is passed over: {link}")
            continue
        if regular:
            found.append(path)
        else:
            _tell(f"{path} is passed over: it is no regular file")
    return found


def _known(paths: list[_Path], place: Path | str) -> list[_Path]:
    """Those of the paths whose names say a known format; the others are told."""
    others = Counter(path.suffix.lower() or path.name for path in paths if kind_of(path) is None)
    if others:
        most = sorted(others.items(), key=lambda counted: (-counted[1], counted[0]))[:4]
        kinds = ", ".join(f"{kind} {n}" for kind, n in most)
        _tell(f"{place}: {others.total()} files are passed over, as their names say no known "
              f"format ({kinds}{', ...' if len(others) > 4 else ''})")
    return [path for path in paths if kind_of(path) is not None]


@functools.cache
def _tell(sentence: str) -> None:
    """Say a sentence, once in a process."""
    say(printable(sentence))
