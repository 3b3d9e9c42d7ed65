"""Progress of anything a person waits for: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from planearly.units import duration, short

console = Console(stderr=True, highlight=False, soft_wrap=True)
_LOG_SECONDS = 15.0
_LOOK = 1.0


class PlainTable(Table):
    """A table whose cells are shown as they are: a domain may be called ``[bold]``."""

    def add_row(self, *cells: str, style: str = "") -> None:  # type: ignore[override]
        super().add_row(*map(Text, cells), style=style)


class Meter:
    """Counts what is done; knows the rate and the time left."""

    def __init__(self, name: str, total: float | None, unit: str, done: float = 0) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = self._start = done
        self._began = time.monotonic()
        self._logged = self._began
        self._progress: Progress | None = None
        if sys.stderr.isatty():
            self._progress = Progress(
                TextColumn("{task.description}", markup=False), BarColumn(),
                TextColumn("{task.fields[text]}", markup=False), console=console, transient=True,
            )
            self._task = self._progress.add_task(name, total=total, completed=int(done), text="")
            self._progress.start()

    def advance(self, amount: float, note: str = "") -> None:
        """Add ``amount`` units; ``note`` (a loss, a file name) is shown beside the rate."""
        self.done += amount
        now = time.monotonic()
        if self._progress is not None:
            self._progress.update(self._task, completed=self.done, text=self.text(note))
        elif now - self._logged >= _LOG_SECONDS:
            self._logged = now
            console.print(f"{self.name}: {self.text(note)}", markup=False)

    def text(self, note: str = "") -> str:
        elapsed = max(time.monotonic() - self._began, 1e-9)
        rate = (self.done - self._start) / elapsed
        parts = [f"{short(self.done)}"]
        if self.total:
            parts[0] += f"/{short(self.total)}"
        parts[0] += f" {self.unit}"
        parts.append(f"{short(rate)} {self.unit}/s")
        if self.total and rate > 0:
            parts.append(f"{duration((self.total - self.done) / rate)} left")
        if note:
            parts.append(note)
        return ", ".join(parts)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        elapsed = time.monotonic() - self._began
        done = self.done - self._start
        console.print(
            f"{self.name}: {short(done)} {self.unit} in {duration(elapsed)} "
            f"({short(done / max(elapsed, 1e-9))} {self.unit}/s)",
            markup=False,
        )


@contextlib.contextmanager
def progress(name: str, total: float | None, unit: str, done: float = 0) -> Iterator[Meter]:
    """``with progress("embedding", n, "windows") as meter: meter.advance(batch)``.

    ``done`` is where a resumed piece of work starts: shown as done, left out of the rate.
    """
    meter = Meter(name, total, unit, done)
    try:
        yield meter
    finally:
        meter.close()


def say(text: str) -> None:
    """One line for the person at the terminal (standard error; results go to standard output)."""
    # half a surrogate pair, of a file name that is not UTF-8, is no reason to stop
    console.print(text.encode("utf-8", "backslashreplace").decode(), markup=False)


@contextlib.contextmanager
def told_in(log: Path) -> Iterator[None]:
    """Have what this process tells written to a file, for another to tell it (:func:`relayed`)."""
    with open(log, "a", encoding="utf-8") as handle:
        console.file = handle
        try:
            yield
        finally:
            console.file = None  # type: ignore[assignment]  # standard error again


@contextlib.contextmanager
def relayed(folder: Path) -> Iterator[None]:
    """Tell meanwhile what others write to the logs of a folder (:func:`told_in`), line by line."""
    told: dict[Path, int] = {}
    over = threading.Event()

    def look() -> None:
        for log in sorted(folder.glob("*.log")):
            with contextlib.suppress(OSError), open(log, "rb") as handle:
                handle.seek(told.get(log, 0))
                whole, newline, _ = handle.read().rpartition(b"\n")
                told[log] = told.get(log, 0) + len(whole + newline)
                for line in whole.decode("utf-8", "replace").splitlines():
                    say(line)

    def follow() -> None:
        while not over.wait(_LOOK):
            look()

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        over.set()
        follower.join()
        look()
