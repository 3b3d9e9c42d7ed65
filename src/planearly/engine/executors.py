"""The executors by their names in a recipe."""

from __future__ import annotations

from planearly.engine.local import Local
from planearly.engine.work import Executor


def of(name: str, processes: int | None) -> Executor:
    """The executor of a recipe's ``engine``, with at most so many workers."""
    assert name == "local"
    return Local(processes)
