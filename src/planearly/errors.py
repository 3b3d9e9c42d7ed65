"""The one exception a user is meant to read."""


class UserError(Exception):
    """Something the user can mend.

    The message is one sentence (two at most): what is wrong, where (file and line of the data, key
    of the recipe), and what to do about it. The command prints it without a traceback and exits
    with status 2. Control characters of the values that it quotes are shown escaped.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in str(message)))


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
