"""The one way this package writes a file: temporary name, flush to disk, rename.

No reader ever sees half a file, whatever moment the writer is killed at.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from tokenize import TokenError  # numpy parses a header with Python's own parser
from typing import IO, Any
from zipfile import BadZipFile

import numpy as np

from planearly.errors import UserError, flattened

_TEMPORARY = re.compile(r"\..+\.[^/]*-\d+\.(tmp|old)", re.DOTALL)


def temporary_name(path: Path) -> Path:
    """What ``path`` is called while this process, of this machine, writes it.

    Raises:
        UserError: the path is one of a folder by its place alone (``.``, ``..``, ``/``).
    """
    if path.name in ("", ".."):
        raise UserError(f"{path} is a folder that has no name there: give what is to be written a "
                        "name")
    return path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}.tmp")


def is_utf8(path: Path | str) -> bool:
    """Whether a name is UTF-8; safetensors writes and reads no file of another."""
    return not re.search("[\ud800-\udfff]", str(path))


def check_place(path: Path, what: str, ours: Callable[[Path], bool], folder: bool = False) -> None:
    """Refuse to write over something else, which would be lost.

    Args:
        what: is to be written, with its article.
        ours: whether what is there is such a thing, which may be replaced.
        folder: that is to be written, and no file.

    Raises:
        UserError: something else is there.
    """
    if path.is_dir() and not folder:
        raise UserError(f"{path} is a folder: name a file in it for {what}")
    _check_kind(path)
    there = any(path.iterdir()) if path.is_dir() else path.is_file() and (
        folder or path.stat().st_size > 0)
    if there and not ours(path):
        raise UserError(f"{path} is there already and is not {what}, so it is not replaced: choose "
                        "another name, or remove it")


def _check_kind(path: Path) -> None:
    """Refuse to replace a device or a pipe, ``/dev/null`` say, by a file."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path} is neither a file nor a folder, and a file would replace it: name "
                        "another place")


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary neighbour of ``path``; on success flush it and rename it to ``path``.

    Raises:
        UserError: the disk is full, the folder cannot be written, or ``path`` is a device or a
            pipe; it is left as it was.

    Text is written in UTF-8; half a surrogate pair (of a file name that is not UTF-8, say) is
    written as ``\\udcXX``, which JSON reads as the same.
    """
    temporary = temporary_name(path)
    encoding, errors = (None, None) if "b" in mode else ("utf-8", "backslashreplace")
    try:
        _check_kind(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, encoding=encoding, errors=errors) as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise storage_error(error, path) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """As :func:`atomic_write`, for a folder: fill the yielded one, it then takes the name ``path``.

    An existing folder of that name is replaced.
    """
    temporary = temporary_name(path)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        old = temporary.with_suffix(".old")
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise storage_error(error, path) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def replacing(folder: Path, name: str) -> Iterator[Path]:
    """Fill the yielded folder; what it holds then takes the place of its namesakes in ``folder``.

    Args:
        name: of the yielded folder, inside ``folder``; only one writer may use it at a time.
    """
    made = folder / name
    try:
        shutil.rmtree(made, ignore_errors=True)  # of a writer that was killed
        made.mkdir(parents=True)
        yield made
        for new in sorted(made.iterdir()):
            place = folder / new.name
            if place.is_dir():  # no folder can be renamed over another
                os.replace(place, made / f"{new.name}.old")
            os.replace(new, place)
        sync_folder(folder)
    except OSError as error:
        raise storage_error(error, folder) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove the temporary files and folders that a killed writer left under ``folder``.

    Only for whoever alone writes there.
    """
    for left in [*folder.rglob(".*.tmp"), *folder.rglob(".*.old")]:
        _remove(left)


def sweep_beside(folder: Path) -> None:
    """As :func:`sweep`, of what lies in ``folder`` itself, where files of others may lie too."""
    for left in folder.iterdir():
        if _TEMPORARY.fullmatch(left.name):
            _remove(left)


def _remove(left: Path) -> None:
    if left.is_dir() and not left.is_symlink():
        shutil.rmtree(left, ignore_errors=True)
    else:
        left.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def storage_error(error: OSError, path: Path) -> UserError:
    """One sentence for a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"the disk is full while writing {path}: free some space and start again; "
            "everything finished so far is kept"
        )
    why = error.strerror or str(error)
    if error.errno == errno.EISDIR:
        return UserError(f"cannot write {path}, which is a folder: name a file in it")
    file = next((parent for parent in path.parents if parent.is_file()), None)
    if error.errno in (errno.ENOTDIR, errno.EEXIST) and file is not None:
        return UserError(f"cannot write {path}: {file} is a file and no folder: choose another "
                         "place")
    if error.errno == errno.ENAMETOOLONG:
        return UserError(f"cannot write {path} ({why}): choose a shorter one")
    return UserError(f"cannot write {path} ({why}): check the folder's rights")


def file_error(error: OSError) -> UserError:
    """One sentence for a failure of the file system, by what was tried: to read or to write."""
    if not isinstance(error.filename, str | bytes):
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            return storage_error(error, Path("."))
        return UserError(f"the system refused: {error.strerror or error}")
    path = Path(os.fsdecode(error.filename))
    writing = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EEXIST, errno.ENOTEMPTY)
    refused = (errno.EACCES, errno.EPERM)
    if error.errno in writing or (
            error.errno in refused and (not path.exists() or os.access(path, os.R_OK))):
        return storage_error(error, path)
    if error.errno in refused:
        return UserError(f"cannot read {path} ({error.strerror}): check its rights")
    if error.errno == errno.ENOENT:
        return UserError(f"cannot read {path}: it does not exist, check the path")
    return UserError(f"cannot read {path} ({error.strerror or error}): check what stands there")


def reading_error(error: OSError, path: Path | str) -> UserError:
    """One sentence for a file or folder that cannot be read."""
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path} does not exist: check the path")
    if isinstance(error, IsADirectoryError):
        return UserError(f"{path} is a folder: name a file in it")
    return UserError(f"cannot read {path} ({error.strerror or error}): check its rights, or leave "
                     "it out")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON with a final newline; numbers that are none become null."""
    try:
        text = json.dumps(value, indent=1, ensure_ascii=False, default=_plain, allow_nan=False)
    except ValueError:
        value = finite(json.loads(json.dumps(value, default=_plain)))
        text = json.dumps(value, indent=1, ensure_ascii=False)
    with atomic_write(path, "w") as handle:
        handle.write(text + "\n")


