"""The texts that a merge is distilled on: read, drawn, and encoded; without labels."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pcb_peft.data.batches import Data, Row, read_rows, spread
from pcb_peft.data.models import load_tokenizer, with_padding
from pcb_peft.distillation.teacher import Batch
from pcb_peft.errors import OptionError


def read_texts(data: Data, limit: int) -> list[Row]:
    """Return at most `limit` rows, evenly spread over the data: a file may be sorted.

    Args:
        data: A ``.jsonl`` file, or rows, with `text` (or `prompt`) and, if wanted, `text_pair`; or plain texts.
        limit: The most texts.

    Raises:
        OptionError: The file cannot be read, or a row has no text.
    """
    if not isinstance(data, str | Path | Sequence):
        raise OptionError("texts must be a .jsonl file, rows or plain texts, per adapter")
    rows = spread(read_rows(data, ("text", "prompt")), limit)
    return [{**row, "text": row.get("prompt", row.get("text"))} for row in rows]


def digest_of(rows: Sequence[Row]) -> str:
    """Return the SHA-256 of the texts, and of nothing that is not read of them."""
    texts = [[row["text"], row.get("text_pair")] for row in rows]
    return hashlib.sha256(json.dumps(texts, ensure_ascii=False).encode()).hexdigest()


def encoded(rows: Sequence[Row], tokenizer: Any, max_length: int) -> list[Batch]:
    """Return the model's inputs for each text, without padding."""
    found: list[Batch] = []
    for row in rows:
        pair = {"text_pair": row["text_pair"]} if row.get("text_pair") is not None else {}
        entry = tokenizer(row["text"], truncation=True, max_length=max_length, **pair)
        found.append({name: torch.tensor([values]) for name, values in entry.items()})
    return found


def tokenizer_for(tokenizer: Any, base_model: str | Path | Any) -> Any:
    """Return a tokenizer that can pad.

    Args:
        tokenizer: The user's, or a path or hub id; None: the base model's.
        base_model: Path or hub id, or a model of transformers.

    Raises:
        OptionError: There is none.
    """
    if tokenizer is None:
        tokenizer = base_model if isinstance(base_model, str | Path) else base_model.name_or_path
    return (
        load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else with_padding(tokenizer)
    )
