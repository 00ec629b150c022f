"""``pcb-peft demo``: four real adapters merged, and tried on real text."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

from pcb_peft.commands.arguments import is_quiet
from pcb_peft.commands.command import Answer, Command
from pcb_peft.commands.sources import constant

FILE = "evaluation/demo.py"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    pools = constant(FILE, "POOLS")
    parser.add_argument("-o", "--output", type=Path, help="directory to keep the merged adapter in")
    parser.add_argument(
        "--pool",
        type=str.lower,
        default=pools[0],
        choices=pools,
        help=f"which of the example adapters: {', '.join(pools)} (default: {pools[0]})",
    )


def _run(parsed: argparse.Namespace) -> Answer:
    from pcb_peft.evaluation.demo import run_demo

    silent = is_quiet(parsed) or getattr(parsed, "json", False)
    write: Callable[[str], None] = _ignore if silent else print
    rows = run_demo(parsed.output, pool=parsed.pool, write=write)
    return Answer("", {"tasks": [dataclasses.asdict(row) for row in rows]})


def _ignore(line: str) -> None:
    del line


COMMAND = Command(
    "demo",
    "Merge real adapters, and show on real text what the merge can do",
    "pcb-peft demo",
    _add_arguments,
    _run,
)
