"""The text and the JSON that commands print: answers on standard output, errors and warnings on standard error."""

import argparse
import io
import json
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from pcb_peft.commands.arguments import is_json, is_quiet, is_verbose
from pcb_peft.commands.command import Answer
from pcb_peft.commands.parser import UsageError
from pcb_peft.runtime import progress
from pcb_peft.runtime.shown import one_line, visible
from pcb_peft.version import __version__

RED, YELLOW, CYAN = 31, 33, 36  # ANSI colours
LIBRARIES = ("torch", "peft", "transformers", "safetensors")


def open_closed_streams() -> None:
    """Lead the standard streams that the caller has closed to nowhere: a file would get their numbers, and the text."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if name == "stdin" else "w", closefd=False))  # noqa: SIM115


def print_what_the_terminal_cannot_show() -> None:
    """Let characters that standard output cannot show be spelled out, instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_answer(
    answer: Answer, parsed: argparse.Namespace, name: str, caught: Sequence[str]
) -> None:
    """Print the answer of a command.

    Args:
        answer: What it found or did.
        parsed: Its arguments.
        name: Its name.
        caught: Warnings that have been printed already; the JSON has them, too.
    """
    progress.close()
    if not is_quiet(parsed):
        for warning in answer.warnings:
            print_warning(warning)
    if is_json(parsed):
        warnings = [*caught, *answer.warnings]
        _print_json({"command": name, **answer.data, "warnings": warnings})
    elif answer.text and (answer.essential or not is_quiet(parsed)):
        print(visible(answer.text))
    sys.stdout.flush()  # a full disk is noticed here, and not when Python ends


def print_warning(message: object) -> None:
    """Print a warning."""
    print(f"{_coloured('warning:', YELLOW)} {visible(str(message))}", file=sys.stderr)


def print_error(error: Exception, words: Sequence[str]) -> None:
    """Print an error on one line, and its hint on another; as JSON, too, if the words of the command line say so."""
    progress.close()
    hint = error.hint if isinstance(error, UsageError) else ""
    message = one_line(error)  # those of other libraries may have many lines
    _print_failure(message, hint)
    if "--json" in words:
        _print_json({"error": {"kind": type(error).__name__, "message": message, "hint": hint}})


def print_unexpected(error: Exception, words: Sequence[str]) -> None:
    """Print an error that is not one of this package; with ``-v`` also where it comes from."""
    progress.close()
    verbose = bool({"-v", "--verbose"} & {*words})
    if verbose:
        traceback.print_exc()
    name = type(error).__name__
    hint = "" if verbose else "run it again with -v to see where"
    _print_failure(f"unexpected {name}: {one_line(error)}", hint)
    if "--json" in words:
        _print_json({"error": {"kind": name, "message": str(error), "hint": hint}})


def print_interrupted(which: str) -> None:
    """Print that a signal has ended the command."""
    progress.close()
    _print_failure(which, "")


def print_version(parsed: argparse.Namespace) -> None:
    """Print the version of this package; with ``-v`` of the libraries that it uses, without importing them."""
    versions = {"pcb_peft": __version__}
    if is_verbose(parsed):
        versions["python"] = sys.version.split()[0]
        versions |= {library: version(library) for library in LIBRARIES}
    if is_json(parsed):
        _print_json(versions)
    else:
        print("\n".join(f"{name} {number}" for name, number in versions.items()))


def _print_failure(message: str, hint: str) -> None:
    print(f"{_coloured('error:', RED)} {visible(message)}", file=sys.stderr)
    if hint:
        print(f"{_coloured('hint:', CYAN)} {visible(hint)}".rstrip(), file=sys.stderr)


def _print_json(data: dict[str, Any]) -> None:
    print(json.dumps(data, ensure_ascii=True, default=str))


def _coloured(word: str, colour: int) -> str:
    """The word in an ANSI colour, where standard error is a terminal that shows it."""
    plain = not sys.stderr.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return word if plain else f"\033[1;{colour}m{word}\033[0m"
