"""Hugging Face datasets as documents, streamed: ``hf://NAME[/CONFIG][:SPLIT]``.

NAME is ``organisation/dataset`` (or a bare old-style name), SPLIT is ``train`` by default. An
absolute or dotted path instead of a name (``hf:///data/mine``) is a local dataset: a folder written
by ``save_to_disk``, or one of data files in the layout of the hub.

The commit of a dataset is resolved once and pinned: whoever resolves the same name with the same
pins again asks nobody, and reads the same records.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from planearly.data.documents import Unit, unpacked
from planearly.errors import UserError, brief, ours
from planearly.files import digest

BUFFER = 1 << 17  # bytes
_WEIGHED = 100  # files of a dataset at most that are asked for their size


class Loaded(NamedTuple):
    """A streamed dataset, and the files of it."""

    dataset: Any
    files: list[str]


def resolve(entry: str, pinned: dict[str, Any] | None = None) -> list[Unit]:
    """One unit per shard of the dataset.

    Args:
        pinned: what is known of datasets by entry; what is found out is added.

    Raises:
        UserError: `datasets` is not installed; no such dataset, configuration or split; the hub
            cannot be reached.
    """
    path, *_ = _parse(entry)
    if _local(path):
        found = [(str(p.relative_to(path)), (s := p.stat()).st_size, s.st_mtime_ns)
                 for p in sorted(Path(path).rglob("*")) if p.is_file()]
        facts = _facts(entry, digest(found))
    else:
        pinned = {} if pinned is None else pinned
        if entry not in pinned:
            pinned[entry] = _facts(entry, _commit(entry, path))
        facts = pinned[entry]
    shards = facts["shards"]
    unit = Unit(entry, "hub", facts["size"] // shards, revision=facts["revision"])
    return [dataclasses.replace(unit, shard=(number, shards)) for number in range(shards)]


def name_of(entry: str) -> str:
    """The dataset's name, or its folder's, without configuration and split."""
    path, *_ = _parse(entry)
    return Path(path).name if _local(path) else path


def _facts(entry: str, revision: str) -> dict[str, Any]:
    """What is pinned of a dataset; ``size`` is that of its text in bytes, 0 where nobody knows."""
    dataset, files = _load(entry, revision)
    path, _, split = _parse(entry)
    splits = getattr(dataset.info, "splits", None) or {}
    size = getattr(splits.get(split), "num_bytes", 0) if split in splits else 0
    return {"revision": revision, "size": size or round(_size(path, files, revision)),
            "shards": max(1, dataset.num_shards)}


def is_pinned(facts: Any) -> bool:
    """Whether this is what :func:`resolve` finds out about a dataset."""
    return isinstance(facts, dict) and isinstance(facts.get("revision"), str) and all(
        type(facts.get(key)) is int for key in ("size", "shards")) and facts["shards"] > 0


def _size(path: str, files: list[str], revision: str) -> float:
    """Bytes of text in a dataset's files, about, from a hundred of them, evenly spaced; 0 where
    nobody knows."""
    many = min(len(files), _WEIGHED)
    some = [files[len(files) * one // many] for one in range(many)]
    if _local(path):
        sizes = {name: Path(name).stat().st_size for name in some}
    else:
        from huggingface_hub import HfApi

        names = [name.partition(f"@{revision}/")[2] for name in some]
        try:
            found = HfApi().get_paths_info(path, names, revision=revision, repo_type="dataset")
        except unanswered():  # nothing but an estimate
            return 0.0
        sizes = {each.path: getattr(each, "size", 0) for each in found}
    return sum(unpacked(*each) for each in sizes.items()) * len(files) / max(len(sizes), 1)


def _commit(entry: str, name: str) -> str:
    """The commit that the hub has of a dataset now."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name).sha)
    except unanswered() as error:
        raise _unreadable(entry, error) from error


def unanswered() -> tuple[type[Exception], ...]:
    """What `huggingface_hub` raises where the hub refuses, or no answer of it comes."""
    from huggingface_hub.errors import HTTPError

    return OSError, ValueError, HTTPError


