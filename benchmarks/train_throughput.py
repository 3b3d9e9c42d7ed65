"""Training tokens per second at the nano shape, beside two peers on an equal Llama.

Peers: transformers.Trainer, and a plain torch loop as a good engineer writes it in an afternoon
(:func:`plain`: compiled, autocast, fused AdamW). All train the same architecture on the same
random tokens with AdamW, in processes of their own, in turns, with the allocator settings that our
loop makes. ``ratio`` and ``ratio_plain`` are against the peers in bfloat16, compiled;
``ratio_best`` and ``ratio_plain_best`` against the peer's better of bfloat16 and float32, since
bfloat16 is the slower on processors without units for it. ``ratio_outside`` is our loop on the
library's own Llama, as it trains a model of others, against our loop on our Transformer.
Compilation and first steps are left out.

    python benchmarks/train_throughput.py --json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from planearly.train.trainable import Dense

Precision = Literal["auto", "bf16", "fp32"]
SKIP = 3
"""Steps at the start that do not count."""

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
VARIANTS: dict[str, tuple[str, str]] = {
    "ours": ("ours", "auto"),
    "ours, a model of others": ("outside", "auto"),
    "trainer, bfloat16": ("trainer", "bf16"),
    "trainer, float32": ("trainer", "fp32"),
    "plain loop, bfloat16": ("plain", "bf16"),
    "plain loop, float32": ("plain", "fp32"),
}


def shape(name: str):
    from planearly import config
    from planearly.model.transformer import Shape

    recipe = config.load(name)
    if recipe.pretrain.batch_tokens is None:  # as in all of docs/benchmarks.md
        recipe = config.variant(recipe, {"pretrain.batch_tokens": 8_192})
    return Shape.of(recipe.model, recipe.tokenizer.vocab_size, recipe.context), recipe


def tokens(rows: int, context: int, vocab: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, (rows, context + 1))


def equal_llama(model_shape: Any) -> dict[str, Any]:
    """The configuration of a LlamaForCausalLM of the same shape."""
    from planearly.model import hf

    settings = hf.hf_config(model_shape, 0, 0)
    return {k: v for k, v in settings.items() if k not in ("architectures", "dtype")}


def outside(recipe_name: str, steps: int, precision: Precision) -> float:
    """Tokens per second of planearly's loop on the library's own Llama."""
    from planearly.model import outside as others

    model_shape, _ = shape(recipe_name)
    config = json.dumps(equal_llama(model_shape) | {"architectures": ["LlamaForCausalLM"]})
    model = others.build(others.Configured(config, model_shape.context, model_shape.vocab_size), 0)
    return ours(recipe_name, steps, precision, model)


def ours(recipe_name: str, steps: int, precision: Precision, model: Any = None) -> float:
    """Tokens per second of planearly's loop, on its own model or another."""
    import torch

    from planearly import keys
    from planearly.data.streams import Batch
    from planearly.model.transformer import Transformer
    from planearly.train import loop

    model_shape, recipe = shape(recipe_name)
    model = Transformer(model_shape) if model is None else model

    class Random:
        context = model_shape.context

        def batch(self, start: int, stop: int) -> Batch:
            drawn = tokens(stop - start, self.context, model_shape.vocab_size, start)
            return Batch(torch.from_numpy(drawn[:, :-1].copy()),
                         torch.from_numpy(drawn[:, 1:].copy()), np.zeros(stop - start, np.int64))

    settings = keys.Pretrain(
        batch_tokens=recipe.pretrain.step_tokens, log_steps=1,
        microbatch_tokens=recipe.pretrain.microbatch_tokens,
        precision=precision, compile="yes", optimizer=keys.Optimizer(preset="adamw"),
    )
    with tempfile.TemporaryDirectory() as folder:
        loop.train(Dense(model), Random(), steps + SKIP, settings,
                   Path(folder), name="ours")
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]
    return statistics.median(line["tokens_per_second"] for line in lines[SKIP:])


def trainer(recipe_name: str, steps: int, precision: Precision) -> float:
    """Tokens per second of transformers.Trainer."""
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    model_shape, recipe = shape(recipe_name)
    model = LlamaForCausalLM(LlamaConfig(**equal_llama(model_shape)))
    rows = recipe.pretrain.step_tokens // model_shape.context
    per_pass = max(4096 // model_shape.context, 1)
    drawn = torch.from_numpy(
        tokens(rows * (steps + SKIP), model_shape.context - 1, model_shape.vocab_size, 0))
    data = [{"input_ids": row, "labels": row} for row in drawn]
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=per_pass, max_steps=steps + SKIP,
            gradient_accumulation_steps=rows // per_pass, bf16=precision == "bf16",
            use_cpu=True, torch_compile=True, optim="adamw_torch_fused", max_grad_norm=1.0,
            save_strategy="no", report_to=[], logging_steps=1000, disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=data, callbacks=[Clock()]).train()
    return recipe.pretrain.step_tokens / statistics.median(np.diff(ends[SKIP - 1:]))


