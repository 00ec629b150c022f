"""``pcb-peft check``: who can load an output, and what it would miss."""

import argparse

from pcb_peft.commands.command import Answer, Command
from pcb_peft.commands.exit_codes import BELOW, DONE


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "output",
        help="directory of an adapter or a folded model, a GGUF file, or a LoRA of an image model",
    )
    parser.add_argument(
        "--for",
        dest="consumers",
        nargs="+",
        default=(),
        metavar="CONSUMER",
        help="programs to ask for, such as vllm, vllm==0.31 or peft==0.11 (default: the newest of all that are known); "
        f"the exit status is {BELOW} if one of them would refuse or miss anything",
    )


def _run(parsed: argparse.Namespace) -> Answer:
    from pcb_peft.consumers.check import check

    found = check(parsed.output, parsed.consumers)
    failed = bool(parsed.consumers) and not found.right
    return Answer(str(found), found.as_dict(), essential=True, exit_code=BELOW if failed else DONE)


COMMAND = Command(
    "check",
    "Say who can load an adapter or a model, with which flags, and what would be missed",
    "pcb-peft check merged --for vllm==0.32",
    _add_arguments,
    _run,
)
