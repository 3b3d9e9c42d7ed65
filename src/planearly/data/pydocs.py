"""A corpus that every machine with this package has: the documentation of its Python packages.

Docstrings, and the prose files shipped beside them, are read from the standard library and from
site-packages; one document per function, or class with its methods, written as reference
documentation reads: a heading with the qualified name and signature, then the text. One package is
held out as "my domain", split by source file. Sources are parsed, never imported. This is the
demo's corpus: it needs no network.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import multiprocessing
import os
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from planearly import processes
from planearly.errors import UserError
from planearly.files import atomic_folder, write_json
from planearly.progress import progress

NAME = "pydocs"
"""As the only entry of a recipe's ``generic``: this corpus."""

#: Packages to hold out, best first. All come with planearly's dependencies. Each is large, of one
#: subject, and has kin in the rest that resembles it without repeating it (SciPy: NumPy,
#: scikit-learn and NetworkX have its style of documentation, NumPy and SymPy its subject).
HELD_OUT = ("scipy", "sklearn", "torch", "networkx", "numpy")
SHORTEST = 200  # characters of a docstring worth reading; a split needs a few hundred of them
SHARDS = 4  # files of the generic corpus, so that later stages can read them side by side
_SHORTEST_PROSE = 1_000
_STDLIB = "python"
_SKIPPED_FOLDERS = {
    "__pycache__", "site-packages", "test", "tests", "idle_test", "licenses", "planearly",
    "_vendor", "_vendored", "vendor", "extern", "externals",
}
_NOT_PROSE = re.compile(
    r"licen[cs]e|copying|notice|authors|credits|vocab|grammar|requirements|cmake|template|skill",
    re.IGNORECASE,
)
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

Definition: TypeAlias = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Source(NamedTuple):
    """A file to read: where it is, its package, and its path relative to the installation."""

    path: str
    package: str
    id: str


class Section(NamedTuple):
    heading: str
    text: str


def build(out: Path, held_out_package: str | None = None,
          roots: Iterable[tuple[str | None, Path]] | None = None,
          workers: int | None = None) -> dict[str, Any]:
    """Write the corpus to the folder ``out``, replacing what is there.

    ``out/generic/{0..3}.jsonl.zst`` and ``out/domain/PACKAGE/{train,valid,test}.jsonl.zst`` hold
    records ``{"text", "source": package, "id": "path#number"}``; ``out/corpus.json`` the counts.
    The same installation gives the same bytes, whatever the number of workers.

    Args:
        out: folder to write.
        held_out_package: the domain, an import name (default: the first of ``HELD_OUT`` that is
            installed with enough text).
        roots: (package name of all its files, or None for one package per entry; folder) to read
            (default: the running interpreter's standard library and site-packages).
        workers: processes (default: one per core, at most 16).

    Returns:
        ``{"domain", "documents": {split: n}, "bytes": {split: n}, "packages": {name: bytes},
        "duplicates", "unreadable"}`` with splits generic, train, valid, test.

    Raises:
        UserError: nothing to read, or the package is not installed or has too little text.
    """
    sources = find_sources(installation() if roots is None else roots)
    if not sources:
        raise UserError("no Python sources found under the installation's library folders")
    found, unreadable = _read_all(sources, workers or min(16, os.cpu_count() or 1))
    text_of = Counter[str]()
    for source, documents in zip(sources, found, strict=True):
        text_of[source.package] += sum(len(s.text) for sections in documents for s in sections)
    domain = held_out_package or _choose(text_of)
    if text_of[domain] < 50 * SHORTEST:
        raise UserError(f"package '{domain}' has {text_of[domain]} characters of documentation "
                        "here, too few for a domain; name a larger installed package")

    # The domain goes first, so that text it shares with another package stays in the domain only:
    # held-out text must not be in the generic corpus.
    order = sorted(range(len(sources)), key=lambda i: (sources[i].package != domain, sources[i].id))
    splits: dict[str, list[dict[str, str]]] = {"generic": [], "train": [], "valid": [], "test": []}
    seen: set[bytes] = set()
    duplicates = 0
    for i in order:
        package, file = sources[i].package, sources[i].id
        split = splits[_split(file) if package == domain else "generic"]
        for number, sections in enumerate(found[i]):
            fresh = [section for section in sections if not _repeats(section.text, seen)]
            duplicates += len(sections) - len(fresh)
            if fresh:
                text = "\n\n".join(f"{heading}\n\n{text}" for heading, text in fresh)
                split.append({"text": text, "source": package, "id": f"{file}#{number}"})
    for name, split in splits.items():
        if not split:
            raise UserError(f"package '{domain}' leaves no document for {name}; "
                            "name a package of more files")

    facts = {
        "domain": domain,
        "documents": {name: len(split) for name, split in splits.items()},
        "bytes": {name: _bytes(split) for name, split in splits.items()},
        "packages": {name: size for name, size in text_of.most_common() if size},
        "duplicates": duplicates,
        "unreadable": unreadable,
    }
    with atomic_folder(out) as folder:
        for shard in range(SHARDS):
            _write(folder / "generic" / f"{shard}.jsonl.zst", splits["generic"][shard::SHARDS])
        for name in ("train", "valid", "test"):
            _write(folder / "domain" / domain / f"{name}.jsonl.zst", splits[name])
        write_json(folder / "corpus.json", facts)
    return facts


