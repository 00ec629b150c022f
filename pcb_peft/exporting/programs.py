"""Programs that read an export, each run on prompts: log-probabilities of the next token."""

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.base.config import read_config
from pcb_peft.consumers.mlx import hidden_rope_theta
from pcb_peft.data.live_heads import Head, give_head, wrapped_by_peft
from pcb_peft.data.models import load_base
from pcb_peft.exporting.in_llama_cpp import base_in_gguf, next_tokens


def answers(model: Any, batches: Sequence[Tensor]) -> list[Tensor]:
    """Return log-probabilities of the next token, or of the labels; an encoder's last states count as such."""
    model.eval()
    found: list[Tensor] = []
    for ids in batches:
        encodes = getattr(model.config, "is_encoder_decoder", False)
        start = {"decoder_input_ids": ids[:, :1]} if encodes else {}
        output = model(ids, **start)
        logits = output.logits if "logits" in output else output.last_hidden_state
        last = logits[:, -1] if logits.ndim == 3 else logits
        found.append(last.float().log_softmax(-1))
    return found


COMPARED = 10
OTHER_BASE = 0.02  # largest difference that llama.cpp's rounding makes of the same base model


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """The parts of a computation: the adapter and its head, the base model's files, the result, the base model."""

    adapter: Adapter
    head: Head
    directory: Path
    output: Path
    bare: Any
    batches: Sequence[Tensor]


Found: TypeAlias = tuple[str, "list[Tensor] | str"]


def _in_peft(run: Run) -> Found:
    import peft

    model = wrapped_by_peft(run.bare, {"model_id": str(run.output)}, str(run.output), run.head)
    return f"PEFT {peft.__version__}", answers(model, run.batches)


def _in_transformers(run: Run) -> Found:
    import transformers

    model = load_base(run.output, run.adapter.task_type, torch.float32)
    if run.head:
        give_head(model, run.head, str(run.output))
    return f"transformers {transformers.__version__}", answers(model, run.batches)


def _in_mlx(run: Run) -> Found:
    try:
        mx: Any = importlib.import_module("mlx.core")
        loading: Any = importlib.import_module("mlx_lm.utils")
        tuning: Any = importlib.import_module("mlx_lm.tuner.utils")
    except ImportError:
        return "mlx-lm", "it is not installed (pip install 'mlx[cpu]' mlx-lm)"
    config = read_config(run.directory)
    theta = hidden_rope_theta(config)  # what a user has to add to the base model is added here
    changes = {} if theta is None else {"rope_theta": theta}
    model, _ = loading.load_model(run.directory, model_config=changes)
    model = tuning.load_adapters(model, str(run.output))
    model.set_dtype(mx.float32)
    found: list[Tensor] = []
    for ids in run.batches:
        logits: Any = model(mx.array(ids.tolist()))[:, -1]
        found.append(torch.tensor(logits.astype(mx.float32).tolist()).log_softmax(-1))
    return "mlx-lm", found


def _in_llama_cpp(run: Run) -> Found:
    """Run llama.cpp with a GGUF file of the base model, after a look at whether that file is the base model."""
    if importlib.util.find_spec("xllamacpp") is None:
        return "llama.cpp", "it is not installed (pip install xllamacpp)"
    base = base_in_gguf(run.directory)
    if base is None:
        return "llama.cpp", (
            f"it needs the base model as a GGUF file of 16 or 32 bits: put one into {run.directory} (llama.cpp's "
            "convert_hf_to_gguf.py writes it), or run llama-server with your own"
        )
    plain, prompts = answers(run.bare, run.batches), [ids[0].tolist() for ids in run.batches]
    size = plain[0].shape[-1]
    distance = max(
        float((there - here).abs()[:, here[0].topk(COMPARED).indices].max())
        for there, here in zip(next_tokens(base, None, prompts, size), plain, strict=True)
    )
    if distance > OTHER_BASE:
        return "llama.cpp", (
            f"{base} alone computes something else than {run.directory} (log-probabilities differ by {distance:.2g}); "
            "put one of 16 or 32 bits there"
        )
    return "llama.cpp", next_tokens(base, run.output, prompts, size)


PROGRAMS: dict[str, Callable[[Run], Found]] = {
    "portable": _in_peft,
    "peft": _in_peft,
    "transformers": _in_transformers,
    "mlx": _in_mlx,
    "gguf": _in_llama_cpp,
}
