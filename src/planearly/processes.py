"""How processes end, in order when a signal says so and with the one that started them; and how
many share a device."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType

SHARING = "PLANEARLY_SHARING"
"""Environment variable: how many processes share this one's GPU, or the machine's processor and
memory."""
_LOOK = 1.0
"""Seconds between two looks at whether the parent is still there."""
_GRACE = 8.0
"""Seconds that a process has to end in order: schedulers and containers kill after ten or more."""


class Stopped(KeyboardInterrupt):
    """A signal has ended the work as an interrupt does.

    Attributes:
        status: of the process, as a shell tells it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


@contextlib.contextmanager
def ending_in_order() -> Iterator[None]:
    """Have SIGTERM and SIGHUP interrupt what is done here as Ctrl-C does.

    So files are closed and workers ended. A signal that the process was started to ignore
    (``nohup``) stays ignored. Processes of ``torchrun`` end at once, as they do without this: one
    that waits for the others in a collective call would not come to it.

    Raises:
        Stopped: a signal came.
    """
    came: list[int] = []
    last = -_GRACE

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if time.monotonic() - last < _GRACE:
            return  # timeout(1) sends two: the second would interrupt the ending
        last = time.monotonic()
        came.append(number)
        raise KeyboardInterrupt

    ours = (threading.current_thread() is threading.main_thread()
            and os.environ.get("WORLD_SIZE", "1") == "1")
    taken = [number for number in (signal.SIGTERM, signal.SIGHUP)
             if ours and signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        if came:
            raise Stopped(came[-1]) from None
        raise
    finally:
        for number in taken:
            if signal.getsignal(number) is interrupt:
                signal.signal(number, signal.SIG_DFL)


def sharing() -> int:
    """How many processes may have this one's device at a time, itself among them, as who started
    them says (:data:`SHARING`); how many do just now: :func:`planearly.company.size`."""
    return int(os.environ.get(SHARING, "1"))


def serve(parent: int) -> None:
    """Make this process a worker: it ends when its parent says so, or has ended.

    Ctrl-C, which a terminal sends to both, is left to the parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    follow(parent)


def follow(parent: int) -> None:
    """End this process by SIGTERM soon after its parent, even if that one was killed; by force
    where the main thread does not come to it."""
    main = threading.main_thread().ident
    assert main is not None

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK)
        signal.pthread_kill(main, signal.SIGTERM)
        time.sleep(_GRACE)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def end(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """End processes in order, and by force those that take too long; waits for all of them."""
    for process in started:
        process.terminate()
    until = time.monotonic() + _GRACE
    for process in started:
        try:
            process.wait(max(until - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
