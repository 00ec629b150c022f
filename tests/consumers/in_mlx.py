"""mlx-lm: its own directories of adapters, and whole models."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core
import mlx_lm.tuner.utils
import mlx_lm.utils
import torch
from answers import Values, answer, top


def prepare(request: dict[str, Any]) -> Callable[[str], Sequence[Values]]:
    """Load nothing yet: an adapter changes the model that it is loaded into."""

    def compute(directory: str) -> list[Values]:
        whole = bool(directory) and (Path(directory) / "config.json").is_file()
        source = Path(directory if whole else request["base"])
        model, _ = mlx_lm.utils.load_model(source)
        if directory and not whole:
            model = mlx_lm.tuner.utils.load_adapters(model, directory)
        model.set_dtype(mlx.core.float32)
        logits = [model(mlx.core.array([tokens]))[0, -1] for tokens in request["prompts"]]
        return [top(torch.tensor(one.tolist()).log_softmax(-1)) for one in logits]

    return compute


if __name__ == "__main__":
    answer(prepare)
