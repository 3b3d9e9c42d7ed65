"""Perplexity of any causal model folder in Hugging Face format on any files of documents.

The windows are those of the token datasets (:mod:`planearly.data.dataset`): every document starts
with the model's bos token (its eos token where it has no bos) and ends with its eos token, which is
predicted too; the targets are cut into windows of at most ``context`` that do not overlap. Where
bos is another token than eos, every window is shown with it first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from planearly import keys
from planearly.data import tokenizer as tk
from planearly.data.dataset import IGNORE, cut_windows
from planearly.data.documents import Problems, Unit
from planearly.data.encode import Encoder
from planearly.data.inputs import resolve
from planearly.data.readers import read_documents
from planearly.data.text import pieces
from planearly.errors import UserError
from planearly.evaluate.perplexity import (
    Forward,
    Scores,
    batch_tokens,
    forward_of,
    forward_whole,
    score,
    summary,
)
from planearly.model import hf, outside
from planearly.progress import Meter, progress

DEFAULT_CONTEXT = 1024
_PIECE = 1 << 20
"""Characters encoded at a time: longer documents are cut before a space."""
_AT_ONCE = 1 << 20
"""Tokens kept in memory and scored together."""

Encode = Callable[[str], np.ndarray]


def evaluate_files(model_folder: Path, files: list[str], context: int | None = None,
                   text_field: str = "text") -> dict[str, Any]:
    """Evaluate a model on documents.

    Args:
        files: files, folders, globs, URLs or hf://NAME, as for every corpus.
        context: most targets of a window; None takes the most that the model reads, at most 1,024.
            A model exported by planearly says the context it was trained with.
        text_field: field that holds the text in JSONL or Parquet records.

    Returns:
        :func:`planearly.evaluate.perplexity.summary` of all documents together, and under
        ``files`` that of each file by its path.

    Raises:
        UserError: no such file, no text, no model, a context the model cannot read, or a tokenizer
            that does not belong to the model, has no token that ends a document, or does not know
            the text.
    """
    units = resolve(files)
    model, tokenizer = hf.load(model_folder)
    embedding = model.get_input_embeddings().weight
    start, end = _ends(tokenizer, len(embedding), model_folder)
    encode, unknown = _encoder(tokenizer, start, end)
    context = _context(model, model_folder, context)
    settings = keys.Data(text_field=text_field)
    problems = Problems(settings.max_bad_share)

    if held := outside.hold(model, context):
        forward = forward_of(held)
    else:
        forward = forward_whole(
            lambda inputs: model(input_ids=inputs, use_cache=False).logits, embedding.device)
    scores: dict[str, list[Scores]] = {}
    n_bytes: dict[str, int] = {}
    with progress("evaluating", None, "tokens") as meter:
        for unit in units:
            for streams, size in _batches(unit, settings, problems, encode):
                n_bytes[unit.path] = n_bytes.get(unit.path, 0) + size
                for stream in streams:
                    check_ids(stream, len(embedding), model_folder)
                scores.setdefault(unit.path, []).append(
                    _score(forward, streams, context, len(embedding), meter,
                           start if start != end else None))
    problems.check()
    problems.tell()
    tk.check_unknown(unknown(), sum(n_bytes.values()), "the text")
    if not scores:
        raise UserError(f"there is no text to evaluate on in {', '.join(files)}; "
                        f"{problems.first()}".rstrip("; "))
    joined = {name: _join(parts) for name, parts in scores.items()}
    found = {name: summary(*one.units(), n_bytes[name]) for name, one in joined.items()}
    total = summary(*_join(list(joined.values())).units(), sum(n_bytes.values()))
    if not np.isfinite(total["nll_per_token"]):
        raise UserError(f"the model in {model_folder} gives likelihoods that are not numbers: its "
                        "weights are damaged, or its config.json is")
    return {**total, "files": found}


def _context(model: Any, folder: Path, asked: int | None) -> int:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if asked is None:
        return min(most or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if asked < 1 or (most and asked > most):
        raise UserError(f"the context is {asked}; the model in {folder} reads 1 to "
                        f"{most or 'any number of'} tokens")
    return asked


def _ends(tokenizer: Any, entries: int, folder: Path) -> tuple[int, int]:
    """Ids of the token before a document and of the one after it.

    Args:
        tokenizer: of `transformers`.
        entries: rows of the model's embedding.

    Raises:
        UserError: none ends a document, or the model has no such entries.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {folder} has no eos_token, so it cannot say where a "
                        "document ends: name one in tokenizer_config.json")
    start = tokenizer.bos_token_id
    found = (tokenizer.eos_token_id if start is None else start), tokenizer.eos_token_id
    check_ids(found, entries, folder)
    return found


