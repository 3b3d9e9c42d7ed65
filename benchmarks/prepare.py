"""Preparation: MB of text per second and peak memory, beside `datasets.map` and datatrove.

    python benchmarks/prepare.py [--megabytes 40] [--processes 1 2] [--text FILES...] [--json]

Ours reads JSON lines, finds duplicates and long paragraphs, tokenizes and writes the token dataset;
the peers read the same JSON lines and tokenize them with the same tokenizer, in batches, with as
many processes: `datasets.map`, and datatrove's `DocumentTokenizer` where it is installed, whose
tasks are files. Each runs in a fresh process, one after the other; ours once more on half of the
text, to show that memory does not grow with the corpus. Peaks are of the largest process (resident
memory).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from planearly import keys
from planearly.data import tokenizer as tk
from planearly.data.documents import Problems
from planearly.data.inputs import resolve
from planearly.data.readers import read_documents

SHARED = Path(__file__).parents[2] / "shared" / "data" / "generic"


def write_text(folder: Path, megabytes: float, sources: list[str]) -> None:
    """JSON lines in files of at most 20 MB: real text, varied when it is used again."""
    units = resolve(sources)
    rng = np.random.default_rng(0)
    folder.mkdir()
    written = turn = number = 0
    handle = open(folder / "00000.jsonl", "w", encoding="utf-8")  # noqa: SIM115
    while written < megabytes * 1e6:
        for unit in units:
            for document in read_documents(unit, keys.Data(), Problems(0.01)):
                words = document.text.split(" ")
                if turn:  # swap words, so that neither duplicates nor words are all known
                    for i in rng.integers(0, len(words), len(words) // 5):
                        words[i] = words[rng.integers(len(words))][::-1]
                handle.write(json.dumps({"text": " ".join(words)}) + "\n")
                written += document.n_bytes
                if written >= megabytes * 1e6:
                    break
                if written > 20e6 * (number + 1):
                    number += 1
                    handle.close()
                    handle = open(folder / f"{number:05d}.jsonl", "w",  # noqa: SIM115
                                  encoding="utf-8")
            if written >= megabytes * 1e6:
                break
        turn += 1
    handle.close()


def run_ours(text: str, tokenizer: str, out: str, processes: int) -> None:
    from planearly.data.build import tokenize_corpus
    from planearly.engine.local import Local

    start = time.perf_counter()
    meta = tokenize_corpus(resolve([text]), Path(tokenizer), 256, keys.Data(), Path(out),
                           executor=Local(processes))
    report(start, meta["n_bytes"], meta["n_tokens"])


def run_datasets(text: str, tokenizer: str, out: str, processes: int) -> None:
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    start = time.perf_counter()
    records = datasets.load_dataset("json", data_files=f"{text}/*.jsonl", cache_dir=f"{out}/cache",
                                    split="train")
    encoded = records.map(lambda batch: {"ids": loaded(batch["text"])["input_ids"],
                                         "bytes": [len(t.encode()) for t in batch["text"]]},
                          batched=True, remove_columns=["text"], num_proc=processes)
    encoded.save_to_disk(f"{out}/saved")
    taken = time.perf_counter()
    tokens = sum(map(len, encoded["ids"]))
    report(start + time.perf_counter() - taken, sum(encoded["bytes"]), tokens)


def run_datatrove(text: str, tokenizer: str, out: str, processes: int) -> None:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    files = sorted(Path(text).glob("*.jsonl"))
    start = time.perf_counter()
    LocalPipelineExecutor(
        [JsonlReader(text, glob_pattern="*.jsonl"),
         DocumentTokenizer(f"{out}/tokens", str(Path(tokenizer) / "tokenizer.json"),
                           local_working_dir=f"{out}/work", eos_token=None, seed=0,
                           shuffle_documents=False)],
        tasks=len(files), workers=processes, logging_dir=f"{out}/logs").run()
    taken = time.perf_counter()
    size = sum(path.stat().st_size for path in Path(out, "tokens").glob("*.ds"))
    n_bytes = sum(len(json.loads(line)["text"].encode()) for path in files
                  for line in path.open(encoding="utf-8"))
    report(start + time.perf_counter() - taken, n_bytes, size // 2)


SIDES = {"ours": run_ours, "datasets": run_datasets, "datatrove": run_datatrove}


def report(start: float, n_bytes: int, n_tokens: int) -> None:
    seconds = time.perf_counter() - start
    peak = max(resource.getrusage(who).ru_maxrss
               for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(json.dumps({"mb_per_second": n_bytes / 1e6 / seconds, "peak_mb": peak / 1024,
                      "tokens": n_tokens, "seconds": seconds}))


def measure(side: str, text: Path, tokenizer: Path, out: Path, processes: int,
            ) -> dict[str, float]:
    """Run one side in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--run", side, text, tokenizer, out, str(processes)],
        stdout=subprocess.PIPE, check=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})  # a process is a core
    return json.loads(done.stdout.decode().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--processes", type=int, nargs="+", default=[os.cpu_count()])
    parser.add_argument("--text", nargs="+", default=[str(SHARED)], help="text to draw from")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--run", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        side, text, made, out, processes = options.run
        SIDES[side](text, made, out, int(processes))
        return
    sides = [side for side in SIDES if side == "ours" or not options.no_peer]
    if importlib.util.find_spec("datatrove") is None and "datatrove" in sides:
        sides.remove("datatrove")
        print("datatrove is left out: pip install 'datatrove[processing]'")
    found: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, megabytes in (("whole", options.megabytes), ("half", options.megabytes / 2)):
            write_text(root / name, megabytes, options.text)
        tokenizer = root / "tokenizer"
        tk.build(keys.Tokenizer(vocab_size=8_192, sample_bytes=5_000_000), keys.Data(),
                 resolve([str(root / "half")]), tokenizer)
        for many in options.processes:
            of = found[str(many)] = {
                side: measure(side, root / "whole", tokenizer, root / f"{side}-{many}", many)
                for side in sides}
            of["ours, half the text"] = measure("ours", root / "half", tokenizer,
                                                root / f"half-{many}", many)
            for side, got in of.items():
                print(f"{many} processes: {side} {got['mb_per_second']:.1f} MB/s, peak "
                      f"{got['peak_mb']:.0f} MB, {got['tokens']:,} tokens")
    if options.json:
        most = found[str(options.processes[-1])]
        peers = {side: most[side]["mb_per_second"] for side in sides if side != "ours"}
        print(json.dumps({
            "ours": most["ours"]["mb_per_second"], "peer": max(peers.values(), default=None),
            "unit": "MB/s", "what_ours": "planearly: read, deduplicate, tokenize, index",
            "what_peer": max(peers, key=peers.__getitem__) if peers else None,
            "megabytes": options.megabytes, "by_processes": found}))


if __name__ == "__main__":
    main()
