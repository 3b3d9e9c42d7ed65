"""Who computes on a device at the same time, so that its time is booked to those that have it.

Workers of a study, commands that are started in one run folder, processes of ``torchrun`` on one
machine's processor: each says so here while it makes a stage. What passes on the clock is divided
by how many have the device then; who waits for another one's stage has no part in it. Processes of
other run folders are not known of.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from planearly.files import digest

_own: Path | None = None
"""This process's file among those of its company; None: it makes no stage."""
_spent, _asked = 0.0, time.monotonic()


@contextlib.contextmanager
def joined(out: Path) -> Iterator[None]:
    """Have the device while a stage of the run folder ``out`` is made."""
    global _own
    if _own is not None:  # a stage that another one needs
        yield
        return
    device_time()
    user = os.getuid() if hasattr(os, "getuid") else ""
    place = Path(tempfile.gettempdir()) / f"planearly-{user}-{digest(str(out.resolve()))[:16]}"
    with contextlib.suppress(OSError):  # nobody is told then
        place.mkdir(mode=0o700, exist_ok=True)
        file = place / f"{_device()}.{os.getpid()}"
        file.touch()
        _own = file
    try:
        yield
    finally:
        device_time()
        if _own is not None:
            _own.unlink(missing_ok=True)
            _own = None
            with contextlib.suppress(OSError):  # others are in it
                place.rmdir()


def size() -> int:
    """How many processes have this one's device now, itself among them."""
    if _own is None:
        return 1
    device, pid = _own.name.rsplit(".", 1)
    try:
        names = os.listdir(_own.parent)
    except OSError:
        return 1
    others = (name.rsplit(".", 1) for name in names)
    return 1 + sum(of == device and each != pid and _lives(int(each)) for of, each in others)


def device_time() -> float:
    """Device-seconds of this process until now, from some moment on, as ``time.monotonic`` counts
    those on the clock. What has passed since this was last asked is divided by how many have the
    device now."""
    global _spent, _asked
    now = time.monotonic()
    _spent += (now - _asked) / size()
    _asked = now
    return _spent


def _device() -> str:
    """The device's name, the same for all processes of the machine."""
    if not torch.cuda.is_available():
        return "cpu"
    index = (torch.cuda.current_device() if torch.cuda.is_initialized()
             else int(os.environ.get("LOCAL_RANK", "0")))
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    name = mask.split(",")[index].strip() if mask else str(index)
    return f"gpu-{name.replace('/', '-')}"


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
