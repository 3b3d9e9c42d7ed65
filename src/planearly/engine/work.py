"""Shards, the work that is done to each of them, and the loop that has workers do it.

A shard's function reads files and writes files; what it returns is a small JSON of counts, which
the engine writes as the shard's marker, last. So a finished shard is one whose marker is there with
the right key, whoever made it: it is never made again, and its bytes depend on nothing but the
shard. Functions and shards go to other processes and machines by name and as JSON.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import secrets
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from planearly import files
from planearly.errors import UserError, brief
from planearly.progress import progress, say

Advance = Callable[[float], None]
"""Told how much more of a shard is done, in the work's unit."""

Seen = Callable[[dict[str, Any]], None]

Function = Callable[[dict[str, Any], Advance], dict[str, Any]]
"""Makes the files of one shard from its item, and returns counts; of a module's top level."""

TRIES = 3
"""Times that a shard is tried whose failures are the machine's."""

PAUSE = 1.0
"""Seconds before a shard is tried again."""

_POLL, _LONGEST_POLL = 0.5, 5.0
_PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT,
            errno.EAGAIN, errno.EINTR, errno.EMFILE, errno.ENFILE, errno.ENOLCK}


@dataclass(frozen=True)
class Shard:
    """One piece of a work.

    Attributes:
        name: for people.
        size: in the work's unit.
        item: what the function is given; JSON, paths as they are in the folder of the caller.
        marker: file that holds the counts once the shard is done.
        key: of everything that the shard is made from.
        made: files that have to be there as well.
    """

    name: str
    size: float
    item: dict[str, Any]
    marker: Path
    key: str
    made: tuple[Path, ...] = ()

    def done(self) -> dict[str, Any] | None:
        """The counts, if the shard is done."""
        try:
            found = files.read_object(self.marker, "key")
        except UserError:
            return None
        whole = found["key"] == self.key and all(path.is_file() for path in self.made)
        return found if whole else None


def window_shards(n: int, rows: int, item: Mapping[str, Any], made: Sequence[Any], markers: Path,
                  to: Callable[[int], Sequence[Path]],
                  size: Callable[[int, int], float] | None = None) -> list[Shard]:
    """The shards of ``n`` windows, ``rows`` in each.

    Args:
        item: of every shard; it gains ``start`` and ``stop``, of its windows, and ``to``, the files
            that it writes.
        made: what all of them are made from.
        markers: folder of the markers.
        to: the files of shard i.
        size: of the windows [start, stop), in the work's unit; None: their number.
    """
    shards = []
    for number, start in enumerate(range(0, n, rows)):
        stop, files_of = min(start + rows, n), tuple(to(number))
        shards.append(Shard(
            f"{number} (windows {start} to {stop})",
            size(start, stop) if size else stop - start,
            {**item, "start": start, "stop": stop, "to": [str(file) for file in files_of]},
            markers / f"{number:05d}.json", files.digest([*made, start]), files_of))
    return shards


@dataclass(frozen=True)
class Work:
    """What is done to every one of some shards.

    Attributes:
        name: for people, as ``tokenizing FILES``.
        unit: of the shards' sizes.
        small: of so much in all, starting processes costs more than they save.
        gpu: computed on a GPU where there is one.
        known: whether the sizes say how much there is to do.
        piece: what a shard is called.
        function: marked by :func:`shard_function`.
        folder: that the items' relative paths are relative to.
    """

    name: str
    unit: str
    function: Function
    shards: Sequence[Shard]
    small: float = 0.0
    gpu: bool = False
    known: bool = True
    piece: str = "shard"
    folder: str = field(default_factory=os.getcwd)

    def __post_init__(self) -> None:
        if not getattr(self.function, "of_shards", False):
            raise ValueError(f"{self.function} is not marked as a shard_function")


def shard_function(function: Function) -> Function:
    """Mark a function of a module's top level as one that may be asked for by name."""
    function.of_shards = True  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True)
