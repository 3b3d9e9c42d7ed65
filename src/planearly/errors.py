"""The one exception a user is meant to read."""


class UserError(Exception):
    """Something the user can mend.

    The message is one sentence (two at most): what is wrong, where (file and line of the data, key
    of the recipe), and what to do about it. The command prints it without a traceback and exits
    with status 2. Control characters of the values that it quotes are shown escaped.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in str(message)))


def brief(error: BaseException) -> str:
    """The first line of an error's message that says something; its type where none does."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)
