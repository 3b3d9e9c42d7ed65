"""Workers of this machine: this process itself, or a pool of others."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection

from planearly import processes
from planearly.engine.work import Executor, Outcome, Shard, Work, Workers, attempt, served

ONE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
"""Environment of a worker that is one of as many as there are cores."""


class Local(Executor):
    """A pool of processes, one a core or one a GPU; this one alone where little is to do."""

    def workers(self, work: Work, shards: Sequence[Shard],
                advance: Callable[[int, float], None]) -> Workers:
        gpus = _gpus() if work.gpu else []
        mine = max(cores() // processes.sharing(), 1)  # others have the rest
        many = min(self.processes or len(gpus) or mine, len(gpus) or len(shards), len(shards))
        if many <= 1 or sum(shard.size for shard in shards) <= work.small:
            return Inline(work, advance)
        return Processes(work, [
            ONE_THREAD | ({"CUDA_VISIBLE_DEVICES": gpus[i]} if gpus else {})
            for i in range(many)], advance)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpus() -> list[str]:
    """The GPUs that this process may use, by the names that it knows them by."""
    import torch

    many = torch.cuda.device_count()
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    return mask.split(",")[:many] if mask else [str(gpu) for gpu in range(many)]


class Inline:
    """One worker: this process."""

    def __init__(self, work: Work, advance: Callable[[int, float], None]) -> None:
        self.work, self.advance = work, advance
        self.given: list[tuple[int, Shard]] = []

    def free(self) -> bool:
        return not self.given

    def give(self, number: int, shard: Shard) -> None:
        self.given.append((number, shard))

    def take(self, seconds: float) -> list[tuple[int, Outcome]]:
        if not self.given:
            time.sleep(seconds)
            return []
        number, shard = self.given.pop()
        return [(number, attempt(self.work.function, shard, self.work.folder,
                                 functools.partial(self.advance, number)))]

    def close(self) -> None:
        pass


class Processes:
    """A process for each environment given; one that is killed is replaced."""

    def __init__(self, work: Work, environments: Sequence[dict[str, str]],
                 advance: Callable[[int, float], None]) -> None:
        self.work, self.advance = work, advance
        self.rested = list(environments)
        self.idle: list[_Process] = []
        self.busy: dict[connection.Connection, tuple[int, _Process]] = {}

    def free(self) -> bool:
        return bool(self.idle or self.rested)

    def give(self, number: int, shard: Shard) -> None:
        worker = self.idle.pop() if self.idle else _Process(self.rested.pop())
        self.busy[worker.link] = number, worker
        with contextlib.suppress(OSError):  # it died while idle: told by its closed link
            worker.link.send((self.work.function, shard, self.work.folder))

    def take(self, seconds: float) -> list[tuple[int, Outcome]]:
        ended = []
        if not self.busy:
            time.sleep(seconds)
        for link in connection.wait(self.busy, seconds):
            assert isinstance(link, connection.Connection)
            number, worker = self.busy[link]
            try:
                news = link.recv()
            except (EOFError, OSError):
                ended.append((number, Outcome(reason=worker.death(), passing=True)))
                self.rested.append(worker.environment)
                del self.busy[link]
                continue
            if isinstance(news, float):
                self.advance(number, news)
            else:
                ended.append((number, news))
                self.idle.append(self.busy.pop(link)[1])
        return ended

    def close(self) -> None:
        for worker in [*self.idle, *(worker for _, worker in self.busy.values())]:
            worker.process.terminate()
            worker.process.join()
            worker.link.close()


class _Process:
    """A process that waits for shards at the other end of a link."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        spawn = multiprocessing.get_context("spawn")
        self.link, there = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(there, environment, os.getpid()),
                                     daemon=True)
        self.process.start()
        there.close()  # so that its death closes the link

    def death(self) -> str:
        self.process.join()
        self.link.close()
        code = self.process.exitcode or 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        return f"its process {how} (is memory short?)"


def _serve(link: connection.Connection, environment: dict[str, str], parent: int) -> None:
    """Do the shards that come, until the parent ends."""
    os.environ.update(environment)  # before the libraries that read it are imported
    processes.serve(parent)
    # a lock that a library makes here (tqdm does) is then not left over by a worker that is ended
    multiprocessing.set_start_method("fork", force=True)
    with contextlib.suppress(EOFError):
        while True:
            function, shard, folder = link.recv()
            link.send(served(function, shard, folder, lambda amount: link.send(float(amount))))
