"""The demo: merge four small real adapters, load the merge with PEFT, measure it on held-out text."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from pcb_peft.data.models import load_tokenizer
from pcb_peft.evaluation.classification import (
    Batch,
    Task,
    encode,
    load_base,
    load_tasks,
    load_with_peft,
    make_batches,
)
from pcb_peft.runtime.scratch import private_directory

SHOWN_CHARACTERS = 76  # a sentence that fits on a line of a terminal


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One line of the demo's table: accuracies between 0 and 1.

    Attributes:
        task: Name of the task.
        base: The base encoder with the task's head.
        own: The encoder with the task's own adapter.
        merged: The encoder with the merged adapter.
    """

    task: str
    base: float
    own: float
    merged: float

    @property
    def normalised(self) -> float:
        """The merge, relative to the task's own adapter."""
        return self.merged / self.own


def run_demo(
    pool: Path,
    data: Path,
    base: Path,
    output: Path | None = None,
    *,
    write: Callable[[str], object] = print,
) -> list[Row]:
    """Merge the example adapters, load the merge with PEFT and measure it on held-out text.

    Args:
        pool: The folder of the example adapters.
        data: The folder of their held-out texts.
        base: The base encoder.
        output: Where to save the merged adapter. None: a temporary folder, removed at the end.
        write: Called with every line of text that the demo shows.

    Returns:
        One row per task.
    """
    tasks = load_tasks(pool, data)
    with contextlib.ExitStack() as stack:
        if output is None:
            output = Path(stack.enter_context(private_directory())) / "merged"
        return _demo(tasks, base, output, write)


def _demo(tasks: list[Task], base: Path, output: Path, write: Callable[[str], object]) -> list[Row]:
    begin = time.perf_counter()
    write(f"Merging {len(tasks)} adapters of all-MiniLM-L6-v2: {', '.join(t.name for t in tasks)}")
    _merge(tasks, base, output)
    merging = time.perf_counter() - begin
    write(f"Saved to {output}. Loading it with PEFT, measuring it on held-out text ...")
    model, tokenizer = load_with_peft(base, output), load_tokenizer(base)
    batches = [make_batches(tokenizer, task.texts) for task in tasks]
    merged = [encode(model, chunk) for chunk in batches]
    rows = _measure(tasks, base, batches, merged)
    write(_table(rows))
    write(_samples(tasks, merged, output))
    total = time.perf_counter() - begin
    write(f"{merging:.1f} s for the merge, {total:.0f} s in all, most of it to run the encoder.")
    return rows


def _merge(tasks: list[Task], base: Path, output: Path) -> None:
    from pcb_peft.merging.engine import merge_adapters

    adapters = [task.adapter for task in tasks]
    merge_adapters(adapters, base_model=base).save_pretrained(output)


def _measure(
    tasks: list[Task], base: Path, batches: list[list[Batch]], merged: list[Tensor]
) -> list[Row]:
    plain = load_base(base)
    rows: list[Row] = []
    for task, chunk, pooled in zip(tasks, batches, merged, strict=True):
        own = load_with_peft(base, task.adapter, len(task.labels))
        before, alone = task.accuracy(encode(plain, chunk)), task.accuracy(encode(own, chunk))
        rows.append(Row(task.name, before, alone, task.accuracy(pooled)))
    return rows


def _table(rows: list[Row]) -> str:
    line = "{:<14} {:>12} {:>12} {:>8} {:>11}".format
    lines = ["", line("accuracy, %", "base encoder", "own adapter", "merged", "merged/own")]
    for row in rows:
        scores = (row.base, row.own, row.merged, row.normalised)
        lines.append(line(row.task, *(f"{100 * score:.1f}" for score in scores)))
    normalised = [row.normalised for row in rows]
    mean, worst = sum(normalised) / len(rows), min(normalised)
    lines.append(f"One adapter keeps {mean:.1%} of the four, {worst:.1%} on the worst task.")
    lines.append(
        "These tasks are easy ones. Expect less of more tasks, and measure: pcb-peft evaluate."
    )
    return "\n".join([*lines, ""])


def _samples(tasks: list[Task], merged: list[Tensor], output: Path) -> str:
    """One sentence per task, and what the merged model makes of it with the head saved for it."""
    lines = ["What the merged model says:"]
    for task, pooled in zip(tasks, merged, strict=True):
        head = load_file(output / "heads" / f"{task.name}.safetensors")
        lengths = [sum(map(len, text)) for text in task.texts]
        shown = next(index for index, size in enumerate(lengths) if 40 < size < SHOWN_CHARACTERS)
        label = task.labels[int(task.predictions(pooled[shown], head))]
        right = task.labels[int(task.answers[shown])]
        verdict = "right" if label == right else f"wrong, it is: {right}"
        lines.append(f"  {' / '.join(task.texts[shown])}\n    {task.name}: {label} ({verdict})")
    return "\n".join([*lines, ""])
