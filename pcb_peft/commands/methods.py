"""``pcb-peft methods``: the methods, spaces and calibrations there are."""

import argparse

from pcb_peft.commands.arguments import is_verbose
from pcb_peft.commands.command import Answer, Command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="a method, a space or a calibration to explain")


def _run(parsed: argparse.Namespace) -> Answer:
    from pcb_peft.commands.catalog import catalog, describe, explain, explained, render

    if parsed.name is None:
        return Answer(render(purposes=is_verbose(parsed)), catalog(), essential=True)
    found = explained(parsed.name)
    text = "\n\n".join(map(explain, found))
    return Answer(text, {"found": [describe(entry) for entry in found]}, essential=True)


COMMAND = Command(
    "methods",
    "List the merge methods, spaces and calibrations, or explain one of them",
    "pcb-peft methods\npcb-peft methods pcb",
    _add_arguments,
    _run,
)
