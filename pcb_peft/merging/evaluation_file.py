"""The evaluation of a merge, as a file beside it has it."""

from pathlib import Path
from typing import Any

import msgspec

from pcb_peft.adapters.saving import EVALUATION_FILE
from pcb_peft.errors import AdapterError
from pcb_peft.files.json_text import read_json_file
from pcb_peft.files.schema import Number, checked

_WAY_OUT = "take it away, or evaluate again"


class TaskLine(msgspec.Struct, kw_only=True):
    """One task of an evaluation, as its JSON has it: see `TaskScores.as_dict`."""

    task: str
    metric: str
    texts: int
    merged: Number
    verdict: str
    lost: bool = False
    base: Number | None = None
    adapter: Number | None = None
    against: Number | None = None
    interval: tuple[Number, Number] | None = None
    kept: Number | None = None

    def shown(self, value: float | None) -> str:
        """Return a score: percent of accuracies and the like, other numbers as they are."""
        if value is None:
            return "–"
        percent = self.metric in ("accuracy", "exact match", "1/perplexity")
        return f"{100 * value:.1f} %" if percent else f"{value:.4g}"


class Measured(msgspec.Struct):
    """An evaluation, as its JSON has it: see `Evaluation.as_dict`."""

    tasks: list[TaskLine]
    notes: list[str] = []
    lost: list[str] = []
    mean_kept: Number | None = None
    worst_kept: Number | None = None


def read_evaluation(directory: Path) -> Measured | None:
    """Read what `evaluate` wrote into a directory; None where it wrote nothing.

    Raises:
        AdapterError: The file is damaged.
    """
    file = directory / EVALUATION_FILE
    if not file.is_file():
        return None
    return checked_evaluation(read_json_file(file, AdapterError, _WAY_OUT), str(file))


def checked_evaluation(content: Any, where: str) -> Measured:
    """Return an evaluation from plain data.

    Raises:
        AdapterError: It is damaged.
    """
    return checked(content, Measured, where, AdapterError, _WAY_OUT)
