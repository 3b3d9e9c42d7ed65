"""The run folder: stages that are done once, kept with a manifest, and continued when interrupted.

A stage is a folder ``NAME-FINGERPRINT``; the fingerprint covers the stage's settings and the
fingerprints of the stages and the digests of the files it reads. So a changed input makes exactly
the stages that depend on it again, beside the old ones, which are kept; a finished stage is one
whose ``manifest.json`` exists, written last, with the sizes and digests of its files. A stage that
was interrupted finds what it left in its folder and goes on from there. Of several processes the
first looks, and tells the others.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import functools
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, ParamSpec, TypeVar

from planearly import company, parallel
from planearly.data import formats
from planearly.data.documents import Unit
from planearly.engine import executors
from planearly.errors import UserError
from planearly.files import (
    digest,
    file_digest,
    read_json,
    storage_error,
    sweep,
    sweep_beside,
    write_json,
)
from planearly.keys import Recipe
from planearly.plan import sizes
from planearly.progress import say
from planearly.stages import claims, noted
from planearly.stages.claims import Busy
from planearly.stages.manifest import MANIFEST, contents, identity_of, versions
from planearly.stages.mirror import Mirror
from planearly.train import track

P = ParamSpec("P")
R = TypeVar("R")

_TURN, _TURNS = 0.5, 20
"""Seconds until a lock is tried again; times that another's start is waited for."""


class Missing(Exception):
    """The stage is not finished, and this run only looks at what is."""


