"""The metric of a merge: of random tokens, of texts, of a file of moments, or of the adapters' own statistics."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from pcb_peft.adapters.source import Source
from pcb_peft.data.moments import MomentsFile, measured_moments, moments_of_gram, open_moments
from pcb_peft.data.statistics_file import TaskStatistics
from pcb_peft.deltas.metric import ModuleMetric, Moments, metric_of
from pcb_peft.errors import MismatchError, OptionError
from pcb_peft.runtime.progress import Track

RANDOM, STATISTICS = "random", "statistics"
ALLOWED = (
    "'random', a .jsonl file of texts, a .safetensors file of moments, or 'statistics' (of kind gram, one file per "
    "adapter)"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Metric:
    """The metric of every module of a base model.

    Attributes:
        moments: From a module to the second moments of its inputs; None for one that was not measured.
        sha256: The hash of the file that they come from, if there is one.
        unmeasured: The modules of the adapters that are no linear layers of the base model.
    """

    moments: Callable[[str], Moments | None]
    sha256: str | None = None
    unmeasured: Sequence[str] = ()

    def __call__(self, module: str) -> ModuleMetric | None:
        """Return the metric of a module; None for one that is no linear layer: its inputs count alike."""
        moments = self.moments(module)
        return None if moments is None else metric_of(moments)


@dataclasses.dataclass(frozen=True, slots=True)
class MeanOfStatistics:
    """The mean of what the adapters' modules see on the texts of their own tasks.

    Attributes:
        statistics: Of kind gram, one per adapter.
        shapes: From a module to (out, in).
    """

    statistics: Sequence[TaskStatistics]
    shapes: Mapping[str, tuple[int, int]]

    def __call__(self, module: str) -> Moments:
        grams = [one.of(module, self.shapes[module]) for one in self.statistics]
        return moments_of_gram(torch.stack(grams).double().mean(0))


@dataclasses.dataclass(frozen=True, slots=True)
class Subject:
    """The merge that asks for a metric.

    Attributes:
        base_model: Path or hub id, if one was given.
        dequantize: Compute its weights from their codes, where it is quantised.
        task_type: PEFT's, of the adapters.
        shapes: From a module to (out, in).
        statistics: One per adapter, if they were given.
    """

    base_model: str | None
    dequantize: bool
    task_type: str | None
    shapes: Mapping[str, tuple[int, int]]
    statistics: Sequence[TaskStatistics]


def is_measured(given: str) -> bool:
    """Return whether a metric is measured on the base model."""
    return given == RANDOM or given.endswith(".jsonl")


def check_source(source: Source, base_model: str | None, statistic: str | None) -> None:
    """Check that a metric can be had, before anything is read.

    Args:
        source: What the user gave.
        base_model: Path or hub id, if one was given.
        statistic: The kind of the statistics that are given, if there are any.

    Raises:
        OptionError: It cannot.
    """
    measured = is_measured(source.path)
    if not (measured or source.path == STATISTICS or source.path.endswith(".safetensors")):
        raise OptionError(f"metric is {source.path!r}; it must be {ALLOWED}")
    if measured and base_model is None:
        raise OptionError(
            f"metric {source.path!r} is measured on the base model: give base_model too (--base-model)"
        )
    if source.path == STATISTICS and statistic != "gram":
        raise OptionError(
            "metric='statistics' needs statistics of kind gram of each adapter: `pcb-peft collect ADAPTER --kind gram` "
            "collects them, statistics=[…] or --statistics passes them to the merge"
        )


def open_metric(source: Source, subject: Subject, device: torch.device, track: Track) -> Metric:
    """Return the metric that a recipe names; measure it if that was not done before.

    Args:
        source: What the user gave, and the hash that the recipe knows.
        subject: The merge.
        device: Where the base model runs.
        track: Shows progress.

    Raises:
        OptionError: There is no such file, or another one than the recipe's.
        MismatchError: The file belongs to another base model.
    """
    if source.path == STATISTICS:
        return Metric(MeanOfStatistics(subject.statistics, subject.shapes))
    file = _opened(source, subject, device, track)
    _refuse_other_model(file, subject.shapes)
    return Metric(
        file.of, file.sha256, [name for name in subject.shapes if name not in file.layers]
    )


def _opened(source: Source, subject: Subject, device: torch.device, track: Track) -> MomentsFile:
    if source.path.endswith(".safetensors"):
        file = open_moments(Path(source.path))
        if source.sha256 not in (None, file.sha256):
            raise OptionError(
                f"metric: {source.path} has changed: it has SHA-256 {file.sha256}, the recipe says {source.sha256}; "
                "restore it, or take sha256 out of the recipe"
            )
        return file
    return measured_moments(
        str(subject.base_model),  # `check_source` has seen it
        source.path,
        subject.task_type,
        device,
        track,
        dequantize=subject.dequantize,
    )


def _refuse_other_model(file: MomentsFile, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raises MismatchError if a file of moments knows none of the modules, or with other inputs."""
    where = file.tensors.where
    known = {module: file.of(module) for module in shapes}
    if shapes and all(one is None for one in known.values()):
        example, layer = next(iter(shapes)), next(iter(file.layers), "none")
        raise MismatchError(
            f"metric: {where} knows no module of the adapters, such as {example}; it knows {layer}: it was "
            "measured on another base model"
        )
    for module, (_, size) in shapes.items():
        one = known[module]
        if one is not None and len(one.vectors) != size:
            raise MismatchError(
                f"metric: {module} has {size} inputs, and {len(one.vectors)} in {where}: it was measured on "
                "another base model"
            )
