"""Tasks that are ready to run: their data are read, and it is known which model they need."""

import dataclasses
from collections.abc import Sequence

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.base.canonical import LANGUAGE_MODELS
from pcb_peft.errors import OptionError
from pcb_peft.evaluation.host import ModelHost
from pcb_peft.evaluation.intervals import wilson_interval
from pcb_peft.evaluation.pairing import Pair
from pcb_peft.evaluation.scores import Score
from pcb_peft.evaluation.settings import Settings
from pcb_peft.evaluation.subjects import head_parameters
from pcb_peft.evaluation.texts import METRIC, TextTask, read_task
from pcb_peft.plugins.options import did_you_mean
from pcb_peft.runtime.shown import quoted


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """A task that is ready to run.

    Attributes:
        pair: Its name, adapter and data.
        task_type: PEFT's word for the model it needs.
        texts: The texts; None where something else measures.
    """

    pair: Pair
    task_type: str
    texts: TextTask | None = None

    @property
    def name(self) -> str:
        """The task's name."""
        return self.pair.name

    @property
    def adapter(self) -> Adapter | None:
        """The adapter that was trained on it."""
        return self.pair.adapter

    @property
    def metric(self) -> str:
        """The name of its score."""
        if self.texts is not None:
            return METRIC[self.texts.measure]
        return "accuracy" if self.pair.harness_task else "score"

    def content(self, limit: int | None) -> object:
        """Return what tells it from other tasks: a hash of its texts, or its name in the harness and a limit."""
        return self.texts.digest() if self.texts else [self.pair.harness_task, limit]


def jobs_of(
    pairs: Sequence[Pair], host: ModelHost, settings: Settings, task_type: str | None = None
) -> list[Job]:
    """Read the data of all tasks.

    Args:
        pairs: The tasks.
        host: The base model.
        settings: How they are measured.
        task_type: PEFT's word for the model of tasks that no adapter was trained on; None: what the base model says.

    Raises:
        OptionError: Labels are given for a task that is not there, or data and task do not belong together.
    """
    names = [pair.name for pair in pairs]
    for name in settings.labels:
        if name not in names:
            raise OptionError(
                f"labels (--labels) names {quoted(name)}, which is no task here{did_you_mean(name, names)}; the tasks "
                f"are {', '.join(names)}"
            )
    return [_job_of(pair, host, settings, task_type) for pair in pairs]


def _job_of(pair: Pair, host: ModelHost, settings: Settings, task_type: str | None) -> Job:
    """Read one task's data; errors are `read_task`'s."""
    head = head_parameters(pair.adapter)
    stated = pair.adapter.task_type if pair.adapter else task_type
    task_type = "SEQ_CLS" if head else stated or host.task_type()
    if pair.harness_task and task_type not in LANGUAGE_MODELS:
        raise OptionError(
            f"lm-eval:{pair.harness_task} is for language models, and the task type here is {task_type}; give data "
            "with labels (data, --data)"
        )
    if callable(pair.data) or pair.harness_task:
        return Job(pair, task_type)
    classes = pair.adapter.head.classes if pair.adapter and head else None
    if classes is None and task_type == host.task_type() == "SEQ_CLS":
        classes = host.config().num_labels
    texts = read_task(
        pair.name,
        pair.data,  # pyright: ignore[reportArgumentType]
        adapter=pair.adapter,
        task_type=task_type,
        classes=classes,
        measure=settings.measure,
        labels=settings.labels.get(pair.name),
        rename=settings.rename,
        length_normalised=settings.length_normalised,
    )
    return Job(pair, task_type, texts)


def limited(job: Job, count: int | None) -> Job:
    """The same job with at most so many texts."""
    return dataclasses.replace(job, texts=job.texts.first(count)) if job.texts else job


def no_better_than_guessing(job: Job, own: Score) -> list[str]:
    """A note where a task's own adapter scores 0 or less, or no better on its texts than a guess would; else none."""
    if own.value <= 0:
        what = "return a score above 0, such as exp(-loss)"
        if job.texts:
            what = (
                "look whether the texts are those of its task, in the form that it was trained on"
            )
        return [
            f"{job.name}: its own adapter scores {own.value:g}, of which nothing can be kept: {what}"
        ]
    chance = job.texts.chance() if job.texts else 0.0
    if not chance or wilson_interval(sum(own.outcomes), len(own.outcomes))[0] > chance:
        return []
    return [
        f"{job.name}: its own adapter is right on {own.value:.1%} of the texts, no better than a guess ({chance:.1%}): "
        "look whether the texts are those of its task, and the labels in the order of the head's rows"
    ]
