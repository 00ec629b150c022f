"""``pcb-peft fold``: a base model with an adapter folded into its weights."""

import argparse

from pcb_peft.commands.arguments import add_output_arguments, progress_of
from pcb_peft.commands.command import Answer, Command
from pcb_peft.commands.next_steps import after_fold, size_on_disk
from pcb_peft.commands.recipe_fields import tied_help
from pcb_peft.runtime.units import format_size


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="directory or hub id")
    parser.add_argument(
        "base_model", help="directory or hub id of a transformers checkpoint in safetensors"
    )
    parser.add_argument("--tied", type=str.lower, metavar="POLICY", help=tied_help())
    add_output_arguments(parser)


def _run(parsed: argparse.Namespace) -> Answer:
    from pcb_peft.adapters.loading import fold_adapter

    fold_adapter(
        parsed.adapter,
        parsed.base_model,
        parsed.output,
        tied=parsed.tied,
        overwrite=parsed.overwrite,
        progress=progress_of(parsed),
    )
    size = size_on_disk(parsed.output)
    text = f"folded into {parsed.output} ({format_size(size)})\n{after_fold(parsed.output)}"
    return Answer(text, {"output": str(parsed.output), "bytes": size})


COMMAND = Command(
    "fold",
    "Write a base model with an adapter folded into its weights",
    "pcb-peft fold merged meta-llama/Llama-3.2-1B -o merged-model",
    _add_arguments,
    _run,
)
