"""Who computes on a device at the same time, so that its time is booked to those that have it.

Workers of a study, commands that are started in one run folder, processes of ``torchrun`` on one
machine's processor: each says so here while it makes a stage, by a locked file in a folder of the
machine that belongs to the run folder. What passes on the clock is divided by how many have the
device then; who waits for another one's stage has no part in it. Processes of other run folders,
other users and other containers are not known of.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from planearly.files import digest

_LOOK = 1.0
"""Seconds between two looks at who has the device."""

_own: tuple[str, Path, int] | None = None
"""This process's device, file and open lock, while it makes a stage and could say so."""
_depth = 0
_spent, _asked = 0.0, time.monotonic()
_lock = threading.RLock()


@contextlib.contextmanager
def joined(out: Path) -> Iterator[None]:
    """Have the device while a stage of the run folder ``out`` is made."""
    global _own, _depth
    if _depth:  # a stage that another one needs
        yield
        return
    device_time()
    with contextlib.suppress(OSError):  # nobody is told then
        _own = _entered(out)
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(ended,), daemon=True)
    _depth = 1
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        device_time()
        _depth = 0
        left, _own = _own, None
        if left is not None:
            with contextlib.suppress(OSError):
                left[1].unlink(missing_ok=True)
            os.close(left[2])
            with contextlib.suppress(OSError):  # others are in it
                left[1].parent.rmdir()


def size() -> int:
    """How many processes have this one's device now, itself among them."""
    if _own is None:
        return 1
    device, file, _ = _own
    try:
        others = [path for path in file.parent.glob(f"{device}.*") if path != file]
    except OSError:
        return 1
    return 1 + sum(map(_held, others))


def device_time() -> float:
    """Device-seconds of this process until now, from some moment on, as ``time.monotonic`` counts
    those on the clock; while it makes a stage, who has the device is looked at every second."""
    global _spent, _asked
    with _lock:
        now = time.monotonic()
        _spent += (now - _asked) / size()
        _asked = now
        return _spent


def _watch(ended: threading.Event) -> None:
    while not ended.wait(_LOOK):
        device_time()


def _entered(out: Path) -> tuple[str, Path, int]:
    """The device, this process's file among those of its company, and the lock on it."""
    name = f"planearly-{os.getuid()}-{digest(str(out.resolve()))[:16]}"
    place = Path(tempfile.gettempdir()) / name
    device = _device()
    file = place / f"{device}.{secrets.token_hex(8)}"
    while True:
        place.mkdir(mode=0o700, exist_ok=True)
        if place.is_symlink() or place.stat().st_uid != os.getuid():
            raise OSError(f"{place} is somebody else's")
        try:
            lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:  # the last of them has left meanwhile, and removed the folder
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(file)):
                return device, file, lock
        os.close(lock)  # taken for a dead one's by another process, and removed


def _held(file: Path) -> bool:
    """Whether the process of a file lives; a dead one's file is removed."""
    try:
        lock = os.open(file, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    else:
        file.unlink(missing_ok=True)
        return False
    finally:
        os.close(lock)


def _device() -> str:
    """The device's name, the same for all processes of the machine."""
    if not torch.cuda.is_available():
        return "cpu"
    index = (torch.cuda.current_device() if torch.cuda.is_initialized()
             else int(os.environ.get("LOCAL_RANK", "0")))
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    name = names[index].strip() if index < len(names) and names[index] else str(index)
    return f"gpu-{name.replace('/', '-')}"
