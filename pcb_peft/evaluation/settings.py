"""The choices of an evaluation, checked."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pcb_peft.data.batches import check_counts
from pcb_peft.errors import OptionError
from pcb_peft.evaluation.budget import parse_budget
from pcb_peft.evaluation.texts import MEASURES


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of a measurement; the attributes are arguments of `evaluate`.

    Attributes:
        measure: A key of `MEASURES`, or "auto".
        labels: Names of the classes, by task.
        rename: Labels of the data to those of the head.
        length_normalised: Choose an answer by its likelihood per token.
        limit: Texts per task.
        budget: Time or tokens.
        threshold: The share below which a task is lost.
        confidence: Level of the intervals.
        batch_size: Texts at a time.
        max_length: Tokens of a text.
        dtype: Of the model.
        device: Where the model runs; None: a GPU if there is one.
        tokenizer: None: the base model's.
        dequantize: Compute the weights of a quantised base model from their codes.
        cache: Where outcomes are kept.
        progress: Whether bars are shown.
    """

    measure: str = "auto"
    labels: Mapping[str, Sequence[str]] = dataclasses.field(
        default_factory=dict[str, Sequence[str]]
    )
    rename: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    length_normalised: bool = False
    limit: int | None = None
    budget: float | str | None = None
    threshold: float = 0.8
    confidence: float = 0.95
    batch_size: int = 32
    max_length: int = 512
    dtype: torch.dtype = torch.float32
    device: str | torch.device | None = None
    tokenizer: Any = None
    dequantize: bool = False
    cache: bool | str | Path = True
    progress: bool | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything.

        Raises:
            OptionError: A value is not allowed.
        """
        if self.measure not in ("auto", *MEASURES):
            raise OptionError(
                f"measure is {self.measure!r}; it must be auto, {', '.join(MEASURES)}"
            )
        check_counts(limit=self.limit, batch_size=self.batch_size, max_length=self.max_length)
        if not 0 <= self.threshold <= 1:
            raise OptionError(f"threshold is {self.threshold!r}; it must be from 0 to 1")
        if not 0 < self.confidence < 1:
            raise OptionError(f"confidence is {self.confidence!r}; it must be between 0 and 1")
        if self.budget is not None:
            parse_budget(self.budget)
