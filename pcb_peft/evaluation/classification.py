"""Text classification tasks: their examples, the encoder that reads them, and accuracy.

Nothing here knows of merges. A `Task` is an adapter with its own head and labelled examples; `encode` runs an encoder
over them once, and every head is then a matrix product.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcb_peft.adapters.beside import labels_beside
from pcb_peft.data.batches import read_rows, spread
from pcb_peft.data.models import quiet_transformers
from pcb_peft.errors import OptionError
from pcb_peft.files.tensors import SafetensorsFile

MAX_LENGTH = 64
BATCH_SIZE = 64

Text = tuple[str, ...]  # (text,) or (text, text_pair)
Head = dict[str, Tensor]  # classifier.weight, classifier.bias
Batch = tuple[list[int], dict[str, Tensor]]  # row numbers of the texts, and their tokens


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """A classification task: an adapter, its own head, and examples with known answers.

    Attributes:
        name: The adapter's folder name.
        adapter: The adapter's folder.
        labels: Names of the classes, in the order of the head's rows.
        texts: The examples.
        answers: The right class of each example.
        head: The classifier trained with the adapter.
    """

    name: str
    adapter: Path
    labels: tuple[str, ...]
    texts: list[Text]
    answers: Tensor
    head: Head

    def predictions(self, pooled: Tensor, head: Head | None = None) -> Tensor:
        """Classes that a head (None: the adapter's own) predicts from the encoder's output."""
        head = self.head if head is None else head
        weight, bias = head["classifier.weight"], head["classifier.bias"]
        return torch.nn.functional.linear(pooled, weight, bias).argmax(-1)

    def accuracy(self, pooled: Tensor) -> float:
        """Share of the examples that the adapter's own head gets right."""
        return (self.predictions(pooled) == self.answers).float().mean().item()


def load_tasks(
    adapters: Path,
    data: Path,
    split: str = "test",
    limit: int | None = None,
    renamed: Mapping[str, str] | None = None,
) -> list[Task]:
    """Load every adapter folder under `adapters` with its examples, in the order of their names.

    Args:
        adapters: A folder of adapter folders, each with a ``task.json`` that lists the labels.
        data: A folder with ``<task>.jsonl``, or with ``<task>/<split>.jsonl``.
        split: Which file of a task's folder to read.
        limit: How many examples to keep, evenly spread over the file. None: all.
        renamed: Labels of the data to their names in ``task.json``, where they differ.

    Returns:
        One task per adapter folder.

    Raises:
        OptionError: The data has a label that ``task.json`` does not list.
    """
    folders = sorted(path.parent for path in adapters.glob("*/task.json"))
    return [_load_task(folder, data, split, limit, renamed or {}) for folder in folders]


def _load_task(
    adapter: Path, data: Path, split: str, limit: int | None, renamed: Mapping[str, str]
) -> Task:
    labels = labels_beside(adapter)
    flat = data / f"{adapter.name}.jsonl"
    file = flat if flat.exists() else data / adapter.name / f"{split}.jsonl"
    chosen = spread(read_rows(file), limit)  # a file may be sorted by label
    answers = [renamed.get(row["label"], row["label"]) for row in chosen]
    if unknown := set(answers) - set(labels):  # to number them anew would score the wrong classes
        raise OptionError(f"{file.name} has labels that {adapter.name}/task.json lacks: {unknown}")
    return Task(
        name=adapter.name,
        adapter=adapter,
        labels=labels,
        texts=[tuple(row[key] for key in ("text", "text_pair") if key in row) for row in chosen],
        answers=torch.tensor([labels.index(answer) for answer in answers]),
        head=_head_of(adapter),
    )


def _head_of(adapter: Path) -> Head:
    """Classifier saved with an adapter, under the base model's names."""
    file = SafetensorsFile(adapter / "adapter_model.safetensors")
    names = [name for name in file.names() if ".classifier." in name]
    return {name[name.index("classifier.") :]: file.read(name) for name in names}


def load_base(folder: Path, labels: int = 2) -> Any:
    """Load the base encoder under an untrained classifier."""
    from transformers import AutoModelForSequenceClassification

    with quiet_transformers():
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=labels, trust_remote_code=False
        )
    return model.eval()


def load_with_peft(base: Path, adapter: Path, labels: int = 2) -> Any:
    """Load the base encoder with an adapter, as any user of PEFT does."""
    from peft import PeftModel

    with warnings.catch_warnings():  # peft asks transformers for a name that is deprecated there
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return PeftModel.from_pretrained(load_base(base, labels), adapter).eval()


def make_batches(tokenizer: Any, texts: Sequence[Text]) -> list[Batch]:
    """Tokenize texts in batches of similar length, so that little of a batch is padding."""
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
    """Run the encoder; one row of its pooled output per text, in the order of the texts."""
    encoder = getattr(model, "get_base_model", lambda: model)().base_model
    rows = [row for chunk, _ in batches for row in chunk]
    pooled = torch.cat([encoder(**tokens).pooler_output for _, tokens in batches])
    return pooled[torch.tensor(rows).argsort()]
