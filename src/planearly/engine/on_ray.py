"""Workers that Ray places on the machines of its cluster: files in, files out, counts back.

A fixed number of actors, each of which has one shard at a time; what goes through Ray is a shard's
name, paths and counts. Trainings are made by actors too, which take them by locks in the run
folder, as any processes do that share it. The files lie where all machines see them, as with any
executor. The cluster is the one at ``RAY_ADDRESS``, or one of this machine, started for the run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import planearly
from planearly.engine.local import ONE_THREAD, Inline, cores
from planearly.engine.work import (
    Claims,
    Executor,
    Function,
    Outcome,
    Shard,
    Work,
    Workers,
    done,
    served,
)
from planearly.errors import UserError, brief
from planearly.progress import relayed, say

_FEWEST_BYTES = 80 << 20  # of Ray's object store, which holds nothing
_HERE = "local"  # a cluster of this machine, started for the run
_REACHED = 5.0  # seconds in which the cluster has to answer
_SEEN = 30.0  # seconds in which a file of another machine has to be seen here
_TOLD = 30.0  # seconds without any worker after which that is told
_FAILED_STARTS = 3


class OnRay(Executor):
    """Actors of a Ray cluster; this process alone where little is to do."""

    remote = spreads = True

    def check(self) -> None:
        if find_spec("ray") is None:
            raise _absent()
        _reached(_address())
        if _address() == "auto":
            _connected(self.processes)  # Ray alone knows where to look

    def workers(self, work: Work, shards: Sequence[Shard],
                advance: Callable[[int, float], None]) -> Workers:
        if len(shards) <= 1 or sum(shard.size for shard in shards) <= work.small:
            return Inline(work, advance)
        ray = _connected(self.processes)
        found = ray.cluster_resources()
        gpu = work.gpu and found.get("GPU", 0) >= 1
        many = self.processes or int(found.get("GPU" if gpu else "CPU", 0)) or 1
        return _Actors(ray, work, min(many, len(shards)), advance, gpus=int(gpu))

    def spread(self, name: str, function: Function, item: dict[str, Any], folder: Path, most: int,
               workers: int | None = None) -> None:
        ray = _connected(self.processes)
        many, cores, sharing, gpus = places(
            [node["Resources"] for node in ray.nodes() if node["Alive"]], most, workers)
        start = secrets.token_hex(8)
        work = Work(name, "workers", function, [
            Shard(f"{n} of {many}", 1.0, {**item, "cores": cores, "sharing": sharing,
                                          "log": str(folder / f"{n}.log")},
                  folder / f"{n}.json", start) for n in range(1, many + 1)], piece="worker")
        say(f"{name} by {many} worker{'s' * (many > 1)} of the Ray cluster")
        actors = _Actors(ray, work, many, lambda number, amount: None, cores, gpus, {})
        with contextlib.closing(actors), relayed(folder):
            for _ in done(work, range(many), actors, Claims()):
                pass


def places(nodes: Sequence[Mapping[str, float]], most: int,
           workers: int | None = None) -> tuple[int, int, int, float]:
    """How many workers a cluster has for trainings, and for each of them cores, how many workers
    are on its GPU or machine, and its share of a GPU.

    Args:
        nodes: ``CPU`` and ``GPU`` of each machine.
        most, workers: as of :meth:`Executor.spread`.
    """
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    if any(gpus):
        many = min(workers or sum(gpus), most)
        sharing = -(-many // sum(gpus))
        cores = min(cpu // (gpu * sharing) for cpu, gpu in zip(cpus, gpus, strict=True) if gpu)
        return many, cores, sharing, 1 / sharing
    many = min(workers or sum(cpu > 0 for cpu in cpus) or 1, most)
    cores = next((cores for cores in range(sum(cpus) // many, 0, -1)
                  if sum(cpu // cores for cpu in cpus) >= many), 1)
    return many, cores, min(max(max(cpus, default=0) // cores, 1), many), 0.0


def _connected(processes: int | None) -> Any:
    """The package, connected to a cluster.

    Raises:
        UserError: it is not installed, or the cluster does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise _absent() from error
    if ray.is_initialized():
        return ray
    address = _address()
    _reached(address)
    before = signal.getsignal(signal.SIGTERM)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if address == _HERE:
            many = processes or cores()
            say(f"no Ray cluster is named by RAY_ADDRESS: one of this machine is started for this "
                f"command ({many} core{'s' * (many > 1)}), and ends with it")
            ray.init("local", num_cpus=many, include_dashboard=False,
                     object_store_memory=_FEWEST_BYTES, **quiet)
        else:
            ray.init(address, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreachable(address, error) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray has put one of its own there
    return ray


def _address() -> str:
    return os.environ.get("RAY_ADDRESS", _HERE)


def _reached(address: str) -> None:
    """Refuse an address at which nobody answers; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdigit():
            socket.create_connection((host, int(port)), _REACHED).close()
        elif address not in (_HERE, "auto"):
            raise ValueError("not of the form HOST:PORT")
    except (OSError, ValueError) as error:
        raise _unreachable(address, error) from error


def _absent() -> UserError:
    return UserError("engine=ray needs the package 'ray': pip install planearly[ray]")


def _unreachable(address: str, error: Exception) -> UserError:
    return UserError(f"no Ray cluster can be reached at RAY_ADDRESS={address} ({brief(error)}):"
                     " give HOST:PORT of its head, or unset it to start one here")


class _Doer:
    """An actor: does shards, one after the other."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        os.environ.update(environment)  # before the libraries that read it are imported

    def ready(self, folder: str) -> tuple[str, str, bool]:
        """The version of planearly there, the machine's name, and whether it sees a folder."""
        return planearly.__version__, os.uname().nodename, os.path.isdir(folder)

    def do(self, function: Function, shard: Shard, folder: str) -> Outcome:
        return served(function, shard, folder, lambda amount: None)


class _Actors:
    """A fixed number of actors; one that dies is replaced as soon as the cluster has room."""

    def __init__(self, ray: Any, work: Work, many: int, advance: Callable[[int, float], None],
                 cores: int = 1, gpus: float = 0,
                 environment: Mapping[str, str] = ONE_THREAD) -> None:
        self.ray, self.work, self.advance, self.environment = ray, work, advance, environment
        self.actor = ray.remote(_Doer).options(
            num_cpus=cores, num_gpus=gpus, max_restarts=0, max_task_retries=0,
            scheduling_strategy="SPREAD")
        self.idle: list[Any] = []
        self.coming: dict[Any, Any] = {}
        self.busy: dict[Any, tuple[int, Shard, Any]] = {}
        self.failed_starts, self.since = 0, time.monotonic()
        for _ in range(many):
            self._start()

    def _start(self) -> None:
        actor = self.actor.remote(self.environment)
        self.coming[actor.ready.remote(self.work.folder)] = actor

    def free(self) -> bool:
        return bool(self.idle)

    def give(self, number: int, shard: Shard) -> None:
        actor = self.idle.pop()
        ref = actor.do.remote(self.work.function, shard, self.work.folder)
        self.busy[ref] = number, shard, actor

    def take(self, seconds: float) -> list[tuple[int, Outcome]]:
        if not self.busy and not self.idle and time.monotonic() - self.since > _TOLD:
            say(f"waiting for Ray to start a worker: its cluster has {self._room()}")
            self.since = time.monotonic()
        refs = [*self.busy, *self.coming]
        ready, _ = self.ray.wait(refs, num_returns=1, timeout=seconds) if refs else ([], [])
        ended = []
        for ref in ready:
            if ref in self.coming:
                self._came(ref)
                continue
            number, shard, actor = self.busy.pop(ref)
            try:
                outcome = self.ray.get(ref)
            except self.ray.exceptions.RayError as error:
                outcome = Outcome(passing=True, reason=f"its Ray worker died ({brief(error)}; is "
                                                       "memory short?)")
                self._start()
            else:
                self.idle.append(actor)
            if outcome.counts is not None:
                outcome = _seen(shard, outcome)
                self.advance(number, shard.size)
            ended.append((number, outcome))
        return ended

    def _came(self, ref: Any) -> None:
        """A new actor is ready, or did not start."""
        actor = self.coming.pop(ref)
        try:
            version, machine, sees = self.ray.get(ref)
        except self.ray.exceptions.RayError as error:
            self.failed_starts += 1
            if self.failed_starts >= _FAILED_STARTS:
                raise UserError(f"Ray's workers do not start ({brief(error)}): planearly "
                                f"{planearly.__version__} has to be installed where they run, as "
                                "here") from error
            return self._start()
        if version != planearly.__version__:
            raise UserError(f"Ray's worker on {machine} has planearly {version}, and this is "
                            f"{planearly.__version__}: install the same everywhere")
        if not sees:
            raise UserError(f"Ray's worker on {machine} does not see {self.work.folder}: start "
                            "planearly in a folder that all machines share")
        self.failed_starts, self.since = 0, time.monotonic()
        self.idle.append(actor)
        return None

    def _room(self) -> str:
        found = self.ray.available_resources()
        return ", ".join(f"{found.get(name, 0):g} {name}s" for name in ("CPU", "GPU")) + " free"

    def close(self) -> None:
        for actor in [*self.idle, *self.coming.values(), *(a for _, _, a in self.busy.values())]:
            with contextlib.suppress(self.ray.exceptions.RayError):
                self.ray.kill(actor)


def _seen(shard: Shard, outcome: Outcome) -> Outcome:
    """The outcome, once what was written is seen on this machine as well."""
    deadline = time.monotonic() + _SEEN
    while shard.done() is None:
        if time.monotonic() > deadline:
            return Outcome(reason=f"what a Ray worker wrote to {Path(shard.marker).parent} is not "
                                  "seen here: choose an --out on a file system that all machines "
                                  "share")
        time.sleep(0.1)
    return outcome