class Outcome:
    """How an attempt at a shard ended.

    Attributes:
        counts: of the function; None if it failed.
        reason: why it did, as a clause.
        passing: whether the machine was the cause, so that another attempt may end otherwise.
        trace: of an error that nobody foresaw.
    """

    counts: dict[str, Any] | None = None
    reason: str = ""
    passing: bool = False
    trace: str = ""


class Workers(Protocol):
    """A fixed number of workers, none of which ever has more than one shard."""

    def free(self) -> bool:
        """Whether one has nothing to do."""

    def give(self, number: int, shard: Shard) -> None:
        """Have a free one do a shard."""

    def take(self, seconds: float) -> list[tuple[int, Outcome]]:
        """How attempts at shards ended, by their numbers; waits for one, at most so long."""

    def close(self) -> None:
        """End them all, whatever they do."""


class Claims:
    """Which shards this process may do: if it works alone, all of them."""

    alone = True

    def take(self, shard: Shard) -> Any:
        """A context to be left when the attempt has ended; None: another process has the shard."""
        return contextlib.nullcontext()

    def stand(self) -> bool:
        """Whether the work still goes on."""
        return True


class Executor:
    """Carries out works, one after the other.

    Attributes:
        processes: how many workers there are at most (None: as many as there is room for).
        remote: whether workers may be on other machines.
        shares: whether other processes may work in the run folder at the same time.
        spreads: whether it has workers for more than shards (:meth:`spread`).
    """

    remote = shares = spreads = False

    def __init__(self, processes: int | None = None) -> None:
        self.processes = processes

    def check(self) -> None:
        """Refuse to begin where there is nobody to do the work.

        Raises:
            UserError: why.
        """

    def workers(self, work: Work, shards: Sequence[Shard],
                advance: Callable[[int, float], None]) -> Workers:
        """Workers for these shards of a work.

        Args:
            advance: told how much more of a shard is done, by its number.
        """
        raise NotImplementedError

    def map(self, work: Work, seen: Seen = lambda counts: None) -> list[dict[str, Any]]:
        """Do every shard that is not done; the counts of all, in order.

        Args:
            seen: told of the counts of each, those done before included; what it raises ends all.

        Raises:
            UserError: an error of the data, or one of the machine for the third time, with the name
                of the shard.
        """
        return self.carry_out(work, Claims(), seen)

    def spread(self, name: str, function: Function, item: dict[str, Any], folder: Path, most: int,
               workers: int | None = None) -> None:
        """Have workers call a function to its end, which divide by themselves what is to be done.

        Args:
            name: of what they do, for people.
            item: for all of them; each is told beside that how many ``cores`` it has, how many
                workers are ``sharing`` its machine or GPU, and the ``log`` to tell in
                (:func:`planearly.progress.told_in`), which is told here.
            folder: for logs and markers, of this call alone.
            most: more workers would have nothing to do.
            workers: as many (None: one for every GPU, or without any one for every machine).

        Raises:
            UserError: as :meth:`map`.
        """
        raise NotImplementedError

    def help(self) -> bool:
        """Do shards of a work that another process of the run folder leads; False: there is none.

        Raises:
            UserError: as :meth:`map`.
        """
        return False

    def carry_out(self, work: Work, claims: Claims, seen: Seen) -> list[dict[str, Any]]:
        """As :meth:`map`, of the shards that may be claimed, until the work ends."""
        results: dict[int, dict[str, Any]] = {}
        for number, shard in enumerate(work.shards):
            if found := shard.done():
                results[number] = found
                seen(found)
        left = [number for number in range(len(work.shards)) if number not in results]
        total = sum(shard.size for shard in work.shards)
        before = sum(work.shards[number].size for number in results)
        with progress(work.name, total if work.known else None, work.unit, before) as meter:
            advanced: collections.Counter[int] = collections.Counter()

            def advance(number: int, amount: float) -> None:
                advanced[number] += amount  # type: ignore[assignment]
                meter.advance(amount)

            workers = self.workers(work, [work.shards[number] for number in left], advance)
            with contextlib.closing(workers):
                for number, counts, here in done(work, left, workers, claims):
                    if counts is not None:
                        results[number] = counts
                        seen(counts)
                    if not (counts and here):
                        advance(number, (work.shards[number].size if counts else 0.0)
                                - advanced[number])
        return [results[number] for number in sorted(results)]


