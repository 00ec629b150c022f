"""The command line ``pcb-peft``: finds the command, runs it, prints its answer or its error.

Nothing here imports torch before a command has been understood, so that help and errors come at once.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from pcb_peft.commands.arguments import add_common_arguments, is_quiet
from pcb_peft.commands.command import Answer, Command
from pcb_peft.commands.parser import Parser, UsageError
from pcb_peft.errors import PcbPeftError
from pcb_peft.runtime import progress
from pcb_peft.runtime.processes import Processes, joined, stoppable
from pcb_peft.version import __version__

COMMANDS = ("merge", "fold", "extract", "collect", "methods", "demo")  # in the order of the help
EXAMPLE = "pcb-peft merge math-lora code-lora -o merged"
RED, YELLOW, CYAN = 31, 33, 36  # ANSI colours
LIBRARIES = ("torch", "peft", "transformers", "safetensors")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The words after ``pcb-peft``; None: those of this process.

    Returns:
        0 if it did what it should, 1 after an error that nobody expected, 2 after any other error, 130 or 143 after a
        signal.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    with warnings.catch_warnings(), stoppable() as came:
        try:
            return _run(words)
        except PcbPeftError as error:
            _print_error(error, words)
            return 2
        except (KeyboardInterrupt, SystemExit):
            if not came:
                raise
            rank, size = _rank_and_size()
            which = f"process {rank} of {size}: " if size > 1 else ""
            progress.close()
            print(
                f"{_coloured('error:', RED)} {which}interrupted ({came[0].name})", file=sys.stderr
            )
            return 128 + came[0]
        except BrokenPipeError:  # nobody reads on, as in `pcb-peft methods | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except Exception as error:  # noqa: BLE001
            _print_unexpected(error, words)
            return 1


def _run(words: Sequence[str]) -> int:
    parsed = parse(words)
    if getattr(parsed, "version", False):
        _print_version(parsed)
        return 0
    command: Command | None = getattr(parsed, "command", None)
    if command is None:
        print(build_parser(words)[0].format_help(), end="")
        return 0
    caught: list[str] = []
    with joined() as processes:
        warnings.showwarning = _collector(caught, processes, quiet=is_quiet(parsed))
        with _silenced(processes), processes.together():
            answer = command.run(parsed)
        if processes.is_main:
            _print_answer(answer, parsed, command, caught)
    return 0


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse a command line.

    Raises:
        UsageError: It cannot be understood.
    """
    parser, commands = build_parser(words)
    parsed, extra = parser.parse_known_args(list(words))
    command: Command | None = getattr(parsed, "command", None)
    (parser if command is None else commands[command.name]).refuse(extra)
    return parsed


def build_parser(words: Sequence[str] | None = None) -> tuple[Parser, dict[str, Parser]]:
    """Build the parser of the command line, and those of its commands.

    Args:
        words: A command line: only a command that it names gets its arguments. None: all of them do.
    """
    parser = Parser(
        prog="pcb-peft",
        description="Merge PEFT adapters: several LoRA or (IA)³ adapters of one base model into one.",
        epilog=f"example:\n  {EXAMPLE}\n\n'pcb-peft COMMAND --help' explains a command.",
    )
    parser.add_argument(
        "-V", "--version", action="store_true", help="print the version; with -v, of libraries too"
    )
    add_common_arguments(parser)
    group = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    parsers: dict[str, Parser] = {}
    for name in COMMANDS:
        command: Command = importlib.import_module(f"pcb_peft.commands.{name}").COMMAND
        examples = "\n".join(f"  {line}" for line in command.example.splitlines())
        parsers[name] = group.add_parser(
            name,
            help=command.summary,
            description=f"{command.summary}.",
            epilog=f"example:\n{examples}",
            conflict_handler="resolve",
        )
        parsers[name].set_defaults(command=command)
        if words is None or name in words:
            command.add_arguments(parsers[name])
            add_common_arguments(parsers[name])
    return parser, parsers


def _silenced(processes: Processes) -> contextlib.AbstractContextManager[object]:
    """Let only the first process print."""
    if processes.is_main:
        return contextlib.nullcontext()
    return contextlib.redirect_stdout(io.StringIO())


def _print_answer(
    answer: Answer, parsed: argparse.Namespace, command: Command, caught: Sequence[str]
) -> None:
    progress.close()
    if not is_quiet(parsed):
        for warning in answer.warnings:
            print(f"{_coloured('warning:', YELLOW)} {warning}", file=sys.stderr)
    if getattr(parsed, "json", False):
        data = {"command": command.name, **answer.data, "warnings": [*caught, *answer.warnings]}
        print(json.dumps(data, ensure_ascii=False, default=str))
    elif answer.text and (answer.essential or not is_quiet(parsed)):
        print(answer.text)


def _print_error(error: PcbPeftError, words: Sequence[str]) -> None:
    progress.close()
    if _rank_and_size()[0] > 0:
        return
    message = " ".join(str(error).split())  # those of other libraries may have many lines
    print(f"{_coloured('error:', RED)} {message}", file=sys.stderr)
    hint = error.hint if isinstance(error, UsageError) else ""
    if hint:
        print(f"{_coloured('hint:', CYAN)} {hint}".rstrip(), file=sys.stderr)
    if "--json" in words:
        print(
            json.dumps(
                {"error": {"kind": type(error).__name__, "message": str(error), "hint": hint}}
            )
        )


def _print_unexpected(error: Exception, words: Sequence[str]) -> None:
    """Say that something went wrong that this package does not know; with ``-v`` where."""
    progress.close()
    if {"-v", "--verbose"} & {*words}:
        traceback.print_exc()
    print(f"{_coloured('error:', RED)} unexpected {type(error).__name__}: {error}", file=sys.stderr)
    if not {"-v", "--verbose"} & {*words}:
        print(f"{_coloured('hint:', CYAN)} run it again with -v to see where", file=sys.stderr)
    if "--json" in words:
        print(
            json.dumps({"error": {"kind": type(error).__name__, "message": str(error), "hint": ""}})
        )


def _print_version(parsed: argparse.Namespace) -> None:
    from importlib.metadata import version

    versions = {"pcb_peft": __version__}
    if getattr(parsed, "verbose", False):
        versions |= {"python": sys.version.split()[0]}
        versions |= {library: version(library) for library in LIBRARIES}
    if getattr(parsed, "json", False):
        print(json.dumps(versions))
    else:
        print("\n".join(f"{name} {number}" for name, number in versions.items()))


def _collector(caught: list[str], processes: Processes, *, quiet: bool) -> Callable[..., None]:
    """Make what shows warnings: in the first process, as one line each."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        caught.append(str(message))
        if processes.is_main and not quiet:
            print(f"{_coloured('warning:', YELLOW)} {message}", file=sys.stderr)

    return show


def _rank_and_size() -> tuple[int, int]:
    """Number of this process and of all, as the launcher has them: also before they have joined, and after."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _coloured(word: str, colour: int) -> str:
    """The word in an ANSI colour, where standard error is a terminal that shows it."""
    plain = not sys.stderr.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return word if plain else f"\033[1;{colour}m{word}\033[0m"
