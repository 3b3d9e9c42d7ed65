"""A corpus, an embedder and a recipe small enough to run every method in a test."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from planearly import config, keys
from planearly.cluster import embed

TOPICS = {"sea": "ship wave harbour sail tide captain anchor storm deck rope",
          "farm": "cow field barn wheat plough hen gate milk tractor hay",
          "law": "court judge statute appeal counsel verdict clerk motion brief oath"}


COMMON = ["the", "a", "of", "and", "to", "in", "on", "was", "with", "by"]


METHODS = ["slm", "slm-is", "slm-nopt", "llm", "llm-lora", "slm-d", "slm-dsir", "slm-knn",
           "slm-top", "slm-color", "slm-linear"]


SHAPE = {"layers": 1, "d_model": 32, "heads": 2, "d_ff": 48}


def document(topic: str, rng: np.random.Generator, words: int = 60) -> str:
    own = TOPICS[topic].split()
    said = [rng.choice(own if rng.random() < 0.5 else COMMON) for _ in range(words)]
    return " ".join(said).capitalize() + "."


def corpus(root: Path) -> Path:
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": document(t, rng), "source": t})
             for _ in range(120) for t in TOPICS]
    root.mkdir(parents=True, exist_ok=True)
    (root / "generic.jsonl").write_text("\n".join(lines))
    (root / "domains" / "law").mkdir(parents=True)
    for split, n in (("train", 40), ("valid", 12), ("test", 12)):
        texts = [json.dumps({"text": document("law", rng)}) for _ in range(n)]
        (root / "domains" / "law" / f"{split}.jsonl").write_text("\n".join(texts))
    return root


class Words(embed.Embedder):
    """Counts of the topics' words: an embedder without weights."""

    def __init__(self) -> None:
        super().__init__("words", hashlib.sha256(b"words").hexdigest(), lambda: self.vectors)

    @staticmethod
    def vectors(texts):
        table = [w for words in TOPICS.values() for w in words.split()]
        counts = np.array([[t.lower().count(w) + 0.1 for w in table] for t in texts], np.float32)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def recipe(root: Path, **over) -> keys.Recipe:
    values = {
        "generic": [str(root / "generic.jsonl")], "domains_root": str(root / "domains"),
        "methods": METHODS, "context": 16, "pretrain_tokens": 16 * 8 * 24,
        "data": {"generic_eval_tokens": 500}, "tokenizer": {"vocab_size": 320},
        "cluster": {"k": [3]}, "model": SHAPE, "large": {**SHAPE, "layers": 2, "d_model": 64},
        "pretrain": {"batch_tokens": 128, "compile": "no"},
        "finetune": {"batch_tokens": 128, "compile": "no", "max_epochs": 1},
        "lora": {"rank": 4, "step_factor": 2.0},
    }
    return config.build(keys.Recipe, {**values, **over}, "")


def results(out: Path) -> dict[str, bytes]:
    """The files of a run folder that depend on nothing but its recipe and texts."""
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()
            and p.name not in ("manifest.json", "recipe.yaml")
            and not p.relative_to(out).parts[0].startswith(".")}


def command(*words: str, **environment: str) -> list[str]:
    return [sys.executable, "-m", "planearly.cli", *map(str, words)]


def call(*words, check: int | None = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(command(*words), capture_output=True, text=True, timeout=1500,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if check is not None:
        assert done.returncode == check, done.stderr[-3000:]
    return done


STARTED_TOGETHER = """
import sys, time
from pathlib import Path
from planearly.data import documents
documents._GROUP = 20_000
if __name__ == "__main__":
    from planearly.cli import main
    from planearly.stages import pipeline
    from planearly.study import run
    Path(sys.argv[1]).touch()
    while len(list(Path(sys.argv[1]).parent.glob("*.ready"))) < 2:
        time.sleep(0.01)
    main(sys.argv[2:])
"""


def both(folder: Path, *words) -> list[str]:
    """What two processes say that are started with the same command at the same time."""
    (folder / "go.py").write_text(STARTED_TOGETHER)
    started = [subprocess.Popen(
        [sys.executable, folder / "go.py", folder / f"{i}.ready", *map(str, words)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}) for i in range(2)]
    told = [process.communicate(timeout=900)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], told
    return told
