"""Several planearly, of one machine or many, in one run folder: they divide every work.

Whoever leads a work (the process that makes the stage) publishes it as a file of the run folder;
the others, who wait for that stage, read it there. Each claims shards by locks that end with the
process that holds them (``flock``), so the shards of one that died are taken over. A shard that two
did after all, where a file system's locks fail, is written twice with the same bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import planearly
from planearly import files
from planearly.engine.local import Local
from planearly.engine.work import Claims, Function, Seen, Shard, Work
from planearly.errors import UserError


class Shared(Local):
    """As local, of the shards that no other process of the run folder has claimed."""

    remote = shares = True

    def __init__(self, processes: int | None, out: Path) -> None:
        super().__init__(processes)
        self.folder = out / ".engine"
        self._helped: set[tuple[str, int]] = set()

    def map(self, work: Work, seen: Seen = lambda counts: None) -> list[dict[str, Any]]:
        if sum(shard.done() is None for shard in work.shards) <= 1:
            return super().map(work, seen)
        claims = _FileClaims(self.folder / files.digest([shard.key for shard in work.shards])[:16])
        claims.locks.mkdir(parents=True, exist_ok=True)
        files.write_json(claims.published, _to_json(work))
        try:
            return self.carry_out(work, claims, seen)
        finally:
            claims.published.unlink(missing_ok=True)
            shutil.rmtree(claims.locks, ignore_errors=True)

    def help(self) -> bool:
        for published in sorted(self.folder.glob("*.json")):
            with contextlib.suppress(FileNotFoundError):  # it ended meanwhile
                since = (published.stem, published.stat().st_mtime_ns)
                if since in self._helped:
                    continue
                work = _from_json(published.read_bytes(), published)
                self._helped.add(since)
                self.carry_out(work, _FileClaims(published.with_suffix("")), lambda counts: None)
                return True
        return False


class _FileClaims(Claims):
    """Claims by locked files beside the published work."""

    alone = False

    def __init__(self, locks: Path) -> None:
        self.locks, self.published = locks, locks.with_suffix(".json")

    def take(self, shard: Shard) -> Any:
        lock = open(self.locks / files.digest(shard.key)[:16], "w")  # noqa: SIM115 (the claim)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        return lock

    def stand(self) -> bool:
        return self.published.exists()


def _to_json(work: Work) -> dict[str, Any]:
    fields = {name: getattr(work, name)
              for name in ("name", "unit", "small", "gpu", "known", "folder")}
    return {"planearly": planearly.__version__, **fields,
            "function": f"{work.function.__module__}:{work.function.__qualname__}",
            "shards": [asdict(shard) for shard in work.shards]}


def _from_json(text: bytes, published: Path) -> Work:
    """A work as it was published.

    Raises:
        UserError: by another version of planearly, or not by planearly at all.
    """
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{published} does not say what work there is: remove the file")
    if values.pop("planearly", None) != planearly.__version__:
        raise UserError(f"{published.parent.parent} is worked in by another version of planearly "
                        f"than this one, {planearly.__version__}: install the same everywhere")
    here = Path(values["folder"])
    shards = [Shard(**shard | {"marker": here / shard["marker"],
                               "made": tuple(here / path for path in shard["made"])})
              for shard in values["shards"]]
    return Work(**values | {"function": _function(values["function"], published),
                            "shards": shards})


def _function(name: str, published: Path) -> Function:
    module, _, attribute = name.partition(":")
    known = module in sys.modules or module.startswith(f"{planearly.__name__}.")
    found = getattr(importlib.import_module(module), attribute, None) if known else None
    if not getattr(found, "of_shards", False):
        raise UserError(f"{published} names '{name}', which does no work on shards: remove the "
                        "file")
    return found  # type: ignore[return-value]
