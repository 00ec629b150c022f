"""``pcb-peft compare``: adapters side by side, before they are merged."""

import argparse

from pcb_peft.commands.arguments import add_dequantize, progress_of
from pcb_peft.commands.command import Answer, Command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapters", nargs="+", help="directories or hub ids of two adapters or more"
    )
    parser.add_argument(
        "--base-model",
        help="directory or hub id of the base model, for adapters that need W, and to look the modules up in it",
    )
    add_dequantize(parser)


def _run(parsed: argparse.Namespace) -> Answer:
    from pcb_peft.inspection.compare import compare_adapters

    comparison = compare_adapters(
        parsed.adapters,
        parsed.base_model,
        dequantize=parsed.dequantize,
        progress=progress_of(parsed),
    )
    return Answer(str(comparison), comparison.as_dict(), essential=True)


COMMAND = Command(
    "compare",
    "Show whether adapters can be merged, who dominates, and what they share",
    "pcb-peft compare math-lora code-lora",
    _add_arguments,
    _run,
)
