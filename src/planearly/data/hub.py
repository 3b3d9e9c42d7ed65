"""Hugging Face datasets as documents, streamed: ``hf://NAME[/CONFIG][:SPLIT]``.

NAME is ``organisation/dataset`` (or a bare old-style name), SPLIT is ``train`` by default. An
absolute or dotted path instead of a name (``hf:///data/mine``) is a local dataset: a folder written
by ``save_to_disk``, or one of data files in the layout of the hub.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from planearly.data.documents import Unit, printable
from planearly.errors import UserError


def resolve(entry: str) -> list[Unit]:
    """One unit per shard of the dataset.

    Raises:
        UserError: `datasets` is not installed; no such dataset, configuration or split.
    """
    path, _, _ = _parse(entry)
    size = modified = 0
    if _local(path):
        found = [p.stat() for p in sorted(Path(path).rglob("*")) if p.is_file()]
        size, modified = sum(s.st_size for s in found), max((s.st_mtime_ns for s in found),
                                                            default=0)
    shards = max(1, _load(entry).num_shards)
    unit = Unit(entry, "hub", size // shards, modified)
    return [dataclasses.replace(unit, shard=(number, shards)) for number in range(shards)]


def records(unit: Unit, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The records of one shard, with those of ``columns`` that there are.

    Raises:
        UserError: a record that cannot be read, or a connection that broke; with shard and row.
    """
    dataset = _load(unit.path)
    number, shards = unit.shard
    if shards > 1:
        dataset = dataset.shard(num_shards=shards, index=number)
    wanted = [name for name in dict.fromkeys(columns) if name in (dataset.column_names or [])]
    if columns[0] in wanted:
        dataset = dataset.select_columns(wanted)
    row = 0
    try:
        for record in dataset:
            yield record
            row += 1
    except Exception as error:  # datasets raises what its readers, and theirs, raise
        brief = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{unit.path}: shard {number + 1} of {shards} cannot be read after row "
                        f"{row} ({printable(brief)}); start again, or mend that record") from error


def _parse(entry: str) -> tuple[str, str | None, str]:
    """(name or path, configuration, split)"""
    body, _, split = entry.removeprefix("hf://").partition(":")
    if not body:
        raise UserError(f"'{entry}' should be hf://NAME[/CONFIG][:SPLIT]")
    if _local(body):
        return body, None, split or "train"
    parts = body.split("/")
    return "/".join(parts[:2]), "/".join(parts[2:]) or None, split or "train"


def _local(path: str) -> bool:
    return path.startswith(("/", "."))


def _load(entry: str) -> Any:
    """The streamed dataset."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{entry} needs the package 'datasets': pip install planearly[hub]"
                        ) from error
    path, configuration, split = _parse(entry)
    try:
        if _local(path) and not Path(path).is_dir():
            raise UserError(f"{entry}: there is no folder {path}")
        if _local(path) and (Path(path, "dataset_dict.json").is_file()
                             or Path(path, "state.json").is_file()):
            stored = datasets.load_from_disk(path)
            if isinstance(stored, datasets.DatasetDict):
                if split not in stored:
                    raise UserError(f"{entry} has no split '{split}'; it has {', '.join(stored)}")
                stored = stored[split]
            return stored.to_iterable_dataset()
        return datasets.load_dataset(path, configuration, split=split, streaming=True)
    except (ValueError, OSError) as error:
        brief = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot read {entry}: {brief}") from error
