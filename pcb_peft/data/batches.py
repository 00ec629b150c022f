"""Batches for a model, made of texts with or without labels or answers."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

import msgspec
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pcb_peft.base.architecture import text_config
from pcb_peft.data.models import load_tokenizer, with_padding
from pcb_peft.errors import OptionError
from pcb_peft.files.json_text import parse_json, read_text
from pcb_peft.files.schema import checked
from pcb_peft.runtime.paths import expanded
from pcb_peft.runtime.shown import quoted

MOST_BYTES = 1 << 30  # of a file of texts
MOST_AT_ONCE = 1_000_000_000
"""The largest number of texts, or of tokens, that a caller may ask for."""

IGNORED = -100
"""The label of a token that the loss leaves out: torch's and transformers' convention."""

Item = TypeVar("Item")

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
    check_counts(batch_size=batch_size, max_length=max_length, limit=limit)
    if labels is not None and (isinstance(labels, str) or not _are_texts(labels)):
        raise OptionError(f"labels is {quoted(labels)}; it must be a list of the classes' names")
    rows = [*spread(read_rows(data), limit)]
    causal = _is_causal(model)
    if with_labels and not causal:
        stated = getattr(model.config, "num_labels", 0)
        classes = stated if stated > 1 else 1 << 31  # one label is a number to predict
        rows = [
            _with_numeric_label(row, labels, number, classes) for number, row in enumerate(rows, 1)
        ]
    collate = _Collator(
        _loaded_tokenizer(tokenizer, model),
        longest_text(model.config, max_length),
        causal=causal,
        with_labels=with_labels,
    )
    return DataLoader(rows, batch_size=batch_size, collate_fn=collate)  # type: ignore[arg-type]


def longest_text(config: Any, most: int) -> int:
    """Return the number of tokens that a text may have: `most`, or fewer if a model has fewer positions.

    XLNet has as many as there are tokens, and states −1.
    """
    positions = getattr(config, "max_position_embeddings", None) or 0
    return min(most, positions) if positions > 0 else most


def _are_texts(values: Any) -> bool:
    return isinstance(values, Sequence) and all(isinstance(value, str) for value in values)


def check_counts(**given: object) -> None:
    """Raise OptionError where one of some numbers is not an integer from 1 to a billion; None may stand for all."""
    for name, value in given.items():
        if value is not None and (type(value) is not int or not 1 <= value <= MOST_AT_ONCE):
            raise OptionError(
                f"{name} is {quoted(value)}; it must be an integer from 1 to {MOST_AT_ONCE:,}"
            )


def read_rows(data: str | Path | Sequence[Any], keys: Sequence[str] = ("text",)) -> list[Row]:
    """Read the rows of a ``.jsonl`` file, or of a list of rows or texts.

    Args:
        data: The file, or the list.
        keys: Names under which a row may hold its text.

    Raises:
        OptionError: The file cannot be read, or a row has no text.
    """
    in_file = isinstance(data, str | Path)
    items: Sequence[Any] = _json_lines(expanded(data)) if in_file else data
    before = f"data: {data}, " if in_file else "data: "
    rows: list[Any] = [{"text": item} if isinstance(item, str) else item for item in items]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping) or not any(isinstance(row.get(k), str) for k in keys):
            raise OptionError(
                f"{before}row {number} is {quoted(row)}; it must be an object with a string `{'` or `'.join(keys)}`"
            )
        _check_row(row, f"{before}row {number}")
    if not rows:
        raise OptionError(f"{before}there are no rows; give at least one text")
    return rows


def spread(rows: Sequence[Item], count: int | None) -> tuple[Item, ...]:
    """Take at most so many rows, evenly spread: a file may be sorted."""
    if count is None or count >= len(rows):
        return tuple(rows)
    return tuple(rows[index * len(rows) // count] for index in range(count))


class _Texts(msgspec.Struct):
    """The keys of a row that are read, where they are there."""

    text: str | None = None
    prompt: str | None = None
    text_pair: str | None = None
    answer: str | None = None
    choices: list[str | float] | None = None
    label: Annotated[int, msgspec.Meta(ge=0, le=1 << 31)] | str | None = None


def _check_row(row: Mapping[str, Any], where: str) -> None:
    """Raise OptionError where a key of a row holds something else than it may, or no text that can be encoded."""
    texts = checked(row, _Texts, where, OptionError, "correct the row")
    for key in ("text", "prompt", "text_pair", "answer"):
        text: str = getattr(texts, key) or ""
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise OptionError(
                f"{where}: {key} is {quoted(text)}, with half a character (a surrogate); correct the row"
            )


def _json_lines(path: Path) -> list[Any]:
    """Return the rows of a file of JSON lines; empty lines are passed over."""
    text = read_text(path, OptionError, "give a file with one JSON object per line", MOST_BYTES)
    return [
        parse_json(
            line, f"data: {path}, line {number}", OptionError, "give one JSON object per line"
        )
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]


def _is_causal(model: Any) -> bool:
    """True if the base model of a PeftModel is a causal language model, which learns its own input."""
    return type(model.get_base_model()).__name__.endswith(("CausalLM", "LMHeadModel"))


def _with_numeric_label(row: Row, labels: Sequence[str] | None, number: int, classes: int) -> Row:
    """The row with its label as a number."""
    label = row.get("label")
    if label is None or (isinstance(label, int) and label < classes):
        return row
    if isinstance(label, int):
        raise OptionError(
            f"data: row {number} has label {label}; the head has {classes} classes, from 0 to {classes - 1}"
        )
    if labels is None or label not in labels:
        allowed = f"one of {', '.join(labels)}" if labels else "a number, unless labels are given"
        raise OptionError(
            f"data: row {number} has label {quoted(label)}; it must be {allowed} (labels=[…], --labels …: the names of "
            "the classes in the order of the head's rows)"
        )
    return {**row, "label": list(labels).index(label)}


def _loaded_tokenizer(tokenizer: Any, model: Any) -> Any:
    """The tokenizer; it is the model's own where none is given."""
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    elif not callable(getattr(tokenizer, "pad", None)):
        tokenizer = load_tokenizer(model.get_base_model().name_or_path)
    tokenizer = with_padding(tokenizer)
    name_padding(model, tokenizer)
    tokenizer.padding_side = "right"
    return tokenizer


def name_padding(model: Any, tokenizer: Any) -> None:
    """Write the number of the padding token into a model's configuration, if it is not there.

    A classifier on a decoder looks there for the last token of a text; in a model of texts and images, in the
    configuration of its text part.
    """
    for config in (model.config, text_config(model.config)):
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id


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
        if not entry["input_ids"]:
            raise OptionError(
                f"data: the text {quoted(row['text'])} has no token; take the row out of the data"
            )
        if not self._causal or row.get("answer") is None:
            return entry | {"start": 0}
        answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"][:length]
        prompt = entry["input_ids"][: length - len(answer)]
        tokens = [*prompt, *answer]
        return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "start": len(prompt)}
