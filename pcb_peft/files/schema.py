"""Strangers' JSON against a schema: a struct of msgspec whose fields say what each key may hold.

>>> class Point(msgspec.Struct):
...     x: int
>>> checked({"x": 3, "colour": "red"}, Point, "point.json", ValueError, "write it again").x
3
>>> checked({"x": "3"}, Point, "point.json", ValueError, "write it again")
Traceback (most recent call last):
    ...
ValueError: point.json: x is '3'; it must be an integer; write it again
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeAlias, TypeVar

import msgspec

from pcb_peft.runtime.shown import quoted, shown

Schema = TypeVar("Schema")

MOST = 2**53  # integers up to here survive every program that reads JSON
Number: TypeAlias = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]
"""A finite number."""

Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=MOST)]
"""A whole number from 0."""

_WORDS = {
    "int": "an integer",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object with names",
}
_STEP = re.compile(r"\.([^.\[\]`]+)|\[(\d+)\]")


def checked(
    content: Any, schema: type[Schema], where: str, error_type: type[Exception], way_out: str
) -> Schema:
    """Return JSON content as a schema has it; keys that the schema does not name are passed over.

    Args:
        content: What `json.loads` returned, or the same in memory.
        schema: A struct, or another type that msgspec converts to.
        where: Name of the content, for messages.
        error_type: Type of the error.
        way_out: What the user can do, for messages.

    Raises:
        Exception: Of that type: a key is missing, or holds something else.
    """
    try:
        return msgspec.convert(content, schema)
    except UnicodeError as error:  # in the name of a key
        raise error_type(
            f"{where} holds a text with half a character (a surrogate); {way_out}"
        ) from error
    except (msgspec.ValidationError, RecursionError) as error:
        raise error_type(f"{where}: {_explained(str(error), content)}; {way_out}") from error


def _explained(message: str, content: Any) -> str:
    """Return a message of msgspec in words: the key, what is there, and what must be."""
    problem, _, path = message.partition(" - at `")
    is_key, path = path.startswith("key`"), path.partition("$")[2]
    steps = [name or int(number) for name, number in _STEP.findall(path)]
    value = content
    for number, step in enumerate(steps):
        keyed = isinstance(value, Mapping) and step in value
        listed = isinstance(value, Sequence) and isinstance(step, int) and step < len(value)
        if not (keyed or listed):
            steps = steps[:number]
            break
        value = value[step]  # pyright: ignore[reportArgumentType, reportCallIssue]
    place = ".".join(map(str, steps))
    if missing := re.fullmatch(r"Object missing required field `(.+)`", problem):
        return f"{place}.{missing[1]} is missing".removeprefix(".")
    if unknown := re.fullmatch(r"Object contains unknown field `(.+)`", problem):
        return f"{place} has {quoted(unknown[1])}, which means nothing there"
    words = re.search(r"Expected `([^`]+)`(.*?)(, got .*)?$", problem)
    wanted = shown(problem) if words is None else f"{_in_words(words[1])}{words[2]}"
    inside = " of such values" if "[...]" in path else ""
    subject = f"{place} is" if place else "it holds"
    if is_key:
        return f"{subject} {quoted(value)}; each name in it must be {wanted}"
    return f"{subject} {quoted(value)}; it must be {wanted}{inside}"


def _in_words(types: str) -> str:
    names = [_WORDS.get(name, name) for name in types.split(" | ")]
    return " or ".join(names)
