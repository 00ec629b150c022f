"""Regular expressions from strangers, matched in linear time by RE2.

Python's own engine may take years for one short expression (``(a+)+`` and forty letters). RE2 never does, and lacks
only what cannot be matched in linear time: lookarounds and references back. An expression that needs them is refused.
"""

import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

from pcb_peft.errors import PcbPeftError
from pcb_peft.runtime.shown import shown

LONGEST = 20_000  # characters of an expression
SECONDS = 2.0
"""Seconds of the processor, for all names that one expression, or one mapping of them, is tried on."""
_PLAIN = re.compile(r"[\w.-]+", re.ASCII)  # a name: all that is special in it is the dot


class Expression:
    """One regular expression."""

    def __init__(self, text: str, where: str, error_type: type[PcbPeftError]) -> None:
        """Compile an expression.

        Args:
            text: The expression.
            where: Name of its place, for messages.
            error_type: Type of the errors.

        Raises:
            PcbPeftError: Of that type: it is no expression, or one that may take for ever.
        """
        import re2  # pyright: ignore[reportMissingTypeStubs]

        self.where, self._error_type, self._seconds = where, error_type, SECONDS
        if len(text) > LONGEST:
            raise error_type(
                f"{where}: a regular expression of {len(text)} characters; it may have {LONGEST}"
            )
        options = re2.Options()
        options.log_errors = False
        try:
            self._compiled: Any = re2.compile(text, options)
        except (re2.error, ValueError) as error:
            reason = error.args[0] if error.args else ""
            reason = reason.decode(errors="replace") if isinstance(reason, bytes) else reason
            raise error_type(
                f"{where}: {shown(text)!r} is not a regular expression that can be matched in a bounded time "
                f"({shown(reason)}); write it without lookarounds and references back"
            ) from error

    def begins(self, name: str) -> bool:
        """Return whether a name begins with a match."""
        return self._timed(self._compiled.match, name)

    def fits(self, name: str) -> bool:
        """Return whether the whole name is a match."""
        return self._timed(self._compiled.fullmatch, name)

    def _timed(self, match: Any, name: str) -> bool:
        started = time.thread_time()
        found = match(name) is not None
        self._seconds -= time.thread_time() - started
        if self._seconds < 0:
            raise self._error_type(
                f"{self.where}: it takes more than {SECONDS:.0f} s to match; write it in a simpler way"
            )
        return found


class Patterns(dict[str, Any]):
    """A mapping from regular expressions to values, in which PEFT looks up modules: the first key that fits counts.

    A key fits the end of a module's path, from a dot on. It is a plain dict to everything else.
    """

    def __init__(
        self, patterns: Mapping[str, Any], where: str, error_type: type[PcbPeftError]
    ) -> None:
        """Take a mapping; the arguments beside it are those of `Expression`."""
        super().__init__(patterns)
        self._where, self._error_type = where, error_type
        self._index: _Index | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Patterns, (dict(self), self._where, self._error_type)

    def value(self, module: str, default: Any) -> Any:
        """Return the value of the first key that fits a module.

        Raises:
            PcbPeftError: A key is no regular expression, or one that may take for ever.
        """
        if self._index is None:
            self._index = _Index(self, self._where, self._error_type)
        key = self._index.first(module)
        return default if key is None else self[key]


class _Index:
    """Keys, plain names among them by their length and the places of their dots, so that many are looked up at once."""

    def __init__(self, keys: Iterable[str], where: str, error_type: type[PcbPeftError]) -> None:
        self._keys = list(keys)
        self._plain: dict[tuple[int, ...], dict[str, int]] = {}
        self._others: list[tuple[int, Expression]] = []
        for number, key in enumerate(self._keys):
            if _PLAIN.fullmatch(key):
                dots = (len(key), *(match.start() for match in re.finditer(r"\.", key)))
                self._plain.setdefault(dots, {}).setdefault(key, number)
            else:
                self._others.append(
                    (number, Expression(rf"(.*\.)?({key})$", f"{where}: {shown(key)}", error_type))
                )
        self._shapes: dict[int, list[tuple[int, ...]]] = {}
        for dots in self._plain:
            self._shapes.setdefault(dots[0], []).append(dots)

    def first(self, module: str) -> str | None:
        """Return the first key that fits a module."""
        first = self._first_plain(module)
        for number, expression in self._others:
            if number > first:
                break
            if expression.begins(module):
                first = number
                break
        return self._keys[first] if first < len(self._keys) else None

    def _first_plain(self, module: str) -> int:
        best = len(self._keys)
        starts = [0, *(match.end() for match in re.finditer(r"\.", module))]
        for start in starts:
            end = module[start:]
            for dots in self._shapes.get(len(end), ()):
                best = min(best, self._plain[dots].get(_with_dots(end, dots[1:]), best))
        return best


def _with_dots(text: str, places: tuple[int, ...]) -> str:
    """Return a text with dots in some places: a dot in a key stands for any character."""
    if all(text[place] == "." for place in places):
        return text
    characters = list(text)
    for place in places:
        characters[place] = "."
    return "".join(characters)
