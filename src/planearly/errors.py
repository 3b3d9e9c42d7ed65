"""The one exception a user is meant to read, and what others' errors become of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """Something the user can mend.

    The message is one sentence (two at most): what is wrong, where (file and line of the data, key
    of the recipe), and what to do about it. The command prints it without a traceback and exits
    with status 2. Control characters of the values that it quotes are shown escaped.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


def printable(text: str) -> str:
    """A text on one line, with what cannot be shown (or is not Unicode) escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def ours(error: BaseException) -> bool:
    """Whether a line of this package raised an error, and not one of a library that it called.

    What a library says of its input is the user's to mend; what our own lines raise, other than a
    :class:`UserError`, is a defect, and its traceback is wanted.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return str(name).partition(".")[0] == __name__.partition(".")[0]


def brief(error: BaseException) -> str:
    """The first line of an error's message that says something; its type where none does."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def flattened(error: BaseException) -> str:
    """All of an error's message on one line, 300 characters at most; its type where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextlib.contextmanager
def refused(what: str, mend: str = "") -> Iterator[None]:
    """Anything that a library raises over a folder that somebody else made, as one sentence.

    Args:
        what: the library cannot do, as a sentence without an end.
        mend: the end: what to do about it.

    Raises:
        UserError: the library has raised; an error of our own lines stays as it is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # such a folder makes a library raise anything
        if ours(error):
            raise
        told = flattened(error)
        if isinstance(error, KeyError):  # which says the key alone
            told = f"{type(error).__name__}: {told}"
        raise UserError(f"{what} ({told}){mend}") from error
