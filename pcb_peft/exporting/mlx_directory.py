"""A LoRA or a DoRA for mlx-lm: transposed factors, one scale, one rank, and the modules by name.

mlx-lm multiplies the rows of W + scale · ΔW by m / ‖W + scale · ΔW‖, as PEFT does; a directory holds either kind alone.
"""

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from pcb_peft.consumers.mlx import hidden_rope_theta
from pcb_peft.deltas.delta import LowRank, Rescaled
from pcb_peft.errors import OptionError, UnsupportedError
from pcb_peft.exporting.gguf_file import refuse_tied
from pcb_peft.exporting.profile import Profile, Request, in_one_process
from pcb_peft.formats.dora import direction, magnitudes
from pcb_peft.recipes.weights import number_of_layers
from pcb_peft.runtime.shown import typed
from pcb_peft.writing.atomic import replace_directory, write_files
from pcb_peft.writing.targets import writing
from pcb_peft.writing.tensors_file import save_tensors

FILE, CONFIG = "adapters.safetensors", "adapter_config.json"


def _write(request: Request) -> Sequence[str]:
    entries = request.adapter.modules.entries
    if not request.config and any(module.endswith("lm_head") for module in entries):
        raise OptionError(
            "whether the output layer is tied to the embeddings decides whether mlx-lm can load a LoRA on it: give "
            "base_model (--base-model)"
        )
    refuse_tied(request, "mlx-lm has no output layer of its own for it")
    kind = _fine_tune_type(request)
    loras = {
        module: _factors(request, module) for module in request.track(sorted(entries), "convert")
    }
    rank = max(lora.rank for lora, _ in loras.values())
    tensors: dict[str, Tensor] = {}
    for module, (lora, m) in loras.items():
        lora_A, lora_B = lora.padded(rank)
        dtype = request.dtype or torch.float32
        tensors[f"{module}.lora_a"] = lora_A.to(dtype).T.contiguous()
        tensors[f"{module}.lora_b"] = lora_B.to(dtype).T.contiguous()
        if m is not None:
            tensors[f"{module}.m"] = m
    config = {
        "fine_tune_type": kind,
        "num_layers": _layers(request, list(entries)),
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(entries)},
    }
    with replace_directory(
        request.output, overwrite=request.overwrite, inputs=request.adapter.inputs
    ) as directory:
        with writing(request.output):
            save_tensors(tensors, directory / FILE, {"format": "mlx"})
        stated = (json.dumps(config, indent=2) + "\n").encode()
        write_files(directory, request.beside() | {CONFIG: stated})
    name = typed(request.adapter.base_model or "MODEL")
    lines = [f"mlx_lm.generate --model {name} --adapter-path {typed(request.output)} --prompt …"]
    if theta := hidden_rope_theta(request.config):
        lines.append(
            f"add rope_theta = {theta} to the base model's config.json, beside rope_parameters: mlx-lm takes 10000 "
            "otherwise, and computes something else, with and without an adapter"
        )
    return lines


def _fine_tune_type(request: Request) -> str:
    """Return mlx-lm's word for the kind of all modules.

    Raises:
        UnsupportedError: Some are DoRAs, and some are not.
    """
    entries = request.adapter.modules.entries
    doras = [module for module, entry in entries.items() if entry.kind.rescales]
    if doras and len(doras) < len(entries):
        other = min(entries.keys() - set(doras))
        raise UnsupportedError(
            f"{request.adapter.name} has a DoRA on {doras[0]} and a LoRA on {other}, and mlx-lm reads one kind; cut it "
            "to LoRAs (max_rank=64, --max-rank 64), or fold it: --to transformers"
        )
    return "dora" if doras else "lora"


def _factors(request: Request, module: str) -> tuple[LowRank, Tensor | None]:
    """Return a module's LoRA, and the magnitudes of a DoRA."""
    delta = request.adapter.modules.entries[module].load()
    if isinstance(delta, Rescaled):
        whole = delta.without_zero_rows()
        lora, dtype = direction(whole), request.dtype or torch.float32
        rounded = LowRank(lora.lora_A.to(dtype), lora.lora_B.to(dtype), layout=lora.layout)
        return rounded, magnitudes(module, whole, rounded)
    if not isinstance(delta, LowRank):
        raise UnsupportedError(f"{module} is a {delta.kind_name}; cut it to a rank: --max-rank")
    return delta, None


def _layers(request: Request, modules: Sequence[str]) -> int:
    """Return the number of layers; mlx-lm converts the modules by name, wherever they are."""
    if isinstance(count := request.config.get("num_hidden_layers"), int):
        return count
    return number_of_layers(modules)


PROFILE = Profile(
    "mlx",
    "mlx-lm: adapters.safetensors and its configuration",
    frozenset({"output", "dora"}),
    in_one_process(_write),
)
