"""Measure this device: its matrix rate, its bandwidth, and real training steps of three models.

Takes a minute or two. The result is kept by device name, and every plan and ledger made on the
device uses it instead of the data sheet; in another precision, or of several trainings side by
side, beside it.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from planearly import config, keys, parallel, processes
from planearly.cost import devices
from planearly.data.streams import Batch
from planearly.errors import UserError
from planearly.files import write_json
from planearly.model import flops
from planearly.model.projected import Projected
from planearly.model.transformer import Shape, Transformer
from planearly.parallel import bf16_is_fast
from planearly.plan import sizes
from planearly.progress import say
from planearly.train import arithmetic, optim, update
from planearly.train.objective import NextToken
from planearly.train.steps import rows_per_step
from planearly.train.trainable import Dense, Trainable
from planearly.units import duration, prefixed, short

if TYPE_CHECKING:
    from multiprocessing.synchronize import Barrier

_WARM_STEPS, _LEAST_STEPS = 2, 3
_GRACE = 5.0
"""Seconds that a training side by side has to end."""


def calibrate(recipe: keys.Recipe, seconds: float = 60.0, workers: int = 1) -> Path:
    """Measure, and write the calibration file.

    Args:
        recipe: its ``model``, ``projected`` and ``large`` are the shapes measured, its
            ``pretrain`` section how they are trained.
        seconds: of training steps in all, warming up and compiling not included.
        workers: trainings side by side, which divide the processor's threads; rates are those of
            all together.

    Returns:
        The file.

    Raises:
        OSError: it could not be written, before anything is measured.
        UserError: a worker came to an end.
    """
    recipe = sizes.settled(recipe)
    name, device = devices.here(), parallel.device()
    bf16 = arithmetic.use_bf16(recipe.pretrain.precision, device)
    named = "" if bf16 == bf16_is_fast(device) else "bfloat16" if bf16 else "float32"
    if device.type == "cpu":
        arithmetic.tune_allocator()
    began, path = time.monotonic(), devices.calibration_file(name, named, workers)
    path.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path.parent).close()  # refused before minutes of measuring
    cores = os.cpu_count() or 1
    if os.getloadavg()[0] > 0.5 * cores:
        say(f"other work is running on this machine (load {os.getloadavg()[0]:.1f} on {cores} "
            "cores): calibrate again when it is idle, or plans will be too slow")
    rate, kind = matmul_rate(device, bf16=bf16)
    bandwidth = copy_rate(device)
    say(f"{name}: {prefixed(rate)}FLOP/s in {kind} matrix products, {prefixed(bandwidth)}B/s of "
        "memory")
    measured = {}
    found = _shapes(recipe, seconds) if workers == 1 else _side_by_side(recipe, seconds, workers)
    for key, facts in found:
        measured[key] = facts
        say(f"{key}: {short(facts['tokens_per_second'])} tokens/s, "
            f"{prefixed(facts['flops_per_second'])}FLOP/s, "
            f"{100 * facts['flops_per_second'] / rate:.0f}% of the matrix rate")
    measured["pn"]["projected"] = asdict(recipe.projected)
    write_json(path, {
        "device": name, "kind": device.type, "when": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "matmul_flops": rate, "matmul_kind": kind, "named_precision": bool(named),
        "sharing": workers, "bandwidth": bandwidth,
        "memory": devices.memory_here(), "recipe": recipe.name, "shapes": measured,
    })
    say(f"calibrated in {duration(time.monotonic() - began)}: {path}")
    return path


def _shapes(recipe: keys.Recipe, seconds: float,
            ready: Callable[[], object] = lambda: None) -> Iterator[tuple[str, dict[str, Any]]]:
    """What :func:`steps` tells of each of a recipe's shapes; ``seconds`` are of all of them."""
    entries = recipe.tokenizer.vocab_size
    small = Shape.of(recipe.model, entries, recipe.context)
    large = Shape.of(recipe.large, entries, recipe.context)
    plans: dict[str, tuple[Shape, Callable[[], Any], int]] = {
        "slm": (small, lambda: Dense(Transformer(small)), 1),
        "pn": (small, lambda: Projected(small, recipe.projected), recipe.projected.at_once),
    }
    if large.d_model != small.d_model:
        plans["llm"] = (large, lambda: Dense(Transformer(large)), 1)
    for key, (shape, make, groups) in plans.items():
        yield key, steps(make(), shape, recipe.pretrain, groups, parallel.device(),
                         seconds / len(plans), ready)