def check_ids(ids: Sequence[int] | np.ndarray, entries: int, folder: Path) -> None:
    """Refuse tokens that a model of so many entries does not have."""
    if (largest := int(np.max(ids))) >= entries:
        raise UserError(f"the tokenizer in {folder} gives token {largest}, the model has "
                        f"{entries}: they do not belong together, put the model's own "
                        "tokenizer there")


def _encoder(tokenizer: Any, start: int, end: int) -> tuple[Encode, Callable[[], int]]:
    """Text to a document's whole stream; the names of special tokens in a text are text.

    Returns:
        It, and the bytes so far that the tokenizer did not know.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    unknown: Callable[[], int] = int
    if isinstance(backend, tokenizers.Tokenizer):
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        encoder = Encoder(backend)
        unknown = lambda: encoder.unknown  # noqa: E731

        def ids(text: str) -> Any:
            return encoder.encode([text])[0]
    else:
        def ids(text: str) -> Any:
            return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def encode(text: str) -> np.ndarray:
        return np.concatenate([[start], *(ids(piece) for piece in pieces(text, _PIECE)), [end]],
                              dtype=np.int64)

    return encode, unknown


def _batches(unit: Unit, settings: keys.Data, problems: Problems,
             encode: Encode) -> Iterator[tuple[list[np.ndarray], int]]:
    """The documents of a file as streams, about a million tokens at a time, and their bytes."""
    streams: list[np.ndarray] = []
    tokens = size = 0
    for document in read_documents(unit, settings, problems):
        stream = encode(document.text)
        if len(stream) <= 2:
            continue
        streams.append(stream)
        tokens += len(stream)
        size += document.n_bytes
        if tokens >= _AT_ONCE:
            yield streams, size
            streams, tokens, size = [], 0, 0
    if streams:
        yield streams, size


def _score(forward: Forward, streams: list[np.ndarray], context: int, vocab_size: int,
           meter: Meter, begin: int | None) -> Scores:
    """Score whole documents, cut into windows, each shown with ``begin`` first if that is given."""
    lengths = np.array([len(stream) for stream in streams])
    windows = cut_windows(0, np.cumsum(lengths) - lengths, lengths - 1, context, 0)
    offsets, sizes = windows["offset"].astype(np.int64), windows["length"].astype(np.int64)
    stream = np.concatenate(streams)

    def rows(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        position = np.arange(sizes[ids].max())
        inside = position < sizes[ids, None]
        place = np.where(inside, offsets[ids, None] + position, 0)
        inputs = np.where(inside, stream[place], 0)
        if begin is not None:
            inputs[:, 0] = begin
        return inputs, np.where(inside, stream[place + 1], IGNORE)

    nll = score(forward, rows, sizes, batch_tokens(vocab_size), meter.advance)
    return Scores(nll, sizes, windows["document"].astype(np.int64))


def _join(parts: list[Scores]) -> Scores:
    """Scores one after the other; no document is in two of them."""
    counts = [int(part.documents.max()) + 1 for part in parts]
    documents = [part.documents + sum(counts[:i]) for i, part in enumerate(parts)]
    return Scores(np.concatenate([part.nll for part in parts]),
                  np.concatenate([part.lengths for part in parts]), np.concatenate(documents))
