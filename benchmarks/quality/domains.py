"""The domains of a task: clusters of its training texts, by what the base encoder makes of them.

One task, several domains: this is what cross-domain merging is measured on. The training texts alone decide where the
clusters are; validation and test texts go to the nearest one.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.cluster.vq import kmeans2, vq
from texts import Row, task_named

BATCH, LENGTH = 64, 64
EVERY = 4  # training texts: so many per one that the clusters are made of


def domains(rows: Sequence[Row], task: str, base: Path, count: int) -> list[int]:
    """Return the domain of each row, a number from 0 to `count` - 1.

    Args:
        rows: Texts of the task, of any split.
        task: The task's name.
        base: The base encoder.
        count: The number of domains.
    """
    found, _ = vq(_embedded(rows, base), _centres(task, base, count))
    return [int(domain) for domain in found]


@functools.cache
def _centres(task: str, base: Path, count: int) -> Any:
    rows = task_named(task).rows("train", as_prompts=False)[::EVERY]
    return kmeans2(_embedded(rows, base), count, minit="++", seed=0)[0]


@torch.inference_mode()
def _embedded(rows: Sequence[Row], base: Path) -> Any:
    """The mean of the encoder's outputs over each text's tokens, of length 1."""
    model, tokenizer = _encoder(base)
    parts: list[Any] = []
    for start in range(0, len(rows), BATCH):
        texts = [row["text"] for row in rows[start : start + BATCH]]
        options = {"padding": True, "truncation": True, "max_length": LENGTH}
        tokens = tokenizer(texts, return_tensors="pt", **options)
        mask = tokens["attention_mask"].unsqueeze(-1)
        outputs = (model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)
        parts.append(torch.nn.functional.normalize(outputs).double().numpy())
    return np.concatenate(parts)


@functools.cache
def _encoder(base: Path) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    return AutoModel.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
