"""``pcb-peft fold``: a base model with an adapter folded into its weights."""

import argparse

from pcb_peft.commands.arguments import (
    add_compare_base,
    add_dequantize,
    add_output_arguments,
    add_resume,
    progress_of,
)
from pcb_peft.commands.command import Answer, Command
from pcb_peft.commands.next_steps import after_fold
from pcb_peft.commands.recipe_fields import tied_help
from pcb_peft.runtime.paths import size_on_disk
from pcb_peft.runtime.units import format_size


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="directory, file or hub id")
    parser.add_argument(
        "base_model",
        help="directory or hub id, in safetensors, of a model of transformers or a pipeline of diffusers; or an image "
        "model in one file, which OUTPUT is, too",
    )
    parser.add_argument("--tied", type=str.lower, metavar="POLICY", help=tied_help())
    add_dequantize(parser, folds=True)
    add_compare_base(parser)
    add_resume(parser)
    add_output_arguments(parser)


def _run(parsed: argparse.Namespace) -> Answer:
    from pcb_peft.adapters.loading import fold_adapter

    folded = fold_adapter(
        parsed.adapter,
        parsed.base_model,
        parsed.output,
        tied=parsed.tied,
        overwrite=parsed.overwrite,
        progress=progress_of(parsed),
        dequantize=parsed.dequantize,
        compare_base=parsed.compare_base,
        resume=parsed.resume,
    )
    size, gap = size_on_disk(parsed.output), folded.base_gap
    lines = [f"folded into {parsed.output} ({format_size(size)})", after_fold(parsed.output)]
    data = {"output": str(parsed.output), "bytes": size}
    if gap is not None:
        lines.insert(1, str(gap))
        data |= {"base_gap": {"ratio": gap.ratio, "modules": dict(gap.ratios)}}
    return Answer("\n".join(lines), data)


COMMAND = Command(
    "fold",
    "Write a base model with an adapter folded into its weights",
    "pcb-peft fold merged meta-llama/Llama-3.2-1B -o merged-model",
    _add_arguments,
    _run,
)
