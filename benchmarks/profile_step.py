"""Where the time of a compiled training step goes, as a table of shares.

    python benchmarks/profile_step.py [--recipe nano] [--precision auto]

Shares are of operations' own time in torch's profiler. Products are those of the blocks and of the
output with its loss; attention is torch's kernel, or the batched products where it is written out
(its softmax then counts as elementwise); elementwise is what inductor made: norms, rotation,
activations, softmax and loss. The optimiser includes clipping, and Muon's products.
"""

from __future__ import annotations

import argparse
import collections

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from planearly import config, keys, parallel
from planearly.data.streams import Batch
from planearly.model import flops
from planearly.model.transformer import Shape, Transformer
from planearly.plan import calibrate
from planearly.train import arithmetic, optim, update
from planearly.train.objective import NextToken
from planearly.train.trainable import Dense


def kind(name: str) -> str:
    if name in ("aten::mm", "aten::addmm", "aten::addmm_"):
        return "matrix products"
    if "scaled_dot_product" in name or name == "aten::bmm":
        return "attention"
    if "CompiledFx" in name:
        return "elementwise, softmax, loss"
    return "everything else"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="nano")
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"])
    parser.add_argument("--steps", type=int, default=3)
    asked = parser.parse_args()
    recipe, device = config.load(asked.recipe), parallel.device()
    if recipe.pretrain.batch_tokens is None:  # as in docs/benchmarks.md
        recipe = config.variant(recipe, {"pretrain.batch_tokens": 8_192})
    shape = Shape.of(recipe.model, recipe.tokenizer.vocab_size, recipe.context)
    settings: keys.Train = recipe.pretrain
    arithmetic.tune_allocator()
    model = Dense(Transformer(shape).to(device))
    rate = optim.resolve(settings.optimizer, 1000)
    optimizers = optim.build(model.module, rate)
    how = arithmetic.Arithmetic(arithmetic.use_bf16(asked.precision, device),
                                arithmetic.microbatch_rows(settings, shape.context, device))
    arithmetic.compile_kernels(model.body, type(model).__name__)
    rows = settings.step_tokens // shape.context
    random = np.random.default_rng(0)

    def step() -> None:
        with record_function("part: data"):
            drawn = torch.from_numpy(
                random.integers(0, shape.vocab_size, (rows, shape.context + 1)))
            batch = Batch(drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous(),
                          np.zeros(rows, np.int64))
        _, counted = update.fitting(model, batch, how, NextToken(), device, "step")
        with record_function("part: optimiser"):
            update.apply(model.module, optimizers, counted, rate.clip)

    for _ in range(2):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as taken:
        for _ in range(asked.steps):
            step()
    shares: dict[str, float] = collections.defaultdict(float)
    whole = 0.0
    for event in taken.events():
        inside, top = event, None
        while inside is not None:
            if inside.name.startswith("part: "):
                top = inside.name.removeprefix("part: ")
            inside = inside.cpu_parent
        shares[top or kind(event.name)] += event.self_cpu_time_total
        whole += event.self_cpu_time_total
    tokens = asked.steps * rows * shape.context
    rate_, name = calibrate.matmul_rate(device)
    print("| part of the step | share |\n|---|---|")
    for part, value in sorted(shares.items(), key=lambda item: -item[1]):
        print(f"| {part} | {100 * value / whole:.1f}% |")
    achieved = flops.training(shape) * tokens / (whole / 1e6)
    print(f"{name} products, {achieved / 1e9:.0f} of {rate_ / 1e9:.0f} GFLOP/s: "
          f"{100 * achieved / rate_:.0f}% of the measured matrix rate")


if __name__ == "__main__":
    main()
