"""Commands: their arguments, what they do, and the answer that they give."""

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """The result of a command.

    Attributes:
        text: The result for people.
        data: The result as plain data, for ``--json``.
        warnings: What the user has to know before the result is used.
        essential: Whether ``--quiet`` prints the text, too: it is what was asked for, not a report of what was done.
        exit_code: The exit code of the program.
    """

    text: str
    data: Mapping[str, Any]
    warnings: Sequence[str] = ()
    essential: bool = False
    exit_code: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Command:
    """A command.

    Attributes:
        name: The word after ``pcb-peft``.
        summary: One line that says what it does, without a full stop.
        example: One or more command lines that work, for its help.
        add_arguments: Adds its arguments to a parser.
        run: Does what the parsed arguments say.
    """

    name: str
    summary: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Answer]
