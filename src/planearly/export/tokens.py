"""The tokens that begin and end documents, by a tokenizer's folder."""

from __future__ import annotations

from pathlib import Path

from planearly import files
from planearly.data import tokenizer
from planearly.errors import UserError


def special_tokens(folder: Path, entries: int) -> tuple[int, int]:
    """Ids of the tokens that open and close a document.

    Args:
        entries: rows of the model's embedding.

    Raises:
        UserError: no tokenizer there, none of its tokens ends a document, or it has more entries
            than the model.
    """
    config = files.read_json(folder / "tokenizer_config.json")
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json: it is not a tokenizer folder")
    loaded = tokenizer.load(folder)
    largest = max(loaded.get_vocab(with_added_tokens=True).values())
    if largest >= entries:
        raise UserError(f"the tokenizer in {folder} has an entry {largest}, the model has "
                        f"{entries} entries: they do not belong together")

    def number(key: str) -> int | None:
        token = config.get(key) if isinstance(config, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        return loaded.token_to_id(token) if isinstance(token, str) else None

    eos = number("eos_token")
    if eos is None:
        raise UserError(f"the tokenizer in {folder} has no eos_token in tokenizer_config.json")
    bos = number("bos_token")
    return eos if bos is None else bos, eos
