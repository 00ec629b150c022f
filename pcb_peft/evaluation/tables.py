"""Scores as a table: for a terminal, in Markdown, and as metadata of a model card."""

from collections.abc import Sequence
from typing import Any

from pcb_peft.evaluation.scores import Score, TaskScores
from pcb_peft.runtime.tables import table

METRICS = {"accuracy": "accuracy", "exact match": "exact_match", "1/perplexity": "perplexity"}
"""Names of the Hub's metrics."""


def text_table(tasks: Sequence[TaskScores]) -> str:
    """The table for a terminal."""
    return table(*_cells(tasks), words_last=True)


def markdown_table(tasks: Sequence[TaskScores]) -> str:
    """The table in Markdown."""
    header, rows = _cells(tasks)
    lines = [header, ["---", *["---:"] * (len(header) - 2), "---"], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def model_index(name: str, tasks: Sequence[TaskScores]) -> list[dict[str, Any]]:
    """The scores as `model-index` of a model card, as the Hub reads it."""
    results: list[dict[str, Any]] = []
    for task in tasks:
        metric = METRICS.get(task.metric, task.metric)
        value = 1 / task.merged.value if metric == "perplexity" else task.merged.value
        kind = "text-classification" if task.metric == "accuracy" else "text-generation"
        results.append(
            {
                "task": {"type": kind},
                "dataset": {"name": task.name, "type": task.name},
                "metrics": [{"type": metric, "value": round(value, 4), "name": task.metric}],
            }
        )
    return [{"name": name, "results": results}]


def _cells(tasks: Sequence[TaskScores]) -> tuple[list[str], list[list[str]]]:
    """The heads of the columns, and the rows; columns that no task fills are left out."""
    controls = list(dict.fromkeys(name for task in tasks for name in task.controls))
    metrics = {task.metric for task in tasks}
    title = f"{metrics.pop()}, %" if len(metrics) == 1 and metrics <= METRICS.keys() else "task"
    columns: dict[str, list[str]] = {
        title: [task.name for task in tasks],
        "metric": [task.metric if title == "task" else "-" for task in tasks],
        "texts": [str(task.texts or "-") for task in tasks],
        "base": [_number(task, task.base) for task in tasks],
        **{
            control: [_number(task, task.controls.get(control)) for task in tasks]
            for control in controls
        },
        "adapter": [_number(task, task.adapter) for task in tasks],
        "merge": [_with_interval(task, task.merged) for task in tasks],
        "other merge": [_against(task) for task in tasks],
        "kept": [_percent(task.kept) for task in tasks],
        "gain kept": [_percent(task.gain_kept) for task in tasks],
        "verdict": [task.verdict for task in tasks],
    }
    shown = {name: cells for name, cells in columns.items() if any(cell != "-" for cell in cells)}
    rows = [list(row) for row in zip(*shown.values(), strict=True)]
    return list(shown), rows


def _against(task: TaskScores) -> str:
    if task.against is None:
        return "-"
    p_value = task.as_dict()["against_p_value"]
    return _number(task, task.against) + (f" (p={p_value:.2g})" if p_value is not None else "")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(task: TaskScores, score: Score | None) -> str:
    if score is None:
        return "-"
    return _shown(task, score.value)


def _shown(task: TaskScores, value: float) -> str:
    """Percent of what is a share; other numbers as they are."""
    return f"{100 * value:.1f}" if task.metric in METRICS else f"{value:.4g}"


def _with_interval(task: TaskScores, score: Score) -> str:
    interval = task.interval(score)
    if interval is None:
        return _shown(task, score.value)
    low, high = (_shown(task, end) for end in interval)
    return f"{_shown(task, score.value)} ({low}–{high})"
