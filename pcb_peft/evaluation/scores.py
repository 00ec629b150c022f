"""Scores of one task: of the base model, of the task's own adapter and of the merge, with what they say in words."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from pcb_peft.evaluation.intervals import (
    Interval,
    mean_interval,
    paired_p_value,
    wilson_interval,
)

SIGNIFICANT = 0.05
"""The p-value below which two scores on the same texts are said to differ."""


@dataclasses.dataclass(frozen=True, slots=True)
class Score:
    """The score of one model at one task: the higher, the better.

    Attributes:
        value: Accuracy, share of exact matches, 1/perplexity, or what a function of the user's returned.
        outcomes: One number per text, in the order of the texts: 1 or 0 for a right or wrong answer, or the loss. Empty
            where a function of the user's measured.
    """

    value: float
    outcomes: tuple[float, ...] = ()

    @classmethod
    def of(cls, outcomes: Sequence[float], *, losses: bool) -> "Score":
        """The score of these outcomes."""
        mean = fmean(outcomes)
        return cls(math.exp(-mean) if losses else mean, tuple(outcomes))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TaskScores:
    """One task.

    Attributes:
        name: The task's name, which is that of its adapter.
        metric: The name of the score: "accuracy", "exact match", "1/perplexity" …
        texts: How many texts were run; 0 where a function of the user's measured.
        merged: The merge.
        base: The base model without an adapter, with the adapter's head if it has one.
        adapter: The task's own adapter alone; None for a task that no adapter was trained on.
        against: Another merge.
        controls: Adapters that should do badly, by name.
        threshold: The task is lost if the merge keeps a smaller share of the adapter's score than this.
        confidence: The level of the intervals.
    """

    name: str
    metric: str
    texts: int
    merged: Score
    base: Score
    adapter: Score | None = None
    against: Score | None = None
    controls: Mapping[str, Score] = dataclasses.field(default_factory=dict[str, Score])
    threshold: float = 0.8
    confidence: float = 0.95

    @property
    def kept(self) -> float | None:
        """The merge's score as a share of the adapter's own; None without an adapter, or if that scores 0 or less."""
        if self.adapter is None or self.adapter.value <= 0:
            return None
        return self.merged.value / self.adapter.value

    @property
    def gain_kept(self) -> float | None:
        """The share of the adapter's gain over the base model that the merge keeps; None without a gain."""
        if self.adapter is None or self.adapter.value <= self.base.value:
            return None
        return (self.merged.value - self.base.value) / (self.adapter.value - self.base.value)

    def interval(self, score: Score) -> Interval | None:
        """The confidence interval of one of the scores; None where there are no outcomes by text."""
        if not score.outcomes:
            return None
        if self.metric == "1/perplexity":
            low, high = mean_interval(score.outcomes, self.confidence)
            return math.exp(-high), math.exp(-low)
        return wilson_interval(sum(score.outcomes), len(score.outcomes), self.confidence)

    @property
    def lost(self) -> bool:
        """True if the merge has lost the task.

        It keeps less than the threshold, or it is no better than the base model within the noise and keeps less than
        half of what the adapter gained.
        """
        if self.adapter is None or self.kept is None:
            return False
        few = self.gain_kept is not None and self.gain_kept < 0.5
        helps = self._better(self.adapter, self.base)
        return self.kept < self.threshold or (
            helps and few and not self._better(self.merged, self.base)
        )

    @property
    def verdict(self) -> str:
        """The fate of the task, in words."""
        if self.adapter is None:
            return self._verdict_without_adapter()
        if self.kept is None:
            return f"unclear: the adapter alone scores {self.adapter.value:g}, of which nothing can be kept"
        if self.lost:
            return f"LOST: {self._reason()}"
        if not self._better(self.adapter, self.base):
            return "unclear: the adapter alone is not clearly better than the base on these texts"
        if not self._better(self.adapter, self.merged):
            return "kept"
        return "kept in part"

    def _reason(self) -> str:
        if self.kept is not None and self.kept < self.threshold:
            return f"keeps {self.kept:.0%}, less than {self.threshold:.0%}"
        return "not clearly better than the base"

    def _verdict_without_adapter(self) -> str:
        if self._better(self.merged, self.base):
            return "better than the base"
        return (
            "worse than the base" if self._better(self.base, self.merged) else "level with the base"
        )

    def _better(self, first: Score, second: Score) -> bool:
        """True if the first score is higher, by more than noise where there are outcomes by text."""
        if first.value <= second.value:
            return False
        if not (first.outcomes and second.outcomes):
            return True
        return paired_p_value(first.outcomes, second.outcomes) < SIGNIFICANT

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; without the outcomes of single texts."""
        scores = {"base": self.base, "adapter": self.adapter, "against": self.against}
        p_value = (
            paired_p_value(self.merged.outcomes, self.against.outcomes)
            if self.against and self.against.outcomes
            else None
        )
        return {
            "task": self.name,
            "metric": self.metric,
            "texts": self.texts,
            "merged": self.merged.value,
            "interval": self.interval(self.merged),
            **{name: score.value for name, score in scores.items() if score},
            "controls": {name: score.value for name, score in self.controls.items()},
            "kept": self.kept,
            "gain_kept": self.gain_kept,
            "lost": self.lost,
            "verdict": self.verdict,
            "against_p_value": p_value,
        }


def worst_first(tasks: Sequence[TaskScores]) -> tuple[TaskScores, ...]:
    """The tasks in the order in which they need attention: lost ones, then by the share that is kept."""

    def place(task: TaskScores) -> tuple[bool, bool, float]:
        return not task.lost, task.kept is None, task.kept or 0.0

    return tuple(sorted(tasks, key=place))
