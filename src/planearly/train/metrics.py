"""``metrics.jsonl``: one JSON object a line, cut back to the checkpoint when a run resumes; and, by
:mod:`planearly.train.track`, what else is told of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from planearly.files import atomic_write
from planearly.progress import say
from planearly.train import track


class Metrics:
    """Appends records that carry a ``step``."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [r for r in read(path) if r["step"] <= resume_step]
        with atomic_write(path, "w") as handle:
            handle.writelines(json.dumps(record) + "\n" for record in kept)
        self._handle = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self._tracker = track.tracker(path.parent)
        for record in kept:
            self._track(record)

    def write(self, record: dict[str, Any]) -> None:
        self._handle.write(json.dumps(record, allow_nan=False) + "\n")
        self._handle.flush()
        self._track(record)

    def close(self) -> None:
        self._handle.close()
        if self._tracker:
            self._tracker.close()

    def _track(self, record: dict[str, Any]) -> None:
        if self._tracker:
            self._tracker.log(record)


def read(path: Path) -> list[dict[str, Any]]:
    """Whole records of a metrics file; a last line cut by a kill is left out, and damaged ones are,
    with a warning: a training has lost nothing by them."""
    if not path.exists():
        return []
    records, damaged = [], 0
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
            else:
                damaged += 1
    if damaged:
        say(f"warning: {damaged} line{'s' * (damaged > 1)} of {path} are damaged and left out")
    return records