def installation() -> list[tuple[str | None, Path]]:
    """The running interpreter's standard library and site-packages, as roots for :func:`build`."""
    paths = sysconfig.get_paths()
    packages = dict.fromkeys(Path(paths[name]).resolve() for name in ("purelib", "platlib"))
    return [(_STDLIB, Path(paths["stdlib"]).resolve()), *((None, path) for path in packages)]


def find_sources(roots: Iterable[tuple[str | None, Path]]) -> list[Source]:
    """Python and prose files under ``roots``, sorted by id; tests and vendored copies left out."""
    found = []
    for package, root in roots:
        for folder, folders, files in os.walk(root):
            folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS
                          and "." not in name]  # hidden, NAME.dist-info, NAME.libs
            for file in files:
                stem, suffix = os.path.splitext(file)
                prose = suffix in (".rst", ".md", ".txt") and not _NOT_PROSE.search(stem)
                if suffix == ".py" or prose:
                    path = Path(folder, file)
                    relative = path.relative_to(root)
                    owner = package or relative.parts[0].removesuffix(suffix)
                    id = f"{package}/{relative.as_posix()}" if package else relative.as_posix()
                    found.append(Source(str(path), owner, id))
    return sorted(found, key=lambda source: source.id)


def read_source(source: Source) -> list[list[Section]] | None:
    """The documents in one file, in order; None for a file that cannot be read or parsed."""
    try:
        raw = Path(source.path).read_bytes()
    except OSError:
        return None
    if not source.path.endswith(".py"):
        text = _clean(raw.decode("utf-8", "replace"))
        title = Path(source.id).with_suffix("").as_posix()
        return [[Section(title, text)]] if _is_prose(text) else []
    if b'"""' not in raw and b"'''" not in raw:
        return []  # parsing is the slow part, and nothing here is long enough
    module = source.id.removeprefix(f"{_STDLIB}/").removesuffix(".py").removesuffix("/__init__")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            found = list(_documents(ast.parse(raw), module.replace("/", ".")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    documents = []
    for sections in found:
        cleaned = [Section(heading, _clean(text)) for heading, text in sections]
        documents.append([section for section in cleaned if len(section.text) >= SHORTEST])
    return [document for document in documents if document]


def _documents(tree: ast.Module, name: str) -> Iterator[list[tuple[str, str]]]:
    """The (heading, text) pairs of each document of a module, in source order."""
    yield [(f"module {name}", ast.get_docstring(tree, clean=False) or "")]
    for child in tree.body:
        if isinstance(child, _DEFINITIONS):
            yield list(_docstrings(child, f"{name}.{child.name}"))
        elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
            yield list(_documenting_call(child.value))
        elif name == "pydoc_data.topics" and isinstance(child, ast.Assign):
            # The language reference that help('TOPIC') shows: a dictionary of texts.
            yield from ([(f"Python language reference: {topic}", text)]
                        for topic, text in ast.literal_eval(child.value).items())


def _docstrings(node: Definition, name: str) -> Iterator[tuple[str, str]]:
    """(heading, text) of a class or function and of all defined inside it."""
    text = ast.get_docstring(node, clean=False)
    if text and len(text) >= SHORTEST:
        yield _heading(node, name), text
    for child in node.body:
        if isinstance(child, _DEFINITIONS):
            yield from _docstrings(child, f"{name}.{child.name}")


def _heading(node: Definition, name: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    return f"{name}({ast.unparse(node.args)})"


def _documenting_call(call: ast.Call) -> Iterator[tuple[str, str]]:
    """Documentation of compiled functions: ``add_docstr(torch.abs, "...")``, ``add_newdoc``."""
    if "doc" not in ast.unparse(call.func).lower() or not call.args:
        return
    strings = sorted((node.lineno, node.col_offset, node.value) for node in ast.walk(call)
                     if isinstance(node, ast.Constant) and isinstance(node.value, str))
    text = "".join(value for _, _, value in strings if "\n" in value)
    first = call.args[0]
    name = first.value if isinstance(first, ast.Constant) else ast.unparse(first)
    inner = [value for _, _, value in strings if value.isidentifier() and value != name]
    if len(text) >= SHORTEST:
        yield ".".join([str(name), *inner]), text


def _clean(text: str) -> str:
    """Common indentation and control characters removed, at most one empty line in a row."""
    text = inspect.cleandoc(text.replace("\r\n", "\n").encode("utf-8", "replace").decode("utf-8"))
    text = re.sub(r"[\x00-\x09\x0b-\x1f\x7f\ufeff]", " ", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" +\n", "\n", text)).strip()


def _is_prose(text: str) -> bool:
    """Sentences rather than data: long enough, mostly letters, several words to a line."""
    if len(text) < _SHORTEST_PROSE:
        return False
    lines = [line for line in text.splitlines() if line.strip()]
    letters = sum(character.isalpha() or character == " " for character in text)
    return letters > 0.75 * len(text) and len(text.split()) > 4 * len(lines)


def _read_all(sources: list[Source], workers: int) -> tuple[list[list[list[Section]]], int]:
    documents, unreadable = [], 0
    # Spawned, not forked: the caller may hold threads (torch), and workers need none of its memory.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, processes.serve, (os.getpid(),)) as pool, \
            progress("reading documentation", len(sources), "files") as meter:
        for found in pool.map(read_source, sources, chunksize=32):
            unreadable += found is None
            documents.append(found or [])
            meter.advance(1)
    return documents, unreadable


def _choose(text_of: Counter[str]) -> str:
    for package in HELD_OUT:
        if text_of[package] >= 1_000_000:
            return package
    raise UserError(f"none of {', '.join(HELD_OUT)} is installed with its documentation; name "
                    "another large package to hold out as the domain")


def _split(id: str) -> str:
    """80/10/10 by a hash of the path, so that a file's split never depends on other files."""
    share = int.from_bytes(hashlib.blake2b(id.encode(), digest_size=4).digest()) / 2**32
    return "train" if share < 0.8 else "valid" if share < 0.9 else "test"


def _repeats(text: str, seen: set[bytes]) -> bool:
    """Whether this text, whitespace aside, came before; remembers it."""
    key = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()
    if key in seen:
        return True
    seen.add(key)
    return False


def _bytes(documents: list[dict[str, str]]) -> int:
    return sum(len(document["text"].encode()) for document in documents)


def _write(path: Path, documents: list[dict[str, str]]) -> None:
    import pyarrow

    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
        for document in documents:
            stream.write(json.dumps(document, ensure_ascii=False).encode() + b"\n")
