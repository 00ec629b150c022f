"""Scores of merges, and the tables of `quality.py`."""

import dataclasses
from collections.abc import Mapping, Sequence
from statistics import fmean

from pcb_peft.evaluation.classification import Task


@dataclasses.dataclass(frozen=True, slots=True)
class Score:
    """Accuracies by task, relative to the task's own adapter: 1 is as good."""

    by_task: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Return the mean over the tasks."""
        return fmean(self.by_task)

    @property
    def worst(self) -> float:
        """Return the score of the worst task."""
        return min(self.by_task)


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """A line of the table.

    Attributes:
        label: The setting.
        scores: By common weight: those tried.
        seconds: What the merge took.
    """

    label: str
    scores: Mapping[float, Score]
    seconds: float

    @property
    def best(self) -> float:
        """Return the common weight with the highest mean."""
        return max(self.scores, key=lambda scale: self.scores[scale].mean)

    @property
    def line(self) -> str:
        """Return the line of a table with a search for the best common weight."""
        plain, best = self.scores[1.0], self.scores[self.best]
        found = [*_percent(plain), f"{self.best:g}", *_percent(best), f"{self.seconds:.1f}"]
        return _row(self.label, *found, _by_task(best))

    @property
    def line_at_one(self) -> str:
        """Return the line of a table without a search."""
        score = self.scores[1.0]
        return _row(self.label, *_percent(score), f"{self.seconds:.1f}", _by_task(score))


def table(tasks: Sequence[Task], own: Sequence[float], results: Sequence[Result]) -> str:
    """Return the results as a Markdown table, the best at its best common weight first.

    Args:
        tasks: The tasks.
        own: The accuracy of each task's own adapter.
        results: The lines.
    """
    alone = ", ".join(
        f"{task.name} {100 * alone:.1f}" for task, alone in zip(tasks, own, strict=True)
    )
    count = sum(len(task.texts) for task in tasks)
    ordered = sorted(results, key=lambda result: -result.scores[result.best].mean)
    if all(result.scores.keys() == {1.0} for result in results):
        head = ("setting", "mean at 1", "worst at 1", "merge, s", "by task")
        lines = [result.line_at_one for result in ordered]
    else:
        searched = ("best weight", "mean", "worst", "merge, s", "by task")
        head = ("setting", "mean at 1", "worst at 1", *searched)
        lines = [result.line for result in ordered]
    title = (
        f"Accuracy over {count} texts of {len(tasks)} tasks, in % of each adapter's own: {alone}."
    )
    return _table(title, head, lines)


def table_of_subsets(count: int, results: Mapping[str, Sequence[Score]]) -> str:
    """Return a Markdown table of merges of some of the adapters.

    Args:
        count: The number of adapters in a merge.
        results: By setting: the score of each merge.
    """
    merges = len(next(iter(results.values())))
    title = (
        f"All {merges} merges of {count} adapters, each on its own tasks, with every weight at 1."
    )
    head = ("setting", "mean", "mean of the worst", "lowest")
    return _table(title, head, [line_of_subsets(*row) for row in results.items()])


def line_of_subsets(label: str, scores: Sequence[Score]) -> str:
    """Return the line of a setting that merged several sets of adapters."""
    means, worst = [score.mean for score in scores], [score.worst for score in scores]
    numbers = fmean(means), fmean(worst), min(worst)
    return _row(label, *(f"{100 * number:.1f}" for number in numbers))


def _table(title: str, head: Sequence[str], lines: Sequence[str]) -> str:
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines]
    return "\n".join([title, "", *rows]) + "\n"


def _row(label: str, *cells: str) -> str:
    return f"| {' | '.join([f'`{label}`', *cells])} |"


def _percent(score: Score) -> tuple[str, str]:
    return f"{100 * score.mean:.1f}", f"{100 * score.worst:.1f}"


def _by_task(score: Score) -> str:
    return " ".join(f"{100 * value:.0f}" for value in score.by_task)
