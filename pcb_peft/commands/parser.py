"""A parser of command lines whose errors are one line and a hint, with suggestions for misspelt words."""

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from pcb_peft.errors import OptionError
from pcb_peft.plugins.options import did_you_mean

REWORDED = (  # argparse's messages, in plain English
    (r"argument (.+): expected at least one argument", r"\1 needs at least one value"),
    (r"argument (.+): expected one argument", r"\1 needs a value"),
    (r"argument (.+): ignored explicit argument .*", r"\1 takes no value"),
    (r"the following arguments are required: (.+)", r"missing: \1"),
    (r"argument (.+)", r"\1"),
)
NUMBER = re.compile(r"-\.?\d")


class UsageError(OptionError):
    """A command line cannot be understood.

    Attributes:
        hint: A way out, on a line of its own.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UsageError.

    Numbers such as ``-1e-3`` and ``-1,0.5`` are values, not options.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self._negative_number_matcher = NUMBER

    def error(self, message: str) -> NoReturn:
        for pattern, words in REWORDED:
            if match := re.fullmatch(pattern, message):
                message = match.expand(words)
        first = "arguments come before options; " if message.startswith("missing: ") else ""
        raise UsageError(message, f"{first}{self.prog} --help shows an example")

    def refuse(self, extra: Sequence[str]) -> None:
        """Raise UsageError for arguments that nothing has taken."""
        if not extra:
            return
        word = extra[0].partition("=")[0]
        if word.startswith("-"):
            suggestion = did_you_mean(word, self._option_string_actions)
            self.error(f"unknown option {word}{suggestion}")
        raise UsageError(
            f"unexpected argument {word!r}",
            f"arguments come before options: {self.format_usage()[7:]}",
        )

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a value that is not one of an argument's choices."""
        choices = list(action.choices or ())
        if action.choices is None or value in choices:
            return
        name = "/".join(action.option_strings) or str(action.metavar or action.dest).lower()
        known = ", ".join(map(str, choices))
        self.error(f"no {name} {value!r}{did_you_mean(str(value), choices)}; there are {known}")
