"""Strangers' values as they may stand in messages: short, on one line, without control characters."""

import reprlib
import shlex
from collections.abc import Collection, Sequence

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
    return _cut(visible(one_line(text)))


def one_line(text: object) -> str:
    """Return a text of any length on one line."""
    try:
        return " ".join(str(text).split())
    except (RecursionError, ValueError):  # a number of too many digits
        return type(text).__name__


def visible(text: str) -> str:
    r"""Return a text whose control characters are spelled out, but for the ends of its lines.

    >>> visible("a\x1b]0;title\x07")
    'a\\x1b]0;title\\x07'
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def some_of(names: Sequence[str], most: int = 3, between: str = ", ") -> str:
    """Return the first of some names, and the number of the others.

    >>> some_of(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    more = len(names) - most
    return between.join(names[:most]) + (f" and {more} more" if more > 0 else "")


def some_modules(names: Collection[str], most: int = 3) -> str:
    """Return some of the names of modules, the outermost first, as a head is, and the number of the others.

    >>> some_modules(["layer.0.norm", "layer.1.norm", "layer.2.norm", "score"])
    'score, layer.0.norm, layer.1.norm and 1 more'
    """
    return some_of(sorted(names, key=lambda name: (name.count("."), name)), most)


def typed(path: object) -> str:
    """Return a path as one types it on a command line.

    >>> typed("merged"), typed("my adapters/merged")
    ('merged', "'my adapters/merged'")
    """
    return shlex.quote(str(path))


def counted(count: int, noun: str) -> str:
    """Return a number of things.

    >>> counted(1, "module"), counted(1200, "module")
    ('1 module', '1200 modules')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def enumerated(names: Sequence[str]) -> str:
    """Return names as a sentence has them.

    >>> enumerated(["flat", "core", "pcb"])
    'flat, core and pcb'
    """
    *others, last = names or [""]
    return f"{', '.join(others)} and {last}" if others else last


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
