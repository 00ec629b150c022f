"""``pcb-peft inspect``: adapters, one by one, each on one screen."""

import argparse

from pcb_peft.commands.arguments import add_dequantize, progress_of
from pcb_peft.commands.command import Answer, Command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapters", nargs="+", help="directories or hub ids of adapters")
    parser.add_argument(
        "--base-model",
        help="directory or hub id of the base model, to look the modules up in it",
    )
    add_dequantize(parser)


def _run(parsed: argparse.Namespace) -> Answer:
    from pcb_peft.inspection.inspect import inspect_adapter

    quantised, progress = parsed.dequantize, progress_of(parsed)
    seen = [
        inspect_adapter(one, parsed.base_model, dequantize=quantised, progress=progress)
        for one in parsed.adapters
    ]
    data = {"adapters": [one.as_dict() for one in seen]}
    return Answer("\n\n\n".join(map(str, seen)), data, essential=True)


COMMAND = Command(
    "inspect",
    "Show what an adapter is, where it changes its base model, and what looks wrong",
    "pcb-peft inspect math-lora\npcb-peft inspect math-lora code-lora --json",
    _add_arguments,
    _run,
)
