"""Divide a pool by its sources, to tell what a domain's own sources in the generic text are worth.

    python benchmarks/sources.py --pool ../shared/data/generic --out pools \\
        --sources medquad imdb_reviews digitalgov bible_kjv stacks_project python_peps

Writes ``domains/SOURCE/{train,valid,test}.jsonl``, a random part of each source; ``inside``, the
pool without these documents, in which the rest of every source stays; ``outside``, the pool
without any document of these sources; and with ``--keep 0.1`` ``kept-0.1``, in which a random tenth
of the rest stays. recipes/study-inside.yaml, study-outside.yaml and study-tenth.yaml train on them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from planearly import keys
from planearly.data.documents import Problems, split_hash
from planearly.data.inputs import resolve
from planearly.data.readers import read_documents
from planearly.errors import UserError
from planearly.progress import say

SPLITS = {"train": 0.6, "valid": 0.15, "test": 0.25}
"""Shares of a domain's characters."""


def taken(files: list[str], sources: list[str], characters: int, seed: int) -> dict[int, str]:
    """Hashes of the documents that a domain is made of, and the split of each: of every source the
    least by hash, up to so many characters.

    Raises:
        UserError: a source is not in the pool, or has less than twice as many.
    """
    found: dict[str, list[tuple[int, int]]] = {name: [] for name in sources}
    for source, text in documents(files):
        if source in found:
            found[source].append((split_hash(text, seed), len(text)))
    splits = {}
    for name, sizes in found.items():
        if (has := sum(size for _, size in sizes)) < 2 * characters:
            raise UserError(f"option '--sources' names '{name}', of which the pool has {has} "
                            f"characters: twice --characters ({characters}) are needed")
        names, ends, total = list(SPLITS), [], 0.0
        for share in SPLITS.values():
            total += share * characters
            ends.append(total)
        so_far = 0
        for key, size in sorted(sizes):
            if so_far >= characters:
                break
            splits[key] = names[next(i for i, end in enumerate(ends) if so_far < end)]
            so_far += size
    return splits


def documents(files: list[str]) -> Iterator[tuple[str, str]]:
    """(source, text) of every document."""
    settings = keys.Data()
    problems = Problems(settings.max_bad_share)
    for unit in resolve(files):
        for document in read_documents(unit, settings, problems):
            yield document.source, document.text
    problems.check()


def divide(files: list[str], sources: list[str], characters: int, seed: int, out: Path,
           keep: Sequence[float] = ()) -> Counter:
    """Write the domains and the pools; characters of each.

    Args:
        keep: shares of the documents that are left of every source, a pool for each; what is in
            one is in those of larger shares.
    """
    splits = taken(files, sources, characters, seed)
    written: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        handles: dict[str, IO[str]] = {}

        def put(place: str, source: str, text: str) -> None:
            if place not in handles:
                path = out / f"{place}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                handles[place] = stack.enter_context(open(path, "w", encoding="utf-8"))
            handles[place].write(json.dumps({"text": text, "source": source}) + "\n")
            written[place] += len(text)

        for source, text in documents(files):
            split = splits.get(split_hash(text, seed)) if source in sources else None
            if split:
                put(f"domains/{source}/{split}", source, text)
                continue
            put("inside/part-00", source, text)
            # another hash than that which took the domains: their documents are its least
            place = split_hash(text, seed + 1) / 2**64 if source in sources else 0.0
            for share in set(keep):
                if place < share:
                    put(f"kept-{share:g}/part-00", source, text)
            if source not in sources:
                put("outside/part-00", source, text)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pool", nargs="+", required=True, help="files or folders")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sources", nargs="+", required=True, help="that become domains")
    parser.add_argument("--characters", type=int, default=1_200_000, help="of a domain, all splits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=float, nargs="*", default=[],
                        help="shares of the rest of a source, of which a pool each is made")
    asked = parser.parse_args()
    if asked.characters < 1:
        parser.error("--characters is to be above 0")
    if not all(0 < share < 1 for share in asked.keep):
        parser.error("--keep takes shares between 0 and 1")
    if asked.out.exists() and any(asked.out.iterdir()):
        parser.error(f"--out {asked.out} is not empty: name a new folder")
    try:
        written = divide(asked.pool, asked.sources, asked.characters, asked.seed, asked.out,
                         asked.keep)
    except UserError as error:
        parser.error(str(error))
    for place, size in sorted(written.items()):
        say(f"{place}: {size / 1e6:.2f}M characters")


if __name__ == "__main__":
    main()
