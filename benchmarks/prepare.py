"""Preparation: MB of text per second and peak memory, beside `datasets.map`.

    python benchmarks/prepare.py [--megabytes 40] [--text FILES...] [--json]

Ours reads JSON lines, finds duplicates and long paragraphs, tokenizes and writes the token dataset;
the peer reads the same JSON lines and tokenizes them with the same tokenizer by `datasets.map`, in
batches, with as many processes as ours has. Each runs in a fresh process; ours once more on half of
the text, to show that memory does not grow with the corpus. Peaks are of the largest process
(resident memory).
"""

from __future__ import annotations

import argparse
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


def run_ours(text: str, tokenizer: str, out: str) -> None:
    from planearly.data.build import tokenize_corpus

    start = time.perf_counter()
    meta = tokenize_corpus(resolve([text]), Path(tokenizer), 256, keys.Data(), Path(out))
    report(start, meta["n_bytes"], meta["n_tokens"])


def run_peer(text: str, tokenizer: str, out: str) -> None:
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
                          batched=True, remove_columns=["text"], num_proc=os.cpu_count())
    encoded.save_to_disk(f"{out}/saved")
    taken = time.perf_counter()
    tokens = sum(map(len, encoded["ids"]))
    report(start + time.perf_counter() - taken, sum(encoded["bytes"]), tokens)


def report(start: float, n_bytes: int, n_tokens: int) -> None:
    seconds = time.perf_counter() - start
    peak = max(resource.getrusage(who).ru_maxrss
               for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(json.dumps({"mb_per_second": n_bytes / 1e6 / seconds, "peak_mb": peak / 1024,
                      "tokens": n_tokens, "seconds": seconds}))


def measure(what: str, text: Path, tokenizer: Path, out: Path) -> dict[str, float]:
    """Run one side in a fresh process."""
    done = subprocess.run([sys.executable, __file__, "--run", what, text, tokenizer, out],
                          stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.decode().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--text", nargs="+", default=[str(SHARED)], help="text to draw from")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        {"ours": run_ours, "peer": run_peer}[options.run[0]](*options.run[1:])
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, megabytes in (("whole", options.megabytes), ("half", options.megabytes / 2)):
            write_text(root / name, megabytes, options.text)
        tokenizer = root / "tokenizer"
        tk.build(keys.Tokenizer(vocab_size=8_192, sample_bytes=5_000_000), keys.Data(),
                 resolve([str(root / "half")]), tokenizer)
        half = measure("ours", root / "half", tokenizer, root / "ours-half")
        ours = measure("ours", root / "whole", tokenizer, root / "ours")
        peer = (None if options.no_peer
                else measure("peer", root / "whole", tokenizer, root / "peer"))
    result = {
        "ours": ours["mb_per_second"], "peer": peer and peer["mb_per_second"], "unit": "MB/s",
        "what_ours": "planearly: read, deduplicate, tokenize, index",
        "what_peer": "datasets: load_dataset('json'), map(tokenizer), save_to_disk",
        "megabytes": options.megabytes, "processes": os.cpu_count(),
        "peak_mb_ours": ours["peak_mb"], "peak_mb_ours_half_the_text": half["peak_mb"],
        "peak_mb_peer": peer and peer["peak_mb"],
    }
    print(f"ours {result['ours']:.1f} MB/s, peak {ours['peak_mb']:.0f} MB "
          f"({half['peak_mb']:.0f} MB on half the text)")
    if peer:
        print(f"datasets.map {peer['mb_per_second']:.1f} MB/s, peak {peer['peak_mb']:.0f} MB")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
