"""``pcb-peft collect``: statistics of an adapter's task from sample texts, for methods that need data."""

import argparse
from pathlib import Path

from pcb_peft.commands.arguments import add_dequantize, add_overwrite_arguments, progress_of
from pcb_peft.commands.command import Answer, Command
from pcb_peft.commands.sources import constant, entries
from pcb_peft.runtime.shown import typed
from pcb_peft.runtime.units import format_count, format_size


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="directory or hub id")
    parser.add_argument("--base-model", required=True, help="directory or hub id")
    add_dequantize(parser)
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help='JSON lines such as {"text": "..."}, if wanted with "text_pair". For --kind gradient also: "label" for a '
        'classifier; "answer" for a causal language model, if only the answer is to be learnt',
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write")
    kinds = _kinds()
    users = "; ".join(f"{kind} for {', '.join(names)}" for kind, names in kinds.items())
    parser.add_argument("--kind", default="gram", choices=kinds, help=f"{users} (default: gram)")
    parser.add_argument("--labels", nargs="+", help="class names, in the order of the head's rows")
    parser.add_argument("--batch-size", type=int, default=8, help="texts at a time (default: 8)")
    parser.add_argument(
        "--max-length", type=int, default=512, help="tokens per text (default: 512)"
    )
    parser.add_argument("--limit", type=int, help="number of texts to use, spread over the file")
    most = format_size(constant("data/collect.py", "DEFAULT_MEMORY"))
    parser.add_argument(
        "--max-memory", metavar="SIZE", help=f"memory for the sums, such as 1G (default: {most})"
    )
    add_overwrite_arguments(parser, "file")


def _kinds() -> dict[str, list[str]]:
    """Statistics by kind, each with the methods that need it."""
    kinds: dict[str, list[str]] = {}
    for method in entries("methods"):
        if kind := method.facts["needs_statistic"]:
            kinds.setdefault(kind, []).append(method.name)
    return kinds


def _run(parsed: argparse.Namespace) -> Answer:
    from pcb_peft.data.collect import DEFAULT_MEMORY, collect_statistics

    statistics = collect_statistics(
        parsed.adapter,
        parsed.base_model,
        parsed.data,
        parsed.output,
        parsed.kind,
        labels=parsed.labels,
        batch_size=parsed.batch_size,
        dequantize=parsed.dequantize,
        max_length=parsed.max_length,
        limit=parsed.limit,
        max_memory=DEFAULT_MEMORY if parsed.max_memory is None else parsed.max_memory,
        overwrite=parsed.overwrite,
        progress=progress_of(parsed),
    )
    unit = "tokens" if statistics.kind == "gram" else "labels"
    modules, count = len(statistics.shapes), statistics.count
    text = (
        f"wrote {parsed.output}: {statistics.kind} of {modules} modules over {format_count(count)} {unit}\n"
        "next:\n"
        f"  merge  pcb-peft merge {typed(parsed.adapter)} OTHER -o merged --method {_kinds()[parsed.kind][0]} "
        f"--statistics {typed(parsed.output)} OTHER_STATISTICS"
    )
    data = {"output": str(parsed.output), "kind": statistics.kind, "modules": modules, unit: count}
    return Answer(text, data)


COMMAND = Command(
    "collect",
    "Collect statistics from sample texts, for merge methods that need data",
    "pcb-peft collect math-lora --base-model meta-llama/Llama-3.2-1B --data math.jsonl -o math.safetensors",
    _add_arguments,
    _run,
)