def records(unit: Unit, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The records of one shard, with those of ``columns`` that there are.

    Args:
        columns: the text's first; ``a.b`` is what column ``a`` holds under ``b``.

    Raises:
        UserError: a record that cannot be read, or a connection that broke; with shard and row.
    """
    dataset = _load(unit.path, unit.revision).dataset
    number, shards = unit.shard
    if shards > 1:
        dataset = dataset.shard(num_shards=shards, index=number)
    known = dataset.column_names or []
    wanted = list(dict.fromkeys(each for name in columns
                                for each in (name, name.partition(".")[0]) if each in known))
    if columns[0] in wanted:
        dataset = dataset.select_columns(wanted)
    row = 0
    try:
        for record in dataset:
            yield record
            row += 1
    except Exception as error:  # datasets raises what its readers, and theirs, raise
        if ours(error):
            raise
        raise UserError(f"{unit.path}: shard {number + 1} of {shards} cannot be read after row "
                        f"{row} ({brief(error)}); start again, or mend that "
                        "record") from error


def _parse(entry: str) -> tuple[str, str | None, str]:
    """(name or path, configuration, split)"""
    body, _, split = entry.removeprefix("hf://").partition(":")
    if not body:
        raise UserError(f"'{entry}' should be hf://NAME[/CONFIG][:SPLIT]")
    if _local(body):
        path, card = Path(body), Path(body).parent / "README.md"
        if card.is_file() and (not path.is_dir() or re.search(
                rf"^\W*config_name:\W*{re.escape(path.name)}\W*$",
                card.read_text("utf-8", "replace"), re.MULTILINE)):
            return str(path.parent), path.name, split or "train"
        return body, None, split or "train"
    parts = body.split("/")
    return "/".join(parts[:2]), "/".join(parts[2:]) or None, split or "train"


def _local(path: str) -> bool:
    return path.startswith(("/", "."))


@functools.lru_cache(maxsize=8)
def _load(entry: str, revision: str) -> Loaded:
    """A dataset as of a commit (of a local one: of what lay there then)."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{entry} needs the package 'datasets': pip install planearly[hub]"
                        ) from error
    from fsspec.compression import register_compression

    # fsspec's own needs another package, and reads the first frame of several alone
    register_compression("zstd", zstd_reader, "zst", force=True)
    path, configuration, split = _parse(entry)
    local = _local(path)
    if local and not Path(path).is_dir():
        raise UserError(f"{entry}: there is no folder {path}")
    at = {} if local else {"revision": revision}
    try:
        if local and (Path(path, "dataset_dict.json").is_file()
                      or Path(path, "state.json").is_file()):
            stored = datasets.load_from_disk(path)
            if isinstance(stored, datasets.DatasetDict):
                if split not in stored:
                    raise UserError(f"{entry} has no split '{split}'; it has {', '.join(stored)}")
                stored = stored[split]
            return Loaded(stored.to_iterable_dataset(),
                          [file["filename"] for file in stored.cache_files])
        builder = datasets.load_dataset_builder(path, configuration, **at)
        return Loaded(builder.as_streaming_dataset(split=split),
                      list((builder.config.data_files or {}).get(split) or []))
    except UserError:
        raise
    except Exception as error:  # datasets raises what its readers, and theirs, raise
        if ours(error):
            raise
        raise _misnamed(entry, at) or _unreadable(entry, error) from error


def zstd_reader(file: IO[bytes], mode: str = "r") -> IO[bytes]:
    """The unpacked bytes of a zstd file of any number of frames."""
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(file, "zstd"), BUFFER)


def _misnamed(entry: str, at: dict[str, str]) -> UserError | None:
    """What is wrong with a configuration or split, if that is all that is wrong."""
    import datasets

    path, configuration, split = _parse(entry)
    try:
        known = datasets.get_dataset_config_names(path, **at)
        if configuration is None and len(known) > 1 and "default" not in known:
            return UserError(f"{entry} has several configurations ({', '.join(known[:20])}): name "
                             f"one, hf://{path}/CONFIG")
        if configuration is not None and configuration not in known:
            return UserError(f"{entry} has no configuration '{configuration}'; it has "
                             f"{', '.join(known[:20])}")
        splits = datasets.get_dataset_split_names(path, configuration, **at)
    except Exception as error:  # then the first error says more
        if ours(error):
            raise
        return None
    if split not in splits:
        return UserError(f"{entry} has no split '{split}'; it has {', '.join(splits)}")
    return None


def _unreadable(entry: str, error: Exception) -> UserError:
    return UserError(f"cannot read {entry} ({brief(error)}): check the name, the "
                     "connection and, for a gated dataset, that you are logged in (hf auth login)")
