"""PEFT: `PeftModel.from_pretrained`."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from answers import Values, answer, top
from peft import PeftModel
from transformers import AutoModelForCausalLM


def prepare(request: dict[str, Any]) -> Callable[[str], Sequence[Values]]:
    """Load the base model."""
    base = AutoModelForCausalLM.from_pretrained(request["base"], torch_dtype=torch.float32).eval()
    prompts = [torch.tensor([tokens]) for tokens in request["prompts"]]

    @torch.no_grad()
    def compute(directory: str) -> list[Values]:
        model: Any = copy.deepcopy(base)
        if directory:
            model = PeftModel.from_pretrained(model, directory).eval()
        return [top(model(ids).logits[0, -1].log_softmax(-1)) for ids in prompts]

    return compute


if __name__ == "__main__":
    answer(prepare)
