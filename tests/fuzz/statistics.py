"""Files of statistics of a task, and of moments of a base model's layers, used by merges."""

from pathlib import Path
from random import Random
from typing import Any

import torch

from fuzz import examples, folders
from fuzz.adapters import finite
from fuzz.cases import Attempt
from fuzz.tensors import mutated_safetensors
from fuzz.values import Steps
from pcb_peft import TaskStatistics, load_adapter, merge_adapters
from pcb_peft.data.moments import measure_moments, random_tokens, save_moments
from pcb_peft.data.statistics_file import save_statistics
from pcb_peft.runtime.progress import tracker

METHODS = {"gram": "regmean", "gradient": "sta"}


def prepare(directory: Path) -> Attempt:
    """Prepare the surface."""
    adapters = [examples.llama_adapter(seed) for seed in (1, 2)]
    files = {
        kind: [
            _statistics(directory / f"{kind}{number}", adapter, kind)
            for number, adapter in enumerate(adapters)
        ]
        for kind in METHODS
    }
    moments = _moments(directory / "moments.safetensors")

    def attempt(rng: Random, steps: Steps) -> Any:
        kind = rng.choice((*METHODS, "metric"))
        original = moments if kind == "metric" else files[kind][0]
        steps.append(kind)
        folders.write(
            directory / "broken",
            {"x.safetensors": mutated_safetensors(original.read_bytes(), rng, steps)},
        )
        if rng.random() < 0.03:
            folders.spoil(directory / "broken", rng, steps)
        file = directory / "broken" / "x.safetensors"
        if kind == "metric":
            merged = merge_adapters(
                adapters,
                "linear",
                metric=file,
                rank=2,
                base_model=examples.base("llama"),
                progress=False,
            )
        else:
            merged = merge_adapters(
                adapters, METHODS[kind], statistics=[file, files[kind][1]], progress=False
            )
        for module in merged.modules:
            finite(merged.delta(module), module)
        return "merged"

    return attempt


def _statistics(path: Path, directory: Path, kind: str) -> Path:
    adapter = load_adapter(directory)
    generator = torch.Generator().manual_seed(1)
    matrices: dict[str, torch.Tensor] = {}
    for module, entry in adapter.modules.entries.items():
        rows, columns = entry.shape
        values = torch.randn(rows if kind == "gradient" else columns, columns, generator=generator)
        matrices[module] = values @ values.T if kind == "gram" else values
    shapes = {module: tuple(values.shape) for module, values in matrices.items()}
    assert adapter.source is not None
    sha256 = adapter.source.sha256
    save_statistics(TaskStatistics(kind, shapes, matrices.__getitem__, 9, sha256), path)
    return path


def _moments(path: Path) -> Path:
    model = examples.workshop().model("llama")
    save_moments(measure_moments(model, random_tokens(model), tracker(False)), path)
    return path
