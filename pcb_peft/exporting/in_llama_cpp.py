"""llama.cpp in a process of its own: it prints, and it aborts its process where an adapter does not fit."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcb_peft.errors import MismatchError
from pcb_peft.files.gguf import is_adapter

ANSWERED = 200  # tokens whose log-probabilities are asked for


def base_in_gguf(directory: Path) -> Path | None:
    """Return the largest GGUF file of a whole model inside a base model's directory, or the one beside it."""
    files = [file for file in directory.glob("*.gguf") if not is_adapter(file)]
    beside = Path(f"{directory}.gguf")
    if files:
        return max(files, key=lambda file: file.stat().st_size)
    return beside if beside.is_file() else None


def next_tokens(
    base: Path, adapter: Path | None, prompts: Sequence[Sequence[int]], size: int
) -> list[Tensor]:
    """Return log-probabilities of the next token after each prompt.

    Args:
        base: GGUF file of the base model.
        adapter: GGUF file of a LoRA, or a directory with one; None for the base model alone.
        prompts: Tokens.
        size: Number of tokens of the model.

    Returns:
        (1, size) each. Tokens that llama.cpp finds unlikely have the value of the least likely one that it told.

    Raises:
        MismatchError: llama.cpp does not load the files.
    """
    file = next(adapter.glob("*.gguf")) if adapter is not None and adapter.is_dir() else adapter
    request = {
        "base": str(base),
        "adapter": None if file is None else str(file),
        "prompts": prompts,
        "threads": torch.get_num_threads(),
    }
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise MismatchError(
            f"llama.cpp does not load {file or base} on {base}: {reason}; is this the base model that the adapter was "
            "trained on?"
        )
    found: list[Tensor] = []
    for told in json.loads(done.stdout):
        values = torch.full((1, size), min(told.values()))
        for token, value in told.items():
            values[0, int(token)] = value
        found.append(values)
    return found


def _answer(request: dict[str, Any]) -> list[dict[int, float]]:
    """Start llama.cpp's server in this process, and ask it for one token after each prompt."""
    xllamacpp: Any = importlib.import_module("xllamacpp")
    settings = xllamacpp.CommonParams()
    settings.model.path = request["base"]
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.n_ctx, settings.n_parallel, settings.warmup = 256, 1, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = request["threads"]
    if request["adapter"]:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = request["adapter"], 1.0
        settings.lora_adapters = [adapter]
    server = xllamacpp.Server(settings)
    return [_most_likely(server, tokens) for tokens in request["prompts"]]


def _most_likely(server: Any, tokens: Sequence[int]) -> dict[int, float]:
    asked = {"prompt": tokens, "max_tokens": 1, "temperature": 0, "logprobs": ANSWERED}
    asked["ignore_eos"] = True  # an answer that ends at once has no log-probabilities
    answered = server.handle_completions(asked)
    return {
        token["id"]: token["logprob"]
        for token in answered["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    }


def main() -> None:
    """Answer the request on standard input."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # llama.cpp prints to both
    json.dump(_answer(json.load(sys.stdin)), lines)
    lines.close()


if __name__ == "__main__":
    main()
