"""Batches for a model, made of texts with or without labels or answers."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pcb_peft.errors import OptionError

IGNORED = (
    -100
)  # the label of a token that the loss leaves out: torch's and transformers' convention

Row: TypeAlias = Mapping[str, Any]
"""A text: `text` and, if there are any, `text_pair`, `label` (for a classifier) or `answer` (for a language model)."""

Data: TypeAlias = str | Path | Sequence[str] | Sequence[Row] | Iterable[Mapping[str, Tensor]]
"""A ``.jsonl`` file, texts, rows, or batches."""


def batches_of(
    data: Data,
    tokenizer: Any,
    model: Any,
    labels: Sequence[str] | None,
    batch_size: int,
    max_length: int,
    limit: int | None,
    *,
    with_labels: bool = True,
) -> Iterable[Mapping[str, Tensor]]:
    """Make a DataLoader of texts; batches are returned as they are.

    Args:
        data: A file, rows, texts or batches.
        tokenizer: The tokenizer, or the path or id to load it from.
        model: The PeftModel that gets the batches.
        labels: Names of the classes, in the order of the head's rows.
        batch_size: Texts per batch.
        max_length: Tokens per text, at most.
        limit: How many texts to take, evenly spread over the data; None: all.
        with_labels: Whether the model computes a loss. If it does not, the rows' labels are not even looked at.

    Raises:
        OptionError: A row is not as it must be; the message says which.
    """
    if isinstance(data, DataLoader) or not isinstance(data, str | Path | Sequence):
        return data  # type: ignore[return-value]
    rows = read_rows(data)
    if limit is not None and limit < len(rows):  # spread, because a file may be sorted by label
        rows = [rows[index * len(rows) // limit] for index in range(limit)]
    causal = _is_causal(model)
    if with_labels and not causal:
        rows = [_with_numeric_label(row, labels, number) for number, row in enumerate(rows, 1)]
    longest = getattr(model.config, "max_position_embeddings", None) or max_length
    collate = _Collator(
        _loaded_tokenizer(tokenizer, model),
        min(max_length, longest),
        causal=causal,
        with_labels=with_labels,
    )
    return DataLoader(rows, batch_size=batch_size, collate_fn=collate)  # type: ignore[arg-type]


def read_rows(data: str | Path | Sequence[Any], keys: Sequence[str] = ("text",)) -> list[Row]:
    """Read the rows of a ``.jsonl`` file, or of a list of rows or texts.

    Args:
        data: The file, or the list.
        keys: Names under which a row may hold its text.

    Raises:
        OptionError: The file cannot be read, or a row has no text.
    """
    items: Sequence[Any] = data if not isinstance(data, str | Path) else _json_lines(Path(data))
    rows: list[Any] = [{"text": item} if isinstance(item, str) else item for item in items]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping) or not any(isinstance(row.get(k), str) for k in keys):
            raise OptionError(
                f"data: row {number} is {row!r}; it must be an object with a string `{'` or `'.join(keys)}`"
            )
    if not rows:
        raise OptionError("data: there are no rows; give at least one text")
    return rows


def _json_lines(path: Path) -> list[Any]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise OptionError(f"data: {path} cannot be read as JSON lines: {error}") from error


def _is_causal(model: Any) -> bool:
    """True if the base model of a PeftModel is a causal language model, which learns its own input."""
    return type(model.get_base_model()).__name__.endswith(("CausalLM", "LMHeadModel"))


def _with_numeric_label(row: Row, labels: Sequence[str] | None, number: int) -> Row:
    """The row with its label as a number."""
    label = row.get("label")
    if label is None or isinstance(label, int):
        return row
    if labels is None or label not in labels:
        allowed = f"one of {', '.join(labels)}" if labels else "a number, unless labels are given"
        raise OptionError(
            f"data: row {number} has label {label!r}; it must be {allowed} (labels=[…], --labels …: the names of the "
            "classes in the order of the head's rows)"
        )
    return {**row, "label": list(labels).index(label)}


def _loaded_tokenizer(tokenizer: Any, model: Any) -> Any:
    """The tokenizer; one without a padding token pads with its end-of-text token, which is masked."""
    from transformers import AutoTokenizer

    if isinstance(tokenizer, str | Path):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    elif not callable(getattr(tokenizer, "pad", None)):
        tokenizer = AutoTokenizer.from_pretrained(model.get_base_model().name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    pad_in_config = getattr(model.config, "pad_token_id", None)
    if pad_in_config is None:  # a classifier on a decoder looks there for the last token of a text
        model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side = "right"
    return tokenizer


class _Collator:
    """Makes a padded batch of rows, with labels where the model computes a loss and the rows have what it needs."""

    def __init__(self, tokenizer: Any, max_length: int, *, causal: bool, with_labels: bool) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        self._causal, self._with_labels = causal, with_labels

    def __call__(self, rows: Sequence[Row]) -> Mapping[str, Tensor]:
        encoded = [self._encoded(row) for row in rows]
        starts = [entry.pop("start") for entry in encoded]
        batch = dict(self._tokenizer.pad(encoded, return_tensors="pt"))
        if not self._with_labels:
            return batch
        if self._causal:
            positions = torch.arange(batch["input_ids"].shape[1])
            learnt = batch["attention_mask"].bool() & (positions >= torch.tensor(starts)[:, None])
            batch["labels"] = torch.where(learnt, batch["input_ids"], IGNORED)
        elif all(row.get("label") is not None for row in rows):
            batch["labels"] = torch.tensor([row["label"] for row in rows])
        return batch

    def _encoded(self, row: Row) -> dict[str, Any]:
        """Tokens of a row, and `start`: the first one that a causal language model learns."""
        tokenizer, length = self._tokenizer, self._max_length
        pair = {"text_pair": row["text_pair"]} if row.get("text_pair") is not None else {}
        entry = dict(tokenizer(row["text"], truncation=True, max_length=length, **pair))
        if not self._causal or row.get("answer") is None:
            return entry | {"start": 0}
        answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"][:length]
        prompt = entry["input_ids"][: length - len(answer)]
        tokens = [*prompt, *answer]
        return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "start": len(prompt)}