def done(work: Work, left: Sequence[int], workers: Workers,
         claims: Claims) -> Iterator[tuple[int, dict[str, Any] | None, bool]]:
    """(shard, its counts or None if an attempt failed, whether it was done here), as they end."""
    waiting = collections.deque(left)
    tries: collections.Counter[int] = collections.Counter()
    pause = _POLL
    if waiting and not claims.alone:
        waiting.rotate(secrets.randbelow(len(waiting)))  # not all ask for the same ones
    with contextlib.ExitStack() as all_claims:
        held: dict[int, contextlib.ExitStack] = {}
        while waiting or held:
            for _ in range(len(waiting)):
                if not workers.free():
                    break
                shard = work.shards[number := waiting.popleft()]
                if not claims.alone and (found := shard.done()):
                    yield number, found, False
                    continue
                claim = claims.take(shard)
                if claim is None:
                    waiting.append(number)
                    continue
                held[number] = all_claims.enter_context(contextlib.ExitStack())
                held[number].enter_context(claim)
                if not claims.alone:
                    if found := shard.done():  # by who held it till now
                        held.pop(number).close()
                        yield number, found, False
                        continue
                    if not claims.stand():  # asked after the marker, which goes when the work ends
                        return
                if tries[number]:
                    time.sleep(PAUSE)
                workers.give(number, shard)
                pause = _POLL
            for number, outcome in workers.take(pause):
                held.pop(number).close()
                yield number, outcome.counts, True
                if outcome.counts is None:
                    tries[number] += 1
                    _check(work, work.shards[number], outcome, tries[number])
                    waiting.append(number)
            pause = min(2 * pause, _LONGEST_POLL)  # others have what is left, or it takes long


def _check(work: Work, shard: Shard, failed: Outcome, tries: int) -> None:
    """Stop if a shard is not to be tried again."""
    name = f"{work.name}: {work.piece} {shard.name} failed"
    if failed.trace:
        raise RuntimeError(f"{name}\n{failed.trace}")
    if not failed.passing:
        raise UserError(failed.reason)
    if tries >= TRIES:
        raise UserError(f"{name} {tries} times, the last time as {failed.reason}")
    say(f"{name}, as {failed.reason}: it is tried again")


def attempt(function: Function, shard: Shard, folder: str, advance: Advance) -> Outcome:
    """Do a shard in this process, from the caller's working folder, and write its marker.

    An error that is neither the data's nor the machine's is raised.
    """
    try:
        with contextlib.nullcontext() if os.getcwd() == folder else contextlib.chdir(folder):
            counts = {"key": shard.key, **function(shard.item, advance)}
            files.write_json(shard.marker, counts)
        return Outcome(counts)
    except Exception as error:  # sorted here; what nobody foresaw is raised again at the end
        passing = passes(error)
        if isinstance(error, UserError):
            return Outcome(reason=str(error), passing=passing)
        if isinstance(error, OSError):
            return Outcome(reason=str(files.file_error(error)), passing=passing)
        if passing:
            return Outcome(reason=f"memory ran out ({brief(error)})", passing=True)
        raise


def served(function: Function, shard: Shard, folder: str, advance: Advance) -> Outcome:
    """As :func:`attempt`, for another process: an error that nobody foresaw comes as text."""
    try:
        return attempt(function, shard, folder, advance)
    except Exception:  # told by who gave the shard, with this trace, as an error of the program
        return Outcome(trace=traceback.format_exc())


def passes(error: BaseException | None) -> bool:
    """Whether an error is the machine's and may pass: a full disk, short memory, a lost server.

    An error for the user is the data's unless the machine was its cause.
    """
    told = isinstance(error, UserError)
    while error is not None:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return True
        if isinstance(error, OSError) and (not told or error.errno in _PASSING):
            return True
        error = error.__cause__
    return False
