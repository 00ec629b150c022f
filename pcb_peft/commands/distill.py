"""``pcb-peft distill``: a merge, trained a little on unlabelled texts to answer as its adapters do."""

import argparse
from pathlib import Path

from pcb_peft.commands.arguments import add_dequantize, add_saving_arguments, dtype_of, progress_of
from pcb_peft.commands.command import Answer, Command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("merged", help="directory of the merge to begin with; its rank stays")
    parser.add_argument("adapters", nargs="+", help="directories or hub ids of those it merges")
    parser.add_argument("--base-model", required=True, help="directory or hub id")
    add_dequantize(parser)
    parser.add_argument(
        "--texts",
        "--data",
        nargs="+",
        type=Path,
        required=True,
        help='one file of JSON lines per adapter, in order: {"text": "..."}, if wanted with "text_pair"; for a '
        "language model the text is a prompt. Labels are not read",
    )
    numbers = (
        ("limit", int, 64, "texts per adapter, spread over its file"),
        ("steps", int, 80, "updates"),
        ("learning-rate", float, 0.05, "peak of Adam's steps, as a fraction of the size of lora_B"),
        ("batch-texts", int, 8, "texts of each adapter per update"),
        ("held-out", float, 0.125, "fraction of the texts that decides when to stop"),
        ("new-tokens", int, 16, "tokens by which a language model continues a text"),
        ("max-length", int, 256, "tokens per text"),
        ("seed", int, 0, "seed of the order of the texts"),
    )
    for name, kind, default, words in numbers:
        parser.add_argument(
            f"--{name}", type=kind, default=default, help=f"{words} (default: {default})"
        )
    parser.add_argument(
        "--checkpoint", type=Path, help="file from which an interrupted run goes on"
    )
    add_saving_arguments(parser)


def _run(parsed: argparse.Namespace) -> Answer:
    from pcb_peft.distillation.distill import distill_merge

    better = distill_merge(
        parsed.merged,
        parsed.adapters,
        parsed.texts,
        parsed.base_model,
        limit=parsed.limit,
        steps=parsed.steps,
        learning_rate=parsed.learning_rate,
        batch_texts=parsed.batch_texts,
        held_out=parsed.held_out,
        new_tokens=parsed.new_tokens,
        dequantize=parsed.dequantize,
        max_length=parsed.max_length,
        seed=parsed.seed,
        checkpoint=parsed.checkpoint,
        progress=progress_of(parsed),
    )
    better.save_pretrained(
        parsed.output,
        dtype=dtype_of(parsed),
        rank_pattern=parsed.rank_pattern,
        overwrite=parsed.overwrite,
    )
    before, after = better.history[0], better.history[better.best_step]
    lines = [f"  {name}: {before[name]:.4f} -> {after[name]:.4f}" for name in before]
    text = "\n".join(
        [
            f"wrote {parsed.output}: the merge after {better.best_step} steps",
            "divergence from each adapter on held-out texts, before and after:",
            *lines,
        ]
    )
    data = {
        "output": str(parsed.output),
        "steps": better.best_step,
        "history": dict(better.history),
    }
    return Answer(text, data)


COMMAND = Command(
    "distill",
    "Train a merge a little on unlabelled texts, so that it answers as its adapters do",
    "pcb-peft distill merged math-lora law-lora --base-model BASE --texts math.jsonl law.jsonl -o better",
    _add_arguments,
    _run,
)
