"""``pcb-peft evaluate``: what a merge kept of each of its tasks."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pcb_peft.commands.arguments import (
    DTYPES,
    add_dequantize,
    dtype_of,
    file_of,
    is_named,
    progress_of,
)
from pcb_peft.commands.command import Answer, Command
from pcb_peft.commands.exit_codes import BELOW, DONE
from pcb_peft.commands.parser import UsageError
from pcb_peft.commands.sources import constant


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("merged", help="the merge, or a folded model: directory or hub id")
    parser.add_argument(
        "--adapters",
        nargs="+",
        metavar="ADAPTER",
        help="the adapters that went into it (default: those that its merge_recipe.yaml names)",
    )
    parser.add_argument("--base-model", help="directory or hub id (default: what the adapters say)")
    parser.add_argument(
        "--data",
        nargs="+",
        default=(),
        metavar="[NAME=]FILE",
        help='one file of JSON lines per adapter, such as {"text": "...", "label": "..."}, or {"prompt": "...", '
        '"answer": "..."} for language models; in the order of the adapters, or named as they are: math-lora.jsonl, '
        "math-lora-test.jsonl, math-lora=FILE",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=(),
        metavar="TASK",
        help="tasks of lm-evaluation-harness, such as arc_easy (needs pip install 'pcb-peft[lm-eval]')",
    )
    add_measuring_arguments(parser.add_argument_group("how it is measured"))
    _add_comparing(parser.add_argument_group("what it is compared with"))
    add_running_arguments(parser.add_argument_group("how it is run"))
    output = parser.add_argument_group("what becomes of the result")
    output.add_argument(
        "--log", type=Path, help="append the result to this file, as a line of JSON"
    )
    output.add_argument(
        "--write-to-card",
        action="store_true",
        help="put the table into README.md of the merge, and the numbers into evaluation.json beside it",
    )
    output.add_argument(
        "--report",
        type=Path,
        metavar="FILE.html",
        help="also write the merge's page for a browser, with the table; a page that is there is replaced",
    )
    output.add_argument(
        "--fail-below",
        type=float,
        metavar="SHARE",
        help=f"exit with status {BELOW} if a task keeps less than this share of its adapter's score, such as 0.8",
    )


def add_measuring_arguments(group: Any) -> None:
    """Add what says how a task is measured."""
    measures: dict[str, str] = constant("evaluation/texts.py", "MEASURES")
    words = "; ".join(f"{name}: {meaning}" for name, meaning in measures.items())
    group.add_argument(
        "--measure", default="auto", choices=("auto", *measures), help=f"{words} (default: auto)"
    )
    group.add_argument(
        "--labels",
        nargs="+",
        default=(),
        metavar="NAME=A,B,C",
        help="class names of a task, in the order of the head's rows, where no task.json beside the adapter has them",
    )
    group.add_argument(
        "--rename",
        nargs="+",
        default=(),
        metavar="DATA=HEAD",
        help="labels of the data that the head knows by another name",
    )
    group.add_argument(
        "--length-normalised", action="store_true", help="choose answers by likelihood per token"
    )


def _add_comparing(group: Any) -> None:
    group.add_argument("--against", metavar="MERGE", help="another merge, compared text by text")
    group.add_argument(
        "--controls",
        action="store_true",
        help="also measure a random adapter of the same norm, and the plain average of the adapters",
    )
    group.add_argument(
        "--threshold",
        type=float,
        help="a task is lost below this share of its adapter's score (default: --fail-below, or 0.8)",
    )
    group.add_argument(
        "--confidence", type=float, default=0.95, help="level of the intervals (default: 0.95)"
    )


def add_running_arguments(group: Any, *, budget: bool = True) -> None:
    """Add what says how texts are run."""
    group.add_argument("--limit", type=int, help="texts per task, evenly spread over its file")
    if budget:
        group.add_argument(
            "--budget", help="time for everything, such as 5m, or tokens, such as '200k tokens'"
        )
    group.add_argument("--batch-size", type=int, default=32, help="texts at a time (default: 32)")
    group.add_argument("--max-length", type=int, default=512, help="tokens per text (default: 512)")
    group.add_argument(
        "--dtype",
        type=str.lower,
        default=DTYPES[0],
        choices=DTYPES,
        help=f"data type of the model (default: {DTYPES[0]})",
    )
    add_dequantize(group)
    group.add_argument("--device", help="where the model runs (default: a GPU if there is one)")
    group.add_argument(
        "--cache", metavar="DIRECTORY", help="where outcomes are kept (default: the user's cache)"
    )
    group.add_argument(
        "--no-cache", action="store_true", help="run everything, and keep no outcomes"
    )


def _run(parsed: argparse.Namespace) -> Answer:
    from pcb_peft.evaluation.evaluate import evaluate
    from pcb_peft.reporting.page import write_report

    _check_outputs(parsed)
    limits = (parsed.threshold, parsed.fail_below, 0.8)
    result = evaluate(
        parsed.merged,
        parsed.adapters,
        parsed.base_model,
        data_of("--data", parsed.data),
        tasks=[task for word in parsed.tasks for task in word.split(",") if task],
        against=parsed.against,
        controls=parsed.controls,
        budget=parsed.budget,
        threshold=next(limit for limit in limits if limit is not None),
        confidence=parsed.confidence,
        log=parsed.log,
        write_to_card=parsed.write_to_card,
        progress=progress_of(parsed),
        **measuring_of(parsed),
        **running_of(parsed),
    )
    if parsed.report:
        write_report(
            parsed.merged,
            parsed.report,
            parsed.adapters,
            evaluation=result,
            overwrite=True,
            progress=progress_of(parsed),
        )
    below = [task.name for task in result.tasks if _is_below(task, parsed.fail_below)]
    failed = [f"below {parsed.fail_below:.0%}: {', '.join(below)}"] if below else []
    page = [f"report for a browser: {parsed.report}"] if parsed.report else []
    return Answer(
        "\n".join([str(result), *page, *failed]),
        {**result.as_dict(), "below": below, "page": str(parsed.report) if parsed.report else None},
        essential=True,
        exit_code=BELOW if below else DONE,
    )


def _check_outputs(parsed: argparse.Namespace) -> None:
    """Refuse a limit that is none, and files that could not be written after the evaluation."""
    from pcb_peft.reporting.merge_record import record_of
    from pcb_peft.reporting.page import is_report
    from pcb_peft.writing.targets import check_file_target

    if parsed.fail_below is not None and not 0 <= parsed.fail_below <= 1:  # nan is not
        raise UsageError(
            f"--fail-below is {parsed.fail_below:g}; it must be a share from 0 to 1", "0.8 is 80 %"
        )
    texts = [file_of(word) for word in parsed.data]
    if parsed.log:
        check_file_target(parsed.log, overwrite="all", inputs=texts)  # a line is added
    if parsed.report:
        record_of(parsed.merged)
        check_file_target(parsed.report, overwrite=True, inputs=texts, is_ours=is_report)


def _is_below(task: Any, limit: float | None) -> bool:
    """True for a task of an adapter that keeps too little, or has nothing to keep."""
    if limit is None or task.adapter is None:
        return False
    return task.kept is None or task.kept < limit


def measuring_of(parsed: argparse.Namespace) -> dict[str, Any]:
    """Return how a task is measured, as the arguments say."""
    return {
        "measure": parsed.measure,
        "labels": {name: names.split(",") for name, names in _pairs("--labels", parsed.labels)},
        "rename": dict(_pairs("--rename", parsed.rename)),
        "length_normalised": parsed.length_normalised,
    }


def running_of(parsed: argparse.Namespace) -> dict[str, Any]:
    """Return how texts are run, as the arguments say."""
    return {
        "limit": parsed.limit,
        "batch_size": parsed.batch_size,
        "max_length": parsed.max_length,
        "dtype": dtype_of(parsed),
        "device": parsed.device,
        "dequantize": parsed.dequantize,
        "cache": False if parsed.no_cache else parsed.cache or True,
    }


def data_of(flag: str, words: Sequence[str]) -> Any:
    """One file per adapter in order, or files by name.

    Raises:
        UsageError: Some have a name, others have none.
    """
    named = [word for word in words if is_named(word)]
    if not named:
        return list(words)
    if len(named) < len(words):
        raise UsageError(
            f"{flag}: some files have a name and some have none",
            f"name all of them: {flag} math=math.jsonl code=code.jsonl",
        )
    return dict(_pairs(flag, words))


def _pairs(flag: str, words: Sequence[str]) -> list[tuple[str, str]]:
    """The two sides of each NAME=VALUE.

    Raises:
        UsageError: A word is not of that form, or two give the same name.
    """
    pairs = [word.partition("=") for word in words]
    for word, (name, equals, value) in zip(words, pairs, strict=True):
        if not (name and equals and value):
            raise UsageError(f"{flag}: {word!r} is not of the form NAME=VALUE", "")
        if [first for first, _, _ in pairs].count(name) > 1:
            raise UsageError(f"{flag}: {name!r} is given twice", "give each name once")
    return [(name, value) for name, _, value in pairs]


COMMAND = Command(
    "evaluate",
    "Measure what a merge kept of each of its tasks",
    "pcb-peft evaluate merged --adapters math-lora code-lora --base-model meta-llama/Llama-3.2-1B "
    "--data math.jsonl code.jsonl\n"
    "pcb-peft evaluate merged --data math-lora=math.jsonl code-lora=code.jsonl --limit 200 --fail-below 0.8\n"
    "pcb-peft evaluate merged --data math-lora=math.jsonl code-lora=code.jsonl --write-to-card --report merged.html\n"
    "pcb-peft evaluate merged --tasks arc_easy gsm8k --against other-merge",
    _add_arguments,
    _run,
)
