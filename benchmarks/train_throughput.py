"""Training tokens per second at the nano shape, beside transformers.Trainer on an equal Llama.

Both train the same architecture (the exported one) in bfloat16 on the same random tokens with
Adam, on all cores, each in processes of its own, in turns. Each side is run uncompiled and
compiled, the peer also with the allocator settings that our loop makes, and counts with its best
figure; compilation and the first steps are left out.

    python benchmarks/train_throughput.py --json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SKIP = 3
"""Steps at the start that do not count."""

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
VARIANTS: dict[str, tuple[str, str, dict[str, str]]] = {
    "ours, eager": ("ours", "no", {}),
    "ours, compiled": ("ours", "yes", {}),
    "trainer, eager": ("trainer", "no", {}),
    "trainer, compiled": ("trainer", "yes", {}),
    "trainer, eager, our allocator settings": ("trainer", "no", ALLOCATOR),
    "trainer, compiled, our allocator settings": ("trainer", "yes", ALLOCATOR),
}


def shape(name: str):
    from planearly import config
    from planearly.model.transformer import Shape

    recipe = config.load(name)
    return Shape.of(recipe.model, recipe.tokenizer.vocab_size, recipe.context), recipe


def tokens(rows: int, context: int, vocab: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, (rows, context + 1))


def ours(recipe_name: str, steps: int, compiled: bool) -> float:
    """Tokens per second of planearly's loop."""
    import torch

    from planearly import keys
    from planearly.data.streams import Batch
    from planearly.model.transformer import Transformer
    from planearly.train import loop

    model_shape, recipe = shape(recipe_name)

    class Random:
        context = model_shape.context

        def batch(self, start: int, stop: int) -> Batch:
            drawn = tokens(stop - start, self.context, model_shape.vocab_size, start)
            return Batch(torch.from_numpy(drawn[:, :-1].copy()),
                         torch.from_numpy(drawn[:, 1:].copy()), np.zeros(stop - start, np.int64))

    settings = keys.Pretrain(
        batch_tokens=recipe.pretrain.batch_tokens, log_steps=1,
        microbatch_tokens=recipe.pretrain.microbatch_tokens,
        compile="yes" if compiled else "no", optimizer=keys.Optimizer(preset="paper"),
    )
    with tempfile.TemporaryDirectory() as folder:
        loop.train(loop.Dense(Transformer(model_shape)), Random(), steps + SKIP, settings,
                   Path(folder), name="ours")
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]
    return statistics.median(line["tokens_per_second"] for line in lines[SKIP:])


def trainer(recipe_name: str, steps: int, compiled: bool) -> float:
    """Tokens per second of transformers.Trainer."""
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from planearly.model import hf

    model_shape, recipe = shape(recipe_name)
    settings = hf.hf_config(model_shape, 0, 0)
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in settings.items()
                                            if k not in ("architectures", "dtype")}))
    rows = recipe.pretrain.batch_tokens // model_shape.context
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
            gradient_accumulation_steps=rows // per_pass, bf16=True, use_cpu=True,
            torch_compile=compiled, optim="adamw_torch_fused", max_grad_norm=5.0,
            save_strategy="no", report_to=[], logging_steps=1000, disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=data, callbacks=[Clock()]).train()
    return recipe.pretrain.batch_tokens / statistics.median(np.diff(ends[SKIP - 1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print a JSON object as the last line")
    parser.add_argument("--recipe", default="nano")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "COMPILED"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        side = {"ours": ours, "trainer": trainer}[asked.one[0]]
        print(json.dumps(side(asked.recipe, asked.steps, asked.one[1] == "yes")))
        return
    found: dict[str, list[float]] = {}
    for _ in range(asked.rounds):
        for name, (side, compiled, environment) in VARIANTS.items():
            command = [sys.executable, __file__, "--recipe", asked.recipe, "--steps",
                       str(asked.steps), "--one", side, compiled]
            done = subprocess.run(command, capture_output=True, text=True,
                                  env={**os.environ, **environment})
            if done.returncode:
                raise SystemExit(done.stderr[-3000:])
            found.setdefault(name, []).append(json.loads(done.stdout.splitlines()[-1]))
    medians = {name: statistics.median(values) for name, values in found.items()}
    print("| tokens/s | median | all rounds |\n|---|---|---|")
    for name, values in found.items():
        print(f"| {name} | {medians[name]:,.0f} | {', '.join(f'{v:,.0f}' for v in values)} |")
    best = {side: max(v for n, v in medians.items() if n.startswith(side))
            for side in ("ours", "trainer")}
    print(f"ratio {best['ours'] / best['trainer']:.2f}")
    if asked.json:
        print(json.dumps({
            "ours": best["ours"], "peer": best["trainer"],
            "ratio": best["ours"] / best["trainer"], "unit": "training tokens per second",
            "what": {"ours": f"planearly, recipe {asked.recipe}, bfloat16",
                     "peer": "transformers.Trainer, equal LlamaForCausalLM, bfloat16"},
            "rounds": found,
        }))


if __name__ == "__main__":
    main()
