"""Declared fields: a recipe's field says in one place what it may be, and how a value is converted.

    seed: Annotated[int, an_integer] = 0

`parse_fields` then makes checked values of what a user wrote.
"""

import dataclasses
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from pcb_peft.errors import OptionError
from pcb_peft.plugins.options import did_you_mean
from pcb_peft.runtime.shown import quoted

LARGEST = 10**9  # of a weight or a scale: what it multiplies must stay a float32

Parser: TypeAlias = Callable[[str, Any], Any]
"""Given the field's name and a value, the converted value, or an OptionError."""


def refuse_unknown_fields(owner: type[Any], given: Iterable[Any]) -> None:
    """Raises OptionError for a name that is no field of a dataclass."""
    known = [field.name for field in dataclasses.fields(owner)]
    for name in given:
        if name not in known:
            raise OptionError(
                f"unknown key {quoted(name)}{did_you_mean(str(name), known)}; allowed: {', '.join(known)}"
            )


def parse_fields(owner: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Check and convert the values of a dataclass's fields, each by the parser in its annotation.

    A value of None stands for the default.

    Raises:
        OptionError: A value is not allowed.
    """
    refuse_unknown_fields(owner, given)
    hints = typing.get_type_hints(owner, include_extras=True)
    parsers: dict[str, Parser] = {name: hint.__metadata__[0] for name, hint in hints.items()}
    return {name: parsers[name](name, value) for name, value in given.items() if value is not None}


def unnamed(parse: Callable[[Any], Any]) -> Parser:
    """A parser whose messages name the field themselves."""
    return lambda _, value: parse(value)


def an_instance(kind: type | tuple[type, ...], words: str) -> Parser:
    """A parser of values that stay as they are, of one type."""

    def parse(name: str, value: Any) -> Any:
        wrong = isinstance(value, bool) and kind is not bool
        if wrong or not isinstance(value, kind):
            raise OptionError(f"{name} is {quoted(value)}; it must be {words}")
        return value

    return parse


def within(largest: int, kind: type | tuple[type, ...], words: str) -> Parser:
    """A parser of numbers that stay as they are, from `-largest` to `largest`."""
    instance = an_instance(kind, words)

    def parse(name: str, value: Any) -> Any:
        if not abs(instance(name, value)) <= largest:  # NaN is not, either
            raise OptionError(
                f"{name} is {quoted(value)}; it must be {words} of at most {largest:,}"
            )
        return value

    return parse


def one_of(allowed: tuple[str, ...]) -> Parser:
    """A parser of one of several words."""

    def parse(name: str, value: Any) -> Any:
        if value not in allowed:
            raise OptionError(
                f"{name} is {quoted(value)}{did_you_mean(str(value), allowed)}; it must be one of {', '.join(allowed)}"
            )
        return value

    return parse


a_name = an_instance(str, "a name")
an_integer = within(2**63, int, "an integer")
a_number = within(LARGEST, (int, float), "a number")
a_truth = an_instance(bool, "true or false")
a_mapping = an_instance(Mapping, "a mapping")
