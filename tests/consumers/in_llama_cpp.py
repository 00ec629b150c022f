"""llama.cpp: its server in this process (xllamacpp), with a GGUF file of the base model beside the base model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import xllamacpp
from answers import TOP, Values, answer


def prepare(request: dict[str, Any]) -> Callable[[str], Sequence[Values]]:
    """Load nothing yet: adapters are given at the start."""

    def compute(directory: str) -> list[Values]:
        settings = xllamacpp.CommonParams()
        settings.model.path = f"{request['base']}.gguf"
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.n_ctx, settings.n_parallel, settings.warmup = 128, 1, False
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        if directory:
            adapter = xllamacpp.CommonAdapterLoraInfo()
            adapter.path, adapter.scale = str(_file(Path(directory))), 1.0
            settings.lora_adapters = [adapter]
        server = xllamacpp.Server(settings)
        return [_next_tokens(server, tokens) for tokens in request["prompts"]]

    return compute


def _file(path: Path) -> Path:
    return next(path.glob("*.gguf")) if path.is_dir() else path


def _next_tokens(server: Any, tokens: Sequence[int]) -> Values:
    request = {"prompt": tokens, "max_tokens": 1, "temperature": 0, "logprobs": TOP}
    request["ignore_eos"] = True  # an answer that ends at once has no log-probabilities
    answered = server.handle_completions(request)
    found = answered["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return {str(token["id"]): token["logprob"] for token in found}


if __name__ == "__main__":
    answer(prepare)
