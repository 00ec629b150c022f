"""``pcb-peft head``: a merged adapter with the head of one task as its own."""

import argparse

from pcb_peft.commands.arguments import add_output_arguments
from pcb_peft.commands.command import Answer, Command
from pcb_peft.commands.next_steps import load_with_head
from pcb_peft.runtime.paths import size_on_disk
from pcb_peft.runtime.units import format_size


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="directory or hub id of a merged adapter")
    parser.add_argument(
        "head", help="the adapter whose head it gets: the name of a file in the folder heads"
    )
    add_output_arguments(parser)


def _run(parsed: argparse.Namespace) -> Answer:
    from pcb_peft.merging.save_head import save_with_head

    adapter = save_with_head(parsed.adapter, parsed.head, parsed.output, overwrite=parsed.overwrite)
    size, labels = size_on_disk(parsed.output), adapter.head.task.labels
    text = (
        f"written to {parsed.output}: {parsed.adapter} with the {' and '.join(adapter.head.modules)} of "
        f"{parsed.head}, {format_size(size)}"
    )
    data = {
        "output": str(parsed.output),
        "bytes": size,
        "head": parsed.head,
        "labels": list(labels),
        "task_type": adapter.task_type,
    }
    return Answer("\n".join([text, load_with_head(adapter, parsed.output)]), data)


COMMAND = Command(
    "head",
    "Give a merged adapter the head of one of its tasks",
    "pcb-peft head merged subj -o merged-subj",
    _add_arguments,
    _run,
)
