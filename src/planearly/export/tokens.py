"""The tokenizer of an exported folder: with the token that begins a document, and one to pad with.

In training every document begins with a token; a prompt without it is text that the model has never
seen begin so. The exported tokenizer adds it, as the GGUF file tells llama.cpp to.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from planearly import files
from planearly.data import tokenizer
from planearly.errors import UserError

CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = ("tokenizer.json", CONFIG, "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja")
_GENERIC = "PreTrainedTokenizerFast"
"""The class of `transformers` that takes ``tokenizer.json`` as it is."""


def special_tokens(folder: Path, entries: int) -> tuple[int, int]:
    """Ids of the tokens that open and close a document.

    Args:
        entries: rows of the model's embedding.

    Raises:
        UserError: no tokenizer there, none of its tokens ends a document, or it has more entries
            than the model.
    """
    config = files.read_json(folder / CONFIG)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json: it is not a tokenizer folder")
    loaded = tokenizer.load(folder)
    largest = max(loaded.get_vocab(with_added_tokens=True).values())
    if largest >= entries:
        raise UserError(f"the tokenizer in {folder} has an entry {largest}, the model has "
                        f"{entries} entries: they do not belong together, take the model's own "
                        "tokenizer")

    def number(key: str) -> int | None:
        token = config.get(key) if isinstance(config, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        return loaded.token_to_id(token) if isinstance(token, str) else None

    eos = number("eos_token")
    if eos is None:
        raise UserError(f"the tokenizer in {folder} has no eos_token in tokenizer_config.json: "
                        "name one there")
    bos = number("bos_token")
    return eos if bos is None else bos, eos


def write_tokenizer(source: Path, folder: Path, bos: int) -> None:
    """Copy a tokenizer into a model folder, made to begin texts as documents began.

    Args:
        source: of a run, or an open checkpoint whose tokenizer may do so already.
        bos: of :func:`special_tokens`.
    """
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    loaded = tokenizer.load(folder)
    token = loaded.id_to_token(bos)
    if token is None or begins_itself(folder, bos):
        return
    spec = files.read_json(folder / "tokenizer.json")
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    begun = {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}},
                 {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {token: {"id": token, "ids": [bos], "tokens": [token]}},
    }
    own = spec.get("post_processor")
    spec["post_processor"] = {"type": "Sequence", "processors": [own, begun]} if own else begun
    files.write_json(folder / "tokenizer.json", spec)
    config = files.read_json(folder / CONFIG)
    if config.get("tokenizer_class") != _GENERIC:  # others may make one of their own of the file
        from transformers import AutoTokenizer

        read = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if read("a").input_ids[:1] != [bos]:
            named = {key: text for key, text in read.special_tokens_map.items()
                     if isinstance(text, str) and loaded.token_to_id(text) is not None}
            files.write_json(folder / CONFIG, {**named, **config, "tokenizer_class": _GENERIC})


def complete(folder: Path, context: int | None) -> None:
    """Name a token to pad with where there is none: the one that ends documents.

    Batches are padded before the text, where a model that continues it needs the padding.

    Args:
        context: most tokens that the model reads; None: as the tokenizer says.
    """
    config = files.read_object(folder / CONFIG)
    config["padding_side"] = "left"
    if context is not None:
        config["model_max_length"] = context
    files.write_json(folder / CONFIG, config)
    place = folder / "special_tokens_map.json"
    named = files.read_object(place) if place.is_file() else {}
    if config.get("pad_token") or named.get("pad_token"):
        return
    pad = named.get("eos_token") or config.get("eos_token")
    files.write_json(folder / CONFIG, {**config, "pad_token": pad})
    if named:
        files.write_json(place, {**named, "pad_token": pad})


def begins_itself(folder: Path, bos: int) -> bool:
    """Whether the tokenizer in a folder puts the token that begins documents before a text."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a").ids
    return ids[:1] == [bos]
