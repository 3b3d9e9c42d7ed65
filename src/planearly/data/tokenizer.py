"""The tokenizer: byte-level BPE or Unigram trained on generic text, or one taken as it is.

Ours split numbers into digits, then words as GPT-2 does, and work on bytes: every text comes back
exactly. ``<|endoftext|>`` (id 0) is the only special token; it begins and ends documents. A literal
``<|endoftext|>`` in a text is encoded as text. A tokenizer taken from outside may begin documents
with another token than it ends them with: a model goes on as it was trained.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from planearly import files, keys, storage
from planearly.data import excerpts
from planearly.data.documents import Problems, Unit
from planearly.engine.work import Executor
from planearly.errors import UserError, refused
from planearly.progress import say

EOT = "<|endoftext|>"
_KNOWN_EOT = (EOT, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>", "[SEP]", "<s>",
              "<bos>", "<|begin_of_text|>")
MOST_UNKNOWN = 0.01
"""Largest share of a text that a tokenizer may have no tokens for."""

_LONG = 1_000
_LONG_RUN = re.compile(rf"\s{{{_LONG}}}|[^\W\d_]{{{_LONG}}}|(?:[^\w\s]|_){{{_LONG}}}")
_LONG_SPACES = re.compile(rf"\s{{{_LONG}}}")


def pre_tokenizer() -> Any:
    return pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])


def train(texts: Iterable[str], settings: keys.Tokenizer) -> Tokenizer:
    """Train a tokenizer of at most ``settings.vocab_size`` entries (fewer on little text).

    The same texts in the same order give the same tokenizer.
    """
    entries: dict[str, Any] = {
        "vocab_size": settings.vocab_size, "special_tokens": [EOT], "show_progress": False,
        "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(),
    }
    unigram = settings.kind == "unigram"
    tokenizer = Tokenizer(models.Unigram() if unigram else models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = (trainers.UnigramTrainer(**entries) if unigram
               else trainers.BpeTrainer(min_frequency=2, **entries))
    tokenizer.train_from_iterator(chain.from_iterable(map(_cut_long_runs, texts)), trainer)
    if unigram:
        tokenizer.model = _in_order(tokenizer)
    return tokenizer


def _cut_long_runs(text: str) -> list[str]:
    """A text cut inside runs of more than a thousand spaces, letters or signs.

    A run is one word to the trainer, whose time grows with the square of a word's length.
    """
    if max(map(len, text.split()), default=0) < _LONG and not _LONG_SPACES.search(text):
        return [text]
    ends = [match.end() for match in _LONG_RUN.finditer(text)]
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]


def _in_order(tokenizer: Tokenizer) -> Any:
    """The Unigram model with its pieces in an order that repeats.

    The trainer keeps words in hash maps with random order: sums differ in their last bits, and
    bytes that the text lacks get scores 0.0001 apart, from the lowest up, in any order. They all
    get the lowest.
    """
    eot, *learned = json.loads(tokenizer.to_str())["model"]["vocab"]
    lowest = min(score for _, score in learned)
    lacking = lowest + 0.0001 * (len(pre_tokenizers.ByteLevel.alphabet()) + 1)
    scored = ((piece, lowest if len(piece) == 1 and score <= lacking else score)
              for piece, score in learned)
    rounded = ((piece, round(score, 9)) for piece, score in scored)
    return models.Unigram([tuple(eot), *sorted(rounded, key=lambda entry: (-entry[1], entry[0]))])


def build(settings: keys.Tokenizer, data: keys.Data, units: list[Unit],
          folder: Path, executor: Executor | None = None) -> dict[str, Any]:
    """Train a tokenizer on a sample of the units' text, or take ``settings.path``; save it.

    Args:
        executor: who reads the text (None: processes of this machine).

    Returns:
        What it is: kind, vocab_size (the real one), eot, eot_id, digest, sample_bytes.

    Raises:
        UserError: no text to train on; nothing usable at ``settings.path``.
    """
    used = 0
    if settings.path:
        tokenizer, eot, begin = take(settings.path)
        kind = f"taken from {settings.path}"
    else:
        problems = Problems(data.max_bad_share)
        texts = excerpts.draw(units, data, settings.sample_bytes, problems, folder / "sample",
                              executor)
        if not texts:
            raise UserError(f"no text to train a tokenizer on; {problems.first()}".rstrip("; "))
        used = sum(len(text.encode()) for text in texts)
        say(f"training a {settings.kind} tokenizer of {settings.vocab_size} entries on "
            f"{used / 1e6:.1f} MB")
        tokenizer, eot, begin, kind = train(texts, settings), EOT, EOT, settings.kind
        if tokenizer.get_vocab_size() < settings.vocab_size:
            say(f"the text is too little for {settings.vocab_size} entries: the tokenizer has "
                f"{tokenizer.get_vocab_size()}")
    save(tokenizer, folder, eot, begin)
    return {"kind": kind, "vocab_size": vocab_size(tokenizer), "eot": eot,
            "eot_id": tokenizer.token_to_id(eot), "digest": digest(folder), "sample_bytes": used}


def save(tokenizer: Tokenizer, folder: Path, eot: str = EOT,
         begin: str | None = None) -> None:
    """Write a folder that ``transformers.AutoTokenizer`` loads.

    Args:
        eot: the token that ends documents, and begins them unless ``begin`` is another.

    Texts are encoded without template (no special token is added), truncation or padding.
    """
    spec = json.loads(tokenizer.to_str())
    spec["post_processor"] = spec["truncation"] = spec["padding"] = None
    files.write_json(folder / "tokenizer.json", spec)
    ends = {"bos_token": begin or eot, "eos_token": eot}
    files.write_json(folder / "special_tokens_map.json", ends)
    files.write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", **ends,
        "clean_up_tokenization_spaces": False,
    })


def load(folder: Path) -> Tokenizer:
    """The tokenizer of a folder; special tokens that stand in a text are encoded as text."""
    return plain(_read(Path(folder) / "tokenizer.json"))


def plain(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer, changed in place: it neither truncates nor pads, and reads all text as text."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


@dataclass(frozen=True)
class Opened:
    """A tokenizer's folder, opened: what reads and writes ids, and what datasets of them note.

    Attributes:
        tokenizer: encodes special tokens that stand in a text as text.
        begin, eot: the ids that begin and end documents.
        vocab_size: rows that an embedding needs.
        dtype: of ids on disk.
        digest: two folders share it if they encode alike.
    """

    folder: Path
    tokenizer: Tokenizer
    begin: int
    eot: int
    vocab_size: int
    dtype: np.dtype[Any]
    digest: str


def opened(folder: Path) -> Opened:
    """A folder that :func:`save` wrote; read once per process, and again if its files change.

    Raises:
        UserError: there is no tokenizer, or none that says which token ends a document.
    """
    names = ("tokenizer.json", "tokenizer_config.json")
    found = [(folder / name).stat() for name in names if (folder / name).is_file()]
    return _opened(folder.resolve(), *((each.st_mtime_ns, each.st_size) for each in found))


@functools.lru_cache(maxsize=4)
def _opened(folder: Path, *stamps: tuple[int, int]) -> Opened:
    loaded = load(folder)
    size = vocab_size(loaded)
    return Opened(folder, loaded, _id(folder, "bos_token", loaded),
                  _id(folder, "eos_token", loaded), size, id_type(size), digest(folder))


def id_type(entries: int) -> np.dtype[Any]:
    """The type of ids on disk, by the number of entries."""
    return np.dtype("<u2" if entries <= 1 << 16 else "<u4")


def _read(path: Path) -> Tokenizer:
    if not path.is_file():
        raise UserError(f"there is no tokenizer at {path}: name a folder that holds one")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        if type(error) is not Exception:  # the Rust side's are bare, for all that it cannot read
            raise
        raise UserError(f"{path} is not a tokenizer of the package tokenizers ({error}): save it "
                        "again, or take another") from error


def _id(folder: Path, key: str, loaded: Tokenizer) -> int:
    config = files.read_json(folder / "tokenizer_config.json")
    token = config.get(key) if isinstance(config, dict) else None
    found = loaded.token_to_id(token) if isinstance(token, str) else None
    if found is None:
        raise UserError(f"{folder}: its {key} '{token}' is not in its vocabulary: name "
                        "one that is")
    return found


def vocab_size(tokenizer: Tokenizer) -> int:
    """Rows that an embedding needs: the largest id plus one."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def other_vocabulary(ours: Tokenizer, model: Path) -> str | None:
    """The first token on which a tokenizer and a model folder's differ, in words; None: no such."""
    mine = ours.get_vocab(with_added_tokens=True)
    theirs = load(model).get_vocab(with_added_tokens=True)
    if mine == theirs:
        return None
    token = min(t for t in mine.keys() | theirs.keys() if mine.get(t) != theirs.get(t))
    there, here = theirs.get(token, "missing"), mine.get(token, "missing")
    return f"'{token}' is {there} there and {here} here"


