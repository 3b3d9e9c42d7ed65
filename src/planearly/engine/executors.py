"""The executors by their names in a recipe."""

from __future__ import annotations

from pathlib import Path

from planearly.engine.local import Local
from planearly.engine.on_ray import OnRay
from planearly.engine.shared import Shared
from planearly.engine.work import Executor


def of(name: str, processes: int | None, out: Path) -> Executor:
    """The executor of a recipe's ``engine``.

    Args:
        processes: most workers (None: as many as there is room for).
        out: the run folder.
    """
    if name == "ray":
        return OnRay(processes)
    return Shared(processes, out) if name == "shared" else Local(processes)