def plain(recipe_name: str, steps: int, precision: Precision) -> float:
    """Tokens per second of a plain loop over a Llama of the recipe's shape."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    shape_, recipe = shape(recipe_name)
    d, heads, context, vocab = shape_.d_model, shape_.heads, shape_.context, shape_.vocab_size

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(d))

        def forward(self, x):
            return F.rms_norm(x, (d,), self.scale, 1e-5)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = Norm(), Norm()
            self.qkv, self.o = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
            self.gate_up = nn.Linear(d, 2 * shape_.d_ff, bias=False)
            self.down = nn.Linear(shape_.d_ff, d, bias=False)

        def forward(self, x, cos, sin):
            rows, time_, _ = x.shape
            q, k, v = (self.qkv(self.norm1(x)).view(rows, time_, 3, heads, -1)
                       .permute(2, 0, 3, 1, 4))

            def turn(y):
                left, right = y.chunk(2, -1)
                return torch.cat((left * cos - right * sin, right * cos + left * sin), -1).to(y)

            y = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
            x = x + self.o(y.transpose(1, 2).reshape(x.shape))
            gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
            return x + self.down(F.silu(gate) * up)

    class Llama(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Embedding(vocab, d), Norm()
            self.layers = nn.ModuleList(Layer() for _ in range(shape_.layers))
            half = d // heads // 2
            angle = torch.outer(torch.arange(context), 1e4 ** (-torch.arange(half) / half))
            self.register_buffer("cos", angle.cos())
            self.register_buffer("sin", angle.sin())

        def forward(self, inputs, targets):
            x = self.embed(inputs)
            for layer in self.layers:
                x = layer(x, self.cos, self.sin)
            logits = F.linear(self.norm(x), self.embed.weight)
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    torch.manual_seed(0)
    model = Llama()
    nn.init.normal_(model.embed.weight, std=0.02)
    run = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    rows = recipe.pretrain.step_tokens // context
    per_pass = max(4096 // context, 1)
    taken = []
    for step in range(steps + SKIP):
        began = time.perf_counter()
        drawn = torch.from_numpy(tokens(rows, context, vocab, step))
        for part in drawn.split(per_pass):
            with (torch.autocast("cpu", torch.bfloat16) if precision == "bf16"
                  else contextlib.nullcontext()):
                loss = run(part[:, :-1], part[:, 1:]) * len(part) / rows
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        taken.append(time.perf_counter() - began)
    return recipe.pretrain.step_tokens / statistics.median(taken[SKIP:])


def limit_of(recipe_name: str, steps: int, precision: Precision) -> float:
    """Tokens per second if every matrix product ran at this machine's measured matrix rate."""
    from planearly import parallel
    from planearly.model import flops
    from planearly.plan import calibrate

    rate, _ = calibrate.matmul_rate(parallel.device())
    return rate / flops.training(shape(recipe_name)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print a JSON object as the last line")
    parser.add_argument("--recipe", default="nano")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "PRECISION"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        side = {"ours": ours, "outside": outside, "trainer": trainer, "plain": plain,
                "limit": limit_of}[asked.one[0]]
        print(json.dumps(side(asked.recipe, asked.steps, asked.one[1])))
        return

    def measured(side: str, precision: str) -> float:
        command = [sys.executable, __file__, "--recipe", asked.recipe, "--steps",
                   str(asked.steps), "--one", side, precision]
        done = subprocess.run(command, capture_output=True, text=True,
                              env={**os.environ, **ALLOCATOR})
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        return json.loads(done.stdout.splitlines()[-1])

    found: dict[str, list[float]] = {}
    for turn in range(asked.rounds):
        for name in VARIANTS if turn % 2 == 0 else reversed(VARIANTS):
            found.setdefault(name, []).append(measured(*VARIANTS[name]))
            print(f"round {turn + 1}, {name}: {found[name][-1]:,.0f} tokens/s", file=sys.stderr,
                  flush=True)
    found["the limit: all products at the measured matrix rate"] = [measured("limit", "auto")]
    medians = {name: statistics.median(values) for name, values in found.items()}
    print("| tokens/s | median | all rounds |\n|---|---|---|")
    for name, values in found.items():
        print(f"| {name} | {medians[name]:,.0f} | {', '.join(f'{v:,.0f}' for v in values)} |")
    ours_ = medians["ours"]
    ratios = {"ratio_outside": medians["ours, a model of others"] / ours_}
    for key, peer in (("ratio", "trainer"), ("ratio_plain", "plain loop")):
        ratios[key] = ours_ / medians[f"{peer}, bfloat16"]
        ratios[f"{key}_best"] = ours_ / max(v for n, v in medians.items() if n.startswith(peer))
    share = ours_ / medians["the limit: all products at the measured matrix rate"]
    print(", ".join(f"{key} {value:.2f}" for key, value in ratios.items())
          + f"; {100 * share:.0f}% of the limit")
    if asked.json:
        print(json.dumps({
            "ours": ours_, "peer": ours_ / ratios["ratio"], **ratios, "share_of_limit": share,
            "unit": "training tokens per second", "rounds": found,
            "what": {"ours": f"planearly, recipe {asked.recipe}, AdamW, precision auto",
                     "peer": "transformers.Trainer, equal LlamaForCausalLM, bfloat16, compiled"},
        }))


if __name__ == "__main__":
    main()
