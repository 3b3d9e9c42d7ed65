"""What a projected network costs over the plain small model, per token of training.

    python benchmarks/projection_overhead.py --json

Whole optimiser steps (projection, microbatches, gradients, clipping, update) of the same batches,
one after the other in one process: the plain model, the projected network, and a naive one that
projects every microbatch under autograd. `ratio` is the median over steps of ours over plain. Peak
memory is that of a process of its own: resident memory uncompiled on a CPU, allocated on a GPU.

On a CPU a model for small machines; on a GPU the paper's 126M one with 262,144 tokens a step.
The last line is one JSON object: milliseconds per step of `ours` and of the `peer`, their `ratio`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from planearly import keys
from planearly.data.sample import Interleave
from planearly.data.streams import Batch
from planearly.model.projected import Projected, by_group
from planearly.model.transformer import Shape, Transformer
from planearly.train import arithmetic, optim, update
from planearly.train.objective import NextToken
from planearly.train.trainable import Dense, Trainable

CPU = Shape(layers=3, d_model=96, heads=4, d_ff=256, vocab_size=8192, context=256)
GPU = Shape(layers=7, d_model=1024, heads=8, d_ff=4096, vocab_size=32_768, context=1024, ffn="gelu")


class Naive(Projected):
    """Projects the microbatch's cluster anew each time, as one would write it first."""

    def begin(self, groups: np.ndarray) -> None:
        pass

    def microbatches(self, groups: np.ndarray, rows: int) -> list[np.ndarray]:
        return by_group(groups, rows)

    def select(self, groups: np.ndarray) -> None:
        for (place, attribute), name in zip(self._places, self.names, strict=True):
            bank = self.bank(name)
            weight = (self.experts[int(groups[0])] @ bank.mixing) @ bank.slices.flatten(1)
            setattr(place, attribute, weight.view(bank.slices.shape[1:]))

    def end(self) -> None:
        for place, attribute in self._places:
            setattr(place, attribute, None)


class Batches:
    """Random tokens; clusters of about the paper's spread on c4."""

    def __init__(self, shape: Shape, rows: int, experts: int) -> None:
        sizes = np.random.default_rng(0).gamma(3.0, size=experts)
        self.draw = Interleave(sizes, 0).draw
        self.shape, self.rows = shape, rows

    def __getitem__(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(self.shape.vocab_size, (self.rows, self.shape.context + 1),
                               generator=generator)
        groups, _ = self.draw(step * self.rows, (step + 1) * self.rows)
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), groups)


def arm(name: str, shape: Shape, projected: keys.Projected) -> Trainable:
    if name == "plain":
        return Dense(Transformer(shape))
    return (Projected if name == "ours" else Naive)(shape, projected)


def stepper(model: Trainable, shape: Shape, settings: keys.Train,
            device: torch.device) -> Callable[[Batch], float]:
    """Runs one optimiser step as the loop does; returns its seconds."""
    model.module.to(device)
    rate = optim.resolve(settings.optimizer, 1000)
    optimizers = optim.build(model.module, rate)
    how = arithmetic.Arithmetic(arithmetic.use_bf16(settings.precision, device),
                                arithmetic.microbatch_rows(settings, shape.context, device))
    if settings.compile == "yes":
        arithmetic.compile_kernels(model.body, type(model).__name__)

    def step(batch: Batch) -> float:
        began = time.perf_counter()
        _, counted = update.fitting(model, batch, how, NextToken(), device, "step")
        update.apply(model.module, optimizers, counted, rate.clip)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="the last line is a JSON object")
    parser.add_argument("--steps", type=int, default=25, help="timed steps of each")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--rank", type=int, default=12)
    parser.add_argument("--batch-tokens", type=int, help="default: 16,384; on a GPU 262,144")
    parser.add_argument("--microbatch-tokens", type=int, help="default: as the loop chooses")
    parser.add_argument("--preset", default="modern", choices=["modern", "adamw", "paper"],
                        help="optimiser of both; modern trains every slice of the bank with Muon")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--memory", choices=["plain", "ours", "naive"], help=argparse.SUPPRESS)
    asked = parser.parse_args()

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    shape = GPU if cuda else CPU
    projected = keys.Projected(experts=asked.experts, rank=asked.rank)
    settings = keys.Train(
        batch_tokens=asked.batch_tokens or (262_144 if cuda else 16_384), precision="auto",
        microbatch_tokens=asked.microbatch_tokens,
        optimizer=keys.Optimizer(preset=asked.preset),
        compile="no" if asked.no_compile or (asked.memory and not cuda) else "yes",
    )
    batches = Batches(shape, settings.step_tokens // shape.context, asked.experts)
    if not cuda:
        arithmetic.tune_allocator()

    if asked.memory:
        step = stepper(arm(asked.memory, shape, projected), shape, settings, device)
        for number in range(3):
            step(batches[number])
        peak = (torch.cuda.max_memory_allocated() if cuda
                else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        print(peak)
        return

    names = ["plain", "ours", "naive"]
    steps = {n: stepper(arm(n, shape, projected), shape, settings, device) for n in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    warm_up = 4  # the steps that compile
    for number in range(warm_up + asked.steps):
        batch = batches[number]
        for name in names if number % 2 else reversed(names):
            taken = steps[name](batch)
            if number >= warm_up:
                seconds[name].append(taken)
            elif not asked.json:
                print(f"warm-up {number}: {name} {taken:.1f} s", flush=True)
    ratio = {n: float(np.median(np.divide(seconds[n], seconds["plain"]))) for n in names}
    spread = np.percentile(np.divide(seconds["ours"], seconds["plain"]), [25, 75])
    memory = {n: int(subprocess.run([sys.executable, __file__, *sys.argv[1:], "--memory", n],
                                    check=True, capture_output=True, text=True).stdout)
              for n in names}
    print(f"{torch.cuda.get_device_name() if cuda else 'CPU'}, {settings.step_tokens:,} tokens a "
          f"step, {asked.experts} experts, h = {asked.rank}, median of {asked.steps} steps")
    for name in names:
        per_second = settings.step_tokens / np.median(seconds[name])
        print(f"{name:6} {1e3 * np.median(seconds[name]):9.1f} ms a step {per_second:12,.0f} "
              f"tokens/s   ratio {ratio[name]:.3f}   peak {memory[name] / 2**30:.2f} GiB")
    if asked.json:
        print(json.dumps({
            "ratio": ratio["ours"], "quartiles": spread.tolist(), "naive_ratio": ratio["naive"],
            "ours": 1e3 * float(np.median(seconds["ours"])),
            "peer": 1e3 * float(np.median(seconds["plain"])), "peer_name": "the plain model",
            "unit": "ms per step", "peak_bytes": memory, "experts": asked.experts,
            "rank": asked.rank, "tokens_per_step": settings.step_tokens, "preset": asked.preset,
        }))


if __name__ == "__main__":
    main()
