"""Who does what, of several processes in one run folder: locks, and tasks that are put off."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TypeVar

from planearly.errors import UserError

R = TypeVar("R")


class Busy(Exception):
    """Another process makes the stage just now."""


def take(lock: IO[str], kind: int) -> bool:
    """Whether a lock (``fcntl.LOCK_EX``, ``LOCK_SH``) could be taken at once; it ends with the file
    or the process.

    Raises:
        UserError: the file system has no locks.
    """
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(f"files of {Path(lock.name).parent} cannot be locked ({error.strerror}): "
                        "choose an --out on a file system with flock (docs/scale.md)") from error
    return True


def in_turns(tasks: Sequence[Callable[[], R]],
             pause: Callable[[Busy], None]) -> Iterator[tuple[int, R]]:
    """What the tasks return, with their numbers, as they end.

    A task that needs what another process makes just now is put off until the others were tried.

    Args:
        pause: called when nothing but such tasks is left; may raise.
    """
    todo = list(enumerate(tasks))
    while todo:
        later: list[tuple[int, Callable[[], R]]] = []
        for number, task in todo:
            try:
                made = task()
            except Busy as stage:
                later.append((number, task))
                busy = stage
            else:
                yield number, made
        if len(later) == len(todo):
            pause(busy)
        todo = later