def finite(value: Any) -> Any:
    """A value for JSON with null in place of numbers that are none, which JSON cannot say."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def line_of_json(value: Any) -> str:
    """``value`` as JSON on one line; numbers that are none become null."""
    return json.dumps(finite(value), allow_nan=False)


class Damaged(UserError):
    """A file is not what was written there."""


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or broken one is a :class:`UserError` that names it."""
    try:
        return json.loads(path.read_bytes())  # in whatever UTF its first bytes tell
    except OSError as error:
        raise reading_error(error, path) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): copy it again, or make it "
                        "anew") from error


def read_object(path: Path, *needed: str) -> dict[str, Any]:
    """Read a JSON file that this package wrote: an object that has the ``needed`` keys.

    Raises:
        Damaged: it holds something else.
        UserError: as :func:`read_json`.
    """
    found = read_json(path)
    lacks = [key for key in needed if key not in found] if isinstance(found, dict) else None
    if lacks is None or lacks:
        what = f"it has no '{lacks[0]}'" if lacks else "it is no JSON object"
        raise Damaged(f"{path} is damaged ({what}): copy it again, or remove it with its folder, "
                      "which is then made anew")
    return dict(found)


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a ``.npy`` file."""
    with atomic_write(path) as handle:
        np.save(handle, array, allow_pickle=False)


def write_chunks(path: Path, dtype: np.dtype, shape: tuple[int, ...],
                 chunks: Iterable[np.ndarray]) -> None:
    """Write a ``.npy`` file of an array that comes in chunks, which together fill ``shape``."""
    with atomic_write(path) as handle:
        np.lib.format.write_array_header_1_0(handle, {
            "descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})
        for chunk in chunks:
            handle.write(chunk.tobytes())


def read_array(path: Path, mapped: bool = True) -> np.ndarray:
    """Read a ``.npy`` file, memory-mapped read-only unless ``mapped`` is false or it is empty.

    Raises:
        Damaged: it is cut or of another kind.
        UserError: it is missing, or cannot be read.
    """
    try:
        array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except OSError as error:
        raise reading_error(error, path) from error
    except (EOFError, SyntaxError, ValueError, BadZipFile, TokenError) as error:
        raise Damaged(f"{path} is damaged ({flattened(error)}): copy it again, or remove it with "
                        "its folder, which is then made anew") from error
    return array if array.size else np.array(array)


class ArrayParts:
    """An array [n, ...] that lies in ``.npy`` files of equally many rows, the last of fewer.

    Rows are read by slices, by arrays of numbers or of truth values; files are memory-mapped as
    they are first needed.
    """

    def __init__(self, paths: Sequence[Path], rows: int, shape: tuple[int, ...],
                 dtype: np.dtype) -> None:
        """
        Args:
            rows: of every file but the last.
            shape: of the whole.
        """
        self.paths, self.rows, self.shape, self.dtype = paths, rows, shape, dtype
        self._opened: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                inside = [self._part(i)[max(start - i * self.rows, 0):stop - i * self.rows]
                          for i in range(start // self.rows, -(-stop // self.rows))]
                return inside[0] if len(inside) == 1 else np.concatenate(
                    [np.empty((0, *self.shape[1:]), self.dtype), *inside])
            index = np.arange(start, stop, step)
        numbers = np.asarray(index)
        if numbers.dtype == bool:
            numbers = np.flatnonzero(numbers)
        if not numbers.ndim:
            return self._part(int(numbers) // self.rows)[int(numbers) % self.rows]
        found = np.empty((len(numbers), *self.shape[1:]), self.dtype)
        part = numbers // self.rows
        order = np.argsort(part, kind="stable")
        for mine in np.split(order, np.flatnonzero(np.diff(part[order])) + 1):
            if len(mine):
                found[mine] = self._part(int(part[mine[0]]))[numbers[mine] % self.rows]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def _part(self, number: int) -> np.ndarray:
        if number not in self._opened:
            self._opened[number] = read_array(self.paths[number])
        return self._opened[number]


Array = np.ndarray | ArrayParts


def digest(value: Any) -> str:
    """Hex SHA-256 of a JSON-able value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def expanded(place: str) -> Path:
    """A path with ``~`` or ``~user`` written out; one that begins like an unknown user's is a
    file's own name, which :meth:`pathlib.Path.expanduser` raises over."""
    return Path(os.path.expanduser(place))


def cache_folder() -> Path:
    """Where what serves any run is kept: ``$PLANEARLY_CACHE``, or the user's cache folder."""
    base = os.environ.get("PLANEARLY_CACHE")
    return Path(base) if base else (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "planearly")


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    try:
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise reading_error(error, path) from error


def known_digest(path: Path) -> str:
    """As :func:`file_digest`; while its size and time stay, a file is read once by a process."""
    try:
        status = path.stat()
    except OSError as error:
        raise reading_error(error, path) from error
    return _digest_at(path.absolute(), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _digest_at(path: Path, size: int, mtime_ns: int) -> str:
    return file_digest(path)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
