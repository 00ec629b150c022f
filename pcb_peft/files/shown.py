"""Strangers' values as they may stand in messages: short, on one line, without control characters."""

import reprlib

LONGEST = 200  # characters

_short = reprlib.Repr()
_short.maxstring = _short.maxother = LONGEST
_short.maxlist = _short.maxtuple = _short.maxdict = _short.maxset = 8
_short.maxlevel = 3
_short.maxlong = 40


def quoted(value: object) -> str:
    """Return what a value looks like in Python, cut after some items and characters.

    >>> quoted(["x"] * 100)
    "['x', 'x', 'x', 'x', 'x', 'x', 'x', 'x', ...]"
    """
    try:
        return _cut(_short.repr(value))
    except ValueError:  # a number of too many digits
        return f"a {type(value).__name__} of too many digits"


def shown(text: object) -> str:
    r"""Return a text on one line, cut after 200 characters, with control characters spelled out.

    >>> shown("a\nb\x1b[31m")
    'a b\\x1b[31m'
    """
    try:
        words = " ".join(str(text).split())
    except (RecursionError, ValueError):  # a number of too many digits
        return type(text).__name__
    return _cut(
        "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    )


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
