"""Which metric a merge uses: that of random tokens, of texts, or of a file of moments."""

import dataclasses
from pathlib import Path

import torch

from pcb_peft.adapters.source import Source
from pcb_peft.data.moments import MomentsFile, measured_moments, open_moments
from pcb_peft.deltas.metric import ModuleMetric, metric_of
from pcb_peft.errors import MismatchError, OptionError
from pcb_peft.runtime.progress import Track

RANDOM = "random"


@dataclasses.dataclass(frozen=True, slots=True)
class Metric:
    """The metric of every module of a base model.

    Attributes:
        file: The moments that it follows from.
    """

    file: MomentsFile

    def __call__(self, module: str) -> ModuleMetric | None:
        """Return the metric of a module; None for one that is no linear layer: its inputs count alike."""
        moments = self.file.of(module)
        return None if moments is None else metric_of(moments)


def open_metric(
    source: Source,
    base_model: str | None,
    task_type: str | None,
    device: torch.device,
    track: Track,
) -> Metric:
    """Return the metric that a recipe names; measure it if that was not done before.

    Args:
        source: "random", a ``.jsonl`` file of texts, or a file of moments; and its hash, if the recipe knows it.
        base_model: Path or hub id.
        task_type: PEFT's, of the adapters.
        device: Where the base model runs.
        track: Shows progress.

    Raises:
        OptionError: There is no base model to measure, or no such file.
    """
    if source.path.endswith(".safetensors"):
        file = open_moments(Path(source.path))
        if source.sha256 not in (None, file.sha256):
            raise OptionError(
                f"metric: {source.path} has changed: it has SHA-256 {file.sha256}, the recipe says {source.sha256}; "
                "restore it, or take sha256 out of the recipe"
            )
        return Metric(file)
    if source.path != RANDOM and not source.path.endswith(".jsonl"):
        raise OptionError(
            f"metric is {source.path!r}; it must be 'random', a .jsonl file of texts, or a .safetensors file of moments"
        )
    if base_model is None:
        raise OptionError(
            f"metric {source.path!r} is measured on the base model: give base_model too (--base-model)"
        )
    return Metric(measured_moments(base_model, source.path, task_type, device, track))


def check_modules(metric: Metric, modules: dict[str, tuple[int, int]]) -> None:
    """Raises MismatchError if a metric belongs to a model whose layers have other inputs, or other names."""
    known = {module: metric.file.of(module) for module in modules}
    if modules and all(one is None for one in known.values()):
        example, layer = next(iter(modules)), next(iter(metric.file.layers), "none")
        raise MismatchError(
            f"metric: {metric.file.path} knows no module of the adapters, such as {example}; it knows {layer}: it was "
            "measured on another base model"
        )
    for module, (_, size) in modules.items():
        one = known[module]
        if one is not None and len(one.vectors) != size:
            raise MismatchError(
                f"metric: {module} has {size} inputs, and {len(one.vectors)} in {metric.file.path}: it was measured on "
                "another base model"
            )
