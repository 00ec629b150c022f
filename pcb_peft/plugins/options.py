"""Options: the keyword-only parameters of a method, a space or a calibration.

Names, kinds, bounds and defaults come from the signature, explanations from the docstring's ``Args`` section.
"""

import dataclasses
import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pcb_peft.errors import OptionError
from pcb_peft.runtime.shown import quoted

RANK = "rank"  # the parameter by which a method is told the integer rank of the result, or None


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """Bounds of a number.

    Attributes:
        low: Smallest value.
        high: Largest value.
        low_open: Whether `low` itself is not allowed.
    """

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float):
            return False
        return (self.low < value if self.low_open else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        return f"in {'(' if self.low_open else '['}{self.low:g}, {self.high:g}]"


Density: TypeAlias = Annotated[float, Range(0, 1, low_open=True)]
"""Fraction of entries that is kept."""

Election: TypeAlias = Literal["weighted", "unweighted"]
"""Whether the weights count in the election of signs."""

Tail: TypeAlias = Annotated[float, Range(0, 0.5)]
"""Fraction at either end of a distribution."""


KIND_NAMES: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One option.

    Attributes:
        name: Its name in Python and in recipes.
        kind: bool, int, float or str.
        default: Its default. If that is None, None may also be given.
        bounds: Bounds of a number.
        choices: All allowed values, if there are few.
        explanation: Its text in the docstring.
    """

    name: str
    kind: type
    default: Any
    bounds: Range = Range()
    choices: tuple[str, ...] = ()
    explanation: str = ""

    @property
    def allowed(self) -> str:
        """Description of the allowed values, such as "a number in (0, 1]"."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        kind = KIND_NAMES[self.kind]
        return kind if self.bounds == Range() else f"{kind} {self.bounds}"

    def check(self, value: Any, owner: str) -> Any:
        """Check a value, and return it as its kind: a float even if an int was given.

        Args:
            value: The value.
            owner: The method, space or calibration, for the message.

        Raises:
            OptionError: The value is of another kind, or out of bounds.
        """
        if value is None and self.default is None:
            return None
        if self.kind is float and type(value) is int:
            value = float(value)
        if (
            type(value) is not self.kind
            or (self.kind in (int, float) and value not in self.bounds)
            or (self.choices and value not in self.choices)
        ):
            raise OptionError(f"{owner}: {self.name} is {quoted(value)}; it must be {self.allowed}")
        return value


def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """Return the keyword-only parameters of a function, by name; `rank` is none of them: the engine passes it."""
    hints = typing.get_type_hints(function, include_extras=True)
    explanations = _explanations(inspect.getdoc(function) or "")
    return {
        name: _option(name, hints[name], parameter.default, explanations.get(name, ""))
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name != RANK
    }


def bind(options: Mapping[str, Option], values: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Return the values of all options: those given, checked, and the defaults of the others.

    Args:
        options: The options by name.
        values: The values that were given, by name.
        owner: The method, space or calibration, for messages.

    Raises:
        OptionError: An unknown name or a value that is not allowed.
    """
    for name in values:
        if name not in options:
            allowed = f"its options are {', '.join(options)}" if options else "it has no options"
            raise OptionError(
                f"{owner} has no option {name!r}{did_you_mean(name, options)}; {allowed}"
            )
    return {
        name: option.check(values[name], owner) if name in values else option.default
        for name, option in options.items()
    }


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the most similar of some words in any case, or nothing."""
    by_lower_case = {known.casefold(): known for known in words}
    close = difflib.get_close_matches(word.casefold(), by_lower_case, n=1)
    return f"; did you mean {by_lower_case[close[0]]!r}?" if close else ""


def _option(name: str, hint: Any, default: Any, explanation: str) -> Option:
    """The option that a parameter with this type hint is; `X | None` counts as X."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(member for member in typing.get_args(hint) if member is not types.NoneType)
    bounds = Range()
    if typing.get_origin(hint) is Annotated:
        hint, bounds = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return Option(name, str, default, choices=typing.get_args(hint), explanation=explanation)
    return Option(name, hint, default, bounds, explanation=explanation)


def _explanations(docstring: str) -> dict[str, str]:
    """The explanation of each name in a Google-style ``Args`` section."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", docstring, re.MULTILINE)
    entries = (
        re.findall(r"^ {4}(\w+): (.*(?:\n {8,}.*)*)", section[1], re.MULTILINE) if section else []
    )
    return {name: " ".join(text.split()) for name, text in entries}
