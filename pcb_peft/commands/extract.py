"""``pcb-peft extract``: the LoRA that turns a base model into a fine-tuned one."""

import argparse

from pcb_peft.commands.arguments import (
    add_dequantize,
    add_saving_arguments,
    dtype_of,
    parse_value,
    progress_of,
)
from pcb_peft.commands.command import Answer, Command
from pcb_peft.commands.next_steps import where_written
from pcb_peft.runtime.paths import size_on_disk
from pcb_peft.runtime.shown import some_modules


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("finetuned", help="directory or hub id of a transformers checkpoint")
    parser.add_argument(
        "--base-model", required=True, help="directory or hub id of the model it was trained from"
    )
    parser.add_argument(
        "--rank",
        type=parse_value,
        required=True,
        help="rank of the LoRA, or the fraction of the energy to keep, such as 0.95",
    )
    parser.add_argument(
        "--leave-out",
        nargs="+",
        default=(),
        metavar="GLOB",
        help="parameters not to extract, such as '*.embed_tokens.*'",
    )
    add_dequantize(parser)
    add_saving_arguments(parser)


def _run(parsed: argparse.Namespace) -> Answer:
    from pcb_peft.extraction.extract import extract_adapter
    from pcb_peft.writing.atomic import check_target

    inputs = (parsed.finetuned, parsed.base_model)
    check_target(parsed.output, overwrite=parsed.overwrite, inputs=inputs)
    extracted = extract_adapter(
        parsed.finetuned,
        parsed.base_model,
        parsed.rank,
        leave_out=parsed.leave_out,
        progress=progress_of(parsed),
        dequantize=parsed.dequantize,
    )
    extracted = extracted.save_pretrained(
        parsed.output,
        dtype=dtype_of(parsed),
        rank_pattern=parsed.rank_pattern,
        overwrite=parsed.overwrite,
    )
    report, size = extracted.report, size_on_disk(parsed.output)
    lines = [f"{len(report.modules)} modules, retained energy {report.energy:.4f}"]
    if extracted.head.modules:
        lines.append(f"stored whole: {some_modules(extracted.head.modules)}")
    lines += [*report.notes, where_written(parsed.output, report.rank, size)]
    data = {
        "output": str(parsed.output),
        "bytes": size,
        "rank": report.rank,
        "stored_whole": list(extracted.head.modules),
        "report": report.as_dict(),
    }
    return Answer("\n".join(lines), data)


COMMAND = Command(
    "extract",
    "Write the LoRA that turns a base model into a fine-tuned one",
    "pcb-peft extract my-finetune --base-model meta-llama/Llama-3.2-1B -o my-lora --rank 0.95",
    _add_arguments,
    _run,
)