def digest(folder: Path) -> str:
    """Hex SHA-256 that two folders share if they encode alike."""
    folder = Path(folder)
    config = files.read_object(folder / "tokenizer_config.json", "eos_token", "bos_token")
    ends = dict.fromkeys([config["eos_token"], config["bos_token"]])  # one, of most tokenizers
    return files.digest([files.file_digest(folder / "tokenizer.json"), *ends])


def check_unknown(unknown: int, n_bytes: int, what: str) -> None:
    """Say what share of a text a tokenizer has no tokens for.

    Args:
        unknown: bytes that :class:`planearly.data.encode.Encoder` counted as unknown.
        n_bytes: of the whole text.
        what: the text, for the message.

    Raises:
        UserError: the share is larger than :data:`MOST_UNKNOWN`.
    """
    share = unknown / max(n_bytes, 1)
    told = (f"{'' if share < 1e-4 else f'{share:.2%}, '}{unknown} of {n_bytes} bytes of {what} are "
            "unknown to the tokenizer")
    if share > MOST_UNKNOWN:
        raise UserError(f"{told}: what a model says of them means nothing; take a tokenizer that "
                        "knows this text, or train one (tokenizer.path=null)")
    if unknown:
        say(told)


_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files beside a tokenizer.json that :func:`take` reads."""


class Taken(NamedTuple):
    """A tokenizer from outside, and the tokens that end and begin documents."""

    tokenizer: Tokenizer
    eot: str
    begin: str


def located(name: str) -> Path:
    """Where the tokenizer of a name is on this machine; of a URL, its copy."""
    if not storage.is_url(name):
        return files.expanded(name)
    folder, _, file = name.rpartition("/") if name.endswith(".json") else (name, "", "")
    return storage.local(folder, ("tokenizer*.json", "special_tokens_map.json",
                                  "added_tokens.json")) / file


def files_of(name: str) -> list[Path]:
    """What :func:`take` reads of a tokenizer on this machine; empty: it is none of this machine."""
    path = files.expanded(name)
    if path.is_dir() and not (path / "tokenizer.json").is_file():  # transformers looks for others
        return sorted(file for kind in ("*.json", "*.txt", "*.model") for file in path.glob(kind))
    own = path / "tokenizer.json" if path.is_dir() else path
    return [file for file in (own, *map(own.with_name, _BESIDE)) if file.is_file()]


def take(name: str) -> Taken:
    """A tokenizer from a tokenizer.json, a model folder, either by its URL, or the hub.

    Where it does not say how documents begin, they begin as they end.

    Raises:
        UserError: there is none, or it has no token that ends a text.
    """
    path = located(name)
    path = path / "tokenizer.json" if (path / "tokenizer.json").is_file() else path
    end: str | None
    if path.is_file():
        tokenizer = _read(path)
        end, begin = _stated_ends(tokenizer, path.parent)
    else:
        import transformers
        with refused(f"no tokenizer could be taken from '{name}'",
                     "; give a tokenizer.json, a model folder or a hub name"):
            loaded = transformers.AutoTokenizer.from_pretrained(
                path if path.is_dir() else name, trust_remote_code=False)
        if not isinstance(getattr(loaded, "backend_tokenizer", None), tokenizers.Tokenizer):
            raise UserError(f"the tokenizer of '{name}' has no tokenizer.json form: take a model "
                            "that has a fast tokenizer")
        tokenizer, end, begin = loaded.backend_tokenizer, loaded.eos_token, loaded.bos_token
    for token in (end, begin, *_KNOWN_EOT):
        if token and tokenizer.token_to_id(token) is not None:
            known = begin is not None and tokenizer.token_to_id(begin) is not None
            return Taken(tokenizer, token, begin if begin and known else token)
    raise UserError(f"the tokenizer at '{name}' has no end-of-text token (such as {EOT} or </s>): "
                    "take another, or train one (tokenizer.path=null)")


def _stated_ends(tokenizer: Tokenizer, folder: Path) -> tuple[str | None, str | None]:
    """The end-of-text token and the first one that the files beside a tokenizer.json name.

    As transformers does: special_tokens_map.json goes first, unless tokenizer_config.json lists
    the added tokens itself; tokens that tokenizer.json lacks are added to ``tokenizer``.
    """
    def read(name: str) -> dict[str, Any]:
        values = files.read_json(folder / name) if (folder / name).is_file() else {}
        if not isinstance(values, dict):
            raise UserError(f"{folder / name} is not a JSON object: copy the tokenizer again")
        return values

    def content(token: Any) -> str | None:
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) and token else None

    settings, named = read("tokenizer_config.json"), read("special_tokens_map.json")
    added = settings.get("added_tokens_decoder")
    added = added if isinstance(added, dict) else {}
    order = [settings, named] if added else [named, settings]
    end, begin = (next((found for values in order if (found := content(values.get(key)))), None)
                  for key in ("eos_token", "bos_token"))
    by_id = {int(number): text for number, token in added.items()
             if str(number).isdigit() and (text := content(token))}
    by_id |= {number: text for text, number in read("added_tokens.json").items()
              if isinstance(number, int)}
    for text in [*(by_id[number] for number in sorted(by_id)), *filter(None, (end or begin,))]:
        if tokenizer.token_to_id(text) is None:
            tokenizer.add_special_tokens([text])
    return end, begin


