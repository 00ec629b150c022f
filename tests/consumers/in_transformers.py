"""transformers alone: `load_adapter` for an adapter, `from_pretrained` for a whole model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from answers import Values, answer, top
from transformers import AutoModelForCausalLM


def prepare(request: dict[str, Any]) -> Callable[[str], Sequence[Values]]:
    """Load nothing yet: every directory gets a model of its own."""
    prompts = [torch.tensor([tokens]) for tokens in request["prompts"]]

    @torch.no_grad()
    def compute(directory: str) -> list[Values]:
        whole = (Path(directory) / "config.json").is_file()
        source = directory if directory and whole else request["base"]
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        if directory and not whole:
            model.load_adapter(directory)
        return [top(model(ids).logits[0, -1].log_softmax(-1)) for ids in prompts]

    return compute


if __name__ == "__main__":
    answer(prepare)
