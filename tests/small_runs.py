"""A corpus, an embedder and a recipe small enough to run every method in a test."""

import contextlib
import functools
import hashlib
import io
import json
import os
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np

from planearly import config, keys
from planearly.cli import main
from planearly.cluster import embed
from planearly.data import documents
from small_processes import fork

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


@functools.cache
def _texts() -> dict[str, str]:
    """What the files of a corpus hold."""
    rng = np.random.default_rng(0)
    texts = {"generic.jsonl": "\n".join(
        json.dumps({"text": document(t, rng), "source": t}) for _ in range(120) for t in TOPICS)}
    for split, n in (("train", 40), ("valid", 12), ("test", 12)):
        texts[f"domains/law/{split}.jsonl"] = "\n".join(
            json.dumps({"text": document("law", rng)}) for _ in range(n))
    return texts


def corpus(root: Path) -> Path:
    for name, text in _texts().items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
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


def with_grid(root: Path, *blocks: dict, **over) -> keys.Recipe:
    """A study of these blocks."""
    return recipe(root, study={"grid": list(blocks)}, methods=["slm"], **over)


def results(out: Path) -> dict[str, bytes]:
    """The files of a run folder that depend on nothing but its recipe and texts."""
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()
            and p.name not in ("manifest.json", "recipe.yaml")
            and not p.relative_to(out).parts[0].startswith(".")}


class Done(NamedTuple):
    """What a command ended with."""

    returncode: int
    stdout: str
    stderr: str


def call(*words, check: int | None = 0) -> Done:
    """The command in this process, which spares it the seconds that an interpreter's imports take.

    Args:
        check: the status that it must end with; None: any.
    """
    with (contextlib.redirect_stdout(io.StringIO()) as out,
          contextlib.redirect_stderr(io.StringIO()) as told):
        try:
            main([*map(str, words)])
            status = 0
        except SystemExit as end:
            status = end.code
    assert check in (None, status), told.getvalue()[-3000:]
    return Done(status, out.getvalue(), told.getvalue())


def forked(told: Path, *words, begin: Callable[[], None] | None = None) -> BaseProcess:
    """The command in a process of its own.

    Args:
        told: file to append to what the command says.
        begin: called before it.
    """
    return fork(_command, told, [*map(str, words)], begin)


def _command(told: Path, words: list[str], begin: Callable[[], None] | None) -> None:
    with open(told, "ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    if begin:
        begin()
    main(words)


def _together(ready: Path) -> None:
    documents._GROUP = 20_000
    ready.touch()
    while len(list(ready.parent.glob("*.ready"))) < 2:
        time.sleep(0.01)


def both(folder: Path, *words) -> list[str]:
    """What two processes say that are started with the same command at the same time."""
    files = [folder / f"{i}.told" for i in range(2)]
    started = [forked(file, *words, begin=functools.partial(_together, file.with_suffix(".ready")))
               for file in files]
    for process in started:
        process.join(900)
    told = [file.read_text() for file in files]
    assert [process.exitcode for process in started] == [0, 0], told
    return told
