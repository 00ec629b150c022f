"""Texts with or without answers, as the batches that a model takes."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pcb_peft.errors import OptionError

IGNORED = -100  # the label of a token that is not to be learnt

Row: TypeAlias = Mapping[str, Any]
"""`text`, and if wanted `text_pair`, `label` (of a classifier) or `answer` (of a language model)."""

Data: TypeAlias = str | Path | Sequence[str] | Sequence[Row] | Iterable[Mapping[str, Tensor]]


def batches_of(
    data: Data,
    tokenizer: Any,
    model: Any,
    labels: Sequence[str] | None,
    batch_size: int,
    max_length: int,
    limit: int | None,
) -> Iterable[Mapping[str, Tensor]]:
    """Batches as they are; a DataLoader of those that are made of texts.

    Args:
        data: A file, rows, texts or batches.
        tokenizer: Or what to load it from.
        model: What the batches are for.
        labels: Names of the classes.
        batch_size: Of texts.
        max_length: In tokens.
        limit: How many texts to take, evenly spread.

    Raises:
        OptionError: A row is not as it must be; the message names it.
    """
    if isinstance(data, DataLoader) or not isinstance(data, str | Path | Sequence):
        return data  # type: ignore[return-value]
    rows = read_rows(data)
    if limit is not None and limit < len(rows):  # spread, because a file may be sorted by label
        rows = [rows[index * len(rows) // limit] for index in range(limit)]
    numbered = [_numbered(row, labels, place) for place, row in enumerate(rows, 1)]
    words = _tokenizer(tokenizer, model)
    longest = getattr(model.config, "max_position_embeddings", None) or max_length
    causal = type(model.get_base_model()).__name__.endswith(("CausalLM", "LMHeadModel"))
    batcher = _Batcher(words, min(max_length, longest), causal)
    return DataLoader(numbered, batch_size=batch_size, collate_fn=batcher)  # type: ignore[arg-type]


def read_rows(data: str | Path | Sequence[Any]) -> list[Row]:
    """The rows of a ``.jsonl`` file, or of a list of rows or texts.

    Raises:
        OptionError: The file cannot be read, or a row has no text.
    """
    items: Sequence[Any] = data if not isinstance(data, str | Path) else _parsed(Path(data))
    rows: list[Any] = [{"text": item} if isinstance(item, str) else item for item in items]
    for place, row in enumerate(rows, 1):
        if not isinstance(row, Mapping) or not isinstance(row.get("text"), str):
            raise OptionError(
                f"data: row {place} is {row!r}; it must be an object with a string `text`"
            )
    if not rows:
        raise OptionError("data: there are no rows; give at least one text")
    return rows


def _parsed(path: Path) -> list[Any]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise OptionError(f"data: {path} cannot be read as JSON lines: {error}") from error


def _numbered(row: Row, labels: Sequence[str] | None, place: int) -> Row:
    """The row with its label as a number."""
    label = row.get("label")
    if label is None or isinstance(label, int):
        return row
    if labels is None or label not in labels:
        known = f"one of {', '.join(labels)}" if labels else "a number, unless labels are given"
        raise OptionError(
            f"data: row {place} has label {label!r}; it must be {known} (labels=[…], --labels …: the names of the "
            "classes in the order of the head's rows)"
        )
    return {**row, "label": list(labels).index(label)}


def _tokenizer(tokenizer: Any, model: Any) -> Any:
    """The tokenizer; a decoder without a padding token pads with its last, which is masked."""
    from transformers import AutoTokenizer

    if isinstance(tokenizer, str | Path):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    elif not callable(getattr(tokenizer, "pad", None)):
        tokenizer = AutoTokenizer.from_pretrained(model.get_base_model().name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if (
        getattr(model.config, "pad_token_id", None) is None
    ):  # a classifier on a decoder looks for it
        model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side = "right"
    return tokenizer


class _Batcher:
    """Rows to a padded batch, with labels where the rows have what they are made of."""

    def __init__(self, tokenizer: Any, max_length: int, causal: bool) -> None:
        self._tokenizer, self._max_length, self._causal = tokenizer, max_length, causal

    def __call__(self, rows: Sequence[Row]) -> Mapping[str, Tensor]:
        encoded = [self._encoded(row) for row in rows]
        starts = [entry.pop("start") for entry in encoded]
        batch = dict(self._tokenizer.pad(encoded, return_tensors="pt"))
        if self._causal:
            places = torch.arange(batch["input_ids"].shape[1])
            learnt = batch["attention_mask"].bool() & (places >= torch.tensor(starts)[:, None])
            batch["labels"] = torch.where(learnt, batch["input_ids"], IGNORED)
        elif all(row.get("label") is not None for row in rows):
            batch["labels"] = torch.tensor([row["label"] for row in rows])
        return batch

    def _encoded(self, row: Row) -> dict[str, Any]:
        """Tokens, and from which of them on they are learnt."""
        words, length = self._tokenizer, self._max_length
        pair = {"text_pair": row["text_pair"]} if row.get("text_pair") is not None else {}
        entry = dict(words(row["text"], truncation=True, max_length=length, **pair))
        if not self._causal or row.get("answer") is None:
            return entry | {"start": 0}
        answer = words(row["answer"], add_special_tokens=False)["input_ids"][:length]
        kept = entry["input_ids"][: length - len(answer)]
        tokens = [*kept, *answer]
        return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "start": len(kept)}