def _side_by_side(recipe: keys.Recipe, seconds: float,
                  workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same by several processes at once, their rates added up."""
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Barrier(workers)
    threads = torch.get_num_threads()  # as a study's workers have them
    if "OMP_NUM_THREADS" not in os.environ:
        threads = max(threads // workers, 1)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # of what was measured before
    with ExitStack() as stack:
        links = []
        for _ in range(workers):
            link, there = spawn.Pipe(duplex=False)
            process = spawn.Process(target=_alongside, daemon=True, args=(
                there, ready, os.getpid(), workers, threads, recipe.to_dict(), seconds))
            links.append(stack.enter_context(closing(link)))
            stack.callback(_end, process)
            process.start()
            there.close()  # so that its end closes the link

        def heard() -> list[Any]:
            """What each of them tells next; one that failed keeps the others waiting."""
            told: dict[Connection, Any] = {}
            while len(told) < workers:
                for link in wait([link for link in links if link not in told]):
                    assert isinstance(link, Connection)
                    told[link] = link.recv()
                    if isinstance(told[link], str):
                        raise UserError(told[link])
            return list(told.values())

        try:
            while (told := heard())[0] is not None:
                key, facts = told[0]
                yield key, facts | {rate: sum(each[1][rate] for each in told)
                                    for rate in ("tokens_per_second", "flops_per_second")}
        except EOFError:
            raise UserError("one of the trainings came to an end while they were measured (is "
                            "memory short?): calibrate with fewer --workers") from None


def _end(process: BaseProcess) -> None:
    if process.pid is not None:
        process.terminate()
        process.join(_GRACE)
        process.kill()
        process.join()


def _alongside(link: Connection, ready: Barrier, parent: int, workers: int, threads: int,
               recipe: dict[str, Any], seconds: float) -> None:
    """Measure as one of several that begin each shape together; None is the end, and a sentence
    what is wrong."""
    processes.serve(parent)
    # a lock that a library makes here (tqdm does) is then not left over by one that is ended
    multiprocessing.set_start_method("fork", force=True)
    os.environ[processes.SHARING] = str(workers)
    torch.set_num_threads(threads)
    if parallel.device().type == "cpu":
        arithmetic.tune_allocator()
    try:
        for found in _shapes(config.build(keys.Recipe, recipe, ""), seconds, ready.wait):
            link.send(found)
        link.send(None)
    except UserError as error:
        link.send(str(error))


def steps(model: Trainable, shape: Shape, settings: keys.Train, groups: int,
          device: torch.device, seconds: float,
          ready: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Real optimiser steps on random tokens, by the training loop's own parts.

    Args:
        ready: called before the steps that are measured.

    Returns:
        ``tokens_per_second`` and ``flops_per_second`` at the median step, and what they belong to.
    """
    model.module.to(device)
    rate = optim.resolve(settings.optimizer, 1_000_000, shape.d_model)
    optimizers = optim.build(model.module, rate)
    rows = rows_per_step(settings.step_tokens, shape.context)
    random = np.random.default_rng(0)
    job = arithmetic.job_of(model.module, model.body, rate.preset, None, device)
    how = arithmetic.Arithmetic(arithmetic.use_bf16(settings.precision, device),
                                arithmetic.microbatch_rows(settings, shape.context, device, job))
    if settings.compile != "no" and arithmetic.can_compile():
        arithmetic.compile_kernels(model.body, type(model).__name__)
    times: list[float] = []
    spent, number = 0.0, 0
    while number < _WARM_STEPS + _LEAST_STEPS or spent < seconds:
        tokens = torch.from_numpy(
            random.integers(0, shape.vocab_size, (rows, shape.context + 1)))
        batch = Batch(tokens[:, :-1], tokens[:, 1:], random.integers(0, groups, rows))
        if number == _WARM_STEPS:
            ready()
        start = time.perf_counter()
        loss, counted = update.fitting(model, batch, how, NextToken(), device, "calibration")
        optim.set_rates(optimizers, rate, number, 1_000_000)
        update.apply(model.module, optimizers, counted, rate.clip)
        loss.item()  # waits for the device
        taken = time.perf_counter() - start
        number += 1
        if number > _WARM_STEPS:
            times.append(taken)
            spent += taken
    speed = rows * shape.context / statistics.median(times)
    return {"shape": shape.to_dict(), "d_model": shape.d_model, "tokens_per_second": speed,
            "flops_per_token": flops.training(shape),
            "flops_per_second": speed * flops.training(shape), "steps": len(times),
            "step_tokens": rows * shape.context, "settings": asdict(settings)}


def matmul_rate(device: torch.device, seconds: float = 2.0,
                bf16: bool | None = None) -> tuple[float, str]:
    """FLOP/s of large square matrix products, and their precision; None: what training takes."""
    bf16 = bf16_is_fast(device) if bf16 is None else bf16
    size = 8192 if device.type == "cuda" else 2048
    kind = torch.bfloat16 if bf16 else torch.float32
    a = torch.randn(size, size, device=device).to(kind)
    fastest = _fastest(lambda: a @ a, device, seconds)
    return 2 * size**3 / fastest, "bfloat16" if bf16 else "float32"


def copy_rate(device: torch.device, seconds: float = 1.0) -> float:
    """Bytes/s read and written by a large copy."""
    count = 1 << (29 if device.type == "cuda" else 26)
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    fastest = _fastest(lambda: target.copy_(source), device, seconds)
    return 2 * source.element_size() * count / fastest


def _fastest(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds or best == float("inf"):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
