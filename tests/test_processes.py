"""What becomes of processes when a signal ends one of them, with real ones."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from planearly import processes
from small_work import alive, children, until

Start = Callable[..., subprocess.Popen[str]]
ORDERLY = """
import os, signal, sys, time
from planearly.processes import Stopped, ending_in_order
try:
    with ending_in_order():
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            for again in range({again}):  # must not interrupt the ending
                signal.raise_signal(signal.SIGTERM)
            print("ended in order", flush=True)
except Stopped as stop:
    sys.exit(stop.status)
"""
FAMILY = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())])
time.sleep(60)
"""
POOL = """
import functools, os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from planearly import processes
if __name__ == "__main__":
    with ProcessPoolExecutor(2, get_context("spawn"), processes.serve, (os.getpid(),)) as pool:
        say = functools.partial(print, flush=True)
        list(pool.map(say, [os.getpid()] * 2))
        list(pool.map(time.sleep, [600, 600]))
"""
CHILD = """
import os, signal, sys, time
from planearly import processes
{before}
processes.serve(int(sys.argv[1]))
print(os.getpid(), flush=True)
while True:
    time.sleep(60)
"""


@pytest.fixture
def start() -> Iterator[Start]:
    """Start Python with a script, or a shell, as a process group that is gone after the test."""
    started: list[subprocess.Popen[str]] = []

    def one(*words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, text=True, start_new_session=True,
            # as from a terminal, though the tests themselves may run under nohup
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
        started.append(process)
        return process

    yield one
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_in_order_once(start: Start, number: signal.Signals) -> None:
    process = start(sys.executable, "-c", ORDERLY.format(again=1))
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=30)[0] == "ended in order\n"
    assert process.returncode == 128 + number


@pytest.mark.parametrize("before, after, number", [
    ("trap '' HUP; exec", "", signal.SIGHUP), ("", "& echo; wait", signal.SIGINT)])
def test_what_the_shell_ignores_stays_ignored(start: Start, tmp_path: Path, before: str, after: str,
                                              number: signal.Signals) -> None:
    (tmp_path / "go.py").write_text(ORDERLY.format(again=0))
    shell = start("bash", "-c", f"{before} '{sys.executable}' '{tmp_path / 'go.py'}' {after}")
    assert shell.stdout
    assert "ready\n" in iter(shell.stdout.readline, "")
    python = children(shell.pid)[0] if after else shell.pid
    os.kill(python, number)
    time.sleep(0.3)
    assert alive(python)
    os.kill(python, signal.SIGTERM)
    assert shell.communicate(timeout=30)[0] == "ended in order\n"


def test_an_interrupt_of_our_own_stays_one() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, processes.ending_in_order():
        raise KeyboardInterrupt
    assert not isinstance(caught.value, processes.Stopped)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("before", [
    "", "signal.signal(signal.SIGTERM, lambda *_: None); processes._GRACE = 0.5"])
def test_a_worker_ends_with_its_killed_parent(start: Start, before: str) -> None:
    parent = start(sys.executable, "-c", FAMILY, CHILD.format(before=before))
    assert parent.stdout
    child = int(parent.stdout.readline())
    os.kill(child, signal.SIGINT)  # is the parent's business
    time.sleep(0.2)
    assert alive(child)
    parent.kill()
    until(lambda: not alive(child))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_a_pool_ends_with_its_killed_parent(start: Start, tmp_path: Path) -> None:
    (tmp_path / "go.py").write_text(POOL)
    parent = start(sys.executable, str(tmp_path / "go.py"))
    assert parent.stdout and parent.stdout.readline() == f"{parent.pid}\n"
    workers = children(parent.pid)
    assert len(workers) >= 2
    parent.kill()
    until(lambda: not any(map(alive, workers)))


def test_who_does_not_end_in_order_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_GRACE", 0.5)
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True)\n"
    started = [subprocess.Popen([sys.executable, "-c", f"{said}print(flush=True); time.sleep(60)"],
                                stdout=subprocess.PIPE)
               for said in (deaf, "import time\n")]
    for process in started:
        assert process.stdout and process.stdout.readline()
    processes.end(started)
    assert [process.returncode for process in started] == [-signal.SIGKILL, -signal.SIGTERM]
    for process in started:
        process.communicate()
