"""The command line ``pcb-peft``: finds the command, runs it, prints its answer or its error.

Nothing here imports torch before a command has been understood, so that help and errors come at once.
"""

import argparse
import contextlib
import importlib
import io
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from pcb_peft.commands.arguments import (
    add_common_arguments,
    is_quiet,
    is_verbose,
)
from pcb_peft.commands.command import Command
from pcb_peft.commands.exit_codes import (
    FULL,
    INTERNAL,
    MEANINGS,
    NO_SPACE,
    OF_THE_SYSTEM,
    REFUSED,
    UNREAD,
    code_of,
)
from pcb_peft.commands.inputs import check_directory, check_inputs
from pcb_peft.commands.output import (
    open_closed_streams,
    print_answer,
    print_error,
    print_interrupted,
    print_unexpected,
    print_version,
    print_warning,
    print_what_the_terminal_cannot_show,
)
from pcb_peft.commands.parser import Parser
from pcb_peft.errors import NoSpaceError, PcbPeftError, ProcessError
from pcb_peft.runtime.paths import current_directory
from pcb_peft.runtime.processes import Processes, joined, rank_and_size, stoppable
from pcb_peft.runtime.units import format_duration

COMMANDS = (
    *("merge", "inspect", "compare", "distill", "evaluate", "search", "head", "fold"),
    *("export", "check", "push", "extract", "collect", "methods", "demo"),
)
"""All commands, in the order of the help."""
EXAMPLE = "pcb-peft merge math-lora code-lora -o merged"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The words after ``pcb-peft``; None: those of this process.

    Returns:
        The exit status: see `pcb_peft.commands.exit_codes`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    open_closed_streams()
    print_what_the_terminal_cannot_show()
    with warnings.catch_warnings(), stoppable() as came:
        try:
            return _run(words)
        except PcbPeftError as error:
            if _prints(error):
                print_error(error, words)
            return code_of(error)
        except (KeyboardInterrupt, SystemExit):
            if not came:
                raise
            rank, size = rank_and_size()
            which = f"process {rank} of {size}: " if size > 1 else ""
            print_interrupted(f"{which}interrupted ({came[0].name})")
            return 128 + came[0]
        except OSError as error:
            return _after_system_error(error, words)
        except Exception as error:  # noqa: BLE001
            print_unexpected(error, words)
            return INTERNAL


def _prints(error: PcbPeftError) -> bool:
    """Return whether this process prints an error: the first one does, and the second, if the first may be gone.

    So does a process that the launcher does not tell its number.
    """
    try:
        rank, _ = rank_and_size()
    except ProcessError:
        return True
    return rank == 0 or (rank == 1 and isinstance(error, ProcessError))


def _after_system_error(error: OSError, words: Sequence[str]) -> int:
    """Return the exit status after an error of the system: of standard output, a disk, a permission."""
    if isinstance(error, FileNotFoundError) and current_directory() is None:
        print_error(
            PcbPeftError("the current directory has been removed; go to another one"), words
        )
        return REFUSED
    closed = isinstance(error, BrokenPipeError)  # nobody reads on, as in `pcb-peft methods | head`
    if not closed and error.errno not in OF_THE_SYSTEM:
        print_unexpected(error, words)
        return INTERNAL
    if error.filename is None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if closed:
        return UNREAD
    subject = "the answer cannot be written" if error.filename is None else error.filename
    kind = NoSpaceError if error.errno in FULL else PcbPeftError
    way_out = "look at the disk, at its free space, and at the permissions"
    print_error(kind(f"{subject}: {error.strerror}; {way_out}"), words)
    return NO_SPACE if error.errno in FULL else REFUSED


def _run(words: Sequence[str]) -> int:
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    parsed = parse(words)
    if parsed.version:
        print_version(parsed)
        return 0
    command: Command | None = getattr(parsed, "command", None)
    if command is None:
        print(build_parser(words)[0].format_help(), end="")
        return 0
    started, caught = time.perf_counter(), list[str]()
    with joined() as processes:
        visible = processes.is_main and not is_quiet(parsed)
        warnings.showwarning = _shower(caught, visible=visible)
        with _silenced(processes), processes.together():
            check_directory(parsed)
            check_inputs(parsed)
            answer = command.run(parsed)
        if processes.is_main:
            print_answer(answer, parsed, command.name, caught)
            if is_verbose(parsed):
                took = format_duration(time.perf_counter() - started)
                print(f"pcb-peft {command.name} took {took}", file=sys.stderr)
    return answer.exit_code


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
        epilog=f"example:\n  {EXAMPLE}\n\n'pcb-peft COMMAND --help' explains a command.\n\n{MEANINGS}",
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


def _complete() -> None:
    """Answer the shell, which asks how a command line may go on, and end; if argcomplete is installed."""
    with contextlib.suppress(ImportError):
        completer: Any = importlib.import_module("argcomplete")
        completer.autocomplete(build_parser()[0], print_suppressed=True)


def _silenced(processes: Processes) -> contextlib.AbstractContextManager[object]:
    """Let only the first process print."""
    if processes.is_main:
        return contextlib.nullcontext()
    return contextlib.redirect_stdout(io.StringIO())


def _shower(caught: list[str], *, visible: bool) -> Callable[..., None]:
    """Make what Python calls to show a warning."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        caught.append(str(message))
        if visible:
            print_warning(message)

    return show
