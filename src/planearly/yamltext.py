"""YAML whose scalars stay as they were typed: ``1.10``, ``no`` and ``2024-13-01`` are text.

What a scalar means is for the reader to say, who knows the key; here only structure is read. Every
error is one sentence with the file and the line.
"""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import Any

import yaml

from planearly.errors import UserError

NULLS = frozenset(("", "~", "null", "Null", "NULL"))
_BOOLS = {word: value for value, words in ((True, "yes true on"), (False, "no false off"))
          for one in words.split() for word in (one, one.capitalize(), one.upper())}
_MOST_BYTES = 4 << 20
_MOST_NODES = 200_000
"""Scalars and lists in all, aliases counted as often as they stand: a file of a few lines can
name ten to the ninth."""
_DEEPEST = 40
_HALVES = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_TEXT = "tag:yaml.org,2002:str"
_PLAIN_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool",
                                                                 "null"))


class Scalar(str):
    """A scalar without quotes, as typed: it may stand for a number, a truth value or nothing."""

    __slots__ = ()

    @property
    def null(self) -> bool:
        return self in NULLS

    @property
    def truth(self) -> bool | None:
        """True or false where it is YAML's word for it."""
        return _BOOLS.get(self)

    def value(self) -> Any:
        """What YAML takes it for; text where it is no right number or date."""
        try:
            return yaml.safe_load(self)
        except (yaml.YAMLError, ValueError):
            return str(self)


class Key(str):
    """A key of a mapping that knows where it stands."""

    origin = ""


class _Loader(yaml.SafeLoader):
    """Structure alone. A ``*`` that names no anchor of the text begins a scalar: a glob."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._known: set[str] = set()

    def _word(self) -> str:
        return re.match(r"[\w-]*", self.prefix(1000)[1:])[0]  # type: ignore[index]

    def fetch_anchor(self) -> None:
        self._known.add(self._word())
        super().fetch_anchor()

    def fetch_alias(self) -> None:
        if self._word() in self._known:
            super().fetch_alias()
        else:
            self.fetch_plain()


class _Words(_Loader):
    """What stands on a command line has no anchors, aliases or tags."""

    fetch_anchor = fetch_alias = fetch_tag = yaml.SafeLoader.fetch_plain


def read(path: Path) -> dict[str, Any]:
    """A file's mapping; keys are :class:`Key`, scalars text or :class:`Scalar`.

    Raises:
        UserError: not readable, not UTF-8, not YAML, not a mapping; a key that stands twice; a tag,
            or nesting that no recipe needs.
    """
    try:
        with open(path, "rb") as handle:
            raw = handle.read(_MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error}): check the path and its "
                        "rights") from error
    if len(raw) > _MOST_BYTES:
        raise UserError(f"{path} is larger than {_MOST_BYTES >> 20} MB: that is no recipe")
    values = _structure(_Loader, _decode(raw, path), str(path))
    if values is None:
        raise UserError(f"{path} is empty: it should hold 'key: value' lines")
    if not isinstance(values, dict):
        raise UserError(f"{path} should hold 'key: value' lines")
    return values


def value(text: str, what: str) -> Any:
    """What was typed after ``key=``, as :func:`read` gives it.

    Raises:
        UserError: brackets or quotes that do not close; ``what`` begins the sentence.
    """
    return _structure(_Words, text, what)


def items(text: str, what: str) -> list[str]:
    """A list of texts as typed: ``[a, b]`` or one alone. Commas separate outside of brackets and
    quotes; quotes at both ends of an item are taken off.

    Raises:
        UserError: a bracket or a quote that does not close, or an item that is empty.
    """
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]") and len(text) > 1):
        return [unquoted(text, what)] if text else []
    found, depth, quote, begin = [], 0, "", 1
    for place, letter in enumerate(text[1:-1] + ",", 1):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and not text[begin:place].strip():
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and depth <= 0:
            found.append(text[begin:place].strip())
            begin, depth = place + 1, 0
    if quote or depth > 0:
        raise UserError(f"{what}: a {'quote' if quote else 'bracket'} is not closed in {text}")
    if found and not found[-1]:
        found.pop()  # after a last comma, or of []
    if not all(found):
        raise UserError(f"{what}: an item is empty in {text}")
    return [unquoted(item, what) for item in found]


def unquoted(text: str, what: str) -> str:
    """A text without the quotes around it, if there are any."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return str(value(text, what))
    return text


def _decode(raw: bytes, path: Path) -> str:
    wide = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
    if raw.startswith(wide) or b"\0" in raw:
        raise UserError(f"{path} is in UTF-16 or UTF-32, or no text at all: a recipe is in UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} line {line} is not UTF-8 (byte 0x{raw[error.start]:02x}): save it "
                        "in UTF-8") from error


def _structure(loader: type[_Loader], text: str, where: str) -> Any:
    """The one document of a text; None where there is none."""
    try:
        reader = loader(text)
        try:
            node = reader.get_single_node()
            return None if node is None else _Builder(where).build(node, 0)
        finally:
            reader.dispose()
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, int(error.position)) + 1
        raise UserError(f"{where} line {number} holds a character that no text has "
                        f"(U+{ord(text[error.position]):04X}): take it out") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = f" line {mark.line + 1}" if mark and loader is _Loader else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        if "'\\t'" in reason:
            reason = "a tab begins the line; indent with spaces"
        raise UserError(f"{where}{line} is not valid YAML: {reason}; text with special characters "
                        "goes in quotes") from error
    except RecursionError as error:
        raise UserError(f"{where} is nested deeper than any recipe needs: write it "
                        "flatter") from error


def _joined(text: str) -> str:
    """A text with the halves of characters joined that JSON escapes one by one."""
    return _HALVES.sub(lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"),
                       text)


class _Builder:
    """Plain values of a tree of nodes."""

    def __init__(self, where: str) -> None:
        self.where, self.nodes = where, 0

    def build(self, node: yaml.Node, depth: int) -> Any:
        self.nodes += 1
        if self.nodes > _MOST_NODES or depth > _DEEPEST:
            raise self.error(node, "is larger or nested deeper than any recipe needs: anchors and "
                                   "aliases multiply it")
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self.mapping(node, depth)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.build(one, depth + 1) for one in node.value]
        if isinstance(node, yaml.ScalarNode) and node.tag in _PLAIN_TAGS:
            return (_joined(str(node.value)) if node.style or node.tag != _TEXT
                    else Scalar(node.value))
        raise self.error(node, f"has the tag {node.tag}, which no recipe key takes: leave it out")

    def mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for name, inner in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise self.error(name, "has a list or a mapping for a key: a key is a word")
            found = self.build(inner, depth + 1)
            if name.value == "<<" and not name.style:
                for one in reversed(found if isinstance(found, list) else [found]):
                    if not isinstance(one, dict):
                        raise self.error(name, "merges ('<<') what is no mapping")
                    merged.update(one)
                continue
            key = Key(name.value)
            key.origin = f"{self.where} line {name.start_mark.line + 1}"
            if key in made:
                raise self.error(name, f"has the key '{key}' a second time: keep one of the two")
            made[key] = found
        return {**{k: v for k, v in merged.items() if k not in made}, **made}

    def error(self, node: yaml.Node, what: str) -> UserError:
        return UserError(f"{self.where} line {node.start_mark.line + 1} {what}")
