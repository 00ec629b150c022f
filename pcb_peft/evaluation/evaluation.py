"""The result of an evaluation: what a merge kept of its tasks."""

import dataclasses
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

from pcb_peft.evaluation.scores import TaskScores
from pcb_peft.evaluation.tables import model_index, text_table


@dataclasses.dataclass(frozen=True, slots=True)
class Evaluation:
    """The share of its tasks that a merge kept. ``print`` it for a table, the worst task first.

    Attributes:
        name: The merge.
        tasks: Scores by task, the worst first.
        settings: What was run: the base model, the texts per task, versions.
        notes: What is worth knowing about how it was measured.
    """

    name: str
    tasks: tuple[TaskScores, ...]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    notes: tuple[str, ...] = ()

    @property
    def lost(self) -> tuple[str, ...]:
        """The names of the tasks that the merge has lost."""
        return tuple(task.name for task in self.tasks if task.lost)

    @property
    def mean_kept(self) -> float | None:
        """The mean share of the adapters' scores that the merge keeps."""
        return self._over_tasks(fmean)

    @property
    def worst_kept(self) -> float | None:
        """The smallest share of an adapter's score that the merge keeps."""
        return self._over_tasks(min)

    def _over_tasks(self, function: Callable[[list[float]], float]) -> float | None:
        kept = [task.kept for task in self.tasks if task.kept is not None]
        return function(kept) if kept else None

    def __getitem__(self, name: str) -> TaskScores:
        return next(task for task in self.tasks if task.name == name)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "name": self.name,
            "lost": list(self.lost),
            "mean_kept": self.mean_kept,
            "worst_kept": self.worst_kept,
            "tasks": [task.as_dict() for task in self.tasks],
            "settings": dict(self.settings),
            "notes": list(self.notes),
        }

    def summary(self) -> list[str]:
        """Sentences: which tasks are lost, what is kept on the whole, and how it was measured."""
        lines = [f"LOST: {', '.join(self.lost)}"] if self.lost else []
        mean, worst = self.mean_kept, self.worst_kept
        if mean is not None and worst is not None:
            name = next(task.name for task in self.tasks if task.kept == worst)
            lines.append(f"{self.name} keeps {mean:.1%} on average, {worst:.1%} of {name}.")
        return [*lines, *self.notes]

    def model_index(self) -> list[dict[str, Any]]:
        """The scores as `model-index` of a model card, as the Hub reads it."""
        return model_index(self.name, self.tasks)

    def __str__(self) -> str:
        return "\n".join([text_table(self.tasks), "", *self.summary()])
