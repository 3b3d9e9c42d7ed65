"""Processes of a test, forked off one that has imported what they need: seconds sooner than new
interpreters, and as far from this process."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing import connection
from multiprocessing.process import BaseProcess

import torch

from planearly import parallel

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([
    "planearly.cli", "planearly.stages.pipeline", "planearly.study.run", "torch._dynamo",
    "transformers.models.auto.tokenization_auto", "matplotlib.figure", "scipy.stats"])


def environment() -> dict[str, str]:
    """For interpreters that are to add up in the same order as this one."""
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def fork(function: Callable, *arguments) -> BaseProcess:
    """Start a function that can be imported, in the environment that this process has now.

    Where a processor's speed in bfloat16 is measured, it is what it was here: on a busy machine
    two measurements may disagree.
    """
    fast = parallel.bf16_is_fast(torch.device("cpu"))
    process = FORKS.Process(target=_call, args=(
        dict(os.environ), torch.get_num_threads(), fast, function, arguments))
    process.start()
    return process


def _call(variables: dict[str, str], threads: int, fast: bool, function: Callable,
          arguments: tuple) -> None:
    parallel._kept_bf16_gain = lambda processor: math.inf if fast else 0.0
    os.environ.clear()
    os.environ.update(variables)
    os.fsync = lambda descriptor: None  # as in conftest.py
    torch.set_num_threads(threads)
    function(*arguments)


def together(count: int, function: Callable, *arguments) -> None:
    """Processes that meet each other: ``function(rank, *arguments)`` for every rank."""
    started = [fork(function, rank, *arguments) for rank in range(count)]
    try:
        while running := [process.sentinel for process in started if process.is_alive()]:
            connection.wait(running)
            assert not any(process.exitcode for process in started), "see its traceback"
    finally:
        for process in started:
            process.kill()
            process.join()
