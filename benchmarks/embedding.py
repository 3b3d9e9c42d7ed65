"""Windows embedded per second: both embedders beside plain sentence-transformers in float32.

    python benchmarks/embedding.py --json [--texts FILE.jsonl]

Windows are the text of a file's records cut at 1,000 characters, or words drawn at random. The last
line is one JSON object: windows per second of `ours` (sentence-bert) and of the `peer`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch

from planearly import keys
from planearly.cluster import embed
from planearly.data.documents import Problems
from planearly.data.inputs import resolve
from planearly.data.readers import read_documents

_CHARACTERS = 1000


def windows(path: Path | None, n: int) -> list[str]:
    if path is None:
        from transformers import AutoTokenizer

        vocabulary = AutoTokenizer.from_pretrained(embed._packaged()).get_vocab()
        words = sorted(w for w in vocabulary if w.isalpha())
        rng = np.random.default_rng(0)
        return [" ".join(rng.choice(words, 300))[:_CHARACTERS] for _ in range(n)]
    found: list[str] = []
    for unit in resolve([str(path)]):
        for document in read_documents(unit, keys.Data(), Problems(1.0)):
            text = document.text
            found += [text[i : i + _CHARACTERS] for i in range(0, len(text), _CHARACTERS)]
            if len(found) >= n:
                return found[:n]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="last line is a JSON object")
    parser.add_argument("--texts", type=Path, help="a file of documents (default: random words)")
    parser.add_argument("--n", type=int, default=384, help="windows; the static embedder: 32 times")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    texts = windows(arguments.texts, 32 * arguments.n)

    from sentence_transformers import SentenceTransformer

    peer = SentenceTransformer(str(embed._packaged()))  # its own choice of device, float32
    static, contextual = embed.load_embedder("static"), embed.load_embedder("sentence-bert")
    runs = {
        "sentence-transformers": (lambda t: peer.encode(t, normalize_embeddings=True), 1),
        "sentence-bert": (contextual.embed, 1),
        "static": (static.embed, 32),
    }
    rate: dict[str, float] = {}
    for name, (run, times) in runs.items():
        run(texts[:64])
        part = texts[: times * arguments.n]
        began = time.perf_counter()
        run(part)
        rate[name] = len(part) / (time.perf_counter() - began)
        print(f"{name:22} {rate[name]:9.1f} windows/s", flush=True)
    if arguments.json:
        print(json.dumps({
            "what": f"windows of {_CHARACTERS} characters embedded per second, {peer.device}",
            "ours": rate["sentence-bert"], "peer": rate["sentence-transformers"],
            "peer_name": "sentence-transformers encode, float32", "static": rate["static"],
            "threads": torch.get_num_threads(),
        }))


if __name__ == "__main__":
    main()
