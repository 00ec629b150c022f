"""CTranslate2: whole models, converted."""

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import ctranslate2
import numpy as np
import torch
from answers import Values, answer, top
from ctranslate2.converters import TransformersConverter


def prepare(request: dict[str, Any]) -> Callable[[str], Sequence[Values]]:
    """Load nothing yet: every directory is a model."""

    def compute(directory: str) -> list[Values]:
        with tempfile.TemporaryDirectory() as folder:
            source = directory or request["base"]
            TransformersConverter(source).convert(folder, force=True)
            model = ctranslate2.Generator(folder, compute_type="float32")
            logits = [model.forward_batch([tokens]) for tokens in request["prompts"]]
            last = [torch.from_numpy(np.array(one))[0, -1] for one in logits]
            return [top(one.float().log_softmax(-1)) for one in last]

    return compute


if __name__ == "__main__":
    answer(prepare)
