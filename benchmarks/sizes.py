"""Which size of model keeps the paper's tokens per parameter, for what a machine trains in an hour.

    OMP_NUM_THREADS=1 python benchmarks/sizes.py --processes 2 --json

Of each width: parameters, tokens/s of one process in float32 and in bfloat16, tokens per parameter
after an hour of so many processes as fast as this one, the share of the measured matrix rate that
products reach, and the tokens/s with four times the tokens a step: how much is lost to the overhead
of operations, and could at most be won by several trainings in one, their weights stacked. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from typing import Literal

import torch

from planearly import keys, parallel
from planearly.model.transformer import Shape, Transformer
from planearly.plan import calibrate
from planearly.train import arithmetic
from planearly.train.trainable import Dense

Precision = Literal["fp32", "bf16"]
CONTEXT, VOCABULARY, LAYERS, STEP = 128, 1024, 2, 8192
PAPER = (361, 1912)
"""Least and most tokens per parameter of the paper's SLM (Tables 2, 3 and 8)."""


def shape_of(width: int) -> Shape:
    """A model of this width: a gated feed-forward of 8/3 of it, in sixteens."""
    return Shape(LAYERS, width, 2, round(width * 8 / 3 / 16) * 16, VOCABULARY, CONTEXT)


def measured(shape: Shape, precision: Precision, step_tokens: int, seconds: float,
             ) -> tuple[float, float]:
    """Tokens and FLOPs per second of one process, a step in one pass."""
    settings = keys.Pretrain(batch_tokens=step_tokens, microbatch_tokens=step_tokens,
                             precision=precision, compile="yes")
    found = calibrate.steps(Dense(Transformer(shape)), shape, settings, 1, parallel.device(),
                            seconds)
    return found["tokens_per_second"], found["flops_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[24, 48, 96, 192])
    parser.add_argument("--processes", type=int, default=1,
                        help="that share the machine, of one thread each")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--json", action="store_true", help="the last line is a JSON object")
    asked = parser.parse_args()
    if any(width < 4 or width % 4 for width in asked.widths):
        parser.error("--widths: each is to be a multiple of 4, for two heads that rotate")
    if asked.processes < 1 or asked.seconds <= 0:
        parser.error("--processes and --seconds are to be above 0")
    torch.set_num_threads(1)
    arithmetic.tune_allocator()
    rate, kind = calibrate.matmul_rate(parallel.device())
    print(f"matrix rate {rate / 1e9:.0f} GFLOP/s in {kind}; the paper's SLM has {PAPER[0]} to "
          f"{PAPER[1]} tokens per parameter")
    lines = []
    for width in asked.widths:
        shape = shape_of(width)
        parameters = sum(p.numel() for p in Transformer(shape).parameters())
        kinds: tuple[Precision, ...] = ("fp32", "bf16")
        speeds = {precision: measured(shape, precision, STEP, asked.seconds)
                  for precision in kinds}
        best = max(speeds, key=lambda precision: speeds[precision][0])
        tokens, flops = speeds[best]
        wide, _ = measured(shape, best, 4 * STEP, asked.seconds)
        lines.append({
            "width": width, "parameters": parameters, "fp32": speeds["fp32"][0],
            "bf16": speeds["bf16"][0], "share": flops / rate, "four_times": wide,
            "hour": 3600 * asked.processes * tokens / parameters})
        print(f"width {width:4}  {parameters / 1e6:5.2f}M  float32 {speeds['fp32'][0]:8,.0f}  "
              f"bfloat16 {speeds['bf16'][0]:8,.0f} tokens/s  {flops / rate:4.0%} of the matrix "
              f"rate  {lines[-1]['hour']:6,.0f} tokens per parameter in an hour  four times the "
              f"tokens a step {wide:8,.0f}", flush=True)
    if asked.json:
        print(json.dumps({"what": "tokens/s of one process", "rate": rate, "kind": kind,
                          "processes": asked.processes, "sizes": lines}))


if __name__ == "__main__":
    main()