class Run:
    """A run folder and the recipe that is run in it."""

    def __init__(self, out: Path, recipe: Recipe, *, wait: bool = True, build: bool = True,
                 earlier: bool = False, mirror: Mirror | None = None) -> None:
        """
        Args:
            wait: for a stage that another process makes; else :class:`Busy` is raised.
            build: stages that are not finished; else :class:`Missing` is raised.
            earlier: take stages of an earlier version of their code as finished, to show them.
            mirror: of the store that ``out`` is a copy of.

        ``first`` tells, while the folder is taken, that no other process worked there before.
        """
        self.out, self.mirror = out, mirror
        # a study's cells are settled each by its own tokens
        self.recipe = recipe if recipe.study.grid else sizes.settled(recipe)
        self.wait, self.build, self.earlier = wait, build, earlier
        self.executor = executors.of(recipe.engine, recipe.processes, out)
        self.alone = False
        self.first = False
        self.memory: dict[Any, Any] = {}
        self.made: list[Path] = []
        self.reused: list[Path] = []
        self.used: list[Path] = []

    @contextlib.contextmanager
    def opened(self) -> Iterator[Run]:
        """Take the folder for this process and note the recipe in it.

        Raises:
            UserError: another process works in the folder, it cannot be written, or who is to do
                the data stages cannot be reached.
        """
        parallel.start()
        if parallel.rank() > 0:
            yield self
            return
        self.executor.check()
        if not self.mirror:
            noted.check_place(self.out)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            # experts of a mixture may be trained side by side in one folder
            alone = self.recipe.mixture.expert
            name = ".lock" if alone is None else f".lock-expert{alone}"
            lock = open(self.out / name, "w")  # noqa: SIM115 (held while the run lasts)
        except OSError as error:
            raise noted.unusable(self.out, error) from error
        with lock:
            self.first = self._enter(lock)
            if self.mirror:
                self.mirror.open()
            if self.first:
                if alone is None:  # what runs that were killed have left
                    sweep_beside(self.out)
                    shutil.rmtree(self.out / ".engine", ignore_errors=True)
                noted.note(self.out, self.recipe)
                if self.executor.shares and not claims.take(lock, fcntl.LOCK_SH):
                    raise self._others()
            yield self
            if self.mirror:
                self.mirror.close()

    def _enter(self, lock: IO[str]) -> bool:
        """Take the run folder; False: together with others, of the same recipe.

        Raises:
            UserError: another process works there, and not with this one.
        """
        if claims.take(lock, fcntl.LOCK_EX):
            return True
        for _ in range(_TURNS) if self.executor.shares else ():
            if claims.take(lock, fcntl.LOCK_SH):
                if changed := noted.changed(self.out, self.recipe):
                    raise UserError(
                        f"those that work in {self.out} do so with other settings "
                        f"({', '.join(changed[:6])}): give the same, or choose another --out")
                say(f"others work in {self.out}: the work is divided among all")
                return False
            time.sleep(_TURN)
        raise self._others()

    def _others(self) -> UserError:
        return UserError(f"another planearly works in {self.out}: wait for it, choose another "
                         "--out, or give both 'engine=shared' to divide the work")

    def stage(
        self,
        name: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, Path],
        build: Callable[[Path], dict[str, Any] | None],
        *,
        every_rank: bool = False,
        version: int = 1,
        same: Sequence[Mapping[str, Any]] = (),
        wider: Sequence[Mapping[str, Any]] = (),
        fits: Callable[[Path], bool] | None = None,
    ) -> Path:
        """The folder of a finished stage; built now unless it is there already.

        Args:
            name: place under the run folder, such as ``pretrain/slm``.
            settings: everything else that the result depends on.
            inputs: finished stages that it reads.
            build: fills the folder and returns facts for the manifest; may find there what an
                interrupted call left. Under ``torchrun`` the first process calls it alone unless
                ``every_rank``.
            version: of the code in ``build``: whoever changes its result raises it by hand, and
                stages of an earlier version are made again.
            same: other settings of the same result, such as those that an older layout had; a stage
                that is finished under them is taken, one that was interrupted is gone on with
                (docs/decisions.md, "What makes a stage another stage").
            wider: settings of stages that hold this one's result and more; taken if finished.
            fits: whether what lies in the folder of such a stage may be taken.

        Raises:
            Missing: it is not finished, and this run builds nothing.
            Busy: another process makes it, and this run does not wait.
        """
        identity = identity_of(name, settings, inputs, version)
        fingerprint = digest(identity)
        folder = self._place(name, identity)
        versions_taken = range(version, 0 if self.earlier else version - 1, -1)
        places = [self.folder(name, each, inputs, number)
                  for number in versions_taken for each in (settings, *same, *wider)]

        def taken(number: int) -> bool:
            return not number % (len(same) + len(wider) + 1) or fits is None or fits(places[number])

        if (number := self._first_finished(places, taken)) is not None:
            if number > len(same) + len(wider) and places[number] not in self.reused:
                say(f"{places[number].name} was made by an earlier version of the code, and is "
                    "shown as it is")
            return self._there(places[number])
        self._note_used(folder)
        if not self.build:
            raise Missing(name)
        with self.claimed(folder):
            waited = self._by_first((folder / MANIFEST).exists)
            if waited:
                self._there(folder)  # made by another process while this one waited
            elif parallel.rank() == 0 or every_rank:
                began, had = time.monotonic(), company.device_time()
                started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                if parallel.rank() == 0:
                    self._announce(name, settings, inputs, version)
                    self._take_over(
                        [places[i] for i in range(1, len(same) + 1) if taken(i)], folder)
                    folder.mkdir(parents=True, exist_ok=True)
                    if not self.executor.shares:  # others may still write shards of it
                        sweep(folder)
                if every_rank:
                    parallel.barrier()
                sending = self.mirror.following(folder) if (
                    self.mirror and parallel.rank() == 0) else contextlib.nullcontext()
                with (company.joined(self.out), sending,
                      contextlib.nullcontext() if every_rank else self.by_first_alone(),
                      track.following(self.recipe.track, self.out, self.recipe.to_dict())):
                    facts = build(folder) or {}
                if every_rank:
                    parallel.barrier()  # all have written what they write
                if parallel.rank() == 0:
                    seconds = round(time.monotonic() - began, 3)
                    sweep(folder)  # of what workers that died have left
                    write_json(folder / MANIFEST, {
                        **identity, "fingerprint": fingerprint,
                        "folders": {key: os.path.relpath(path, self.out)
                                    for key, path in sorted(inputs.items())},
                        "versions": versions(), "started": started, "seconds": seconds,
                        "device_seconds": round(company.device_time() - had, 3), **facts,
                        "files": contents(folder),
                    })
                    self.made.append(folder)
                    if self.mirror:
                        self.mirror.keep(folder)
        if not self.alone:
            parallel.barrier()
        return folder

    def folder(self, name: str, settings: Mapping[str, Any], inputs: Mapping[str, Path],
               version: int = 1) -> Path:
        """Where a stage with these settings and inputs lies, finished or not."""
        return self._place(name, identity_of(name, settings, inputs, version))

    def _place(self, name: str, identity: Mapping[str, Any]) -> Path:
        return self.out / f"{name}-{digest(identity)[:8]}"

    def _by_first(self, ask: Callable[[], float]) -> int:
        """A whole number that the first process finds out; what it says holds for all of them."""
        mine = float(ask()) if parallel.rank() == 0 else 0.0
        return int(mine if self.alone else parallel.sum_scalars(mine)[0])

    def _first_finished(self, places: list[Path], taken: Callable[[int], bool]) -> int | None:
        """Number of the first place that holds a finished stage, of those that may be taken."""
        found = self._by_first(lambda: next(
            (i for i, place in enumerate(places)
             if self._is_finished(place) and taken(i)), -1))
        return None if found < 0 else found

    def _is_finished(self, place: Path) -> bool:
        """Whether a stage is finished, here or in the store, from where it is then fetched."""
        if (place / MANIFEST).exists():
            if self.mirror:
                self.mirror.keep(place)
            return True
        if self.mirror is None:
            return False
        with self.alone_among_others(".fetching"):
            return (place / MANIFEST).exists() or self.mirror.take(place)

    def _announce(self, name: str, settings: Mapping[str, Any], inputs: Mapping[str, Path],
                  version: int) -> None:
        """Say that a stage is made, and by which version of its code if that has changed."""
        say(f"── {name}")
        older = [self.folder(name, settings, inputs, number) for number in range(1, version)]
        for place in older:
            if (place / MANIFEST).exists():
                say(f"  the code that makes {name} has changed since (version {version}): it is "
                    f"made again beside {place.name}, which is kept")

    def _take_over(self, others: list[Path], folder: Path) -> None:
        """Go on with what an interrupted stage of the same result left, under this one's name."""
        for other in others:
            if folder.exists() or not other.is_dir():
                continue
            with contextlib.suppress(Busy), self.claimed(other, wait=False):
                os.rename(other, folder)
                say(f"  goes on with what was interrupted in {other.name}")

    @contextlib.contextmanager
    def by_first_alone(self) -> Iterator[None]:
        """While the first process works alone: it does not wait for what the others say."""
        before, self.alone = self.alone, True
        try:
            yield
        finally:
            self.alone = before

    def _note_used(self, folder: Path) -> None:
        if folder not in self.used:
            self.used.append(folder)

    def _there(self, folder: Path) -> Path:
        self._note_used(folder)
        if folder not in self.made and folder not in self.reused:
            self.reused.append(folder)
        return folder

    @contextlib.contextmanager
    def claimed(self, folder: Path, wait: bool = True) -> Iterator[None]:
        """Hold a folder of the run for this process (and those ``torchrun`` started with it).

        Args:
            wait: for another process that holds it, if this run does at all.

        Raises:
            Busy: another process holds it, and this one does not wait.
        """
        if parallel.rank() > 0:  # the first process takes it for all, who wait for what it says
            yield
            return
        locks = self.out / ".locks"
        try:
            locks.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, locks) from error
        with open(locks / folder.relative_to(self.out).as_posix().replace("/", "--"), "w") as lock:
            if not claims.take(lock, fcntl.LOCK_EX):
                # of several processes one cannot turn away alone
                if not wait or not (self.wait or parallel.world() > 1):
                    raise Busy(folder.name)
                say(f"another process makes {folder.name}: waiting for it")
                while not claims.take(lock, fcntl.LOCK_EX):
                    self.pause(_TURN)
            yield

    def pause(self, seconds: float) -> None:
        """Do shards of what another process leads, or where there are none, wait."""
        if not self.executor.help():
            time.sleep(seconds)

    def divided(self, tasks: Sequence[Callable[[], R]]) -> list[R]:
        """What the tasks return, in order.

        Where other processes work in the folder, a task that needs a stage which another one makes
        just now is put off while there are other tasks: so they divide the stages.

        Raises:
            Busy: nothing but such tasks is left, and this run does not wait.
        """
        waits = self.wait
        if waits and not self.executor.shares:
            return [task() for task in tasks]

        def pause(busy: Busy) -> None:
            if not waits:
                raise busy
            self.pause(_TURN)

        self.wait = False
        try:
            results = dict(claims.in_turns(tasks, pause))
        finally:
            self.wait = waits
        return [results[number] for number in range(len(tasks))]

    def unit_digests(self, units: Sequence[Unit]) -> list[str]:
        """What each input is: a file's content, the URL and version of a store's file, or the name
        and part of a hub dataset.

        The same bytes are other documents as a text than as records. Of texts only those that could
        be either say their kind, so that what was made from others is found as before.
        """
        local = [Path(unit.path) for unit in units if unit.kind != "hub" and not unit.stored]
        content = dict(zip(local, self.file_digests(local), strict=True))

        def also(unit: Unit) -> Iterator[str]:
            yield from filter(None, (unit.revision, unit.source_field))
            if Path(unit.path) in content and formats.reads_otherwise(unit):
                yield unit.kind

        return [digest([content.get(Path(unit.path), unit.path), unit.shard, repr(unit.keep),
                        *also(unit)]) for unit in units]

    def file_digests(self, paths: list[Path]) -> list[str]:
        """SHA-256 of each file; remembered in the run folder by path, size and time of change.

        Of several processes the first reads the files.
        """
        if parallel.rank() > 0 and not self.alone:
            parallel.barrier()
        found = self._file_digests(paths)
        if parallel.rank() == 0 and not self.alone:
            parallel.barrier()
        return found

    def _file_digests(self, paths: list[Path]) -> list[str]:
        with self.alone_among_others(".digests"):
            return self._noted_digests(paths)

    @contextlib.contextmanager
    def alone_among_others(self, name: str) -> Iterator[None]:
        """Where several processes share the run folder, one after the other."""
        with self.claimed(self.out / name) if self.executor.shares else contextlib.nullcontext():
            yield

    def _noted_digests(self, paths: list[Path]) -> list[str]:
        cache_path = self.out / ".digests.json"
        cache: dict[str, str] = {}
        with contextlib.suppress(UserError, TypeError, ValueError):  # worked out again, if damaged
            cache |= read_json(cache_path) if cache_path.exists() else {}
        known = len(cache)
        digests = []
        for path in paths:
            status = path.stat()
            place = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
            if place not in cache:
                cache[place] = file_digest(path)
            digests.append(cache[place])
        if len(cache) > known and parallel.rank() == 0:
            write_json(cache_path, cache)
        return digests


def once(function: Callable[P, R]) -> Callable[P, R]:
    """Remember a stage function's result for its run (its first argument) and other arguments."""

    @functools.wraps(function)
    def remembered(*args: P.args, **kwargs: P.kwargs) -> R:
        run, *rest = args
        assert isinstance(run, Run)
        key = (function.__module__, function.__qualname__, *rest, *sorted(kwargs.items()))
        if key not in run.memory:
            run.memory[key] = function(*args, **kwargs)
        return run.memory[key]

    return remembered
