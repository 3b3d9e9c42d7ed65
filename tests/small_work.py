"""Work small enough for a test, whose shards fail as they are told to."""

import errno
import os
import signal
import time
from pathlib import Path

import pytest

from planearly import files
from planearly.engine.shared import Shared
from planearly.engine.work import Shard, Work, shard_function
from planearly.errors import UserError
from planearly.progress import say, told_in


@shard_function
def double(item, advance):
    """Write a number's double; every start and end goes to a log, with the process's number."""
    out, number = Path(item["out"]), item["number"]
    _log(out, f"{os.getpid()} begin {number}")
    time.sleep(float(os.environ.get("SMALL_WORK_SECONDS", "0")))
    advance(0.5)
    trouble = item["trouble"]
    if trouble and not (item["once"] and _tried(out / f"tried-{number}")):
        TROUBLES[trouble](out / f"{number}.txt")
    with files.atomic_write(out / f"{number}.txt", "w") as handle:
        handle.write(str(2 * number))
    _log(out, f"{os.getpid()} end {number}")
    return {"double": 2 * number}


@shard_function
def serve(item, advance):
    """Tell and log that a worker is here; as troubled as :func:`double`, by its number."""
    out, number = Path(item["out"]), int(Path(item["log"]).stem)
    with told_in(Path(item["log"])):
        _log(out, f"{os.getpid()} begin {number}")
        say(f"worker {number} is here, with {item['cores']} core")
        trouble = item["troubles"].get(number)
        if trouble and not (item["once"] and _tried(out / f"tried-{number}")):
            TROUBLES[trouble](out / f"{number}.txt")
        _log(out, f"{os.getpid()} end {number}")
    return {}


def _tried(flag: Path) -> bool:
    if flag.exists():
        return True
    flag.touch()
    return False


def _log(out: Path, line: str) -> None:
    with open(out / "log", "a") as handle:
        handle.write(line + "\n")


def _killed(path: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _full_disk(path: Path) -> None:
    with files.atomic_write(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))


def _lost_file(path: Path) -> None:
    path.with_name("nowhere").read_bytes()


def _no_memory(path: Path) -> None:
    raise MemoryError("cannot allocate 9 GB")


def _bad_data(path: Path) -> None:
    raise UserError("line 7 holds no text: mend it")


def _held(path: Path) -> None:
    while not path.with_name("go").exists():
        time.sleep(0.01)


def _slip(path: Path) -> None:
    raise KeyError("a slip of the pen")


TROUBLES = {"killed": _killed, "full disk": _full_disk, "lost file": _lost_file,
            "no memory": _no_memory, "bad data": _bad_data, "slip": _slip,
            "held": _held}


def work(out: Path, troubles: dict[int, str] | None = None, once: bool = True,
         small: float = 0, n: int = 8) -> Work:
    """Doubling the numbers up to ``n``, with troubles at some of them."""
    out.mkdir(parents=True, exist_ok=True)
    return Work("doubling", "numbers", double, [
        Shard(f"{number}", 1.0, {"number": number, "out": str(out), "once": once,
                                 "trouble": (troubles or {}).get(number)},
              out / "parts" / f"{number}.json", f"key {number}", (out / f"{number}.txt",))
        for number in range(n)], small=small)


def help_from_elsewhere(folder: Path, seconds: float) -> None:
    """Help with the works of a run folder until there are none, from another current folder."""
    os.chdir("/")
    os.environ["SMALL_WORK_SECONDS"] = str(seconds)
    executor = Shared(1, folder)
    while not executor.help():
        time.sleep(0.01)


def log(out: Path) -> list[tuple[int, str, int]]:
    """(process, begin or end, shard) of everything that was done, in order."""
    lines = (line.split() for line in (out / "log").read_text().splitlines())
    return [(int(process), what, int(number)) for process, what, number in lines]


def made(out: Path) -> dict[str, bytes]:
    """What the work left, but its notes of who did what when."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*"))
            if path.is_file() and not path.name.startswith(("log", "go", "tried-"))
            and path.suffix != ".tmp"}  # of workers that were killed


def until(true, seconds: float = 60.0) -> None:
    """Wait for something to become true."""
    for _ in range(int(100 * seconds)):
        if true():
            return
        time.sleep(0.01)
    pytest.fail(f"it did not come to that in {seconds} seconds")


def children(pid: int) -> list[int]:
    """Processes that a process has started, where there is ``/proc``."""
    return [int(child) for child in
            Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    """Whether a process has not ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")  # one that nobody waits for has ended too
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
