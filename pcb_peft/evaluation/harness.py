"""Tasks of lm-evaluation-harness, as an extra: ``pip install pcb-peft[lm-eval]``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pcb_peft.data.batches import spread
from pcb_peft.errors import OptionError
from pcb_peft.files.json_text import read_text


def harness_outcomes(
    model: Any, tokenizer: Any, task: str, *, batch_size: int, limit: int | None
) -> list[float]:
    """Run a task of lm-evaluation-harness; one number per document, by the task's first metric.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        task: A name such as "arc_easy", or the path of a task's YAML file.
        batch_size: Documents at a time.
        limit: How many documents to run, evenly spread over those of the task; None: all.

    Raises:
        OptionError: The package is not installed, the task is not known, or it has no number per document.
    """
    evaluator, harness_model, manager = _imported(task)
    wrapped = harness_model(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        found = evaluator.simple_evaluate(
            model=wrapped,
            tasks=[_name(task)],
            samples=_places(_name(task), manager, limit),
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,
        )
    except (KeyError, ValueError, OSError, ImportError) as error:
        raise OptionError(
            f"lm-eval:{task} cannot be run: {error}; see `lm_eval ls tasks` for the names, and note that most tasks "
            "download their data"
        ) from error
    outcomes: list[float] = []
    for name, samples in found["samples"].items():
        metric = _metric(found["configs"][name])
        outcomes += [_number(task, metric, sample) for sample in samples]
    return outcomes


def _places(name: str, manager: Any, limit: int | None) -> dict[str, list[int]] | None:
    """The documents to run, by the name of each task that a name stands for; None for all."""
    if limit is None:
        return None
    tasks = manager.load([name])["tasks"]
    return {key: list(spread(range(len(task.eval_docs)), limit)) for key, task in tasks.items()}


def harness_version() -> str:
    """The version of lm-evaluation-harness.

    Raises:
        OptionError: It is not installed.
    """
    import importlib.metadata

    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError as error:
        raise OptionError(_MISSING) from error


_MISSING = "tasks of lm-evaluation-harness need another package: pip install 'pcb-peft[lm-eval]'"


def _imported(task: str) -> tuple[Any, Any, Any]:
    """The evaluator, the class that wraps a model, and the tasks it knows; beside a YAML file those of its folder."""
    try:
        from lm_eval import evaluator  # pyright: ignore
        from lm_eval.models.huggingface import HFLM  # pyright: ignore
        from lm_eval.tasks import TaskManager  # pyright: ignore
    except ImportError as error:
        raise OptionError(_MISSING) from error
    folder = str(Path(task).parent) if _is_file(task) else None
    return evaluator, HFLM, TaskManager(include_path=folder)


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _name(task: str) -> str:
    """The name of a task; that in its YAML file where one is given."""
    if not _is_file(task):
        return task
    lines = read_text(Path(task), OptionError, "give the file of a task").splitlines()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("task:")]
    if not named:
        raise OptionError(
            f"{task} has no line `task: NAME`; it is no task of lm-evaluation-harness"
        )
    return named[0]


def _metric(config: Mapping[str, Any]) -> str:
    """The first metric of a task."""
    metrics = config.get("metric_list") or [{"metric": "acc"}]
    return str(metrics[0]["metric"])


def _number(task: str, metric: str, sample: Mapping[str, Any]) -> float:
    value = sample.get(metric)
    if not isinstance(value, int | float):
        raise OptionError(
            f"lm-eval:{task}: its metric {metric} is not a number per document, but {value!r}; choose a task with "
            "accuracy or exact match"
        )
    return float(value)
