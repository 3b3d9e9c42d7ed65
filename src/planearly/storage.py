"""Files of stores (``s3://``, ``gs://`` and what else ``fsspec`` opens): found, read, copied from
there and published there.

A file there is known by its URL and its version: its size and the tag that the store gives its
content, or else its time of change. Nothing that a store said is remembered, so what has changed is
seen. Addresses and credentials are those that the store's own tools take.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import fnmatch
import functools
import io
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from planearly.errors import UserError, brief
from planearly.files import (
    atomic_write,
    cache_folder,
    digest,
    expanded,
    file_digest,
    storage_error,
    write_json,
)
from planearly.progress import progress

_URL = re.compile(r"(?!hf://)([A-Za-z][A-Za-z0-9+.-]+)://")  # names of the hub are another matter
_PACKAGES = {"s3": "planearly[s3]", "s3a": "planearly[s3]", "gs": "planearly[gcs]",
             "gcs": "planearly[gcs]", "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs",
             "http": "aiohttp", "https": "aiohttp", "sftp": "paramiko", "ssh": "paramiko"}
_TAGS = ("ETag", "md5Hash", "etag", "content_md5", "Content-MD5")
_TIMES = ("LastModified", "updated", "last_modified", "Last-Modified", "mtime", "modified",
          "created")
_WHOLE = ".whole.json"
RECORD = ".published.json"
"""File of a folder in a store that tells what was published there."""
_LEAST, _MOST = 1 << 18, 1 << 23  # bytes asked for at once
_PAUSES = (1.0, 4.0, 16.0)
"""Seconds before a store is asked again."""
_FOR_GOOD = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError,
             TypeError, NotImplementedError, ImportError)
_INVALID = (errno.EINVAL, errno.ENAMETOOLONG, errno.EPERM)
_NO_BUCKET = re.compile("bucket (does not exist|not found)", re.IGNORECASE)
_WEB = re.compile("https?://", re.IGNORECASE)
_FOLDERS = re.compile("(file|local|sftp|ssh)://", re.IGNORECASE)
"""Places where a folder has to be made before a file lies in it."""
_CREDENTIALS = re.compile(r"Credential|Token|RefreshError|ProfileNotFound|Auth")


T = TypeVar("T")


class Entry(NamedTuple):
    """What a store has at a URL: a file, or a folder, which has no version."""

    url: str
    size: int = 0
    version: str = ""

    @property
    def is_folder(self) -> bool:
        return not self.version


def is_url(place: object) -> bool:
    """Whether a place is of a store; names of the hub (``hf://``) are not."""
    return bool(_URL.match(str(place)))


def join(url: str, name: str) -> str:
    return f"{url.rstrip('/')}/{name}"


def within(url: str, folder: str) -> str:
    """The path of a URL from a folder that it lies in."""
    return url.removeprefix(folder.rstrip("/")).lstrip("/")


def look(url: str) -> Entry | None:
    """What is at a URL now; None: nothing.

    Raises:
        UserError: no such bucket, no right to look, or one of those that any call raises: no
            package for the scheme, no credentials, no connection.
    """
    with _asking(url):
        store, path = _store(url)
        try:
            return _entry(store, store.info(path))
        except FileNotFoundError as error:
            if _NO_BUCKET.search(str(error)):
                raise
            cause = error.__cause__
            if _WEB.match(url) and cause and not isinstance(cause, FileNotFoundError):
                raise cause from None  # its client takes every failure for a place that is empty
            return None


def absent(url: str) -> UserError:
    """That nothing is at a URL."""
    what = "address" if _WEB.match(url) or _FOLDERS.match(url) else "bucket and the name"
    return UserError(f"{url} does not exist: check the {what}")


def files_under(folder: str) -> list[Entry]:
    """All files of a folder, to the bottom, in the order of their paths as of a local folder."""
    with _asking(folder):
        store, path = _store(folder)
        return _sorted(_entry(store, info) for info in store.find(path, detail=True).values()
                       if not info["name"].endswith("/"))  # an object that marks a folder


def tree(folder: str) -> dict[str, Entry]:
    """All files of a folder, to the bottom, by their paths in it."""
    with _asking(folder):
        store, root = _store(folder)
        base = store.unstrip_protocol(root)
        return {within(file.url, base): file for file in files_under(folder)}


def matching(pattern: str) -> list[Entry]:
    """The files and folders that a glob matches, in the order of their paths."""
    with _asking(pattern):
        store, path = _store(pattern)
        return _sorted(_entry(store, info) for info in store.glob(path, detail=True).values())


def folders_in(folder: str) -> list[str]:
    """The names of a folder's own folders, sorted."""
    with _asking(folder):
        store, path = _store(folder)
        found = [info["name"] for info in store.ls(path, detail=True)
                 if info["type"] == "directory"]
        return sorted(PurePosixPath(name).name for name in found)


def reader(file: Entry, until: int | None = None) -> io.BufferedReader:
    """The bytes of a file, which is still as it was listed.

    Args:
        until: where the bytes that are wanted end (None: the file); beyond, less is read ahead.

    A block that could not be had is asked for again. Reading raises :class:`UserError` where the
    file has changed or gone, or the store cannot be reached.
    """
    return io.BufferedReader(_Blocks(file, file.size if until is None else until), _LEAST >> 1)


@functools.lru_cache
def local(place: str, wanted: tuple[str, ...] = ()) -> Path:
    """A place on this machine as it is; of a file or folder of a store the copy in the user's
    cache.

    A version is copied once, by whoever comes first; a copy that was interrupted goes on with the
    files that it lacks. What a process has copied, it does not ask for again.

    Args:
        wanted: of a folder only its own files of such names (:mod:`fnmatch`); empty: all files, to
            the bottom. Hidden ones are left out.

    Raises:
        UserError: nothing is there, the store cannot be asked, or the disk is full.
    """
    if not is_url(place):
        return expanded(place)
    found = look(place)
    if found is None:
        raise absent(place)
    named = {file: within(file.url, found.url) for file in files_under(found.url)} if (
        found.is_folder) else {found: PurePosixPath(found.url).name}
    if found.is_folder:
        named = {file: name for file, name in named.items()
                 if not any(part.startswith(".") for part in name.split("/")) and (
                     not wanted or ("/" not in name and any(
                         fnmatch.fnmatch(name, each) for each in wanted)))}
    if not named:
        raise UserError(f"{place} holds no {', '.join(wanted) or 'files'}: check the name")
    made = cache_folder() / "stores" / digest([[*file] for file in named])[:16]
    folder = made / PurePosixPath(found.url).name if found.is_folder else made
    with _locked(made):
        if not (made / _WHOLE).is_file():
            fetch(place, {folder / name: file for file, name in named.items()})
            write_json(made / _WHOLE, {"url": found.url, "files": [[*file] for file in named]})
    return folder if found.is_folder else folder / next(iter(named.values()))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """While no other process of this machine makes a folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise storage_error(error, folder) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fetch(url: str, files: dict[Path, Entry]) -> None:
    """Copy files of a store to places on this machine, those that are not there with that size."""
    there = {path for path, file in files.items()
             if path.is_file() and path.stat().st_size == file.size}
    if len(there) == len(files):
        return
    total, done = (sum(files[path].size for path in some) / 1e6 for some in (files, there))
    with progress(f"fetching {url}", total, "MB", done) as meter:
        for path, file in files.items():
            if path in there:
                continue
            with atomic_write(path) as out, reader(file) as source:
                while block := source.read(_MOST):
                    out.write(block)
                    meter.advance(len(block) / 1e6)


class _Blocks(io.RawIOBase):
    """A file of a store, in blocks that grow while it is read in order."""

    def __init__(self, file: Entry, until: int) -> None:
        self.file, self.until = file, until
        self._place = self._start = 0
        self._block = b""
        self._ahead = _LEAST >> 1

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.file.size}[whence]
        self._place = max(origin + place, 0)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, into: Any) -> int:
        if self._place >= self.file.size:
            return 0
        end = self._start + len(self._block)
        if not self._start <= self._place < end:
            self._ahead = min(2 * self._ahead, _MOST) if self._place == end else _LEAST
            ahead = max(min(self._place + self._ahead, self.until), self._place + _LEAST)
            stop = min(max(self._place + len(into), ahead), self.file.size)
            self._start, self._block = self._place, _fetch(self.file, self._place, stop)
        first = self._place - self._start
        data = self._block[first:first + len(into)]
        into[:len(data)] = data
        self._place += len(data)
        return len(data)


def _fetch(file: Entry, start: int, stop: int) -> bytes:
    """The bytes [start, stop) of a file, which afterwards is still as it was listed."""
    def ask() -> bytes:
        store, path = _store(file.url)
        data = store.cat_file(path, start=start, end=stop)
        now = look(file.url)
        if now is None or now.version != file.version:
            raise UserError(f"{file.url} has changed since it was listed: start again")
        if len(data) != stop - start:
            raise ConnectionError(f"{len(data)} bytes came of {stop - start}")
        return bytes(data)

    with _asking(file.url):
        return _patiently(ask)


def check_writable(url: str) -> None:
    """Refuse a folder to publish in that cannot be written, before anything is made for it.

    Raises:
        UserError: it is no URL, or the store does not take a file there.
    """
    if not is_url(url):
        raise UserError(f"'{url}' is no URL of a store, as s3://bucket/models: give one, or copy "
                        "what the run folder holds")
    with _asking(url):
        store, root = _store(url)
        _make_folder(store, root, url)
        store.pipe_file(f"{root}/{RECORD}", json.dumps(_record(store, root)).encode())


def publish(files: Mapping[str, Path], url: str, last: str = "", *, stays: bool = False,
            quiet: bool = False) -> int:
    """Make a folder of a store hold these files, by their paths there.

    What is there already, with the same content, is not sent again; what was published there before
    and is not among them is removed. A file appears whole or not at all.

    Args:
        last: the file by which readers know that the others are whole: it goes before one of them
            changes, and comes after them.
        stays: it does not go before, as it goes with those that come as well.
        quiet: without progress, as from a thread.

    Returns:
        How many files were sent.

    Raises:
        UserError: the store does not take them, or cannot be reached.
    """
    with _asking(url):
        store, root = _store(url)
        there = {name: entry.version for name, entry in tree(url).items()}
        record = _record(store, root)
        known = {name: file_digest(path) for name, path in files.items()}
        new = [name for name in files if name not in there
               or record.get(name) != [known[name], there[name]]]
        gone = [name for name in record if name in there and name not in files]
        if not stays and last in there and last in files and {*new, *gone} - {last}:
            gone.append(last)
            new.append(last)
        new = sorted({*new}, key=lambda name: (name == last, name))
        if not new and not gone:
            return 0
        try:
            for name in reversed(gone):  # the last one first
                _patiently(lambda name=name: store.rm_file(f"{root}/{name}"))  # type: ignore[misc]
                record.pop(name, None)
            for name, version in _sent({name: files[name] for name in new}, store, root, url,
                                       quiet):
                record[name] = [known[name], version]
        finally:
            with contextlib.suppress(Exception):  # then all is sent again
                store.pipe_file(f"{root}/{RECORD}", json.dumps(record).encode())
    return len(new)


@contextlib.contextmanager
def written(place: Path | str) -> Iterator[Path]:
    """Where to write a file; for a URL a temporary place, from where it is sent, with what was
    written beside it.

    Raises:
        UserError: the store does not take it.
    """
    if not is_url(place):
        yield Path(place)
        return
    folder, _, name = str(place).rpartition("/")
    with tempfile.TemporaryDirectory() as made:
        yield Path(made, name)
        with _asking(folder):
            store, root = _store(folder)
            files = {path.name: path for path in sorted(Path(made).iterdir())}
            for _ in _sent(files, store, root, folder):
                pass


def _sent(files: Mapping[str, Path], store: Any, root: str, url: str,
          quiet: bool = False) -> Iterator[tuple[str, str]]:
    """Send files; the name and the version there of each, as it is sent."""
    from fsspec.callbacks import Callback

    total = sum(path.stat().st_size for path in files.values()) / 1e6
    with contextlib.nullcontext() if quiet else progress(
            f"publishing in {url}", total, "MB") as meter:
        class Told(Callback):
            def relative_update(self, inc: int = 1) -> None:
                if meter is not None:
                    meter.advance(inc / 1e6)

        for name, path in files.items():
            place = f"{root}/{name}"
            _make_folder(store, place.rpartition("/")[0], url)
            _patiently(lambda: store.put_file(str(path), place, callback=Told()))  # noqa: B023
            sent = look(join(url, name))
            if sent is None or sent.size != path.stat().st_size:
                raise UserError(f"{join(url, name)} was changed by another while it was published: "
                                "start again")
            yield name, sent.version


def _make_folder(store: Any, path: str, url: str) -> None:
    if _FOLDERS.match(url):
        store.makedirs(path, exist_ok=True)


def _record(store: Any, root: str) -> dict[str, list[str]]:
    """Digest and version of the files that were published in a folder; empty if none were."""
    try:
        found = json.loads(store.cat_file(f"{root}/{RECORD}"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _patiently(ask: Callable[[], T]) -> T:
    """What is asked for, again and again while the connection fails."""
    for pause in _PAUSES:
        try:
            return ask()
        except UserError:
            raise
        except Exception as error:  # clients raise what theirs raise
            if not _passes(error):
                raise
            time.sleep(pause)
    return ask()


def _store(url: str) -> tuple[Any, str]:
    """The file system of a URL, which remembers no listings, and the path there."""
    scheme = url.partition("://")[0]
    try:
        from fsspec.core import url_to_fs

        store, path = url_to_fs(url)
    except ImportError as error:
        package = _PACKAGES.get(scheme.lower())
        how = f"pip install '{package}'" if package else brief(error)
        raise UserError(f"{url}: {scheme}:// needs a package: {how}") from error
    store.invalidate_cache()
    return store, path


def _entry(store: Any, info: dict[str, Any]) -> Entry:
    url = store.unstrip_protocol(info["name"])
    if info["type"] == "directory":
        return Entry(url)
    if info.get("size") is None:
        raise UserError(f"{url} cannot be read in parts, as its server does not tell its size: "
                        "download it")
    told = next((info[name] for name in (*_TAGS, *_TIMES) if info.get(name)), "")
    told = told.timestamp() if isinstance(told, datetime.datetime) else told
    return Entry(url, int(info["size"]), f"{info['size']} {told}".replace('"', "").rstrip())


def _sorted(entries: Iterator[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: PurePosixPath(entry.url))


@contextlib.contextmanager
def _asking(url: str) -> Iterator[None]:
    """Whatever a client raises as one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not _passes(error):
            raise _refused(url, error) from error
        lost = OSError(errno.ETIMEDOUT, brief(error))  # so that it counts as one that may pass
        lost.__cause__ = error
        raise UserError(f"cannot reach {url} ({brief(error)}): check the connection and the "
                        "address of the store (docs/data.md), and start again") from lost


def _passes(error: Exception) -> bool:
    """Whether an error is of the connection, so that asking again may help."""
    if isinstance(error, OSError) and error.errno in _INVALID:
        return False
    return not isinstance(error, _FOR_GOOD) and not _CREDENTIALS.search(type(error).__name__)


def _refused(url: str, error: Exception) -> UserError:
    """One sentence for an error that asking again does not mend."""
    scheme, why = url.partition("://")[0], brief(error)
    if _CREDENTIALS.search(type(error).__name__):
        return UserError(f"{url} needs credentials ({why}): set them as for the store's own tools, "
                         "or say that it is public (docs/data.md)")
    if isinstance(error, PermissionError):
        return UserError(f"the store refuses {url} ({why}): check what your credentials may do")
    if isinstance(error, FileNotFoundError):
        where = " (no such bucket)" if _NO_BUCKET.search(str(error)) else ""
        return UserError(f"{url} does not exist{where}: check its name")
    if isinstance(error, ValueError) and "protocol" in why.lower():
        return UserError(f"'{url}': {scheme}:// is not known; give s3://, gs://, hf://NAME or a "
                         "place on this machine")
    return UserError(f"{url} cannot be read or written ({why}): check its name and the settings of "
                     "the store (docs/data.md)")
